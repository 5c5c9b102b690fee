"""Files that a full disk, a kill or a signal leaves whole, and what killed processes left behind."""

import ctypes
import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from typer.testing import CliRunner

from sb3_offline_ft import TD3BC
from sb3_offline_ft.cli import app
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.leftovers import owned_name, remove_leftovers, temporary_folder
from sb3_offline_ft.common.reporting import reporting
from sb3_offline_ft.common.statistics_file import WholeVecNormalize
from sb3_offline_ft.common.termination import Terminated, held, raising_terminated
from sb3_offline_ft.study.engine.queue import StudyQueue
from tests.conftest import REPOSITORY, RunPython
from tests.made_up_study import result_of, write_study
from tests.reported_studies import ONE_DATASET, methods

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu"}


def learner(**settings: Any) -> TD3BC:
    return TD3BC("MlpPolicy", gym.make("Pendulum-v1"), **SMALL, **settings)


def in_child(action: Callable[[], None], *, limit: int | None = None, kill_at: int | None = None) -> int:
    """Exit code of a forked process that may write files of so many bytes, or is killed at the so many-th sync."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    syncs, fsync = 0, os.fsync

    def counted(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    try:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        action()
    except OSError:
        os._exit(28)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:TD3BC has neither a dataset")
class TestSaving:
    def test_a_full_disk_or_a_kill_leaves_the_old_model_buffer_and_statistics(self, tmp_path: Path) -> None:
        venv = WholeVecNormalize(make_vec_env("Pendulum-v1"))
        model = TD3BC("MlpPolicy", venv, **SMALL)
        model.learn(300)
        saves: dict[str, Callable[[str], None]] = {
            "model.zip": model.save, "buffer.npz": model.save_replay_buffer, "statistics.pkl": venv.save
        }  # fmt: skip
        for name, save in saves.items():
            file = tmp_path / name
            file.write_bytes(b"old")
            assert in_child(lambda save=save, file=file: save(str(file)), limit=1000) == 28  # type: ignore[misc]
            assert in_child(lambda save=save, file=file: save(str(file)), kill_at=1) == -signal.SIGKILL  # type: ignore[misc]
            assert file.read_bytes() == b"old" and len(list(tmp_path.glob(f".{name}.*"))) == 1
            save(str(file))
            assert file.read_bytes() != b"old" and not list(tmp_path.glob(".*")), "what the killed one left is gone"
        assert TD3BC.load(tmp_path / "model.zip").num_timesteps == 300
        loaded = VecNormalize.load(str(tmp_path / "statistics.pkl"), make_vec_env("Pendulum-v1"))
        assert type(loaded) is VecNormalize and loaded.obs_rms.mean.tolist() == venv.obs_rms.mean.tolist()  # type: ignore[union-attr]
        assert b"sb3_offline_ft" not in (tmp_path / "statistics.pkl").read_bytes(), "SB3 reads it without this package"

    def test_names_and_streams_are_those_of_sb3(self, tmp_path: Path) -> None:
        model = learner()
        model.save(tmp_path / "new" / "model")
        (tmp_path / "taken.zip").mkdir()
        with pytest.warns(UserWarning, match=r"taken.zip' is a folder. Will save instead to .*taken.zip_2"):
            model.save(tmp_path / "taken")
        stream = io.BytesIO()
        model.save(stream)  # type: ignore[arg-type]
        with (tmp_path / "opened").open("wb") as file:
            model.save(file)  # type: ignore[arg-type]
        (tmp_path / "link.zip").symlink_to(tmp_path / "new" / "model.zip")
        model.save(tmp_path / "link")
        assert (tmp_path / "link.zip").is_symlink()
        for place in ("new/model.zip", "taken.zip_2", "opened"):
            with zipfile.ZipFile(tmp_path / place) as archive:
                assert archive.testzip() is None
        stream.seek(0)
        assert TD3.load(stream).action_space == model.action_space

    def test_links_modes_and_devices_stay_what_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file, link, pipe = (tmp_path / name for name in ("statistics.pkl", "link.pkl", "pipe"))
        file.write_bytes(b"old")
        file.chmod(0o600)
        link.symlink_to(file)
        WholeVecNormalize(make_vec_env("Pendulum-v1")).save(str(link))
        assert link.is_symlink() and file.read_bytes() != b"old" and stat.S_IMODE(file.stat().st_mode) == 0o600
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with atomic_write(pipe) as stream:
            stream.write(b"x")
        assert os.read(reader, 2) == b"x" and pipe.is_fifo()
        os.close(reader)
        monkeypatch.chdir(tmp_path)
        with atomic_write("relative") as stream:
            monkeypatch.chdir("/")
            stream.write(b"x")
        assert (tmp_path / "relative").read_bytes() == b"x" and not list(tmp_path.glob(".*"))

    def test_threads_write_at_once_and_leave_the_umask(self, tmp_path: Path) -> None:
        def write(number: int) -> None:
            for _ in range(100):
                with atomic_write(tmp_path / str(number % 2)) as file:
                    file.write(bytes([number]) * 1000)

        before = os.umask(0o027)
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(write, range(8)))
        finally:
            after = os.umask(before)
        assert after == 0o027
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert len(content) == 1000 and len(set(content)) == 1 and stat.S_IMODE(path.stat().st_mode) == 0o640


class TestLeftovers:
    def test_only_those_of_dead_processes_are_removed(self, tmp_path: Path) -> None:
        folder = temporary_folder(tmp_path, "mine")
        (folder / "content").write_bytes(b"x")
        own = f"{owned_name('data.csv')}.abcdefgh.tmp"
        place, _, rest = own.split(".")[-3].partition("-")
        number, start = rest.split("-")
        dead = subprocess.Popen([sys.executable, "-c", ""])
        # Nobody has asked yet how it ended
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        zombie = f".z.{place}-{dead.pid}-{_start_of_process(dead.pid)}.abcdefgh.tmp"
        (tmp_path / zombie).write_bytes(b"half")
        remove_leftovers(tmp_path)
        assert not (tmp_path / zombie).exists()
        dead.wait()
        gone = [f".x.{place}-{dead.pid}-{start}.abcdefgh.tmp", f".x.{place}-{number}-{int(start) - 1}.abcdefgh"]
        stay = [own, f".x.00000000-{dead.pid}-{start}.abcdefgh.tmp", ".hidden", ".other.abcdefgh.tmp", "x.tmp"]
        for name in (gone[0], *stay):
            (tmp_path / name).write_bytes(b"half")
        (tmp_path / gone[1] / "inside").mkdir(parents=True)
        elsewhere = tmp_path / f".y.00000000-1-{start}.abcdefgh.tmp"
        elsewhere.write_bytes(b"half")
        os.utime(elsewhere, (0, 0))
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, folder.name])
        remove_leftovers(tmp_path / "none")

    def test_long_names_fit(self, tmp_path: Path) -> None:
        with atomic_write(tmp_path / ("ü" * 120)) as file:
            file.write(b"x")
        assert [path.name for path in tmp_path.iterdir()] == ["ü" * 120]


def _start_of_process(number: int) -> str:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]


class TestTermination:
    def test_a_forked_process_ends_at_once_and_who_ignores_the_signal_goes_on_to(self) -> None:
        with raising_terminated():
            process = os.fork()
            if not process:
                try:
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with raising_terminated() as has_come:
                signal.raise_signal(signal.SIGTERM)
                assert not has_come()
        finally:
            signal.signal(signal.SIGTERM, before)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_what_swallows_the_signal_gets_it_again(self) -> None:
        class Swallowing:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
        cleaned = []
        with pytest.raises(Terminated), raising_terminated():
            Swallowing()
            try:
                time.sleep(10)
            finally:
                # Longer than until it would come again
                time.sleep(0.3)
                cleaned.append(True)
        assert cleaned and (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before

    @pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
    def test_what_must_not_be_broken_off_is_finished(self, number: int, error: type[BaseException]) -> None:
        done = []
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(error), raising_terminated():
                with held():
                    os.kill(os.getpid(), number)
                    time.sleep(0.25)
                    done.append("held")
                time.sleep(1)
                done.append("not reached")
        finally:
            signal.signal(signal.SIGINT, before)
        assert done == ["held"]

    def test_a_command_ends_with_143_and_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Exception) as caught, reporting("study run", "interrupted: go on"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert getattr(caught.value, "exit_code", None) == 143
        assert capsys.readouterr().err == "sb3-offline-ft study run: interrupted: go on\n"

    def test_training_in_rl_zoo3_saves_its_model_and_ends_with_143(self, run_python: RunPython, tmp_path: Path) -> None:
        options = ["--algo", "td3bc", "--env", "Pendulum-v1", "-n", "1000000", "--eval-freq", "-1"]
        hyperparams = ["-params", "offline_steps:0", "learning_starts:1000000"]
        ended = run_python("-c", ENDED_AFTER_AN_EPISODE, *options, *hyperparams, cwd=tmp_path)
        assert ended.returncode == 143 and "Ended by SIGTERM: the model is saved in" in ended.stderr, (
            ended.stdout + ended.stderr
        )
        assert "Traceback" not in ended.stderr
        saved = tmp_path / "logs" / "td3bc" / "Pendulum-v1_1" / "Pendulum-v1.zip"
        assert TD3BC.load(saved).num_timesteps > 0


ENDED_AFTER_AN_EPISODE = """
import os, runpy, signal, threading, time
from pathlib import Path

def end():
    while not any(len(path.read_text().splitlines()) > 2 for path in Path("logs").rglob("*.monitor.csv")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end, daemon=True).start()
runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
"""


def give_up_privilege() -> None:
    """Let modes of files hold for root too, in this process."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None)
    assert library.capget(header, data) == 0
    for place in range(3):
        data[place] &= ~2  # CAP_DAC_OVERRIDE
    assert library.capset(header, data) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "capset"), reason="needs Linux")
def test_a_study_that_cannot_be_written_to_can_be_looked_at(tmp_path: Path) -> None:
    protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3") | {"seeds": 1})
    with StudyQueue(protocol) as queue:
        queue.enqueue()
        claim = queue.claim(list(queue.cells))
        assert claim is not None and claim.finish(result_of(protocol, claim.cell))
    folder, output, said = protocol.folder, tmp_path / "elsewhere" / "report.html", tmp_path / "said"
    places = [folder, *folder.rglob("*")]
    for path in places:
        path.chmod(path.stat().st_mode & ~0o222)

    def look() -> None:
        give_up_privilege()
        with pytest.raises(PermissionError):
            (folder / "new").touch()
        for arguments in (["status", str(folder)], ["report", str(folder), "--output", str(output), "--format", "csv"]):
            result = CliRunner().invoke(app, ["study", *arguments])
            with said.open("a") as file:
                file.write(result.output)
            assert result.exit_code == 0

    try:
        code = in_child(look)
    finally:
        for path in places:
            path.chmod(path.stat().st_mode | 0o200)
    assert code == 0, said.read_text()
    assert "1 done" in said.read_text() and output.with_name("results.csv").is_file()


def test_the_committed_kills_lost_nothing() -> None:
    kills = json.loads((REPOSITORY / "benchmarks" / "kills" / "kills.json").read_text())
    commands = ["dataset collect", "dataset convert", "dataset report", "study report", "trial run", "study run"]
    assert [each["command"] for each in kills] == commands
    for each in kills:
        assert each["kills"] >= 30 and each["equal"], each
        assert each["lost"] == each["damaged"] == each["left_at_last"] == 0, each
