"""Minari's datasets: its three storage formats, read episode by episode."""

import importlib.metadata
import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minari
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from minari.dataset.minari_storage import is_image_space

from sb3_offline_ft.common.callbacks import progress_bar as make_progress_bar
from sb3_offline_ft.common.observations import Array, by_key
from sb3_offline_ft.common.reading import (
    ContentError,
    TooLargeError,
    check_is_file,
    check_memory,
    read_json,
    reason_of,
    too_large,
)
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets.columns import FLAG_COLUMNS, as_flags, check_numbers
from sb3_offline_ft.datasets.files.hdf5 import open_array, open_group, open_hdf5
from sb3_offline_ft.datasets.files.reading import Source, by_column, read_parquet, reading
from sb3_offline_ft.datasets.keys import choose_keys, dict_of, leaf_spaces, no_keys, space_in_order
from sb3_offline_ft.datasets.offline_dataset import KeyOrder, OfflineDataset
from sb3_offline_ft.datasets.reference_scores import choose_reference_scores
from sb3_offline_ft.datasets.spaces import check_spaces_supported, column_dtype, row_shape

# Minari writes without pyarrow's preserve_order, so parts of this many rows end up in any order.
_ARROW_ORDERED_ROWS = 131_072
METADATA = "metadata.json"
_MOST_STEPS_PER_BYTE = 1000
"""Of the best packed data: what claims more is damaged."""
_HDF5, _HDF5_CACHE_BYTES = "main_data.hdf5", 1 << 20

_Episode = dict[str, Array]


@dataclass(frozen=True)
class _Field:
    """What Minari stores of each step under one name."""

    shape: tuple[int, ...]
    dtype: type[np.generic]
    is_jpeg: bool = False


@dataclass(frozen=True)
class _Opened:
    """A dataset whose content has not been read; its space has the wanted keys in the order of the environment, if known."""

    dataset: minari.MinariDataset
    metadata: dict[str, Any]
    observation_space: spaces.Space[Any]
    key_order: KeyOrder

    def layout(self) -> dict[str, _Field]:
        """What to read of an episode; the names are paths in it."""
        has_jpeg = bool(self.dataset.storage.jpeg_encoding)
        layout = {
            f"observations/{key}" if key else "observations": _Field(
                row_shape(space), column_dtype(space), has_jpeg and is_image_space(space)
            )
            for key, space in by_key(self.observation_space).items()
        }
        layout["actions"] = _Field(row_shape(self.dataset.action_space), np.float32)
        return layout | {"rewards": _Field((), np.float32)} | dict.fromkeys(FLAG_COLUMNS, _Field((), np.bool_))


@contextmanager
def minari_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    opened = _open(source)
    yield lambda: _read(source, opened)


def _open(source: Source) -> _Opened:
    """Open a dataset and check that it can be read."""
    where, data = source.where, source.file
    try:
        metadata = _read_metadata(data)
        dataset = minari.MinariDataset(data) if source.given is None else source.given
        space = dataset.observation_space
        if "observation_space" in metadata:
            space = space_in_order(metadata["observation_space"])
    except ImportError:
        raise
    except TooLargeError as error:
        raise ValueError(f"{where}: {error}") from None
    except MemoryError as error:
        raise too_large(f"{where}: {str(data / METADATA)!r}", error) from error
    except Exception as error:
        raise ValueError(
            f"{where}: Minari {importlib.metadata.version('minari')} cannot open {str(data)!r} ({reason_of(error)}). Its "
            "metadata.json is damaged or from another Minari version."
        ) from error
    n_stored = metadata["total_episodes"]
    if any(not 0 <= index < n_stored for index in dataset.episode_indices):
        raise ValueError(
            f"{where} has the episodes 0 to {n_stored - 1}, found {dataset.episode_indices} in the MinariDataset."
        )
    leaves = leaf_spaces(space) if isinstance(space, spaces.Dict) else {}
    # Minari sorts the keys when it combines datasets
    is_sorted = bool(metadata.get("combined_datasets")) and list(leaves) == sorted(leaves)
    key_order: KeyOrder = "unknown" if leaves and is_sorted else "recorded"
    if source.keys is not None:
        if not leaves:
            raise no_keys(where, space.shape)
        key_order = "named"
        space = dict_of({key: leaves[key] for key in choose_keys(source.keys, list(leaves), where)})
    advice = f"Or take some of the keys, such as ?keys={next(iter(leaves))}." if leaves else ""
    check_spaces_supported(space, dataset.action_space, where, advice)
    if dataset.total_episodes == 0 or dataset.total_steps == 0:
        raise ValueError(
            f"{where} is empty: expected at least one transition, found {dataset.total_episodes} episodes "
            f"and {dataset.total_steps} steps in {str(data / METADATA)!r}."
        )
    if dataset.storage.FORMAT == "hdf5":
        with reading(where, data / _HDF5):
            open_hdf5(data / _HDF5).close()
    return _Opened(dataset, metadata, space, key_order)


def _read_metadata(data: Path) -> dict[str, Any]:
    """What is said about a dataset, and can be believed of the numbers that memory is taken for."""
    path = data / METADATA
    metadata = read_json(path)
    for name in ("observation_space", "action_space"):
        if not isinstance(metadata.get(name), str):
            raise ContentError(
                f"{str(path)!r} does not say the {name}. To find it, Minari would make the environment that the file "
                "describes, which runs code"
            )
    size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    for name, most in (("total_episodes", size), ("total_steps", _MOST_STEPS_PER_BYTE * size)):
        count = metadata.get(name)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
            raise ContentError(
                f"{name} must be a whole number of at least 0, and {size:,} bytes of data must be able to hold as many, found "
                f"{count!r:.80}"
            )
    return metadata


def _read(source: Source, opened: _Opened) -> OfflineDataset:
    dataset, metadata, layout = opened.dataset, opened.metadata, opened.layout()
    columns, starts = _read_columns(source, dataset, layout)
    env_id = dataset.env_spec.id if dataset.env_spec is not None else None
    scores = {key: None if metadata.get(key) is None else float(metadata[key]) for key in ("ref_min_score", "ref_max_score")}
    provenance = {
        "source": source.kind,
        "dataset_id": metadata.get("dataset_id"),
        "env_id": env_id,
        "env_spec": metadata.get("env_spec"),
        "algorithm": metadata.get("algorithm_name"),
        "author": sorted(metadata.get("author") or ()),
        "description": metadata.get("description"),
        "code_permalink": metadata.get("code_permalink"),
        "requirements": list(metadata.get("requirements") or ()),
        "combined_datasets": list(metadata.get("combined_datasets") or ()),
        "data_format": metadata.get("data_format"),
        "minari_version": metadata.get("minari_version"),
        "read_with_minari": importlib.metadata.version("minari"),
        **scores,
    }
    name = source.name if source.kind != "minari-folder" else str(metadata.get("dataset_id") or source.name)
    n_episodes, n_stored = len(starts), int(metadata["total_episodes"])
    if not np.array_equal(dataset.episode_indices, np.arange(n_stored)):
        provenance |= {"episodes_chosen": n_episodes, "episodes_stored": n_stored}
        name += f" ({n_episodes} of {n_stored} episodes)"
    if any(field.is_jpeg for field in layout.values()):
        provenance["lossy_images"] = True
        warn(
            f"{source.where}: the images were stored as JPEG, so they differ a little from those that the environment shows. "
            "Record with DataCollector(env, jpeg_encoding=False) to keep them exactly."
        )
    if opened.key_order == "named":
        provenance["keys"] = list(columns["observations"])
    return OfflineDataset.from_columns(
        **columns,
        episode_starts=starts,
        observation_space=opened.observation_space,
        action_space=dataset.action_space,
        key_order=opened.key_order,
        spec=source.spec,
        name=name,
        provenance=provenance,
        reference_scores=choose_reference_scores(env_id, *scores.values()),
        copy=False,
    )


def _read_columns(
    source: Source, dataset: minari.MinariDataset, layout: dict[str, _Field]
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """The columns and the first row of every episode."""
    chosen = [int(index) for index in dataset.episode_indices]
    data_format = dataset.storage.FORMAT
    file = source.file / _HDF5 if data_format == "hdf5" else source.file
    n_rows, n_episodes = int(dataset.total_steps), int(dataset.total_episodes)
    row_bytes = sum(math.prod(field.shape) * np.dtype(field.dtype).itemsize for field in layout.values())
    check_memory(n_rows * row_bytes, source.where)
    columns = {name: np.empty((n_rows, *field.shape), field.dtype) for name, field in layout.items()}
    columns |= {"next_" + name: np.empty_like(columns[name]) for name in layout if name.startswith("observations")}
    starts = np.empty(n_episodes, np.int64)
    with reading(source.where, file), np.errstate(over="ignore"):
        if data_format == "hdf5":
            episodes = _hdf5_episodes(file, chosen, layout, source.where)
        elif data_format in ("arrow", "parquet"):
            episodes = _arrow_episodes(source.file, chosen, data_format, layout)
        else:
            raise ContentError(f"{source.where}: expected Minari's format hdf5, arrow or parquet, found {data_format!r}.")
        if source.progress_bar:
            episodes = _with_bar(episodes, n_episodes, source.name)
        lengths = _fill(columns, starts, zip(chosen, episodes, strict=True), source.where, file)
        if sum(lengths) != n_rows or len(lengths) != n_episodes:
            raise ContentError(
                f"{source.where}: metadata.json promises {n_rows} steps in {n_episodes} episodes, found {sum(lengths)} steps "
                f"in {len(lengths)} episodes{_first_wrong_length(dataset, lengths)} in {str(file)!r}. "
                "The dataset is damaged or incomplete; copy or download it again."
            )
    return by_column(columns), starts


def _with_bar(episodes: Iterator[_Episode], n_episodes: int, name: str) -> Iterator[_Episode]:
    with make_progress_bar(n_episodes, f"{name} (episodes)") as bar:
        for episode in episodes:
            yield episode
            bar.update()


def _fill(
    columns: dict[str, Array],
    starts: npt.NDArray[np.int64],
    numbered_episodes: Iterable[tuple[int, _Episode]],
    where: str,
    file: Path,
) -> list[int]:
    """Copy episodes into the columns one after the other; returns their lengths, also of those that do not fit in."""
    n_rows = len(columns["rewards"])
    lengths: list[int] = []
    begin = 0
    for position, (index, episode) in enumerate(numbered_episodes):
        length = len(episode["rewards"])
        end = begin + length
        for name, array in episode.items():
            is_observation = name.startswith("observations")
            shape = (length + is_observation, *columns[name].shape[1:])
            if array.shape != shape:
                hint = ""
                if is_observation and len(array) == length:
                    hint = " The last next observation is missing, as in some v0 datasets: use a newer version of the dataset."
                raise ContentError(
                    f"{where}: episode {index} has {length} rewards, so expected {name} of shape {shape}, "
                    f"found {array.shape}.{hint}"
                )
        if length == 0:
            raise ContentError(f"{where}: episode {index} is empty, expected at least one step. Record or filter it again.")
        if end <= n_rows and position < len(starts):
            starts[position] = begin
            for name, array in episode.items():
                _check_values(array, name, columns[name].dtype, f"{where}, episode {index} in {str(file)!r}")
                if name.startswith("observations"):
                    columns[name][begin:end] = array[:-1]
                    columns["next_" + name][begin:end] = array[1:]
                else:
                    columns[name][begin:end] = array
        begin = end
        lengths.append(length)
    return lengths


def _check_values(array: Array, name: str, dtype: npt.DTypeLike, where: str) -> None:
    try:
        if array.dtype != dtype:
            as_flags(array, name, where) if dtype == np.bool_ else check_numbers(array, name, where, dtype)
    except ValueError as error:
        raise ContentError(str(error)) from None


def _first_wrong_length(dataset: minari.MinariDataset, lengths: list[int]) -> str:
    indices = [int(index) for index in dataset.episode_indices]
    for index, facts, found in zip(indices, dataset.storage.get_episode_metadata(indices), lengths, strict=False):
        promised = int(facts.get("total_steps", found))
        if promised == found:
            continue
        # Minari pads actions to the observations in Arrow and Parquet, so a missing observation costs a step there.
        hint = ", as its last next observation is missing" if promised == found + 1 else ""
        return f" (first in episode {index}: {promised} steps promised, {found} found{hint})"
    return ""


def _hdf5_episodes(file: Path, indices: Iterable[int], layout: dict[str, _Field], where: str) -> Iterator[_Episode]:
    """Read what Minari's HDF5 storage reads but the infos, through h5py's low level: 2x to 4x faster than Minari."""
    import h5py

    with open_hdf5(file) as handle:
        # HDF5 would keep the descriptions of all objects ever opened: as much memory as the data itself.
        cache = handle.id.get_mdc_config()
        cache.set_initial_size = True
        cache.initial_size = cache.min_size = _HDF5_CACHE_BYTES
        cache.max_size = 2 * _HDF5_CACHE_BYTES
        handle.id.set_mdc_config(cache)
        for index in indices:
            episode: _Episode = {}
            group, here = open_group(handle.id, f"episode_{index}", where), f"{where}: episode_{index}"
            for name, field in layout.items():
                if field.is_jpeg:
                    frames = h5py.Dataset(open_array(group, name, here, of_bytes=True)[0])[()]
                    episode[name] = _decode_jpeg((frame.tobytes() for frame in frames), len(frames), field)
                    continue
                stored, shape, dtype = open_array(group, name, here)
                array = np.empty(shape, dtype)
                stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
                episode[name] = _as_rows(array, field)
            yield episode


def _arrow_episodes(data: Path, indices: Iterable[int], file_format: str, layout: dict[str, _Field]) -> Iterator[_Episode]:
    """Read what Minari's Arrow and Parquet storages read but the infos."""
    for index in indices:
        parts = sorted((data / str(index)).glob(f"*.{file_format}"), key=lambda part: (len(part.name), part.name))
        if not parts:
            raise FileNotFoundError(f"no .{file_format} file in {str(data / str(index))!r}")
        pieces = [_arrow_columns(part, file_format, layout) for part in parts]
        n_stored = sum(len(piece["rewards"]) for piece in pieces)
        if n_stored > _ARROW_ORDERED_ROWS:
            raise ContentError(
                f"Episode {index} in {str(data)!r} has {n_stored} observations: expected at most {_ARROW_ORDERED_ROWS} in "
                f"Minari's {file_format} format, as it does not keep the order of the rows of longer episodes. Use hdf5."
            )
        episode = pieces[0] if len(pieces) == 1 else {name: np.concatenate([one[name] for one in pieces]) for name in layout}
        # Minari pads every other column by one row to the length of the observations.
        yield {name: array if name.startswith("observations") else array[:-1] for name, array in episode.items()}


def _arrow_columns(part: Path, file_format: str, layout: dict[str, _Field]) -> _Episode:
    check_is_file(part)
    if file_format == "parquet":
        # A key with a slash in its name, or within nested Dicts: what is not there is not read
        names = [name.replace("/", ".", count) for name in layout for count in (1, -1)]
        table = read_parquet(part, names, use_threads=False)
    else:
        import pyarrow as pa

        with pa.memory_map(str(part)) as file:
            table = pa.ipc.open_file(file).read_all()
            # Arrow believes the offsets in a file
            table.validate(full=True)
    arrays: _Episode = {}
    for name, field in layout.items():
        outer, _, key = name.partition("/")
        column = table[outer].combine_chunks()
        if key:
            column = _struct_field(column, key)
        if field.is_jpeg:
            arrays[name] = _decode_jpeg((frame.as_py() for frame in column), len(column), field)
        elif hasattr(column, "flatten") and column.type.num_fields:
            arrays[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *field.shape)
        else:
            arrays[name] = _as_rows(column.to_numpy(zero_copy_only=False), field)
    return arrays


def _struct_field(column: Any, key: str) -> Any:
    names = [field.name for field in column.type]
    if key in names:
        return column.field(key)
    outer = next(name for name in names if key.startswith(f"{name}/"))
    return _struct_field(column.field(outer), key.removeprefix(f"{outer}/"))


def _as_rows(array: Array, field: _Field) -> Array:
    """Give a column of Discrete values, which Minari stores as numbers, the form ``(N, 1)``."""
    return array[:, None] if array.ndim == 1 and field.shape == (1,) else array


def _decode_jpeg(frames: Iterable[bytes], n_frames: int, field: _Field) -> Array:
    from PIL import Image

    images = np.empty((n_frames, *field.shape), np.uint8)
    for image, frame in zip(images, frames, strict=True):
        image[...] = np.asarray(Image.open(io.BytesIO(frame), formats=("JPEG",)))
    return images
