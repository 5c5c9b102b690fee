"""Gradient steps by autograd, for any network."""

from collections.abc import Iterator
from typing import ClassVar

import torch as th
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.td3.policies import TD3Policy
from torch.nn import functional as F

from sb3_offline_ft.update.kernel import ActorLoss, ActorObjective, Batch, UpdateKernel, actor_value_of, batches_of


class AutogradKernel(UpdateKernel):
    """
    The operations of SB3's ``TD3.train``, in its order, for networks of every kind: the same results as there, to the bit.

    It leaves out what SB3 computes without using it: gradients of the critics' parameters in the policy's step.

    :param policy: The policy
    """

    name: ClassVar[str] = "autograd"
    needs_training_mode: ClassVar[bool] = True

    def __init__(self, policy: TD3Policy) -> None:
        super().__init__(policy)
        networks = (policy.critic, policy.critic_target, policy.actor, policy.actor_target)
        self._norm_stats = [get_parameters_by_name(network, ["running_"]) for network in networks]

    def batches(self, rows: Batch, batch_size: int) -> Iterator[Batch]:
        for batch in batches_of(rows, batch_size):
            self._batch = batch
            yield batch

    @th.no_grad()
    def next_q_values(self, noise: th.Tensor, critics: th.Tensor | None = None) -> th.Tensor:
        next_observations = self._batch.next_observations
        self.next_actions = (self.policy.actor_target(next_observations) + noise).clamp(-1, 1)
        q_values = th.cat(self.policy.critic_target(next_observations, self.next_actions), dim=1)
        return q_values if critics is None else q_values[:, critics]

    @th.no_grad()
    def q_values_of_next(self, actions: th.Tensor) -> th.Tensor:
        return th.cat(self.policy.critic_target(self._batch.next_observations, actions), dim=1)

    def update_critics(self, targets: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
        critic = self.policy.critic
        q_values = critic(self._batch.observations, self._batch.actions)
        if weights is None and targets.shape[1] == 1:
            loss = th.stack([F.mse_loss(values, targets) for values in q_values]).sum()
        else:
            errors = (th.cat(q_values, dim=1) - targets).square()
            loss = (errors if weights is None else errors * weights).mean(dim=0).sum()
        critic.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        critic.optimizer.step()
        return loss.detach()

    def update_actor(self, actor_loss: ActorLoss) -> th.Tensor:
        actor = self.policy.actor
        actions = actor(self._batch.observations)
        q_values = self._actor_values(actions)
        objective = actor_loss(actions, q_values)
        actor.optimizer.zero_grad()
        if isinstance(objective, ActorObjective):
            loss = objective.loss(actions, q_values)
            inputs = [parameter for parameter in actor.parameters() if parameter.requires_grad]
            loss.backward(inputs=inputs or None)  # type: ignore[no-untyped-call]
        else:
            # It may have parameters of its own
            loss = objective
            loss.backward()  # type: ignore[no-untyped-call]
        actor.optimizer.step()
        return loss.detach()

    def _actor_values(self, actions: th.Tensor) -> th.Tensor:
        critic, observations = self.policy.critic, self._batch.observations
        kind = actor_value_of(self.policy)
        if kind == "first":
            return critic.q1_forward(observations, actions)
        q_values = th.cat(critic(observations, actions), dim=1)
        return q_values.mean(dim=1, keepdim=True) if kind == "mean" else q_values.amin(dim=1, keepdim=True)

    def update_targets(self, tau: float, update_actor: bool) -> None:
        policy = self.policy
        critic_stats, critic_target_stats, actor_stats, actor_target_stats = self._norm_stats
        polyak_update(policy.critic.parameters(), policy.critic_target.parameters(), tau)
        if update_actor:
            polyak_update(policy.actor.parameters(), policy.actor_target.parameters(), tau)
        # Copy running stats, see SB3's issue #996
        polyak_update(critic_stats, critic_target_stats, 1.0)
        if update_actor:
            polyak_update(actor_stats, actor_target_stats, 1.0)
