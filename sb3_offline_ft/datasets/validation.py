"""Does a dataset fit an environment, and its actions on the scale that the policies use."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.spaces.utils import flatten_space
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.common.observations import Observations, by_key, map_observations
from sb3_offline_ft.datasets.columns import as_observations, frozen
from sb3_offline_ft.datasets.keys import dict_of, fitting_orders, flattened_space, format_keys, leaf_spaces
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

_CLIP = "clip them with ?clip_actions=1 after the dataset's name, or load_dataset(..., clip_actions=True)"


def check_compatible(dataset: OfflineDataset, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """
    Check that a dataset can train a policy for an environment with these spaces.

    Shapes and bounds must agree with the spaces the dataset was recorded in, float32 against float64 does not matter.
    A dataset that does not know its spaces is compared by keys, shapes and image or not. What :func:`fit_to_space` converts
    counts as fitting. Actions must lie within the environment's bounds up to :data:`ACTION_TOLERANCE`.

    :param dataset: The dataset
    :param observation_space: The environment's observation space
    :param action_space: The environment's action space
    :raises ValueError: Something does not fit; the message says what, what was expected and found, and what to do
    """
    where = f"Dataset {dataset.name!r}"
    check_spaces_supported(observation_space, action_space, "The environment")
    env_actions = _bounded_box(action_space, "The environment's action space")
    dataset = clip_actions(_without_key(dataset, observation_space), env_actions)
    recorded_in = f" It was recorded in {dataset.env_id}." if dataset.env_id else ""
    hint = f"{recorded_in} Use the environment (and wrappers) that the data was recorded in, or other data."
    difference = _observation_difference(dataset, observation_space)
    if difference is None:
        difference = _column_difference(dataset.actions, dataset.action_space, env_actions, "action")
        if difference is not None and dataset.action_space is not None and not dataset.action_space.is_bounded():
            hint = f". If the actions were recorded before an environment clipped them: {_CLIP}.{hint}"
    if difference is not None:
        raise ValueError(f"{where} does not fit the environment: {difference}.{hint.removeprefix('.')}")
    _check_action_range(dataset, env_actions, where)


def fit_to_space(dataset: OfflineDataset, observation_space: spaces.Space[Any]) -> OfflineDataset:
    """
    Bring observations into the form in which a learner sees them.

    Two conversions are made, each only where the environment's space asks for exactly it:

    - Images that were recorded with channels last ``(H, W, C)`` are transposed if the space has them first ``(C, H, W)``,
      as SB3's ``VecTransposeImage`` does with the environment.
    - ``Dict`` observations, and ``Box`` ones of several dimensions, are flattened as gymnasium's ``FlattenObservation`` does
      if the space is the flattened space of the data. ``Dict`` data must know its space for that, or its keys must have been
      named; they stand in the order of the data (see :func:`as_flattened_by`).

    A single key of a ``Dict`` becomes the observation itself where the environment shows one array.

    :param dataset: The dataset
    :param observation_space: The space of the environment that the learner sees
    :return: The dataset itself if nothing is to be done, else a copy that shares the other columns
    :raises ValueError: It cannot be known in which order the keys are flattened
    """
    dataset = _without_key(dataset, observation_space)
    order = _flattened_order(dataset, observation_space)
    if order is not None:
        return _flatten(dataset, order, observation_space)
    columns, wanted = by_key(dataset.observations), by_key(observation_space)
    keys = {key for key, column in columns.items() if key in wanted and _is_transposed(column, wanted[key])}
    return _transpose(dataset, keys) if keys else dataset


def as_flattened_by(dataset: OfflineDataset, env: VecEnv | gym.Env[Any, Any]) -> OfflineDataset:
    """
    Bring the keys of ``Dict`` observations into the order in which an environment flattens them.

    It is that of the space that the environment's ``FlattenObservation`` wraps. If there is no such wrapper, the order of the
    dataset counts as unknown, unless it was named (``keys=``).

    :param dataset: The dataset
    :param env: The environment; if its observations are not flat, nothing is done
    :return: The dataset itself, or a copy that shares the columns
    :raises ValueError: The environment flattens something else than the observations of the dataset
    """
    wanted, observations = env.observation_space, dataset.observations
    if not isinstance(wanted, spaces.Box) or len(wanted.shape) != 1:
        return dataset
    if not isinstance(observations, dict) and observations.ndim == 2:
        return dataset
    wrapped = flattened_space(env)
    if wrapped is None:
        return replace(dataset, key_order="unknown") if dataset.key_order == "recorded" else dataset
    if isinstance(wrapped, spaces.Dict):
        wrapped = dict_of(leaf_spaces(wrapped))
    where = f"Dataset {dataset.name!r}"
    check_spaces_supported(wrapped, None, "The environment, below FlattenObservation")
    if difference := _observation_difference(dataset, wrapped):
        raise ValueError(f"{where} does not fit the environment, which flattens its observations: {difference}.")
    if not isinstance(observations, dict):
        return dataset
    in_order = _with_observations(dataset, lambda one: as_observations(one, "observations", wrapped, where, False), wrapped)
    return replace(in_order, key_order="recorded")


def with_clipping(dataset: OfflineDataset) -> OfflineDataset:
    """
    Have the actions of a dataset clipped: now if it knows their bounds, else when it meets an environment.

    Infinite bounds, as behind gymnasium's ``ClipAction``, count as unknown.
    """
    dataset = replace(dataset, sources=tuple(replace(part, clip_actions=True) for part in dataset.sources))
    if dataset.action_space is not None and not dataset.action_space.is_bounded():
        return replace(dataset, action_space=None)
    return dataset if dataset.action_space is None else clip_actions(dataset, dataset.action_space)


def clip_actions(dataset: OfflineDataset, action_space: spaces.Box) -> OfflineDataset:
    """
    Clip the actions of those parts of a dataset that ask for it.

    :param dataset: The dataset
    :param action_space: Has the bounds
    :return: The dataset itself if there is nothing to clip, else a copy that shares the other columns; ``actions_clipped`` of
        its provenance counts rows and numbers, and says how far beyond the bounds they were, as a share of the range
    """
    clipped = [slice(part.begin, part.end) for part in dataset.sources if part.clip_actions]
    if not clipped or dataset.actions.shape[1:] != action_space.shape:
        return dataset
    excess = np.concatenate([_excess(dataset.actions[part], action_space) for part in clipped])
    n_rows = int((excess > 0).reshape(len(excess), -1).any(axis=1).sum())
    if n_rows == 0 and "actions_clipped" in dataset.provenance:
        return dataset
    actions = dataset.actions.copy()
    for part in clipped:
        np.clip(actions[part], action_space.low, action_space.high, out=actions[part])
    furthest = round(max(0.0, float(excess.max())), 6)
    found = {"rows": n_rows, "of_rows": len(excess), "numbers": int((excess > 0).sum()), "furthest": furthest}
    return replace(dataset, actions=frozen(actions), provenance=dataset.provenance | {"actions_clipped": found})


def _excess(actions: npt.NDArray[Any], space: spaces.Box) -> npt.NDArray[Any]:
    """How far actions are beyond the bounds, as a share of the range; negative within them."""
    excess: npt.NDArray[Any] = np.maximum(space.low - actions, actions - space.high)
    excess /= space.high - space.low
    return excess


def scale_actions(actions: npt.NDArray[Any], action_space: spaces.Box) -> npt.NDArray[np.float32]:
    """
    Scale actions from the environment's bounds to [-1, 1], as SB3's ``policy.scale_action`` does, and clip.

    :param actions: ``(..., *act_shape)``, in the units of the environment
    :param action_space: The environment's action space
    :return: The same shape, float32, within [-1, 1]
    :raises ValueError: The space is not a ``Box`` with finite bounds, or the shape does not fit
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
    excess = _excess(dataset.actions, space)
    is_beyond = excess > ACTION_TOLERANCE
    if is_beyond.any():
        row, *dims = (int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
        at = tuple(dims)
        n_rows = int(is_beyond.reshape(len(dataset), -1).any(axis=1).sum())
        raise ValueError(
            f"{where} does not fit the environment: {n_rows} of {len(dataset)} rows have actions beyond its bounds, "
            f"worst in row {row}, dimension {index_text(at)}: expected {space.low[at]:g} to {space.high[at]:g}, "
            f"found {dataset.actions[row, *at]:g}. {_advice(dataset.actions, (row, *at), int(is_beyond.sum()))}"
        )


def _advice(actions: npt.NDArray[np.float32], worst_at: tuple[int, ...], n_beyond: int) -> str:
    """What to do about actions beyond the bounds; the likelier cause comes first."""
    column = actions.reshape(len(actions), -1)[:, np.ravel_multi_index(worst_at[1:], actions.shape[1:])]
    # A policy's tail holds few numbers and no two alike; another unit has its own bounds, which are reached again and again
    n_worst = int(np.isclose(column, actions[worst_at], rtol=1e-4).sum())
    is_tail = n_beyond < actions.size / 2 and n_worst <= max(1, len(column) / 1000)
    causes = [
        f"a stochastic policy's actions before clipping: {_CLIP}",
        "actions in another unit or scale: convert them to the environment's units, or wrap the environment in RescaleAction",
    ]
    first, second = causes if is_tail else causes[::-1]
    return f"These look like {first}. Otherwise they may be {second}."


def _observation_difference(dataset: OfflineDataset, observation_space: spaces.Space[Any]) -> str | None:
    """How the observations differ from those of the environment, after what :func:`fit_to_space` does."""
    if _flattened_order(dataset, observation_space) is not None:
        return None
    observations, space = dataset.observations, dataset.observation_space
    if not isinstance(observation_space, spaces.Dict):
        if isinstance(observations, dict):
            return (
                f"expected one array of observations of shape {observation_space.shape}, found the keys "
                f"{', '.join(observations)}; a Dict is flattened only if it knows its space and the environment is wrapped in "
                "FlattenObservation, and in this order of the keys; name another with ?keys=... after the dataset's name"
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
            + (f"; take those with ?keys={format_keys(observation_space.spaces)}" if surplus and not missing else "")
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
        arrays = dict(by_key(column))
        arrays |= {key: np.ascontiguousarray(np.moveaxis(arrays[key], -1, 1)) for key in keys}
        return arrays if isinstance(column, dict) else arrays[""]

    space = dataset.observation_space
    if space is not None:
        known = {key: _channels_first(one) if key in keys else one for key, one in by_key(space).items()}
        space = dict_of(known) if isinstance(space, spaces.Dict) else known[""]
    return _with_observations(dataset, transpose, space)


def _flatten(dataset: OfflineDataset, order: list[str], wanted: spaces.Space[Any]) -> OfflineDataset:
    """Flatten rows; a Dict's in this order of the keys."""
    space = dataset.observation_space
    subspaces = space.spaces if isinstance(space, spaces.Dict) else dict.fromkeys(order, wanted)

    def flatten(column: Observations) -> Observations:
        columns = by_key(column)
        return np.concatenate([flatten_rows(columns[key], subspaces[key]) for key in order], axis=1)

    if isinstance(space, spaces.Dict):
        space = dict_of({key: space[key] for key in order})
    return _with_observations(dataset, flatten, None if space is None else flatten_space(space))


def _without_key(dataset: OfflineDataset, wanted: spaces.Space[Any]) -> OfflineDataset:
    """The observation itself if the dataset has a single key and the environment shows such an array."""
    if not isinstance(dataset.observations, dict) or len(dataset.observations) != 1 or not isinstance(wanted, spaces.Box):
        return dataset
    ((key, column),) = dataset.observations.items()
    space = dataset.observation_space
    inner = space[key] if isinstance(space, spaces.Dict) else None
    fits = column.shape[1:] == wanted.shape or _is_transposed(column, wanted)
    if isinstance(inner, spaces.Discrete) or not fits:
        return dataset
    return _with_observations(dataset, lambda columns: columns[key], inner)


def _flattened_order(dataset: OfflineDataset, wanted: spaces.Space[Any]) -> list[str] | None:
    """The order in which the keys make up the environment's flat space; ``None`` if the data does not, or is flat itself."""
    observations, space = dataset.observations, dataset.observation_space
    if not isinstance(wanted, spaces.Box) or len(wanted.shape) != 1:
        return None
    if not isinstance(observations, dict):
        fits = observations.ndim > 2 and observations[0].size == wanted.shape[0]
        if fits and space is not None:
            fits = space_difference(wanted, flatten_space(space), "observation") is None
        return [""] if fits else None
    if not isinstance(space, spaces.Dict):
        # Without a space the order is not known, unless it was named
        n_numbers = sum(array[0].size for array in observations.values())
        return list(observations) if dataset.key_order == "named" and n_numbers == wanted.shape[0] else None
    if np.dtype(flatten_space(space).dtype).kind != np.dtype(wanted.dtype).kind:
        return None
    orders = list(islice(fitting_orders(space.spaces, wanted), 2))
    if dataset.key_order != "unknown":
        # The recorded order is the first one, if it fits
        return list(space) if list(space) in orders else None
    if len(orders) > 1:
        raise ValueError(
            f"Dataset {dataset.name!r}: the environment's observations are flat, and it is not known in which order it puts "
            f"the keys of the data together: {' or '.join(', '.join(order) for order in orders)}. Name the order that it has, "
            f"such as ?keys={format_keys(orders[0])} after the dataset's name or load_dataset(..., keys={orders[0]}), wrap "
            "the environment in gymnasium's FlattenObservation, or record the data behind the wrapper that flattens."
        )
    return orders[0] if orders else None


def _with_observations(
    dataset: OfflineDataset, function: Callable[[Observations], Observations], space: spaces.Space[Any] | None
) -> OfflineDataset:
    now, following = (map_observations(frozen, function(one)) for one in (dataset.observations, dataset.next_observations))
    return replace(dataset, observations=now, next_observations=following, observation_space=space)
