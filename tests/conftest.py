"""Fixtures shared by several test modules."""

import compileall
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.update import Batch
from tests.warm_python import READ_LATE, TIMEOUT, WarmPython

# Small networks: more threads only wait for one another, worst when several tests run at once
th.set_num_threads(1)

# One server forks the processes of SubprocVecEnv and those that a test kills: what they import, it imports once. It begins
# with the first test that needs it, so that a later one cannot ask for more.
multiprocessing.set_forkserver_preload(["stable_baselines3", "sb3_offline_ft.trial.running", "tests.test_trial_running"])

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent


def draw_batch(model: OfflineTD3, batch_size: int) -> Batch:
    """Draws a batch and makes it the one that the model's next update works on, as ``train`` does."""
    return model.draw_batch(batch_size)


RunPython = Callable[..., subprocess.CompletedProcess[str]]


def build(kind: str, project: Path, folder: Path) -> Path:
    """Builds the ``wheel`` or the ``sdist`` of a project with the build backend that is installed: no network is used."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(project)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return next(folder.iterdir())


def pytest_collection_finish() -> None:
    """What the imports and the collection made stays for ever: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """A hook on all optimizers that a test leaves behind sends the kernels of later tests another way."""
    yield
    hooks = [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
    _global_optimizer_pre_hooks.clear()
    _global_optimizer_post_hooks.clear()
    assert not hooks, f"the test leaves hooks on all optimizers: {hooks}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build("wheel", REPOSITORY, tmp_path_factory.mktemp("wheel"))


class Installation:
    """
    A virtual environment in which the wheel is installed, and which borrows the packages that the tests run with.

    A wheel of pure Python is installed by unpacking it, so that Python reads our startup files as it does for users.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        code = "import sys, sysconfig; print(sys.executable, sysconfig.get_path('purelib'), sep='\\n')"
        executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        process = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=True)
        self.python, site_packages = process.stdout.splitlines()
        self.site_packages = Path(site_packages)
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site_packages / "borrowed.pth").write_text("\n".join(borrowed))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site_packages)
        # As pip does
        compileall.compile_dir(self.site_packages, quiet=1)
        self.warm_python: WarmPython | None = None

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs its Python with these arguments, warm if it may be; the variables are added to the environment."""
        if self.warm_python is None or arguments[0] not in ("-m", "-c") or not variables.keys() <= READ_LATE:
            return self.start(*arguments, cwd=cwd, **variables)
        cwd.mkdir(parents=True, exist_ok=True)
        return self.warm_python.run(arguments, cwd, self._environment(variables))

    def start(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Starts its Python with these arguments; the variables are added to the environment."""
        cwd.mkdir(parents=True, exist_ok=True)
        command, environment = [self.python, *arguments], self._environment(variables)
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT)

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if key not in ("SB3_OFFLINE_FT_NO_HOOK", "PYTHONPATH")}
        return inherited | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"} | variables


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation of the wheel for tests that do not change it."""
    installation = Installation(wheel, tmp_path_factory.mktemp("installation"))
    if hasattr(os, "fork"):
        hook = installation.site_packages / "sb3_offline_ft.pth"
        installation.warm_python = WarmPython(installation.python, hook, tmp_path_factory.mktemp("output"))
    yield installation
    if installation.warm_python is not None:
        installation.warm_python.close()


@pytest.fixture
def run_python(installation: Installation, tmp_path: Path) -> RunPython:
    """Runs Python where the wheel is installed, in an empty folder, as a user would."""

    def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return installation.run(*arguments, cwd=cwd or tmp_path / "work", **variables)

    return run


@pytest.fixture
def start_python(installation: Installation, tmp_path: Path) -> RunPython:
    """The same with nothing loaded before, for what is about the start itself and what it loads."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return installation.start(*arguments, cwd=tmp_path / "work", **variables)

    return run


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which Minari looks for local datasets."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root
