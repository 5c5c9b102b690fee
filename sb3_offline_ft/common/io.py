"""Files and texts without pickle, written whole or not at all."""

import base64
import io
import os
import pathlib
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any, BinaryIO

import numpy as np

from sb3_offline_ft.common.leftovers import owned_name, remove_leftovers
from sb3_offline_ft.common.reading import ArrayFile, TooLargeError, open_file, reason_of, too_large


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """
    Open a temporary file beside ``path`` for writing; it takes the name ``path`` only if the block succeeds, and only when
    the disk has all of it. What killed processes left there in the same way is removed. The mode of a file that is there is
    kept.

    :param path: Where the file shall be, a link to it, or a device; missing folders are created
    :return: The open binary file
    """
    # A link stays one
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        # A device or a pipe can be written to, not replaced
        with target.open("wb") as file:
            yield file
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    if target.is_file():
        # What may not be written to is not replaced either
        target.open("r+b").close()
    # Not tempfile's, whose files are private: ours follow the user's umask, or keep what was set
    temporary = target.with_name(f"{owned_name(target.name)}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if target.is_file():
                shutil.copymode(target, temporary)
            yield file
        replace_synced(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: pathlib.Path) -> None:
    """Remove what :func:`atomic_write` left in a folder when its process was killed. No other may be writing there."""
    for path in folder.glob(".*.????????.tmp"):
        path.unlink(missing_ok=True)


def replace_synced(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """
    Give a file or a folder of files its name when the disk has what is in it, so that no crash leaves a name without content.

    :raises OSError: The disk does not take it, or the name is that of a folder with content; all is as it was
    """
    for path in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
        _sync(path)
    os.replace(temporary, target)
    _sync(target.parent)


def _sync(path: pathlib.Path) -> None:
    is_folder = path.is_dir()
    # Windows opens no folders, and some file systems cannot sync them
    with suppress(OSError) if is_folder else nullcontext():
        # Windows syncs only what may be written
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming_damage(path: str | os.PathLike[str] | IO[bytes], expected: str) -> Iterator[None]:
    """
    Make one clear error of whatever libraries raise about a file that is damaged, or is another one than was expected.

    :param path: The file that the block reads, or a stream
    :param expected: What it should be, in words
    :raises ValueError: The block could not read it
    :raises FileNotFoundError: There is no such file
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except TooLargeError as error:
        if str(error).startswith(f"{path} "):
            raise
        raise TooLargeError(f"{path} cannot be read ({reason_of(error)}).") from None
    except MemoryError as error:
        raise too_large(path, error) from error
    # Libraries raise anything: EOFError, zlib.error, BadZipFile, RecursionError, ...
    except Exception as error:
        raise ValueError(f"{path} is damaged or not {expected} ({reason_of(error)}).") from error


def read_npz(path: str | os.PathLike[str], *names: str, optional: Collection[str] = ()) -> dict[str, np.ndarray]:
    """
    Read arrays of an ``.npz`` file; nothing is unpickled. Optional ones may be missing.

    :raises ValueError: It is damaged, or an array is missing or holds Python objects
    :raises FileNotFoundError: There is no such file
    """
    with naming_damage(path, f"an .npz file with {', '.join(names)}"):
        with open_file(path) as stream:
            file = ArrayFile(stream, pathlib.Path(path).name)
            return {name: file[name] for name in names if name in file or name not in optional}


def arrays_to_text(arrays: Mapping[str, np.ndarray]) -> str:
    """Pack named arrays into one ASCII string (base64 of an ``.npz`` without pickle)."""
    stream = io.BytesIO()
    np.savez(stream, **dict(arrays))  # type: ignore[arg-type]  # the stubs take names for savez's own keyword
    return base64.b64encode(stream.getvalue()).decode("ascii")


def arrays_from_text(text: str) -> dict[str, np.ndarray]:
    """Unpack what :func:`arrays_to_text` packed."""
    arrays = ArrayFile(io.BytesIO(base64.b64decode(text)), "a text of arrays")
    return {name: arrays[name] for name in arrays.files}


def arrays_to_json(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Turn arrays of numbers, booleans or text into JSON's form; for small ones much faster than :func:`arrays_to_text`."""
    return {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "content": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii"),
        }
        for name, array in arrays.items()
    }


def arrays_from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Take back what :func:`arrays_to_json` gave."""
    return {
        name: np.frombuffer(base64.b64decode(entry["content"]), np.dtype(entry["dtype"])).reshape(entry["shape"]).copy()
        for name, entry in content.items()
    }
