"""What came out of a tuning: tables, pictures, files."""

import json
import math
import warnings
from collections import Counter
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
from sb3_offline_ft.pages.pictures import Drawing, inline_svg
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import some
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.engine.queue import CELL
from sb3_offline_ft.study.report.shortcomings import shortcomings
from sb3_offline_ft.study.tuning.entry import write_entry, zoo_command
from sb3_offline_ft.study.tuning.plan import FEWEST_TO_SHOW, TuningPlan
from sb3_offline_ft.study.tuning.queue import GIVEN_UP, SCORES, SEARCH, TuningQueue, trial_note
from sb3_offline_ft.tuning.pruner import DEEPEST_DIP, PRESET

FEWEST_FOR_IMPORTANCE = 10
BEST_SHOWN = 5
ACCENT = "#0072b2"
MUTED = "#8a939d"
_WIDTH = 5.6


@dataclass(frozen=True)
class Importance:
    """The share of each parameter, the highest first, or the reason why it cannot be computed."""

    shares: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def parameter_importance(study: optuna.Study) -> Importance:
    """
    Importance of parameters by PED-ANOVA (Watanabe et al. 2023, https://arxiv.org/abs/2304.10255): how much the distribution
    of each one among good trials differs from that among all.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    shares: dict[str, float] = {}
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        why = f" from {len(complete)} completed trials: it needs {FEWEST_FOR_IMPORTANCE}."
    elif len({trial.value for trial in complete}) == 1:
        why = ": all trials have the same value."
    else:
        why = ": good trials do not differ from others."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
            except (ValueError, RuntimeError) as error:
                why = f": {error}"
    if math.isfinite(total := sum(shares.values())) and total > 0:
        return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])))
    return Importance(reason=f"The importance of hyperparameters cannot be computed{why}")


@dataclass(frozen=True)
class TuningResult:
    """What came out of a tuning; ``preset`` is None if the preset's trial has no value."""

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
    def complete(self) -> list[FrozenTrial]:
        """Trials that have ended with a value."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @property
    def counts(self) -> str:
        """Numbers of trials in words."""
        by_state = Counter(trial.state for trial in self.trials)
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
        return (
            f"The best of {len(self.complete)} trials with {len(self.plan.seeds)} seeds each is partly the luckiest: expect "
            f"less of it with other seeds. `--confirm {FEWEST_TO_SHOW}` runs it and the preset with {FEWEST_TO_SHOW} fresh "
            "seeds."
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
        runs = {f"{_name(trial)}, seed {facts['seed']}": facts for trial in self.trials for facts in _scores(trial)}
        return shortcomings(runs, self.plan.study.interactions)

    def table(self) -> TextTable:
        """The best trials, and the preset's."""
        shown = sorted(self.complete, key=lambda trial: -(trial.value or 0.0))[:BEST_SHOWN]
        if self.preset is not None and not any(PRESET in trial.user_attrs for trial in shown):
            shown.append(self.preset)
        rows = []
        for trial in shown:
            scores = [
                f"{one['initial_return']:,.1f}, {one['last_return']:,.1f}, {one['dip_depth']:.2f}" for one in _scores(trial)
            ]
            rows.append([_name(trial), f"{trial.value:+.3f}", *scores])
        columns = ["", "value", *(f"seed {seed}: J0, J_end, dip" for seed in self.plan.seeds)]
        return TextTable("The best trials", columns, rows)

    def changes_table(self) -> TextTable:
        """What the best trial sets."""
        rows = [[name, "default" if old is None else str(old), str(new)] for name, (old, new) in self.changes.items()]
        return TextTable("What the best one sets", ["hyperparameter", "preset", "best"], rows)


def _name(trial: FrozenTrial) -> str:
    return str(trial.user_attrs[CELL])


def _scores(trial: FrozenTrial) -> list[dict[str, Any]]:
    return list(trial.user_attrs.get(SCORES, []))


def _search_words(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "How trials were searched was not recorded"
    dip = "" if facts["prune_dip"] is None else f"at a dip deeper than {facts['prune_dip']:g}, or "
    return (
        f"{facts['sampler']} sampler, {facts['pruner']} pruner, {facts['startup_trials']} random trials first; a trial was "
        f"given up {dip}as the pruner says, but never the preset"
    )


def read_result(queue: TuningQueue) -> TuningResult:
    """What came out of a tuning so far; of equal trials the first is the best."""
    trials = queue.trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        notes = "; ".join(f"{_name(trial)} {trial_note(trial)}" for trial in trials[:3]) or "none has ended"
        raise ValueError(f"No trial was completed, so there is nothing to report: {notes}.")
    best = max(complete, key=lambda trial: trial.value or 0.0)
    preset = next((trial for trial in complete if PRESET in trial.user_attrs), None)
    return TuningResult(queue.plan, trials, best, preset, parameter_importance(queue.study))


def show_result(result: TuningResult, console: Console) -> None:
    """Print what came out."""
    plan = result.plan
    console.print(Text(f"{plan.method.label} on {plan.dataset}: {result.counts}", style="bold"))
    _print_table(result.table(), console, _name(result.best))
    console.print(Text(f"Values are in units of {plan.objective.unit_text}."))
    if result.changes:
        _print_table(result.changes_table(), console)
    console.print(Text(result.importance.reason or f"Most important: {', '.join(list(result.importance.shares)[:3])}."))
    console.print(Text(result.verdict, style="bold"))
    if not result.preset_is_best:
        console.print(Text(result.caution, style="yellow"))


def _print_table(content: TextTable, console: Console, bold: str | None = None) -> None:
    table = Table(*content.columns)
    for row in content.rows:
        table.add_row(*row, style="bold" if row[0] == bold else "")
    console.print(table)


def write_result(
    result: TuningResult, queue: TuningQueue, folder: Path, configuration: Path, confirmation: str = ""
) -> list[Path]:
    """Write what came out, and what fresh seeds said: the configuration, a page, pictures, and all trials."""
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

    drawings = [_history(result), *([_importance(result)] if result.importance.shares else [])]
    pictures = []
    for one in drawings:
        for kind, content in one.files().items():
            write(f"{one.name}.{kind}", content)
        svg = inline_svg(one.name, one.paint, one.size, words=one.words, colours={ACCENT: "var(--accent)"})
        pictures.append(Picture(svg, one.title, one.caption, one.words))
    page = render_page(
        __package__,
        "report.html.jinja",
        title=f"{plan.study.name}: {plan.method.label} tuned on {plan.dataset}",
        result=result,
        confirmation=confirmation,
        plan=plan,
        settings=plan.settings,
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


def _history(result: TuningResult) -> Drawing:
    numbers = [trial.number for trial in result.complete]
    values = [float(trial.value or 0.0) for trial in result.complete]
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
    return Drawing("history", "How the search went", caption, words, paint, (_WIDTH, 3.4))


def _importance(result: TuningResult) -> Drawing:
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
    caption = (
        f"PED-ANOVA: how much the values in the best tenth of the {len(result.complete)} completed trials differ from those "
        "in all. The sum is 1. With few trials it is rough."
    )
    return Drawing("importance", "Which hyperparameters matter", caption, words, paint, (_WIDTH, 0.8 + 0.3 * len(shares)))
