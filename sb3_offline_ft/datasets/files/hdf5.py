"""``.hdf5`` files of flat arrays, as D4RL's, as datasets."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.common.reading import ContentError, check_is_file, check_memory, shortened
from sb3_offline_ft.datasets.files.arrays import check_names, dataset_from_arrays, is_column
from sb3_offline_ft.datasets.files.reading import Source, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset

_OBSERVATIONS = ("observations", "next_observations")


@contextmanager
def hdf5_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    with reading(source.where, source.file):
        file = open_hdf5(source.file)
    with file:
        with reading(source.where, source.file):
            stored = _arrays_in(file, source)
        check_names(stored, source.where)

        def read() -> OfflineDataset:
            with reading(source.where, source.file):
                arrays = {name: _read_array(array) for name, array in stored.items() if array is not None}
            return dataset_from_arrays(arrays, source)

        yield read


def open_hdf5(path: Path) -> Any:
    """Open a file of HDF5's format for reading, an object of h5py's."""
    import h5py

    check_is_file(path)
    return h5py.File(path, "r")


def open_array(file: Any, name: str, where: str, of_bytes: bool = False) -> tuple[Any, tuple[int, ...], np.dtype[Any]]:
    """
    Open an array for h5py's low level, without looking outside of the file for any of it.

    :param file: h5py's ``FileID`` of the file, or the ``GroupID`` of :func:`open_group`
    :param name: The array's path in it
    :param where: Names the file at the start of messages
    :param of_bytes: Whether each value is a series of bytes, such as a packed image, and not a number
    :return: h5py's ``DatasetID``, the shape and the dtype of the array
    :raises ContentError: It is a link, its values are in another file, it holds no numbers, or it is too large
    :raises Exception: What h5py raises about a damaged file
    """
    from h5py import check_vlen_dtype, h5d

    where = f"{where}: {shortened(name)}"
    _check_links(file, name, where)
    stored = h5d.open(file, name.encode())
    layout = stored.get_create_plist()
    kind = layout.get_layout()
    if kind == h5d.VIRTUAL or (kind == h5d.CONTIGUOUS and layout.get_external_count()):
        raise ContentError(f"{where} has its values in another file, which is not read. Copy the array into the file.")
    shape, dtype = stored.shape, stored.dtype
    if shape is None or (of_bytes and check_vlen_dtype(dtype) != np.uint8):
        found = "no values" if shape is None else f"values of type {dtype}"
        raise ContentError(f"{where} holds {found}, expected an array of {'packed images' if of_bytes else 'numbers'}.")
    check_memory(math.prod(shape) * dtype.itemsize, where)
    return stored, shape, dtype


def open_group(file: Any, name: str, where: str) -> Any:
    """Open a group as :func:`open_array` does an array; many arrays are found sooner from there."""
    from h5py import h5g

    _check_links(file, name, f"{where}: {name}")
    return h5g.open(file, name.encode())


def _check_links(file: Any, name: str, where: str) -> None:
    from h5py import h5l

    for path in (name[:end].encode() for end, sign in enumerate(f"{name}/") if sign == "/"):
        try:
            is_hard = file.links.get_info(path).type == h5l.TYPE_HARD
        except RuntimeError:
            raise KeyError(f"there is no {path.decode()}") from None
        if not is_hard:
            raise ContentError(
                f"{where} leads to another place by a link, which is not followed. Copy the array into the file."
            )


def _arrays_in(file: Any, source: Source) -> dict[str, Any]:
    """The arrays by name, not yet read, None for what is no column; ``observations/<key>`` for those of a group."""
    import h5py

    names = list(file)
    if "episode_0" in names or source.file.name == "main_data.hdf5":
        raise ContentError(f"{source.where} is part of a Minari dataset: name the folder that holds it.")
    stored: dict[str, Any] = {}
    for name in names:
        is_group = isinstance(file.get(name, getlink=True), h5py.HardLink) and file.get(name, getclass=True) is h5py.Group
        if not is_group:
            stored[name] = _array(file, name, source)
        elif name in _OBSERVATIONS:
            for key in file[name]:
                member = file[name].get(key, getlink=True)
                if isinstance(member, h5py.HardLink) and file[name].get(key, getclass=True) is h5py.Group:
                    raise ContentError(
                        f"{source.where}: {name}/{shortened(key)} is a group within a group; nested observations are not "
                        "supported, expected an array for each key."
                    )
                stored[f"{name}/{key}"] = _array(file, f"{name}/{key}", source)
    return stored


def _array(file: Any, name: str, source: Source) -> Any:
    import h5py

    return h5py.Dataset(open_array(file.id, name, source.where)[0]) if is_column(name) else None


def _read_array(stored: Any) -> Array:
    with np.errstate(over="ignore"):
        # Converted while it is read, so that the wide numbers are never all in memory
        array: Array = (stored.astype(np.float32) if stored.dtype == np.float64 else stored)[()]
    return array
