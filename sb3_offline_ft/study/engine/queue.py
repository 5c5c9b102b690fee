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
from sb3_offline_ft.study.engine.liveness import HEARTBEAT, STORAGE_FAULTS, FileLocks, Heartbeats, Liveness, Release
from sb3_offline_ft.study.engine.results import StudyResults, find_result, keep_result, load_results, local_result
from sb3_offline_ft.study.engine.run_folder import CellResult
from sb3_offline_ft.tuning.storage import JOURNAL_SUFFIX, open_storage, with_absolute_path, without_password

JOURNAL = "study.log"
CELL, KEY, WORKER, STARTED = "cell", "key", "worker", "started"
RESULT, ERROR = "result", "error"
INTERRUPTED, SUPERSEDED = "interrupted", "superseded"
DATA = "data"
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
    """
    What is known of a cell.

    :param cell: The cell
    :param key: Its key
    :param state: Where it is
    :param trial: The trial that says so, None for a cell that was never enqueued
    """

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
        values = {} if self.trial is None else self.trial.intermediate_values
        return max(values.items()) if values else None

    @property
    def error(self) -> str | None:
        """The traceback of a failed cell."""
        if self.state is not CellState.FAILED:
            return None
        return self._attribute(ERROR) or (
            f"Its worker died {MOST_LOSSES} times without an error: memory ran out, the system killed it, or the environment "
            "crashed the process.\n"
        )


def stored_result(trial: FrozenTrial) -> str:
    """
    :param trial: The trial of a cell that is done
    :return: The result that it holds, as :meth:`CellResult.to_json` wrote it
    """
    attributes = trial.user_attrs
    pieces = [attributes[RESULT]]
    while (name := f"{RESULT}/{len(pieces)}") in attributes:
        pieces.append(attributes[name])
    return "".join(pieces)


def results_in_storage(protocol: Protocol, storage: str | None = None) -> StudyResults:
    """
    Read the results of a study's cells; run folders that are missing or half written are made from the storage.

    :param protocol: The protocol
    :param storage: The storage, None for the journal in the study's folder, if there is one
    :return: The results
    :raises OSError: The storage cannot be opened, or a run folder cannot be written
    """
    if storage is None and not (protocol.folder / JOURNAL).exists():
        return load_results(protocol)
    with StudyQueue(protocol, storage, create=False) as queue:
        statuses = queue.statuses()
    stored = {each.key: stored_result(each.trial) for each in statuses if each.state is CellState.DONE and each.trial}
    errors = {each.key: each.error for each in statuses if each.error is not None}
    return load_results(protocol, stored, errors)


def same_host(worker: str | None) -> bool:
    """
    :param worker: A trial's worker
    :return: Whether it is on this machine
    """
    return worker is not None and worker.rpartition(":")[0] == socket.gethostname()


def trying_again(action: Callable[[], T]) -> T:
    """
    Do what needs the storage; if a database cannot be reached, try again for about three minutes.

    :param action: What to do
    :return: What it gives
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
    """
    :param error: What a database raised
    :return: Its first line, without the statement and the address
    """
    error = error.__cause__ or error
    return (str(getattr(error, "orig", None) or error) or type(error).__name__).splitlines()[0].rstrip(".")


class Claim:
    """
    A cell that this process has taken.

    :param queue: The queue it is from
    :param cell: The cell
    :param key: Its key
    :param number: Number of its trial
    :param release: Ends the sign of life
    """

    def __init__(self, queue: "StudyQueue", cell: Cell, key: str, number: int, release: Release) -> None:
        self.cell, self.key, self.number = cell, key, number
        self._queue = queue
        self._release = release
        self._ended = False

    def report(self, timestep: int, value: float) -> None:
        """
        Tell those who watch the study how the cell goes on; a database that cannot be reached just now is not told.

        :param timestep: Interactions
        :param value: Mean return of a measured evaluation
        :raises UpdateFinishedTrialError: The cell was taken from this process because it seemed dead
        """
        with contextlib.suppress(*STORAGE_FAULTS):
            self._queue.storage.set_trial_intermediate_value(self._queue.trial_id(self.number), timestep, value)

    def finish(self, result: CellResult) -> bool:
        """
        Store the result, in the run folder and in the storage.

        :param result: The result
        :return: False if the cell was taken from this process because it seemed dead
        :raises OSError: It cannot be stored
        """
        text, value = result.to_json(), float(result.returns[-1].mean())
        self._queue.write_run_folders(self.key, result)

        def store() -> None:
            queue, trial_id = self._queue, self._queue.trial_id(self.number)
            for index, begin in enumerate(range(0, len(text), MOST_CHARACTERS)):
                name = RESULT if index == 0 else f"{RESULT}/{index}"
                queue.storage.set_trial_user_attr(trial_id, name, text[begin : begin + MOST_CHARACTERS])
            queue.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value if math.isfinite(value) else -math.inf])

        return self._end(store)

    def fail(self, error: str) -> bool:
        """
        Record that the cell failed.

        :param error: The traceback
        :return: As :meth:`finish`
        """
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

    :param protocol: The study's protocol
    :param storage: A journal file ending in ``.log``, or the URL of a database; None for the journal in the study's folder
    :param create: Whether to begin the study if the storage does not know it
    :raises OSError: The storage cannot be opened, or does not know the study
    """

    def __init__(self, protocol: Protocol, storage: str | None = None, create: bool = True) -> None:
        self.protocol = protocol
        self.location = with_absolute_path(str(protocol.folder / JOURNAL) if storage is None else storage)
        self.shown_location = without_password(self.location)
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
        self._study_id = self.storage.get_study_id_from_name(protocol.name)
        self.liveness: Liveness
        if isinstance(self.storage, RDBStorage):
            self.liveness = Heartbeats(self.storage, self.study, self._study_id)
        else:
            self.liveness = FileLocks(Path(f"{self.location}.locks"), self.storage, self._study_id)
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
                f"There is no study {name!r} in {self.shown_location}: it has {known}. Begin it with "
                "`sb3-offline-ft study run`, or give the right storage with `--storage`."
            ) from None

    def trial_id(self, number: int) -> int:
        """
        :param number: Number of a trial
        :return: Its id in the storage
        """
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
        """
        :param keys: Keys of cells; None for all
        :return: What is known of these cells, in the protocol's order
        """
        by_key = self._trials()
        return [
            CellStatus(cell, key, *self._state(by_key.get(key, [])))
            for key in (self.cells if keys is None else keys)
            for cell in self.cells[key]
        ]

    def _trials(self) -> dict[str, list[FrozenTrial]]:
        by_key: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get(KEY)
            if key is not None and SUPERSEDED not in trial.user_attrs:
                by_key.setdefault(key, []).append(trial)
        return by_key

    def _state(self, trials: list[FrozenTrial]) -> tuple[CellState, FrozenTrial | None]:
        """The state of a cell with these trials, oldest first."""
        for trial in trials:
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                return CellState.DONE, trial
        for trial in trials:
            if trial.state == TrialState.RUNNING and self.liveness.is_alive(trial):
                return CellState.RUNNING, trial
        for trial in trials:
            if trial.state == TrialState.WAITING:
                return CellState.WAITING, trial
        if not trials:
            return CellState.WAITING, None
        last = trials[-1]
        if ERROR in last.user_attrs or _losses(trials) >= MOST_LOSSES:
            return CellState.FAILED, last
        return CellState.WAITING, last

    def enqueue(self, keys: Iterable[str] | None = None, retry_failed: bool = False) -> int:
        """
        Enqueue the cells that wait and have no trial, among them those whose workers died, and end what was enqueued twice.

        :param keys: Keys of cells; None for all
        :param retry_failed: Whether to try failed cells again
        :return: How many were enqueued
        """
        self.end_dead()
        by_key, enqueued = self._trials(), 0
        for key in self.cells if keys is None else keys:
            trials = by_key.get(key, [])
            state, trial = self._state(trials)
            self._end_doubles(trials, 1 if state is CellState.WAITING else 0)
            waits = state is CellState.WAITING and (trial is None or trial.state != TrialState.WAITING)
            if waits or (retry_failed and state is CellState.FAILED):
                self._enqueue(key)
                enqueued += 1
        return enqueued

    def end_dead(self) -> None:
        """End the trials of workers that have died."""
        self.liveness.end_dead(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

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

    def _end_doubles(self, trials: list[FrozenTrial], keep: int) -> None:
        for trial in [trial for trial in trials if trial.state == TrialState.WAITING][keep:]:
            with contextlib.suppress(UpdateFinishedTrialError):
                self.end(trial.number, SUPERSEDED, True)

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
        for trial in self._trials().get(key, []):
            if trial.number == number:
                continue
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                return True
            if trial.state == TrialState.RUNNING and trial.number < number and self.liveness.is_alive(trial):
                return True
            if trial.state == TrialState.WAITING and trial.number < number:
                return True
        return False

    def _pretrained_now(self, by_key: dict[str, list[FrozenTrial]]) -> set[str | None]:
        """Pretrainings that a worker is doing, of which none on this machine is finished."""
        going_on: set[str | None] = set()
        finished: set[str | None] = {None}
        for key, pretraining in self._pretraining.items():
            for trial in by_key.get(key, []):
                # The first evaluation follows the pretraining
                if trial.intermediate_values:
                    if same_host(trial.user_attrs.get(WORKER)):
                        finished.add(pretraining)
                elif trial.state == TrialState.RUNNING:
                    going_on.add(pretraining)
        return going_on - finished

    def end(self, number: int, attribute: str, value: Any) -> None:
        """
        End a trial without a result.

        :param number: Its number
        :param attribute: Attribute that says why
        :param value: The attribute's value
        :raises UpdateFinishedTrialError: The trial has ended
        """
        self.storage.set_trial_user_attr(self.trial_id(number), attribute, value)
        self.storage.set_trial_state_values(self.trial_id(number), TrialState.FAIL)

    def give_back(self, number: int) -> None:
        """
        Let the cell of a trial wait again, nobody being at work on it any more, unless it has ended.

        :param number: The trial's number
        """
        trial = self.storage.get_trial(self.trial_id(number))
        if not trial.state.is_finished():
            with contextlib.suppress(UpdateFinishedTrialError):
                self.end(number, INTERRUPTED, True)
            self.enqueue([trial.user_attrs[KEY]])

    def lost(self, number: int) -> None:
        """
        End a trial whose process is known to be dead.

        :param number: The trial's number
        """
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(self.trial_id(number), TrialState.FAIL)

    def write_run_folders(self, key: str, result: CellResult) -> None:
        """
        Write a result for all cells that have this key, as far as it is missing or half written here.

        :param key: Key of cells
        :param result: Their result
        :raises OSError: It cannot be written
        """
        for cell in self.cells[key]:
            keep_result(self.protocol, cell, result)

    def local_result(self, key: str) -> CellResult | None:
        """
        :param key: Key of cells
        :return: Their result, if a run folder here has it
        """
        return local_result(self.protocol, self.cells[key][0])

    def restore_run_folders(self) -> None:
        """
        Write the run folders of all cells that are done, as far as they are missing or half written here.

        :raises OSError: One cannot be written
        """
        for status in self.statuses():
            if status.state is CellState.DONE and status.trial:
                find_result(self.protocol, status.cell, stored_result(status.trial))


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
    if not method.pretrained:
        return None
    return json.dumps([cell.dataset, cell.seed, dict(method.pretraining_hyperparams)], sort_keys=True, default=str)
