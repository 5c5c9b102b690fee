"""What to expect of a trial, in words and numbers."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.pages.words import number
from sb3_offline_ft.trial.evidence import amount
from sb3_offline_ft.trial.plan import RETURN
from sb3_offline_ft.trial.planning import PlanResult
from sb3_offline_ft.trial.simulation import Outcomes


def show_plan(result: PlanResult, console: Console) -> None:
    """
    Show what to expect of a trial.

    :param result: What :func:`~sb3_offline_ft.trial.planning.plan_trial` said
    :param console: Where
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in plan_rows(result):
        table.add_row(name, Text(words))
    console.print(table)


def plan_rows(result: PlanResult) -> Iterator[tuple[str, str]]:
    """
    :param result: What to expect
    :return: Each answer with the name of its question
    """
    plan = result.plan
    metric, effect = plan.metric(plan.primary.metric), amount(plan.primary.smallest_effect, "")
    shown = amount(plan.primary.smallest_effect, metric.unit)
    question = f"Is {plan.candidate} better than {plan.baseline} by {metric.name}?"
    yield "Question", f"{question} The smallest effect worth having is {shown}."
    spread = f"{amount(result.spread, metric.unit)} from episode to episode"
    yield "Baseline", f"mean {amount(result.baseline.value, metric.unit)}, spread {spread}; by {result.source}."
    yield "Is it long enough?", _length(result, shown)
    yield f"Better by {effect}", _chances(result.better)
    yield "As good", f"{_chances(result.equal)} A go is false here: {100 * plan.error_rates.false_go:g} % are planned."
    yield f"Worse by {effect}", _chances(result.worse)
    total = sum(stage.episodes for stage in plan.stages)
    supervised = sum(stage.episodes for stage in plan.stages if stage.supervised)
    duration = f" and {number(result.hours)} hours" if result.hours else ""
    yield (
        "Duration and cost",
        (f"at most {total} episodes{duration}, {supervised} of them supervised: {number(result.cost)} {plan.currency}."),
    )
    yield "Worst loss", _worst_loss(result)
    yield "Worth a year", _value(result)
    data = "not asked: `data` names no dataset, or the policies cannot be loaded." if plan.data is None else "not asked."
    yield "Do the data suffice?", data if result.verdict is None else result.verdict.text
    if result.advice is not None:
        yield "Recipe for these data", result.advice.text
    for note in result.notes:
        yield "Note", note


def _percent(count: int, outcomes: Outcomes) -> str:
    return f"{100 * count / outcomes.trials:.0f} %"


def _chances(outcomes: Outcomes) -> str:
    not_yet = outcomes.trials - outcomes.go - outcomes.no_go
    shares = zip(("go", "no-go", "not yet"), (outcomes.go, outcomes.no_go, not_yet), strict=True)
    words = ", ".join(f"{name} {_percent(count, outcomes)}" for name, count in shares)
    return f"{words}, after {outcomes.episodes:.0f} episodes on average ({outcomes.trials} simulated trials)."


def _length(result: PlanResult, shown: str) -> str:
    plan, wanted = result.plan, f"{100 * (1 - result.plan.error_rates.missed):g} %"
    facts = (
        f"{plan.compared_episodes} episodes are compared; with equal shares about {result.needed} would show {shown} with a "
        f"chance of {wanted}."
    )
    if result.reaches_power:
        return f"Yes. {facts}"
    visible = amount(result.visible, plan.metric(plan.primary.metric).unit)
    last = [stage for stage in plan.stages if stage.compares][-1]
    advice = f"No: a candidate that is better by {shown} would pass too rarely. {facts} What could be done: "
    options = [f"plan for an effect of {visible}, which this plan does show"]
    if result.enough is not None:
        episodes, outcomes = result.enough
        more = episodes - last.episodes
        options.insert(
            0,
            f"give {last.name!r} {episodes} episodes and the budget {plan.budget + more}, then the chance is "
            f"{_percent(outcomes.go, outcomes)}",
        )
    if any(stage.share < 0.5 for stage in plan.stages if stage.compares):
        options.append("let more of the episodes be in a ramp with a share of 0.5, where an episode tells most")
    return f"{advice}{'; or '.join(options)}."


def _worst_loss(result: PlanResult) -> str:
    plan = result.plan
    if result.worst_loss is None and plan.risk is not None:
        return "bounded by `risk`, but nothing is known of the baseline's return yet: set `risk.baseline_return`."
    if result.worst_loss is None:
        return "not bounded: set `risk` in the plan, to have a budget of it."
    unit, money = plan.metric(RETURN).unit, f", or {number(result.worst_cost)} {plan.currency}" if result.worst_cost else ""
    return f"the risk budget lets the candidate lose {amount(result.worst_loss, unit)} of return in all{money}."


def _value(result: PlanResult) -> str:
    plan, value = result.plan, result.value
    if not value.value:
        return "not known: set `value_per_unit` of the primary metric, and `costs.episodes_per_year`."
    words = (
        f"{number(value.value)} {plan.currency} with the smallest effect; a trial that finds just this leaves an interval of "
        f"{number(value.low)} to {number(value.high)}."
    )
    if result.payback_days is None:
        return words
    return f"{words} Trial and deployment are paid for after {number(result.payback_days)} days of service."
