"""What may be lost while something new is tried."""

import copy
from dataclasses import dataclass, field
from typing import Any

SMALLEST_UNIT = 1e-9
"""Of a total loss, relative to the returns: what is less is rounding."""


@dataclass(frozen=True)
class Level:
    """
    What an episode is expected to return, and the unit in which losses against it are counted.

    :param expected: Expected return
    :param random: Mean return of a random policy; falling to it from ``expected`` is a loss of 1, a *total loss*
    """

    expected: float
    random: float

    @property
    def unit(self) -> float:
        """A total loss, in returns; never 0."""
        smallest = SMALLEST_UNIT * max(abs(self.expected), abs(self.random), SMALLEST_UNIT)
        return max(abs(self.expected - self.random), smallest)

    def loss(self, total: float) -> float:
        """The loss of an episode with this return; negative for a gain."""
        return (self.expected - total) / self.unit


@dataclass
class RiskBudget:
    """
    An account from which episodes that try something new are paid, in total losses (see :class:`Level`).

    Each finished episode, of any kind, puts aside ``share``. An episode at risk may begin only if what is there covers its
    worst case, besides that of those at risk that are running; it is charged what it returned less than expected when it ends,
    and a gain is credited. So at any time, whatever acts,

        sum of losses of the episodes at risk <= share * number of finished episodes,

    as long as no episode returns less than ``worst_return``; if one does, there is a debt, and nothing new begins until it is
    repaid. This is conservative exploration (Wu et al. 2016, Conservative Bandits; Garcelon et al. 2020, Conservative
    Exploration in Reinforcement Learning) for a learner of which nothing is known. It is kept twice: against the baseline,
    and against the level of whoever is champion when the episode begins, which may be higher.

    :param share: Share of a total loss that an episode may cost on average, in [0, 1]
    :param baseline: Level of the policy that acted at first
    :param worst_return: What an episode returns at the least
    """

    share: float
    baseline: Level
    worst_return: float
    n_episodes: int = 0
    """Finished episodes of any kind."""
    lost: float = 0.0
    """Sum of the losses of the episodes at risk against the baseline."""
    lost_to_champion: float = 0.0
    """The same against the champion of the time."""
    _running: dict[int, Level] = field(default_factory=dict)

    @property
    def allowance(self) -> float:
        """What all finished episodes have put aside."""
        return self.share * self.n_episodes

    @property
    def balance(self) -> float:
        """What is left of the allowance, not counting what running episodes may cost."""
        return self.allowance - max(self.lost, self.lost_to_champion)

    @property
    def reserved(self) -> float:
        """What the running episodes at risk cost at worst."""
        return sum(map(self.worst_loss, self._running.values()))

    def worst_loss(self, champion: Level) -> float:
        """The largest loss of an episode that begins while the champion has this level."""
        return max(0.0, self.baseline.loss(self.worst_return), champion.loss(self.worst_return))

    def covers(self, champion: Level, expected_loss: float = 0.0) -> bool:
        """
        Whether an episode at risk may begin.

        :param champion: Level of the present champion
        :param expected_loss: What shall be kept besides the worst case
        """
        needed = self.worst_loss(champion) + max(0.0, expected_loss)
        return self.share > 0 and self.balance - self.reserved >= needed - 1e-12

    def begin(self, place: int, champion: Level) -> None:
        """An episode at risk begins in this environment."""
        self._running[place] = champion

    def end(self, place: int, total: float) -> float:
        """
        An episode ends.

        :param place: Index of its environment
        :param total: Its return
        :return: What it was charged against the champion's level, negative for a gain; 0 if it was not at risk
        """
        self.n_episodes += 1
        champion = self._running.pop(place, None)
        if champion is None:
            return 0.0
        loss = champion.loss(total)
        self.lost += self.baseline.loss(total)
        # A gain repays, but is not saved up: what a good challenger earned shall not pay for bad ones
        self.lost_to_champion = max(0.0, self.lost_to_champion + loss)
        return loss

    def abandon(self, place: int) -> None:
        """What runs here will not be finished; if it is at risk, it counts as if it had ended at its worst."""
        if place in self._running:
            self.end(place, self.worst_return)

    def state_dict(self) -> dict[str, Any]:
        """The account in the form of JSON, as if the episodes at risk that are running ended at their worst."""
        account = copy.deepcopy(self)
        for place in self._running:
            account.abandon(place)
        state = {name: getattr(account, name) for name in ("share", "worst_return", "n_episodes", "lost", "lost_to_champion")}
        return state | {"baseline": vars(self.baseline)}

    def run_state(self) -> dict[str, Any]:
        """The account as it is, with the episodes at risk that are running, in the form of JSON."""
        own = {name: getattr(self, name) for name in ("share", "worst_return", "n_episodes", "lost", "lost_to_champion")}
        running = [[place, vars(level)] for place, level in self._running.items()]
        return own | {"baseline": vars(self.baseline), "running": running}

    @classmethod
    def from_run_state(cls, state: dict[str, Any]) -> "RiskBudget":
        """The account that :meth:`run_state` was taken of."""
        account = cls.from_state_dict({name: value for name, value in state.items() if name != "running"})
        account._running = {place: Level(**level) for place, level in state["running"]}
        return account

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "RiskBudget":
        """The account that :meth:`state_dict` was taken of."""
        return cls(**state | {"baseline": Level(**state["baseline"])})
