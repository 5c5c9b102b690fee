"""Files that hold the columns of a dataset as arrays, all episodes one after the other."""

from collections.abc import Collection
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_offline_ft.common.observations import Array, map_observations, n_rows, named_arrays, take_rows
from sb3_offline_ft.common.reading import shortened
from sb3_offline_ft.common.suggestions import first_of
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets.columns import FLAG_COLUMNS, as_flags, as_float, split_ends
from sb3_offline_ft.datasets.files.reading import Source, by_column
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset

ALIASES = {
    **dict.fromkeys(("terminals", "terminal", "terminated"), "terminations"),
    **dict.fromkeys(("timeouts", "timeout", "truncated"), "truncations"),
    "done": "dones",
}
_REQUIRED = ("observations", "actions", "rewards", "terminations")
_OPTIONAL = ("truncations", "dones", "next_observations", "action_low", "action_high")
_OBSERVATIONS = ("observations", "next_observations")
_MOST_NAMED = 30


def is_column(name: str) -> bool:
    """Whether an array of this name is read; ``observations/<key>`` is one key of Dict observations."""
    first, slash, key = name.partition("/")
    return bool(first in _OBSERVATIONS and key) if slash else ALIASES.get(name, name) in (*_REQUIRED, *_OPTIONAL)


def check_names(found: Collection[str], where: str) -> None:
    """Check that the arrays in a file make up a dataset: none is missing, and no two mean the same."""
    names = {ALIASES.get(name, name.partition("/")[0] if is_column(name) else name) for name in found}
    follows = {"terminations"} if names >= {"dones", "truncations"} else set()
    missing = [name for name in _REQUIRED if name not in names | follows]
    if missing:
        raise ValueError(
            f"{where} has no {' and no '.join(missing)}: expected the arrays {', '.join(_REQUIRED)} "
            f"(optional: {', '.join(_OPTIONAL)}), found {first_of(list(found), _MOST_NAMED) or 'none'}."
        )
    for name in dict.fromkeys(ALIASES.values()):
        same = sorted((one for one in found if ALIASES.get(one, one) == name), key=lambda one: one != name)
        if len(same) > 1:
            raise ValueError(f"{where} has both {same[0]} and {same[1]}, which mean the same: keep one of them.")
    for name in _OBSERVATIONS:
        keys = [one for one in found if one.startswith(name + "/")]
        if name in found and keys:
            raise ValueError(f"{where} has both {name} and {shortened(keys[0])}: keep either one array or one for each key.")
    if ("action_low" in names) != ("action_high" in names):
        raise ValueError(f"{where} has only one of action_low and action_high: give both or none.")


def dataset_from_arrays(arrays: dict[str, Array], source: Source) -> OfflineDataset:
    """Make a dataset of the arrays in a file, by the names that they have there; they are given away."""
    where = source.where
    names = {ALIASES.get(name, name): name for name in arrays}
    columns = by_column({meaning: arrays[name] for meaning, name in names.items()})
    if "dones" in columns:
        flags = {name: as_flags(columns.pop(name), names[name], where) for name in (*FLAG_COLUMNS, "dones") if name in columns}
        columns |= split_ends(flags, names, where)
    low, high = columns.pop("action_low", None), columns.pop("action_high", None)
    action_space = None
    if low is not None and high is not None:
        try:
            low, high = as_float(low, "action_low", where, True), as_float(high, "action_high", where, True)
            action_space = spaces.Box(low, high, dtype=np.float32)
        except Exception as error:
            raise ValueError(f"{where}: action_low {low} and action_high {high} make no Box ({error}).") from error
    provenance: dict[str, Any] = {"source": source.kind, "file": source.file.name, "env_id": None}
    if "next_observations" not in columns:
        _derive_next_observations(columns, provenance, where)
    return OfflineDataset.from_columns(
        **columns, action_space=action_space, spec=source.spec, name=source.name, provenance=provenance, copy=False
    )


def _derive_next_observations(columns: dict[str, Any], provenance: dict[str, Any], where: str) -> None:
    """Shift observations within episodes; drop the rows whose next observation matters but was not recorded."""
    observations = map_observations(np.atleast_1d, columns["observations"])
    length = n_rows(observations)
    if length == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found none.")
    others = [(name, array) for name, array in columns.items() if name != "observations"]
    for name, array in (*named_arrays(columns["observations"], "observations"), *others):
        if array.ndim == 0 or len(array) != length:
            raise ValueError(f"{where}: {name} must have as many rows as observations ({length}), found shape {array.shape}")
    terminated = as_flags(columns["terminations"], "terminations", where)
    ends = terminated.copy()
    if "truncations" in columns:
        ends |= as_flags(columns["truncations"], "truncations", where)
    if ends.ndim != 1:
        raise ValueError(f"{where}: terminations must have shape ({length},), found {terminated.shape}")
    ends[-1] = True
    keep = ~ends | terminated
    successor = np.arange(1, length + 1)
    # The next observation of a terminated row is never used: there is no bootstrap from it.
    successor[ends] = np.flatnonzero(ends)
    if not keep.any():
        raise ValueError(
            f"{where} has no transition: in {provenance['file']!r} each episode has one row and goes on, so that its next "
            "observation is not known."
        )
    episode = np.concatenate(([0], np.cumsum(ends)[:-1]))[keep]
    columns["next_observations"] = take_rows(observations, successor[keep])
    columns["episode_starts"] = np.flatnonzero(np.diff(episode, prepend=-1))
    if not keep.all():
        for name in ("observations", *(name for name, _ in others)):
            columns[name] = take_rows(columns[name], keep)
    n_dropped = int(length - keep.sum())
    provenance |= {"next_observations": "derived from the following row", "rows_dropped": n_dropped}
    no_time_limits = (
        "" if "truncations" in columns else " There are no truncations either: episodes cut by a time limit would be joined."
    )
    warn(
        f"{where} has no next_observations: they are derived within episodes, and {n_dropped} last rows of episodes that "
        f"did not terminate are dropped, as their next observation is unknown.{no_time_limits}"
    )
