"""Runs a trial in its environment, from wherever it is."""

import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TextColumn

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets.tools.show import progress_bar as bar
from sb3_offline_ft.pages.words import number
from sb3_offline_ft.trial.assignment import BASELINE, Assignment
from sb3_offline_ft.trial.episodes import EpisodeRunner, LastSteps, Outcome
from sb3_offline_ft.trial.machine import ABORTED, DRILL, Finished
from sb3_offline_ft.trial.pilot import Takeover
from sb3_offline_ft.trial.report import write_report
from sb3_offline_ft.trial.trial import STEPS_FOLDER, Trial

DRILL_STEPS = 100
"""A drill is triggered within the first steps, so many if the environment does not say how long an episode lasts at most."""
PAGE_SECONDS = 2.0
"""The page is written after each episode, but no sooner than this after the last time."""
ENDED = "the process that ran it was ended"


def run_trial(
    trial: Trial,
    *,
    progress_bar: bool = True,
    until: str | None = None,
    drill: bool = False,
    device: str = "cpu",
    console: Console | None = None,
) -> Finished | None:
    """
    Run the episodes of a trial from where it is to its end, and write its page after each. What the plan asks of robustness
    comes first, if it has not been done.

    Each episode is in the journal, and on disk, before the next one begins: whatever ends the process, only the episode under
    way is lost, and noted as such.

    :param trial: The trial, whose plan has an environment
    :param progress_bar: Whether to show the progress
    :param until: Name of the last stage to run; all if None
    :param drill: Run one rollback drill instead: an episode of the candidate within which the baseline has to take over
    :param device: Torch device of the policies
    :param console: Where the progress is shown, by default on standard error
    :return: Why there is no next episode; None if there is one, after a drill or a stage
    :raises ValueError: Another process works on the trial, a policy does not fit, the plan's metrics or limits are not
        reported, or the environment failed
    :raises OSError: A policy's file cannot be read, or the disk does not take the journal
    """
    try:
        with trial.locked():
            plan = trial.plan_in_force
            if until is not None and until not in (names := [stage.name for stage in plan.stages]):
                raise ValueError(f"There is no stage {until!r}: expected one of {', '.join(map(repr, names))}.")
            measured = [name for record in trial.machine.episodes for name, one in record.metrics.items() if one is not None]
            with closing(EpisodeRunner(plan, measured, device)) as runner:
                trial.begin({arm: controller.sha256 for arm, controller in runner.controllers.items()})
                _close_open_episode(trial, ENDED)
                if drill:
                    ended = _run_drill(trial, runner)
                else:
                    shown = console or PlainConsole(stderr=True, quiet=not progress_bar)
                    if plan.robustness is not None and trial.machine.robustness is None:
                        trial.robustness(device=device, console=shown)
                    ended = _run_stages(trial, runner, until, shown)
            _write_page(trial, running=False)
            return ended
    except (Exception, KeyboardInterrupt) as error:
        # A write may have been cut short: the journal is read again, and the first error is the one to tell
        with suppress(Exception), trial.locked():
            _close_open_episode(trial, "interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
            _write_page(trial, running=False)
        raise


def _run_stages(trial: Trial, runner: EpisodeRunner, until: str | None, console: Console) -> Finished | None:
    total = sum(stage.episodes for stage in trial.plan_in_force.stages)
    written = time.monotonic()
    with bar(console, TextColumn("{task.fields[said]}", markup=False)) as progress:
        task = progress.add_task("", total=total, completed=len(trial.machine.episodes), said="")
        while not isinstance(upcoming := trial.next(), Finished):
            progress.update(task, description=f"{upcoming.stage}: {upcoming.arm}")
            outcome = runner.run(upcoming, on_takeover=_noting_abort(trial, upcoming))
            recorded = _record(trial, upcoming, outcome, ABORTED if outcome.takeover is not None else None)
            primary = trial.plan_in_force.primary.metric
            progress.update(task, completed=len(trial.machine.episodes), said=f"{primary} {number(outcome.metrics[primary])}")
            if recorded.decision is not None:
                progress.console.print(
                    f"{recorded.decision.decision}: {recorded.decision.reasons[0]}", markup=False, soft_wrap=True
                )
            if time.monotonic() - written > PAGE_SECONDS:
                _write_page(trial, running=True)
                written = time.monotonic()
            if upcoming.stage == until and trial.machine.stage != until:
                return None
    return upcoming


def _record(trial: Trial, assignment: Assignment, outcome: Outcome, excluded: str | None) -> Any:
    details = {name: getattr(outcome, name) for name in ("steps", "seconds", "acted", "travel", "shadow", "violations")}
    return trial.record(
        metrics=outcome.metrics, episode=assignment.episode, regime=outcome.regime, excluded=excluded, **details
    )  # fmt: skip


def _noting_abort(trial: Trial, assignment: Assignment) -> Callable[[Takeover, LastSteps], None]:
    """Writes an abort down as soon as the baseline acts, so that it is known even if the process ends within the episode."""

    def note(takeover: Takeover, last_steps: LastSteps) -> None:
        if takeover.is_drill:
            return
        file = Path(STEPS_FOLDER) / f"{assignment.episode}.npz"
        last_steps.write(trial.folder / file)
        trial.append(
            "abort", episode=assignment.episode, stage=assignment.stage, arm=assignment.arm, step=takeover.step,
            reason=takeover.reason, seconds_to_baseline=takeover.seconds, steps_file=file.as_posix(),
        )  # fmt: skip

    return note


def _close_open_episode(trial: Trial, reason: str) -> None:
    """Note an episode that was begun and never recorded; one of the candidate that was aborted stays that."""
    under_way = trial.machine.open
    if under_way is None:
        return
    if any(abort["episode"] == under_way.episode for abort in trial.machine.aborts):
        trial.record(metrics={}, episode=under_way.episode, excluded=ABORTED)
    else:
        trial.give_up(reason, under_way.episode)


def _run_drill(trial: Trial, runner: EpisodeRunner) -> Finished | None:
    """Let the baseline take over at a random step; where the episode is over before, again at an earlier one."""
    longest = min(DRILL_STEPS, runner.time_limit or DRILL_STEPS) // 2
    while not isinstance(upcoming := trial.next(drill=True), Finished):
        step = int(np.random.default_rng([trial.plan_in_force.seed, upcoming.episode]).integers(1, longest, endpoint=True))
        outcome = runner.run(upcoming, drill_at=step, on_takeover=_noting_abort(trial, upcoming))
        takeover = outcome.takeover
        if takeover is not None and not takeover.is_drill:
            _record(trial, upcoming, outcome, ABORTED)
            raise ValueError(
                f"The candidate was aborted in step {takeover.step}, before the drill: {takeover.reason}. It counts as an "
                "abort."
            )
        _record(trial, upcoming, outcome, DRILL)
        if takeover is not None or outcome.steps == 1:
            seconds, n_after = (None, 0) if takeover is None else (takeover.seconds, takeover.n_after)
            took_over = n_after > 0 and n_after == outcome.steps - step == outcome.acted[BASELINE]
            trial.append(
                "drill", episode=upcoming.episode, step=step, seconds_to_baseline=seconds, baseline_took_over=took_over
            )  # fmt: skip
            return None
        longest = max(1, outcome.steps // 2)
    return upcoming


def _write_page(trial: Trial, running: bool) -> None:
    """Write the page; whatever keeps it from being written ends no trial."""
    try:
        write_report(trial, running=running)
    except Exception as error:
        warn(f"The page of the trial could not be written ({type(error).__name__}: {error}).")
