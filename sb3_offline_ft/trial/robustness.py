"""What a trial does before the candidate acts: both policies in environments that are changed."""

import hashlib
from pathlib import Path

from rich.console import Console

from sb3_offline_ft.evaluation.robustness import InfoMetric, RobustnessResult, run_robustness, write_files
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE
from sb3_offline_ft.trial.measuring import INFO
from sb3_offline_ft.trial.plan import Robustness
from sb3_offline_ft.trial.trial import Trial


def try_robustness(trial: Trial, *, n_jobs: int = 1, device: str = "cpu", console: Console | None = None) -> RobustnessResult:
    """
    Try both policies of a trial in its environment, changed as the plan says; without a word of it there, in all ways.

    The result is ``robustness.json`` in the folder, with its picture beside it, and noted in the journal.

    :param trial: The trial, whose plan has an environment
    :param n_jobs: Number of processes
    :param device: Torch device of the policies
    :param console: Where to show the progress; nothing is shown if omitted
    :return: What came of it
    :raises ValueError: There is no environment, a policy does not fit, or the environment does not have such a perturbation
    :raises OSError: A policy's file cannot be read, or a file cannot be written
    """
    plan = trial.plan_in_force
    if plan.env is None:
        raise ValueError("This trial has no environment to change: name `env` in the plan.")
    asked = plan.robustness or Robustness()
    sources = {metric: metric.source for metric in plan.metrics if metric.source is not None}
    result = run_robustness(
        {CANDIDATE: plan.candidate, BASELINE: plan.baseline},
        plan.env,
        None if asked.perturb is None else dict(asked.perturb),
        env_kwargs=plan.env_kwargs,
        n_seeds=asked.seeds,
        seed=plan.seed,
        n_jobs=n_jobs,
        metrics=[
            InfoMetric(metric.name, source.removeprefix(INFO), metric.aggregate)
            for metric, source in sources.items()
            if source.startswith(INFO)
        ],
        random_return=None if plan.risk is None else plan.risk.random_return,
        device=device,
        console=console,
    )
    file: Path = write_files(result, trial.folder)[0]
    trial.append("robustness", file=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    return result
