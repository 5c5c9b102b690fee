"""Several sources with weights, filters on episodes, and Dict observations. About 1 minute."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import TD3BC, OfflineDataset, load_dataset


def as_dict(observations: np.ndarray) -> dict[str, np.ndarray]:
    """Of one observation, or of a column of them."""
    return {"direction": observations[..., :2], "velocity": observations[..., 2:]}


class DictPendulum(gym.ObservationWrapper):
    """Pendulum-v1 with a dictionary in place of a vector."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.observation_space = spaces.Dict({"direction": spaces.Box(-1, 1, (2,)), "velocity": spaces.Box(-8, 8, (1,))})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return as_dict(observation)


def source(spec: str, name: str) -> OfflineDataset:
    data = load_dataset(spec)
    return OfflineDataset.from_columns(
        observations=as_dict(data.observations),
        actions=data.actions,
        rewards=data.rewards,
        next_observations=as_dict(data.next_observations),
        terminations=data.terminations,
        truncations=data.truncations,
        episode_starts=data.episode_starts,
        name=name,
    )


# The best fifth of the episodes and the rest: two thirds of the offline rows of a batch come from the best
best = source("bundled:pendulum-medium?top_fraction=0.2", "best")
rest = source("bundled:pendulum-medium?max_return=-800", "rest")
data = OfflineDataset.concatenate([best, rest], weights=[2, 1])
for part in data.sources:
    returns = data.episode_returns[(data.episode_starts >= part.begin) & (data.episode_starts < part.end)]
    print(f"{part.name}: {part.end - part.begin:,} rows, weight {part.weight:.2f}, mean return {returns.mean():.0f}")

model = TD3BC("MultiInputPolicy", DictPendulum(), dataset=data, gamma=0.98, learning_rate=1e-3, seed=0)
model.pretrain(5_000)
print("rows drawn:", model.replay_buffer.sampled_rows_by_source())
mean, std = evaluate_policy(model, Monitor(DictPendulum()), n_eval_episodes=20)
print(f"mean return {mean:.0f}, standard deviation {std:.0f}")
