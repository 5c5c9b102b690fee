"""``.hdf5`` files of flat arrays, as D4RL's, as datasets."""

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
def open_hdf5(path: Path) -> Iterator[dict[str, Any]]:
    """Open a file.

    :param path: The file.
    :return: A context manager that gives the arrays in the file by name, not yet read.
    """
    import h5py

    where = f"Dataset {str(path)!r}"
    with reading(where, path):
        file = h5py.File(path, "r")
    with file:
        with reading(where, path):
            if "episode_0" in file or path.name == "main_data.hdf5":
                raise ContentError(f"{where} is part of a Minari dataset: name the folder that holds it.")
            stored: dict[str, Any] = {}
            for name in file:
                members = file[name]
                if isinstance(members, h5py.Group):
                    for key, value in members.items() if name in ("observations", "next_observations") else ():
                        if isinstance(value, h5py.Group):
                            raise ContentError(
                                f"{where}: {name}/{key} is a group within a group; nested observations are not supported, "
                                "expected an array for each key."
                            )
                        stored[f"{name}/{key}"] = value
                else:
                    stored[name] = members
        check_names(stored, where)
        yield stored


def load_hdf5(source: Source, path: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    with open_hdf5(path) as stored, reading(where, path):
        arrays = {name: _read_array(array) for name, array in stored.items() if is_column(name)}
    return dataset_from_arrays(arrays, source, where)


def _read_array(stored: Any) -> Array:
    with np.errstate(over="ignore"):
        # Converted while it is read, so that the wide numbers are never all in memory
        array: Array = (stored.astype(np.float32) if stored.dtype == np.float64 else stored)[()]
    return array
