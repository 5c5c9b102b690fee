"""
Sequential detectors of policy collapse: has a stream of episodes become worse than a reference?

A detector is calibrated on the episodes of a reference policy and then fed one episode after the other. If these come
independently from the reference's distribution, the probability of any alarm within ``horizon`` episodes is at most
``false_alarm_rate``, over the randomness of the (short) reference as well.

All of them compare ranks. A new episode falls into one of the ``n + 1`` gaps between the ``n`` ordered reference episodes
(*bin* 0: worse than all of them). Whatever the continuous distribution, the probabilities of the gaps are uniformly
distributed on the simplex, Dirichlet(1, ..., 1), and the bins of a stream follow Polya's urn: after bins
:math:`b_1, \\dots, b_t`, the next is bin j with probability :math:`(1 + \\#\\{s: b_s = j\\}) / (n + 1 + t)` (Hill, 1968). So
the law of any function of the bins is known exactly, and can be simulated.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from sb3_offline_ft.common.checks import known_keywords, whole_number

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MIN_REFERENCE = 5
MIN_WORST_SCORE = 2.0


@dataclass(frozen=True)
class Alarm:
    """
    What a detector reports.

    :param detector: Name of the detector
    :param statistic: Its statistic
    :param threshold: The threshold, which the statistic has reached
    :param episode: Number of finished episodes monitored when it fired (a running one is not counted)
    :param message: One plain sentence
    """

    detector: str
    statistic: float
    threshold: float
    episode: int
    message: str


def _normal_scores(n_reference: int, worst: float) -> Floats:
    """
    Scores of the bins, from worse (positive) to better (negative): van der Waerden's normal scores.

    :param n_reference: Number of reference episodes
    :param worst: Score of an episode that is worse than all of them; other scores are clipped to it
    :return: Shape (n_reference + 1,)
    """
    levels = (np.arange(n_reference + 1) + 0.5) / (n_reference + 1)
    scores: Floats = np.minimum(-ndtri(levels), worst)
    scores[0] = worst
    return scores


def _simulated_bins(
    generator: np.random.Generator, n_reference: int, n_steps: int, n_runs: int
) -> Iterator[npt.NDArray[np.uint16]]:
    """
    Bins of streams from the reference's distribution, each run with a reference of its own.

    :param generator: Source of randomness
    :param n_reference: Number of reference episodes
    :param n_steps: Number of episodes
    :param n_runs: Number of streams
    :return: For each step the bins of all runs, shape (n_runs,)
    """
    # Continuous, so uniform without loss of generality; single precision is fast and a tie has probability 1e-7
    reference = np.sort(generator.random((n_runs, n_reference), dtype=np.float32), axis=1).T.copy()
    for start in range(0, n_steps, 16):
        values = generator.random((min(16, n_steps - start), n_runs), dtype=np.float32)
        bins = np.zeros(values.shape, np.uint16)
        for bound in reference:
            bins += bound < values
        yield from bins


def _threshold(maxima: Floats, false_alarm_rate: float) -> float:
    """
    Threshold of a Monte Carlo test (Dwass, 1957): one more maximum, drawn as the given ones, reaches it with at most the
    given probability, whatever the number of simulations.

    :param maxima: Simulated maxima of a statistic, shape (n_simulations,)
    :param false_alarm_rate: The probability
    :return: The threshold, just above an order statistic
    """
    rank = math.ceil((len(maxima) + 1) * (1 - false_alarm_rate))
    largest = float(np.sort(maxima)[rank - 1])
    return largest + 1e-9 * max(1.0, abs(largest))


class Detector(ABC):
    """
    Base class of the detectors.

    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :param n_simulations: Number of simulated streams that thresholds are computed from; by default enough
    :param seed: Seed of the simulations and of random tie-breaking
    :raises ValueError: A parameter is out of range
    """

    name: ClassVar[str]
    """Name in :data:`DETECTORS`."""
    needs_rewards: ClassVar[bool] = False
    """Whether episodes are given as per-step rewards rather than as returns."""

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        horizon: int = 1000,
        n_simulations: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"`false_alarm_rate` must be above 0 and below 1, found {false_alarm_rate!r}.")
        self.false_alarm_rate = float(false_alarm_rate)
        self.horizon = whole_number(horizon, "horizon", 1)
        self.seed = whole_number(seed, "seed")
        if n_simulations is None:
            self.n_simulations = self._default_n_simulations()
        else:
            self.n_simulations = whole_number(n_simulations, "n_simulations", math.ceil(1 / self.false_alarm_rate))
        self._arguments: dict[str, Any] = {
            "false_alarm_rate": self.false_alarm_rate,
            "horizon": self.horizon,
            "n_simulations": n_simulations,
            "seed": self.seed,
        }
        self._calibrated = False
        self.n_episodes = 0
        self._statistic = 0.0
        self._threshold = math.inf

    def _default_n_simulations(self) -> int:
        # Any number above 1 / rate keeps the rate; more make the threshold vary less, as far as there is time
        return min(max(10_000, math.ceil(100 / self.false_alarm_rate)), max(20_000, math.ceil(3 / self.false_alarm_rate)))

    @property
    def is_calibrated(self) -> bool:
        """Whether a reference has been given."""
        return self._calibrated

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, besides rate and horizon."""
        return {name: value for name, value in self._arguments.items() if name not in ("false_alarm_rate", "horizon")}

    @property
    def statistic(self) -> float:
        """The statistic; it grows towards an alarm, which there is as long as it is at least :attr:`threshold`."""
        return self._statistic

    @property
    def threshold(self) -> float:
        """The threshold of :attr:`statistic`; infinite before calibration."""
        return self._threshold

    def calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
        """
        Set the reference and start monitoring.

        :param reference: At least 5 finished episodes of the reference policy: their returns, or where
            :attr:`needs_rewards` is set the 1-D arrays of their per-step rewards; the more episodes, the faster the alarms
        :raises ValueError: There are too few, all have the same return, or a value is not finite
        """
        n_reference = len(reference)
        if n_reference < MIN_REFERENCE:
            raise ValueError(
                f"A reference for the {self.name} detector needs at least {MIN_REFERENCE} finished episodes, "
                f"found {n_reference}: gather more (a longer warm-up), or give more returns."
            )
        self._calibrated = False
        self._calibrate(reference)
        self._calibrated = True
        self.reset()

    def update(self, x: Any, episode_key: int = 0) -> Alarm | None:
        """
        Take one finished episode.

        :param x: Its return, or where :attr:`needs_rewards` is set its per-step rewards, shape (n_steps,)
        :param episode_key: Which of several concurrently running episodes it was, as in :meth:`update_within`
        :return: An alarm if the statistic is at its threshold or above
        :raises RuntimeError: The detector is not calibrated
        :raises ValueError: A value is not finite
        """
        self._check_calibrated()
        self._statistic = self._update(x, episode_key)
        return self._alarm()

    def update_within(self, rewards: Any, episode_key: int = 0) -> Alarm | None:
        """
        Take the rewards that a running episode has given so far; only some detectors make use of them.

        :param rewards: All its per-step rewards so far, shape (n_steps,)
        :param episode_key: Which of several concurrently running episodes it is, for example the index of its environment
        :return: An alarm if something new could be tested and the statistic is at its threshold or above
        :raises RuntimeError: The detector is not calibrated
        """
        self._check_calibrated()
        return None

    def reset(self) -> None:
        """Start monitoring again, with the same calibration."""
        self.n_episodes = 0
        self._statistic = 0.0

    def fresh(self, false_alarm_rate: float) -> "Detector":
        """
        Make an uncalibrated detector with the same settings but another rate.

        :param false_alarm_rate: Its rate of false alarms
        :return: The detector
        """
        arguments = {**self._arguments, "false_alarm_rate": false_alarm_rate}
        if arguments["n_simulations"] is not None:
            arguments["n_simulations"] = max(arguments["n_simulations"], math.ceil(1 / false_alarm_rate))
        return type(self)(**arguments)

    def state_dict(self) -> dict[str, np.ndarray]:
        """
        The whole state with the calibration, from which an identical detector continues to the bit.

        :return: Arrays by name
        """
        state: dict[str, np.ndarray] = {"detector": np.array(self.name), "calibrated": np.array(self._calibrated)}
        state |= {f"argument_{key}": np.array(self._as_float(value)) for key, value in self._arguments.items()}
        if self._calibrated:
            state["n_episodes"] = np.array(self.n_episodes)
            state["statistic"] = np.array(self._statistic)
            state["threshold"] = np.array(self._threshold)
            state |= {name: np.array(getattr(self, f"_{name}")) for name in self._state_names()}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """
        Continue from a saved state.

        :param state: What :meth:`state_dict` of a detector with the same settings gave
        :raises ValueError: It is of another kind of detector or of other settings, or something is missing
        """
        kind = str(state["detector"]) if "detector" in state else None
        if kind != self.name:
            raise ValueError(
                f"The state is one of detector {kind!r}, expected {self.name!r}: load it into a detector of its kind."
            )
        for key, value in self._arguments.items():
            saved, own = state.get(f"argument_{key}"), np.array(self._as_float(value))
            if saved is None or not np.array_equal(saved, own, equal_nan=True):
                raise ValueError(
                    f"The state of detector {self.name!r} was saved with {key}={None if saved is None else saved.tolist()}, "
                    f"this one has {own.tolist()} (nan: the default): make it with the same settings."
                )
        calibrated = bool(state["calibrated"]) if "calibrated" in state else False
        names = ["n_episodes", "statistic", "threshold", *self._state_names()] if calibrated else []
        missing = [name for name in ("calibrated", *names) if name not in state]
        if missing:
            raise ValueError(
                f"The state of detector {self.name!r} lacks {', '.join(missing)}: save it again with state_dict()."
            )
        self._calibrated = calibrated
        self._statistic, self._threshold, self.n_episodes = 0.0, math.inf, 0
        if calibrated:
            self.n_episodes = int(state["n_episodes"])
            self._statistic, self._threshold = float(state["statistic"]), float(state["threshold"])
            for name in self._state_names():
                value = np.array(state[name])
                setattr(self, f"_{name}", value if value.ndim else value.item())

    @staticmethod
    def _as_float(value: Any) -> Any:
        return np.asarray(math.nan if value is None else value, np.float64)

    def _check_calibrated(self) -> None:
        if not self._calibrated:
            raise RuntimeError(f"The {self.name} detector has no reference yet: call calibrate() first.")

    def _alarm(self) -> Alarm | None:
        if self._statistic < self._threshold:
            return None
        message = (
            f"Episodes have become worse than the reference ({self.name} detector: statistic {self._statistic:.4g} reached "
            f"its threshold {self._threshold:.4g} after {self.n_episodes} finished episodes)."
        )
        return Alarm(self.name, self._statistic, self._threshold, self.n_episodes, message)

    @classmethod
    @abstractmethod
    def _state_names(cls) -> tuple[str, ...]:
        """Names, without underscore, of the attributes that make the state."""

    @abstractmethod
    def _calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
        """Set threshold and what else is needed from the reference."""

    @abstractmethod
    def _update(self, x: Any, episode_key: int) -> float:
        """Take one finished episode, count it, and return the statistic."""


class _ReturnDetector(Detector):
    """
    Base class of detectors that see the rank of each return among the reference.

    Equal returns are ordered at random, as if each came with a random number to break ties: with that, bins follow
    Polya's urn for discrete returns as well.
    """

    def _calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
        returns = np.asarray(reference, np.float64)
        if returns.ndim != 1 or not np.isfinite(returns).all():
            raise ValueError(
                f"The {self.name} detector's reference must be one finite return per episode, found shape {returns.shape} "
                f"with {np.count_nonzero(~np.isfinite(returns))} values that are not finite."
            )
        if returns.min() == returns.max():
            raise ValueError(
                f"All {len(returns)} reference episodes have the same return {returns[0]}, expected different ones: there is "
                "no scale on which to call a return worse. Give returns of several differently seeded episodes."
            )
        ties = np.random.default_rng([self.seed, 1]).random(len(returns))
        order = np.lexsort((ties, returns))
        self._reference: Floats = returns[order]
        self._ties: Floats = ties[order]
        self._counts: Integers = np.zeros(len(returns) + 1, np.int64)

    def reset(self) -> None:
        super().reset()
        if self._calibrated:
            self._counts = np.zeros(len(self._reference) + 1, np.int64)

    def _bin(self, x: Any) -> int:
        value = float(x)
        if not math.isfinite(value):
            raise ValueError(
                f"The {self.name} detector expected a finite return, found {value}: check the environment's rewards."
            )
        low, high = (int(np.searchsorted(self._reference, value, side)) for side in ("left", "right"))
        if low < high:
            tie = np.random.default_rng([self.seed, 2, self.n_episodes]).random()
            low += int(np.searchsorted(self._ties[low:high], tie))
        return low


@lru_cache(maxsize=64)
def _cusum_calibration(
    n_reference: int, false_alarm_rate: float, horizon: int, n_simulations: int, seed: int, drift: float, clip: float | None
) -> tuple[float, float, float]:
    """
    Calibrate :class:`CusumDetector`, which depends on the reference's size only.

    :return: Worst score, largest baseline and threshold
    """
    generators = [np.random.default_rng([seed, 3, stream]) for stream in range(3)]
    # A smaller and independent simulation chooses, so that the choice does not bias the threshold
    candidates = [clip] if clip is not None else [c for c in (2.0, 2.5, 3.0, 4.0) if c > drift] or [2 * drift]
    weights = generators[0].dirichlet(np.ones(n_reference + 1), 4000)
    scores = np.stack([_normal_scores(n_reference, worst) for worst in candidates])
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
    return candidates[best], float(caps[best]), _threshold(maxima[0], false_alarm_rate)


def _cusum_maxima(
    generator: np.random.Generator, scores: Floats, caps: Floats, drift: float, horizon: int, n_runs: int
) -> Floats:
    """
    Simulate the maxima of the sums of :class:`CusumDetector`.

    :param scores: Scores of the bins for each setting, shape (n_settings, n_reference + 1)
    :param caps: Largest baselines, shape (n_settings,)
    :return: Shape (n_settings, n_runs)
    """
    n_bins = scores.shape[1]
    start = scores.mean(axis=1)[:, None]
    caps = np.maximum(caps[:, None], start)
    totals = np.repeat(start * n_bins, n_runs, axis=1)
    sums = np.zeros_like(totals)
    maxima = np.zeros_like(totals)
    for step, bins in enumerate(_simulated_bins(generator, n_bins - 1, horizon, n_runs)):
        new = scores.take(bins, axis=1)
        baseline = np.clip(totals / (n_bins + step), start, caps)
        totals += new
        sums += new
        sums -= baseline
        sums -= drift
        np.maximum(sums, 0.0, out=sums)
        np.maximum(maxima, sums, out=maxima)
    return maxima


class CusumDetector(_ReturnDetector):
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

    def _calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
        super()._calibrate(reference)
        worst, cap, self._threshold = _cusum_calibration(
            len(self._reference), self.false_alarm_rate, self.horizon, self.n_simulations, self.seed, self.drift, self.clip
        )
        self._scores: Floats = _normal_scores(len(self._reference), worst)
        self._cap = max(cap, float(self._scores.mean()))

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        return ("reference", "ties", "counts", "scores", "cap")

    def _update(self, x: Any, episode_key: int) -> float:
        j = self._bin(x)
        predicted = float(((1 + self._counts) * self._scores).sum()) / (len(self._scores) + self.n_episodes)
        baseline = min(max(predicted, float(self._scores.mean())), self._cap)
        self._counts[j] += 1
        self.n_episodes += 1
        return max(0.0, self._statistic + float(self._scores[j]) - baseline - self.drift)


class BettingDetector(_ReturnDetector):
    """
    Betting against "nothing has changed" (conformal test martingales: Vovk, Gammerman and Shafer, 2005).

    A gambler starts with capital 1 and bets on low ranks among the reference, at odds that are fair or worse if nothing
    has changed. The capital is then a nonnegative supermartingale, so it reaches ``1 / false_alarm_rate`` with at most that
    probability (Ville, 1939): for ever, not only within the horizon, for every distribution, and without simulation. Bets
    are on the lowest bin, and on the lowest 10 %, 25 % and 50 % of bins, each with a cautious and a bold share of the
    capital (Waudby-Smith and Ramdas, 2024). Odds are the worse of those from Polya's urn and those from the reference
    alone: the latter keep an improved policy that returns to its old level from looking like a collapse. Capital is put in
    bit by bit, so that a late collapse meets unspent money (a mixture over the time of change; Shin, Ramdas and Rinaldo,
    2024): half of it uniformly over the horizon, half as 1 / (t (t + 1)).

    The statistic is the logarithm of the capital. m returns below n reference ones have probability
    1 / binomial(n + m, m), so no valid detector alarms before this is below the rate.

    :param false_alarm_rate: Probability of any alarm, ever, as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes over which most of the capital is put in
    :param n_simulations: Not used, there are none
    :param seed: Seed of random tie-breaking
    :raises ValueError: A parameter is out of range
    """

    name = "betting"
    shares: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.1, 0.1, 0.25, 0.25, 0.5, 0.5)
    """For each bet, the share of the bins that it is on; 0: only the lowest."""
    stakes: ClassVar[tuple[float, ...]] = (0.5, 0.95, 0.4, 0.8, 0.4, 0.8, 0.4, 0.8)
    """For each bet, the share of the capital at stake."""

    def _calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
        super()._calibrate(reference)
        self._threshold = -math.log(self.false_alarm_rate)
        self._log_capitals: Floats = np.full(len(self.shares), -np.inf)

    def reset(self) -> None:
        super().reset()
        if self._calibrated:
            self._log_capitals = np.full(len(self.shares), -np.inf)

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        return ("reference", "ties", "counts", "log_capitals")

    def _update(self, x: Any, episode_key: int) -> float:
        j = self._bin(x)
        n_bins, n_past = len(self._counts), self.n_episodes
        widths = np.maximum(1, np.rint(np.array(self.shares) * n_bins)).astype(np.int64)
        uniform = widths / n_bins
        urn = (widths + np.cumsum(self._counts)[widths - 1]) / (n_bins + n_past)
        stakes = np.array(self.stakes)
        fair = (1 - stakes) * uniform + stakes * np.maximum(uniform, urn)
        gains = np.log(((1 - stakes) * uniform + stakes * (j < widths)) / fair)
        self._counts[j] += 1
        self.n_episodes += 1
        t, within = self.n_episodes, self.n_episodes <= self.horizon
        put_in = 0.5 / (t * (t + 1)) + (0.5 / self.horizon if within else 0.0)
        left = 0.5 / (t + 1) + (0.5 * (1 - t / self.horizon) if within else 0.0)
        self._log_capitals = np.logaddexp(self._log_capitals, math.log(put_in / len(stakes))) + gains
        return float(np.logaddexp(np.logaddexp.reduce(self._log_capitals), math.log(left)))


def _shrunk_covariance(segments: Floats) -> Floats:
    """
    Covariance, shrunk towards a multiple of the identity by as much as suits normal data (OAS; Chen, Wiesel, Eldar and
    Hero, 2010).

    :param segments: Shape (n_episodes, n_segments)
    :return: Shape (n_segments, n_segments)
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
    Weights of the first i segments, for each i, under which the weighted sum varies least.

    These are proportional to the sum of the columns of the inverse covariance (Greenberg and Mannor, 2021), here with
    nonnegative weights and a fifth of the plain sum mixed in: lower rewards never count as better ones, none are ignored.

    :param covariance: Of the segments, shape (n_segments, n_segments)
    :return: Row i - 1 has the weights of the first i segments, which sum to 1; shape (n_segments, n_segments)
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

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        return (
            "segment_length", "segments", "weights", "information", "tested", "scores", "start", "cap", "used_lookbacks",
            "units", "history", "total", "running_keys", "running_tests",
        )  # fmt: skip

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

    def _calibrate(self, reference: Sequence[Any] | npt.NDArray[Any]) -> None:
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
        self._scores: Floats = _normal_scores(len(episodes), max(MIN_WORST_SCORE, -ndtri(0.5 / (len(episodes) + 1))))
        self._calibrate_threshold()

    def _differences(self, segments: Floats) -> Floats:
        """
        Weighted sums of differences to the reference episodes, 0 where there is none but for rounding.

        :param segments: Of one episode, shape (n_segments,)
        :return: Shape (n_reference, n_segments): to each reference episode, over the first 1, 2, ... segments
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
        scores = _normal_scores(n_reference - 1, float(self._scores[0]))
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
                threshold = _threshold((maxima / units[usable, None]).max(axis=0), self.false_alarm_rate)
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
        Simulate the maxima of the standardised sums.

        :param table: Scores of the reference episodes at each test, shape (n_reference, n_segments)
        :return: Shape (n_lookbacks, n_runs)
        """
        information = np.where(self._tested, self._information, 0.0)[self._tested].astype(np.float32)[:, None]
        partial = table.T[self._tested].astype(np.float32)
        history = np.zeros((int(lookbacks.max()), n_runs), np.float32)
        sums = np.zeros((len(lookbacks), n_runs), np.float32)
        totals = np.full(n_runs, self._start * len(table))
        maxima = np.full((len(lookbacks), n_runs), -np.inf, np.float32)
        norms = [1 / np.sqrt(lookback - 1 + information**2) for lookback in lookbacks]
        for step, atoms in enumerate(_simulated_bins(generator, len(table) - 1, self.horizon, n_runs)):
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
        """
        Test an episode at its boundaries ``first`` to ``last``, 1 being the end of the first segment.

        :return: The statistic, and the score of the last test
        """
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
        """
        Test a running episode if it has finished another segment.

        :param rewards: All its per-step rewards so far, shape (n_steps,)
        :param episode_key: Which of several concurrently running episodes it is, for example the index of its environment
        :return: An alarm if there was something to test and the statistic is at its threshold or above
        :raises RuntimeError: The detector is not calibrated
        :raises ValueError: A value is not finite
        """
        self._check_calibrated()
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


DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector for detector in (CusumDetector, BettingDetector, DeteriorationDetector)
}
"""The detectors by name."""


def make_detector(
    detector: str | Mapping[str, Mapping[str, Any] | None] | Detector, false_alarm_rate: float = 0.01, horizon: int = 1000
) -> Detector:
    """
    Make a detector.

    :param detector: A name in :data:`DETECTORS`, or a name with further settings as in ``{"cusum": {"drift": 0.25}}``, or a
        detector, which is returned as it is
    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :return: The detector
    :raises ValueError: There is no detector of that name
    :raises TypeError: It has no such setting
    """
    if isinstance(detector, Detector):
        return detector
    options: Mapping[str, Any] | None = None
    name: Any = detector
    if isinstance(detector, Mapping):
        if len(detector) != 1:
            raise ValueError(
                f"A detector with settings is one name with them, {{'cusum': {{'drift': 0.25}}}}, found {detector!r}."
            )
        ((name, options),) = detector.items()
    if not isinstance(name, str) or name not in DETECTORS:
        near = difflib.get_close_matches(str(name), DETECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DETECTORS)}."
        raise ValueError(f"Unknown detector {name!r}: {hint}")
    options = dict(options or {})
    known_keywords(DETECTORS[name], options, f"Detector {name!r}")
    return DETECTORS[name](**{"false_alarm_rate": false_alarm_rate, "horizon": horizon, **options})
