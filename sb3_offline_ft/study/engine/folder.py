"""What a cell of a study leaves behind: one folder, written whole or not at all."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.collapse.events import EVENTS_FILE, encode_events, read_events
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json, naming_damage, read_npz, replace_synced
from sb3_offline_ft.common.leftovers import temporary_folder
from sb3_offline_ft.common.reading import parse_json, read_json
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.history import EVENTS_FILE as DEPLOYMENT_EVENTS_FILE
from sb3_offline_ft.evaluation.run_summary import EVALUATIONS
from sb3_offline_ft.evaluation.served import EXPLORE, SERVE, TRIAL

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Cell, Protocol

MANIFEST = "manifest.json"
TRAINING = "training.npz"
RUNS = "runs"
KEY_DIGITS = 8
"""Of a cell's key, in the name of its folder."""
ATTEMPTS = 20

KINDS = (SERVE, EXPLORE, TRIAL)
"""Of training episodes, from the harmless to the risky."""

_ARRAYS: dict[str, tuple[type, int]] = {
    "timesteps": (np.int64, 1),
    "returns": (np.float64, 2),
    "lengths": (np.int64, 2),
    "training_timesteps": (np.int64, 1),
    "training_returns": (np.float64, 1),
    "own_timesteps": (np.int64, 1),
    "own_returns": (np.float64, 2),
    "own_lengths": (np.int64, 2),
    "training_kinds": (np.int64, 1),
}
"""Types and numbers of dimensions."""
_OWN = ("own_timesteps", "own_returns", "own_lengths")
_ADDED = (*_OWN, "training_kinds")
"""Not in results of before."""
_FILES = {
    EVALUATIONS: {"timesteps": "timesteps", "results": "returns", "ep_lengths": "lengths"},
    TRAINING: {"timesteps": "training_timesteps", "returns": "training_returns", **{name: name for name in _ADDED}},
}
"""Where the arrays are, with their names there."""


@dataclass
class CellResult:
    """
    What happened in a cell.

    :param timesteps: Interactions at each measured evaluation, the first one at 0, shape ``(evaluations,)``
    :param returns: Undiscounted return of each evaluation episode, shape ``(evaluations, episodes)``
    :param lengths: Length of each evaluation episode, shape ``(evaluations, episodes)``
    :param training_timesteps: Interactions at the end of each training episode, shape ``(training episodes,)``
    :param training_returns: Undiscounted return of each training episode, shape ``(training episodes,)``
    :param events: Events of the collapse guard
    :param manifest: Facts about the cell, in the form of JSON
    :param own_timesteps: Interactions before each evaluation that the learner learned from, shape ``(own evaluations,)``; none
        if there were none, or if they were not recorded
    :param own_returns: Undiscounted return of each of their episodes, shape ``(own evaluations, episodes)``
    :param own_lengths: Length of each of them, shape ``(own evaluations, episodes)``
    :param training_kinds: The kind of each training episode as an index of :data:`KINDS`, shape ``(training episodes,)``; none
        if there was no champion
    :param deployment_events: Events of the champion and its challengers
    """

    timesteps: npt.NDArray[np.int64]
    returns: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    training_timesteps: npt.NDArray[np.int64]
    training_returns: npt.NDArray[np.float64]
    events: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    own_timesteps: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    own_returns: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    own_lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    training_kinds: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    deployment_events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def frozen_until(self) -> int:
        """Interactions with the pretrained policy; -1 if there was none."""
        return int(self.manifest["frozen_until"])

    @property
    def knows_own_evaluations(self) -> bool:
        """Whether all evaluations that the learner learned from were recorded, or there were none."""
        return bool(self.manifest.get("learner_evaluation_steps") == self.own_lengths.sum())

    @property
    def kinds(self) -> list[str]:
        """The kind of each training episode, one of :data:`KINDS`; without a champion all serve."""
        return [KINDS[kind] for kind in self.training_kinds] or [SERVE] * len(self.training_returns)

    def to_json(self) -> str:
        """
        :return: All of it as one line of JSON, exact to the bit
        """
        arrays = arrays_to_json({name: np.asarray(getattr(self, name), dtype) for name, (dtype, _) in _ARRAYS.items()})
        events = {"events": self.events, "deployment_events": self.deployment_events}
        return json.dumps({"arrays": arrays, **events, "manifest": self.manifest})

    @classmethod
    def from_json(cls, text: str) -> "CellResult":
        """
        :param text: What :meth:`to_json` gave
        :return: The result
        :raises ValueError: It is something else
        """
        content = parse_json(text, "the text")
        arrays: dict[str, Any] = arrays_from_json(content["arrays"])
        deployment = content.get("deployment_events", [])
        result = cls(**arrays, events=content["events"], manifest=content["manifest"], deployment_events=deployment)
        _check_manifest(result.manifest)
        return _checked(result)


def run_folder(study: Path, dataset: str | None, method: str, seed: int, key: str) -> Path:
    """Where the result of the cell with a key is, or would be, in a study's folder."""
    return study / RUNS / (dataset or "no-data") / method / f"seed{seed}-{key[:KEY_DIGITS]}"


def find_result(protocol: "Protocol", cell: "Cell", stored: str | None = None) -> CellResult | None:
    """
    Read a cell's result, and write its run folder if that is missing or damaged. A stored result that is damaged is named in
    a warning.

    :param stored: Its result in the storage as JSON, if it is there
    :return: Its result, None if there is none
    :raises OSError: The run folder cannot be written
    """
    result = local_result(protocol, cell)
    if result is None and stored is not None:
        try:
            with naming_damage(f"The result of {cell.name} in the storage", "one that a run has written"):
                result = CellResult.from_json(stored)
        except ValueError as error:
            warn(f"{error} It is left out.")
    return None if result is None else keep_result(protocol, cell, result)


def local_result(protocol: "Protocol", cell: "Cell") -> CellResult | None:
    """A cell's result from its run folder, or from one that has the name that the method or the dataset had before."""
    key = protocol.cell_key(cell)
    results = (_result_of(key, folder) for folder in folders_of(protocol, cell))
    return next((result for result in results if result is not None), None)


def _result_of(key: str, folder: Path) -> CellResult | None:
    # The only place to read from, so that Python shows the warning of a damaged folder once
    result = read_result(folder)
    return result if result is not None and result.manifest["key"] == key else None


def keep_result(protocol: "Protocol", cell: "Cell", result: CellResult) -> CellResult:
    """
    Write a cell's result, or that of another one with the same key, into its run folder, unless it is there.

    :return: The result as it is there, with the cell's name
    :raises OSError: It cannot be written
    """
    folder = next(folders_of(protocol, cell))
    there = _result_of(protocol.cell_key(cell), folder)
    if there is not None:
        return there
    result = replace(result, manifest=result.manifest | {"name": cell.name, "label": cell.method.label})
    write_result(folder, result)
    return result


def folders_of(protocol: "Protocol", cell: "Cell") -> Iterator[Path]:
    """The run folder of a cell, and then those that have the names of before."""
    own = run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell))
    yield own
    yield from (folder for folder in sorted((protocol.folder / RUNS).glob(f"*/*/{own.name}")) if folder != own)


def write_result(folder: Path, result: CellResult) -> None:
    """
    Write a result; what is there is replaced. If others write the same folder at once, one of them is there at last, whole.

    :raises OSError: It cannot be written; the folder is as it was
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(folder.parent, folder.name)
    try:
        for name, arrays in _FILES.items():
            # From memory: only a write of bytes says whether the disk is full
            stream = io.BytesIO()
            np.savez_compressed(stream, **{there: getattr(result, here) for there, here in arrays.items()})
            (temporary / name).write_bytes(stream.getvalue())
        if result.manifest.get("guarded"):
            (temporary / EVENTS_FILE).write_bytes(encode_events(result.events))
        if result.manifest.get("champion"):
            (temporary / DEPLOYMENT_EVENTS_FILE).write_bytes(encode_events(result.deployment_events))
        (temporary / MANIFEST).write_text(json.dumps(result.manifest, indent=1) + "\n")
        temporary.chmod(0o755)
        _replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, folder: Path) -> None:
    for attempt in range(ATTEMPTS):
        _move_away(folder)
        try:
            replace_synced(temporary, folder)
            return
        except OSError as error:
            # Another process was faster
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == ATTEMPTS - 1:
                raise
            if read_result(folder) is not None:
                shutil.rmtree(temporary, ignore_errors=True)
                return


def _move_away(folder: Path) -> None:
    if not folder.exists():
        return
    old = temporary_folder(folder.parent, f"{folder.name}.old")
    try:
        # Another process may have moved it
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old / folder.name)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def read_result(folder: Path) -> CellResult | None:
    """
    Read what :func:`write_result` wrote. A folder that is there, but damaged, is named in a warning.

    :return: The result, None if there is none or it is damaged
    """
    try:
        with naming_damage(folder, "the result of a cell"):
            return _checked(_read(folder))
    except FileNotFoundError as error:
        if not folder.exists():
            return None
        problem = f"{folder} lacks {Path(str(error.filename)).name}."
    except ValueError as error:
        problem = str(error)
    warn(f"{problem} The cell counts as not run.")
    return None


def _read(folder: Path) -> CellResult:
    manifest = read_json(folder / MANIFEST)
    _check_manifest(manifest)
    arrays: dict[str, Any] = {}
    for name, names in _FILES.items():
        arrays |= {names[there]: array for there, array in read_npz(folder / name, *names, optional=_ADDED).items()}
    events = _read_whole_events(folder / EVENTS_FILE) if manifest["guarded"] else []
    deployment = _read_whole_events(folder / DEPLOYMENT_EVENTS_FILE) if manifest.get("champion") else []
    return CellResult(**arrays, events=events, manifest=manifest, deployment_events=deployment)


def _read_whole_events(path: Path) -> list[dict[str, Any]]:
    """What is cut off is no damage to others, that read it while it is written."""
    events = read_events(path)
    if not events or not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path} is cut off")
    return events


_FACTS: dict[str, Any] = {
    "key": str,
    "guarded": bool,
    "champion": dict | None,
    "cell": dict,
    "cell.dataset": dict | None,
    "frozen_until": int,
    "dataset": dict | None,
    "dataset.fingerprint": str,
    "dataset.transitions": int,
    "dataset.episodes": int,
    "dataset.mean_return": int | float,
    "pretrained": dict | None,
    "pretrained.recipe": str,
    "pretrained.weights_sha256": str,
    "random_return": int | float | None,
    "learner_evaluation_steps": int,
    "seconds": dict | None,
    "seconds.preparation": int | float,
    "seconds.finetuning": int | float,
    "versions": dict | None,
}
"""What reports need of a manifest, with its types."""
_NEEDED = re.compile(r"key|guarded|(dataset|pretrained)\..*")
_NEEDED_WITH_CELL = ("frozen_until", "dataset")
"""Manifests with the cell's facts have all that a run writes."""


def _check_manifest(manifest: Any) -> None:
    """
    :raises ValueError: A fact is missing or of another type than reports need
    """
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds a {type(manifest).__name__}, expected facts by name")
    for path, allowed in _FACTS.items():
        parent, _, name = path.rpartition(".")
        facts = manifest.get(parent) if parent else manifest
        if not isinstance(facts, dict):
            continue
        if name not in facts:
            if _NEEDED.fullmatch(path) or ("cell" in manifest and path in _NEEDED_WITH_CELL):
                raise ValueError(f"{MANIFEST} does not say {path}")
        elif not isinstance(value := facts[name], allowed) or (isinstance(value, bool) and allowed is not bool):
            words = getattr(allowed, "__name__", allowed)
            raise ValueError(f"{MANIFEST}: {path} must be {words}, found {value!r:.60}")


def _checked(result: CellResult) -> CellResult:
    """
    :raises ValueError: An array has another type or shape than :class:`CellResult` says, or an event no time
    """
    for name, (dtype, n_dimensions) in _ARRAYS.items():
        array = getattr(result, name)
        is_whole = dtype is np.int64
        if array.dtype.kind not in ("iu" if is_whole else "iuf") or array.ndim != n_dimensions:
            raise ValueError(
                f"{name} must be {'whole numbers' if is_whole else 'numbers'} in {n_dimensions} dimension"
                f"{'s' * (n_dimensions > 1)}, found {array.dtype} of shape {array.shape}"
            )
    steps = result.timesteps
    if result.returns.size == 0 or steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise ValueError("it must have evaluations, the one later than the other")
    if not len(steps) == len(result.returns) or result.returns.shape != result.lengths.shape:
        raise ValueError(
            f"timesteps, returns and lengths must be of the same evaluations, found shapes {steps.shape}, "
            f"{result.returns.shape} and {result.lengths.shape}"
        )
    if result.training_timesteps.shape != result.training_returns.shape:
        raise ValueError("timesteps and returns of training must be of the same episodes")
    if result.own_returns.shape != result.own_lengths.shape or len(result.own_timesteps) != len(result.own_returns):
        raise ValueError(
            f"{', '.join(_OWN)} must be of the same evaluations, found shapes {result.own_timesteps.shape}, "
            f"{result.own_returns.shape} and {result.own_lengths.shape}"
        )
    kinds = result.training_kinds
    if kinds.size and (kinds.shape != result.training_returns.shape or not np.isin(kinds, range(len(KINDS))).all()):
        raise ValueError(f"training_kinds must be of the training episodes, each one of {', '.join(KINDS)}, found {kinds}")
    for event in [*result.events, *result.deployment_events]:
        if not isinstance(event.get("timestep", 0), int):
            raise ValueError(f"an event's timestep must be a whole number, found {event['timestep']!r:.60}")
    return result
