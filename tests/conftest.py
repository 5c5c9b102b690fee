"""Fixtures shared by several test modules."""

import os
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

# Small networks: more threads only wait for one another, worst when several tests run at once
th.set_num_threads(1)

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

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs its Python with these arguments; the variables are added to the environment."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("SB3_OFFLINE_FT_NO_HOOK", "PYTHONPATH")}
        environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"} | variables
        cwd.mkdir(parents=True, exist_ok=True)
        return subprocess.run([self.python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """An installation of the wheel for tests that do not change it."""
    return Installation(wheel, tmp_path_factory.mktemp("installation"))


@pytest.fixture
def run_python(installation: Installation, tmp_path: Path) -> RunPython:
    """Runs Python where the wheel is installed, in an empty folder, as a user would."""

    def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return installation.run(*arguments, cwd=cwd or tmp_path / "work", **variables)

    return run


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which Minari looks for local datasets."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root
