"""TD3 with behavior cloning in the policy's and the critics' objective (Tarasov et al. 2023)."""

import io
import math
import pathlib
from numbers import Real
from typing import Any, Self

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.offline_td3.offline_td3 import SB3_LEARNING_STARTS, OfflineTD3
from sb3_offline_ft.policies.guide import GuideLike
from sb3_offline_ft.policies.policies import OfflinePolicy
from sb3_offline_ft.update import ActorObjective, Attraction, Batch

POLICY_DEFAULTS = {"net_arch": [256, 256, 256], "actor_value": "min"}


class ReBRAC(OfflineTD3):
    """
    TD3 with behavior cloning in the policy's objective and in the critics' targets.

    Paper: Tarasov et al. 2023, "Revisiting the Minimalist Approach to Offline Reinforcement Learning",
    https://arxiv.org/abs/2305.09836. The policy maximises ``Q(s, pi(s)) / mean|Q(s, pi(s))| - beta1 * sum((pi(s) - a)**2)``
    where ``Q`` is the minimum over the critics. The critics' targets are
    ``r + gamma * (1 - d) * (min Q'(s', a') - beta2 * sum((a' - a'_data)**2))`` where ``a'`` is the smoothed target action and
    ``a'_data`` the action that the data has at ``s'``. Sums are over action dimensions, actions are in [-1, 1].

    With the policies of this package ``policy_kwargs`` has the defaults ``net_arch=[256, 256, 256]`` and
    ``actor_value="min"``.

    The parameters up to ``_init_setup_model`` are those of SB3's TD3, in its order; the following ones up to
    ``policy_averaging`` are those of :class:`OfflineTD3`, where they are described.

    :param actor_bc_coef: Weight ``beta1`` of behavior cloning in the policy's objective
    :param critic_bc_coef: Weight ``beta2`` of the distance to the data's next actions in the critics' targets
    :param online_actor_bc: Factor on ``actor_bc_coef`` while finetuning: a number, or a schedule
        (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    :param online_critic_bc: The same for ``critic_bc_coef``
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
        dataset: DatasetSpec | None = None,
        offline_steps: int = 0,
        offline_fraction: ScheduleLike = 0.5,
        warmup_steps: int = 2000,
        warmup_action_noise: bool = False,
        critic_warmup_steps: int = 0,
        reset_optimizers: bool = True,
        normalize_observations: bool = True,
        kernel: str = "auto",
        update_precision: str = "float32",
        guide_policy: GuideLike = None,
        guide_steps: ScheduleLike = 0,
        policy_averaging: float = 0.0,
        actor_bc_coef: float = 0.01,
        critic_bc_coef: float = 0.01,
        online_actor_bc: ScheduleLike = "lin_1.0_0.5",
        online_critic_bc: ScheduleLike = 0.0,
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
            policy_kwargs=_with_defaults(policy, policy_kwargs),
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
            guide_policy=guide_policy,
            guide_steps=guide_steps,
            policy_averaging=policy_averaging,
        )
        self.actor_bc_coef = actor_bc_coef
        self.critic_bc_coef = critic_bc_coef
        self.online_actor_bc = online_actor_bc
        self.online_critic_bc = online_critic_bc
        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        for name in ("actor_bc_coef", "critic_bc_coef"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ValueError(f"`{name}` must be a number of at least 0, found {value!r}.")
            setattr(self, name, float(value))
        self._online_actor_bc_schedule: Schedule = make_schedule(self.online_actor_bc, "online_actor_bc")
        self._online_critic_bc_schedule: Schedule = make_schedule(self.online_critic_bc, "online_critic_bc")

    def _setup_model(self) -> None:
        super()._setup_model()
        require = getattr(self.replay_buffer, "require", None)
        if self.critic_bc_coef > 0 and require is not None:
            require(next_actions=True)

    def _factor(self, online: Schedule) -> float:
        """On a weight of behavior cloning: none without logged data or pretrained weights."""
        if self._pretraining:
            return 1.0
        return online(self._current_progress_remaining) if self._finetuning else 0.0

    def _next_value_penalty(self, batch: Batch, next_actions: th.Tensor, next_q_values: th.Tensor) -> th.Tensor | None:
        weight = self.critic_bc_coef * self._factor(self._online_critic_bc_schedule)
        if weight == 0:
            return None
        recorded = getattr(batch, "next_actions", None)
        if recorded is None:
            raise ValueError(
                "ReBRAC's critics need the data's next actions, which batches of this replay buffer do not have: use "
                "OfflineToOnlineReplayBuffer, or `critic_bc_coef=0`."
            )
        distance = (next_actions - recorded).square().sum(dim=1, keepdim=True)
        penalty: th.Tensor = weight * distance * batch.has_next_actions  # type: ignore[union-attr]
        self._log("train/critic_bc_penalty", penalty.mean())
        return penalty

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        if not (self._pretraining or self._finetuning):
            return super()._actor_loss(batch, actions, q_values)
        weight = self.actor_bc_coef * self._factor(self._online_actor_bc_schedule)
        mean_abs_q = q_values.detach().abs().mean()
        action_dim = actions.shape[1]
        self._log("train/mean_abs_q", mean_abs_q)
        self._log("train/bc_loss", F.mse_loss(actions.detach(), batch.actions) * action_dim)
        self._log("train/bc_weight", weight)
        # An attraction is a mean over action dimensions, this term is a sum
        return ActorObjective(1 / mean_abs_q, (Attraction(weight * action_dim, batch.actions),))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_online_actor_bc_schedule", "_online_critic_bc_schedule"]

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model, as :meth:`OfflineTD3.load` does. ``policy_kwargs`` may leave out what the constructor adds to them.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on (can be None if you only need prediction)
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training
        :param kwargs: constructor arguments that shall replace the saved ones
        :return: new model instance with loaded parameters
        :raises TypeError: A keyword is not an argument of the constructor
        :raises ValueError: ``policy_kwargs`` are not those of the file
        """
        if "policy_kwargs" in kwargs:
            stored, _, _ = load_from_zip_file(path, device=device, custom_objects=custom_objects)
            complete = None if stored is None else _with_defaults(stored["policy_class"], kwargs["policy_kwargs"])
            if stored is not None and complete == stored["policy_kwargs"]:
                kwargs["policy_kwargs"] = complete
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)


def _with_defaults(policy: str | type[TD3Policy], policy_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(policy, str) or issubclass(policy, OfflinePolicy):
        return POLICY_DEFAULTS | (policy_kwargs or {})
    return policy_kwargs
