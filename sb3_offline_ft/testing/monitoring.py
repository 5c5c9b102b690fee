"""Clauses about callbacks, logs and progress bars."""

import contextlib
import csv
import importlib.util
import io
import json
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.testing.clause import clause
from sb3_offline_ft.testing.learners import Algorithm, assert_finite, assert_same, folder, make, state, vector_data
from sb3_offline_ft.testing.point_env import PointEnv

ONLINE_KEYS = (
    "rollout/ep_len_mean",
    "rollout/ep_rew_mean",
    "time/episodes",
    "time/fps",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/actor_loss",
    "train/critic_loss",
    "train/learning_rate",
    "train/n_updates",
)
OFFLINE_KEYS = ("offline/actor_loss", "offline/critic_loss", "offline/gradient_steps", "offline/learning_rate")


class StopAfter(BaseCallback):
    """Returns False at a given call, and counts its calls."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def _on_step(self) -> bool:
        return self.n_calls < self.n


def _evaluation(**settings: Any) -> EvalCallback:
    return EvalCallback(Monitor(PointEnv()), **({"n_eval_episodes": 2, "verbose": 0} | settings))


@clause
def check_callbacks(algorithm: Algorithm, **settings: Any) -> None:
    """SB3's callbacks work in both phases: evaluation, checkpoints, lists, functions."""
    model = make(algorithm, settings, dataset=vector_data(), offline_steps=20)
    with folder() as path:
        offline = _evaluation(eval_freq=10, best_model_save_path=str(path / "offline"), log_path=str(path / "offline"))
        model.pretrain(20, callback=[offline, CheckpointCallback(10, str(path), "offline")])
        assert offline.evaluations_timesteps == [10, 20], f"evaluations while pretraining at {offline.evaluations_timesteps}"
        online = _evaluation(eval_freq=20, best_model_save_path=str(path / "online"), log_path=str(path / "online"))
        checkpoints = CheckpointCallback(20, str(path), "online", save_replay_buffer=True)
        model.learn(60, callback=CallbackList([EveryNTimesteps(1, online), checkpoints]))
        assert online.evaluations_timesteps == [0, 20, 40, 60], f"evaluations online at {online.evaluations_timesteps}"
        for name in ("offline_10_steps", "offline_20_steps", "online_20_steps", "online_60_steps"):
            assert (path / f"{name}.zip").exists(), f"there is no checkpoint {name}.zip: {sorted(path.iterdir())}"
        loaded = algorithm.load(path / "online_40_steps", env=PointEnv(), device="cpu", dataset=vector_data())
        loaded.load_replay_buffer(path / "online_replay_buffer_40_steps.pkl")
        assert loaded.num_timesteps == 40 and loaded.replay_buffer is not None, f"it has {loaded.num_timesteps} steps"
        loaded.learn(10, reset_num_timesteps=False)
        for phase in ("offline", "online"):
            assert (path / phase / "evaluations.npz").exists(), f"there are no evaluations of the {phase} phase"
            algorithm.load(path / phase / "best_model", device="cpu")
    calls = iter(range(100))
    model.learn(7, callback=lambda _locals, _globals: next(calls) >= 0)
    n_calls = next(calls)
    assert n_calls == 7, f"a function as a callback is called {n_calls} times in 7 steps"


@clause
def check_stopping(algorithm: Algorithm, **settings: Any) -> None:
    """A callback that returns False ends either phase at once, and SB3's stopping callbacks do."""
    model = make(algorithm, settings, dataset=vector_data())
    model.pretrain(50, callback=StopAfter(7))
    assert model.offline_steps_done == 7, f"asked to stop at 7, pretraining stopped at {model.offline_steps_done}"
    model.learn(50, callback=StopAfter(9))
    assert model.num_timesteps == 9, f"asked to stop at 9, `learn` stopped at {model.num_timesteps}"
    model.learn(500, callback=StopTrainingOnMaxEpisodes(2))
    assert 2 <= model.num_timesteps <= 40, f"after at most 40 steps of two episodes it is at {model.num_timesteps}"
    model.learn(500, callback=_evaluation(eval_freq=10, callback_on_new_best=StopTrainingOnRewardThreshold(-1e9)))
    assert model.num_timesteps <= 10, f"the threshold is met at once, but training stopped at {model.num_timesteps}"
    no_improvement = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2)
    model.learn(2000, callback=_evaluation(eval_freq=1, callback_after_eval=no_improvement))
    assert model.num_timesteps < 2000, "a run without improvement is not stopped"


@clause
def check_collapse_guard(algorithm: Algorithm, **settings: Any) -> None:
    """``CollapseGuard`` changes nothing, to the bit, while all is well, and puts the learner back when it is not."""
    common: dict[str, Any] = {"dataset": vector_data(), "offline_steps": 20, "warmup_steps": 150}
    runs = []
    for guarded in (False, True):
        model = make(algorithm, settings, **common)
        guard = CollapseGuard(signal_freq=50, verbose=0, promotion_episodes=5, ratchet=False, tolerance=0.9)
        model.learn(300, callback=guard if guarded else None)
        runs.append(state(model))
    assert guard.alarms == 0, f"{guard.alarms} alarms without a collapse"
    assert any(event["event"] == "baseline" for event in guard.events), "the guard has no baseline from the warm-up"
    n_signals = sum(event["event"] == "signal" for event in guard.events)
    assert n_signals >= 2, f"{n_signals} measurements of signals in 300 steps, expected some every 50"
    assert_same(runs[1], runs[0], "a run under guard is the same as without")
    model = make(algorithm, settings, **common)
    guard = CollapseGuard(baseline=np.linspace(99.0, 101.0, 20), tolerance=0.0, max_rollbacks=1, after_max_rollbacks="stop",
                          verbose=0)  # fmt: skip
    model.learn(2000, callback=guard)
    assert guard.rollbacks == 1 and guard.alarms == 2, f"{guard.alarms} alarms, {guard.rollbacks} rollbacks: expected 2 and 1"
    assert model.num_timesteps < 2000, "the guard does not end the run"
    assert_finite(model)


@clause
def check_logs(algorithm: Algorithm, **settings: Any) -> None:
    """SB3's outputs all show SB3's values in the online phase, and those of pretraining under ``offline/``."""
    formats = ["stdout", "log", "json", "csv"]
    if importlib.util.find_spec("tensorboard") is not None:
        formats.append("tensorboard")
    model = make(algorithm, settings, dataset=vector_data(), offline_steps=20)
    with folder() as path, contextlib.redirect_stdout(io.StringIO()) as shown:
        # SB3's own writer keeps the stream that it finds now
        model.set_logger(configure(str(path), formats))
        model.pretrain(20, log_interval=10)
        model.learn(120, log_interval=1)
        model.logger.close()
        text = (path / "log.txt").read_text()
        with (path / "progress.csv").open(newline="") as file:
            columns = next(csv.reader(file))
        lines = [json.loads(line) for line in (path / "progress.json").read_text().splitlines()]
        assert "tensorboard" not in formats or any("tfevents" in file.name for file in path.iterdir()), "no tensorboard file"
    for key in (*ONLINE_KEYS, *OFFLINE_KEYS):
        assert key in columns, f"{key} is not logged, found {', '.join(sorted(columns))}"
        values = np.array([line[key] for line in lines if line.get(key) is not None], float)
        assert len(values) and np.isfinite(values).all(), f"{key} has the values {values}"
        for where, output in (("log.txt", text), ("stdout", shown.getvalue())):
            assert key.split("/")[1] in output, f"{key} is not shown in {where}"
    offline = [line for line in lines if line.get("offline/gradient_steps") is not None]
    assert [line["offline/gradient_steps"] for line in offline] == [10, 20], f"logged while pretraining: {offline}"
    mixed = [key for line in offline for key in line if key.startswith("train/") and line[key] is not None]
    assert not mixed, f"values of the online phase are logged while pretraining: {mixed}"


@clause
def check_progress_bars(algorithm: Algorithm, **settings: Any) -> None:
    """``progress_bar=True`` shows one bar for each phase."""
    model = make(algorithm, settings, dataset=vector_data(), offline_steps=20)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        model.learn(30, progress_bar=True)
        make(algorithm, settings, dataset=vector_data()).pretrain(20, progress_bar=True)
    shown = out.getvalue() + err.getvalue()
    assert shown.count("20/20") >= 2, f"the bar of the offline phase is not complete: {shown[-300:]!r}"
    assert "30/30" in shown, f"the bar of the online phase is not complete: {shown[-300:]!r}"
