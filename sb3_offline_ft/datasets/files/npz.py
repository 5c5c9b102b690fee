"""``.npz`` files as datasets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.datasets.files.arrays import check_names, dataset_from_arrays, is_column
from sb3_offline_ft.datasets.files.reading import ContentError, Source, reading
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
def open_archive(source: Source) -> Iterator[Any]:
    """Open a file of arrays without pickle."""
    with open(source.file, "rb") as file:
        with reading(source.where, source.file):
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ContentError(
                    f"{source.where} is no .npz archive: expected one made by numpy.savez, found a single array."
                )
        yield archive


def read_array(archive: Any, name: str, source: Source) -> Array:
    """Read one array of an open archive, float64 as float32."""
    with reading(source.where, source.file):
        try:
            array: Array = archive[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ContentError(
                f"{source.where}: {name} holds Python objects, expected numbers. Save it as a plain array."
            ) from error
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype == np.float64 else array
