"""What the pages say of our studies is what their committed results say, and these are what their runs say."""

import itertools
import re
import shutil
import subprocess
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sb3_offline_ft import load_dataset
from sb3_offline_ft.datasets.tools.report import RULE_HELD
from sb3_offline_ft.evaluation import finetuning_metrics
from sb3_offline_ft.pages.words import NONE
from sb3_offline_ft.study import Protocol, study_results, write_report
from sb3_offline_ft.study.engine.folder import read_result
from tests.conftest import REPOSITORY
from tests.made_up_study import COLLAPSED_TO, write_runs, write_study
from tests.reported_studies import METHODS

BENCHMARKS = REPOSITORY / "benchmarks"
STUDIES = BENCHMARKS / "studies"
FOLDERS = sorted(file.parent for file in STUDIES.glob("*/study.yml"))
MARKED = "# A page\n\n<!-- results:answer begin -->\n<!-- results:answer end -->\n\nAnd\n\n"
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
        marked[page.name] = sorted(name for _, name, _ in findings.BLOCK.findall(text))
    assert marked == {"README.md": ["answer"], "findings.md": sorted([*folders, "answer", "regimes"])}


def test_reports_on_data_say_what_the_studies_say(findings: ModuleType) -> None:
    right, told = RULE_HELD
    text = findings.regimes(findings.studies())
    assert f"Of the {told} rows" in text and text.endswith(f"ended higher in {right}.")


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
        if "external" in run.manifest:
            # What a command remembers it does not say
            assert run.manifest["updates"]["online"] > 0 and run.manifest["interactions"] >= run.timesteps[-1]
        elif not run.manifest["frozen"]:
            check_that_it_learned(run.manifest)


def check_that_it_learned(manifest: dict[str, Any]) -> None:
    name, memory, interactions = manifest["name"], manifest["replay_buffer"], manifest["interactions"]
    assert interactions == manifest["cell"]["interactions"], f"{name} ended early"
    assert memory["capacity"] >= memory["rows"] == interactions, f"{name} forgot what it had done"
    # Actions are continuous, and batches are a small part of what they are drawn from
    assert memory["distinct_rows"] == interactions, f"{name} did the same again and again"
    assert memory["batch"]["distinct_rows"] >= 0.9 * memory["batch"]["rows"], f"{name} replayed the same again and again"
    due = (interactions - max(0, manifest["frozen_until"])) * manifest["hyperparams"]["gradient_steps"]
    # A guard may hold a learner for a while
    assert 0 < manifest["updates"]["online"] <= due, f"{name} was not updated as often as it should"
    assert manifest["guarded"] or manifest["updates"]["online"] == due, f"{name} was not updated as often as it should"


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
    rows = findings.of(findings.read(tmp_path / "made-up"), "medium", "td3")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["lowest_return"]) < 2 * COLLAPSED_TO for row in rows)
    ends = ", ".join(f"{float(row['last_return']):.0f}" for row in rows)
    assert f"| {ends} |" in text
    assert text == findings.filled(text, tmp_path / "docs" / "page.md", folders)


def test_a_rule_is_compared_with_who_ended_higher(findings: ModuleType, tmp_path: Path) -> None:
    assert findings.regimes({}) == findings.NOT_YET
    folder = write_study(tmp_path / "made-up", {"seeds": 3}).folder
    write_runs(Protocol.load(folder))
    write_report(folder, formats=["csv"])
    data = {label: load_dataset(spec).episode_returns.mean() for label, spec in Protocol.load(folder).datasets.items()}
    text = findings.regimes(findings.studies(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| made up |")]
    assert [row[1] for row in rows] == list(data)
    unit = 3857.8 - 24.8
    for _, label, start, of_data, says, near, plain, higher in rows:
        assert float(of_data) == pytest.approx(data[label], abs=0.5)
        lead = (float(start) - float(of_data)) / unit
        assert says == ("the policy" if lead > 0.05 else "the data" if lead < -0.05 else "either")
        # Plain TD3 falls in all runs, and TD3C in none
        assert float(near.removeprefix("TD3C: ")) > float(plain) + 0.05 * unit and higher == "3 of 3"
    told = [row for row in rows if row[4] != "either"]
    n_right = sum(row[4] == "the policy" for row in told)
    assert f"Of the {len(told)} rows" in text and text.endswith(f"ended higher in {n_right}.")


def test_results_of_other_runs_and_runs_that_did_not_learn_are_noticed(findings: ModuleType, tmp_path: Path) -> None:
    study = write_study(tmp_path / "made-up", {"seeds": 1})
    folder = study.folder

    def rows_with(**facts: Any) -> list[dict[str, str]]:
        write_runs(study, **facts)
        write_report(folder, formats=["csv"])
        with tarfile.open(folder / "runs.tar.xz", "w:xz") as archive:
            archive.add(folder / "runs", "runs")
        return list(findings.read(folder))

    rows = rows_with()
    check_that_results_are_of_all_runs(folder, rows, tmp_path / "unpacked")
    with pytest.raises(AssertionError):
        check_that_results_are_of_all_runs(folder, rows[1:], tmp_path / "unpacked")
    with pytest.raises(AssertionError):
        changed = [row | {"last_return": str(2 * float(row["last_return"]))} for row in rows]
        check_that_results_are_of_all_runs(folder, changed, tmp_path / "unpacked")
    n, batch = study.interactions, {"rows": 256, "distinct_rows": 254}
    full = {"capacity": n, "rows": n, "distinct_rows": n, "batch": batch}
    lacking: dict[str, dict[str, Any]] = {
        "forgot what it had done": {"replay_buffer": full | {"capacity": 1, "rows": 1}},
        "did the same again and again": {"replay_buffer": full | {"distinct_rows": 1}},
        "replayed the same again and again": {"replay_buffer": full | {"batch": batch | {"distinct_rows": 129}}},
        "was not updated as often": {"updates": {"offline": 50_000, "online": 0, "undone": 0}},
        "ended early": {"interactions": n - 1},
    }
    for number, (what, facts) in enumerate(lacking.items()):
        rows = rows_with(**facts)
        with pytest.raises(AssertionError, match=what):
            check_that_results_are_of_all_runs(folder, rows, tmp_path / f"unpacked {number}")


def test_results_and_pictures_of_other_settings_are_refused(findings: ModuleType, tmp_path: Path) -> None:
    study = write_study(tmp_path / "made-up", {"seeds": 1})
    write_runs(study)
    write_report(study.folder, formats=["csv"])
    findings.draw(study_results(study.folder))
    findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))
    # A picture of results as they were
    results = study.folder / "results.csv"
    text = results.read_text()
    results.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"curves\.png is not of these results"):
        findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))
    results.write_text(text)
    write_study(tmp_path / "made-up", {"seeds": 1, "interactions": 29_000})
    with pytest.raises(ValueError, match="11 of 11 runs are of other settings"):
        findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))


def test_facts_about_data_that_is_not_here_are_taken_from_the_packed_runs(findings: ModuleType, tmp_path: Path) -> None:
    data = shutil.copytree(REPOSITORY / "sb3_offline_ft/datasets/bundled/pendulum-medium", tmp_path / "data")
    changes = {"env": "Pendulum-v1", "datasets": {"medium": "../data?episodes=20"}, "seeds": 1, "random_return": -1309}
    study = write_study(tmp_path / "made-up", changes)
    write_runs(study)
    write_report(study.folder, formats=["csv"])
    with tarfile.open(study.folder / "runs.tar.xz", "w:xz") as archive:
        archive.add(study.folder / "runs", "runs")
    shutil.rmtree(study.folder / "runs")
    shutil.rmtree(data)
    findings.check(study.folder)


def test_tables_are_of_all_methods_and_seeds(findings: ModuleType, tmp_path: Path) -> None:
    study = write_study(tmp_path / "made-up", {"seeds": 3})
    cells = [cell for cell in study.cells() if cell.method.name != "td3" or (cell.dataset, cell.seed) == ("medium", 1)]
    write_runs(study, [cell for cell in cells if cell.method.name != "offline"])
    write_report(study.folder, formats=["csv"])
    text = findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))
    # Two of the three seeds are those of other methods, and a dataset has none of this one
    assert "**best**, seeds 0, 1, 2, J0 1" in text
    assert re.search(rf"\| plain TD3 \| 1 of 1 \| {NONE}, 0\.9\d, {NONE} \| {NONE}, 1\d{{3}}, {NONE} \|", text)
    assert "last 10, per seed" in text


def test_how_many_evaluations_make_the_end_is_said_as_it_is(findings: ModuleType, tmp_path: Path) -> None:
    study = write_study(tmp_path / "made-up", {"seeds": 1, "interactions": 8_000})
    write_runs(study, [cell for cell in study.cells() if cell.method.name in ("td3", "td3c")])
    write_report(study.folder, formats=["csv"])
    text = findings.filled(MARKED, tmp_path / "page.md", findings.studies(tmp_path))
    assert "last 6, per seed" in text and "ten" not in text.split()


def test_what_was_served_is_one_table_of_all_studies_that_ask_for_it(findings: ModuleType, tmp_path: Path) -> None:
    compared = {"offline": METHODS["offline"], "td3c": METHODS["td3c"] | {"champion": True}}
    asked = {"seeds": 2, "methods": compared, "reference_method": "td3c"}
    study = write_study(tmp_path / "hopper-champion", asked)
    write_runs(study)
    write_report(study.folder, formats=["csv", "md"])
    findings.draw(study_results(study.folder))
    write_study(tmp_path / "another", asked)
    text = findings.answer(findings.studies(tmp_path))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == 2 * [method["label"] for method in compared.values()]
    assert [row[0] != "" for row in rows] == [True, False, True, False]
    assert all(re.fullmatch(r"Hopper-v5, (medium|best), 30,000; J0 11\d\d", row[0]) for row in rows[::2])
    made = findings.read(study.folder)
    for row, (dataset, method) in zip(rows, itertools.product(study.datasets, compared), strict=True):
        runs = findings.of(made, dataset, method)
        numbers = [row[2], *(cell.split(" (")[0] for cell in row[3:])]
        names = "served_mean_return", "served_last_third_return", "served_collapsed_share", "final_return"
        means = [np.mean([float(run[name]) for run in runs]) * (100 if "share" in name else 1) for name in names]
        assert numbers == ["2", *(f"{mean:.{digits}f}" for mean, digits in zip(means, (0, 0, 1, 0), strict=True))]
        low, high = (float(bound) for bound in row[3].split(" (")[1].rstrip(")").split(" to "))
        assert low <= float(numbers[1]) <= high
    of_study = findings.single(study.folder, tmp_path / "page.md")
    assert "Paired tests do not tell TD3C from offline policy as it is, as there are too few pairs." in of_study
    assert of_study.index("Paired tests") < of_study.index("curves.png") < of_study.index("**medium**")


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
