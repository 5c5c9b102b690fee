"""What a dataset spec means: from one string to the columns of an :class:`OfflineDataset`."""

import difflib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import socket
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import minari
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.storage.datasets_root_dir import get_dataset_path
from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset, check_spaces_supported
from sb3_offline_ft.datasets.reference_scores import choose_reference_scores

BUNDLED: tuple[str, ...] = ("hopper-medium", "pendulum-medium")
"""Names of the datasets that come with the package; load one with ``load_dataset("bundled:<name>")``."""

_BUNDLED_PREFIX = "bundled:"
_BUNDLED_SPECS = tuple(_BUNDLED_PREFIX + name for name in BUNDLED)
_HUB_CONNECT_SECONDS = 3.0
_HUB_LIST_SECONDS = 10.0
_NPZ_ALIASES = {"terminals": "terminations", "timeouts": "truncations"}
_NPZ_REQUIRED = ("observations", "actions", "rewards", "terminations")
_NPZ_OPTIONAL = ("truncations", "next_observations", "action_low", "action_high")
_ACCEPTED = (
    "A spec is a Minari id (mujoco/hopper/medium-v0), a folder holding a Minari dataset, a .npz file, "
    f"or one of {', '.join(_BUNDLED_SPECS)}."
)

# Minari writes without pyarrow's preserve_order, so parts of this many rows end up in any order.
_ARROW_ORDERED_ROWS = 131_072
_HDF5_CACHE_BYTES = 1 << 20
_EPISODE_COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")

_Episode = tuple[Any, Any, Any, Any, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Source:
    """Where a spec leads; ``path`` is a Minari ``data`` folder or a ``.npz``, None for an id still to be downloaded."""

    kind: Literal["minari", "minari-folder", "bundled", "npz"]
    spec: str
    name: str
    path: Path | None


def load_dataset(spec: str | Path | OfflineDataset, *, download: bool = True) -> OfflineDataset:
    """Load the dataset that a spec names.

    =============================  ==================================================================================
    spec                           meaning
    =============================  ==================================================================================
    ``mujoco/hopper/medium-v0``    a Minari id: the local one (below ``MINARI_DATASETS_PATH``), else from Minari's hub
    ``path/to/folder``             a Minari dataset's folder, or the ``data`` folder in it (hdf5, arrow or parquet)
    ``path/to/file.npz``           arrays ``observations, actions, rewards, terminations`` and, if there are any,
                                   ``truncations, next_observations, action_low, action_high``
                                   (``terminals`` and ``timeouts`` are understood as well)
    ``bundled:hopper-medium``      small real data that comes with the package, see :data:`BUNDLED`
    =============================  ==================================================================================

    Columns are float32. Time limits are truncations, and the last row of an episode without a flag becomes one.

    :param spec: The spec; an :class:`OfflineDataset` is returned as it is.
    :param download: Whether a Minari id that is not there locally may be downloaded.
    :return: The dataset; its ``spec`` loads it again.
    :raises FileNotFoundError: if there is no such file, folder, id or bundled name.
    :raises ValueError: if the spec is malformed, or the data damaged, empty, not finite or not supported.
    :raises TypeError: if the spec is not a string, a path or a dataset.
    """
    if isinstance(spec, OfflineDataset):
        return spec
    source = _resolve(spec, download)
    if source.path is None:
        source = _download(source)
    assert source.path is not None
    return _load_npz(source, source.path) if source.kind == "npz" else _load_minari(source, source.path)


def check_spec(spec: str | Path | OfflineDataset, *, download: bool = True) -> None:
    """Check what can be checked of a spec without reading data.

    :param spec: As for :func:`load_dataset`.
    :param download: As for :func:`load_dataset`; the hub is asked for an unknown id, nothing is downloaded.
    :raises FileNotFoundError: as :func:`load_dataset`.
    :raises ValueError: as :func:`load_dataset`, if the spec is malformed or its data cannot be opened.
    :raises TypeError: as :func:`load_dataset`.
    """
    if isinstance(spec, OfflineDataset):
        return
    source = _resolve(spec, download)
    if source.path is None:
        return
    if source.kind == "npz":
        with _open_npz(source.path):
            pass
    else:
        _open_minari(source, source.path)


def _resolve(spec: str | Path, download: bool) -> _Source:
    if not isinstance(spec, str | Path):
        raise TypeError(
            f"A dataset spec must be a string, a path or an OfflineDataset, found {type(spec).__name__}. {_ACCEPTED}"
        )
    text = str(spec).strip()
    if not text:
        raise ValueError(f"The dataset spec is empty. {_ACCEPTED}")
    if text.startswith(_BUNDLED_PREFIX):
        return _resolve_bundled(text)
    path = Path(text).expanduser()
    explicit = isinstance(spec, Path) or text.startswith((".", "~")) or path.is_absolute()
    if path.suffix == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"No dataset file {str(path.absolute())!r}{_suggest_files(path)}")
        return _Source("npz", str(path.absolute()), path.stem, path.absolute())
    if path.is_file():
        raise ValueError(
            f"Cannot load the file {text!r}: expected a .npz file or a folder holding a Minari dataset, "
            f"found a {path.suffix or 'nameless'} file"
            + (". For a Minari dataset, name the folder that holds it." if path.name == "main_data.hdf5" else ".")
        )
    if not explicit:
        local = _local_data_folder(text)
        if local is not None:
            return _Source("minari", text, text, local)
    if path.is_dir():
        return _resolve_folder(path)
    if explicit:
        raise FileNotFoundError(f"No folder or file {str(path.absolute())!r}{_suggest_files(path)}")
    _check_minari_id(text)
    problem, hub_ids = ("not asked, as download=False", []) if not download else _hub_ids(text)
    if text in hub_ids:
        return _Source("minari", text, text, None)
    raise FileNotFoundError(_unknown(text, problem, hub_ids))


def _resolve_bundled(text: str) -> _Source:
    name = text.removeprefix(_BUNDLED_PREFIX)
    if name not in BUNDLED:
        raise FileNotFoundError(
            f"No bundled dataset {name!r}{_did_you_mean(text, _BUNDLED_SPECS)} There are {', '.join(_BUNDLED_SPECS)}."
        )
    folder = Path(str(importlib.resources.files("sb3_offline_ft.datasets") / "bundled" / name / "data"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The data of {text!r} is not at {str(folder)!r}: the package is installed incompletely or zipped. Reinstall it."
        )
    return _Source("bundled", text, name, folder)


def _resolve_folder(path: Path) -> _Source:
    path = path.absolute()
    for data in (path / "data", path):
        if (data / "metadata.json").is_file():
            folder = path.parent if data == path and path.name == "data" else path
            return _Source("minari-folder", str(path), folder.name, data)
    raise FileNotFoundError(
        f"The folder {str(path)!r} holds no Minari dataset: expected a metadata.json in it or in its data folder, "
        f"found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}."
    )


def _check_minari_id(text: str) -> None:
    match = DATASET_ID_RE.fullmatch(text)
    if match and match.group("version") is not None:
        return
    if match:
        problem = "it has no version; a Minari id ends in -v0 or higher"
    elif len(text.split("/")[0]) == 1:
        problem = f"the namespace {text.split('/')[0]!r} is too short; Minari wants two letters or more"
    else:
        problem = "it is no existing path either; a Minari id looks like mujoco/hopper/medium-v0"
    raise ValueError(
        f"Malformed dataset spec {text!r}: {problem}{_did_you_mean(text, [*_local_ids(), *_BUNDLED_SPECS])} {_ACCEPTED}"
    )


def _minari_root() -> Path | None:
    try:
        return Path(get_dataset_path())
    except OSError:  # Minari makes the folder, which a read-only home does not allow.
        return None


def _local_data_folder(dataset_id: str) -> Path | None:
    root = _minari_root()
    if root is None or not DATASET_ID_RE.fullmatch(dataset_id):
        return None
    data = root / dataset_id / "data"
    return data if (data / "metadata.json").is_file() else None


def _local_ids() -> list[str]:
    # minari.list_local_datasets raises as soon as one folder has no version in its name.
    root = _minari_root()
    found: list[str] = []
    for folder, children, _ in os.walk(root) if root is not None else ():
        if os.path.isfile(os.path.join(folder, "data", "metadata.json")):
            found.append(Path(folder).relative_to(root or "").as_posix())
            children.clear()
        else:
            children[:] = [child for child in children if not child.startswith(".")]
    return sorted(found)


def _unknown(text: str, hub_problem: str | None, hub_ids: list[str]) -> str:
    local_ids = _local_ids()
    tried = [
        f"folder {str(Path(text).absolute())!r}: none",
        f"local Minari datasets in {str(_minari_root())!r}: {len(local_ids)} there, none with this id",
        f"Minari's hub: {hub_problem}" if hub_problem else "Minari's hub: no dataset with this id",
    ]
    suggestion = _did_you_mean(text, [*local_ids, *hub_ids, *_BUNDLED_SPECS])
    advice = " Without the hub, copy the dataset into the local folder, or set MINARI_DATASETS_PATH." if hub_problem else ""
    return f"Unknown dataset {text!r}. Tried {'; '.join(tried)}{suggestion}{advice}"


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(text.lower(), by_lower, n=3, cutoff=0.6)
    # A user who types the last parts of an id only gets no close match by spelling.
    near += [low for low in by_lower if text.lower() in low and low not in near][: 3 - len(near)]
    return f". Did you mean {' or '.join(by_lower[low] for low in near)}?" if near else "."


def _suggest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {str(path.parent.absolute())!r} does not exist."
    return _did_you_mean(path.name, (sibling.name for sibling in path.parent.iterdir()))


def _hub_ids(wanted: str) -> tuple[str | None, list[str]]:
    """Ask the hub for its ids; returns what is wrong with it (or None) and the ids of the wanted group, else of all."""
    remote = os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    if remote.startswith("hf://") and importlib.util.find_spec("huggingface_hub") is None:
        return f'{remote} cannot be asked, as huggingface_hub is missing; pip install "minari[hf]"', []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return f"{remote} cannot be asked, as HF_HUB_OFFLINE is set", []
    if problem := _connection_problem(remote):
        return f"{remote} is unreachable ({problem})", []

    def list_ids() -> list[str]:
        storage = get_cloud_storage()
        return list(storage.list_datasets(prefix=wanted.split("/")[0] + "/")) or list(storage.list_datasets())

    try:
        return None, _within(_HUB_LIST_SECONDS, list_ids)
    except Exception as error:
        return f"{remote} could not be listed ({type(error).__name__}: {error})", []


def _connection_problem(remote: str) -> str | None:
    """Try a bare connection first: the hub's own clients retry for a long time when there is no network."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if remote.startswith("hf://") else ""
    url = urllib.parse.urlsplit(endpoint or "https://storage.googleapis.com")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = through.hostname or "", through.port or 8080
    try:
        _within(_HUB_CONNECT_SECONDS, lambda: socket.create_connection((host, port), timeout=_HUB_CONNECT_SECONDS).close())
    except OSError as error:
        return f"no connection to {host}:{port}: {error}"
    return None


def _within(seconds: float, function: Callable[[], _T]) -> _T:
    """Run a function that has no reliable timeout of its own; raises TimeoutError, and leaves its thread behind."""
    result: list[_T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result[0]


def _download(source: _Source) -> _Source:
    folder = get_dataset_path(source.spec)
    try:
        # A folder without metadata is an interrupted download, which Minari would take as complete.
        minari.download_dataset(source.spec, force_download=folder.exists())
    except Exception as error:
        raise ValueError(f"Downloading the dataset {source.spec!r} failed ({type(error).__name__}: {error}).") from error
    path = _local_data_folder(source.spec)
    if path is None:
        raise FileNotFoundError(
            f"The download of {source.spec!r} left no metadata.json in {str(folder / 'data')!r}. Try again."
        )
    return _Source(source.kind, source.spec, source.name, path)


def _open_minari(source: _Source, data: Path) -> minari.MinariDataset:
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
        with _reading(where, data / "main_data.hdf5"):
            import h5py

            h5py.File(data / "main_data.hdf5", "r").close()
    return dataset


@contextmanager
def _reading(where: str, path: Path) -> Iterator[None]:
    """Turn whatever a storage library raises about a damaged file into one error that names the file."""
    try:
        yield
    except ImportError:
        raise
    except _ContentError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise ValueError(
            f"{where}: cannot read {str(path)!r}, it is damaged or incomplete "
            f"({type(error).__name__}: {error}). Copy or download it again."
        ) from error


class _ContentError(ValueError):
    """An error that already says what is wrong."""


def _load_minari(source: _Source, data: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    dataset = _open_minari(source, data)
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
    with _reading(where, file), np.errstate(over="ignore"):
        if data_format == "hdf5":
            episodes = _hdf5_episodes(file, n_episodes)
        elif data_format in ("arrow", "parquet"):
            shapes = {"observations": observation_space.shape, "actions": action_space.shape}
            episodes = _arrow_episodes(data, n_episodes, data_format, shapes)
        else:
            episodes = _minari_episodes(dataset)
        lengths = _fill(columns, starts, episodes, where)
        if sum(lengths) != n_rows or len(lengths) != n_episodes:
            raise _ContentError(
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
                raise _ContentError(
                    f"{where}: episode {index} has {length} rewards, so expected {name} of shape {shape}, "
                    f"found {array.shape}.{hint}"
                )
        if length == 0:
            raise _ContentError(f"{where}: episode {index} is empty, expected at least one step. Record or filter it again.")
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
            raise _ContentError(
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


@contextmanager
def _open_npz(path: Path) -> Iterator[Any]:
    where = f"Dataset {str(path)!r}"
    with open(path, "rb") as file:
        with _reading(where, path):
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _ContentError(f"{where} is no .npz archive: expected one made by numpy.savez, found a single array.")
        names = {_NPZ_ALIASES.get(key, key) for key in archive.files}
        missing = [key for key in _NPZ_REQUIRED if key not in names]
        if missing:
            raise ValueError(
                f"{where} has no {' and no '.join(missing)}: expected the arrays {', '.join(_NPZ_REQUIRED)} "
                f"(optional: {', '.join(_NPZ_OPTIONAL)}), found {', '.join(archive.files) or 'none'}."
            )
        for alias, key in _NPZ_ALIASES.items():
            if alias in archive.files and key in archive.files:
                raise ValueError(f"{where} has both {key} and {alias}, which mean the same: keep one of them.")
        if ("action_low" in names) != ("action_high" in names):
            raise ValueError(f"{where} has only one of action_low and action_high: give both or none.")
        yield archive


def _read_npz_array(archive: Any, key: str, where: str, path: Path) -> npt.NDArray[Any]:
    with _reading(where, path):
        try:
            array: npt.NDArray[Any] = archive[key]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise _ContentError(f"{where}: {key} holds Python objects, expected numbers. Save it as a plain array.") from error
    return array


def _load_npz(source: _Source, path: Path) -> OfflineDataset:
    where = f"Dataset {source.spec!r}"
    columns: dict[str, Any] = {}
    with _open_npz(path) as archive:
        for key in archive.files:
            column = _NPZ_ALIASES.get(key, key)
            if column in (*_NPZ_REQUIRED, *_NPZ_OPTIONAL):
                array = _read_npz_array(archive, key, where, path)
                is_double = column not in ("action_low", "action_high") and array.dtype == np.float64
                with np.errstate(over="ignore"):
                    columns[column] = array.astype(np.float32) if is_double else array
    low, high = columns.pop("action_low", None), columns.pop("action_high", None)
    action_space = None
    if low is not None and high is not None:
        try:
            action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        except Exception as error:
            raise ValueError(f"{where}: action_low {low} and action_high {high} make no Box ({error}).") from error
    provenance: dict[str, Any] = {"source": "npz", "file": path.name, "env_id": None}
    if "next_observations" not in columns:
        _derive_next_observations(columns, provenance, where)
    return OfflineDataset.from_columns(
        **columns, action_space=action_space, spec=source.spec, name=source.name, provenance=provenance, copy=False
    )


def _derive_next_observations(columns: dict[str, npt.NDArray[Any]], provenance: dict[str, Any], where: str) -> None:
    """Shift observations within episodes; drop the rows whose next observation matters but was not recorded."""
    n_rows = len(np.atleast_1d(columns["observations"]))
    if n_rows == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found none.")
    for name, array in columns.items():
        if array.ndim == 0 or len(array) != n_rows:
            raise ValueError(f"{where}: {name} must have as many rows as observations ({n_rows}), found shape {array.shape}")
    terminated = columns["terminations"].astype(np.bool_)
    ends = terminated.copy()
    if "truncations" in columns:
        ends |= columns["truncations"].astype(np.bool_)
    ends[-1] = True
    keep = ~ends | terminated
    successor = np.arange(1, n_rows + 1)
    # The next observation of a terminated row is never used: there is no bootstrap from it.
    successor[ends] = np.flatnonzero(ends)
    episode = np.concatenate(([0], np.cumsum(ends)[:-1]))[keep]
    columns["next_observations"] = columns["observations"][successor[keep]]
    columns["episode_starts"] = np.flatnonzero(np.diff(episode, prepend=-1))
    if not keep.all():
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            if name in columns:
                columns[name] = columns[name][keep]
    n_dropped = int(n_rows - keep.sum())
    provenance["next_observations"] = "derived from the following row"
    provenance["rows_dropped"] = n_dropped
    no_time_limits = (
        "" if "truncations" in columns else " There are no truncations either: episodes cut by a time limit would be joined."
    )
    warnings.warn(
        f"{where} has no next_observations: they are derived within episodes, and {n_dropped} last rows of episodes that "
        f"did not terminate are dropped, as their next observation is unknown.{no_time_limits}",
        stacklevel=4,
    )
