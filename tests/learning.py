"""Whether a policy has learned something, as a statistical test."""

import gymnasium as gym
import numpy as np
from scipy import stats
from stable_baselines3.common.base_class import BaseAlgorithm

RANDOM_RETURN = -1309.0
"""Mean return of random actions on Pendulum-v1: that of the package's table of reference scores."""


def pendulum_returns(model: BaseAlgorithm, n_episodes: int = 10) -> np.ndarray:
    """Returns of the policy on Pendulum-v1 from different first states."""
    env, returns = gym.make("Pendulum-v1"), []
    for seed in range(n_episodes):
        observation, _ = env.reset(seed=seed)
        rewards, truncated = [], False
        while not truncated:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, _, truncated, _ = env.step(action)
            rewards.append(float(reward))
        returns.append(sum(rewards))
    return np.array(returns)


def p_value_of_no_better_than_random(model: BaseAlgorithm) -> float:
    """
    One-sided t-test over episodes against the mean return of random actions.

    For a policy that is no better, a test that asks for less than 0.01 passes with a probability of at most 0.01. The states
    and the learner's seeds are fixed, so that a test that has passed goes on to pass.
    """
    return float(stats.ttest_1samp(pendulum_returns(model), RANDOM_RETURN, alternative="greater").pvalue)
