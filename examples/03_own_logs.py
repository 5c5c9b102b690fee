"""Logs of a hand-written controller (a CSV file) become a dataset, the dataset becomes a policy. About 1 minute."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import TD3BC
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.tables import read_tables

env = gym.make("Pendulum-v1")
generator = np.random.default_rng(0)


def controller(observation: np.ndarray) -> np.ndarray:
    """Pumps energy until the pendulum is nearly upright, then holds it; noise shows more than one action for a state."""
    cosine, sine, velocity = observation
    angle, energy = np.arctan2(sine, cosine), velocity**2 / 6 + 5 * (cosine - 1)
    torque = -10 * angle - 2 * velocity if cosine > 0.9 else -2 * np.sign(velocity) * np.sign(energy)
    return np.clip([torque + generator.normal(0, 0.5)], -2, 2).astype(np.float32)


# Your own logs exist already. One row is one step; the columns may have any names and any order.
rows = []
for episode in range(50):
    observation, _ = env.reset(seed=episode)
    for step in range(200):
        action = controller(observation)
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append([episode, step, *observation, *action, float(reward), *after, terminated, truncated])
        observation = after
names = "run t cos sin velocity torque reward next_cos next_sin next_velocity fell time_limit".split()
pd.DataFrame(rows, columns=names).to_csv("logs.csv", index=False)

data = read_tables(
    [Path("logs.csv")],
    ColumnMap(
        observations=("cos", "sin", "velocity"),
        next_observations=("next_cos", "next_sin", "next_velocity"),
        actions=("torque",),
        reward="reward",
        terminated="fell",  # the task itself ended
        truncated="time_limit",  # something from outside ended the episode
        episode="run",
        time="t",
    ),
    action_space=env.action_space,
    name="controller",
)
print(data)

model = TD3BC("MlpPolicy", "Pendulum-v1", dataset=data, gamma=0.98, learning_rate=1e-3, seed=0)
model.pretrain(5_000)
mean, std = evaluate_policy(model, Monitor(env), n_eval_episodes=20)
print(f"Controller: mean return {data.episode_returns.mean():.0f}. Policy: {mean:.0f}, standard deviation {std:.0f}")
