"""The results of a study, from its run folders and its storage."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.study.engine.run_folder import RUNS, CellResult, read_result, run_folder, write_result

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Cell, Protocol


@dataclass(frozen=True)
class Run:
    """
    A finished cell.

    :param cell: The cell
    :param key: Its key
    :param result: Its result
    """

    cell: "Cell"
    key: str
    result: CellResult


@dataclass(frozen=True)
class StudyResults:
    """
    What is known of a study.

    :param protocol: Its protocol
    :param runs: Finished cells, in the protocol's order
    :param missing: Cells that have not finished
    :param failed: Cells that have failed, with their tracebacks
    """

    protocol: "Protocol"
    runs: tuple[Run, ...]
    missing: tuple["Cell", ...]
    failed: Mapping["Cell", str]

    @property
    def damaged(self) -> tuple["Cell", ...]:
        """Those of the missing cells that have a run folder, which cannot be read."""
        return tuple(
            cell
            for cell in self.missing
            if any(folder.exists() for folder in _folders(self.protocol, cell, self.protocol.cell_key(cell)))
        )


def load_results(
    protocol: "Protocol", stored: Mapping[str, str] | None = None, errors: Mapping[str, str] | None = None
) -> StudyResults:
    """
    Read the results of a study's cells. A run folder that is missing, or only half written, is made from the storage.

    :param protocol: The protocol
    :param stored: Results in the storage as JSON, by key
    :param errors: Tracebacks of failed cells, by key
    :return: The results
    :raises OSError: A run folder cannot be written
    """
    runs: list[Run] = []
    missing: list[Cell] = []
    failed: dict[Cell, str] = {}
    for cell in protocol.cells():
        key = protocol.cell_key(cell)
        result = find_result(protocol, cell, (stored or {}).get(key))
        if result is not None:
            runs.append(Run(cell, key, result))
        elif errors and key in errors:
            failed[cell] = errors[key]
        else:
            missing.append(cell)
    return StudyResults(protocol, tuple(runs), tuple(missing), failed)


def find_result(protocol: "Protocol", cell: "Cell", stored: str | None = None) -> CellResult | None:
    """
    Read a cell's result, and write its run folder if that is missing or damaged. A stored result that is damaged is named in
    a warning.

    :param protocol: The protocol
    :param cell: A cell
    :param stored: Its result in the storage as JSON, if it is there
    :return: Its result, None if there is none
    :raises OSError: The run folder cannot be written
    """
    result = local_result(protocol, cell)
    if result is None and stored is not None:
        try:
            with naming_damage(f"The result of {cell.name} in the storage", "one that a run has written"):
                result = CellResult.from_json(stored)
        except ValueError as error:
            warnings.warn(f"{error} It is left out.", stacklevel=2)
    return None if result is None else keep_result(protocol, cell, result)


def local_result(protocol: "Protocol", cell: "Cell") -> CellResult | None:
    """
    :param protocol: The protocol
    :param cell: A cell
    :return: Its result from its run folder, or from one with the same key that has the name that the method or the dataset had
        before; None if there is none
    """
    key = protocol.cell_key(cell)
    folders = _folders(protocol, cell, key)
    return next((result for folder in folders if (result := _read(folder, key)) is not None), None)


def keep_result(protocol: "Protocol", cell: "Cell", result: CellResult) -> CellResult:
    """
    Write a result into a cell's run folder, unless it is there.

    :param protocol: The protocol
    :param cell: The cell
    :param result: The result of it, or of another one with the same key
    :return: The result as it is there, with the cell's name
    :raises OSError: It cannot be written
    """
    folder = _folder(protocol, cell, protocol.cell_key(cell))
    there = _read(folder, protocol.cell_key(cell))
    if there is not None:
        return there
    result = replace(result, manifest=result.manifest | {"name": cell.name, "label": cell.method.label})
    write_result(folder, result)
    return result


def _folders(protocol: "Protocol", cell: "Cell", key: str) -> Iterator[Path]:
    own = _folder(protocol, cell, key)
    yield own
    others = sorted((protocol.folder / RUNS).glob(f"*/*/{own.name}"))
    yield from (folder for folder in others if folder != own)


def _folder(protocol: "Protocol", cell: "Cell", key: str) -> Path:
    return run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, key)


def _read(folder: Path, key: str) -> CellResult | None:
    result = read_result(folder)
    return result if result is not None and result.manifest["key"] == key else None
