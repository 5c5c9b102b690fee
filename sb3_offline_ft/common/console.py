"""The terminal, to which nothing in data or names can speak: control characters are shown, not sent."""

import re
from collections.abc import Iterable

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """A text in which control characters but for tabs and ends of lines are written out, such as ``\\x1b``."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def echo(text: str, err: bool = False) -> None:
    """Print a line, control characters written out."""
    typer.echo(visible(text), err=err)


class PlainConsole(Console):
    """Rich's console, whose terminal a file or a dataset could otherwise colour, move or let type."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich's, with control characters in texts written out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
