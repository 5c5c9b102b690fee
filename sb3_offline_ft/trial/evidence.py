"""What the episodes of a trial say so far: the comparison, its planned looks, guardrails, checks of quality."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from scipy.stats import binomtest, fisher_exact, kendalltau, t

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, schedule
from sb3_offline_ft.trial.comparison import (
    Array,
    Deterioration,
    Look,
    LookResult,
    Rerandomisation,
    exact_p,
    limit_test,
    planned_looks,
    sequential_test,
    two_levels,
)
from sb3_offline_ft.trial.machine import EpisodeRecord
from sb3_offline_ft.trial.plan import RETURN, Guardrail, TrialPlan

FEWEST_MEASURED = 0.9
"""Share of the comparison's episodes that have to be measured."""
QUALITY_LEVEL = 0.01
"""Of each check of quality: probability that it fires if nothing is wrong."""


@dataclass(frozen=True)
class Design:
    """
    What a plan says about its comparison.

    :param sizes: Episodes of each block, and how many of them are the candidate's
    :param ends: Episodes of the comparison up to the end of each block
    :param looks: When the evidence is looked at
    """

    sizes: list[tuple[int, int]]
    ends: list[int]
    looks: list[Look]


@lru_cache(maxsize=16)
def design_of(plan: TrialPlan) -> Design:
    """The design of a plan's comparison."""
    found: dict[int, tuple[int, int]] = {}
    for slot in (slot for i, stage in enumerate(plan.stages) if stage.compares for slot in schedule(plan, i)):
        if slot.block is not None:
            episodes, candidates = found.get(slot.block, (0, 0))
            found[slot.block] = (episodes + 1, candidates + (slot.arm == CANDIDATE))
    sizes = [found[block] for block in sorted(found)]
    ends = list(accumulate(episodes for episodes, _ in sizes))
    return Design(sizes, ends, planned_looks(sizes, plan.error_rates.false_go))


@dataclass
class Evidence:
    """
    The episodes so far.

    :param plan: The plan
    :param episodes: All episodes, in order
    """

    plan: TrialPlan
    episodes: Sequence[EpisodeRecord]
    design: Design = field(init=False)
    compared: list[EpisodeRecord] = field(init=False)
    """Those of the comparison, measured or not."""
    n_complete: int = field(init=False)
    """How many planned blocks are complete, from the first."""

    def __post_init__(self) -> None:
        self.episodes = list(self.episodes)
        self.design = design_of(self.plan)
        self.compared = [record for record in self.episodes if record.assignment.block is not None]
        self.n_complete = bisect_right(self.design.ends, len(self.compared))

    @property
    def looks(self) -> list[Look]:
        """Those that are due."""
        return [look for look in self.design.looks if look.blocks <= self.n_complete]

    @property
    def is_at_look(self) -> bool:
        """Whether the last episode was the last one before a look."""
        at = len(self.compared) in [self.design.ends[look.blocks - 1] for look in self.design.looks]
        return at and self.episodes[-1] is self.compared[-1]

    @property
    def n_left(self) -> int:
        """Episodes of the comparison that are planned and not there yet."""
        return max(0, self.design.ends[-1] - len(self.compared))

    @property
    def n_to_measure(self) -> int:
        """How many more episodes it takes, if all are measured, until enough of them are."""
        metric = self.plan.primary.metric
        n_measured = sum(self.value(record, metric) is not None for record in self.compared)
        short = (FEWEST_MEASURED * len(self.compared) - n_measured) / (1 - FEWEST_MEASURED)
        return max(0, math.ceil(round(short, 6)))

    def value(self, record: EpisodeRecord, metric: str) -> float | None:
        """What counts for an episode, higher is better; an aborted one counts as the worst that can be. None if missing."""
        sign = self.plan.sign(metric)
        if record.is_aborted:
            found = [sign * one for other in self.compared if (one := other.metrics.get(metric)) is not None]
            if metric == RETURN and self.plan.risk is not None:
                found.append(self.plan.risk.worst_return)
            return min(found, default=None)
        value = record.metrics.get(metric)
        return None if value is None or not record.is_compared else sign * value

    def comparison(self, metric: str) -> Rerandomisation | None:
        """Of the episodes in complete blocks that have a value, None if there are none."""
        rows = [
            (value, record.arm == CANDIDATE, record.block)
            for record in self.compared[: self.design.ends[self.n_complete - 1] if self.n_complete else 0]
            if (value := self.value(record, metric)) is not None
        ]
        return Rerandomisation(*map(np.array, zip(*rows, strict=True))) if rows else None

    def deterioration(self) -> Deterioration:
        """What all episodes so far say about "worse: stop now"."""
        test = Deterioration(self.plan.error_rates.false_stop, self.plan.primary.smallest_effect)
        for record in self.compared:
            if (value := self.value(record, self.plan.primary.metric)) is not None:
                test.take(value, record.arm == CANDIDATE, record.share)
        return test


def margin_looks(comparison: Rerandomisation | None, margin: float, looks: list[Look], sign: int = 1) -> list[LookResult]:
    """What each look showed of "the candidate is better than minus the margin"; with sign -1, of "it is worse than that"."""
    if comparison is None or not looks:
        return []
    results = sequential_test(sign * comparison.statistics(-margin, [look.blocks for look in looks]), looks)
    levels = two_levels(comparison.values)
    if not margin or levels is None:
        return results
    # Rates that differ spread differently, which no shift of the values does: both tests have to agree
    height, before, exact = levels[1] - levels[0], 0.0, list[LookResult]()
    successes = comparison.values == levels[1] if sign > 0 else comparison.values == levels[0]
    for look, result in zip(looks, results, strict=True):
        arms = [arm & (comparison.blocks < look.blocks) for arm in (comparison.is_candidate, ~comparison.is_candidate)]
        counts = [(int(successes[arm].sum()), int(arm.sum())) for arm in arms]
        p = exact_p(counts[0], counts[1], -sign * margin / height)
        exact.append(LookResult(look, max(p, result.p), min(look.spent - before, result.level)))
        before = look.spent
    return exact


@dataclass(frozen=True)
class GuardrailResult:
    """
    What is known of a guardrail.

    :param guardrail: The guardrail
    :param unit: Unit of its metric
    :param sign: 1 if higher values of it are better, else -1
    :param confidence: Of the interval of :attr:`estimate`
    :param comparison: The episodes by its metric, None if there are none
    :param looks: What each look showed of "it holds"
    :param is_violated: Whether it is proved not to hold
    """

    guardrail: Guardrail
    unit: str
    sign: int
    confidence: float
    comparison: Rerandomisation | None
    looks: list[LookResult]
    is_violated: bool

    @property
    def holds(self) -> bool:
        """Whether it is proved to hold."""
        return any(look.is_crossed for look in self.looks)

    @cached_property
    def estimate(self) -> Estimate:
        """Of a margin: by how much the candidate is better (worse, if negative); of a limit: its mean."""
        if self.comparison is None:
            return Estimate(math.nan, math.nan, math.nan, 0, "no values yet")
        if self.guardrail.limit is None:
            return self.comparison.interval(self.confidence)
        return mean_of(self.sign * self.comparison.values[self.comparison.is_candidate], self.confidence)

    @property
    def distance(self) -> float:
        """How far the candidate is from violating it: from the limit as it was seen, from the margin if it is as good."""
        if self.guardrail.limit is None:
            return self.guardrail.margin or 0.0
        return self.estimate.value - self.sign * self.guardrail.limit

    @property
    def text(self) -> str:
        """In words."""
        if self.comparison is None:
            return "no episode of the comparison has a value yet."
        state = "proved to be violated" if self.is_violated else "proved to hold" if self.holds else "not proved yet"
        found = self.estimate
        if self.guardrail.limit is not None:
            return f"the candidate's mean is {amount(found.value, self.unit)}, the limit {self.guardrail.limit:.4g}; {state}."
        way = "better" if found.value >= 0 else "worse"
        return (
            f"the candidate is {way} by {amount(abs(found.value), self.unit)}, and may be worse by at most "
            f"{self.guardrail.margin:.4g}; {state}."
        )


def amount(value: float, unit: str) -> str:
    """A number with its unit."""
    return f"{value:.4g} {unit}".rstrip()


def mean_of(values: Array, confidence: float) -> Estimate:
    """Mean with its interval by Student's t."""
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    half = float(t.isf((1 - confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half, n, f"mean; {100 * confidence:g} % interval: Student's t")


def guardrail_result(evidence: Evidence, guardrail: Guardrail) -> GuardrailResult:
    """What is known of a guardrail."""
    plan, name, looks = evidence.plan, guardrail.metric, evidence.looks
    sign, comparison, holding, violating = plan.sign(name), evidence.comparison(name), list[LookResult](), list[LookResult]()
    if comparison is not None and guardrail.limit is None:
        holding, violating = (margin_looks(comparison, guardrail.margin or 0.0, looks, way) for way in (1, -1))
    elif comparison is not None and guardrail.limit is not None:
        at = [comparison.values[comparison.is_candidate & (comparison.blocks < look.blocks)] for look in looks]
        holding = limit_test(at, sign * guardrail.limit, looks)
        violating = limit_test([-values for values in at], -sign * guardrail.limit, looks)
    is_violated = any(look.is_crossed for look in violating)
    confidence = 1 - 2 * plan.error_rates.false_go
    return GuardrailResult(guardrail, plan.metric(name).unit, sign, confidence, comparison, holding, is_violated)


@dataclass(frozen=True)
class Check:
    """
    A check of quality.

    :param name: What is checked
    :param text: What was found
    :param fired: Whether something is wrong
    :param blocks_go: Whether there is no go then; else it is only said
    """

    name: str
    text: str
    fired: bool
    blocks_go: bool = True


def quality_checks(evidence: Evidence, comparison: Rerandomisation | None) -> list[Check]:
    """Whether the episodes are what was planned, and whether time plays a part."""
    metric = evidence.plan.primary.metric
    arms = [record.arm == CANDIDATE for record in evidence.compared]
    measured = [evidence.value(record, metric) is not None for record in evidence.compared]
    counts = [[sum(m for m, a in zip(measured, arms, strict=True) if a is arm) for arm in (True, False)]]
    counts.append([sum(a is arm for a in arms) - n for arm, n in zip((True, False), counts[0], strict=True)])
    n, n_measured = len(arms), sum(counts[0])
    differs = bool(n_measured < n and fisher_exact(counts).pvalue < QUALITY_LEVEL)
    text = f"{n_measured} of {n} episodes of the comparison are measured, {counts[0][0]} of them the candidate's; "
    text += f"{100 * FEWEST_MEASURED:g} % have to be, and of both policies alike."
    checks = [
        Check("missing data", text, n_measured < FEWEST_MEASURED * n or differs),
        _shares(evidence, counts[0]),
    ]
    baseline = [record for record in evidence.episodes if record.arm == BASELINE and record.excluded is None]
    served = [(record.episode, value) for record in baseline if (value := record.metrics.get(metric)) is not None]
    tau, p = _trend(served)
    text = f"Kendall's tau {tau:.2f}, p = {p:.2g}; blocks take care of it." if served else "no episode yet."
    checks.append(Check("drift of the baseline", text, p < QUALITY_LEVEL, blocks_go=False))
    tau, p = _trend([] if comparison is None else comparison.differences)
    text = f"Kendall's tau {tau:.2f}, p = {p:.2g} of the blocks' differences in time."
    checks.append(Check("fading of the difference", text, tau < 0 and p < QUALITY_LEVEL))
    return checks


def _shares(evidence: Evidence, measured: list[int]) -> Check:
    """Whether the candidate had its share, as far as blocks are complete."""
    sizes, n = evidence.design.sizes[: evidence.n_complete], sum(measured)
    if not sizes or not n:
        return Check("shares as planned", "no block is complete yet.", False)
    share = sum(candidates for _, candidates in sizes) / sum(episodes for episodes, _ in sizes)
    text = f"the candidate has {measured[0]} of {n} measured episodes, {100 * share:.0f} % were planned."
    return Check("shares as planned", text, bool(binomtest(measured[0], n, share).pvalue < QUALITY_LEVEL))


def _trend(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Kendall's tau with time, and its p-value."""
    if len({value for _, value in points}) < 2:
        return 0.0, 1.0
    found = kendalltau(*zip(*points, strict=True))
    return float(found.statistic), float(found.pvalue)
