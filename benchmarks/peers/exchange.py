"""
What a command needs that is a method of a study: the request, the data, the measured evaluations, and the result.

Needs NumPy and Gymnasium only, so that it can be copied into any environment. A command is given the path of a request as its
last argument:

    exchange = Exchange.from_command_line()
    env = exchange.make_env()                       # records its episodes
    ... learn from exchange.dataset() ...
    exchange.measure(act)                           # before the first interaction
    ... after each interaction with env: exchange.measure_if_due(act) ...
    exchange.finish(algorithm="...", hyperparams={...}, packages=["d3rlpy"], offline_updates=..., online_updates=...)
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

Act = Callable[[np.ndarray], np.ndarray]
"""Gives the deterministic action for an observation."""
VERSION = 1


class Recorded(gym.Wrapper):
    """An environment that notes the ends and returns of its episodes."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.n_steps, self._return = 0, 0.0
        self.ends: list[int] = []
        self.returns: list[float] = []

    def reset(self, **kwargs: Any) -> Any:
        self._return = 0.0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.n_steps += 1
        self._return += float(reward)
        if terminated or truncated:
            self.ends.append(self.n_steps)
            self.returns.append(self._return)
        return observation, reward, terminated, truncated, info


class Exchange:
    """
    :param request: The path of a request
    """

    def __init__(self, request: str | Path) -> None:
        self.request: dict[str, Any] = json.loads(Path(request).read_text())
        if self.request["version"] != VERSION:
            sys.exit(
                f"{request} has version {self.request['version']}, expected {VERSION}: take the exchange.py of that version."
            )
        self.seed: int = self.request["seed"]
        self.interactions: int = self.request["interactions"]
        self.options: dict[str, Any] = self.request["options"]
        plan = self.request["evaluation"]
        self._every, self._episodes, self._evaluation_seed = plan["every"], plan["episodes"], plan["seed"]
        self._measured: gym.Env | None = None
        self.env: Recorded | None = None
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []
        self.lengths: list[list[int]] = []
        self._clock, self._told, self._seconds = time.monotonic(), 0.0, {"preparation": 0.0, "finetuning": 0.0}

    @classmethod
    def from_command_line(cls) -> "Exchange":
        parser = argparse.ArgumentParser(description="A method of a study, which is run by `sb3-offline-ft study run`.")
        parser.add_argument("request", help="the file in which the study says what is to be done")
        return cls(parser.parse_args().request)

    def dataset(self) -> dict[str, np.ndarray]:
        """The data: rows of observations, actions, rewards, next_observations, terminations and truncations, and the index
        of the row in which each episode begins, ``episode_starts``."""
        with np.load(self.request["dataset"]) as file:
            return {name: file[name] for name in file.files}

    def make_env(self) -> Recorded:
        """The environment to learn in, with the seed of the run."""
        self.env = Recorded(gym.make(self.request["env"]))
        self.env.reset(seed=self.seed)
        self.env.action_space.seed(self.seed)
        return self.env

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell the study how far the run is, at most five times a second."""
        if time.monotonic() - self._told > 0.2 or done == total:
            self._told = time.monotonic()
            print(json.dumps({"phase": phase, "done": done, "total": total}), flush=True)

    def measure(self, act: Act) -> None:
        """Evaluate after as many interactions as there have been, in an environment that nobody learns from."""
        if self._measured is None:
            self._seconds["preparation"], self._clock = time.monotonic() - self._clock, time.monotonic()
            self._measured = gym.make(self.request["env"])
        returns, lengths = [], []
        # Seeded once, and reset after the last episode too, so that all methods are measured in the same episodes
        observation, _ = self._measured.reset(seed=None if self.timesteps else self._evaluation_seed)
        for _ in range(self._episodes):
            total, length, ended = 0.0, 0, False
            while not ended:
                observation, reward, terminated, truncated, _ = self._measured.step(act(observation))
                total, length, ended = total + float(reward), length + 1, terminated or truncated
            returns.append(total)
            lengths.append(length)
            observation, _ = self._measured.reset()
        self.timesteps.append(0 if not self.timesteps else self.timesteps[-1] + self._every)
        self.returns.append(returns)
        self.lengths.append(lengths)

    def measure_if_due(self, act: Act) -> None:
        """To be called after each interaction."""
        assert self.env is not None
        now = min(self.env.n_steps, self.interactions)
        self.progress("finetuning", now, self.interactions)
        if now >= self.timesteps[-1] + self._every:
            self.measure(act)

    def finish(
        self,
        algorithm: str,
        hyperparams: dict[str, Any],
        packages: list[str],
        offline_updates: int,
        online_updates: int,
        frozen_until: int = -1,
    ) -> None:
        """
        Write the result.

        :param algorithm: What learned
        :param hyperparams: How, as the objects say that did
        :param packages: Names of the packages whose versions count
        :param offline_updates: Gradient steps of the critic before the first interaction
        :param online_updates: The same since then
        :param frozen_until: Interactions in which the pretrained policy acted as it was; -1 if there were none
        """
        assert self.env is not None
        self._seconds["finetuning"] = time.monotonic() - self._clock
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "gymnasium", *packages)}
        result = {
            "timesteps": self.timesteps,
            "returns": self.returns,
            "lengths": self.lengths,
            "training_timesteps": self.env.ends,
            "training_returns": self.env.returns,
            "algorithm": algorithm,
            "hyperparams": json.loads(json.dumps(hyperparams, default=str)),
            "versions": versions,
            "frozen_until": frozen_until,
            "interactions": self.env.n_steps,
            "updates": {"offline": offline_updates, "online": online_updates},
            "seconds": self._seconds,
        }
        path = Path(self.request["result"])
        path.with_suffix(".part").write_text(json.dumps(result, allow_nan=False))
        os.replace(path.with_suffix(".part"), path)
