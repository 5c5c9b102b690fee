"""The results of a study, from its run folders and its storage."""

import errno
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.folder import RUNS, CellResult, find_result, folders_of, read_result
from sb3_offline_ft.study.engine.liveness import STORAGE_FAULTS
from sb3_offline_ft.study.engine.queue import JOURNAL, StudyQueue, fault_text


@dataclass(frozen=True)
class Run:
    """
    A finished cell.

    :param cell: The cell
    :param key: Its key
    :param result: Its result
    """

    cell: Cell
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

    protocol: Protocol
    runs: tuple[Run, ...]
    missing: tuple[Cell, ...]
    failed: Mapping[Cell, str]

    @property
    def damaged(self) -> tuple[Cell, ...]:
        """Those of the missing cells that have a run folder, which cannot be read."""
        return tuple(cell for cell in self.missing if any(map(Path.exists, folders_of(self.protocol, cell))))


def study_results(folder: str | Path, storage: str | None = None, trust_pickle: bool = False) -> StudyResults:
    """
    Read what is known of a study: from its run folders, and from its storage if there is one.

    :param folder: The study's folder
    :param storage: Its storage, None for the journal in its folder
    :param trust_pickle: Whether datasets may be read from pickle files: that runs code which these hold
    :return: The results
    :raises OSError: There is no study, or its storage cannot be read
    :raises ValueError: Its protocol is wrong
    """
    protocol = Protocol.load(folder, trust_pickle)
    if storage is None and not (protocol.folder / JOURNAL).exists():
        remember_data_of_runs(protocol)
        return load_results(protocol)
    try:
        with StudyQueue(protocol, storage, create=False) as queue:
            try:
                queue.restore_run_folders()
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                warn(f"{protocol.folder} cannot be written to: results that only the storage has are left out ({error}).")
            errors = {status.key: status.error for status in queue.statuses() if status.error is not None}
    except STORAGE_FAULTS as error:
        raise OSError(f"The storage failed: {fault_text(error)}.") from None
    return load_results(protocol, errors)


def load_results(protocol: Protocol, errors: Mapping[str, str] | None = None) -> StudyResults:
    """
    Read the results of a study's cells from its run folders.

    :param errors: Tracebacks of failed cells, by key
    """
    runs: list[Run] = []
    missing: list[Cell] = []
    failed: dict[Cell, str] = {}
    for cell in protocol.cells():
        key, result = protocol.cell_key(cell), find_result(protocol, cell)
        if result is not None:
            runs.append(Run(cell, key, result))
        elif errors and key in errors:
            failed[cell] = errors[key]
        else:
            missing.append(cell)
    return StudyResults(protocol, tuple(runs), tuple(missing), failed)


def remember_data_of_runs(protocol: Protocol) -> None:
    """
    Take facts about data that is not here from finished runs of a study without a storage, so that they are found.

    :raises OSError: Data is not here, and no run has it
    :raises ValueError: Data cannot be read, and no run has it
    """
    for label in protocol.datasets:
        try:
            protocol.data_facts(label)
        except (OSError, ValueError):
            folders = sorted((protocol.folder / RUNS / label).glob("*/*"))
            manifests = [result.manifest for folder in folders if (result := read_result(folder)) is not None]
            texts = [
                json.dumps(_recorded_facts(each), sort_keys=True) for each in manifests if "cell" in each and each["dataset"]
            ]
            if not texts:
                raise
            recorded = Counter(texts)
            facts = json.loads(max(recorded, key=lambda text: (recorded[text], text)))
            protocol.remember_data({label: {**facts, "spec": protocol.specs[label]}})


def _recorded_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    # A cell's own facts have the scores only where its result depends on them
    return {"reference_scores": manifest["dataset"].get("reference_scores"), **(manifest["cell"].get("dataset") or {})}
