"""The arguments that the algorithms of this package share, for type checkers and editors."""

from typing import Any, TypedDict

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise

from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.policies.guide import GuideLike


class SharedArguments(TypedDict, total=False):
    """Those of :class:`OfflineTD3` that have the same default in all algorithms."""

    learning_rate: float | Schedule
    buffer_size: int
    learning_starts: int
    batch_size: int
    tau: float
    gamma: float
    train_freq: int | tuple[int, str]
    gradient_steps: int
    action_noise: ActionNoise | None
    replay_buffer_class: type[ReplayBuffer] | None
    replay_buffer_kwargs: dict[str, Any] | None
    optimize_memory_usage: bool
    n_steps: int
    policy_delay: int
    target_policy_noise: float
    target_noise_clip: float
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: th.device | str
    _init_setup_model: bool
    dataset: DatasetSpec | None
    offline_steps: int
    offline_fraction: ScheduleLike
    warmup_steps: int
    warmup_action_noise: bool
    critic_warmup_steps: int
    reset_optimizers: bool
    normalize_observations: bool
    kernel: str
    update_precision: str
    guide_policy: GuideLike
    guide_steps: ScheduleLike


class OfflineTD3Arguments(SharedArguments, total=False):
    """All arguments of :class:`OfflineTD3` but ``policy`` and ``env``."""

    policy_averaging: float
