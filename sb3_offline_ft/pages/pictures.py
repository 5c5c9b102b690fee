"""Pictures for pages, as SVG that takes its colours from the page around it, and as files."""

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


def inline_svg(
    name: str,
    paint: Callable[[Figure], None],
    size: tuple[float, float],
    *,
    words: str = "",
    colours: Mapping[str, str] | None = None,
) -> str:
    """Draw a picture for a page.

    :param name: Told from those of the other pictures on the page.
    :param paint: Draws into the figure.
    :param size: Width and height in inches.
    :param words: What screen readers say of it.
    :param colours: More colours, as ``#rrggbb``, and what the page's style calls them, such as ``var(--accent)``.
    :return: An ``<svg>`` element, the same for the same content.
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


def picture_files(name: str, paint: Callable[[Figure], None], size: tuple[float, float], title: str) -> dict[str, bytes]:
    """Draw a picture for files, with dark lines on white.

    :param name: As for :func:`inline_svg`.
    :param paint: Draws into the figure.
    :param size: Width and height in inches.
    :param title: Written into the files.
    :return: The contents of an ``svg`` and of a ``png`` file (200 dots an inch), the same for the same picture.
    """
    white: dict[Any, Any] = {"figure.facecolor": "white"}
    text = _draw_svg(name, paint, size, {**white, "svg.fonttype": "path"}, title)
    with rc_context({**_STYLE, **white}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=200, metadata={"Title": title, "Software": None})
    return {"svg": text.encode("utf-8"), "png": stream.getvalue()}


def _draw_svg(
    name: str, paint: Callable[[Figure], None], size: tuple[float, float], style: dict[Any, Any], title: str | None = None
) -> str:
    with rc_context({**_STYLE, **style, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        stream = io.BytesIO()
        named = {} if title is None else {"Title": title}
        figure.savefig(stream, format="svg", dpi=200, metadata={"Date": None, "Creator": None, **named})
    return stream.getvalue().decode("utf-8")
