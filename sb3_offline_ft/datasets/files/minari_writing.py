"""New Minari datasets: built aside, and moved into the local folder only when they are complete."""

import copy
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from io import FileIO, RawIOBase
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE, parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_offline_ft.common.leftovers import temporary_folder
from sb3_offline_ft.common.termination import held
from sb3_offline_ft.common.warning import warn

_HDF5 = "main_data.hdf5"
_SMALLEST_COMPRESSED_BYTES = 1024
_COPIED_BYTES = 1 << 20
_FIX = "Make room, set MINARI_DATASETS_PATH to another folder, or name one to go on in if this happens with --keep-in."


def check_new_id(dataset_id: str, overwrite: bool = False) -> None:
    """Refuse what is no Minari id, and one that is there already and may not be replaced."""
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match.group("version") is None:
        raise ValueError(
            f"{dataset_id!r} is no Minari id: expected name-v0 or namespace/name-v0, with letters, digits, - and _ in the "
            "names, two letters or more in the namespace, and the version at the end."
        )
    folder = get_dataset_path(dataset_id)
    restore_replaced(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"There is a dataset {dataset_id!r} already, in {str(folder)!r}: choose another id (a higher version, such as "
            f"{dataset_id.rpartition('-v')[0]}-v{int(match.group('version')) + 1}), or replace it with --overwrite."
        )


def write_minari(
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    *,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    env: gym.Env[Any, Any] | None = None,
    facts: dict[str, Any] | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    keep_in: str | Path | None = None,
) -> Path:
    """
    Write a Minari dataset (hdf5), whole or not at all, and give its folder; arguments and errors are those of
    :func:`convert_logs`.

    The spec is taken from the environment. The check is called with the folder of the complete dataset before it is moved,
    and may raise to have it thrown away. ``facts`` may hold ``ref_min_score`` and ``ref_max_score`` too.
    """
    check_new_id(dataset_id, overwrite)
    root, other_root = Path(get_dataset_path()), None if keep_in is None else Path(keep_in).expanduser()
    with ExitStack() as stack:
        try:
            new = _aside(root, stack) / dataset_id
            metadata = _new_metadata(new / "data", dataset_id, observation_space, action_space, env, facts or {})
            file = stack.enter_context(FailsafeFile(new / "data" / _HDF5))
        except OSError as error:
            raise OSError(f"{_what_failed(dataset_id, root, _with_space(error, root))} {_FIX}") from error
        other = None
        if other_root is not None:
            other_root.mkdir(parents=True, exist_ok=True)
            other = _aside(other_root, stack) / dataset_id
            (other / "data").mkdir(parents=True)
            file.spare = other / "data" / _HDF5
        metadata |= write_episodes(file, episodes)
        counted = f"{metadata['total_episodes']:,} episodes ({metadata['total_steps']:,} steps)"
        if not metadata["total_episodes"] and file.error is None:
            raise ValueError(f"There are no episodes to write to {dataset_id!r}")

        def complete(folder: Path) -> None:
            _write_metadata(folder / "data", metadata)
            if check is not None:
                check(folder)

        try:
            if file.error is not None:
                raise file.error
            complete(new)
            _make_namespace(dataset_id)
            return put_in_place(new, root / dataset_id, overwrite)
        except OSError as error:
            failed = _what_failed(dataset_id, root, error if error is file.error else _with_space(error, root))
            lost = f"{counted} were complete and are lost. {_FIX}"
            if file.path is None or not metadata["total_episodes"]:
                raise OSError(
                    f"{failed}{'' if other is None else f' Nor is there room in {str(other_root)!r}.'} {lost}"
                ) from error
            if other is None and not isinstance(error, _TakenError):
                raise OSError(f"{failed} {lost}") from error
            try:
                if other is not None and not (other / "data" / _HDF5).exists():
                    shutil.copyfile(file.path, other / "data" / _HDF5)
                kept = _put_under_free_id(other or new, other_root or root, metadata, complete)
            except OSError as second:
                raise OSError(
                    f"{failed} It cannot be kept in {str(other_root or root)!r} either ({second}). {lost}"
                ) from error
            if isinstance(error, _TakenError):
                raise FileExistsError(
                    f"A dataset {dataset_id!r} was made by something else in the meantime, and is left as it is. What was "
                    f"written here, {counted}, is kept in {str(kept)!r}."
                ) from error
            raise OSError(f"{failed} {counted} are kept in {str(kept)!r}, which is a dataset too. {_FIX}") from error


class _TakenError(FileExistsError):
    """There is a dataset already where one was to be put."""


class FailsafeFile(RawIOBase):
    """
    A file for HDF5, which crashes the process when a write fails.

    When one does, the file goes on in a spare place. If there is none, what is still written is kept in memory, so that HDF5
    can close the file; it is of no other use then.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        """Where it is; ``None`` if there is no place left."""
        self.spare: Path | None = None
        self.error: OSError | None = None
        """What went wrong first."""
        self._file = path.open("w+b", buffering=0)
        self._position = self._size = 0
        self._beyond: list[tuple[int, bytes]] = []

    def close(self) -> None:
        self._file.close()
        super().close()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")

        def write_here() -> None:
            self._file.seek(self._position)
            _write_all(self._file, view)

        self._try(write_here)
        if self.path is None:
            self._beyond.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        assert size is not None
        self._try(lambda: self._file.truncate(size))
        self._size = size
        return size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        begin, end = self._position, min(self._position + len(view), self._size)
        view[:] = bytes(len(view))
        self._file.seek(begin)
        done = 0
        while begin + done < end and (found := self._file.readinto(view[done : end - begin])):
            done += found
        for start, data in self._beyond:
            first, last = max(start, begin), min(start + len(data), end)
            if first < last:
                view[first - begin : last - begin] = data[first - start : last - start]
        self._position = max(begin, end)
        return max(end - begin, 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def _try(self, action: Callable[[], Any]) -> None:
        while self.path is not None:
            try:
                action()
                return
            except OSError as error:
                self.error = self.error or _with_space(error, self.path.parent)
                self._move()

    def _move(self) -> None:
        before, self.path = self.path, None
        if self.spare is None or before is None:
            return
        place, self.spare = self.spare, None
        with ExitStack() as stack:
            try:
                file = stack.enter_context(place.open("w+b", buffering=0))
                self._file.seek(0)
                while chunk := self._file.read(_COPIED_BYTES):
                    _write_all(file, memoryview(chunk))
            except OSError:
                place.unlink(missing_ok=True)
                return
            stack.pop_all()
        self._file.close()
        before.unlink()
        self._file, self.path = file, place


def _write_all(file: FileIO, data: memoryview) -> None:
    # Near the end of a full disk less is written than asked for
    while len(data):
        data = data[file.write(data) :]


def write_episodes(file: FailsafeFile, episodes: Iterable[EpisodeBuffer]) -> dict[str, int]:
    """
    Write episodes as Minari reads them from hdf5, but with fixed and compressed arrays.

    Minari's growable arrays take about 16 kB for an episode, however short. Stops when no place for the file is left. Returns
    ``total_episodes`` and ``total_steps``.
    """
    import h5py

    n_episodes = n_steps = 0
    # HDF5 calls the file from destructors too, where an exception is lost, and with it what was to be written
    with held():
        hdf5 = h5py.File(file, "w", libver=("v110", "v110"))
    try:
        for episode in episodes:
            with held():
                _write_episode(hdf5.create_group(f"episode_{n_episodes}"), n_episodes, episode)
            if file.path is None:
                break
            n_episodes += 1
            n_steps += len(episode.rewards)
    finally:
        with held():
            hdf5.close()
    return {"total_episodes": n_episodes, "total_steps": n_steps}


def _write_episode(group: Any, number: int, episode: EpisodeBuffer) -> None:
    group.attrs.update({"id": number, "total_steps": len(episode.rewards)})
    if episode.seed is not None:
        group.attrs["seed"] = episode.seed
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        _write_arrays(group, name, getattr(episode, name))


def _write_arrays(group: Any, name: str, value: Any) -> None:
    if isinstance(value, dict):
        inner = group.create_group(name)
        for key, one in value.items():
            _write_arrays(inner, key, one)
        return
    array = np.asarray(value)
    is_large = array.nbytes >= _SMALLEST_COMPRESSED_BYTES and array.dtype.kind in "biuf"
    options: dict[str, Any] = {"chunks": array.shape, "compression": "gzip", "shuffle": True} if is_large else {}
    group.create_dataset(name, data=array, **options)


def _new_metadata(
    data: Path,
    dataset_id: str,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    env: gym.Env[Any, Any] | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Make the folder of an empty dataset, and return its metadata as Minari writes them."""
    data.mkdir(parents=True)
    storage = MinariStorage.new(
        data, observation_space, action_space, None if env is None else _recoverable(env), jpeg_encoding=False
    )
    known = {name: value for name, value in facts.items() if value is not None}
    for name in ("author", "author_email"):
        if isinstance(known.get(name), str):
            known[name] = {known[name]}
    storage.update_metadata(known | {"dataset_id": dataset_id, "minari_version": minari.__version__})
    return dict(MinariStorage.read_raw_metadata(data))


def _write_metadata(data: Path, metadata: dict[str, Any]) -> None:
    with (data / _HDF5).open("rb+") as written:
        os.fsync(written.fileno())
        metadata["dataset_size"] = round(written.seek(0, os.SEEK_END) / 1e6, 1)
    with (data / "metadata.json").open("w", encoding="utf-8") as file:
        json.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def _make_namespace(dataset_id: str) -> None:
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        with suppress(ValueError):
            create_namespace(namespace)


def _aside(root: Path, stack: ExitStack) -> Path:
    aside = temporary_folder(root, "sb3-offline-ft-dataset")
    stack.callback(_remove, aside)
    return aside


def _remove(folder: Path) -> None:
    with held():
        shutil.rmtree(folder, ignore_errors=True)


def _with_space(error: OSError, place: Path) -> OSError:
    """Say how much space there is, before temporary files are removed."""
    text = f"{error.strerror or error}"
    with suppress(OSError):
        space = shutil.disk_usage(place)
        text += f" ({_bytes(space.free)} of {_bytes(space.total)} were free)"
    return OSError(error.errno, text)


def _what_failed(dataset_id: str, root: Path, error: OSError) -> str:
    return f"Cannot write {dataset_id!r} to {str(root)!r}: {error.strerror}."


def _bytes(number: float) -> str:
    power = next((power for power in range(3) if number < 1000 ** (power + 1)), 3)
    return f"{number / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def put_in_place(new: Path, folder: Path, overwrite: bool) -> Path:
    """
    Move the folder of a complete dataset to its place, in one step that does not take it from another dataset.

    What is replaced is at ``new`` afterwards, or gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(folder)
    replaced = _replaced(folder)
    while True:
        try:
            # A folder with something in it is never replaced by this
            os.replace(new, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                restore_replaced(folder)
                raise
        if not overwrite:
            raise _TakenError(errno.EEXIST, f"there is a dataset in {str(folder)!r} already")
        if _exchange(new, folder):
            break
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def restore_replaced(folder: Path) -> None:
    """Put back a dataset that was being replaced when the process was killed."""
    if not folder.exists() and (replaced := _replaced(folder)).is_dir():
        with suppress(OSError):
            os.replace(replaced, folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system and the file system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0)  # RENAME_EXCHANGE


def _put_under_free_id(new: Path, root: Path, metadata: dict[str, Any], complete: Callable[[Path], None]) -> Path:
    """Complete a dataset and move it to its place, or to that of the next version that is free."""
    name, version = metadata["dataset_id"].rsplit("-v", 1)
    for number in count(int(version)):
        metadata["dataset_id"] = f"{name}-v{number}"
        folder = root / metadata["dataset_id"]
        if not folder.exists():
            complete(new)
            with suppress(_TakenError):
                return put_in_place(new, folder, overwrite=False)
    raise AssertionError


def _recoverable(env: gym.Env[Any, Any]) -> EnvSpec | None:
    """Bring the spec of an environment into a form that can be written; with a warning, none if there is no such form."""
    if env.spec is None:
        return None
    spec = copy.deepcopy(env.spec)
    entry_point: Any = spec.entry_point
    if callable(entry_point) and str(getattr(entry_point, "__qualname__", "<>")).isidentifier():
        # Registered as a class; its name says the same, if it is importable
        spec.entry_point = f"{entry_point.__module__}:{entry_point.__qualname__}"
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        warn(
            f"The environment {spec.id} cannot be recovered from the dataset, as its spec cannot be written: {error} "
            "Register it with entry_point='module:Class' and arguments of plain types."
        )
        return None
    return spec
