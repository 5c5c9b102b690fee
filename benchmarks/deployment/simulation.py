"""Simulated runs of a contest: policies are distributions of returns, and a book beside the account counts what was lost."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sb3_offline_ft.deployment.contest import Contest
from sb3_offline_ft.deployment.roles import Contender, Episode, Kind, Verdict
from sb3_offline_ft.deployment.rules import Rules

Generator = np.random.Generator


@dataclass(frozen=True)
class Policy:
    """
    :param mean: Mean return
    :param draw: Gives the return of an episode
    :param length: Duration of an episode
    """

    mean: float
    draw: Callable[[Generator], float]
    length: Callable[[Generator], float] = lambda rng: 1.0


@dataclass(frozen=True)
class Ended:
    """An episode that has ended."""

    place: int
    kind: Kind
    total: float
    verdict: Verdict | None


def play(
    contest: Contest,
    n_episodes: int,
    rng: Generator,
    offer: Callable[[], Contender | None],
    total: Callable[[Episode, int], float],
    length: Callable[[Episode], float] = lambda episode: 1.0,
    explores: bool = False,
    began: Callable[[int, Kind], None] = lambda place, kind: None,
) -> Iterator[Ended]:
    """
    Run a contest, with episodes that overlap if there are several places.

    :param contest: The contest
    :param n_episodes: Episodes that end
    :param rng: Decides between episodes that end at the same time
    :param offer: Gives a challenger
    :param total: Return of an episode that ends as the i-th
    :param length: Duration of one that begins
    :param explores: Whether exploring differs from serving
    :param began: Is told of each episode that begins
    """
    running: list[tuple[float, float, int]] = []

    def begin(place: int, now: float) -> None:
        episode = contest.begin(place, offer, explores)
        began(place, episode.kind)
        heapq.heappush(running, (now + length(episode), rng.random(), place))

    for place in range(len(contest.running)):
        begin(place, 0.0)
    for i in range(n_episodes):
        now, _, place = heapq.heappop(running)
        episode = contest.running[place]
        kind, value = episode.kind, total(episode, i)
        yield Ended(place, kind, value, contest.end(place, value))
        begin(place, now)


@dataclass
class Book:
    """
    What episodes at risk have lost in a contest, counted from the episodes alone.

    :param contest: The contest, of which only the champion's returns are read, and whether there is an account
    """

    contest: Contest
    n_episodes: int = 0
    lost: float = 0.0
    """In returns, against the baseline."""
    lost_to_champion: float = 0.0
    """In total losses, against the champion's mean when each of them began, since the moment for which this is largest."""
    magnitude: float = 1.0
    """Of the largest number that was added, for rounding."""
    baseline: float | None = None
    n_at_risk: int = 0
    largest_share: float = 0.0
    """Of its allowance that was ever used."""
    _at_risk: dict[int, float] = field(default_factory=dict)

    def begin(self, place: int, kind: Kind) -> None:
        if self.contest.budget is None:
            return
        champion = float(np.mean(self.contest.champion.returns))
        # When the account was opened, nobody else had been champion
        self.baseline = champion if self.baseline is None else self.baseline
        if kind is not Kind.SERVE:
            self._at_risk[place] = champion

    def end(self, place: int, total: float) -> None:
        self.n_episodes += 1
        if place not in self._at_risk:
            return
        champion, random = self._at_risk.pop(place), self.contest.rules.random_return
        assert self.baseline is not None
        self.n_at_risk += 1
        self.lost += self.baseline - total
        in_total_losses = (champion - total) / self.distance(champion, random)
        # The largest sum since any moment: a gain repays what was lost before, and nothing that is lost later
        self.lost_to_champion = max(0.0, self.lost_to_champion + in_total_losses)
        self.magnitude = max(self.magnitude, abs(self.baseline), abs(total), abs(in_total_losses))

    def cut_off(self, worst_return: float) -> None:
        """The run is interrupted: episodes at risk count as if they had ended at their worst."""
        for place in list(self._at_risk):
            self.end(place, worst_return)

    @property
    def unit(self) -> float:
        """A total loss of the baseline."""
        return 0.0 if self.baseline is None else self.distance(self.baseline, self.contest.rules.random_return)

    @staticmethod
    def distance(expected: float, random: float) -> float:
        """Of two returns, at least a billionth of them."""
        return float(max(abs(expected - random), 1e-9 * abs(expected), 1e-9 * abs(random), 1e-18))

    @property
    def is_kept(self) -> bool:
        """Whether the promise is kept now, both ways, up to rounding."""
        share, rounding = self.contest.rules.risk_budget, 1e-9 * self.magnitude
        allowance = share * self.n_episodes
        if allowance > 0 and self.unit > 0:
            used = max(self.lost / self.unit, self.lost_to_champion) / allowance
            self.largest_share = max(self.largest_share, used)
        against_baseline = self.lost <= allowance * self.unit + rounding * max(1.0, self.unit)
        return against_baseline and self.lost_to_champion <= allowance + rounding


# Distributions of returns around 1, while a random policy returns 0


def normal(mean: float) -> Policy:
    return Policy(mean, lambda rng: rng.normal(mean, 0.2))


def heavy_tailed(mean: float) -> Policy:
    return Policy(mean, lambda rng: mean + 0.1 * rng.standard_t(2.1))


def bimodal(mean: float) -> Policy:
    """Every fifth episode is a fall."""
    return Policy(mean, lambda rng: mean + (-0.8 if rng.random() < 0.2 else 0.2) + rng.normal(0, 0.05))


def binary(mean: float) -> Policy:
    """Success or failure; successes return 2."""
    return Policy(mean, lambda rng: 2.0 * (rng.random() < mean / 2))


def crossing(mean: float) -> Policy:
    """Higher by 0.3 in most episodes, and rare falls that cost as much on average."""
    return Policy(mean, lambda rng: mean + (-2.7 if rng.random() < 0.1 else 0.3) + rng.normal(0, 0.2))


def short(mean: float) -> Policy:
    """As normal, in a tenth of the time."""
    return Policy(mean, lambda rng: rng.normal(mean, 0.2), lambda rng: 0.1 * rng.random())


def long(mean: float) -> Policy:
    return Policy(mean, lambda rng: rng.normal(mean, 0.2), lambda rng: 2 * rng.random())


def still(rng: Generator, n: int) -> np.ndarray:
    return np.zeros(n)


def rise(speed: float) -> Callable[[Generator, int], np.ndarray]:
    """Everybody's returns rise in a run by so many standard deviations of the normal distribution above."""
    return lambda rng, n: np.linspace(0, 0.2 * speed, n)


@dataclass(frozen=True)
class World:
    """
    :param champion: Distribution of the first champion
    :param challenger: Distribution of challengers
    :param drift: What is added to everybody's returns in the course of a run
    :param n_places: Episodes that run at the same time
    """

    champion: Callable[[float], Policy]
    challenger: Callable[[float], Policy]
    drift: Callable[[Generator, int], np.ndarray] = still
    n_places: int = 1


HEAVY = "heavy-tailed (Student's t, 2.1 degrees of freedom)"
PLACES = "4 places, short challengers, rise of 2 in a run"
WORLDS = {
    "normal": World(normal, normal),
    HEAVY: World(heavy_tailed, heavy_tailed),
    "bimodal (falls)": World(bimodal, bimodal),
    "binary": World(binary, binary),
    "4 places, short challengers": World(long, short, n_places=4),
    "crossing (outside the promise)": World(normal, crossing),
    **{f"rise of {speed:g} in a run": World(normal, normal, rise(speed)) for speed in (0.5, 1, 2, 4)},
    PLACES: World(long, short, rise(2), 4),
}
STREAMS = {"equal": (0.0,), "mixed": (-0.5, -0.2, -0.05, 0.0, 0.2)}
"""By how much the challengers of a run are better than the champion of the time."""


def is_promised(name: str, controls: str) -> bool:
    """Whether the rate of false promotions is promised in this world."""
    return "outside" not in name and (controls == "concurrent" or WORLDS[name].drift is still)


def simulated_promotions(
    world: World, leads: tuple[float, ...], rules: Rules, n_episodes: int, seed: int
) -> tuple[list[Verdict], Contest]:
    """The decisions of a run, and the contest at its end."""
    rng = np.random.default_rng(seed)
    drift = world.drift(rng, n_episodes)
    contest = Contest(rules, Contender(0, world.champion(1.0)), world.n_places, seed)

    def actor(episode: Episode) -> Policy:
        policy: Policy = contest.contenders[episode.role].policy
        return policy

    def offer() -> Contender:
        lead = leads[rng.integers(len(leads))]
        return Contender(0, world.challenger(max(0.0, contest.champion.policy.mean + lead)))

    episodes = play(
        contest,
        n_episodes,
        rng,
        offer,
        lambda episode, i: actor(episode).draw(rng) + drift[i],
        lambda episode: actor(episode).length(rng),
    )
    return [episode.verdict for episode in episodes if episode.verdict is not None], contest
