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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import minari
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.storage.datasets_root_dir import get_dataset_path
from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

from sb3_offline_ft.datasets.minari_files import load_minari, open_minari
from sb3_offline_ft.datasets.npz_files import load_npz, open_npz
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reading import Source

BUNDLED: tuple[str, ...] = ("hopper-medium", "pendulum-medium")
"""Names of the datasets that come with the package; load one with ``load_dataset("bundled:<name>")``."""

_BUNDLED_PREFIX = "bundled:"
_BUNDLED_SPECS = tuple(_BUNDLED_PREFIX + name for name in BUNDLED)
_HUB_CONNECT_SECONDS = 3.0
_HUB_LIST_SECONDS = 10.0
_ACCEPTED = (
    "A spec is a Minari id (mujoco/hopper/medium-v0), a folder holding a Minari dataset, a .npz file, "
    f"or one of {', '.join(_BUNDLED_SPECS)}."
)

_T = TypeVar("_T")


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
    return load_npz(source, source.path) if source.kind == "npz" else load_minari(source, source.path)


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
        with open_npz(source.path):
            pass
    else:
        open_minari(source, source.path)


def _resolve(spec: str | Path, download: bool) -> Source:
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
        return Source("npz", str(path.absolute()), path.stem, path.absolute())
    if path.is_file():
        raise ValueError(
            f"Cannot load the file {text!r}: expected a .npz file or a folder holding a Minari dataset, "
            f"found a {path.suffix or 'nameless'} file"
            + (". For a Minari dataset, name the folder that holds it." if path.name == "main_data.hdf5" else ".")
        )
    if not explicit:
        local = _local_data_folder(text)
        if local is not None:
            return Source("minari", text, text, local)
    if path.is_dir():
        return _resolve_folder(path)
    if explicit:
        raise FileNotFoundError(f"No folder or file {str(path.absolute())!r}{_suggest_files(path)}")
    _check_minari_id(text)
    problem, hub_ids = ("not asked, as download=False", []) if not download else _hub_ids(text)
    if text in hub_ids:
        return Source("minari", text, text, None)
    raise FileNotFoundError(_unknown(text, problem, hub_ids))


def _resolve_bundled(text: str) -> Source:
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
    return Source("bundled", text, name, folder)


def _resolve_folder(path: Path) -> Source:
    path = path.absolute()
    for data in (path / "data", path):
        if (data / "metadata.json").is_file():
            folder = path.parent if data == path and path.name == "data" else path
            return Source("minari-folder", str(path), folder.name, data)
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


def _download(source: Source) -> Source:
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
    return Source(source.kind, source.spec, source.name, path)
