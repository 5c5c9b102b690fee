"""Go, no-go or not yet: the rules of a plan, applied to its trial."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from scipy.stats import norm

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.trial.comparison import Deterioration, LookResult, Rerandomisation, information
from sb3_offline_ft.trial.evidence import (
    Check,
    Evidence,
    GuardrailResult,
    guardrail_result,
    margin_looks,
    quality_checks,
)
from sb3_offline_ft.trial.machine import Finished, TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan
from sb3_offline_ft.trial.reasons import reasons_of

Verdict = Literal["go", "no-go", "not yet"]


@dataclass(frozen=True)
class Decision:
    """
    A decision with what it rests on; made by :func:`decide`.

    :param evidence: The episodes
    :param comparison: Those of the comparison by the primary metric, None before the first block is complete
    :param looks: What each look so far showed of "the candidate is better"
    :param guardrails: What is known of each guardrail
    :param deterioration_p: Of "the candidate is not worse", valid at any time
    :param n_aborts: How many of the candidate's episodes were aborted
    :param cut: Why the trial ended before its stages did; None if it did not
    """

    evidence: Evidence
    comparison: Rerandomisation | None
    looks: list[LookResult]
    guardrails: list[GuardrailResult]
    deterioration_p: float
    n_aborts: int
    cut: str | None

    @property
    def plan(self) -> TrialPlan:
        """Its plan."""
        return self.evidence.plan

    @cached_property
    def decision(self) -> Verdict:
        """``go``, ``no-go`` or ``not yet``."""
        if self.is_worse or self.is_aborted_too_often or self.is_violated or self.is_too_small:
            return "no-go"
        if not self.is_superior or self.cut is not None or not all(each.holds for each in self.guardrails):
            return "not yet"
        return "not yet" if any(check.fired and check.blocks_go for check in self.quality) else "go"

    @property
    def n_looks(self) -> int:
        """How many looks are planned."""
        return len(self.evidence.design.looks)

    @property
    def confidence(self) -> float:
        """Of all intervals."""
        return 1 - 2 * self.plan.error_rates.false_go

    @property
    def is_superior(self) -> bool:
        """Whether the candidate is proved to be better."""
        return any(look.is_crossed for look in self.looks)

    @property
    def is_worse(self) -> bool:
        """Whether the candidate is proved to be worse."""
        return self.deterioration_p <= self.plan.error_rates.false_stop

    @property
    def is_aborted_too_often(self) -> bool:
        """Whether there were more aborts than the plan allows."""
        return self.n_aborts > self.plan.abort.most

    @property
    def is_violated(self) -> bool:
        """Whether a guardrail is proved to be violated."""
        return any(each.is_violated for each in self.guardrails)

    @cached_property
    def is_too_small(self) -> bool:
        """Whether all that was planned is there, and excludes the smallest effect worth having."""
        if self.evidence.n_left or self.is_superior or self.comparison is None:
            return False
        return self.comparison.p_value_below(self.plan.primary.smallest_effect) <= self.plan.error_rates.false_go

    @cached_property
    def effect(self) -> Estimate:
        """By how much the candidate is better, in units of the primary metric, with its interval."""
        if self.comparison is None:
            return Estimate(math.nan, math.nan, math.nan, 0, "no block of the comparison is complete yet")
        return self.comparison.interval(self.confidence)

    @cached_property
    def quality(self) -> list[Check]:
        """The checks of quality."""
        return quality_checks(self.evidence, self.comparison)

    @property
    def p(self) -> float | None:
        """p-value of "the candidate is not better" at the last look, None before the first."""
        return self.looks[-1].p if self.looks else None

    @property
    def level(self) -> float | None:
        """What :attr:`p` had to reach."""
        return self.looks[-1].level if self.looks else None

    @property
    def value_a_year(self) -> Estimate:
        """What the effect is worth in a year, in the plan's currency."""
        return value_a_year(self.plan, self.effect)

    @cached_property
    def more_episodes(self) -> int | None:
        """
        How many more it takes, in equal shares: those that are planned, else those to see what is still open, which is the
        smallest effect, or that a guardrail holds if the candidate is as good in it as it seems to be or as the baseline; and
        as many as make up for the missing ones. None after go or no-go.
        """
        if self.decision != "not yet":
            return None
        if self.evidence.n_left or self.comparison is None:
            return max(self.evidence.n_left, self.evidence.n_to_measure)
        missing = [] if self.is_superior else [self._missing(self.comparison, self.plan.primary.smallest_effect)]
        for each in self.guardrails:
            if not each.holds and each.comparison is not None and (distance := each.distance) > 0:
                missing.append(self._missing(each.comparison, distance))
        return max(self.plan.blocks.episodes, self.evidence.n_to_measure, *missing)

    def _missing(self, comparison: Rerandomisation, effect: float) -> int:
        there = 4 * float(information(comparison.sizes).sum())
        return math.ceil(episodes_needed(self.plan, comparison.spread, effect) - there)

    @cached_property
    def reasons(self) -> list[str]:
        """Why, in words, the most important reason first."""
        return reasons_of(self)


def review(plan: TrialPlan, machine: TrialMachine, deterioration: Deterioration | None = None) -> Decision | None:
    """
    To be called after each episode: whether the trial ends here.

    :param plan: The plan
    :param machine: The trial
    :param deterioration: What the episodes say about "worse: stop now", if it is known already
    :return: A decision for go or no-go, None if the trial goes on
    """
    evidence = Evidence(plan, machine.episodes)
    deterioration = deterioration or evidence.deterioration()
    if not (evidence.is_at_look or deterioration.is_proved or len(machine.aborts) > plan.abort.most):
        return None
    decision = decide(plan, machine, deterioration)
    return None if decision.decision == "not yet" else decision


def decide(plan: TrialPlan, machine: TrialMachine, deterioration: Deterioration | None = None) -> Decision:
    """
    Decide by the rules of the plan, at any time; the evidence is looked at where the plan says so.

    *Go*, if at a planned look the candidate is better by the primary metric, all guardrails hold, and nothing speaks against
    it. *No-go*, if it is worse at any episode, was aborted too often, violates a guardrail, or all that was planned is there
    and excludes the smallest effect worth having. Else *not yet*.

    :param plan: The plan
    :param machine: The trial
    :param deterioration: What the episodes say about "worse: stop now", if it is known already
    :return: The decision
    """
    evidence, upcoming = Evidence(plan, machine.episodes), machine.next()
    comparison = evidence.comparison(plan.primary.metric)
    return Decision(
        evidence=evidence,
        comparison=comparison,
        looks=margin_looks(comparison, 0.0, evidence.looks),
        guardrails=[guardrail_result(evidence, guardrail) for guardrail in plan.guardrails],
        deterioration_p=(deterioration or evidence.deterioration()).p,
        n_aborts=len(machine.aborts),
        cut=upcoming.reason if isinstance(upcoming, Finished) and upcoming.is_cut else None,
    )


def episodes_needed(plan: TrialPlan, spread: float, effect: float) -> int:
    """
    :param plan: The plan
    :param spread: Standard deviation of an episode's value of the primary metric
    :param effect: By how much the candidate is better
    :return: Episodes of both policies, in equal shares, after which this is seen with the power of the plan (normal
        approximation)
    """
    errors = float(norm.isf(plan.error_rates.false_go) + norm.isf(plan.error_rates.missed))
    return max(2 * plan.blocks.episodes, math.ceil(4 * (errors * spread / effect) ** 2))


def value_a_year(plan: TrialPlan, effect: Estimate) -> Estimate:
    """
    :param plan: The plan
    :param effect: An improvement of the primary metric, in its units
    :return: What it is worth in a year, in the plan's currency
    """
    scale = plan.metric(plan.primary.metric).value_per_unit * plan.costs.episodes_per_year
    return Estimate(effect.value * scale, effect.low * scale, effect.high * scale, effect.n, effect.method)
