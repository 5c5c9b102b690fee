"""
Detectors that compare ranks, and the exact law of these as long as nothing has changed.

A new episode falls into one of the ``n + 1`` gaps between the ``n`` ordered reference episodes (*bin* 0: worse than all of
them). Whatever the continuous distribution, the probabilities of the gaps are uniformly distributed on the simplex,
Dirichlet(1, ..., 1), and the bins of a stream follow Polya's urn: after bins :math:`b_1, \\dots, b_t`, the next is bin j with
probability :math:`(1 + \\#\\{s: b_s = j\\}) / (n + 1 + t)` (Hill, 1968). So the law of any function of the bins is known
exactly, over the randomness of the (short) reference as well, and can be simulated.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from sb3_offline_ft.collapse.detectors.base import Detector, Episodes

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def normal_scores(n_reference: int, worst: float) -> Floats:
    """Van der Waerden's normal scores of the bins, from worse (positive, ``worst`` at most) to better (negative)."""
    levels = (np.arange(n_reference + 1) + 0.5) / (n_reference + 1)
    scores: Floats = np.minimum(-ndtri(levels), worst)
    scores[0] = worst
    return scores


def simulated_bins(
    generator: np.random.Generator, n_reference: int, n_steps: int, n_runs: int
) -> Iterator[npt.NDArray[np.uint16]]:
    """For each step the bins of all runs, shape (n_runs,); each run has a reference of its own, of the same distribution."""
    # Continuous, so uniform without loss of generality; single precision is fast and a tie has probability 1e-7
    reference = np.sort(generator.random((n_runs, n_reference), dtype=np.float32), axis=1).T.copy()
    for start in range(0, n_steps, 16):
        values = generator.random((min(16, n_steps - start), n_runs), dtype=np.float32)
        bins = np.zeros(values.shape, np.uint16)
        for bound in reference:
            bins += bound < values
        yield from bins


def monte_carlo_threshold(maxima: Floats, false_alarm_rate: float) -> float:
    """
    Threshold of a Monte Carlo test (Dwass, 1957), just above an order statistic: one more maximum, drawn as the given ones,
    reaches it with at most the given probability, whatever the number of simulations.
    """
    rank = math.ceil((len(maxima) + 1) * (1 - false_alarm_rate))
    largest = float(np.sort(maxima)[rank - 1])
    return largest + 1e-9 * max(1.0, abs(largest))


class RankDetector(Detector):
    """
    Base class of detectors that see the rank of each return among the reference. Fed with negated returns, they tell whether a
    stream has become better.

    Equal returns are ordered at random, as if each came with a random number to break ties: with that, bins follow
    Polya's urn for discrete returns as well.
    """

    def _calibrate(self, reference: Episodes) -> None:
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
