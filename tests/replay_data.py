"""Random transitions for the tests of the replay buffers."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_offline_ft import OfflineDataset
from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
IMAGE = spaces.Box(0, 255, (2, 6, 5), np.uint8)
DICT = spaces.Dict({"camera": IMAGE, "joints": VECTOR, "mode": spaces.Discrete(4)})
VECTORS = spaces.Dict({"goal": spaces.Box(-np.inf, np.inf, (2, 2), np.float32), "mode": spaces.Discrete(4), "state": VECTOR})
SPACES: dict[str, spaces.Space[Any]] = {"vector": VECTOR, "image": IMAGE, "dict": DICT}
ACTION_SPACE = spaces.Box(np.array([-2.0, -1.0], np.float32), np.array([2.0, 3.0], np.float32))


def make_buffer(space: spaces.Space[Any], rows: int = 50, n_envs: int = 1, **settings: Any) -> OfflineToOnlineReplayBuffer:
    kind = DictOfflineToOnlineReplayBuffer if isinstance(space, spaces.Dict) else OfflineToOnlineReplayBuffer
    return kind(rows * n_envs, space, ACTION_SPACE, "cpu", n_envs, **settings)


def observations(space: spaces.Space[Any], n: int, generator: np.random.Generator) -> Any:
    """Observations as an environment gives them, shape ``(n, ...)``."""
    if isinstance(space, spaces.Dict):
        return {key: observations(one, n, generator) for key, one in space.spaces.items()}
    if isinstance(space, spaces.Discrete):
        return generator.integers(0, space.n, size=n)
    if space.dtype == np.uint8:
        return generator.integers(0, 256, size=(n, *space.shape), dtype=np.uint8)
    return generator.normal(1.0, 3.0, size=(n, *space.shape)).astype(np.float32)


def make_dataset(
    space: spaces.Space[Any], lengths: Sequence[int], endings: Sequence[bool], generator: np.random.Generator
) -> OfflineDataset:
    """Episodes of these lengths, each of which terminated or was truncated."""
    n = sum(lengths)
    last, terminations = np.cumsum(lengths) - 1, np.zeros(n, dtype=bool)
    terminations[last[np.array(endings, dtype=bool)]] = True
    return OfflineDataset.from_columns(
        observations=observations(space, n, generator),
        actions=generator.uniform(-1, 1, (n, 2)).astype(np.float32),
        rewards=generator.normal(size=n).astype(np.float32),
        next_observations=observations(space, n, generator),
        terminations=terminations,
        episode_starts=last + 1 - np.array(lengths),
        observation_space=space,
        action_space=ACTION_SPACE,
    )


def fill_online(buffers: Sequence[ReplayBuffer], n_steps: int, generator: np.random.Generator, ends: float = 0.3) -> None:
    """Adds the same steps to all buffers; each ends an episode with probability ``ends``, every other time by a time limit."""
    n_envs, space = buffers[0].n_envs, buffers[0].observation_space
    for _ in range(n_steps):
        dones = generator.random(n_envs) < ends
        timeouts = dones & (generator.random(n_envs) < 0.5)
        step = (observations(space, n_envs, generator), observations(space, n_envs, generator))
        actions, rewards = generator.uniform(-1, 1, (n_envs, 2)), generator.normal(size=n_envs)
        for buffer in buffers:
            infos = [{"TimeLimit.truncated": bool(timeout)} for timeout in timeouts]
            buffer.add(*(dict(one) if isinstance(one, dict) else one for one in step), actions, rewards, dones, infos)


class Still(gym.Env):
    """Only its spaces are needed."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, ACTION_SPACE


def make_vec_normalize(space: spaces.Space[Any]) -> VecNormalize:
    """Statistics that change every vector and every reward, and clip some."""
    keys = (
        [key for key, one in space.spaces.items() if one.dtype != np.uint8 and isinstance(one, spaces.Box)]
        if isinstance(space, spaces.Dict)
        else None
    )
    env = VecNormalize(DummyVecEnv([lambda: Still(space)]), clip_obs=2.0, clip_reward=0.6, norm_obs_keys=keys)
    for rms in env.obs_rms.values() if isinstance(env.obs_rms, dict) else [env.obs_rms]:
        assert isinstance(rms, RunningMeanStd)
        rms.mean, rms.var = np.full(rms.mean.shape, 0.4), np.full(rms.var.shape, 1.7)
    env.ret_rms.var = np.array(3.1)
    return env


def by_name(batch: Any) -> dict[str, th.Tensor]:
    """All tensors of a batch by name; those of dictionaries under the name and the key."""
    tensors: dict[str, th.Tensor] = {}
    for name, column in batch._asdict().items():
        if isinstance(column, dict):
            tensors |= {f"{name}/{key}": tensor for key, tensor in column.items()}
        elif column is not None:
            tensors[name] = column
    return tensors


def concatenated(batches: Sequence[OfflineToOnlineReplayBufferSamples]) -> dict[str, th.Tensor]:
    """Batches one after the other."""
    named = [by_name(batch) for batch in batches]
    return {name: th.cat([batch[name] for batch in named]) for name in named[0]}


def assert_same(found: dict[str, th.Tensor], expected: dict[str, th.Tensor]) -> None:
    """Equal to the bit, types included."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and th.equal(tensor, expected[name]), name
