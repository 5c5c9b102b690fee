"""Why a trial was decided as it was, in words."""

from typing import TYPE_CHECKING

from sb3_offline_ft.trial.evidence import amount

if TYPE_CHECKING:
    from sb3_offline_ft.trial.decision import Decision


def reasons_of(decision: "Decision") -> list[str]:
    """
    :param decision: The decision
    :return: Its reasons, the most important one first
    """
    return {"go": _for, "no-go": _against, "not yet": _open}[decision.decision](decision)


def _unit(decision: "Decision") -> str:
    return decision.plan.metric(decision.plan.primary.metric).unit


def _effect(decision: "Decision") -> str:
    """The effect with its interval."""
    effect = decision.effect
    way = "better" if effect.value >= 0 else "worse"
    text = f"By {decision.plan.primary.metric}, the candidate is {way} by {amount(abs(effect.value), _unit(decision))}"
    if effect.has_interval:
        level = f"{100 * decision.confidence:g} %"
        text += f" ({level} interval of the improvement: {effect.low:.4g} to {effect.high:.4g})"
    return text


def _look(decision: "Decision", index: int) -> str:
    look = decision.looks[index]
    return f"p = {look.p:.2g} at look {index + 1} of {decision.n_looks}, where {look.level:.2g} was needed"


def _for(decision: "Decision") -> list[str]:
    plan, smallest = decision.plan, decision.plan.primary.smallest_effect
    crossed = [look.is_crossed for look in decision.looks].index(True)
    reasons = [f"{_effect(decision)}: proved, {_look(decision, crossed)}."]
    if decision.effect.value < smallest:
        reasons.append(f"That may be less than the smallest effect worth having, {amount(smallest, _unit(decision))}.")
    reasons += [f"Guardrail {each.guardrail.metric}: {each.text}" for each in decision.guardrails]
    aborts = f"{decision.n_aborts} aborts of at most {plan.abort.most}" if decision.n_aborts else "no abort"
    reasons.append(f"Nothing speaks against it: no deterioration, {aborts}, the checks of quality passed.")
    return reasons + [f"To be known, {check.name}: {check.text}" for check in decision.quality if check.fired]


def _against(decision: "Decision") -> list[str]:
    plan, reasons = decision.plan, []
    if decision.is_worse:
        reasons.append(
            f"The candidate is worse than the baseline: p = {decision.deterioration_p:.2g}, and "
            f"{plan.error_rates.false_stop:.2g} is enough to stop at any episode."
        )
    if decision.is_aborted_too_often:
        reasons.append(f"{decision.n_aborts} of the candidate's episodes were aborted, at most {plan.abort.most} may be.")
    reasons += [f"Guardrail {each.guardrail.metric}: {each.text}" for each in decision.guardrails if each.is_violated]
    if decision.is_too_small:
        reasons.append(
            f"All {len(decision.evidence.compared)} planned episodes are there, and exclude the smallest effect worth having, "
            f"{amount(plan.primary.smallest_effect, _unit(decision))}. {_effect(decision)}."
        )
    return reasons


def _open(decision: "Decision") -> list[str]:
    if decision.comparison is None:
        reasons = ["No block of the comparison is complete yet."]
    elif not decision.looks:
        reasons = [f"{_effect(decision)}: the first of {decision.n_looks} looks is still to come."]
    else:
        state = "proved" if decision.is_superior else "not proved"
        reasons = [f"{_effect(decision)}: {state}, {_look(decision, len(decision.looks) - 1)}."]
    if decision.is_superior:
        reasons += [f"Guardrail {each.guardrail.metric}: {each.text}" for each in decision.guardrails if not each.holds]
    reasons += [f"Quality, {check.name}: {check.text}" for check in decision.quality if check.fired and check.blocks_go]
    if decision.cut is not None:
        reasons.append(f"The trial was cut short. {decision.cut}")
    elif decision.evidence.n_left == 0:
        reasons.append(
            f"All {len(decision.evidence.compared)} planned episodes are there, and leave it open. To go on, amend the plan, "
            "and know that going on because a result is open raises the chance of a false go."
        )
    return reasons
