"""
Kills the long commands at random moments, 30 times each, and looks at what is there afterwards.

Each command is run once without interruption. Then it is started again and again in a process group of its own, which gets
SIGKILL after a random part of that time. After each kill, what is there must be whole: nothing, or what the uninterrupted run
made, and nothing that was there before may be lost. At the end the command is run to its end: the result must be that of the
uninterrupted run, and no temporary file or folder may be left.

Usage::

    python benchmarks/kills/kill.py [--kills 30] [--seed 0] [--only NAME ...]

Writes kills.json and kills.md beside this file; commands that are not asked for keep their rows.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml

from sb3_offline_ft.cli import app
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.datasets.tools import collect, convert, report
from sb3_offline_ft.study import Protocol
from sb3_offline_ft.study.engine import run
from sb3_offline_ft.study.engine.folder import local_result
from sb3_offline_ft.study.report import page
from sb3_offline_ft.trial import running
from sb3_offline_ft.trial.episodes import EpisodeRunner
from sb3_offline_ft.trial.trial import Trial

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "kills.json", HERE / "kills.md"
PRELOADED = (collect, convert, report, run, page, running)
"""Imported before a process is forked, so that a kill hits what a command does and not its imports."""
ENV = "Pendulum-v1"
STUDY: dict[str, Any] = {
    "name": "killed",
    "env": ENV,
    "datasets": {"medium": "bundled:pendulum-medium"},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 50}},
    "seeds": 2,
    "interactions": 200,
    "evaluation": {"every": 100, "episodes": 1},
    "learner_evaluation": {"every": 100, "episodes": 1},
    "hyperparams": {"warmup_steps": 50, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}},
    "methods": {"scratch": {"algorithm": "td3", "start": "scratch"}, "td3c": {}},
}
TRIAL: dict[str, Any] = {
    "env": ENV,
    "baseline": "zero",
    "candidate": "random",
    "primary": {"metric": "return", "smallest_effect": 1.0},
    "budget": {"episodes": 100},
    "stages": [{"name": "pilot", "episodes": 100, "share": 0.5}],
    "error_rates": {"false_stop": 1e-6, "false_go": 1e-6},
}


class Case:
    """
    A command and what it makes.

    :param folder: Where it works
    """

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepare()

    def prepare(self) -> None:
        """Make what the command needs."""

    def begin_again(self) -> None:
        """After the command has come to its end, let it have something to do."""

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def parts(self) -> dict[str, str]:
        """Digests of what is there, by name; an error if anything is damaged."""
        raise NotImplementedError

    def is_equal(self, uninterrupted: dict[str, str]) -> bool:
        """Whether what a run that was killed and went on has made is what an uninterrupted one makes."""
        return self.parts() == uninterrupted


class Collect(Case):
    name = "dataset collect"
    id_ = "kills/collected-v0"

    def arguments(self) -> list[str]:
        options = ["--env", ENV, "--random", "--steps", "8000", "--seed", "1", "--overwrite"]
        return ["dataset", "collect", "--id", self.id_, *options]

    def parts(self) -> dict[str, str]:
        folder = Path(os.environ["MINARI_DATASETS_PATH"]) / self.id_
        return {self.id_: load_dataset(self.id_).fingerprint} if folder.exists() else {}


class Convert(Collect):
    name = "dataset convert"
    id_ = "kills/converted-v0"

    def prepare(self) -> None:
        write_npz(self.folder / "logs.npz", 20_000)

    def arguments(self) -> list[str]:
        return ["dataset", "convert", str(self.folder / "logs.npz"), "--to", self.id_, "--env", ENV, "--overwrite"]


class Page(Case):
    name = "dataset report"

    def prepare(self) -> None:
        write_npz(self.folder / "logs.npz", 2_000)

    def arguments(self) -> list[str]:
        return ["dataset", "report", str(self.folder / "logs.npz"), "-o", str(self.folder / "out" / "report.html")]

    def parts(self) -> dict[str, str]:
        found = sorted(path for path in (self.folder / "out").rglob("*") if path.is_file() and not path.name.startswith("."))
        return {path.name: digest(path.read_bytes()) for path in found}


class StudyRun(Case):
    name = "study run"

    def prepare(self) -> None:
        self.study = self.folder / "study"
        self.study.mkdir()
        (self.study / "study.yml").write_text(yaml.safe_dump(STUDY, sort_keys=False))

    def begin_again(self) -> None:
        shutil.rmtree(self.study)
        self.prepare()

    def arguments(self) -> list[str]:
        return ["study", "run", str(self.study), "--workers", "1"]

    def parts(self) -> dict[str, str]:
        protocol = Protocol.load(self.study)
        results = {cell.name: local_result(protocol, cell) for cell in protocol.cells()}
        arrays = "timesteps", "returns", "lengths", "training_timesteps", "training_returns", "own_returns"
        return {
            name: digest(b"".join(getattr(result, array).tobytes() for array in arrays))
            for name, result in results.items()
            if result is not None
        }


class StudyReport(Page):
    name = "study report"
    made: Path | None = None
    """The study, run once, since pages say how long runs took."""

    def prepare(self) -> None:
        if self.made is None:
            study = StudyRun(Path(tempfile.mkdtemp()))
            wait(start(study.arguments()))
            assert len(study.parts()) == len([*Protocol.load(study.study).cells()])
            type(self).made = study.study
        assert self.made is not None
        shutil.copytree(self.made, self.folder / "study")

    def arguments(self) -> list[str]:
        return ["study", "report", str(self.folder / "study"), "-o", str(self.folder / "out" / "report.html")]


class TrialRun(Case):
    name = "trial run"

    def prepare(self) -> None:
        self.trial = self.folder / "trial"
        self.trial.mkdir()
        (self.trial / "trial.yml").write_text(yaml.safe_dump(TRIAL, sort_keys=False))

    def begin_again(self) -> None:
        shutil.rmtree(self.trial)
        self.prepare()

    def arguments(self) -> list[str]:
        return ["trial", "run", str(self.trial)]

    def parts(self) -> dict[str, str]:
        trial = Trial.open(self.trial)
        kept = [record for record in trial.machine.episodes if not record.is_missing]
        return {str(record.episode): json.dumps(dict(record.metrics)) for record in kept}

    def is_equal(self, uninterrupted: dict[str, str]) -> bool:
        # Episodes that were under way are noted as lost, so that later ones are others: each is measured again
        trial = Trial.open(self.trial)
        again = EpisodeRunner(trial.plan_in_force)
        kept = [record for record in trial.machine.episodes if not record.is_missing]
        try:
            return all(dict(record.metrics) == again.run(record.assignment).metrics for record in kept[::5])
        finally:
            again.close()


CASES: tuple[type[Case], ...] = (Collect, Convert, Page, StudyReport, TrialRun, StudyRun)


def write_npz(path: Path, rows: int) -> None:
    data = load_dataset("bundled:pendulum-medium")
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    np.savez(path, **{name: np.asarray(getattr(data, name))[:rows] for name in names})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def start(arguments: list[str]) -> int:
    """Run a command in a forked process that leads a group; gives its number."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        quiet = os.open(os.environ.get("KILLS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(quiet, descriptor)
        sys.argv = ["sb3-offline-ft", *arguments]
        app(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def wait(process: int) -> int:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def killed_after(process: int, seconds: float) -> bool:
    """Kill a process and its group after a time; whether it was still there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    return wait(process) == -signal.SIGKILL


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob(".*") if path.name.startswith(".")]


@dataclass
class Outcome:
    """What 30 kills of a command came to."""

    command: str
    kills: int
    seed: int
    seconds_uninterrupted: float
    completed_in_between: int
    left_something: int
    """After how many kills temporary files or folders were there, for the next command to remove."""
    most_left: int
    lost: int
    """Parts of results that were there and were not afterwards."""
    damaged: int
    left_at_last: int
    equal: bool


def try_case(make: Callable[[Path], Case], kills: int, seed: int) -> Outcome:
    """Kill one command at random moments."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root, minari = Path(name), Path(name) / "minari"
        minari.mkdir()
        os.environ["MINARI_DATASETS_PATH"] = str(minari)
        # The same folder for both, since pages name files
        folder = root / "work"
        folder.mkdir()
        case = make(folder)
        began = time.monotonic()
        assert wait(start(case.arguments())) in (0, 2), case.arguments()
        seconds = time.monotonic() - began
        uninterrupted = case.parts()
        assert uninterrupted
        for used in (minari, folder):
            shutil.rmtree(used)
            used.mkdir()
        case, before = make(folder), {}
        outcome = Outcome(case.name, 0, seed, round(seconds, 2), 0, 0, 0, 0, 0, 0, False)
        while outcome.kills < kills:
            began = time.monotonic()
            if not killed_after(start(case.arguments()), chance.uniform(0, seconds)):
                # Quicker than the first time
                seconds = min(seconds, time.monotonic() - began)
                outcome.completed_in_between += 1
                if outcome.completed_in_between > kills:
                    raise RuntimeError(f"{case.name} ends before it can be killed")
                case.begin_again()
                before = {}
                continue
            outcome.kills += 1
            there = leftovers(minari, case.folder)
            outcome.left_something += bool(there)
            outcome.most_left = max(outcome.most_left, len(there))
            try:
                now = case.parts()
            except (OSError, ValueError) as error:
                print(f"{case.name}, kill {outcome.kills}: {error}")
                outcome.damaged += 1
                continue
            outcome.lost += sum(now.get(part) != what for part, what in before.items())
            outcome.damaged += sum(uninterrupted.get(part) != what for part, what in now.items() if part in uninterrupted
                                   and not isinstance(case, TrialRun))  # fmt: skip
            before = now
        assert wait(start(case.arguments())) in (0, 2)
        outcome.equal = case.is_equal(uninterrupted)
        outcome.left_at_last = len(leftovers(minari, case.folder))
        return outcome


def write_table(outcomes: list[dict[str, Any]]) -> None:
    heads = ["command", "kills", "damaged", "lost", "left something", "left at last", "equal to uninterrupted"]
    rows = [
        [f"`{each['command']}`", each["kills"], each["damaged"], each["lost"], each["left_something"], each["left_at_last"],
         "yes" if each["equal"] else "no"]
        for each in outcomes
    ]  # fmt: skip
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    with atomic_write(TABLE) as file:
        file.write(("\n".join(lines) + "\n").encode())


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES])
    asked = parser.parse_args()
    th.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for case in CASES:
        if case.name not in asked.only:
            continue
        outcome = asdict(try_case(case, asked.kills, asked.seed))
        print(outcome, flush=True)
        known = [each for each in known if each["command"] != case.name] + [outcome]
        known.sort(key=lambda each: [case.name for case in CASES].index(each["command"]))
        with atomic_write(RESULTS) as file:
            file.write((json.dumps(known, indent=1) + "\n").encode())
        write_table(known)


if __name__ == "__main__":
    main()
