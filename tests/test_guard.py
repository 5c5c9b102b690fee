"""CollapseGuard: it only watches as long as nothing is wrong, notices a collapse, and puts the whole learner back."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, CusumDetector, LearnerSnapshot, OfflineTD3
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.collapse.show import verdict
from sb3_offline_ft.collapse.signals import SignalMonitor, draw_rows, greedy_actions, observations_at, policy_distance

EPISODE_LENGTH = 10


def small() -> dict[str, Any]:
    # A new dictionary each time, since SB3's SAC adds to it
    return {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", "seed": 0}


class Hold(gym.Env[np.ndarray, Any]):
    """Short episodes whose return is high as long as the action is small (or the discrete action is not the last one)."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self._discrete = discrete

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._step += 1
        loss = float(action == 2) if self._discrete else float(action[0]) ** 2
        reward = 1 - loss + 0.05 * self.np_random.normal()
        return self._observation(), reward, False, self._step >= EPISODE_LENGTH, {}


def hold_discrete() -> Hold:
    return Hold(discrete=True)


BASELINE = np.random.default_rng(0).normal(9.5, 0.3, 20)


def make(algorithm: type[OffPolicyAlgorithm], **settings: Any) -> OffPolicyAlgorithm:
    discrete = issubclass(algorithm, DQN | QRDQN)
    env = make_vec_env(hold_discrete if discrete else Hold, n_envs=settings.pop("n_envs", 1), seed=0)
    defaults: dict[str, Any] = {**small(), "learning_starts": 20, "buffer_size": 5000, "batch_size": 32, "train_freq": 1}
    if discrete:
        defaults |= {"exploration_fraction": 0.01, "exploration_final_eps": 0.0, "target_update_interval": 50}
    return algorithm("MlpPolicy", env, **{**defaults, **settings})


# So small a learning rate that nothing happens by itself. The first update comes after ten episodes of baseline
CALM = {"learning_starts": 0, "train_freq": (100, "step"), "gradient_steps": 20, "learning_rate": 1e-5}


def make_td3(**settings: Any) -> OffPolicyAlgorithm:
    return make(TD3, **{**CALM, **settings})


@th.no_grad()
def ruin(model: OffPolicyAlgorithm) -> None:
    """Make the policy choose the worst action everywhere."""
    policy: Any = model.policy
    if hasattr(policy, "actor"):
        last = [module for module in policy.actor.modules() if isinstance(module, th.nn.Linear)]
        final = policy.actor.mu if isinstance(policy.actor.mu, th.nn.Linear) else last[-1]
        final.bias += 20
    else:
        network = getattr(policy, "quantile_net" if hasattr(policy, "quantile_net") else "q_net")
        final = [module for module in network.modules() if isinstance(module, th.nn.Linear)][-1]
        # Of QRDQN's outputs every third belongs to the last action
        final.bias[2::3] += 1000


class At(BaseCallback):
    """Does something to the learner at the given environment steps, after the guard's turn."""

    def __init__(self, steps: list[int], action: Callable[[OffPolicyAlgorithm], object]) -> None:
        super().__init__()
        self.steps, self.action = steps, action

    def _on_step(self) -> bool:
        if self.num_timesteps in self.steps:
            self.action(self.model)  # type: ignore[arg-type]
        return True


def of(guard: CollapseGuard, kind: str) -> list[dict[str, Any]]:
    return [event for event in guard.events if event["event"] == kind]


def parameters(model: OffPolicyAlgorithm) -> list[th.Tensor]:
    return [value.clone() for value in model.policy.state_dict().values()]


def same(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    return all(th.equal(a, b) for a, b in zip(first, second, strict=True))


# No harm


@pytest.mark.parametrize("algorithm", [TD3, SAC, DQN, TQC, CrossQ])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_without_collapse_training_is_the_same_to_the_bit(algorithm: type[OffPolicyAlgorithm], n_envs: int) -> None:
    runs = []
    for guarded in (False, True):
        model = make(algorithm, n_envs=n_envs)
        guard = CollapseGuard(baseline=BASELINE - 8, signal_freq=20, promotion_episodes=5, ratchet=False, verbose=0)
        model.learn(400, callback=guard if guarded else None)
        runs.append((parameters(model), model.replay_buffer.rewards.copy(), np.random.rand(), th.rand(1)))  # type: ignore[union-attr]
        if guarded:
            assert not of(guard, "alarm") and of(guard, "promotion") and of(guard, "signal")
    assert same(runs[0][0], runs[1][0])
    assert np.array_equal(runs[0][1], runs[1][1])
    assert runs[0][2:] == runs[1][2:]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
def test_our_algorithms_are_the_same_to_the_bit_with_a_guard(algorithm: type[OfflineTD3], parallel: bool) -> None:
    runs = []
    for guarded in (False, True):
        env = make_vec_env("Pendulum-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv if parallel else None)
        model = algorithm(
            "MlpPolicy",
            env,
            **small(),
            dataset="bundled:pendulum-medium",
            offline_steps=20,
            warmup_steps=2400,
            batch_size=32,
            train_freq=50,
            gradient_steps=2,
            action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)),
            warmup_action_noise=True,
        )
        eval_env = Monitor(gym.make("Pendulum-v1"))
        eval_env.reset(seed=1)
        evaluation = EvalCallback(eval_env, eval_freq=1500, n_eval_episodes=1, verbose=0)
        guard = CollapseGuard(tolerance=0.5, verbose=0)
        model.learn(3200, callback=[guard, evaluation] if guarded else evaluation)
        runs.append((parameters(model), model.replay_buffer.observations.copy()))  # type: ignore[union-attr]
        env.close()
        if guarded:
            assert of(guard, "baseline")[0]["n"] == 12
            assert not of(guard, "alarm")
    assert same(runs[0][0], runs[1][0])
    assert np.array_equal(runs[0][1], runs[1][1])


# Alarm and rollback


ALGORITHMS = [OfflineTD3, TD3, DDPG, SAC, DQN, TQC, QRDQN, CrossQ]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.filterwarnings("ignore:.*has neither a dataset nor pretrained weights")
def test_a_collapse_is_noticed_and_undone(algorithm: type[OffPolicyAlgorithm]) -> None:
    model = make(algorithm, learning_rate=1e-4)
    guard = CollapseGuard(baseline=BASELINE - 6, promotion_episodes=5, remedies=[], max_rollbacks=1, ratchet=False, verbose=0)
    model.learn(500, callback=[guard, At([300], ruin)])
    alarm = of(guard, "alarm")[0]
    assert 300 < alarm["timestep"] <= 300 + 8 * EPISODE_LENGTH
    assert guard.rollbacks == 1
    returns = {event["timestep"]: event["return"] for event in of(guard, "episode")}
    assert returns[alarm["timestep"]] < 2
    assert returns[alarm["timestep"] + 2 * EPISODE_LENGTH] > 5


def test_the_learner_is_that_of_the_snapshot_to_the_bit() -> None:
    model = make_td3()
    taken: list[list[th.Tensor]] = []
    guard = CollapseGuard(remedies=[], ratchet=False, promotion_episodes=1000, verbose=0)
    restored: list[list[th.Tensor]] = []

    class Look(BaseCallback):
        def _on_training_start(self) -> None:
            taken.append(parameters(self.model))  # type: ignore[arg-type]

        def _on_step(self) -> bool:
            if guard.rollbacks and not restored:
                restored.append(parameters(self.model))  # type: ignore[arg-type]
                return False
            return True

    model.learn(1000, callback=[guard, Look(), At([300], ruin)])
    assert same(taken[0], restored[0])
    (rollback,) = of(guard, "rollback")
    assert (rollback["to_timestep"], rollback["to_n_updates"], model._n_updates) == (0, 0, 0)


def test_the_whole_run_is_reproducible_to_the_bit() -> None:
    runs = []
    for _ in range(2):
        model = make_td3()
        guard = CollapseGuard(remedies=["slower_actor", {"critic_warmup": {"steps": 100}}], verbose=0)
        model.learn(1200, callback=[guard, At([300, 800], ruin)])
        assert guard.rollbacks == 2
        untimed = [{key: value for key, value in event.items() if key != "time"} for event in guard.events]
        runs.append((parameters(model), untimed))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_episodes_that_the_collapsed_policy_began_are_ignored() -> None:
    model = make_td3(n_envs=2)
    guard = CollapseGuard(remedies=[], verbose=0)
    model.learn(800, callback=[guard, At([400], ruin)])
    (alarm,) = of(guard, "alarm")
    after = [event for event in of(guard, "episode") if event["timestep"] > alarm["timestep"]]
    # Both environments end their episodes at the same steps: at an alarm none is running
    assert alarm["timestep"] % (2 * EPISODE_LENGTH) == 0
    assert all(event["phase"] == "monitoring" for event in after)


def test_an_episode_that_is_running_at_an_alarm_is_ignored() -> None:
    guard = CollapseGuard(
        baseline=BASELINE - 6,
        secondary_alarms={"action_saturation": 0.9},
        signal_freq=7,
        remedies=[],
        ratchet=False,
        verbose=0,
    )
    make_td3().learn(400, callback=[guard, At([300], ruin)])
    (alarm,) = of(guard, "alarm")
    assert alarm["timestep"] == 301
    phases = [event["phase"] for event in of(guard, "episode") if event["timestep"] > 300]
    assert phases == ["ignored", *["monitoring"] * 9]


def test_the_within_episode_detector_fires_before_the_end_of_the_episode() -> None:
    model = make_td3()
    guard = CollapseGuard(detector="deterioration", remedies=[], max_rollbacks=1, verbose=0)
    model.learn(900, callback=[guard, At([500], ruin)])
    (alarm,) = of(guard, "alarm")
    assert 500 < alarm["timestep"] <= 500 + 12 * EPISODE_LENGTH
    assert alarm["reason"] == "deterioration"
    assert alarm["timestep"] % EPISODE_LENGTH != 0


@pytest.mark.parametrize("what", ["parameter", "loss", "action"])
def test_non_finite_values_raise_an_alarm_at_once(what: str) -> None:
    @th.no_grad()
    def spoil(model: Any) -> None:
        if what == "loss":
            model.critic_target.qf0[0].bias.fill_(math.inf)
        elif what == "parameter":
            model.actor.mu[0].weight[0, 0] = math.nan
        else:
            model.policy.actor.mu[-2].bias.fill_(math.nan)

    model = make(TD3, learning_starts=0, train_freq=(20, "step"), gradient_steps=2)
    actions: list[np.ndarray] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            actions.append(self.locals["actions"].copy())
            return True

    guard = CollapseGuard(baseline=BASELINE, remedies=[], verbose=0)
    # Ruined at the end of a rollout: the update follows, then the next action
    model.learn(300, callback=[guard, At([140 if what != "action" else 150], spoil), Look()])
    (alarm,) = of(guard, "alarm")
    assert alarm["reason"].startswith("non-finite")
    assert alarm["timestep"] == (140 if what != "action" else 151)
    assert all(bool(value.isfinite().all()) for value in parameters(model))
    if what != "action":
        assert np.isfinite(actions).all()


def test_secondary_alarms_are_raised_where_asked_for() -> None:
    guard = CollapseGuard(
        secondary_alarms={"action_saturation": 0.9}, signal_freq=10, baseline=BASELINE - 2, remedies=[], verbose=0
    )
    make(TD3).learn(500, callback=[guard, At([300], ruin)])
    assert of(guard, "alarm")[0]["reason"] == "action_saturation"
    assert of(guard, "alarm")[0]["timestep"] <= 320


def test_secondary_alarms_do_not_need_a_baseline() -> None:
    guard = CollapseGuard(secondary_alarms={"action_saturation": 0.9}, signal_freq=10, remedies=[], verbose=0)
    with pytest.warns(UserWarning, match="3 episodes"):
        make_td3(train_freq=(30, "step")).learn(300, callback=[guard, At([200], ruin)])
    assert of(guard, "alarm")[0]["reason"] == "action_saturation"


def test_limits_of_signals_that_a_learner_does_not_have_are_refused_at_the_start(tmp_path: Path) -> None:
    guard = CollapseGuard(baseline=BASELINE, secondary_alarms={"action_saturation": 0.9}, path=tmp_path, verbose=0)
    model = make(DQN)
    with pytest.raises(ValueError, match=r"`action_saturation`.*DQN.*leave it out"):
        model.learn(100, callback=guard)
    assert model.num_timesteps == 0 and not list(tmp_path.iterdir())
    model.learn(100, callback=CollapseGuard(baseline=BASELINE, secondary_alarms={"td_error": 1e9}, verbose=0))
    assert set(SignalMonitor(model).names) == {*SignalMonitor.NAMES} - {"action_saturation"}


def test_all_settings_are_told_at_the_start() -> None:
    chosen: dict[str, Any] = {"signal_freq": 70, "update_reference": True, "tolerance": 0.2, "keep_snapshots": 2}
    guard = CollapseGuard(detector={"cusum": {"drift": 0.25}}, baseline=BASELINE, verbose=0, **chosen)
    with pytest.warns(UserWarning, match="moves nothing, since TD3 has no reference policy"):
        make(TD3).learn(30, callback=guard)
    (start,) = of(guard, "start")
    told = start["settings"]
    assert chosen.items() <= told.items() and told["detector_drift"] == 0.25 and told["detector_clip"] is None
    names = set(inspect.signature(CollapseGuard.__init__).parameters) - {"self", "path", "verbose"}
    assert names <= told.keys() | start.keys()


def test_signals_tell_what_they_are_named_after() -> None:
    model = make(TD3)
    model.learn(100)
    before = LearnerSnapshot.take(model)
    monitor = SignalMonitor(model)
    first = monitor.measure(before.policy_state)
    assert first["policy_shift"] == 0 and first["action_saturation"] == 0
    with th.no_grad():
        for critic in (model.critic, model.critic_target):  # type: ignore[attr-defined]
            for layer in (critic.qf0[-1], critic.qf1[-1]):
                layer.weight *= 100
                layer.bias *= 100
    model.num_timesteps += 1000
    second = monitor.measure(before.policy_state)
    assert second["log_mean_abs_q"] == pytest.approx(first["log_mean_abs_q"] + 2, abs=0.2)
    assert second["log_mean_abs_q_slope"] == pytest.approx(2, abs=0.2)
    assert second["td_error"] > first["td_error"]
    ruin(model)
    third = monitor.measure(before.policy_state)
    assert third["action_saturation"] == 1
    assert third["policy_shift"] > 0.5


@pytest.mark.parametrize("steps", [15, 20, 33, 40])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("memory", [False, True])
def test_signals_are_measured_on_transitions_that_have_been(memory: bool, n_envs: int, steps: int) -> None:
    """Also in a ring of 20 rows that has been written less than once, once, and more often."""
    env = make_vec_env(Hold, n_envs=n_envs, seed=0)
    model: Any = TD3("MlpPolicy", env, **small(), buffer_size=20 * n_envs, learning_starts=1000, optimize_memory_usage=memory,
                     replay_buffer_kwargs={"handle_timeout_termination": not memory})  # fmt: skip
    seen: dict[tuple[int, bytes], bytes] = {}

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            before, after, ended = self.model._last_obs, self.locals["new_obs"], self.locals["dones"]  # type: ignore
            for column in range(n_envs):
                # With `optimize_memory_usage` SB3 replaces the last observation of an episode by the first of the next
                seen[column, before[column].tobytes()] = b"" if ended[column] else after[column].tobytes()
            return True

    model.learn(steps * n_envs, callback=Keep())
    rows, columns = draw_rows(model.replay_buffer, 2000, np.random.default_rng(0))
    invalid = {model.replay_buffer.pos} if memory and steps >= 20 else set()
    assert set(rows.tolist()) == set(range(min(steps, 20))) - invalid and set(columns.tolist()) == set(range(n_envs))
    pairs = zip(observations_at(model, rows, columns), observations_at(model, rows, columns, following=True), strict=True)
    n_checked = 0
    for column, (before, after) in zip(columns.tolist(), pairs, strict=True):
        following = seen[column, before.numpy().tobytes()]
        n_checked += following != b""
        assert following in (b"", after.numpy().tobytes())
    assert n_checked > 1000


@pytest.mark.parametrize("algorithm", [SAC, DQN, TQC, QRDQN, CrossQ, DDPG])
def test_signals_exist_for_each_algorithm(algorithm: type[OffPolicyAlgorithm]) -> None:
    model = make(algorithm, n_envs=2)
    model.learn(100)
    signals = SignalMonitor(model).measure(LearnerSnapshot.take(model).policy_state)
    assert all(math.isfinite(value) for value in signals.values())
    assert {"log_mean_abs_q", "td_error", "policy_shift"} <= signals.keys()


def test_signals_are_logged(tmp_path: Path) -> None:
    model = make(TD3)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, callback=CollapseGuard(baseline=BASELINE - 2, signal_freq=20, verbose=0), log_interval=1)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    expected = {f"collapse/{name}" for name in (*SignalMonitor.NAMES, "statistic", "threshold", "baseline_mean")}
    assert expected <= set(header)
    assert (tmp_path / "collapse_events.jsonl").exists() and (tmp_path / "collapse.png").exists()


def test_signals_that_cannot_be_measured_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_td3(buffer_size=1, n_envs=1)
    guard = CollapseGuard(signal_freq=10, baseline=BASELINE - 2)
    with pytest.warns(UserWarning, match="need 2 rows of the replay buffer, which can hold 1") as caught:
        model.learn(100, callback=guard)
    assert len(caught) == 1
    (warning,), (end,) = of(guard, "warning"), of(guard, "end")
    assert warning["message"] == "No signal was measured, 10 times for want of rows in the replay buffer."
    assert warning["message"] in capsys.readouterr().out and end["signals"] == 0
    # Asked for an alarm, but the run is too short
    guard = CollapseGuard(secondary_alarms={"policy_shift": 0.5}, baseline=BASELINE - 2, verbose=0)
    make_td3().learn(200, callback=guard)
    assert of(guard, "warning")[0]["message"] == "No signal was measured: `signal_freq=1000` is longer than the run."
    guard = CollapseGuard(signal_freq=10, baseline=BASELINE - 2, verbose=0)
    make_td3().learn(200, callback=guard)
    assert of(guard, "end")[0]["signals"] == len(of(guard, "signal")) == 20 and not of(guard, "warning")


def test_options_without_effect_are_said() -> None:
    for settings, message in (
        ({"save_snapshots": True}, "writes nothing, since there is no folder"),
        ({"update_reference": True}, "moves nothing, since TD3 has no reference policy"),
    ):
        guard = CollapseGuard(baseline=BASELINE, verbose=0, **settings)
        with pytest.warns(UserWarning, match=message) as caught:
            make_td3().learn(10, callback=guard)
        assert len(caught) == sum(message in event["message"] for event in of(guard, "warning")) == 1


@pytest.mark.filterwarnings("error")
def test_an_alarm_does_not_disturb_the_logger(tmp_path: Path) -> None:
    model = make(TD3, learning_rate=1e-5)
    model.set_logger(configure(str(tmp_path), ["log", "csv", "tensorboard"]))
    model.learn(400, callback=[CollapseGuard(baseline=BASELINE - 6, verbose=0), At([300], ruin)], log_interval=1)
    model.logger.close()
    assert "rollbacks" in (tmp_path / "log.txt").read_text()


class Shared(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layer = th.nn.Linear(2, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(observations))


def test_actor_and_critic_may_share_a_features_extractor() -> None:
    sharing = {"features_extractor_class": Shared, "share_features_extractor": True, "net_arch": [16]}
    model = make(TD3, policy_kwargs=sharing, learning_rate=1e-4)
    guard = CollapseGuard(baseline=BASELINE - 6, signal_freq=20, remedies=["trust_region"], ratchet=False, verbose=0)
    model.learn(500, callback=[guard, At([300], ruin)])
    assert guard.rollbacks >= 1
    shifts = {event["timestep"]: event["policy_shift"] for event in of(guard, "signal")}
    # The guard's turn at step 300 comes before the ruin
    assert 0 < shifts[300] < 0.1 and max(shifts.values()) > 0.5
    before = parameters(model)
    SignalMonitor(model).measure(guard._good[0].snapshot.policy_state)
    assert same(before, parameters(model))


class Broken(Hold):
    """Gives one observation and one reward that are not finite."""

    count = 0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self.count += 1
        if self.count == 153:
            observation[0] = np.nan
        # The second one comes at the end of an episode
        return observation, math.inf if self.count == 260 else reward, terminated, truncated, info


def test_what_a_broken_environment_gives_is_kept_out_of_the_buffer() -> None:
    model = TD3("MlpPolicy", Broken(), **small(), learning_starts=0, batch_size=32, learning_rate=1e-5)
    guard = CollapseGuard(baseline=BASELINE - 6, verbose=0)
    with pytest.warns(UserWarning, match="non-finite observation or reward") as caught:
        model.learn(400, callback=guard)
    assert len([entry for entry in caught if "non-finite" in str(entry.message)]) == 1
    assert not of(guard, "alarm")
    buffer = model.replay_buffer
    assert buffer is not None
    assert max(event["return"] for event in of(guard, "episode")) < EPISODE_LENGTH + 2
    assert [event["timestep"] for event in of(guard, "episode") if event["phase"] == "ignored"] == [160, 260]
    for row in (152, 153, 259):
        assert np.array_equal(buffer.observations[row], buffer.observations[row - 1])
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):  # type: ignore[attr-defined]
        assert np.isfinite(array[: buffer.pos]).all()
    assert all(bool(value.isfinite().all()) for value in parameters(model))


def test_a_broken_observation_does_not_stay_where_the_next_ones_are_kept_in_one_array_with_the_others() -> None:
    class Look(BaseCallback):
        def _on_rollout_end(self) -> None:
            assert np.isfinite(self.model.replay_buffer.observations).all()  # type: ignore[attr-defined]

        def _on_step(self) -> bool:
            return True

    model = TD3("MlpPolicy", Broken(), **small(), learning_starts=0, learning_rate=1e-5, buffer_size=100, train_freq=1,
                optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False})  # fmt: skip
    with pytest.warns(UserWarning, match="non-finite observation or reward"):
        model.learn(300, callback=[CollapseGuard(baseline=BASELINE - 6, verbose=0), Look()])
    assert all(bool(value.isfinite().all()) for value in parameters(model))


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
    last_good = guard._good[-1].snapshot.policy_state
    assert all(th.equal(value, last_good[name]) for name, value in actor.items())


def test_a_non_finite_value_of_the_last_update_is_noticed() -> None:
    @th.no_grad()
    def spoil(model: Any) -> None:
        model.actor.mu[0].weight[0, 0] = math.nan

    model = make_td3()
    guard = CollapseGuard(baseline=BASELINE - 6, remedies=[], verbose=0)
    model.learn(300, callback=[guard, At([300], spoil)])
    assert of(guard, "alarm")[0]["reason"].startswith("non-finite")
    assert all(bool(value.isfinite().all()) for value in parameters(model))


def test_each_environment_has_its_own_running_episode() -> None:
    model = make_td3(n_envs=3)
    guard = CollapseGuard(detector="deterioration", remedies=[], verbose=0)
    seen: list[int] = []

    class Look(BaseCallback):
        def _on_training_start(self) -> None:
            judge = guard._monitor.judge

            def watched(episode: Any, key: int = 0) -> Any:
                seen.append(key)
                return judge(episode, key)

            guard._monitor.judge = watched  # type: ignore[method-assign]

        def _on_step(self) -> bool:
            return True

    model.learn(900, callback=[guard, Look()])
    assert set(seen) == {0, 1, 2} and not of(guard, "alarm")


# Remedies


def rolled_back(remedies: list[Any], steps: int, model: OffPolicyAlgorithm | None = None, **settings: Any) -> Any:
    """A learner in training at ``steps`` environment steps after a rollback at about step 310, and its guard."""
    model = make_td3() if model is None else model
    guard = CollapseGuard(remedies=remedies, promotion_episodes=1000, verbose=0, **settings)
    model.learn(300 + steps, callback=[guard, At([300], ruin)])
    assert guard.rollbacks == 1
    return model, guard


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


def test_a_slower_actor_moves_less() -> None:
    distances = {}
    for factor in (1.0, 0.1):
        model, guard = rolled_back([{"slower_actor": {"factor": factor}}], steps=200)
        guard._brake.attach()
        distances[factor] = moved(model, 2)
        assert [group["lr"] for group in model.actor.optimizer.param_groups] == [1e-5]
    assert distances[0.1][0] < 0.5 * distances[1.0][0]


def test_a_critic_warmup_holds_the_policy_and_ends() -> None:
    model, guard = rolled_back([{"critic_warmup": {"steps": 400}}], steps=300)
    guard._brake.attach()
    actor, critic = moved(model, 20)
    assert actor == 0 and critic > 0
    model, guard = rolled_back([{"critic_warmup": {"steps": 400}}], steps=900)
    guard._brake.attach()
    assert of(guard, "release")[0]["name"] == "critic_warmup"
    assert moved(model, 20)[0] > 0


def test_a_trust_region_is_never_left() -> None:
    class Look(BaseCallback):
        largest: ClassVar[list[float]] = []

        def _on_rollout_start(self) -> None:
            model: Any = self.model
            if guard.rollbacks:
                rows = th.from_numpy(model.replay_buffer.observations[: model.replay_buffer.pos, 0])
                now, center = greedy_actions(model, rows), greedy_actions(model, rows, guard._good[-1].snapshot.policy_state)
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
    assert model.epsilon == "lin_0.01_0.005" and model._epsilon_schedule(0.0) == pytest.approx(0.005)
    assert model.offline_fraction == 0.75 == model.replay_buffer.offline_fraction  # type: ignore[union-attr]
    # 50 offline updates, none up to step 1800 after the rollback, then one at 1900 and one at 2000
    assert of(guard, "alarm")[0]["timestep"] == 1500
    assert model._n_updates == 52
    assert model.first_warmup_end == 1200


def test_remedies_that_do_not_fit_are_refused_if_asked_for_and_left_out_otherwise() -> None:
    for name in ("tighter_constraint", "more_offline_data", "warmup"):
        with pytest.raises(ValueError, match=name):
            make_td3().learn(10, callback=CollapseGuard(remedies=[name], verbose=0))
    guard = CollapseGuard(verbose=0)
    make_td3().learn(10, callback=guard)
    assert of(guard, "start")[0]["settings"]["remedies"] == ["critic_warmup", "trust_region"]


# Escalation


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
    last_good = guard._good[-1].snapshot.policy_state
    restored = all(th.equal(value, last_good[name]) for name, value in actor.items())
    assert restored == (ending != "continue")
    assert (returns[-5:].mean() > 5) == (ending == "freeze")


def test_an_older_snapshot_is_tried_when_the_newest_fails() -> None:
    model = make_td3()
    guard = CollapseGuard(remedies=[], promotion_episodes=5, max_rollbacks=10, ratchet=False, verbose=0)
    model.learn(1500, callback=[guard, At([600, 700, 800, 900], ruin)])
    steps = [event["to_timestep"] for event in of(guard, "rollback")]
    promoted = [event["candidate_timestep"] for event in of(guard, "promotion") if event["timestep"] <= 600]
    # Each of the two newest is restored twice, since nothing is promoted in between
    assert steps == [promoted[-1], promoted[-1], promoted[-2], promoted[-2]]


# Poisoned data


@pytest.mark.parametrize("poisoned_data", ["keep", "drop", 0.5])
def test_what_the_collapsed_policy_gathered_is_kept_dropped_or_thinned_out(poisoned_data: str | float) -> None:
    model = make_td3()
    guard = CollapseGuard(poisoned_data=poisoned_data, remedies=[], promotion_episodes=1000, verbose=0)

    class Look(BaseCallback):
        rows = -1

        def _on_step(self) -> bool:
            if guard.rollbacks and self.rows < 0 and not of(guard, "alarm")[0]["timestep"] == self.num_timesteps:
                self.rows = self.model.replay_buffer.pos  # type: ignore[attr-defined]
            return True

    look = Look()
    model.learn(400, callback=[guard, At([300], ruin), look])
    (alarm,) = of(guard, "alarm")
    # The baseline's 100 steps are not poisoned
    span = alarm["timestep"] - 100
    if poisoned_data == "keep":
        assert look.rows == alarm["timestep"] and not of(guard, "removal")
        return
    (removal,) = of(guard, "removal")
    assert look.rows == alarm["timestep"] - removal["removed"]
    if poisoned_data == "drop":
        assert removal["removed"] == span
    else:
        assert abs(removal["removed"] - 0.5 * span) < 5 * math.sqrt(span * 0.25)


def test_what_a_good_policy_gathered_is_not_dropped() -> None:
    model = make_td3()
    guard = CollapseGuard(poisoned_data="drop", remedies=[], promotion_episodes=5, ratchet=False, verbose=0)
    model.learn(500, callback=[guard, At([300], ruin)])
    (alarm,), (removal,) = of(guard, "alarm"), of(guard, "removal")
    last_good = max(event["timestep"] for event in of(guard, "promotion") if event["timestep"] < alarm["timestep"])
    assert removal["removed"] == alarm["timestep"] - last_good < 150
    actions = model.replay_buffer.actions[: model.replay_buffer.pos, 0, 0]  # type: ignore[union-attr]
    assert np.abs(actions).max() < 0.99


def test_buffers_whose_rows_hang_together_are_refused() -> None:
    model = make(TD3, n_steps=3)
    with pytest.raises(ValueError, match="NStepReplayBuffer"):
        model.learn(10, callback=CollapseGuard(poisoned_data="drop", baseline=BASELINE, verbose=0))


# Baseline, promotion, ratchet


def test_a_promotion_makes_the_promoted_policy_the_reference_and_a_rollback_to_it_too(tmp_path: Path) -> None:
    """What is promoted is the learner of some episodes ago, not what it has become since."""
    settings: dict[str, Any] = {**CALM, "learning_rate": 1e-3, "constraint_reference": "pretrained", "epsilon": 1.0}
    model: Any = make(TD3C, **settings, warmup_steps=0, policy_averaging=0.5)
    model.set_parameters(make(TD3C, **settings).get_parameters())
    policies: dict[int, list[th.Tensor]] = {}

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            policies[self.num_timesteps] = [value.clone() for value in self.model.actor.state_dict().values()]  # type: ignore
            return True

    def reference() -> list[th.Tensor]:
        return list(model.reference_actor.state_dict().values())

    guard = CollapseGuard(baseline=BASELINE - 6, promotion_episodes=10, ratchet=False, remedies=[], update_reference=True,
                          path=tmp_path, save_snapshots=True, verbose=0)  # fmt: skip
    model.learn(500, callback=[guard, Keep()])
    promotion = of(guard, "promotion")[-1]
    assert same(reference(), policies[promotion["candidate_timestep"]])
    assert not same(reference(), policies[promotion["timestep"]])
    promoted = [value.clone() for value in reference()]
    model.save(tmp_path / "model")

    @th.no_grad()
    def spoil(model: Any) -> None:
        model.actor.mu[0].weight.fill_(math.nan)

    model.learn(100, callback=[guard, At([510], spoil)], reset_num_timesteps=False)
    assert guard.rollbacks == 1 and same(reference(), promoted)
    model = TD3C.load(tmp_path / "model", env=model.get_env())
    guard = CollapseGuard(baseline=BASELINE - 6, remedies=[], path=tmp_path, save_snapshots=True, verbose=0)
    # The third time it is not the loaded learner that is restored, but the one that was promoted last
    model.learn(100, callback=[guard, At([510, 520, 530], spoil)], reset_num_timesteps=False)
    assert guard.rollbacks == 3 and same(reference(), promoted)


def test_the_baseline_is_raised_when_the_policy_has_become_better() -> None:
    guard = CollapseGuard(baseline=BASELINE - 4, promotion_episodes=10, verbose=0)
    make_td3().learn(600, callback=guard)
    ratchet = of(guard, "ratchet")[0]
    assert ratchet["old_mean"] == pytest.approx(np.mean(BASELINE) - 4)
    assert ratchet["new_mean"] > 8


def test_a_fall_back_to_the_old_level_is_a_collapse_after_the_baseline_was_raised() -> None:
    @th.no_grad()
    def worsen(model: Any) -> None:
        model.actor.mu[-2].bias.fill_(0.7)

    for ratchet in (False, True):
        guard = CollapseGuard(
            baseline=BASELINE - 4, promotion_episodes=10, ratchet=ratchet, remedies=[], max_rollbacks=1, verbose=0
        )
        make_td3().learn(1400, callback=[guard, At([1000], worsen)])
        assert bool(of(guard, "alarm")) == ratchet


def test_a_collapse_does_not_become_the_baseline() -> None:
    # The ruin comes while the episodes of a raised baseline are gathered
    guard = CollapseGuard(baseline=BASELINE - 6, remedies=[], max_rollbacks=1, verbose=0)
    make_td3().learn(400, callback=[guard, At([280], ruin)])
    assert not of(guard, "ratchet")
    assert 280 < of(guard, "alarm")[0]["timestep"] < 400


def test_small_losses_are_tolerated() -> None:
    @th.no_grad()
    def worsen(model: Any) -> None:
        model.actor.mu[-2].bias.fill_(0.5)

    for tolerance, alarms in ((0.0, True), (0.6, False)):
        guard = CollapseGuard(tolerance=tolerance, remedies=[], max_rollbacks=1, ratchet=False, verbose=0)
        make_td3(learning_rate=1e-5).learn(800, callback=[guard, At([200], worsen)])
        assert bool(of(guard, "alarm")) == alarms


def test_evaluations_can_be_watched_in_place_of_training_episodes(tmp_path: Path) -> None:
    evaluation = EvalCallback(Monitor(Hold()), log_path=str(tmp_path), eval_freq=20, n_eval_episodes=5, verbose=0)
    model = make_td3()
    guard = CollapseGuard(baseline="evaluations", remedies=[], max_rollbacks=1, verbose=0)
    model.learn(600, callback=[guard, evaluation, At([300], ruin)])
    assert of(guard, "baseline")[0]["source"] == "evaluations"
    assert of(guard, "baseline")[0]["n"] == 20
    (alarm,) = of(guard, "alarm")
    assert 300 < alarm["timestep"] <= 361
    assert (tmp_path / "collapse_events.jsonl").exists()
    returns = [value for results in evaluation.evaluations_results for value in results]
    # The guard comes before the evaluations of a step, so that it does not see the last ones
    assert [event["return"] for event in of(guard, "evaluation")] == returns[:-5]
    phases = [event["phase"] for event in of(guard, "evaluation")]
    assert phases == ["baseline"] * 20 + ["monitoring"] * (len(returns) - 25)
    assert verdict(guard.events).startswith(
        f"1 alarm, 1 rollback in {phases.count('monitoring')} monitored evaluation episodes"
    )


def test_vec_normalize_rewards_are_not_what_is_watched() -> None:
    env = VecNormalize(make_vec_env(Hold, seed=0))
    model = TD3("MlpPolicy", env, **small(), learning_starts=0, train_freq=(100, "step"), gradient_steps=5)
    guard = CollapseGuard(remedies=[], max_rollbacks=1, verbose=0)
    model.learn(600, callback=[guard, At([300], ruin)])
    assert 8 < of(guard, "baseline")[0]["mean"] < 11
    assert guard.rollbacks == 1


def test_a_warmup_without_the_noise_of_the_episodes_to_come_is_pointed_out() -> None:
    settings: dict[str, Any] = {"dataset": "bundled:pendulum-medium", "offline_steps": 5, "warmup_steps": 1000}
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    model = TD3BC("MlpPolicy", make_vec_env("Pendulum-v1", seed=0), **small(), **settings, action_noise=noise)
    with pytest.warns(UserWarning, match="warmup_action_noise=True"):
        model.learn(1010, callback=CollapseGuard(verbose=0))


# Saving and going on


def test_the_guard_goes_on_after_load(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"path": tmp_path, "save_snapshots": True, "promotion_episodes": 5, "ratchet": False}
    settings |= {"remedies": ["slower_actor"], "verbose": 0}
    model = make_td3()
    guard = CollapseGuard(**settings)
    model.learn(700, callback=[guard, At([300], ruin)])
    assert guard.rollbacks == 1 and guard.promotions > 0
    model.save(tmp_path / "model")
    loaded = TD3.load(tmp_path / "model", env=make_vec_env(Hold, seed=1))
    again = CollapseGuard(**settings)
    loaded.learn(600, callback=[again, At([900], ruin)], reset_num_timesteps=False)
    assert again.rollbacks == 2
    # The first halving was taken up, the second came on top of it
    assert again._the_brake.learning_rate_factor == 0.25
    assert again.promotions >= guard.promotions
    # The baseline is that of the first run, also after the second rollback
    means = {event["mean"] for event in of(again, "baseline")}
    assert means == {event["mean"] for event in of(guard, "baseline")}
    # One file tells both runs
    events = read_events(tmp_path / "collapse_events.jsonl")
    assert [event["event"] for event in events].count("start") == 2
    assert [event["resumed"] for event in events if event["event"] == "start"] == [False, True]
    assert of(again, "rollback")[-1]["to_timestep"] > 0


def test_checkpoints_hold_the_guards_state(tmp_path: Path) -> None:
    model = make_td3()
    checkpoints = CheckpointCallback(save_freq=100, save_path=str(tmp_path))
    model.learn(300, callback=[CollapseGuard(verbose=0), checkpoints])
    for step in (200, 300):
        loaded = TD3.load(tmp_path / f"rl_model_{step}_steps", env=make_vec_env(Hold, seed=1))
        guard = CollapseGuard(verbose=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.learn(100, callback=[guard], reset_num_timesteps=False)
        assert of(guard, "start")[0]["resumed"]
        assert guard._episodes >= (step + 80) // EPISODE_LENGTH


def test_two_calls_of_learn_are_one_run() -> None:
    model, guard = make_td3(), CollapseGuard(verbose=0)
    model.learn(300, callback=guard)
    episodes = guard._episodes
    model.learn(300, callback=guard, reset_num_timesteps=False)
    assert guard._episodes == 2 * episodes
    assert len(of(guard, "start")) == 1
    model.learn(300, callback=guard)
    assert guard._episodes == episodes


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


def test_a_run_saved_in_its_warmup_keeps_the_baseline(tmp_path: Path) -> None:
    model = make_td3(train_freq=(200, "step"))
    model.learn(150, callback=CollapseGuard(verbose=0))
    model.save(tmp_path / "model")
    loaded = TD3.load(tmp_path / "model", env=make_vec_env(Hold, seed=1))
    loaded.train_freq = model.train_freq
    guard = CollapseGuard(verbose=0)
    loaded.learn(300, callback=guard, reset_num_timesteps=False)
    assert of(guard, "baseline")[0]["n"] >= 15 + 10


def test_a_damaged_state_is_said_and_the_guard_begins_anew(tmp_path: Path) -> None:
    model = make_td3()
    model.learn(300, callback=CollapseGuard(verbose=0))
    for text in ("{", "{}", '{"version": 99}', "[]"):
        model.collapse_guard_state = text  # type: ignore[attr-defined]
        with pytest.warns(UserWarning, match="cannot be taken up"):
            model.learn(20, callback=CollapseGuard(baseline=BASELINE, verbose=0), reset_num_timesteps=False)


def test_a_damaged_file_of_events_is_kept_aside(tmp_path: Path) -> None:
    model = make_td3()
    model.learn(300, callback=CollapseGuard(path=tmp_path, verbose=0))
    file = tmp_path / "collapse_events.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "not JSON", *lines[1:]]) + "\n")
    with pytest.warns(UserWarning, match="damaged"):
        model.learn(100, callback=CollapseGuard(path=tmp_path, verbose=0), reset_num_timesteps=False)
    assert (tmp_path / "collapse_events.damaged").exists() and read_events(file)


def test_snapshots_of_an_earlier_run_in_the_same_folder_are_not_taken_for_ours(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = make_td3(seed=seed)
        model.learn(300, callback=CollapseGuard(path=tmp_path, save_snapshots=True, promotion_episodes=5, verbose=0))
    stored = LearnerSnapshot.load(tmp_path / "snapshots" / "snapshot_0.pt").policy_state
    first = make_td3(seed=1).policy.state_dict()
    assert all(th.equal(stored[name], value) for name, value in first.items())


def test_going_on_after_a_stop_is_guarded_again() -> None:
    model = make_td3()
    guard = CollapseGuard(remedies=[], max_rollbacks=0, after_max_rollbacks="stop", verbose=0)
    model.learn(900, callback=[guard, At([300], ruin)])
    stopped = model.num_timesteps
    assert stopped < 900
    model.learn(600, callback=[guard, At([stopped + 200], ruin)], reset_num_timesteps=False)
    assert stopped + 200 < model.num_timesteps < stopped + 600
    assert guard.alarms == 2


def test_a_later_rollback_with_a_smaller_share_of_the_rate_is_possible() -> None:
    guard = CollapseGuard(detector={"cusum": {"n_simulations": 1000}}, remedies=[], ratchet=False, verbose=0)
    make_td3().learn(1500, callback=[guard, At([300, 800], ruin)])
    assert guard.rollbacks == 2


def test_poisoned_data_is_dropped_after_each_of_several_rollbacks() -> None:
    model = make_td3()
    guard = CollapseGuard(poisoned_data="drop", remedies=[], promotion_episodes=5, ratchet=False, verbose=0)
    model.learn(1800, callback=[guard, At([300, 400, 500, 1000], ruin)])
    assert guard.rollbacks >= 4
    assert len(of(guard, "removal")) == guard.rollbacks and not of(guard, "warning")


def test_snapshots_are_kept_in_bounds(tmp_path: Path) -> None:
    guard = CollapseGuard(path=tmp_path, save_snapshots=True, keep_snapshots=2, promotion_episodes=2, ratchet=False, verbose=0)
    make_td3().learn(1000, callback=guard)
    assert guard.promotions > 5
    assert len(guard._good) == 3
    files = sorted((tmp_path / "snapshots").glob("*.pt"))
    assert len(files) == 3 and (tmp_path / "snapshots" / "snapshot_0.pt") in files


# Faults


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LearnerSnapshot, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LearnerSnapshot, "save", fail)
    guard = CollapseGuard(path=tmp_path, save_snapshots=True, promotion_episodes=2, verbose=0)
    model = make_td3()
    with pytest.warns(UserWarning, match="No space left") as caught:
        model.learn(800, callback=guard)
    assert len([entry for entry in caught if "No space left" in str(entry.message)]) == 1
    assert model.num_timesteps == 800 and guard.promotions > 1


def test_too_short_a_warmup_is_said_and_does_not_end_training() -> None:
    guard = CollapseGuard(verbose=0)
    model = make_td3(train_freq=(30, "step"))
    with pytest.warns(UserWarning, match="3 episodes, expected at least 5.*warmup_steps"):
        model.learn(300, callback=[guard, At([200], ruin)])
    assert model.num_timesteps == 300 and not of(guard, "alarm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": [1.0, 2.0, 3.0, 4.0]}, "5"),
        ({"baseline": [1.0] * 8}, "same return"),
        ({"baseline": [1.0, 2.0, math.nan, 4.0, 5.0]}, "finite"),
        ({"baseline": "pretrained"}, "'warmup', 'evaluations'"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"horizon_episodes": 0}, "horizon_episodes"),
        ({"detector": "cusun"}, "cusum"),
        ({"detector": "deterioration", "baseline": [1.0, 2.0, 3.0, 4.0, 5.0]}, "rewards of each step"),
        ({"detector": CusumDetector(0.05)}, "false_alarm_rate"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"random_return": math.nan}, "random_return"),
        ({"max_rollbacks": -1}, "max_rollbacks"),
        ({"after_max_rollbacks": "halt"}, "'freeze', 'stop', 'continue'"),
        ({"poisoned_data": "forget"}, "poisoned_data"),
        ({"poisoned_data": 1.5}, "poisoned_data"),
        ({"remedies": ["slower_actr"]}, "slower_actor"),
        ({"remedies": "slower_actor"}, "list"),
        ({"remedies": [{"slower_actor": {"factr": 1}}]}, "factr"),
        ({"remedies": [{"slower_actor": {"factor": 0}}]}, "factor"),
        ({"remedies": [{"trust_region": {"radius": -1}}]}, "radius"),
        ({"remedies": [{"critic_warmup": {"steps": 0}}]}, "steps"),
        ({"secondary_alarms": {"td_eror": 1.0}}, "td_error"),
        ({"secondary_alarms": {"td_error": math.inf}}, "finite"),
        ({"secondary_alarms": {"td_error": 1.0}, "signal_freq": 0}, "signal_freq"),
        ({"keep_snapshots": 0}, "keep_snapshots"),
        ({"promotion_episodes": 1}, "promotion_episodes"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseGuard(**settings)


def test_an_unknown_keyword_is_named_with_its_neighbour() -> None:
    with pytest.raises(TypeError, match="max_rollbacks"):
        CollapseGuard(max_rolbacks=3)  # type: ignore[call-arg]


def test_two_guards_are_refused() -> None:
    guard = CollapseGuard(verbose=0)
    for guards in ([guard, guard], [guard, CollapseGuard(verbose=0)]):
        with pytest.raises(ValueError, match="several CollapseGuards"):
            make_td3().learn(10, callback=[*guards])


def test_pretraining_has_nothing_to_watch() -> None:
    model = TD3BC("MlpPolicy", "Pendulum-v1", **small(), dataset="bundled:pendulum-medium")
    with pytest.raises(ValueError, match="pass it to `learn`"):
        model.pretrain(2, callback=CollapseGuard(verbose=0))


def test_what_can_be_read_before_training() -> None:
    guard = CollapseGuard(verbose=0)
    assert (guard.alarms, guard.rollbacks, guard.promotions, guard.events) == (0, 0, 0, [])
    assert guard.detector.false_alarm_rate == 0.01


def test_on_policy_algorithms_are_refused() -> None:
    model = PPO("MlpPolicy", make_vec_env(Hold), n_steps=16, batch_size=16, device="cpu")
    with pytest.raises(ValueError, match="off-policy"):
        model.learn(16, callback=CollapseGuard(verbose=0))


def test_evaluations_without_a_log_are_refused() -> None:
    evaluation = EvalCallback(Monitor(Hold()), eval_freq=20, verbose=0)
    with pytest.raises(ValueError, match="log_path"):
        make_td3().learn(10, callback=[CollapseGuard(baseline="evaluations", verbose=0), evaluation])


def test_messages_are_printed_once_and_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    make_td3().learn(400, callback=[CollapseGuard(), At([300], ruin)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CollapseGuard")]
    assert "baseline of 10 episodes" in lines[0]
    assert sum("ALARM" in line for line in lines) == 1
    assert any("rollback 1" in line for line in lines)


@pytest.fixture(autouse=True)
def _no_global_state() -> Iterator[None]:
    th.set_num_threads(1)
    yield
