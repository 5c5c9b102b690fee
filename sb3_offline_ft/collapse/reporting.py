"""How a guarded run tells what happens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import HumanOutputFormat, Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse.events import EPISODES, EVENTS_FILE, EventLog
from sb3_offline_ft.collapse.signals import SignalMonitor
from sb3_offline_ft.common.callbacks import find_callbacks, monitor_folder
from sb3_offline_ft.common.warning import warn


@dataclass
class Counts:
    """What has happened in a run, and how often."""

    episodes: int = 0
    alarms: int = 0
    rollbacks: int = 0
    promotions: int = 0
    undone_updates: int = 0
    is_stopped: bool = False
    """Whether the guard has ended training."""


@dataclass
class Reporter:
    """Writes events into the log of events, values into that of SB3, warns, and prints."""

    log: EventLog
    verbose: int
    learner: OffPolicyAlgorithm | None = None
    evaluations: Sequence[EvalCallback] = ()
    """Of which rl-zoo3's in ``-optimize`` know a trial."""
    counts: Counts = field(default_factory=Counts)

    @property
    def model(self) -> OffPolicyAlgorithm:
        assert self.learner is not None
        return self.learner

    def event(self, kind: str, **details: Any) -> None:
        steps, updates = self.model.num_timesteps, self.model._n_updates
        place = {"timestep": steps, "episode": self.counts.episodes, "n_updates": updates}
        self.log.append({"event": kind, **place, "time": time.time(), **details})

    def record(self, **values: float | None) -> None:
        for name, value in values.items():
            self.model.logger.record(f"collapse/{name}", value)

    def warn(self, message: str) -> None:
        self.event("warning", message=message)
        warn(f"CollapseGuard: {message}")

    def say(self, message: str, level: int = 1) -> None:
        if self.verbose >= level:
            print(f"CollapseGuard: {message}")

    def tell_trial(self, is_watched: bool) -> None:
        """Write what has come of the run so far into Optuna's trial, if it is one."""
        for evaluation in self.evaluations:
            trial: Any = getattr(evaluation, "trial", None)
            if trial is not None:
                trial.set_user_attr("collapse_rollbacks", self.counts.rollbacks)
                trial.set_user_attr("collapse_alarms", self.counts.alarms)
                trial.set_user_attr("collapse_watched", is_watched)

    def tell_end(self, signals: SignalMonitor, signal_freq: int) -> None:
        """Write the last event, and before it what was not done although it was asked for."""
        messages = []
        if signals.n_measured == 0 and signal_freq > 0:
            short = f": `signal_freq={signal_freq}` is longer than the run."
            scarce = f", {signals.n_asked} times for want of rows in the replay buffer."
            messages.append("No signal was measured" + (scarce if signals.n_asked else short))
        if all(event.get("phase", "monitoring") != "monitoring" for event in self.log.events if event["event"] in EPISODES):
            messages.append("No episode was compared with a baseline: the run ended before one, or there is no baseline.")
        for message in messages:
            self.event("warning", message=message)
            self.say(message)
        counts = {name: getattr(self.counts, name) for name in ("rollbacks", "alarms", "promotions")}
        self.event("end", **counts, signals=signals.n_measured)


def start_log(folder: Path | None, resume: bool, name: str = EVENTS_FILE) -> EventLog:
    """The log of a run that begins or goes on; a damaged file is kept aside."""
    path = None if folder is None else folder / name
    log = EventLog(path)
    try:
        log.start(resume)
    except ValueError as error:
        assert path is not None
        aside = path.replace(path.with_suffix(".damaged"))
        warn(f"{error} It is kept as {aside}.")
        log.start(resume=False)
    return log


def run_folder(callback: BaseCallback | None, logger: Logger, env: VecEnv) -> Path | None:
    """Where a run's files are: with those of its ``EvalCallback``, or of the logger or ``Monitor``, if they keep any."""
    for evaluation in find_callbacks(callback, EvalCallback):
        if evaluation.log_path is not None:
            # SB3 appends the file's name, `evaluations`
            return Path(evaluation.log_path).parent
    # SB3's default logger has a folder too, in which nobody looks
    keeps_files = any(not isinstance(form, HumanOutputFormat) or form.own_file for form in logger.output_formats)
    folder = logger.get_dir() if keeps_files else None
    return Path(folder) if folder else monitor_folder(env)


def evaluations_with_returns(callback: BaseCallback | None) -> list[EvalCallback]:
    """The evaluations of a run that keep their returns; ``ValueError`` if there are none."""
    evaluations = [each for each in find_callbacks(callback, EvalCallback) if each.log_path is not None]
    if not evaluations:
        raise ValueError(
            "`baseline='evaluations'` needs an EvalCallback with `log_path=...` in the same list of callbacks (only then it "
            "keeps its returns): pass one to `learn`, or use `baseline='warmup'`."
        )
    return evaluations
