"""Who of those that run a study's cells is still alive."""

import contextlib
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

HEARTBEAT = (15, 120)
"""Seconds between two signs of life in a database, and seconds without one after which a worker counts as dead."""

STORAGE_FAULTS = (StorageInternalError, SQLAlchemyError)
"""What Optuna raises when a database fails or cannot be reached."""

Release = Callable[[], None]


class Liveness(Protocol):
    """How processes show that they are at work on a trial, and others see that they are not any more."""

    def hold(self, number: int) -> Release | None:
        """
        Show from now on that this process is at work on a trial.

        :param number: The trial's number
        :return: Ends it; None if another process is at work on the trial
        """

    def is_alive(self, trial: FrozenTrial) -> bool:
        """
        :param trial: A running trial
        :return: Whether somebody may be at work on it
        """

    def end_dead(self, trials: list[FrozenTrial]) -> None:
        """
        Let running trials fail if nobody is at work on them.

        :param trials: The study's trials
        """


class FileLocks:
    """
    For journal files: who runs a trial holds the lock of a file, which the operating system takes from processes that die.

    :param folder: Folder of these files
    :param storage: The journal
    :param study_id: The study's id in it
    """

    def __init__(self, folder: Path, storage: BaseStorage, study_id: int) -> None:
        self._folder = folder
        self._storage = storage
        self._study_id = study_id

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._folder / f"{self._study_id}-{number}.lock")

    def hold(self, number: int) -> Release | None:
        """See :class:`Liveness`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock(number)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None

        def release() -> None:
            lock.release()
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)

        return release

    def is_alive(self, trial: FrozenTrial) -> bool:
        """See :class:`Liveness`."""
        lock = self._lock(trial.number)
        if not Path(lock.lock_file).exists():
            return False
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        except OSError:
            # Somebody else's files: they cannot be tried
            return True
        lock.release()
        return False

    def end_dead(self, trials: list[FrozenTrial]) -> None:
        """See :class:`Liveness`."""
        for trial in trials:
            if trial.state == TrialState.RUNNING and not self.is_alive(trial):
                with contextlib.suppress(UpdateFinishedTrialError):
                    trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
                    self._storage.set_trial_state_values(trial_id, TrialState.FAIL)


class Heartbeats:
    """
    For databases: who runs a trial writes Optuna's heartbeats, the time of which is the server's.

    :param storage: The database
    :param study: The study
    :param study_id: Its id in the database
    """

    def __init__(self, storage: RDBStorage, study: optuna.Study, study_id: int) -> None:
        self._storage = storage
        self._study = study
        self._study_id = study_id

    def hold(self, number: int) -> Release | None:
        """See :class:`Liveness`."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        # Before the trial is taken: a running trial that never had a heartbeat would never count as dead
        self._storage.record_heartbeat(trial_id)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT[0]):
                # The server may be back in time for the next one
                with contextlib.suppress(*STORAGE_FAULTS):
                    self._storage.record_heartbeat(trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()

        def release() -> None:
            stop.set()
            thread.join()

        return release

    def is_alive(self, trial: FrozenTrial) -> bool:
        """See :class:`Liveness`; what is dead was ended by :meth:`end_dead`."""
        return True

    def end_dead(self, trials: list[FrozenTrial]) -> None:
        """See :class:`Liveness`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(self._study)
