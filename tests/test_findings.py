"""What the pages say of our studies is what their committed results say, and these are what their runs say."""

import subprocess
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from sb3_offline_ft.evaluation import finetuning_metrics
from sb3_offline_ft.study import study_results, write_report
from sb3_offline_ft.study.run_folder import read_result
from tests.conftest import REPOSITORY
from tests.made_up_study import COLLAPSED_TO, write_runs, write_study

BENCHMARKS = REPOSITORY / "benchmarks"
STUDIES = BENCHMARKS / "studies"
FOLDERS = sorted(file.parent for file in STUDIES.glob("*/study.yml"))
MARKED = "# A page\n\n<!-- results:overview begin -->\n<!-- results:overview end -->\n\nAnd\n\n"
MARKED += "<!-- results:made-up begin -->\n| old | table |\n<!-- results:made-up end -->\n\nits end.\n"


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    spec = spec_from_file_location("findings", STUDIES / "findings.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_the_results_say(findings: ModuleType) -> None:
    """If it fails, run benchmarks/studies/findings.py."""
    folders = findings.studies()
    marked = {}
    for page in findings.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == findings.filled(text, page, folders)
        marked[page.name] = [name for _, name, _ in findings.BLOCK.findall(text)]
    assert marked == {"README.md": ["overview"], "findings.md": sorted(folders)}


def check_that_results_are_of_all_runs(folder: Path, rows: list[dict[str, str]], unpacked: Path) -> None:
    with tarfile.open(folder / "runs.tar.xz") as archive:
        archive.extractall(unpacked, filter="data")
    results = [read_result(run) for run in unpacked.glob("runs/*/*/seed*")]
    runs = {result.manifest["key"]: result for result in results if result is not None}
    reported = {row["key"]: row for row in rows}
    assert len(results) == len(runs) and reported.keys() == runs.keys()
    for key, run in runs.items():
        metrics = finetuning_metrics(run.timesteps, run.returns, run.frozen_until, run.manifest["random_return"])
        for name in ("initial_return", "lowest_return", "last_return"):
            value = getattr(metrics, name)
            assert (float(reported[key][name]) if value is not None else None) == pytest.approx(value)
        if not run.manifest["frozen"]:
            memory, interactions = run.manifest["replay_buffer"], run.manifest["interactions"]
            assert memory["capacity"] >= memory["rows"] == interactions, f"{run.manifest['name']} forgot what it had done"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_results_are_of_all_committed_runs(folder: Path, findings: ModuleType, tmp_path: Path) -> None:
    kept = {name for name in ("results.csv", "tables.md", "runs.tar.xz", "curves.png") if (folder / name).exists()}
    assert len(kept) in (0, 4), f"{folder.name} has {sorted(kept)} only"
    if kept:
        check_that_results_are_of_all_runs(folder, findings.read(folder), tmp_path)


def test_without_results_there_is_no_table(findings: ModuleType, tmp_path: Path) -> None:
    write_runs(write_study(tmp_path / "made-up", {"seeds": 1}))
    text = findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))
    assert "|" not in text and text.count(findings.NOT_YET) == 2
    assert text.startswith("# A page\n") and text.endswith("its end.\n") and "And" in text


def test_results_become_tables_and_a_picture(findings: ModuleType, tmp_path: Path) -> None:
    write_runs(write_study(tmp_path / "made-up", {"seeds": 3}))
    write_report(tmp_path / "made-up", formats=["csv"])
    findings.draw(study_results(tmp_path / "made-up"))
    folders = findings.studies(tmp_path)
    text = findings.filled(MARKED, tmp_path / "docs" / "page.md", folders)
    assert "old" not in text and "![Curves of made up](../made-up/curves.png)" in text
    assert text.count("| plain TD3 | 3 of 3 |") == text.count("| TD3C | 0 of 3 |") == 2
    assert "| Hopper-v5, medium | 3 |" in text and "| Hopper-v5, best | 3 |" in text
    rows = findings.of(findings.read(tmp_path / "made-up"), "medium", "td3")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["lowest_return"]) < 2 * COLLAPSED_TO for row in rows)
    ends = ", ".join(f"{float(row['last_return']):.0f}" for row in rows)
    assert f"| {ends} |" in text
    assert text == findings.filled(text, tmp_path / "docs" / "page.md", folders)


def test_results_of_other_runs_and_runs_without_a_memory_are_noticed(findings: ModuleType, tmp_path: Path) -> None:
    study = write_study(tmp_path / "made-up", {"seeds": 1})
    folder = study.folder

    def rows_with_a_memory_of(capacity: int, rows: int) -> list[dict[str, str]]:
        memory = {"capacity": capacity, "rows": rows}
        write_runs(study, frozen=False, interactions=study.interactions, replay_buffer=memory)
        write_report(folder, formats=["csv"])
        with tarfile.open(folder / "runs.tar.xz", "w:xz") as archive:
            archive.add(folder / "runs", "runs")
        return list(findings.read(folder))

    rows = rows_with_a_memory_of(1_000_000, study.interactions)
    check_that_results_are_of_all_runs(folder, rows, tmp_path / "unpacked")
    with pytest.raises(AssertionError):
        check_that_results_are_of_all_runs(folder, rows[1:], tmp_path / "unpacked")
    with pytest.raises(AssertionError):
        changed = [row | {"last_return": str(2 * float(row["last_return"]))} for row in rows]
        check_that_results_are_of_all_runs(folder, changed, tmp_path / "unpacked")
    rows = rows_with_a_memory_of(1, 1)
    with pytest.raises(AssertionError, match="forgot what it had done"):
        check_that_results_are_of_all_runs(folder, rows, tmp_path / "unpacked again")


def test_a_comment_that_names_no_study_is_an_error(findings: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="made-up"):
        findings.filled(MARKED, tmp_path / "page.md", {})


def test_tracked_results_stay_small() -> None:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "benchmarks"]
    listed = [name for name in subprocess.run(command, capture_output=True, text=True).stdout.split("\0") if name]
    # Without git it is a copy of the tracked files
    paths = [REPOSITORY / name for name in listed] if listed else BENCHMARKS.rglob("*")
    files = [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
    assert 50 < len(files) < 300
    assert sum(file.stat().st_size for file in files) < 8e6
