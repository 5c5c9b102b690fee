"""``TD3BC(online_bc="adaptive")``: the controller is the paper's, fed with the returns of training episodes."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, LearnerSnapshot, OfflineDataset, load_dataset
from sb3_offline_ft.td3bc.adaptive_weight import AdaptiveWeight
from sb3_offline_ft.update import ActorObjective
from tests import hooks
from tests.learning import p_value_of_no_better_than_random

DATASET = "bundled:pendulum-medium"
RANDOM, EXPERT = -1309.0, -150.0


def without_scores() -> OfflineDataset:
    """The data of which nobody knows what an expert achieves."""
    return load_dataset(DATASET).with_facts(reference_scores=None)


def make(env: Any = "Pendulum-v1", **settings: Any) -> TD3BC:
    defaults: dict[str, Any] = {"dataset": DATASET, "policy_kwargs": {"net_arch": [8, 8]}, "seed": 0, "device": "cpu"}
    defaults |= {"batch_size": 4, "offline_steps": 5, "warmup_steps": 0, "online_bc": "adaptive", "train_freq": 50}
    return TD3BC("MlpPolicy", env, **(defaults | settings))


class Episodes(BaseCallback):
    """Records the training episodes that end, and the weight at each step before SB3 has told the learner of them."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float, int]] = []
        self.weights: list[float] = []

    def _on_step(self) -> bool:
        controller = self.model.adaptive_weight  # type: ignore[attr-defined]
        self.weights.append(controller.weight)
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, info["episode"]["r"], info["episode"]["l"]))
        return True


def test_controller_by_hand() -> None:
    """Zhao et al. 2022, with the order of the authors' code: the weight changes by the average of the episodes before."""
    controller = AdaptiveWeight(target=1.05, gains=(7.5e-5, 2.5e-4), unit=(0.0, 100.0))
    controller.observe(50.0, 1000, is_frozen=True)
    controller.observe(70.0, 1000, is_frozen=True)
    assert controller.weight == 1 and np.isnan(controller.average)

    # The average of the warm-up is 60, that is 0.6; the return is above it: 7.5e-5 * 1000 * (0.6 - 1.05) = -0.03375
    controller.observe(80.0, 1000, is_frozen=False)
    assert controller.weight == pytest.approx(1 - 0.03375)
    assert controller.average == pytest.approx(0.95 * 60 + 0.05 * 80)
    # From 0.61 to 0.21 in 200 steps: 7.5e-5 * 200 * (0.61 - 1.05) + 2.5e-4 * 200 * 0.4 = -0.0066 + 0.02
    controller.observe(21.0, 200, is_frozen=False)
    assert controller.weight == pytest.approx(1 - 0.03375 - 0.0066 + 0.02)
    assert controller.average_score == pytest.approx(0.95 * 0.61 + 0.05 * 0.21)
    # Never above its first value, never below 0
    controller.observe(-2000.0, 1000, is_frozen=False)
    assert controller.weight == 1
    for _ in range(100):
        controller.observe(controller.average, 1000, is_frozen=False)
    assert controller.weight == 0
    # Nothing is updated in a renewed warm-up, so that the weight stays
    before = controller.average
    controller.observe(-100.0, 1000, is_frozen=True)
    assert controller.weight == 0 and controller.average == pytest.approx(0.95 * before - 5)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_weight_follows_the_training_episodes(n_envs: int) -> None:
    """Recomputed from what ``Monitor`` reported, in the dataset's reference scores; the warm-up gives the first average."""
    record = Episodes()
    model = make(make_vec_env("Pendulum-v1", n_envs, seed=0), warmup_steps=500 * n_envs, policy_delay=1)
    model.learn(1400 * n_envs, callback=record, log_interval=None)
    assert len(record.episodes) == 7 * n_envs
    weight, average = 1.0, np.mean([r for step, r, _ in record.episodes if step <= 500 * n_envs])
    for step, episode_return, length in record.episodes:
        if step <= 500 * n_envs:
            continue
        score, current = ((x - RANDOM) / (EXPERT - RANDOM) for x in (average, episode_return))
        change = length * (7.5e-5 * (score - 1.05) + 2.5e-4 * max(0, score - current))
        weight = min(1, max(0, weight + change))
        average = 0.95 * average + 0.05 * episode_return
    assert model.adaptive_weight is not None
    assert model.adaptive_weight.weight == pytest.approx(weight) and weight < 1
    assert model.adaptive_weight.average == pytest.approx(average)
    assert record.weights[499] == 1
    # The last updates came after the last episode
    logged = model.logger.name_to_value
    assert logged["train/average_score"] == pytest.approx((average - RANDOM) / (EXPERT - RANDOM), abs=1e-6)
    assert logged["train/bc_weight"] == pytest.approx(weight)


def test_the_weight_is_that_of_behavior_cloning() -> None:
    model = make(alpha=0.0)
    model.learn(0)
    batch = model.draw_batch(32)
    actions = model.actor(batch.observations).detach()
    distance = float(((actions - batch.actions) ** 2).mean())
    assert model.adaptive_weight is not None
    for weight in (1.0, 0.3, 0.0):
        model.adaptive_weight.weight = weight
        objective = hooks.objective(model, batch, actions, th.ones(32, 1))
        assert isinstance(objective, ActorObjective)
        assert float(objective.loss(actions, th.ones(32, 1)).detach()) == pytest.approx(weight * distance)
        # Offline the weight is 1 whatever happened online
        model.life_cycle.environment_steps = 0
        offline = hooks.objective(model, batch, actions, th.ones(32, 1))
        assert isinstance(offline, ActorObjective)
        assert float(offline.loss(actions, th.ones(32, 1)).detach()) == pytest.approx(distance)
        model.life_cycle.environment_steps = None


def test_without_a_warm_up_the_first_evaluation_is_the_first_average(tmp_path: Path) -> None:
    """The one of the pretrained policy, not a later one; it is the unit too, if there are no reference scores."""
    env = Monitor(gym.make("Pendulum-v1"))
    evaluation = EvalCallback(env, eval_freq=90, n_eval_episodes=2, log_path=str(tmp_path), verbose=0)
    model = make(dataset=without_scores(), train_freq=1, learning_rate=1e-2).learn(199, callback=evaluation)
    controller, first = model.adaptive_weight, float(np.mean(evaluation.evaluations_results[0]))
    assert controller is not None and np.isnan(controller.average)
    assert len({float(np.mean(result)) for result in evaluation.evaluations_results}) == 3
    record = Episodes()
    model.learn(1, callback=record, reset_num_timesteps=False)
    assert controller.one == pytest.approx(first) and controller.zero == pytest.approx(2 * first)
    assert controller.average == pytest.approx(0.95 * first + 0.05 * record.episodes[0][1])


def test_without_both_it_is_the_first_episode() -> None:
    record = Episodes()
    model = make(dataset=without_scores()).learn(250, callback=record)
    (_, first_return, _), controller = record.episodes[0], model.adaptive_weight
    assert controller is not None
    assert (controller.zero, controller.one) == (pytest.approx(2 * first_return), pytest.approx(first_return))
    assert controller.average == pytest.approx(first_return)


def test_units_that_are_given_come_first() -> None:
    model = make(adaptive_bc_returns=[-1600, -100]).learn(0)
    assert model.adaptive_weight is not None
    assert (model.adaptive_weight.zero, model.adaptive_weight.one) == (-1600, -100)
    assert model.adaptive_bc_returns == (-1600, -100)


def test_a_return_of_0_is_no_unit() -> None:
    controller = AdaptiveWeight(1.05, (1e-4, 1e-4))
    with pytest.raises(ValueError, match="units of the pretrained policy's, which is 0"):
        controller.observe(0.0, 10, is_frozen=False)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_return_that_is_not_finite_is_ignored(bad: float, is_frozen: bool) -> None:
    controller = AdaptiveWeight(1.05, (7.5e-5, 2.5e-4), unit=(0.0, 1000.0))
    for _ in range(2):
        state = controller.state_dict()["adaptive_weight"]
        controller.observe(bad, 200, is_frozen)
        assert np.array_equal(controller.state_dict()["adaptive_weight"], state, equal_nan=True)
        controller.observe(500.0, 200, is_frozen=False)
    assert 0 < controller.weight < 1 and controller.average == 500


def test_an_environment_without_returns_is_refused_before_anything_is_done() -> None:
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    model = make(env)
    with pytest.raises(ValueError, match=r"needs the returns of training episodes.*wrap it in SB3's `Monitor`"):
        model.learn(250)
    assert model.offline_steps_done == model.num_timesteps == 0 and model.offline_dataset is None
    make(VecMonitor(env)).learn(250)
    # Gymnasium's wrapper reports them too
    make(DummyVecEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1"))])).learn(250)


def test_only_behavior_cloning_needs_returns() -> None:
    model = make(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), dataset=None, offline_steps=0, learning_starts=0)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        model.learn(60)
    model.learn(210, reset_num_timesteps=False)


def test_an_episode_that_ends_without_a_return_is_an_error() -> None:
    """Such as one that is ended by a wrapper around the monitor, which does not see it."""
    env = gym.wrappers.TimeLimit(Monitor(gym.make("Pendulum-v1")), 50)
    with pytest.raises(ValueError, match="needs the returns of training episodes"):
        make(DummyVecEnv([lambda: env])).learn(60)


def test_a_run_that_is_saved_goes_on(tmp_path: Path) -> None:
    model = make(warmup_steps=200).learn(700)
    assert model.adaptive_weight is not None and model.adaptive_weight.weight < 1
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    state = model.adaptive_weight.state_dict()["adaptive_weight"]
    assert loaded.adaptive_weight is not None
    assert np.array_equal(loaded.adaptive_weight.state_dict()["adaptive_weight"], state, equal_nan=True)
    loaded.learn(250, reset_num_timesteps=False)
    assert loaded.adaptive_weight.weight != model.adaptive_weight.weight
    # A run of its own begins with the whole weight
    loaded.learn(0)
    assert loaded.adaptive_weight.weight == 1 and np.isnan(loaded.adaptive_weight.average)


def test_a_rollback_restores_the_weight() -> None:
    model = make(warmup_steps=200).learn(500)
    controller = model.adaptive_weight
    assert controller is not None
    snapshot, state = LearnerSnapshot.take(model), controller.state_dict()["adaptive_weight"]
    model.learn(600, reset_num_timesteps=False)
    assert not np.array_equal(controller.state_dict()["adaptive_weight"], state)
    snapshot.restore(model)
    assert np.array_equal(controller.state_dict()["adaptive_weight"], state, equal_nan=True)


def test_a_rollback_to_before_the_warm_up_keeps_what_was_measured_in_it() -> None:
    """
    The guard's first snapshot is from before the warm-up, which is not repeated: the return of the pretrained policy and the
    unit stay, and the average begins with that return again.
    """
    guard, record = CollapseGuard(remedies=[], ratchet=False, verbose=0), Episodes()

    class Spoil(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 630:
                with th.no_grad():
                    self.model.actor.mu[0].weight[0, 0] = np.nan  # type: ignore[attr-defined]
            return True

    env = gym.make("Pendulum-v1", max_episode_steps=50)
    model = make(env, dataset=without_scores(), warmup_steps=500, train_freq=10).learn(900, callback=[guard, record, Spoil()])
    controller = model.adaptive_weight
    assert controller is not None and guard.rollbacks == 1
    (rollback,) = [event for event in guard.events if event["event"] == "rollback"]
    assert (rollback["to_timestep"], rollback["timestep"]) == (0, 630)
    pretrained = float(np.mean([r for step, r, _ in record.episodes if step <= 500]))
    assert (controller.zero, controller.one) == (pytest.approx(2 * pretrained), pytest.approx(pretrained))
    weight, average = 1.0, pretrained
    for step, episode_return, length in record.episodes:
        if step > 630:
            score, current = (controller.normalized(value) for value in (average, episode_return))
            weight += length * (7.5e-5 * (score - 1.05) + 2.5e-4 * max(0, score - current))
            weight = min(1, max(0, weight))
            average = 0.95 * average + 0.05 * episode_return
    assert controller.average == pytest.approx(average)
    assert controller.weight == pytest.approx(weight)


@pytest.mark.parametrize("source", ["warm-up", "evaluation", "first episode"])
def test_what_was_measured_is_not_replaced_by_what_was_unknown(source: str) -> None:
    controller = AdaptiveWeight(1.05, (7.5e-5, 2.5e-4))
    first = controller.state_dict()["adaptive_weight"]
    if source == "warm-up":
        controller.observe(40.0, 100, is_frozen=True)
        partial = controller.state_dict()["adaptive_weight"]
        controller.observe(60.0, 100, is_frozen=True)
        # Still in the warm-up
        for state in (first, partial):
            controller.load_state_dict({"adaptive_weight": state})
    elif source == "evaluation":
        controller.expect(50.0)
        controller.load_state_dict({"adaptive_weight": first})
    for episode_return in (50.0, -300.0, -300.0):
        controller.observe(episode_return, 100, is_frozen=False)
    assert controller.average < 30
    later = controller.state_dict()["adaptive_weight"]
    controller.load_state_dict({"adaptive_weight": first})
    assert (controller.weight, controller.average, controller.zero, controller.one) == (1, 50, 0, 50)
    controller.observe(-300.0, 100, is_frozen=False)
    assert (controller.zero, controller.one) == (0, 50)
    # What was known then is that of then
    controller.load_state_dict({"adaptive_weight": later})
    assert np.array_equal(controller.state_dict()["adaptive_weight"], later, equal_nan=True)
    # A controller that knows nothing takes over all there is
    fresh = AdaptiveWeight(1.05, (7.5e-5, 2.5e-4))
    fresh.load_state_dict({"adaptive_weight": later})
    assert np.array_equal(fresh.state_dict()["adaptive_weight"], later, equal_nan=True)


def test_a_run_that_becomes_adaptive_on_the_way_uses_the_reference_scores(tmp_path: Path) -> None:
    make(online_bc="keep").learn(60).save(tmp_path / "model")
    model = TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1"), online_bc="adaptive")
    model.learn(210, reset_num_timesteps=False)
    assert model.adaptive_weight is not None
    assert (model.adaptive_weight.zero, model.adaptive_weight.one) == (RANDOM, EXPERT)


def test_other_algorithms_carry_it_along(tmp_path: Path) -> None:
    """TD3C has no behavior cloning online, so that it needs no returns."""
    make().learn(10).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TD3C.load(tmp_path / "model", env=DummyVecEnv([lambda: gym.make("Pendulum-v1")])).learn(210)
    assert "adaptive_weight" not in model.extra_state()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_bc_target": float("inf")}, "`adaptive_bc_target` must be a finite number, found inf"),
        ({"adaptive_bc_target": "high"}, "`adaptive_bc_target` must be a finite number"),
        ({"adaptive_bc_gains": 1e-4}, "`adaptive_bc_gains` must be two numbers, found 0.0001"),
        ({"adaptive_bc_gains": (1e-4, -1e-4)}, "`adaptive_bc_gains` must be at least 0"),
        ({"adaptive_bc_returns": (1, 2, 3)}, "`adaptive_bc_returns` must be two numbers"),
        ({"adaptive_bc_returns": (0, float("nan"))}, "`adaptive_bc_returns` must be finite"),
        ({"adaptive_bc_returns": (5, 5)}, "`adaptive_bc_returns` must be the return of a random policy and the larger one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_it_learns_while_the_weight_falls() -> None:
    """A policy below the target is released from the data step by step; it stays better than random, at a level of 0.01."""
    model = make(policy_kwargs={"net_arch": [64, 64]}, gamma=0.95, learning_rate=2e-3, batch_size=64, seed=2,
                 offline_steps=1500, warmup_steps=200, train_freq=1, adaptive_bc_gains=(7.5e-4, 2.5e-3))  # fmt: skip
    model.learn(1200)
    assert model.adaptive_weight is not None and model.adaptive_weight.weight < 0.8
    assert p_value_of_no_better_than_random(model) < 0.01
