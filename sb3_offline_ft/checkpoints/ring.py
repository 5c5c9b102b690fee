"""The rows of a replay buffer in files that checkpoints share, named by their content, so that only new rows are written."""

import hashlib
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.her import HerReplayBuffer

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.reading import ArrayFile, open_file

ROWS_OF_A_FILE = 4096
BYTES_OF_A_FILE = 2**24
FOLDER = "buffer"

Columns = dict[str, np.ndarray]


def check_buffer(buffer: Any) -> None:
    """``ValueError`` if the rows of a buffer cannot be kept."""
    if not isinstance(buffer, ReplayBuffer) or isinstance(buffer, HerReplayBuffer):
        raise ValueError(
            f"CheckpointRun cannot save a {type(buffer).__name__}: expected a ReplayBuffer whose rows are arrays. Use another "
            "replay buffer, or no CheckpointRun."
        )


def columns_of(buffer: ReplayBuffer) -> Columns:
    """The arrays of a buffer that have a row for each step of its environments, by name."""
    columns: Columns = {}
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else (("", value),):
            if isinstance(array, np.ndarray) and array.shape[:2] == (buffer.buffer_size, buffer.n_envs):
                columns[f"{name}/{key}" if key else name] = array
    return dict(sorted(columns.items()))


def _n_rows(buffer: ReplayBuffer) -> int:
    # With shared observations the next one is in the row that comes next
    return min(buffer.size() + bool(buffer.optimize_memory_usage), buffer.buffer_size)


class RingFiles:
    """
    The files of a replay buffer's rows in a folder of checkpoints.

    :param folder: The folder; that of the files is made within it
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._known: dict[tuple[int, int], tuple[int, str]] = {}
        """Of each piece of the ring, the checksum and the name of the file that holds it."""

    def write(self, buffer: ReplayBuffer) -> dict[str, Any]:
        """
        Write the rows that no file holds.

        :return: What :meth:`read` needs, in the form of JSON
        """
        columns, n_rows = columns_of(buffer), _n_rows(buffer)
        row_bytes = sum(array[0].nbytes for array in columns.values())
        step = max(1, min(ROWS_OF_A_FILE // buffer.n_envs, BYTES_OF_A_FILE // max(row_bytes, 1)))
        pieces = []
        for start in range(0, n_rows, step):
            piece = {name: array[start : min(start + step, n_rows)] for name, array in columns.items()}
            pieces.append([start, self._file_of(start, min(start + step, n_rows), piece)])
        shapes = {name: [str(array.dtype), list(array.shape)] for name, array in columns.items()}
        return {"pos": int(buffer.pos), "full": bool(buffer.full), "rows": n_rows, "columns": shapes, "files": pieces}

    def _file_of(self, start: int, stop: int, piece: Columns) -> str:
        # Rows may have been changed after they were stored; a checksum is twice as fast as the name
        checksum = 0
        for array in piece.values():
            checksum = zlib.crc32(array.data, checksum)
        known, name = self._known.get((start, stop), (None, ""))
        if known == checksum and (self._folder / name).is_file():
            return name
        name = f"{_digest(piece)}.npz"
        if not self._holds(name):
            with atomic_write(self._folder / name) as file:
                np.savez(file, **piece)  # type: ignore[arg-type]  # the stubs take names for savez's own keyword
        self._known[start, stop] = checksum, name
        return name

    def _holds(self, name: str) -> bool:
        """Whether these rows are in the file of their name; what else has that name is removed."""
        path = self._folder / name
        if not os.path.lexists(path):
            return False
        try:
            self._piece(name)
        except (ValueError, OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            return False
        return True

    def keep(self, names: set[str]) -> None:
        """Remove the files that no checkpoint needs."""
        for file in self._folder.glob("*.npz") if self._folder.is_dir() else ():
            if file.name not in names:
                file.unlink(missing_ok=True)

    def check(self, facts: dict[str, Any]) -> None:
        """``ValueError`` if a file is missing or damaged."""
        for _, name in facts["files"]:
            self._piece(name)

    def _piece(self, name: str) -> Columns:
        path = self._folder / name
        with naming_damage(path, "rows of a replay buffer"):
            with open_file(path) as stream:
                content = ArrayFile(stream, name)
                piece = {column: content[column] for column in sorted(content.files)}
            if f"{_digest(piece)}.npz" != name:
                raise ValueError("its content has changed")
        return piece

    def read(self, facts: dict[str, Any], buffer: ReplayBuffer) -> None:
        """
        Put the rows into a buffer.

        :param facts: What :meth:`write` returned
        :param buffer: A buffer of the same size, for the same environment
        :raises ValueError: It is another one, or a file is damaged
        """
        columns = columns_of(buffer)
        for name in sorted(columns.keys() | facts["columns"].keys()):
            own = [str(columns[name].dtype), list(columns[name].shape)] if name in columns else None
            if own != facts["columns"].get(name):
                raise ValueError(
                    f"The replay buffer's {name} is {own}, and the run's was {facts['columns'].get(name)}: resume with "
                    "the same `buffer_size`, environment and number of environments."
                )
        for start, name in facts["files"]:
            for column, values in self._piece(name).items():
                columns[column][start : start + len(values)] = values
        buffer.pos, buffer.full = facts["pos"], facts["full"]


def _digest(piece: Columns) -> str:
    digest = hashlib.sha256()
    for name, array in piece.items():
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
