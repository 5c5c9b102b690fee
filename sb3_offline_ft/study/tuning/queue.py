"""The trials of a tuning, taken by workers as the cells of a study are."""

import math
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from sb3_offline_ft.study.design.protocol import Cell
from sb3_offline_ft.study.engine.queue import CELL, ERROR, KEY, CellState, Claim, StudyQueue
from sb3_offline_ft.study.tuning.plan import TuningPlan
from sb3_offline_ft.tuning.pruner import PRESET

JOURNAL = "tune.log"
SCORES = "scores"
"""User attribute with the score of each seed that has ended, and facts about its run."""
SEARCH = "search"
"""User attribute with how a trial was searched: a later call may ask for another sampler or pruner."""
GIVEN_UP = "given_up"
"""User attribute that says where a trial was given up."""
MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class TrialSlot(Cell):
    """A trial that a tuning shall have; number 0 is the preset."""

    number: int = 0

    @property
    def name(self) -> str:
        return "preset" if self.number == 0 else f"trial {self.number}"


class TuningQueue(StudyQueue):
    """
    The trials of a tuning in a storage: a fixed number of slots, each of which is tried again if its worker dies, with the
    same hyperparameters.

    :param plan: The tuning
    :param storage: A journal file ending in ``.log``, or the URL of a database; None for the journal in the study's folder
    :param create: Whether to begin the tuning if the storage does not know it
    :raises OSError: The storage cannot be opened, or does not know the tuning
    """

    def __init__(self, plan: TuningPlan, storage: str | None = None, create: bool = True) -> None:
        self.plan = plan
        storage = str(plan.study.folder / JOURNAL) if storage is None else storage
        super().__init__(plan.protocol.changed(name=plan.name), storage, create)
        slots = [TrialSlot(plan.dataset, plan.method, plan.seeds[0], number) for number in range(plan.settings.n_trials)]
        self.cells = {f"slot-{slot.number}": [slot] for slot in slots}
        # All trials have the same pretraining: nobody shall wait for it with another one
        self._pretraining = dict.fromkeys(self.cells)
        self.study.sampler, self.study.pruner = plan.sampler(), plan.pruner()

    def trial(self, claim: Claim) -> Trial:
        """A trial that this process has taken, as Optuna gives it to objectives."""
        return Trial(self.study, self.trial_id(claim.number))

    def finish(self, claim: Claim, value: float) -> bool:
        """Record a trial's value; False if it was taken from this process because it seemed dead."""

        def end() -> None:
            self.storage.set_trial_state_values(self.trial_id(claim.number), TrialState.COMPLETE, [value])

        return claim._end(end)

    def give_up(self, claim: Claim) -> bool:
        """Record that a trial is not worth going on with; False as for :meth:`finish`."""

        def end() -> None:
            trial_id = self.trial_id(claim.number)
            _, value = max(self.storage.get_trial(trial_id).intermediate_values.items(), default=(0, math.nan))
            values = [value] if math.isfinite(value) else None
            self.storage.set_trial_state_values(trial_id, TrialState.PRUNED, values)

        return claim._end(end)

    def trials(self) -> list[FrozenTrial]:
        """All trials that have ended with a value, were given up, or failed with an error."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state in MEASURED or (trial.state == TrialState.FAIL and ERROR in trial.user_attrs)
        ]

    def _state(self, trials: list[FrozenTrial]) -> tuple[CellState, FrozenTrial | None]:
        for trial in trials:
            if trial.state in MEASURED:
                return CellState.DONE, trial
        return super()._state(trials)

    def _has_rival(self, key: str, number: int) -> bool:
        others = (trial for trial in self._trials().get(key, []) if trial.number != number)
        return any(trial.state in MEASURED for trial in others) or super()._has_rival(key, number)

    def _enqueue(self, key: str) -> None:
        attributes: dict[str, Any] = {CELL: self.cells[key][0].name, KEY: key, **self.plan.facts}
        earlier = [trial.params for trial in self._trials().get(key, []) if trial.params]
        parameters = earlier[-1] if earlier else {}
        if key == next(iter(self.cells)):
            attributes[PRESET], parameters = True, self.plan.preset_parameters()
        self.study.enqueue_trial(parameters, user_attrs=attributes)

    def restore_run_folders(self) -> None:
        """Trials have no run folders."""


def trial_note(trial: FrozenTrial) -> str:
    """What became of a trial that has ended, in a few words."""
    if trial.state == TrialState.COMPLETE:
        return "complete"
    if trial.state == TrialState.PRUNED:
        return f"given up {trial.user_attrs.get(GIVEN_UP, '')}".rstrip()
    return "failed: " + str(trial.user_attrs[ERROR]).rstrip().rpartition("\n")[2]
