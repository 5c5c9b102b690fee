"""``.npz`` files as datasets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.datasets.files.arrays import check_names, dataset_from_arrays, is_column
from sb3_offline_ft.datasets.files.reading import ContentError, Source, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset


@contextmanager
def open_archive(path: Path) -> Iterator[Any]:
    """Open a file of arrays without pickle.

    :param path: The file.
    :return: A context manager that gives the arrays by name, not yet read.
    """
    where = f"Dataset {str(path)!r}"
    with open(path, "rb") as file:
        with reading(where, path):
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ContentError(f"{where} is no .npz archive: expected one made by numpy.savez, found a single array.")
        yield archive


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    with open_archive(path) as archive:
        check_names(archive.files, f"Dataset {str(path)!r}")
        yield archive


def load_npz(source: Source, path: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    with open_npz(path) as archive:
        arrays = {name: read_array(archive, name, where, path) for name in archive.files if is_column(name)}
    return dataset_from_arrays(arrays, source, where)


def read_array(archive: Any, name: str, where: str, path: Path) -> Array:
    """Read one array.

    :param archive: What :func:`open_archive` gave.
    :param name: Its name.
    :param where: Names the dataset at the start of messages.
    :param path: The file.
    :return: The array, float64 as float32.
    :raises ValueError: if it is damaged or holds Python objects.
    """
    with reading(where, path):
        try:
            array: Array = archive[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ContentError(f"{where}: {name} holds Python objects, expected numbers. Save it as a plain array.") from error
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype == np.float64 else array
