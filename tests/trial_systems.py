"""A small system for trials, and policies for it."""

import os
import signal
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ENV = "tests.trial_systems:Tank-v0"
STEADY, BETTER, WORSE = (f"tests.trial_systems:{name}" for name in ("steady", "better", "worse"))


class Tank(gym.Env[np.ndarray, np.ndarray]):
    """
    A tank whose level shall be at 1; the action is the inflow. Its info has the energy, the level and the season.

    :param steps: Of an episode
    :param forgets: Key of the info that is left out, ...
    :param after: ... from this step on
    :param breaks_at: Step in which the environment raises an error
    :param pause: Seconds that a step takes
    :param shares_state: Whether it returns the array that it keeps its state in
    :param interrupted_at: Number of the step of all episodes in which somebody presses Ctrl-C
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(
        self, steps: int = 20, forgets: str | None = None, after: int = 0, breaks_at: int | None = None, pause: float = 0.0,
        interrupted_at: int | None = None, shares_state: bool = False,
    ) -> None:  # fmt: skip
        self.steps, self.forgets, self.after, self.breaks_at = steps, forgets, after, breaks_at
        self.pause, self.interrupted_at, self.all_steps = pause, interrupted_at, 0
        self.shares_state, self.state = shares_state, np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.level, self.step_number = float(self.np_random.uniform(0, 0.5)), 0
        self.state = np.array([self.level, 0.0])
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.step_number == self.breaks_at:
            raise RuntimeError("the pump is gone")
        self.all_steps += 1
        if self.all_steps == self.interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(self.pause)
        if self.shares_state:
            self.level = float(self.state[0])
        inflow = float(action[0])
        self.level += 0.3 * inflow + float(self.np_random.normal(0, 0.02))
        self.step_number += 1
        season = "winter" if self.step_number < 8 else "summer"
        info: dict[str, Any] = {"energy": abs(inflow), "level": self.level, "season": season}
        if self.forgets is not None and self.step_number > self.after:
            info.pop(self.forgets)
        reward = -abs(self.level - 1)
        self.state = np.array([self.level, inflow])
        return self.state, reward, False, self.step_number >= self.steps, info


gym.register("Tank-v0", entry_point=Tank)


def steady(observation: np.ndarray) -> np.ndarray:
    """Slow."""
    return np.array([0.5 * (1 - observation[0])])


def better(observation: np.ndarray) -> np.ndarray:
    """Fast."""
    return np.array([2.0 * (1 - observation[0])])


def worse(observation: np.ndarray) -> np.ndarray:
    """Does nothing."""
    return np.zeros(1)


def overflowing(observation: np.ndarray) -> np.ndarray:
    """Fills the tank and goes on."""
    return np.ones(1)


def silent_after_a_while(observation: np.ndarray) -> np.ndarray:
    """Has no number for high levels."""
    return np.array([1.0 if observation[0] < 1 else np.nan])


def failing_after_a_while(observation: np.ndarray) -> np.ndarray:
    """Raises an error for high levels."""
    if observation[0] > 1:
        raise ZeroDivisionError("division by zero")
    return np.ones(1)


def two_valves(observation: np.ndarray) -> np.ndarray:
    """Was made for another tank."""
    return np.zeros(2)


def exiting_after_a_while(observation: np.ndarray) -> np.ndarray:
    """Ends the process for high levels."""
    if observation[0] > 1:
        raise SystemExit(3)
    return np.ones(1)


def scribbling(observation: np.ndarray) -> np.ndarray:
    """Writes into what it gets."""
    observation *= 0
    return np.zeros(1)


class Unready:
    """Cannot begin an episode."""

    def reset(self) -> None:
        raise RuntimeError("no connection")

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        return np.zeros(1)
