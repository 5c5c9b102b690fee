"""Policies in perturbed environments, in one process or several, with the same outcome."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch as th
from rich.console import Console

from sb3_offline_ft.common.checks import whole_number
from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.observations import Observations, map_observations
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.datasets.tools.show import progress_bar
from sb3_offline_ft.evaluation.robustness.episodes import InfoMetric, Job, Outcome, Setting, Stage
from sb3_offline_ft.evaluation.robustness.perturbations import Env, Perturbation, find_perturbation, possible
from sb3_offline_ft.evaluation.robustness.result import RETURN, Policy, Response, RobustnessResult, Values

RANDOM = "random"
"""Role of the random policy."""
PACKAGES = ("sb3-offline-ft", "stable-baselines3", "gymnasium", "mujoco", "numpy", "torch")


def run_robustness(
    policies: Mapping[str, str],
    env_id: str,
    grid: Mapping[str, Sequence[float]] | None = None,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    n_seeds: int = 10,
    seed: int = 0,
    n_jobs: int = 1,
    metrics: Sequence[InfoMetric] = (),
    random_return: float | None = None,
    device: str = "cpu",
    safe_load: bool = False,
    console: Console | None = None,
) -> RobustnessResult:
    """
    Try policies in an environment that is changed in many ways, each of which is another one than they were made for.

    All policies meet the same episodes and the same disturbances. The outcome depends on the arguments only, not on the number
    of processes. Scripts that use more than one need ``if __name__ == "__main__":``.

    :param policies: What :func:`~sb3_offline_ft.controllers.load_controller` takes, by role: ``candidate``, perhaps
        ``baseline``
    :param env_id: Gymnasium id of the environment
    :param grid: Levels by the name of a perturbation; an empty sequence for its default ones. All perturbations that the
        environment has if omitted
    :param env_kwargs: Arguments of the environment
    :param n_seeds: Number of episodes at each level
    :param seed: The number that all seeds are derived from
    :param n_jobs: Number of processes
    :param metrics: What is measured beside the return
    :param random_return: Mean return of a random policy; measured if omitted
    :param device: Torch device of the policies
    :param safe_load: Whether nothing of saved policies may be unpickled (see :func:`sb3_offline_ft.safe_load`)
    :param console: Where to show the progress; nothing is shown if omitted
    :return: What came of it
    :raises ValueError: A perturbation is unknown or the environment does not have it, a policy does not fit, or fails
    """
    n_seeds, n_jobs = whole_number(n_seeds, "n_seeds", 1), whole_number(n_jobs, "n_jobs", 1)
    specs = dict(policies) | ({RANDOM: "random"} if random_return is None else {})
    setting = Setting(env_id, dict(env_kwargs or {}), specs, tuple(metrics), whole_number(seed, "seed"), device, safe_load)
    with closing(Stage(setting)) as stage:
        levels = _levels(grid, stage.env)
        shown = {role: Policy(stage.controllers[role].name, stage.controllers[role].sha256) for role in policies}
        perturbations = list(levels)
        nominal_jobs = [Job(role, number) for role in specs for number in range(n_seeds)]
        changed_jobs = [
            Job(role, number, perturbation.name, level)
            for perturbation in perturbations
            for level in levels[perturbation]
            for role in policies
            for number in range(n_seeds)
        ]
        with _players(stage, n_jobs, len(nominal_jobs) + len(changed_jobs), console) as play:
            nominal = play(nominal_jobs, None)
            spread = _spread([nominal[job] for job in nominal_jobs if job.role == next(iter(policies))])
            outcomes = nominal | play(changed_jobs, spread)

    def values(role: str, name: str | None, level: float | None) -> Values:
        episodes = [outcomes[Job(role, number, name, level)].values for number in range(n_seeds)]
        return {metric: tuple(each[metric] for each in episodes) for metric in episodes[0]}

    def response(perturbation: Perturbation) -> Response:
        tried = sorted({*levels[perturbation], perturbation.nominal})
        named = [(None, None) if level == perturbation.nominal else (perturbation.name, level) for level in tried]
        by_role = {role: tuple(values(role, *each) for each in named) for role in policies}
        return Response(perturbation.name, perturbation.what, perturbation.nominal, tuple(tried), by_role)

    return RobustnessResult(
        env_id=env_id,
        env_kwargs=setting.env_kwargs,
        seed=setting.seed,
        random_return=float(np.mean(values(RANDOM, None, None)[RETURN])) if random_return is None else float(random_return),
        policies=shown,
        responses=tuple(response(each) for each in perturbations),
        versions=installed_versions(PACKAGES),
    )


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """
    :param texts: Each is ``name`` or ``name=level,level,...``
    :return: Levels by name; none where none are named
    :raises ValueError: A level is no number, or a name is there twice
    """
    grid: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, levels = text.partition("=")
        if name in grid:
            raise ValueError(f"{name!r} is named twice: give all its levels at once, {name}=0.8,1.2.")
        try:
            grid[name] = tuple(float(level) for level in levels.split(",")) if levels else ()
        except ValueError:
            raise ValueError(f"Levels of {name} must be numbers with commas between, found {levels!r}.") from None
    return grid


def _levels(grid: Mapping[str, Sequence[float]] | None, env: Env) -> dict[Perturbation, list[float]]:
    """The levels of each perturbation that are not nominal."""
    grid = {name: () for name in possible(env)} if grid is None else grid
    chosen = {find_perturbation(name, env): levels for name, levels in grid.items()}
    if not chosen:
        raise ValueError("There is nothing to change: name at least one perturbation.")
    checked = {each: [each.check_level(level) for level in levels or each.levels] for each, levels in chosen.items()}
    return {each: sorted({level for level in levels if level != each.nominal}) for each, levels in checked.items()}


def _spread(outcomes: Sequence[Outcome]) -> Observations:
    """Standard deviation of each number of an observation over nominal episodes."""
    seen = [outcome.observations for outcome in outcomes if outcome.observations is not None]
    spread: Observations = map_observations(lambda *rows: np.concatenate(rows).astype(np.float64).std(axis=0), *seen)
    return spread


# Processes


Play = Callable[[Sequence[Job], Observations | None], dict[Job, Outcome]]
_stage: Stage | None = None
"""Of this process, if it is one of several."""


@contextmanager
def _players(stage: Stage, n_jobs: int, total: int, console: Console | None) -> Iterator[Play]:
    """What plays episodes, in this process or in others."""
    with one_thread(), progress_bar(console or PlainConsole(quiet=True)) as progress:
        task = progress.add_task("episodes", total=total)

        def here(jobs: Sequence[Job], spread: Observations | None) -> dict[Job, Outcome]:
            outcomes = {}
            for job in jobs:
                outcomes[job] = stage.play(job, spread)
                progress.advance(task)
            return outcomes

        if n_jobs == 1:
            yield here
            return
        pool = ProcessPoolExecutor(n_jobs, get_context("spawn"), _begin_process, (stage.setting,))

        def elsewhere(jobs: Sequence[Job], spread: Observations | None) -> dict[Job, Outcome]:
            futures: dict[Future[Outcome], Job] = {pool.submit(_play, job, spread): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
            return {job: future.result() for future, job in futures.items()}

        try:
            yield elsewhere
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads would add numbers up in another order, and only wait for one another."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(before)


def _begin_process(setting: Setting) -> None:
    global _stage
    # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    th.set_num_threads(1)
    _stage = Stage(setting)


def _play(job: Job, spread: Observations | None) -> Outcome:
    assert _stage is not None
    return _stage.play(job, spread)
