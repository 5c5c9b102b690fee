"""The results of a study, from its run folders and its storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sb3_offline_ft.study.run_folder import CellResult, read_result, run_folder, write_result

if TYPE_CHECKING:
    from sb3_offline_ft.study.protocol import Cell, Protocol


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
    :param protocol: The protocol
    :param cell: A cell
    :param stored: Its result in the storage as JSON, if it is there; a run folder that lacks it gets it
    :return: Its result, None if there is none
    :raises OSError: The run folder cannot be written
    """
    key = protocol.cell_key(cell)
    folder = run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, key)
    result = read_result(folder)
    if result is not None and result.manifest["key"] == key:
        return result
    if stored is None:
        return None
    result = CellResult.from_json(stored)
    write_result(folder, result)
    return result
