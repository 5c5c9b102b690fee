"""What is tried never costs more than the risk budget, whatever a learner does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sb3_offline_ft.deployment import Contender, Contest, Kind, Level, RiskBudget, Rules
from tests.simulated_contests import simulation

ROUNDING = 1e-9
shares = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 1.0])
quantiles = st.floats(0, 1) | st.sampled_from([0.0, 1.0])


class AnyLearner(RuleBasedStateMachine):
    """Episodes at risk begin whenever the account allows it, at any level of the champion, and end in any order."""

    @initialize(
        share=shares,
        expected=st.floats(-1e3, 1e3),
        distance=st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1e-12, 1.0]),
        lower=st.floats(0, 1e3) | st.just(0.0),
        scale=st.sampled_from([1e-6, 1.0, 1e9]),
    )
    def open(self, share: float, expected: float, distance: float, lower: float, scale: float) -> None:
        self.scale = scale
        self.baseline = Level(scale * expected, scale * (expected - distance))
        self.worst = min(self.baseline.expected, self.baseline.random) - scale * lower
        self.budget = RiskBudget(share, self.baseline, self.worst)
        self.running: dict[int, float | None] = {}
        self.n_finished, self.ended = 0, [(self.baseline.expected, self.baseline.expected)]

    @rule(place=st.integers(0, 3), gain=st.floats(-1, 3), wants_risk=st.booleans())
    def begin(self, place: int, gain: float, wants_risk: bool) -> None:
        if place in self.running:
            return
        champion = self.baseline.expected + gain * abs(self.baseline.expected - self.baseline.random)
        level, at_risk = Level(champion, self.baseline.random), False
        if wants_risk and self.budget.covers(level):
            self.budget.begin(place, level)
            at_risk = True
        self.running[place] = champion if at_risk else None

    @precondition(lambda self: self.running)
    @rule(data=st.data(), quantile=quantiles)
    def end(self, data: Any, quantile: float) -> None:
        place = data.draw(st.sampled_from(sorted(self.running)))
        self.finish(place, self.worst + quantile * 2e3 * self.scale)

    def finish(self, place: int, total: float) -> None:
        champion = self.running.pop(place)
        self.budget.end(place, total)
        self.n_finished += 1
        if champion is not None:
            self.ended.append((champion, total))

    @rule()
    def save_and_load(self) -> None:
        self.budget = RiskBudget.from_state_dict(self.budget.state_dict())
        for champion in filter(lambda level: level is not None, self.running.values()):
            self.n_finished += 1
            self.ended.append((champion, self.worst))
        self.running.clear()

    @invariant()
    def is_kept(self) -> None:
        if not hasattr(self, "budget"):
            return
        totals = np.array([total for _, total in self.ended])
        losses = self.baseline.expected - totals
        allowance = self.budget.share * self.n_finished
        distance = simulation.Book.distance
        unit = distance(self.baseline.expected, self.baseline.random)
        assert losses.sum() <= allowance * unit + ROUNDING * np.abs(totals).max()
        relative = np.array([(level - total) / distance(level, self.baseline.random) for level, total in self.ended])
        assert relative.sum() <= allowance + ROUNDING * max(1.0, np.abs(relative).max())


TestAnyLearner = AnyLearner.TestCase
TestAnyLearner.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def follow(
    contest: Contest, totals: Callable[[Kind, int], float], n_episodes: int = 80, seed: int = 0, **options: Any
) -> tuple[Any, list[Any]]:
    """A run with the book beside its account, which is looked at after each episode."""
    rng, book, ended = np.random.default_rng(seed), simulation.Book(contest), []
    lengths = rng.exponential(size=2)
    episodes = simulation.play(
        contest,
        n_episodes,
        rng,
        lambda: Contender(1),
        totals,
        lambda kind: lengths[int(kind is Kind.TRIAL)] * rng.exponential(),
        began=book.begin,
        **options,
    )
    for episode in episodes:
        book.end(episode.place, episode.total)
        assert book.is_kept
        ended.append(episode)
    return book, ended


@settings(max_examples=60, deadline=None)
@given(
    rules=st.builds(
        Rules,
        risk_budget=st.floats(0, 1, exclude_max=True),
        random_return=st.floats(-3, 3) | st.just(1.0),
        worst_return=st.just(-3.0),
        false_promotion_rate=st.floats(0.01, 0.99),
        canary_envs=st.none() | st.integers(1, 3),
    ),
    returns=st.fixed_dictionaries({kind: st.lists(quantiles, min_size=1, max_size=20) for kind in Kind}),
    n_places=st.integers(1, 5),
    explores=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_adversarial_learners(
    rules: Rules, returns: dict[Kind, list[float]], n_places: int, explores: bool, seed: int
) -> None:
    contest = Contest(rules, Contender(0), n_places, seed)
    follow(contest, lambda kind, i: -3 + 6 * returns[kind][i % len(returns[kind])], seed=seed, explores=explores)


@pytest.mark.parametrize("n_places", [1, 4])
def test_a_challenger_that_falls_once_it_is_trusted(n_places: int) -> None:
    """Promotions raise the level that losses are counted against, and end episodes at risk of others."""
    contest, promoted = Contest(Rules(risk_budget=0.5), Contender(0), n_places), []
    rng = np.random.default_rng(0)

    def totals(kind: Kind, i: int) -> float:
        falls = len(promoted) % 2
        return float(rng.normal(1 + len(promoted), 0.1)) if kind is Kind.SERVE else 0.0 if falls else 3.0 + 2 * len(promoted)

    book = simulation.Book(contest)
    for episode in simulation.play(contest, 400, rng, lambda: Contender(1), totals, explores=True, began=book.begin):
        book.end(episode.place, episode.total)
        assert book.is_kept
        if episode.verdict is not None and episode.verdict.kind == "promotion":
            promoted.append(episode.verdict)
    assert promoted and book.n_at_risk > len(promoted)
    # The account was not kept by trying nothing: some of it was used up
    assert book.largest_share > 0.25


def test_no_budget() -> None:
    """Only the champion acts, whatever is offered."""
    contest = Contest(Rules(risk_budget=0), Contender(0), 3)
    book, ended = follow(contest, lambda kind, i: 1.0 + i % 2, explores=True)
    assert {episode.kind for episode in ended} == {Kind.SERVE} and book.n_at_risk == 0
    assert contest.challenge is None and contest.budget is not None and contest.budget.lost == 0


def test_below_the_worst_return() -> None:
    """There is a debt, and nothing at risk begins until it is repaid and there is enough for another one."""
    rules = Rules(risk_budget=0.125, baseline_episodes=2)
    contest = Contest(rules, Contender(0))

    def trial_after(n_most: int) -> int:
        for n in range(n_most):
            if contest.begin(0, lambda: Contender(1), explores=True).kind is Kind.TRIAL:
                return n
            contest.end(0, 100.0)
        return n_most

    # Eight episodes put aside one total loss
    assert trial_after(100) == 8
    contest.end(0, -200.0)
    assert contest.budget is not None and contest.budget.balance == pytest.approx(9 / 8 - 3)
    # 23 more episodes: the debt of 15 / 8, and 1 for the next
    assert trial_after(100) == 23


def test_a_baseline_below_the_worst_return() -> None:
    """What the baseline itself returned is possible."""
    contest = Contest(Rules(risk_budget=0.5, random_return=-1.0, worst_return=0.0, baseline_episodes=2), Contender(0))
    for total in (-5.0, 5.0):
        contest.begin(0, None)
        contest.end(0, total)
    contest.begin(0, lambda: Contender(1))
    assert contest.budget is not None and contest.budget.worst_return == -5.0
    # 5 - -5 is lost at worst, but the unit is 1
    assert contest.budget.worst_loss(contest.level) == pytest.approx(5.0)


@pytest.mark.parametrize("by_file", [True, False])
def test_episodes_that_are_cut_off(by_file: bool) -> None:
    """Running episodes at risk are charged their worst, others nothing; it does not matter when the next ones begin."""
    rules = Rules(risk_budget=0.9, worst_return=-1.0, baseline_episodes=2)
    contest = Contest(rules, Contender(0), 6)
    for i in range(24):
        contest.begin(i % 6, None)
        contest.end(i % 6, 1.0)
    kinds = [contest.begin(place, lambda: Contender(1), explores=True).kind for place in range(6)]
    assert kinds.count(Kind.TRIAL) == 1
    contest.end(0, 2.0)
    # From now on a coin decides
    kinds = [contest.begin(place, None).kind for place in range(6)]
    at_risk, lost, finished = kinds.count(Kind.TRIAL), contest.budget.lost, contest.budget.n_episodes  # type: ignore[union-attr]
    assert 0 < at_risk < 6
    if by_file:
        state = contest.state_dict()
        contest = Contest(rules, Contender(0), 6)
        contest.load_state_dict(state, {"champion": None, "challenger": None})
    else:
        for place in range(6):
            contest.begin(place, None)
    budget = contest.budget
    assert budget is not None and (budget.n_episodes, budget.lost) == (finished + at_risk, pytest.approx(lost + 2.0 * at_risk))
    # Promised all the same, and the test of the challenger has begun anew
    assert budget.lost <= budget.allowance
    assert contest.challenge is not None and contest.challenge.challenger.returns == [2.0]
    assert contest.challenge.test is not None and contest.challenge.test.log_evidence == 0.0 and contest.n_tests == 2


@given(
    returns=st.lists(st.floats(-10, 10), min_size=10, max_size=20),
    true=st.floats(-10, 10),
    tried=st.lists(st.floats(-10, 10), max_size=20),
)
def test_an_uncertain_baseline(returns: list[float], true: float, tried: list[float]) -> None:
    """Against the true mean, what is lost is more by its distance from J0 for each episode at risk, and by nothing else."""
    budget = RiskBudget(1.0, Level(float(np.mean(returns)), 20.0), -10.0)
    for place, total in enumerate(tried):
        budget.begin(place, budget.baseline)
        budget.end(place, total)
    distance = budget.baseline.random - budget.baseline.expected
    shortfall = sum(true - total for total in tried)
    assert shortfall == pytest.approx(budget.lost * distance + len(tried) * (true - budget.baseline.expected), abs=1e-8)
