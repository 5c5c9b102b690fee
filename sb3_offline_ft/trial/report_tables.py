"""The tables of a trial's report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sb3_offline_ft.evaluation.robustness.result import KEPT, RobustnessResult
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import NBSP, NONE, counted, listed, number, ranged
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE
from sb3_offline_ft.trial.checklist import ChecklistItem
from sb3_offline_ft.trial.comparison import LookResult
from sb3_offline_ft.trial.decision import Decision
from sb3_offline_ft.trial.machine import EpisodeRecord, TrialMachine
from sb3_offline_ft.trial.plan import Metric, TrialPlan

ARMS = (BASELINE, CANDIDATE)
SHORT_HASH = 16


def titled(metric: Metric) -> str:
    """A metric with its unit."""
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def values_of(episodes: Iterable[EpisodeRecord], metric: str, arm: str) -> list[float]:
    """What the episodes in which a policy acted from the beginning to the end have measured."""
    kept = [record for record in episodes if record.arm == arm and record.excluded is None]
    return [value for record in kept if (value := record.metrics.get(metric)) is not None]


def mean_text(values: Sequence[float]) -> str:
    """A mean and the standard deviation."""
    if not values:
        return NONE
    spread = f" \N{PLUS-MINUS SIGN} {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return f"{number(float(np.mean(values)))}{spread}"


def metrics_table(plan: TrialPlan, machine: TrialMachine, improvements: Mapping[str, Estimate], level: str) -> TextTable:
    """Both policies by every metric, in the episodes of the comparison."""
    compared = [record for record in machine.episodes if record.is_compared]
    roles = {rail.metric: f"guardrail, {_bound(rail.margin, rail.limit)}" for rail in plan.guardrails}
    roles[plan.primary.metric] = f"primary, by {plan.primary.smallest_effect:g} or more"
    rows = []
    for metric in plan.metrics:
        means = [mean_text(values_of(compared, metric.name, arm)) for arm in ARMS]
        if metric.name not in roles and means == [NONE, NONE]:
            continue
        improvement = ranged(improvements.get(metric.name))
        rows.append([titled(metric), f"{metric.better} is better", *means, improvement, roles.get(metric.name, NONE)])
    columns = ["metric", "", "baseline", "candidate", f"better by ({level} interval)", "in the plan"]
    note = (
        "Means and standard deviations of the compared episodes, without aborted ones. The improvement is that within blocks, "
        "in which an aborted episode of the candidate counts as the worst."
    )
    return TextTable("metrics", columns, rows, "Both policies by every metric", note)


def _bound(margin: float | None, limit: float | None) -> str:
    return f"mean within {limit:g}" if limit is not None else f"worse by less than {margin:g}"


def stages_table(plan: TrialPlan, machine: TrialMachine) -> TextTable:
    """What the stages planned, and what came of them."""
    rows = []
    for stage in plan.stages:
        done = [record for record in machine.episodes if record.stage == stage.name]
        aborts = sum(abort.get("stage") == stage.name for abort in machine.aborts)
        n_candidate = sum(record.arm == CANDIDATE for record in done)
        means = [mean_text(values_of(done, plan.primary.metric, arm)) for arm in ARMS]
        share = NONE if stage.kind == "shadow" else f"{n_candidate} ({100 * stage.share:g}{NBSP}% planned)"
        rows.append([stage.name, f"{len(done)} of {stage.episodes}", share, *means, str(aborts)])
    columns = ["stage", "episodes", "of the candidate", "baseline", "candidate", "aborts"]
    return TextTable("stages", columns, rows, "Stages", f"Means of {titled(plan.metric(plan.primary.metric))}.")


def aborts_table(machine: TrialMachine) -> TextTable:
    """Every abort, and how fast the baseline took over."""
    rows = [
        [str(one["episode"]), str(one.get("stage", NONE)), str(one["step"]), str(one["reason"]),
         milliseconds(_thousandfold(one.get("seconds_to_baseline"))), str(one.get("steps_file") or NONE)]
        for one in machine.aborts
    ]  # fmt: skip
    columns = ["episode", "stage", "step", "why", "baseline acted after", "last steps"]
    return TextTable("aborts", columns, rows, "Aborts")


def drills_table(machine: TrialMachine) -> TextTable:
    """Every rollback drill."""
    rows = [
        [str(one["episode"]), str(one["step"]), "yes" if one["baseline_took_over"] else "NO",
         milliseconds(_thousandfold(one.get("seconds_to_baseline"))), str(one.get("time", NONE))]
        for one in machine.drills
    ]  # fmt: skip
    columns = ["episode", "step", "baseline took over", "it acted after", "when"]
    return TextTable("drills", columns, rows, "Rollback drills")


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{number(100 * share, 1)}{NBSP}%"


def milliseconds(*values: float | None) -> str:
    """Short durations."""
    return NONE if None in values else f"{' / '.join(f'{value:.3g}' for value in values)}{NBSP}ms"


def violations_table(plan: TrialPlan, machine: TrialMachine) -> TextTable:
    """How the limits within an episode were kept."""
    rows = []
    for limit in plan.abort.limits:
        named = (("at least", limit.min), ("at most", limit.max))
        bounds = [f"{words} {bound:g}" for words, bound in named if bound is not None]
        for arm in ARMS:
            of_arm = [record for record in machine.episodes if record.arm == arm and record.violations is not None]
            found = [one for record in of_arm if (one := (record.violations or {}).get(limit.source))]
            worst = [one["worst"] for one in found if one["worst"] is not None]
            farthest = max(worst, key=lambda value: _excess(value, limit.min, limit.max), default=None)
            rows.append([
                limit.source, listed(bounds), arm, f"{len(found)} of {len(of_arm)}", str(sum(one["count"] for one in found)),
                str(sum(one["steps"] for one in found)), number(farthest),
            ])  # fmt: skip
    columns = ["limit", "", "policy", "episodes", "times crossed", "steps beyond", "worst"]
    note = "An episode is of the policy that was to act. After an abort the baseline went on; its steps are counted here too."
    return TextTable("violations", columns, rows, "Limits within episodes", note)


def _excess(value: float, low: float | None, high: float | None) -> float:
    return max(0.0 if low is None else low - value, 0.0 if high is None else value - high)


def actuators_table(machine: TrialMachine) -> TextTable:
    """Travel, saturation and latency of both policies."""
    rows = []
    for arm in ARMS:
        found = [record.travel for record in machine.episodes if record.arm == arm and record.travel is not None]
        if not found:
            continue
        weights = np.array([one["steps"] for one in found], dtype=np.float64)
        travel = np.array([one["travel"] for one in found]) / np.maximum(weights - 1, 1)[:, None]
        saturation = np.array([one["saturation"] for one in found])
        beyond = np.array([one["beyond"] for one in found])
        latencies = [one["latency_ms"] for one in found if one["latency_ms"] is not None]
        medians, p99s = ([one[name] for one in latencies] for name in ("median", "p99"))
        rows.append([
            arm, _per_actuator(np.average(travel, axis=0, weights=weights), number),
            _per_actuator(np.average(saturation, axis=0, weights=weights), percent),
            percent(float(np.average(beyond, weights=weights))),
            milliseconds(float(np.median(medians)), max(p99s)) if latencies else NONE,
        ])  # fmt: skip
    columns = ["policy", "travel a step", "saturated", "beyond bounds", "latency, median / worst 99th percentile"]
    note = (
        "Travel: how far actions move from step to step, in ranges of the actuator. Saturated: share of the steps within "
        "0.5 % of a bound. With several actuators the mean, and the one that has most of it (counted from 0)."
    )
    return TextTable("actuators", columns, rows, "Actuators", note)


def _thousandfold(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _per_actuator(values: np.ndarray, text: Any) -> str:
    worst = int(values.argmax())
    if len(values) == 1:
        return str(text(float(values[0])))
    return f"{text(float(values.mean()))} (most: {text(float(values[worst]))}, actuator {worst})"


def shadow_table(machine: TrialMachine) -> TextTable:
    """What the candidate would have done while the baseline acted."""
    rows = []
    for record in machine.episodes:
        shadow = record.shadow
        if shadow is None:
            continue
        distance, latency, faults = shadow.get("distance"), shadow.get("latency_ms"), shadow.get("faults") or {}
        told = f"{sum(faults.values())}: {listed(faults, ';')}" if faults else "0"
        if distance is None or latency is None:
            rows.append([str(record.episode), *[NONE] * 4, told])
            continue
        rows.append([
            str(record.episode), " / ".join(percent(distance[name]) for name in ("mean", "p95", "max")),
            percent(shadow["beyond"]), _per_actuator(np.array(shadow["saturation"]), percent),
            milliseconds(latency["median"], latency["p99"]), told,
        ])  # fmt: skip
    columns = [
        "episode", "distance of actions, mean / 95th percentile / largest", "beyond bounds", "saturated",
        "latency, median / 99th percentile", "actions that cannot be sent",
    ]  # fmt: skip
    note = "Distances in shares of the range of the actions, mean of the actuators."
    return TextTable("shadow", columns, rows, "Shadow", note)


def service_table(machine: TrialMachine) -> TextTable:
    """How much of the time the candidate acted, and how often it handed back."""
    with_steps = [record.acted for record in machine.episodes if record.acted is not None]
    total = sum(sum(acted.values()) for acted in with_steps)
    rows = []
    if total:
        candidate = sum(acted.get(CANDIDATE, 0) for acted in with_steps)
        rows.append(["share of all steps in which the candidate acted", f"{percent(candidate / total)} of {total:,}"])
    own = [record for record in machine.episodes if record.arm == CANDIDATE]
    steps = sum(sum((record.acted or {}).values()) for record in own)
    if steps:
        acted = sum((record.acted or {}).get(CANDIDATE, 0) for record in own)
        rows.append(["share of its own episodes' steps in which it acted", percent(acted / steps)])
    rows.append(["episodes of the candidate", f"{len(own)} of {len(machine.episodes)}"])
    rows.append(["hand-backs to the baseline (aborts)", str(len(machine.aborts))])
    rows.append(["episodes that got lost", str(sum(record.is_missing for record in machine.episodes))])
    return TextTable("service", ["", ""], rows, "Time in service")


def regimes_table(plan: TrialPlan, machine: TrialMachine) -> TextTable:
    """The primary metric of both policies in each regime."""
    regimes = sorted({record.regime for record in machine.episodes if record.regime})
    rows = []
    for regime in regimes:
        within = [record for record in machine.episodes if record.regime == regime and record.is_compared]
        baseline, candidate = (values_of(within, plan.primary.metric, arm) for arm in ARMS)
        better = NONE
        if baseline and candidate:
            better = number(plan.sign(plan.primary.metric) * float(np.mean(candidate) - np.mean(baseline)))
        counts = f"{len(baseline)} and {len(candidate)}"
        rows.append([regime, counts, mean_text(baseline), mean_text(candidate), better])
    columns = ["regime", "episodes", "baseline", "candidate", "better by"]
    note = f"{titled(plan.metric(plan.primary.metric))}, compared episodes. Few of them make no proof for a regime alone."
    return TextTable("regimes", columns, rows, "By regime", note)


def tests_table(plan: TrialPlan, decision: Decision) -> TextTable:
    """Every test that was made, with what it had to reach."""
    rows = [_look_row("better (primary)", look, decision.n_looks, i) for i, look in enumerate(decision.looks)]
    for result in decision.guardrails:
        name = f"guardrail {result.guardrail.metric} holds"
        rows += [_look_row(name, look, decision.n_looks, i) for i, look in enumerate(result.looks)]
    at_any_time = ["worse: stop now", "after each episode", f"{decision.deterioration_p:.3g}"]
    is_worse = decision.deterioration_p <= plan.error_rates.false_stop
    rows.append([*at_any_time, f"{plan.error_rates.false_stop:.3g}", "YES" if is_worse else "no"])
    columns = ["test", "when", "p", "needed", "proved"]
    note = (
        f"Chances of a wrong decision by the plan: go for a candidate that is no better {plan.error_rates.false_go:g}, stop "
        f"of one that is not worse {plan.error_rates.false_stop:g}; if there are enough episodes, one that is better by "
        f"{plan.primary.smallest_effect:g} is missed with {plan.error_rates.missed:g}. Looks are at planned times only; the "
        "tests compare with all orders of the policies that could have been drawn within the blocks."
    )
    return TextTable("tests", columns, rows, "Tests", note)


def _look_row(name: str, look: LookResult, n_looks: int, index: int) -> list[str]:
    when = f"look {index + 1} of {n_looks}, after {counted(look.look.blocks, 'block')}"
    return [name, when, f"{look.p:.3g}", f"{look.level:.3g}", "YES" if look.is_crossed else "no"]


def quality_table(decision: Decision) -> TextTable:
    """The checks of quality."""
    rows = [
        [check.name, check.text, ("NO GO" if check.blocks_go else "to be known") if check.fired else "passed"]
        for check in decision.quality
    ]
    return TextTable("quality", ["check", "found", ""], rows, "Quality of the trial")


def checklist_table(items: Sequence[ChecklistItem], ticked: Mapping[str, str]) -> TextTable:
    """
    Who ticked what.

    :param items: The checklist as it is now
    :param ticked: When the journal says that an item was ticked, by name
    """
    rows = []
    for item in items:
        state = f"\N{BALLOT BOX WITH CHECK} {item.who or 'no name given'}" if item.is_ticked else "\N{BALLOT BOX} open"
        rows.append([item.name, item.text.replace("`", ""), state, ticked.get(item.name, NONE)])
    return TextTable("checklist", ["item", "", "ticked by", "noted"], rows)


def episodes_table(plan: TrialPlan, machine: TrialMachine) -> TextTable:
    """Every episode with its numbers."""
    rows = []
    for record in machine.episodes:
        values = [number(record.metrics.get(metric.name)) for metric in plan.metrics]
        block = NONE if record.block is None else str(record.block)
        steps = NONE if record.steps is None else str(record.steps)
        rows.append([
            str(record.episode), record.stage, record.arm, block, f"{record.share:.2g}", *values, steps,
            record.excluded or "", (record.time or NONE)[:19].replace("T", " "),
        ])  # fmt: skip
    names = [titled(metric) for metric in plan.metrics]
    columns = ["episode", "stage", "policy", "block", "share", *names, "steps", "excluded", "recorded (UTC)"]
    return TextTable("episodes", columns, rows, "Every episode in numbers")


def robustness_table(result: RobustnessResult) -> TextTable:
    """At which levels of what was changed each policy keeps its return."""
    rows = []
    for response in result.responses:
        row = [response.name, response.what, f"{response.nominal:g}"]
        for role in result.policies:
            kept, means = result.kept(role, response), response.means(role)
            row += [NONE if kept is None else str(kept), number(float(np.nanmin(means)))]
        rows.append(row)
    columns = ["changed", "level", "nominal"]
    for role in result.policies:
        columns += [f"{role} keeps its return", "lowest mean return"]
    nominal = [f"{role} {number(result.nominal_return(role))}" for role in result.policies]
    note = (
        f"Kept: at least {100 * KEPT:g} % of the mean return without a change ({listed(nominal)}) above that of a random "
        f"policy, {number(result.random_return)}. {counted(result.n_seeds, 'episode')} at each level; arrows: nothing beyond "
        "was tried."
    )
    return TextTable("robustness", columns, rows, "Where the return is kept", note)
