"""TD3 with a constrained policy update (after Luo et al. 2023)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.schedules import make_schedule, scale_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.offline_td3 import OfflineTD3, SharedArguments
from sb3_offline_ft.offline_td3.objective import behavior_cloning, check_alpha
from sb3_offline_ft.td3c.constraint import Constraint
from sb3_offline_ft.td3c.multiplier import Multiplier
from sb3_offline_ft.update import ActorObjective, Attraction, Batch

CONSTRAINT_REFERENCES = ("target", "pretrained", "best", "champion")
MOVED_BY = {"best": "what is best from an EvalCallback", "champion": "who that is from a ChampionChallenger"}
AVERAGE_FREQ = 10
"""Steps of the actor between two looks at the distance of the averaged policy, which moves slowly."""


class TD3C(OfflineTD3):
    """
    TD3 with a constrained policy update: TD3BC offline, and online a policy that stays near a reference policy.

    Implements the idea of Luo et al. 2023, "Finetuning from Offline Reinforcement Learning: Challenges, Trade-offs and
    Practical Solutions", https://arxiv.org/abs/2303.17396; constants are ours. Online, the policy
    maximises ``Q1(s, pi(s)) / mean|Q1|`` subject to ``mean((pi(s) - pi_ref(s))**2) <= epsilon``, the mean being over batch
    and action dimensions and actions in [-1, 1]. A Lagrange multiplier, kept on log scale and bounded, takes one Adam step
    on the violation with each step of the actor. If that does not keep the policy near, its weights are moved back towards
    the reference's (``trust_region``).

    The other parameters, those of SB3's TD3 in its order among them, are described at :class:`OfflineTD3`;
    ``policy_averaging`` is on here by default.

    :param alpha: Weight of the value against behavior cloning in the offline phase, as in :class:`TD3BC`
    :param constraint_reference: ``"target"``: the target policy, which follows the policy (a limit on its speed);
        ``"pretrained"``: the policy as it was when finetuning began (a trust region around it); ``"best"``: the same, until an
        ``EvalCallback`` finds the learner better than before, from when on it is that policy; ``"champion"``: the same, until
        a :class:`ChampionChallenger` promotes another policy, from when on it is that one
    :param epsilon: Bound on the mean squared distance of actions to the reference's: a number or a schedule
        (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    :param initial_multiplier: Lagrange multiplier at the start of finetuning
    :param multiplier_learning_rate: Learning rate of Adam for the logarithm of the multiplier
    :param min_multiplier: Smallest value of the multiplier
    :param max_multiplier: Largest value of the multiplier
    :param trust_region: When the mean distance in the last ten or so batches exceeds this many times ``epsilon``, the weights
        of the policy are moved back on the straight line to the reference's, so far that it would be ``epsilon`` if it shrank
        with the square of the way; None for never. The average of ``policy_averaging`` is looked at in every tenth batch, and
        moved back alike
    :param critic_penalty: Weight of the distance to the reference in the critics' targets, from which
        ``critic_penalty * multiplier * scale * mean((a' - pi_ref(s'))**2)`` is taken off the value of the next observation,
        the mean being over action dimensions; ``scale`` is the mean absolute value when finetuning begins. With 1 critics and
        policy weigh the distance alike; 0 is for no penalty
    """

    moved_settings: ClassVar[tuple[str, ...]] = (*OfflineTD3.moved_settings, "epsilon")
    online_only_arguments: ClassVar[frozenset[str]] = frozenset(
        "constraint_reference epsilon initial_multiplier multiplier_learning_rate min_multiplier max_multiplier trust_region "
        "critic_penalty".split()
    )

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        *args: Any,
        policy_averaging: float = 0.99,
        alpha: float = 2.5,
        constraint_reference: str = "best",
        epsilon: ScheduleLike = 1e-3,
        initial_multiplier: float = 1.0,
        multiplier_learning_rate: float = 1e-2,
        min_multiplier: float = 1e-3,
        max_multiplier: float = 1e3,
        trust_region: float | None = 2.0,
        critic_penalty: float = 0.0,
        **kwargs: Unpack[SharedArguments],
    ) -> None:
        self.alpha = alpha
        self.constraint_reference = constraint_reference
        self.epsilon = epsilon
        self.initial_multiplier = initial_multiplier
        self.multiplier_learning_rate = multiplier_learning_rate
        self.min_multiplier = min_multiplier
        self.max_multiplier = max_multiplier
        self.trust_region = trust_region
        self.critic_penalty = critic_penalty
        super().__init__(policy, env, *args, policy_averaging=policy_averaging, **kwargs)

    def _check_settings(self) -> None:
        super()._check_settings()
        self.alpha = check_alpha(self.alpha)
        if self.constraint_reference not in CONSTRAINT_REFERENCES:
            known = ", ".join(map(repr, CONSTRAINT_REFERENCES))
            raise ValueError(f"`constraint_reference` must be one of {known}, found {self.constraint_reference!r}.")
        self._epsilon_schedule: Schedule = make_schedule(self.epsilon, "epsilon")
        if self.trust_region is not None and not 1 <= self.trust_region < math.inf:
            raise ValueError(
                "`trust_region` must be at least 1, as it is in multiples of `epsilon`, or None for none, found "
                f"{self.trust_region!r}."
            )
        if not 0 <= self.critic_penalty < math.inf:
            raise ValueError(f"`critic_penalty` must be at least 0, found {self.critic_penalty!r}.")
        if self.critic_penalty > 0 and self.constraint_reference == "target":
            raise ValueError(
                "`critic_penalty` has no use with `constraint_reference='target'`, since the critics' targets are about that "
                "policy's own actions: choose 'pretrained' or 'best', or `critic_penalty=0`."
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.constraint = Constraint(self, has_reference=self.constraint_reference != "target")
        rates = self.initial_multiplier, self.multiplier_learning_rate
        self._multiplier = Multiplier(*rates, self.min_multiplier, self.max_multiplier, self.device)

    @property
    def multiplier(self) -> float:
        """The Lagrange multiplier, now."""
        return float(self._multiplier)

    @property
    def reference_actor(self) -> Actor | None:
        """The reference policy; None if there is none, or for the reference ``"target"``."""
        return self.constraint.reference

    @property
    def current_epsilon(self) -> float:
        """The bound on the distance, now."""
        return self._epsilon_schedule(self._current_progress_remaining)

    def set_reference_policy(self, policy_state: Mapping[str, th.Tensor] | None = None) -> None:
        """
        Make a policy the reference of the constraint. Without effect for the reference ``"target"``.

        :param policy_state: Its parameters and statistics by name, as in ``policy.state_dict()`` or in
            ``LearnerSnapshot.policy_state``; by default those of the current policy
        """
        self.constraint.set_reference(policy_state)

    def scale_epsilon(self, factor: float) -> None:
        """
        Make the constraint tighter or wider from now on.

        :param factor: What ``epsilon`` is multiplied with; of a schedule, both ends
        """
        self.epsilon = scale_schedule(self.epsilon, factor)
        self._epsilon_schedule = make_schedule(self.epsilon, "epsilon")

    def _move_setting(self, name: str, value: Any) -> None:
        super()._move_setting(name, value)
        self._epsilon_schedule = make_schedule(self.epsilon, "epsilon")

    def _on_finetuning_start(self, pretrained: bool) -> None:
        super()._on_finetuning_start(pretrained)
        self.constraint.begin_run()
        self._multiplier.reset()
        self.life_cycle.is_constrained = pretrained
        if pretrained:
            self.set_reference_policy()
        elif self.life_cycle.is_finetuning:
            warn(
                "TD3C has a dataset but no pretrained policy to stay near: it trains online like TD3. "
                "Pretrain with `offline_steps` or `pretrain()`."
            )
        is_moved = self.evaluations.has_judge or (self.constraint_reference == "best" and self.evaluations.callbacks)
        if pretrained and not is_moved and (source := MOVED_BY.get(self.constraint_reference)):
            warn(
                f"`constraint_reference={self.constraint_reference!r}` learns {source}, and there is none: the reference "
                f"stays the pretrained policy. Pass `callback={source.split()[-1]}(...)` to `learn`, or choose 'pretrained'."
            )

    def _on_new_best(self) -> None:
        if self.constraint_reference == "best" and self.reference_actor is not None:
            self.set_reference_policy()

    @property
    def _reference(self) -> Actor | None:
        """The policy to stay near, None if there is none."""
        if not self.life_cycle.is_constrained or self.life_cycle.is_pretraining:
            return None
        if self.constraint_reference == "target":
            return self.actor_target
        if self.reference_actor is None:
            # The run went on with another kind of reference than it was saved with
            self.set_reference_policy()
        return self.reference_actor

    def _next_value_penalty(self, batch: Batch, next_actions: th.Tensor, next_q_values: th.Tensor) -> th.Tensor | None:
        reference = self._reference
        if self.critic_penalty == 0 or reference is None:
            return None
        distance = (next_actions - reference(batch.next_observations)).square().mean(dim=1, keepdim=True)
        weight = (self.critic_penalty * self.constraint.scale_of(next_q_values)).to(distance.dtype)
        penalty: th.Tensor = weight * self._multiplier.value.to(distance.dtype) * distance
        self._log("train/critic_penalty", penalty.mean())
        return penalty

    def _update_actor(self, batch: Batch) -> None:
        # Before the step, after which a guard that holds the policy puts it back
        self._return_to_trust_region(batch)
        super()._update_actor(batch)

    @th.no_grad()
    def _return_to_trust_region(self, batch: Batch) -> None:
        """Move the weights back if they are outside: a large multiplier alone does not bring the policy back."""
        reference, constraint, epsilon = self._reference, self.constraint, self.current_epsilon
        if self.trust_region is None or reference is None:
            return
        bounds = epsilon, self.trust_region
        is_outside = constraint.move_back(self.actor.parameters(), reference, constraint.mean_distance, *bounds)
        constraint.mean_distance = th.where(is_outside, epsilon, constraint.mean_distance)
        average = {} if self.acting.learned_weights is None else self.acting.learned_weights.average
        if average and self._n_updates // self.policy_delay % AVERAGE_FREQ == 0:
            # What acts lags behind what is learned, and may be outside when that is not, such as after a fall of epsilon
            distance = constraint.distance_of(average, reference, batch.observations)
            is_outside = is_outside | constraint.move_back(average.values(), reference, distance, *bounds)
        self._log("train/moved_back", is_outside.double())

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        self._distance: th.Tensor | None = None
        if self.life_cycle.is_pretraining:
            return behavior_cloning(self.alpha, 1.0, batch.actions, actions, q_values, self._log)
        reference, epsilon = self._reference, self.current_epsilon
        if reference is None:
            return super()._actor_loss(batch, actions, q_values)
        with th.no_grad():
            reference_actions = reference(batch.observations)
        self._distance = F.mse_loss(actions.detach(), reference_actions)
        mean_abs_q = q_values.detach().abs().mean()
        multiplier = self._multiplier.value.to(self._distance.dtype)
        self._log("train/mean_abs_q", mean_abs_q)
        self._log("train/policy_distance", self._distance)
        self._log("train/constraint_violation", self._distance - epsilon)
        self._log("train/epsilon", epsilon)
        self._log("train/multiplier", multiplier)
        # Divided by the sum of the weights: Adam's steps would grow while the multiplier grows, and be tiny after it has
        value_weight, distance_weight = 1 / (1 + multiplier), multiplier / (1 + multiplier)
        return ActorObjective(value_weight / mean_abs_q, (Attraction(distance_weight, reference_actions),))

    def _after_actor_update(self) -> None:
        if self._distance is not None:
            self._multiplier.step(self._distance - self.current_epsilon)
            self.constraint.observe(self._distance)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "constraint", "_multiplier", "_distance", "_epsilon_schedule"]

    def _stateful_parts(self) -> dict[str, Any]:
        return super()._stateful_parts() | {"multiplier": self._multiplier, "constraint": self.constraint}
