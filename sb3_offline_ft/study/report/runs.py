"""Numbers of a run, and of the runs of a method on a dataset."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.evaluation.finetuning_metrics import (
    LAST,
    DipNoiseFloor,
    FinetuningMetrics,
    dip_noise_floor,
    finetuning_metrics,
)
from sb3_offline_ft.evaluation.served import (
    EXPLORE,
    TRIAL,
    ActedEpisodes,
    Losses,
    ServedMetrics,
    acted_episodes,
    served_metrics,
)
from sb3_offline_ft.evaluation.statistics import Band, Estimate, aggregate, curve_band, rate
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.engine.results import Run

RELATIVE_METRICS = ("dip_depth", "dip_area", "time_below_band", "recovery_time", "selected_dip_depth")
SERVED_POINTS = 30
"""Of a curve of served returns."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunNumbers:
    """
    A run in numbers.

    :param run: The run
    :param metrics: The metrics of what was measured
    :param noise: The dips that its pretrained policy would show by chance, None if that cannot be said
    :param acted: All that acted in the environment, None if that was not recorded
    :param served: Its metrics at as many interactions as the study has; of nothing, if what acted was not recorded
    """

    run: Run
    metrics: FinetuningMetrics
    noise: DipNoiseFloor | None
    acted: ActedEpisodes | None
    served: ServedMetrics

    @property
    def seed(self) -> int:
        return self.run.cell.seed

    @property
    def method(self) -> Method:
        return self.run.cell.method

    @property
    def dataset(self) -> str | None:
        """Label of its dataset, None if its method uses no data."""
        return self.run.cell.dataset

    @property
    def manifest(self) -> dict[str, Any]:
        return self.run.result.manifest

    @property
    def means(self) -> Array:
        """Mean return of each evaluation, shape ``(evaluations,)``."""
        return np.asarray(self.run.result.returns.mean(axis=1), np.float64)

    @property
    def n_last(self) -> int:
        """Evaluations that its end is the mean of: the last ones after the warm-up, as many as there are."""
        result = self.run.result
        n_free = int((result.timesteps > result.frozen_until).sum())
        return min(LAST, n_free or result.timesteps.size)

    @property
    def learner_evaluation_steps(self) -> int | None:
        """Environment steps of evaluations that the learner learned from, None if they were not recorded."""
        steps = self.manifest.get("learner_evaluation_steps")
        return None if steps is None else int(steps)

    @property
    def at_risk(self) -> dict[str, float | None]:
        """How many trials and explorations there were after the warm-up, and what they lost; None without a champion."""
        nothing = None
        if self.run.result.training_kinds.size and self.acted is not None:
            nothing = Losses(0, None if self.served.losses.shortfall is None else 0.0)
        by_kind = {kind: self.served.losses_by_kind.get(kind, nothing) for kind in (TRIAL, EXPLORE)}
        return {
            f"served_{kind}_{name}": getattr(losses, name, None)
            for kind, losses in by_kind.items()
            for name in ("episodes", "shortfall")
        }

    @property
    def seconds(self) -> float | None:
        """Wall time of the finetuning."""
        seconds = (self.manifest.get("seconds") or {}).get("finetuning")
        return None if seconds is None else float(seconds)

    def value(self, name: str) -> float | None:
        """
        A metric, one of what was served or at risk, ``"seconds"`` or ``"learner_evaluation_steps"``; None if it is not defined
        for this run. Dips are measured by what the pretrained policy has over a random one, so that one which is no better has
        none.
        """
        if name in (served := self.served.values() | self.at_risk):
            return served[name]
        if name in RELATIVE_METRICS and self.metrics.collapsed is None:
            return None
        value = getattr(self.metrics if hasattr(self.metrics, name) else self, name)
        return None if value is None else float(value)

    def events(self, kind: str) -> int:
        """How many events of a kind its guard wrote."""
        return sum(event.get("event") == kind for event in self.run.result.events)

    @property
    def watched(self) -> tuple[int, int]:
        """Training episodes whose returns a guard watched, and all that it saw."""
        phases = [event.get("phase") for event in self.run.result.events if event.get("event") == "episode"]
        return phases.count("monitoring"), len(phases)


@dataclass(frozen=True)
class Group:
    """The runs of a method on a dataset, by seed."""

    method: Method
    runs: tuple[RunNumbers, ...]
    is_averaged: bool = False
    """Whether they are of several variants, and averaged seed by seed: those of a seed begin alike and are not independent."""

    @property
    def label(self) -> str:
        return self.method.label

    @cached_property
    def curve(self) -> Band:
        """Mean over the runs at each evaluation that all have: a guard may have ended some early."""
        n = min(one.means.size for one in self.runs)
        return curve_band(self.runs[0].run.result.timesteps[:n], [[one.means[:n] for one in self.runs]], "mean")

    def served_curve(self, interactions: int) -> Band | None:
        """Mean served return over the runs in so many interactions at most; None if none has recorded what acted."""
        width = interactions / SERVED_POINTS
        acted = [one.acted for one in self.runs if one.acted is not None and one.acted.lengths.sum() >= width]
        n = min((min(SERVED_POINTS, int(each.lengths.sum() / width)) for each in acted), default=0)
        if n == 0:
            return None
        ends = width * np.arange(1, n + 1)
        return curve_band(ends, [[[each.mean_return(end - width, end) for end in ends] for each in acted]], "mean")

    def values(self, name: str) -> list[float]:
        """As for :meth:`RunNumbers.value`, of each seed for which it is defined."""
        return self._by_seed((one.seed, one.value(name)) for one in self.runs)

    def _by_seed(self, pairs: Iterable[tuple[int, float | None]]) -> list[float]:
        found: dict[int, list[float]] = {}
        for seed, value in pairs:
            if value is not None:
                found.setdefault(seed, []).append(value)
        return [float(np.mean(values)) for values in found.values()]

    def estimate(self, name: str) -> Estimate | None:
        """Mean of :meth:`values`, None if there are none."""
        values = self.values(name)
        return aggregate([values], "mean") if values else None

    @property
    def outcomes(self) -> list[bool]:
        """Whether runs collapsed, of those for which that is defined."""
        return [one.metrics.collapsed for one in self.runs if one.metrics.collapsed is not None]

    @cached_property
    def collapse_rate(self) -> Estimate | None:
        """Share of the runs that collapsed, None if that is not defined for them."""
        if not self.outcomes:
            return None
        if self.is_averaged:
            return aggregate([self._by_seed((one.seed, one.metrics.collapsed) for one in self.runs)], "mean")
        return rate(sum(self.outcomes), len(self.outcomes))

    @property
    def collapse_probability(self) -> float | None:
        """Share of the runs that would count as collapsed if their policies did not change; None if that cannot be said."""
        floors = [one.noise for one in self.runs if one.metrics.collapsed is not None and one.noise is not None]
        values = [floor.collapse_probability for floor in floors if floor.collapse_probability is not None]
        return float(np.mean(values)) if values else None

    @property
    def deeper_than_noise(self) -> tuple[int, int]:
        """Runs whose dip is deeper than those of 95 % of unchanged policies, and runs for which that can be said."""
        pairs = [(one.value("dip_depth"), one.noise.quantile) for one in self.runs if one.noise is not None]
        known = [depth > quantile for depth, quantile in pairs if depth is not None]
        return sum(known), len(known)

    @property
    def above_initial(self) -> tuple[int, int]:
        """Runs that ended above their pretrained policy, and runs that had one."""
        known = [one.metrics for one in self.runs if one.metrics.initial_return is not None]
        return sum(one.last_return > (one.initial_return or 0.0) for one in known), len(known)


def last_evaluations(runs: Iterable[RunNumbers]) -> str:
    """How many evaluations the ends of runs are the means of, such as ``10`` or ``3 to 10``."""
    counts = [one.n_last for one in runs]
    low, high = min(counts), max(counts)
    return str(high) if low == high else f"{low} to {high}"


def measure_runs(
    runs: Iterable[Run], random_return: float | None, interactions: int
) -> tuple[tuple[RunNumbers, ...], dict[str, str]]:
    """
    Measure runs, with the dips by chance of each from the most evaluations of the pretrained policy that it started from, and
    what they served in so many interactions.

    :return: Numbers of the runs, and by name why others cannot be measured: their returns are not finite
    """
    runs = tuple(runs)
    pools: dict[str | None, Array] = {}
    for run in runs:
        weights, returns = started_from(run), frozen_returns(run)
        if weights is not None and np.isfinite(returns).all() and returns.size > pools.get(weights, np.empty(0)).size:
            pools[weights] = returns

    @cache
    def noise_floor(weights: str, n_evaluations: int, n_episodes: int, n_initial: int) -> DipNoiseFloor | None:
        return dip_noise_floor(pools[weights], n_evaluations, n_episodes, random_return, initial_episodes=n_initial)

    def noise_of(run: Run) -> DipNoiseFloor | None:
        weights, n_initial, returns = started_from(run), frozen_returns(run).size, run.result.returns
        if weights is None or weights not in pools:
            return None
        measured = returns.size - n_initial or returns.size
        return noise_floor(weights, measured // returns.shape[1], returns.shape[1], n_initial)

    numbers, unusable = [], {}
    for run in runs:
        result = run.result
        training = result.training_timesteps, result.training_returns
        try:
            metrics = finetuning_metrics(result.timesteps, result.returns, result.frozen_until, random_return, *training)
            acted = acted_in(run, interactions)
            served = served_metrics(acted or acted_episodes([], [], -1), random_return, interactions)
            numbers.append(RunNumbers(run, metrics, noise_of(run), acted, served))
        except ValueError as error:
            unusable[run.cell.name] = str(error)
    return tuple(numbers), unusable


def acted_in(run: Run, interactions: int) -> ActedEpisodes | None:
    """
    All that acted in a run, its own evaluations included; None if these were not recorded. A policy that is frozen in all of
    it would have served episodes like those in which it was measured: one after the other, for so many interactions or as
    many as were measured.
    """
    result = run.result
    if run.cell.method.frozen:
        ends = np.cumsum(result.lengths.ravel(), dtype=np.int64)
        n = 1 + int((ends < interactions).sum())
        return acted_episodes(
            ends[:n], result.returns.ravel()[:n], interactions, interactions=min(interactions, int(ends[-1]))
        )
    if not result.knows_own_evaluations:
        return None
    return acted_episodes(
        result.training_timesteps,
        result.training_returns,
        result.frozen_until,
        kinds=result.kinds,
        interactions=result.manifest.get("interactions"),
        evaluation_timesteps=result.own_timesteps,
        evaluation_returns=result.own_returns,
        evaluation_lengths=result.own_lengths,
    )


def started_from(run: Run) -> str | None:
    """Digest of the pretrained weights that a run started from."""
    facts = run.result.manifest.get("pretrained")
    return None if facts is None else str(facts["weights_sha256"])


def frozen_returns(run: Run) -> Array:
    """Returns of all episodes of evaluations of the pretrained policy, shape ``(episodes,)``."""
    result = run.result
    return np.asarray(result.returns[result.timesteps <= result.frozen_until], np.float64).ravel()
