"""``sb3-offline-ft doctor`` in sound and in damaged installations."""

import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import sb3_offline_ft
from sb3_offline_ft.algorithms import ALGORITHMS
from sb3_offline_ft.cli import app
from tests.conftest import REPOSITORY, Installation

DOCTOR = ("-m", "sb3_offline_ft", "doctor")


def test_a_sound_installation(installation: Installation, tmp_path: Path) -> None:
    process = installation.run(*DOCTOR, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Everything that is needed works." in process.stdout
    assert "problem" not in process.stdout
    for found in (
        "active",
        f"knows {', '.join(ALGORITHMS)}",
        "bundled:hopper-medium",
        "20,000 transitions",
        "Hopper-v5 works",
    ):
        assert found in process.stdout
    # Without the hub everything but downloading works.
    assert "http://127.0.0.1:9 cannot be reached" in process.stdout


def test_a_hook_that_is_turned_off_is_no_fault(installation: Installation, tmp_path: Path) -> None:
    process = installation.run(*DOCTOR, cwd=tmp_path, SB3_OFFLINE_FT_NO_HOOK="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert process.returncode == 0, process.stdout
    assert "turned off by SB3_OFFLINE_FT_NO_HOOK" in process.stdout
    assert "python -m sb3_offline_ft.zoo.train" in process.stdout


def test_a_damaged_installation_is_diagnosed(wheel: Path, tmp_path: Path) -> None:
    installation = Installation(wheel, tmp_path / "installation")
    (installation.site_packages / "sb3_offline_ft.pth").unlink()
    (installation.site_packages / "sb3_offline_ft" / "hyperparams" / "td3c.yml").unlink()
    data = installation.site_packages / "sb3_offline_ft" / "datasets" / "bundled" / "hopper-medium" / "data" / "main_data.hdf5"
    data.write_bytes(data.read_bytes()[:1000])
    process = installation.run(*DOCTOR, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert process.returncode == 1, process.stdout
    assert process.stdout.splitlines()[-1] == "Broken: Startup hook, rl_zoo3, Presets, bundled:hopper-medium."
    assert "pip install --force-reinstall --no-deps sb3-offline-ft" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


def test_a_package_that_is_too_old_is_named(wheel: Path, tmp_path: Path) -> None:
    installation = Installation(wheel, tmp_path / "installation")
    old = installation.site_packages / "gymnasium-0.29.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: gymnasium\nVersion: 0.29.1\n")
    code = "from sb3_offline_ft.doctor import check_packages; print([c for c in check_packages() if c.is_broken])"
    process = installation.run("-c", code, cwd=tmp_path)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = next(Requirement(line) for line in project["dependencies"] if line.startswith("gymnasium>"))
    assert f"found='0.29.1, but {needed.specifier} is needed'" in process.stdout, process.stderr
    assert f'pip install "gymnasium{needed.specifier}"' in process.stdout


@pytest.mark.skipif(os.name == "nt", reason="a file in the place of a folder is reported in another way on Windows")
def test_a_datasets_folder_that_cannot_be_made_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sb3_offline_ft.doctor import check_minari

    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(occupied / "datasets"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    datasets, hub = check_minari()
    assert (datasets.status, hub.status) == ("note", "note")
    assert str(occupied) in datasets.found
    assert "MINARI_DATASETS_PATH" in datasets.remedy


def test_the_version_option() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, sb3_offline_ft.__version__)
