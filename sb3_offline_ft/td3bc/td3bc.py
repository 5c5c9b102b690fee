"""TD3 with behavior cloning (Fujimoto & Gu 2021), offline and online."""

import math
from typing import Any, ClassVar, Unpack

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.offline_td3 import OfflineTD3, OfflineTD3Arguments
from sb3_offline_ft.offline_td3.objective import behavior_cloning, check_alpha
from sb3_offline_ft.td3bc.adaptive_weight import AdaptiveWeight, check_returns_are_reported
from sb3_offline_ft.update import ActorObjective, Batch

ADAPTIVE = "adaptive"
# The weight that is controlled begins with 1
ONLINE_BC_WORDS = {"keep": 1.0, "drop": 0.0, ADAPTIVE: 1.0}


class TD3BC(OfflineTD3):
    """
    TD3 with behavior cloning.

    Paper: Fujimoto & Gu 2021, "A Minimalist Approach to Offline Reinforcement Learning", https://arxiv.org/abs/2106.06860.
    The policy maximises ``lambda * Q1(s, pi(s)) - w * mean((pi(s) - a)**2)`` with ``lambda = alpha / mean|Q1(s, pi(s))|``
    (constant for the gradient); the mean is over batch and action dimensions, actions are in [-1, 1]. ``w`` is 1 offline
    and ``online_bc`` while finetuning.

    The other parameters, those of SB3's TD3 in its order among them, are described at :class:`OfflineTD3`.

    :param alpha: Weight of the value against behavior cloning. 0 is behavior cloning alone; ``float("inf")`` is TD3's own
        objective, to the bit
    :param online_bc: Weight of the behavior cloning term while finetuning: ``"keep"`` (1), ``"drop"`` (0), a number, a
        schedule that anneals it (see :func:`sb3_offline_ft.common.schedules.make_schedule`), or ``"adaptive"``: a controller
        lowers it from 1 while the returns of training episodes are below a target and raises it when they fall (Zhao et al.
        2022, https://arxiv.org/abs/2210.13846)
    :param adaptive_bc_target: Return aimed at by ``online_bc="adaptive"``, in units in which a random policy has 0 and an
        expert 1
    :param adaptive_bc_gains: Its gains, per environment step: of the difference to the target, and of a fall below the running
        average. The paper's, 3e-5 and 1e-4, are for a weight that begins with 0.4; these are for one that begins with 1
    :param adaptive_bc_returns: The returns that count as 0 and 1; by default the dataset's reference scores, or if it has none
        ``(J - |J|, J)`` where ``J`` is the return of the pretrained policy in the warm-up
    """

    online_only_arguments: ClassVar[frozenset[str]] = frozenset(
        {"online_bc", "adaptive_bc_target", "adaptive_bc_gains", "adaptive_bc_returns"}
    )

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        *args: Any,
        alpha: float = 2.5,
        online_bc: ScheduleLike = 1.0,
        adaptive_bc_target: float = 1.05,
        adaptive_bc_gains: tuple[float, float] = (7.5e-5, 2.5e-4),
        adaptive_bc_returns: tuple[float, float] | None = None,
        **kwargs: Unpack[OfflineTD3Arguments],
    ) -> None:
        self.alpha = alpha
        self.online_bc = online_bc
        self.adaptive_bc_target = adaptive_bc_target
        self.adaptive_bc_gains = adaptive_bc_gains
        self.adaptive_bc_returns = adaptive_bc_returns
        super().__init__(policy, env, *args, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        self.alpha = check_alpha(self.alpha)
        self._online_bc_schedule: Schedule = make_schedule(self.online_bc, "online_bc", words=ONLINE_BC_WORDS)
        self.adaptive_weight: AdaptiveWeight | None = None
        if self.online_bc == ADAPTIVE:
            self.adaptive_weight = AdaptiveWeight(self.adaptive_bc_target, self.adaptive_bc_gains, self.adaptive_bc_returns)
            # A file has lists in their place
            self.adaptive_bc_gains, self.adaptive_bc_returns = self.adaptive_weight.gains, self.adaptive_weight.given_unit

    def _check_run(self, goes_on: bool) -> None:
        super()._check_run(goes_on)
        finetunes = self.life_cycle.is_finetuning if goes_on else self.dataset is not None or self.has_trained_weights
        if finetunes and self.adaptive_weight is not None and self.env is not None:
            check_returns_are_reported(self.env)

    @property
    def _reference_returns(self) -> tuple[float, float] | None:
        """Returns of a random policy and of an expert, None if the dataset does not tell them."""
        scores = None if self.offline_dataset is None else self.offline_dataset.reference_scores
        return None if scores is None else (scores.random, scores.expert)

    def _on_finetuning_start(self, pretrained: bool) -> None:
        super()._on_finetuning_start(pretrained)
        if self.adaptive_weight is not None:
            self.adaptive_weight.begin(self._reference_returns)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self.adaptive_weight is None or not self.life_cycle.is_finetuning or dones is None:
            return
        for evaluation in self.evaluations.callbacks:
            # The one before the first interaction is the pretrained policy's
            if self.num_timesteps == self.n_envs and math.isfinite(evaluation.last_mean_reward):
                self.adaptive_weight.expect(float(evaluation.last_mean_reward))
        # The run may have begun with another `online_bc`
        self.adaptive_weight.offer_unit(self._reference_returns)
        self.adaptive_weight.observe_ended(infos, dones, is_frozen=self.num_timesteps <= self.life_cycle.frozen_until)

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        if self.life_cycle.is_plain_td3:
            return super()._actor_loss(batch, actions, q_values)
        weight = 1.0 if self.life_cycle.is_pretraining else self._online_bc_weight()
        return behavior_cloning(self.alpha, weight, batch.actions, actions, q_values, self._log)

    def _online_bc_weight(self) -> float:
        if self.adaptive_weight is None:
            return self._online_bc_schedule(self._current_progress_remaining)
        if math.isfinite(self.adaptive_weight.average):
            self._log("train/average_score", self.adaptive_weight.average_score)
        return self.adaptive_weight.weight

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_online_bc_schedule", "adaptive_weight"]

    def _stateful_parts(self) -> dict[str, Any]:
        return super()._stateful_parts() | ({} if self.adaptive_weight is None else {"adaptive_weight": self.adaptive_weight})
