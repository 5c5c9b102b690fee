"""A study on two machines that share nothing but a PostgreSQL server: two processes with folders of their own."""

import io
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from rich.console import Console

from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine.queue import CellState, StudyQueue
from sb3_offline_ft.study.engine.results import study_results
from sb3_offline_ft.study.engine.run import run_study
from tests.study_environments import CLOSED, GATED_PENDULUM
from tests.study_runs import assert_each_done_once, assert_same, study_run, wait_until, write_study

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")

SECRET = "sesame-7f"


def find_binaries() -> Path | None:
    """The folder of the newest server that is installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    candidates = [*folders, *([Path(on_path).resolve().parent] if on_path else [])]
    return next((folder for folder in candidates if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def account() -> dict[str, Any]:
    """Who the server runs as: it refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("there is no account but root's to run PostgreSQL with")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server that listens on a socket in a folder of its own."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    who = account()
    # pytest's own folders are closed to other users, and too long a path for a socket
    root = Path(tempfile.mkdtemp(prefix="pg"))
    try:
        (root / "password").write_text(SECRET)
        if who:
            for path in (root, root / "password"):
                os.chown(path, who["user"], who["group"])
        data = root / "data"
        options = [
            "--username=researcher",
            f"--pwfile={root / 'password'}",
            "--auth=scram-sha-256",
            "--no-sync",
            "-D",
            str(data),
        ]
        made = subprocess.run([binaries / "initdb", *options], cwd=root, capture_output=True, text=True, **who)
        assert made.returncode == 0, made.stdout + made.stderr
        settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={root}", "-c", "fsync=off"]
        with (root / "log").open("wb") as log, subprocess.Popen(
            [binaries / "postgres", "-D", data, *settings], cwd=root, stdout=log, stderr=log, **who
        ) as process:  # fmt: skip
            url = f"postgresql://researcher:{SECRET}@/postgres?host={quote(str(root), safe='')}"
            try:
                wait_for(url, process, root / "log")
                yield url
            finally:
                # A fast shutdown: sessions are ended
                process.send_signal(signal.SIGINT)
                process.wait(60)
    finally:
        shutil.rmtree(root)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)


def test_machines_share_a_study_through_a_server_and_take_over_from_the_dead(server: str, tmp_path: Path) -> None:
    here, there = (write_study(tmp_path / name, env=GATED_PENDULUM) for name in ("here", "there"))
    gate = tmp_path / CLOSED
    gate.touch()
    options = ("--storage", server)
    with study_run(there, *options, watched=tmp_path) as second:
        with study_run(here, *options, watched=tmp_path) as first:
            wait_until(lambda: evaluations(server) == 2, first)
            with StudyQueue(Protocol.load(here), server, create=False) as queue:
                workers = [str(status.worker) for status in queue.statuses() if status.state is CellState.RUNNING]
            (killed,) = (worker for worker in workers if os.getpgid(int(worker.rpartition(":")[2])) == first.pid)
            os.killpg(first.pid, signal.SIGKILL)
        with psycopg.connect(server) as connection:
            # As it will be after some time
            connection.execute(
                "UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour' WHERE trial_id IN "
                "(SELECT trial_id FROM trial_user_attributes WHERE key = 'worker' AND value_json = %s)",
                (json.dumps(killed),),
            )
        gate.unlink()
        output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert "tiny: 6 done" in output and SECRET not in output
    assert_each_done_once(there, server)

    # The first machine is there again, and finds that nothing is left to do but to write what others found out
    assert run_study(here, storage=server, console=Console(file=io.StringIO())) == {"done": 6}
    assert not (here / "study.log").exists()
    for run, other in zip(*(study_results(folder).runs for folder in (here, there)), strict=True):
        assert_same(run.result, other.result)


def evaluations(server: str) -> int:
    """How many there were in all cells so far."""
    with psycopg.connect(server) as connection:
        try:
            row = connection.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()
        except psycopg.errors.UndefinedTable:
            return 0
    return int(row[0])
