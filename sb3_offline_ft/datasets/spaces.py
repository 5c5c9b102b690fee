"""Which spaces datasets can have, how their columns look, and how two spaces differ."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces


def check_spaces_supported(
    observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any] | None, where: str, advice: str = ""
) -> None:
    """Refuse spaces that the columns cannot hold.

    :param observation_space: ``None`` is not checked.
    :param action_space: ``None`` is not checked.
    :param where: Names the dataset or environment at the start of the message.
    :param advice: What else to do if it is about a key of the observations.
    :raises ValueError: if observations are neither a ``Box`` nor a ``Dict`` of ``Box`` and ``Discrete`` spaces, or actions
        are not a ``Box`` of floats.
    """
    flatten = "Flatten them before recording (gymnasium.wrappers.FlattenObservation)."
    if isinstance(observation_space, spaces.Dict):
        flatten = " ".join([flatten, advice]).strip()
        if not observation_space.spaces:
            raise ValueError(f"{where}: observations must have at least one key, found an empty Dict.")
        for key, space in observation_space.spaces.items():
            if isinstance(space, spaces.Dict | spaces.Tuple):
                raise ValueError(
                    f"{where}: the observation {key!r} is a {type(space).__name__} within a Dict; nested spaces are not "
                    f"supported, expected a Box or Discrete. {flatten}"
                )
            if isinstance(space, spaces.Discrete) and space.start != 0:
                raise ValueError(
                    f"{where}: the observation {key!r} is {space}; SB3 encodes Discrete spaces as one-hot vectors only if "
                    f"they start at 0. {flatten}"
                )
            if not isinstance(space, spaces.Box | spaces.Discrete):
                raise ValueError(
                    f"{where}: the observation {key!r} must be a Box or Discrete, found {type(space).__name__}, which is "
                    f"not supported. {flatten}"
                )
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
    """
    :param space: A ``Box`` or ``Discrete`` space.
    :return: The shape of one row of its column, ``(1,)`` for ``Discrete`` as in SB3's buffers.
    """
    return (1,) if isinstance(space, spaces.Discrete) else tuple(space.shape or ())


def column_dtype(space: spaces.Space[Any]) -> type[np.uint8] | type[np.float32]:
    """
    :param space: A ``Box`` or ``Discrete`` space.
    :return: ``uint8`` for images (uint8 of two dimensions or more), else ``float32``.
    """
    is_image = isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1
    return np.uint8 if is_image else np.float32


def space_difference(expected: spaces.Space[Any], found: spaces.Space[Any], what: str) -> str | None:
    """Say how a space differs from another one, apart from the width of floats.

    :param expected: A supported space that is not a ``Dict``.
    :param found: Another one.
    :param what: Names the values of the spaces, such as ``observation``.
    :return: A clause for a message, ``None`` if the spaces agree.
    """
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
    """
    :param what: ``observation``, ``action``, or an observation with its key.
    :return: It for a message about all of its values.
    """
    return what if what.endswith("'") else what + "s"


def index_text(at: tuple[int, ...]) -> str:
    """
    :param at: An index into a row.
    :return: It for a message, without the tuple where it is one number.
    """
    return str(at[0]) if len(at) == 1 else str(at)


def flatten_rows(column: npt.NDArray[Any], space: spaces.Space[Any]) -> npt.NDArray[np.float32]:
    """Flatten every row as ``gymnasium.spaces.utils.flatten`` does.

    :param column: ``(N, *shape)``.
    :param space: The space of a row, a ``Box`` or ``Discrete`` one.
    :return: ``(N, flatdim(space))`` float32; one-hot for ``Discrete``.
    """
    if isinstance(space, spaces.Discrete):
        one_hot = np.zeros((len(column), int(space.n)), np.float32)
        one_hot[np.arange(len(column)), column.reshape(len(column)).astype(np.int64)] = 1.0
        return one_hot
    return column.reshape(len(column), -1).astype(np.float32, copy=False)
