"""Go, no-go or not yet: the rules of a plan, applied to its trial."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from scipy.stats import norm

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.trial.comparison import Deterioration, LookResult, Rerandomisation
from sb3_offline_ft.trial.evidence import (
    Check,
    Evidence,
    GuardrailResult,
    amount,
    guardrail_result,
    looks_of,
    margin_looks,
    quality_checks,
)
from sb3_offline_ft.trial.machine import Finished, TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan

Verdict = Literal["go", "no-go", "not yet"]


@dataclass(frozen=True)
class Decision:
    """
    A decision with its reasons.

    :param decision: ``go``, ``no-go`` or ``not yet``
    :param reasons: Why, the most important one first
    :param comparison: The episodes of the comparison by the primary metric, None if there are none
    :param confidence: Of the interval of :attr:`effect`
    :param looks: What each look so far showed of "the candidate is better"
    :param n_looks: How many are planned
    :param guardrails: What is known of each guardrail
    :param quality: The checks of quality
    :param deterioration_p: Of "the candidate is not worse", valid at any time
    :param more_episodes: How many more it would take, None after a go or no-go
    """

    decision: Verdict
    reasons: list[str]
    comparison: Rerandomisation | None
    confidence: float
    looks: list[LookResult]
    n_looks: int
    guardrails: list[GuardrailResult]
    quality: list[Check]
    deterioration_p: float
    more_episodes: int | None = None

    @cached_property
    def effect(self) -> Estimate:
        """By how much the candidate is better, in units of the primary metric, with its interval."""
        if self.comparison is None:
            return Estimate(math.nan, math.nan, math.nan, 0, "no block of the comparison is complete yet")
        return self.comparison.interval(self.confidence)

    @property
    def p(self) -> float | None:
        """p-value of "the candidate is not better" at the last look, None before the first."""
        return self.looks[-1].p if self.looks else None

    @property
    def level(self) -> float | None:
        """What :attr:`p` had to reach."""
        return self.looks[-1].level if self.looks else None

    @property
    def is_superior(self) -> bool:
        """Whether the candidate is proved to be better."""
        return any(look.is_crossed for look in self.looks)


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

    *Go*, if at a planned look the candidate is better by the primary metric, all guardrails hold, and nothing speaks against it.
    *No-go*, if it is worse at any episode, was aborted too often, a guardrail is violated, or all that was planned is there and
    excludes the smallest effect worth having. Else *not yet*.

    :param plan: The plan
    :param machine: The trial
    :param deterioration: What the episodes say about "worse: stop now", if it is known already
    :return: The decision
    """
    evidence = Evidence(plan, machine.episodes)
    deterioration = deterioration or evidence.deterioration()
    comparison = evidence.comparison(plan.primary.metric)
    found = Decision(
        decision="not yet",
        reasons=[],
        comparison=comparison,
        confidence=1 - 2 * plan.error_rates.false_go,
        looks=margin_looks(comparison, 0.0, evidence.looks),
        n_looks=len(looks_of(plan)),
        guardrails=[guardrail_result(evidence, guardrail) for guardrail in plan.guardrails],
        quality=quality_checks(evidence),
        deterioration_p=deterioration.p,
    )
    if against := _against(evidence, machine, found, deterioration):
        return replace(found, decision="no-go", reasons=against)
    missing = _missing(machine, found)
    if found.is_superior and not missing:
        return replace(found, decision="go", reasons=_for_go(plan, machine, found))
    return replace(found, reasons=_not_yet(evidence, found, missing), more_episodes=_more_episodes(evidence, found))


def _against(evidence: Evidence, machine: TrialMachine, found: Decision, deterioration: Deterioration) -> list[str]:
    """What makes it a no-go."""
    plan, reasons = evidence.plan, []
    if deterioration.is_proved:
        reasons.append(
            f"The candidate is worse than the baseline: p = {deterioration.p:.2g}, and {plan.error_rates.false_stop:.2g} is enough "
            "to stop at any episode."
        )  # fmt: skip
    if len(machine.aborts) > plan.abort.most:
        reasons.append(f"{len(machine.aborts)} episodes of the candidate were aborted, at most {plan.abort.most} may be.")
    reasons += [f"Guardrail {each.guardrail.metric}: {each.text}" for each in found.guardrails if each.is_violated]
    if evidence.n_left == 0 and not found.is_superior and found.comparison is not None:
        smallest = plan.primary.smallest_effect
        if (p := found.comparison.p_value_below(smallest)) <= plan.error_rates.false_go:
            reasons.append(
                f"All {len(evidence.compared)} planned episodes are there, and the smallest effect worth having is excluded: "
                f"{_effect(plan, found)}, {amount(smallest, _unit(plan))} would be needed (p = {p:.2g})."
            )
    return reasons


def _missing(machine: TrialMachine, found: Decision) -> list[str]:
    """What keeps a better candidate from a go."""
    reasons = [f"Guardrail {each.guardrail.metric}: {each.text}" for each in found.guardrails if not each.holds]
    reasons += [f"Quality, {check.name}: {check.text}" for check in found.quality if check.fired and check.blocks_go]
    upcoming = machine.next()
    if isinstance(upcoming, Finished) and upcoming.is_cut:
        reasons.append(f"The trial was cut short. {upcoming.reason}")
    return reasons


def _unit(plan: TrialPlan) -> str:
    return plan.metric(plan.primary.metric).unit


def _effect(plan: TrialPlan, found: Decision) -> str:
    """The effect with its interval, in words."""
    effect, unit = found.effect, _unit(plan)
    way = "better" if effect.value >= 0 else "worse"
    interval = f" ({100 * found.confidence:g} % interval of the improvement {effect.low:.4g} to {effect.high:.4g})"
    text = f"by {plan.primary.metric}, the candidate is {way} by {amount(abs(effect.value), unit)}"
    return text + interval * effect.has_interval


def _look(found: Decision) -> str:
    last = found.looks[-1]
    return f"p = {last.p:.2g} at look {len(found.looks)} of {found.n_looks}, where {last.level:.2g} was needed"


def _for_go(plan: TrialPlan, machine: TrialMachine, found: Decision) -> list[str]:
    effect = _effect(plan, found)
    crossed = next(i for i, look in enumerate(found.looks) if look.is_crossed)
    at = replace(found, looks=found.looks[: crossed + 1])
    reasons = [f"{effect[0].upper()}{effect[1:]}; {_look(at)}."]
    if found.effect.value < plan.primary.smallest_effect:
        reasons.append(
            "It is better, but perhaps by less than the smallest effect worth having, "
            f"{amount(plan.primary.smallest_effect, _unit(plan))}."
        )
    reasons += [f"Guardrail {each.guardrail.metric}: {each.text}" for each in found.guardrails]
    said = [f"{check.name}: {check.text}" for check in found.quality if check.fired]
    n = len(machine.aborts)
    aborts = f"{n} of its episodes {'was' if n == 1 else 'were'} aborted, and {plan.abort.most} may be" if n else "no abort"
    reasons.append(f"Nothing speaks against it: no deterioration, {aborts}, checks of quality passed.")
    return reasons + [f"To be known, {one}" for one in said]


def _not_yet(evidence: Evidence, found: Decision, missing: list[str]) -> list[str]:
    plan = evidence.plan
    if found.comparison is None:
        return ["No block of the comparison is complete yet.", *missing]
    effect = _effect(plan, found)
    state = "this is proved" if found.is_superior else "not proved yet"
    look = f"; {_look(found)}" if found.looks else f"; the first of {found.n_looks} looks is still to come"
    reasons = [f"{effect[0].upper()}{effect[1:]}: {state}{look}."]
    if found.is_superior:
        reasons += missing
    else:
        reasons += [reason for reason in missing if not reason.startswith("Guardrail")]
    if evidence.n_left == 0:
        reasons.append(
            f"All {len(evidence.compared)} planned episodes are there, and leave it open. For more, amend the plan, and know "
            "that going on because a result is open raises the chance of a false go."
        )  # fmt: skip
    return reasons


def _more_episodes(evidence: Evidence, found: Decision) -> int:
    """Those that are planned still; if none, those that it would take to see the smallest effect."""
    if evidence.n_left or found.comparison is None:
        return evidence.n_left
    needed = episodes_needed(evidence.plan, found.comparison.spread, evidence.plan.primary.smallest_effect)
    return max(evidence.plan.blocks.episodes, needed - len(evidence.compared))


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
