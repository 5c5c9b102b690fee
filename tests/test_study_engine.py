"""The queue of a study's cells: taken by one worker only, done once, whatever happens to workers and storages."""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy import event

from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine import queue as queue_module
from sb3_offline_ft.study.engine.folder import CellResult
from sb3_offline_ft.study.engine.queue import (
    ERROR,
    INTERRUPTED,
    KEY,
    MOST_LOSSES,
    SUPERSEDED,
    CellState,
    StudyQueue,
)
from sb3_offline_ft.study.engine.results import study_results
from sb3_offline_ft.study.engine.status import show_status
from sb3_offline_ft.tuning.storage import describe_trial, open_storage, without_password
from tests.study_runs import STUDY, write_study

MakeQueue = Callable[..., StudyQueue]


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shared.log") if request.param == "journal" else f"sqlite:///{tmp_path / 'shared.db'}"


@pytest.fixture
def make_queue(tmp_path: Path, storage: str) -> Iterator[MakeQueue]:
    """A queue as another process would open it."""
    write_study(tmp_path / "study")
    made = []

    def make(folder: Path = tmp_path / "study") -> StudyQueue:
        made.append(StudyQueue(Protocol.load(folder), storage))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


def states(queue: StudyQueue) -> list[str]:
    return [str(status.state) for status in queue.statuses()]


def a_result(queue: StudyQueue, key: str, value: float = 1.5, episodes: int = 1) -> CellResult:
    counted = np.arange(episodes, dtype=np.int64)
    manifest = {"key": key, "guarded": False, "name": queue.cells[key][0].name}
    ones = np.full((1, 1), value)
    return CellResult(np.zeros(1, np.int64), ones, ones.astype(np.int64), counted, counted / 7, [], manifest)


def test_cells_are_enqueued_once_and_taken_in_the_order_of_the_protocol(make_queue: MakeQueue) -> None:
    queue = make_queue()
    assert queue.enqueue() == 6
    assert queue.enqueue() == make_queue().enqueue() == 0
    names = []
    while (claim := queue.claim(list(queue.cells))) is not None:
        names.append(claim.cell.name)
        claim.report(0, 1.0)
        claim.finish(a_result(queue, claim.key))
    assert names == [cell.name for cell in queue.protocol.cells()]
    assert states(queue) == ["done"] * 6
    assert make_queue().enqueue() == 0


def test_many_workers_take_each_cell_once(make_queue: MakeQueue, tmp_path: Path) -> None:
    write_study(tmp_path / "study", seeds=4)
    make_queue().enqueue()
    taken: list[str] = []
    start = threading.Barrier(4)

    def think(_: Any, __: Any, statement: str, *___: Any) -> None:
        # What was read before may be outdated now
        if statement.startswith("UPDATE trials"):
            time.sleep(0.02)

    def work() -> None:
        queue = make_queue()
        if isinstance(queue.storage, RDBStorage):
            event.listen(queue.storage.engine, "before_cursor_execute", think)
        start.wait()
        while (claim := queue.claim(list(queue.cells))) is not None:
            taken.append(claim.cell.name)
            claim.finish(a_result(queue, claim.key))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue = make_queue()
    assert sorted(taken) == sorted(cell.name for cell in queue.protocol.cells())
    assert set(states(queue)) == {"done"}


def test_what_was_enqueued_twice_is_run_once(make_queue: MakeQueue) -> None:
    first, second = make_queue(), make_queue()
    key = next(iter(first.cells))
    # Both saw that there was none
    for queue in (first, second, second):
        queue.study.enqueue_trial({}, user_attrs={KEY: key})
    claim = first.claim([key])
    assert claim is not None and claim.number == 0
    assert second.claim([key]) is None
    # One that was taken before the other was looked at is put back; only of two processes at once one takes the second
    assert second._take(key, 1) is None
    second.enqueue([key])
    claim.finish(a_result(first, key))
    trials = first.study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert all(SUPERSEDED in trial.user_attrs for trial in trials[1:])
    assert states(first)[0] == "done" and second.claim([key]) is None


def test_results_are_exact_however_long_they_are(make_queue: MakeQueue, tmp_path: Path) -> None:
    queue = make_queue()
    queue.enqueue()
    claim = queue.claim(list(queue.cells))
    assert claim is not None
    written = a_result(queue, claim.key, episodes=20_000)
    written.manifest["quotes"] = [""] * 20_000
    assert claim.finish(written)
    # MySQL cuts off what is longer
    attributes = queue.study.get_trials()[0].user_attrs
    assert all(len(json.dumps(value)) < 65_535 for value in attributes.values())
    # A machine that shares the storage only
    elsewhere = make_queue(write_study(tmp_path / "elsewhere"))
    elsewhere.restore_run_folders()
    for each in (queue, elsewhere):
        read = each.local_result(claim.key)
        assert read is not None
        np.testing.assert_array_equal(read.training_returns, written.training_returns)
    results = study_results(elsewhere.protocol.folder, elsewhere.location)
    assert [run.key for run in results.runs] == [claim.key] and len(results.missing) == 5


def test_failed_cells_are_tried_again_only_if_asked_for(make_queue: MakeQueue) -> None:
    queue = make_queue()
    key = next(iter(queue.cells))
    queue.enqueue([key])
    claim = queue.claim([key])
    assert claim is not None
    assert claim.fail("Traceback (most recent call last):\nValueError: no")
    assert states(queue)[0] == "failed"
    assert queue.enqueue([key]) == 0 and queue.claim([key]) is None
    (failed,) = study_results(queue.protocol.folder, queue.location).failed.items()
    assert failed[0].name == claim.cell.name and failed[1].endswith("ValueError: no")
    assert queue.enqueue([key], retry_failed=True) == 1
    assert states(queue)[0] == "waiting"
    again = queue.claim([key])
    assert again is not None and again.finish(a_result(queue, key))
    assert states(queue)[0] == "done"


def test_a_cell_that_is_given_back_waits_again(make_queue: MakeQueue) -> None:
    queue = make_queue()
    key = next(iter(queue.cells))
    queue.enqueue([key])
    for _ in range(MOST_LOSSES + 1):
        claim = queue.claim([key])
        assert claim is not None and states(queue)[0] == "running"
        claim.report(0, 1.0)
        claim.give_back()
        assert states(queue)[0] == "waiting"
    last = queue.statuses([key])[0]
    assert last.last_evaluation is None
    assert sum(INTERRUPTED in trial.user_attrs for trial in queue.study.get_trials()) == MOST_LOSSES + 1


def lose(queue: StudyQueue, number: int, storage: str, release: Callable[[], None]) -> None:
    """What a worker leaves behind that is killed."""
    release()
    if storage.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(storage.removeprefix("sqlite:///"))) as database, database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")


def test_the_cell_of_a_dead_worker_runs_again(make_queue: MakeQueue, storage: str) -> None:
    dead, alive = make_queue(), make_queue()
    key = next(iter(dead.cells))
    dead.enqueue([key])
    claim = dead.claim([key])
    assert claim is not None
    assert alive.enqueue([key]) == 0 and states(alive)[0] == "running"
    lose(dead, claim.number, storage, claim.let_go)
    assert alive.enqueue([key]) == 1 and states(alive)[0] == "waiting"
    again = alive.claim([key])
    assert again is not None and again.number == 1
    # The dead one was only asleep
    with pytest.raises(UpdateFinishedTrialError):
        claim.report(0, 1.0)
    assert not claim.finish(a_result(dead, key))
    assert again.finish(a_result(alive, key))
    assert [trial.state for trial in alive.study.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_cell_that_always_kills_its_worker_counts_as_failed(make_queue: MakeQueue, storage: str) -> None:
    queue = make_queue()
    key = next(iter(queue.cells))
    for loss in range(MOST_LOSSES):
        assert queue.enqueue([key]) == 1, loss
        claim = queue.claim([key])
        assert claim is not None
        claim.let_go()
        queue.lost(claim.number)
    assert queue.enqueue([key]) == 0
    assert states(queue)[0] == "failed"
    assert "died 5 times" in str(queue.statuses([key])[0].error)


def test_workers_do_not_wait_for_the_same_pretraining_if_there_is_other_work(tmp_path: Path) -> None:
    methods = {name: STUDY["methods"][name] for name in ("offline", "td3")}
    queue = StudyQueue(Protocol.load(write_study(tmp_path / "study", methods=methods)))
    keys = list(queue.cells)
    queue.enqueue()
    names = []
    claims = []
    for _ in range(2):
        claim = queue.claim(keys)
        assert claim is not None
        claims.append(claim)
        names.append(claim.cell.name)
    assert names == ["medium/offline/seed0", "medium/offline/seed1"]
    # The second one's pretraining is over, the first one's is not
    claims[1].report(0, 1.0)
    third, fourth = queue.claim(keys), queue.claim(keys)
    assert third is not None and third.cell.name == "medium/td3/seed1"
    # Better to wait for a pretraining than to do nothing
    assert fourth is not None and fourth.cell.name == "medium/td3/seed0"


def test_nor_if_two_look_at_the_same_moment(make_queue: MakeQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker takes a cell just after this one has seen that it waits."""
    write_study(tmp_path / "study", methods={name: STUDY["methods"][name] for name in ("offline", "td3")})
    slow, quick = make_queue(), make_queue()
    keys = list(slow.cells)
    slow.enqueue()
    hold = slow.liveness.hold

    def outrun(number: int) -> Callable[[], None] | None:
        monkeypatch.undo()
        first = quick.claim(keys)
        assert first is not None and first.number == number
        return hold(number)

    monkeypatch.setattr(slow.liveness, "hold", outrun)
    claim = slow.claim(keys)
    assert claim is not None and claim.cell.name == "medium/offline/seed1"


def test_what_is_added_to_a_study_runs_and_what_was_changed_runs_anew(make_queue: MakeQueue, tmp_path: Path) -> None:
    queue = make_queue()
    queue.enqueue()
    while (claim := queue.claim(list(queue.cells))) is not None:
        claim.finish(a_result(queue, claim.key))
    write_study(tmp_path / "study", seeds=3)
    assert make_queue().enqueue() == 3
    changed = STUDY["methods"] | {"td3": {"algorithm": "td3", "hyperparams": {"tau": 0.01}}}
    write_study(tmp_path / "study", methods=changed)
    queue = make_queue()
    assert queue.enqueue() == 2
    assert states(queue) == ["done", "done", "waiting"] * 2
    # The old ones are still there
    write_study(tmp_path / "study")
    assert set(states(make_queue())) == {"done"}


def test_cells_that_are_the_same_run_once(tmp_path: Path) -> None:
    datasets = dict.fromkeys(("medium", "the-same"), "bundled:pendulum-medium")
    methods = {"td3": {"algorithm": "td3"}}
    queue = StudyQueue(Protocol.load(write_study(tmp_path / "study", datasets=datasets, methods=methods, seeds=1)))
    assert queue.enqueue() == 1
    claim = queue.claim(list(queue.cells))
    assert claim is not None
    claim.finish(a_result(queue, claim.key))
    assert states(queue) == ["done", "done"]
    runs = study_results(tmp_path / "study").runs
    assert [run.result.manifest["name"] for run in runs] == ["medium/td3/seed0", "the-same/td3/seed0"]


def test_half_written_run_folders_are_made_anew(make_queue: MakeQueue, tmp_path: Path) -> None:
    queue = make_queue()
    queue.enqueue()
    claim = queue.claim(list(queue.cells))
    assert claim is not None
    claim.finish(a_result(queue, claim.key))
    (manifest,) = (tmp_path / "study" / "runs").rglob("manifest.json")
    whole = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    for half in (
        lambda: manifest.unlink(),
        lambda: manifest.write_text('{"key"'),
        lambda: manifest.with_name("training.npz").unlink(),
    ):
        half()
        with pytest.warns(UserWarning, match="scratch/seed0-.* The cell counts as not run"):
            assert queue.local_result(claim.key) is None
            queue.restore_run_folders()
        assert {path.name: path.read_bytes() for path in manifest.parent.iterdir()} == whole


def test_a_journal_that_ends_within_a_line_can_be_written_again(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    StudyQueue(Protocol.load(folder)).enqueue()
    with (folder / "study.log").open("ab") as journal:
        # A worker was killed just then
        journal.write(b'{"op_code":8,"worker_id":"' + b"0" * 100_000)
    queue = StudyQueue(Protocol.load(folder))
    assert states(queue) == ["waiting"] * 6
    claim = queue.claim(list(queue.cells))
    assert claim is not None and claim.finish(a_result(queue, claim.key))
    assert states(StudyQueue(Protocol.load(folder))) == ["done", *["waiting"] * 5]
    for line in (folder / "study.log").read_text().splitlines():
        json.loads(line)


def test_other_data_under_the_same_name_is_an_error(tmp_path: Path) -> None:
    rows = {
        "observations": np.zeros((20, 3), np.float32),
        "actions": np.zeros((20, 1), np.float32),
        "rewards": np.arange(20, dtype=np.float32),
        "next_observations": np.zeros((20, 3), np.float32),
        "terminations": np.zeros(20, np.bool_),
        "truncations": np.arange(20) % 10 == 9,
    }
    storage = str(tmp_path / "shared.log")
    folders = [write_study(tmp_path / name, datasets={"mine": "data.npz"}) for name in ("here", "there")]
    for factor, folder in enumerate(folders):
        np.savez(folder / "data.npz", **(rows | {"rewards": rows["rewards"] * (factor + 1)}))
    StudyQueue(Protocol.load(folders[0]), storage).check_data()
    with pytest.raises(ValueError, match=r"datasets\.mine .* is not what the study 'tiny' was begun with"):
        StudyQueue(Protocol.load(folders[1]), storage).check_data()


def test_storages_that_cannot_be_reached_are_named_without_the_password(tmp_path: Path) -> None:
    protocol = Protocol.load(write_study(tmp_path / "study"))
    with pytest.raises(OSError, match="cannot be opened") as error:
        StudyQueue(protocol, "postgresql://me:secret@127.0.0.1:1/studies?connect_timeout=2")
    assert "secret" not in str(error.value) and "me:***@127.0.0.1:1/studies" in str(error.value)
    with pytest.raises(FileNotFoundError, match="There is no storage"):
        StudyQueue(protocol, str(tmp_path / "none.log"), create=False)
    open_storage(str(tmp_path / "other.log"), create=True)
    with pytest.raises(FileNotFoundError, match=r"There is no study 'tiny' in .*other\.log: it has none"):
        StudyQueue(protocol, str(tmp_path / "other.log"), create=False)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        StudyQueue(protocol, str(tmp_path / "file" / "study.log"))
    assert without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql://127.0.0.1:1/db?user=me&password=sesame",
        "postgresql+psycopg://me@127.0.0.1:1/db?sslpassword=sesame&sslcert=none",
        "mysql+pymysql://127.0.0.1:1/db?passwd=sesame",
        "postgresql//me:sesame@host/db",
        "postgresql://me:sesame@host:port/db",
        "me:sesame@host/db",
        "host=here password=sesame",
        "sqlite:///none.db?auth_token=sesame",
    ],
)
def test_passwords_are_shown_to_nobody(storage: str) -> None:
    assert "sesame" not in without_password(storage)
    with pytest.raises((OSError, ValueError, ImportError)) as caught:
        open_storage(storage, create=False)
    assert "sesame" not in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, ValueError) or "`--storage` is" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Query string argument")
def test_looking_up_a_trial_shows_no_password(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}?password=sesame"
    open_storage(storage, create=True)
    with pytest.raises(ValueError, match=r"There is no study 'mine' in sqlite:///.*password=hidden: it has none") as caught:
        describe_trial(storage, "mine", 0)
    assert "sesame" not in str(caught.value)


def test_a_database_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "RETRY_SECONDS", (0.1,) * 50)
    queue = StudyQueue(Protocol.load(write_study(tmp_path / "study")), f"sqlite:///{tmp_path / 'shared.db'}")
    queue.enqueue()
    claim = queue.claim(list(queue.cells))
    assert claim is not None
    with sqlite3.connect(tmp_path / "shared.db", check_same_thread=False) as database:
        database.execute("ALTER TABLE trial_user_attributes RENAME TO lost")
        database.execute("ALTER TABLE trial_intermediate_values RENAME TO lost_too")
        database.commit()
        # Nobody needs to know this: it is not tried again
        claim.report(0, 1.0)
        back = threading.Timer(1.0, lambda: database.execute("ALTER TABLE lost RENAME TO trial_user_attributes"))
        back.start()
        assert claim.finish(a_result(queue, claim.key))
        back.join()
        database.execute("ALTER TABLE lost_too RENAME TO trial_intermediate_values")
    assert states(queue)[0] == "done"
    queue.close()
    database.close()


def test_an_answer_that_was_lost_loses_no_result(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "RETRY_SECONDS", (0.0,))
    queue = make_queue()
    queue.enqueue()
    claim = queue.claim(list(queue.cells))
    assert claim is not None
    store = queue.storage.set_trial_state_values

    def lose_answer(*arguments: Any) -> bool:
        store(*arguments)
        monkeypatch.undo()
        raise StorageInternalError("The connection was lost.")

    monkeypatch.setattr(queue.storage, "set_trial_state_values", lose_answer)
    assert claim.finish(a_result(queue, claim.key))
    assert states(queue)[0] == "done"


def test_status_without_a_storage_counts_what_is_in_run_folders(tmp_path: Path) -> None:
    def shown() -> str:
        console = Console(width=160, record=True)
        show_status(folder, None, console=console)
        return console.export_text()

    folder = write_study(tmp_path / "study")
    queue = StudyQueue(Protocol.load(folder))
    queue.enqueue()
    for _ in range(2):
        claim = queue.claim(list(queue.cells))
        assert claim is not None and claim.finish(a_result(queue, claim.key))
    assert "tiny: 2 done, 4 waiting" in shown()
    (folder / "study.log").unlink()
    assert "tiny: 2 done, 4 waiting" in shown()
    # A method's name may be changed
    write_study(folder, methods={f"{name}-2": entry for name, entry in STUDY["methods"].items()})
    assert "tiny: 2 done, 4 waiting" in shown()
    # Of data that is not here nothing can be said, and that of others is found
    write_study(folder, datasets={"medium": "bundled:pendulum-medium", "lost": "lost.npz"})
    assert "tiny: 2 done, 4 waiting, 4 not known" in shown()
    assert "Whether 4 cells ran is not known: the data is not here, and no run knows it." in shown()
    # A storage that does not know them will
    StudyQueue(Protocol.load(write_study(folder))).enqueue()
    assert "tiny: 2 done, 4 waiting" in shown()


def test_status_shows_all_states_and_errors(make_queue: MakeQueue, storage: str, tmp_path: Path) -> None:
    def shown(errors: bool = False, storage: str | None = storage) -> str:
        console = Console(width=160, record=True)
        show_status(tmp_path / "study", storage, errors, console)
        return console.export_text()

    queue = make_queue()
    assert "tiny: 6 waiting" in shown() and "tiny: 6 waiting" in shown(storage=None)
    queue.enqueue()
    done, failed, running = (queue.claim(list(queue.cells)) for _ in range(3))
    assert done is not None and failed is not None and running is not None
    done.finish(a_result(queue, done.key))
    failed.fail("Traceback (most recent call last):\n  somewhere\nValueError: no [bold] way")
    running.report(100, -12.5)
    text = shown()
    assert "tiny: 1 done, 1 running, 3 waiting, 1 failed" in text
    assert "100 of 200" in text and "-12.5" in text and running.cell.name in text
    assert f"{failed.cell.name} failed: ValueError: no [bold] way" in text
    assert "somewhere" not in text and "--errors" in text
    assert "  somewhere\n" in shown(errors=True)
    assert ERROR in queue.study.get_trials()[1].user_attrs
    assert states(queue).count(CellState.RUNNING) == 1
