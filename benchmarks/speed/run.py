"""
Measure how fast updates are, next to SB3, SBX, d3rlpy and a single-file implementation, in turn on this machine.

    python benchmarks/speed/run.py             # everything, about half an hour; make benchmark does this too
    python benchmarks/speed/run.py --quick     # does it work? a few minutes
    python benchmarks/speed/run.py --only offline/hopper/td3bc --threads 1 --seconds-per-round 0.5
    python benchmarks/speed/run.py --list      # what there is to measure

Each candidate runs in a process of its own, is warmed up, and then waits for its turns: in each round all candidates of a
group run once, in random order, one at a time on the same cores. What counts are ratios within rounds, since they do not
depend on how fast the machine happens to be at the time. The results of a complete run go to `results` and README.md, those
of a part of it (or of a quick run) to `logs/speed`. README.md describes what is measured.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, Self

from candidates import GROUPS, REFERENCE, SHAPES, Candidate, Group
from machine import busy_seconds, manifest, slug
from peers import DEFAULT_FOLDER, PeerError, ensure
from report import HEADINGS as COLUMNS
from report import PARTIAL, RESULTS, contention, draw, fill_readme, markdown, missing, summarize, tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sb3_offline_ft.common.io import atomic_write

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PARTS = REPOSITORY / "logs" / "speed"
START_TIMEOUT = 300.0
SETTINGS = {"rounds": 9, "seconds_per_round": 2.0, "threads": [1, 2]}
QUICK = {"rounds": 2, "seconds_per_round": 0.2, "threads": [1]}


class WorkerError(RuntimeError):
    """A worker cannot measure its candidate, or has died; the message says why."""


class Worker:
    """
    The process of one candidate.

    :param group: Its group
    :param candidate: What it measures
    :param threads: Number of threads, and of cores
    :param python: The Python that runs it
    """

    def __init__(self, group: Group, candidate: Candidate, threads: int, python: Path) -> None:
        self.group, self.candidate, self.threads = group, candidate, threads
        self.steps = 0
        self.facts: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.turns: list[dict[str, Any] | None] = []
        self.problem: str | None = None
        self.errors: IO[str] = tempfile.TemporaryFile("w+")
        environment = os.environ | {
            name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["JAX_PLATFORMS"] = "cpu"
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths)) if candidate.environment == "own" else ""
        self.process = subprocess.Popen(
            [str(python), str(HERE / "worker.py"), f"{group.name}/{candidate.name}", "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            cwd=REPOSITORY,
            # An interrupt is for `run.py`, which ends its workers itself
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                # What could not be sent to a process that has died is still in the buffer
                with suppress(BrokenPipeError):
                    stream.close()

    def answer(self, timeout: float) -> dict[str, Any]:
        """
        :param timeout: Seconds to wait at most
        :return: The worker's next answer
        :raises WorkerError: It has none, or reports a problem
        """
        assert self.process.stdout is not None
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["it ended without a message"]
            raise WorkerError(f"no answer in {timeout:.0f} s" if late else lines[-1])
        found: dict[str, Any] = json.loads(line)
        if "not_measured" in found:
            raise WorkerError(found["not_measured"])
        return found

    def run(self, steps: int, timeout: float) -> dict[str, Any]:
        """
        :param steps: Number of steps
        :param timeout: Seconds to wait at most
        :return: What they took
        :raises WorkerError: It has died
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"its process has ended with status {self.process.wait()}") from error
        return self.answer(timeout)

    def warm_up(self, seconds: float) -> None:
        """
        Wait until the candidate is set up, and find out how many steps take how long.

        :param seconds: What a turn shall take
        :raises WorkerError: The candidate cannot be measured
        """
        ready = self.answer(START_TIMEOUT)
        self.facts, self.versions = ready["facts"], ready["versions"]
        multiple = ready["multiple_of"]
        # The first calls compile and allocate; the last one is representative
        for share in (0.0, 0.1, 1.0):
            self.steps = multiple * max(1, round(share * self.steps / multiple))
            found = self.run(self.steps, START_TIMEOUT)
            self.steps = max(1, round(seconds * self.candidate.share * self.steps / found["seconds"]))
        self.steps = multiple * max(1, round(self.steps / multiple))

    def take_turn(self, seconds: float) -> None:
        """
        :param seconds: What a turn shall take
        """
        if self.problem is None:
            try:
                start, before = time.perf_counter(), busy_seconds()
                turn = self.run(self.steps, 60 + 20 * seconds)
                elapsed, after = time.perf_counter() - start, busy_seconds()
                own = turn.pop("turn_cpu_seconds")
                if before is not None and after is not None:
                    turn["others"] = max(0.0, after - before - own) / elapsed
                self.turns.append(turn)
                return
            except WorkerError as error:
                self.problem = f"failed in round {len(self.turns) + 1}: {error}"
        self.turns.append(None)

    def measurement(self) -> dict[str, Any]:
        """
        :return: What was measured
        """
        own = {"steps", "seconds", "cpu_seconds"}
        names = sorted({name for turn in self.turns if turn is not None for name in turn} - own)
        return {
            **describe(self.group, self.candidate, self.threads),
            "steps": self.steps,
            "seconds": self._column("seconds"),
            "cpu_seconds": self._column("cpu_seconds"),
            "extra": {name: self._column(name) for name in names},
            "facts": self.facts,
            "versions": self.versions,
            "not_measured": self.problem,
        }

    def _column(self, name: str) -> list[float | None]:
        if all(turn is None for turn in self.turns):
            return []
        return [None if turn is None else turn.get(name) for turn in self.turns]


def describe(group: Group, candidate: Candidate, threads: int) -> dict[str, Any]:
    return {
        "group": group.name,
        "candidate": candidate.name,
        "threads": threads,
        "kind": candidate.kind,
        "settings": candidate.settings,
        "environment": candidate.environment,
    }


class Benchmark:
    """
    Runs the groups and keeps what was measured.

    :param arguments: Of the command line
    :param chosen: What to measure
    """

    def __init__(self, arguments: argparse.Namespace, chosen: list[tuple[Group, list[Candidate]]]) -> None:
        self.arguments, self.chosen = arguments, chosen
        self.random = random.Random(arguments.seed)
        self.measurements: list[dict[str, Any]] = []
        self.running: list[Worker] = []
        self.complete = False
        self.manifest = manifest() | {"command": command_line(arguments)}
        self.pythons: dict[str, Path | str] = {"own": Path(sys.executable)}
        names = ("rounds", "seconds_per_round", "threads", "seed", "clock", "quick")
        self.settings = {name: getattr(arguments, name) for name in names}

    def content(self) -> dict[str, Any]:
        """
        :return: What was measured up to now
        """
        partly = [worker.measurement() for worker in self.running if worker.turns or worker.problem]
        found: dict[str, Any] = {
            "complete": self.complete,
            "manifest": self.manifest | {"load_average_after": os.getloadavg()[0]},
            "settings": self.settings,
            "measurements": self.measurements + partly,
        }
        return found | {"summary": summarize(found)}

    def python(self, environment: str, progress: Progress) -> Path | str:
        """
        :param environment: ``"own"`` or a peer
        :param progress: To say that it may take a while
        :return: Its Python, or why there is none
        """
        if environment not in self.pythons:
            progress.console.print(f"{environment}: its environment, in {self.arguments.peer_dir}", highlight=False)
            try:
                self.pythons[environment] = ensure(environment, self.arguments.peer_dir)
            except PeerError as error:
                self.pythons[environment] = str(error).replace(str(self.arguments.peer_dir), "PEER_DIR")
        return self.pythons[environment]

    def run(self, progress: Progress) -> None:
        """
        :param progress: The progress bar
        """
        turns = sum(len(candidates) for _, candidates in self.chosen) * len(self.arguments.threads)
        task = progress.add_task("", total=turns * (self.arguments.rounds + 1))
        for threads in self.arguments.threads:
            for group, candidates in self.chosen:
                with ExitStack() as stack:
                    try:
                        self._run_group(group, candidates, threads, progress, task, stack)
                    finally:
                        self.measurements += [worker.measurement() for worker in self.running]
                        self.running = []
                self.save()
        self.complete = True

    def _run_group(
        self, group: Group, candidates: list[Candidate], threads: int, progress: Progress, task: Any, stack: ExitStack
    ) -> None:
        seconds, rounds = self.arguments.seconds_per_round, self.arguments.rounds
        for candidate in candidates:
            progress.update(task, description=f"{group.name}, {threads} thread(s): set up {candidate.name}")
            problem = self._start(group, candidate, threads, progress, stack)
            if problem is not None:
                name = f"{group.name}/{candidate.name}"
                progress.console.print(f"not measured: {name}, {threads} thread(s): {problem}", highlight=False)
                self.measurements.append(
                    describe(group, candidate, threads)
                    | {"seconds": [], "cpu_seconds": [], "extra": {}, "not_measured": problem}
                )
                progress.advance(task, rounds)
            progress.advance(task)
        for number in range(rounds):
            order = list(self.running)
            self.random.shuffle(order)
            for worker in order:
                what = f"{group.name}, {threads} thread(s), round {number + 1}: {worker.candidate.name}"
                progress.update(task, description=what)
                worker.take_turn(seconds)
                progress.advance(task)
            self.save()

    def _start(self, group: Group, candidate: Candidate, threads: int, progress: Progress, stack: ExitStack) -> str | None:
        """Start a worker and warm it up; says why if that is impossible."""
        if candidate.environment != "own" and self.arguments.skip_peers:
            return "left out by --skip-peers"
        python = self.python(candidate.environment, progress)
        if isinstance(python, str):
            return python
        worker = stack.enter_context(Worker(group, candidate, threads, python))
        try:
            worker.warm_up(self.arguments.seconds_per_round)
        except WorkerError as error:
            return str(error)
        self.running.append(worker)
        return None

    def save(self) -> Path:
        """
        Write what there is. Results of an earlier complete run are replaced by a complete run only.

        :return: The file
        """
        folder = self.arguments.output
        path: Path = folder / f"{slug()}{'.json' if self.complete else PARTIAL}"
        with atomic_write(path) as file:
            file.write((json.dumps(self.content(), indent=1) + "\n").encode())
        if self.complete:
            for outdated in folder.glob(f"{slug()}.partial.*"):
                outdated.unlink()
        return path


def choose(patterns: list[str] | None) -> list[tuple[Group, list[Candidate]]]:
    """
    :param patterns: Parts of names such as ``"offline/hopper"``, with ``*`` and ``?`` if need be; None for everything
    :return: What to measure: with a candidate its reference, and the products that the limit is taken from
    """
    chosen = []
    for group in GROUPS:
        wanted = [
            candidate
            for candidate in group.candidates
            if patterns is None or any(fnmatch(f"{group.name}/{candidate.name}", f"*{pattern}*") for pattern in patterns)
        ]
        if wanted:
            along = [candidate for candidate in group.candidates if candidate.name == REFERENCE or candidate.kind == "gemm"]
            chosen.append((group, [candidate for candidate in group.candidates if candidate in wanted or candidate in along]))
    return chosen


def command_line(arguments: argparse.Namespace) -> str:
    """
    :param arguments: Of the command line
    :return: The command, without folders of this machine
    """
    words = ["python", "benchmarks/speed/run.py"]
    if arguments.quick:
        words.append("--quick")
    for name, default in (QUICK if arguments.quick else SETTINGS).items():
        value = getattr(arguments, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if arguments.seed != 0:
        words += ["--seed", str(arguments.seed)]
    if arguments.clock != "wall":
        words += ["--clock", arguments.clock]
    for name in ("shapes", "only"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", *getattr(arguments, name)]
    return " ".join([*words, *(["--skip-peers"] if arguments.skip_peers else [])])


def show(content: dict[str, Any], console: Console) -> None:
    """
    :param content: What was measured
    :param console: Where to
    """
    for title, rows in tables(content):
        used = [index for index in range(len(COLUMNS)) if any(row[index] for row in rows)]
        table = Table(title=title.replace("`", ""), title_justify="left")
        for index in used:
            table.add_column(COLUMNS[index], justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(row[index] for index in used))
        console.print(table)
    for line in [*contention(content), *missing(content)]:
        console.print(line, highlight=False)


def parse() -> argparse.Namespace:
    """
    :return: The command line, with defaults filled in
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help=f"numbers of threads ({SETTINGS['threads']})")
    parser.add_argument("--rounds", type=int, help=f"turns of each candidate ({SETTINGS['rounds']})")
    parser.add_argument("--seconds-per-round", type=float, help=f"length of a turn ({SETTINGS['seconds_per_round']})")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="shapes of the offline groups (all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of names; the reference is measured along")
    parser.add_argument("--skip-peers", action="store_true", help="leave out what needs an environment of its own")
    parser.add_argument("--peer-dir", type=Path, default=DEFAULT_FOLDER, help="where these are made (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}: shows whether it works, and no more")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, 1 thread only")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds")
    parser.add_argument("--output", type=Path, help="folder of the results (results, or logs/speed for a part)")
    parser.add_argument("--list", action="store_true", help="show what there is to measure")
    arguments = parser.parse_args()
    for name, default in (QUICK if arguments.quick else SETTINGS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    if arguments.clock == "cpu" and arguments.threads != [1]:
        parser.error("computing time of several threads says nothing about speed: add `--threads 1`")
    if min(arguments.threads) < 1 or arguments.rounds < 1 or arguments.seconds_per_round <= 0:
        parser.error("--threads, --rounds and --seconds-per-round must be positive")
    if arguments.output is None:
        whole = not (arguments.quick or arguments.only or arguments.shapes or arguments.skip_peers)
        arguments.output = RESULTS if whole else PARTS
    return arguments


def main() -> None:
    arguments = parse()
    # Tables are wider than what is assumed of a file
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = choose(arguments.only)
    if arguments.shapes is not None:
        left_out = [f"offline/{name}" for name in SHAPES if name not in arguments.shapes]
        chosen = [(group, candidates) for group, candidates in chosen if group.name not in left_out]
    if arguments.list or not chosen:
        for group, candidates in chosen or choose(None):
            console.print(f"{group.name}: {', '.join(candidate.name for candidate in candidates)}", highlight=False)
        sys.exit(0 if arguments.list else "Nothing matches --only and --shapes: the names are above.")
    benchmark = Benchmark(arguments, chosen)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    interrupted = False
    try:
        # Drawn seldom, so that it takes nothing from what is measured
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            benchmark.run(progress)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted: what was measured until now is kept.")
    path = benchmark.save()
    content = benchmark.content()
    show(content, console)
    stem = path.name.removesuffix(PARTIAL).removesuffix(".json") + (".partial" if interrupted else "")
    figure = path.with_name(f"{stem}.png")
    drawn = draw(content, figure)
    with atomic_write(path.with_name(f"{stem}.md")) as file:
        file.write(markdown(content, figure.name if drawn else None).encode())
    if path.parent.resolve() == RESULTS and not interrupted:
        fill_readme()
    shown = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
    console.print(f"written: {shown}", highlight=False)
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
