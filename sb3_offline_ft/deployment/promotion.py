"""Proof that a challenger is better than the champion, from few episodes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtr

LEAST_LEAD = 1.0
"""Standard deviations of the champion: to prove a smaller lead takes longer than trials last, so none is bet on."""
MOST_CERTAIN = 0.95
"""No bet is surer than this: it could not be recovered from when it is lost."""
FARTHEST = 5.0
"""Standard deviations at which a return is cut off, so that a single one decides nothing."""
SMALLEST_SPREAD = 0.01
"""Of a champion's returns, in total losses: equal returns of a few episodes do not mean that there is no noise."""


def spread_of(returns: Sequence[float], unit: float) -> float:
    """
    Standard deviation of a champion's returns.

    :param returns: The returns
    :param unit: A total loss, ``|J - J_random|``
    """
    spread = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
    return max(spread, SMALLEST_SPREAD * unit, math.ulp(1.0))


@dataclass
class Bet:
    """
    A bet on who acts in an episode, which is fixed before it begins.

    :param share: Probability with which the coin chooses the challenger, in (0, 1)
    :param center: Mean return of the champion so far
    :param spread: Standard deviation of its returns
    :param lead: By how many of these the challenger is thought to be ahead
    """

    share: float
    center: float
    spread: float
    lead: float
    log_gain: float | None = None
    """Natural logarithm of what the bet multiplied the capital by; None while the episode runs."""

    def settle(self, total: float, is_challenger: bool) -> None:
        """
        The episode has ended.

        :param total: Its return
        :param is_challenger: Whether the challenger acted
        """
        score = max(-FARTHEST, min(FARTHEST, (total - self.center) / self.spread))
        # Two normal distributions of the same spread
        odds = self.lead * (score - self.lead / 2) + math.log(self.share / (1 - self.share))
        chance = max(1 - MOST_CERTAIN, min(MOST_CERTAIN, float(expit(odds))))
        self.log_gain = math.log(chance / self.share if is_challenger else (1 - chance) / (1 - self.share))


class PromotionTest:
    """
    A sequential test of "the challenger is not better than the champion" by betting on a coin.

    While the test lasts, a coin decides for each episode who of the two acts. If the challenger's returns are not better, a
    return does not tell who acted, or points to the champion when it is high. A gambler with capital 1, who sees the return
    and bets on who acted, more on the challenger the higher the return, then has a capital that is a nonnegative
    supermartingale; it ever reaches ``1 / level`` with at most the probability ``level`` (Ville 1939; testing by betting:
    Shafer 2021; of independence: Podkopaev & Ramdas 2023). That is true for every number of episodes, for returns of any
    distribution, and, since nothing but the coin has to be random, while returns drift with time. "Not better" means: there
    is no height that the challenger reaches more often than the champion (stochastic order).

    Episodes may overlap. A bet uses only what was known before its coin was thrown, and they count in the order of the coins,
    none before those ahead of it: otherwise a challenger with short episodes would be judged by these alone for a while.

    :param level: Probability of promoting a challenger that is not better, in (0, 1)
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self._bets: list[Bet] = []

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the capital."""
        gains = (bet.log_gain for bet in self._bets)
        return sum(itertools.takewhile(lambda gain: gain is not None, gains))  # type: ignore[arg-type]

    @property
    def log_threshold(self) -> float:
        """What :attr:`log_evidence` has to reach."""
        return -math.log(self.level)

    @property
    def is_proved(self) -> bool:
        """Whether the challenger is better."""
        return self.log_evidence >= self.log_threshold

    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> Bet:
        """
        Bet on an episode that is about to begin.

        :param share: Probability with which the coin chooses the challenger, in (0, 1)
        :param champion: Returns of the champion so far, at least one
        :param challenger: Those of the challenger
        :param unit: A total loss, ``|J - J_random|``
        """
        spread, center = spread_of(champion, unit), sum(champion) / len(champion)
        # Shrunk, as if there had been one more episode without a lead
        lead = (sum(challenger) - len(challenger) * center) / spread / (len(challenger) + 1)
        bet = Bet(share, center, spread, max(LEAST_LEAD, min(FARTHEST, lead)))
        self._bets.append(bet)
        return bet


def chance_of_being_better(champion: Sequence[float], challenger: Sequence[float], unit: float) -> float:
    """
    How likely a challenger is better, to stop trials that are hopeless; no promise rests on it.

    Normal model with the champion's spread for both; before there are episodes, the lead is distributed around 0 with a
    standard deviation of half a total loss.

    :param champion: Returns of the champion, at least one
    :param challenger: Returns of the challenger
    :param unit: A total loss, ``|J - J_random|``
    :return: Probability that its mean is higher
    """
    if not challenger:
        return 0.5
    spread, prior = spread_of(champion, unit), unit / 2
    noise = spread**2 * (1 / len(challenger) + 1 / len(champion))
    lead = sum(challenger) / len(challenger) - sum(champion) / len(champion)
    # Posterior of a normal mean: its mean over its standard deviation
    return float(ndtr(lead * prior / math.sqrt(noise * (noise + prior**2))))
