"""
The event log of a collapse guard: JSON Lines, one event a line.

Each event is ``{"event": KIND, "timestep": int, "episode": int, "n_updates": int, "time": unix seconds, ...details}``.
JSON has no NaN and no infinities: they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, also inside lists
and nested settings, and read back as floats everywhere but in the fields that hold words (:data:`WORD_FIELDS`).
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.common.reading import parse_json, read_bytes
from sb3_offline_ft.common.warning import warn

EVENTS_FILE = "collapse_events.jsonl"
WORD_FIELDS = frozenset(
    {"action", "algorithm", "detector", "event", "message", "name", "phase", "poisoned_data", "reason", "source"}
)

EPISODES = ("episode", "evaluation")
"""Kinds of events that have a return: training episodes, and episodes of evaluations where these are watched."""

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Event = dict[str, Any]


class EventLog:
    """
    The events of one run, in memory and in a file to which each is written at once.

    A disk that fails never stops the training: there is one warning, the events stay in memory, and what is missing in the
    file is written as soon as the disk works again. An event that is appended before :meth:`start` continues the file.

    :param path: The file; None keeps the events in memory only
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.events: list[Event] = []
        self._n_written = 0
        # Where the last whole line ends, if what follows must go before the next line is written
        self._cut_at: int | None = None
        self._is_started = False
        self._must_replace = False
        self._has_warned = False

    def start(self, resume: bool) -> None:
        """
        Begin a run, or go on with the events that are there: the file's or, if this log has been started, its own.

        :raises ValueError: The file that shall be resumed is damaged
        """
        if not resume:
            self.events, self._must_replace = [], True
        elif not self._is_started and self.path is not None:
            try:
                # Only of a file: a device might have no end
                if self.path.is_file():
                    self.events, self._n_written, self._cut_at = _parse(self.path)
            except OSError as error:
                self._warn(error)
        self._is_started = True
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """How far the log is: the number of events, and those themselves if there is no file."""
        return {
            "n_events": len(self.events),
            "events": [_written(event) for event in self.events] if self.path is None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: what came later is forgotten, in the file too."""
        if state["events"] is not None:
            self.events = [cast(Event, _restored(event)) for event in state["events"]]
        if len(self.events) > state["n_events"]:
            self.events, self._must_replace = self.events[: state["n_events"]], True
        self._is_started = True
        self._write()

    def append(self, event: Event) -> None:
        """Add an event, in which what JSON lacks becomes numbers, lists and texts; ``ValueError`` as for :meth:`start`."""
        if not self._is_started:
            self.start(resume=True)
        self.events.append(_restored(json_form(event)))
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        try:
            if self._must_replace:
                self._replace(self.path)
            elif self._cut_at is not None or self._n_written < len(self.events):
                self._extend(self.path)
        except OSError as error:
            self._warn(error)

    def _replace(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.writelines(map(_line, self.events))
        self._n_written, self._cut_at, self._must_replace = len(self.events), None, False

    def _extend(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            end = file.seek(0, os.SEEK_END)
            if self._cut_at is not None and end > self._cut_at:
                end = file.truncate(self._cut_at)
            if end == 0:
                # A file that was deleted or emptied under us shall hold the whole run again
                self._n_written = 0
            while self._n_written < len(self.events):
                # A write that fails may leave a part of the line
                self._cut_at = end
                line = _line(self.events[self._n_written])
                file.write(line)
                file.flush()
                end += len(line)
                self._n_written += 1
        self._cut_at = None

    def _warn(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warn(
            f"Events cannot be written to {self.path} ({error}). The training goes on; the events stay in "
            "memory and are written when the file can be written again.",
            RuntimeWarning,
        )


def read_events(path: Path) -> list[Event]:
    """
    Read a file of events, oldest first. A last line that is incomplete, as a killed process leaves it, is dropped.

    :raises ValueError: Another line is damaged
    """
    return _parse(path)[0]


def monitored_words(events: Iterable[Event]) -> str:
    """How many episodes were compared with the baseline, such as ``"40 monitored episodes (of 50)"``."""
    by_kind = {kind: [event for event in events if event["event"] == kind] for kind in EPISODES}
    kind = "evaluation" if by_kind["evaluation"] else "episode"
    n = sum(event.get("phase", "monitoring") == "monitoring" for event in by_kind[kind])
    words = f"{n:,} monitored {'evaluation ' if kind == 'evaluation' else ''}episode{'' if n == 1 else 's'}"
    return words if n == len(by_kind[kind]) else f"{words} (of {len(by_kind[kind]):,})"


def encode_events(events: Iterable[Event]) -> bytes:
    """What a file of these events holds."""
    return b"".join(map(_line, events))


def _parse(path: Path) -> tuple[list[Event], int, int | None]:
    """Events, how many of them are whole lines, and where the last line begins if it does not end in a newline."""
    *whole, last = read_bytes(path).split(b"\n")
    events = [_event(line, path, number) for number, line in enumerate(whole, start=1) if line.strip()]
    n_whole = len(events)
    if not last:
        return events, n_whole, None
    try:
        events.append(_event(last, path, len(whole) + 1))
    except ValueError:
        pass
    return events, n_whole, sum(len(line) + 1 for line in whole)


def _event(line: bytes, path: Path, number: int) -> Event:
    try:
        event = parse_json(line.decode(), "the line")
    except ValueError:
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        shown = line if len(line) <= 60 else line[:60] + b"..."
        raise ValueError(
            f"{path}, line {number} is damaged: expected a JSON object with an 'event', found {shown!r}. "
            "Remove this line to read the others."
        )
    return cast(Event, _restored(event))


def _line(event: Event) -> bytes:
    return json.dumps(_written(event), allow_nan=False).encode("ascii") + b"\n"


def _written(value: Any) -> Any:
    """The same with texts for the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _written(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_written(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any, name: str = "") -> Any:
    """The same with the numbers that JSON lacks, but for what is called as fields of words are."""
    if isinstance(value, dict):
        return {key: _restored(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item, name) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) and name not in WORD_FIELDS else value
