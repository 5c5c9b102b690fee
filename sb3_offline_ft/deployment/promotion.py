"""Proof that a challenger is better than the champion, from few episodes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logsumexp
from scipy.stats import norm

Floats = npt.NDArray[np.float64]

LEADS = np.array([0.5, 1.0, 2.0, 4.0])
"""How far a challenger may be ahead, in standard deviations of the champion: what is bet on."""
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

    Bets are those of a mixture of experts, each of which expects the challenger to lead by some standard deviations of the
    champion's returns, one by what it has led so far.

    :param level: Probability of promoting a challenger that is not better, in (0, 1)
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self.n_episodes = 0
        self._log_capitals: Floats = np.full(len(LEADS) + 1, -math.log(len(LEADS) + 1))

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the capital."""
        return float(logsumexp(self._log_capitals))

    @property
    def log_threshold(self) -> float:
        """What :attr:`log_evidence` has to reach."""
        return -math.log(self.level)

    @property
    def is_proved(self) -> bool:
        """Whether the challenger is better."""
        return self.log_evidence >= self.log_threshold

    def bet(
        self,
        total: float,
        is_challenger: bool,
        share: float,
        champion: Sequence[float],
        challenger: Sequence[float],
        unit: float,
    ) -> None:
        """
        Take a finished episode.

        :param total: Its return
        :param is_challenger: Whether the coin chose the challenger
        :param share: Probability with which it could, in (0, 1)
        :param champion: Returns of the champion in episodes that ended before, at least one
        :param challenger: Those of the challenger
        :param unit: A total loss, ``|J - J_random|``
        """
        spread, center = spread_of(champion, unit), float(np.mean(champion))
        score = float(np.clip((total - center) / spread, -FARTHEST, FARTHEST))
        # Shrunk, as if there had been one more episode without a lead
        lead = sum(challenger) - len(challenger) * center
        leads = np.append(LEADS, np.clip(lead / spread / (len(challenger) + 1), 0.0, FARTHEST))
        odds = leads * (score - leads / 2) + math.log(share / (1 - share))
        chances = np.clip(expit(odds), 1 - MOST_CERTAIN, MOST_CERTAIN)
        self._log_capitals = self._log_capitals + np.log(chances / share if is_challenger else (1 - chances) / (1 - share))
        self.n_episodes += 1

    def state_dict(self) -> dict[str, Any]:
        """In the form of JSON."""
        return {"level": self.level, "n_episodes": self.n_episodes, "log_capitals": self._log_capitals.tolist()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "PromotionTest":
        """The test that :meth:`state_dict` was taken of."""
        test = cls(state["level"])
        test.n_episodes = state["n_episodes"]
        test._log_capitals = np.array(state["log_capitals"])
        return test


def chance_of_lead(champion: Sequence[float], challenger: Sequence[float], unit: float, least: float) -> float:
    """
    How likely a challenger leads by as much as is worth a trial, to stop trials that are hopeless; no promise rests on it.

    Normal model with the champion's spread for both; before there are episodes, the lead is distributed around 0 with a
    standard deviation of half a total loss.

    :param champion: Returns of the champion, at least one
    :param challenger: Returns of the challenger
    :param unit: A total loss, ``|J - J_random|``
    :param least: A lead that is worth a trial, in total losses
    :return: Probability that its mean is higher by more than that
    """
    spread, prior = spread_of(champion, unit), unit / 2
    n = len(challenger)
    noise = spread**2 * (1 / n + 1 / len(champion)) if n else math.inf
    lead = float(np.mean(challenger) - np.mean(champion)) if n else 0.0
    weight = prior**2 / (noise + prior**2)
    return float(norm.sf((least * unit - weight * lead) / (prior * math.sqrt(1 - weight))))
