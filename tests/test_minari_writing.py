"""New datasets on disks that fill up, beside other writers, and in processes that are killed: nothing is lost unsaid."""

import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from sb3_offline_ft import load_dataset
from sb3_offline_ft.datasets.files import minari_writing
from sb3_offline_ft.datasets.files.minari_writing import FailsafeFile, write_minari
from sb3_offline_ft.datasets.tools.collect import collect_dataset
from sb3_offline_ft.datasets.tools.convert import convert_logs

pytestmark = pytest.mark.usefixtures("minari_root")

SPACES: dict[str, Any] = {
    "observation_space": spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "action_space": spaces.Box(-1, 1, (1,), np.float32),
}


def episodes(n: int, value: float = 0.0, length: int = 100) -> Iterator[EpisodeBuffer]:
    """Episodes that do not compress; the last action of each says which data they are of."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield EpisodeBuffer(
            observations=rng.normal(size=(length + 1, 4)).astype(np.float32),
            actions=np.full((length, 1), value, np.float32),
            rewards=rng.normal(size=length),
            terminations=np.zeros(length, np.bool_),
            truncations=np.arange(length) == length - 1,
        )


def assert_nothing_hidden(*folders: Path) -> None:
    assert not [path for folder in folders for path in folder.rglob("*") if path.name.startswith((".", "tmp"))]


def run(arguments: list[str], root: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "MINARI_DATASETS_PATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", "sb3_offline_ft", "dataset", *arguments],
        env=environment, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def limit_files() -> None:
    """No file of this process may grow beyond 60 kB; Python ignores the signal, so that writing raises ``OSError``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with room for 100 kB, and what a process needs to find it so: a disk where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    )
    yield folder, {} if mounted else {"preexec_fn": limit_files}
    if mounted:
        subprocess.check_call(["umount", str(folder)])


@pytest.fixture
def full_at(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the files in Minari's folder grow to a size only."""

    def fill(most: int) -> None:
        # Where the bytes of a file go to the disk, which has no public name
        write_all = minari_writing._write_all

        def write(file: io.FileIO, data: memoryview) -> None:
            room = most - file.tell()
            if not Path(str(file.name)).is_relative_to(minari_root) or room >= len(data):
                return write_all(file, data)
            file.write(data[: max(room, 0)])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(minari_writing, "_write_all", write)

    return fill


class TestFullDisk:
    RECORD = ("collect", "--id", "my/full-v0", "--env", "Pendulum-v1", "--random", "--steps", "6000")

    def test_the_command_says_in_one_line_what_is_lost(self, small_disk: tuple[Path, dict[str, Any]]) -> None:
        disk, options = small_disk
        made = run([*self.RECORD], disk, **options)
        assert made.returncode == 1 and made.stdout == ""
        (line,) = made.stderr.splitlines()
        assert re.search(
            r"Cannot write 'my/full-v0' to '.*disk': (No space left on device|File too large) \(.* were free\)", line
        )
        assert re.search(r"\d+ episodes \([\d,]+ steps\) were complete and are lost.*--keep-in", line)
        assert not list(disk.rglob("*.hdf5"))
        assert_nothing_hidden(disk)

    def test_a_file_that_may_not_grow(self, tmp_path: Path, minari_root: Path) -> None:
        """The spare folder is no better."""
        made = run([*self.RECORD, "--keep-in", str(tmp_path / "spare")], minari_root, preexec_fn=limit_files)
        (line,) = made.stderr.splitlines()
        assert made.returncode == 1 and "File too large" in line and "Nor is there room in" in line and "are lost" in line
        assert not list(tmp_path.rglob("*.hdf5"))
        assert_nothing_hidden(tmp_path)

    def test_the_command_goes_on_in_the_folder_to_keep_it_in(
        self, small_disk: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        disk, options = small_disk
        if options:
            # Limits of the process hold in all folders: another process fills the place here
            (disk / "my").write_text("in the way")
        made = run([*self.RECORD, "--keep-in", str(tmp_path / "spare")], disk)
        assert made.returncode == 1 and len(made.stderr.splitlines()) == 1
        folder = tmp_path / "spare" / "my" / "full-v0"
        assert f"30 episodes (6,000 steps) are kept in {str(folder)!r}" in made.stderr
        assert load_dataset(folder).episode_lengths.tolist() == [200] * 30
        assert_nothing_hidden(disk, tmp_path / "spare")

    @pytest.mark.parametrize("most", [0, 5_000, 20_000, 36_000])
    def test_whatever_the_moment(self, most: int, full_at: Callable[[int], None], tmp_path: Path, minari_root: Path) -> None:
        write_minari("my/whole-v0", episodes(12), **SPACES)
        whole = load_dataset("my/whole-v0")
        assert (minari_root / "my/whole-v0/data/main_data.hdf5").stat().st_size > 36_000
        full_at(most)
        with pytest.raises(OSError, match=r"No space left on device \(.* were free\)\. [01]?\d episodes .* are lost"):
            write_minari("my/full-v0", episodes(12), **SPACES)
        with pytest.raises(OSError, match=r"No space left .* 12 episodes \(1,200 steps\) are kept in '.*/spare/my/full-v0'"):
            write_minari("my/full-v0", episodes(12), keep_in=tmp_path / "spare", **SPACES)
        assert load_dataset(tmp_path / "spare/my/full-v0").fingerprint == whole.fingerprint
        with pytest.raises(OSError, match=r"are kept in '.*/spare/my/full-v1'"):
            write_minari("my/full-v0", episodes(12), keep_in=tmp_path / "spare", **SPACES)
        assert load_dataset(tmp_path / "spare/my/full-v1").provenance["dataset_id"] == "my/full-v1"
        assert_nothing_hidden(minari_root, tmp_path / "spare")
        assert not (minari_root / "my/full-v0").exists()

    def test_conversions_and_recordings(self, full_at: Callable[[int], None], tmp_path: Path, minari_root: Path) -> None:
        full_at(10_000)
        with pytest.raises(OSError, match=r"30 episodes .* are kept in"):
            convert_logs(
                ["bundled:pendulum-medium?episodes=30"], "my/c-v0", env="Pendulum-v1", keep_in=tmp_path / "spare"
            )  # fmt: skip
        with pytest.raises(OSError, match=r"10 episodes .* are kept in"):
            collect_dataset("my/r-v0", "Pendulum-v1", algorithm="random", n_episodes=10, keep_in=tmp_path / "spare")
        expected = load_dataset("bundled:pendulum-medium?episodes=30")
        assert load_dataset(tmp_path / "spare/my/c-v0").fingerprint == expected.fingerprint
        assert len(load_dataset(tmp_path / "spare/my/r-v0")) == 2_000

    def test_what_goes_wrong_at_the_end(self, minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_minari("my/old-v0", episodes(2, value=0.5), **SPACES)
        replace = os.replace

        def fail(source: Any, target: Any) -> None:
            if Path(target).is_relative_to(minari_root):
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"Disk quota exceeded \(.*2 episodes \(200 steps\) were complete and are lost"):
            write_minari("my/old-v0", episodes(2), overwrite=True, **SPACES)
        with pytest.raises(OSError, match=r"Disk quota exceeded \(.*are kept in '.*spare/my/old-v0'"):
            write_minari("my/old-v0", episodes(2), overwrite=True, keep_in=tmp_path / "spare", **SPACES)
        assert load_dataset("my/old-v0").actions[0, 0] == 0.5 and load_dataset(tmp_path / "spare/my/old-v0").actions[0, 0] == 0
        assert_nothing_hidden(minari_root, tmp_path / "spare")

    def test_an_error_of_the_source_is_no_error_of_the_disk(self, minari_root: Path) -> None:
        def broken() -> Iterator[EpisodeBuffer]:
            yield from episodes(1)
            raise OSError("the robot does not answer")

        with pytest.raises(OSError, match=r"^the robot does not answer$"):
            write_minari("my/x-v0", broken(), **SPACES)
        assert_nothing_hidden(minari_root)

    @pytest.mark.parametrize("has_spare", [False, True])
    def test_the_file_reads_as_one_that_never_failed(
        self, has_spare: bool, full_at: Callable[[int], None], minari_root: Path, tmp_path: Path
    ) -> None:
        rng, expected = np.random.default_rng(0), io.BytesIO()
        full_at(3_000)
        with FailsafeFile(minari_root / "file") as file:
            file.spare = tmp_path / "spare" if has_spare else None
            for _ in range(2_000):
                place, size = (int(number) for number in rng.integers(0, 5_000, 2))
                assert file.seek(place) == expected.seek(place)
                if rng.random() < 0.5:
                    data = rng.bytes(size // 10)
                    assert file.write(data) == expected.write(data)
                else:
                    assert file.read(size) == expected.read(size)
                assert file.seek(0, os.SEEK_END) == expected.seek(0, os.SEEK_END)
            assert file.error is not None and file.path == (tmp_path / "spare" if has_spare else None)
            if has_spare:
                assert (tmp_path / "spare").read_bytes() == expected.getvalue() and not (minari_root / "file").exists()


MEETING = '''
import os, pathlib, time
import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class Meeting(PendulumEnv):
    """Waits in its first step until two of its kind have come so far."""
    met = False
    def step(self, action):
        if not self.met:
            pathlib.Path("here", str(os.getpid())).touch()
            while len(os.listdir("here")) < 2:
                time.sleep(0.01)
            self.met = True
        return super().step(action)

gym.register("Meeting-v0", Meeting, max_episode_steps=50)
'''


class TestOthers:
    def test_two_recordings_at_once_lose_nothing(self, tmp_path: Path, minari_root: Path) -> None:
        (tmp_path / "meeting.py").write_text(MEETING)
        (tmp_path / "here").mkdir()
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{tmp_path}", "COLUMNS": "400"}
        command = [sys.executable, "-m", "sb3_offline_ft", "dataset", "collect", "--id", "my/both-v0", "--random"]
        both = [
            subprocess.Popen(
                [*command, "--env", "meeting:Meeting-v0", "--n-episodes", str(index + 1)],
                cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip
        answers = [(*process.communicate(timeout=120), process.returncode) for process in both]
        assert sorted(code for _, _, code in answers) == [0, 1], answers
        (loser,) = (index for index, (_, _, code) in enumerate(answers) if code)
        (line,) = answers[loser][1].splitlines()
        assert "'my/both-v0' was made by something else in the meantime" in line
        assert f"{loser + 1} episodes ({50 * (loser + 1)} steps), is kept in {str(minari_root / 'my/both-v1')!r}" in line
        assert load_dataset("my/both-v0").n_episodes == 2 - loser and load_dataset("my/both-v1").n_episodes == loser + 1
        assert load_dataset("my/both-v1").provenance["dataset_id"] == "my/both-v1"
        assert_nothing_hidden(minari_root)

    @pytest.mark.parametrize("keeps", [False, True])
    def test_a_dataset_made_meanwhile_is_left_alone(self, keeps: bool, minari_root: Path, tmp_path: Path) -> None:
        def slow() -> Iterator[EpisodeBuffer]:
            yield from episodes(1)
            for version in (0, 1):
                write_minari(f"my/x-v{version}", episodes(2, value=0.5), **SPACES)

        kept = tmp_path / "spare/my/x-v0" if keeps else minari_root / "my/x-v2"
        with pytest.raises(FileExistsError, match=rf"in the meantime.*1 episodes \(100 steps\), is kept in '{kept}'"):
            write_minari("my/x-v0", slow(), keep_in=tmp_path / "spare" if keeps else None, **SPACES)
        assert len(load_dataset(kept)) == 100 and len(load_dataset("my/x-v0")) == len(load_dataset("my/x-v1")) == 200
        assert_nothing_hidden(minari_root, tmp_path)

    def test_with_overwrite_the_last_one_stays(self, minari_root: Path) -> None:
        def slow() -> Iterator[EpisodeBuffer]:
            yield from episodes(1)
            write_minari("my/x-v0", episodes(2, value=0.5), **SPACES)

        write_minari("my/x-v0", slow(), overwrite=True, **SPACES)
        assert len(load_dataset("my/x-v0")) == 100
        assert_nothing_hidden(minari_root)

    def test_a_folder_or_file_in_the_way(self, minari_root: Path) -> None:
        def slow(name: str, make: Callable[[Path], Any]) -> Iterator[EpisodeBuffer]:
            yield from episodes(1)
            make(minari_root / name)

        # An empty folder holds no data
        write_minari("a-v0", slow("a-v0", Path.mkdir), **SPACES)
        with pytest.raises(FileExistsError, match=r"is kept in '.*b-v1'"):
            write_minari("b-v0", slow("b-v0", Path.touch), **SPACES)
        with pytest.raises(OSError, match=r"Cannot write 'sp/c-v0' to .*1 episodes \(100 steps\) were complete and are lost"):
            write_minari("sp/c-v0", slow("sp", Path.touch), **SPACES)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_minari_writing import SPACES, episodes
from sb3_offline_ft.datasets.files import minari_writing

calls, replace = 0, os.replace

def replace_or_die(source, target):
    global calls
    calls += 1
    if calls == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
if not {can_exchange}:
    minari_writing._exchange = lambda one, other: False
minari_writing.write_minari("my/x-v0", episodes(3, value=1.0), overwrite=True, **SPACES)
"""


@pytest.mark.parametrize(("die_at", "can_exchange"), [(1, True), (2, True), (1, False), (2, False), (3, False), (4, False)])
def test_a_kill_while_replacing_leaves_the_old_or_the_new_dataset(die_at: int, can_exchange: bool, minari_root: Path) -> None:
    write_minari("my/x-v0", episodes(2, value=0.5), **SPACES)
    script = KILLED.format(tests=str(Path(__file__).parent), die_at=die_at, can_exchange=can_exchange)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    code = subprocess.call([sys.executable, "-c", script], env=environment, timeout=120)
    n_calls = 1 if can_exchange and sys.platform == "linux" else 3
    assert code == (-signal.SIGKILL if die_at <= n_calls else 0)
    data = load_dataset("my/x-v0")
    assert (len(data), data.actions[0, 0]) == ((200, 0.5) if die_at <= n_calls else (300, 1.0))
    with pytest.raises(FileExistsError, match="There is a dataset 'my/x-v0' already"):
        write_minari("my/x-v0", episodes(1), **SPACES)
    write_minari("my/x-v0", episodes(1), overwrite=True, **SPACES)
    assert len(load_dataset("my/x-v0")) == 100


def test_a_dataset_that_was_hidden_is_found_by_the_next_writer_too(minari_root: Path) -> None:
    write_minari("my/x-v0", episodes(2), **SPACES)
    os.replace(minari_root / "my/x-v0", minari_root / "my/.x-v0.replaced")
    with pytest.raises(FileExistsError, match="There is a dataset 'my/x-v0' already"):
        write_minari("my/x-v0", episodes(1), **SPACES)
    assert len(load_dataset("my/x-v0")) == 200
