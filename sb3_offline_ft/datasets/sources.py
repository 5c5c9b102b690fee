"""What a dataset spec means: from its text to the columns of an :class:`OfflineDataset`."""

import importlib.resources
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import minari
import numpy as np
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_offline_ft.common.reading import check_is_file
from sb3_offline_ft.common.suggestions import nearest
from sb3_offline_ft.datasets.files.hdf5 import hdf5_reader
from sb3_offline_ft.datasets.files.hub import hub_ids
from sb3_offline_ft.datasets.files.minari import minari_reader
from sb3_offline_ft.datasets.files.minari_writing import restore_replaced
from sb3_offline_ft.datasets.files.npz import npz_reader
from sb3_offline_ft.datasets.files.reading import Kind, Reader, Source
from sb3_offline_ft.datasets.files.replay_buffers import has_own_format, own_replay_buffer_reader, replay_buffer_reader
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.specs import (
    ACCEPTED,
    BUNDLED,
    BUNDLED_PREFIX,
    BUNDLED_SPECS,
    TRUST,
    Base,
    DatasetSpec,
    PartSpec,
    join_specs,
    parse_spec,
)
from sb3_offline_ft.datasets.validation import with_clipping

_READERS: dict[Kind, Reader] = {
    "npz": npz_reader,
    "hdf5": hdf5_reader,
    "own-replay-buffer": own_replay_buffer_reader,
    "replay-buffer": replay_buffer_reader,
    **dict.fromkeys(("minari", "minari-folder", "bundled"), minari_reader),
}
_KINDS_BY_SUFFIX: dict[str, Kind] = {".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5", ".pkl": "replay-buffer"}


def load_dataset(
    spec: DatasetSpec, *, download: bool = True, trust_pickle: bool = False, progress_bar: bool = False, **filters: Any
) -> OfflineDataset:
    """
    Load the data that a spec names.

    =============================  ==================================================================================
    spec                           meaning
    =============================  ==================================================================================
    ``mujoco/hopper/medium-v0``    a Minari id: the local one (below ``MINARI_DATASETS_PATH``), else from Minari's hub
    ``path/to/folder``             a Minari dataset's folder, or the ``data`` folder in it (hdf5, arrow or parquet)
    ``path/to/file.npz``           arrays ``observations, actions, rewards, terminations`` and, if there are any,
                                   ``truncations, next_observations, action_low, action_high``
                                   (``terminals`` and ``timeouts`` are understood as well); Dict observations as
                                   ``observations/<key>``
    ``path/to/file.hdf5``          the same arrays in HDF5, as in D4RL's files (``.h5`` as well)
    ``path/to/buffer.pkl``         a replay buffer written by SB3's ``save_replay_buffer``, if ``trust_pickle``; or one of
                                   this package (``.npz`` as well), which is no pickle file
    ``bundled:hopper-medium``      small real data that comes with the package, see :data:`BUNDLED`
    a ``minari.MinariDataset``     such as ``minari.load_dataset(id).filter_episodes(...)``: the episodes that it holds
    ``<spec>?min_return=1000``     only some episodes: the filters below, joined by ``&``
    ``<spec>?keys=a,b/c``          only some keys of ``Dict`` observations; in a flattened environment, put together in this
                                   order. Those of nested Dicts are joined by ``/``
    ``<spec>?clip_actions=1``      actions that were recorded before clipping are clipped to the bounds, instead of refused
    ``<spec> + <spec>``            several together; ``0.7*<spec> + 0.3*<spec>`` with their shares of the batches
    =============================  ==================================================================================

    A list does the same as ``+``: of specs, of pairs ``(spec, weight)``, or of mappings with ``spec``, ``weight`` and filters.
    Without weights every transition is as likely as any other. The parts must have been recorded in the same environment.

    The filters are ``min_return``, ``max_return``, ``min_length``, ``max_length`` (inclusive), ``top_fraction`` (the episodes
    of the highest returns, a share in (0, 1]), ``episodes`` (at most so many: the first, or a random choice by ``seed``), in
    this order. In a list they hold for each part. ``keys`` and ``clip_actions`` may be keywords too.

    Columns are float32, images uint8. Time limits are truncations, and the last row of an episode without a flag becomes one.

    :param spec: The spec; an :class:`OfflineDataset` is returned as it is, or filtered
    :param download: Whether a Minari id that is not there locally may be downloaded
    :param trust_pickle: Whether pickle files may be read: that runs code which the file holds. The same as
        ``?trust_pickle=1`` in the spec; take it out of specs that come from a file, with :func:`without_trust`
    :param progress_bar: Whether to show the episodes that have been read of Minari data (needs tqdm and rich)
    :param filters: Filters, ``keys`` and ``clip_actions`` for all parts, in addition to those in the spec
    :return: The dataset; its ``spec`` loads it again, with trust given again if it is a pickle file
    :raises FileNotFoundError: There is no such file, folder, id or bundled name
    :raises ValueError: The spec is malformed, no episode passes the filters, the parts do not go together, or the data is
        damaged, empty, not finite or not supported
    :raises TypeError: The spec is of another type
    """
    parts = parse_spec(spec, filters, trust_pickle)
    datasets = [_load_part(part, download, progress_bar) for part in parts]
    if len(datasets) == 1:
        return datasets[0]
    weights = [part.weight for part in parts if part.weight is not None]
    together = OfflineDataset.concatenate(datasets, weights or None)
    return together.with_facts(spec=join_specs([one.spec for one in datasets], [part.weight for part in parts]))


def check_spec(spec: DatasetSpec, *, download: bool = True, trust_pickle: bool = False, **filters: Any) -> None:
    """
    Check what can be checked of a spec without reading data.

    :param spec: As for :func:`load_dataset`
    :param download: As for :func:`load_dataset`; the hub is asked for an unknown id, nothing is downloaded
    :param trust_pickle: As for :func:`load_dataset`; nothing is unpickled
    :param filters: As for :func:`load_dataset`
    :raises FileNotFoundError: As :func:`load_dataset`
    :raises ValueError: As :func:`load_dataset`, if the spec is malformed or its data cannot be opened
    :raises TypeError: As :func:`load_dataset`
    """
    for part in parse_spec(spec, filters, trust_pickle):
        if isinstance(part.base, OfflineDataset):
            continue
        source = _resolve(part, download)
        if source.path is not None:
            with _READERS[source.kind](source):
                pass


def spec_text(spec: DatasetSpec) -> str | None:
    """
    Write a spec as one string; reads nothing.

    :param spec: As for :func:`load_dataset`, such as a list
    :return: The string that means the same; ``None`` if it holds an :class:`OfflineDataset`, which no string names
    :raises ValueError: As :func:`load_dataset`, if the spec is malformed
    :raises TypeError: As :func:`load_dataset`
    """
    parts = parse_spec(spec)
    bases = [_base_text(part.base) for part in parts]
    texts = [None if base is None else part.text(base, part.trust_pickle) for part, base in zip(parts, bases, strict=True)]
    return join_specs(texts, [part.weight for part in parts])


def without_trust(spec: Any) -> Any:
    """
    Take the consent to unpickle out of a spec that was read from a file, or will be written to one: a file cannot give it.

    :param spec: As for :func:`load_dataset`
    :return: The same spec without ``trust_pickle``
    :raises ValueError: As :func:`load_dataset`, if a string in it has such an option and is malformed, or has one twice
    """
    if isinstance(spec, Mapping):
        return {name: without_trust(value) for name, value in spec.items() if name != TRUST}
    if isinstance(spec, list | tuple):
        return [without_trust(entry) for entry in spec]
    if not isinstance(spec, str) or TRUST not in spec:
        return spec
    parts = parse_spec(spec)
    if any(TRUST in str(part.base) for part in parts):
        # Whether such a name is a path depends on what is there, now and when it is read
        raise ValueError(f"{spec!r} has {TRUST!r} in the name of the data: rename it, or leave the second {TRUST!r} out.")
    if not any(part.trust_pickle for part in parts):
        return spec
    return join_specs([part.text(str(part.base), False) for part in parts], [part.weight for part in parts])


def _base_text(base: Base) -> str | None:
    """The string that names a source, if there is one."""
    if isinstance(base, OfflineDataset) or (isinstance(base, minari.MinariDataset) and not _is_whole(base)):
        return None
    if isinstance(base, minari.MinariDataset):
        return _source_of(base).spec
    # A path that is no string is no Minari id, which a relative one would be taken for
    return base if isinstance(base, str) else os.path.abspath(base)


def _is_whole(dataset: minari.MinariDataset) -> bool:
    return np.array_equal(dataset.episode_indices, np.arange(dataset.storage.total_episodes))


def _source_of(dataset: minari.MinariDataset) -> Source:
    data = Path(dataset.storage.data_path).absolute()
    local = _local_data_folder(dataset.id)
    if local is not None and local.resolve() == data.resolve():
        return Source("minari", dataset.id, dataset.id, data, given=dataset)
    spec = str(data.parent if data.name == "data" else data)
    return Source("minari-folder", spec, dataset.id, data, given=dataset)


def _load_part(part: PartSpec, download: bool, progress_bar: bool) -> OfflineDataset:
    if isinstance(part.base, OfflineDataset):
        if not part.filters.given() and part.keys is None and not part.clip_actions:
            return part.base
        dataset = part.base if part.keys is None else part.base.select_keys(part.keys)
        # A spec with options cannot take more, as filters are applied in one order
        given = part.base.spec
        is_plain = given is not None and "?" not in given and len(dataset.sources) == 1
        spec = part.text(given or "", needs_trust=False) if is_plain else None
    else:
        source = replace(_resolve(part, download), progress_bar=progress_bar)
        if source.path is None:
            source = replace(source, path=_download(source.spec))
        spec = None
        if source.given is None or _is_whole(source.given):
            # It is saved with models and results, from which no consent shall come
            spec = part.text(source.spec, needs_trust=False)
        dataset = _read_bundled(source) if source.kind == "bundled" and not progress_bar else _read(source)
        dataset = dataset.with_facts(provenance=deepcopy(dataset.provenance))
        # Minari data is read without the other keys
        if part.keys is not None and dataset.key_order != "named":
            dataset = dataset.select_keys(part.keys)
    name = part.text(dataset.name, needs_trust=False)
    dataset = part.filters.apply(dataset)
    if part.clip_actions:
        dataset = with_clipping(dataset)
    return dataset.with_facts(spec=spec, name=name)


def _read(source: Source) -> OfflineDataset:
    with _READERS[source.kind](source) as read:
        return read()


@lru_cache(maxsize=4)
def _read_bundled(source: Source) -> OfflineDataset:
    """The files do not change, nor do the columns of a dataset: all learners in a process share them."""
    return _read(source)


def _resolve(part: PartSpec, download: bool) -> Source:
    assert not isinstance(part.base, OfflineDataset)
    is_open = isinstance(part.base, minari.MinariDataset)
    source = _source_of(part.base) if is_open else _find(part.base, download)
    return replace(source, keys=part.keys, trust_pickle=part.trust_pickle)


def _find(spec: str | os.PathLike[str], download: bool) -> Source:
    text = os.fspath(spec).strip()
    if text.startswith(BUNDLED_PREFIX):
        return _resolve_bundled(text)
    path = Path(text).expanduser()
    explicit = isinstance(spec, os.PathLike) or text.startswith((".", "~")) or path.is_absolute()
    if path.suffix in _KINDS_BY_SUFFIX and not path.is_dir():
        if path.exists():
            check_is_file(path)
        else:
            raise FileNotFoundError(f"No dataset file {str(path.absolute())!r}{_suggest_files(path)}")
        kind = _KINDS_BY_SUFFIX[path.suffix]
        if kind != "hdf5" and has_own_format(path):
            kind = "own-replay-buffer"
        return Source(kind, str(path.absolute()), path.stem, path.absolute())
    if path.is_file():
        raise ValueError(
            f"Cannot load the file {text!r}: expected a .npz, .hdf5 or .pkl file or a folder holding a Minari dataset, "
            f"found a {path.suffix or 'nameless'} file."
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
    problem, known_ids = ("not asked, as download=False", []) if not download else hub_ids(text)
    if text in known_ids:
        return Source("minari", text, text, None)
    raise FileNotFoundError(_unknown(text, problem, known_ids))


def _resolve_bundled(text: str) -> Source:
    name = text.removeprefix(BUNDLED_PREFIX)
    if name not in BUNDLED:
        raise FileNotFoundError(
            f"No bundled dataset {name!r}{_did_you_mean(text, BUNDLED_SPECS)} There are {', '.join(BUNDLED_SPECS)}."
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
        f"Malformed dataset spec {text!r}: {problem}{_did_you_mean(text, [*_local_ids(), *BUNDLED_SPECS])} {ACCEPTED}"
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
    restore_replaced(root / dataset_id)
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


def _unknown(text: str, hub_problem: str | None, known_ids: list[str]) -> str:
    local_ids = _local_ids()
    tried = [
        f"folder {str(Path(text).absolute())!r}: none",
        f"local Minari datasets in {str(_minari_root())!r}: {len(local_ids)} there, none with this id",
        f"Minari's hub: {hub_problem}" if hub_problem else "Minari's hub: no dataset with this id",
    ]
    suggestion = _did_you_mean(text, [*local_ids, *known_ids, *BUNDLED_SPECS])
    advice = " Without the hub, copy the dataset into the local folder, or set MINARI_DATASETS_PATH." if hub_problem else ""
    return f"Unknown dataset {text!r}. Tried {'; '.join(tried)}{suggestion}{advice}"


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    known = list(known)
    near = nearest(text, known, 3)
    # A user who types the last parts of an id only gets no close match by spelling.
    near += [one for one in known if text.lower() in one.lower() and one not in near][: 3 - len(near)]
    return f". Did you mean {' or '.join(near)}?" if near else "."


def _suggest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {str(path.parent.absolute())!r} does not exist."
    return _did_you_mean(path.name, (sibling.name for sibling in path.parent.iterdir()))


def _download(dataset_id: str) -> Path:
    folder = get_dataset_path(dataset_id)
    try:
        # A folder without metadata is an interrupted download, which Minari would take as complete.
        minari.download_dataset(dataset_id, force_download=folder.exists())
    except Exception as error:
        raise ValueError(f"Downloading the dataset {dataset_id!r} failed ({type(error).__name__}: {error}).") from error
    data = _local_data_folder(dataset_id)
    if data is None:
        raise FileNotFoundError(
            f"The download of {dataset_id!r} left no metadata.json in {str(folder / 'data')!r}. Try again."
        )
    return data
