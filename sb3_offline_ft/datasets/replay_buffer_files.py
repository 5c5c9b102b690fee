"""Replay buffers saved by SB3 as datasets."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_offline_ft.common.observations import Array, map_observations
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reading import ContentError, Source, reading
from sb3_offline_ft.datasets.spaces import check_spaces_supported


def check_trust(path: Path, trust_pickle: bool) -> None:
    """
    :param path: The file.
    :param trust_pickle: Whether the user trusts it.
    :raises ValueError: if not.
    """
    if not trust_pickle:
        raise ValueError(
            f"{str(path)!r} is a pickle file, and reading one runs whatever code it holds. If you trust where it comes from, "
            "allow it with load_dataset(..., trust_pickle=True), or in the spec with ?trust_pickle=1 after the name."
        )


def load_replay_buffer(source: Source, path: Path) -> OfflineDataset:
    """Read a buffer written by ``save_replay_buffer``; each of its environments' transitions in the order of collection.

    :param source: What the file is.
    :param path: The file, trusted by the user.
    :return: The dataset, with actions in the units of the environment.
    :raises ValueError: if it is damaged or no such buffer, or cannot tell time limits from terminations.
    """
    where = f"Dataset {source.spec!r}"
    with reading(where, path):
        try:
            with open(path, "rb") as file:
                buffer = load_from_pkl(file)
        except ImportError as error:
            raise ContentError(
                f"{where} was saved with classes that cannot be imported here ({error}): install them."
            ) from error
        if not isinstance(buffer, ReplayBuffer):
            raise ContentError(
                f"{where} holds a {type(buffer).__name__}: expected a replay buffer written by SB3's save_replay_buffer."
            )
    check_spaces_supported(buffer.observation_space, buffer.action_space, where)
    if buffer.optimize_memory_usage:
        raise ValueError(
            f"{where} was filled with optimize_memory_usage=True: it holds neither time limits nor the observations at the "
            "ends of episodes. Gather it again with optimize_memory_usage=False."
        )
    if not buffer.handle_timeout_termination:
        warnings.warn(
            f"{where} was filled with handle_timeout_termination=False: its time limits count as terminations.", stacklevel=3
        )
    n_steps, first = buffer.size(), buffer.pos if buffer.full else 0
    if n_steps == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found none.")

    def in_order(column: Array) -> Array:
        """From the ring, (slot, environment), to one environment after the other, each from its oldest step."""
        rows = np.roll(column[:n_steps], -first, axis=0)
        return rows.swapaxes(0, 1).reshape(n_steps * buffer.n_envs, *column.shape[2:])

    dones, timeouts = in_order(buffer.dones) > 0.0, in_order(buffer.timeouts) > 0.0
    truncations = dones & timeouts
    # The last step of each environment, unless it ended an episode
    truncations[n_steps - 1 :: n_steps] |= ~dones[n_steps - 1 :: n_steps]
    provenance: dict[str, Any] = {
        "source": source.kind,
        "file": path.name,
        "env_id": None,
        "buffer_class": type(buffer).__name__,
        "n_envs": buffer.n_envs,
        "oldest_transitions_overwritten": bool(buffer.full),
    }
    return OfflineDataset.from_columns(
        map_observations(in_order, buffer.observations),
        _unscale(in_order(buffer.actions), buffer.action_space, where),
        in_order(buffer.rewards),
        map_observations(in_order, buffer.next_observations),
        dones & ~timeouts,
        truncations,
        observation_space=buffer.observation_space,
        action_space=buffer.action_space,
        spec=source.spec,
        name=source.name,
        provenance=provenance,
        copy=False,
    )


def _unscale(actions: Array, space: spaces.Space[Any], where: str) -> Array:
    """Bring the policy's actions in [-1, 1] back to the bounds of the environment, as SB3's ``policy.unscale_action`` does."""
    assert isinstance(space, spaces.Box)
    if not space.is_bounded():
        raise ValueError(f"{where}: actions must have finite bounds to be scaled back, found {space}.")
    scaled = actions.reshape(len(actions), *space.shape).astype(np.float64)
    unscaled: Array = space.low + 0.5 * (scaled + 1.0) * (space.high - space.low)
    return unscaled.astype(np.float32)
