"""Real observations, in the form in which an environment gives them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import by_key
from sb3_offline_ft.controllers import Controller
from sb3_offline_ft.controllers.contract import OBSERVATION
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, fit_to_space
from sb3_offline_ft.export.raw_policy import has_channels_last

NEEDED = 1_000
SEED = 0

Columns = dict[str, npt.NDArray[Any]]
"""Rows of each key, in the order of the policy's keys; of observations that are no ``Dict``, of an empty key."""


@dataclass(frozen=True)
class RealObservations:
    """
    Observations that occur.

    :param columns: Those of each key
    :param source: Where they are from, in words
    """

    columns: Columns
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def inputs(self) -> Columns:
        """By the names of the inputs of an exported policy, in the numbers that it takes."""
        return {key or OBSERVATION: column.astype(input_dtype(column.dtype)) for key, column in self.columns.items()}

    def single(self) -> Iterator[Any]:
        """One after the other, as the environment gives them."""
        for i in range(len(self)):
            row = {key: column[i] for key, column in self.columns.items()}
            yield row[""] if "" in row else row


def input_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """What an exported policy takes: all real numbers in single precision, others as they are."""
    return np.dtype(np.float32) if np.dtype(dtype).kind == "f" else np.dtype(dtype)


def input_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The same observations of one key, in the numbers that an exported policy takes."""
    if isinstance(space, spaces.Box):
        dtype = input_dtype(space.dtype)
        return spaces.Box(space.low.astype(dtype), space.high.astype(dtype), space.shape, dtype.type)
    return space


def gather(
    policy: Controller, raw: spaces.Space[Any], dataset: OfflineDataset | None, env: gym.Env[Any, Any] | None
) -> RealObservations:
    """
    :param policy: Acts in the environment
    :param raw: The observations as the environment gives them
    :param dataset: Where observations are taken from first
    :param env: Where those are made that are missing
    :return: At least :data:`NEEDED` observations
    :raises ValueError: There are not as many
    """
    parts: list[RealObservations] = []
    if dataset is not None:
        parts.append(_of_dataset(dataset, policy, raw))
    missing = NEEDED - sum(map(len, parts))
    if missing > 0 and env is not None:
        parts.append(_of_environment(env, policy, missing))
        missing = 0
    if missing > 0:
        found = f"{parts[0].source} has {len(parts[0])}" if parts else "there are none"
        raise ValueError(
            f"An exported policy is compared with the original on {NEEDED:,} real observations, and {found}: name a dataset "
            "with --data, or the environment with --env."
        )
    columns = {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns}
    words = [part.source if len(parts) == 1 else f"{len(part)} of {part.source}" for part in parts]
    return RealObservations(columns, " and ".join(words))


def _of_dataset(dataset: OfflineDataset, policy: Controller, raw: spaces.Space[Any]) -> RealObservations:
    seen = policy.observation_space
    assert seen is not None and policy.action_space is not None
    check_compatible(dataset, _as_recorded(raw, seen), policy.action_space)
    columns = by_key(fit_to_space(dataset, seen).observations)
    rows = np.random.default_rng(SEED).choice(len(dataset), min(NEEDED, len(dataset)), replace=False)
    rows.sort()
    spaces_seen, spaces_raw = by_key(seen), by_key(raw)
    found = {key: _as_given(columns[key][rows], spaces_raw[key], spaces_seen[key]) for key in spaces_seen}
    return RealObservations(found, f"the dataset {dataset.name}")


def _as_recorded(raw: spaces.Space[Any], seen: spaces.Space[Any]) -> spaces.Space[Any]:
    """What a dataset is compared with: the environment's space, but images as the policy sees them."""
    if isinstance(raw, spaces.Dict) and isinstance(seen, spaces.Dict):
        return spaces.Dict({key: _as_recorded(raw[key], seen[key]) for key in seen.spaces})
    return seen if has_channels_last(raw, seen) else raw


def _as_given(rows: npt.NDArray[Any], raw: spaces.Space[Any], seen: spaces.Space[Any]) -> npt.NDArray[Any]:
    """Rows of a dataset as the environment would give them."""
    if has_channels_last(raw, seen):
        rows = np.moveaxis(rows, 1, -1)
    return rows.reshape(len(rows), *(raw.shape or ())).astype(raw.dtype)


def _of_environment(env: gym.Env[Any, Any], policy: Controller, n: int) -> RealObservations:
    """Those that the policy meets."""
    keys = list(by_key(policy.observation_space))
    rows: dict[str, list[Any]] = {key: [] for key in keys}
    observation, _ = env.reset(seed=SEED)
    policy.reset(SEED)
    for _ in range(n):
        for key in keys:
            rows[key].append(np.array(observation[key] if isinstance(observation, Mapping) else observation))
        observation, _, terminated, truncated, _ = env.step(policy.act(observation))
        if terminated or truncated:
            observation, _ = env.reset()
            policy.reset()
    return RealObservations({key: np.stack(column) for key, column in rows.items()}, f"the environment {_name(env)}")


def _name(env: gym.Env[Any, Any]) -> str:
    return type(env.unwrapped).__name__ if env.spec is None else env.spec.id
