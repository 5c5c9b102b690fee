"""What a cell of a study leaves behind: one folder, written whole or not at all."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.collapse.events import EVENTS_FILE, encode_events, read_events
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json, naming_damage, read_npz, replace_synced
from sb3_offline_ft.evaluation.run_summary import EVALUATIONS

MANIFEST = "manifest.json"
TRAINING = "training.npz"
RUNS = "runs"
NEEDED = ("key", "guarded")
"""What a manifest must say; with the cell's facts, as all that a run writes, also the rest that reports need."""
KEY_DIGITS = 8
"""Of a cell's key, in the name of its folder."""
ATTEMPTS = 20
STALE_SECONDS = 3600
_TEMPORARY = re.compile(rf"\.seed\d+-[0-9a-f]{{{KEY_DIGITS}}}\.(old\.)?[A-Za-z0-9_]{{8}}")

_ARRAYS = {
    "timesteps": np.int64,
    "returns": np.float64,
    "lengths": np.int64,
    "training_timesteps": np.int64,
    "training_returns": np.float64,
}


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
    """

    timesteps: npt.NDArray[np.int64]
    returns: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    training_timesteps: npt.NDArray[np.int64]
    training_returns: npt.NDArray[np.float64]
    events: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def frozen_until(self) -> int:
        """Interactions with the pretrained policy; -1 if there was none."""
        return int(self.manifest["frozen_until"])

    def to_json(self) -> str:
        """
        :return: All of it as one line of JSON, exact to the bit
        """
        arrays = arrays_to_json({name: np.asarray(getattr(self, name), dtype) for name, dtype in _ARRAYS.items()})
        return json.dumps({"arrays": arrays, "events": self.events, "manifest": self.manifest})

    @classmethod
    def from_json(cls, text: str) -> "CellResult":
        """
        :param text: What :meth:`to_json` gave
        :return: The result
        :raises ValueError: It is something else
        """
        content = json.loads(text)
        result = cls(**arrays_from_json(content["arrays"]), events=content["events"], manifest=content["manifest"])
        _check_manifest(result.manifest)
        return _checked(result)


def run_folder(study: Path, dataset: str | None, method: str, seed: int, key: str) -> Path:
    """
    :param study: Folder of the study
    :param dataset: Label of the dataset, None if there is none
    :param method: Name of the method
    :param seed: The seed
    :param key: Key of the cell
    :return: Where the cell's result is, or would be
    """
    return study / RUNS / (dataset or "no-data") / method / f"seed{seed}-{key[:KEY_DIGITS]}"


def write_result(folder: Path, result: CellResult) -> None:
    """
    Write a result; what is there is replaced. If others write the same folder at once, one of them is there at last, whole.

    :param folder: The cell's folder
    :param result: The result
    :raises OSError: It cannot be written; the folder is as it was
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        evaluations = {"timesteps": result.timesteps, "results": result.returns, "ep_lengths": result.lengths}
        training = {"timesteps": result.training_timesteps, "returns": result.training_returns}
        (temporary / EVALUATIONS).write_bytes(_npz(evaluations))
        (temporary / TRAINING).write_bytes(_npz(training))
        if result.manifest.get("guarded"):
            (temporary / EVENTS_FILE).write_bytes(encode_events(result.events))
        (temporary / MANIFEST).write_text(json.dumps(result.manifest, indent=1) + "\n")
        temporary.chmod(0o755)
        _replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _npz(arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """The same arrays give the same bytes: no dates, as they are in ``numpy.savez``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


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
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    try:
        # Another process may have moved it
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old / folder.name)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for path in parent.glob(".*"):
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def read_result(folder: Path) -> CellResult | None:
    """
    Read what :func:`write_result` wrote. A folder that is there, but damaged, is named in a warning.

    :param folder: The cell's folder
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
    warnings.warn(f"{problem} The cell counts as not run.", stacklevel=2)
    return None


def _read(folder: Path) -> CellResult:
    manifest = json.loads((folder / MANIFEST).read_text())
    _check_manifest(manifest)
    evaluations = read_npz(folder / EVALUATIONS, "timesteps", "results", "ep_lengths")
    training = read_npz(folder / TRAINING, "timesteps", "returns")
    return CellResult(
        evaluations["timesteps"],
        evaluations["results"],
        evaluations["ep_lengths"],
        training["timesteps"],
        training["returns"],
        _read_whole_events(folder / EVENTS_FILE) if manifest["guarded"] else [],
        manifest,
    )


def _read_whole_events(path: Path) -> list[dict[str, Any]]:
    """
    :raises ValueError: It is damaged, or cut off, which is no damage to others that read it while it is written
    """
    events = read_events(path)
    if not events or not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path} is cut off")
    return events


_Types = tuple[type, ...]
_NUMBER, _NOTHING = (int, float), type(None)
_FACTS: dict[str, _Types] = {
    "key": (str,),
    "guarded": (bool,),
    "cell": (dict,),
    "frozen_until": (int,),
    "dataset": (dict, _NOTHING),
    "pretrained": (dict, _NOTHING),
    "random_return": (*_NUMBER, _NOTHING),
    "learner_evaluation_steps": (int,),
    "seconds": (dict, _NOTHING),
    "versions": (dict, _NOTHING),
}
_FACTS_WITHIN: dict[str, dict[str, _Types]] = {
    "dataset": {"fingerprint": (str,), "transitions": (int,), "episodes": (int,), "mean_return": _NUMBER},
    "pretrained": {"recipe": (str,), "weights_sha256": (str,)},
    "seconds": {"preparation": _NUMBER, "finetuning": _NUMBER},
}


def _check_manifest(manifest: Any) -> None:
    """
    :raises ValueError: A fact is missing or of another type than reports need
    """
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds a {type(manifest).__name__}, expected facts by name")
    whole = "cell" in manifest
    _check_facts(manifest, _FACTS, "", ("frozen_until", "dataset", *NEEDED) if whole else NEEDED)
    for name, types in _FACTS_WITHIN.items():
        if isinstance(manifest.get(name), dict):
            _check_facts(manifest[name], types, f"{name}.", () if name == "seconds" else tuple(types))
    if whole and not isinstance(manifest["cell"].get("dataset"), dict | None):
        raise ValueError(f"{MANIFEST}: cell.dataset must hold facts by name, found {manifest['cell']['dataset']!r:.60}")


def _check_facts(facts: dict[str, Any], types: dict[str, _Types], where: str, needed: tuple[str, ...]) -> None:
    for name, allowed in types.items():
        if name not in facts:
            if name in needed:
                raise ValueError(f"{MANIFEST} does not say {where}{name}")
            continue
        value = facts[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            words = " or ".join(one.__name__ for one in allowed)
            raise ValueError(f"{MANIFEST}: {where}{name} must be {words}, found {value!r:.60}")


def _checked(result: CellResult) -> CellResult:
    """
    :raises ValueError: An array has another type or shape than :class:`CellResult` says, or an event no time
    """
    for name, kinds, n_dimensions in (
        ("timesteps", "iu", 1),
        ("returns", "iuf", 2),
        ("lengths", "iu", 2),
        ("training_timesteps", "iu", 1),
        ("training_returns", "iuf", 1),
    ):
        array = getattr(result, name)
        if array.dtype.kind not in kinds or array.ndim != n_dimensions:
            number = "whole numbers" if kinds == "iu" else "numbers"
            raise ValueError(
                f"{name} must be {number} in {n_dimensions} dimension{'s' * (n_dimensions > 1)}, "
                f"found {array.dtype} of shape {array.shape}"
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
    for event in result.events:
        if not isinstance(event.get("timestep", 0), int):
            raise ValueError(f"an event's timestep must be a whole number, found {event['timestep']!r:.60}")
    return result
