"""Does a dataset fit an environment, and its actions on the scale that the policies use."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.spaces.utils import flatten_space
from stable_baselines3.common.preprocessing import is_image_space

from sb3_offline_ft.common.observations import Observations, named_arrays
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.spaces import (
    check_spaces_supported,
    column_dtype,
    flatten_rows,
    index_text,
    row_shape,
    space_difference,
    values_of,
)

ACTION_TOLERANCE = 1e-3
"""Actions this far beyond the bounds, as a share of each dimension's range, are rounding: they get clipped."""

_CHUNK_ROWS = 65_536


def check_compatible(dataset: OfflineDataset, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Check that a dataset can train a policy for an environment with these spaces.

    Shapes and bounds must agree with the spaces the dataset was recorded in, float32 against float64 does not matter.
    A dataset that does not know its spaces is compared by keys, shapes and image or not. What :func:`fit_to_space` converts
    counts as fitting. Actions must lie within the environment's bounds up to :data:`ACTION_TOLERANCE`.

    :param dataset: The dataset.
    :param observation_space: The environment's observation space.
    :param action_space: The environment's action space.
    :raises ValueError: if something does not fit; the message says what, what was expected and found, and what to do.
    """
    where = f"Dataset {dataset.name!r}"
    check_spaces_supported(observation_space, action_space, "The environment")
    env_actions = _bounded_box(action_space, "The environment's action space")
    recorded_in = f" It was recorded in {dataset.env_id}." if dataset.env_id else ""
    hint = f"{recorded_in} Use the environment (and wrappers) that the data was recorded in, or other data."
    difference = _observation_difference(dataset, observation_space)
    if difference is None:
        difference = _column_difference(dataset.actions, dataset.action_space, env_actions, "action")
    if difference is not None:
        raise ValueError(f"{where} does not fit the environment: {difference}.{hint}")
    _check_action_range(dataset, env_actions, where)


def fit_to_space(dataset: OfflineDataset, observation_space: spaces.Space[Any]) -> OfflineDataset:
    """Bring observations into the form in which a learner sees them.

    Two conversions are made, each only where the environment's space asks for exactly it:

    - Images that were recorded with channels last ``(H, W, C)`` are transposed if the space has them first ``(C, H, W)``,
      as SB3's ``VecTransposeImage`` does with the environment.
    - ``Dict`` observations, and ``Box`` ones of several dimensions, are flattened as gymnasium's ``FlattenObservation`` does
      if the space is the flattened space of the data. ``Dict`` data must know its space for that.

    :param dataset: The dataset.
    :param observation_space: The space of the environment that the learner sees.
    :return: The dataset itself if nothing is to be done, else a copy that shares the other columns.
    """
    if _is_flattened(dataset, observation_space):
        return _flatten(dataset, observation_space)
    columns = _by_key(dataset.observations)
    wanted = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    keys = {key for key, column in columns.items() if key in wanted and _is_transposed(column, wanted[key])}
    return _transpose(dataset, keys) if keys else dataset


def scale_actions(actions: npt.NDArray[Any], action_space: spaces.Box) -> npt.NDArray[np.float32]:
    """Scale actions from the environment's bounds to [-1, 1], as SB3's ``policy.scale_action`` does, and clip.

    :param actions: ``(..., *act_shape)``, in the units of the environment.
    :param action_space: The environment's action space.
    :return: The same shape, float32, within [-1, 1].
    :raises ValueError: if the space is not a ``Box`` with finite bounds, or the shape does not fit.
    """
    box = _bounded_box(action_space, "The action space")
    if actions.shape[max(0, actions.ndim - len(box.shape)) :] != box.shape:
        raise ValueError(f"Actions must have the shape (..., {', '.join(map(str, box.shape))}), found {actions.shape}")
    scaled = 2.0 * ((actions - box.low) / (box.high - box.low)) - 1.0
    return np.clip(scaled, -1.0, 1.0).astype(np.float32, copy=False)


def _bounded_box(space: spaces.Space[Any], what: str) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{what} must be a Box, found {space}: discrete and composite actions are not supported")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(
            f"{what} must have finite bounds, found {space}. Wrap the environment in RescaleAction or ClipAction."
        )
    if not (space.low < space.high).all():
        raise ValueError(f"{what} must have low < high in every dimension, found {space}")
    return space


def _check_action_range(dataset: OfflineDataset, space: spaces.Box, where: str) -> None:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    extent = high - low
    n_beyond, worst = 0, 0.0
    worst_at: tuple[int, ...] = (0,)
    for begin in range(0, len(dataset), _CHUNK_ROWS):
        chunk = dataset.actions[begin : begin + _CHUNK_ROWS].astype(np.float64)
        excess = np.maximum(low - chunk, chunk - high) / extent
        n_beyond += int((excess > ACTION_TOLERANCE).reshape(len(chunk), -1).any(axis=1).sum())
        if excess.max() > worst:
            worst = float(excess.max())
            row, *dims = (int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
            worst_at = (begin + row, *dims)
    if n_beyond:
        row, *dims = worst_at
        at = tuple(dims)
        raise ValueError(
            f"{where} does not fit the environment: {n_beyond} of {len(dataset)} rows have actions beyond its bounds, "
            f"worst in row {row}, dimension {index_text(at)}: expected {low[at]:g} to {high[at]:g}, "
            f"found {dataset.actions[worst_at]:g}. If the data was recorded with another action scale, "
            "convert its actions to the environment's units, or wrap the environment in RescaleAction."
        )


def _observation_difference(dataset: OfflineDataset, observation_space: spaces.Space[Any]) -> str | None:
    """How the observations differ from those of the environment, after what :func:`fit_to_space` does."""
    if _is_flattened(dataset, observation_space):
        return None
    observations, space = dataset.observations, dataset.observation_space
    if not isinstance(observation_space, spaces.Dict):
        if isinstance(observations, dict):
            return (
                f"expected one array of observations of shape {observation_space.shape}, found the keys "
                f"{', '.join(observations)}; a Dict is flattened only if it knows its space and the environment is wrapped in "
                "FlattenObservation"
            )
        return _column_difference(observations, space, observation_space, "observation")
    if not isinstance(observations, dict):
        return (
            f"expected observations with the keys {', '.join(observation_space.spaces)}, "
            f"found one array of shape {observations.shape[1:]}"
        )
    if observations.keys() != observation_space.spaces.keys():
        missing = [key for key in observation_space.spaces if key not in observations]
        surplus = [key for key in observations if key not in observation_space.spaces]
        return (
            f"expected observations with the keys {', '.join(observation_space.spaces)}, found {', '.join(observations)}"
            + (f" (missing: {', '.join(missing)})" if missing else "")
            + (f" (not in the environment: {', '.join(surplus)})" if surplus else "")
        )
    for key, wanted in observation_space.spaces.items():
        known = space[key] if isinstance(space, spaces.Dict) else None
        if difference := _column_difference(observations[key], known, wanted, f"observation {key!r}"):
            return difference
    return None


def _column_difference(
    column: npt.NDArray[Any], space: spaces.Space[Any] | None, wanted: spaces.Space[Any], what: str
) -> str | None:
    shape = column.shape[1:]
    if _is_transposed(column, wanted):
        shape = tuple(wanted.shape or ())
        space = None if space is None else _channels_first(space)
    if shape != row_shape(wanted):
        return f"expected {values_of(what)} of shape {row_shape(wanted)}, found {shape}"
    if space is not None:
        return space_difference(wanted, space, what)
    if column.dtype != column_dtype(wanted):
        return f"expected {values_of(what)} of type {wanted.dtype}, found {column.dtype}"
    return None


def _is_transposed(column: npt.NDArray[Any], wanted: spaces.Space[Any]) -> bool:
    """Whether the column holds images with channels last and the learner sees them first."""
    return (
        is_image_space(wanted)
        and column.dtype == np.uint8
        and column.shape[1:] != wanted.shape
        and wanted.shape == (*column.shape[-1:], *column.shape[1:-1])
    )


def _channels_first(space: spaces.Space[Any]) -> spaces.Space[Any]:
    assert isinstance(space, spaces.Box)
    return spaces.Box(np.moveaxis(space.low, -1, 0), np.moveaxis(space.high, -1, 0), dtype=np.uint8)


def _transpose(dataset: OfflineDataset, keys: set[str]) -> OfflineDataset:
    """Put channels first in the images under these keys."""

    def transpose(column: Observations) -> Observations:
        arrays = {
            key: np.ascontiguousarray(np.moveaxis(array, -1, 1)) if key in keys else array
            for key, array in _by_key(column).items()
        }
        return arrays if isinstance(column, dict) else arrays[""]

    space = dataset.observation_space
    if isinstance(space, spaces.Dict):
        space = spaces.Dict([(key, _channels_first(one) if key in keys else one) for key, one in space.spaces.items()])
    elif space is not None:
        space = _channels_first(space)
    return _with_observations(dataset, transpose, space)


def _flatten(dataset: OfflineDataset, wanted: spaces.Space[Any]) -> OfflineDataset:
    """Flatten rows; a Dict's in the order of its space."""
    space = dataset.observation_space
    subspaces = space.spaces if isinstance(space, spaces.Dict) else {"": wanted}

    def flatten(column: Observations) -> Observations:
        columns = _by_key(column)
        return np.concatenate([flatten_rows(columns[key], subspace) for key, subspace in subspaces.items()], axis=1)

    return _with_observations(dataset, flatten, None if space is None else flatten_space(space))


def _by_key(observations: Observations) -> dict[str, npt.NDArray[Any]]:
    return observations if isinstance(observations, dict) else {"": observations}


def _is_flattened(dataset: OfflineDataset, wanted: spaces.Space[Any]) -> bool:
    """Whether the environment's space is the flattened space of data that is not flat."""
    if not isinstance(wanted, spaces.Box) or len(wanted.shape) != 1:
        return False
    observations, space = dataset.observations, dataset.observation_space
    if space is not None:
        if not isinstance(observations, dict) and observations.ndim == 2:
            return False
        return space_difference(wanted, flatten_space(space), "observation") is None
    # Without a space the order of the keys is not known, but that of an array's elements is.
    return not isinstance(observations, dict) and observations.ndim > 2 and observations[0].size == wanted.shape[0]


def _with_observations(
    dataset: OfflineDataset, function: Callable[[Observations], Observations], space: spaces.Space[Any] | None
) -> OfflineDataset:
    columns = {name: function(getattr(dataset, name)) for name in ("observations", "next_observations")}
    for name, column in columns.items():
        for _, array in named_arrays(column, name):
            array.flags.writeable = False
    return replace(dataset, **columns, observation_space=space)  # type: ignore[arg-type]
