"""CollapseGuard: it only watches as long as nothing is wrong, notices a collapse, and puts the whole learner back."""

import inspect
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, Alarm, CollapseGuard, CusumDetector, DeteriorationDetector, OfflineTD3
from sb3_offline_ft.collapse.show import verdict
from tests.guarded_runs import BASELINE, EPISODE_LENGTH, At, Hold, make, make_td3, of, parameters, ruin, same, small

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
    assert (rollback["to_timestep"], rollback["to_n_updates"], guard.events[-1]["n_updates"]) == (0, 0, 0)


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


def test_each_environment_has_its_own_running_episode() -> None:
    seen: list[int] = []

    class Watching(DeteriorationDetector):
        def update(self, x: Any, episode_key: int = 0) -> Alarm | None:
            seen.append(episode_key)
            return super().update(x, episode_key)

    guard = CollapseGuard(detector=Watching(), remedies=[], verbose=0)
    make_td3(n_envs=3).learn(900, callback=guard)
    assert set(seen) == {0, 1, 2} and not of(guard, "alarm")


# Escalation


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
