"""Observations that are one array or, for Dict spaces, one array a key."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

Array = npt.NDArray[Any]
NUMBERS_AT_ONCE = 2**20

Observations = Array | dict[str, Array]
"""Rows of observations: an array ``(N, *shape)``, or for a Dict space a dictionary of such arrays."""


def map_observations(function: Callable[..., Any], *observations: Observations) -> Any:
    """Apply a function to arrays, or to those of every key of dictionaries with the same keys."""
    first = observations[0]
    if not isinstance(first, dict):
        return function(*observations)
    return {key: function(*(one[key] for one in observations)) for key in first}


def named_arrays(observations: Observations, name: str) -> Iterator[tuple[str, Array]]:
    """The arrays with names for messages: in a dictionary that of the whole followed by the key in brackets."""
    if isinstance(observations, dict):
        for key, array in observations.items():
            yield f"{name}[{key!r}]", array
    else:
        yield name, observations


def n_rows(observations: Observations) -> int:
    """Number of rows ``N``."""
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


def nbytes(observations: Observations) -> int:
    """Size of all arrays together in bytes."""
    return sum(array.nbytes for _, array in named_arrays(observations, ""))


def take_rows(observations: Observations, rows: Any) -> Any:
    """Pick rows by whatever indexes the first axis of an array; views for a slice, copies otherwise."""
    return map_observations(lambda array: array[rows], observations)


def mean_and_std(observations: Array) -> tuple[Array, Array]:
    """
    Mean and population standard deviation of each number of an observation, flattened to one dimension.

    They are computed in double precision without a copy of all observations in it.
    """
    rows = observations.reshape(len(observations), -1)
    mean = rows.mean(axis=0, dtype=np.float64)
    at_once = max(1, NUMBERS_AT_ONCE // max(1, rows.shape[1]))
    squares = np.zeros_like(mean)
    for start in range(0, len(rows), at_once):
        squares += np.square(rows[start : start + at_once] - mean).sum(axis=0)
    return mean, np.sqrt(squares / len(rows))


def by_key(observations: Any) -> dict[str, Any]:
    """
    :param observations: An observation space, or arrays of observations
    :return: What each key of a ``Dict`` has; for other spaces and single arrays the thing itself, with an empty key
    """
    if isinstance(observations, spaces.Dict):
        return dict(observations.spaces)
    return observations if isinstance(observations, dict) else {"": observations}


def kind_of(space: spaces.Space[Any]) -> str:
    """
    :param space: An observation space, not a ``Dict``
    :return: ``"image"`` for uint8 of two dimensions or more, ``"vector"`` for other numbers but uint8, else ``"other"``
    """
    if not isinstance(space, spaces.Box) or (space.dtype == np.uint8 and len(space.shape) < 2):
        return "other"
    return "image" if space.dtype == np.uint8 else "vector"
