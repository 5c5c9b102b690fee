"""One episode of a policy in an environment, as it is or perturbed."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_offline_ft.common.observations import Observations, map_observations
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.controllers import Controller, check_fits, load_controller
from sb3_offline_ft.evaluation.robustness.perturbations import Conditions, Env, find_perturbation
from sb3_offline_ft.evaluation.robustness.result import RETURN

_DISTURBANCE_STREAM = 1
AGGREGATES: dict[str, Callable[[list[float]], Any]] = {
    "sum": np.sum, "mean": np.mean, "min": np.min, "max": np.max, "last": lambda values: values[-1],
}  # fmt: skip
"""What can be made of a metric's values at all steps of an episode."""


@dataclass(frozen=True)
class InfoMetric:
    """
    A number that an environment gives in ``info`` at each step.

    :param name: What it is called
    :param key: Its key
    :param aggregate: What is made of the values of an episode, one of ``AGGREGATES``
    """

    name: str
    key: str
    aggregate: str = "sum"

    def __post_init__(self) -> None:
        if self.name == RETURN:
            raise ValueError(f"A metric cannot be called {RETURN!r}, as the sum of the rewards is.")
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"Unknown aggregate {self.aggregate!r} of {self.name}. {suggestion(self.aggregate, AGGREGATES)}")

    @classmethod
    def parse(cls, text: str) -> "InfoMetric":
        """
        :param text: ``name=info.key`` or ``name=info.key:aggregate``
        :raises ValueError: It has another form
        """
        name, equals, source = text.partition("=")
        key, _, aggregate = source.partition(":")
        if not name or not equals or not key.removeprefix("info."):
            raise ValueError(f"A metric is given as name=info.key:aggregate, such as energy=info.energy:sum, found {text!r}.")
        return cls(name, key.removeprefix("info."), aggregate or "sum")


@dataclass(frozen=True)
class Setting:
    """What all episodes have in common, in a form that other processes get."""

    env_id: str
    env_kwargs: Mapping[str, Any]
    specs: Mapping[str, str]
    metrics: tuple[InfoMetric, ...]
    seed: int
    device: str
    safe_load: bool = False


@dataclass(frozen=True)
class Job:
    """One episode; without a perturbation it is a nominal one."""

    role: str
    number: int
    perturbation: str | None = None
    level: float | None = None

    def in_words(self) -> str:
        """For messages."""
        changed = "nothing changed" if self.perturbation is None else f"{self.perturbation} {self.level:g}"
        return f"the {self.role}, with {changed}, in episode {self.number}"


@dataclass(frozen=True)
class Outcome:
    """What came of an episode; of nominal ones the observations are told, in rows."""

    values: dict[str, float]
    observations: Observations | None


class Stage:
    """An environment with the policies that may act in it; episodes leave nothing behind."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.env = make_env(setting.env_id, setting.env_kwargs)
        self.controllers = {
            role: load_controller(
                spec,
                setting.env_id,
                action_space=self.env.action_space,
                device=setting.device,
                safe_load=setting.safe_load,
            )
            for role, spec in setting.specs.items()
        }
        for controller in self.controllers.values():
            check_fits(controller, self.env)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def play(self, job: Job, spread: Observations | None) -> Outcome:
        """Run one episode; perturbed ones need to know the spread of each sensor."""
        with ExitStack() as stack:
            env = self.env
            if job.perturbation is not None:
                assert job.level is not None and spread is not None
                conditions = Conditions(derive_seed(self._seed(job), _DISTURBANCE_STREAM), spread)
                perturbation = find_perturbation(job.perturbation, env)
                env = stack.enter_context(perturbation.applied(env, job.level, conditions))
            return self._episode(env, self.controllers[job.role], job)

    def _seed(self, job: Job) -> int:
        return derive_seed(self.setting.seed, job.number)

    def _episode(self, env: Env, controller: Controller, job: Job) -> Outcome:
        seed = self._seed(job)
        rewards, infos, seen = list[float](), list[dict[str, Any]](), list[Any]()
        observation, _ = env.reset(seed=seed)
        self._asked(controller.reset, seed, job)
        ended = False
        while not ended:
            seen.append(map_observations(np.array, observation))
            action = self._action(controller, observation, job)
            observation, reward, terminated, truncated, info = env.step(action)
            rewards.append(float(reward))
            infos.append({metric.key: self._value(metric, info) for metric in self.setting.metrics})
            ended = bool(terminated or truncated)
        values = {RETURN: math.fsum(rewards) if np.isfinite(rewards).all() else math.nan}
        for metric in self.setting.metrics:
            values[metric.name] = float(AGGREGATES[metric.aggregate]([info[metric.key] for info in infos]))
        is_nominal = job.perturbation is None
        return Outcome(values, map_observations(lambda *rows: np.stack(rows), *seen) if is_nominal else None)

    def _action(self, controller: Controller, observation: Any, job: Job) -> Any:
        action, space = self._asked(controller.act, observation, job), self.env.action_space
        if not isinstance(space, spaces.Box):
            return action
        action = self._asked(lambda given: np.asarray(given, np.float64), action, job)
        if action.shape == () and math.prod(space.shape) == 1:
            action = action.reshape(space.shape)
        if action.shape != space.shape or not np.isfinite(action).all():
            raise ValueError(
                f"The action of {job.in_words()} is {action}: expected finite numbers of shape {space.shape}, within {space}."
            )
        return np.clip(action, space.low, space.high).astype(space.dtype)

    def _asked(self, function: Callable[[Any], Any], argument: Any, job: Job) -> Any:
        try:
            return function(argument)
        except Exception as error:
            raise ValueError(f"An error in {job.in_words()} ({type(error).__name__}: {error}).") from error

    def _value(self, metric: InfoMetric, info: dict[str, Any]) -> float:
        if metric.key not in info:
            raise ValueError(
                f"The environment {self.setting.env_id} gives no info {metric.key!r} for the metric {metric.name!r}. "
                f"{suggestion(metric.key, list(info) or ['none'])}"
            )
        return float(info[metric.key])


def make_env(env_id: str, env_kwargs: Mapping[str, Any]) -> Env:
    """
    :raises ValueError: There is no such environment, or it cannot be made
    """
    try:
        return gym.make(env_id, **env_kwargs)
    # Environments of users raise anything
    except Exception as error:
        raise ValueError(f"Cannot make the environment {env_id!r} ({type(error).__name__}: {error}).") from error
