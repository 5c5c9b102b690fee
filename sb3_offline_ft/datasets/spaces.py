"""Which spaces datasets can have, how their columns look, and how two spaces differ."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import kind_of


def check_spaces_supported(
    observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any] | None, where: str, advice: str = ""
) -> None:
    """
    Refuse spaces that the columns cannot hold.

    :param observation_space: ``None`` is not checked
    :param action_space: ``None`` is not checked
    :param where: Names the dataset or environment at the start of the message
    :param advice: What else to do if it is about a key of the observations
    :raises ValueError: Observations are neither a ``Box`` nor a ``Dict`` of ``Box`` and ``Discrete`` spaces, or actions
        are not a ``Box`` of floats
    """
    flatten = "Flatten them before recording (gymnasium.wrappers.FlattenObservation)."
    if isinstance(observation_space, spaces.Dict):
        if not observation_space.spaces:
            raise ValueError(f"{where}: observations must have at least one key, found an empty Dict.")
        for key, space in observation_space.spaces.items():
            kind = type(space).__name__
            if isinstance(space, spaces.Box) or (isinstance(space, spaces.Discrete) and space.start == 0):
                continue
            if isinstance(space, spaces.Dict | spaces.Tuple):
                problem = f"is a {kind} within a Dict; nested spaces are not supported, expected a Box or Discrete"
            elif isinstance(space, spaces.Discrete):
                problem = f"is {space}; SB3 encodes Discrete spaces as one-hot vectors only if they start at 0"
            else:
                problem = f"must be a Box or Discrete, found {kind}, which is not supported"
            raise ValueError(f"{where}: the observation {key!r} {problem}. {flatten} {advice}".strip())
    elif observation_space is not None and not isinstance(observation_space, spaces.Box):
        raise ValueError(
            f"{where}: observations must be a Box or a Dict of them, found {type(observation_space).__name__}, which is not "
            f"supported. {flatten}"
        )
    if action_space is not None and not (
        isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    ):
        raise ValueError(
            f"{where}: actions must be a Box of floats, found {action_space}. "
            "TD3-based algorithms need continuous actions; discrete ones are not supported."
        )


def row_shape(space: spaces.Space[Any]) -> tuple[int, ...]:
    """The shape of one row of the column of a ``Box`` or ``Discrete`` space, ``(1,)`` for ``Discrete`` as in SB3's buffers."""
    return (1,) if isinstance(space, spaces.Discrete) else tuple(space.shape or ())


def column_dtype(space: spaces.Space[Any]) -> type[np.uint8] | type[np.float32]:
    """``uint8`` for images (uint8 of two dimensions or more), else ``float32``."""
    return np.uint8 if kind_of(space) == "image" else np.float32


def space_difference(expected: spaces.Space[Any], found: spaces.Space[Any], what: str) -> str | None:
    """How a space, not a ``Dict``, differs from the expected one, apart from the width of floats: a clause for a message."""
    values = values_of(what)
    if isinstance(expected, spaces.Discrete) or isinstance(found, spaces.Discrete):
        return None if expected == found else f"expected {values} of the space {expected}, found {found}"
    assert isinstance(expected, spaces.Box) and isinstance(found, spaces.Box)
    if expected.shape != found.shape:
        return f"expected {values} of shape {expected.shape}, found {found.shape}"
    if np.dtype(expected.dtype).kind != np.dtype(found.dtype).kind:
        return f"expected {values} of type {expected.dtype}, found {found.dtype}"
    for side in ("low", "high"):
        ours, theirs = getattr(expected, side), getattr(found, side)
        differs = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
        if differs.any():
            at = tuple(int(i) for i in np.argwhere(differs)[0])
            return (
                f"the {what} space's {side} differs in {int(differs.sum())} of {differs.size} dimensions, first in dimension "
                f"{index_text(at)}: expected {ours[at]:g}, found {theirs[at]:g}"
            )
    return None


def values_of(what: str) -> str:
    return what if what.endswith("'") else what + "s"


def index_text(at: tuple[int, ...]) -> str:
    return str(at[0]) if len(at) == 1 else str(at)


def flatten_rows(column: npt.NDArray[Any], space: spaces.Space[Any]) -> npt.NDArray[np.float32]:
    """Flatten every row as ``gymnasium.spaces.flatten`` does: ``(N, flatdim(space))`` float32, one-hot where discrete."""
    if isinstance(space, spaces.Discrete):
        one_hot = np.zeros((len(column), int(space.n)), np.float32)
        one_hot[np.arange(len(column)), column.reshape(len(column)).astype(np.int64)] = 1.0
        return one_hot
    return column.reshape(len(column), -1).astype(np.float32, copy=False)
