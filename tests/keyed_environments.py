"""Environments with Dict observations, and recordings of them."""

import gc
import warnings
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces

WIDE = spaces.Box(-100, 100, (1,))


class Keyed(gym.Env[Any, Any]):
    """Shows a number for each element of its space, all different: 1, 2, ... in the order of the keys, and the step behind."""

    def __init__(self, space: spaces.Dict | None = None) -> None:
        self.observation_space = spaces.Dict(position=WIDE, goal=WIDE) if space is None else space
        self.action_space = spaces.Box(-1, 1, (1,))

    def _numbers(self, space: spaces.Space[Any], begin: int) -> tuple[Any, int]:
        if isinstance(space, spaces.Dict):
            values = {}
            for key, one in space.spaces.items():
                values[key], begin = self._numbers(one, begin)
            return values, begin
        if isinstance(space, spaces.Discrete):
            return np.int64((begin + self.step_number) % space.n), begin + 1
        size = int(np.prod(space.shape))
        return (begin + np.arange(size) + self.step_number / 16).reshape(space.shape).astype(space.dtype), begin + size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number = 0
        return self._numbers(self.observation_space, 1)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        return self._numbers(self.observation_space, 1)[0], 1.0, self.step_number == 4, False, {}


class KeyedGoals(Keyed):
    """With the keys of an environment with goals."""

    def __init__(self) -> None:
        super().__init__(spaces.Dict(observation=WIDE, desired_goal=WIDE, achieved_goal=WIDE))


gym.register("Keyed-v0", f"{__name__}:Keyed", max_episode_steps=100)
gym.register("KeyedGoals-v0", f"{__name__}:KeyedGoals")


def record(env: gym.Env[Any, Any], dataset_id: str, episodes: int = 3) -> None:
    """Records random actions with Minari."""
    collector = minari.DataCollector(env, jpeg_encoding=False)
    collector.action_space.seed(0)
    for _ in range(episodes):
        collector.reset(seed=0, options={"minari_autoseed": False})
        while not any(collector.step(collector.action_space.sample())[2:4]):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.create_dataset(dataset_id)
        del collector
        gc.collect()
