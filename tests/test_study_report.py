"""The report on a study: it says what the results say, needs nothing else, and can be read anywhere."""

import csv
import html
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from scipy import stats
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.evaluation.finetuning_metrics import finetuning_metrics
from sb3_offline_ft.study.analysis import StudyNumbers
from sb3_offline_ft.study.cell import run_cell
from sb3_offline_ft.study.looks import USUAL, looks_of
from sb3_offline_ft.study.protocol import Cell, Protocol
from sb3_offline_ft.study.queue import StudyQueue
from sb3_offline_ft.study.report import study_results, write_report
from sb3_offline_ft.study.run_folder import run_folder, write_result
from sb3_offline_ft.study.tables import CSV_METRICS
from sb3_offline_ft.study.verdict import verdict
from tests.made_up_study import COLLAPSED_TO, END, J0, J_RANDOM, STUDY, WARMUP, level, result_of, write_runs, write_study
from tests.test_dataset_report import SVG, Page

ONE_DATASET = {"datasets": {"medium": "bundled:hopper-medium?episodes=20"}}
SMALL = ONE_DATASET | {"interactions": 12_000, "seeds": 3}
METHODS: dict[str, Any] = STUDY["methods"]


def methods(*names: str) -> dict[str, Any]:
    return {"methods": {name: METHODS[name] for name in names}, "reference_method": names[-1]}


def words(of: Protocol | StudyNumbers, heading: str = "") -> str:
    """Sentences of the verdict, with plain spaces and minus signs, below headings that begin so."""
    numbers = of if isinstance(of, StudyNumbers) else StudyNumbers(study_results(of.folder), {})
    found = [" ".join(texts) for title, texts in verdict(numbers) if title.startswith(heading)]
    return " ".join(" ".join(found).split()).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    """Six methods on a dataset with five seeds, all finished and reported."""
    protocol = write_study(tmp_path_factory.mktemp("report") / "made up", ONE_DATASET)
    write_runs(protocol)
    write_report(protocol.folder)
    return protocol


@pytest.fixture(scope="module")
def numbers(study: Protocol) -> StudyNumbers:
    return StudyNumbers(study_results(study.folder), {})


@pytest.fixture(scope="module")
def page(study: Protocol) -> str:
    return (study.folder / "report.html").read_text(encoding="utf-8")


class TestVerdict:
    def test_collapses_are_counted_with_exact_intervals(self, numbers: StudyNumbers, page: str) -> None:
        interval = stats.binomtest(5, 5).proportion_ci(0.95, method="exact")
        assert f"{100 * interval.low:.0f}-{100 * interval.high:.0f} %" == "48-100 %"
        expected = (
            "On medium, plain TD3 collapsed in 5 of 5 seeds (95 % CI 48-100 %); TD3BC kept in 0 of 5 (0-52 %); "
            "TD3C in 0 of 5 (0-52 %); TD3C with guard in 0 of 5 (0-52 %)."
        )
        assert words(numbers, "In short").startswith(expected)
        assert expected.replace("-", "\N{EN DASH}") in Page(page).text

    def test_overlapping_intervals_are_not_called_differences(self, numbers: StudyNumbers) -> None:
        short = words(numbers, "In short")
        assert "TD3C with guard in 0 of 5 (0-52 %). All of these intervals overlap: no difference is certain." in short

    def test_numbers_are_those_of_the_runs(self, numbers: StudyNumbers) -> None:
        ends = re.findall(r"(TD3C with guard|plain TD3|TD3C|TD3BC kept) ([\d,]+) \((?:95 % interval )?([\d,]+) to ([\d,]+)\)",
                          words(numbers, "On medium"))  # fmt: skip
        assert {label for label, *_ in ends} == {"TD3C with guard", "plain TD3", "TD3C", "TD3BC kept"}
        for label, *texts in ends:
            name = next(name for name, method in METHODS.items() if method["label"] == label)
            value, low, high = (float(text.replace(",", "")) for text in texts)
            # Mean of 50 evaluations of 10 episodes with a standard deviation of 4 %: a standard error of 0.2 %
            assert value == pytest.approx(END[name], rel=0.01)
            assert low < value < high
            # Seeds are spread by 60: the standard error of their mean is 60 * sqrt(2.5 / 5)
            assert high - low == pytest.approx(2 * 1.96 * 60 * np.sqrt(2.5 / 5), rel=0.35)

    def test_partial_collapse_and_its_interval(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return level(cell, share) if cell.seed < 2 else np.full(share.shape, J0)

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3"))
        write_runs(protocol, curve=curve)
        assert "On medium, plain TD3 collapsed in 2 of 5 seeds (95 % CI 5-85 %)." in words(protocol, "In short")

    def test_intervals_that_are_apart_are_said_so_and_pooled_over_datasets(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", {"interactions": 12_000} | methods("td3", "td3c"))
        write_runs(protocol)
        short = words(protocol, "In short")
        assert short.count("These intervals overlap: no difference is certain.") == 2
        expected = (
            "Taking all datasets together, plain TD3 collapsed in 10 of 10 runs (95 % CI 69-100 %); TD3C in 0 of 10 (0-31 %). "
            "These intervals do not overlap."
        )
        assert expected in short

    def test_dips_are_compared_with_the_noise_of_an_unchanged_policy(self, numbers: StudyNumbers) -> None:
        depth = (J0 + 40 - COLLAPSED_TO) / (J0 + 40 - J_RANDOM)
        text = words(numbers, "On medium")
        assert f"plain TD3 {depth:.2f} (5 of 5 seeds deeper than the noise of an unchanged policy)" in text
        assert "TD3C 0.00 (0 of 5)" in text
        assert re.search(
            r"95 % of the runs of an unchanged policy seem to dip by no more than 0\.0[2-6], by noise alone", text
        )

    def test_methods_are_compared_in_pairs(self, numbers: StudyNumbers) -> None:
        text = words(numbers, "Compared with TD3C")
        # Five pairs give no p-value below 2 / 2^5, and Holm's correction makes the smallest of five as large as five times it
        assert "higher" not in text and "lower" not in text
        assert re.search(rf"no difference shown for .*plain TD3 \(-(69|70)\d, p = {5 * 2 / 2**5:.2f}\)", text)
        assert "With 5 pairs of runs, a paired test cannot give a p-value below 0.062" in words(numbers, "What remains")

    def test_differences_are_called_so_if_pairs_are_enough(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3bc", "td3", "td3c") | {"seeds": 8})
        write_runs(protocol)
        text = words(protocol, "Compared with TD3C")
        p = 2 * 2 / 2**8  # twice, for two methods
        assert re.search(rf"Mean of the last 10 evaluations: lower for TD3BC kept \(-1,1\d\d, p = {p:.3f}\); plain TD3", text)
        assert re.search(rf"Dips: deeper for plain TD3 \(\+0\.9\d, p = {p:.3f}\)", text)
        assert f"Collapses: more often for plain TD3 (8 : 0 pairs, p = {p:.3f})" in text
        assert "cannot give a p-value" not in words(protocol, "What remains")

    def test_equal_methods_are_not_told_apart(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.full(share.shape, J0)

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3bc", "td3c") | {"seeds": 8})
        write_runs(protocol, curve=curve)
        text = words(protocol, "Compared with TD3C")
        assert "higher" not in text and "lower" not in text and text.count("no difference shown for TD3BC kept") >= 2
        assert "Collapses" not in text
        assert "TD3BC kept collapsed in 0 of 8 seeds (95 % CI 0-37 %); TD3C in 0 of 8 (0-37 %)." in words(protocol, "In short")

    @pytest.mark.parametrize(
        ("seeds", "said"),
        [(1, "only 1 seed: nothing can be said"), (5, "5 seeds are few"), (3, "missed with probability 73 %"), (10, None)],
    )
    def test_few_seeds_are_said(self, seeds: int, said: str | None, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3") | {"seeds": seeds})
        write_runs(protocol)
        text = words(protocol, "What remains")
        assert said in text if said is not None else "seeds are few" not in text

    def test_one_seed_has_no_intervals(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3", "td3c") | {"seeds": 1})
        write_runs(protocol)
        text = words(protocol)
        assert re.search(
            r"Mean of the last 10 evaluations: TD3C [\d,]+ \(no interval\); plain TD3 [\d,]+ \(no interval\)\. For", text
        )
        assert "Compared" not in text and "overlap" not in words(protocol, "On ")
        assert "plain TD3 0.99 (1 of 1 seed deeper than the noise" in text

    def test_what_is_not_defined_is_said(self, numbers: StudyNumbers, tmp_path: Path) -> None:
        assert "not defined for TD3 from scratch: there is no pretrained policy" in words(numbers, "What remains")
        protocol = _study_without_scores(tmp_path)
        write_runs(protocol)
        text = words(protocol)
        assert "not defined for plain TD3 and TD3C: the return of a random policy is not known" in text
        assert "collapsed" not in text and "dip" not in words(protocol, "On ") and "normalised" not in text

    def test_a_pretrained_policy_that_is_no_better_than_a_random_one_has_nothing_to_lose(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3", "td3c") | {"random_return": 1130.0})
        # The seeds' levels are 1100, 1120 and 1140
        write_runs(protocol)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        assert "plain TD3 collapsed in 1 of 1 seed (95 % CI 3-100 %); TD3C in 0 of 1 (0-98 %)." in words(numbers)
        for group in numbers.datasets[0].groups:
            assert len(group.values("dip_depth")) == len(group.values("dip_area")) == 1 and len(group.runs) == 3

    def test_what_the_end_holds_of_the_best_evaluation(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where(share > 0.6, 500, np.where(share > 0.4, 3000, J0))

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3c") | {"seeds": 2})
        write_runs(protocol, curve=curve)
        held = (500 - J_RANDOM) / (3000 - J_RANDOM)
        (found,) = re.findall(r"from the random policy's level: TD3C (\d+) %\.", words(protocol))
        # The best of six noisy evaluations is above their mean
        assert int(found) == pytest.approx(100 * held, abs=1.5)


def _study_without_scores(folder: Path, **changes: Any) -> Protocol:
    """An environment and data of which no scores of a random policy and an expert are known."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 21, 10))
    columns = {"observations": states[:, :-1].reshape(-1, 10), "next_observations": states[:, 1:].reshape(-1, 10)}
    ends = np.arange(60) % 20 == 19
    facts = {"actions": rng.uniform(-1, 1, (60, 2)), "rewards": np.ones(60), "terminations": np.zeros(60, bool)}
    np.savez(folder / "data.npz", **columns, **facts, truncations=ends)  # type: ignore[arg-type]
    study = {"env": "Reacher-v5", "datasets": {"own": str(folder / "data.npz")}, "random_return": None}
    return write_study(folder / "study", SMALL | methods("td3", "td3c") | study | changes)


class TestScores:
    def test_known_scores_of_an_expert_are_the_scale(self, numbers: StudyNumbers) -> None:
        expert = reference_scores_for("Hopper-v5")
        assert expert is not None
        for one in numbers.runs:
            expected = 100 * (one.metrics.last_return - J_RANDOM) / (expert.expert - J_RANDOM)
            assert numbers.score(one) == pytest.approx(expected)
        assert "0 is a random policy (17, as the protocol says), 100 an expert (3,857.8)." in numbers.scale_words

    def test_without_one_the_pretrained_policies_are_and_it_is_said(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        scale = numbers.datasets[0].scale
        assert scale is not None
        # The seeds' levels are 1100, 1120 and 1140
        assert scale.top == pytest.approx(1120, rel=0.01) and scale.normalized(scale.top) == 100
        assert "100 the mean level of the pretrained policies (1,1" in numbers.scale_words
        assert scale.normalized(100.0) == 0


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
        assert len(figures) == len(SVG.findall(page)) == 7
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
            "Verdict", "Learning curves", "Every seed", "Dips", "Collapses", "Scores", "Probability of improvement of TD3C",
            "Performance profiles", "Paired comparison with TD3C", "How it was measured", "Versions, machines, weights",
            "20 episodes", "bundled:hopper-medium?episodes=20", "as the runs had it",
            "All 30 runs had the same versions of Python and of all packages.",
            "All runs were made on the same kind of processor.",
            "In all 5 cases in which several methods share dataset, seed and pretraining, they started from exactly the same",
            "python -m pip install torch==2.9.0 numpy==2.3.0",
            "sb3-offline-ft study run 'made up' --workers 2",
            "The first run was begun at 2026-01-01T10:00:00+00:00, the last at 2026-01-05T10:00:00+00:00 (UTC)",
            "TD3C with guard: 5 alarms, 5 rollbacks, 10 promotions and 0 escalations in 5 runs.",
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
        parsed = Page((protocol.folder / "report.html").read_text(encoding="utf-8"))
        assert label in parsed.text and "Study: <script>" in parsed.text

    def test_the_guard_of_each_run_is_shown(self, page: str) -> None:
        (table,) = re.findall(r'<section id="guard">.*?</section>', page, re.DOTALL)
        rows = re.findall(r"<th scope=\"row\">(.*?)</th>((?:<td>.*?</td>)+)", table)
        assert [name for name, _ in rows] == [f"medium/td3c-guard/seed{seed}" for seed in range(5)]
        assert all(re.findall(r"<td>(.*?)</td>", cells) == ["1", "1", "2", "0", "9,000"] for _, cells in rows)


class TestFiles:
    def test_results_have_a_row_for_each_run_with_all_metrics(self, study: Protocol) -> None:
        rows = list(csv.DictReader(io.StringIO((study.folder / "results.csv").read_text(encoding="utf-8"))))
        runs = study_results(study.folder).runs
        assert len(rows) == len(runs) == 30
        for row, run in zip(rows, runs, strict=True):
            result = run.result
            assert (row["method"], row["seed"], row["key"]) == (run.cell.method.name, str(run.cell.seed), run.key)
            metrics = finetuning_metrics(
                result.timesteps, result.returns, result.frozen_until, J_RANDOM, result.training_timesteps,
                result.training_returns,
            )  # fmt: skip
            for name in CSV_METRICS:
                value = getattr(metrics, name)
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
        assert len(tables) == 6
        for table in tables:
            widths = {line.count("|") - line.count("\\|") for line in table.splitlines()}
            assert len(widths) == 1
            assert set(table.splitlines()[1]) == set("| -")
        assert text.startswith("# made up\n\n## In short\n\n- On medium, plain TD3 collapsed in 5 of 5 seeds")

    def test_figures_are_pictures(self, study: Protocol) -> None:
        names = {path.name for path in (study.folder / "figures").iterdir()}
        kinds = ("curves-medium", "seeds-medium", "dips-medium", "collapses-medium", "scores", "improvement", "profiles")
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
        assert contents[0] == contents[1] and len(contents[0]) == 17
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
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
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
        text = Page((changed.folder / "report.html").read_text(encoding="utf-8")).text
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

    def test_runs_that_cannot_be_measured_are_left_out_and_said(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where((cell.seed == 1) & (share > 0.5), np.nan, level(cell, share))

        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol, curve=curve)
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "plain TD3 collapsed in 2 of 2 seeds" in text and "of 3 runs 1 cannot be measured" in text
        assert re.search("medium/td3/seed1 not measurable: The evaluation at timestep .* has returns", text)

    def test_a_dataset_without_runs_is_left_out(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", methods("td3", "td3c") | {"interactions": 12_000, "seeds": 2})
        write_runs(protocol, [cell for cell in protocol.cells() if cell.dataset == "medium" or cell.method.name == "td3c"])
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "Not among the scores, as they have no finished run on some dataset: plain TD3." in text

    def test_a_run_that_a_guard_ended_early_is_drawn_as_far_as_it_goes(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c-guard"))
        write_runs(protocol)
        short = protocol.cells()[0]
        result = result_of(protocol, short)
        for name in ("timesteps", "returns", "lengths"):
            setattr(result, name, getattr(result, name)[:8])
        folder = run_folder(protocol.folder, short.dataset, short.method.name, short.seed, protocol.cell_key(short))
        write_result(folder, result)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        assert numbers.datasets[0].groups[0].curve.x[-1] == 7_000
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
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "Not all runs had the same versions: torch differ, see below." in text
        assert "2.8.0 (3 runs); 2.9.0+cpu (3 runs)" in text
        assert "Runs were made on 2 kinds of processors" in text
        assert "they did NOT start from the same weights: medium, seed 1" in text
        assert "pip install" not in text

    def test_the_data_need_not_be_here(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        (tmp_path / "data.npz").unlink()
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "60 in 3 episodes mean 20.0" in text and "not readable here: as the runs recorded it" in text
        assert "6 runs had the same versions" in text

    def test_data_that_no_run_knows_is_an_error(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path)
        (tmp_path / "data.npz").unlink()
        result = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert result.exit_code == 1 and "data.npz" in result.output


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> StudyNumbers:
    changes = SMALL | methods("offline", "td3", "td3c") | {
        "hyperparams": {"offline_fraction": 0.5},
            "factors": {"offline_fraction": [0.0, 0.25, "lin_0.5_0.0"], "ensemble_size": [2, 5]}, "seeds": 2,
    }  # fmt: skip
    protocol = write_study(tmp_path_factory.mktemp("factors") / "study", changes)
    write_runs(protocol)
    write_report(protocol.folder, formats=("html", "csv"))
    return StudyNumbers(study_results(protocol.folder), {})


class TestFactors:
    def test_each_value_has_its_runs_after_the_method_as_listed(self, factored: StudyNumbers) -> None:
        levels = factored.factor_levels("offline_fraction", factored.datasets[0])
        assert set(levels) == {"td3", "td3c"}
        assert [value for value, _ in levels["td3c"]] == ["0.5 (as listed)", "0.0", "0.25", "lin_0.5_0.0"]
        for value, group in levels["td3c"]:
            assert group.method.base == "td3c" and len(group.runs) == 2
            assert value == "0.5 (as listed)" or group.method.variant == {"offline_fraction": yaml.safe_load(value)}

    def test_defaults_that_are_not_written_are_named_too(self, factored: StudyNumbers) -> None:
        levels = factored.factor_levels("ensemble_size", factored.datasets[0])
        assert [value for value, _ in levels["td3"]] == ["2 (as listed)", "5"]

    def test_they_have_parts_of_their_own(self, factored: StudyNumbers) -> None:
        page = (factored.protocol.folder / "report.html").read_text(encoding="utf-8")
        parsed = Page(page)
        assert {"factor-offline_fraction", "factor-ensemble_size"} <= set(parsed.ids)
        assert "Factor: offline_fraction" in parsed.text and "offline_fraction on medium" in parsed.text
        assert "The pictures leave out" in parsed.text and "Some variants need a pretraining of their own" in parsed.text
        rows = list(csv.DictReader(io.StringIO((factored.protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        assert {row["factor_offline_fraction"] for row in rows} == {"", "0.0", "0.25", "lin_0.5_0.0"}


class TestLooks:
    def test_usual_methods_look_the_same_in_every_study(self) -> None:
        assert looks_of(USUAL)["td3"] == looks_of(["td3", "sac"])["td3"] == looks_of(["mine", "td3"])["td3"]

    def test_other_methods_do_not_look_like_them(self) -> None:
        looks = looks_of([*USUAL, *(f"other{number}" for number in range(20))])
        assert len(set(looks.values())) == len(looks)
        assert looks["other0"].variable not in {looks[name].variable for name in USUAL}


CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PHONE = 390
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
            browser(f"--screenshot={picture}", f"--window-size={width},2400", *arguments, page)
            pixels: np.ndarray = (255 * imread(picture)[..., :3]).astype(np.int64)
            assert pixels.shape[:2] == (2400, width)
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
            result = run_cell(protocol, cell, pretrained_folder=protocol.folder / "pretrained")
            folder = run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell))
            write_result(folder, result)
        answer = CliRunner().invoke(app, ["study", "report", str(protocol.folder)])
        assert answer.exit_code == 0, answer.output
        assert "Report:" in answer.output and "14 figures in" in answer.output
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "they started from exactly the same weights" in text and "All 12 runs had the same versions" in text
        assert "as the runs had it" in text and "0 is a random policy (-1,309)" in text
        rows = list(csv.DictReader(io.StringIO((protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        own = {row["method"]: int(row["learner_evaluation_steps"]) for row in rows}
        # An evaluation of Pendulum-v1 has 200 steps
        assert own["td3c"] > 0 and own["td3c"] % 200 == 0 and own["td3"] == 0
        assert WARMUP > 0 and all(float(row["lowest_return"]) < 0 for row in rows)
