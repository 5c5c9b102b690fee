"""Who of those that run a study's cells is still alive."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

HEARTBEAT = (15, 120)
"""Seconds between two signs of life in a database, and seconds without one after which a worker counts as dead."""

STORAGE_FAULTS = (StorageInternalError, SQLAlchemyError)
"""What Optuna raises when a database fails or cannot be reached."""

Release = Callable[[], None]


class FileLocks:
    """
    For journal files, which have no heartbeats: who runs a trial holds the lock of a file, which the operating system takes
    from processes that die.
    """

    def __init__(self, folder: Path, storage: BaseStorage, study: optuna.Study) -> None:
        self._folder, self._storage, self._study = folder, storage, study
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._folder / f"{self._study_id}-{number}.lock")

    def hold(self, number: int) -> Release | None:
        """Show from now on that this process is at work on a trial; None if another one is."""
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

    def end_dead(self) -> None:
        """Let running trials fail if nobody is at work on them, where the journal can be written."""
        if not os.access(self._folder.parent, os.W_OK):
            return
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._is_held(self._lock(trial.number)):
                with contextlib.suppress(UpdateFinishedTrialError):
                    trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
                    self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _is_held(self, lock: FileLock) -> bool:
        if not Path(lock.lock_file).exists():
            return False
        try:
            lock.acquire(blocking=False)
        # Somebody else's files cannot be tried
        except (Timeout, OSError):
            return True
        lock.release()
        return False


class Heartbeats:
    """
    For databases: who runs a trial writes Optuna's heartbeats, the time of which is the server's. Optuna's own thread would
    end with the first one that cannot be written.
    """

    def __init__(self, storage: RDBStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def hold(self, number: int) -> Release:
        """Show from now on that this process is at work on a trial."""
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

    def end_dead(self) -> None:
        """Let running trials fail of which there has been no heartbeat for long."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(self._study)
