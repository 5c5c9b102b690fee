"""Plans of trials, and trials that are run with made-up returns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sb3_offline_ft.trial.assignment import Assignment
from sb3_offline_ft.trial.machine import Finished, TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan
from sb3_offline_ft.trial.reading import parse_plan

STAGES: list[dict[str, Any]] = [
    {"name": "shadow", "episodes": 3},
    {"name": "pilot", "episodes": 8, "share": 0.25},
    {"name": "ramp 50 %", "episodes": 12, "share": 0.5},
    {"name": "full", "episodes": 4},
]


def plan_content(**sections: Any) -> dict[str, Any]:
    """What a small plan's file says, without an environment."""
    return {
        "baseline": "PID",
        "candidate": "TD3C",
        "primary": {"metric": "return", "smallest_effect": 1.0},
        "budget": {"episodes": 30},
        "stages": STAGES,
        **sections,
    }


def plan_of(**sections: Any) -> TrialPlan:
    """A small plan."""
    return parse_plan(plan_content(**sections), Path("trial.yml"))


def drive(machine: TrialMachine, returns: Callable[[Assignment], float | None]) -> tuple[list[dict[str, Any]], Finished]:
    """Runs a trial to its end; its events, and why there is no next episode."""
    events: list[dict[str, Any]] = []

    def apply(**event: Any) -> None:
        machine.apply(event)
        events.append(event)

    while not isinstance(upcoming := machine.next(), Finished):
        apply(event="assignment", **upcoming.as_event())
        value = returns(upcoming)
        if value is None:
            apply(event="missing", episode=upcoming.episode, reason="power cut")
        else:
            apply(event="episode", episode=upcoming.episode, metrics={"return": value}, excluded=None)
    return events, upcoming
