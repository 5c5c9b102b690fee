"""Cells of methods that are commands: what they are asked for, and what is read back."""

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.reading import parse_json, read_json, shortened
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.datasets.columns import COLUMNS
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
END_SECONDS = 5
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
        _run([*method.external["command"], str(Path(own) / REQUEST)], folder, tell)
        try:
            with naming_damage(f"The result of `{' '.join(method.external['command'])}`", "one that a study asked for"):
                arrays, facts = _checked(read_json(result), request)
        except FileNotFoundError:
            raise ExternalError(f"{method.name}: the command ended without a result in {RESULT}.") from None
        except ValueError as error:
            raise ExternalError(f"{method.name}: {error}") from None
    if on_evaluation is not None:
        for timestep, returns in zip(arrays["timesteps"], arrays["returns"], strict=True):
            on_evaluation(int(timestep), returns.tolist())
    return arrays, facts


def written(dataset: OfflineDataset, folder: Path) -> Path:
    """The file of a dataset for commands, which is written if it is missing: a NumPy archive of plain arrays."""
    path = folder / DATA / f"{dataset.fingerprint[:16]}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        arrays = {name: getattr(dataset, name) for name in COLUMNS}
        if isinstance(arrays["observations"], dict):
            raise ExternalError(f"{dataset.name} has `Dict` observations: commands are given data with one array of them.")
        if any(part.weight is not None for part in dataset.sources):
            raise ExternalError(f"{dataset.name} has weighted parts, of which commands know nothing: leave out the weights.")
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    return path


def _run(command: list[str], folder: Path, tell: OnStep) -> None:
    threads = {name: str(th.get_num_threads()) for name in THREADS}
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
    except OSError as error:
        raise ExternalError(f"`{command[0]}` cannot be run in {folder}: {error.strerror}.") from None
    last: deque[str] = deque(maxlen=LAST_LINES)
    assert process.stdout is not None
    with process.stdout as lines:
        try:
            for line in iter(lambda: lines.readline(MOST_OF_LINE), b""):
                text = line.decode(errors="replace").rstrip()
                if not _told(text, tell):
                    last.append(text)
            code = process.wait()
        finally:
            _end(process)
    if code:
        said = "\n".join(map(shortened, last)) or "nothing was printed"
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"
        raise ExternalError(f"`{' '.join(command[:-1])}` {ended}: {said}")


def _told(text: str, tell: OnStep) -> bool:
    """Whether a line says how far the command is: ``{"phase": ..., "done": ..., "total": ...}``."""
    if not text.startswith("{"):
        return False
    try:
        step = parse_json(text, "a line")
        tell(str(step["phase"]), int(step["done"]), int(step["total"]))
    except (ValueError, KeyError, TypeError):
        return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End what may still run of a command."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            return


def _checked(content: Mapping[str, Any], request: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for name, kind in FACTS.items():
        if not isinstance(content.get(name), kind) or isinstance(content[name], bool):
            raise ValueError(f"`{name}` must be a {kind.__name__}, found {content.get(name)!r:.60}")
    for name in ("updates", "seconds"):
        if not all(type(one) in (int, float) and 0 <= one < math.inf for one in content[name].values()):
            raise ValueError(f"`{name}` must have numbers of at least 0, found {content[name]!r:.60}")
    if not -1 <= content["frozen_until"] < request["interactions"]:
        raise ValueError(f"`frozen_until` must be from -1 to below the interactions, found {content['frozen_until']}")
    arrays: dict[str, Any] = {}
    for name, (dtype, n_dimensions) in ARRAYS.items():
        values = content.get(name)
        try:
            array = np.array(values, dtype=np.float64)
            are_numbers = all(type(one) in (int, float) for one in np.array(values, dtype=object).flat)
        except (ValueError, TypeError, OverflowError):
            are_numbers = False
        if not are_numbers:
            raise ValueError(f"`{name}` must be numbers, found {values!r:.60}")
        array = array.reshape(0) if not array.size and n_dimensions == 1 else array
        if array.ndim != n_dimensions or not np.isfinite(array).all() or (dtype is np.int64 and (array % 1).any()):
            raise ValueError(f"`{name}` must be finite numbers in {n_dimensions} dimensions, found shape {array.shape}")
        arrays[name] = array.astype(dtype)
    plan, interactions = request["evaluation"], request["interactions"]
    expected = list(range(0, interactions + 1, plan["every"]))
    if arrays["timesteps"].tolist() != expected or arrays["returns"].shape != (len(expected), plan["episodes"]):
        raise ValueError(
            f"its evaluations must be after {_in_short(expected)} interactions, of {plan['episodes']} episodes each, found "
            f"{_in_short(arrays['timesteps'].tolist())}, shape {arrays['returns'].shape}"
        )
    if content["interactions"] < interactions:
        raise ValueError(f"`interactions` must be at least {interactions}, found {content['interactions']}")
    steps = arrays["training_timesteps"]
    if (np.diff(steps, prepend=0) <= 0).any():
        raise ValueError("`training_timesteps` must be the ends of episodes, the one later than the other")
    if steps.shape != arrays["training_returns"].shape:
        raise ValueError("`training_timesteps` and `training_returns` must be of the same episodes")
    within = steps <= interactions
    arrays |= {name: arrays[name][within] for name in ("training_timesteps", "training_returns")}
    return arrays, {name: content[name] for name in FACTS}


def _in_short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (f", ... {numbers[-1]}" if len(numbers) > 3 else "")
