"""
Estimates and comparisons of few runs, against closed forms, published values, and rliable.

Statistical tests have fixed seeds; they fail if the exact 99.9 % interval of a measured rate excludes what is promised.
"""

import importlib.util
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sb3_offline_ft.evaluation.comparisons import compare_paired, compare_paired_rates, compare_rates, holm
from sb3_offline_ft.evaluation.statistics import (
    aggregate,
    curve_band,
    performance_profile,
    probability_of_improvement,
    rate,
)

REFERENCE = json.loads((Path(__file__).parent / "data" / "rliable_reference.json").read_text())
SCORE = st.floats(-100, 100).map(lambda value: round(value, 2))
RUNS = st.lists(SCORE, min_size=1, max_size=8)
DATASETS = st.lists(RUNS, min_size=1, max_size=3)


def reference_scores(name):
    """Of each task the runs."""
    return list(np.array(REFERENCE["scores"][name]).T)


def assert_rate(n_hits, n, low, high):
    interval = stats.binomtest(n_hits, n).proportion_ci(0.999, method="exact")
    assert interval.low <= high and low <= interval.high, f"{n_hits} of {n}, promised {low} to {high}"


# Aggregates


def test_the_interquartile_mean_in_closed_form():
    # Of 4k numbers 1, ..., 4k the middle ones have the mean of all; an outlier changes nothing
    assert aggregate([[1, 2, 3, 4]]).value == 2.5
    assert aggregate([[1, 2, 3, 1000]]).value == 2.5
    assert aggregate([[-1e9, 5, 6, 10, 1e9]]).value == 7  # one of five is left out at each end
    assert aggregate([[1, 2, 9]]).value == 4  # none of three
    assert aggregate([[0] * 5, [10] * 5]).value == 5  # datasets are pooled: of ten, two at each end


def test_mean_and_median_in_closed_form():
    assert aggregate([[1, 2, 6], [10]], "mean").value == 6.5  # datasets count the same
    assert aggregate([[1, 2, 6], [10]], "median").value == 4
    assert aggregate([[1, 2, 6], [10], [20]], "task_median").value == 10


def test_the_interquartile_mean_is_rliables_for_every_number_of_runs():
    runs = np.ravel(REFERENCE["scores"]["x"])
    for n, expected in enumerate(REFERENCE["iqm_of_the_first"], start=1):
        assert aggregate([runs[:n]], n_resamples=10).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["x", "y", "five"])
@pytest.mark.parametrize("statistic", ["iqm", "mean", "task_median"])
def test_aggregates_and_intervals_are_rliables(name, statistic):
    expected = REFERENCE["aggregates"][name][statistic]
    estimate = aggregate(reference_scores(name), statistic, n_resamples=REFERENCE["n_resamples"])
    assert estimate.value == pytest.approx(expected["value"], rel=1e-12)
    # Both ends come from 50,000 resamples: the standard error of their difference is below 0.5 % of a normal interval
    tolerance = 0.03 * (expected["high"] - expected["low"])
    assert estimate.low == pytest.approx(expected["low"], abs=tolerance)
    assert estimate.high == pytest.approx(expected["high"], abs=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("rliable") is None, reason="rliable is not installed")
def test_the_installed_rliable_agrees():
    from rliable import metrics

    rng = np.random.default_rng(3)
    for n_runs, n_tasks in itertools.product((1, 2, 3, 5, 7, 10), (1, 2, 4)):
        x, y = rng.normal(size=(2, n_runs, n_tasks)).round(1)
        functions = {"iqm": metrics.aggregate_iqm, "mean": metrics.aggregate_mean, "task_median": metrics.aggregate_median}
        for statistic, function in functions.items():
            assert aggregate(list(x.T), statistic, n_resamples=10).value == pytest.approx(function(x), abs=1e-12)
        expected = metrics.probability_of_improvement(x, y)
        assert probability_of_improvement(list(x.T), list(y.T), n_resamples=10).value == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(scores=DATASETS, order=st.randoms(use_true_random=False))
def test_aggregates_lie_between_the_runs_whatever_their_order(scores, order):
    everything = np.concatenate(scores)
    shuffled = [order.sample(runs, len(runs)) for runs in order.sample(scores, len(scores))]
    for statistic in ("iqm", "mean", "median", "task_median"):
        estimate = aggregate(scores, statistic, n_resamples=50)
        assert everything.min() - 1e-9 <= estimate.value <= everything.max() + 1e-9
        assert aggregate(shuffled, statistic, n_resamples=50).value == pytest.approx(estimate.value, abs=1e-9)
        if estimate.has_interval:
            assert everything.min() - 1e-9 <= estimate.low <= estimate.high <= everything.max() + 1e-9
        assert estimate.n == everything.size


def test_all_resamples_of_two_runs():
    # Of two runs the mean of a resample is either run with probability 1/4 each, else the middle
    estimate = aggregate([[0.0, 1.0]], "mean", n_resamples=2000)
    assert (estimate.low, estimate.high) == (0, 1)
    narrow = aggregate([[0.0, 1.0]], "mean", confidence=0.4, n_resamples=2000)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_runs_are_resampled_within_their_dataset():
    # Datasets far apart: their difference is not uncertainty
    estimate = aggregate([[0.0, 0.1, 0.2], [100.0, 100.1, 100.2]], "mean")
    assert 49.9 < estimate.low < estimate.high < 50.3


def test_one_run_has_no_interval():
    for scores in ([[3.0]], [[1.0, 2.0], [3.0]]):
        estimate = aggregate(scores)
        assert np.isnan(estimate.low) and np.isnan(estimate.high) and not estimate.has_interval
        assert "no interval: it takes at least two runs per dataset" in estimate.method


def test_equal_runs_have_no_interval():
    estimate = aggregate([[0.1] * 5])
    assert estimate.value == pytest.approx(0.1) and not estimate.has_interval
    assert "no interval: all resamples give the same value" in estimate.method


def test_an_estimate_says_how_it_was_computed():
    estimate = aggregate({"medium": [1.0, 2.0], "replay": [1.0, 2.0, 4.0]}, confidence=0.9, n_resamples=1234)
    for words in ("interquartile mean of 5 runs on 2 datasets", "90 % stratified percentile bootstrap (1,234 resamples)"):
        assert words in estimate.method


def test_same_seed_same_interval():
    runs = np.random.default_rng(0).normal(size=9)
    first, second, other = (aggregate([runs], n_resamples=500, seed=seed) for seed in (4, 4, 5))
    assert first == second and first.value == other.value and first != other


def test_intervals_of_ten_runs_cover_the_truth():
    # benchmarks/studies/interval_coverage.md: 0.93 of intervals of 95 %
    rng, n_studies = np.random.default_rng(0), 400
    estimates = [aggregate([rng.normal(size=10)], n_resamples=500, seed=study) for study in range(n_studies)]
    assert_rate(sum(estimate.low <= 0 <= estimate.high for estimate in estimates), n_studies, 0.91, 0.95)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "`scores` is empty"),
        ([[]], "dataset 0 has shape \\(0,\\)"),
        ([1.0, 2.0], "one array of runs per dataset.*dataset 0 has shape \\(\\)"),
        ({"medium": [1.0, np.nan]}, "Run 1 of dataset 'medium' has a score of nan or inf"),
        ([[1.0], [np.inf]], "Run 0 of dataset 1"),
    ],
)
def test_scores_without_a_meaning_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        aggregate(scores)
    with pytest.raises(ValueError, match=message):
        performance_profile(scores, [0.0])


def test_options_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="one of iqm, mean, median, task_median; found 'modus'"):
        aggregate([[1.0, 2.0]], "modus")
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1, found 95"):
        aggregate([[1.0, 2.0]], confidence=95)
    with pytest.raises(ValueError, match="`n_resamples` must be at least 1"):
        aggregate([[1.0, 2.0]], n_resamples=0)
    with pytest.raises(ValueError, match="'pointwise' or 'simultaneous', found 'both'"):
        performance_profile([[1.0, 2.0]], [0.0], "both")


# Rates


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (5, 5, 0.025 ** (1 / 5), 1.0),  # 47.8 %, in closed form: all n have it with probability p^n
        (0, 5, 0.0, 1 - 0.025 ** (1 / 5)),
        (0, 10, 0.0, 0.3085),  # table values of Clopper & Pearson's interval
        (3, 10, 0.0667, 0.6525),
        (8, 10, 0.4439, 0.9748),
        (1, 1, 0.025, 1.0),
    ],
)
def test_exact_intervals_of_rates(successes, n, low, high):
    estimate = rate(successes, n)
    assert (estimate.value, estimate.n) == (successes / n, n)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), p=st.floats(0.01, 0.99))
def test_exact_intervals_cover_whatever_the_truth(n, p):
    intervals = [rate(k, n) for k in range(n + 1)]
    missed = sum(stats.binom.pmf(k, n, p) for k, interval in enumerate(intervals) if not interval.low <= p <= interval.high)
    assert missed <= 0.05 + 1e-9


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (6, 5), (-1, 5)])
def test_impossible_rates_are_refused(successes, n):
    with pytest.raises(ValueError, match=f"found {successes} of {n}"):
        rate(successes, n)


# Probability of improvement


def test_probability_of_improvement_is_rliables():
    expected = REFERENCE["probability_of_improvement"]
    estimate = probability_of_improvement(reference_scores("x"), reference_scores("y"), n_resamples=10_000)
    assert estimate.value == pytest.approx(expected["value"], rel=1e-12)
    # 10,000 resamples of a statistic with steps of 1/420
    assert estimate.low == pytest.approx(expected["low"], abs=0.015)
    assert estimate.high == pytest.approx(expected["high"], abs=0.015)


@settings(max_examples=60, deadline=None)
@given(x=RUNS, y=RUNS)
def test_probability_of_improvement_is_the_mann_whitney_statistic(x, y):
    expected = stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y)) if len({*x, *y}) > 1 else 0.5
    forth = probability_of_improvement([x], [y], n_resamples=20)
    back = probability_of_improvement([y], [x], n_resamples=20)
    assert forth.value == pytest.approx(expected, abs=1e-12)
    assert forth.value + back.value == pytest.approx(1)


def test_probability_of_improvement_averages_over_datasets():
    x, y = {"a": [2, 3], "b": [1, 2, 3]}, {"b": [1, 2, 3], "a": [0, 1]}
    estimate = probability_of_improvement(x, y)
    assert estimate.value == 0.75 and 0.5 <= estimate.low < 0.75 < estimate.high <= 1


def test_runs_that_all_datasets_share_are_resampled_once():
    rng = np.random.default_rng(0)
    x, y = [rng.normal(size=5) for _ in range(3)], rng.normal(size=5)
    each, once = (probability_of_improvement(x, [y] * 3, shared=shared) for shared in (None, "y"))
    back = probability_of_improvement([y] * 3, x, shared="x")
    assert once.value == pytest.approx(each.value) and back.value == pytest.approx(1 - each.value)
    assert (each.n, once.n, back.n) == (30, 20, 20)
    # The variance of the shared runs is not divided by the number of datasets
    assert once.high - once.low > 1.15 * (each.high - each.low)
    assert (once.low, once.high) == pytest.approx((1 - back.high, 1 - back.low), abs=0.03)
    assert probability_of_improvement(x[:1], [y], shared="y").low == probability_of_improvement(x[:1], [y]).low
    with pytest.raises(ValueError, match="same on all datasets: those of `x` differ"):
        probability_of_improvement(x, [y] * 3, shared="x")


def test_intervals_with_shared_runs_cover():
    """5 runs on each of 3 datasets, against 5 shared ones: percentile intervals of 95 % from so few cover about 91 %."""
    rng, covered, n_studies = np.random.default_rng(0), {None: 0, "y": 0}, 200
    for _ in range(n_studies):
        y = rng.normal(size=5)
        x = [rng.normal(size=5) for _ in range(3)]
        for shared in covered:
            estimate = probability_of_improvement(x, [y] * 3, shared=shared, n_resamples=300)
            covered[shared] += estimate.low <= 0.5 <= estimate.high
    # The standard error of 0.91 is 0.02
    assert covered["y"] / n_studies > 0.85 and covered["y"] > covered[None]


def test_full_separation_has_no_bootstrap_interval():
    estimate = probability_of_improvement([[5, 6, 7]], [[1, 2]])
    assert estimate.value == 1 and not estimate.has_interval


def test_methods_with_different_datasets_are_refused():
    with pytest.raises(ValueError, match=r"same datasets: found \['a'\] and \['b'\]"):
        probability_of_improvement({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="same datasets: found 1 and 2"):
        compare_paired([[1.0]], [[1.0], [2.0]])


# Profiles and curves


def test_performance_profile_is_rliables():
    expected = REFERENCE["performance_profile"]
    profile = performance_profile(reference_scores("x"), expected["thresholds"], n_resamples=10_000)
    np.testing.assert_allclose(profile.value, expected["value"], atol=1e-12)
    # Shares of 30 runs: both ends may differ by one run
    np.testing.assert_allclose(profile.low, expected["low"], atol=1 / 30 + 1e-9)
    np.testing.assert_allclose(profile.high, expected["high"], atol=1 / 30 + 1e-9)


def test_performance_profile_falls_from_one_to_zero():
    profile = performance_profile([[0.2, 0.4, 0.6, 0.8]], [0.0, 0.2, 0.5, 0.79, 0.8])
    np.testing.assert_allclose(profile.value, [1, 0.75, 0.5, 0.25, 0])
    assert np.all(profile.low <= profile.value) and np.all(profile.value <= profile.high)


def test_simultaneous_bands_cover_the_whole_profile():
    rng, thresholds, n_studies = np.random.default_rng(0), np.linspace(-3, 3, 121), 500
    truth, hits = stats.norm.sf(thresholds), 0
    for _ in range(n_studies):
        band = performance_profile([rng.normal(size=5)], thresholds, "simultaneous")
        hits += bool(np.all((band.low <= truth) & (truth <= band.high)))
    # 0.95 at all points there are, a little more on a grid
    assert_rate(hits, n_studies, 0.95, 0.97)
    assert band.low.min() == 0 and band.high.max() == 1
    assert "Kolmogorov" in band.method and band.n == 5


def test_curves_are_aggregated_at_each_evaluation():
    rng = np.random.default_rng(0)
    curves = {"medium": rng.normal(size=(5, 4)), "replay": rng.normal(size=(3, 4))}
    for statistic in ("iqm", "mean", "median"):
        band = curve_band([0, 10, 20, 40], curves, statistic, n_resamples=3000)
        assert band.n == 8 and band.x.tolist() == [0, 10, 20, 40]
        for point in range(4):
            estimate = aggregate([runs[:, point] for runs in curves.values()], statistic, n_resamples=3000)
            assert band.value[point] == pytest.approx(estimate.value, abs=1e-12)
            # The ends differ by what two times 3,000 resamples differ
            width = estimate.high - estimate.low
            assert band.low[point] == pytest.approx(estimate.low, abs=0.15 * width)
            assert band.high[point] == pytest.approx(estimate.high, abs=0.15 * width)


def test_large_curves_need_little_memory_at_a_time():
    curves = [np.random.default_rng(0).normal(size=(30, 31))]
    tracemalloc.start()
    try:
        band = curve_band(1000 * np.arange(31), curves, n_resamples=10_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All resamples at once are 9.3 million numbers and copies of them
    assert peak < 8 * 31 * 30 * 10_000 * 1.5
    # The mean of the middle 16 of 30 normal runs has a standard error of about 1.1 / sqrt(30)
    assert np.median(band.high - band.low) == pytest.approx(2 * 1.96 * 1.1 / np.sqrt(30), rel=0.15)


def test_one_run_has_a_curve_without_a_band():
    for curves in ([[[1.0, 2.0]]], [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]):
        band = curve_band([0, 1], curves)
        assert np.isnan(band.low).all() and np.isnan(band.high).all() and np.isfinite(band.value).all()
        assert "no interval" in band.method
    assert np.isnan(performance_profile([[1.0]], [0.0, 2.0], "simultaneous").low).all()


def test_where_runs_agree_the_band_has_no_width():
    band = curve_band([0, 1], [[[5.0, 1.0], [5.0, 2.0], [5.0, 3.0]]], "mean")
    assert band.low[0] == band.value[0] == band.high[0] and band.low[1] < band.high[1]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([[[1.0, 2.0], [1.0]]], "run 1 of dataset 0 has shape \\(1,\\), expected \\(2,\\).*unfinished"),
        ({"medium": [[1.0, np.nan]]}, "Run 0 of dataset 'medium'"),
        ([[]], "Dataset 0 has no runs"),
        ([], "`curves` is empty"),
    ],
)
def test_curves_that_do_not_match_are_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        curve_band([0, 1], curves)


# Comparisons


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_the_sign_flip_test_is_exact(n):
    # All differences have the same sign: only two of 2^n assignments are so far from 0
    comparison = compare_paired([np.arange(n) + 1.0], [np.zeros(n)])
    assert comparison.p_value == pytest.approx(2 / 2**n) == comparison.smallest_p_value
    assert comparison.difference.value == pytest.approx((n + 1) / 2)
    assert comparison.wilcoxon_p_value == pytest.approx(2 / 2**n)
    assert comparison.n_pairs == n and f"exact, all {2**n:,} assignments" in comparison.method


def test_the_sign_flip_test_against_all_assignments():
    x, y = [[3.0, 1.0, 4.0], [2.0, 0.5]], [[1.0, 2.0, 1.0], [2.5, 3.0]]
    weighted = [
        (a - b) / (2 * len(first)) for first, second in zip(x, y, strict=True) for a, b in zip(first, second, strict=True)
    ]
    sums = [np.dot(signs, weighted) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean(np.abs(sums) >= abs(sum(weighted)) - 1e-12)
    comparison = compare_paired(x, y)
    assert comparison.p_value == pytest.approx(expected)
    assert comparison.difference.value == pytest.approx(np.mean([4 / 3, -1.5]))


def test_the_sign_flip_test_keeps_its_level():
    # With 6 pairs the largest p-value of at most 0.05 is 2/64: exactly that often it must be reached
    rng, n_studies = np.random.default_rng(0), 600
    found = [
        compare_paired([rng.normal(size=6)], [rng.normal(size=6)], n_resamples=10).p_value <= 1 / 32 for _ in range(n_studies)
    ]
    assert_rate(sum(found), n_studies, 1 / 32, 1 / 32)


def test_many_pairs_are_compared_by_random_assignments():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.6, 1, 40), rng.normal(size=40)
    first, second = compare_paired([x], [y]), compare_paired([x], [y])
    assert first == second and "32,768 random assignments" in first.method
    assert first.p_value == pytest.approx(stats.ttest_rel(x, y).pvalue, rel=0.2)


def test_equal_runs_do_not_differ():
    comparison = compare_paired([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])
    assert comparison.p_value == 1 and comparison.wilcoxon_p_value is None and not comparison.difference.has_interval


def test_runs_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="same seeds: dataset 0 has 2 and 3 runs"):
        compare_paired([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="same length, at least 1"):
        compare_paired_rates([True], [True, False])


def test_mcnemars_test_looks_at_pairs_that_differ():
    for n in (1, 3, 5, 6):
        assert compare_paired_rates([True] * n, [False] * n).p_value == pytest.approx(2 / 2**n)
    assert compare_paired_rates([True, False, True], [True, False, True]).p_value == 1
    comparison = compare_paired_rates([1, 1, 1, 1, 0, 1], [0, 0, 0, 1, 1, 0])
    assert comparison.p_value == pytest.approx(2 * (1 + 5) / 2**5)
    assert comparison.difference == pytest.approx(3 / 6) and "4 and 1 discordant of 6 pairs" in comparison.method
    expected = REFERENCE["mcnemar"]
    assert compare_paired_rates(expected["x"], expected["y"]).p_value == pytest.approx(expected["p_value"])


def test_boschloos_test_of_rates():
    # All five against none: with equal probabilities 1/2, the worst case, both extreme tables have probability 2^-10 each
    comparison = compare_rates(5, 5, 0, 5)
    assert comparison.p_value == pytest.approx(2 / 2**10, rel=1e-3) and comparison.difference == 1
    assert compare_rates(3, 10, 8, 10).p_value < stats.fisher_exact([[3, 8], [7, 2]]).pvalue
    for successes in (0, 5):
        assert compare_rates(successes, 5, successes, 5).p_value == 1
    assert compare_rates(1, 4, 0, 9).p_value == pytest.approx(compare_rates(0, 9, 1, 4).p_value)


def test_holms_correction():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(REFERENCE["holm"]["p_values"]), REFERENCE["holm"]["adjusted"])
    assert holm([0.7]) == [0.7] and holm([]).size == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, np.nan])


@settings(max_examples=50, deadline=None)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_correction_never_helps_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert np.all(adjusted >= np.array(p_values)) and np.all(
        adjusted <= np.minimum(1, len(p_values) * np.array(p_values)) + 1e-12
    )
    assert np.all(np.diff(adjusted[np.argsort(p_values)]) >= 0)
