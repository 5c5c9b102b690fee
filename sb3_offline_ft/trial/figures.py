"""The pictures of a trial's report. The policies differ in form as well as in colour, so they can be told apart in print."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sb3_offline_ft.common.drawing import BLUE
from sb3_offline_ft.pages.pictures import INK, Drawing
from sb3_offline_ft.pages.words import Estimate, counted, listed, number, ranged
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm
from sb3_offline_ft.trial.machine import EpisodeRecord, TrialMachine
from sb3_offline_ft.trial.plan import Metric, TrialPlan

COLOURS = {BLUE: "var(--accent)"}
"""What the page calls the candidate's colour."""
WIDTH, WIDE = 4.6, 10.5

LOOKS: dict[Arm, dict[str, Any]] = {
    BASELINE: {"marker": "o", "color": INK, "markerfacecolor": "none", "markeredgewidth": 1.2},
    CANDIDATE: {"marker": "D", "color": BLUE, "markeredgecolor": INK, "markeredgewidth": 0.5},
}


def draw_episodes(plan: TrialPlan, machine: TrialMachine, metrics: Sequence[Metric]) -> Drawing | None:
    """Every episode as a dot, one panel a metric, with stages and blocks; None if there is no episode."""
    episodes = machine.episodes
    if not episodes:
        return None

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            _blocks(axes, episodes)
            _dots(axes, episodes, metric.name, with_label=axes is panels[0])
            axes.set_ylabel(_titled(metric), fontsize=10)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.set_xlim(-0.7, len(episodes) - 0.3)
        _stages(panels[0], episodes)
        panels[-1].set_xlabel("episode", fontsize=10)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)

    words = [_told(episodes, metric) for metric in metrics]
    out = sum(record.is_missing for record in episodes)
    if out:
        words.append(f"{counted(out, 'episode')} got lost")
    caption = (
        "Each dot is an episode: circles the baseline, diamonds the candidate, crosses an abort. Shaded and white: the blocks "
        "within which both acted in random order; short lines: their means in each. Dotted lines part the stages."
    )
    size = (WIDE, 1.1 + 2.3 * len(metrics))
    return Drawing("episodes", "Every episode", caption, f"{listed(words, ';')}.", paint, size)


def _titled(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def _told(episodes: Sequence[EpisodeRecord], metric: Metric) -> str:
    texts = []
    for arm in (BASELINE, CANDIDATE):
        values = [value for one in episodes if one.arm == arm and (value := one.metrics.get(metric.name)) is not None]
        if values:
            span = f"{number(min(values))} to {number(max(values))}, mean {number(sum(values) / len(values))}"
            texts.append(f"{arm} {span} in {counted(len(values), 'episode')}")
    return f"{metric.name}: {listed(texts)}" if texts else f"{metric.name}: no values"


def _blocks(axes: Axes, episodes: Sequence[EpisodeRecord]) -> None:
    for block, group in itertools.groupby(episodes, lambda record: record.block):
        numbers = [record.episode for record in group]
        if block is not None and block % 2 == 0:
            axes.axvspan(numbers[0] - 0.5, numbers[-1] + 0.5, color=INK, alpha=0.07, linewidth=0, zorder=0)


def _dots(axes: Axes, episodes: Sequence[EpisodeRecord], metric: str, with_label: bool) -> None:
    size = float(np.clip(60 / np.sqrt(len(episodes)), 3.0, 6.0))
    known = [(record, value) for record in episodes if (value := record.metrics.get(metric)) is not None]
    for arm, look in LOOKS.items():
        part = [(record.episode, value) for record, value in known if record.arm == arm and not record.is_aborted]
        if part:
            axes.plot(*zip(*part, strict=True), linestyle="", markersize=size, label=arm if with_label else None, **look)
        for block in sorted({record.block for record, _ in known if record.block is not None}):
            of_block = [record.episode for record, _ in known if record.block == block]
            values = [value for record, value in known if record.block == block and record.arm == arm and record.is_compared]
            if values:
                ends, height = (min(of_block) - 0.4, max(of_block) + 0.4), (np.mean(values),) * 2
                axes.plot(ends, height, color=look["color"], linewidth=1.6, linestyle="-" if arm == CANDIDATE else (0, (3, 2)))
    aborted = [(record.episode, value) for record, value in known if record.is_aborted]
    if aborted:
        look = {"marker": "X", "color": BLUE, "markeredgecolor": INK, "markeredgewidth": 0.6}
        label = "aborted" if with_label else None
        axes.plot(*zip(*aborted, strict=True), linestyle="", markersize=size + 2, label=label, **look)
    lost = [record.episode for record in episodes if record.metrics.get(metric) is None]
    if lost:
        axes.plot(
            lost, [0.02] * len(lost), "|", color=INK, markersize=8, transform=axes.get_xaxis_transform(),
            label="no value" if with_label else None,
        )  # fmt: skip


def _stages(axes: Axes, episodes: Sequence[EpisodeRecord]) -> None:
    """Name the stages above the first panel, and part them in all."""
    groups = [(stage, [one.episode for one in group]) for stage, group in itertools.groupby(episodes, lambda one: one.stage)]
    room = len(episodes) / 75
    for index, (stage, numbers) in enumerate(groups):
        if index:
            for each in axes.figure.axes:
                each.axvline(numbers[0] - 0.5, color=INK, linewidth=0.9, linestyle=":")
        name = stage if len(stage) * room <= len(numbers) + 0.5 else ""
        middle = (numbers[0] + numbers[-1]) / 2
        axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)


@dataclass(frozen=True)
class Effect:
    """
    By how much the candidate is better in a metric, and what it is compared with.

    :param metric: The metric
    :param estimate: The improvement, with its interval; negative if the candidate is worse
    :param needed: What it is compared with: the smallest effect worth having, or minus the margin of a guardrail
    :param role: What the metric is in the plan
    """

    metric: Metric
    estimate: Estimate
    needed: float
    role: str


def draw_effects(effects: Sequence[Effect], level: str) -> Drawing | None:
    """The effects with their intervals, a panel each since their units differ; None if none is known."""
    known = [effect for effect in effects if np.isfinite(effect.estimate.value)]
    if not known:
        return None

    def paint(figure: Figure) -> None:
        for axes, effect in zip(figure.subplots(len(known), 1, squeeze=False)[:, 0], known, strict=True):
            one = effect.estimate
            ends = [end for end in (one.low, one.high) if np.isfinite(end)]
            axes.axvline(0, color=INK, linewidth=1)
            axes.axvline(effect.needed, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.plot(ends, [0] * len(ends), color=BLUE, linewidth=4, alpha=0.5, solid_capstyle="butt")
            axes.plot(ends, [0] * len(ends), "|", color=INK, markersize=11, markeredgewidth=1.4)
            axes.plot(one.value, 0, "D", color=BLUE, markeredgecolor=INK, markersize=8)
            points = [0.0, effect.needed, one.value, *ends]
            room = 0.12 * (max(points) - min(points) or 1.0)
            axes.set(xlim=(min(points) - room, max(points) + room), ylim=(-1, 1), yticks=[])
            axes.spines["left"].set_visible(False)
            axes.set_title(f"{effect.role}: {_titled(effect.metric)}", fontsize=10, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        figure.supxlabel(
            "worse  \N{LEFTWARDS ARROW}  candidate compared with the baseline  \N{RIGHTWARDS ARROW}  better", fontsize=10
        )

    words = [f"{effect.metric.name} {ranged(effect.estimate)}, to be above {number(effect.needed)}" for effect in known]
    caption = (
        f"How much better the candidate is, with {level} intervals, in units of each metric. Dashed: the smallest effect "
        "worth having, or how much worse a guardrail may get."
    )
    size = (WIDTH, 0.55 + 0.95 * len(known))
    return Drawing("effects", "Candidate against baseline", caption, f"{listed(words, ';')}.", paint, size)


def draw_blocks(plan: TrialPlan, machine: TrialMachine) -> Drawing | None:
    """The difference of each block, by which a trend shows; None before the first complete one."""
    metric = plan.metric(plan.primary.metric)
    found = _block_differences(machine.episodes, metric)
    if not found:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=1)
        axes.axhline(plan.primary.smallest_effect, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.vlines([block for block, _ in found], 0, [value for _, value in found], color=BLUE, linewidth=1.2)
        axes.plot(*zip(*found, strict=True), "D", color=BLUE, markeredgecolor=INK, markersize=6)
        axes.set_xlabel("block", fontsize=10)
        axes.set_ylabel(f"improvement in {_titled(metric)}", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.08)

    values = [value for _, value in found]
    words = (
        f"The candidate was better in {sum(value > 0 for value in values)} of {counted(len(values), 'block')}; differences "
        f"from {number(min(values))} to {number(max(values))}"
    )
    caption = (
        "Mean of the candidate minus mean of the baseline within each block, positive is better. Dashed: the smallest effect "
        "worth having. What drifts with time hits both policies of a block alike."
    )
    return Drawing("blocks", "Block by block", caption, f"{words}.", paint, (WIDTH, 2.7))


def _block_differences(episodes: Sequence[EpisodeRecord], metric: Metric) -> list[tuple[int, float]]:
    found = []
    for block in sorted({record.block for record in episodes if record.block is not None}):
        means: dict[str, float] = {}
        for arm in (BASELINE, CANDIDATE):
            of_arm = [one for one in episodes if one.block == block and one.arm == arm and one.is_compared]
            values = [value for one in of_arm if (value := one.metrics.get(metric.name)) is not None]
            if values:
                means[arm] = sum(values) / len(values)
        if len(means) == 2:
            found.append((block, metric.sign * (means[CANDIDATE] - means[BASELINE])))
    return found


def draw_risk(spent: Sequence[tuple[int, float]], allowance: float, n_planned: int) -> Drawing | None:
    """
    What the candidate's episodes have lost against the risk budget; None if there was none.

    :param spent: Numbers of episodes, and what had been lost after each, in total losses
    :param allowance: What may be lost in all
    :param n_planned: Episodes of the whole trial
    """
    if not spent:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(allowance, color=INK, linewidth=1.4, linestyle=(0, (4, 3)), label="budget")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.step(*zip(*spent, strict=True), where="post", color=BLUE, linewidth=2, label="lost")
        axes.set(xlim=(0, max(n_planned, spent[-1][0] + 1)), xlabel="episode", ylabel="total losses")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(y=0.15)
        axes.legend(loc="best")

    words = f"Lost {number(spent[-1][1])} of {number(allowance)} total losses; at most {number(max(one for _, one in spent))}"
    caption = (
        "What the candidate's episodes returned less than the baseline is expected to. 1 is a total loss: an episode as bad "
        "as a random policy's. Below 0 the candidate has gained."
    )
    return Drawing("risk", "Risk spent", caption, f"{words}.", paint, (WIDTH, 2.5))
