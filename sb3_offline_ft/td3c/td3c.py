"""TD3 with a constrained policy update (after Luo et al. 2023)."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.schedules import make_schedule, scale_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.offline_td3.offline_td3 import SB3_LEARNING_STARTS
from sb3_offline_ft.policies.frozen import frozen_actor, weights_from_arrays, weights_to_arrays
from sb3_offline_ft.policies.guide import GuideLike
from sb3_offline_ft.td3bc.td3bc import TD3BC
from sb3_offline_ft.update import ActorObjective, Attraction, Batch

CONSTRAINT_REFERENCES = ("target", "pretrained", "best")
ACTOR = "actor."
REFERENCE_PREFIX = "reference_actor."
MULTIPLIER_STATE = ("step", "exp_avg", "exp_avg_sq")
DISTANCE_WEIGHT = 0.1
"""Weight of a batch in the running mean of distances: a few states far away make a batch's own an uncertain one."""
AVERAGE_FREQ = 10
"""Steps of the actor between two looks at the distance of the averaged policy, which moves slowly."""


class TD3C(TD3BC):
    """
    TD3 with a constrained policy update: TD3BC offline, and online a policy that stays near a reference policy.

    Implements the idea of Luo et al. 2023, "Finetuning from Offline Reinforcement Learning: Challenges, Trade-offs and
    Practical Solutions", https://arxiv.org/abs/2303.17396; constants are ours. Online, the policy
    maximises ``Q1(s, pi(s)) / mean|Q1|`` subject to ``mean((pi(s) - pi_ref(s))**2) <= epsilon``, the mean being over batch
    and action dimensions and actions in [-1, 1]. A Lagrange multiplier, kept on log scale and bounded, takes one Adam step
    on the violation with each step of the actor. If that does not keep the policy near, its weights are moved back towards
    the reference's (``trust_region``).

    The parameters up to ``_init_setup_model`` are those of SB3's TD3, in its order; the following ones up to
    ``policy_averaging``, which is on here by default, are those of :class:`OfflineTD3`, where they are described.

    :param alpha: Weight of the value against behavior cloning in the offline phase, as in :class:`TD3BC`
    :param constraint_reference: ``"target"``: the target policy, which follows the policy (a limit on its speed);
        ``"pretrained"``: the policy as it was when finetuning began (a trust region around it); ``"best"``: the same, until an
        ``EvalCallback`` reports a new best mean reward, from when on it is that policy
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

    _position_names: ClassVar[tuple[str, ...]] = (*TD3BC._position_names, "_constrained")

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
            guide_policy=guide_policy,
            guide_steps=guide_steps,
            policy_averaging=policy_averaging,
            alpha=alpha,
        )
        self.constraint_reference = constraint_reference
        self.epsilon = epsilon
        self.initial_multiplier = initial_multiplier
        self.multiplier_learning_rate = multiplier_learning_rate
        self.min_multiplier = min_multiplier
        self.max_multiplier = max_multiplier
        self.trust_region = trust_region
        self.critic_penalty = critic_penalty
        self.reference_actor: Actor | None = None
        self._constrained = False
        self._critic_penalty_scale: float | None = None
        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.constraint_reference not in CONSTRAINT_REFERENCES:
            raise ValueError(
                f"`constraint_reference` must be one of {', '.join(map(repr, CONSTRAINT_REFERENCES))}, "
                f"found {self.constraint_reference!r}."
            )
        self._epsilon_schedule: Schedule = make_schedule(self.epsilon, "epsilon")
        if not 0 < self.min_multiplier <= self.initial_multiplier <= self.max_multiplier < math.inf:
            raise ValueError(
                "Expected 0 < min_multiplier <= initial_multiplier <= max_multiplier < inf, found "
                f"{self.min_multiplier!r}, {self.initial_multiplier!r}, {self.max_multiplier!r}."
            )
        if not 0 <= self.multiplier_learning_rate < math.inf:
            raise ValueError(f"`multiplier_learning_rate` must be at least 0, found {self.multiplier_learning_rate!r}.")
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

    def _make_adaptive_weight(self) -> None:
        # Online there is no behavior cloning, whatever a loaded file of TD3BC says
        return None

    def _setup_model(self) -> None:
        super()._setup_model()
        self._mean_distance = self._no_distance
        self._reset_multiplier()

    @property
    def _no_distance(self) -> th.Tensor:
        return th.zeros((), dtype=th.float64, device=self.device)

    def _reset_multiplier(self) -> None:
        log_multiplier = math.log(self.initial_multiplier)
        self.log_multiplier = th.tensor(log_multiplier, dtype=th.float64, device=self.device, requires_grad=True)
        self.multiplier_optimizer = th.optim.Adam([self.log_multiplier], lr=self.multiplier_learning_rate)

    @property
    def multiplier(self) -> float:
        """The Lagrange multiplier, now."""
        return math.exp(self.log_multiplier.item())

    def set_reference_policy(self, policy_state: Mapping[str, th.Tensor] | None = None) -> None:
        """
        Make a policy the reference of the constraint. Without effect for the reference ``"target"``.

        :param policy_state: Its parameters and statistics by name, as in ``policy.state_dict()`` or in
            ``LearnerSnapshot.policy_state``; by default those of the current policy
        """
        if self.constraint_reference == "target":
            return
        self._mean_distance = self._no_distance
        if self.reference_actor is None:
            self.reference_actor = frozen_actor(self.policy)
        state = self.policy.state_dict() if policy_state is None else policy_state
        actor = {name.removeprefix(ACTOR): value for name, value in state.items() if name.startswith(ACTOR)}
        self.reference_actor.load_state_dict(actor)

    def scale_epsilon(self, factor: float) -> None:
        """
        Make the constraint tighter or wider from now on.

        :param factor: What ``epsilon`` is multiplied with; of a schedule, both ends
        """
        self.epsilon = scale_schedule(self.epsilon, factor)
        self._epsilon_schedule = make_schedule(self.epsilon, "epsilon")

    def _on_finetuning_start(self, pretrained: bool) -> None:
        super()._on_finetuning_start(pretrained)
        self.reference_actor = None
        self._critic_penalty_scale = None
        self._mean_distance = self._no_distance
        self._constrained = pretrained
        self._reset_multiplier()
        if not pretrained:
            if self._finetuning:
                warnings.warn(
                    "TD3C has a dataset but no pretrained policy to stay near: it trains online like TD3. "
                    "Pretrain with `offline_steps` or `pretrain()`.",
                    stacklevel=6,
                )
            return
        self.set_reference_policy()
        if self.constraint_reference == "best" and not self._eval_callbacks:
            warnings.warn(
                "`constraint_reference='best'` learns what is best from an EvalCallback, and there is none: the reference "
                "stays the pretrained policy. Pass `callback=EvalCallback(...)` to `learn`, or choose 'pretrained'.",
                stacklevel=6,
            )

    def _on_new_best(self) -> None:
        if self.constraint_reference == "best" and self.reference_actor is not None:
            self.set_reference_policy()

    @property
    def _reference(self) -> Actor | None:
        """The policy to stay near, None if there is none."""
        if not self._constrained or self._pretraining:
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
        if self._critic_penalty_scale is None or not math.isfinite(self._critic_penalty_scale):
            # Once: a scale that follows negative values lets them grow without bound
            self._critic_penalty_scale = float(next_q_values.abs().mean())
        distance = (next_actions - reference(batch.next_observations)).square().mean(dim=1, keepdim=True)
        multiplier = self.log_multiplier.detach().exp().to(distance.dtype)
        penalty: th.Tensor = self.critic_penalty * self._critic_penalty_scale * multiplier * distance
        self._log("train/critic_penalty", penalty.mean())
        return penalty

    def _update_actor(self, batch: Batch) -> None:
        # Before the step, after which a guard that holds the policy puts it back
        self._return_to_trust_region(batch)
        super()._update_actor(batch)

    @th.no_grad()
    def _return_to_trust_region(self, batch: Batch) -> None:
        """Move the weights back if they are outside: a large multiplier alone does not bring the policy back."""
        reference = self._reference
        if self.trust_region is None or reference is None:
            return
        epsilon = self._epsilon_schedule(self._current_progress_remaining)
        is_outside = self._move_back(self.actor.parameters(), self._mean_distance, epsilon, reference)
        self._mean_distance = th.where(is_outside, epsilon, self._mean_distance)
        if self._learned_weights is not None and self._learned_weights.average:
            is_outside = is_outside | self._return_average(self._learned_weights.average, batch, epsilon, reference)
        self._log("train/moved_back", is_outside.double())

    def _return_average(
        self, average: dict[str, th.Tensor], batch: Batch, epsilon: float, reference: Actor
    ) -> th.Tensor | bool:
        """What acts lags behind what is learned, and may be outside when that is not, such as after a fall of epsilon."""
        if self._n_updates // self.policy_delay % AVERAGE_FREQ != 0:
            return False
        training = self.actor.training
        self.actor.set_training_mode(False)
        try:
            actions = th.func.functional_call(self.actor, average, (batch.observations,))
        finally:
            self.actor.set_training_mode(training)
        distance = F.mse_loss(actions, reference(batch.observations)).double()
        return self._move_back(average.values(), distance, epsilon, reference)

    def _move_back(self, weights: Iterable[th.Tensor], distance: th.Tensor, epsilon: float, reference: Actor) -> th.Tensor:
        assert self.trust_region is not None
        is_outside = distance > self.trust_region * epsilon
        # Decided on the device: a GPU would have to be waited for
        way = th.where(is_outside, 1 - (epsilon / distance).sqrt(), 0.0)
        for weight, center in zip(weights, reference.parameters(), strict=True):
            weight.lerp_(center, way.to(weight.dtype))
        return is_outside

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective | th.Tensor:
        self._distance: th.Tensor | None = None
        if self._pretraining:
            return super()._actor_loss(batch, actions, q_values)
        reference = self._reference
        if reference is None:
            return ActorObjective()
        with th.no_grad():
            reference_actions = reference(batch.observations)
        epsilon = self._epsilon_schedule(self._current_progress_remaining)
        distance = F.mse_loss(actions.detach(), reference_actions)
        mean_abs_q = q_values.detach().abs().mean()
        multiplier = self.log_multiplier.detach().exp().to(distance.dtype)
        self._distance, self._violation = distance, distance - epsilon
        self._log("train/mean_abs_q", mean_abs_q)
        self._log("train/policy_distance", distance)
        self._log("train/constraint_violation", self._violation)
        self._log("train/epsilon", epsilon)
        self._log("train/multiplier", multiplier)
        # Divided by the sum of the weights: Adam's steps would grow while the multiplier grows, and be tiny after it has
        value_weight, distance_weight = 1 / (1 + multiplier), multiplier / (1 + multiplier)
        return ActorObjective(value_weight / mean_abs_q, (Attraction(distance_weight, reference_actions),))

    def _after_actor_update(self) -> None:
        if self._distance is None:
            return
        # The dual's gradient with respect to log(multiplier), up to the factor multiplier, as SAC does for its temperature
        self.log_multiplier.grad = -self._violation.to(self.log_multiplier.dtype)
        self.multiplier_optimizer.step()
        with th.no_grad():
            self.log_multiplier.clamp_(math.log(self.min_multiplier), math.log(self.max_multiplier))
        self._mean_distance = self._mean_distance + DISTANCE_WEIGHT * (self._distance.double() - self._mean_distance)

    def _excluded_save_params(self) -> list[str]:
        live = ["log_multiplier", "multiplier_optimizer", "reference_actor", "_distance", "_violation", "_epsilon_schedule"]
        return [*super()._excluded_save_params(), *live, "_mean_distance"]

    def _get_extra_state(self) -> dict[str, np.ndarray]:
        state = super()._get_extra_state()
        state["log_multiplier"] = self.log_multiplier.detach().cpu().numpy()
        for name, value in self.multiplier_optimizer.state.get(self.log_multiplier, {}).items():
            state[f"multiplier_optimizer.{name}"] = value.cpu().numpy()
        state["mean_distance"] = self._mean_distance.cpu().numpy()
        if self._critic_penalty_scale is not None:
            state["critic_penalty_scale"] = np.array(self._critic_penalty_scale)
        if self.reference_actor is not None:
            state |= weights_to_arrays(self.reference_actor, REFERENCE_PREFIX)
        return state

    def _set_extra_state(self, state: dict[str, np.ndarray]) -> None:
        super()._set_extra_state(state)
        if "log_multiplier" not in state:
            warnings.warn(
                "The file was not saved by TD3C: the Lagrange multiplier starts at its initial value "
                f"{self.initial_multiplier:g}, and the loaded policy will be the reference of the constraint.",
                stacklevel=3,
            )
            return
        with th.no_grad():
            self.log_multiplier.copy_(th.from_numpy(state["log_multiplier"]))
        moments = {
            name: th.from_numpy(state[f"multiplier_optimizer.{name}"].copy())
            for name in MULTIPLIER_STATE
            if f"multiplier_optimizer.{name}" in state
        }
        self.multiplier_optimizer.state.clear()
        if moments:
            self.multiplier_optimizer.state[self.log_multiplier] = {
                name: value if name == "step" else value.to(self.device) for name, value in moments.items()
            }
        self._mean_distance = self._no_distance + float(state.get("mean_distance", 0.0))
        if "critic_penalty_scale" in state:
            # A state from before it was measured leaves it as it is
            self._critic_penalty_scale = float(state["critic_penalty_scale"])
        weights = weights_from_arrays(state, REFERENCE_PREFIX)
        if not weights or self.constraint_reference == "target":
            self.reference_actor = None
            return
        if self.reference_actor is None:
            self.reference_actor = frozen_actor(self.policy)
        self.reference_actor.load_state_dict(weights)
