"""Files and texts without pickle, written whole or not at all."""

import base64
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """
    Open a temporary file beside ``path`` for writing; it takes the name ``path`` only if the block succeeds.

    :param path: Where the file shall be; missing folders are created
    :return: The open binary file
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp's files are private, ours follow the user's umask like any other
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def arrays_to_text(arrays: Mapping[str, np.ndarray]) -> str:
    """
    Pack named arrays into one ASCII string (base64 of an ``.npz`` without pickle).

    :param arrays: Arrays by name
    :return: The string, readable by :func:`arrays_from_text`
    """
    stream = io.BytesIO()
    np.savez(stream, **dict(arrays))  # type: ignore[arg-type]  # the stubs take names for savez's own keyword
    return base64.b64encode(stream.getvalue()).decode("ascii")


def arrays_from_text(text: str) -> dict[str, np.ndarray]:
    """
    Unpack what :func:`arrays_to_text` packed.

    :param text: The string
    :return: Arrays by name
    """
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def arrays_to_json(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """
    Turn named arrays into what ``json.dumps`` takes; for small arrays much faster than :func:`arrays_to_text`.

    :param arrays: Arrays by name, of numbers, booleans or text
    :return: By name the dtype, the shape and the content
    """
    return {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "content": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii"),
        }
        for name, array in arrays.items()
    }


def arrays_from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """
    Take back what :func:`arrays_to_json` gave.

    :param content: By name the dtype, the shape and the content
    :return: Arrays by name
    """
    return {
        name: np.frombuffer(base64.b64decode(entry["content"]), np.dtype(entry["dtype"])).reshape(entry["shape"]).copy()
        for name, entry in content.items()
    }
