"""Where a trial is, in words."""

from collections.abc import Iterator

import numpy as np

from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm, Assignment
from sb3_offline_ft.trial.checklist import read_checklist
from sb3_offline_ft.trial.journal import kinds
from sb3_offline_ft.trial.machine import EpisodeRecord, Finished
from sb3_offline_ft.trial.plan import Metric, TrialPlan
from sb3_offline_ft.trial.trial import Trial


def status_rows(trial: Trial) -> Iterator[tuple[str, str]]:
    """
    :param trial: A trial
    :return: What there is to know, each with its name
    """
    machine, plan, events = trial.machine, trial.plan_in_force, trial.journal.events
    yield "plan", _plan_words(trial)
    for event in kinds(events, "plan_changed", "amendment"):
        words = "amended" if event["event"] == "amendment" else "file changed after the first episode, not in force"
        reason = f" because {event['reason']}" if "reason" in event else ""
        yield f"plan, {event['time'][:16]}", f"{words}{reason}: {'; '.join(event['difference'])}"
    yield "stage", f"{machine.stage or 'all are done'}; {machine.n_counted} of {plan.budget} episodes of the budget"
    for arm in (BASELINE, CANDIDATE):
        yield arm, f"{getattr(plan, arm)}: {_arm_words(plan, machine.episodes, arm)}"
    lost = [f"{len(machine.aborts)} aborted (more than {plan.abort.most}: no-go)"]
    lost.append(f"{sum(record.is_missing for record in machine.episodes)} missing")
    yield "episodes lost", ", ".join(lost)
    if machine.risk is not None:
        yield "risk", f"{machine.risk.lost:.2f} of {machine.risk.allowance:.2f} total losses spent"
    drills = [event for event in machine.drills if event.get("baseline_took_over")]
    yield "rollback drill", f"{len(drills)} of {len(machine.drills)}: the baseline took over" if machine.drills else "none yet"
    if open_items := [item.name for item in read_checklist(trial.folder) if not item.is_ticked]:
        yield "not ticked", ", ".join(open_items)
    decision = trial.decide()
    yield "decision", f"{decision.decision}. {' '.join(decision.reasons)}"
    upcoming = machine.next()
    yield "under way" if machine.open is not None else "next", in_words(upcoming, plan)


def in_words(upcoming: Assignment | Finished, plan: TrialPlan) -> str:
    """What comes next."""
    if isinstance(upcoming, Finished):
        return upcoming.reason
    policy = getattr(plan, upcoming.arm)
    return f"episode {upcoming.episode}, {upcoming.stage}: the {upcoming.arm} drives ({policy}). {upcoming.why}"


def _plan_words(trial: Trial) -> str:
    if not trial.is_begun:
        return "not frozen yet: it is when the first episode begins"
    start = kinds(trial.journal.events, "start")[0]
    return f"frozen {start['time'][:16]} UTC, {trial.plan_in_force.digest[:12]}"


def _arm_words(plan: TrialPlan, episodes: list[EpisodeRecord], arm: Arm) -> str:
    own = [record for record in episodes if record.arm == arm and record.excluded is None]
    if not own:
        return "no episode yet"
    means = [words for metric in plan.metrics if (words := _mean_words(metric, own))]
    return f"{len(own)} episode{'s' * (len(own) != 1)}, mean {', '.join(means)}"


def _mean_words(metric: Metric, episodes: list[EpisodeRecord]) -> str:
    values = [value for record in episodes if (value := record.metrics.get(metric.name)) is not None]
    return f"{metric.name} {np.mean(values):.4g} {metric.unit}".strip() if values else ""
