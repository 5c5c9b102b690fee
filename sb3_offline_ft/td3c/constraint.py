"""What a constrained policy stays near, and how far it is from there."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.policies.frozen import frozen_actor, weights_from_arrays, weights_to_arrays

ACTOR = "actor."
REFERENCE_PREFIX = "reference_actor."
DISTANCE_WEIGHT = 0.1
"""Weight of a batch in the running mean of distances: a few states far away make a batch's own an uncertain one."""


class Constraint:
    """
    A reference policy of its own, if there is one, and the distance of the learner's policy, all on the learner's device.

    :param learner: The learner
    :param has_reference: Whether there can be one
    """

    def __init__(self, learner: TD3, has_reference: bool) -> None:
        self._learner, self._has_reference = learner, has_reference
        self.begin_run()

    @property
    def _policy(self) -> TD3Policy:
        # Looked up, since it may be replaced
        return self._learner.policy

    def begin_run(self) -> None:
        """Forget all."""
        self.reference: Actor | None = None
        self.mean_distance = self._number(0.0)
        """Running mean of the distances in the last ten or so batches."""
        self.value_scale = self._number(float("nan"))
        """Mean absolute value of next observations when the run began; NaN until then."""

    def _number(self, value: float) -> th.Tensor:
        return th.tensor(value, dtype=th.float64, device=self._policy.device)

    def set_reference(self, policy_state: Mapping[str, th.Tensor] | None = None) -> None:
        """Make a policy the reference, by default the current one, if there can be one."""
        if not self._has_reference:
            return
        self.mean_distance = self._number(0.0)
        if self.reference is None:
            self.reference = frozen_actor(self._policy)
        state = self._policy.state_dict() if policy_state is None else policy_state
        actor = {name.removeprefix(ACTOR): value for name, value in state.items() if name.startswith(ACTOR)}
        self.reference.load_state_dict(actor)

    def observe(self, distance: th.Tensor) -> None:
        """Take the distance in a batch into account."""
        self.mean_distance = self.mean_distance + DISTANCE_WEIGHT * (distance.double() - self.mean_distance)

    def scale_of(self, next_q_values: th.Tensor) -> th.Tensor:
        """The mean absolute value of the first values of next observations that were finite."""
        # Once: a scale that follows negative values lets them grow without bound
        measured = next_q_values.abs().mean().to(self.value_scale.dtype)
        self.value_scale = th.where(self.value_scale.isfinite(), self.value_scale, measured)
        return self.value_scale

    def distance_of(self, weights: Mapping[str, th.Tensor], reference: Actor, observations: Any) -> th.Tensor:
        """The distance that the learner's policy would have with other weights."""
        actor = self._policy.actor
        training = actor.training
        actor.set_training_mode(False)
        try:
            actions = th.func.functional_call(actor, dict(weights), (observations,))
        finally:
            actor.set_training_mode(training)
        return F.mse_loss(actions, reference(observations)).double()

    @staticmethod
    def move_back(
        weights: Iterable[th.Tensor], reference: Actor, distance: th.Tensor, epsilon: float, trust_region: float
    ) -> th.Tensor:
        """
        Move weights on the straight line to the reference's, if they are outside of the trust region.

        :param weights: Those of an actor, which are changed
        :param reference: The reference
        :param distance: Their distance, a scalar
        :param epsilon: What it would be then if it shrank with the square of the way
        :param trust_region: How many times that it may be
        :return: Whether they were outside, a scalar
        """
        is_outside = distance > trust_region * epsilon
        # Decided on the device: a GPU would have to be waited for
        way = th.where(is_outside, 1 - (epsilon / distance).sqrt(), 0.0)
        for weight, center in zip(weights, reference.parameters(), strict=True):
            weight.lerp_(center, way.to(weight.dtype))
        return is_outside

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        state = {"mean_distance": self.mean_distance.cpu().numpy()}
        if not self.value_scale.isnan():
            state["critic_penalty_scale"] = self.value_scale.cpu().numpy()
        return state | ({} if self.reference is None else weights_to_arrays(self.reference, REFERENCE_PREFIX))

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state; one from before the scale was measured leaves that as it is."""
        self.mean_distance = self._number(float(state.get("mean_distance", 0.0)))
        self.value_scale = self._number(float(state.get("critic_penalty_scale", self.value_scale)))
        weights = weights_from_arrays(state, REFERENCE_PREFIX)
        if not weights or not self._has_reference:
            self.reference = None
            return
        if self.reference is None:
            self.reference = frozen_actor(self._policy)
        self.reference.load_state_dict(weights)
