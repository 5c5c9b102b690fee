"""A process that runs cells of a study, one after the other."""

import contextlib
import errno
import io
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from optuna.exceptions import UpdateFinishedTrialError

from sb3_offline_ft.pretrained.cache import default_folder
from sb3_offline_ft.study.design.protocol import Protocol, study_file
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.queue import CellState, Claim, StudyQueue, trying_again

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DISK_FULL_WORDS = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed writing file")
REPORT_SECONDS = 0.2
TAKEN_OVER = "another worker took it over, to which this one had seemed dead"


@dataclass(frozen=True)
class WorkerSettings:
    """
    What a worker is told, as :func:`run_study` is.

    :param text: The study's file as it was when the run began, None for as it is
    """

    folder: Path
    storage: str | None = None
    threads: int = 1
    device: str = "cpu"
    only: str = "*"
    text: str | None = None
    trust_pickle: bool = False

    def protocol(self) -> Protocol:
        """The study's protocol, the same throughout a run although its file may be edited meanwhile."""
        if self.text is None:
            return Protocol.load(self.folder, self.trust_pickle)
        return Protocol.parse(self.text, study_file(self.folder), self.trust_pickle)


class Took(NamedTuple):
    """A worker took a cell."""

    cell: str
    number: int


class Stepped(NamedTuple):
    """A worker has done some steps of its cell."""

    phase: str
    done: int
    total: int


class Evaluated(NamedTuple):
    """A worker has measured its cell's policy."""

    timestep: int
    mean_return: float


class Finished(NamedTuple):
    """A worker's cell has ended; ``error`` is the last line of the traceback if it failed."""

    mean_return: float | None = None
    error: str | None = None
    note: str | None = None


class Said(NamedTuple):
    """A worker's process wrote a line."""

    text: str


class Stopped(NamedTuple):
    """A worker cannot go on; nor can others."""

    reason: str


Message = Took | Stepped | Evaluated | Finished | Said | Stopped


class Interrupts:
    """SIGTERM raises ``KeyboardInterrupt``, once, and not in the middle of what must not be cut off."""

    def __init__(self) -> None:
        self._deferring = 0
        self._came = False
        signal.signal(signal.SIGTERM, self._handle)
        # The parent decides what becomes of Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, *_: Any) -> None:
        if self._came:
            return
        self._came = True
        if not self._deferring:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block be finished first."""
        came_before = self._came
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
            if self._came and not came_before:
                raise KeyboardInterrupt


class PrintedLines(io.TextIOBase):
    """Sends what is printed to the parent, line by line."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            self.say(line.rstrip())
        return len(text)

    def say(self, line: str) -> None:
        # Who prints is not to blame if there is no parent any more
        with contextlib.suppress(OSError):
            self._connection.send(Said(line))


def work(settings: Any, connection: Connection, worker_class: "type[Worker] | None" = None) -> None:
    """Run cells until none waits, or the parent sends something; it is sent messages."""
    interrupts = Interrupts()
    lines = sys.stdout = sys.stderr = PrintedLines(connection)
    th.set_num_threads(settings.threads)
    warnings.showwarning = lambda message, *_, **__: lines.say(f"Note: {message}")
    try:
        worker = (worker_class or Worker)(settings, connection, interrupts)
        worker.check()
        worker.run()
    except KeyboardInterrupt:
        return
    except Exception as error:
        known = isinstance(error, (OSError, ValueError, TypeError, ImportError))
        text = " ".join(str(error).split()) if known else "".join(traceback.format_exception(error)).rstrip()
        with contextlib.suppress(OSError):
            connection.send(Stopped(text))


def chosen_keys(queue: StudyQueue, only: str) -> list[str]:
    """
    Keys of the cells with a name that a glob matches.

    :raises ValueError: There is none
    """
    keys = [key for key, cells in queue.cells.items() if any(fnmatchcase(cell.name, only) for cell in cells)]
    if not keys:
        names = [cell.name for cells in queue.cells.values() for cell in cells]
        raise ValueError(f"`--only {only}` matches no cell: there are {', '.join(names[:10])}{', ...' if names[10:] else ''}.")
    return keys


def last_line(error: BaseException) -> str:
    """The last line of an error's traceback."""
    return traceback.format_exception_only(error)[-1].strip()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that there is no room for a file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(words in str(error) for words in DISK_FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


class Worker:
    """Runs cells of a study in this process, of which the parent at the other end of a connection is told."""

    _unit = "cell"  # what it runs, in words

    def __init__(self, settings: WorkerSettings, connection: Connection, interrupts: Interrupts) -> None:
        self.settings, self.connection, self.interrupts = settings, connection, interrupts
        self.protocol = settings.protocol()
        self.queue = StudyQueue(self.protocol, settings.storage, create=False)
        self.keys = chosen_keys(self.queue, settings.only)
        self.pretrained_folder = default_folder(self.protocol.folder)
        self._reported = 0.0

    def check(self) -> None:
        """Check what all cells need, so that they do not fail one by one."""
        self.queue.check_data()
        waiting = [each.cell for each in self.queue.statuses(self.keys) if each.state is not CellState.DONE]
        self.protocol.check(commands={cell.method.name for cell in waiting})

    def run(self) -> None:
        """
        Run cells until none waits, or the parent wants no more.

        :raises OSError: The disk is full or the storage was lost
        """
        while not self.connection.poll():
            claim = None
            try:
                with self.interrupts.deferred():
                    claim = trying_again(lambda: self.queue.claim(self.keys))
                if claim is None:
                    return
                self._run(claim)
            except BaseException as error:
                if claim is not None:
                    with self.interrupts.deferred():
                        claim.give_back()
                if isinstance(error, OSError) and error.errno is not None:
                    self._refuse_full_disk(error)
                raise

    def _run(self, claim: Claim) -> None:
        self.send(Took(claim.cell.name, claim.number))
        try:
            end = self._compute(claim)
        except UpdateFinishedTrialError:
            claim.let_go()
            self.send(Finished(note=TAKEN_OVER))
            return
        except Exception as error:
            self._refuse_full_disk(error)
            with self.interrupts.deferred():
                claim.fail("".join(traceback.format_exception(error)))
            self.send(Finished(error=last_line(error)))
            self._failed(claim, error)
            return
        with self.interrupts.deferred():
            finished = end()
        self.send(finished)

    def _compute(self, claim: Claim) -> Callable[[], Finished]:
        """Run a cell; gives what stores its result, and says how it ended."""
        # There is one if the process that ran the cell could not tell the storage
        result = self.queue.local_result(claim.key) or run_cell(
            self.protocol,
            claim.cell,
            pretrained_folder=self.pretrained_folder,
            on_step=self._step,
            on_evaluation=lambda timestep, returns: self._evaluation(claim, timestep, returns),
            device=self.settings.device,
        )

        def end() -> Finished:
            return Finished(float(result.returns[-1].mean()), note=None if claim.finish(result) else TAKEN_OVER)

        return end

    def _failed(self, claim: Claim, error: Exception) -> None:
        """Go on after an error that has been recorded."""

    def _refuse_full_disk(self, error: Exception) -> None:
        if is_disk_full(error):
            raise OSError(
                f"There is no room on the disk for {self.protocol.folder} or {self.pretrained_folder} ({last_line(error)}): "
                f"make room and run the study again, the {self._unit} waits."
            ) from None

    def send(self, message: Message) -> None:
        """
        Tell the parent.

        :raises KeyboardInterrupt: There is no parent any more, so nobody could stop this process
        """
        try:
            self.connection.send(message)
        except OSError:
            raise KeyboardInterrupt from None

    def _step(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self.send(Stepped(phase, done, total))

    def _evaluation(self, claim: Claim, timestep: int, returns: Sequence[float]) -> None:
        value = float(np.mean(returns))
        with self.interrupts.deferred():
            claim.report(timestep, value)
        self.send(Evaluated(timestep, value))
