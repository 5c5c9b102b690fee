"""Proof that a challenger is better than the champion, from few episodes."""

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtr

LEAST_LEAD = 1.0
"""Standard deviations of the champion: to prove a smaller lead takes longer than trials last, so none is bet on."""
MOST_CERTAIN = 0.95
"""No bet is surer than this: it could not be recovered from when it is lost."""
FARTHEST = 5.0
"""Standard deviations at which a return is cut off, so that a single one decides nothing."""
TAKEN_A_LOOK, MOST_SHUFFLES = 20, 50_000
"""Simulated, for thresholds: so many shuffles that each look takes a few, but of very small levels."""
DECIMALS = 9
"""Of a statistic, whose order is around 1: what is less is rounding, and equal values have to be equal."""
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
    A sequential test of "the challenger is not better than the champion": there is no height that it reaches more often
    (stochastic order). It may be looked at after each episode.

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
    def evidence(self) -> float:
        """What speaks for the challenger, in a unit of the test's own."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """What :attr:`evidence` has to reach now."""

    @property
    @abstractmethod
    def is_proved(self) -> bool:
        """Whether the challenger is better."""

    @abstractmethod
    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> "Bet | TrialEpisode":
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
    def open_bets(self) -> "list[Bet] | list[TrialEpisode]":
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

    A gambler with capital 1 bets at odds that are fair or worse if the challenger is not better. The capital is then a
    nonnegative supermartingale, so that it ever reaches ``1 / level`` with at most the probability ``level`` (Ville 1939;
    testing by betting: Shafer 2021), whatever the number of episodes and the distribution of returns.
    """

    has_coin = True

    def __init__(self, level: float) -> None:
        super().__init__(level)
        self._bets: list[Bet] = []

    @property
    def evidence(self) -> float:
        """Natural logarithm of the capital."""
        gains = (bet.log_gain for bet in self._bets)
        return sum(itertools.takewhile(lambda gain: gain is not None, gains))  # type: ignore[arg-type]

    @property
    def threshold(self) -> float:
        return -math.log(self.level)

    @property
    def is_proved(self) -> bool:
        return self.evidence >= self.threshold

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
class TrialEpisode:
    """An episode of the challenger that counts."""

    total: float | None = None

    def settle(self, total: float, is_challenger: bool) -> None:
        """The episode has ended, in which the challenger acted."""
        self.total = total


class HistoricalTest(PromotionTest):
    """
    The challenger is compared with what the champion returned before (*historical controls*) by a group-sequential rank test
    with a look after each of its episodes. All episodes are the challenger's, so it needs about half of those that a
    :class:`ConcurrentTest` needs; but it takes for granted that the champion would return now what it returned before: the
    returns of both have to be exchangeable if the challenger is as good as the champion. Then its ranks are those of shuffled
    returns, whatever their distribution.

    Ranks among all returns of both count by their Savage scores (Savage 1956), the expected order statistics of an exponential
    distribution, by which either the high ones count most or the low ones: of both sums, the larger. A challenger is often
    much better in some of its episodes and as good in the others: it finds what the champion does not, or does not fall where
    the champion does.

    :param level: Probability of promoting a challenger that is not better, in (0, 1); up to the k-th of n episodes the share
        ``sqrt(k / n)`` of it is spent, so that a long test proves large leads about as soon as a short one
    :param champion: Returns of the champion, at least five
    :param unit: A total loss, ``|J - J_random|``, above 0
    :param max_episodes: Episodes of the challenger that count, at most
    :param seed: Seed of the order of equal returns
    """

    has_coin = False

    def __init__(self, level: float, champion: Sequence[float], unit: float, max_episodes: int, seed: int = 0) -> None:
        super().__init__(level)
        # Equal returns of a few episodes do not mean that there is no noise, and ranks need a scale
        spread = SMALLEST_SPREAD * unit if len({*champion}) == 1 else 0.0
        self._returns = [float(total) for total in np.asarray(champion) + np.linspace(0.0, spread, len(champion))]
        """Of the champion, then of the challenger."""
        self._order = np.random.default_rng(seed)
        self._ties = list(self._order.random(len(champion)))
        self._n_champion = len(champion)
        self._episodes: deque[TrialEpisode] = deque()
        self._thresholds = _thresholds(level, len(champion), max_episodes)
        self._evidence, self._was_proved = 0.0, False

    @property
    def evidence(self) -> float:
        """The larger sum of the challenger's scores, in standard deviations from what shuffled returns give."""
        self._count()
        return self._evidence

    @property
    def threshold(self) -> float:
        self._count()
        return float(self._thresholds[max(0, len(self._returns) - self._n_champion - 1)])

    @property
    def is_proved(self) -> bool:
        self._count()
        return self._was_proved

    @property
    def open_bets(self) -> list[TrialEpisode]:
        return list(self._episodes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "max_episodes": len(self._thresholds),
            "n_champion": self._n_champion,
            "returns": list(self._returns),
            "ties": list(self._ties),
            "order": self._order.bit_generator.state,
            "bets": [episode.total for episode in self._episodes],
            "evidence": self._evidence,
            "was_proved": self._was_proved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._thresholds = _thresholds(self.level, state["n_champion"], state["max_episodes"])
        self._n_champion, self._returns, self._ties = state["n_champion"], list(state["returns"]), list(state["ties"])
        self._order.bit_generator.state = state["order"]
        self._episodes = deque(map(TrialEpisode, state["bets"]))
        self._evidence, self._was_proved = state["evidence"], state["was_proved"]

    def bet(self, share: float, champion: Sequence[float], challenger: Sequence[float], unit: float) -> TrialEpisode:
        self._episodes.append(episode := TrialEpisode())
        return episode

    def _count(self) -> None:
        """Count the episodes that have ended, none before those that began before it."""
        while self._episodes and (total := self._episodes[0].total) is not None:
            self._episodes.popleft()
            if len(self._returns) - self._n_champion < len(self._thresholds):
                self._returns.append(total)
                self._ties.append(self._order.random())
                self._look()

    def _look(self) -> None:
        n = len(self._returns)
        ranks = np.argsort(np.lexsort((self._ties, self._returns)))
        self._evidence = float(_statistic(ranks[self._n_champion :], n))
        self._was_proved |= self._evidence >= self._thresholds[n - self._n_champion - 1]


@lru_cache(maxsize=1024)
def _savage_scores(n: int) -> npt.NDArray[np.float64]:
    """Of the ranks of as many returns from the lowest, less their mean, in standard deviations."""
    scores = np.cumsum(1 / np.arange(n, 0, -1)) - 1
    return np.asarray(scores / np.std(scores, ddof=1), dtype=np.float64)


def _statistic(ranks: npt.NDArray[np.integer], n: int) -> npt.NDArray[np.float64]:
    """The larger sum of scores, by a challenger's ranks among n, in standard deviations from what shuffled returns give."""
    n_trials, high = len(ranks), _savage_scores(n)
    low = -high[::-1]
    total = np.maximum(high[ranks].sum(axis=0), low[ranks].sum(axis=0)) / math.sqrt(n_trials * (n - n_trials) / n)
    return np.asarray(np.round(total, DECIMALS), dtype=np.float64)


@lru_cache(maxsize=4096)
def _thresholds(level: float, n_champion: int, max_episodes: int) -> npt.NDArray[np.float64]:
    """
    What the statistic has to reach after each episode: of the simulated shuffles that no earlier look has taken, each look
    takes those with the highest statistics, so that as many as may be wrong are taken up to it. So looks that depend on each
    other cost nothing.

    :return: Shape ``(max_episodes,)``, infinite where nothing can be proved yet
    """
    n_shuffles = min(MOST_SHUFFLES, math.ceil(TAKEN_A_LOOK * max_episodes / level))
    rng, is_left, thresholds = np.random.default_rng(0), np.ones(n_shuffles, dtype=bool), []
    ranks = np.zeros((max_episodes, n_shuffles), dtype=np.int32)
    for k in range(1, max_episodes + 1):
        n = n_champion + k
        # The rank of the last of shuffled returns among all is uniform, whatever the ranks before
        ranks[k - 1] = rng.integers(n, size=n_shuffles)
        ranks[: k - 1] += ranks[: k - 1] >= ranks[k - 1]
        statistics = _statistic(ranks[:k], n)
        left = np.sort(statistics[is_left])
        n_allowed = int(level * math.sqrt(k / max_episodes) * n_shuffles + 1e-9) - (n_shuffles - len(left))
        # With equal values at the border, none of them is taken
        taken = left[left > left[-1 - n_allowed]]
        thresholds.append(taken[0] if len(taken) else math.inf)
        is_left &= statistics < thresholds[-1]
    return np.array(thresholds)


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
