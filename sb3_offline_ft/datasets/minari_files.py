"""Minari's datasets: its three storage formats, read episode by episode."""

import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import minari
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset, check_spaces_supported
from sb3_offline_ft.datasets.reading import ContentError, Source, reading
from sb3_offline_ft.datasets.reference_scores import choose_reference_scores

# Minari writes without pyarrow's preserve_order, so parts of this many rows end up in any order.
_ARROW_ORDERED_ROWS = 131_072
_HDF5_CACHE_BYTES = 1 << 20
_EPISODE_COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")

_Episode = tuple[Any, Any, Any, Any, Any]


def open_minari(source: Source, data: Path) -> minari.MinariDataset:
    where = f"Dataset {source.spec!r}"
    try:
        dataset = minari.MinariDataset(data)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"{where}: Minari {importlib.metadata.version('minari')} cannot open {str(data)!r} "
            f"({type(error).__name__}: {error}). Its metadata.json is damaged or from another Minari version."
        ) from error
    check_spaces_supported(dataset.observation_space, dataset.action_space, where)
    if dataset.total_episodes == 0 or dataset.total_steps == 0:
        raise ValueError(
            f"{where} is empty: expected at least one transition, found {dataset.total_episodes} episodes "
            f"and {dataset.total_steps} steps in {str(data / 'metadata.json')!r}."
        )
    if dataset.storage.FORMAT == "hdf5":
        with reading(where, data / "main_data.hdf5"):
            import h5py

            h5py.File(data / "main_data.hdf5", "r").close()
    return dataset


def load_minari(source: Source, data: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    dataset = open_minari(source, data)
    metadata: dict[str, Any] = dict(dataset.storage.metadata)
    observation_space, action_space = dataset.observation_space, dataset.action_space
    assert isinstance(observation_space, spaces.Box) and isinstance(action_space, spaces.Box)
    data_format = dataset.storage.FORMAT
    file = data / "main_data.hdf5" if data_format == "hdf5" else data
    n_rows, n_episodes = int(dataset.total_steps), int(dataset.total_episodes)
    columns: dict[str, npt.NDArray[Any]] = {
        "observations": np.empty((n_rows, *observation_space.shape), np.float32),
        "actions": np.empty((n_rows, *action_space.shape), np.float32),
        "rewards": np.empty(n_rows, np.float32),
        "next_observations": np.empty((n_rows, *observation_space.shape), np.float32),
        "terminations": np.empty(n_rows, np.bool_),
        "truncations": np.empty(n_rows, np.bool_),
    }
    starts = np.empty(n_episodes, np.int64)
    with reading(where, file), np.errstate(over="ignore"):
        if data_format == "hdf5":
            episodes = _hdf5_episodes(file, n_episodes)
        elif data_format in ("arrow", "parquet"):
            shapes = {"observations": observation_space.shape, "actions": action_space.shape}
            episodes = _arrow_episodes(data, n_episodes, data_format, shapes)
        else:
            episodes = _minari_episodes(dataset)
        lengths = _fill(columns, starts, episodes, where)
        if sum(lengths) != n_rows or len(lengths) != n_episodes:
            raise ContentError(
                f"{where}: metadata.json promises {n_rows} steps in {n_episodes} episodes, found {sum(lengths)} steps "
                f"in {len(lengths)} episodes{_first_wrong_length(dataset, lengths)} in {str(file)!r}. "
                "The dataset is damaged or incomplete; copy or download it again."
            )
    env_id = dataset.env_spec.id if dataset.env_spec is not None else None
    ref_min, ref_max = (
        None if metadata.get(key) is None else float(metadata[key]) for key in ("ref_min_score", "ref_max_score")
    )
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
        "ref_min_score": ref_min,
        "ref_max_score": ref_max,
    }
    name = source.name if source.kind != "minari-folder" else str(metadata.get("dataset_id") or source.name)
    return OfflineDataset.from_columns(
        **columns,
        episode_starts=starts,
        observation_space=observation_space,
        action_space=action_space,
        spec=source.spec,
        name=name,
        provenance=provenance,
        reference_scores=choose_reference_scores(env_id, ref_min, ref_max),
        copy=False,
    )


def _fill(
    columns: dict[str, npt.NDArray[Any]], starts: npt.NDArray[np.int64], episodes: Iterable[_Episode], where: str
) -> list[int]:
    """Copy episodes into the columns one after the other; returns their lengths, also of those that do not fit in."""
    n_rows = len(columns["rewards"])
    lengths: list[int] = []
    begin = 0
    for index, (observations, actions, rewards, terminations, truncations) in enumerate(episodes):
        length = len(rewards)
        end = begin + length
        expected = {
            "observations": (observations, (length + 1, *columns["observations"].shape[1:])),
            "actions": (actions, (length, *columns["actions"].shape[1:])),
            "rewards": (rewards, (length,)),
            "terminations": (terminations, (length,)),
            "truncations": (truncations, (length,)),
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                hint = ""
                if name == "observations" and len(array) == length:
                    hint = " The last next observation is missing, as in some v0 datasets: use a newer version of the dataset."
                raise ContentError(
                    f"{where}: episode {index} has {length} rewards, so expected {name} of shape {shape}, "
                    f"found {array.shape}.{hint}"
                )
        if length == 0:
            raise ContentError(f"{where}: episode {index} is empty, expected at least one step. Record or filter it again.")
        if end <= n_rows and index < len(starts):
            starts[index] = begin
            columns["observations"][begin:end] = observations[:-1]
            columns["next_observations"][begin:end] = observations[1:]
            columns["actions"][begin:end] = actions
            columns["rewards"][begin:end] = rewards
            columns["terminations"][begin:end] = terminations
            columns["truncations"][begin:end] = truncations
        begin = end
        lengths.append(length)
    return lengths


def _first_wrong_length(dataset: minari.MinariDataset, lengths: list[int]) -> str:
    for index, (facts, found) in enumerate(
        zip(dataset.storage.get_episode_metadata(range(len(lengths))), lengths, strict=True)
    ):
        promised = int(facts.get("total_steps", found))
        if promised == found:
            continue
        # Minari pads actions to the observations in Arrow and Parquet, so a missing observation costs a step there.
        hint = ", as its last next observation is missing" if promised == found + 1 else ""
        return f" (first in episode {index}: {promised} steps promised, {found} found{hint})"
    return ""


def _hdf5_episodes(file: Path, n_episodes: int) -> Iterator[_Episode]:
    """Read what Minari's HDF5 storage reads but the infos, through h5py's low level: 2x to 4x faster than Minari."""
    import h5py

    with h5py.File(file, "r") as handle:
        # HDF5 would keep the descriptions of all objects ever opened: as much memory as the data itself.
        cache = handle.id.get_mdc_config()
        cache.set_initial_size = True
        cache.initial_size = cache.min_size = _HDF5_CACHE_BYTES
        cache.max_size = 2 * _HDF5_CACHE_BYTES
        handle.id.set_mdc_config(cache)
        for index in range(n_episodes):
            arrays: list[npt.NDArray[Any]] = []
            for name in _EPISODE_COLUMNS:
                stored = h5py.h5d.open(handle.id, f"episode_{index}/{name}".encode())
                array = np.empty(stored.shape, stored.dtype)
                stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
                arrays.append(array)
            yield arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]


def _arrow_episodes(data: Path, n_episodes: int, file_format: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[_Episode]:
    """Read what Minari's Arrow and Parquet storages read but the infos."""
    for index in range(n_episodes):
        parts = sorted((data / str(index)).glob(f"*.{file_format}"), key=lambda part: (len(part.name), part.name))
        if not parts:
            raise FileNotFoundError(f"no .{file_format} file in {str(data / str(index))!r}")
        pieces = [_arrow_columns(part, file_format, shapes) for part in parts]
        n_stored = sum(len(piece[0]) for piece in pieces)
        if n_stored > _ARROW_ORDERED_ROWS:
            raise ContentError(
                f"Episode {index} in {str(data)!r} has {n_stored} observations: expected at most {_ARROW_ORDERED_ROWS} in "
                f"Minari's {file_format} format, as it does not keep the order of the rows of longer episodes. Use hdf5."
            )
        observations, *others = pieces[0] if len(pieces) == 1 else map(np.concatenate, zip(*pieces, strict=True))
        # Minari pads every other column by one row to the length of the observations.
        actions, rewards, terminations, truncations = (array[:-1] for array in others)
        yield observations, actions, rewards, terminations, truncations


def _arrow_columns(part: Path, file_format: str, shapes: dict[str, tuple[int, ...]]) -> list[npt.NDArray[Any]]:
    if file_format == "parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(part).read(columns=list(_EPISODE_COLUMNS), use_threads=False)
    else:
        import pyarrow as pa

        with pa.memory_map(str(part)) as file:
            table = pa.ipc.open_file(file).read_all()
    arrays: list[npt.NDArray[Any]] = []
    for name in _EPISODE_COLUMNS:
        column = table[name].combine_chunks()
        if name in shapes:
            arrays.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *shapes[name]))
        else:
            arrays.append(column.to_numpy(zero_copy_only=False))
    return arrays


def _minari_episodes(dataset: minari.MinariDataset) -> Iterator[_Episode]:
    for episode in dataset.iterate_episodes():
        yield episode.observations, episode.actions, episode.rewards, episode.terminations, episode.truncations
