"""The report on a study: it says what the results say, needs nothing else, and can be read anywhere."""

import html
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.evaluation.finetuning_metrics import finetuning_metrics
from sb3_offline_ft.study import Cell, Protocol, study_results, write_report
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.queue import StudyQueue
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.looks import USUAL, looks_of
from sb3_offline_ft.study.report.provenance import data_facts, machines_table, provenance
from tests.made_up_study import J_RANDOM, level, result_of, write_run, write_runs, write_study
from tests.reported_studies import (
    METHODS,
    ONE_DATASET,
    SMALL,
    methods,
    numbers_of,
    report_page,
    results_rows,
    study_without_scores,
    words,
)
from tests.test_dataset_report import SVG, Page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    """Six methods on a dataset with five seeds, all finished and reported."""
    protocol = write_study(tmp_path_factory.mktemp("report") / "made up", ONE_DATASET)
    write_runs(protocol)
    write_report(protocol.folder)
    return protocol


@pytest.fixture(scope="module")
def page(study: Protocol) -> str:
    return (study.folder / "report.html").read_text(encoding="utf-8")


class TestPage:
    def test_it_needs_nothing_else(self, page: str) -> None:
        parsed = Page(page)
        assert all(link.startswith("#") for link in parsed.links)
        assert "http" not in "".join(re.findall(r"url\([^)]*\)", page)) and "@import" not in page
        assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "@media print" in page

    def test_ids_are_there_once_and_references_lead_to_them(self, page: str) -> None:
        parsed = Page(page)
        assert len(parsed.ids) == len(set(parsed.ids)) > 0
        references = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([^)]+)\)", page))
        assert references and references <= set(parsed.ids)

    def test_every_figure_can_be_read_without_seeing_it(self, page: str) -> None:
        figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
        assert len(figures) == len(SVG.findall(page)) == 8
        for figure in figures:
            root = ElementTree.fromstring(SVG.findall(figure)[0])
            label = root.get("aria-label")
            assert root.get("role") == "img" and label is not None and re.search(r"\d", label)
            assert "<figcaption>" in figure
            (told,) = re.findall(r"In words</summary><p>(.*?)</p>", figure, re.DOTALL)
            assert html.unescape(told) in label
            assert root.get("viewBox") and root.get("width") is None and "currentColor" in figure
            assert "plain TD3" in told or "TD3C" in told

    def test_pictures_take_the_colours_of_the_methods_from_the_page(self, page: str) -> None:
        looks = looks_of(USUAL)
        assert len({look.variable for look in looks.values()}) == len(USUAL)
        for look in looks.values():
            assert f"{look.variable}: {look.light};" in page and f"{look.variable}: {look.dark};" in page
            assert f"var({look.variable})" in SVG.findall(page)[0]
            assert all(look.light not in picture for picture in SVG.findall(page))

    def test_everything_that_was_asked_is_on_it(self, study: Protocol, page: str) -> None:
        parsed = Page(page)
        text = parsed.text
        for expected in (
            "Verdict",
            "On medium, plain TD3 collapsed in 5 of 5 seeds (95 % CI 48\N{EN DASH}100 %);",
            "Served return", "Learning curves", "Every seed", "Dips", "Collapses", "Scores",
            "Probability of improvement of TD3C", "Performance profiles", "Paired comparison with TD3C",
            "How it was measured", "Versions, machines, weights",
            "20 episodes", "bundled:hopper-medium?episodes=20", "as the runs had it",
            "All 30 runs had the same versions of numpy, Python, sb3-offline-ft and torch, and the same code.",
            "code c0dec0dec0de",
            "All runs were made on the same kind of processor.",
            "In all 5 cases in which several methods share dataset, seed and pretraining, they started from exactly the same",
            "python -m pip install torch==2.9.0 numpy==2.3.0",
            "sb3-offline-ft study run 'made up' --workers 2",
            "The first run was begun at 2026-01-01T10:00:00+00:00, the last at 2026-01-05T10:00:00+00:00 (UTC)",
            "TD3C with guard: 5 alarms, 5 rollbacks, 10 promotions, 0 escalations and 0 warnings in 5 runs. It watched the "
            "returns of 700 of 750 episodes.",
        ):  # fmt: skip
            assert expected in text, expected
        assert {"verdict", "data-medium", "across", "guard", "protocol"} <= set(parsed.ids)
        assert study.dataset("medium").fingerprint[:16] in text
        assert html.escape(study.text, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page
        assert "What is missing" not in text and "not complete" not in text
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)

    def test_names_are_text_not_markup(self, tmp_path: Path) -> None:
        label = '<b>A & "B"</b> $x_1$'
        changes = SMALL | {"methods": {"td3": METHODS["td3"] | {"label": label}}, "name": "<script>", "reference_method": None}
        protocol = write_study(tmp_path / "study", changes)
        write_runs(protocol)
        write_report(protocol.folder, formats=("html", "md"))
        parsed = report_page(protocol)
        assert label in parsed.text and "Study: <script>" in parsed.text

    def test_dollars_are_no_formulas(self, tmp_path: Path) -> None:
        entries = {"td3bc": METHODS["td3bc"] | {"label": "$5 vs $6"}, "td3c": METHODS["td3c"] | {"label": r"TD3C $\nosuch$"}}
        protocol = write_study(tmp_path / "study", SMALL | {"methods": entries, "reference_method": "td3c"})
        write_runs(protocol)
        assert len(write_report(protocol.folder)) > 4
        pictures = "".join(SVG.findall((protocol.folder / "report.html").read_text(encoding="utf-8")))
        assert ">$5 vs $6<" in pictures and r">TD3C $\nosuch$<" in pictures

    def test_chances_are_said_as_measured(self, page: str) -> None:
        text = Page(page).text
        assert "in about 84 % of the cases with 5 seeds and in 89 % with 10" in text
        assert "44 % were deeper with 30 episodes of the frozen policy, and 15 % with 300" in text
        assert re.search(r"of 20 learning runs about 1\.0 would be deeper by chance", " ".join(text.split()))

    def test_the_guard_of_each_run_is_shown(self, page: str) -> None:
        (table,) = re.findall(r'<section id="guard">.*?</section>', page, re.DOTALL)
        rows = re.findall(r"<th scope=\"row\">(.*?)</th>((?:<td>.*?</td>)+)", table)
        assert [name for name, _ in rows] == [f"medium/td3c-guard/seed{seed}" for seed in range(5)]
        assert all(
            re.findall(r"<td>(.*?)</td>", cells) == ["140 of 150", "1", "1", "2", "0", "0", "9,000"] for _, cells in rows
        )


class TestFiles:
    def test_datasets_with_like_names_have_pictures_of_their_own(self, tmp_path: Path) -> None:
        data = {f"{name}": f"bundled:hopper-medium?episodes={n}" for name, n in (("v1.0", 20), ("v1-0", 21), ("V1-0", 22))}
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c") | {"datasets": data, "seeds": 2})
        write_runs(protocol)
        names = [path.name.lower() for path in write_report(protocol.folder)]
        assert len(names) == len(set(names))
        assert {"curves-v1-0.png", "curves-v1-0-2.png", "curves-v1-0-3.png"} <= set(names)
        parsed = report_page(protocol)
        assert len(parsed.ids) == len(set(parsed.ids)) and {"data-v1-0", "data-v1-0-2", "data-V1-0-3"} <= set(parsed.ids)

    def test_results_have_a_row_for_each_run_with_all_metrics(self, study: Protocol) -> None:
        rows = results_rows(study)
        runs = study_results(study.folder).runs
        assert len(rows) == len(runs) == 30
        for row, run in zip(rows, runs, strict=True):
            result = run.result
            assert (row["method"], row["seed"], row["key"]) == (run.cell.method.name, str(run.cell.seed), run.key)
            metrics = finetuning_metrics(
                result.timesteps, result.returns, result.frozen_until, J_RANDOM, result.training_timesteps,
                result.training_returns,
            )  # fmt: skip
            for name, value in asdict(metrics).items():
                if value is None or isinstance(value, bool):
                    assert row[name] == ("" if value is None else str(value).lower())
                else:
                    assert float(row[name]) == value
            assert row["dataset"] == (run.cell.dataset or "")
            assert row["guard_promotions"] == ("2" if run.cell.method.guard is not None else "0")
            assert row["learner_evaluation_steps"] == str(result.manifest["learner_evaluation_steps"])
            assert (row["dip_noise_quantile"] == "") is (not run.cell.method.pretrained)

    def test_tables_are_markdown(self, study: Protocol) -> None:
        text = (study.folder / "tables.md").read_text(encoding="utf-8")
        tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
        assert len(tables) == 8
        for table in tables:
            widths = {line.count("|") - line.count("\\|") for line in table.splitlines()}
            assert len(widths) == 1
            assert set(table.splitlines()[1]) == set("| -")
        assert text.startswith("# made up\n\nOn medium, plain TD3 served most, 1,373 on average (5 seeds; lost episodes ")
        assert "\n\n## What was served\n\n- Mean return of everything that acted on medium in 30,000" in text
        assert "\n\n## In short\n\n- On medium, plain TD3 collapsed in 5 of 5 seeds" in text
        assert re.findall("^### .*", text, re.MULTILINE)[:2] == ["### Served return on medium", "### Returns on medium"]

    def test_figures_are_pictures(self, study: Protocol) -> None:
        names = {path.name for path in (study.folder / "figures").iterdir()}
        kinds = (
            "served-medium", "curves-medium", "seeds-medium", "dips-medium", "collapses-medium", "scores", "improvement",
            "profiles",
        )  # fmt: skip
        assert names == {f"{kind}.{suffix}" for kind in kinds for suffix in ("svg", "png")}
        for kind in kinds:
            pixels = imread(study.folder / "figures" / f"{kind}.png")
            assert pixels.shape[1] == 920 and (pixels[0, 0] == 1).all()
            assert 0.01 < (pixels[..., :3] < 0.9).any(axis=2).mean() < 0.5
            root = ElementTree.parse(study.folder / "figures" / f"{kind}.svg").getroot()
            assert root.tag.endswith("svg") and root.findall("{http://www.w3.org/2000/svg}title")

    def test_the_same_results_give_the_same_files(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("offline", "td3", "td3c"))
        write_runs(protocol)
        contents = []
        for name in ("one", "two"):
            files = write_report(protocol.folder, tmp_path / name / "page.html")
            contents.append({file.relative_to(tmp_path / name): file.read_bytes() for file in files})
        assert contents[0] == contents[1] and len(contents[0]) == 19
        assert {"page.html", "results.csv", "tables.md", "figures"} == {path.name for path in (tmp_path / "one").iterdir()}

    @pytest.mark.parametrize(
        ("formats", "expected"), [(["csv"], {"results.csv"}), (["html", "md"], {"report.html", "tables.md"})]
    )
    def test_only_what_is_asked_for_is_written(self, formats: list[str], expected: set[str], tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol)
        options = [option for one in formats for option in ("--format", one)]
        result = CliRunner().invoke(
            app, ["study", "report", str(protocol.folder), *options, "-o", str(tmp_path / "new/report.html")]
        )
        assert result.exit_code == 0, result.output
        assert {path.name for path in (tmp_path / "new").iterdir()} == expected
        assert all(f"Report: {tmp_path / 'new' / name}" in result.output for name in expected)


class TestUnfinished:
    def test_what_is_missing_is_named_and_the_rest_reported(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("offline", "td3", "td3c"))
        done = [cell for cell in protocol.cells() if cell.name not in ("medium/td3/seed2", "medium/td3c/seed1")]
        write_runs(protocol, done)
        queue = StudyQueue(protocol)
        queue.enqueue([protocol.cell_key(cell) for cell in protocol.cells() if cell.name == "medium/td3/seed2"])
        claim = queue.claim(list(queue.cells))
        assert claim is not None and claim.cell.name == "medium/td3/seed2"
        claim.fail('Traceback (most recent call last):\n  File "x.py"\nValueError: actions are nan\n')
        write_report(protocol.folder, formats=("html", "csv"))
        text = report_page(protocol).text
        assert "This study is not complete: of 9 runs 1 run has not finished and 1 failed." in text
        assert "medium/td3/seed2 failed: ValueError: actions are nan" in text and "medium/td3c/seed1 not finished" in text
        assert "plain TD3 collapsed in 2 of 2 seeds" in text
        assert "1 of 9 runs is not finished" in text and "the method looks better here than it is" in text
        assert len((protocol.folder / "results.csv").read_text().splitlines()) == 8

    def test_nothing_finished_is_one_clear_error(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL)
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1
        assert "nothing to report on made up yet (18 runs not finished, 0 failed)" in result.output
        assert f"sb3-offline-ft study run {protocol.folder}" in result.output
        assert [path.name for path in protocol.folder.iterdir()] == ["study.yml"]

    def test_runs_of_other_settings_are_named(self, tmp_path: Path) -> None:
        write_runs(write_study(tmp_path / "study", SMALL | methods("td3")))
        changed = write_study(tmp_path / "study", SMALL | methods("td3") | {"interactions": 13_000})
        result = CliRunner().invoke(app, ["study", "report", str(changed.folder)])
        assert result.exit_code == 1 and "3 run folders in runs are of other settings" in result.output
        write_runs(changed, changed.cells()[:2])
        write_report(changed.folder, formats=("html",))
        text = report_page(changed).text
        assert "of 3 runs 1 run has not finished" in text and "3 run folders in runs are of other settings" in text

    def test_results_are_read_from_a_storage_elsewhere(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3") | {"seeds": 1})
        storage = str(tmp_path / "elsewhere.log")
        queue = StudyQueue(protocol, storage)
        queue.enqueue()
        claim = queue.claim(list(queue.cells))
        assert claim is not None and claim.finish(result_of(protocol, claim.cell))
        shutil.rmtree(protocol.folder / "runs", ignore_errors=True)
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert result.exit_code == 1
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder), "--storage", storage, "--format", "csv"])
        assert result.exit_code == 0, result.output
        assert len((protocol.folder / "results.csv").read_text().splitlines()) == 2

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
    def test_the_storage_is_closed(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3") | {"seeds": 1})
        storage = f"sqlite:///{tmp_path / 'study.db'}"
        with StudyQueue(protocol, storage) as queue:
            queue.enqueue()
            claim = queue.claim(list(queue.cells))
            assert claim is not None and claim.finish(result_of(protocol, claim.cell))
        assert len(study_results(protocol.folder, storage).runs) == 1
        links = (file.resolve().name for file in Path("/proc/self/fd").iterdir())
        assert "study.db" not in set(links)

    def test_runs_that_cannot_be_measured_are_left_out_and_said(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where((cell.seed == 1) & (share > 0.5), np.nan, level(cell, share))

        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol, curve=curve)
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
        assert "plain TD3 collapsed in 2 of 2 seeds" in text and "of 3 runs 1 cannot be measured" in text
        assert re.search("medium/td3/seed1 not measurable: The evaluation at timestep .* has returns", text)

    def test_a_dataset_without_runs_is_left_out(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", methods("td3", "td3c") | {"interactions": 12_000, "seeds": 2})
        write_runs(protocol, [cell for cell in protocol.cells() if cell.dataset == "medium" or cell.method.name == "td3c"])
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
        assert "Not among the scores, as they have no finished run on some dataset: plain TD3." in text

    def test_a_run_that_a_guard_ended_early_is_drawn_as_far_as_it_goes(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c-guard"))
        write_runs(protocol)
        short = protocol.cells()[0]
        result = result_of(protocol, short)
        for name in ("timesteps", "returns", "lengths"):
            setattr(result, name, getattr(result, name)[:8])
        result.manifest["interactions"] = 7_000
        write_run(protocol, short, result)
        numbers = numbers_of(protocol)
        assert numbers.datasets[0].groups[0].curve.x[-1] == 7_000
        expected = (
            "1 of 3 learning runs ended before 12,000 interactions, so that the curves of their methods end there, and their "
            "last evaluations are compared with later ones of others: medium/td3c-guard/seed0 (7,000)."
        )
        assert expected in words(numbers, "What remains")
        assert "Mean of the last 5 to 10 evaluations: TD3C with guard" in words(numbers, "On medium")
        assert len(write_report(protocol.folder)) > 4

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--format", "pdf"], "Formats of a report are html, figures, csv and md, found 'pdf'."),
            (["--storage", "missing.log"], "missing.log"),
        ],
    )
    def test_bad_options_are_one_clear_error(self, arguments: list[str], expected: str, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol)
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder), *arguments])
        assert result.exit_code == 1 and expected in result.output and len(result.output.strip().splitlines()) == 1
        assert not (protocol.folder / "report.html").exists()

    def test_no_study_is_one_clear_error(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["study", "report", str(tmp_path)])
        assert result.exit_code == 1 and "There is no study in" in result.output


class TestProvenance:
    def test_differences_between_runs_are_said(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3", "td3c"))
        cells = protocol.cells()
        write_runs(protocol, [cell for cell in cells if cell.method.name == "td3"])
        write_runs(
            protocol,
            [cell for cell in cells if cell.method.name == "td3c"],
            versions={"sb3-offline-ft": "0.1.0", "torch": "2.8.0", "numpy": "2.3.0"},
            cpu="Another kind",
            pretrained={"recipe": "medium-1-" + str(dict(cells[0].method.pretraining_hyperparams)), "weights_sha256": "other"},
        )
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
        assert "Not all runs had the same versions: torch differ, see below." in text
        assert "2.8.0 (3 runs); 2.9.0+cpu (3 runs)" in text
        assert "Runs were made on 2 kinds of processors" in text
        assert "they did NOT start from the same weights: medium, seed 1" in text
        assert "pip install" not in text
        assert "# the runs had several versions of torch, see the table above: none are named here" in text

    def test_other_code_is_said_though_versions_are_the_same(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        cells = protocol.cells()
        write_runs(protocol, cells[1:])
        write_runs(protocol, cells[:1], code="0ther" * 12)
        (text, *_) = provenance(study_results(protocol.folder).runs)
        assert text == "Not all runs had the same versions: code differ, see below."
        assert ["code", "0ther0ther0t (1 run); c0dec0dec0de (2 runs)"] in machines_table(
            study_results(protocol.folder).runs
        ).rows
        write_runs(protocol, code=None)
        (text, *_) = provenance(study_results(protocol.folder).runs)
        assert text.endswith("sb3-offline-ft and torch, and whether they had the same code was not recorded.")

    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            ({"cpu": None}, "The processor of 1 of 3 runs was not recorded: whether all had the same kind cannot be said."),
            # Older runs do not say of which model
            ({"cpu_model": None}, "All runs were made on the same kind of processor."),
            ({"cpu_model": "6/85/7"}, "Runs were made on 2 kinds of processors"),
            ({"device": "cuda:0"}, "The GPU of 1 of 1 run was not recorded"),
            ({"device": "cuda:0", "gpu": "Some GPU"}, "All runs were made on the same kind of GPU."),
        ],
    )
    def test_kinds_of_machines_are_said_as_far_as_they_were_recorded(
        self, facts: dict[str, Any], expected: str, tmp_path: Path
    ) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        cells = protocol.cells()
        write_runs(protocol, cells[1:])
        write_runs(protocol, cells[:1], **facts)
        assert any(text.startswith(expected) for text in provenance(study_results(protocol.folder).runs))

    def test_data_that_was_changed_since_is_not_taken_for_that_of_the_runs(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        runs = study_results(protocol.folder).runs
        with np.load(tmp_path / "data.npz") as file:
            columns = dict(file)
        np.savez(tmp_path / "data.npz", **columns | {"rewards": np.full(60, 7.0)})
        facts = data_facts(protocol, runs)["own"]
        assert facts.mean_return == 20 and facts.returns == "mean 20.0"
        assert facts.fingerprint == runs[0].result.manifest["dataset"]["fingerprint"]
        assert "NOT what they had" in facts.remark

    def test_hyperparameters_that_a_run_changed_are_said(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol)
        write_runs(protocol, protocol.cells()[:1], changed_hyperparams={"batch_size": 512})
        runs = study_results(protocol.folder).runs
        assert "Hyperparameters changed during 1 of 3 runs: batch_size." in provenance(runs)

    def test_the_data_need_not_be_here(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        (tmp_path / "data.npz").unlink()
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
        assert "60 in 3 episodes mean 20.0" in text and "not readable here: as the runs recorded it" in text
        assert "6 runs had the same versions" in text

    def test_what_only_the_data_said_of_an_expert_is_kept_by_the_runs(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path)
        facts = protocol.data_facts("own") | {"reference_scores": [100.0, 900.0]}
        protocol = Protocol.load(protocol.folder)
        protocol.remember_data({"own": facts})
        write_runs(protocol, random_return=100.0)
        (tmp_path / "data.npz").unlink()
        numbers = numbers_of(protocol)
        assert "100 an expert (900), as the dataset says" in numbers.scale_words

    def test_what_only_the_data_said_of_a_random_policy_is_kept_by_the_runs(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path)
        write_runs(protocol, random_return=100.0)
        (tmp_path / "data.npz").unlink()
        results = study_results(protocol.folder)
        assert results.protocol.random_return is None
        numbers = StudyNumbers(results, {})
        assert numbers.random_return == 100 and all(len(group.outcomes) == 3 for group in numbers.datasets[0].groups)
        assert "0 is a random policy (100, as the runs recorded it)" in numbers.scale_words
        assert "plain TD3 collapsed in 3 of 3 seeds" in words(numbers)

    @pytest.mark.parametrize(("n_unknown", "which"), [(6, ""), (3, " of 3 of 6 runs")])
    def test_a_version_that_was_not_recorded_is_said(self, n_unknown: int, which: str, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3", "td3c"))
        cells = protocol.cells()
        write_runs(protocol, cells[n_unknown:])
        write_runs(protocol, cells[:n_unknown], versions={"torch": "2.9.0+cpu", "numpy": "2.3.0"})
        write_report(protocol.folder, formats=("html",))
        text = " ".join(report_page(protocol).text.split())
        assert f"The version of sb3-offline-ft{which} was not recorded: whether all runs had the same cannot be said." in text
        assert "had the same versions of Python" not in text
        assert ("sb3-offline-ft not recorded" if n_unknown == 6 else "0.1.0 (3 runs); not recorded (3 runs)") in text

    def test_data_that_no_run_knows_is_an_error(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path)
        (tmp_path / "data.npz").unlink()
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert result.exit_code == 1 and "data.npz" in result.output


class TestLooks:
    def test_usual_methods_look_the_same_in_every_study(self) -> None:
        assert looks_of(USUAL)["td3"] == looks_of(["td3", "sac"])["td3"] == looks_of(["mine", "td3"])["td3"]

    def test_other_methods_do_not_look_like_them(self) -> None:
        looks = looks_of([*USUAL, *(f"other{number}" for number in range(20))])
        assert len(set(looks.values())) == len(looks)
        assert looks["other0"].variable not in {looks[name].variable for name in USUAL}


CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PHONE = 390
PAGE = 4800
# A window of Chromium without a screen has at least 500 points, a frame in it as many as it is told
FRAME = """<body><iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const view = event.target.contentWindow, root = view.document.documentElement, wide = [];
  for (const one of root.querySelectorAll("details")) one.open = true;
  for (const one of root.querySelectorAll("body *"))
    if (!one.closest(".scroll, svg") && one.getBoundingClientRect().right > root.clientWidth + 1) wide.push(one.tagName);
  document.documentElement.setAttribute("data-widths", `${{view.innerWidth}} ${{root.scrollWidth}} ${{wide.join(" ")}}`);
}};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
class TestInABrowser:
    @pytest.fixture
    def browser(self, tmp_path: Path) -> Iterator[Any]:
        def run(*arguments: str) -> str:
            options = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={tmp_path / 'user'}",
            ]
            return subprocess.run(
                [str(CHROMIUM), *options, *arguments], capture_output=True, text=True, check=True, timeout=120
            ).stdout

        yield run

    @pytest.fixture
    def colours(self, study: Protocol, browser: Any, tmp_path: Path) -> Any:
        def shoot(width: int, *arguments: str) -> np.ndarray:
            picture = tmp_path / "page.png"
            page = (study.folder / "report.html").as_uri()
            browser(f"--screenshot={picture}", f"--window-size={width},{PAGE}", *arguments, page)
            pixels: np.ndarray = (255 * imread(picture)[..., :3]).astype(np.int64)
            assert pixels.shape[:2] == (PAGE, width)
            return pixels

        return shoot

    def test_it_is_dark_text_on_light_ground_or_the_other_way_round(self, colours: Any) -> None:
        for arguments, ground in ((), 255), (("--blink-settings=preferredColorScheme=0",), 20):
            pixels = colours(1200, *arguments)
            assert abs(np.median(pixels) - ground) < 15
            assert (np.abs(pixels - np.median(pixels)).max(axis=2) > 100).mean() > 0.01

    @pytest.mark.parametrize("dark", [False, True])
    def test_methods_are_seen_in_their_colours(self, dark: bool, colours: Any) -> None:
        pixels = colours(PHONE, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
        pixels = np.concatenate(
            [pixels, colours(1200, *(["--blink-settings=preferredColorScheme=0"] if dark else []))[:, :PHONE]]
        )
        seen = {tuple(row) for row in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
        for name, look in looks_of(USUAL).items():
            colour = look.dark if dark else look.light
            assert tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) in seen, name

    def test_a_phone_need_not_scroll_sideways(self, browser: Any, tmp_path: Path, page: str) -> None:
        (tmp_path / "frame.html").write_text(FRAME.format(width=PHONE, page=html.escape(page)), encoding="utf-8")
        dom = browser("--dump-dom", "--window-size=800,1000", (tmp_path / "frame.html").as_uri())
        (found,) = re.findall(r'data-widths="(\d+) (\d+) ([^"]*)"', dom)
        assert found == (str(PHONE), str(PHONE), ""), f"wider than the screen: {found}"

    def test_it_can_be_printed(self, study: Protocol, browser: Any, tmp_path: Path) -> None:
        browser(f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", (study.folder / "report.html").as_uri())
        content = (tmp_path / "page.pdf").read_bytes()
        assert content.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", content)) > 3


class TestARealStudy:
    def test_all_from_the_protocol_to_the_page(self, tmp_path: Path) -> None:
        nets = {"policy_kwargs": {"net_arch": [8]}}
        changes = {
            "env": "Pendulum-v1",
            "datasets": {"medium": "bundled:pendulum-medium"},
            "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 50}},
            "hyperparams": {"warmup_steps": 100, "batch_size": 16, **nets},
            "interactions": 400,
            "seeds": 2,
            "evaluation": {"every": 200, "episodes": 2},
            "learner_evaluation": {"every": 200, "episodes": 1},
            "random_return": None,
            "methods": METHODS
            | {"td3c-guard": METHODS["td3c-guard"] | {"guard": {"baseline": [-1300, -1000, -1200, -900, -1100]}}},
        }
        protocol = write_study(tmp_path / "study", changes)
        for cell in protocol.cells():
            write_run(protocol, cell, run_cell(protocol, cell, pretrained_folder=protocol.folder / "pretrained"))
        answer = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert answer.exit_code == 0, answer.output
        assert "Report:" in answer.output and "16 figures in" in answer.output
        text = report_page(protocol).text
        assert "they started from exactly the same weights" in text
        versions = [run.result.manifest["versions"] for run in study_results(protocol.folder).runs]
        recorded = all("sb3-offline-ft" in one for one in versions)
        assert ("All 12 runs had the same versions" if recorded else "sb3-offline-ft was not recorded") in text
        assert "as the runs had it" in text and "0 is a random policy (-1,309)" in text
        rows = results_rows(protocol)
        own = {row["method"]: int(row["learner_evaluation_steps"]) for row in rows}
        # An evaluation of Pendulum-v1 has 200 steps
        assert own["td3c"] > 0 and own["td3c"] % 200 == 0 and own["td3"] == 0
        assert all(row["served_mean_return"] for row in rows) and "What was served is not known" not in text
        for row, cell in zip(rows, protocol.cells(), strict=True):
            (folder,) = protocol.folder.glob(f"runs/*/{cell.method.name}/seed{cell.seed}-*")
            with np.load(folder / "evaluations.npz") as file:
                means = dict(zip(file["timesteps"].tolist(), file["results"].mean(axis=1).tolist(), strict=True))
            assert list(means) == [0, 200, 400]
            # Pretrained and not frozen: only after the warm-up of 100 steps
            counted = list(means.values())[1 if cell.method.pretrained and not cell.method.frozen else 0 :]
            assert float(row["lowest_return"]) == pytest.approx(min(counted))
            assert float(row["last_return"]) == pytest.approx(np.mean(counted))
