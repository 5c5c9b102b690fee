"""
Estimates with their uncertainty, from few runs.

Scores of a method are given as one array of runs per dataset: a list of arrays, or a mapping from the datasets' names. Runs
are resampled within each dataset (stratified bootstrap), so intervals are about other seeds on the same datasets. All
randomness comes from ``seed``.

The choice of aggregates and intervals follows Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical
Precipice (rliable). Percentile intervals from few runs are too narrow: from 5 runs, intervals of 95 % cover the true
interquartile mean in about 90 % of the cases, and the true mean in 84 % if runs are normally distributed, in 65 % if one in
five fails (``benchmarks/studies/interval_coverage.md``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from sb3_offline_ft.evaluation.resampling import (
    Array,
    Curves,
    Scores,
    checked_curves,
    checked_scores,
    matching_scores,
    resample,
)

Statistic = Literal["iqm", "mean", "median", "task_median"]

N_RESAMPLES = 10_000
N_RESAMPLES_BAND = 2_000
_SINGLE_RUN = "no interval: it takes at least two runs per dataset"


@dataclass(frozen=True)
class Estimate:
    """
    A number with its interval.

    :param value: The estimate
    :param low: Lower end of the interval, nan if there is no interval
    :param high: Upper end
    :param n: Runs (or pairs of runs) it comes from
    :param method: How value and interval were computed; why there is no interval, if there is none
    """

    value: float
    low: float
    high: float
    n: int
    method: str

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low))


@dataclass(frozen=True)
class Band:
    """
    A curve with a band around it.

    :param x: Where, such as timesteps, shape ``(points,)``
    :param value: The curve, shape ``(points,)``
    :param low: Lower edge, nan if there is no band, shape ``(points,)``
    :param high: Upper edge
    :param n: Runs it comes from
    :param method: How curve and band were computed; why there is no band, if there is none
    """

    x: Array
    value: Array
    low: Array
    high: Array
    n: int
    method: str


def _pooled(*samples: Array, axis: int = -1) -> Array:
    return samples[0] if len(samples) == 1 else np.concatenate(samples, axis=axis)


def _iqm(*samples: Array, axis: int = -1) -> Array:
    return np.asarray(stats.trim_mean(_pooled(*samples, axis=axis), 0.25, axis=axis))


def _mean(*samples: Array, axis: int = -1) -> Array:
    return np.asarray(np.mean([sample.mean(axis=axis) for sample in samples], axis=0))


def _median(*samples: Array, axis: int = -1) -> Array:
    return np.asarray(np.median(_pooled(*samples, axis=axis), axis=axis))


def _task_median(*samples: Array, axis: int = -1) -> Array:
    return np.asarray(np.median([sample.mean(axis=axis) for sample in samples], axis=0))


_STATISTICS: dict[str, tuple[Callable[..., Array], str]] = {
    "iqm": (_iqm, "interquartile mean"),
    "mean": (_mean, "mean"),
    "median": (_median, "median"),
    "task_median": (_task_median, "median of the datasets' means"),
}


def aggregate(
    scores: Scores,
    statistic: Statistic = "iqm",
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """
    Aggregate scores of a method, with a stratified-bootstrap percentile interval.

    - ``iqm``: interquartile mean: the ``floor(n / 4)`` lowest and highest of all ``n`` runs are left out, the rest is averaged
      (of 5 runs one at each end; of 3 none)
    - ``mean``: mean of the datasets' means, so that each dataset counts the same
    - ``median``: of all runs
    - ``task_median``: median of the datasets' means, which Agarwal et al. and rliable call median

    There is no interval, rather than a false one, if a dataset has only one run or all resamples agree, as when all runs are
    equal.

    :param scores: Of each dataset the runs, shape ``(runs,)``
    :param statistic: Which aggregate
    :param confidence: Level of the interval
    :param n_resamples: Resamples of the bootstrap
    :param seed: Same seed, same interval
    :return: The estimate
    :raises ValueError: There are no scores, or one is not finite
    """
    samples = checked_scores(scores)
    function, name = _known_statistic(statistic)
    return _bootstrap(samples, function, f"{name} of {_runs(samples)}", confidence, n_resamples, seed)


def rate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """
    The share of runs in which something happened, with the exact interval of Clopper & Pearson 1934: it covers the true
    probability at least as often as it says, for any number of runs.

    :param successes: In how many runs it happened
    :param n: Of how many
    :param confidence: Level of the interval
    :return: The estimate
    :raises ValueError: There are no runs, or more successes than runs
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"A rate needs at least one run and at most as many successes: found {successes} of {n}.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="exact")
    method = f"{successes} of {n} runs, exact binomial interval (Clopper-Pearson)"
    return Estimate(successes / n, float(interval.low), float(interval.high), n, method)


def probability_of_improvement(
    x: Scores,
    y: Scores,
    *,
    shared: Literal["x", "y"] | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES_BAND,
    seed: int = 0,
) -> Estimate:
    """
    Probability that a run of method X has a higher score than a run of method Y on the same dataset, averaged over datasets.

    ``P = mean over datasets of U / (n m)``, with the Mann-Whitney statistic ``U`` of ``n`` runs of X and ``m`` of Y; ties
    count half (Agarwal et al. 2021, section 4.3). Runs of X and Y are resampled independently, pairs by seed are not used.

    :param x: Of each dataset the runs of method X, shape ``(runs,)``
    :param y: The same of method Y, datasets in the same order (or with the same names)
    :param shared: The method whose runs are the same on all datasets, as of one that uses no data: they are resampled once for
        all datasets, since each run is only one run
    :param confidence: Level of the stratified-bootstrap percentile interval
    :param n_resamples: Resamples of the bootstrap
    :param seed: Same seed, same interval
    :return: The estimate; without an interval if all resamples agree, as when all runs of X are better than all of Y
    :raises ValueError: Datasets differ, there are no scores, one is not finite, or shared runs differ between datasets
    """
    x_samples, y_samples = matching_scores(x, y)
    n_datasets = len(x_samples)
    first_samples, second_samples = (
        _once(samples, name) if shared == name else samples for samples, name in ((x_samples, "x"), (y_samples, "y"))
    )
    n_first = len(first_samples)

    def statistic(*samples: Array, axis: int = -1) -> Array:
        shares = []
        repeated = (list(part) * (n_datasets // len(part)) for part in (samples[:n_first], samples[n_first:]))
        for one, other in zip(*repeated, strict=True):
            first, second = one[..., :, None], other[..., None, :]
            shares.append(np.mean((first > second) + 0.5 * (first == second), axis=(-2, -1)))
        return np.asarray(np.mean(shares, axis=0))

    name = f"Mann-Whitney U / (n m) of {_runs(first_samples)} and {_runs(second_samples)}"
    if shared is not None:
        name += f", the runs of {shared} resampled once for all datasets"
    longest = max(map(len, x_samples))
    samples = [*first_samples, *second_samples]
    return _bootstrap(samples, statistic, name, confidence, n_resamples, seed, numbers_per_run=longest)


def performance_profile(
    scores: Scores,
    thresholds: npt.ArrayLike,
    band: Literal["pointwise", "simultaneous"] = "pointwise",
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES_BAND,
    seed: int = 0,
) -> Band:
    """
    The share of runs with a score above each threshold: run-score distribution (Agarwal et al. 2021, section 4.2).

    A pointwise band is the stratified-bootstrap percentile interval at each threshold by itself; it has no width where all
    runs or none are above the threshold. A simultaneous band holds at all thresholds together: the profile plus and minus the
    quantile of the Kolmogorov statistic (Massey 1951; exact for runs of one dataset), within 0 and 1.

    :param scores: Of each dataset the runs, shape ``(runs,)``
    :param thresholds: The scores to compare with, shape ``(points,)``
    :param band: Which band
    :param confidence: Level of the band
    :param n_resamples: Resamples of the bootstrap of a pointwise band
    :param seed: Same seed, same band
    :return: The profile
    :raises ValueError: There are no scores, or one is not finite
    """
    if band not in ("pointwise", "simultaneous"):
        raise ValueError(f"`band` must be 'pointwise' or 'simultaneous', found {band!r}.")
    samples = checked_scores(scores)
    points = np.asarray(thresholds, dtype=np.float64)
    is_above = [(sample > points[:, None]).astype(np.float64) for sample in samples]
    name = f"share of {_runs(samples)} above the threshold"

    def share(*resampled: Array, axis: int = -1) -> Array:
        return np.asarray(_pooled(*resampled, axis=axis).mean(axis=axis))

    if band == "pointwise" or min(map(len, samples)) < 2:
        return _pointwise_band(points, is_above, share, name, confidence, n_resamples, seed)
    value, n = share(*is_above), sum(map(len, samples))
    deviation = stats.kstwo.ppf(confidence, n)
    low, high = np.maximum(value - deviation, 0.0), np.minimum(value + deviation, 1.0)
    return Band(points, value, low, high, n, f"{name}, simultaneous {100 * confidence:g} % Kolmogorov band")


def curve_band(
    timesteps: npt.ArrayLike,
    curves: Curves,
    statistic: Statistic = "iqm",
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES_BAND,
    seed: int = 0,
) -> Band:
    """
    Aggregate learning curves over runs at each evaluation, with a pointwise stratified-bootstrap percentile band. Whole curves
    are resampled. Where all runs agree, the band has no width.

    :param timesteps: Of the evaluations, the same for all runs, shape ``(evaluations,)``
    :param curves: Of each dataset the curves, shape ``(runs, evaluations)``
    :param statistic: As for :func:`aggregate`
    :param confidence: Level of the band
    :param n_resamples: Resamples of the bootstrap
    :param seed: Same seed, same band
    :return: The curve
    :raises ValueError: Runs do not have the same evaluations, there are none, or a return is not finite
    """
    points = np.asarray(timesteps, dtype=np.float64)
    samples = checked_curves(curves, points.size)
    function, name = _known_statistic(statistic)
    return _pointwise_band(points, samples, function, f"{name} of {_runs(samples)}", confidence, n_resamples, seed)


def _pointwise_band(
    points: Array,
    samples: list[Array],
    function: Callable[..., Array],
    name: str,
    confidence: float,
    n_resamples: int,
    seed: int,
) -> Band:
    """A curve of samples with the shape ``(points, runs)``."""
    value, counts = function(*samples, axis=-1), [sample.shape[-1] for sample in samples]
    if min(counts) < 2:
        nothing = np.full(points.shape, np.nan)
        return Band(points, value, nothing, nothing, sum(counts), f"{name}, {_SINGLE_RUN}")
    low, high = resample(samples, function, confidence, n_resamples, seed, points.size).confidence_interval
    method = f"{name}, pointwise {_bootstrap_name(confidence, n_resamples)}"
    return Band(points, value, np.asarray(low), np.asarray(high), sum(counts), method)


def _bootstrap(
    samples: list[Array],
    function: Callable[..., Array],
    name: str,
    confidence: float,
    n_resamples: int,
    seed: int,
    numbers_per_run: int = 1,
) -> Estimate:
    value, n = float(function(*samples, axis=-1)), sum(map(len, samples))
    if min(map(len, samples)) < 2:
        return Estimate(value, np.nan, np.nan, n, f"{name}, {_SINGLE_RUN}")
    result = resample(samples, function, confidence, n_resamples, seed, numbers_per_run)
    if np.ptp(result.bootstrap_distribution) <= 1e-12 * abs(value):
        return Estimate(value, np.nan, np.nan, n, f"{name}, no interval: all resamples give the same value")
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high), n, f"{name}, {_bootstrap_name(confidence, n_resamples)}")


def _once(samples: list[Array], name: str) -> list[Array]:
    if any(not np.array_equal(sample, samples[0]) for sample in samples):
        raise ValueError(f"Shared runs are the same on all datasets: those of `{name}` differ.")
    return samples[:1]


def _bootstrap_name(confidence: float, n_resamples: int) -> str:
    return f"{100 * confidence:g} % stratified percentile bootstrap ({n_resamples:,} resamples)"


def _runs(samples: list[Array]) -> str:
    n, n_datasets = sum(sample.shape[-1] for sample in samples), len(samples)
    return f"{n} run{'s' * (n != 1)} on {n_datasets} dataset{'s' * (n_datasets != 1)}"


def _known_statistic(statistic: str) -> tuple[Callable[..., Array], str]:
    if statistic not in _STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(_STATISTICS)}; found {statistic!r}.")
    return _STATISTICS[statistic]
