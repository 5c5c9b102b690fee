"""Proof that a challenger is better than the champion, from few episodes."""

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.special import expit, ndtr

from sb3_offline_ft.collapse.detectors import BettingDetector

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


class PromotionTest(ABC):
    """
    A sequential test of "the challenger is not better than the champion" by betting.

    A gambler with capital 1 bets on the challenger, at odds that are fair or worse if it is not better. The capital is then a
    nonnegative supermartingale, so that it ever reaches ``1 / level`` with at most the probability ``level`` (Ville 1939;
    testing by betting: Shafer 2021), whatever the number of episodes and the distribution of returns. "Not better" means:
    there is no height that the challenger reaches more often than the champion (stochastic order).

    Episodes may overlap. They count in the order in which they began, none before those ahead of it: otherwise a challenger
    with short episodes would be judged by these alone for a while.

    :param level: Probability of promoting a challenger that is not better, in (0, 1)
    """

    has_coin: ClassVar[bool]
    """Whether a coin has to decide for each episode who acts."""

    def __init__(self, level: float) -> None:
        self.level = level

    @property
    @abstractmethod
    def log_evidence(self) -> float:
        """Natural logarithm of the capital."""

    @property
    def log_threshold(self) -> float:
        """What :attr:`log_evidence` has to reach."""
        return -math.log(self.level)

    @property
    def is_proved(self) -> bool:
        """Whether the challenger is better."""
        return self.log_evidence >= self.log_threshold

    @abstractmethod
    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> "Bet | RankBet":
        """
        Bet on an episode that is about to begin.

        :param share: Probability with which a coin chooses the challenger, in (0, 1)
        :param champion: Returns of the champion so far, at least one
        :param challenger: Those of the challenger
        :param unit: A total loss, ``|J - J_random|``
        :return: The bet, to be settled when the episode ends
        """

    @property
    @abstractmethod
    def open_bets(self) -> "list[Bet] | list[RankBet]":
        """The bets that :meth:`state_dict` has, in its order."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The test's state as plain values and arrays, with its bets."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""


class ConcurrentTest(PromotionTest):
    """
    The champion acts while the challenger is tested (*concurrent controls*): a coin decides for each episode who of the two
    acts, and bets are on who did, more on the challenger the higher the return (testing of independence: Podkopaev & Ramdas
    2023). Nothing but the coin has to be random: it holds while returns drift with time.
    """

    has_coin = True

    def __init__(self, level: float) -> None:
        super().__init__(level)
        self._bets: list[Bet] = []

    @property
    def log_evidence(self) -> float:
        gains = (bet.log_gain for bet in self._bets)
        return sum(itertools.takewhile(lambda gain: gain is not None, gains))  # type: ignore[arg-type]

    @property
    def open_bets(self) -> list[Bet]:
        return self._bets

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "bets": [vars(bet).copy() for bet in self._bets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bets = [Bet(**bet) for bet in state["bets"]]

    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> Bet:
        spread, center = spread_of(champion, unit), sum(champion) / len(champion)
        # Shrunk, as if there had been one more episode without a lead
        lead = (sum(challenger) - len(challenger) * center) / spread / (len(challenger) + 1)
        bet = Bet(share, center, spread, max(LEAST_LEAD, min(FARTHEST, lead)))
        self._bets.append(bet)
        return bet


@dataclass
class RankBet:
    """A bet on the rank of the return of an episode, which is fixed before it begins."""

    total: float | None = None

    def settle(self, total: float, is_challenger: bool) -> None:
        """The episode has ended, in which the challenger acted."""
        self.total = total


class HistoricalTest(PromotionTest):
    """
    The challenger is compared with what the champion returned before (*historical controls*): bets are on high ranks of its
    returns among the champion's, as those of the :class:`~sb3_offline_ft.collapse.BettingDetector` are on low ones. All
    episodes are the challenger's, so it needs about half of those that a :class:`ConcurrentTest` needs; but it takes for
    granted that the champion would return now what it returned before: the returns of both have to be exchangeable if the
    challenger is as good as the champion.

    :param champion: Returns of the champion, at least five
    :param unit: A total loss, ``|J - J_random|``, above 0
    :param seed: Seed of the order of equal returns
    """

    has_coin = False

    def __init__(self, level: float, champion: Sequence[float], unit: float, seed: int = 0) -> None:
        super().__init__(level)
        self.seed = seed
        self._bets: deque[RankBet] = deque()
        # Equal returns of a few episodes do not mean that there is no noise, and ranks need a scale
        spread = SMALLEST_SPREAD * unit if len({*champion}) == 1 else 0.0
        self._detector = BettingDetector(level, horizon=1, seed=seed)
        self._detector.calibrate(-np.asarray(champion) - np.linspace(0.0, spread, len(champion)))

    @property
    def log_evidence(self) -> float:
        while self._bets and (total := self._bets[0].total) is not None:
            self._bets.popleft()
            self._detector.update(-total)
        return self._detector.statistic

    @property
    def open_bets(self) -> list[RankBet]:
        return list(self._bets)

    def state_dict(self) -> dict[str, Any]:
        bets = [bet.total for bet in self._bets]
        return {"level": self.level, "bets": bets, "detector": self._detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bets = deque(map(RankBet, state["bets"]))
        self._detector.load_state_dict(state["detector"])

    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> RankBet:
        self._bets.append(bet := RankBet())
        return bet


def chance_of_lead(champion: Sequence[float], challenger: Sequence[float], unit: float, least: float) -> float:
    """
    How likely a challenger leads by as much as is worth a trial, to stop trials that are hopeless; no promise rests on it.

    Normal model with the larger spread of both; before there are episodes, the lead is distributed around 0 with a
    standard deviation of half a total loss.

    :param champion: Returns of the champion, at least one
    :param challenger: Returns of the challenger
    :param unit: A total loss, ``|J - J_random|``
    :param least: A lead that is worth a trial, in total losses
    :return: Probability that its mean is higher by more than that
    """
    n, prior = len(challenger), unit / 2
    spread = max(spread_of(champion, unit), spread_of(challenger, unit))
    noise = spread**2 * (1 / n + 1 / len(champion)) if n else math.inf
    lead = sum(challenger) / n - sum(champion) / len(champion) if n else 0.0
    weight = prior**2 / (noise + prior**2)
    return float(ndtr((weight * lead - least * unit) / (prior * math.sqrt(1 - weight))))
