"""What a plan may become after the first episode."""

from sb3_offline_ft.trial.machine import TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan

FIXED = ("env", "env_kwargs", "baseline", "candidate", "seed", "blocks", "action_bounds")
"""What an amendment cannot change: what has been drawn and measured would not belong to the plan any more."""


def check_amendment(machine: TrialMachine, after: TrialPlan) -> None:
    """
    Refuse changes after which the episodes so far would not belong to the plan.

    :param machine: The trial
    :param after: The plan as it shall be
    :raises ValueError: Something cannot be changed any more
    """
    before, advice = machine.plan, "begin a new trial for that."
    for name in FIXED:
        if getattr(before, name) != getattr(after, name):
            raise ValueError(f"`{name}` cannot be amended after the first episode: {advice}")
    begun = before.stages[: machine.begun_stages]
    if after.stages[: machine.begun_stages] != begun:
        raise ValueError(f"Stages that have begun ({', '.join(stage.name for stage in begun)}) cannot be amended: {advice}")
    for metric in before.metrics:
        found = next((one for one in after.metrics if one.name == metric.name), None)
        measured = ("source", "aggregate", "better")
        if found is None or any(getattr(found, name) != getattr(metric, name) for name in measured):
            raise ValueError(f"`metrics.{metric.name}` was measured in another way, and cannot be amended: {advice}")
    if after.budget < machine.n_counted:
        raise ValueError(f"`budget.episodes` must be at least {machine.n_counted}: so many have been used.")
