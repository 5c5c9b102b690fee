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
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.collapse.events import EVENTS_FILE, encode_events, read_events
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json
from sb3_offline_ft.evaluation.run_summary import EVALUATIONS

MANIFEST = "manifest.json"
TRAINING = "training.npz"
RUNS = "runs"
NEEDED = ("key", "guarded")
"""What a manifest must say."""
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
        """
        content = json.loads(text)
        return cls(**arrays_from_json(content["arrays"]), events=content["events"], manifest=content["manifest"])


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
            os.replace(temporary, folder)
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


def _arrays(path: Path, *names: str) -> dict[str, npt.NDArray[Any]]:
    # From memory: NumPy leaves a damaged file open
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        return {name: file[name] for name in names}


def read_result(folder: Path) -> CellResult | None:
    """
    Read what :func:`write_result` wrote.

    :param folder: The cell's folder
    :return: The result, None if there is none or only part of one
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict) or any(name not in manifest for name in NEEDED):
            return None
        evaluations = _arrays(folder / EVALUATIONS, "timesteps", "results", "ep_lengths")
        training = _arrays(folder / TRAINING, "timesteps", "returns")
        events = read_events(folder / EVENTS_FILE) if manifest["guarded"] else []
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return CellResult(
        evaluations["timesteps"],
        evaluations["results"],
        evaluations["ep_lengths"],
        training["timesteps"],
        training["returns"],
        events,
        manifest,
    )
