"""
The metrics of a finetuning run, on curves whose metrics are known by hand, and their noise.

Statistical tests have fixed seeds; they fail if the exact 99.9 % interval of a measured rate excludes what is promised.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from sb3_offline_ft.evaluation.finetuning_metrics import collapse_threshold, dip_noise_floor, finetuning_metrics

RECORDED = Path(__file__).parents[1] / "benchmarks" / "finetuning" / "results" / "hopper"
J_RANDOM = 0.0
# Evaluated every 1,000 interactions with a warm-up of 2,000: J0 is 100, the band begins at 90
FROZEN = [98.0, 100.0, 102.0]
CURVE = [80.0, 20.0, 40.0, 95.0, 85.0, 90.0, 91.0, 120.0, 150.0, 130.0]


def run(curve, frozen=FROZEN, frozen_until=2000, random_return=J_RANDOM, **options):
    means = np.array([*frozen, *curve], dtype=float)
    # Two episodes each, whose mean is the value
    return finetuning_metrics(
        1000 * np.arange(means.size), np.stack([means - 1, means + 1], axis=1), frozen_until, random_return, **options
    )


def test_metrics_of_a_known_curve():
    metrics = run(CURVE)
    assert metrics.initial_return == pytest.approx(100)
    episodes = [97, 99, 99, 101, 101, 103]
    assert metrics.initial_standard_error == pytest.approx(np.std(episodes, ddof=1) / np.sqrt(6))
    assert metrics.band == pytest.approx(90)
    assert (metrics.lowest_return, metrics.lowest_at) == (pytest.approx(20), 4000)
    assert metrics.dip_depth == pytest.approx(0.8)
    assert metrics.dip_area == pytest.approx((20 + 80 + 60 + 5 + 15 + 10 + 9) / 10 / 100)
    assert metrics.time_below_band == pytest.approx(0.4)
    # 95 at 6,000 is followed by 85; from 8,000 on three in a row are at 90 or above
    assert metrics.recovered and metrics.recovery_time == 4000
    assert metrics.collapsed
    assert metrics.final_return == pytest.approx(130)
    assert metrics.last_return == metrics.mean_return == pytest.approx(np.mean(CURVE))
    assert metrics.best_return == pytest.approx(150)
    assert metrics.best_sustained_return == pytest.approx((120 + 150 + 130) / 3)
    assert run([50, 70]).best_sustained_return == pytest.approx(60)
    assert metrics.max_drawdown == pytest.approx(80)
    assert metrics.training_return is None


def test_noise_of_the_pretrained_policy_widens_the_band():
    metrics = run(CURVE, frozen=[70.0, 130.0, 100.0])
    assert metrics.band == pytest.approx(100 - 2 * stats.sem([69, 71, 129, 131, 99, 101]))
    assert metrics.band < 90


def test_the_last_return_is_of_ten_evaluations():
    assert run([0.0] * 5 + [10.0] * 9 + [20.0]).last_return == pytest.approx(11)


def test_evaluations_count_for_the_time_before_them():
    # Free from 2,000 on: the first evaluation stands for 100 interactions, the second for 900
    metrics = finetuning_metrics([0, 2000, 2100, 3000], [[100.0], [100.0], [0.0], [100.0]], 2000, J_RANDOM)
    assert metrics.mean_return == pytest.approx(90)
    assert metrics.dip_area == pytest.approx(0.1)
    assert metrics.time_below_band == pytest.approx(0.1)


def test_collapse_is_a_quarter_of_what_was_learned():
    assert collapse_threshold(120, 20) == 45
    for lowest, collapsed in ((25.0, True), (25.1, False)):
        assert run([90.0, lowest, 90.0]).collapsed is collapsed


def test_only_evaluations_after_the_warm_up_can_dip():
    metrics = run([100.0] * 5, frozen=[100.0, 10.0, 190.0])
    assert metrics.dip_depth == pytest.approx(0) and not metrics.collapsed and metrics.lowest_return == pytest.approx(100)


def test_recovery():
    assert run([95.0, 92.0, 110.0]).recovery_time == 0  # never below the band
    never = run([50.0, 100.0, 100.0, 60.0, 100.0, 100.0])
    assert never.recovered is False and never.recovery_time is None
    assert run([50.0, 100.0, 100.0, 60.0, 100.0, 100.0], consecutive=2).recovery_time == 1000
    assert run([100.0, 100.0, 100.0, 5.0]).recovered is False


def test_drawdown_counts_from_the_peak():
    assert run([100.0, 300.0, 120.0, 310.0]).max_drawdown == pytest.approx(180)
    assert run([110.0, 120.0, 130.0]).max_drawdown == 0


def test_keeping_the_best_evaluated_policy():
    # The pretrained policy has 100 in both halves; one policy is lucky in the first half, one is better in both
    returns = [[90.0, 110.0], [110.0, 90.0], [130.0, 60.0], [120.0, 140.0], [100.0, 130.0]]
    metrics = finetuning_metrics(1000 * np.arange(5), returns, 1000, J_RANDOM)
    # Chosen by the first: 130 is kept, which gives 60, 60, 60. By the second: the pretrained one, then 140, which gives 120
    assert metrics.selected_return == pytest.approx((60 + 120) / 2)
    assert metrics.selected_dip_depth == pytest.approx((100 - (60 + 100) / 2) / 100)


def test_the_pretrained_policy_is_kept_if_none_is_better():
    metrics = run([50.0, 90.0, 10.0])
    assert metrics.selected_return == pytest.approx(100) and metrics.selected_dip_depth == pytest.approx(0)
    frozen = run([], frozen=FROZEN)
    assert frozen.selected_return == pytest.approx(100) and frozen.selected_dip_depth == pytest.approx(0)


def test_from_scratch_the_first_policy_is_kept_until_there_is_a_better_one():
    metrics = run([5.0, 10.0, 3.0], frozen=[], frozen_until=-1)
    assert metrics.selected_return == pytest.approx(10) and metrics.selected_dip_depth is None


def test_a_single_episode_cannot_choose_and_measure():
    metrics = finetuning_metrics([0, 1000], [[1.0, 2.0], [3.0]], 0, J_RANDOM)
    assert metrics.selected_return is metrics.selected_dip_depth is None


def test_choosing_does_not_flatter_what_is_chosen():
    # A policy that never changes: the best of its evaluations is above its mean, what is kept is not
    rng = np.random.default_rng(0)
    runs = [finetuning_metrics(np.arange(30), rng.normal(100, 30, (30, 10)), 2, J_RANDOM) for _ in range(400)]
    kept = np.array([metrics.selected_return for metrics in runs])
    best = np.array([metrics.best_return for metrics in runs])
    assert best.mean() > 110
    assert stats.ttest_1samp(kept, 100).pvalue > 0.001


def test_a_run_from_scratch_has_no_level_to_fall_from():
    metrics = run([5.0, 10.0, 3.0], frozen=[], frozen_until=-1)
    relative = (
        "initial_return",
        "band",
        "dip_depth",
        "dip_area",
        "time_below_band",
        "recovered",
        "recovery_time",
        "collapsed",
    )
    assert all(getattr(metrics, name) is None for name in relative)
    assert (metrics.lowest_return, metrics.best_return, metrics.final_return) == (3, 10, 3)
    assert metrics.mean_return == pytest.approx(6.5)  # the evaluation before any interaction stands for no time
    assert metrics.max_drawdown == 7


def test_without_the_return_of_a_random_policy_nothing_is_relative_to_it():
    metrics = run(CURVE, random_return=None)
    assert metrics.initial_return == pytest.approx(100) and metrics.max_drawdown == pytest.approx(80)
    assert metrics.dip_depth is metrics.dip_area is metrics.band is metrics.recovered is metrics.collapsed is None
    assert run(CURVE, random_return=100.0).dip_depth is None


def test_a_policy_worse_than_a_random_one_cannot_collapse():
    metrics = run([50.0, 90.0], random_return=200.0)
    assert metrics.collapsed is None and metrics.dip_depth == pytest.approx(0.5)


def test_a_frozen_policy_is_measured_by_all_its_evaluations():
    metrics = run([], frozen=[90.0, 100.0, 95.0, 115.0], frozen_until=10_000)
    assert metrics.initial_return == pytest.approx(100) and metrics.dip_depth == pytest.approx(0.1)
    assert metrics.final_return == pytest.approx(115) and not metrics.collapsed


def test_a_single_evaluation_and_episode():
    metrics = finetuning_metrics([0], [[100.0]], 0, J_RANDOM)
    assert metrics.initial_standard_error is None and metrics.band == pytest.approx(90)
    assert metrics.mean_return == metrics.last_return == 100 and metrics.dip_depth == 0


def test_evaluations_may_have_different_numbers_of_episodes():
    metrics = finetuning_metrics([0, 1000, 2000], [[1.0, 2.0, 3.0, 6.0], [8.0], [4.0, 6.0]], 1000, J_RANDOM)
    assert metrics.initial_return == 4 and metrics.final_return == 5


def test_training_returns_after_the_warm_up():
    training = {"training_timesteps": [1000, 2000, 2500, 3000], "training_returns": [1.0, 2.0, 30.0, 50.0]}
    assert run(CURVE, **training).training_return == 40
    assert run(CURVE, training_timesteps=[1000], training_returns=[1.0]).training_return is None


def test_all_metrics_can_be_written_as_json():
    values = dataclasses.asdict(run(CURVE))
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1000], [[1.0, 2.0], [1.0, np.nan]], 0, 0.0), "evaluation at timestep 1000 has returns .*nan.*: expected finite"),
        (([0, 1000], [[1.0], [np.inf]], 0, 0.0), "timestep 1000 .*inf"),
        (([0, 1000], [[1.0], []], 0, 0.0), "timestep 1000 has no episodes"),
        (([0, 1000], [[1.0]], 0, 0.0), "1 evaluations, 2 timesteps"),
        (([0, 1000, 1000], [[1.0]] * 3, 0, 0.0), "must increase, found 1000 before 1000"),
        (([], [], 0, 0.0), "at least one evaluation"),
        (([0], [[1.0]], 0, np.nan), "`random_return` must be a finite number"),
        (([0], [[1.0]], 0, 0.0, [10], [np.nan]), "training episodes must be finite"),
        (([0], [[1.0]], 0, 0.0, [10, 20], [1.0]), "Each training episode must have a timestep"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        finetuning_metrics(*arguments)


RETURN = st.floats(-1e4, 1e4).map(lambda value: round(value, 3))


@settings(max_examples=150, deadline=None)
@given(
    returns=st.lists(st.lists(RETURN, min_size=1, max_size=4), min_size=2, max_size=12),
    gaps=st.lists(st.integers(1, 5000), min_size=12, max_size=12),
    n_frozen=st.integers(0, 12),
    random_return=RETURN,
)
def test_metrics_agree_with_each_other(returns, gaps, n_frozen, random_return):
    steps = np.cumsum(gaps)[: len(returns)]
    frozen_until = int(steps[min(n_frozen, len(steps)) - 1]) if n_frozen else -1
    metrics = finetuning_metrics(steps, returns, frozen_until, random_return)
    assert metrics.lowest_return <= metrics.final_return <= metrics.best_return
    for mean in (metrics.mean_return, metrics.last_return):
        assert metrics.lowest_return - 1e-6 <= mean <= metrics.best_return + 1e-6
    assert metrics.max_drawdown >= 0
    if metrics.dip_depth is None:
        assert metrics.dip_area is metrics.time_below_band is metrics.recovered is None
        return
    assert 0 <= metrics.dip_area <= max(0.0, metrics.dip_depth) + 1e-9
    assert metrics.time_below_band <= (metrics.dip_area > 0)
    assert (metrics.recovery_time is not None) == metrics.recovered
    assert (metrics.recovery_time == 0) == (metrics.lowest_return >= metrics.band)
    assert metrics.max_drawdown >= metrics.initial_return - metrics.lowest_return - 1e-6
    if metrics.collapsed:
        assert metrics.dip_depth >= 0.75 - 1e-9
    # Other units for returns change nothing that has none
    scaled = [[3 * value + 7 for value in evaluation] for evaluation in returns]
    other = finetuning_metrics(steps, scaled, frozen_until, 3 * random_return + 7)
    if abs(metrics.initial_return - random_return) > 1e-2:
        assert other.dip_depth == pytest.approx(metrics.dip_depth, rel=1e-6, abs=1e-6)
        assert other.dip_area == pytest.approx(metrics.dip_area, rel=1e-6, abs=1e-6)


def test_recorded_runs_of_td3_collapse_and_those_of_the_constrained_one_do_not():
    for path in sorted(RECORDED.glob("*_seed*.json")):
        content = json.loads(path.read_text())
        if content.get("method") not in ("TD3", "TD3C, best"):
            continue
        metrics = finetuning_metrics(content["timesteps"], content["episode_returns"], 2000, 17.1)
        assert metrics.collapsed is (content["method"] == "TD3")
        assert (metrics.dip_depth > 0.9) is (content["method"] == "TD3")


def test_the_floor_of_normal_returns_is_the_expected_smallest_of_normal_means():
    # Mean dip of evaluations with standard error s: s times the mean of the largest of 25 standard normal values, 1.9653
    episodes = 1000 + 100 * stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    floor = dip_noise_floor(episodes, 25, 10, 0.0, n_resamples=20_000)
    assert floor.mean == pytest.approx(0.1 / np.sqrt(10) * 1.9653, rel=0.02)
    # J0 of as many episodes as were given is almost exact: the quantile is that of the smallest mean alone
    lowest = -stats.norm.ppf(1 - 0.95 ** (1 / 25)) * 0.1 / np.sqrt(10)
    assert floor.quantile == pytest.approx(lowest, rel=0.04)
    assert floor.collapse_probability == 0 and floor.n_episodes == 1000
    # One of 10 episodes adds the noise of one evaluation
    noisy = dip_noise_floor(episodes, 1, 10, 0.0, initial_episodes=10, n_resamples=20_000)
    assert noisy.mean == pytest.approx(0, abs=0.001)
    assert noisy.quantile == pytest.approx(1.645 * 0.1 * np.sqrt(2 / 10), rel=0.04)


def test_the_floor_of_two_outcomes_is_binomial():
    # An evaluation of one episode is 0 or 1; with J0 = 0.5 the dip is 1 as soon as one of 3 is 0
    floor = dip_noise_floor([0.0, 1.0] * 500, 3, 1, 0.0, n_resamples=20_000, initial_episodes=100_000 // 100)
    is_deep = floor.depths > 0.5
    assert binomtest(int(is_deep.sum()), is_deep.size, 1 - 1 / 8).pvalue > 1e-3
    assert floor.collapse_probability == pytest.approx(7 / 8, abs=0.01)


def test_the_floor_is_exceeded_as_often_as_it_says():
    rng = np.random.default_rng(5)
    n_runs, n_deeper = 400, 0
    for seed in range(n_runs):
        frozen, initial = rng.normal(100, 10, 300), rng.normal(100, 10, 30)
        floor = dip_noise_floor(frozen, 28, 10, 0.0, initial_episodes=30, n_resamples=500, seed=seed)
        curve = rng.normal(100, 10, (28, 10))
        metrics = finetuning_metrics(1000 * np.arange(29), [initial, *curve], 0, 0.0)
        n_deeper += metrics.dip_depth > floor.quantile
    interval = binomtest(n_deeper, n_runs).proportion_ci(0.999)
    assert interval.low <= 0.05 <= interval.high, n_deeper


def test_the_floor_grows_with_evaluations_and_shrinks_with_episodes():
    episodes = np.random.default_rng(0).normal(100, 20, 60)
    few, many = (dip_noise_floor(episodes, n, 10, 0.0) for n in (5, 50))
    assert few.mean < many.mean and few.quantile < many.quantile
    longer = dip_noise_floor(episodes, 50, 100, 0.0, n_resamples=1000)
    assert longer.mean < many.mean and longer.area_mean < many.area_mean <= many.mean


def test_a_deep_dip_is_improbable_and_a_shallow_one_is_not():
    floor = dip_noise_floor(np.random.default_rng(0).normal(100, 10, 30), 28, 10, 0.0, n_resamples=1000)
    assert floor.probability(1.0) == pytest.approx(1 / 1001)
    assert floor.probability(-1.0) == 1
    assert floor.probability(floor.quantile) == pytest.approx(0.05, abs=0.005)


def test_the_floor_of_equal_returns_is_none_at_all():
    floor = dip_noise_floor([500.0] * 30, 28, 10, 20.0)
    assert floor.mean == floor.quantile == floor.area_mean == 0 and floor.probability(0.0) == 1


def test_same_seed_same_floor():
    episodes = np.random.default_rng(0).normal(size=20)
    first, second, other = (dip_noise_floor(episodes, 10, 5, 3.0, n_resamples=100, seed=seed) for seed in (1, 1, 2))
    assert first == second and first != other
    np.testing.assert_array_equal(first.depths, second.depths)


def test_without_noise_to_look_at_there_is_no_floor():
    assert dip_noise_floor([100.0], 10, 10, 0.0) is None
    assert dip_noise_floor([100.0, 110.0], 10, 10, None) is None
    assert dip_noise_floor([100.0, 110.0], 10, 10, 105.0) is None
    assert dip_noise_floor([100.0, 110.0], 10, 10, 200.0).collapse_probability is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, np.nan], 10, 10, 0.0), "must be finite"),
        (([1.0, 2.0], 0, 10, 0.0), "must be at least 1, found 0, 10 and"),
        (([1.0, 2.0], 10, 0, 0.0), "must be at least 1"),
    ],
)
def test_a_floor_of_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dip_noise_floor(*arguments)
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1"):
        dip_noise_floor([1.0, 2.0], 10, 10, 0.0, confidence=95)
