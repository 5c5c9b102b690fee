"""Betting on low ranks."""

import math
from typing import Any, ClassVar

import numpy as np

from sb3_offline_ft.collapse.detectors.base import Episodes
from sb3_offline_ft.collapse.detectors.ranks import Floats, RankDetector


class BettingDetector(RankDetector):
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
    _state_names = ("reference", "ties", "counts", "log_capitals")
    shares: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.1, 0.1, 0.25, 0.25, 0.5, 0.5)
    """For each bet, the share of the bins that it is on; 0: only the lowest."""
    stakes: ClassVar[tuple[float, ...]] = (0.5, 0.95, 0.4, 0.8, 0.4, 0.8, 0.4, 0.8)
    """For each bet, the share of the capital at stake."""

    def _calibrate(self, reference: Episodes) -> None:
        super()._calibrate(reference)
        self._threshold = -math.log(self.false_alarm_rate)

    def reset(self) -> None:
        super().reset()
        self._log_capitals: Floats = np.full(len(self.shares), -np.inf)

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
