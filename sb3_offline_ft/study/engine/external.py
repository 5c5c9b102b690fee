"""Cells of methods that are commands: what they are asked for, and what is read back."""

import contextlib
import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.reading import parse_json, read_json, shortened
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.datasets.columns import COLUMNS
from sb3_offline_ft.study.design.checking import check_for_commands
from sb3_offline_ft.study.engine.measure import OnEvaluation, OnStep

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.methods import Method

VERSION = 1
"""Of the form of requests and results."""
REQUEST, RESULT, DATA = "request.json", "result.json", "external_data"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LAST_LINES = 20
"""Of what a command printed, in the message if it fails."""
MOST_OF_LINE = 65536
MOST_SAID = 4000
"""Characters of them."""
RUNS = "runs"
"""The phase of a command that has not said which one it is in."""
MOST_OF_PHASE, MOST_STEPS, LARGEST = 40, 2**53, 1e100
END_SECONDS, QUIET_SECONDS = 5, 1
ARRAYS = {
    "timesteps": (np.int64, 1),
    "returns": (np.float64, 2),
    "lengths": (np.int64, 2),
    "training_timesteps": (np.int64, 1),
    "training_returns": (np.float64, 1),
}
"""What a result holds, by its names there and in a :class:`CellResult`, with types and numbers of dimensions."""
FACTS: dict[str, Any] = {
    "algorithm": str,
    "hyperparams": dict,
    "versions": dict,
    "frozen_until": int,
    "interactions": int,
    "updates": dict,
    "seconds": dict,
}
"""What it says besides, with types."""
NUMBERS = {"updates": {"offline", "online"}, "seconds": {"preparation", "finetuning"}}
"""Those that hold numbers, which must have these."""


class ExternalError(RuntimeError):
    """A command has failed, or what it wrote is no result."""


def run_external(
    method: "Method",
    request: Mapping[str, Any],
    dataset: OfflineDataset,
    folder: Path,
    tell: OnStep,
    on_evaluation: OnEvaluation | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Run a method's command in a study's folder, with the file of a request as its last argument.

    :param method: The method
    :param request: What the study asks for, besides where the data is and the result shall be
    :param dataset: The data, which is written down once for all cells
    :param folder: The study's folder
    :param tell: Is told the phase, the steps that are done of it, and of how many, as the command prints them
    :param on_evaluation: Is told the evaluations when the command has ended
    :return: The arrays of :data:`ARRAYS` and the facts of :data:`FACTS`
    :raises ExternalError: The command failed, or its result is missing or damaged
    """
    assert method.external is not None
    with tempfile.TemporaryDirectory(prefix="external-") as own:
        result = Path(own) / RESULT
        options = dict(method.external["options"])
        asked = {
            "version": VERSION,
            **request,
            "options": options,
            "dataset": str(written(dataset, folder)),
            "result": str(result),
        }
        (Path(own) / REQUEST).write_text(json.dumps(asked, indent=1))
        _run([*method.external["command"], str(Path(own) / REQUEST)], folder, tell, method.external.get("timeout"))
        try:
            with naming_damage(f"The result of `{shlex.join(method.external['command'])}`", "one that a study asked for"):
                arrays, facts = _checked(read_json(result), request, method.pretrained)
        except FileNotFoundError:
            raise ExternalError(f"{method.name}: the command ended without a result in {RESULT}.") from None
        except ValueError as error:
            raise ExternalError(f"{method.name}: {error}") from None
    if on_evaluation is not None:
        for timestep, returns in zip(arrays["timesteps"], arrays["returns"], strict=True):
            on_evaluation(int(timestep), returns.tolist())
    return arrays, facts


def written(dataset: OfflineDataset, folder: Path) -> Path:
    """The file of a dataset for commands, which is written if it is missing or damaged: a NumPy archive of plain arrays."""
    try:
        check_for_commands(dataset)
    except ValueError as error:
        raise ExternalError(str(error)) from None
    path = folder / DATA / f"{dataset.fingerprint[:16]}.npz"
    arrays = {name: getattr(dataset, name) for name in COLUMNS}
    if not _holds(path, arrays):
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    return path


def _holds(path: Path, arrays: Mapping[str, Any]) -> bool:
    try:
        with path.open("rb") as file, np.load(file) as known:
            return all(np.array_equal(known[name], value) for name, value in arrays.items())
    # Whoever reads a damaged archive raises anything
    except Exception:
        return False


def _run(command: list[str], folder: Path, tell: OnStep, timeout: float | None = None) -> None:
    threads = {name: str(th.get_num_threads()) for name in THREADS}
    what = shortened(shlex.join(command[:-1]))
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group of its own, so that all of it can be ended
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise ExternalError(f"`{what}` cannot be run in {folder}: {getattr(error, 'strerror', None) or error}.") from None
    last: deque[str] = deque(maxlen=LAST_LINES)
    ends = math.inf if timeout is None else time.monotonic() + timeout
    assert process.stdout is not None
    with process.stdout as output:
        try:
            told = RUNS, 0, 1
            for line in _lines(process, output.fileno(), ends):
                text = line.decode(errors="replace").rstrip()
                step = _step_of(text)
                if text and step is None:
                    last.append(text)
                # Whatever it says, as there may be nobody to be told any more
                tell(*(told := step or told))
            code = process.poll()
        finally:
            _end(process)
    if code == 0:
        return
    if code is None:
        ended = f"did not end within {timeout:,g} seconds (`timeout`), and was ended"
    elif code < 0:
        ended = f"was ended by {signal.Signals(-code).name if -code in {*signal.Signals} else f'signal {-code}'}"
    else:
        ended = f"failed with exit status {code}"
    said = "\n".join(map(shortened, last))[-MOST_SAID:] or "nothing was printed"
    # The last line is what is shown of an error where there is room for one
    raise ExternalError(f"{said}\n`{what}` {ended}")


def _lines(process: "subprocess.Popen[bytes]", output: int, ends: float) -> Iterator[bytes]:
    """
    What a command prints, until it or the time has ended; empty lines from time to time, when it prints nothing. What it has
    started may keep the output open after its end.
    """
    begun = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while time.monotonic() < ends:
            has_ended = process.poll() is not None
            if has_ended:
                ends = min(ends, time.monotonic() + END_SECONDS)
            if not selector.select(0 if has_ended else QUIET_SECONDS):
                if has_ended:
                    break
                yield b""
                continue
            content = os.read(output, MOST_OF_LINE)
            *lines, begun = (begun + content).split(b"\n")
            yield from lines
            begun = begun[:MOST_OF_LINE]
            if not content:
                # It may have closed its output, and still run
                selector.unregister(output)
                break
    yield begun
    while process.poll() is None and time.monotonic() < ends:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(QUIET_SECONDS, max(0.0, ends - time.monotonic())))
            break
        yield b""


def _step_of(text: str) -> tuple[str, int, int] | None:
    """How far a line says that the command is, ``{"phase": ..., "done": ..., "total": ...}``; None if it does not."""
    if not text.startswith("{"):
        return None
    try:
        step = parse_json(text, "a line")
        phase, done, total = step["phase"], step["done"], step["total"]
    except (ValueError, KeyError, TypeError):
        return None
    if not (isinstance(phase, str) and type(done) is type(total) is int and 0 <= done <= total < MOST_STEPS):
        return None
    return phase[:MOST_OF_PHASE], done, total


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End what may still run of a command: it and those that it has started, in its group."""
    ends, number = time.monotonic() + END_SECONDS, int(signal.SIGTERM)
    with contextlib.suppress(OSError):
        while time.monotonic() < ends:
            # Its entry is there until it has been asked for
            process.poll()
            os.killpg(process.pid, number)
            number = 0
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _checked(
    content: Mapping[str, Any], request: Mapping[str, Any], pretrained: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    _check_facts(content, request["interactions"], pretrained)
    arrays = {name: _array(content.get(name), name, *form) for name, form in ARRAYS.items()}
    plan, interactions = request["evaluation"], request["interactions"]
    expected = list(range(0, interactions + 1, plan["every"]))
    if arrays["timesteps"].tolist() != expected or arrays["returns"].shape != (len(expected), plan["episodes"]):
        raise ValueError(
            f"its evaluations must be after {_in_short(expected)} interactions, of {plan['episodes']} episodes each, found "
            f"{_in_short(arrays['timesteps'].tolist())}, shape {arrays['returns'].shape}"
        )
    if arrays["lengths"].shape != arrays["returns"].shape or (arrays["lengths"] < 1).any():
        raise ValueError(f"`lengths` must be those of the episodes of `returns`, found shape {arrays['lengths'].shape}")
    steps = arrays["training_timesteps"]
    if (np.diff(steps, prepend=0) <= 0).any():
        raise ValueError("`training_timesteps` must be the ends of episodes, the one later than the other")
    if steps.shape != arrays["training_returns"].shape:
        raise ValueError("`training_timesteps` and `training_returns` must be of the same episodes")
    within = steps <= interactions
    arrays |= {name: arrays[name][within] for name in ("training_timesteps", "training_returns")}
    return arrays, {name: content[name] for name in FACTS}


def _check_facts(content: Mapping[str, Any], interactions: int, pretrained: bool) -> None:
    for name, kind in FACTS.items():
        if not isinstance(content.get(name), kind) or isinstance(content[name], bool):
            raise ValueError(f"`{name}` must be a {kind.__name__}, found {content.get(name)!r:.60}")
    for name, keys in NUMBERS.items():
        given = content[name]
        if not (keys <= given.keys() and all(type(one) in (int, float) and 0 <= one < LARGEST for one in given.values())):
            raise ValueError(f"`{name}` must have numbers of at least 0, {' and '.join(sorted(keys))}, found {given!r:.60}")
    if not -1 <= content["frozen_until"] < interactions:
        raise ValueError(f"`frozen_until` must be from -1 to below the interactions, found {content['frozen_until']}")
    if not pretrained and content["frozen_until"] != -1:
        raise ValueError(f"`frozen_until` must be -1 with `start: scratch`, found {content['frozen_until']}")
    if content["interactions"] < interactions:
        raise ValueError(f"`interactions` must be at least {interactions}, found {content['interactions']}")


def _array(values: Any, name: str, dtype: type, n_dimensions: int) -> Any:
    try:
        array = np.array(values, dtype=np.float64)
        are_numbers = all(type(one) in (int, float) for one in np.array(values, dtype=object).flat)
    except (ValueError, TypeError, OverflowError):
        are_numbers = False
    if not are_numbers:
        raise ValueError(f"`{name}` must be numbers, found {values!r:.60}")
    array = array.reshape(0) if not array.size and n_dimensions == 1 else array
    if array.ndim != n_dimensions or not (np.abs(array) < LARGEST).all():
        raise ValueError(f"`{name}` must be finite numbers in {n_dimensions} dimensions, found shape {array.shape}")
    if dtype is np.int64 and ((array % 1).any() or (array < 0).any() or (array > MOST_STEPS).any()):
        raise ValueError(f"`{name}` must be whole numbers of steps")
    return array.astype(dtype)


def _in_short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (f", ... {numbers[-1]}" if len(numbers) > 3 else "")
