"""Disturbances that any environment can be wrapped in: of its actuators, its sensors and its beginning."""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from sb3_offline_ft.common.observations import Observations, map_observations

Env = gym.Env[Any, Any]
Step = tuple[Any, Any, bool, bool, dict[str, Any]]


def rest_of(space: spaces.Box) -> npt.NDArray[Any]:
    """The action that does nothing: zero, or the bound that is nearest to it."""
    return np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)


class ActionDelay(gym.Wrapper[Any, Any, Any, Any]):
    """An action takes effect so many steps after it was decided; until the first one does, nothing is done."""

    def __init__(self, env: Env, steps: float) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Box)
        self._on_their_way = [rest_of(env.action_space)] * int(steps)
        self._queue: deque[Any] = deque(self._on_their_way)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._queue = deque(self._on_their_way)
        return self.env.reset(**options)

    def step(self, action: Any) -> Step:
        self._queue.append(np.array(action))
        return self.env.step(self._queue.popleft())


class DeadZone(gym.ActionWrapper[Any, Any, Any]):
    """Actions that differ by less than this share of half their range from doing nothing do nothing."""

    def __init__(self, env: Env, share: float) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Box)
        self._rest = rest_of(env.action_space)
        self._width = share * (env.action_space.high - env.action_space.low) / 2

    def action(self, action: Any) -> Any:
        return np.where(np.abs(action - self._rest) < self._width, self._rest, action)


class ActionGain(gym.ActionWrapper[Any, Any, Any]):
    """Actions are so many times as far from doing nothing, within their bounds."""

    def __init__(self, env: Env, factor: float) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Box)
        self._space, self._rest, self._factor = env.action_space, rest_of(env.action_space), factor

    def action(self, action: Any) -> Any:
        stronger = self._rest + self._factor * (np.asarray(action) - self._rest)
        return np.clip(stronger, self._space.low, self._space.high).astype(self._space.dtype)


class SensorNoise(gym.ObservationWrapper[Any, Any, Any]):
    """Each number of each observation gets Gaussian noise of this standard deviation, in shapes of an observation."""

    def __init__(self, env: Env, std: Observations, seed: int) -> None:
        super().__init__(env)
        self._std, self._generator = std, np.random.default_rng(seed)

    def observation(self, observation: Any) -> Any:
        def noisy(seen: Any, std: Any) -> Any:
            return (seen + std * self._generator.standard_normal(np.shape(seen))).astype(seen.dtype)

        return map_observations(noisy, observation, self._std)


class SensorBias(gym.ObservationWrapper[Any, Any, Any]):
    """Each number of each observation is too large by this, in shapes of an observation."""

    def __init__(self, env: Env, bias: Observations) -> None:
        super().__init__(env)
        self._bias = bias

    def observation(self, observation: Any) -> Any:
        return map_observations(lambda seen, bias: (seen + bias).astype(seen.dtype), observation, self._bias)


class SensorDropOut(gym.Wrapper[Any, Any, Any, Any]):
    """
    At each step each sensor, a number of the observation, fails with this probability. One that fails shows what it showed
    before, or zero. All work when an episode begins.
    """

    def __init__(self, env: Env, probability: float, holds: bool, seed: int) -> None:
        super().__init__(env)
        self._probability, self._holds, self._generator = probability, holds, np.random.default_rng(seed)
        self._shown: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        # Environments may change the array that they returned
        self._shown = map_observations(np.array, observation)
        return observation, info

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)

        def failing(seen: Any, shown: Any) -> Any:
            fails = self._generator.random(np.shape(seen)) < self._probability
            return np.where(fails, shown if self._holds else np.zeros_like(seen), seen)

        self._shown = map_observations(failing, observation, self._shown)
        return map_observations(np.array, self._shown), reward, terminated, truncated, info


class ConstantForce(gym.Wrapper[Any, Any, Any, Any]):
    """
    A wind along the x axis on the first body of a MuJoCo environment that can move, as a share of the weight of all bodies.

    MuJoCo's data keeps an applied force until it is reset.
    """

    def __init__(self, env: Env, share: float) -> None:
        super().__init__(env)
        model = env.unwrapped.model  # type: ignore[attr-defined]
        weight = float(np.sum(model.body_mass)) * (float(np.linalg.norm(model.opt.gravity)) or 9.81)
        self._body, self._force = int(model.dof_bodyid[0]), share * weight

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self.push(self._force)
        return observation, info

    def push(self, force: float) -> None:
        """Push with so many newtons from now on."""
        self.env.unwrapped.data.xfrc_applied[self._body, 0] = force  # type: ignore[attr-defined]


class WiderStart(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with bounds of its first states among the options of its reset, of which the speed's are times this."""

    def __init__(self, env: Env, factor: float) -> None:
        super().__init__(env)
        self._options = {"y_init": factor}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(seed=seed, options={**self._options, **(options or {})})


class RandomStart(gym.Wrapper[Any, Any, Any, Any]):
    """
    Episodes begin with so many uniformly random actions, which count neither as rewards nor as steps; an end among them begins
    again.
    """

    def __init__(self, env: Env, steps: float, seed: int) -> None:
        super().__init__(env)
        self._steps, self._generator = int(steps), np.random.default_rng(seed)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        space = self.env.action_space
        assert isinstance(space, spaces.Box)
        for _ in range(self._steps):
            action = self._generator.uniform(space.low, space.high).astype(space.dtype)
            observation, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                return self.env.reset()
        self._count_steps_from_here()
        return observation, info

    def _count_steps_from_here(self) -> None:
        env: Env = self.env
        while isinstance(env, gym.Wrapper):
            if isinstance(env, TimeLimit):
                env._elapsed_steps = 0  # type: ignore[assignment]  # Gymnasium infers it from the None of its constructor
            env = env.env
