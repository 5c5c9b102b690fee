"""What is in the wheel, and what the package promises on import."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sb3_offline_ft
from tests.conftest import REPOSITORY, RunPython, build

STARTUP_FILES = {"_sb3_offline_ft_startup.py", "sb3_offline_ft.pth", "sb3_offline_ft.start"}
PRESETS = {f"sb3_offline_ft/hyperparams/{algo}.yml" for algo in ("td3bc", "td3c", "rebrac")}


def test_the_wheel_holds_the_package_the_startup_files_and_nothing_else(wheel: Path) -> None:
    package = REPOSITORY / "sb3_offline_ft"
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= PRESETS
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert names == expected | STARTUP_FILES
    assert len(licences) == 1
    suffixes = {Path(name).suffix for name in names if name.startswith("sb3_offline_ft/")}
    assert suffixes <= {".py", ".typed", ".yml", ".hdf5", ".json", ".jinja", ".md", ""}


def test_the_wheel_brings_presets_types_and_bundled_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert PRESETS | {"sb3_offline_ft/py.typed"} <= names
    for dataset in ("hopper-medium", "pendulum-medium"):
        assert f"sb3_offline_ft/datasets/bundled/{dataset}/data/main_data.hdf5" in names
        assert f"sb3_offline_ft/datasets/bundled/{dataset}/data/metadata.json" in names


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 10 * 2**20


def test_the_source_distribution_can_build_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", REPOSITORY, tmp_path / "sdist")
    with tarfile.open(archive) as sources:
        sources.extractall(tmp_path / "sources", filter="data")
    unpacked = next((tmp_path / "sources").iterdir())
    assert not {".ci", "benchmarks", "data", "scripts", "logs"} & {path.name for path in unpacked.iterdir()}
    rebuilt = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert {info.filename: info.CRC for info in first.infolist()} == {
            info.filename: info.CRC for info in second.infolist()
        }


def test_the_editable_wheel_brings_the_startup_files_and_leaves_the_module_in_the_checkout(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / process.stdout.split()[-1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        # Presets are copied too, since the build backend knows no pointer to them; the checkout's own are those that count
        pointers = names - {"sb3_offline_ft.pth", "sb3_offline_ft.start"} - PRESETS
        assert len(pointers) == 1
        pointer = pointers.pop()
        assert set(archive.read(pointer).decode().split()) == {str(REPOSITORY)}
        # Startup files are read in alphabetical order: the checkout must be on the path when ours is read.
        assert pointer < "sb3_offline_ft.pth"


def test_importing_the_package_is_cheap(start_python: RunPython) -> None:
    heavy = ("torch", "numpy", "stable_baselines3", "gymnasium", "minari", "h5py", "rl_zoo3", "scipy", "typer")
    code = f"import sys, sb3_offline_ft; sb3_offline_ft.__version__; print([m for m in {heavy} if m in sys.modules])"
    process = start_python("-c", code)
    assert process.stdout.strip() == "[]", process.stderr


@pytest.mark.parametrize("name", sorted(sb3_offline_ft.__all__))
def test_every_public_name_exists(name: str) -> None:
    assert name in dir(sb3_offline_ft)
    assert getattr(sb3_offline_ft, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'sb3_offline_ft' has no attribute 'TD4'"):
        sb3_offline_ft.TD4  # noqa: B018
