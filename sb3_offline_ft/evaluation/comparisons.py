"""Two methods compared, run by run where they share the seed."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from sb3_offline_ft.evaluation.resampling import MOST_NUMBERS, Array, Scores, matching_scores
from sb3_offline_ft.evaluation.statistics import N_RESAMPLES, Estimate, aggregate, rate

MOST_SIGN_FLIPS = 1 << 15
"""All assignments of signs are tried up to this number, which is that of 15 pairs."""


@dataclass(frozen=True)
class PairedComparison:
    """
    Two methods compared by runs that share seed and dataset.

    :param difference: Mean of ``x - y``, with a stratified-bootstrap percentile interval over pairs
    :param p_value: Of the sign-flip permutation test, two-sided
    :param smallest_p_value: The least that so many pairs can give, ``2 / 2^n``: 5 pairs never fall below 0.0625
    :param wilcoxon_p_value: Of Wilcoxon's signed-rank test on the pooled differences, for differences with outliers (exact or
        normal approximation as SciPy chooses); None if all differences are 0
    :param n_pairs: Number of pairs
    :param method: How the p-value was computed
    """

    difference: Estimate
    p_value: float
    smallest_p_value: float
    wilcoxon_p_value: float | None
    n_pairs: int
    method: str


def compare_paired(
    x: Scores,
    y: Scores,
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> PairedComparison:
    """
    Compare two methods whose runs are paired by seed: such pairs start from the same pretrained policy.

    If both methods are the same, each difference is as likely with the other sign. The p-value is the share of the ``2^n``
    assignments of signs whose mean difference is at least as far from 0 (Fisher 1935): of all up to 15 pairs, of 32,768 random
    ones beyond (then ``(1 + count) / (1 + assignments)``). Datasets count the same.

    :param x: Of each dataset the runs of method X, shape ``(runs,)``
    :param y: The same of method Y: same datasets, same order of seeds
    :param confidence: Level of the interval of the difference
    :param n_resamples: Resamples of the bootstrap
    :param seed: Same seed, same result
    :return: The comparison
    :raises ValueError: Runs are not paired, there are none, or a score is not finite
    """
    x_samples, y_samples = matching_scores(x, y)
    for position, (one, other) in enumerate(zip(x_samples, y_samples, strict=True)):
        if len(one) != len(other):
            raise ValueError(
                f"Paired runs must have the same seeds: dataset {position} has {len(one)} and {len(other)} runs. "
                "Leave out the seeds that only one method has."
            )
    pairs = [one - other for one, other in zip(x_samples, y_samples, strict=True)]
    difference = aggregate(pairs, "mean", confidence=confidence, n_resamples=n_resamples, seed=seed)
    pooled = np.concatenate(pairs)
    # Each dataset's mean counts the same, and a flipped sign stays with its pair
    weighted = np.concatenate([pair / (len(pairs) * len(pair)) for pair in pairs])
    n_flips = 2**pooled.size
    is_exact = n_flips <= MOST_SIGN_FLIPS
    p_value = 1.0
    if pooled.size > 1:
        test = stats.permutation_test(
            (weighted,),
            lambda sample, axis: np.sum(sample, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=MOST_SIGN_FLIPS,
            batch=max(1, MOST_NUMBERS // pooled.size),
            rng=np.random.default_rng(seed),
        )
        p_value = float(test.pvalue)
    signed_ranks = None
    if np.any(pooled != 0):
        signed_ranks = float(stats.wilcoxon(pooled).pvalue)
    kind = f"exact, all {n_flips:,} assignments" if is_exact else f"{MOST_SIGN_FLIPS:,} random assignments"
    return PairedComparison(
        difference=replace(difference, method=f"paired differences: {difference.method}"),
        p_value=p_value,
        smallest_p_value=2 / n_flips if is_exact else 2 / (1 + MOST_SIGN_FLIPS),
        wilcoxon_p_value=signed_ranks,
        n_pairs=int(pooled.size),
        method=f"two-sided sign-flip permutation test of the mean difference ({kind})",
    )


@dataclass(frozen=True)
class RateComparison:
    """
    Two methods compared by how often something happened, such as a collapse.

    :param difference: Rate of X minus rate of Y
    :param p_value: Of the test, two-sided
    :param method: Which test
    """

    difference: float
    p_value: float
    method: str


def compare_paired_rates(x: npt.ArrayLike, y: npt.ArrayLike) -> RateComparison:
    """
    McNemar's exact test for runs paired by seed and dataset: among the pairs in which the two methods differ, is either more
    often the one in which it happened? With 5 pairs it cannot fall below 0.0625.

    :param x: Of each pair, whether it happened with method X, shape ``(pairs,)``
    :param y: Whether it happened with method Y
    :return: The comparison
    :raises ValueError: There are no pairs, or the lengths differ
    """
    first, second = np.asarray(x, dtype=bool), np.asarray(y, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"Paired runs must be two lists of the same length, at least 1: found {first.shape}, {second.shape}.")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    n_different = only_first + only_second
    p_value = float(stats.binomtest(only_first, n_different).pvalue) if n_different else 1.0
    method = f"McNemar's exact test, {only_first} and {only_second} discordant of {first.size} pairs"
    return RateComparison(float(first.mean() - second.mean()), p_value, method)


def compare_rates(successes_x: int, n_x: int, successes_y: int, n_y: int) -> RateComparison:
    """
    Boschloo's exact test (Boschloo 1970) for runs that are not paired; more powerful than Fisher's.

    For runs that share a seed it is conservative if sharing it makes them alike.

    :param successes_x: In how many runs of X it happened
    :param n_x: Of how many
    :param successes_y: In how many runs of Y it happened
    :param n_y: Of how many
    :return: The comparison
    :raises ValueError: A method has no runs, or more successes than runs
    """
    difference = rate(successes_x, n_x).value - rate(successes_y, n_y).value
    p_value = 1.0
    if 0 < successes_x + successes_y < n_x + n_y:
        table = [[successes_x, successes_y], [n_x - successes_x, n_y - successes_y]]
        p_value = min(1.0, float(stats.boschloo_exact(table).pvalue))
    return RateComparison(difference, p_value, "Boschloo's exact test")


def holm(p_values: npt.ArrayLike) -> Array:
    """
    Correct p-values for the number of comparisons (Holm 1979): with the adjusted ones, the probability of even one false
    finding is at most the level, whatever the dependence. SciPy has only corrections for the false discovery rate.

    :param p_values: Of all comparisons made, shape ``(comparisons,)``
    :return: The adjusted p-values: of the i-th smallest of m, the largest ``(m - j + 1) p_(j)`` with ``j <= i``, at most 1
    :raises ValueError: One is not a probability
    """
    p = np.asarray(p_values, dtype=np.float64).ravel()
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must be between 0 and 1, found {p.tolist()}.")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted
