"""A process that runs trials of a tuning, one after the other."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import optuna
from optuna import TrialPruned
from optuna.trial import Trial

from sb3_offline_ft.pretrained.cache import default_folder
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.folder import CellResult
from sb3_offline_ft.study.engine.liveness import STORAGE_FAULTS
from sb3_offline_ft.study.engine.queue import Claim, trying_again
from sb3_offline_ft.study.engine.worker import TAKEN_OVER, Evaluated, Finished, Interrupts, Worker, last_line, work
from sb3_offline_ft.study.tuning.plan import TuningPlan, TuningSettings
from sb3_offline_ft.study.tuning.queue import GIVEN_UP, SCORES, SEARCH, TuningQueue
from sb3_offline_ft.tuning.objective import Objective, Score
from sb3_offline_ft.tuning.pruner import DEEPEST_DIP, PRESET

KEPT = (
    "frozen_until",
    "interactions",
    "learner_evaluation_steps",
    "replay_buffer",
    "updates",
    "alarms",
    "rollbacks",
    "changed_hyperparams",
    "versions",
    "code",
)
"""What a trial keeps of the manifest of each of its runs."""


def final_score(objective: Objective, result: CellResult) -> Score:
    """The value of a run that has ended; an error if it is not finite, or nothing was evaluated after the warm-up."""
    score = objective.score(result.timesteps.tolist(), result.returns.mean(axis=1).tolist(), result.frozen_until)
    if score is None:
        raise ValueError(
            f"The last evaluation is at {result.timesteps[-1]:,} interactions, and the warm-up ends at "
            f"{result.frozen_until:,}: nothing was measured after it. Set a smaller `evaluation.every` in study.yml."
        )
    if not math.isfinite(score.value):
        raise ValueError(
            f"The returns are not finite: the run ended with {score.last_return}, the lowest is {score.lowest_return}."
        )
    return score


class TuningWorker(Worker):
    """Runs trials of a tuning in this process."""

    _unit = "trial"
    queue: TuningQueue

    def __init__(self, settings: TuningSettings, connection: Connection, interrupts: Interrupts) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings = settings
        self.connection = connection
        self.interrupts = interrupts
        self.plan = TuningPlan(settings, settings.protocol())
        self.protocol = self.plan.protocol
        self.queue = TuningQueue(self.plan, settings.storage, create=False)
        self.keys = list(self.queue.cells)
        self.pretrained_folder = default_folder(self.protocol.folder)
        self._reported = 0.0

    def _compute(self, claim: Claim) -> Callable[[], Finished]:
        try:
            value = _TrialRun(self, claim).value()
        except TrialPruned as error:
            where = str(error)
            return lambda: Finished(note=f"given up {where}" if self.queue.give_up(claim) else TAKEN_OVER)
        return lambda: Finished(note=f"value {value:+.3f}" if self.queue.finish(claim, value) else TAKEN_OVER)

    def _failed(self, claim: Claim, error: Exception) -> None:
        if claim.key == self.keys[0]:
            raise ValueError(f"The preset failed, without which nothing can be compared: {last_line(error)}") from None


class _TrialRun:
    """The runs of a trial, seed by seed."""

    def __init__(self, worker: TuningWorker, claim: Claim) -> None:
        self.worker, self.plan, self.claim = worker, worker.plan, claim
        self.trial: Trial = trying_again(lambda: worker.queue.trial(claim))
        self.scores: list[Score] = []
        self.told: list[dict[str, Any]] = []
        self.deepest = -math.inf
        self.timesteps: list[int] = []
        self.means: list[float] = []

    def value(self) -> float:
        """The mean of the seeds' values; raises ``TrialPruned`` if it was given up."""
        plan, worker = self.plan, self.worker
        is_preset = PRESET in self.trial.user_attrs
        trying_again(lambda: self.trial.set_user_attr(SEARCH, plan.settings.search_facts))
        names = plan.preset_parameters() if is_preset else None
        parameters = trying_again(lambda: plan.space.draw(self.trial, names))
        method = plan.tuned(None if is_preset else parameters)
        self.frozen_until = plan.frozen_until(method.hyperparams)
        for seed in plan.seeds:
            self.timesteps, self.means = [], []
            result = run_cell(
                plan.protocol,
                plan.cell(method, seed),
                pretrained_folder=worker.pretrained_folder,
                on_step=self._progress_of(seed),
                on_evaluation=self._evaluated,
                device=worker.settings.device,
            )
            self.scores.append(final_score(plan.objective, result))
            facts = {name: result.manifest[name] for name in KEPT}
            self.told.append({"seed": seed, **asdict(self.scores[-1]), **facts})
            with worker.interrupts.deferred():
                trying_again(lambda: self.trial.set_user_attr(SCORES, self.told))
        return float(np.mean([score.value for score in self.scores]))

    def _progress_of(self, seed: int) -> Callable[[str, int, int], None]:
        return lambda phase, done, total: self.worker._step(f"{phase}, seed {seed}", done, total)

    def _evaluated(self, timestep: int, returns: Sequence[float]) -> None:
        mean = float(np.mean(returns))
        self.timesteps.append(timestep)
        self.means.append(mean)
        self.worker.send(Evaluated(timestep, mean))
        score = self.plan.objective.score(self.timesteps, self.means, self.frozen_until)
        if score is not None:
            with self.worker.interrupts.deferred():
                self._report(timestep, score)

    def _report(self, timestep: int, score: Score) -> None:
        """Report what the trial's value would be if it ended here, and give it up if that is not promising."""
        n_ended = len(self.scores)
        self.deepest = max(self.deepest, score.dip_depth)
        value = (sum(each.value for each in self.scores) + score.value) / (n_ended + 1)
        step = n_ended * self.plan.n_evaluations + timestep // self.plan.study.evaluation.every
        # A database that cannot be reached just now is not told
        with contextlib.suppress(*STORAGE_FAULTS):
            self.trial.set_user_attr(DEEPEST_DIP, self.deepest)
            self.trial.report(value, step)
            if self.trial.should_prune():
                where = f"at {timestep:,} interactions with seed {self.plan.seeds[n_ended]}, deepest dip {self.deepest:.2f}"
                self.trial.set_user_attr(GIVEN_UP, where)
                raise TrialPruned(where)


def tune_work(settings: TuningSettings, connection: Connection) -> None:
    """Run trials until none waits, or the parent sends something."""
    work(settings, connection, TuningWorker)
