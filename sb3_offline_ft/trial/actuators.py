"""The actuators of a system: what an action must be like, how far two of them lie apart, and what a policy does to them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

Array = npt.NDArray[np.float64]

AT_BOUND = 0.005
"""Of its range: an action that is this near to a bound is saturated. Policies that end in tanh never quite reach it."""
ROUNDING = 1e-6
"""Of its range: no action lies beyond its bounds by less than this."""


class Actuators:
    """
    What takes the actions. Distances are in shares of the range between the bounds; of an action without bounds in its own
    unit, and of a choice between things 1 for another choice.

    :param space: The action space
    :param most_beyond: How far an action may lie beyond its bounds, in shares of its range; None for any distance
    """

    def __init__(self, space: spaces.Space[Any], most_beyond: float | None = None) -> None:
        self.space, self._most_beyond = space, most_beyond
        if isinstance(space, spaces.Box):
            self._low, self._high = (np.asarray(bound, np.float64).ravel() for bound in (space.low, space.high))
            with np.errstate(invalid="ignore"):
                reach = self._high - self._low
            self._range = np.where(np.isfinite(reach) & (reach > 0), reach, 1.0)

    def fault(self, action: Any) -> str | None:
        """What is wrong with an action, in words; None if it can be sent."""
        if not isinstance(self.space, spaces.Box):
            return None if self.space.contains(self._as_choice(action)) else f"its action {action!r} is none of {self.space}"
        shape = np.shape(action)
        if shape != self.space.shape and not (shape == () and np.prod(self.space.shape) == 1):
            return f"its action has the shape {shape}, not {self.space.shape}"
        if not np.isfinite(np.asarray(action, np.float64)).all():
            return "its action is not finite"
        beyond = float(self._beyond(action).max())
        if self._most_beyond is not None and beyond > self._most_beyond + ROUNDING:
            return f"its action lies {beyond:.3g} of the range beyond the bounds, more than {self._most_beyond:g}"
        return None

    def command(self, action: Any) -> Any:
        """What is sent: the action within its bounds, in the form that the environment takes."""
        if not isinstance(self.space, spaces.Box):
            return self._as_choice(action)
        shaped = np.reshape(np.asarray(action, np.float64), self.space.shape)
        return np.clip(shaped, self.space.low, self.space.high).astype(self.space.dtype)

    def is_beyond(self, action: Any) -> bool:
        """Whether it lies beyond its bounds."""
        return isinstance(self.space, spaces.Box) and bool((self._beyond(action) > ROUNDING).any())

    def distance(self, one: Any, other: Any) -> Array:
        """How far two actions lie apart, shape ``(actuators,)``."""
        a, b = (np.asarray(action, np.float64).ravel() for action in (one, other))
        if isinstance(self.space, spaces.Box):
            return np.asarray(np.abs(a - b) / self._range)
        return np.asarray(a != b, np.float64)

    def saturated(self, action: Any) -> npt.NDArray[np.bool_]:
        """Which actuators are at a bound, shape ``(actuators,)``."""
        if not isinstance(self.space, spaces.Box):
            return np.zeros(np.size(action), np.bool_)
        near, flat = AT_BOUND * self._range, np.asarray(action, np.float64).ravel()
        return np.asarray((flat <= self._low + near) | (flat >= self._high - near))

    def _beyond(self, action: Any) -> Array:
        flat = np.asarray(action, np.float64).ravel()
        return np.asarray(np.maximum(np.maximum(self._low - flat, flat - self._high), 0.0) / self._range)

    def _as_choice(self, action: Any) -> Any:
        array = np.asarray(action)
        is_one = isinstance(self.space, spaces.Discrete) and array.size == 1 and array.dtype.kind in "iu"
        return int(array.item()) if is_one else array


@dataclass
class ActionLog:
    """What a policy did in an episode, or would have done."""

    actuators: Actuators
    steps: int = 0
    n_beyond: int = 0
    seconds: list[float] = field(default_factory=list)
    """How long it took to decide."""
    _last: Any = None
    _travel: Any = 0.0
    _saturated: Any = 0.0

    def timed(self, act: Callable[[Any], Any], observation: Any) -> Any:
        """Ask for an action, and note how long it takes."""
        begin = time.perf_counter()
        try:
            return act(observation)
        finally:
            self.seconds.append(time.perf_counter() - begin)

    def add(self, action: Any) -> None:
        """An action without fault."""
        command = self.actuators.command(action)
        self.steps += 1
        self.n_beyond += self.actuators.is_beyond(action)
        self._saturated = self._saturated + self.actuators.saturated(command)
        if self._last is not None:
            self._travel = self._travel + self.actuators.distance(command, self._last)
        self._last = command

    def summary(self) -> dict[str, Any] | None:
        """
        In the form of JSON: ``steps``; ``travel``, the way of each actuator, the sum of :meth:`Actuators.distance` from step
        to step; ``saturation``, the share of the steps that each was at a bound; ``beyond``, the share of the steps with an
        action beyond its bounds; ``latency_ms``, None if nobody measured it. None if there was no action.
        """
        if not self.steps:
            return None
        ms = 1e3 * np.array(self.seconds)
        return {
            "steps": self.steps,
            "travel": (np.zeros_like(self._saturated) + self._travel).tolist(),
            "saturation": (np.asarray(self._saturated) / self.steps).tolist(),
            "beyond": self.n_beyond / self.steps,
            "latency_ms": {"median": float(np.median(ms)), "p99": float(np.quantile(ms, 0.99))} if self.seconds else None,
        }
