"""TD3+BC the way single-file implementations have it: plain PyTorch, everything spelled out, nothing tuned for speed."""

import copy

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F


class TransitionBuffer:
    """
    Transitions as tensors.

    :param columns: Observations, actions, rewards, next observations and flags of termination, one row per transition
    """

    def __init__(self, *columns: np.ndarray) -> None:
        self.columns = [th.as_tensor(column, dtype=th.float32) for column in columns]

    def sample(self, batch_size: int) -> list[th.Tensor]:
        rows = np.random.randint(0, len(self.columns[0]), size=batch_size)
        return [column[rows] for column in self.columns]


def mlp(n_inputs: int, n_outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs)
    )


class Actor(nn.Module):
    """The policy, with actions in [-1, 1]."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp(observation_dim, action_dim, hidden)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.net(observations))


class Critic(nn.Module):
    """One value function."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp(observation_dim + action_dim, 1, hidden)

    def forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        value: th.Tensor = self.net(th.cat([observations, actions], 1))
        return value


class Trainer:
    """
    TD3+BC (Fujimoto & Gu 2021).

    :param buffer: The data
    :param observation_dim: Length of an observation
    :param action_dim: Length of an action
    :param hidden: Width of the two hidden layers
    :param batch_size: Transitions per update
    :param policy_delay: Updates of the critics per update of the policy
    """

    gamma, tau, alpha, target_noise, noise_clip, learning_rate = 0.99, 0.005, 2.5, 0.2, 0.5, 3e-4

    def __init__(
        self, buffer: TransitionBuffer, observation_dim: int, action_dim: int, hidden: int, batch_size: int, policy_delay: int
    ) -> None:
        self.buffer, self.batch_size, self.policy_delay = buffer, batch_size, policy_delay
        self.actor = Actor(observation_dim, action_dim, hidden)
        self.critics = [Critic(observation_dim, action_dim, hidden) for _ in range(2)]
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_targets = copy.deepcopy(self.critics)
        self.actor_optimizer = th.optim.Adam(self.actor.parameters(), lr=self.learning_rate)
        self.critic_optimizers = [th.optim.Adam(critic.parameters(), lr=self.learning_rate) for critic in self.critics]
        self.updates = 0

    def update(self) -> dict[str, float]:
        """
        Take one gradient step.

        :return: Losses
        """
        self.updates += 1
        losses = {}
        observations, actions, rewards, next_observations, terminations = self.buffer.sample(self.batch_size)
        with th.no_grad():
            noise = (th.randn_like(actions) * self.target_noise).clamp(-self.noise_clip, self.noise_clip)
            next_actions = (self.actor_target(next_observations) + noise).clamp(-1, 1)
            next_values = th.min(*[target(next_observations, next_actions) for target in self.critic_targets])
            targets = rewards + (1 - terminations) * self.gamma * next_values
        critic_loss = sum((F.mse_loss(critic(observations, actions), targets) for critic in self.critics), th.zeros(()))
        for optimizer in self.critic_optimizers:
            optimizer.zero_grad()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.critic_optimizers:
            optimizer.step()
        losses["critic"] = critic_loss.item()
        if self.updates % self.policy_delay == 0:
            policy_actions = self.actor(observations)
            values = self.critics[0](observations, policy_actions)
            weight = self.alpha / values.abs().mean().detach()
            actor_loss = -weight * values.mean() + F.mse_loss(policy_actions, actions)
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            losses["actor"] = actor_loss.item()
            networks = [(self.actor, self.actor_target), *zip(self.critics, self.critic_targets, strict=True)]
            for network, target in networks:
                self.follow(network, target)
        return losses

    def follow(self, network: nn.Module, target: nn.Module) -> None:
        for parameter, target_parameter in zip(network.parameters(), target.parameters(), strict=True):
            target_parameter.data.copy_(self.tau * parameter.data + (1 - self.tau) * target_parameter.data)
