"""Tunes the finetuning in the conditions of a study: trials by workers, results as files, a check with fresh seeds."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from rich.console import Console
from rich.text import Text

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.strict_yaml import load_yaml
from sb3_offline_ft.evaluation.comparisons import PairedComparison, compare_paired
from sb3_offline_ft.pretrained.recipe import SHARED_WITH_PRETRAINING
from sb3_offline_ft.study.design.methods import online_only
from sb3_offline_ft.study.design.protocol import STUDY_FILE
from sb3_offline_ft.study.engine.liveness import STORAGE_FAULTS
from sb3_offline_ft.study.engine.queue import CellState, fault_text
from sb3_offline_ft.study.engine.results import study_results
from sb3_offline_ft.study.engine.run import StudyRun, run_study
from sb3_offline_ft.study.engine.worker import DISK_FULL
from sb3_offline_ft.study.report.comparisons import SIGNIFICANT
from sb3_offline_ft.study.tuning.entry import spec_seen_from
from sb3_offline_ft.study.tuning.plan import FEWEST_SEEDS, FEWEST_TO_SHOW, TuningPlan, TuningSettings
from sb3_offline_ft.study.tuning.queue import TuningQueue
from sb3_offline_ft.study.tuning.report import TuningResult, read_result, show_result, write_result
from sb3_offline_ft.study.tuning.worker import final_score, tune_work

TUNING = "tuning"
CONFIRMATION = "confirmation"
CONFIGURATION = "hyperparams.yml"
PRESET_METHOD, TUNED_METHOD = "preset", "tuned"
TOO_FEW = f"no difference can be shown with fewer than {FEWEST_TO_SHOW} seeds"


class TuningRun(StudyRun):
    """The workers of one ``study tune``, which begin no other trial after ``timeout`` seconds."""

    _work = staticmethod(tune_work)
    _unit = "trial"
    queue: TuningQueue
    settings: TuningSettings

    def __init__(self, settings: TuningSettings, workers: int, console: Console, timeout: float | None = None) -> None:
        super().__init__(settings, workers, console)
        self._end = None if timeout is None else time.monotonic() + timeout
        self._is_over = False

    def _open_queue(self) -> TuningQueue:
        return TuningQueue(TuningPlan(self.settings, self.settings.protocol()), self.settings.storage)

    def _look(self) -> None:
        super()._look()
        if self._end is not None and not self._is_over and time.monotonic() >= self._end:
            self._is_over = True
            self.display.say("The time is over: no other trial is begun.", "yellow")
            self._no_more_cells()

    def _is_unfinished(self) -> bool:
        return not self._is_over and super()._is_unfinished()

    def _start_workers(self) -> None:
        if not self._is_over:
            super()._start_workers()


@dataclass(frozen=True)
class Tuned:
    """
    What :func:`tune` did.

    :param result: What came out
    :param files: The files that were written
    :param comparison: The best trial's hyperparameters less the preset, with fresh seeds; None if that was not asked for
    """

    result: TuningResult
    files: list[Path]
    comparison: PairedComparison | None = None


def tune(
    settings: TuningSettings,
    *,
    workers: int = 1,
    timeout: float | None = None,
    output: Path | None = None,
    confirm: int = 0,
    retry_failed: bool = False,
    console: Console | None = None,
) -> Tuned:
    """
    Tune the finetuning of a method in the conditions of a study. Others may do the same at once, on any number of machines.

    :param settings: What to tune, and how
    :param workers: Processes that run trials
    :param timeout: Seconds after which no other trial is begun, None for no limit
    :param output: Where to write the configuration, by default among the other files
    :param confirm: Number of fresh seeds with which the best and the preset are run again, 0 for none
    :param retry_failed: Whether to try trials again that have failed
    :param console: Where to show what happens
    :return: What came out
    :raises OSError: The storage, the data or the disk cannot be used
    :raises ValueError: The protocol, a setting or the data is wrong, or no trial was completed
    :raises KeyboardInterrupt: Ctrl-C; all workers were stopped, and their trials wait
    """
    if output is not None and output.suffix not in (".yml", ".yaml"):
        raise ValueError(f"`--output` must end in .yml or .yaml, which rl_zoo3 takes: found {str(output)!r}.")
    if confirm < 0 or confirm == 1:
        raise ValueError(f"`--confirm` must be at least {FEWEST_SEEDS} seeds, or 0 for none: found {confirm}.")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"`--timeout` must be above 0 seconds, found {timeout:g}.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = console or PlainConsole(stderr=True)
    if 0 < confirm < FEWEST_TO_SHOW:
        console.print(Text(f"`--confirm {confirm}`: {TOO_FEW}.", style="yellow"))
    try:
        run = TuningRun(settings, workers, console, timeout)
        with run.queue as queue:
            counts = run.run(retry_failed)
            result = read_result(queue)
            if unfinished := counts[CellState.WAITING] + counts[CellState.RUNNING]:
                text = f"Trials that have not ended: {unfinished}. The same command goes on with them."
                console.print(Text(text, style="yellow"))
            show_result(result, console)
            folder = _folder(result.plan)
            configuration = output or folder / CONFIGURATION
            files = write_result(result, queue, folder, configuration)
            comparison = None
            if confirm and not result.preset_is_best:
                comparison = confirm_best(result, settings, confirm, workers, console)
                files = write_result(result, queue, folder, configuration, confirmation_text(comparison))
            elif confirm:
                console.print(Text("There is nothing to confirm: the best is the preset."))
    except STORAGE_FAULTS as error:
        raise OSError(f"The storage failed: {fault_text(error)}. What is done is kept: run the command again.") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(
                f"There is no room on the disk for {settings.folder} ({error}): make room and run the command again."
            ) from None
        raise
    return Tuned(result, files, comparison)


def _folder(plan: TuningPlan) -> Path:
    return plan.study.folder / TUNING / f"{plan.dataset}-{plan.method.name}-{plan.digest}"


def confirm_best(
    result: TuningResult, settings: TuningSettings, n_seeds: int, workers: int, console: Console
) -> PairedComparison:
    """
    Run the best trial's hyperparameters and the preset with seeds that the tuning has not seen: as a study of its own, which
    can be interrupted and reported on as any other.

    :return: The best less the preset, in the objective's values, paired by seed
    """
    plan = result.plan
    folder = _folder(plan) / f"{CONFIRMATION}-{result.best.number}"
    with atomic_write(folder / STUDY_FILE) as file:
        file.write(confirmation_study(result, plan.fresh_seeds(n_seeds), folder).encode("utf-8"))
    console.print(Text(f"The best and the preset with {n_seeds} fresh seeds: {folder}"))
    counts = run_study(
        folder,
        workers=workers,
        storage=settings.storage,
        threads=settings.threads,
        device=settings.device,
        trust_pickle=settings.trust_pickle,
        console=console,
    )
    if set(counts) != {CellState.DONE}:
        raise OSError(f"Not all runs of {folder} were completed: see `sb3-offline-ft study status {folder} --errors`.")
    values: dict[str, list[float]] = {PRESET_METHOD: [], TUNED_METHOD: []}
    for run in study_results(folder, settings.storage).runs:
        values[run.cell.method.name].append(final_score(plan.objective, run.result).value)
    comparison = compare_paired([values[TUNED_METHOD]], [values[PRESET_METHOD]])
    console.print(Text(confirmation_text(comparison), style="bold"))
    return comparison


def confirmation_text(comparison: PairedComparison) -> str:
    """What fresh seeds showed. The test alone judges: bootstrap intervals of few pairs are too narrow for that."""
    difference, p_value = comparison.difference, comparison.p_value
    judged = "not shown to be different"
    if comparison.smallest_p_value >= SIGNIFICANT:
        judged = f"{TOO_FEW}: p is at least {comparison.smallest_p_value:.3g} with so few"
    elif p_value < SIGNIFICANT:
        judged = "better" if difference.value > 0 else "worse"
    return (
        f"With {comparison.n_pairs} fresh seeds, best less preset is {difference.value:+.3f} (95 % bootstrap interval "
        f"{difference.low:+.3f} to {difference.high:+.3f}; sign-flip test p = {p_value:.3g}): {judged}."
    )


def confirmation_study(result: TuningResult, seeds: list[int], folder: Path) -> str:
    """The file of a study of the best and the preset with fresh seeds, which shall be in the folder."""
    plan = result.plan
    given: dict[str, Any] = load_yaml(plan.study.text, plan.study.file)
    entry = dict(given["methods"][plan.method.base]) | {"label": "preset"}
    own = dict(plan.method.hyperparams)
    entry["hyperparams"] = {name: value for name, value in own.items() if name not in SHARED_WITH_PRETRAINING}
    left_out = online_only(plan.study.pretraining.algorithm)
    offline = {name: value for name, value in plan.method.pretraining_hyperparams.items() if name not in left_out}
    tuned = {name: new for name, (_, new) in result.changes.items()}
    methods = {
        PRESET_METHOD: entry,
        TUNED_METHOD: entry | {"label": "tuned", "hyperparams": entry["hyperparams"] | tuned},
    }
    study = {name: value for name, value in given.items() if name not in ("factors", "factors_combined")} | {
        "name": f"{plan.name}/{CONFIRMATION}-{result.best.number}",
        "datasets": {plan.dataset: spec_seen_from(plan.study, plan.dataset, folder)},
        "pretraining": {"algorithm": plan.study.pretraining.algorithm, "hyperparams": offline},
        "seeds": seeds,
        "methods": methods,
        "reference_method": PRESET_METHOD,
    }
    return "# The best hyperparameters of a tuning and the preset, with seeds that it has not seen\n" + yaml.safe_dump(
        study, sort_keys=False, allow_unicode=True
    )
