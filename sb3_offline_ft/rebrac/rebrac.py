"""TD3 with behavior cloning in the policy's and the critics' objective (Tarasov et al. 2023)."""

import math
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, Unpack

import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.offline_td3 import OfflineTD3, OfflineTD3Arguments
from sb3_offline_ft.update import ActorObjective, Attraction, Batch


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

    The other parameters, those of SB3's TD3 in its order among them, are described at :class:`OfflineTD3`.

    :param actor_bc_coef: Weight ``beta1`` of behavior cloning in the policy's objective
    :param critic_bc_coef: Weight ``beta2`` of the distance to the data's next actions in the critics' targets
    :param online_actor_bc: Factor on ``actor_bc_coef`` while finetuning: a number, or a schedule
        (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    :param online_critic_bc: The same for ``critic_bc_coef``
    """

    policy_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"net_arch": [256, 256, 256], "actor_value": "min"})
    online_only_arguments: ClassVar[frozenset[str]] = frozenset({"online_actor_bc", "online_critic_bc"})

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        *args: Any,
        actor_bc_coef: float = 0.01,
        critic_bc_coef: float = 0.01,
        online_actor_bc: ScheduleLike = "lin_1.0_0.5",
        online_critic_bc: ScheduleLike = 0.0,
        **kwargs: Unpack[OfflineTD3Arguments],
    ) -> None:
        self.actor_bc_coef = actor_bc_coef
        self.critic_bc_coef = critic_bc_coef
        self.online_actor_bc = online_actor_bc
        self.online_critic_bc = online_critic_bc
        super().__init__(policy, env, *args, **kwargs)

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
        if self.life_cycle.is_pretraining:
            return 1.0
        return 0.0 if self.life_cycle.is_plain_td3 else online(self._current_progress_remaining)

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
        if self.life_cycle.is_plain_td3:
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
