"""What is changed after a rollback and after the last one, and that it ends."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from sb3_contrib import CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft import TD3C, CollapseGuard
from sb3_offline_ft.collapse.signals import greedy_actions, policy_distance
from tests.guarded_runs import BASELINE, At, make, make_td3, of, parameters, ruin, same, small


def moved(model: Any, gradient_steps: int) -> tuple[float, float]:
    """How far actor and critic move in updates of the learner."""
    networks = (model.actor, model.critic)
    before = [[value.detach().clone() for value in network.parameters()] for network in networks]
    model.train(gradient_steps, 32)
    after = [[value.detach() for value in network.parameters()] for network in networks]
    actor, critic = (
        math.sqrt(sum(float((a - b).pow(2).sum()) for a, b in zip(*pair, strict=True)))
        for pair in zip(before, after, strict=True)
    )
    return actor, critic


def moved_after_rollback(
    remedy: dict[str, Any], steps: int, gradient_steps: int
) -> tuple[Any, CollapseGuard, tuple[float, float]]:
    """A learner, its guard, and how far updates move it some steps after a rollback at about step 310."""
    model, distances = make_td3(), []
    guard = CollapseGuard(remedies=[remedy], promotion_episodes=1000, verbose=0)
    last = At([300 + steps], lambda model: distances.append(moved(model, gradient_steps)))
    model.learn(300 + steps, callback=[guard, At([300], ruin), last])
    assert guard.rollbacks == 1
    return model, guard, distances[0]


def test_a_slower_actor_moves_less() -> None:
    distances = {}
    for factor in (1.0, 0.1):
        model, _, distances[factor] = moved_after_rollback({"slower_actor": {"factor": factor}}, steps=200, gradient_steps=2)
        assert [group["lr"] for group in model.actor.optimizer.param_groups] == [1e-5]
    assert distances[0.1][0] < 0.5 * distances[1.0][0]


def test_a_critic_warmup_holds_the_policy_and_ends() -> None:
    warmup = {"critic_warmup": {"steps": 400}}
    _, _, (actor, critic) = moved_after_rollback(warmup, steps=300, gradient_steps=20)
    assert actor == 0 and critic > 0
    _, guard, (actor, _) = moved_after_rollback(warmup, steps=900, gradient_steps=20)
    assert of(guard, "release")[0]["name"] == "critic_warmup"
    assert actor > 0


def test_a_trust_region_is_never_left() -> None:
    class Look(BaseCallback):
        largest: ClassVar[list[float]] = []

        def _on_rollout_start(self) -> None:
            model: Any = self.model
            if guard.rollbacks:
                rows = th.from_numpy(model.replay_buffer.observations[: model.replay_buffer.pos, 0])
                now, center = greedy_actions(model, rows), greedy_actions(model, rows, guard.last_good.policy_state)
                self.largest.append(policy_distance(now, center))

        def _on_step(self) -> bool:
            return True

    model = make_td3(learning_rate=3e-2)
    guard = CollapseGuard(remedies=[{"trust_region": {"radius": 1e-3}}], max_rollbacks=50, promotion_episodes=1000, verbose=0)
    model.learn(1500, callback=[guard, At([300], ruin), Look()])
    assert guard.rollbacks >= 1
    # Measured on other states than those the region is kept on
    assert max(Look.largest) < 3e-3
    assert max(Look.largest) > 1e-5


def test_a_tighter_constraint_and_more_offline_data() -> None:
    model = TD3C(
        "MlpPolicy",
        make_vec_env("Pendulum-v1", seed=0),
        **small(),
        dataset="bundled:pendulum-medium",
        offline_steps=50,
        warmup_steps=1200,
        batch_size=32,
        train_freq=100,
        gradient_steps=1,
        constraint_reference="pretrained",
        epsilon="lin_0.02_0.01",
        offline_fraction=0.5,
    )
    guard = CollapseGuard(remedies=["tighter_constraint", "more_offline_data", {"warmup": {"steps": 300}}], verbose=0)

    @th.no_grad()
    def spoil(model: Any) -> None:
        model.actor.mu[0].weight.fill_(math.nan)

    model.learn(2000, callback=[guard, At([1500], spoil)])
    assert guard.rollbacks == 1
    assert model.epsilon == "lin_0.01_0.005"
    assert model.offline_fraction == 0.75 == model.replay_buffer.offline_fraction  # type: ignore[union-attr]
    # 50 offline updates, none up to step 1800 after the rollback, then one at 1900 and one at 2000
    assert of(guard, "alarm")[0]["timestep"] == 1500
    assert guard.events[-1]["n_updates"] == 52
    assert model.first_warmup_end == 1200


def test_remedies_that_do_not_fit_are_refused_if_asked_for_and_left_out_otherwise() -> None:
    for name in ("tighter_constraint", "more_offline_data", "warmup"):
        with pytest.raises(ValueError, match=name):
            make_td3().learn(10, callback=CollapseGuard(remedies=[name], verbose=0))
    guard = CollapseGuard(verbose=0)
    make_td3().learn(10, callback=guard)
    assert of(guard, "start")[0]["settings"]["remedies"] == ["critic_warmup", "trust_region"]


@pytest.mark.parametrize("algorithm", [TD3, SAC, CrossQ])
def test_a_frozen_policy_stays_what_it_was_whatever_the_critics_do(algorithm: type[OffPolicyAlgorithm]) -> None:
    @th.no_grad()
    def spoil(model: Any) -> None:
        for value in model.critic.parameters():
            value.fill_(math.nan)

    model = make(algorithm)
    guard = CollapseGuard(baseline=BASELINE, max_rollbacks=0, secondary_alarms={"td_error": -1.0}, signal_freq=150, verbose=0)
    model.learn(300, callback=[guard, At([200], spoil)])
    assert of(guard, "escalation")[0]["action"] == "freeze"
    actor = {name: value for name, value in model.policy.state_dict().items() if name.startswith("actor.")}
    last_good = guard.last_good.policy_state
    assert all(th.equal(value, last_good[name]) for name, value in actor.items())


@pytest.mark.parametrize("ending", ["freeze", "stop", "continue"])
def test_what_happens_after_the_last_rollback(ending: str) -> None:
    model = make_td3()
    guard = CollapseGuard(remedies=[], max_rollbacks=1, after_max_rollbacks=ending, verbose=0)
    model.learn(1500, callback=[guard, At([300, 600], ruin)])
    assert (guard.rollbacks, guard.alarms) == (1, 2)
    (escalation,) = of(guard, "escalation")
    assert escalation["action"] == ending
    assert (model.num_timesteps < 1500) == (ending == "stop")
    returns = np.array([event["return"] for event in of(guard, "episode")])
    actor = {name: value for name, value in model.policy.state_dict().items() if name.startswith("actor.")}
    last_good = guard.last_good.policy_state
    restored = all(th.equal(value, last_good[name]) for name, value in actor.items())
    assert restored == (ending != "continue")
    assert (returns[-5:].mean() > 5) == (ending == "freeze")


def test_brakes_do_not_outlive_the_run_they_were_made_for() -> None:
    model = make_td3()
    model.learn(400, callback=[CollapseGuard(verbose=0), At([300], ruin)])
    model.learn(200, callback=CollapseGuard(verbose=0))
    assert moved(model, 20)[0] > 0


def test_a_brake_does_not_survive_an_interrupt() -> None:
    def interrupt(model: OffPolicyAlgorithm) -> None:
        raise KeyboardInterrupt

    for guards in ([], [CollapseGuard(verbose=0)]):
        model = make_td3()
        with pytest.raises(KeyboardInterrupt):
            model.learn(900, callback=[CollapseGuard(verbose=0), At([300], ruin), At([500], interrupt)])
        before = parameters(model)
        model.learn(300, callback=[*guards])
        actor = [name for name in model.policy.state_dict() if name.startswith("actor.")]
        assert not same(before[: len(actor)], parameters(model)[: len(actor)])
