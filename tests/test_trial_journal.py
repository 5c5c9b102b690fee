"""The journal of a trial: nothing that was written is lost, and what is changed later shows."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sb3_offline_ft.trial.journal import JOURNAL_FILE, Journal

PROPERTIES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
events = st.lists(st.dictionaries(st.sampled_from(["episode", "metrics", "reason", "why"]), values, max_size=3), max_size=6)


def written(folder: Path, contents: list[dict[str, Any]]) -> Path:
    """A file with these events."""
    path = folder / JOURNAL_FILE
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for content in contents:
        journal.append("episode_of_test", **content)
    return path


def contents_of(journal: Journal) -> list[dict[str, Any]]:
    """What the events say besides what the journal adds."""
    own = ("n", "time", "event", "previous", "hash")
    return [{name: value for name, value in event.items() if name not in own} for event in journal.events]


@PROPERTIES
@given(contents=events)
def test_what_was_written_is_read_again(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    journal = Journal(written(tmp_path, contents))
    assert contents_of(journal) == contents
    assert [event["n"] for event in journal.events] == list(range(len(contents)))


@PROPERTIES
@given(contents=events, data=st.data())
def test_a_torn_last_line_is_dropped_and_all_before_it_kept(
    tmp_path: Path, contents: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = written(tmp_path, contents)
    whole = path.read_bytes() if path.exists() else b""
    length = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:length])
    n_whole = whole[:length].count(b"\n")
    journal = Journal(path)
    assert contents_of(journal) == contents[:n_whole]
    # The next event takes the place of the torn one
    if length and not whole[:length].endswith(b"\n"):
        with pytest.warns(UserWarning, match="last line was not written completely"):
            journal.append("after")
    else:
        journal.append("after")
    assert [*contents_of(Journal(path))] == [*contents[:n_whole], {}]


@PROPERTIES
@given(contents=events.filter(bool), data=st.data())
def test_a_changed_byte_is_found_and_its_line_named(
    tmp_path: Path, contents: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = written(tmp_path, contents)
    whole = bytearray(path.read_bytes())
    # Without the newline at the end the last line would be a torn one
    place = data.draw(st.integers(0, len(whole) - 2))
    whole[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    line = path.read_bytes()[:place].count(b"\n") + 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"line {line} was changed after it was written"):
        Journal(path)


@PROPERTIES
@given(n=st.integers(2, 6), data=st.data())
def test_a_line_that_is_gone_or_was_moved_is_named(tmp_path: Path, n: int, data: st.DataObject) -> None:
    path = written(tmp_path, [{"reason": str(i)} for i in range(n)])
    lines = path.read_bytes().splitlines(keepends=True)
    first = data.draw(st.integers(0, n - 2))
    gone = lines[:first] + lines[first + 1 :]
    path.write_bytes(b"".join(gone))
    with pytest.raises(ValueError, match=f"line {first + 1} does not follow the line before it"):
        Journal(path)
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=f"line {first + 1} does not follow the line before it"):
        Journal(path)


def test_a_rewritten_line_with_a_fitting_hash_breaks_the_chain_after_it(tmp_path: Path) -> None:
    path = written(tmp_path, [{"reason": "a"}, {"reason": "b"}, {"reason": "c"}])
    lines = path.read_bytes().splitlines(keepends=True)
    forged = json.loads(lines[1]) | {"reason": "better"}
    del forged["hash"]
    body = json.dumps(forged)
    seal = hashlib.sha256(body.encode()).hexdigest()
    lines[1] = f'{body[:-1]}, "hash": "{seal}"}}\n'.encode()
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="line 3 does not follow the line before it"):
        Journal(path)


def test_the_last_hash_stands_for_the_whole_file(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path, [{"reason": "a"}, {"reason": "b"}]))
    before = journal.last_hash
    # That the last line is gone shows by nothing else
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0])
    assert Journal(journal.path).last_hash != before


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path, [{"reason": "a"}]))
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        journal.append("episode", value=float("nan"))
    assert journal.path.read_bytes() == before
    assert len(journal.events) == 1


HOLD = """
import sys, time
from sb3_offline_ft.trial.journal import Journal
with Journal(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_that_the_trial_is_locked(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path, [{"reason": "a"}]))
    command = [sys.executable, "-c", HOLD, str(journal.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=r"Another process works on the trial.*wait until it is done"):
            journal.append("episode")
        # Reading needs no lock
        assert len(Journal(journal.path).events) == 1
        other.stdin.close()
    journal.append("episode")
    assert len(journal.events) == 2


def test_what_another_process_wrote_is_read_before_writing(tmp_path: Path) -> None:
    one = Journal(written(tmp_path, [{"reason": "a"}]))
    other = Journal(one.path)
    other.append("episode", reason="b")
    one.append("episode", reason="c")
    assert [event.get("reason") for event in one.events] == ["a", "b", "c"]
    assert Journal(one.path).events == one.events
