"""What is measured of an episode, step by step."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sb3_offline_ft.common.suggestions import hint
from sb3_offline_ft.trial.aborting import LimitWatch
from sb3_offline_ft.trial.plan import TrialPlan

INFO = "info."
REWARD = "reward"
_AGGREGATE: dict[str, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "min": min,
    "max": max,
}


def check_sources(plan: TrialPlan) -> None:
    """
    Check that all metrics and limits can come from an environment.

    :raises ValueError: One comes from a column, or from nowhere
    """
    sources = {f"metrics.{metric.name}": metric.source or metric.name for metric in plan.metrics}
    sources |= {} if plan.regime is None else {"regime": plan.regime}
    for key, source in (sources | {f"abort.limits.{limit.source}": limit.source for limit in plan.abort.limits}).items():
        if source != REWARD and not source.startswith(INFO):
            raise ValueError(
                f"{key}: {source!r} does not come from an environment: a trial with `env` can have `reward` and `info.<key>`."
            )


def aggregate(how: str, values: list[float]) -> float | None:
    """
    :param how: sum, mean, min, max or last
    :param values: Of the steps
    :return: One number; None without values, or if it is not finite
    """
    if not values:
        return None
    result = values[-1] if how == "last" else float(_AGGREGATE[how](values))
    return result if math.isfinite(result) else None


class EpisodeMeter:
    """
    Reads metrics and limits off the steps of an episode.

    :param plan: The plan
    :param known: Sources that the environment has reported before; those of this episode are added
    """

    def __init__(self, plan: TrialPlan, known: set[str | None]) -> None:
        self._plan, self._known = plan, known
        self._series: dict[str, list[float]] = {metric.name: [] for metric in plan.metrics}
        sources = [*(metric.source for metric in plan.metrics), *(limit.source for limit in plan.abort.limits)]
        self._sources = dict.fromkeys(source for source in sources if source is not None)
        self._steps, self._keys, self._regimes = 0, set[str](), Counter[str]()
        self.watch = LimitWatch(plan.abort.limits)
        self.values: dict[str, float | None] = {}
        """Of the last step, by source."""

    def take(self, reward: float, info: Mapping[str, Any]) -> str | None:
        """
        A step.

        :return: The limit that it has crossed, in words; None if all were kept
        :raises ValueError: A value is no number, or the environment does not report one that has a limit
        """
        self.values = {source: _value(source, reward, info) for source in self._sources}
        self._known.update(source for source, value in self.values.items() if value is not None)
        self._keys.update(info)
        if self._plan.regime is not None and (regime := info.get(self._plan.regime.removeprefix(INFO))) is not None:
            self._regimes[str(regime)] += 1
        for limit in self._plan.abort.limits:
            self._check_known(f"abort.limits.{limit.source}", limit.source)
        if self._steps >= self._plan.blocks.wash_in_steps:
            for metric in self._plan.metrics:
                value = self.values[metric.source or metric.name]
                self._series[metric.name] += [] if value is None else [value]
        self._steps += 1
        return self.watch.take(self.values)

    @property
    def regime(self) -> str | None:
        """The operating regime that most steps were in, if the plan says where it is named."""
        return self._regimes.most_common(1)[0][0] if self._regimes else None

    def metrics(self) -> dict[str, float | None]:
        """
        :return: The metrics of the episode; None where there was no value, or one that is not finite
        :raises ValueError: No episode has reported one of them
        """
        for metric in self._plan.metrics:
            self._check_known(f"metrics.{metric.name}", metric.source)
        return {metric.name: aggregate(metric.aggregate, self._series[metric.name]) for metric in self._plan.metrics}

    def _check_known(self, key: str, source: str | None) -> None:
        if source is not None and source not in self._known:
            names = [f"{INFO}{name}" for name in self._keys]
            found = hint(source, names) if names else "it gives no info."
            raise ValueError(f"{key}: the environment reports no {source!r}; {found}")


def _value(source: str, reward: float, info: Mapping[str, Any]) -> float | None:
    value = reward if source == REWARD else info.get(source.removeprefix(INFO))
    if value is None:
        return None
    try:
        (number,) = np.asarray(value, np.float64).ravel()
    except (TypeError, ValueError):
        raise ValueError(f"{source} is {value!r}: expected a number in each step.") from None
    return float(number)
