"""How far a study is."""

import contextlib
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.design.reading import NO_DATA
from sb3_offline_ft.study.engine.folder import RUNS, local_result
from sb3_offline_ft.study.engine.liveness import STORAGE_FAULTS
from sb3_offline_ft.study.engine.progress import counts_text
from sb3_offline_ft.study.engine.queue import JOURNAL, CellState, CellStatus, StudyQueue, fault_text
from sb3_offline_ft.study.engine.results import remember_data_of_runs

STYLES = {
    CellState.DONE: "green",
    CellState.RUNNING: "cyan",
    CellState.WAITING: "",
    CellState.FAILED: "red",
    CellState.UNKNOWN: "yellow",
}


def show_status(
    folder: Path,
    storage: str | None = None,
    errors: bool = False,
    console: Console | None = None,
    trust_pickle: bool = False,
) -> None:
    """
    Print how far a study is.

    :param storage: Its storage, None for the journal in its folder
    :param errors: Show the tracebacks of failed cells whole
    :param trust_pickle: Whether datasets of which no run and no storage knows may be read from pickle files
    :raises OSError: The storage cannot be opened
    :raises ValueError: The protocol is wrong
    """
    console = console or PlainConsole()
    protocol = Protocol.load(folder, trust_pickle)
    statuses = read_statuses(protocol, storage)
    console.print(Text(f"{protocol.name}: {counts_text(Counter(each.state for each in statuses))}", style="bold"))
    console.print(_grid(statuses))
    running = [each for each in statuses if each.state is CellState.RUNNING]
    if running:
        console.print(_running_table(running, protocol.interactions))
    failed = [each for each in statuses if each.state is CellState.FAILED]
    for each in failed:
        lines = (each.error or "").rstrip().splitlines()
        console.print(Text(f"{each.cell.name} failed: {lines[-1] if lines else 'no error was recorded'}", style="red"))
        if errors:
            console.print(Text("\n".join(lines)), soft_wrap=True)
    if failed and not errors:
        console.print(Text("`--errors` shows the whole tracebacks; `study run --retry-failed` tries failed cells again."))
    unknown = sum(each.state is CellState.UNKNOWN for each in statuses)
    if unknown:
        cells = f"{unknown:,} cell{'s' * (unknown != 1)}"
        console.print(Text(f"Whether {cells} ran is not known: the data is not here, and no run knows it."))


def read_statuses(protocol: Protocol, storage: str | None = None) -> list[CellStatus]:
    """
    What is known of each cell.

    :param storage: The study's storage, None for the journal in its folder
    :raises OSError: The storage cannot be read
    """
    if storage is None and not (protocol.folder / JOURNAL).exists():
        return _without_storage(protocol)
    try:
        with StudyQueue(protocol, storage, create=False) as queue:
            return [_with_run_folder(protocol, each) for each in queue.statuses()]
    except STORAGE_FAULTS as error:
        raise OSError(f"The storage failed: {fault_text(error)}.") from None


def _without_storage(protocol: Protocol) -> list[CellStatus]:
    waiting = [CellStatus(cell, "", CellState.WAITING, None) for cell in protocol.cells()]
    if not (protocol.folder / RUNS).exists():
        return waiting
    # Data that is not here, and no run has had, has no results
    with contextlib.suppress(OSError, ValueError):
        remember_data_of_runs(protocol)
    statuses = []
    for status in waiting:
        try:
            statuses.append(_with_run_folder(protocol, status))
        except (OSError, ValueError):
            statuses.append(replace(status, state=CellState.UNKNOWN))
    return statuses


def _with_run_folder(protocol: Protocol, status: CellStatus) -> CellStatus:
    """Who runs a cell that has a result here takes that."""
    is_done = status.state is CellState.WAITING and local_result(protocol, status.cell) is not None
    return replace(status, state=CellState.DONE) if is_done else status


def _grid(statuses: list[CellStatus]) -> Table:
    table = Table()
    table.add_column("dataset", overflow="fold")
    table.add_column("method", overflow="fold")
    states = [state for state in CellState if state is not CellState.UNKNOWN or any(each.state is state for each in statuses)]
    for state in states:
        table.add_column(str(state), justify="right", style=STYLES[state])
    counts: dict[tuple[str, str], Counter[CellState]] = {}
    for each in statuses:
        row = (each.cell.dataset or NO_DATA, each.cell.method.name)
        counts.setdefault(row, Counter())[each.state] += 1
    for (dataset, method), count in counts.items():
        table.add_row(Text(dataset), Text(method), *(str(count[state] or "") for state in states))
    return table


def _running_table(running: list[CellStatus], interactions: int) -> Table:
    table = Table(title="Running", title_justify="left")
    for column in ("cell", "worker", "since"):
        table.add_column(column, overflow="fold")
    for column in ("interactions", "last return"):
        table.add_column(column, justify="right")
    for each in running:
        timestep, value = each.last_evaluation or (None, None)
        table.add_row(
            Text(each.cell.name),
            Text(each.worker or "?"),
            "?" if each.started is None else _since(each.started),
            "not yet" if timestep is None else f"{timestep:,} of {interactions:,}",
            "" if value is None else f"{value:,.1f}",
        )
    return table


def _since(moment: datetime) -> str:
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    duration = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    local, today = moment.astimezone(), datetime.now(UTC).astimezone().date()
    return f"{local:%H:%M}, {duration}" if local.date() == today else f"{local:%Y-%m-%d %H:%M}, {duration}"
