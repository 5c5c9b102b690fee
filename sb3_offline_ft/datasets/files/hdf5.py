"""``.hdf5`` files of flat arrays, as D4RL's, as datasets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.datasets.files.arrays import check_names, dataset_from_arrays, is_column
from sb3_offline_ft.datasets.files.reading import ContentError, Source, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset


@contextmanager
def hdf5_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    import h5py

    with reading(source.where, source.file):
        file = h5py.File(source.file, "r")
    with file:
        with reading(source.where, source.file):
            stored = _arrays_in(file, source)
        check_names(stored, source.where)

        def read() -> OfflineDataset:
            with reading(source.where, source.file):
                arrays = {name: _read_array(array) for name, array in stored.items() if is_column(name)}
            return dataset_from_arrays(arrays, source)

        yield read


def _arrays_in(file: Any, source: Source) -> dict[str, Any]:
    """The arrays by name, not yet read; ``observations/<key>`` for those of a group."""
    import h5py

    if "episode_0" in file or source.file.name == "main_data.hdf5":
        raise ContentError(f"{source.where} is part of a Minari dataset: name the folder that holds it.")
    stored: dict[str, Any] = {}
    for name, members in file.items():
        if not isinstance(members, h5py.Group):
            stored[name] = members
        elif name in ("observations", "next_observations"):
            for key, value in members.items():
                if isinstance(value, h5py.Group):
                    raise ContentError(
                        f"{source.where}: {name}/{key} is a group within a group; nested observations are not supported, "
                        "expected an array for each key."
                    )
                stored[f"{name}/{key}"] = value
    return stored


def _read_array(stored: Any) -> Array:
    with np.errstate(over="ignore"):
        # Converted while it is read, so that the wide numbers are never all in memory
        array: Array = (stored.astype(np.float32) if stored.dtype == np.float64 else stored)[()]
    return array
