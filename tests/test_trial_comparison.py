"""What shuffling arms within blocks proves, and how often it is wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest

from sb3_offline_ft.trial.comparison import (
    Deterioration,
    Look,
    Rerandomisation,
    exact_p,
    limit_test,
    planned_looks,
    sequential_test,
)

SIZES = [(4, 1), (4, 1), (10, 1), (4, 2), (4, 2), (4, 2), (4, 2)]
"""Episodes of the blocks, and how many of them are the candidate's."""
BLOCKS = np.repeat(np.arange(len(SIZES)), [episodes for episodes, _ in SIZES])
N = len(BLOCKS)
UNLIKELY = 1e-4
"""Tests with chance in them fail as rarely as this, if what they test is true."""


def drawn(rng: np.random.Generator) -> np.ndarray:
    """Who acts, in an order that is drawn within blocks."""
    return np.concatenate([rng.permutation(np.arange(episodes) < candidates) for episodes, candidates in SIZES])


def wandering(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=N).cumsum()


def heavy(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(1.5, size=N)


def binary(rng: np.random.Generator) -> np.ndarray:
    return (rng.random(N) < 0.3).astype(float)


class TestRerandomisation:
    @pytest.mark.parametrize(("n_blocks", "p"), [(1, 1 / 4), (2, 1 / 16), (3, 1 / 64)])
    def test_p_is_the_share_of_orders(self, n_blocks: int, p: float) -> None:
        """The candidate has the one high value of each block of four; 5 standard errors of 1,999 shuffles are allowed."""
        values = np.tile([0.0, 1.0, 0.1, 0.2], n_blocks)
        found = Rerandomisation(values, values == 1, np.repeat(np.arange(n_blocks), 4)).p_value()
        assert found == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 1999))

    def test_what_differs_between_blocks_cancels(self) -> None:
        rng = np.random.default_rng(0)
        arms, level = drawn(rng), 100.0 * rng.normal(size=len(SIZES))[BLOCKS]
        assert Rerandomisation(level + 3.0 * arms, arms, BLOCKS).difference == pytest.approx(3.0)

    def test_another_share_at_another_time_does_not_turn_the_difference_around(self) -> None:
        """Simpson's paradox: the candidate acts most while everything is bad."""
        arms = np.array([True, True, True, False, True, False, False, False])
        values = np.array([1.0, 1, 1, 0, 11, 10, 10, 10])
        assert values[arms].mean() < values[~arms].mean()
        assert Rerandomisation(values, arms, np.repeat([0, 1], 4)).difference == pytest.approx(1.0)

    def test_equal_values_prove_nothing(self) -> None:
        arms = drawn(np.random.default_rng(0))
        test = Rerandomisation(np.full(N, 0.1), arms, BLOCKS)
        assert test.p_value() == 1.0 and test.spread == pytest.approx(0.0, abs=1e-12)
        # ... but that the candidate is not worse by a margin
        assert test.p_value(-0.5) < 0.01

    @pytest.mark.parametrize("scale", [0.1, 1e5 / 3])
    def test_a_difference_that_explains_all_values_is_not_rejected(self, scale: float) -> None:
        """A system without noise."""
        arms = drawn(np.random.default_rng(0))
        test = Rerandomisation(7 * scale + scale * arms, arms, BLOCKS)
        assert test.p_value(scale) == test.p_value_below(scale) == 1.0
        assert test.p_value(0.999 * scale) < 0.01 and test.p_value_below(1.001 * scale) < 0.01
        found = test.interval(0.9)
        assert (found.value, found.low, found.high) == pytest.approx((scale, scale, scale))

    def test_a_block_of_one_arm_tells_nothing(self) -> None:
        test = Rerandomisation([1.0, 2.0], [True, True], [0, 0])
        assert not test.is_possible and math.isnan(test.difference) and not test.interval(0.9).has_interval
        assert test.differences == []

    def test_a_candidate_that_spreads_more_is_no_better_for_it(self) -> None:
        """Three times the spread, the same mean: without studentising, a test at 5 % is wrong in about 11 % of the cases."""
        rng, wrong = np.random.default_rng(0), 0
        for _ in range(400):
            arms = drawn(rng)
            wrong += Rerandomisation(rng.normal(size=N) * np.where(arms, 3.0, 1.0), arms, BLOCKS).p_value() <= 0.05
        assert binomtest(wrong, 400, 0.07, "greater").pvalue > UNLIKELY

    @pytest.mark.parametrize("draw", [wandering, heavy])
    def test_intervals_contain_the_difference(self, draw: Callable[[np.random.Generator], np.ndarray]) -> None:
        rng, inside, n_trials = np.random.default_rng(1), 0, 100
        for _ in range(n_trials):
            arms = drawn(rng)
            found = Rerandomisation(draw(rng) + 2.0 * arms, arms, BLOCKS).interval(0.8)
            inside += found.low <= 2.0 <= found.high
        assert binomtest(inside, n_trials, 0.8, "less").pvalue > UNLIKELY
        assert binomtest(inside, n_trials, 0.9, "greater").pvalue > UNLIKELY

    def test_intervals_and_tests_say_the_same(self) -> None:
        rng = np.random.default_rng(2)
        arms = drawn(rng)
        test = Rerandomisation(rng.normal(size=N) + arms, arms, BLOCKS)
        found = test.interval(0.9)
        for value, p_value, slightly in ((found.low, test.p_value, -1), (found.high, test.p_value_below, 1)):
            assert p_value(value - 0.1 * slightly) > 0.05 >= p_value(value + 0.1 * slightly)


class TestLooks:
    def test_little_is_spent_early_and_all_in_the_end(self) -> None:
        looks = planned_looks(SIZES, 0.05)
        assert looks[-1] == Look(len(SIZES), pytest.approx(0.05))
        assert [look.blocks for look in looks] == sorted({look.blocks for look in looks}) and len(looks) == 4
        assert looks[0].spent < 0.002 and all(np.diff([look.spent for look in looks]) > 0)

    def test_there_are_no_more_looks_than_blocks(self) -> None:
        assert planned_looks([(4, 2)], 0.05) == [Look(1, pytest.approx(0.05))]

    @pytest.mark.parametrize("decimals", [8, 0])
    def test_of_all_orders_that_might_have_been_drawn_few_pass(self, decimals: int) -> None:
        """Exactly: each of 200 rows in the place of what was drawn, with and without equal values."""
        rng = np.random.default_rng(0)
        statistics = np.round(rng.normal(size=(200, 3)).cumsum(axis=1), decimals)
        looks = [Look(1, 0.02), Look(2, 0.1), Look(3, 0.2)]
        passing = np.zeros(3)
        for row in range(len(statistics)):
            order = [row, *(other for other in range(200) if other != row)]
            crossed = np.cumsum([look.is_crossed for look in sequential_test(statistics[order], looks)]) > 0
            passing += crossed
        assert all(passing <= [4, 20, 40])
        # Nothing is given away if no values are equal
        assert decimals == 0 or passing.tolist() == [4, 20, 40]

    @pytest.mark.parametrize("draw", [wandering, heavy, binary])
    def test_a_candidate_that_is_as_good_hardly_ever_passes(self, draw: Callable[[np.random.Generator], np.ndarray]) -> None:
        rng, passed, n_trials, rate = np.random.default_rng(0), 0, 300, 0.2
        looks = planned_looks(SIZES, rate)
        for _ in range(n_trials):
            test = Rerandomisation(draw(rng), drawn(rng), BLOCKS)
            passed += any(
                look.is_crossed for look in sequential_test(test.statistics(0.0, [one.blocks for one in looks]), looks)
            )
        assert binomtest(passed, n_trials, rate, "greater").pvalue > UNLIKELY
        assert binomtest(passed, n_trials, rate / 2, "less").pvalue > UNLIKELY

    def test_a_limit_is_hardly_ever_kept_by_a_mean_at_it(self) -> None:
        rng, looks, rate, n_trials = np.random.default_rng(0), planned_looks(SIZES, 0.2), 0.2, 400
        passed = 0
        for _ in range(n_trials):
            values = rng.normal(size=11)
            passed += any(one.is_crossed for one in limit_test([values[: look.blocks + 4] for look in looks], 0.0, looks))
        assert binomtest(passed, n_trials, rate, "greater").pvalue > UNLIKELY and passed > 20

    def test_equal_values_are_as_many_heads_of_a_coin(self) -> None:
        looks = [Look(1, 0.01), Look(2, 0.05)]
        kept = limit_test([np.zeros(2), np.zeros(5)], -1.0, looks)
        assert [look.p for look in kept] == [0.25, 0.5**5] and [look.is_crossed for look in kept] == [False, True]
        assert limit_test([np.zeros(5), np.zeros(50)], 1.0, looks)[1].p == 1.0
        assert limit_test([np.zeros(0), np.zeros(1)], 0.0, looks)[1].p == 1.0


class TestSuccesses:
    def test_no_failure_proves_little(self) -> None:
        """Without one in 21 episodes, a rate of failures of 0.1 has a probability of 0.9^21, and none is above 0."""
        looks = [Look(1, 0.05)]
        for limit, p in ((-0.1, 0.9**21), (-0.5, 0.5**21), (0.0, 1.0)):
            assert limit_test([np.zeros(21)], limit, looks)[0].p == pytest.approx(p)
        assert limit_test([np.ones(21)], 0.9, looks)[0].p == pytest.approx(0.9**21)
        assert exact_p((21, 21), (41, 41), -0.1) == pytest.approx(0.9**21)

    @pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
    def test_a_rate_at_its_limit_is_hardly_ever_proved_above_it(self, rate: float) -> None:
        rng, looks, passed = np.random.default_rng(0), [Look(1, 0.02), Look(2, 0.1)], 0
        for _ in range(400):
            values = (rng.random(20) < rate) - 1.0
            passed += any(look.is_crossed for look in limit_test([values[:10], values], rate - 1.0, looks))
        assert binomtest(passed, 400, 0.1, "greater").pvalue > UNLIKELY

    @pytest.mark.parametrize(("baseline", "difference"), [(1.0, -0.2), (0.5, -0.1), (0.5, 0.2)])
    def test_rates_that_differ_by_just_this_are_hardly_ever_proved_to_differ_by_more(
        self, baseline: float, difference: float
    ) -> None:
        rng, passed = np.random.default_rng(0), 0
        for _ in range(300):
            candidate = int(rng.binomial(21, baseline + difference))
            passed += exact_p((candidate, 21), (int(rng.binomial(41, baseline)), 41), difference) <= 0.1
        assert binomtest(passed, 300, 0.1, "greater").pvalue > UNLIKELY

    def test_what_cannot_differ_by_more_does_not(self) -> None:
        assert exact_p((0, 5), (5, 5), -1.5) == 0.0 and exact_p((5, 5), (0, 5), 1.5) == 1.0


def watched(rng: np.random.Generator, worse_by: float, level: float) -> tuple[bool, int]:
    """Whether a trial of eight blocks was stopped, and after how many episodes."""
    test, n = Deterioration(level, unit=1.0), 0
    for _ in range(8):
        left = 2
        for position, is_candidate in enumerate(rng.permutation([True, True, False, False])):
            n += 1
            test.take(rng.normal() - worse_by * is_candidate, bool(is_candidate), left / (4 - position))
            left -= int(is_candidate)
            if test.is_proved:
                return True, n
    return False, n


class TestDeterioration:
    def test_a_candidate_that_is_as_good_is_hardly_ever_stopped(self) -> None:
        rng, level = np.random.default_rng(0), 0.2
        stopped = sum(watched(rng, 0.0, level)[0] for _ in range(300))
        assert binomtest(stopped, 300, level, "greater").pvalue > UNLIKELY

    def test_a_far_worse_one_is_stopped_before_the_end(self) -> None:
        ends = [watched(np.random.default_rng(seed), 5.0, 0.01) for seed in range(30)]
        assert sum(stopped for stopped, _ in ends) >= 28 and np.mean([n for _, n in ends]) < 20

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_nothing_is_learned_where_no_order_is_drawn(self, share: float) -> None:
        test = Deterioration(0.01, unit=1.0)
        for value in (0.0, 1.0, -100.0, -100.0):
            test.take(value, share == 1.0, share)
        assert test.p == 1.0
