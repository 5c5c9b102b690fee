"""`study run` with workers that are killed, interrupted, out of disk, or at work in two commands at once."""

import io
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from rich.console import Console
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine.folder import CellResult
from sb3_offline_ft.study.engine.queue import ERROR, WORKER, CellState, StudyQueue
from sb3_offline_ft.study.engine.results import load_results
from sb3_offline_ft.study.engine.run import StudyRun, run_study
from sb3_offline_ft.study.engine.worker import Evaluated, Interrupts, PrintedLines, Worker, WorkerSettings
from tests.study_environments import CLOSED, FAIL, FOLDER_VARIABLE, GATED_PENDULUM
from tests.study_runs import (
    STUDY,
    assert_each_done_once,
    assert_same,
    at_the_gate,
    study_run,
    undisturbed,
    wait_until,
    write_study,
)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the environments of workers look into."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def gate(watched: Path) -> Iterator[Path]:
    """While it exists, no run goes beyond its middle."""
    gate = watched / CLOSED
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CellResult]:
    """The results of an undisturbed study."""
    folder = tmp_path_factory.mktemp("undisturbed")
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        return undisturbed(write_study(folder, env=GATED_PENDULUM))
    finally:
        del os.environ[FOLDER_VARIABLE]


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_killed_workers_and_two_commands_at_once_give_the_results_of_an_undisturbed_study(
    gate: Path, watched: Path, expected: dict[str, CellResult]
) -> None:
    folder = write_study(watched / "study", env=GATED_PENDULUM)
    with study_run(folder, "--workers", "2", watched=watched) as first:
        wait_until(lambda: at_the_gate(folder) == 2, first)
        os.killpg(first.pid, signal.SIGKILL)
    wait_until(lambda: at_the_gate(folder) == 0)

    (watched / FAIL).touch()
    killed: list[str] = []

    def kill_one_more(second: subprocess.Popen[str]) -> None:
        wait_until(lambda: at_the_gate(folder) == 2, second)
        queue = StudyQueue(Protocol.load(folder), create=False)
        workers = [status.worker for status in queue.statuses() if status.state is CellState.RUNNING]
        killed.append(str(workers[0]))
        os.kill(int(killed[0].rpartition(":")[2]), signal.SIGKILL)
        gate.unlink()

    with study_run(folder, watched=watched) as second:
        killer = threading.Thread(target=kill_one_more, args=(second,))
        killer.start()
        counts = run_study(folder, console=console())
        killer.join()
        output, _ = second.communicate(timeout=120)
    # One cell's environment failed, which stopped nothing
    assert counts == {CellState.DONE: 5, CellState.FAILED: 1}
    assert second.returncode == 1 and "1 cell failed" in output

    queue = StudyQueue(Protocol.load(folder), create=False)
    trials = queue.study.get_trials()
    (failed,) = (trial for trial in trials if ERROR in trial.user_attrs)
    assert failed.user_attrs[ERROR].rstrip().endswith("RuntimeError: The pendulum fell off the table.")
    lost = [trial for trial in trials if trial.state == TrialState.FAIL and trial is not failed and WORKER in trial.user_attrs]
    assert len(lost) == 3 and killed[0] in [trial.user_attrs[WORKER] for trial in lost]
    shown = CliRunner().invoke(app, ["study", "status", str(folder), "--errors"]).output
    assert "5 done, 1 failed" in shown and "study_environments.py" in shown

    assert run_study(folder, console=console()) == counts
    assert len(queue.study.get_trials()) == len(trials)
    assert run_study(folder, retry_failed=True, console=console()) == {CellState.DONE: 6}
    assert_each_done_once(folder)
    protocol = Protocol.load(folder)
    for cell in protocol.cells():
        result = queue.local_result(protocol.cell_key(cell))
        assert result is not None
        assert_same(result, expected[cell.name])


def test_ctrl_c_lets_cells_wait_and_keeps_what_is_done(gate: Path, watched: Path) -> None:
    folder = write_study(watched / "study", env=GATED_PENDULUM, seeds=1)
    # A shell's background job ignores the signal, and its children with it
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with study_run(folder, "--workers", "2", "--only", "*/*f*/*", watched=watched, **restored) as process:
        wait_until(lambda: at_the_gate(folder) == 1, process)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert re.search(r"interrupted: what is done is kept, the rest waits. `sb3-offline-ft study run \S+` goes on", output)
    assert "Traceback" not in output
    queue = StudyQueue(Protocol.load(folder), create=False)
    assert [str(status.state) for status in queue.statuses()] == ["waiting"] * 3
    # What was chosen with --only was enqueued again, and nothing else
    assert [trial.state for trial in queue.study.get_trials()] == [TrialState.FAIL, TrialState.WAITING]
    assert queue.enqueue() == 2


def test_a_study_that_is_edited_during_a_run_is_run_as_it_was(watched: Path) -> None:
    class Counting(StudyRun):
        started = 0

        def _start_worker(self) -> None:
            self.started += 1
            assert self.started == 1, "workers that find nothing to do are started for ever"
            super()._start_worker()

    methods = {"offline": STUDY["methods"]["offline"]}
    folder = write_study(watched / "study", methods=methods, seeds=1)
    began = Protocol.load(folder)
    run = Counting(WorkerSettings(folder), 1, console())
    assert not run.file_has_changed()
    # Before a worker begins
    write_study(folder, methods=methods, seeds=2, interactions=100)
    assert run.run() == {CellState.DONE: 1}
    assert run.file_has_changed()
    run.queue.close()
    assert [run.cell.name for run in load_results(began).runs] == ["medium/offline/seed0"]
    shown = console()
    assert run_study(folder, only="*/seed0", console=shown) == {CellState.DONE: 1}
    assert "has changed" not in shown.file.getvalue()
    assert [run.result.timesteps.tolist() for run in load_results(Protocol.load(folder)).runs] == [[0, 100]]


def test_a_full_disk_stops_the_run_and_its_cells_wait(watched: Path) -> None:
    big = {"policy_kwargs": {"net_arch": [128, 128]}}
    hyperparams = {"warmup_steps": 50, "batch_size": 16, **big}
    folder = write_study(watched / "study", hyperparams=hyperparams, seeds=1)
    # The journal stays below this, the pretrained learner does not
    limit = 200_000
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))}
    with study_run(folder, watched=watched, **limited) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "There is no room on the disk" in output and "make room and run the study again" in output
    assert "Traceback" not in output
    queue = StudyQueue(Protocol.load(folder), create=False)
    assert [str(status.state) for status in queue.statuses()] == ["done", "waiting", "waiting"]
    assert not any(path.suffix == ".tmp" for path in folder.rglob(".*"))


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield Interrupts()
    for number, handler in before:
        signal.signal(number, handler)


def test_a_worker_whose_command_died_gives_its_cell_back(gate: Path, watched: Path, interrupts: Interrupts) -> None:
    folder = write_study(watched / "study", env=GATED_PENDULUM, seeds=1)
    queue = StudyQueue(Protocol.load(folder))
    queue.enqueue()
    here, there = multiprocessing.Pipe()
    worker = Worker(WorkerSettings(folder), there, interrupts)

    def die() -> None:
        while not isinstance(here.recv(), Evaluated):
            pass
        here.close()
        gate.unlink()

    command = threading.Thread(target=die)
    command.start()
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    command.join()
    assert [str(status.state) for status in queue.statuses()] == ["waiting"] * 3
    # Nobody listens to what it prints
    assert PrintedLines(there).write("a\nb\n") == 4
    there.close()


def test_sigterm_waits_until_what_is_stored_is_stored(interrupts: Interrupts) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("stored")
        done.append("gone on")
    # The cell can be given back, whatever comes
    signal.raise_signal(signal.SIGTERM)
    assert done == ["stored"]


def test_what_all_cells_need_is_checked_before_any_is_taken(watched: Path) -> None:
    folder = write_study(watched / "study", datasets={"hopper": "bundled:hopper-medium"})
    with pytest.raises(OSError, match=r"hopper.* does not fit the environment"):
        run_study(folder, console=console())
    queue = StudyQueue(Protocol.load(folder), create=False)
    assert {str(status.state) for status in queue.statuses()} == {"waiting"}
    with pytest.raises(ValueError, match=r"`--only nothing` matches no cell: there are no-data/scratch/seed0"):
        run_study(folder, only="nothing", console=console())
