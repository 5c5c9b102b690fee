"""Training episodes as they come."""

from dataclasses import dataclass

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

WITHIN_FREQ = 5
"""Steps between two looks at a running episode."""


@dataclass(frozen=True)
class Episode:
    """A finished episode; it counts if the policy acted in it, from its beginning."""

    total: float
    length: int
    rewards: list[float]
    counts: bool


class RunningEpisodes:
    """The running episodes of a learner's environments, whose single rewards are only kept where they are asked for."""

    def __init__(self, model: OffPolicyAlgorithm, keep_rewards: bool) -> None:
        self._model, self._keep_rewards = model, keep_rewards
        self._returns = np.zeros(model.n_envs)
        self._lengths = np.zeros(model.n_envs, dtype=np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(model.n_envs)]
        # An episode that was running before the guard came is not a whole one
        self._ignored = np.full(model.n_envs, model.num_timesteps > 0)
        self._random = np.full(model.n_envs, self._acts_randomly())

    def _acts_randomly(self) -> bool:
        return self._model.num_timesteps < self._model.learning_starts

    def add(self, rewards: np.ndarray) -> None:
        self._returns += rewards
        self._lengths += 1
        for so_far, reward in zip(self._rewards, rewards, strict=True) if self._keep_rewards else ():
            so_far.append(float(reward))

    def to_look_at(self, dones: np.ndarray) -> list[tuple[int, list[float]]]:
        """Environments whose episode goes on and is to be looked at now, with its rewards so far."""
        chosen = ~(np.asarray(dones, bool) | self._ignored) & (self._lengths % WITHIN_FREQ == 0)
        return [(index, self._rewards[index]) for index in np.flatnonzero(chosen).tolist()]

    def finish(self, index: int) -> Episode:
        counts = not (self._ignored[index] or self._random[index])
        episode = Episode(float(self._returns[index]), int(self._lengths[index]), self._rewards[index], counts)
        self._returns[index] = self._lengths[index] = 0
        self._rewards[index] = []
        self._ignored[index] = False
        # The next episode's first action has been chosen when `num_timesteps` was what it is now
        self._random[index] = self._acts_randomly()
        return episode

    def ignore(self, only_begun: bool = False) -> None:
        """Do not count the episodes that are running, or only those of which there has been a step."""
        self._ignored |= self._lengths > 0 if only_begun else True
