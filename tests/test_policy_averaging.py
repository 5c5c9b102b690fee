"""A policy that is the moving average of what gradient steps make of it: what is averaged, who sees it, that it survives."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import TD3BC, TD3C, LearnerSnapshot, OfflineTD3
from sb3_offline_ft.collapse.remedies import PolicyBrake
from sb3_offline_ft.collapse.signals import greedy_actions, policy_distance
from tests.hooks import last_observations

ENV = "Pendulum-v1"
DATASET = "bundled:pendulum-medium"
WARMUP = 20


def make(algorithm: type[OfflineTD3] = TD3BC, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dataset": DATASET, "policy_kwargs": {"net_arch": [8, 8]}, "seed": 0, "device": "cpu"}
    defaults |= {"batch_size": 8, "offline_steps": 10, "warmup_steps": WARMUP, "policy_averaging": 0.9}
    return algorithm("MlpPolicy", ENV, **(defaults | settings))


def weights(model: Any) -> dict[str, th.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.actor.named_parameters()}


def learned(model: Any) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.acting.learned_weights.values.items()}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


class Record(BaseCallback):
    """The policy, the learned weights, the target policy and the action at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.policies: list[dict[str, th.Tensor]] = []
        self.learned: list[dict[str, th.Tensor] | None] = []
        self.targets: list[dict[str, th.Tensor]] = []
        self.is_own_action: list[bool] = []

    def _on_step(self) -> bool:
        model: Any = self.model
        self.policies.append(weights(model))
        self.learned.append(None if model.acting.learned_weights is None else learned(model))
        self.targets.append({name: value.detach().clone() for name, value in model.actor_target.named_parameters()})
        own, _ = model.predict(last_observations(model))
        self.is_own_action.append(bool(np.allclose(own, self.locals["actions"])))
        return True


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_the_policy_is_the_moving_average_and_learning_goes_on_from_its_own_weights(kernel: str) -> None:
    """With batches of logged data only, learning does not depend on who acts: it is that without an average, to the bit."""
    averaging, plain = Record(), Record()
    make(kernel=kernel, offline_fraction=1.0).learn(60, callback=averaging)
    make(kernel=kernel, offline_fraction=1.0, policy_averaging=0.0).learn(60, callback=plain)
    assert all(entry is None for entry in plain.learned)
    average, updates = plain.policies[WARMUP], 0
    for step in range(60):
        now = averaging.learned[step]
        assert now is None or same(now, plain.policies[step])
        assert same(averaging.targets[step], plain.targets[step])
        if not same(plain.policies[step], plain.policies[step - 1]) and step > 0:
            updates += 1
            average = {name: 0.9 * value + 0.1 * plain.policies[step][name] for name, value in average.items()}
        for name, value in averaging.policies[step].items():
            th.testing.assert_close(value, average[name])
        assert averaging.is_own_action[step]
    assert updates == (60 - WARMUP - 1) // 2


def test_pretraining_is_not_averaged_and_each_finetuning_run_begins_anew() -> None:
    model, plain = make(), make(policy_averaging=0.0)
    assert same(weights(model.pretrain()), weights(plain.pretrain()))
    model.learn(50)
    assert not same(learned(model), weights(model))
    before = weights(model)
    model.learn(WARMUP + 1)
    assert same(weights(model), before) and same(learned(model), before)


def test_a_run_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    model = make(TD3C, constraint_reference="pretrained").learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded: Any = TD3C.load(tmp_path / "model", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert same(weights(loaded), weights(model)) and same(learned(loaded), learned(model))
    # To plain TD3 it is the policy that acted
    observation = np.array([[0.1, -0.2, 0.3]], dtype=np.float32)
    assert np.array_equal(TD3.load(tmp_path / "model").predict(observation)[0], model.predict(observation)[0])
    for each in (model, loaded):
        each.set_random_seed(3)
        each.learn(0, reset_num_timesteps=False)
        each.train(20, 8)
    assert same(weights(loaded), weights(model)) and same(learned(loaded), learned(model))


def test_parameters_from_elsewhere_are_learned_on() -> None:
    model = make().learn(50)
    other = make(seed=1).learn(50)
    model.set_parameters(other.get_parameters())
    assert same(weights(model), weights(other)) and same(learned(model), weights(other))


def test_what_has_no_average_gets_one_with_its_next_run(tmp_path: Path) -> None:
    make(policy_averaging=0.0).learn(50).save(tmp_path / "plain")
    loaded: Any = TD3BC.load(tmp_path / "plain", env=gym.make(ENV), policy_averaging=0.5)
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.acting.learned_weights is None
    loaded.learn(50)
    assert not same(weights(loaded), learned(loaded))
    untrained = make(TD3C, offline_steps=0)
    with pytest.warns(UserWarning, match="no pretrained policy"):
        untrained.learn(50)
    assert untrained.acting.learned_weights is None


def test_a_rollback_restores_the_average_and_the_learned_weights() -> None:
    model = make().learn(50)
    snapshot = LearnerSnapshot.take(model)
    policy, values = weights(model), learned(model)
    model.train(10, 8)
    assert not same(weights(model), policy)
    expected = weights(model), learned(model)
    snapshot.restore(model)
    assert same(weights(model), policy) and same(learned(model), values)
    model.train(10, 8)
    assert same(weights(model), expected[0]) and same(learned(model), expected[1])


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
def test_a_hold_leaves_the_average_and_the_learned_weights_as_they_are(algorithm: type[OfflineTD3], kernel: str) -> None:
    settings = {"constraint_reference": "pretrained"} if algorithm is TD3C else {}
    model = make(algorithm, kernel=kernel, **settings).learn(50)
    snapshot = LearnerSnapshot.take(model)
    policy, values = weights(model), learned(model)
    assert not same(policy, values)
    model.train(10, 8)
    snapshot.restore(model)
    brake = PolicyBrake(model)
    brake.hold(True)
    target = [value.clone() for value in model.actor_target.parameters()]
    critic = [value.clone() for value in model.critic.parameters()]
    if algorithm is TD3C:
        # As far outside as its own trust region may find the policy, which it would move back before each step
        model.scale_epsilon(1e-9)
    model.train(10, 8)
    assert same(weights(model), policy) and same(learned(model), values)
    assert not all(map(th.equal, critic, model.critic.parameters()))
    # The target policy goes on to what is learned
    for old, new, value in zip(target, model.actor_target.parameters(), values.values(), strict=True):
        th.testing.assert_close(new, value + (1 - model.tau) ** 5 * (old - value))
    brake.hold(False)
    model.train(2, 8)
    brake.remove()
    assert not same(learned(model), values)
    for name, value in weights(model).items():
        th.testing.assert_close(value, 0.9 * policy[name] + 0.1 * learned(model)[name])


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_a_guards_trust_region_bounds_the_policy_that_acts(kernel: str) -> None:
    radius = 1e-4
    model = make(kernel=kernel, learning_rate=3e-2, policy_averaging=0.5).learn(WARMUP + 1)
    center = LearnerSnapshot.take(model).policy_state
    observations = th.from_numpy(model.replay_buffer.observations[: model.replay_buffer.pos, 0])
    model.policy.set_training_mode(False)

    def distance(parameters: dict[str, th.Tensor]) -> float:
        state = {**center, **{f"actor.{name}": value for name, value in parameters.items()}}
        return policy_distance(greedy_actions(model, observations, state), greedy_actions(model, observations, center))

    brake = PolicyBrake(model)
    brake.confine(radius, center)
    largest = 0.0
    for _ in range(100):
        model.train(2, 8)
        largest = max(largest, distance(weights(model)))
        # What is learned is not left behind outside, or it would pull the policy out again for ever
        assert distance(learned(model)) < 100 * radius
    brake.remove()
    # Measured on other draws of the same states than those that the region is kept on
    assert 0.1 * radius < largest < 1.5 * radius
    model.train(20, 8)
    assert distance(weights(model)) > 10 * radius


def test_the_reference_of_the_constraint_is_the_policy_that_was_evaluated() -> None:
    class KeepsTheEvaluated(EvalCallback):
        best: dict[str, th.Tensor] | None = None

        def _on_step(self) -> bool:
            before = self.best_mean_reward
            goes_on = super()._on_step()
            if self.best_mean_reward > before and self.n_calls > WARMUP:
                self.best = weights(self.model)
                # So that nothing later is better
                self.best_mean_reward = float("inf")
            return goes_on

    evaluation = KeepsTheEvaluated(Monitor(gym.make(ENV)), n_eval_episodes=1, eval_freq=40, verbose=0)
    evaluation.best_mean_reward = -float("inf")
    model = make(TD3C)
    model.learn(WARMUP + 1, callback=evaluation)
    evaluation.best_mean_reward = -float("inf")
    model.learn(90, callback=evaluation, reset_num_timesteps=False)
    assert evaluation.best is not None
    assert same(dict(model.reference_actor.named_parameters()), evaluation.best)
    assert not same(evaluation.best, weights(model))


def test_an_error_within_a_step_leaves_the_average_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().learn(50)
    policy, values = weights(model), learned(model)

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_actor_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        model.train(2, 8)
    assert same(weights(model), policy) and same(learned(model), values)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), "0.9", None])
def test_a_decay_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`policy_averaging` must be at least 0 and less than 1, such as 0\.999"):
        make(policy_averaging=value)
