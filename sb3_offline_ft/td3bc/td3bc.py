"""TD3 with behavior cloning (Fujimoto & Gu 2021), offline and online."""

import math
import os
from numbers import Real
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.common.update import ActorObjective, Attraction, Batch
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.offline_td3.offline_td3 import SB3_LEARNING_STARTS, OfflineTD3

ONLINE_BC_WORDS = {"keep": 1.0, "drop": 0.0}


class TD3BC(OfflineTD3):
    """
    TD3 with behavior cloning.

    Paper: Fujimoto & Gu 2021, "A Minimalist Approach to Offline Reinforcement Learning", https://arxiv.org/abs/2106.06860.
    The policy maximises ``lambda * Q1(s, pi(s)) - w * mean((pi(s) - a)**2)`` with ``lambda = alpha / mean|Q1(s, pi(s))|``
    (constant for the gradient); the mean is over batch and action dimensions, actions are in [-1, 1]. ``w`` is 1 offline
    and ``online_bc`` while finetuning.

    The parameters up to ``_init_setup_model`` are those of SB3's TD3, in its order; the following ones up to
    ``update_precision`` are those of :class:`OfflineTD3`, where they are described.

    :param alpha: Weight of the value against behavior cloning. 0 is behavior cloning alone; ``float("inf")`` is TD3's own
        objective, to the bit
    :param online_bc: Weight of the behavior cloning term while finetuning: ``"keep"`` (1), ``"drop"`` (0), a number, or a
        schedule that anneals it (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    """

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = SB3_LEARNING_STARTS,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        policy_delay: int = 2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        dataset: str | os.PathLike[str] | OfflineDataset | None = None,
        offline_steps: int = 0,
        offline_fraction: ScheduleLike = 0.5,
        warmup_steps: int = 2000,
        warmup_action_noise: bool = False,
        critic_warmup_steps: int = 0,
        reset_optimizers: bool = True,
        normalize_observations: bool = True,
        kernel: str = "auto",
        update_precision: str = "float32",
        alpha: float = 2.5,
        online_bc: ScheduleLike = 1.0,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_delay=policy_delay,
            target_policy_noise=target_policy_noise,
            target_noise_clip=target_noise_clip,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            dataset=dataset,
            offline_steps=offline_steps,
            offline_fraction=offline_fraction,
            warmup_steps=warmup_steps,
            warmup_action_noise=warmup_action_noise,
            critic_warmup_steps=critic_warmup_steps,
            reset_optimizers=reset_optimizers,
            normalize_observations=normalize_observations,
            kernel=kernel,
            update_precision=update_precision,
        )
        self.alpha = alpha
        self.online_bc = online_bc
        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real) or not self.alpha >= 0:
            raise ValueError(f"`alpha` must be a number of at least 0, found {self.alpha!r}.")
        self.alpha = float(self.alpha)
        self._online_bc_schedule: Schedule = make_schedule(self.online_bc, "online_bc", words=ONLINE_BC_WORDS)

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        if math.isinf(self.alpha) or not (self._pretraining or self._finetuning):
            return super()._actor_loss(batch, actions, q_values)
        weight = 1.0 if self._pretraining else self._online_bc_schedule(self._current_progress_remaining)
        mean_abs_q = q_values.detach().abs().mean()
        self._log("train/mean_abs_q", mean_abs_q)
        self._log("train/bc_loss", F.mse_loss(actions.detach(), batch.actions))
        self._log("train/bc_weight", weight)
        return ActorObjective(self.alpha / mean_abs_q, (Attraction(weight, batch.actions),))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_online_bc_schedule"]
