"""Pictures for pages, as SVG that takes its colours from the page around it, and as files."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sb3_offline_ft.common.drawing import new_figure
from sb3_offline_ft.pages.html import Picture

INK, FAINT = "#1c2129", "#c9d1da"
"""Colours of text and of lines; pages replace them by their own."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    # Labels with dollar signs are names, not formulas
    "text.parse_math": False,
}
_WHITE: dict[Any, Any] = {"figure.facecolor": "white"}

Paint = Callable[[Figure], None]


@dataclass(frozen=True)
class Drawing:
    """
    A picture that is yet to be drawn.

    :param name: Its name, for files and ids
    :param title: What it shows
    :param caption: How to read it
    :param words: What can be seen in it, for those who do not see it
    :param paint: Draws it into a figure
    :param size: Width and height in inches
    """

    name: str
    title: str
    caption: str
    words: str
    paint: Paint
    size: tuple[float, float]

    def on_page(self, colours: Mapping[str, str] | None = None) -> Picture:
        """The picture in the colours of the page, some of which :func:`inline_svg` is told."""
        svg = inline_svg(self.name, self.paint, self.size, words=f"{self.title}. {self.words}", colours=colours)
        return Picture(svg, self.title, self.caption, self.words)

    def files(self) -> dict[str, bytes]:
        """Contents of an ``svg`` and a ``png`` file."""
        return picture_files(self.name, self.paint, self.size, self.title)


def inline_svg(
    name: str, paint: Paint, size: tuple[float, float], *, words: str = "", colours: Mapping[str, str] | None = None
) -> str:
    """
    Draw a picture for a page.

    :param name: Told from those of the other pictures on the page
    :param paint: Draws into the figure
    :param size: Width and height in inches
    :param words: What screen readers say of it
    :param colours: More colours, as ``#rrggbb``, and what the page's style calls them, such as ``var(--accent)``
    :return: An ``<svg>`` element, the same for the same content
    """
    text = _draw_svg(name, paint, size, {})
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    label = f' aria-label="{html.escape(words)}"' if words else ""
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda found: f'{found[1]} role="img"{label}', text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    for colour, called in {INK: "currentColor", FAINT: "var(--line)", **(colours or {})}.items():
        text = text.replace(colour.lower(), called)
    return text


def picture_files(name: str, paint: Paint, size: tuple[float, float], title: str) -> dict[str, bytes]:
    """Draw a picture with dark lines on white: an ``svg`` and a ``png`` file (200 dots an inch) that have this title."""
    text = _draw_svg(name, paint, size, {**_WHITE, "svg.fonttype": "path"}, title)
    with rc_context({**_STYLE, **_WHITE}):
        figure = new_figure(size)
        paint(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=200, metadata={"Title": title, "Software": None})
    return {"svg": text.encode("utf-8"), "png": stream.getvalue()}


def _draw_svg(name: str, paint: Paint, size: tuple[float, float], style: dict[Any, Any], title: str | None = None) -> str:
    with rc_context({**_STYLE, **style, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        stream = io.BytesIO()
        named = {} if title is None else {"Title": title}
        figure.savefig(stream, format="svg", dpi=200, metadata={"Date": None, "Creator": None, **named})
    return stream.getvalue().decode("utf-8")


def panels(figure: Figure, n: int, n_columns: int = 1, sharey: bool = False, sharex: bool = True) -> list[Axes]:
    """The first panels of a grid with so many columns, by default with one x axis; the rest of the last row is left empty."""
    grid = list(figure.subplots(-(-n // n_columns), n_columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axes in grid[n:]:
        axes.set_visible(False)
    return grid[:n]


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name what is drawn at the heights 0, 1, 2 and so on, the first at the top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def shade(axes: Axes, until: float, label: str | None = None) -> None:
    """Shade the time before a step."""
    axes.axvspan(0, until, color=INK, alpha=0.07, linewidth=0, label=label)


def level(axes: Axes, height: float | None, dashes: tuple[float, float], label: str | None = None) -> None:
    """A thin line across, if there is such a level."""
    if height is not None:
        axes.axhline(height, color=INK, linewidth=1, linestyle=(0, dashes), label=label)
