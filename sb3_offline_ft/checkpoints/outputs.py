"""The files that SB3's logger writes: cut back to what they were at a checkpoint, and gone on with."""

import os
import sys
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
)

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.warning import warn

State = dict[str, Any]

TENSORBOARD_FILES = "events.out.tfevents.*"


def logger_state(logger: Logger) -> State:
    """What a logger has noted since it was last dumped, and how long its files are."""
    return {
        "values": {name: _number(value) for name, value in logger.name_to_value.items()},
        "counts": dict(logger.name_to_count),
        "excluded": {name: list(names) for name, names in logger.name_to_excluded.items()},
        "folder": None if logger.dir is None else str(Path(logger.dir).absolute()),
        "formats": [_format_state(each) for each in logger.output_formats],
    }


def _number(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else float(value)


def _format_state(output: KVWriter) -> State:
    kind, state = type(output).__name__, dict[str, Any]()
    if isinstance(output, TensorBoardOutputFormat):
        output.writer.flush()
        folder = Path(output.writer.log_dir).absolute()
        state = {"folder": str(folder), "files": {path.name: path.stat().st_size for path in folder.glob(TENSORBOARD_FILES)}}
    elif isinstance(output, HumanOutputFormat | JSONOutputFormat | CSVOutputFormat) and getattr(output, "own_file", True):
        output.file.flush()
        path = Path(output.file.name).absolute()
        state = {"file": str(path), "size": path.stat().st_size}
        if isinstance(output, CSVOutputFormat):
            state |= {"keys": list(output.keys), "rows": len(path.read_text(encoding="utf-8").splitlines())}
    return {"kind": kind, **state}


def open_logger(state: State) -> Logger:
    """A logger that goes on in the files of a state, which are cut back to what they were."""
    formats = [made for saved in state["formats"] if (made := _open(saved)) is not None]
    return Logger(state["folder"], formats)


def load_values(logger: Logger, state: State) -> None:
    """Take up what had been noted."""
    for known in (logger.name_to_value, logger.name_to_count, logger.name_to_excluded):
        known.clear()
    logger.name_to_value.update(state["values"])
    logger.name_to_count.update(state["counts"])
    logger.name_to_excluded.update({name: tuple(names) for name, names in state["excluded"].items()})


def _open(saved: State) -> KVWriter | None:
    kind = saved["kind"]
    if kind == HumanOutputFormat.__name__ and "file" not in saved:
        return HumanOutputFormat(sys.stdout)
    if kind == TensorBoardOutputFormat.__name__:
        folder = Path(saved["folder"])
        for path in folder.glob(TENSORBOARD_FILES):
            if path.name in saved["files"]:
                _cut(path, saved["files"][path.name])
            else:
                path.unlink()
        return TensorBoardOutputFormat(str(folder))
    classes = {cls.__name__: cls for cls in (HumanOutputFormat, JSONOutputFormat, CSVOutputFormat)}
    if kind not in classes or "file" not in saved:
        warn(f"The logger's {kind} cannot be gone on with, and is left out: give the run a logger with SB3's own formats.")
        return None
    path = Path(saved["file"])
    # SB3 empties a file that it opens
    output: Any = classes[kind](os.devnull)
    output.file.close()
    if isinstance(output, CSVOutputFormat):
        output.keys = list(saved["keys"])
        _cut_table(path, output.keys, saved["rows"])
    else:
        _cut(path, saved["size"])
    output.file = path.open("r+" if path.exists() else "w+", encoding="utf-8")
    output.file.seek(0, os.SEEK_END)
    return output  # type: ignore[no-any-return]


def _cut(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        warn(f"{path} holds less than it did at the checkpoint, and what is missing in it cannot be had again.")
    elif found > size:
        os.truncate(path, size)


def _cut_table(path: Path, keys: list[str], n_lines: int) -> None:
    """SB3 adds new columns to the lines that there are, as empty ones at their ends."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) < n_lines:
        warn(f"{path} holds less than it did at the checkpoint, and what is missing in it cannot be had again.")
        return
    if not n_lines:
        _cut(path, 0)
        return
    n_new = len(lines[0].split(",")) - len(keys)
    kept = [",".join(keys), *(line[: len(line) - n_new] for line in lines[1:n_lines])]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())
