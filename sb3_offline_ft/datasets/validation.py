"""Does a dataset fit an environment, and its actions on the scale that the policies use."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset, check_spaces_supported

ACTION_TOLERANCE = 1e-3
"""Actions this far beyond the bounds, as a share of each dimension's range, are rounding: they get clipped."""

_CHUNK_ROWS = 65_536


def check_compatible(dataset: OfflineDataset, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Check that a dataset can train a policy for an environment with these spaces.

    Shapes and bounds must agree with the spaces the dataset was recorded in, float32 against float64 does not matter.
    A dataset that does not know its spaces is compared by shapes only. Actions must lie within the environment's bounds
    up to :data:`ACTION_TOLERANCE`.

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
    for what, env_space, data_space, column in (
        ("observation", observation_space, dataset.observation_space, dataset.observations),
        ("action", env_actions, dataset.action_space, dataset.actions),
    ):
        if column.shape[1:] != env_space.shape:
            raise ValueError(
                f"{where} does not fit the environment: expected {what}s of shape {env_space.shape}, "
                f"found {column.shape[1:]}.{hint}"
            )
        if isinstance(data_space, spaces.Box) and isinstance(env_space, spaces.Box):
            if np.dtype(data_space.dtype).kind != np.dtype(env_space.dtype).kind:
                raise ValueError(
                    f"{where} does not fit the environment: expected {what}s of type {env_space.dtype}, "
                    f"found {data_space.dtype}.{hint}"
                )
            for side in ("low", "high"):
                ours, theirs = getattr(env_space, side), getattr(data_space, side)
                differs = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
                if differs.any():
                    at = tuple(int(i) for i in np.argwhere(differs)[0])
                    raise ValueError(
                        f"{where} does not fit the environment: the {what} space's {side} differs in "
                        f"{int(differs.sum())} of {differs.size} dimensions, first in dimension {_index(at)}: "
                        f"expected {ours[at]:g}, found {theirs[at]:g}.{hint}"
                    )
    _check_action_range(dataset, env_actions, where)


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
            f"worst in row {row}, dimension {_index(at)}: expected {low[at]:g} to {high[at]:g}, "
            f"found {dataset.actions[worst_at]:g}. If the data was recorded with another action scale, "
            "convert its actions to the environment's units, or wrap the environment in RescaleAction."
        )


def _index(at: tuple[int, ...]) -> str:
    return str(at[0]) if len(at) == 1 else str(at)
