"""When the baseline takes over within an episode of the candidate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sb3_offline_ft.trial.plan import Limit


@dataclass
class Violations:
    """How a limit was kept in an episode: how often it was crossed, for how many steps, and the value farthest beyond it."""

    limit: Limit
    count: int = 0
    steps: int = 0
    worst: float | None = None
    _excess: float = 0.0
    _is_beyond: bool = False

    def take(self, value: float | None) -> str | None:
        """A step's value; says what is wrong with it, if anything. A value that cannot be read is beyond any limit."""
        excess = self._beyond(value)
        if excess > 0:
            self.steps += 1
            self.count += not self._is_beyond
            if value is not None and math.isfinite(value) and excess > self._excess:
                self.worst, self._excess = value, excess
        self._is_beyond = excess > 0
        return self._in_words(value) if excess > 0 else None

    def _beyond(self, value: float | None) -> float:
        if value is None or math.isnan(value):
            return math.inf
        low = -math.inf if self.limit.min is None else self.limit.min
        high = math.inf if self.limit.max is None else self.limit.max
        return max(low - value, value - high, 0.0)

    def _in_words(self, value: float | None) -> str:
        source, limit = self.limit.source, self.limit
        if value is None or math.isnan(value):
            return f"{source} has no value"
        if limit.max is not None and value > limit.max:
            return f"{source} was {value:.6g}, above its limit {limit.max:g}"
        return f"{source} was {value:.6g}, below its limit {limit.min:g}"


@dataclass
class LimitWatch:
    """
    Watches the limits of a plan in an episode.

    :param limits: The limits
    """

    limits: tuple[Limit, ...]
    violations: list[Violations] = field(init=False)

    def __post_init__(self) -> None:
        self.violations = [Violations(limit) for limit in self.limits]

    def take(self, values: Mapping[str, float | None]) -> str | None:
        """
        :param values: Those of a step, by source
        :return: The first limit that was crossed, in words; None if all were kept
        """
        found = [violation.take(values[violation.limit.source]) for violation in self.violations]
        return next((text for text in found if text is not None), None)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Of each limit that was crossed: ``count``, ``steps`` and the ``worst`` value, None if none could be read."""
        return {
            one.limit.source: {"count": one.count, "steps": one.steps, "worst": one.worst}
            for one in self.violations
            if one.count
        }
