"""Text files, perhaps packed, as streams that are checked while they are read."""

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sb3_offline_ft.common.reading import SMALL, ContentError, check_memory, open_file


def _zst(file: Any) -> Any:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise ImportError(
            "Files packed as .zst need the package zstandard: pip install zstandard.", name="zstandard"
        ) from None
    return zstandard.ZstdDecompressor().stream_reader(file)


_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zst,
}
PACKED = tuple(_UNPACK)


@contextmanager
def open_text(path: Path, where: str) -> Iterator[io.BufferedReader]:
    """
    Open a text for reading as bytes, unpacked.

    :param path: The file, packed if its name says so
    :param where: Names it at the start of messages
    :return: The stream; reading from it raises a :class:`ContentError` at a byte of zero, which readers of numbers take for
        the end, and when memory does not suffice for the text
    """
    with open_file(path) as file:
        unpack = _UNPACK.get(path.suffix.lower())
        stream = file if unpack is None else unpack(file)
        yield io.BufferedReader(_Checked(stream, where), 2**18)


class _Checked(io.RawIOBase):
    """Passes on what it reads from a stream of a text."""

    def __init__(self, stream: Any, where: str) -> None:
        self._stream, self._where = stream, where
        self._n_bytes = self._n_lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        if (at := content.find(b"\0")) >= 0:
            line = self._n_lines + content.count(b"\n", 0, at) + 1
            raise ContentError(f"{self._where}, line {line} has a byte of zero, expected text in UTF-8. Write the file again.")
        if self._n_bytes // SMALL < (self._n_bytes + len(content)) // SMALL:
            check_memory(self._n_bytes + len(content), self._where)
        self._n_bytes += len(content)
        self._n_lines += content.count(b"\n")
        buffer[: len(content)] = content
        return len(content)
