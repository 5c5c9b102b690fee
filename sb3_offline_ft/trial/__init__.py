"""From a policy that runs today and a candidate to a go or no-go on a real system. The names are imported on first use."""

from typing import TYPE_CHECKING

from sb3_offline_ft.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_offline_ft.trial.advice import recipe_for
    from sb3_offline_ft.trial.assignment import Assignment
    from sb3_offline_ft.trial.decision import Decision, decide
    from sb3_offline_ft.trial.machine import EpisodeRecord, Finished, TrialMachine
    from sb3_offline_ft.trial.plan import TrialPlan
    from sb3_offline_ft.trial.planning import PlanResult, plan_trial
    from sb3_offline_ft.trial.reading import read_plan
    from sb3_offline_ft.trial.report import write_report
    from sb3_offline_ft.trial.running import run_trial
    from sb3_offline_ft.trial.trial import Recorded, Trial

__all__ = [
    "Assignment",
    "Decision",
    "EpisodeRecord",
    "Finished",
    "PlanResult",
    "Recorded",
    "Trial",
    "TrialMachine",
    "TrialPlan",
    "decide",
    "plan_trial",
    "read_plan",
    "recipe_for",
    "run_trial",
    "write_report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "advice": ("recipe_for",),
        "assignment": ("Assignment",),
        "decision": ("Decision", "decide"),
        "machine": ("EpisodeRecord", "Finished", "TrialMachine"),
        "plan": ("TrialPlan",),
        "planning": ("PlanResult", "plan_trial"),
        "reading": ("read_plan",),
        "report": ("write_report",),
        "running": ("run_trial",),
        "trial": ("Recorded", "Trial"),
    },
)
