"""What a study's workers are doing, on a terminal or line by line."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from sb3_offline_ft.study.engine.queue import CellState
from sb3_offline_ft.study.engine.worker import Evaluated, Finished, Message, Said, Stepped, Stopped, Took


def counts_text(counts: Mapping[CellState, int]) -> str:
    """Numbers of cells in words, without what there is none of."""
    return ", ".join(f"{counts[state]} {state}" for state in CellState if counts.get(state)) or "no cells"


class RunDisplay:
    """Shows what workers do: as live bars on a terminal, else as one line for each cell that begins or ends."""

    def __init__(self, console: Console, what: str = "cells") -> None:
        self._console = console
        self._cells: dict[int, str] = {}
        self._tasks: dict[int, TaskID] = {}
        self._said: set[str] = set()
        self._all = Progress(
            TextColumn(f"[bold]{what}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"), console=console,
        )  # fmt: skip
        self._workers = Progress(
            TextColumn("{task.description}", markup=False), TextColumn("{task.fields[phase]}", markup=False), BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("{task.fields[last]}"), console=console,
        )  # fmt: skip
        self._overall = self._all.add_task("", total=None, counts="")

    def shown(self) -> AbstractContextManager[Any]:
        """While it is entered, the display is there."""
        if not self._console.is_terminal:
            return nullcontext()
        return Live(Group(self._all, self._workers), console=self._console, refresh_per_second=4)

    def counts(self, counts: Mapping[CellState, int]) -> None:
        """Show the numbers of cells, wherever they are run."""
        self._all.update(
            self._overall, completed=counts.get(CellState.DONE, 0), total=sum(counts.values()), counts=counts_text(counts)
        )

    def say(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def told(self, worker: int, message: Message) -> None:
        """Show what the worker with a number told."""
        match message:
            case Took(cell=cell):
                self._cells[worker] = cell
                self._tasks[worker] = self._workers.add_task(cell, total=None, phase="begins", last="")
                if not self._console.is_terminal:
                    self._log(f"{cell}: begins")
            case Stepped(phase=phase, done=done, total=total):
                self._update(worker, completed=done, total=total, phase=phase)
            case Evaluated(timestep=timestep, mean_return=value):
                self._update(worker, last=f"return {value:,.1f} at {timestep:,}")
            case Finished(mean_return=value, error=error, note=note):
                self.gone(worker)
                cell = self._cells.pop(worker, "?")
                if error is not None:
                    self._log(f"{cell}: failed: {error}", "red")
                elif note is not None:
                    self._log(f"{cell}: {note}", "yellow")
                else:
                    self._log(f"{cell}: done, return {value:,.1f}")
            case Said(text=text):
                if text not in self._said:
                    self._said.add(text)
                    self.say(f"worker {worker}: {text}", "dim")
            case Stopped():
                self.gone(worker)

    def gone(self, worker: int) -> None:
        """Show that a worker is at no cell any more."""
        if worker in self._tasks:
            self._workers.remove_task(self._tasks.pop(worker))

    def _update(self, worker: int, **fields: Any) -> None:
        if worker in self._tasks:
            self._workers.update(self._tasks[worker], **fields)

    def _log(self, text: str, style: str = "") -> None:
        self.say(f"{datetime.now():%H:%M:%S}  {text}", style)
