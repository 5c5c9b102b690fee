"""Weighted sums of rewards within and over episodes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from scipy.special import ndtri
from scipy.stats import rankdata

from sb3_offline_ft.collapse.detectors.base import Alarm, Detector, Episodes
from sb3_offline_ft.collapse.detectors.ranks import Floats, Integers, monte_carlo_threshold, normal_scores, simulated_bins
from sb3_offline_ft.common.checks import whole_number

MIN_WORST_SCORE = 2.0


def _shrunk_covariance(segments: Floats) -> Floats:
    """
    Covariance of segments, shape (n_episodes, n_segments), shrunk towards a multiple of the identity by as much as suits
    normal data (OAS; Chen, Wiesel, Eldar and Hero, 2010).
    """
    n_episodes, n_segments = segments.shape
    centered = segments - segments.mean(axis=0)
    covariance = centered.T @ centered / n_episodes
    scale = np.trace(covariance) / n_segments
    mean_square = np.mean(covariance**2)
    denominator = (n_episodes + 1) * (mean_square - scale**2 / n_segments)
    if scale <= 0:
        return np.eye(n_segments)
    shrinkage = 1.0 if denominator <= 0 else min(1.0, float((mean_square + scale**2) / denominator))
    shrunk: Floats = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(n_segments)
    return shrunk


def _segment_weights(covariance: Floats) -> Floats:
    """
    Weights of the first i segments under which the weighted sum varies least, which sum to 1, in row i - 1.

    These are proportional to the sum of the columns of the inverse covariance (Greenberg and Mannor, 2021), here with
    nonnegative weights and a fifth of the plain sum mixed in: lower rewards never count as better ones, none are ignored.
    """
    n_segments = len(covariance)
    # A hair of ridge: the weights of nearly constant segments stay finite
    factor = np.linalg.cholesky(covariance + 1e-9 * np.trace(covariance) / n_segments * np.eye(n_segments))
    target = solve_triangular(factor, np.ones(n_segments), lower=True)
    weights = np.zeros((n_segments, n_segments))
    for i in range(1, n_segments + 1):
        best, _ = nnls(factor[:i, :i].T, target[:i])
        weights[i - 1, :i] = 0.8 * best / best.sum() + 0.2 / i
    return weights


class DeteriorationDetector(Detector):
    """
    Weighted sums of rewards within and over episodes (Greenberg and Mannor, 2021, arXiv 2010.11660).

    Episodes are cut into segments of equal numbers of steps (segments that an episode does not reach are 0, so that the
    plain sum is the return; steps beyond the longest reference episode go to the last segment). Whenever a running episode
    finishes a segment, and at its end, the weighted sum of its segments is ranked among the reference's sums of the same
    segments, and so are whole episodes. For each lookback m the normal scores of the last m - 1 finished episodes and the
    running part, which counts by its share of the information, are added and standardised; the statistic is the largest of
    these sums in units of their own quantiles. Weights are the inverse covariance's (see :func:`_segment_weights`); each
    comparison with a reference episode uses weights estimated without it, as the jackknife+ does (Barber, Candes, Ramdas
    and Tibshirani, 2021), or the reference would look better ordered than new episodes. Scores are relative to a
    baseline as in :class:`CusumDetector`.

    The threshold comes from simulated streams of whole reference episodes (the paper's bootstrap for false-alarm rates).
    Short references need more: each stream has its own random probabilities of the episodes, Dirichlet(1, ..., 1), each
    episode is ranked among the others as a new one would be, and the worst counts as worst at every test. For tests at
    the ends of episodes this is the law of the ranks among one reference episode less, but for the estimated weights; for
    tests within episodes it is an approximation, which the benchmarks check.

    Several environments may run at once: each running episode has a key, and its tests use the episodes finished by then.

    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :param n_simulations: Number of simulated streams that the threshold is computed from; by default enough
    :param seed: Seed of the simulations
    :param n_segments: Number of segments of the longest reference episode, at most; more of them detect earlier within an
        episode
    :param lookbacks: Numbers of episodes that are looked at together, each at least 1; those too short to ever reach the
        threshold are dropped, and longer ones are added if none is left
    :raises ValueError: A parameter is out of range
    """

    name = "deterioration"
    needs_rewards = True
    _state_names = (
        "segment_length", "segments", "weights", "information", "tested", "scores", "start", "cap", "used_lookbacks",
        "units", "history", "total", "running_keys", "running_tests",
    )  # fmt: skip

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        horizon: int = 1000,
        n_simulations: int | None = None,
        seed: int = 0,
        n_segments: int = 10,
        lookbacks: Sequence[int] = (1, 2, 4, 8, 16),
    ) -> None:
        super().__init__(false_alarm_rate, horizon, n_simulations, seed)
        self.n_segments = whole_number(n_segments, "n_segments", 1)
        self.lookbacks = tuple(sorted({whole_number(lookback, "lookbacks", 1) for lookback in lookbacks}))
        if not self.lookbacks:
            raise ValueError("`lookbacks` must be numbers of episodes, found none: give at least one, for example (1, 4, 16).")
        self._arguments |= {"n_segments": self.n_segments, "lookbacks": self.lookbacks}

    def _default_n_simulations(self) -> int:
        return min(max(2000, math.ceil(20 / self.false_alarm_rate)), max(4000, math.ceil(3 / self.false_alarm_rate)))

    def reset(self) -> None:
        super().reset()
        if self._calibrated:
            self._history: Floats = np.zeros(int(self._used_lookbacks.max()) - 1)
            self._total = self._start * len(self._scores)
            self._running_keys: Integers = np.zeros(0, np.int64)
            self._running_tests: Integers = np.zeros(0, np.int64)

    def _checked(self, rewards: Any, what: str) -> Floats:
        array = np.asarray(rewards, np.float64)
        if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
            raise ValueError(
                f"{what} of the {self.name} detector must be the finite rewards of its steps, shape (n_steps,), "
                f"found shape {array.shape} with {np.count_nonzero(~np.isfinite(array))} values that are not finite."
            )
        return array

    def _segment_sums(self, rewards: Floats, n_segments: int) -> Floats:
        starts = np.arange(0, len(rewards), self._segment_length)[:n_segments]
        sums = np.zeros(n_segments)
        sums[: len(starts)] = np.add.reduceat(rewards, starts)
        return sums

    def _calibrate(self, reference: Episodes) -> None:
        episodes = [self._checked(rewards, f"Reference episode {i}") for i, rewards in enumerate(reference)]
        longest = max(map(len, episodes))
        self._segment_length = math.ceil(longest / min(self.n_segments, longest))
        n_segments = math.ceil(longest / self._segment_length)
        self._segments: Floats = np.stack([self._segment_sums(episode, n_segments) for episode in episodes])
        returns = self._segments.sum(axis=1)
        if np.ptp(returns) <= 1e-9 * np.abs(self._segments).max():
            raise ValueError(
                f"All {len(returns)} reference episodes have the same return {returns[0]}, expected different ones: there is "
                "no scale on which to call an episode worse. Give several differently seeded episodes."
            )
        others = ~np.eye(len(episodes), dtype=bool)
        self._weights: Floats = np.stack([_segment_weights(_shrunk_covariance(self._segments[rows])) for rows in others])
        covariance = _shrunk_covariance(self._segments)
        weights = _segment_weights(covariance)
        deviations = np.sqrt(np.einsum("ij,jk,ik->i", weights, covariance, weights))
        self._information: Floats = np.minimum(1.0, deviations[-1] / deviations)
        self._scores: Floats = normal_scores(len(episodes), max(MIN_WORST_SCORE, -ndtri(0.5 / (len(episodes) + 1))))
        self._calibrate_threshold()

    def _differences(self, segments: Floats) -> Floats:
        """
        Weighted sums, over the first 1, 2, ... segments, of one episode's differences to each reference episode, shape
        (n_reference, n_segments); 0 where there is none but for rounding.
        """
        differences: Floats = np.einsum("eij,ej->ei", self._weights, segments - self._segments)
        differences[np.abs(differences) <= 1e-9 * np.abs(self._segments).max()] = 0.0
        return differences

    def _calibrate_threshold(self) -> None:
        n_reference = len(self._segments)
        differences = np.stack([self._differences(segments) for segments in self._segments])
        signs = np.sign(differences).sum(axis=1)
        # Boundaries at which all reference episodes are alike cannot be ranked
        self._tested: npt.NDArray[np.bool_] = np.ptp(signs, axis=0) > 0
        if not self._tested[-1]:
            raise ValueError(
                f"The {n_reference} reference episodes cannot be ordered from better to worse: "
                "give more, differently seeded ones."
            )
        # Each reference episode ranked among the others, as a new one is among all
        scores = normal_scores(n_reference - 1, float(self._scores[0]))
        by_rank = np.concatenate([[0.0], np.cumsum(scores)])
        below, upto = rankdata(signs, "min", axis=0) - 1, rankdata(signs, "max", axis=0)
        table = (by_rank[upto] - by_rank[below]) / (upto - below)
        table[signs[:, -1].argmin()] = scores[0]
        self._start = float(table[:, -1].mean())
        generators = [np.random.default_rng([self.seed, 4, stream]) for stream in range(3)]
        whole = generators[0].dirichlet(np.ones(n_reference), 4000) @ table[:, -1]
        self._cap = max(self._start, float(np.quantile(whole, max(0.5, 1 - 2 * self.false_alarm_rate))))
        lookbacks = np.array(self.lookbacks)
        while True:
            maxima = self._simulated_maxima(generators[1], table, lookbacks, self.n_simulations // 2)
            units = np.quantile(maxima, 1 - self.false_alarm_rate / len(lookbacks), axis=1)
            usable = (self._scores[0] - self._start) * np.sqrt(lookbacks) >= units
            if usable.any():
                maxima = self._simulated_maxima(generators[2], table, lookbacks[usable], self.n_simulations)
                threshold = monte_carlo_threshold((maxima / units[usable, None]).max(axis=0), self.false_alarm_rate)
                # Even where the baseline has risen to its cap
                if ((self._scores[0] - self._cap) * np.sqrt(lookbacks[usable]) >= threshold * units[usable]).any():
                    break
            if lookbacks[-1] >= self.horizon:
                raise ValueError(
                    f"{n_reference} reference episodes are too few for a false-alarm rate of {self.false_alarm_rate} over "
                    f"{self.horizon} episodes: not even {lookbacks[-1]} collapsed episodes would raise an alarm. Give more "
                    "reference episodes, a higher false-alarm rate or a shorter horizon."
                )
            lookbacks = np.append(lookbacks, 2 * lookbacks[-1])
        self._used_lookbacks: Integers = lookbacks[usable].astype(np.int64)
        self._units: Floats = units[usable]
        # The simulation is in single precision
        self._threshold = threshold * (1 + 1e-5)

    def _simulated_maxima(self, generator: np.random.Generator, table: Floats, lookbacks: Integers, n_runs: int) -> Floats:
        """
        Simulated maxima of the standardised sums, shape (n_lookbacks, n_runs), where the reference episodes have the scores
        ``table`` at each test, shape (n_reference, n_segments).
        """
        information = np.where(self._tested, self._information, 0.0)[self._tested].astype(np.float32)[:, None]
        partial = table.T[self._tested].astype(np.float32)
        history = np.zeros((int(lookbacks.max()), n_runs), np.float32)
        sums = np.zeros((len(lookbacks), n_runs), np.float32)
        totals = np.full(n_runs, self._start * len(table))
        maxima = np.full((len(lookbacks), n_runs), -np.inf, np.float32)
        norms = [1 / np.sqrt(lookback - 1 + information**2) for lookback in lookbacks]
        for step, atoms in enumerate(simulated_bins(generator, len(table) - 1, self.horizon, n_runs)):
            baseline = np.clip(totals / (len(table) + step), self._start, self._cap).astype(np.float32)
            running = partial.take(atoms, axis=1)
            new = running[-1] - baseline
            totals += running[-1]
            running -= baseline
            running *= information
            for i, lookback in enumerate(lookbacks):
                best = ((running + sums[i]) * norms[i]).max(axis=0)
                np.maximum(maxima[i], best, out=maxima[i])
                if lookback > 1:
                    sums[i] += new
                    sums[i] -= history[(step - lookback + 1) % len(history)]
            history[step % len(history)] = new
        return maxima.astype(np.float64)

    def _baseline(self) -> float:
        return min(max(self._total / (len(self._scores) + self.n_episodes), self._start), self._cap)

    def _test(self, segments: Floats, first: int, last: int) -> tuple[float, float]:
        """Statistic and last score of an episode at its boundaries ``first`` to ``last``, 1 being the first segment's end."""
        differences = self._differences(segments)
        baseline = self._baseline()
        statistic, score = -math.inf, 0.0
        recent = np.array([self._history[len(self._history) - lookback + 1 :].sum() for lookback in self._used_lookbacks])
        for i in range(first - 1, last):
            if not self._tested[i]:
                continue
            below, equal = np.count_nonzero(differences[:, i] > 0), np.count_nonzero(differences[:, i] == 0)
            score = float(self._scores[below + 1 : below + equal + 1].mean() if equal else self._scores[below])
            information = self._information[i]
            sums = (recent + information * (score - baseline)) / np.sqrt(self._used_lookbacks - 1 + information**2)
            statistic = max(statistic, float((sums / self._units).max()))
        return statistic, score

    def _tests_done(self, episode_key: int) -> int:
        found = np.flatnonzero(self._running_keys == episode_key)
        return int(self._running_tests[found[0]]) if len(found) else 0

    def _set_tests_done(self, episode_key: int, tests: int) -> None:
        keep = self._running_keys != episode_key
        self._running_keys, self._running_tests = self._running_keys[keep], self._running_tests[keep]
        if tests:
            self._running_keys = np.append(self._running_keys, episode_key)
            self._running_tests = np.append(self._running_tests, tests)

    def update_within(self, rewards: Any, episode_key: int = 0) -> Alarm | None:
        super().update_within(rewards, episode_key)
        n_segments = self._segments.shape[1]
        done, finished = self._tests_done(episode_key), min(len(rewards) // self._segment_length, n_segments - 1)
        if finished <= done:
            return None
        segments = self._segment_sums(self._checked(rewards, "A running episode"), n_segments)
        self._set_tests_done(episode_key, finished)
        statistic, _ = self._test(segments, done + 1, finished)
        if statistic == -math.inf:
            return None
        self._statistic = statistic
        return self._alarm()

    def _update(self, x: Any, episode_key: int) -> float:
        rewards, n_segments = self._checked(x, "An episode"), self._segments.shape[1]
        segments = self._segment_sums(rewards, n_segments)
        done = self._tests_done(episode_key)
        finished = min(len(rewards) // self._segment_length, n_segments - 1)
        within, _ = self._test(segments, done + 1, finished)
        whole, score = self._test(segments, n_segments, n_segments)
        self._set_tests_done(episode_key, 0)
        if len(self._history):
            self._history = np.append(self._history[1:], score - self._baseline())
        self._total += score
        self.n_episodes += 1
        return max(within, whole)
