"""The methods of a study against its reference method: paired tests, and the probability of improvement."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from sb3_offline_ft.evaluation.comparisons import compare_paired, compare_paired_rates, holm
from sb3_offline_ft.evaluation.statistics import Estimate, probability_of_improvement
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.report.runs import RunNumbers

SIGNIFICANT = 0.05
COLLAPSED = "collapsed"
FAMILIES = (("served_mean_return",), ("last_return", "mean_return", "dip_depth", COLLAPSED))
"""Metrics that are corrected together: what a study asks first, and what explains it."""
COMPARED = tuple(metric for family in FAMILIES for metric in family)

Values = Mapping[tuple[str | None, int], float]
"""Of the runs of a method, by dataset and seed."""


@dataclass(frozen=True)
class Improvement:
    """The probability that a run of the reference method ends higher than one of another method."""

    method: Method
    probability: Estimate


@dataclass(frozen=True)
class Comparison:
    """
    A method against the reference method, in pairs of runs with the same dataset and seed.

    :param method: The method
    :param metric: What is compared: a metric, or ``"collapsed"``
    :param n: Pairs
    :param p: Two-sided p-value
    :param smallest_p: The least that so many pairs can give
    :param difference: Mean of the method's value minus the reference's, None for collapses
    :param only_method: Pairs in which only the method collapsed
    :param only_reference: Pairs in which only the reference collapsed
    :param p_corrected: The p-value, corrected for all comparisons of the metric's family
    :param smallest_p_corrected: The least that it could be with so many pairs and comparisons
    :param n_tests: Comparisons of the family
    """

    method: Method
    metric: str
    n: int
    p: float
    smallest_p: float
    difference: Estimate | None = None
    only_method: int = 0
    only_reference: int = 0
    p_corrected: float = 1.0
    smallest_p_corrected: float = 1.0
    n_tests: int = 1


@dataclass(frozen=True)
class PairedTests:
    """Paired tests of methods against a reference method, None if there is none."""

    runs: Sequence[RunNumbers]
    methods: Sequence[Method]
    reference: Method | None
    seeds: Sequence[int]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """
        The tests. The correction is for all methods and metrics of a family: a study of methods that do not differ shows any
        difference in what was served with a probability of at most :data:`SIGNIFICANT`, and so for the other metrics together.
        """
        made = [row for family in FAMILIES for row in self._family(family)]
        order = {method.name: position for position, method in enumerate(self.methods)}
        return sorted(made, key=lambda row: order[row.method.name])

    def _family(self, metrics: Iterable[str]) -> list[Comparison]:
        made = [row for metric in metrics for method in self.methods if (row := self._compare(method, metric)) is not None]
        corrected, smallest = holm([row.p for row in made]), holm([row.smallest_p for row in made])
        return [
            replace(row, p_corrected=float(p), smallest_p_corrected=float(least), n_tests=len(made))
            for row, p, least in zip(made, corrected, smallest, strict=True)
        ]

    @cached_property
    def not_compared(self) -> dict[str, list[Method]]:
        """By metric, the methods that have it, as the reference method has, but fewer than two pairs of runs with it."""
        compared = {(row.metric, row.method.name) for row in self.comparisons}
        found = {
            metric: [
                method
                for method in self.methods
                if (metric, method.name) not in compared and all(self._values_of_both(method, metric))
            ]
            for metric in COMPARED
        }
        return {metric: methods for metric, methods in found.items() if methods}

    def _compare(self, method: Method, metric: str) -> Comparison | None:
        strata = self._pairs(method, metric)
        if sum(map(len, strata)) < 2:
            return None
        if metric == COLLAPSED:
            outcomes = [(bool(one), bool(other)) for stratum in strata for one, other in stratum]
            n, p = len(outcomes), compare_paired_rates(*zip(*outcomes, strict=True)).p_value
            return Comparison(
                method, metric, n, p, 2.0 ** (1 - n), None, outcomes.count((True, False)), outcomes.count((False, True))
            )
        test = compare_paired(*([[pair[side] for pair in stratum] for stratum in strata] for side in (0, 1)))
        return Comparison(method, metric, test.n_pairs, test.p_value, test.smallest_p_value, test.difference)

    def _pairs(self, method: Method, metric: str) -> list[list[tuple[float, float]]]:
        """
        By dataset, the values of runs with the same seed. A run without data has one pair, with the mean of the other method's
        runs of its seed on all datasets: more pairs with the same run would not be independent. Seeds that lack a dataset on
        which others have been run are left out.
        """
        sides = self._values_of_both(method, metric)
        if self.reference is None or method.uses_data == self.reference.uses_data:
            strata: dict[str | None, list[tuple[float, float]]] = {}
            for key in sides[0]:
                if key in sides[1]:
                    strata.setdefault(key[0], []).append((sides[0][key], sides[1][key]))
            return list(strata.values())
        pairs = []
        n_datasets = [len({label for label, _ in side}) for side in sides]
        for seed in self.seeds:
            values = [[value for key, value in side.items() if key[1] == seed] for side in sides]
            if values[0] and values[1] and [len(side) for side in values] == n_datasets:
                pairs.append((float(np.mean(values[0])), float(np.mean(values[1]))))
        return [pairs] if pairs else []

    def _values_of_both(self, method: Method, metric: str) -> tuple[Values, Values]:
        """Values of a method and of the reference, none if they cannot be compared."""
        reference = self.reference
        if reference is None or method == reference:
            return {}, {}
        if metric == "mean_return" and not self._are_alike(method, reference):
            return {}, {}
        if metric in ("dip_depth", COLLAPSED) and (method.frozen or reference.frozen):
            # A policy that does not change has no dip: what seems so is noise
            return {}, {}
        return values_of(self.runs, method, metric), values_of(self.runs, reference, metric)

    def _are_alike(self, *methods: Method) -> bool:
        """Whether evaluations count from the same interaction on, after a warm-up; from scratch all do."""
        names = {method.name for method in methods if not method.frozen}
        return len({one.run.result.frozen_until for one in self.runs if one.method.name in names}) <= 1


def values_of(runs: Iterable[RunNumbers], method: Method, metric: str) -> Values:
    """A metric of the runs of a method for which it is defined."""
    least = 0.0 if metric == "dip_depth" else -np.inf  # a policy that was never below its start did not dip
    found = {(one.dataset, one.seed): one.value(metric) for one in runs if one.method.name == method.name}
    return {key: max(value, least) for key, value in found.items() if value is not None}


def improvement(
    runs: Sequence[RunNumbers], reference: Method, other: Method, cells: Sequence[tuple[str | None, int]]
) -> Improvement | None:
    """
    The reference method against another one by the ends of runs, on the datasets and seeds of which both have runs. The runs
    of a method without data are the same on all datasets: then only seeds count that all datasets have, and if both have none,
    only once.
    """
    labels = list(dict.fromkeys(label for label, _ in cells))
    seeds = {label: [seed for other_label, seed in cells if other_label == label] for label in labels}
    if not (reference.uses_data and other.uses_data):
        everywhere = [seed for seed in seeds[labels[0]] if all(seed in seeds[label] for label in labels)] if labels else []
        labels = labels if reference.uses_data or other.uses_data else labels[:1]
        seeds = {label: everywhere for label in labels if everywhere}
    if not seeds:
        return None

    def ends(method: Method) -> list[list[float]]:
        values = values_of(runs, method, "last_return")
        return [[values[label if method.uses_data else None, seed] for seed in seeds[label]] for label in seeds]

    shared: Literal["x", "y"] | None = None
    if len(seeds) > 1:
        shared = "x" if not reference.uses_data else "y" if not other.uses_data else None
    return Improvement(other, probability_of_improvement(ends(reference), ends(other), shared=shared))
