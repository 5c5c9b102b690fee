"""Batches in the making: arrays that rows of both parts of a buffer are copied into."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.common.observations import Observations

Array = npt.NDArray[Any]


@dataclass(slots=True)
class BatchColumns:
    """Several batches in the making: arrays of shape ``(n_batches, batch_size, ...)``."""

    observations: Observations
    next_observations: Observations
    actions: Array
    dones: Array
    rewards: Array
    is_offline: Array
    discounts: Array | None = None
    next_actions: Array | None = None
    has_next_actions: Array | None = None
    returns: Array | None = None
    has_returns: Array | None = None


def empty_rows(shape: tuple[int, int], ring: Observations, offline: Observations) -> Observations:
    """
    Make arrays for observations of both parts, of a type that holds those of either.

    :param shape: ``(n_batches, batch_size)``
    :param ring: Arrays of shape ``(buffer_size, n_envs, *obs_shape)``
    :param offline: Arrays of which the types are taken, but for numbers of a Discrete space: these are integers, as in SB3
    :return: Empty arrays of shape ``(n_batches, batch_size, *obs_shape)``
    """
    if isinstance(ring, dict):
        assert isinstance(offline, dict)
        return {
            key: np.empty((*shape, *array.shape[2:]), array.dtype if array.dtype.kind == "i" else offline[key].dtype)
            for key, array in ring.items()
        }
    assert not isinstance(offline, dict)
    return np.empty((*shape, *ring.shape[2:]), offline.dtype)


def gather_observations(columns: Observations, rows: Array, out: Observations, span: slice) -> None:
    """
    Copy rows of observations.

    :param columns: Shape ``(n_rows, *obs_shape)``, or a dictionary of such
    :param rows: Valid indices, shape ``(n_batches, size of span)``
    :param out: Where to, shape ``(n_batches, batch_size, *obs_shape)``, or a dictionary of such
    :param span: Which part of each batch is filled
    """
    if isinstance(columns, dict):
        for key, column in columns.items():
            gather(column, rows, out[key][:, span])
    else:
        assert not isinstance(out, dict)
        gather(columns, rows, out[:, span])


def gather(column: Array, rows: Array, out: Array) -> None:
    """
    Copy rows of a column.

    :param column: Shape ``(n_rows, ...)``
    :param rows: Valid indices, shape ``(n_batches, batch)``
    :param out: Where to, shape ``(n_batches, batch, ...)``
    """
    # mode="clip" spares the check of the indices, and the temporary copy of `out` that it needs
    if out.flags.c_contiguous and out.dtype == column.dtype:
        column.take(rows, axis=0, out=out, mode="clip")
    else:
        # Numbers of a Discrete space are floats in a dataset
        np.copyto(out, column.take(rows, axis=0, mode="clip"), casting="unsafe")
