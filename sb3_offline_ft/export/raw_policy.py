"""A policy with all that stands between it and its environment, as one network."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_offline_ft.common.observations import by_key


class RawPolicy(nn.Module):
    """
    Raw observations in, deterministic actions in the units of the environment and within its bounds out.

    It takes a tensor for each key of the observations, in the order of the keys, with the batch as the first dimension.

    :param policy: A policy with continuous actions and without memory
    :param statistics: What its observations were normalized with, if with anything
    :param observation_space: The observations as the environment gives them: other bounds than the policy's, and images with
        the channels last, are possible
    :raises ValueError: The policy has memory, or its actions are no numbers
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(
        self, policy: BasePolicy, statistics: VecNormalize | None, observation_space: spaces.Space[Any], name: str
    ) -> None:
        super().__init__()
        if not isinstance(policy.action_space, spaces.Box):
            raise ValueError(f"{name} cannot be exported: expected actions that are a Box, found {policy.action_space}.")
        if hasattr(policy, "lstm_actor"):
            raise ValueError(f"{name} cannot be exported: it has a memory, and only policies without one can be.")
        actor = getattr(policy, "actor", None)
        # Critics shall not be in the file
        self.policy = actor if isinstance(actor, BasePolicy) else policy
        self.is_squashed = policy.squash_output
        raw, seen = by_key(observation_space), by_key(policy.observation_space)
        self.keys = list(seen)
        self.is_dict = isinstance(policy.observation_space, spaces.Dict)
        self.first_steps = nn.ModuleList(
            nn.Sequential(*_normalization(statistics, key), *_transposition(raw[key], seen[key])) for key in seen
        )
        self.register_buffer("low", th.as_tensor(policy.action_space.low, dtype=th.float32))
        self.register_buffer("high", th.as_tensor(policy.action_space.high, dtype=th.float32))

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        seen = [step(each) for step, each in zip(self.first_steps, observations, strict=True)]
        actions: th.Tensor = self.policy._predict(
            dict(zip(self.keys, seen, strict=True)) if self.is_dict else seen[0], deterministic=True
        )
        actions = actions.reshape(-1, *self.low.shape)
        if self.is_squashed:
            actions = self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        return th.minimum(th.maximum(actions, self.low), self.high)


class _Normalization(nn.Module):
    """``VecNormalize`` of one key, as precise in float32 as it is there in float64."""

    mean: th.Tensor
    rest: th.Tensor
    std: th.Tensor

    def __init__(self, moments: RunningMeanStd, epsilon: float, limit: float) -> None:
        super().__init__()
        # In two parts: numbers far from zero that hardly vary would lose their digits
        mean = np.asarray(moments.mean, np.float32)
        self.register_buffer("mean", th.as_tensor(mean))
        self.register_buffer("rest", th.as_tensor(np.asarray(moments.mean - mean, np.float32)))
        self.register_buffer("std", th.as_tensor(np.asarray(np.sqrt(moments.var + epsilon), np.float32)))
        self.limit = limit

    def forward(self, observations: th.Tensor) -> th.Tensor:
        centered = (observations.float() - self.mean) - self.rest
        return th.clamp(centered / self.std, -self.limit, self.limit)


class _ChannelsFirst(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.permute(0, 3, 1, 2)


def _normalization(statistics: VecNormalize | None, key: str) -> list[nn.Module]:
    if statistics is None or not statistics.norm_obs:
        return []
    if isinstance(statistics.obs_rms, dict):
        # Of a Dict, some keys may be left as they are
        moments = statistics.obs_rms.get(key)
    else:
        moments = statistics.obs_rms
    return [] if moments is None else [_Normalization(moments, statistics.epsilon, statistics.clip_obs)]


def _transposition(raw: spaces.Space[Any], seen: spaces.Space[Any]) -> list[nn.Module]:
    return [_ChannelsFirst()] if has_channels_last(raw, seen) else []


def has_channels_last(raw: spaces.Space[Any], seen: spaces.Space[Any]) -> bool:
    """Whether the environment's images have their channels last, and the policy's first."""
    return raw.shape != seen.shape and len(raw.shape or ()) == 3
