"""What can be changed in an environment, by how much, and how it is put back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_offline_ft.common.observations import Observations, by_key, kind_of, map_observations
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.evaluation.robustness import wrappers

Env = gym.Env[Any, Any]
Applied = AbstractContextManager[Env]
ATTRIBUTE = "attribute."
FACTORS = (0.5, 0.7, 0.85, 1.15, 1.3, 1.5)


@dataclass(frozen=True)
class Conditions:
    """
    What a perturbation may need to know of an episode.

    :param seed: Seed of what it draws
    :param spread: Standard deviation of each number of an observation in nominal episodes, in the shapes of an observation
    """

    seed: int
    spread: Observations


@dataclass(frozen=True)
class Perturbation(ABC):
    """
    One thing that is changed.

    :param name: Its name
    :param what: What its level is, in words
    :param nominal: The level that changes nothing
    :param levels: Those that are tried if none are named
    :param least: The smallest level that makes sense
    :param most: The largest one
    :param is_whole: Whether levels are whole numbers
    """

    name: str
    what: str
    nominal: float
    levels: tuple[float, ...]
    least: float = 0.0
    most: float = math.inf
    is_whole: bool = False

    @abstractmethod
    def fits(self, env: Env) -> bool:
        """Whether the environment has what is changed."""

    @abstractmethod
    def applied(self, env: Env, level: float, conditions: Conditions) -> Applied:
        """
        Change an environment for the duration of a ``with`` block, in which episodes begin with a reset.

        :param env: The environment
        :param level: By how much
        :param conditions: Of the episode
        :return: The context manager, whose value is the environment to use
        """

    def check_level(self, level: float) -> float:
        """
        :return: The level
        :raises ValueError: It makes no sense
        """
        if not self.least <= level <= self.most or not math.isfinite(level) or (self.is_whole and level != int(level)):
            kind = "whole number" if self.is_whole else "finite number"
            bounds = f"{kind} from {self.least:g} to {self.most:g}"
            raise ValueError(f"A level of {self.name} must be a {bounds} ({self.what}), found {level:g}.")
        return float(level)


@dataclass(frozen=True)
class Scaling(Perturbation):
    """
    Numbers of MuJoCo's model, or an attribute of another environment, are multiplied.

    :param fields: Arrays of MuJoCo's model
    :param attribute: Attribute of environments without such a model
    """

    fields: tuple[str, ...] = ()
    attribute: str = ""

    def fits(self, env: Env) -> bool:
        return any(np.any(getattr(owner, field)) for owner, field in self._parts(env))

    def _parts(self, env: Env) -> list[tuple[Any, str]]:
        """The objects with the attributes of theirs that are multiplied."""
        model = mujoco_model(env)
        if model is not None and self.fields:
            return [(model.opt if field == "gravity" else model, field) for field in self.fields]
        return [(env.unwrapped, self.attribute)] if self.attribute in numbers_of(env) else []

    def applied(self, env: Env, level: float, conditions: Conditions) -> Applied:
        """As declared."""
        return self._multiplied(env, level)

    @contextmanager
    def _multiplied(self, env: Env, level: float) -> Iterator[Env]:
        parts = self._parts(env)
        before = [np.copy(getattr(owner, field)) for owner, field in parts]
        try:
            self._write(env, parts, [level * value for value in before])
            yield env
        finally:
            self._write(env, parts, before)

    def _write(self, env: Env, parts: list[tuple[Any, str]], values: list[Any]) -> None:
        model = mujoco_model(env)
        for (owner, field), value in zip(parts, values, strict=True):
            if owner is env.unwrapped:
                setattr(owner, field, value.item())
            else:
                getattr(owner, field)[:] = value
        if model is not None:
            import mujoco

            # What MuJoCo derives from these numbers
            mujoco.mj_setConst(model, mujoco.MjData(model))


@dataclass(frozen=True)
class Wrapping(Perturbation):
    """
    The environment gets a wrapper.

    :param wrap: Makes it of the environment, the level and the conditions
    :param needs: Says whether an environment has what is wrapped
    """

    wrap: Callable[[Env, float, Conditions], Env] = lambda env, level, conditions: env
    needs: Callable[[Env], bool] = lambda env: True

    def fits(self, env: Env) -> bool:
        return self.needs(env)

    def applied(self, env: Env, level: float, conditions: Conditions) -> Applied:
        """As declared."""
        return nullcontext(self.wrap(env, level, conditions))


@dataclass(frozen=True)
class Wind(Perturbation):
    """A constant force, in MuJoCo."""

    def fits(self, env: Env) -> bool:
        model = mujoco_model(env)
        return model is not None and model.nv > 0

    @contextmanager
    def applied(self, env: Env, level: float, conditions: Conditions) -> Iterator[Env]:
        """As declared."""
        windy = wrappers.ConstantForce(env, level)
        try:
            yield windy
        finally:
            windy.push(0.0)


class FirstStates(Scaling):
    """The range that an environment draws its first states from."""

    def fits(self, env: Env) -> bool:
        return super().fits(env) or _draws_as_pendulum(env)

    def applied(self, env: Env, level: float, conditions: Conditions) -> Applied:
        """As declared."""
        if _draws_as_pendulum(env):
            return nullcontext(wrappers.WiderStart(env, level))
        return super().applied(env, level, conditions)


def mujoco_model(env: Env) -> Any:
    """The model of a MuJoCo environment; None for others."""
    model = getattr(env.unwrapped, "model", None)
    return model if type(model).__name__ == "MjModel" else None


def _draws_as_pendulum(env: Env) -> bool:
    from gymnasium.envs.classic_control import PendulumEnv

    return isinstance(env.unwrapped, PendulumEnv)


def _has_actions(env: Env) -> bool:
    return isinstance(env.action_space, spaces.Box) and env.action_space.is_bounded()


def _has_sensors(env: Env) -> bool:
    return all(kind_of(space) == "vector" for space in by_key(env.observation_space).values())


def _shares(spread: Observations, share: float) -> Any:
    return map_observations(lambda each: share * each, spread)


def _factor(name: str, what: str, fields: tuple[str, ...] = (), attribute: str = "", **limits: Any) -> Scaling:
    return Scaling(name, what, 1.0, limits.pop("levels", FACTORS), fields=fields, attribute=attribute, **limits)


class _Actuators(Scaling):
    """Those of MuJoCo that are no muscles, which have other numbers in these arrays."""

    def fits(self, env: Env) -> bool:
        model = mujoco_model(env)
        return model is not None and model.nu > 0 and set(model.actuator_gaintype.tolist()) <= {0, 1}


_ALL: tuple[Perturbation, ...] = (
    _factor("mass", "times the masses and inertias of all bodies", ("body_mass", "body_inertia"), "m"),
    _factor("friction", "times the friction of all surfaces", ("geom_friction", "pair_friction")),
    _factor("gravity", "times gravity", ("gravity",), "g"),
    _factor("damping", "times the damping of all joints", ("dof_damping",)),
    _factor("length", "times the length of the pendulum", attribute="l"),
    _factor("max_torque", "times the largest torque", attribute="max_torque", levels=(0.3, 0.5, 0.7, 0.85), most=1.0),
    _Actuators(
        "actuator_gain", "times the forces of all actuators", 1.0, FACTORS, fields=("actuator_gainprm", "actuator_biasprm")
    ),
    Wind("wind", "constant force along x, in weights of all bodies", 0.0, (-0.1, -0.05, 0.05, 0.1), least=-math.inf),
    # The argument `reset_noise_scale` of Gymnasium's MuJoCo environments
    FirstStates("initial_state", "times the range of the first states", 1.0, (2.0, 4.0, 8.0), attribute="_reset_noise_scale"),
    Wrapping(
        "random_start", "random actions at the beginning", 0.0, (5.0, 10.0, 20.0), is_whole=True, needs=_has_actions,
        wrap=lambda env, level, its: wrappers.RandomStart(env, level, its.seed),
    ),
    Wrapping(
        "delay", "steps until an action takes effect", 0.0, (1.0, 2.0, 3.0, 5.0), is_whole=True, needs=_has_actions,
        wrap=lambda env, level, _: wrappers.ActionDelay(env, level),
    ),
    Wrapping(
        "dead_zone", "share of half the range in which actions do nothing", 0.0, (0.05, 0.1, 0.2, 0.3), most=1.0,
        needs=_has_actions, wrap=lambda env, level, _: wrappers.DeadZone(env, level),
    ),
    Wrapping(
        "action_gain", "times the actions, within their bounds", 1.0, FACTORS, needs=_has_actions,
        wrap=lambda env, level, _: wrappers.ActionGain(env, level),
    ),
    Wrapping(
        "sensor_noise", "standard deviation of noise, in those of the sensors", 0.0, (0.02, 0.05, 0.1, 0.2, 0.5),
        needs=_has_sensors, wrap=lambda env, level, its: wrappers.SensorNoise(env, _shares(its.spread, level), its.seed),
    ),
    Wrapping(
        "sensor_bias", "too large by so many standard deviations of the sensors", 0.0, (-0.2, -0.1, 0.1, 0.2), least=-math.inf,
        needs=_has_sensors, wrap=lambda env, level, its: wrappers.SensorBias(env, _shares(its.spread, level)),
    ),
    Wrapping(
        "sensor_holds", "probability that a sensor shows its last value", 0.0, (0.05, 0.1, 0.2, 0.4), most=1.0,
        needs=_has_sensors, wrap=lambda env, level, its: wrappers.SensorDropOut(env, level, True, its.seed),
    ),
    Wrapping(
        "sensor_zero", "probability that a sensor shows zero", 0.0, (0.05, 0.1, 0.2, 0.4), most=1.0,
        needs=_has_sensors, wrap=lambda env, level, its: wrappers.SensorDropOut(env, level, False, its.seed),
    ),
)  # fmt: skip
PERTURBATIONS = {each.name: each for each in _ALL}
"""All by name; beside them ``attribute.NAME`` multiplies a number that the environment has under this name."""


def find_perturbation(name: str, env: Env) -> Perturbation:
    """
    :param name: One of ``PERTURBATIONS``, or ``attribute.`` and the name of a number that the environment has
    :param env: The environment
    :return: What it is
    :raises ValueError: There is none of this name, or not in this environment
    """
    found: Perturbation | None = PERTURBATIONS.get(name)
    numbers = [name for name in numbers_of(env) if not name.startswith("_")]
    if found is None and name.startswith(ATTRIBUTE):
        attribute = name.removeprefix(ATTRIBUTE)
        if attribute not in numbers:
            raise ValueError(f"{_called(env)} has no number {attribute!r}. {suggestion(attribute, numbers or ['none'])}")
        return _factor(name, f"times {attribute}", attribute=attribute, least=-math.inf)
    if found is None:
        raise ValueError(f"Unknown perturbation {name!r}. {suggestion(name, [*PERTURBATIONS, f'{ATTRIBUTE}<name>'])}")
    if not found.fits(env):
        there = ", ".join([*possible(env), *(f"{ATTRIBUTE}{each}" for each in numbers)])
        raise ValueError(f"{_called(env)} has no {name} that could be changed: it has {there}.")
    return found


def possible(env: Env) -> list[str]:
    """Names of the perturbations that an environment has."""
    return [name for name, each in PERTURBATIONS.items() if each.fits(env)]


def numbers_of(env: Env) -> list[str]:
    """Names of the numbers that an environment has as attributes."""
    values = vars(env.unwrapped).items()
    return sorted(name for name, value in values if isinstance(value, Real) and not isinstance(value, bool))


def _called(env: Env) -> str:
    return type(env.unwrapped).__name__ if env.spec is None else env.spec.id
