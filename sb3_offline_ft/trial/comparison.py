"""What permuted blocks prove about a difference: tests by the randomisation that was made, and by betting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, binomtest, norm, ttest_1samp

from sb3_offline_ft.deployment.promotion import ConcurrentTest
from sb3_offline_ft.evaluation.statistics import Estimate

Array = npt.NDArray[np.float64]

N_SHUFFLES = 1999
"""How often the arms are shuffled."""
N_LOOKS = 4
"""How often the evidence is looked at, at most."""
POOLED = 4.0
"""Blocks that the pooled spread of the episodes counts as, beside the spread of the blocks: few blocks tell little of it."""
N_RATES = 101
"""Rates of success that are tried for the largest p-value."""
DECIMALS = 9
"""Of a statistic, whose order is around 1: what is less is rounding, and equal values have to be equal."""


@dataclass(frozen=True)
class Look:
    """
    A planned look at the evidence.

    :param blocks: Number of blocks that are complete then
    :param spent: Probability of a false go up to this look, this one included
    """

    blocks: int
    spent: float


def information(sizes: Sequence[tuple[int, int]]) -> Array:
    """
    :param sizes: Episodes of each block, and how many of them are the candidate's
    :return: What each block tells about the difference: its inverse variance, if that of an episode is 1
    """
    return np.array([candidates * (episodes - candidates) / episodes for episodes, candidates in sizes])


def planned_looks(sizes: Sequence[tuple[int, int]], false_go: float, n_looks: int = N_LOOKS) -> list[Look]:
    """
    Looks that are equally spaced in information, at ends of blocks. Little is spent early (Lan & DeMets 1983, in the form of
    O'Brien & Fleming), so that the last look has nearly the level of a single test.

    :param sizes: Episodes of each planned block, and how many of them are the candidate's
    :param false_go: Probability of a false go at any look
    :param n_looks: Number of looks, fewer if there are fewer blocks
    :return: The looks; the last one is at the planned maximum
    """
    fractions = np.cumsum(information(sizes)) / information(sizes).sum()
    ends = sorted({int(np.searchsorted(fractions, i / n_looks - 1e-9)) for i in range(1, n_looks + 1)})
    spent = 2 * norm.sf(norm.isf(false_go / 2) / np.sqrt(fractions[ends]))
    return [Look(end + 1, float(level)) for end, level in zip(ends, spent, strict=True)]


@lru_cache(maxsize=512)
def _shuffled(block: int, episodes: int, candidates: int) -> Array:
    """Shuffles of the arms of a block, 1 where the candidate acts, shape ``(N_SHUFFLES, episodes)``."""
    order = np.random.default_rng([block, episodes, candidates]).random((N_SHUFFLES, episodes)).argsort(axis=1)
    return (order < candidates).astype(float)


class Rerandomisation:
    """
    The difference between candidate and baseline, and what shuffling the arms within blocks says about it.

    The difference is the mean of the blocks' differences, weighted by their information: what differs between blocks, such as
    a drift or another share of the candidate, cancels. Its statistic is studentised by how the blocks differ, so that a
    candidate whose values spread more is no better for it (Janssen 1997; Chung & Romano 2013).

    If the candidate is exactly as good as the baseline, each order of arms within blocks that could have been drawn is as
    probable as the one that was, whatever the values and their dependence in time. So the tests are exact.

    :param values: Values of the episodes, higher is better
    :param is_candidate: Who acted in them
    :param blocks: Number of the block of each
    """

    def __init__(self, values: npt.ArrayLike, is_candidate: npt.ArrayLike, blocks: npt.ArrayLike) -> None:
        self.values, self.is_candidate = np.asarray(values, dtype=float), np.asarray(is_candidate, dtype=bool)
        self.blocks = np.asarray(blocks, dtype=int)
        names, counts = np.unique(self.blocks, return_counts=True)
        candidates = np.array([self.is_candidate[self.blocks == name].sum() for name in names], dtype=int)
        self.sizes = list(zip(counts.tolist(), candidates.tolist(), strict=True))
        self.names = names
        rows = [np.flatnonzero(self.blocks == name) for name in names]
        self._drawn = [self.is_candidate[row].astype(float) for row in rows]
        self._shares = [drawn - drawn.mean() for drawn in self._drawn]
        self._centred = [self.values[row] - self.values[row].mean() for row in rows]
        # Of each block
        self._squares = np.array([centred @ centred for centred in self._centred])
        self._products = np.array([one @ other for one, other in zip(self._centred, self._shares, strict=True)])

    def _sums(self, of_blocks: list[Array]) -> Array:
        """Over the candidate's episodes, for each shuffle and block; the first shuffle is what was drawn."""
        sums = np.empty((N_SHUFFLES + 1, len(of_blocks)))
        for i, (name, drawn, terms) in enumerate(zip(self.names, self._drawn, of_blocks, strict=True)):
            sums[0, i] = drawn @ terms
            sums[1:, i] = _shuffled(int(name), len(drawn), int(drawn.sum())) @ terms
        return sums

    @cached_property
    def _scores(self) -> Array:
        return self._sums(self._centred)

    @cached_property
    def _overlaps(self) -> Array:
        return self._sums(self._shares)

    @property
    def is_possible(self) -> bool:
        """Whether there is a block with both arms."""
        return bool(information(self.sizes).sum() > 0)

    @property
    def difference(self) -> float:
        """Of the means, candidate minus baseline; nan if there is no block with both."""
        return float(self._scores[0].sum() / information(self.sizes).sum()) if self.is_possible else math.nan

    @property
    def differences(self) -> list[tuple[int, float]]:
        """Of each block with both arms, its number and the difference of the means in it."""
        weights = information(self.sizes)
        return [(int(self.names[i]), float(self._scores[0, i] / weight)) for i, weight in enumerate(weights) if weight > 0]

    @cached_property
    def spread(self) -> float:
        """Standard deviation of an episode's value within its block and arm."""
        weights = information(self.sizes)
        freedom = max(1, len(self.values) - len(self.sizes) - 1)
        squares = float(self._squares.sum()) - (self.difference**2 * float(weights.sum()) if self.is_possible else 0.0)
        return math.sqrt(max(0.0, squares) / freedom)

    def statistics(self, difference: float = 0.0, ends: Sequence[int] | None = None) -> Array:
        """
        :param difference: The difference in question
        :param ends: Numbers of blocks after which to look, counted as the plan does; all blocks if None
        :return: How far the difference is above this one, in standard errors up to a factor, of each shuffle and look, shape
            ``(1 + N_SHUFFLES, looks)``; the first row is what was drawn
        """
        weights = information(self.sizes)
        scores = self._scores - difference * self._overlaps if difference else self._scores
        squares = self._squares - 2 * difference * self._products + difference**2 * weights
        n = np.searchsorted(self.names, [int(self.names[-1]) + 1] if ends is None else ends)
        is_before = (np.arange(len(weights))[:, None] < n).astype(float)
        episodes = np.array([size for size, _ in self.sizes]) @ is_before
        total = np.maximum(weights @ is_before, 1e-300)
        sums = scores @ is_before
        above = sums / total
        of_blocks = scores**2 @ is_before - 2 * above * (scores * weights @ is_before) + above**2 * (weights**2 @ is_before)
        of_episodes = (squares @ is_before - above**2 * total) / np.maximum(1, episodes - n - 1)
        pooled = POOLED / np.maximum(n, 1)
        variance = (np.maximum(of_blocks, 0.0) + pooled * of_episodes * total) / (1 + pooled)
        # Without any spread, the order of the shuffles is that of their differences; what the difference explains is rounding
        least = 1e-12 * ((self._squares + difference**2 * weights) @ is_before) + 1e-300
        return np.asarray(np.round(sums / np.sqrt(np.maximum(variance, least)), DECIMALS), dtype=np.float64)

    def p_value(self, difference: float = 0.0) -> float:
        """Of "the candidate is not better by more than this"; of "not worse", it is that of the values with other signs."""
        above = self.statistics(difference)[:, 0]
        return float((above >= above[0]).mean())

    def p_value_below(self, difference: float) -> float:
        """Of "the candidate is better by at least this"."""
        above = self.statistics(difference)[:, 0]
        return float((above <= above[0]).mean())

    def interval(self, confidence: float) -> Estimate:
        """
        :param confidence: Probability that the interval contains the difference
        :return: The difference, and all differences that the test does not reject
        """
        name = f"blocks' differences; {100 * confidence:g} % interval: what shuffling within blocks does not reject"
        n, level = len(self.values), (1 - confidence) / 2
        if not self.is_possible:
            return Estimate(math.nan, math.nan, math.nan, n, "no block has both arms yet")
        scale = max(self.spread / math.sqrt(information(self.sizes).sum()), 1e-9 * abs(self.difference), 1e-300)
        ends = []
        for sign, p_value in ((-1, self.p_value), (1, self.p_value_below)):
            inside, outside = 0.0, 2.0
            while p_value(self.difference + sign * outside * scale) > level and outside < 1e3:
                inside, outside = outside, 2 * outside
            if outside >= 1e3:
                return Estimate(self.difference, math.nan, math.nan, n, "too few blocks for an interval")
            for _ in range(12):
                middle = (inside + outside) / 2
                is_inside = p_value(self.difference + sign * middle * scale) > level
                inside, outside = (middle, outside) if is_inside else (inside, middle)
            ends.append(self.difference + sign * outside * scale)
        return Estimate(self.difference, ends[0], ends[1], n, name)


@dataclass(frozen=True)
class LookResult:
    """
    What a look showed.

    :param look: The look
    :param p: p-value by itself
    :param level: What it has to reach here
    """

    look: Look
    p: float
    level: float

    @property
    def is_crossed(self) -> bool:
        """Whether this look decides."""
        return self.p <= self.level


def sequential_test(statistics: Array, looks: Sequence[Look]) -> list[LookResult]:
    """
    A group-sequential test by shuffling. Of the shuffles that no earlier look has taken, each look takes those with the
    highest statistics, as many as are spent up to it. What was drawn is one of them with equal probability, so it is taken at
    any look with at most the probability that is spent in all; looks that depend on each other cost nothing.

    :param statistics: Of each shuffle and look, shape ``(1 + N_SHUFFLES, looks)``, the first row is what was drawn
    :param looks: The looks so far
    :return: What each look showed
    """
    n, is_left, taken, results = len(statistics), np.ones(len(statistics), dtype=bool), 0, []
    for look, column in zip(looks, statistics.T, strict=True):
        n_allowed = int(look.spent * n + 1e-9) - taken
        left = np.sort(column[is_left])[::-1]
        # With equal values at the border, none of them is taken
        border = left[n_allowed] if n_allowed < len(left) else -math.inf
        results.append(LookResult(look, float((column >= column[0]).mean()), float((column > border).mean())))
        is_taken = is_left & (column > border)
        taken, is_left = taken + int(is_taken.sum()), is_left & ~is_taken
    return results


def two_levels(values: Array) -> tuple[float, float] | None:
    """Lower and upper level, if values are failures and successes; of 0 and 1, one may not have been seen yet."""
    found = {float(value) for value in values}
    if len(found) == 1:
        found.update({-1.0: (0.0,), 0.0: (-1.0,), 1.0: (0.0,)}.get(min(found), ()))
    return (min(found), max(found)) if len(found) == 2 else None


@lru_cache(maxsize=4096)
def exact_p(candidate: tuple[int, int], baseline: tuple[int, int], difference: float) -> float:
    """
    Of "the candidate's rate of success is not higher by more than a difference": exact for the baseline's rate at which it is
    largest (unconditional test; Chan 1998). Shuffling does not do here: where rates differ, the arms spread differently.

    :param candidate: Successes and episodes of the candidate
    :param baseline: Those of the baseline
    :param difference: The difference in question
    :return: The p-value
    """
    if abs(difference) > 1:
        return float(difference > 0)

    def above(of_candidate: npt.ArrayLike, of_baseline: npt.ArrayLike) -> Array:
        one, other = ((np.asarray(k) + 1) / (n + 2) for k, (_, n) in ((of_candidate, candidate), (of_baseline, baseline)))
        spread = np.sqrt(one * (1 - one) / (candidate[1] + 2) + other * (1 - other) / (baseline[1] + 2))
        return np.asarray((one - other - difference) / spread)

    counts = [np.arange(n + 1) for _, n in (candidate, baseline)]
    is_above = above(counts[0][:, None], counts[1][None, :]) >= above(candidate[0], baseline[0]) - 1e-9
    rates = np.linspace(max(0.0, -difference), min(1.0, 1.0 - difference), N_RATES)[:, None]
    of_candidate = binom.pmf(counts[0], candidate[1], np.clip(rates + difference, 0.0, 1.0))
    of_baseline = binom.pmf(counts[1], baseline[1], rates)
    return float(min(1.0, np.einsum("ri,ij,rj->r", of_candidate, is_above.astype(float), of_baseline).max()))


def limit_test(values: Sequence[Array], limit: float, looks: Sequence[Look]) -> list[LookResult]:
    """
    Whether the candidate's mean is above a limit: Student's t at each look, at what is newly spent there (union bound);
    binomial, if values are failures and successes.

    :param values: The candidate's values up to each look, higher is better
    :param limit: The limit
    :param looks: The looks so far
    :return: What each look showed
    """
    results, before = [], 0.0
    for look, sample in zip(looks, values, strict=True):
        p, levels, is_still = 1.0, two_levels(sample), len(sample) > 1 and float(np.ptp(sample)) == 0
        if len(sample) > 1 and levels is not None:
            share = min(1.0, max(0.0, (limit - levels[0]) / (levels[1] - levels[0])))
            p = float(binomtest(int((sample == levels[1]).sum()), len(sample), share, "greater").pvalue)
        elif len(sample) > 1:
            p = 0.0 if is_still else float(ttest_1samp(sample, limit, alternative="greater").pvalue)
        if is_still:
            # Equal values show no noise, but are as many heads of a coin
            p = max(p, 0.5 ** len(sample)) if sample[0] >= limit else 1.0
        results.append(LookResult(look, p, look.spent - before))
        before = look.spent
    return results


class Deterioration:
    """
    "The candidate is worse: stop now", at any episode (:class:`~sb3_offline_ft.deployment.ConcurrentTest` on negated values).
    The order within a block gives each episode the probability with which it is the candidate's; where only one is left to
    act, nothing is learned.

    :param level: Probability of a false stop, at any time
    :param unit: A difference that is large enough to matter, for the smallest spread
    """

    def __init__(self, level: float, unit: float) -> None:
        self._test, self._unit = ConcurrentTest(level), unit
        self._baseline: list[float] = []
        self._candidate: list[float] = []

    def take(self, value: float, is_candidate: bool, share: float) -> None:
        """
        An episode is over.

        :param value: Its value, higher is better
        :param is_candidate: Who acted
        :param share: Probability with which it was to be the candidate's
        """
        if 0 < share < 1 and self._baseline:
            self._test.bet(share, self._baseline, self._candidate, self._unit).settle(-value, is_candidate)
        (self._candidate if is_candidate else self._baseline).append(-value)

    @property
    def p(self) -> float:
        """Valid at any time."""
        return min(1.0, math.exp(-self._test.evidence))

    @property
    def is_proved(self) -> bool:
        """Whether the candidate is worse."""
        return self._test.is_proved
