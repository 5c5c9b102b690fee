"""Small studies, and `study run` as others start it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from optuna.trial import TrialState

from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.folder import CellResult
from sb3_offline_ft.study.engine.queue import KEY, WORKER, CellState, StudyQueue
from tests.conftest import REPOSITORY
from tests.study_environments import FOLDER_VARIABLE

NETS = {"policy_kwargs": {"net_arch": [8]}}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "env": "Pendulum-v1",
    "datasets": {"medium": "bundled:pendulum-medium"},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 30}},
    "seeds": 2,
    "interactions": 200,
    "evaluation": {"every": 100, "episodes": 1},
    "learner_evaluation": {"every": 100, "episodes": 1},
    "hyperparams": {"warmup_steps": 50, "batch_size": 16, **NETS},
    "methods": {"scratch": {"algorithm": "td3", "start": "scratch"}, "offline": {"frozen": True}, "td3": {"algorithm": "td3"}},
}
ARRAYS = (
    "timesteps", "returns", "lengths", "training_timesteps", "training_returns", "own_timesteps", "own_returns", "own_lengths",
    "training_kinds",
)  # fmt: skip


def write_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Variables of processes whose environments look into a folder."""
    return os.environ | {FOLDER_VARIABLE: str(folder), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@contextmanager
def study_run(folder: Path, *options: str, watched: Path, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """``study run`` in a process group of its own, as a terminal starts it; what is left of it at last is killed."""
    command = [sys.executable, "-m", "sb3_offline_ft", "study", "run", str(folder), *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment(watched), start_new_session=True, **pipes, **settings) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 120
    while not condition():
        if process is not None and process.poll() is not None:
            assert process.stdout is not None
            raise AssertionError(process.stdout.read())
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def at_the_gate(folder: Path, storage: str | None = None) -> int:
    """How many cells of a study have had their first evaluation and go on."""
    try:
        with StudyQueue(Protocol.load(folder), storage, create=False) as queue:
            statuses = queue.statuses()
    except FileNotFoundError:
        return 0
    return sum(each.state is CellState.RUNNING and each.last_evaluation is not None for each in statuses)


def undisturbed(folder: Path) -> dict[str, CellResult]:
    """All results of a study by the names of cells, run one after the other in this process."""
    protocol = Protocol.load(folder)
    return {cell.name: run_cell(protocol, cell, pretrained_folder=folder / "pretrained") for cell in protocol.cells()}


def assert_same(result: CellResult, expected: CellResult) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name), err_msg=name)
    for name in ("key", "pretrained", "frozen_until", "updates"):
        assert result.manifest[name] == expected.manifest[name]


def assert_each_done_once(folder: Path, storage: str | None = None) -> None:
    with StudyQueue(Protocol.load(folder), storage, create=False) as queue:
        trials = queue.study.get_trials(deepcopy=False)
    done = [trial.user_attrs[KEY] for trial in trials if trial.state == TrialState.COMPLETE]
    assert sorted(done) == sorted(queue.cells)
    assert not any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials)
    assert all(WORKER in trial.user_attrs for trial in trials if trial.state == TrialState.COMPLETE)
