"""The journal of a trial: append-only, on disk before it counts, and chained so that a later edit shows."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.common.reading import parse_json, read_bytes
from sb3_offline_ft.common.warning import warn

JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "journal.lock"
FIRST = "0" * 64
"""What the first line names as the hash of the line before it."""
_SEAL = re.compile(rb', "hash": "([0-9a-f]{64})"\}')

Event = dict[str, Any]


class Journal:
    """
    The events of a trial, one JSON object a line.

    Each line has a number, a time, the hash of the line before it, and its own: an edit, a line that was removed, put in or
    moved breaks the chain. That the last lines were cut off can only be seen by the hash of the last one, which the report
    prints. A line that a killed process left half-written is dropped.

    :param path: The file, which need not exist
    :raises ValueError: The file was changed after it was written, or is damaged; the message names the line
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.events: list[Event] = []
        """All events, oldest first."""
        self._end = 0
        self._lock = FileLock(self.path.with_name(LOCK_FILE), timeout=0)
        self.refresh()

    @property
    def last_hash(self) -> str:
        """Hash of the last line, which stands for the whole file."""
        return str(self.events[-1]["hash"]) if self.events else FIRST

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keep other processes from writing; what they wrote before is read first. May be nested.

        :raises ValueError: Another process works on this trial
        """
        outermost = not self._lock.is_locked
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process works on the trial in {str(self.path.parent)!r} and has locked it: wait until it "
                "is done, or end it."
            ) from None
        try:
            if outermost:
                self.refresh()
                self._drop_torn_line()
            yield
        finally:
            self._lock.release()

    def refresh(self) -> None:
        """Read what is new in the file; ``ValueError`` as for the constructor."""
        content = read_bytes(self.path) if self.path.exists() else b""
        *lines, _ = content.split(b"\n")
        self.events, self._end = [], 0
        for line in lines:
            self.events.append(self._read(line))
            self._end += len(line) + 1

    def append(self, event: str, **fields: Any) -> Event:
        """
        Write an event; it is on disk when this returns.

        :param event: Its kind
        :param fields: What it says, in the form of JSON
        :return: The event as it was written
        :raises ValueError: Another process works on this trial, or a number is not finite
        :raises OSError: The disk does not take it; the journal is as it was
        """
        with self.locked():
            return self.write(self.draft(event, **fields))

    def draft(self, event: str, **fields: Any) -> Event:
        """The next event, as :meth:`write` will write it."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        return {"n": len(self.events), "time": time, "event": event, **json_form(fields), "previous": self.last_hash}

    def write(self, draft: Event) -> Event:
        """Write what :meth:`draft` made; errors as of :meth:`append`. The journal has to be locked."""
        body = json.dumps(draft, allow_nan=False)
        seal = hashlib.sha256(body.encode()).hexdigest()
        line = f'{body[:-1]}, "hash": "{seal}"}}\n'.encode()
        self._write(line)
        self._end += len(line)
        self.events.append(json.loads(line))
        return self.events[-1]

    def _write(self, line: bytes) -> None:
        with open(self.path, "ab") as file:
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                # A full disk, or Ctrl-C
                file.truncate(self._end)
                raise

    def _drop_torn_line(self) -> None:
        if self.path.is_file() and self.path.stat().st_size > self._end:
            warn(f"{self.path}: the last line was not written completely, and is dropped.", UserWarning)
            os.truncate(self.path, self._end)

    def _read(self, line: bytes) -> Event:
        number = len(self.events) + 1
        seal = _SEAL.search(line)
        body = line[: seal.start()] + b"}" if seal is not None and seal.end() == len(line) else None
        if body is None or seal is None or hashlib.sha256(body).hexdigest() != seal[1].decode():
            self._fail(number, "was changed after it was written: its hash does not fit to what it says")
        event: Event = parse_json(line, f"{self.path}, line {number}")
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            self._fail(number, "is no event")
        if event.get("previous") != self.last_hash or event.get("n") != number - 1:
            self._fail(number, "does not follow the line before it: a line was removed, put in or moved")
        return event

    def _fail(self, number: int, problem: str) -> None:
        raise ValueError(
            f"{self.path}, line {number} {problem}. Nothing after line {number - 1} can be trusted: bring back the file as it "
            "was, or begin a new trial."
        )


def kinds(events: list[Event], *names: str) -> list[Mapping[str, Any]]:
    """The events of these kinds."""
    return [event for event in events if event["event"] in names]
