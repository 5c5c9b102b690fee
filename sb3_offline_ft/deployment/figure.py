"""The picture of a contest."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_offline_ft.collapse.events import Event
from sb3_offline_ft.common.drawing import (
    BLUE,
    GREEN,
    SKY,
    VERMILLION,
    common_legend,
    new_figure,
    panels_of_run,
    save_png,
    say_in,
)
from sb3_offline_ft.deployment.history import COLLAPSED, DECISIONS, History, column, counted
from sb3_offline_ft.deployment.roles import Kind

# Told from one another by form and brightness too
LOOKS: dict[Kind, dict[str, Any]] = {
    Kind.SERVE: {"marker": "o", "color": SKY, "markeredgewidth": 0},
    Kind.EXPLORE: {"marker": "s", "color": "0.35", "markerfacecolor": "none", "markeredgewidth": 0.9},
    Kind.TRIAL: {"marker": "D", "color": VERMILLION, "markeredgecolor": "black", "markeredgewidth": 0.5},
}
MARKS: dict[str, dict[str, Any]] = {
    "promotion": {"marker": "^", "color": GREEN, "markeredgecolor": "black", "markeredgewidth": 0.5},
    "rejection": {"marker": "x", "color": "0.25", "markeredgewidth": 1.2},
    "demotion": {"marker": "v", "color": "black", "markeredgewidth": 0},
    "below_worst": {"marker": "*", "color": VERMILLION, "markeredgewidth": 0},
}
IN_WORDS = {"below_worst": "below the worst return"}


def draw_history(history: History, path: Path | None = None) -> Figure:
    """
    Draw a contest: above, the returns of its episodes by kind, its champions and what was decided; below, the budget. The
    figure, which pyplot does not know, is also written to ``path``, as PNG.
    """
    figure = new_figure((10, 6))
    steps = [event["timestep"] / 1000 for event in history.events]
    top, bottom = panels_of_run(figure, steps)
    _draw_episodes(history, top)
    _draw_levels(history, top)
    _draw_champions(history, top, max(steps, default=0.0))
    _draw_decisions(history, top)
    _draw_budget(history, bottom)
    _draw_titles(history, top)
    top.set_ylabel(f"return of the {history.unit.removesuffix('s')}")
    bottom.set_ylabel("total losses")
    common_legend(figure, (top, bottom))
    if path is not None:
        save_png(figure, path)
    return figure


def _draw_titles(history: History, axes: Axes) -> None:
    algorithm = history.settings.get("algorithm")
    axes.set_title("Champion and challenger" + (f": {algorithm}" if algorithm else ""), loc="left", fontsize=11)
    words = [counted(len(history.episodes()), history.unit)]
    words += [counted(history.counts[name], f"{name}s") for name in DECISIONS]
    axes.set_title(", ".join(words), loc="right", fontsize=9, color="0.35")


def _draw_episodes(history: History, axes: Axes) -> None:
    episodes = history.episodes()
    if not episodes:
        say_in(axes, f"no {history.unit} yet", fontsize=13)
        axes.set_yticks([])
        return
    size = float(np.clip(100 / math.sqrt(len(episodes)), 2.5, 5.5))
    for order, (kind, look) in enumerate(LOOKS.items()):
        x, y = (column(history.episodes(kind), name) for name in ("timestep", "return"))
        if len(x):
            label = f"{kind.value} ({len(x):,})"
            axes.plot(x / 1000, y, linestyle="", markersize=size, zorder=2 + order, label=label, gid=kind.value, **look)
    returns = column(episodes, "return")
    levels = np.append(returns, [] if history.baseline is None else _levels(history.baseline))
    low, high = float(levels.min()), float(levels.max())
    room = (high - low) or max(abs(high), 1.0)
    # Decisions are marked in the strip below the episodes
    axes.set_ylim(low - 0.12 * room, high + 0.08 * room)


def _levels(baseline: Event) -> list[float]:
    mean, random = baseline["mean"], baseline["random_return"]
    return [mean, random + COLLAPSED * (mean - random), random]


def _draw_levels(history: History, axes: Axes) -> None:
    if history.baseline is not None:
        labels = ("baseline", "limit of collapse", "random policy")
        for label, height, dashes in zip(labels, _levels(history.baseline), ((6, 3), (3, 2), (1, 2)), strict=True):
            axes.axhline(height, color="black", linewidth=0.9, linestyle=(0, dashes), zorder=1, label=label, gid=label)
        low, high = history.baseline["low"], history.baseline["high"]
        axes.axhspan(low, high, color="0.9", linewidth=0, zorder=0, label="baseline, 95 %", gid="baseline interval")


def _draw_champions(history: History, axes: Axes, last: float) -> None:
    known = [(begin / 1000, champion) for begin, champion in history.reigns if champion.returns]
    if known:
        x = [begin for begin, _ in known]
        heights = [float(np.mean(champion.returns)) for _, champion in known]
        axes.step(
            [*x, last], [*heights, heights[-1]], where="post", color=BLUE, linewidth=2.2, zorder=5, label="champion",
            gid="champions",
        )  # fmt: skip


def _draw_decisions(history: History, axes: Axes) -> None:
    for name, look in MARKS.items():
        steps = [event["timestep"] / 1000 for event in history.events if event["event"] == name]
        if steps:
            size = float(np.clip(250 / len(steps), 4.0, 7.0))
            axes.plot(
                steps, np.full(len(steps), 0.035), linestyle="", markersize=size, zorder=6, clip_on=False,
                transform=axes.get_xaxis_transform(), label=IN_WORDS.get(name, name), gid=name, **look,
            )  # fmt: skip


def _draw_budget(history: History, axes: Axes) -> None:
    account = history.account
    if not account:
        say_in(axes, "no budget: the baseline is not known yet")
        axes.set(ylim=(0, 1), yticks=[0, 1])
        return
    steps = column(account, "timestep") / 1000
    lines: dict[str, dict[str, Any]] = {
        "allowance": {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.2},
        "lost": {"color": VERMILLION, "linewidth": 1.8},
        "balance": {"color": BLUE, "linestyle": (0, (1, 1)), "linewidth": 1.8},
    }
    labels = {"lost": "shortfall", "balance": "left"}
    for name, look in lines.items():
        label = labels.get(name, name)
        axes.step(steps, column(account, name), where="post", label=label, gid=name, **look)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
