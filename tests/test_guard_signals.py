"""Signals of a collapse beside the returns, and numbers that are not finite."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_offline_ft import CollapseGuard, LearnerSnapshot
from sb3_offline_ft.collapse.signals import SignalMonitor, draw_rows, observations_at
from tests.guarded_runs import BASELINE, EPISODE_LENGTH, At, Hold, make, make_td3, of, parameters, ruin, same, small


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
            # SB3 has the observation before the step nowhere else
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
    SignalMonitor(model).measure(LearnerSnapshot.take(model).policy_state)
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


def test_a_non_finite_value_of_the_last_update_is_noticed() -> None:
    @th.no_grad()
    def spoil(model: Any) -> None:
        model.actor.mu[0].weight[0, 0] = math.nan

    model = make_td3()
    guard = CollapseGuard(baseline=BASELINE - 6, remedies=[], verbose=0)
    model.learn(300, callback=[guard, At([300], spoil)])
    assert of(guard, "alarm")[0]["reason"].startswith("non-finite")
    assert all(bool(value.isfinite().all()) for value in parameters(model))
