"""What an update kernel is asked for by an algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.td3.policies import TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.common.observations import take_rows
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples

Batch = OfflineToOnlineReplayBufferSamples | ReplayBufferSamples


@dataclass(frozen=True)
class Attraction:
    """
    A term ``weight * mean((actions - reference)**2)`` of a policy's loss; the mean is over batch and action dimensions.

    :param weight: Its weight
    :param reference: Actions, shape ``(batch, action_dim)``, in [-1, 1]
    """

    weight: th.Tensor | float
    reference: th.Tensor


@dataclass(frozen=True)
class ActorObjective:
    """
    A policy's loss: ``-value_weight * mean(Q(s, pi(s)))`` plus attractions of its actions to others.

    ``Q`` is the value that the policy maximises: the first critic's, or what its ``actor_value`` says. Weights and references
    are constants for the gradient, even if they depend on the policy.

    :param value_weight: Weight of the value
    :param attractions: The other terms
    """

    value_weight: th.Tensor | float = 1.0
    attractions: tuple[Attraction, ...] = ()

    def loss(self, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        """
        :param actions: The policy's actions, shape ``(batch, action_dim)``
        :param q_values: The values of them that the policy maximises, shape ``(batch, 1)``
        :return: The loss, differentiable in both
        """
        loss = -q_values.mean() * _constant(self.value_weight)
        for attraction in self.attractions:
            loss = loss + _constant(attraction.weight) * F.mse_loss(actions, attraction.reference.detach())
        return loss


def _constant(value: th.Tensor | float) -> th.Tensor | float:
    return value.detach() if isinstance(value, th.Tensor) else value


ActorLoss = Callable[[th.Tensor, th.Tensor], ActorObjective | th.Tensor]
"""
A policy's loss as a function of its actions ``(batch, action_dim)`` and the values of them that it maximises ``(batch, 1)``:
an :class:`ActorObjective`, or a scalar built of differentiable operations on these two.
"""


def batches_of(rows: Batch, batch_size: int) -> Iterator[Batch]:
    """Go through batches that are one after the other in ``rows``; they are views."""
    n_rows = len(rows.actions)
    if n_rows == batch_size:
        yield rows
        return
    for start in range(0, n_rows, batch_size):
        part = slice(start, start + batch_size)
        yield type(rows)(*(None if column is None else take_rows(column, part) for column in rows))  # type: ignore[arg-type]


def actor_value_of(policy: TD3Policy) -> str:
    """Which value the actor of a policy, which may be SB3's, maximises."""
    return getattr(policy, "actor_value", "first")


def target_critics_of(policy: TD3Policy) -> int:
    """Number of target critics of a policy, which may be SB3's, whose minimum is the critics' target."""
    chosen = getattr(policy, "target_critics", None)
    return len(policy.critic_target.q_networks) if chosen is None else chosen


class UpdateKernel(ABC):
    """
    Computes the gradient steps of an actor-critic algorithm on the policy's own parameters and optimizers.

    An algorithm iterates over :meth:`batches`; each batch is the current one until the next is asked for, and the other
    methods work on it. What is learned (targets, the policy's objective) the algorithm states itself, in terms of values and
    actions, so that it need not know how gradients come about.

    :param policy: The policy
    """

    name: ClassVar[str]
    needs_training_mode: ClassVar[bool]
    """Whether the policy must be in training mode for an update."""
    next_actions: th.Tensor
    """
    The smoothed target actions of which :meth:`next_q_values` has told the values, shape ``(batch, action_dim)``, in [-1, 1].

    They stay until it is called again or another batch is asked for, and are not to be changed.
    """

    def __init__(self, policy: TD3Policy) -> None:
        self.policy = policy

    @abstractmethod
    def batches(self, rows: Batch, batch_size: int) -> Iterator[Batch]:
        """
        Go through batches; while one is in hand, it is the current one.

        :param rows: Several batches in one, batch after batch
        :param batch_size: Number of rows in each
        :return: Each batch
        """

    @abstractmethod
    def next_q_values(self, noise: th.Tensor, critics: th.Tensor | None = None) -> th.Tensor:
        """
        Values of the target critics at the next observations and the target policy's actions there, smoothed by noise and
        clipped to [-1, 1]; without gradient. The actions are in :attr:`next_actions` afterwards.

        :param noise: Noise of the actions, shape ``(batch, action_dim)``
        :param critics: Indices of the target critics that are asked, shape ``(n,)``; None for all
        :return: Shape ``(batch, n)``
        """

    @abstractmethod
    def q_values_of_next(self, actions: th.Tensor) -> th.Tensor:
        """
        Values of the target critics at the next observations and actions of anybody; without gradient.

        :param actions: The actions, shape ``(batch, action_dim)``, in [-1, 1]
        :return: Shape ``(batch, n_critics)``
        """

    @abstractmethod
    def update_critics(self, targets: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
        """
        One step of the critics' optimizer on the sum over critics of the mean squared error.

        :param targets: What the values of the batch should be, shape ``(batch, 1)``, or ``(batch, n_critics)`` for critics
            that learn different things
        :param weights: Weights of the squared errors in each critic's mean, shape ``(batch, n_critics)``; None for 1
        :return: The loss before the step, a scalar
        """

    @abstractmethod
    def update_actor(self, actor_loss: ActorLoss) -> th.Tensor:
        """
        One step of the actor's optimizer.

        :param actor_loss: The loss as a function of actions and the values of them that the policy maximises
        :return: The loss before the step, a scalar
        """

    @abstractmethod
    def update_targets(self, tau: float, update_actor: bool) -> None:
        """
        Move the target networks towards the others by Polyak averaging.

        :param tau: Weight of the new parameters
        :param update_actor: Whether the target policy is moved too
        """
