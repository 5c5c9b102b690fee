"""What a study's report says of served returns is what everything that acted in its runs earned."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_offline_ft.evaluation.served import WINDOW
from sb3_offline_ft.pages.words import NONE, number, probability
from sb3_offline_ft.study import Cell, Protocol, write_report
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.runs import Group
from sb3_offline_ft.study.report.summary import headline, summary_table
from tests.made_up_study import (
    COLLAPSED_TO,
    EPISODES,
    J0,
    J_RANDOM,
    WARMUP,
    result_of,
    write_run,
    write_runs,
    write_study,
)
from tests.reported_studies import METHODS, ONE_DATASET, methods, numbers_of, results_rows, words

EARLY, LATE = 100.0, 900.0


def rising(cell: Cell, share: np.ndarray) -> np.ndarray:
    """From one level to another after half of the finetuning."""
    return np.where(share > 0.5, LATE, EARLY)


def groups_of(numbers: StudyNumbers) -> dict[str, Group]:
    return {group.method.name: group for group in numbers.datasets[0].groups}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    """Six methods on a dataset with three seeds."""
    protocol = write_study(tmp_path_factory.mktemp("served") / "made up", ONE_DATASET | {"seeds": 3})
    write_runs(protocol)
    return protocol


def test_training_episodes_are_served(study: Protocol) -> None:
    group = groups_of(numbers_of(study))["td3"]
    for one in group.runs:
        result = one.run.result
        ends, returns = result.training_timesteps, result.training_returns
        # All episodes are equally long here
        assert one.value("served_initial_return") == pytest.approx(returns[ends <= WARMUP].mean())
        assert one.value("served_warmup_return") == pytest.approx(returns[ends <= WARMUP].mean())
        assert one.value("served_mean_return") == pytest.approx(returns.mean())
        assert one.value("served_last_third_return") == pytest.approx(returns[ends > 20_000].mean())
        within = (ends > 10_000 - WINDOW) & (ends <= 10_000)
        assert one.value("served_return_at_10000") == pytest.approx(returns[within].mean())
        assert one.value("served_return_at_100000") is None
        lost = returns[ends > WARMUP] <= J_RANDOM + 0.25 * (returns[ends <= WARMUP].mean() - J_RANDOM)
        assert one.value("served_collapsed_share") == pytest.approx(lost.mean()) and lost.any()
        assert one.value("served_dip_depth") == pytest.approx(
            (J0 + 20 * one.seed - COLLAPSED_TO) / (J0 + 20 * one.seed - J_RANDOM), abs=1e-3
        )


def test_own_evaluations_are_paid_for(tmp_path: Path) -> None:
    """A learner that is evaluated a lot has learned nothing yet, when another has."""
    protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3", "td3c") | {"seeds": 2})
    write_runs(protocol, curve=rising)
    groups = groups_of(numbers_of(protocol))
    for name, expected in (("td3", LATE), ("td3c", EARLY)):
        assert groups[name].values("served_last_third_return") == pytest.approx([expected] * 2)
        # What is measured does not see that
        assert groups[name].values("last_return") == pytest.approx([LATE] * 2, rel=0.02)
    # By then it has trained for little more than a third of the run
    assert groups["td3c"].values("served_return_at_100000") == pytest.approx([EARLY] * 2)
    assert [one.acted.interactions for one in groups["td3c"].runs if one.acted] == [280_000, 281_000]


def test_a_policy_that_does_not_change_serves_what_was_measured(study: Protocol) -> None:
    for one in groups_of(numbers_of(study))["offline"].runs:
        # 500 interactions each: 60 of the 310 episodes
        first = one.run.result.returns.ravel()[: study.interactions // 500]
        assert one.value("served_mean_return") == pytest.approx(first.mean())
        assert one.value("served_initial_return") == pytest.approx(first.mean())
        assert one.value("served_shortfall") == pytest.approx(0, abs=1e-9)
        assert one.value("served_return_at_100000") is None


def test_runs_that_did_not_record_their_evaluations_have_no_served_return(tmp_path: Path) -> None:
    protocol = write_study(tmp_path / "study", ONE_DATASET | methods("td3", "td3c") | {"seeds": 2})
    write_runs(protocol)
    for cell in protocol.cells():
        result = result_of(protocol, cell)
        result.own_timesteps, result.own_returns = np.zeros(0, np.int64), np.zeros((0, EPISODES))
        result.own_lengths = np.zeros((0, EPISODES), np.int64)
        write_run(protocol, cell, result)
    groups = groups_of(numbers_of(protocol))
    assert len(groups["td3"].values("served_mean_return")) == 2 and not groups["td3c"].values("served_mean_return")
    said = "What was served is not known of 2 of 4 runs (TD3C): they did not record what their own evaluations returned"
    assert said in words(protocol, "What remains") and "TD3C" not in words(protocol, "What was served")
    write_report(protocol.folder)
    rows = results_rows(protocol)
    assert {row["method"]: row["served_mean_return"] == "" for row in rows} == {"td3": False, "td3c": True}
    served = (protocol.folder / "tables.md").read_text().split("### ")[1]
    assert "plain TD3" in served and "TD3C" not in served and f"at {100_000:,}" not in served


def test_the_verdict_begins_with_it(study: Protocol) -> None:
    numbers = numbers_of(study)
    groups = groups_of(numbers)
    text = words(numbers, "What was served")
    assert words(numbers).startswith(text)
    after, third, losses = text.split(". Mean return of everything")[0], *re.split(r"\. (?:Mean|Largest)", text)[1:]
    for name, method in METHODS.items():
        for part, metric in ((after, "mean"), (third, "last_third")):
            estimate = groups[name].estimate(f"served_{metric}_return")
            assert estimate is not None and f"{method['label']} {estimate.value:,.0f} (" in part
    largest = max(groups["td3"].values("served_largest_shortfall"))
    share = 100 * np.mean(groups["td3"].values("served_collapsed_share"))
    assert f"plain TD3 {largest:.1f}, {share:.1f} %" in losses and "from scratch" not in losses


def test_what_a_champion_spent_at_risk(tmp_path: Path) -> None:
    gated = {"label": "TD3C behind a champion", "algorithm": "td3c", "champion": True}
    compared = {"methods": {"td3": METHODS["td3"], "td3c": gated}, "reference_method": "td3c"}
    protocol = write_study(tmp_path / "study", ONE_DATASET | compared | {"seeds": 2})
    for cell in protocol.cells():
        result = result_of(protocol, cell)
        if cell.method.champion is not None:
            # In the warm-up nothing is at risk that counts; after it one trial in a row of five, and no exploration
            result.training_kinds = np.where(np.arange(result.training_timesteps.size) % 5 == 0, 2, 0)
        write_run(protocol, cell, result)
    numbers = numbers_of(protocol)
    groups = groups_of(numbers)
    for one in groups["td3c"].runs:
        result = one.run.result
        served_baseline = result.training_returns[result.training_timesteps <= WARMUP].mean()
        of_trials = result.training_returns[(result.training_timesteps > WARMUP) & (result.training_kinds == 2)]
        lost = ((served_baseline - of_trials) / (served_baseline - J_RANDOM)).sum()
        assert one.value("served_trial_episodes") == of_trials.size == 28
        assert one.value("served_trial_shortfall") == pytest.approx(lost) and lost < 0
        assert (one.value("served_explore_episodes"), one.value("served_explore_shortfall")) == (0, 0)
    assert not groups["td3"].values("served_trial_episodes")
    mean = np.mean(groups["td3c"].values("served_trial_shortfall"))
    said = f"TD3C behind a champion 28.0 trials (shortfall {mean:.1f}) and 0.0 explorations (shortfall 0.0)."
    assert f"means over the seeds: {said}" in words(numbers, "What was served")
    write_report(protocol.folder)
    table = (protocol.folder / "tables.md").read_text().split("### ")[1]
    titles, rows = re.findall(r"^\| method.*", table, re.MULTILINE), re.findall(r"^\| (?:plain|TD3C).*", table, re.MULTILINE)
    place = titles[0].split(" | ").index("trials")
    trials = {row.split(" | ")[0]: row.split(" | ")[place] for row in rows}
    assert [text[:4] for text in trials.values()] == [NONE, "28.0"]
    assert {row["method"]: row["served_trial_episodes"] for row in results_rows(protocol)} == {"td3": "", "td3c": "28"}


def test_curves_are_of_equal_interactions(study: Protocol) -> None:
    for name, group in groups_of(numbers_of(study)).items():
        curve = group.served_curve(study.interactions)
        assert curve is not None and curve.x[-1] == study.interactions
        means = [one.acted.mean_return(0, study.interactions) for one in group.runs if one.acted is not None]
        # Its points are of equally many interactions: their mean is that of all
        assert np.mean(curve.value) == pytest.approx(np.mean(means)), name


def test_results_have_it(study: Protocol) -> None:
    write_report(study.folder, formats=["csv"])
    rows = results_rows(study)
    assert "served_trial_episodes" not in rows[0]
    assert list(rows[0])[5].startswith("served_")
    for row, one in zip(rows, numbers_of(study).runs, strict=True):
        for name, value in one.served.values().items():
            assert (float(row[name]) if row[name] else None) == value, name


# What is read first


def first_words(protocol: Protocol) -> str:
    return headline(numbers_of(protocol)).replace("\N{MINUS SIGN}", "-")


def test_the_headline_says_who_served_most_and_what_tests_say(tmp_path: Path) -> None:
    def study(name: str, seeds: int, **changes: Any) -> Protocol:
        protocol = write_study(tmp_path / name, ONE_DATASET | {"seeds": seeds} | methods("offline", "td3", "td3c") | changes)
        write_runs(protocol)
        return protocol

    many = study("many", 12)
    served = {group.label: group.values("served_mean_return") for group in numbers_of(many).datasets[0].groups}
    (most, highest), (second, _), *_ = sorted(served.items(), key=lambda row: -np.mean(row[1]))
    text = first_words(many)
    assert text.startswith(f"On medium, {most} served most, {np.mean(highest):,.0f} on average (12 seeds; lost episodes ")
    assert f"before {second} with" in text and (most, second) == ("plain TD3", "TD3C")
    # All of 2^12 flips of signs are as large: p = 2 / 2^12, doubled by Holm's correction for the first of two tests
    small = f"({probability(4 / 2**12)})"
    assert (
        f"Paired tests say that TD3C served less than plain TD3 {small} and more than offline policy as it is {small}." in text
    )
    # However large a difference is, two pairs prove nothing
    few = first_words(study("few", 2))
    assert "Paired tests do not tell TD3C from offline policy as it is and plain TD3, as there are too few pairs." in few
    assert "names no reference method" in first_words(study("none", 2, reference_method=None))
    assert "What was served is not tested: no other method has two runs" in first_words(study("one", 1))
    unfinished = study("unfinished", 2, reference_method="td3c")
    shutil.rmtree(unfinished.folder / "runs" / "medium" / "td3c")
    assert "Nothing is tested, as no run of td3c, its reference, has finished." in first_words(unfinished)
    assert "No run of td3c, the reference, has finished" in words(unfinished, "What remains")


def test_who_served_alike_is_named_together(tmp_path: Path) -> None:
    protocol = write_study(tmp_path / "tie", ONE_DATASET | {"seeds": 2} | methods("td3", "td3bc"))
    write_runs(protocol, curve=lambda cell, share: np.full(share.shape, 500.0))
    text = first_words(protocol)
    assert re.match(r"On medium, (plain TD3|TD3BC kept) and (plain TD3|TD3BC kept) served 500 on average \(2 seeds", text)
    assert "before" not in text and "most" not in text


def test_a_warm_up_counts_as_served_and_not_for_means_over_time(tmp_path: Path) -> None:
    """So methods with other warm-ups, or none, are ranked and tested by what they served."""
    compared = methods("offline", "td3", "scratch") | {"reference_method": "td3"}
    protocol = write_study(tmp_path / "study", ONE_DATASET | {"seeds": 8} | compared)
    write_runs(protocol, curve=lambda cell, share: np.where(share > 0.5, 900.0, 100.0) + (cell.method.name == "scratch"))
    tests = {(row.method.name, row.metric) for row in numbers_of(protocol).tests.comparisons}
    assert {("offline", "served_mean_return"), ("scratch", "served_mean_return"), ("scratch", "last_return")} <= tests
    assert ("scratch", "mean_return") not in tests and ("offline", "mean_return") in tests
    assert "from scratch" in first_words(protocol)


def test_the_last_third_of_a_policy_that_never_changes_is_of_what_was_measured(tmp_path: Path) -> None:
    rarely = {"seeds": 1, "interactions": 10**6, "evaluation": {"every": 10**5, "episodes": EPISODES}}
    protocol = write_study(tmp_path / "study", ONE_DATASET | rarely | methods("offline"))
    write_runs(protocol)
    (one,) = groups_of(numbers_of(protocol))["offline"].runs
    measured = one.run.result.returns.ravel()
    assert one.value("served_mean_return") == pytest.approx(measured.mean())
    third = one.value("served_last_third_return")
    assert third is not None and measured.min() <= third <= measured.max()


def test_seeds_in_the_headline_are_those_of_its_numbers(tmp_path: Path) -> None:
    protocol = write_study(tmp_path / "study", ONE_DATASET | {"seeds": 2} | methods("td3"))
    write_runs(protocol)
    without = protocol.cells()[-1]
    result = result_of(protocol, without)
    result.training_timesteps, result.training_returns = np.zeros(0, np.int64), np.zeros(0)
    result.training_kinds = np.zeros(0, np.int64)
    write_run(protocol, without, result)
    assert re.search(r"plain TD3 served [\d,]+ on average \(1 seed;", first_words(protocol))
    assert groups_of(numbers_of(protocol))["td3"].served_curve(protocol.interactions) is not None


def test_the_level_of_the_pretrained_policy_is_not_that_of_commands(tmp_path: Path) -> None:
    command = {"label": "a command", "external": {"command": ["true"]}}
    compared = {"methods": {"td3": METHODS["td3"], "own": command}, "reference_method": "td3"}
    protocol = write_study(tmp_path / "study", ONE_DATASET | {"seeds": 2} | compared)
    for cell in protocol.cells():
        result = result_of(protocol, cell, lambda cell, share: np.full(share.shape, J0 if cell.method.name == "td3" else 30.0))
        if cell.method.external is not None:
            result.manifest |= {"external": cell.method.external, "pretrained": None}
            del result.manifest["replay_buffer"]
        write_run(protocol, cell, result)
    numbers = numbers_of(protocol)
    assert numbers.datasets[0].initial_return == pytest.approx(J0, rel=0.05)
    assert "did not record all" not in words(numbers, "What remains")


def test_the_first_table_and_picture_are_of_what_was_served(study: Protocol) -> None:
    table, numbers = summary_table(numbers_of(study)), numbers_of(study)
    assert [row[0] for row in table.rows] == [method.label for method in numbers.methods]
    assert len({len(row) for row in [table.columns, *table.rows]}) == 1
    for row, group in zip(table.rows, numbers.datasets[0].groups, strict=True):
        for text, name in zip(row[1:3], ("served_mean_return", "final_return"), strict=True):
            estimate = group.estimate(name)
            assert text == NONE if estimate is None else text.startswith(number(estimate.value))
    write_report(study.folder, formats=["html"])
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    order = [page.index(what) for what in ('id="summary"', headline(numbers)[:40], "served-medium", 'id="verdict"')]
    assert order == sorted(order)
