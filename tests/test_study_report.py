"""The report on a study: it says what the results say, needs nothing else, and can be read anywhere."""

import csv
import html
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
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
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.folder import run_folder, write_result
from sb3_offline_ft.study.engine.queue import StudyQueue
from sb3_offline_ft.study.engine.results import Run, StudyResults, study_results
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.looks import USUAL, looks_of
from sb3_offline_ft.study.report.page import write_report
from sb3_offline_ft.study.report.provenance import data_facts, machines_table, provenance
from sb3_offline_ft.study.report.tables import CSV_METRICS, guard_table
from sb3_offline_ft.study.report.verdict import verdict
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
            "On medium, plain TD3 collapsed in 5 of 5 seeds (95 % CI 48-100 %); offline policy as it is in 0 of 5 (0-52 %); "
            "TD3BC kept in 0 of 5 (0-52 %); TD3C in 0 of 5 (0-52 %); TD3C with guard in 0 of 5 (0-52 %)."
        )
        assert words(numbers, "In short").startswith(expected)
        assert expected.replace("-", "\N{EN DASH}") in Page(page).text

    def test_intervals_are_described_and_are_no_test(self, numbers: StudyNumbers) -> None:
        short = words(numbers, "In short")
        assert "TD3C with guard in 0 of 5 (0-52 %). All of these intervals overlap; that is no test." in short
        # Levels are at least 120 apart, except those of the frozen policy and of TD3BC
        assert "No two of these intervals overlap; that is no test." in words(numbers, "On ")
        assert "Whether methods differ is for the paired tests below to say, not for intervals." in short

    def test_pairs_tell_apart_what_overlapping_intervals_hide(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return J0 + 300.0 * cell.seed + np.where((share > 0) & (cell.method.base == "td3c"), 100, 0)

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3", "td3c") | {"seeds": 8})
        write_runs(protocol, curve=curve)
        text = words(protocol)
        # Four numbers are compared
        p = 4 * 2 / 2**8
        assert re.search(rf"Mean of the last 10 evaluations: lower for plain TD3 \(-[\d.]+, p = {p:.3f}\)", text)
        assert text.count("These intervals overlap; that is no test.") == 2
        assert "certain" not in text.replace("uncertain", "")

    def test_methods_that_do_not_differ_are_seldom_said_to_differ(self, tmp_path: Path) -> None:
        """Holm's correction allows 5 % of the studies; that 8 or more of 40 err has then a probability below 0.001."""
        changes = ONE_DATASET | methods("td3bc", "td3", "td3c") | {"seeds": 10, "interactions": 8_000}
        protocol = write_study(tmp_path / "study", changes | {"evaluation": {"every": 1_000, "episodes": 2}})
        runs = [Run(cell, protocol.cell_key(cell), result_of(protocol, cell)) for cell in protocol.cells()]
        claims, n_studies = 0, 40
        for study_number in range(n_studies):
            rng = np.random.default_rng(study_number)
            means = J0 + rng.normal(0, 200, (len(runs), 1)) + rng.normal(0, 300, (len(runs), 1)) * np.linspace(0, 1, 9)
            episodes = means[..., None] + rng.normal(0, 150, (len(runs), 9, 2))
            made = [
                Run(run.cell, run.key, replace(run.result, returns=np.where(run.result.timesteps[:, None] > WARMUP, one, J0)))
                for run, one in zip(runs, episodes, strict=True)
            ]
            found = words(StudyNumbers(StudyResults(protocol, tuple(made), (), {}), {}), "Compared")
            claims += re.search(r"(higher|lower|deeper|less deep|more often|less often) for", found) is not None
        assert stats.binom.sf(7, n_studies, 0.05) < 0.001
        assert claims <= 7

    def test_numbers_are_those_of_the_runs(self, numbers: StudyNumbers) -> None:
        text, kept = words(numbers, "On medium").split("If the best evaluated policy is kept")
        value = r"(TD3C with guard|plain TD3|TD3C|TD3BC kept) ([\d,]+) \((?:95 % interval )?([\d,]+) to ([\d,]+)\)"
        ends = re.findall(value, text)
        assert {label for label, *_ in re.findall(value, kept)} == {label for label, *_ in ends}
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
        assert short.count("These intervals overlap; that is no test.") == 2
        expected = (
            "Taking all datasets together, plain TD3 collapsed in 10 of 10 runs (95 % CI 69-100 %); TD3C in 0 of 10 (0-31 %). "
            "These intervals do not overlap; that is no test."
        )
        assert expected in short

    def test_collapses_by_chance_are_said(self, numbers: StudyNumbers, tmp_path: Path) -> None:
        assert "count as collapsed" not in words(numbers)
        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("offline", "td3c"))
        for cell in protocol.cells():
            rng, result = np.random.default_rng([cell.seed, len(cell.method.name)]), result_of(protocol, cell)
            # Three of four episodes fail: an evaluation of ten in which all do has a probability of 0.06
            result.returns = np.where(rng.random(result.returns.shape) < 0.25, 300.0, 20.0) + rng.normal(0, 1, (31, 10))
            write_result(
                run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell)), result
            )
        text = words(protocol, "In short")
        assert re.search(r"offline policy as it is (collapsed )?in \d of 5", text)
        (share,) = re.findall(r"an unchanged policy would count as collapsed in (\d+)(?: to \d+)? % of runs", text)
        assert int(share) == pytest.approx(100 * (1 - (1 - 0.75**10) ** 28), abs=20)
        write_report(protocol.folder, formats=("csv",))
        rows = list(csv.DictReader(io.StringIO((protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        assert all(0.1 < float(row["collapse_noise_probability"]) < 1 for row in rows)

    def test_steps_of_own_evaluations_are_said_beside_the_interactions(self, numbers: StudyNumbers) -> None:
        expected = (
            "Beside the 30,000 interactions, TD3C used on average 252,000 and TD3C with guard 252,000 environment steps for "
            "their own evaluations."
        )
        assert expected in words(numbers, "In short")

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
        # Five pairs give no p-value below 2 / 2^5, and Holm's correction makes the smallest of 15 as large as 15 times it:
        # ends of five methods, means of four (not from scratch), dips and collapses of three (nor of the frozen policy)
        assert "higher" not in text and "lower" not in text
        assert re.search(rf"no difference shown for .*plain TD3 \(-(69|70)\d, p = {15 * 2 / 2**5:.2f}\)", text)
        assert "With 5 pairs of runs, a paired test cannot give a p-value below 0.062" in words(numbers, "What remains")

    def test_what_is_not_alike_is_not_compared(self, numbers: StudyNumbers) -> None:
        compared = {name: {row.metric for row in numbers.comparisons if row.method.name == name} for name in METHODS}
        assert compared["scratch"] == {"last_return"}
        assert compared["offline"] == {"last_return", "mean_return"}
        assert compared["td3"] == {"last_return", "mean_return", "dip_depth", "collapsed"} and not compared["td3c"]

    def test_too_many_comparisons_for_any_difference_are_said(self, tmp_path: Path) -> None:
        changes = ONE_DATASET | methods("td3bc", "td3", "td3c") | {"interactions": 12_000, "seeds": 6}
        protocol = write_study(tmp_path / "study", changes)
        write_runs(protocol)
        # A single test could: 2 / 2^6 is below 0.05
        expected = (
            f"cannot give a p-value below 0.031, and Holm's correction for 8 tests makes {8 * 2 / 2**6:.2g} of it: no "
            "difference, however large, can be called significant."
        )
        assert expected in words(protocol, "What remains")

    def test_differences_are_called_so_if_pairs_are_enough(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3bc", "td3", "td3c") | {"seeds": 10})
        write_runs(protocol)
        text = words(protocol, "Compared with TD3C")
        p = 8 * 2 / 2**10  # two methods are compared by four numbers
        assert re.search(rf"Mean of the last 10 evaluations: lower for TD3BC kept \(-1,1\d\d, p = {p:.3f}\); plain TD3", text)
        assert re.search(rf"Dips: deeper for plain TD3 \(\+0\.9\d, p = {p:.3f}\)", text)
        assert f"Collapses: more often for plain TD3 (10 : 0 pairs, p = {p:.3f})" in text
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
        expected = "on medium are not defined for plain TD3 (2 of 3 runs) and TD3C (2 of 3 runs): the pretrained policy is no"
        assert expected in words(numbers, "What remains")
        # One pair is none, of ends there are three
        assert "Dips cannot be compared for plain TD3: there are fewer than two pairs of runs." in words(
            numbers, "What remains"
        )
        assert "Ends cannot be compared" not in words(numbers)
        for group in numbers.datasets[0].groups:
            assert len(group.values("dip_depth")) == len(group.values("dip_area")) == 1 and len(group.runs) == 3

    def test_what_is_not_defined_on_a_dataset_is_said_of_it(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.full(share.shape, J_RANDOM - 5) if cell.dataset == "best" else level(cell, share)

        names = methods("scratch", "td3", "td3c")
        protocol = write_study(tmp_path / "study", {"interactions": 12_000, "seeds": 3} | names)
        write_runs(protocol, curve=curve)
        text = words(protocol, "What remains")
        assert "not defined for TD3 from scratch: there is no pretrained policy" in text
        assert (
            "on best are not defined for plain TD3 (3 of 3 runs) and TD3C (3 of 3 runs): the pretrained policy is no" in text
        )
        assert "on medium are not defined" not in text
        # What is of one dataset is not called that of all
        assert "On medium, plain TD3 collapsed in 3 of 3" in words(protocol, "In short")
        assert "together" not in words(protocol, "In short")

    def test_ends_of_short_runs_are_of_as_many_evaluations_as_there_are(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3", "td3c") | {"seeds": 2, "interactions": 8_000})
        write_runs(protocol)
        write_report(protocol.folder)
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "Mean of the last 6 evaluations" in text and "or of all if there are fewer: here of 6." in text
        assert "last 6" in (protocol.folder / "tables.md").read_text(encoding="utf-8").split("### Returns")[1]
        assert "last ten" not in text and not re.search(r"last 10\b(?! evaluations after the warm-up, or of all)", text)

    def test_methods_with_too_few_pairs_are_named(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3bc", "td3", "td3c"))
        write_runs(protocol, [cell for cell in protocol.cells() if cell.method.name != "td3" or cell.seed == 0])
        text = words(protocol, "What remains")
        for what in ("Ends", "Means over the whole run after the warm-up", "Dips", "Collapses"):
            assert f"{what} cannot be compared for plain TD3: there are fewer than two pairs of runs." in text

    def test_what_the_end_holds_of_the_best_evaluation(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where(share > 0.6, 500, np.where(share > 0.4, 3000, J0))

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("offline", "td3c") | {"seeds": 2})
        frozen = [cell for cell in protocol.cells() if cell.method.frozen]
        write_runs(protocol, frozen)
        write_runs(protocol, [cell for cell in protocol.cells() if not cell.method.frozen], curve=curve)
        held = (500 - J_RANDOM) / (3000 - J_RANDOM)
        ((still, found),) = re.findall(
            r"means over the seeds: offline policy as it is (\d+) %; TD3C (\d+) %\.", words(protocol)
        )
        # The best three of six noisy evaluations in a row are above their mean
        assert int(found) == pytest.approx(100 * held, abs=1.5)
        assert 95 <= int(still) < 100
        assert "A policy that does not change (offline policy as it is) has less than 100 % too" in words(protocol)
        assert re.search(r"offline policy as it is in \d of 2; .*does in about half of the seeds, by noise", words(protocol))

    def test_runs_that_were_never_better_than_a_random_policy_are_not_left_out(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where(share > 0, J_RANDOM - 10 if cell.seed else J_RANDOM + 200, J0)

        protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3c") | {"seeds": 2})
        write_runs(protocol, curve=curve)
        # Ends are 200 above and 10 below, and so are the best
        (found,) = re.findall(r"means over the seeds: TD3C (\d+) %\.", words(protocol))
        assert 85 < int(found) <= 100
        write_runs(protocol, curve=lambda cell, share: np.where(share > 0, J_RANDOM - 10, J0))
        assert "means over the seeds: TD3C never above a random policy." in words(protocol)


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


class TestShortcomings:
    """Runs that were not what their method's name says: the page says so."""

    MEMORY: ClassVar[dict[str, Any]] = {"capacity": 12_000, "rows": 12_000, "distinct_rows": 12_000, "offline_rows": 20_000}
    FULL = MEMORY | {"batch": {"rows": 256, "distinct_rows": 254}}

    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            (
                {"replay_buffer": FULL | {"capacity": 1}},
                "1 of 3 learning runs had a replay buffer that is smaller than the run: medium/td3/seed0 (1 of 12,000).",
            ),
            (
                {"replay_buffer": MEMORY | {"batch": {"rows": 256, "distinct_rows": 129}}},
                "1 of 3 learning runs drew batches of few distinct rows: medium/td3/seed0 (129 of 256).",
            ),
            (
                {"replay_buffer": MEMORY},
                "1 of 3 learning runs drew batches of few distinct rows: medium/td3/seed0 (0 of 0).",
            ),
            (
                {"updates": {"offline": 50_000, "online": 0, "undone": 0}},
                "1 of 3 learning runs had no update after the first interaction: medium/td3/seed0.",
            ),
            (
                {"interactions": 7_000},
                "1 of 3 learning runs ended before 12,000 interactions, so that the curves of their methods end there",
            ),
            # What is missing is not taken for a good number
            ({"updates": ...}, "1 of 3 learning runs did not record all that they were: medium/td3/seed0 (updates)."),
            ({"replay_buffer": ...}, "did not record all that they were: medium/td3/seed0 (replay_buffer)."),
            ({"learner_evaluation_steps": ...}, "that they were: medium/td3/seed0 (learner_evaluation_steps)."),
            # Learners that replay nothing
            ({"replay_buffer": None}, ""),
            ({"replay_buffer": FULL}, ""),
        ],
    )
    def test_what_a_run_lacked_is_said(self, facts: dict[str, Any], expected: str, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("offline", "td3"))
        write_runs(protocol)
        cell = next(cell for cell in protocol.cells() if not cell.method.frozen)
        result = result_of(protocol, cell, **facts)
        result.manifest = {name: fact for name, fact in result.manifest.items() if fact is not ...}
        write_result(run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell)), result)
        text = words(protocol, "What remains")
        assert expected in text if expected else "learning runs" not in text
        write_report(protocol.folder, formats=("csv",))
        rows = list(csv.DictReader(io.StringIO((protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        assert [row["method"] for row in rows[:2]] == ["offline", "td3"]
        manifest = result.manifest
        memory, updates = manifest.get("replay_buffer") or {}, manifest.get("updates") or {}
        for column, value in {
            "interactions": manifest["interactions"], "updates_online": updates.get("online", ""),
            "updates_undone": updates.get("undone", ""), "replay_capacity": memory.get("capacity", ""),
            "replay_distinct_rows": memory.get("distinct_rows", ""),
            "batch_distinct_rows": (memory.get("batch") or {}).get("distinct_rows", ""), "code": "c0de" * 16,
            "learner_evaluation_steps": manifest.get("learner_evaluation_steps", ""), "last_evaluations": 10,
        }.items():  # fmt: skip
            assert rows[1][column] == str(value), column

    def test_many_runs_are_counted_and_some_named(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3bc", "td3", "td3c"))
        write_runs(protocol, updates={"offline": 50_000, "online": 0, "undone": 0})
        text = words(protocol, "What remains")
        assert re.search(r"9 of 9 learning runs had no update after .*: medium/td3bc/seed0, .* and 1 more\.", text)

    def test_guards_that_never_watched_have_no_alarms(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c-guard"))
        write_runs(protocol)
        assert "watched no returns" not in words(protocol)
        cell = protocol.cells()[0]
        result = result_of(protocol, cell)
        episodes = [event | {"phase": "unwatched"} for event in result.events if event["event"] == "episode"]
        result.events = [result.events[0], {"event": "warning", "timestep": 2_000, "message": "too short"}, *episodes]
        write_result(run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, protocol.cell_key(cell)), result)
        expected = "The guard watched no returns in 1 run, so had no alarms: medium/td3c-guard/seed0."
        assert expected in words(protocol, "What remains")
        numbers = StudyNumbers(study_results(protocol.folder), {})
        rows = {row[0]: list(row[1:]) for row in guard_table(numbers).rows}
        assert rows["medium/td3c-guard/seed0"] == ["0 of 60", "0", "0", "0", "0", "1", "\N{EN DASH}"]
        assert rows["medium/td3c-guard/seed1"][0] == "50 of 60"

    @pytest.mark.filterwarnings("ignore:.*The cell counts as not run")
    def test_damaged_runs_are_not_called_those_of_other_settings(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol)
        (damaged,) = protocol.folder.glob("runs/medium/td3/seed1-*")
        (damaged / "evaluations.npz").write_bytes(b"damaged")
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "of 3 runs 1 run has not finished (1 with damaged files)." in text
        assert "medium/td3/seed1 its run folder is damaged" in text and "other settings" not in text
        # Nor those that have another name now
        write_study(protocol.folder, SMALL | {"methods": {"renamed": METHODS["td3"]}, "reference_method": None})
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "(1 with damaged files)" in text and "other settings" not in text

    @pytest.mark.filterwarnings("ignore:.*The cell counts as not run")
    def test_only_damaged_runs_are_an_error_that_says_so(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3"))
        write_runs(protocol, protocol.cells()[:1])
        (damaged,) = protocol.folder.glob("runs/medium/td3/seed0-*")
        (damaged / "evaluations.npz").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"\(3 runs not finished, 1 of them with damaged files, 0 failed\)"):
            write_report(protocol.folder)


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

    def test_a_scale_must_have_its_top_above_a_random_policy(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path, random_return=1_500.0)
        write_runs(protocol)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        assert numbers.datasets[0].scale is None and not numbers.aggregates and not numbers.profiles
        assert {numbers.score(one) for one in numbers.runs} == {None}
        expected = "There are no normalised scores on own: 100 would not be above 0 (0 is a random policy (1,500"
        assert expected in words(numbers, "What remains") and "normalised ends" not in words(numbers)
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "There are no normalised scores. On own, 100 would not be above 0" in text

    def test_the_environments_scores_are_checked_too(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c") | {"random_return": 5_000.0})
        write_runs(protocol)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        assert numbers.datasets[0].scale is None and "100 an expert (3,857.8)" in numbers.datasets[0].why_no_scale

    def test_scores_are_of_what_all_methods_have(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where(share <= 0, J0, 500.0 if cell.dataset == "medium" else 2500.0)

        protocol = write_study(tmp_path / "study", {"interactions": 12_000} | methods("td3bc", "td3c"))
        missing = {("td3bc", "medium", seed) for seed in range(1, 5)}
        done = [cell for cell in protocol.cells() if (cell.method.name, cell.dataset, cell.seed) not in missing]
        write_runs(protocol, done, curve=curve)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        one, other = numbers.aggregates
        assert one.iqm.n == other.iqm.n == 6
        # Both are at the same levels: with all of TD3C's ten runs it would seem lower by 14
        assert one.iqm.value == pytest.approx(other.iqm.value, abs=0.5)
        assert one.mean.value == pytest.approx(other.mean.value, abs=0.5)
        short = words(numbers, "In short")
        assert "They are over the 6 of 10 pairs of dataset and seed that all of these methods have." in short
        assert "Taking all datasets together, TD3BC kept collapsed in 0 of 6 runs" in short

    def test_methods_without_data_are_compared_where_all_datasets_are(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", {"interactions": 12_000} | methods("scratch", "td3c"))
        done = [cell for cell in protocol.cells() if cell.dataset != "best" or cell.seed < 3]
        write_runs(protocol, done)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        (row,) = numbers.comparisons
        assert row.n == 3
        scratch, td3c = numbers.aggregates
        assert (scratch.iqm.n, td3c.iqm.n) == (5, 8)
        # Three seeds on two datasets, and three runs from scratch, which are the same on both
        (improvement,) = numbers.improvements
        assert improvement.probability.n == 2 * 3 + 3


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
        parsed = Page((protocol.folder / "report.html").read_text(encoding="utf-8"))
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
        parsed = Page((protocol.folder / "report.html").read_text(encoding="utf-8"))
        assert len(parsed.ids) == len(set(parsed.ids)) and {"data-v1-0", "data-v1-0-2", "data-V1-0-3"} <= set(parsed.ids)

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
        result.manifest["interactions"] = 7_000
        folder = run_folder(protocol.folder, short.dataset, short.method.name, short.seed, protocol.cell_key(short))
        write_result(folder, result)
        numbers = StudyNumbers(study_results(protocol.folder), {})
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
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
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
        protocol = _study_without_scores(tmp_path, random_return=100.0)
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
        protocol = _study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        (tmp_path / "data.npz").unlink()
        write_report(protocol.folder, formats=("html",))
        text = Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text
        assert "60 in 3 episodes mean 20.0" in text and "not readable here: as the runs recorded it" in text
        assert "6 runs had the same versions" in text

    def test_what_only_the_data_said_of_an_expert_is_kept_by_the_runs(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path)
        protocol._data_facts["own"] = protocol.data_facts("own") | {"reference_scores": [100.0, 900.0]}
        write_runs(protocol, random_return=100.0)
        (tmp_path / "data.npz").unlink()
        numbers = StudyNumbers(study_results(protocol.folder), {})
        assert "100 an expert (900), as the dataset says" in numbers.scale_words

    def test_what_only_the_data_said_of_a_random_policy_is_kept_by_the_runs(self, tmp_path: Path) -> None:
        protocol = _study_without_scores(tmp_path)
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
        text = " ".join(Page((protocol.folder / "report.html").read_text(encoding="utf-8")).text.split())
        assert f"The version of sb3-offline-ft{which} was not recorded: whether all runs had the same cannot be said." in text
        assert "had the same versions of Python" not in text
        assert ("sb3-offline-ft not recorded" if n_unknown == 6 else "0.1.0 (3 runs); not recorded (3 runs)") in text

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

    def test_what_is_not_written_is_what_the_runs_had(self, tmp_path: Path) -> None:
        changes = SMALL | methods("td3") | {"seeds": 1, "factors": {"ensemble_size": [5], "gamma": [0.9]}}
        protocol = write_study(tmp_path / "study", changes)
        # As they were made when the defaults were others
        write_runs(protocol, hyperparams={"gamma": 0.97, "policy_kwargs": {"n_critics": 3}})
        numbers = StudyNumbers(study_results(protocol.folder), {})
        for factor, expected in (("ensemble_size", ["3 (as listed)", "5"]), ("gamma", ["0.97 (as listed)", "0.9"])):
            levels = numbers.factor_levels(factor, numbers.datasets[0])["td3"]
            assert [value for value, _ in levels] == expected

    def test_they_have_parts_of_their_own(self, factored: StudyNumbers) -> None:
        page = (factored.protocol.folder / "report.html").read_text(encoding="utf-8")
        parsed = Page(page)
        assert {"factor-offline_fraction", "factor-ensemble_size"} <= set(parsed.ids)
        assert "Factor: offline_fraction" in parsed.text and "offline_fraction on medium" in parsed.text
        assert "The pictures leave out" in parsed.text and "Some variants need a pretraining of their own" in parsed.text
        rows = list(csv.DictReader(io.StringIO((factored.protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        assert {row["factor_offline_fraction"] for row in rows} == {"", "0.0", "0.25", "lin_0.5_0.0"}

    def test_combined_factors_are_averaged_over_each_other(self, tmp_path: Path) -> None:
        changes = SMALL | methods("td3") | {"hyperparams": {"offline_fraction": 0.5}, "factors_combined": True}
        factors = {"offline_fraction": [0.5, 0.0], "ensemble_size": [2, 5, 10]}

        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            values = {"offline_fraction": 0.5, "ensemble_size": 2} | dict(cell.method.variant)
            end = 1500 + 400 * (values["offline_fraction"] == 0) + 10 * values["ensemble_size"]
            return np.where(share > 0, end, J0)

        protocol = write_study(tmp_path / "study", changes | {"factors": factors})
        assert len(protocol.methods) == 6
        unfinished = protocol.cells()[-1]
        write_runs(protocol, protocol.cells()[:-1], curve=curve)
        numbers = StudyNumbers(study_results(protocol.folder), {})
        levels = numbers.factor_levels("offline_fraction", numbers.datasets[0])["td3"]
        assert [value for value, _ in levels] == ["0.5", "0.0"]
        sizes = np.mean([20, 50, 100])
        for (_, group), end in zip(levels, (1500, 1900), strict=True):
            # Three sizes; the last seed lacks one
            assert len(group.runs) == 6 and unfinished.seed not in {one.seed for one in group.runs}
            estimate = group.estimate("last_return")
            assert estimate is not None and estimate.n == 2 and estimate.value == pytest.approx(end + sizes, rel=0.01)
        sizes_of = numbers.factor_levels("ensemble_size", numbers.datasets[0])["td3"]
        assert [(value, len(group.runs)) for value, group in sizes_of] == [("2", 4), ("5", 4), ("10", 4)]
        write_report(protocol.folder, formats=("html",))
        parsed = Page((protocol.folder / "report.html").read_text(encoding="utf-8"))
        assert {"factor-offline_fraction", "factor-ensemble_size"} <= set(parsed.ids)
        assert "each value is averaged over all values of the others" in parsed.text
        assert not re.search(r"\bnan\b", parsed.text)


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
        assert "they started from exactly the same weights" in text
        versions = [run.result.manifest["versions"] for run in study_results(protocol.folder).runs]
        recorded = all("sb3-offline-ft" in one for one in versions)
        assert ("All 12 runs had the same versions" if recorded else "sb3-offline-ft was not recorded") in text
        assert "as the runs had it" in text and "0 is a random policy (-1,309)" in text
        rows = list(csv.DictReader(io.StringIO((protocol.folder / "results.csv").read_text(encoding="utf-8"))))
        own = {row["method"]: int(row["learner_evaluation_steps"]) for row in rows}
        # An evaluation of Pendulum-v1 has 200 steps
        assert own["td3c"] > 0 and own["td3c"] % 200 == 0 and own["td3"] == 0
        for row, cell in zip(rows, protocol.cells(), strict=True):
            folder = run_folder(protocol.folder, cell.dataset, cell.method.name, cell.seed, row["key"])
            with np.load(folder / "evaluations.npz") as file:
                means = dict(zip(file["timesteps"].tolist(), file["results"].mean(axis=1).tolist(), strict=True))
            assert list(means) == [0, 200, 400]
            # Pretrained and not frozen: only after the warm-up of 100 steps
            counted = list(means.values())[1 if cell.method.pretrained and not cell.method.frozen else 0 :]
            assert float(row["lowest_return"]) == pytest.approx(min(counted))
            assert float(row["last_return"]) == pytest.approx(np.mean(counted))
