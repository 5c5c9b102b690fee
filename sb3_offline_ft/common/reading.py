"""The one way in which files are read that others may have made: whole, regular, of bounded size, and checked before use."""

import io
import json
import os
import re
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePath
from typing import IO, Any, NoReturn

import numpy as np
from numpy.lib import format as npy

MIB = 2**20
MOST_SETTINGS = MIB
"""Bytes of a file that people write, such as ``study.yml``: YAML takes some ten seconds for as many."""
MOST_JSON = 256 * MIB
"""Bytes of a file of facts that a program writes."""
SMALL = 64 * MIB
"""Bytes for which nobody is asked whether there is memory."""
_NO_FILES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NPY = ".npy"
_MOST_OF_HEADER = 2**14
"""Bytes in front of an array's values, of which NumPy parses at most 10,000."""
_MOST_OF_TEXT = 500


class ContentError(ValueError):
    """An error of a file that says all: which file it is, what was expected and found, and what to do."""


class TooLargeError(ContentError):
    """Nothing is known of damage, but it is more than there is memory for, or than such a file should be."""


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """
    Open a regular file for reading.

    :raises ContentError: It is something else, such as a named pipe, for which one could wait for ever
    :raises OSError: There is no such file, or it may not be read
    """
    check_is_file(path)
    return open(path, "rb")


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Check that something can be opened as :func:`open_file` does, for libraries that do it themselves."""
    mode = os.stat(path).st_mode
    for is_one, kind in _NO_FILES:
        if is_one(mode):
            raise ContentError(f"{os.fspath(path)} is {kind}: expected a regular file. Write what it gives into a file first.")


def read_bytes(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """
    Read a whole file.

    :param path: The file
    :param most: Bytes that it may have, if not as many as there is memory for
    :raises ContentError: It is no regular file
    :raises TooLargeError: It is too large
    :raises OSError: As :func:`open_file`
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise TooLargeError(
                f"{os.fspath(path)} has {size:,} bytes: expected at most {most:,} of such a file. Is it the right one?"
            )
        check_memory(size, os.fspath(path))
        return file.read()


def read_text(path: str | os.PathLike[str], most: int = MOST_SETTINGS) -> str:
    """Read a text in UTF-8; raises as :func:`read_bytes`."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContentError(
            f"{os.fspath(path)} is no text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None


def parse_json(text: str | bytes, where: str) -> Any:
    """
    Read JSON.

    :param text: The text
    :param where: What it is, at the start of messages
    :raises ContentError: It is no JSON, nested too deeply, or names something twice
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ContentError(f"{where} has {shortened(repr(twice))} twice: which one counts is not known. Leave one.")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except ContentError:
        raise
    except RecursionError:
        raise ContentError(f"{where} is no JSON that a program has written: it is nested too deeply.") from None
    except ValueError as error:
        raise ContentError(f"{where} is no JSON: {error}. Bring back the file as it was.") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises as :func:`read_text` and :func:`parse_json`."""
    content = parse_json(read_text(path, MOST_JSON), os.fspath(path))
    if not isinstance(content, dict):
        raise ContentError(f"{os.fspath(path)} must hold a JSON object, found {type(content).__name__}.")
    return content


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of a zip file, if there is memory for it; ``KeyError`` if there is none of the name."""
    check_memory(archive.getinfo(name).file_size, f"{archive.filename or 'a zip file'}: {name}")
    return archive.read(name)


class ArrayFile:
    """
    The arrays of an open ``.npz`` file, each read and verified when it is asked for. Nothing is unpickled.

    :param stream: The file, open as long as this is used
    :param where: What it is, at the start of messages
    :raises ContentError: It has an array twice, or is a single one
    :raises Exception: What Python's zipfile raises about a damaged file
    """

    def __init__(self, stream: IO[bytes], where: str) -> None:
        start = stream.read(len(npy.MAGIC_PREFIX))
        stream.seek(0)
        if start == npy.MAGIC_PREFIX:
            raise ContentError(f"{where} is no .npz archive: expected one made by numpy.savez, found a single array.")
        self.where, self._is_verified = where, False
        self._archive = zipfile.ZipFile(stream)
        names = [(info.filename.removesuffix(_NPY), info) for info in self._archive.infolist()]
        self._members = dict(names)
        for name, count in Counter(name for name, _ in names).items():
            if count > 1:
                raise ContentError(
                    f"{where} has {shortened(name)} {count} times: which one counts is not known. Write it again."
                )

    @property
    def files(self) -> list[str]:
        """Names of the arrays, as NumPy calls them."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray:
        """
        Read an array.

        :raises KeyError: There is none of the name
        :raises ContentError: It holds other than numbers, truths or text, or has another size than it says
        :raises TooLargeError: There is no memory for it
        :raises Exception: What the libraries raise about a damaged file
        """
        if not self._is_verified:
            # The list of members and each member must say the same name: a damaged one is not a missing one
            for member_info in self._members.values():
                self._archive.open(member_info).close()
            self._is_verified = True
        info = self._members[name]
        with self._archive.open(info) as member:
            # NumPy reads as much of a header as it says that it has, which may be gigabytes
            start = io.BytesIO(member.read(_MOST_OF_HEADER))
        if not start.getvalue().startswith(npy.MAGIC_PREFIX):
            self._fail(name, "is no array of NumPy's. Write the file again with numpy.savez")
        version = npy.read_magic(start)
        if version not in ((1, 0), (2, 0)):
            self._fail(name, f"has the version {version} of NumPy's format, expected 1.0 or 2.0")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        try:
            shape, _, dtype = read_header(start)
        except MemoryError:
            # Of Python's parser, about brackets within brackets
            self._fail(name, "has no header of NumPy's: the file is damaged. Copy or download it again")
        if dtype.hasobject:
            self._fail(name, "holds Python objects, expected numbers. Save it as a plain array")
        if dtype.kind not in "biufU" or any(length < 0 for length in shape):
            self._fail(name, shortened(f"is of type {dtype} and shape {shape}, expected numbers, truths or text"))
        promised = dtype.itemsize
        for length in shape:
            promised *= length
        found = info.file_size - start.tell()
        if promised != found:
            self._fail(
                name, f"should have {promised:,} bytes, as its shape is {shape} of {dtype}, found {found:,}: the file is "
                "damaged. Copy or download it again"
            )  # fmt: skip
        check_memory(promised, f"{self.where}: {shortened(name)}")
        with self._archive.open(info) as member:
            return np.asarray(npy.read_array(member, allow_pickle=False))

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise ContentError(f"{self.where}: {shortened(name)} {problem}.")


def check_memory(n_bytes: int, where: str) -> None:
    """
    Check that there is memory for what a file says that it holds, before the memory is taken.

    :param n_bytes: Bytes that will be taken
    :param where: What needs them, at the start of the message
    :raises TooLargeError: There is less, as far as the system says
    """
    if n_bytes <= SMALL:
        return
    free = _free_memory()
    if free is not None and n_bytes > free:
        raise TooLargeError(f"{where} needs {_gib(n_bytes)} of memory, and {_gib(free)} are free. {_ADVICE}")


_ADVICE = "Read a smaller part, or use a machine with more memory."


def reason_of(error: Exception) -> str:
    """What a library says about a damaged file, in one line of bounded length, without what a terminal would obey."""
    text = shortened(" ".join(str(error).split()).rstrip("."))
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def shortened(text: str) -> str:
    """A text of a file for a message: of bounded length, without what a terminal would obey."""
    begin = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[:_MOST_OF_TEXT])
    return begin if len(text) <= _MOST_OF_TEXT else f"{begin}..."


def too_large(where: object, error: MemoryError) -> TooLargeError:
    """The error to raise in place of a ``MemoryError``."""
    return TooLargeError(f"{where} needs more memory than there is ({reason_of(error)}). {_ADVICE}")


def _free_memory() -> int | None:
    """Bytes that this process may still take, as far as the system says."""
    if sys.platform != "linux":
        return None
    import resource

    free = [*free_in_groups()]
    of_system = _kibibytes(Path("/proc/meminfo"))
    # Not every container says it
    if "MemAvailable" in of_system:
        free.append(of_system["MemAvailable"] + of_system.get("SwapFree", 0))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _kibibytes(Path("/proc/self/status")).get("VmSize", 0))
    return min(free, default=None)


def _kibibytes(file: Path) -> dict[str, int]:
    """The bytes in a file of the system, by name."""
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", _content(file), re.MULTILINE)}


def free_in_groups(system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limits of the process's control groups leave, as containers and batch systems set them."""
    for kinds, path in re.findall(r"^\d+:(.*?):(.*)$", _content(process), re.MULTILINE):
        if kinds and "memory" not in kinds.split(","):
            continue
        # Version 1 has names for its kinds, and a folder for each
        root, limit, used, prefix = (
            (system / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if kinds
            else (system, "memory.max", "memory.current", "")
        )
        parts = PurePath(path).parts[1:]
        for depth in range(len(parts) + 1):
            group = root.joinpath(*parts[:depth])
            sizes = [_content(group / name).strip() for name in (limit, used)]
            if all(map(str.isdigit, sizes)):
                # Of the copies of files the system lets go
                copies = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", _content(group / "memory.stat"), re.MULTILINE)
                yield int(sizes[0]) - int(sizes[1]) + sum(map(int, copies))


def _content(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
