"""``sb3-offline-ft reproduce``: does a run again, and says whether it came out the same."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.datasets.specs import TRUST
from sb3_offline_ft.zoo.command_line import without_options
from sb3_offline_ft.zoo.manifest import FAILED, FINISHED, MANIFEST, VARIABLES, read_manifest
from sb3_offline_ft.zoo.trace import TRACE, Difference, Position, Trace, compare

COMMANDS = ("rl_zoo3.train", "sb3_offline_ft.zoo.train", "rl_zoo3")
"""Modules and scripts that take rl_zoo3's command line."""
OUTPUT = "output.txt"
POLL_SECONDS = 0.5

Surroundings = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Verdict:
    """
    What came of doing a run again.

    :param first: Manifest of the run
    :param until: Environment steps and updates until which it was compared
    :param episodes: Number of training episodes that were compared
    :param difference: Where the runs part, None if they are the same
    :param surroundings: What is another one now, by name: then and now
    """

    first: Mapping[str, Any]
    until: Position
    episodes: int
    difference: Difference | None
    surroundings: Surroundings

    @property
    def is_same(self) -> bool:
        """Whether the runs are the same to the bit, as far as the first one came."""
        return self.difference is None

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if self.difference is not None:
            return f"DIFFERENT: {_parted_in_words(self.difference)}"
        counts = f"weights after {self.until[1]:,} updates, and returns of {self.episodes:,} training episodes"
        state = "" if _is_whole(self.first) else f". The first run was not finished ({self.first['state']}): as far as it went"
        return f"THE SAME, to the bit: {counts}{state}"


def _is_whole(first: Mapping[str, Any]) -> bool:
    """Whether a run ended by itself, so that another one has to end there too."""
    return first["state"] in (FINISHED, FAILED)


def _parted_in_words(difference: Difference) -> str:
    parts = []
    if difference.updates == 0:
        parts.append("weights differ from the start")
    elif difference.updates is not None:
        until = "" if difference.same_until is None else f"the same until update {difference.same_until:,}, "
        parts.append(f"{until}weights differ after update {difference.updates:,}")
    elif difference.same_until is not None:
        parts.append(f"weights are the same until update {difference.same_until:,}")
    else:
        parts.append("no weights could be compared")
    if difference.episode is not None:
        events = (difference.first, difference.second)
        words = [f"return {event['return']} in {event['length']:,} steps" if event else "none" for event in events]
        ended = next(event["timestep"] for event in events if event)
        parts.append(f"training episode {difference.episode:,}, ended at step {ended:,}, differs: {words[0]}, now {words[1]}")
    if difference.ends is not None:
        (steps, updates), (steps_now, updates_now) = difference.ends
        parts.append(f"it ended at step {steps:,} with {updates:,} updates, now at {steps_now:,} with {updates_now:,}")
    return "; ".join(parts)


def reproduce(folder: Path, keep: Path | None = None, trust_pickle: bool = False, console: Console | None = None) -> Verdict:
    """
    Do a run again: with the same command in a process of its own, in another folder.

    :param folder: The run's folder
    :param keep: Folder that gets the new run, which must not exist or be empty; None for one that is removed
    :param trust_pickle: Whether the run's data may be read if it is a pickle file: that runs code which it holds
    :param console: Where to show what happens
    :return: Whether it came out the same
    :raises OSError: There is no such run, or it could not be run
    :raises ValueError: Its manifest is damaged, or its command is none that can be run again
    """
    console = console or Console(stderr=True)
    first, trace = read_manifest(folder), Trace.read(folder)
    if not trace.weights:
        raise FileNotFoundError(f"{folder} has no {TRACE}, or an empty one: there is nothing to compare a run with.")
    if trace.end[1] == next(iter(trace.weights))[1] and not trace.episodes:
        raise ValueError(f"{folder} has come to no update and to no episode's end: there is nothing to compare a run with.")
    arguments = _arguments(first, trust_pickle)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise FileExistsError(f"{keep} exists and is not an empty folder: choose another one with --keep.")
    with _log_folder(keep) as logs:
        # The last of an option is what counts
        with_tensorboard = first["hyperparameters"].get("tensorboard_log", {}).get("value") is not None
        tensorboard = str(logs / "tensorboard") if with_tensorboard else ""
        command = [sys.executable, "-m", "sb3_offline_ft.zoo.train", *arguments, "-f", str(logs), "-tb", tensorboard]
        console.print(Text(f"Running again: {_shown(command)}"), soft_wrap=True)
        failure = _run(command, first, trace, logs, console)
        made = next((logs / first["algorithm"]).glob(f"*/{MANIFEST}"), None)
        if made is None or (failure is not None and first["state"] != FAILED):
            raise OSError(f"The run could not be run again: {failure or 'it has left no run folder'}")
        second, traced = read_manifest(made.parent), Trace.read(made.parent)
    difference = compare(trace, traced, whole=_is_whole(first))
    until = next((position for position in reversed(trace.weights) if position in traced.weights), (0, 0))
    episodes = min(len(trace.episodes), len(traced.episodes))
    return Verdict(first, until, episodes, difference, surroundings(first, second))


def _arguments(first: Mapping[str, Any], trust_pickle: bool) -> list[str]:
    """The command line of the run, with what was drawn or set elsewhere, but for where it writes."""
    module = Path(first["module"]).stem if "/" in first["module"] or "\\" in first["module"] else first["module"]
    if module not in COMMANDS:
        raise ValueError(
            f"The run was started by {first['module']}, not by `python -m rl_zoo3.train` or `sb3_offline_ft.zoo.train`: "
            "there is no command line to run again."
        )
    words = without_options(first["arguments"], flags=["--track"])
    if any(TRUST in word for word in words) and not trust_pickle:
        raise ValueError(
            "The run's data is a pickle file, and reading it runs code that it holds: add --trust-pickle if you trust it."
        )
    return [*words, "--seed", str(first["seed"]), "--num-threads", str(first["threads"])]


@contextmanager
def _log_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="sb3_offline_ft_reproduce_") as folder:
        yield Path(folder)


def _run(command: list[str], first: Mapping[str, Any], trace: Trace, logs: Path, console: Console) -> str | None:
    """Run it, or as far as the first run came; what went wrong in one line, None for nothing."""
    given = {name: first["variables"].get(name) for name in VARIABLES}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    environment |= {name: value for name, value in given.items() if value is not None}
    # The command may name files there
    working_folder = Path(first["working_folder"])
    with (logs / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=working_folder if working_folder.is_dir() else None,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with _progress(trace, console) as show:
                while (code := _exit_code(process)) is None:
                    now = _trace_so_far(logs / first["algorithm"])
                    show(now)
                    if not _is_whole(first) and now.weights and now.end >= trace.end:
                        return None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return None if code == 0 else f"exit code {code}: {_last_line(logs / OUTPUT)} (`--keep` keeps all that it said)"


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _trace_so_far(runs: Path) -> Trace:
    folder = next(runs.glob("*/"), None) if runs.is_dir() else None
    return Trace({}, []) if folder is None else Trace.read(folder)


@contextmanager
def _progress(trace: Trace, console: Console) -> Iterator[Callable[[Trace], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=max(1, sum(trace.end)))

        def show(now: Trace) -> None:
            timesteps, updates = now.end
            parted = compare(trace, now, whole=False)
            since = None if parted is None else parted.updates
            state = "the same so far" if since is None else f"different since update {since:,}"
            words = f"step {timesteps:,}, update {updates:,}: {state}" if now.weights else "starting"
            progress.update(task, completed=timesteps + updates, description=words)

        yield show


def surroundings(first: Mapping[str, Any], second: Mapping[str, Any]) -> Surroundings:
    """
    :param first: A run's manifest
    :param second: That of another run
    :return: What around the two is not the same, by name, with its value in each
    """
    then, now = _facts(first), _facts(second)
    return {name: (then.get(name), now.get(name)) for name in {**then, **now} if then.get(name) != now.get(name)}


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = ("seed", "error", "code", "python", "platform", "cpu", "cpu_model", "gpu", "device", "threads")
    facts = {name: manifest.get(name) for name in names}
    facts |= {f"version of {name}": version for name, version in manifest["versions"].items()}
    facts |= {f"variable {name}": value for name, value in manifest["variables"].items()}
    dataset, agent, git = (manifest.get(name) or {} for name in ("dataset", "agent", "git"))
    facts |= {f"dataset's {name}": dataset.get(name) for name in ("spec", "fingerprint")}
    facts |= {f"agent's {name}": digest for name, digest in agent.get("files", {}).items()}
    facts |= {"git commit": git.get("commit"), "files changed since this commit": git.get("changed_files")}
    hyperparameters = {name: fact["value"] for name, fact in manifest["hyperparameters"].items()}
    # Where it is written says nothing of how it comes out
    hyperparameters.pop("tensorboard_log", None)
    return facts | {f"hyperparameter {name}": value for name, value in hyperparameters.items()}


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines()
    return _visible(lines[-1]) if lines else "it said nothing"


def _shown(command: list[str]) -> str:
    return _visible(subprocess.list2cmdline(["python", *command[1:]]))


def _visible(text: str) -> str:
    """A text that a terminal only shows, whatever is in it."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def show_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print a verdict, and what has changed around the run."""
    console = console or Console()
    console.print(Text(verdict.words, style="bold green" if verdict.is_same else "bold red"), soft_wrap=True)
    if not verdict.surroundings:
        console.print("Versions, code, processor, threads, data, settings and git commit are those of the first run.")
        return
    table = Table("not the same now", "then", "now", title="Surroundings", title_justify="left")
    for name, values in verdict.surroundings.items():
        table.add_row(
            Text(_visible(name)), *(Text("none" if value is None else _visible(str(value)[:60])) for value in values)
        )
    console.print(table)
