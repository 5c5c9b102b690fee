"""CUSUM of ranks."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from sb3_offline_ft.collapse.detectors.base import Episodes
from sb3_offline_ft.collapse.detectors.ranks import Floats, RankDetector, monte_carlo_threshold, normal_scores, simulated_bins


@lru_cache(maxsize=64)
def _cusum_calibration(
    n_reference: int, false_alarm_rate: float, horizon: int, n_simulations: int, seed: int, drift: float, clip: float | None
) -> tuple[float, float, float]:
    """Worst score, largest baseline and threshold of :class:`CusumDetector`, which depend on the reference's size only."""
    generators = [np.random.default_rng([seed, 3, stream]) for stream in range(3)]
    # A smaller and independent simulation chooses, so that the choice does not bias the threshold
    candidates = [clip] if clip is not None else [c for c in (2.0, 2.5, 3.0, 4.0) if c > drift] or [2 * drift]
    weights = generators[0].dirichlet(np.ones(n_reference + 1), 4000)
    scores = np.stack([normal_scores(n_reference, worst) for worst in candidates])
    caps = np.quantile(scores @ weights.T, max(0.5, 1 - 2 * false_alarm_rate), axis=1)
    best = 0
    if len(candidates) > 1:
        maxima = _cusum_maxima(generators[1], scores, caps, drift, horizon, max(1000, math.ceil(10 / false_alarm_rate)))
        levels = np.maximum(np.quantile(maxima, 1 - false_alarm_rate, axis=1), 1e-9)
        edges = ndtri(np.arange(n_reference + 2) / (n_reference + 1))
        slopes = [scores @ np.diff(ndtr(edges + fall)) for fall in (2 * drift, 4 * drift)] + [np.array(candidates)]
        delays = [levels / np.maximum(slope - drift, levels / horizon) for slope in slopes]
        best = int(np.argmin(np.sum(delays, axis=0)))
    chosen = slice(best, best + 1)
    maxima = _cusum_maxima(generators[2], scores[chosen], caps[chosen], drift, horizon, n_simulations)
    return candidates[best], float(caps[best]), monte_carlo_threshold(maxima[0], false_alarm_rate)


def _cusum_maxima(
    generator: np.random.Generator, scores: Floats, caps: Floats, drift: float, horizon: int, n_runs: int
) -> Floats:
    """
    Simulated maxima of the sums of :class:`CusumDetector`, shape (n_settings, n_runs), for several scores of the bins, shape
    (n_settings, n_reference + 1), and largest baselines, shape (n_settings,).
    """
    n_bins = scores.shape[1]
    start = scores.mean(axis=1)[:, None]
    caps = np.maximum(caps[:, None], start)
    totals = np.repeat(start * n_bins, n_runs, axis=1)
    sums = np.zeros_like(totals)
    maxima = np.zeros_like(totals)
    for step, bins in enumerate(simulated_bins(generator, n_bins - 1, horizon, n_runs)):
        new = scores.take(bins, axis=1)
        baseline = np.clip(totals / (n_bins + step), start, caps)
        totals += new
        sums += new
        sums -= baseline
        sums -= drift
        np.maximum(sums, 0.0, out=sums)
        np.maximum(maxima, sums, out=maxima)
    return maxima


class CusumDetector(RankDetector):
    """
    CUSUM (Page, 1954) of the normal scores of ranks.

    Each return is given the normal score z of its rank among the reference (positive: worse; about its distance below the
    reference's mean in standard deviations if returns are normal). The sum S = max(0, S + z - b - ``drift``) grows while
    returns are worse by more than ``drift`` and is pulled to 0 otherwise. The baseline b is the mean score that Polya's urn
    predicts, from reference and stream so far: it learns by how much a short reference was lucky. It is not below the
    reference's own, so that an improved policy that returns to its old level is no alarm, and not above what luck explains
    (the ``1 - 2 * false_alarm_rate`` quantile over the probabilities of the bins), so that a lasting decline does not
    become the norm. With a large reference b tends to 0 and the detector to the classical CUSUM.

    S is a function of the bins alone. So the threshold, from simulated streams, is exact for every continuous distribution,
    and with random tie-breaking for every other, over the randomness of reference, stream and simulation.

    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :param n_simulations: Number of simulated streams that the threshold is computed from; by default enough
    :param seed: Seed of the simulations and of random tie-breaking
    :param drift: Decline that is tolerated, in standard deviations (of normal scores); half the smallest decline to detect
    :param clip: Score of a return worse than all reference returns, above ``drift``; by default chosen to detect declines of
        2 and 4 times ``drift`` and total collapse fast
    :raises ValueError: A parameter is out of range
    """

    name = "cusum"
    _state_names = ("reference", "ties", "counts", "scores", "cap")

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        horizon: int = 1000,
        n_simulations: int | None = None,
        seed: int = 0,
        drift: float = 0.5,
        clip: float | None = None,
    ) -> None:
        super().__init__(false_alarm_rate, horizon, n_simulations, seed)
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"`drift` must be a number of standard deviations of at least 0, found {drift!r}.")
        if clip is not None and not (math.isfinite(clip) and clip > drift):
            raise ValueError(f"`clip` must be above `drift` ({drift!r}), found {clip!r}: no sum would ever grow.")
        self.drift = float(drift)
        self.clip = None if clip is None else float(clip)
        self._arguments |= {"drift": self.drift, "clip": self.clip}

    def _calibrate(self, reference: Episodes) -> None:
        super()._calibrate(reference)
        worst, cap, self._threshold = _cusum_calibration(
            len(self._reference), self.false_alarm_rate, self.horizon, self.n_simulations, self.seed, self.drift, self.clip
        )
        self._scores: Floats = normal_scores(len(self._reference), worst)
        self._cap = max(cap, float(self._scores.mean()))

    def _update(self, x: Any, episode_key: int) -> float:
        j = self._bin(x)
        predicted = float(((1 + self._counts) * self._scores).sum()) / (len(self._scores) + self.n_episodes)
        baseline = min(max(predicted, float(self._scores.mean())), self._cap)
        self._counts[j] += 1
        self.n_episodes += 1
        return max(0.0, self._statistic + float(self._scores[j]) - baseline - self.drift)
