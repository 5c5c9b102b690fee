"""A study's cells as trials of Optuna: which are done, and which one a worker takes next."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from sb3_offline_ft.study.design.identity import data_facts
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.folder import CellResult, find_result, keep_result, local_result
from sb3_offline_ft.study.engine.liveness import HEARTBEAT, STORAGE_FAULTS, FileLocks, Heartbeats, Release
from sb3_offline_ft.tuning.storage import JOURNAL_SUFFIX, open_storage, with_absolute_path, without_password

JOURNAL = "study.log"
CELL, KEY, WORKER, STARTED = "cell", "key", "worker", "started"
RESULT, ERROR = "result", "error"
INTERRUPTED, SUPERSEDED = "interrupted", "superseded"
DATA = "data"
DAMAGED = "damaged"
"""With the number of a trial, an attribute of the study, as a trial that has ended takes none."""
MOST_CHARACTERS = 30_000
"""In one attribute of ASCII: MySQL keeps 65,535 bytes, and JSON may write a character with two."""
MOST_OF_ERROR = 10_000
"""Of a traceback, in which JSON may write a character with six bytes."""
ENDED_WITH_RESULT = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that only who runs a trial gives it."""
MOST_LOSSES = 5
"""Times that a cell's worker may die before the cell counts as failed."""
RETRY_SECONDS = (1, 2, 5, 10, 20, 30, 60, 60)

T = TypeVar("T")


class CellState(StrEnum):
    """Where a cell is."""

    DONE = "done"
    RUNNING = "running"
    WAITING = "waiting"
    FAILED = "failed"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class CellStatus:
    """What is known of a cell, and the trial that says so, None for a cell that was never enqueued."""

    cell: Cell
    key: str
    state: CellState
    trial: FrozenTrial | None

    def _attribute(self, name: str) -> str | None:
        return None if self.trial is None else self.trial.user_attrs.get(name)

    @property
    def worker(self) -> str | None:
        """Host and process id of who took it."""
        return self._attribute(WORKER)

    @property
    def started(self) -> datetime | None:
        """When it was taken, in UTC."""
        text = self._attribute(STARTED)
        return None if text is None else datetime.fromisoformat(text)

    @property
    def last_evaluation(self) -> tuple[int, float] | None:
        """Interactions and mean return of the last measured evaluation."""
        return max(self.trial.intermediate_values.items(), default=None) if self.trial is not None else None

    @property
    def error(self) -> str | None:
        """The traceback of a failed cell."""
        if self.state is not CellState.FAILED:
            return None
        return self._attribute(ERROR) or (
            f"Its worker died {MOST_LOSSES} times without an error: memory ran out, the system killed it, or the environment "
            "crashed the process.\n"
        )


def trying_again(action: Callable[[], T]) -> T:
    """
    Do what needs the storage; if a database cannot be reached, try again for about three minutes.

    :raises OSError: The database is still not there
    """
    for pause in RETRY_SECONDS:
        try:
            return action()
        except STORAGE_FAULTS:
            time.sleep(pause)
    try:
        return action()
    except STORAGE_FAULTS as error:
        raise OSError(f"The storage was lost: {fault_text(error)}.") from None


def fault_text(error: BaseException) -> str:
    """The first line of what a database raised, without the statement and the address."""
    error = error.__cause__ or error
    return (str(getattr(error, "orig", None) or error) or type(error).__name__).splitlines()[0].rstrip(".")


class Claim:
    """A cell that this process has taken, with its key and the number of its trial; ``release`` ends the sign of life."""

    def __init__(self, queue: "StudyQueue", cell: Cell, key: str, number: int, release: Release) -> None:
        self.cell, self.key, self.number = cell, key, number
        self._queue, self._release, self._ended = queue, release, False

    def report(self, timestep: int, value: float) -> None:
        """
        Tell those who watch the study how the cell goes on; a database that cannot be reached just now is not told.

        :raises UpdateFinishedTrialError: The cell was taken from this process because it seemed dead
        """
        with contextlib.suppress(*STORAGE_FAULTS):
            self._queue.storage.set_trial_intermediate_value(self._queue.trial_id(self.number), timestep, value)

    def finish(self, result: CellResult) -> bool:
        """
        Store the result, in the run folder and in the storage.

        :return: False if the cell was taken from this process because it seemed dead
        :raises OSError: It cannot be stored
        """
        text, value = result.to_json(), float(result.returns[-1].mean())
        for cell in self._queue.cells[self.key]:
            keep_result(self._queue.protocol, cell, result)

        def store() -> None:
            storage, trial_id = self._queue.storage, self._queue.trial_id(self.number)
            for index, begin in enumerate(range(0, len(text), MOST_CHARACTERS)):
                name = RESULT if index == 0 else f"{RESULT}/{index}"
                storage.set_trial_user_attr(trial_id, name, text[begin : begin + MOST_CHARACTERS])
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value if math.isfinite(value) else -math.inf])

        return self._end(store)

    def fail(self, error: str) -> bool:
        """Record that the cell failed with a traceback; False as :meth:`finish`."""
        return self._end(lambda: self._queue.end(self.number, ERROR, error[-MOST_OF_ERROR:]))

    def give_back(self) -> None:
        """Let the cell wait again, if it has not ended."""
        if not self._ended:
            # If this cannot be written either, others will see that this process is dead
            with contextlib.suppress(OSError, *STORAGE_FAULTS):
                self._queue.give_back(self.number)
            self.let_go()

    def let_go(self) -> None:
        """Show no sign of life for it any more."""
        self._ended = True
        self._release()

    def _end(self, action: Callable[[], None]) -> bool:
        mine = True
        try:
            trying_again(action)
        except UpdateFinishedTrialError:
            # Unless it was taken from this process, the storage has done it before, and its answer was lost
            trial = trying_again(lambda: self._queue.storage.get_trial(self._queue.trial_id(self.number)))
            mine = trial.state in ENDED_WITH_RESULT
        self.let_go()
        return mine


class StudyQueue:
    """
    The cells of a study in a storage. Each attempt at a cell is a trial; a cell's key, which holds all that its result
    depends on, says which trials are its own.

    Optuna keeps the trials, and says who was first to take one. It does not know which trials are the same cell, takes any
    that waits, and knows of the dead only in a database.

    :param protocol: The study's protocol
    :param storage: A journal file ending in ``.log``, or the URL of a database; None for the journal in the study's folder
    :param create: Whether to begin the study if the storage does not know it
    :raises OSError: The storage cannot be opened, or does not know the study
    """

    def __init__(self, protocol: Protocol, storage: str | None = None, create: bool = True) -> None:
        self.protocol = protocol
        self.location = with_absolute_path(str(protocol.folder / JOURNAL) if storage is None else storage)
        is_journal = self.location.endswith(JOURNAL_SUFFIX)
        self.storage = open_storage(self.location, create, None if is_journal else HEARTBEAT)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self.study = self._open_study(create)
        except BaseException:
            self.close()
            raise
        finally:
            optuna.logging.set_verbosity(verbosity)
        self.liveness = (
            Heartbeats(self.storage, self.study)
            if isinstance(self.storage, RDBStorage)
            else FileLocks(Path(f"{self.location}.locks"), self.storage, self.study)
        )
        self._study_id = self.storage.get_study_id_from_name(protocol.name)
        self._know_data(create)
        self.cells: dict[str, list[Cell]] = {}
        for cell in protocol.cells():
            self.cells.setdefault(protocol.cell_key(cell), []).append(cell)
        self._pretraining = {key: _pretraining(cells[0]) for key, cells in self.cells.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to a database."""
        if isinstance(self.storage, RDBStorage):
            self.storage.remove_session()
            self.storage.engine.dispose()

    def _open_study(self, create: bool) -> optuna.Study:
        name = self.protocol.name
        if create:
            return optuna.create_study(study_name=name, storage=self.storage, direction="maximize", load_if_exists=True)
        try:
            return optuna.load_study(study_name=name, storage=self.storage)
        except KeyError:
            known = ", ".join(map(repr, optuna.get_all_study_names(self.storage))) or "none"
            raise FileNotFoundError(
                f"There is no study {name!r} in {without_password(self.location)}: it has {known}. Begin it with "
                "`sb3-offline-ft study run`, or give the right storage with `--storage`."
            ) from None

    def trial_id(self, number: int) -> int:
        """The id in the storage of the trial with a number."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _know_data(self, record: bool) -> None:
        """Load no data that the study was begun with: cells have the keys that they have where it was begun."""
        recorded = self.study.user_attrs.get(DATA, {})
        self.protocol.remember_data(recorded)
        if record:
            facts = {label: self.protocol.data_facts(label) for label in self.protocol.datasets}
            if recorded != recorded | facts:
                self.study.set_user_attr(DATA, recorded | facts)

    def check_data(self) -> None:
        """
        Load the data and check that it is what the study was begun with, wherever that was.

        :raises FileNotFoundError: It is not here
        :raises ValueError: It is something else
        """
        for label, spec in self.protocol.datasets.items():
            found, expected = data_facts(self.protocol.dataset(label)), self.protocol.data_facts(label)
            if any(found[name] != expected[name] for name in found):
                raise ValueError(
                    f"The data of datasets.{label} ({spec}) is not what the study {self.protocol.name!r} was begun with: its "
                    f"fingerprint is {found['fingerprint']}, expected {expected['fingerprint']}. Bring the same files "
                    "here; data that was changed on purpose needs another label in study.yml, or the study another name."
                )

    def statuses(self, keys: Iterable[str] | None = None) -> list[CellStatus]:
        """What is known of the cells with these keys, or of all, in the protocol's order."""
        by_key = self._trials()
        return [
            CellStatus(cell, key, *self._state(by_key.get(key, [])))
            for key in (self.cells if keys is None else keys)
            for cell in self.cells[key]
        ]

    def _trials(self) -> dict[str, list[FrozenTrial]]:
        """The trials that count by the keys of their cells, oldest first, after those of dead workers have been ended."""
        self.liveness.end_dead()
        attributes = self.study.user_attrs
        by_key: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get(KEY)
            if key is not None and SUPERSEDED not in trial.user_attrs and f"{DAMAGED}/{trial.number}" not in attributes:
                by_key.setdefault(key, []).append(trial)
        return by_key

    def _state(self, trials: list[FrozenTrial]) -> tuple[CellState, FrozenTrial | None]:
        """The state of a cell with these trials, oldest first."""
        for trial in trials:
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                return CellState.DONE, trial
        for state, cell_state in ((TrialState.RUNNING, CellState.RUNNING), (TrialState.WAITING, CellState.WAITING)):
            for trial in trials:
                if trial.state == state:
                    return cell_state, trial
        if not trials:
            return CellState.WAITING, None
        has_failed = ERROR in trials[-1].user_attrs or _losses(trials) >= MOST_LOSSES
        return CellState.FAILED if has_failed else CellState.WAITING, trials[-1]

    def enqueue(self, keys: Iterable[str] | None = None, retry_failed: bool = False) -> int:
        """
        Enqueue the cells that wait and have no trial, among them those whose workers died, and end what was enqueued twice.

        :param keys: Keys of cells; None for all
        :param retry_failed: Whether to try failed cells again
        :return: How many were enqueued
        """
        by_key, enqueued = self._trials(), 0
        for key in self.cells if keys is None else keys:
            trials = by_key.get(key, [])
            state, trial = self._state(trials)
            waiting = [each.number for each in trials if each.state == TrialState.WAITING]
            for number in waiting[1 if state is CellState.WAITING else 0 :]:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.end(number, SUPERSEDED, True)
            waits = state is CellState.WAITING and (trial is None or trial.state != TrialState.WAITING)
            if waits or (retry_failed and state is CellState.FAILED):
                self._enqueue(key)
                enqueued += 1
        return enqueued

    def _enqueue(self, key: str) -> None:
        self.study.enqueue_trial({}, user_attrs={CELL: self.cells[key][0].name, KEY: key})

    def claim(self, keys: Sequence[str]) -> Claim | None:
        """
        Take a cell that waits. Those whose pretraining another worker is doing right now come last.

        :param keys: Keys of the cells to choose from, in the order of preference
        :return: The cell; None if none waits
        """
        by_key = self._trials()
        waiting = {}
        for key in keys:
            state, first = self._state(by_key.get(key, []))
            if state is CellState.WAITING and first is not None and first.state == TrialState.WAITING:
                waiting[key] = first.number
        busy = self._pretrained_now(by_key)
        while waiting:
            key = min(waiting, key=lambda key: self._pretraining[key] in busy)
            claim = self._take(key, waiting.pop(key))
            if claim is not None:
                return claim
            # Another worker has taken it since, and is perhaps about to pretrain
            busy |= {self._pretraining[key]} - {None}
        return None

    def _take(self, key: str, number: int) -> Claim | None:
        release = self.liveness.hold(number)
        if release is None:
            return None
        mine = False
        try:
            mine = self._begin(key, number)
        finally:
            # Without a sign of life others will take it, should the storage have failed half-way
            if not mine:
                release()
        return Claim(self, self.cells[key][0], key, number, release) if mine else None

    def _begin(self, key: str, number: int) -> bool:
        trial_id = self.trial_id(number)
        try:
            with self._one_at_a_time():
                mine = self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            if not mine:
                return False
            if self._has_rival(key, number):
                self.end(number, SUPERSEDED, True)
                return False
            self.storage.set_trial_user_attr(trial_id, WORKER, f"{socket.gethostname()}:{os.getpid()}")
            self.storage.set_trial_user_attr(trial_id, STARTED, datetime.now(UTC).isoformat(timespec="seconds"))
        except UpdateFinishedTrialError:
            return False
        return True

    def _one_at_a_time(self) -> AbstractContextManager[Any]:
        # SQLite has no locks of rows
        if isinstance(self.storage, RDBStorage) and self.storage.engine.dialect.name == "sqlite":
            database = self.storage.engine.url.database
            if database and database != ":memory:":
                return FileLock(f"{database}.lock")
        return nullcontext()

    def _has_rival(self, key: str, number: int) -> bool:
        """Whether another trial goes before this one: two processes may have enqueued the same cell at once."""
        unfinished = (TrialState.RUNNING, TrialState.WAITING)
        return any(
            (trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs)
            or (trial.state in unfinished and trial.number < number)
            for trial in self._trials().get(key, [])
            if trial.number != number
        )

    def _pretrained_now(self, by_key: dict[str, list[FrozenTrial]]) -> set[str | None]:
        """Pretrainings that a worker is doing, of which none on this machine is finished."""
        going_on: set[str | None] = set()
        finished: set[str | None] = {None}
        for key, pretraining in self._pretraining.items():
            for trial in by_key.get(key, []):
                # The first evaluation follows the pretraining
                if trial.intermediate_values:
                    if str(trial.user_attrs.get(WORKER)).rpartition(":")[0] == socket.gethostname():
                        finished.add(pretraining)
                elif trial.state == TrialState.RUNNING:
                    going_on.add(pretraining)
        return going_on - finished

    def end(self, number: int, attribute: str, value: Any) -> None:
        """
        End a trial without a result, with an attribute that says why.

        :raises UpdateFinishedTrialError: The trial has ended
        """
        self.storage.set_trial_user_attr(self.trial_id(number), attribute, value)
        self.storage.set_trial_state_values(self.trial_id(number), TrialState.FAIL)

    def give_back(self, number: int) -> None:
        """Let the cell of a trial wait again, nobody being at work on it any more, unless it has ended."""
        trial = self.storage.get_trial(self.trial_id(number))
        if not trial.state.is_finished():
            with contextlib.suppress(UpdateFinishedTrialError):
                self.end(number, INTERRUPTED, True)
            self.enqueue([trial.user_attrs[KEY]])

    def lost(self, number: int) -> None:
        """End a trial whose process is known to be dead."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(self.trial_id(number), TrialState.FAIL)

    def local_result(self, key: str) -> CellResult | None:
        """The result of the cells with a key, if a run folder here has it."""
        return local_result(self.protocol, self.cells[key][0])

    def restore_run_folders(self) -> None:
        """
        Write the run folders of all cells that are done, as far as they are missing or half written here. A cell whose result
        is damaged in the storage too has none: it waits again.

        :raises OSError: One cannot be written
        """
        for status in self.statuses():
            trial = status.trial
            if status.state is CellState.DONE and trial is not None:
                if find_result(self.protocol, status.cell, _stored_result(trial)) is None:
                    self.study.set_user_attr(f"{DAMAGED}/{trial.number}", True)


def _stored_result(trial: FrozenTrial) -> str:
    """The result in the trial of a cell that is done, as :meth:`CellResult.to_json` wrote it."""
    pieces = [trial.user_attrs[RESULT]]
    while (name := f"{RESULT}/{len(pieces)}") in trial.user_attrs:
        pieces.append(trial.user_attrs[name])
    return "".join(map(str, pieces))


def _losses(trials: list[FrozenTrial]) -> int:
    """How often in a row a worker died at last."""
    losses = 0
    for trial in reversed(trials):
        if INTERRUPTED in trial.user_attrs:
            continue
        if trial.state != TrialState.FAIL or ERROR in trial.user_attrs:
            break
        losses += 1
    return losses


def _pretraining(cell: Cell) -> str | None:
    """What tells the pretraining of one cell from that of others, None without one."""
    method = cell.method
    if not method.pretrained or method.external is not None:
        return None
    return json.dumps([cell.dataset, cell.seed, dict(method.pretraining_hyperparams)], sort_keys=True, default=str)
