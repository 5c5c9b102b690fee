"""What the documentation says of our studies is what their committed runs say."""

import csv
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from sb3_offline_ft.study import study_results

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "benchmarks" / "studies"
FOLDERS = sorted(file.parent for file in STUDIES.glob("*/study.yml"))


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    spec = spec_from_file_location("findings", STUDIES / "findings.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_of_what_we_found_are_those_of_the_runs(folder: Path, findings: ModuleType) -> None:
    results = study_results(folder)
    if not results.runs:
        pytest.skip("no runs yet, but perhaps a tuning")
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for dataset in {run.cell.dataset or "" for run in results.runs}:
        rows = list(findings.rows(results, dataset))
        assert rows and not [row for row in rows if row not in page]


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*/results.csv")), ids=lambda file: file.parent.name)
def test_a_committed_report_is_of_all_committed_runs(file: Path) -> None:
    results = study_results(file.parent)
    with file.open(newline="", encoding="utf-8") as lines:
        reported = {row["key"] for row in csv.DictReader(lines)}
    assert reported == {run.key for run in results.runs}
