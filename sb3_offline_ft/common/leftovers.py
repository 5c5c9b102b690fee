"""Temporary files and folders whose names tell which process writes them, so that what a killed one left can be removed."""

import os
import pathlib
import platform
import re
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from functools import cache

OLD_SECONDS = 7 * 24 * 3600
"""Age at which what another machine's process made, or one's of before a restart, counts as left behind."""
NEVER = -1
"""Start of a process that is dead, though nobody has asked how it ended."""
NAME_CHARACTERS = 100
"""Of the name of what is written; the whole name must fit into a file system's 255 bytes."""
_OWNED = re.compile(r"\..*\.(?P<place>[0-9a-f]{8})-(?P<process>\d+)-(?P<start>\d+)\.\w{8}(\.tmp)?", re.DOTALL)


def owned_name(name: str) -> str:
    """
    :param name: Name of the file or folder that is written
    :return: The beginning of the name of a temporary one beside it, which tells whose it is: where, process and its start
    """
    process = os.getpid()
    return f".{name.encode()[-NAME_CHARACTERS:].decode(errors='ignore')}.{_place()}-{process}-{_start_of(process) or 0}"


def temporary_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """
    Make a folder beside what it shall become. What killed processes left in ``parent`` is removed.

    :param parent: Where, a folder that exists
    :param name: What it shall become, or a word for it
    """
    remove_leftovers(parent)
    return pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=f"{owned_name(name)}."))


def remove_leftovers(folder: pathlib.Path) -> None:
    """
    Remove temporary files and folders in a folder whose processes are dead, or were on another machine (or before this one was
    started again) and are old. Others, and whatever has other names, are left alone.

    :param folder: The folder, not those in it
    """
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if name.startswith(".")]
        for name in names:
            if (match := _OWNED.fullmatch(name)) and _is_left_behind(folder / name, **match.groupdict()):
                path = folder / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()


def _is_left_behind(path: pathlib.Path, place: str, process: str, start: str) -> bool:
    if place != _place() or os.name == "nt":
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > OLD_SECONDS
        return False
    now = _start_of(int(process))
    if now is not None:
        # The number may be another process's by now
        return now != int(start)
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


@cache
def _place() -> str:
    """A name for where process numbers mean the same: a machine, which others may share the name of, and on it a container."""
    facts = platform.node()
    with suppress(OSError):
        facts += pathlib.Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(facts.encode()):08x}"


def _start_of(process: int) -> int | None:
    """When a process began, in the system's own unit, never if it is dead; None if this system does not tell."""
    try:
        facts = pathlib.Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name before it, in brackets, may hold anything
    fields = facts.rpartition(")")[2].split()
    return NEVER if fields[0] in "ZX" else int(fields[19])
