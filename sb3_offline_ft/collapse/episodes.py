"""Episodes of a run as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback

WITHIN_FREQ = 5
"""Steps between two looks at a running episode."""


@dataclass(frozen=True)
class Episode:
    """A finished training episode."""

    total: float
    length: int
    rewards: list[float]
    counts: bool
    """Whether the policy acted in it, and in all of it."""


class RunningEpisodes:
    """
    The running training episodes, one an environment.

    :param n_envs: Number of environments
    :param are_whole: Whether they begin now
    :param random: Whether their actions are random ones, not the policy's
    :param keep_rewards: Whether single rewards are asked for
    """

    def __init__(self, n_envs: int, are_whole: bool, random: bool, keep_rewards: bool) -> None:
        self._keep_rewards = keep_rewards
        self._returns = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(n_envs)]
        self._ignored = np.full(n_envs, not are_whole)
        self._random = np.full(n_envs, random)

    def add(self, rewards: np.ndarray) -> None:
        self._returns += rewards
        self._lengths += 1
        if self._keep_rewards:
            for so_far, reward in zip(self._rewards, rewards, strict=True):
                so_far.append(float(reward))

    def to_look_at(self, dones: np.ndarray) -> Iterator[tuple[int, list[float]]]:
        """Environments whose episode goes on and is to be looked at now, with its rewards so far."""
        for index, rewards in enumerate(self._rewards):
            if not dones[index] and not self._ignored[index] and len(rewards) % WITHIN_FREQ == 0:
                yield index, rewards

    def finish(self, index: int, next_is_random: bool) -> Episode:
        counts = not (self._ignored[index] or self._random[index])
        episode = Episode(float(self._returns[index]), int(self._lengths[index]), self._rewards[index], counts)
        self._returns[index] = self._lengths[index] = 0
        self._rewards[index] = []
        self._ignored[index] = False
        self._random[index] = next_is_random
        return episode

    def ignore(self, only_begun: bool = False) -> None:
        """Do not count the episodes that are running, or only those of which there has been a step."""
        self._ignored |= self._lengths > 0 if only_begun else True


class EvaluationEpisodes:
    """
    Returns of the episodes of evaluations from now on.

    :param evaluations: Callbacks that keep their returns
    """

    def __init__(self, evaluations: Sequence[EvalCallback]) -> None:
        self._evaluations = evaluations
        self._seen = [len(evaluation.evaluations_results) for evaluation in evaluations]

    def new(self) -> Iterator[float]:
        for number, evaluation in enumerate(self._evaluations):
            results: list[Any] = evaluation.evaluations_results[self._seen[number] :]
            self._seen[number] += len(results)
            for returns in results:
                yield from np.ravel(returns).tolist()
