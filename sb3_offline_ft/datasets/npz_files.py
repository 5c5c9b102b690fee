"""``.npz`` files as datasets."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reading import ContentError, Source, reading

_NPZ_ALIASES = {"terminals": "terminations", "timeouts": "truncations"}
_NPZ_REQUIRED = ("observations", "actions", "rewards", "terminations")
_NPZ_OPTIONAL = ("truncations", "next_observations", "action_low", "action_high")


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    where = f"Dataset {str(path)!r}"
    with open(path, "rb") as file:
        with reading(where, path):
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ContentError(f"{where} is no .npz archive: expected one made by numpy.savez, found a single array.")
        names = {_NPZ_ALIASES.get(key, key) for key in archive.files}
        missing = [key for key in _NPZ_REQUIRED if key not in names]
        if missing:
            raise ValueError(
                f"{where} has no {' and no '.join(missing)}: expected the arrays {', '.join(_NPZ_REQUIRED)} "
                f"(optional: {', '.join(_NPZ_OPTIONAL)}), found {', '.join(archive.files) or 'none'}."
            )
        for alias, key in _NPZ_ALIASES.items():
            if alias in archive.files and key in archive.files:
                raise ValueError(f"{where} has both {key} and {alias}, which mean the same: keep one of them.")
        if ("action_low" in names) != ("action_high" in names):
            raise ValueError(f"{where} has only one of action_low and action_high: give both or none.")
        yield archive


def _read_npz_array(archive: Any, key: str, where: str, path: Path) -> npt.NDArray[Any]:
    with reading(where, path):
        try:
            array: npt.NDArray[Any] = archive[key]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ContentError(f"{where}: {key} holds Python objects, expected numbers. Save it as a plain array.") from error
    return array


def load_npz(source: Source, path: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    columns: dict[str, Any] = {}
    with open_npz(path) as archive:
        for key in archive.files:
            column = _NPZ_ALIASES.get(key, key)
            if column in (*_NPZ_REQUIRED, *_NPZ_OPTIONAL):
                array = _read_npz_array(archive, key, where, path)
                is_double = column not in ("action_low", "action_high") and array.dtype == np.float64
                with np.errstate(over="ignore"):
                    columns[column] = array.astype(np.float32) if is_double else array
    low, high = columns.pop("action_low", None), columns.pop("action_high", None)
    action_space = None
    if low is not None and high is not None:
        try:
            action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        except Exception as error:
            raise ValueError(f"{where}: action_low {low} and action_high {high} make no Box ({error}).") from error
    provenance: dict[str, Any] = {"source": "npz", "file": path.name, "env_id": None}
    if "next_observations" not in columns:
        derive_next_observations(columns, provenance, where)
    return OfflineDataset.from_columns(
        **columns, action_space=action_space, spec=source.spec, name=source.name, provenance=provenance, copy=False
    )


def derive_next_observations(columns: dict[str, npt.NDArray[Any]], provenance: dict[str, Any], where: str) -> None:
    """Shift observations within episodes; drop the rows whose next observation matters but was not recorded."""
    n_rows = len(np.atleast_1d(columns["observations"]))
    if n_rows == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found none.")
    for name, array in columns.items():
        if array.ndim == 0 or len(array) != n_rows:
            raise ValueError(f"{where}: {name} must have as many rows as observations ({n_rows}), found shape {array.shape}")
    terminated = columns["terminations"].astype(np.bool_)
    ends = terminated.copy()
    if "truncations" in columns:
        ends |= columns["truncations"].astype(np.bool_)
    ends[-1] = True
    keep = ~ends | terminated
    successor = np.arange(1, n_rows + 1)
    # The next observation of a terminated row is never used: there is no bootstrap from it.
    successor[ends] = np.flatnonzero(ends)
    episode = np.concatenate(([0], np.cumsum(ends)[:-1]))[keep]
    columns["next_observations"] = columns["observations"][successor[keep]]
    columns["episode_starts"] = np.flatnonzero(np.diff(episode, prepend=-1))
    if not keep.all():
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            if name in columns:
                columns[name] = columns[name][keep]
    n_dropped = int(n_rows - keep.sum())
    provenance["next_observations"] = "derived from the following row"
    provenance["rows_dropped"] = n_dropped
    no_time_limits = (
        "" if "truncations" in columns else " There are no truncations either: episodes cut by a time limit would be joined."
    )
    warnings.warn(
        f"{where} has no next_observations: they are derived within episodes, and {n_dropped} last rows of episodes that "
        f"did not terminate are dropped, as their next observation is unknown.{no_time_limits}",
        stacklevel=4,
    )
