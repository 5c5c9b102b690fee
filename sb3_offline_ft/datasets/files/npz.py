"""``.npz`` files as datasets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.common.reading import ArrayFile, open_file
from sb3_offline_ft.datasets.files.arrays import check_names, dataset_from_arrays, is_column
from sb3_offline_ft.datasets.files.reading import Source, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset


@contextmanager
def npz_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    with open_archive(source) as archive:
        check_names(archive.files, source.where)

        def read() -> OfflineDataset:
            arrays = {name: read_array(archive, name, source) for name in archive.files if is_column(name)}
            return dataset_from_arrays(arrays, source)

        yield read


@contextmanager
def open_archive(source: Source) -> Iterator[ArrayFile]:
    """Open a file of arrays without pickle."""
    with open_file(source.file) as file:
        with reading(source.where, source.file):
            archive = ArrayFile(file, source.where)
        yield archive


def read_array(archive: ArrayFile, name: str, source: Source) -> Array:
    """Read one array of an open archive, float64 as float32."""
    with reading(source.where, source.file):
        array: Array = archive[name]
        if array.dtype != np.float64:
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
