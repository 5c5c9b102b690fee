"""Checks and conversions of the columns of a dataset."""

import math
from collections.abc import Callable, Mapping
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import Array, Observations, by_key, named_arrays
from sb3_offline_ft.datasets.spaces import column_dtype, row_shape

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

FLOAT_COLUMNS = ("observations", "actions", "rewards", "next_observations")
FLAG_COLUMNS = ("terminations", "truncations")
COLUMNS = (*FLOAT_COLUMNS, *FLAG_COLUMNS, "episode_starts")


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, made read-only."""
    array.flags.writeable = False
    return array


def as_columns(
    given: Mapping[str, Any],
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any] | None,
    where: str,
    copy: bool,
) -> dict[str, Any]:
    """
    Bring what a user gave for each column but the starts of episodes into its form; all must go together, and fit the spaces.
    ``truncations`` may be ``None``; a ``Dict`` space gives the order of the keys.
    """
    columns: dict[str, Any] = {
        "observations": as_observations(given["observations"], "observations", observation_space, where, copy),
        "actions": as_float(given["actions"], "actions", where, copy),
        "rewards": as_float(given["rewards"], "rewards", where, copy),
        "next_observations": as_observations(given["next_observations"], "next_observations", observation_space, where, copy),
        "terminations": as_flags(given["terminations"], "terminations", where),
    }
    now, following = columns["observations"], columns["next_observations"]
    keys, found = (one.keys() if isinstance(one, dict) else None for one in (now, following))
    if keys != found:
        raise ValueError(
            f"{where}: next_observations must have the same keys as observations ({_keys(keys or ['one array'])}), "
            f"found {_keys(found or ['one array'])}"
        )
    if keys is not None:
        columns["next_observations"] = {key: following[key] for key in keys}
    truncations = given["truncations"]
    columns["truncations"] = (
        np.zeros_like(columns["terminations"]) if truncations is None else as_flags(truncations, "truncations", where)
    )
    _check_shapes(columns, observation_space, action_space, where)
    return columns


def split_episodes(columns: dict[str, Any], episode_starts: npt.ArrayLike | None, where: str) -> tuple[IntArray, int]:
    """
    Find the first row of every episode, and mark the last one of each that has no flag as a truncation.

    Without ``episode_starts`` an episode also ends where the next row's observation is not this row's next observation; the
    second number returned is that of the episodes that only this told apart.
    """
    length = len(columns["rewards"])
    starts_here = np.roll(columns["terminations"] | columns["truncations"], 1)
    starts_here[0] = True
    n_joints = 0
    if episode_starts is None:
        n_joints = _mark_joints(starts_here, columns["observations"], columns["next_observations"])
    else:
        starts_here[_as_starts(episode_starts, length, where)] = True
    columns["truncations"] = np.roll(starts_here, -1) & ~columns["terminations"]
    return np.flatnonzero(starts_here).astype(np.int64), n_joints


def as_observations(observations: Any, name: str, space: spaces.Space[Any] | None, where: str, copy: bool) -> Observations:
    """Bring observations into the form of a column: float32, but uint8 for images; for a ``Discrete`` space ``(N, 1)``."""
    if not isinstance(observations, Mapping):
        if isinstance(observations, tuple):
            raise ValueError(f"{where}: {name} must be one array or a dictionary of arrays, found a tuple")
        if isinstance(space, spaces.Dict):
            raise ValueError(
                f"{where}: {name} must be a dictionary with the keys {_keys(space.spaces)} of its space, found one array"
            )
        return _as_numbers(observations, name, space, where, copy)
    if space is not None and not isinstance(space, spaces.Dict):
        raise ValueError(f"{where}: {name} must be one array as its space is {space}, found a dictionary")
    if isinstance(space, spaces.Dict) and set(observations) != set(space.spaces):
        raise ValueError(
            f"{where}: {name} must have the keys {_keys(space.spaces)} of its space, found {_keys(observations) or 'none'}"
        )
    columns: dict[str, Array] = {}
    for key in space.spaces if isinstance(space, spaces.Dict) else observations:
        value = observations[key]
        if not isinstance(key, str) or isinstance(value, Mapping | tuple):
            raise ValueError(
                f"{where}: {name} must be a dictionary of arrays, found {type(value).__name__} under {key!r}; nested ones are "
                "not supported. Flatten them (gymnasium.spaces.utils.flatten)."
            )
        columns[key] = _as_numbers(value, f"{name}[{key!r}]", space[key] if space is not None else None, where, copy)
    if not columns:
        raise ValueError(f"{where}: {name} must have at least one key, found an empty dictionary")
    return columns


def as_float(column: npt.ArrayLike, name: str, where: str, copy: bool) -> FloatArray:
    """Bring a column of real numbers into its form, float32; actions must be floats."""
    if isinstance(column, Mapping | tuple):
        raise ValueError(f"{where}: {name} must be one array, found a {type(column).__name__}; it is not supported")
    array = np.asarray(column)
    check_numbers(array, name, where)
    if array.dtype.kind not in "f" and name == "actions":
        raise ValueError(
            f"{where}: actions must be floats, found dtype {array.dtype}. "
            "TD3-based algorithms need continuous actions; discrete ones are not supported."
        )
    with np.errstate(over="ignore"):
        return np.array(array, dtype=np.float32, order="C") if copy else np.ascontiguousarray(array, dtype=np.float32)


def check_numbers(array: Array, name: str, where: str, dtype: npt.DTypeLike = np.float32) -> None:
    """Check that an array can become a column; neither text nor objects are numbers, and images are not converted."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where}: {name} must hold real numbers, {_found(array)}. Convert them to float32.")
    if np.dtype(dtype) == np.uint8 != array.dtype:
        raise ValueError(
            f"{where}: {name} must be uint8 images as in its space, found dtype {array.dtype}. Convert them with "
            "astype(np.uint8) after bringing them to 0 to 255."
        )


def _as_numbers(column: Any, name: str, space: spaces.Space[Any] | None, where: str, copy: bool) -> Array:
    array = np.asarray(column)
    is_image = array.dtype == np.uint8 and array.ndim > 2 if space is None else column_dtype(space) is np.uint8
    if is_image:
        check_numbers(array, name, where, np.uint8)
        return np.array(array, order="C") if copy else np.ascontiguousarray(array)
    numbers = as_float(array, name, where, copy)
    if isinstance(space, spaces.Discrete):
        numbers = numbers.reshape(-1, 1) if numbers.ndim == 1 else numbers
        wrong = np.flatnonzero((numbers != np.floor(numbers)) | (numbers < 0) | (numbers >= space.n))
        if len(wrong):
            raise ValueError(
                f"{where}: {name} must be whole numbers from 0 to {space.n - 1}, found {numbers.flat[wrong[0]]} "
                f"in row {wrong[0]}"
            )
    return numbers


def as_flags(column: npt.ArrayLike, name: str, where: str) -> BoolArray:
    """Bring flags, booleans or 0 and 1, into the form of a column; anything else is an error."""
    array = np.asarray(column)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: {name} must be booleans, {_found(array)}")
    if array.dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        # As a file may say, and NumPy adds and compares them as they are
        raise ValueError(f"{where}: {name} must be booleans, found bytes that are neither true nor false")
    flags = array.astype(np.bool_)
    if array.dtype.kind != "b" and len(wrong := np.flatnonzero(array != flags)):
        raise ValueError(f"{where}: {name} must be booleans (or 0 and 1), found {array.flat[wrong[0]]} in row {wrong[0]}")
    return flags


def split_ends(
    flags: Mapping[str, BoolArray], names: Mapping[str, str], where: str, row: Callable[[int], str] = "row {}".format
) -> dict[str, BoolArray]:
    """
    Tell terminations from truncations where ``dones`` say that an episode ended, one way or the other; flags that contradict
    each other are refused. ``names`` are what they are called in messages.
    """
    known = {name: array for name, array in flags.items() if name != "dones"}
    if "dones" not in flags:
        return known
    done = flags["dones"]
    if any(array.shape != done.shape for array in known.values()):
        found = ", ".join(f"{names[name]} {array.shape}" for name, array in flags.items())
        raise ValueError(f"{where}: the flags of episodes' ends must have the same shape, found {found}.")
    terminated, truncated = known.get("terminations"), known.get("truncations")
    if terminated is None:
        return known | {"terminations": done if truncated is None else done & ~truncated}
    wrong = terminated & ~done if truncated is None else done != (terminated | truncated)
    if len(rows := np.flatnonzero(wrong)):
        shown = ", ".join(row(index) for index in rows[:5].tolist()) + (", ..." if len(rows) > 5 else "")
        values = ", ".join(f"{names[name]} {int(array.flat[rows[0]])}" for name, array in flags.items())
        raise ValueError(
            f"{where}: the flags of episodes' ends contradict each other in {len(rows):,} of {done.size:,} rows ({shown}), "
            f"first {values}. Expected {names['dones']} wherever an episode ended, one way or the other"
            f"{'' if truncated is None else ', and only there'}: repair the flags, or leave out what is wrong (a table's done "
            "is left out where both --terminated and --truncated are named)."
        )
    return known if truncated is not None else known | {"truncations": done & ~terminated}


def _as_starts(episode_starts: npt.ArrayLike, n_rows: int, where: str) -> IntArray:
    starts = np.asarray(episode_starts)
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: episode_starts must be a 1-d array of row indices, found dtype {starts.dtype} and shape {starts.shape}"
        )
    if len(starts) == 0 or starts[0] != 0 or starts[-1] >= n_rows or np.any(np.diff(starts.astype(np.int64)) <= 0):
        raise ValueError(
            f"{where}: episode_starts must increase from 0 and stay below the number of rows ({n_rows}), found {starts}"
        )
    return starts.astype(np.int64)


def _check_shapes(
    columns: dict[str, Any], observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any] | None, where: str
) -> None:
    observations = dict(named_arrays(columns["observations"], "observations"))
    following = [array for _, array in named_arrays(columns["next_observations"], "next_observations")]
    first_name, first = next(iter(observations.items()))
    length = len(first) if first.ndim else 0
    if length == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found {first_name} {first.shape}")
    known = [] if observation_space is None else by_key(observation_space).values()
    vectors = [(name, array, space) for (name, array), space in zip_longest(observations.items(), known)]
    vectors.append(("actions", columns["actions"], action_space))
    for name, array, space in vectors:
        if array.ndim < 2:
            raise ValueError(
                f"{where}: {name} must have the shape (rows, dimensions), found {array.shape}. "
                f"Reshape one-dimensional {name} to (rows, 1)."
            )
        if space is not None and array.shape[1:] != row_shape(space):
            raise ValueError(
                f"{where}: {name} have rows of shape {array.shape[1:]}, but its space has shape {row_shape(space)}"
            )
    expected = [(name, columns[name], (length,)) for name in ("rewards", *FLAG_COLUMNS)]
    expected += [(name, array, (length, *array.shape[1:])) for name, array, _ in vectors]
    expected += [
        (f"next_{name}", array, same.shape) for (name, same), array in zip(observations.items(), following, strict=True)
    ]
    for name, array, shape in expected:
        if array.shape != shape:
            raise ValueError(
                f"{where}: {name} must have shape {shape} to go with {first_name} {first.shape}, found {array.shape}"
            )


def _mark_joints(starts_here: BoolArray, observations: Observations, next_observations: Observations) -> int:
    """Mark the rows that do not continue the row before, and count them."""
    new = np.zeros(len(starts_here) - 1, np.bool_)
    for (_, before), (_, after) in zip(named_arrays(next_observations, ""), named_arrays(observations, ""), strict=True):
        differs = before[:-1] != after[1:]
        if before.dtype.kind == "f":
            differs &= ~(np.isnan(before[:-1]) & np.isnan(after[1:]))
        new |= differs.reshape(len(new), math.prod(differs.shape[1:])).any(axis=1)
    new &= ~starts_here[1:]
    starts_here[1:] |= new
    return int(new.sum())


def check_finite(columns: dict[str, Any], starts: IntArray, where: str) -> None:
    """Check that no column holds NaN or infinity; the message names the first row and its episode."""
    for name, column in chain.from_iterable(named_arrays(columns[column], column) for column in FLOAT_COLUMNS):
        if column.dtype.kind != "f":
            continue
        is_bad = ~np.isfinite(column).reshape(len(column), -1).all(axis=1)
        if is_bad.any():
            first = int(is_bad.argmax())
            episode = int(np.searchsorted(starts, first, side="right")) - 1
            raise ValueError(
                f"{where}: {name} hold NaN or infinity in {int(is_bad.sum())} of {len(column)} rows, first in row {first} "
                f"(episode {episode}, step {first - int(starts[episode])}): {column[first]}. "
                "Remove these episodes or repair the values."
            )


def _found(array: Array) -> str:
    return f"found dtype {array.dtype}" + (f", such as {array.flat[0]!r}" if array.size else "")


def _keys(keys: Any) -> str:
    return ", ".join(map(str, keys))
