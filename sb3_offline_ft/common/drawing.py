"""What pictures of runs have in common. Imported where one is drawn, for the sake of Matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_offline_ft.common.io import atomic_write

# The colours of Okabe and Ito, which colour-blind readers can tell apart
BLUE, SKY, GREEN, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7"


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure for a picture of dots, which pyplot does not know."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure into a file, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def panels_of_run(figure: Figure, steps: Sequence[float]) -> tuple[Axes, Axes]:
    """A high panel for the returns and a low one below it, over these environment steps (in thousands)."""
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    top.set_xlim(first, last + 0.015 * (last - first) if last > first else first + 1)
    bottom.set_xlabel("environment steps (thousands)")
    return top, bottom


def say_in(axes: Axes, text: str, **look: Any) -> None:
    """Say in the middle of a panel why it is empty."""
    look = {"x": 0.5, "y": 0.5, "transform": axes.transAxes, "ha": "center", "va": "center", "color": "0.4", **look}
    axes.text(s=text, **look)


def common_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels, in which each label is once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    for entry in legend.legend_handles:
        # Thousands of small and faint dots are seen together, the one in the legend is alone
        if isinstance(entry, Line2D):
            entry.set(alpha=1, markersize=max(5.0, entry.get_markersize()))
