"""What came out of a tuning: tables, pictures, files."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.pages.html import Picture, render_page
from sb3_offline_ft.pages.pictures import inline_svg, picture_files
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.engine.queue import CELL
from sb3_offline_ft.study.report.shortcomings import shortcomings
from sb3_offline_ft.study.report.words import some
from sb3_offline_ft.study.tuning.entry import write_entry, zoo_command
from sb3_offline_ft.study.tuning.objective import Score
from sb3_offline_ft.study.tuning.plan import FEWEST_TO_SHOW, TuningPlan
from sb3_offline_ft.study.tuning.pruner import DEEPEST_DIP, PRESET
from sb3_offline_ft.study.tuning.queue import GIVEN_UP, SCORES, SEARCH, TuningQueue, best_trial, preset_trial, trial_note

FEWEST_FOR_IMPORTANCE = 10
BEST_SHOWN = 5
ACCENT = "#0072b2"
MUTED = "#8a939d"
_WIDTH = 5.6


@dataclass(frozen=True)
class Importance:
    """
    How much parameters matter.

    :param shares: Share of each parameter by its name, the highest first; empty if it cannot be computed
    :param reason: Why it cannot be computed, empty if it can
    """

    shares: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def parameter_importance(study: optuna.Study) -> Importance:
    """
    Importance of parameters by PED-ANOVA (Watanabe et al. 2023, https://arxiv.org/abs/2304.10255): how much the distribution
    of each one among good trials differs from that among all.

    :param study: A study
    :return: The importance
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return Importance(
            reason=f"The importance of hyperparameters cannot be computed from {len(complete)} completed trials: it needs "
            f"{FEWEST_FOR_IMPORTANCE}."
        )
    if len({trial.value for trial in complete}) == 1:
        return Importance(reason="The importance of hyperparameters cannot be computed: all trials have the same value.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError) as error:
            return Importance(reason=f"The importance of hyperparameters cannot be computed: {error}")
    if not all(math.isfinite(share) for share in shares.values()) or sum(shares.values()) == 0:
        return Importance(
            reason="The importance of hyperparameters cannot be computed: good trials do not differ from others."
        )
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])))


@dataclass(frozen=True)
class TuningResult:
    """
    What came out of a tuning.

    :param plan: The tuning
    :param trials: Trials that have ended with a value, were given up or failed
    :param best: The best one
    :param preset: That of the preset, None if it has no value
    :param importance: How much parameters matter
    """

    plan: TuningPlan
    trials: Sequence[FrozenTrial]
    best: FrozenTrial
    preset: FrozenTrial | None
    importance: Importance

    @property
    def preset_is_best(self) -> bool:
        """Whether no trial was better than the preset."""
        return PRESET in self.best.user_attrs

    @property
    def method(self) -> Method:
        """The study's method with the best trial's hyperparameters."""
        return self.plan.tuned(None if self.preset_is_best else self.best.params)

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What the best trial sets: the preset's value, None for the algorithm's default, and its own."""
        tuned = {} if self.preset_is_best else self.plan.changed(self.best.params)
        return {name: (self.plan.method.hyperparams.get(name), value) for name, value in sorted(tuned.items())}

    @property
    def counts(self) -> str:
        """Numbers of trials in words."""
        by_state = {state: sum(trial.state == state for trial in self.trials) for state in TrialState}
        names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "given up", TrialState.FAIL: "failed"}
        return ", ".join(f"{by_state[state]} {name}" for state, name in names.items() if by_state[state])

    @property
    def verdict(self) -> str:
        """What came out, in a sentence."""
        if self.preset is None:
            return f"The best trial has the value {self.best.value:+.3f}; the preset has none."
        if self.preset_is_best:
            return f"No trial was better than the preset, which has the value {self.preset.value:+.3f}."
        return f"The best trial has the value {self.best.value:+.3f}, the preset {self.preset.value:+.3f}."

    @property
    def caution(self) -> str:
        """What the result must not be taken for."""
        n = sum(trial.state == TrialState.COMPLETE for trial in self.trials)
        return (
            f"The best of {n} trials with {len(self.plan.seeds)} seeds each is partly the luckiest: expect less of it with "
            f"other seeds. `--confirm {FEWEST_TO_SHOW}` runs it and the preset with {FEWEST_TO_SHOW} fresh seeds."
        )

    @property
    def searches(self) -> list[str]:
        """How trials were drawn and given up, in a sentence for each way."""
        ways: dict[str, list[str]] = {}
        for trial in self.trials:
            ways.setdefault(_search_words(trial.user_attrs.get(SEARCH)), []).append(_name(trial))
        return [f"{words}." if len(ways) == 1 else f"{words}: {some(names)}." for words, names in ways.items()]

    @property
    def shortcomings(self) -> list[str]:
        """What runs of trials lacked, in sentences."""
        runs = {
            f"{_name(trial)}, seed {facts['seed']}": facts
            for trial in self.trials
            for facts in trial.user_attrs.get(SCORES, [])
        }
        return shortcomings(runs, self.plan.study.interactions)

    def shown(self) -> list[FrozenTrial]:
        """
        :return: The best trials, and the preset's
        """
        complete = sorted(
            (trial for trial in self.trials if trial.state == TrialState.COMPLETE), key=lambda trial: -(trial.value or 0.0)
        )
        best = complete[:BEST_SHOWN]
        return best if self.preset is None or any(PRESET in trial.user_attrs for trial in best) else [*best, self.preset]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """
        :return: Names of columns, and the rows, of a table of the best trials
        """
        columns = ["", "value", *(f"seed {seed}: J0, J_end, dip" for seed in self.plan.seeds)]
        rows = []
        for trial in self.shown():
            scores = [Score.from_dict(facts) for facts in trial.user_attrs[SCORES]]
            cells = [f"{each.initial_return:,.1f}, {each.last_return:,.1f}, {each.dip_depth:.2f}" for each in scores]
            rows.append([_name(trial), f"{trial.value:+.3f}", *cells])
        return columns, rows


def _name(trial: FrozenTrial) -> str:
    return str(trial.user_attrs[CELL])


def _search_words(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "How trials were searched was not recorded"
    dip = "" if facts["prune_dip"] is None else f"at a dip deeper than {facts['prune_dip']:g}, or "
    return (
        f"{facts['sampler']} sampler, {facts['pruner']} pruner, {facts['startup_trials']} random trials first; a trial was "
        f"given up {dip}as the pruner says, but never the preset"
    )


def read_result(queue: TuningQueue) -> TuningResult:
    """
    :param queue: The trials of a tuning
    :return: What came out of it so far
    :raises ValueError: No trial was completed
    """
    trials = queue.trials()
    best = best_trial(trials)
    if best is None:
        notes = "; ".join(f"{_name(trial)} {trial_note(trial)}" for trial in trials[:3]) or "none has ended"
        raise ValueError(f"No trial was completed, so there is nothing to report: {notes}.")
    return TuningResult(queue.plan, trials, best, preset_trial(trials), parameter_importance(queue.study))


def show_result(result: TuningResult, console: Console) -> None:
    """
    Print what came out.

    :param result: The result
    :param console: Where to print
    """
    plan = result.plan
    columns, rows = result.rows()
    console.print(Text(f"{plan.method.label} on {plan.dataset}: {result.counts}", style="bold"))
    table = Table(*columns)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == _name(result.best) else "")
    console.print(table)
    console.print(Text(f"Values are in units of {plan.objective.unit_text}."))
    if result.changes:
        changes = Table("hyperparameter", "preset", "best")
        for name, (old, new) in result.changes.items():
            changes.add_row(name, "default" if old is None else str(old), str(new))
        console.print(changes)
    console.print(Text(result.importance.reason or f"Most important: {', '.join(list(result.importance.shares)[:3])}."))
    console.print(Text(result.verdict, style="bold"))
    if not result.preset_is_best:
        console.print(Text(result.caution, style="yellow"))


def write_result(
    result: TuningResult, queue: TuningQueue, folder: Path, configuration: Path, confirmation: str = ""
) -> list[Path]:
    """
    Write what came out: the configuration, a page, pictures, and all trials.

    :param result: The result
    :param queue: The trials
    :param folder: Where to write
    :param configuration: Where to write the configuration
    :param confirmation: What fresh seeds said, empty if they were not asked
    :return: The files
    :raises OSError: One cannot be written
    """
    plan = result.plan
    facts = {
        "Objective": f"J_end - J0 - {plan.settings.dip_penalty:g} x dip, mean over seeds {', '.join(map(str, plan.seeds))}",
        "Value": f"{result.best.value:+.3f} of {_name(result.best)} of {len(result.trials)} ({result.counts})"
        + ("" if result.preset is None else f"; preset {result.preset.value:+.3f}"),
        "Units": plan.objective.unit_text,
    } | ({"Confirmation": confirmation} if confirmation else {})
    entry = write_entry(plan, result.method, configuration, facts)
    written = [configuration]

    def write(name: str, content: bytes) -> None:
        with atomic_write(folder / name) as file:
            file.write(content)
        written.append(folder / name)

    drawings = {"history": _history(result)}
    if result.importance.shares:
        drawings["importance"] = _importance(result)
    pictures = []
    for name, drawing in drawings.items():
        for kind, content in picture_files(name, drawing.paint, drawing.size, drawing.title).items():
            write(f"{name}.{kind}", content)
        svg = inline_svg(name, drawing.paint, drawing.size, words=drawing.words, colours={ACCENT: "var(--accent)"})
        pictures.append(Picture(svg, drawing.title, drawing.caption, drawing.words))
    columns, rows = result.rows()
    page = render_page(
        __package__,
        "report.html.jinja",
        title=f"{plan.study.name}: {plan.method.label} tuned on {plan.dataset}",
        result=result,
        confirmation=confirmation,
        plan=plan,
        settings=plan.settings,
        columns=columns,
        rows=rows,
        pictures=pictures,
        others=[(_name(trial), trial_note(trial)) for trial in result.trials if trial.state != TrialState.COMPLETE],
        entry=entry,
        configuration=configuration.name,
        command=zoo_command(plan, configuration),
    )
    write("tuning.html", page)
    write("trials.csv", _csv(result, queue).encode("utf-8"))
    return written


def _csv(result: TuningResult, queue: TuningQueue) -> str:
    frame = queue.study.trials_dataframe(
        attrs=("number", "state", "value", "params", "user_attrs", "datetime_start", "duration")
    )
    frame = frame[frame["number"].isin([trial.number for trial in result.trials])].copy()
    # Others say where it ran, or what the space must know
    attributes = {f"user_attrs_{name}": name for name in (SCORES, SEARCH, DEEPEST_DIP, GIVEN_UP)}
    frame = frame.rename(columns={f"user_attrs_{CELL}": "trial"} | attributes)
    parameters = [name for name in frame if name.startswith("params_")]
    columns = ["number", "trial", "state", "value", *parameters, *attributes.values(), "datetime_start", "duration"]
    frame = frame[[name for name in columns if name in frame]]
    for name in {SCORES, SEARCH} & set(frame):
        frame[name] = frame[name].map(lambda told: json.dumps(told) if isinstance(told, list | dict) else "")
    return str(frame.to_csv(index=False))


@dataclass(frozen=True)
class _Drawing:
    paint: Any
    size: tuple[float, float]
    title: str
    caption: str
    words: str


def _history(result: TuningResult) -> _Drawing:
    complete = [trial for trial in result.trials if trial.state == TrialState.COMPLETE]
    numbers = [trial.number for trial in complete]
    values = [float(trial.value or 0.0) for trial in complete]
    given_up = {
        trial.number: trial.value for trial in result.trials if trial.state == TrialState.PRUNED and trial.value is not None
    }
    preset = None if result.preset is None else result.preset.value

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if preset is not None:
            axes.axhline(preset, color=MUTED, linestyle="--", label="preset")
        if given_up:
            label = "given up: value so far"
            axes.scatter(list(given_up), list(given_up.values()), marker="x", s=22, color=MUTED, label=label)
        axes.scatter(numbers, values, s=26, color=ACCENT, label="complete", zorder=3)
        axes.step(numbers, np.maximum.accumulate(values), where="post", color=ACCENT, linewidth=1.2, label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel("value")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    words = f"{result.counts}. {result.verdict}"
    caption = "Value of each trial; 0 is as good as the pretrained policy all the time."
    return _Drawing(paint, (_WIDTH, 3.4), "How the search went", caption, words)


def _importance(result: TuningResult) -> _Drawing:
    shares = result.importance.shares

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(reversed(shares))
        axes.barh(names, [shares[name] for name in names], color=ACCENT)
        for name in names:
            axes.annotate(f"{shares[name]:.2f}", (shares[name], name), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_xlabel("importance")
        axes.margins(x=0.15)

    words = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    n = sum(trial.state == TrialState.COMPLETE for trial in result.trials)
    caption = (
        f"PED-ANOVA: how much the values in the best tenth of the {n} completed trials differ from those in all. "
        "The sum is 1. With few trials it is rough."
    )
    return _Drawing(paint, (_WIDTH, 0.8 + 0.3 * len(shares)), "Which hyperparameters matter", caption, words)
