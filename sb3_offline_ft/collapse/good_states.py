"""The states of the learner that a rollback can lead to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.learner import move_reference
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.collapse.poisoned import Mark, PoisonedData, ReplayMark
from sb3_offline_ft.collapse.reporting import Reporter
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot
from sb3_offline_ft.common.warning import warn

CANDIDATE_LIFE = 4
"""Windows of episodes after which an undecided candidate is replaced by a newer one."""
FAILURES_PER_SNAPSHOT = 2
"""Rollbacks to the same state without a promotion in between, after which an older one is tried."""


@dataclass
class GoodState:
    """A state of the learner, and what was known then."""

    snapshot: LearnerSnapshot
    timestep: int
    reference: list[Any]
    """The baseline's episodes."""
    mark: Mark
    """What was gathered by then is not poisoned."""
    is_reference: bool = False
    """Whether its policy became the reference of a constrained algorithm when it was promoted."""

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values and tensors."""
        ring = self.mark.ring
        return {
            "snapshot": self.snapshot.state_dict(),
            "timestep": self.timestep,
            "reference": list(self.reference),
            "mark": {"pos": ring.pos, "full": ring.full, "rows": self.mark.rows},
            "is_reference": self.is_reference,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: th.device) -> "GoodState":
        """The state that :meth:`state_dict` was taken of."""
        mark = Mark(ReplayMark(state["mark"]["pos"], state["mark"]["full"]), state["mark"]["rows"])
        snapshot = LearnerSnapshot.from_state_dict(state["snapshot"], device)
        return cls(snapshot, state["timestep"], state["reference"], mark, state["is_reference"])


@dataclass
class SnapshotFiles:
    """Good states as files in a run's folder, if there is one, so that a loaded run can go back to them."""

    run_folder: Path | None
    are_written: bool
    report: Reporter
    has_warned: bool = False

    def __post_init__(self) -> None:
        self.folder = None if self.run_folder is None else self.run_folder / "snapshots"

    def clear(self) -> None:
        """Remove those of another run in the same folder, and what a killed one was writing."""
        if self.are_written and self.folder is not None:
            for pattern in ("snapshot_*.pt", ".snapshot_*.tmp"):
                for file in self.folder.glob(pattern):
                    file.unlink(missing_ok=True)

    def write(self, states: list[GoodState]) -> None:
        """Have exactly these states in the folder."""
        if not self.are_written or self.folder is None:
            return
        wanted = {self._file(self.folder, state.timestep): state.snapshot for state in states}
        try:
            for file, snapshot in wanted.items():
                if not file.exists():
                    snapshot.save(file)
            for file in self.folder.glob("snapshot_*.pt"):
                if file not in wanted:
                    file.unlink()
        except OSError as error:
            if not self.has_warned:
                self.has_warned = True
                self.report.warn(f"Snapshots cannot be written to {self.folder} ({error}); training goes on without.")

    def read(self, timestep: int, model: OffPolicyAlgorithm) -> LearnerSnapshot | None:
        """The snapshot of a timestep, if it is there and fits the learner."""
        if self.folder is None or not (file := self._file(self.folder, timestep)).exists():
            return None
        try:
            snapshot = LearnerSnapshot.load(file, device=model.device)
            snapshot.check(model)
        except ValueError as error:
            warn(f"CollapseGuard: {error} The snapshot is left out.")
            return None
        return snapshot

    @staticmethod
    def _file(folder: Path, timestep: int) -> Path:
        return folder / f"snapshot_{timestep}.pt"


@dataclass
class GoodStates:
    """The learner's first state, those promoted since, and a candidate, which the episodes after it speak for or not."""

    model: OffPolicyAlgorithm
    monitor: EpisodeMonitor
    poisoned: PoisonedData
    files: SnapshotFiles
    report: Reporter
    keep: int
    """Number of promoted states to keep, besides the first one."""
    window_size: int
    """Number of episodes between two judgements of the candidate."""
    failures: int = 0
    """Rollbacks since the last promotion."""

    def __post_init__(self) -> None:
        self.states = [self._take()]
        self.window: list[float] = []
        """Returns of the episodes since the candidate was taken."""
        self._candidate: GoodState | None = None

    @property
    def newest(self) -> GoodState:
        return self.states[-1]

    def _take(self) -> GoodState:
        snapshot = LearnerSnapshot.take(self.model)
        return GoodState(snapshot, self.model.num_timesteps, self.monitor.reference, self.poisoned.gathered_so_far())

    def renew_first(self) -> None:
        """The learner has not been updated yet, but the statistics of ``VecNormalize`` have."""
        if self.model.get_vec_normalize_env() is not None and len(self.states) == 1:
            self.states[0] = self._take()

    def end_of_baseline(self) -> None:
        """What the unchanged policy gathered is not poisoned; the present step is the first one of a changed policy."""
        self.states[0].mark = self.poisoned.stored_so_far()

    def begin_period(self) -> None:
        """There is a new baseline."""
        for state in self.states:
            state.reference = state.reference or self.monitor.reference
        self.new_candidate()

    def new_candidate(self) -> None:
        self._candidate = self._take()
        self.window = []
        self.report.event("candidate")

    def judge(self, total: float) -> bool:
        """Take the return of a monitored episode into account, and tell whether the candidate is to be promoted."""
        self.window.append(total)
        if self._candidate is None or len(self.window) % self.window_size != 0:
            return False
        if self.monitor.is_not_worse(self.window):
            return True
        if len(self.window) >= CANDIDATE_LIFE * self.window_size:
            self.new_candidate()
        return False

    def promote(self, is_reference: bool) -> GoodState:
        """Make the candidate the newest good state."""
        good = self._candidate
        assert good is not None
        # The window that speaks for it is not poisoned either
        good.mark = self.poisoned.gathered_so_far()
        good.reference = self.monitor.reference
        good.is_reference = is_reference
        self.states.append(good)
        while len(self.states) > self.keep + 1:
            # The first one, from before finetuning, stays
            del self.states[1]
        self.files.write(self.states)
        self.failures = 0
        return good

    def restore(self, is_rollback: bool) -> GoodState:
        """Make the learner what it was in the newest good state, or in an older one if that has failed too often."""
        if self.failures >= FAILURES_PER_SNAPSHOT and len(self.states) > 1:
            self.states.pop()
            self.failures = 0
        self.report.counts.undone_updates += self.model._n_updates - self.newest.snapshot.n_updates
        # Not the random generators: the same batches would lead to the same collapse
        self.newest.snapshot.restore(self.model, generators=False)
        # The snapshot is older than its promotion
        self.refer_to(self.newest)
        if is_rollback:
            self.failures += 1
            self._candidate, self.window = None, []
        return self.newest

    def refer_to(self, good: GoodState) -> None:
        if good.is_reference:
            move_reference(self.model, good.snapshot.policy_state)

    def state_dict(self) -> dict[str, Any]:
        """All states, the candidate and its window, as plain values and tensors."""
        return {
            "states": [state.state_dict() for state in self.states],
            "candidate": None if self._candidate is None else self._candidate.state_dict(),
            "window": list(self.window),
            "failures": self.failures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        device, candidate = self.model.device, state["candidate"]
        self.states = [GoodState.from_state_dict(one, device) for one in state["states"]]
        self._candidate = None if candidate is None else GoodState.from_state_dict(candidate, device)
        self.window, self.failures = list(state["window"]), state["failures"]

    def read(self, timesteps: Sequence[int], references: Sequence[int]) -> None:
        """Take up the states of a run that was saved, as far as they were written; the loaded learner stays the newest."""
        self.newest.reference = self.monitor.reference
        for timestep in timesteps:
            snapshot = self.files.read(timestep, self.model)
            if snapshot is not None:
                mark, is_reference = self.poisoned.stored_so_far(), timestep in references
                older = GoodState(snapshot, timestep, self.monitor.reference, mark, is_reference)
                self.states.insert(len(self.states) - 1, older)
