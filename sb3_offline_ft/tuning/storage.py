"""Optuna's storages, opened with clear errors."""

import os
import re
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

JOURNAL_SUFFIX = ".log"
SECRETS = ("pass", "pwd", "secret", "token")
"""Parts of names in the query of a URL whose values are shown to nobody."""
ATTEMPTS = 5
PAUSE_SECONDS = 0.2
CONNECT_SECONDS = 15
MADE_BY_ANOTHER = ("already exists", "database is locked")
"""What databases say to the second of two processes that make the tables at once, if rows do not collide."""


def with_absolute_path(storage: str) -> str:
    """A storage's path or URL, as Optuna needs it to find that a process died which had locked the journal."""
    return str(Path(storage).absolute()) if storage.endswith(JOURNAL_SUFFIX) else storage


def without_password(storage: str) -> str:
    """A storage's path or URL, as it may be shown."""
    if storage.endswith(JOURNAL_SUFFIX):
        return storage
    try:
        return _shown(make_url(storage))
    except (ArgumentError, ValueError):
        return _shown_in_part(storage)


def _shown(url: URL) -> str:
    secret = {name: "hidden" for name in url.query if any(word in name.lower() for word in SECRETS)}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def _shown_in_part(storage: str) -> str:
    """What cannot be read as a URL: where a password would be in it is not known."""
    if "@" not in storage and "=" not in storage:
        return storage
    scheme = re.match(r"[A-Za-z0-9+]+:?//", storage)
    return f"{scheme[0] if scheme else ''}..."


def open_storage(storage: str, create: bool, heartbeat: tuple[int, int] | None = None) -> BaseStorage:
    """
    Open a storage as rl_zoo3 does.

    :param storage: A journal file ending in ``.log``, or the URL of a database
    :param create: Whether a file that does not exist is made
    :param heartbeat: For a database: seconds between the signs of life of those who run trials, and seconds without one after
        which they count as dead
    :return: The storage
    :raises OSError: It cannot be opened
    :raises ImportError: The database's driver is not installed
    :raises ValueError: It is neither of the two
    """
    if storage.endswith(JOURNAL_SUFFIX):
        return _open_journal(Path(storage), create)
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        raise ValueError(
            f"`--storage` is {_shown_in_part(storage)!r}, which cannot be read: expected a journal file ending in "
            f"{JOURNAL_SUFFIX}, or the URL of a database such as 'sqlite:///study.db' or "
            "'postgresql+psycopg://user:password@host/database', where a port is a number."
        ) from None
    if url.get_backend_name() == "sqlite" and not create and not Path(url.database or "").exists():
        raise FileNotFoundError(f"There is no storage {url.database!r}: give that of the study with `--storage`.")
    url = _with_driver(url)
    shown = _shown(url)
    try:
        return _open_database(url, heartbeat)
    except ImportError as error:
        raise ImportError(
            f"The storage {shown} needs a driver that is not installed ({_first_line(error.__cause__ or error)}): install it "
            "with pip, such as psycopg[binary] for 'postgresql+psycopg://' or pymysql for 'mysql+pymysql://'."
        ) from None
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        raise OSError(
            f"The storage {shown} cannot be opened: {_first_line(getattr(error, 'orig', None) or error)}. Check the address, "
            "the user's rights and that the server runs."
        ) from None


def _with_driver(url: URL) -> URL:
    """What servers' manuals call ``postgres://`` or ``postgresql://``, with the driver that is installed."""
    if url.drivername in ("postgres", "postgresql"):
        driver = "psycopg2" if find_spec("psycopg") is None and find_spec("psycopg2") is not None else "psycopg"
        return url.set(drivername=f"postgresql+{driver}")
    return url


def _open_database(url: URL, heartbeat: tuple[int, int] | None) -> BaseStorage:
    settings: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True}}
    if url.get_driver_name() in ("psycopg", "psycopg2", "pymysql", "mysqldb"):
        settings["engine_kwargs"]["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    if heartbeat is not None:
        settings["heartbeat_interval"], settings["grace_period"] = heartbeat
    address = url.render_as_string(hide_password=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for attempt in range(1, ATTEMPTS):
            try:
                return RDBStorage(address, **settings)
            except SQLAlchemyError as error:
                if not isinstance(error, IntegrityError) and not any(text in str(error) for text in MADE_BY_ANOTHER):
                    raise
                time.sleep(PAUSE_SECONDS * attempt)
        return RDBStorage(address, **settings)


class _JournalLock(JournalFileSymlinkLock):
    """
    The lock of those who write a journal. A process that was killed while it wrote, or whose disk was full, leaves part of a
    line, after which Optuna could not read what others write: who gets the lock next removes it.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        """True, when the lock is there."""
        super().acquire()
        try:
            with open(self._path, "rb+") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                if end and file.read(1) != b"\n":
                    file.truncate(_end_of_last_line(file, end))
        except BaseException:
            self.release()
            raise
        return True


def _end_of_last_line(file: BinaryIO, end: int, step: int = 65536) -> int:
    while end > 0:
        begin = max(end - step, 0)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _open_journal(path: Path, create: bool) -> BaseStorage:
    if not create and not path.exists():
        raise FileNotFoundError(f"There is no storage {str(path)!r}: give that of the study with `--storage`.")
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Who only looks at a study need not be able to write to it
        with path.open("ab" if create else "rb"):
            pass
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(str(path))))
    except OSError as error:
        verb = "written" if create else "read"
        raise OSError(
            f"The journal {str(path)!r} cannot be {verb}: {error.strerror or error}. Choose another file with `--storage`."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def describe_trial(storage: str, study_name: str, number: int) -> str:
    """What is known of a trial, by its number."""
    opened = open_storage(storage, create=False)
    names = optuna.get_all_study_names(opened)
    if study_name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise ValueError(
            f"There is no study {study_name!r} in {without_password(storage)}: it has {known}. Choose one with `--study-name`."
        )
    study = optuna.load_study(study_name=study_name, storage=opened)
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise ValueError(
            f"There is no trial {number} in the study {study_name!r}, which has the trials 0 to {len(trials) - 1}: "
            "choose one with `--trial-id`."
        )
    trial = trials[number]
    told: dict[str, Any] = {"study's seed": study.user_attrs.get("seed"), "evaluated every": trial.user_attrs.get("eval_freq")}
    values = "no value" if trial.value is None else f"value {trial.value:.1f}"
    facts = [values, *(f"{name} {value}" for name, value in told.items() if value is not None)]
    return f"Trial {trial.number} ({trial.state.name.lower()}): {', '.join(facts)}"
