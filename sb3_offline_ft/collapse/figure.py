"""The picture of a guarded run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sb3_offline_ft.collapse.events import EPISODES, Event, monitored_words
from sb3_offline_ft.common.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    SKY,
    VERMILLION,
    common_legend,
    new_figure,
    panels_of_run,
    save_png,
    say_in,
)

HIGHEST_RATIO = 100.0
MOST_NUMBERS = 25

Array = npt.NDArray[np.float64]


def draw_events(events: list[Event], path: Path | None = None) -> Figure:
    """
    Draw a guarded run: above, the returns of its episodes with the baseline, the alarms and the rollbacks; below, how close
    the detector was to an alarm. The figure, which pyplot does not know, is also written to ``path``, as PNG.
    """
    figure = new_figure((10, 6))
    steps = [_step(event) for event in events]
    top, bottom = panels_of_run(figure, steps)
    _draw_baseline_phase(events, (top, bottom))
    _draw_returns(events, top)
    _draw_baseline(events, top, max(steps, default=0.0))
    _draw_ratio(events, bottom)
    _draw_alarms(events, (top, bottom))
    _draw_rollbacks(events, (top, bottom))
    _draw_escalations(events, (top, bottom))
    top.set_ylabel("return of the episode")
    bottom.set_ylabel("statistic / threshold")
    _draw_titles(events, top)
    common_legend(figure, (top, bottom))
    if path is not None:
        save_png(figure, path)
    return figure


def _of(events: list[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["event"] in kinds]


def _number(event: Event, name: str) -> float:
    value = event.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _step(event: Event, name: str = "timestep") -> float:
    step = _number(event, name) / 1000
    return step if math.isfinite(step) else 0.0


def _segments(events: list[Event]) -> Iterator[list[Event]]:
    """
    The episodes and alarms between rollbacks and restarts, across which no line shall go. Episodes that end at the step of a
    rollback belong to what came before it, wherever they stand.
    """
    segment: list[Event] = []
    rollback_step: float | None = None
    for event in events:
        kind = event["event"]
        if kind == "rollback":
            rollback_step = _step(event)
        elif kind == "start" or (kind in EPISODES and rollback_step is not None and _step(event) != rollback_step):
            yield segment
            segment, rollback_step = [], None
        if kind in (*EPISODES, "alarm"):
            segment.append(event)
    yield segment


def _phase(episode: Event) -> str:
    phase = episode.get("phase", "monitoring")
    return phase if phase in ("baseline", "ignored", "monitoring") else "unwatched"


def _running_median(values: Array, window: int) -> Array:
    half = window // 2
    padded = np.pad(values, half, constant_values=np.nan)
    return np.asarray(np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1), dtype=np.float64)


def _draw_titles(events: list[Event], axes: Axes) -> None:
    starts = _of(events, "start")
    words = [str(starts[-1][name]) for name in ("algorithm", "detector") if starts and starts[-1].get(name)]
    axes.set_title(": ".join(["Collapse guard", ", ".join(words)]) if words else "Collapse guard", loc="left", fontsize=11)
    counts = [monitored_words(events)]
    for kind in ("alarm", "rollback", "promotion"):
        n = len(_of(events, kind))
        counts.append(f"{n:,} {kind}{'' if n == 1 else 's'}")
    axes.set_title(", ".join(counts), loc="right", fontsize=9, color="0.35")


def _draw_baseline_phase(events: list[Event], panels: tuple[Axes, Axes]) -> None:
    spans: list[list[float]] = []
    is_open, before = False, None
    for event in events:
        kind = event["event"]
        if kind == "start" or (kind in EPISODES and _phase(event) in ("monitoring", "unwatched")):
            is_open, before = False, _step(event)
        elif kind in EPISODES and _phase(event) == "baseline":
            if not is_open:
                spans.append([_step(event) if before is None else before, _step(event)])
            spans[-1][1] = max(spans[-1][1], _step(event))
            is_open = True
    for axes in panels:
        for begin, end in spans:
            axes.axvspan(begin, end, color="0.93", linewidth=0, zorder=0, label="baseline phase", gid="baseline phase")


def _draw_returns(events: list[Event], axes: Axes) -> None:
    found = _of(events, *EPISODES)
    episodes = [event for event in found if math.isfinite(_number(event, "return"))]
    if not episodes:
        text = "no episodes yet" if not found else "no episode has a finite return"
        say_in(axes, text, fontsize=13)
        axes.set_yticks([])
        return
    size = float(np.clip(90 / math.sqrt(len(episodes)), 2.0, 5.0))
    alpha = float(np.clip(20 / math.sqrt(len(episodes)), 0.25, 0.85))
    looks: dict[str, dict[str, Any]] = {
        "ignored": {"color": "0.5", "markerfacecolor": "none", "markeredgewidth": 0.8, "label": "episode, ignored"},
        "unwatched": {"color": "0.6", "markeredgewidth": 0, "alpha": alpha, "label": "episode, not watched"},
        "monitoring": {"color": SKY, "markeredgewidth": 0, "alpha": alpha, "label": "episode, monitored"},
        "baseline": {"color": PURPLE, "markeredgewidth": 0, "alpha": max(alpha, 0.6), "label": "episode, baseline"},
    }
    for phase, look in looks.items():
        chosen = [event for event in episodes if _phase(event) == phase]
        if chosen:
            x, y = [_step(event) for event in chosen], [_number(event, "return") for event in chosen]
            axes.plot(x, y, "o", markersize=size, zorder=2, gid=f"episodes {phase}", **look)
    _draw_median(events, axes, window=int(np.clip(len(episodes) // 40, 5, 101)))
    levels = [_number(event, "return") for event in episodes]
    levels += [_number(event, name) for event in _of(events, "baseline") for name in ("mean", "low", "high")]
    levels = [level for level in levels if math.isfinite(level)]
    low, high = min(levels), max(levels)
    room = (high - low) or max(abs(high), 1.0)
    # Promotions are marked in the strip below the episodes, rollbacks in the one above them
    axes.set_ylim(low - 0.12 * room, high + (0.2 if _of(events, "rollback") else 0.08) * room)


def _draw_median(events: list[Event], axes: Axes, window: int) -> None:
    for segment in _segments(events):
        rows = [
            (_step(event), _number(event, "return"))
            for event in segment
            if event["event"] in EPISODES and _phase(event) != "ignored" and math.isfinite(_number(event, "return"))
        ]
        if len(rows) > 1:
            x, y = np.array(rows).T
            median = _running_median(y, window)
            label = f"running median ({window // 2 * 2 + 1} episodes)"
            axes.plot(x, median, color=BLUE, linewidth=1.8, zorder=4, label=label, gid="running median")


def _draw_baseline(events: list[Event], axes: Axes, last: float) -> None:
    baselines = _of(events, "baseline")
    if baselines:
        x = np.array([*(_step(event) for event in baselines), last])
        mean, low, high = (
            np.array([_number(event, name) for event in [*baselines, baselines[-1]]]) for name in ("mean", "low", "high")
        )
        axes.fill_between(
            x, low, high, step="post", color=GREEN, alpha=0.15, linewidth=0, zorder=1, label="baseline, 5-95 %",
            gid="baseline band",
        )  # fmt: skip
        axes.step(
            x, mean, where="post", color=GREEN, linewidth=1.6, linestyle="--", zorder=3, label="baseline mean",
            gid="baseline mean",
        )  # fmt: skip
    promotions = [_step(event) for event in _of(events, "promotion")]
    if promotions:
        size = float(np.clip(150 / len(promotions), 3.0, 6.5))
        axes.plot(
            promotions, np.full(len(promotions), 0.025), "^", color=GREEN, markersize=size, markeredgewidth=0, zorder=5,
            transform=axes.get_xaxis_transform(), label="promotion", gid="promotions",
        )  # fmt: skip


def _draw_ratio(events: list[Event], axes: Axes) -> None:
    highest, lowest = 1.0, 0.0
    for segment in _segments(events):
        rows = []
        for event in segment:
            ratio = _number(event, "statistic") / (_number(event, "threshold") or math.nan)
            if not math.isnan(ratio):
                rows.append((_step(event), ratio))
        if rows:
            x, ratios = np.array(rows).T
            shown = np.clip(ratios, -HIGHEST_RATIO, HIGHEST_RATIO)
            highest, lowest = max(highest, shown.max()), min(lowest, shown.min())
            marker = "o" if len(rows) == 1 else ""
            axes.plot(x, shown, marker=marker, markersize=3, color="0.25", linewidth=1.2, zorder=3,
                      label="statistic / threshold", gid="statistic")  # fmt: skip
            beyond = np.abs(ratios) > HIGHEST_RATIO
            if beyond.any():
                label = f"beyond {HIGHEST_RATIO:.0f}"
                axes.plot(x[beyond], shown[beyond], "D", color="0.25", markersize=4, zorder=4, label=label, gid="beyond")
    if not any(line.get_gid() == "statistic" for line in axes.lines):
        text = "no statistic yet" if _of(events, "baseline") else "no statistic: the detector has no baseline yet"
        if any(_phase(event) == "unwatched" for event in _of(events, *EPISODES)):
            text = "no statistic: the returns were not watched"
        say_in(axes, text, y=0.4)
        axes.set(ylim=(0, 1.25), yticks=[0, 1])
    elif max(highest, -lowest) <= 3:
        axes.set_ylim(min(1.1 * lowest, -0.03 * highest), max(1.25, 1.1 * highest))
    else:
        axes.set_yscale("symlog", linthresh=1.0, linscale=1.0)
        axes.set_ylim(1.5 * lowest, 1.5 * highest)
        ticks = [tick for tick in (-100, -10, -1, 0, 1, 3, 10, 30, 100) if 1.5 * lowest <= tick <= 1.5 * highest]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(1, color=VERMILLION, linewidth=1.2, linestyle="--", zorder=2, label="alarm threshold", gid="threshold")


def _draw_alarms(events: list[Event], panels: tuple[Axes, Axes]) -> None:
    for axes in panels:
        for event in _of(events, "alarm"):
            axes.axvline(_step(event), color=VERMILLION, linewidth=1.3, alpha=0.9, zorder=3.5, label="alarm", gid="alarm")


def _draw_rollbacks(events: list[Event], panels: tuple[Axes, Axes]) -> None:
    rollbacks = _of(events, "rollback")
    top = panels[0]
    for index, event in enumerate(rollbacks):
        begin, end, height = _step(event), _step(event, "to_timestep"), 0.965 - 0.045 * (index % 3)
        look: dict[str, Any] = {"color": BLUE, "linewidth": 1.6, "zorder": 6, "transform": top.get_xaxis_transform()}
        top.plot([end, begin], [height, height], label="rollback (to the triangle)", gid="rollback", **look)
        top.plot([end], [height], "<", markersize=6, gid="rollback target", **look)
        if len(rollbacks) <= MOST_NUMBERS:
            top.annotate(
                str(event.get("number", index + 1)), (begin, height), xycoords=top.get_xaxis_transform(), xytext=(4, 0),
                textcoords="offset points", va="center", ha="left", color=BLUE, fontsize=9, fontweight="bold", zorder=7,
                annotation_clip=False,
            )  # fmt: skip


def _draw_escalations(events: list[Event], panels: tuple[Axes, Axes]) -> None:
    for event in _of(events, "escalation"):
        for axes in panels:
            axes.axvline(
                _step(event), color="black", linewidth=2, linestyle=":", zorder=5, label="escalation", gid="escalation"
            )
        panels[0].annotate(
            str(event.get("action", "")), (_step(event), 0.03), xycoords=panels[0].get_xaxis_transform(), xytext=(-5, 8),
            textcoords="offset points", ha="right", va="bottom", rotation=90, fontsize=9, fontweight="bold", zorder=7,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
