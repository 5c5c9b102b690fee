"""Runs a study: starts workers, shows what they do, and sees to it that no cell is lost."""

import contextlib
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.study.design.protocol import study_file
from sb3_offline_ft.study.engine.liveness import STORAGE_FAULTS
from sb3_offline_ft.study.engine.progress import RunDisplay, counts_text
from sb3_offline_ft.study.engine.queue import CellState, CellStatus, StudyQueue, fault_text
from sb3_offline_ft.study.engine.worker import DISK_FULL, Finished, Stopped, Took, WorkerSettings, chosen_keys, work

POLL_SECONDS = 3.0
STOP_SECONDS = 10.0
MOST_EARLY_DEATHS = 3


@dataclass
class _Process:
    number: int
    process: SpawnProcess
    connection: Connection
    trial: int | None = None
    began: bool = False


class StudyRun:
    """
    The workers of one ``study run``, at most so many at once.

    :raises OSError: The storage or the data cannot be opened
    :raises ValueError: The protocol is wrong
    """

    _work: Callable[[Any, Connection], None] = staticmethod(work)
    _unit = "cell"  # what workers run, in words

    def __init__(self, settings: WorkerSettings, workers: int, console: Console) -> None:
        self.settings, self.workers = settings, workers
        self._import_env(console)
        self.queue = self._open_queue()
        self.protocol = self.queue.protocol
        self.settings = replace(settings, text=self.protocol.text)
        self.keys = chosen_keys(self.queue, settings.only)
        self.display = RunDisplay(console, f"{self._unit}s")
        self.problem: str | None = None
        self._context = multiprocessing.get_context("spawn")
        self._alive: dict[int, _Process] = {}
        self._waits_for_others = False
        self._early_deaths = 0
        self._statuses: list[CellStatus] = []
        self._next_look = 0.0

    def _import_env(self, console: Console) -> None:
        protocol = self.settings.protocol()
        if protocol.env_module:
            console.print(Text(f"Importing {protocol.env_module}, as `env` of {protocol.file} says: that runs its code."))
        for command in protocol.commands:
            console.print(Text(f"Running `{command}`, as `methods` of {protocol.file} say: that runs their code."))
        protocol.import_env()

    def _open_queue(self) -> StudyQueue:
        # If the study begins now, this loads the data, which this process does not need any more after that
        self.settings = replace(self.settings, text=self.settings.protocol().text)
        StudyQueue(self.settings.protocol(), self.settings.storage).close()
        return StudyQueue(self.settings.protocol(), self.settings.storage, create=False)

    def run(self, retry_failed: bool = False) -> Counter[CellState]:
        """
        Run cells until none waits or runs, here or elsewhere.

        :return: Numbers of cells by their states
        :raises OSError: The disk is full, or the storage was lost; what was done is kept
        :raises KeyboardInterrupt: Ctrl-C; all workers were stopped, and their cells wait
        """
        self.queue.restore_run_folders()
        self.queue.enqueue(self.keys, retry_failed)
        try:
            with self.display.shown():
                self._look()
                while self._alive or self._is_unfinished():
                    self._start_workers()
                    self._listen()
                    self._look()
        finally:
            self._stop()
        if self.problem is not None:
            raise OSError(self.problem)
        self.queue.restore_run_folders()
        return self.counts()

    def file_has_changed(self) -> bool:
        """Whether the study's file is another one than when the run began."""
        try:
            return study_file(self.settings.folder).read_text(encoding="utf-8") != self.protocol.text
        except (OSError, UnicodeDecodeError):
            return True

    def counts(self) -> Counter[CellState]:
        """Numbers of cells by their states, of those that were asked for."""
        return Counter(status.state for status in self.queue.statuses(self.keys))

    def _look(self) -> None:
        """Look into the storage now and then: others may finish cells, or die."""
        if time.monotonic() < self._next_look:
            return
        try:
            self.queue.enqueue(self.keys)
            self._statuses = self.queue.statuses(self.keys)
        except STORAGE_FAULTS as error:
            self.display.say(f"The storage does not answer: {fault_text(error)}. Trying again.", "yellow")
        self.display.counts(Counter(status.state for status in self._statuses))
        self._next_look = time.monotonic() + POLL_SECONDS

    def _is_unfinished(self) -> bool:
        unfinished = any(status.state in (CellState.WAITING, CellState.RUNNING) for status in self._statuses)
        return unfinished and self.problem is None

    def _start_workers(self) -> None:
        waiting = len({status.key for status in self._statuses if status.state is CellState.WAITING})
        idle = sum(worker.trial is None for worker in self._alive.values())
        if self.problem is None:
            for _ in range(min(self.workers - len(self._alive), waiting - idle)):
                self._start_worker()

    def _start_worker(self) -> None:
        here, there = self._context.Pipe()
        number = next(number for number in range(1, self.workers + 1) if number not in self._alive)
        process = self._context.Process(target=self._work, args=(self.settings, there), name=f"worker-{number}")
        with _ctrl_c_blocked():
            process.start()
        there.close()
        self._alive[number] = _Process(number, process, here)

    def _listen(self) -> None:
        """Wait for what workers tell, or until it is time to look into the storage."""
        timeout = max(0.1, self._next_look - time.monotonic())
        if not self._alive:
            self._say_that_others_run()
            time.sleep(timeout)
            return
        objects: list[Any] = [each for worker in self._alive.values() for each in (worker.connection, worker.process.sentinel)]
        wait(objects, timeout)
        for worker in list(self._alive.values()):
            self._hear(worker)
            if not worker.process.is_alive():
                self._bury(worker, self.queue.lost)
                self._see_how_it_ended(worker)

    def _say_that_others_run(self) -> None:
        others = {status.worker for status in self._statuses if status.state is CellState.RUNNING}
        if others and not self._waits_for_others:
            self._waits_for_others = True
            names = ", ".join(sorted(map(str, others)))
            self.display.say(
                f"Nothing is left but what others run ({names}): waiting, in case they die. Ctrl-C ends this only."
            )

    def _hear(self, worker: _Process) -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                message = worker.connection.recv()
                self.display.told(worker.number, message)
                match message:
                    case Took(number=number):
                        worker.trial, worker.began = number, True
                        self._early_deaths, self._next_look = 0, 0.0
                    case Finished():
                        worker.trial = None
                        self._next_look = 0.0
                    case Stopped(reason=reason):
                        self._no_more(reason)

    def _no_more(self, reason: str) -> None:
        if self.problem is None:
            self.problem = reason
            self._no_more_cells()

    def _no_more_cells(self) -> None:
        """Let workers end after the cells that they are at."""
        for worker in self._alive.values():
            with contextlib.suppress(OSError):
                worker.connection.send("no more cells")

    def _bury(self, worker: _Process, take_over: Callable[[int], None]) -> None:
        """Part with a worker that has ended, and let its trial be taken over, if it has one."""
        worker.process.join()
        self._hear(worker)
        worker.connection.close()
        del self._alive[worker.number]
        self.display.gone(worker.number)
        if worker.trial is not None:
            # It is dead for sure, others would only notice it later
            with contextlib.suppress(OSError, *STORAGE_FAULTS):
                take_over(worker.trial)

    def _see_how_it_ended(self, worker: _Process) -> None:
        self._next_look = 0.0
        if code := worker.process.exitcode:
            cell = "" if worker.trial is None else f"; its {self._unit} waits again"
            self.display.say(f"Worker {worker.number} died ({_ending(code)}){cell}.", "yellow")
            self._early_deaths += not worker.began
            if self._early_deaths >= MOST_EARLY_DEATHS:
                self._no_more(f"{MOST_EARLY_DEATHS} workers died before they took a {self._unit} ({_ending(code)}).")

    def _stop(self) -> None:
        """End all workers that are still there; their cells wait again."""
        for worker in self._alive.values():
            worker.process.terminate()
        end = time.monotonic() + STOP_SECONDS
        # Who presses Ctrl-C again does not want to wait
        with contextlib.suppress(KeyboardInterrupt):
            while self._alive and time.monotonic() < end:
                for worker in list(self._alive.values()):
                    self._hear(worker)
                    worker.process.join(0.05)
                    if not worker.process.is_alive():
                        self._bury(worker, self.queue.give_back)
        for worker in list(self._alive.values()):
            worker.process.kill()
            self._bury(worker, self.queue.give_back)


def run_study(
    folder: Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    threads: int = 1,
    retry_failed: bool = False,
    device: str = "cpu",
    only: str = "*",
    trust_pickle: bool = False,
    console: Console | None = None,
) -> Counter[CellState]:
    """
    Run the cells of a study that have not run yet. Others may do the same at once, on any number of machines.

    :param folder: Folder of the study
    :param workers: Processes that run cells
    :param storage: A journal file ending in ``.log``, or the URL of a database; None for the journal in the study's folder
    :param threads: Threads of each process
    :param retry_failed: Whether to try cells again that have failed
    :param device: Where to compute
    :param only: Glob of names of cells, such as ``medium/td3c/*``
    :param trust_pickle: Whether datasets may be read from pickle files: that runs code which these hold
    :param console: Where to show what happens
    :return: Numbers of cells
    :raises OSError: The storage, the data or the disk cannot be used
    :raises ValueError: The protocol, the data or an argument is wrong
    :raises KeyboardInterrupt: Ctrl-C; all workers were stopped, and their cells wait
    """
    console = console or PlainConsole(stderr=True)
    try:
        settings = WorkerSettings(folder.absolute(), storage, threads, device, only, trust_pickle=trust_pickle)
        run = StudyRun(settings, workers, console)
        try:
            counts = run.run(retry_failed)
        finally:
            run.queue.close()
    except STORAGE_FAULTS as error:
        raise OSError(f"The storage failed: {fault_text(error)}. What is done is kept: run the study again.") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(f"There is no room on the disk for {folder} ({error}): make room and run the study again.") from None
        raise
    run.display.say(f"{run.protocol.name}: {counts_text(counts)}")
    if run.file_has_changed():
        run.display.say(f"{run.protocol.file} has changed since this run began: run it again for what is new.", "yellow")
    return counts


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes that are started within never see Ctrl-C: it is for the parent, which ends them in order."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
