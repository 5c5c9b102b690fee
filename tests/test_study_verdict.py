"""The verdict on a study says what its results say, and the numbers that it is made of are those of the runs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from scipy import stats

from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.study import Cell, Run, StudyResults, write_report
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.factors import factor_levels
from sb3_offline_ft.study.report.tables import guard_table
from tests.made_up_study import COLLAPSED_TO, END, J0, J_RANDOM, WARMUP, level, result_of, write_run, write_runs, write_study
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


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> StudyNumbers:
    """Six methods on a dataset with five seeds, all finished."""
    protocol = write_study(tmp_path_factory.mktemp("verdict") / "made up", ONE_DATASET)
    write_runs(protocol)
    return numbers_of(protocol)


class TestVerdict:
    def test_collapses_are_counted_with_exact_intervals(self, numbers: StudyNumbers) -> None:
        interval = stats.binomtest(5, 5).proportion_ci(0.95, method="exact")
        assert f"{100 * interval.low:.0f}-{100 * interval.high:.0f} %" == "48-100 %"
        expected = (
            "On medium, plain TD3 collapsed in 5 of 5 seeds (95 % CI 48-100 %); offline policy as it is in 0 of 5 (0-52 %); "
            "TD3BC kept in 0 of 5 (0-52 %); TD3C in 0 of 5 (0-52 %); TD3C with guard in 0 of 5 (0-52 %)."
        )
        assert words(numbers, "In short").startswith(expected)

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
        # Four numbers are compared, besides what was served
        p = 4 * 2 / 2**8
        assert re.search(rf"Mean of the last 10 evaluations: lower for plain TD3 \(-[\d.]+, p = {p:.3f}\)", text)
        assert text.count("These intervals overlap; that is no test.") == 2
        assert "certain" not in text.replace("uncertain", "")

    def test_methods_that_do_not_differ_are_seldom_said_to_differ(self, tmp_path: Path) -> None:
        """Holm's correction allows 5 % of the studies; that 6 or more of 20 err has then a probability below 0.001."""
        changes = ONE_DATASET | methods("td3bc", "td3", "td3c") | {"seeds": 10, "interactions": 8_000}
        protocol = write_study(tmp_path / "study", changes | {"evaluation": {"every": 1_000, "episodes": 2}})
        runs = [Run(cell, protocol.cell_key(cell), result_of(protocol, cell)) for cell in protocol.cells()]
        claims, of_served, n_studies = 0, 0, 20
        for study_number in range(n_studies):
            rng = np.random.default_rng(study_number)
            means = J0 + rng.normal(0, 200, (len(runs), 1)) + rng.normal(0, 300, (len(runs), 1)) * np.linspace(0, 1, 9)
            episodes = means[..., None] + rng.normal(0, 150, (len(runs), 9, 2))
            made = []
            for run, one in zip(runs, episodes, strict=True):
                result = run.result
                returns = np.where(result.timesteps[:, None] > WARMUP, one, J0)
                acted, own = (
                    np.interp(steps, result.timesteps, returns.mean(axis=1))
                    for steps in (result.training_timesteps, result.own_timesteps)
                )
                own_returns = np.broadcast_to(own[:, None], result.own_returns.shape)
                result = replace(result, returns=returns, training_returns=acted, own_returns=own_returns)
                made.append(Run(run.cell, run.key, result))
            found = words(StudyNumbers(StudyResults(protocol, tuple(made), (), {}), {}), "Compared")
            claims += re.search(r"(higher|lower|deeper|less deep|more often|less often) for", found) is not None
            of_served += re.search(r"(more|less) for", found) is not None
            assert "What was served: " in found
        assert stats.binom.sf(5, n_studies, 0.05) < 0.001
        assert claims <= 5 and of_served <= 5

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
            write_run(protocol, cell, result)
        text = words(protocol, "In short")
        assert re.search(r"offline policy as it is (collapsed )?in \d of 5", text)
        (share,) = re.findall(r"an unchanged policy would count as collapsed in (\d+)(?: to \d+)? % of runs", text)
        assert int(share) == pytest.approx(100 * (1 - (1 - 0.75**10) ** 28), abs=20)
        write_report(protocol.folder, formats=("csv",))
        rows = results_rows(protocol)
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
        assert re.search(rf"no difference shown for .*plain TD3 \(-(69|70)\d, p = {min(1, 15 * 2 / 2**5):.2f}\)", text)
        assert "With 5 pairs of runs, a paired test cannot give a p-value below 0.062" in words(numbers, "What remains")

    def test_what_is_not_alike_is_not_compared(self, numbers: StudyNumbers) -> None:
        compared = {name: {row.metric for row in numbers.tests.comparisons if row.method.name == name} for name in METHODS}
        assert compared["scratch"] == {"served_mean_return", "last_return"}
        assert compared["offline"] == {"served_mean_return", "last_return", "mean_return"}
        assert compared["td3"] == {"served_mean_return", "last_return", "mean_return", "dip_depth", "collapsed"}
        assert not compared["td3c"]

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
        p = 8 * 2 / 2**10  # two methods are compared by four numbers, besides what was served
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
        protocol = study_without_scores(tmp_path)
        write_runs(protocol)
        text = words(protocol)
        assert "not defined for plain TD3 and TD3C: the return of a random policy is not known" in text
        assert "collapsed" not in text and "dip" not in words(protocol, "On ") and "normalised" not in text

    def test_a_pretrained_policy_that_is_no_better_than_a_random_one_has_nothing_to_lose(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3", "td3c") | {"random_return": 1130.0})
        # The seeds' levels are 1100, 1120 and 1140
        write_runs(protocol)
        numbers = numbers_of(protocol)
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
        text = report_page(protocol).text
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
        write_run(protocol, cell, result)
        text = words(protocol, "What remains")
        assert expected in text if expected else "learning runs" not in text
        write_report(protocol.folder, formats=("csv",))
        rows = results_rows(protocol)
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
        write_run(protocol, cell, result)
        expected = "The guard watched no returns in 1 run, so had no alarms: medium/td3c-guard/seed0."
        assert expected in words(protocol, "What remains")
        numbers = numbers_of(protocol)
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
        text = report_page(protocol).text
        assert "of 3 runs 1 run has not finished (1 with damaged files)." in text
        assert "medium/td3/seed1 its run folder is damaged" in text and "other settings" not in text
        # Nor those that have another name now
        write_study(protocol.folder, SMALL | {"methods": {"renamed": METHODS["td3"]}, "reference_method": None})
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
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
        protocol = study_without_scores(tmp_path, random_return=100.0)
        write_runs(protocol)
        numbers = numbers_of(protocol)
        scale = numbers.datasets[0].scale
        assert scale is not None
        # The seeds' levels are 1100, 1120 and 1140
        assert scale.top == pytest.approx(1120, rel=0.01) and scale.normalized(scale.top) == 100
        assert "100 the mean level of the pretrained policies (1,1" in numbers.scale_words
        assert scale.normalized(100.0) == 0

    def test_a_scale_must_have_its_top_above_a_random_policy(self, tmp_path: Path) -> None:
        protocol = study_without_scores(tmp_path, random_return=1_500.0)
        write_runs(protocol)
        numbers = numbers_of(protocol)
        assert numbers.datasets[0].scale is None and not numbers.aggregates and not numbers.profiles
        assert {numbers.score(one) for one in numbers.runs} == {None}
        expected = "There are no normalised scores on own: 100 would not be above 0 (0 is a random policy (1,500"
        assert expected in words(numbers, "What remains") and "normalised ends" not in words(numbers)
        write_report(protocol.folder, formats=("html",))
        text = report_page(protocol).text
        assert "There are no normalised scores. On own, 100 would not be above 0" in text

    def test_the_environments_scores_are_checked_too(self, tmp_path: Path) -> None:
        protocol = write_study(tmp_path / "study", SMALL | methods("td3c") | {"random_return": 5_000.0})
        write_runs(protocol)
        numbers = numbers_of(protocol)
        assert numbers.datasets[0].scale is None and "100 an expert (3,857.8)" in numbers.datasets[0].why_no_scale

    def test_scores_are_of_what_all_methods_have(self, tmp_path: Path) -> None:
        def curve(cell: Cell, share: np.ndarray) -> np.ndarray:
            return np.where(share <= 0, J0, 500.0 if cell.dataset == "medium" else 2500.0)

        protocol = write_study(tmp_path / "study", {"interactions": 12_000} | methods("td3bc", "td3c"))
        missing = {("td3bc", "medium", seed) for seed in range(1, 5)}
        done = [cell for cell in protocol.cells() if (cell.method.name, cell.dataset, cell.seed) not in missing]
        write_runs(protocol, done, curve=curve)
        numbers = numbers_of(protocol)
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
        numbers = numbers_of(protocol)
        assert {row.metric: row.n for row in numbers.tests.comparisons} == {"served_mean_return": 3, "last_return": 3}
        scratch, td3c = numbers.aggregates
        assert (scratch.iqm.n, td3c.iqm.n) == (5, 8)
        # Three seeds on two datasets, and three runs from scratch, which are the same on both
        (improvement,) = numbers.improvements
        assert improvement.probability.n == 2 * 3 + 3


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> StudyNumbers:
    changes = SMALL | methods("offline", "td3", "td3c") | {
        "hyperparams": {"offline_fraction": 0.5},
            "factors": {"offline_fraction": [0.0, 0.25, "lin_0.5_0.0"], "ensemble_size": [2, 5]}, "seeds": 2,
    }  # fmt: skip
    protocol = write_study(tmp_path_factory.mktemp("factors") / "study", changes)
    write_runs(protocol)
    write_report(protocol.folder, formats=("html", "csv"))
    return numbers_of(protocol)


class TestFactors:
    def test_each_value_has_its_runs_after_the_method_as_listed(self, factored: StudyNumbers) -> None:
        levels = factor_levels(factored.protocol, "offline_fraction", factored.datasets[0].groups)
        assert set(levels) == {"td3", "td3c"}
        assert [value for value, _ in levels["td3c"]] == ["0.5 (as listed)", "0.0", "0.25", "lin_0.5_0.0"]
        for value, group in levels["td3c"]:
            assert group.method.base == "td3c" and len(group.runs) == 2
            assert value == "0.5 (as listed)" or group.method.variant == {"offline_fraction": yaml.safe_load(value)}

    def test_defaults_that_are_not_written_are_named_too(self, factored: StudyNumbers) -> None:
        levels = factor_levels(factored.protocol, "ensemble_size", factored.datasets[0].groups)
        assert [value for value, _ in levels["td3"]] == ["2 (as listed)", "5"]

    def test_what_is_not_written_is_what_the_runs_had(self, tmp_path: Path) -> None:
        changes = SMALL | methods("td3") | {"seeds": 1, "factors": {"ensemble_size": [5], "gamma": [0.9]}}
        protocol = write_study(tmp_path / "study", changes)
        # As they were made when the defaults were others
        write_runs(protocol, hyperparams={"gamma": 0.97, "policy_kwargs": {"n_critics": 3}})
        numbers = numbers_of(protocol)
        for factor, expected in (("ensemble_size", ["3 (as listed)", "5"]), ("gamma", ["0.97 (as listed)", "0.9"])):
            levels = factor_levels(protocol, factor, numbers.datasets[0].groups)["td3"]
            assert [value for value, _ in levels] == expected

    def test_they_have_parts_of_their_own(self, factored: StudyNumbers) -> None:
        parsed = report_page(factored.protocol)
        assert {"factor-offline_fraction", "factor-ensemble_size"} <= set(parsed.ids)
        assert "Factor: offline_fraction" in parsed.text and "offline_fraction on medium" in parsed.text
        assert "The pictures leave out" in parsed.text and "Some variants need a pretraining of their own" in parsed.text
        rows = results_rows(factored.protocol)
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
        numbers = numbers_of(protocol)
        levels = factor_levels(protocol, "offline_fraction", numbers.datasets[0].groups)["td3"]
        assert [value for value, _ in levels] == ["0.5", "0.0"]
        sizes = np.mean([20, 50, 100])
        for (_, group), end in zip(levels, (1500, 1900), strict=True):
            # Three sizes; the last seed lacks one
            assert len(group.runs) == 6 and unfinished.seed not in {one.seed for one in group.runs}
            estimate = group.estimate("last_return")
            assert estimate is not None and estimate.n == 2 and estimate.value == pytest.approx(end + sizes, rel=0.01)
        sizes_of = factor_levels(protocol, "ensemble_size", numbers.datasets[0].groups)["td3"]
        assert [(value, len(group.runs)) for value, group in sizes_of] == [("2", 4), ("5", 4), ("10", 4)]
        write_report(protocol.folder, formats=("html",))
        parsed = report_page(protocol)
        assert {"factor-offline_fraction", "factor-ensemble_size"} <= set(parsed.ids)
        assert "each value is averaged over all values of the others" in parsed.text
        assert not re.search(r"\bnan\b", parsed.text)
