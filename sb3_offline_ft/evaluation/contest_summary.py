"""What a summary says of a run with champion and challenger."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.drawing import save_png
from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.deployment.history import EVENTS, EVENTS_FILE, FIGURE, History


def contest_rows(contest: History | None) -> Iterator[tuple[str, str]]:
    """What was served, at what risk, and what came out."""
    if contest is not None:
        yield from contest.in_words().items()


def draw_contest(folder: Path, contest: History, figure: Path) -> None:
    """Write the picture of the contest in a run's folder; ``ValueError`` names its events if they are damaged."""
    with naming_damage(folder / EVENTS_FILE, EVENTS):
        drawn = contest.draw()
    save_png(drawn, figure)


def show_contest(folder: Path, contest: History, figure: Path | None, console: Console | None) -> None:
    """Print the summary of a run that needed no evaluations, and write its picture, by default into the run's folder."""
    figure = figure or folder / FIGURE
    draw_contest(folder, contest, figure)
    table = Table(title=f"Champion and challenger in {folder}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, text in contest_rows(contest):
        table.add_row(name, text)
    for model in sorted(folder.glob("best_model.zip")):
        table.add_row("champion", str(model))
    table.add_row("picture", str(figure))
    (console or PlainConsole()).print(table)
