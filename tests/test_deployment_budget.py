"""What is tried never costs more than the risk budget, whatever a learner does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sb3_offline_ft.deployment import Contender, Contest, Kind, Level, RiskBudget, Rules
from sb3_offline_ft.deployment.roles import Episode
from sb3_offline_ft.deployment.rules import CONTROLS
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
    contest: Contest, totals: Callable[[Episode, int], float], n_episodes: int = 80, seed: int = 0, **options: Any
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
        lambda episode: lengths[int(episode.kind is Kind.TRIAL)] * rng.exponential(),
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
        controls=st.sampled_from(CONTROLS),
        exploration_share=st.floats(0, 1, exclude_max=True),
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

    def total(episode: Episode, i: int) -> float:
        of_kind = returns[episode.actor]
        return -3 + 6 * of_kind[i % len(of_kind)]

    follow(contest, total, seed=seed, explores=explores)


@pytest.mark.parametrize("controls", CONTROLS)
@pytest.mark.parametrize("n_places", [1, 4])
def test_a_challenger_that_falls_once_it_is_trusted(n_places: int, controls: str) -> None:
    """Promotions raise the level that losses are counted against, and end episodes at risk of others."""
    contest, promoted = Contest(Rules(risk_budget=0.5, controls=controls), Contender(0), n_places), []
    rng = np.random.default_rng(0)

    def totals(episode: Episode, i: int) -> float:
        falls, serves = len(promoted) % 2, episode.actor is Kind.SERVE
        return float(rng.normal(1 + len(promoted), 0.1)) if serves else 0.0 if falls else 3.0 + 2 * len(promoted)

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
    book, ended = follow(contest, lambda episode, i: 1.0 + i % 2, explores=True)
    assert {episode.kind for episode in ended} == {Kind.SERVE} and book.n_at_risk == 0
    assert contest.challenge is None and contest.budget is not None and contest.budget.lost == 0


def test_below_the_worst_return() -> None:
    """There is a debt, and nothing at risk begins until it is repaid and there is enough for another one."""
    rules = Rules(risk_budget=0.125, baseline_episodes=5)
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
    contest = Contest(
        Rules(risk_budget=0.5, random_return=-1.0, worst_return=0.0, baseline_episodes=2, controls="concurrent"), Contender(0)
    )
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
    rules = Rules(risk_budget=0.9, worst_return=-1.0, baseline_episodes=2, controls="concurrent")
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
    assert contest.challenge.test is not None and contest.challenge.test.evidence == 0.0 and contest.n_tests == 2


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


def test_gains_are_not_saved_up() -> None:
    """What a good challenger earned pays for what was lost, and not for what others will lose."""
    level = Level(10.0, 0.0)
    budget = RiskBudget(0.5, level, 0.0, n_episodes=4)
    for total, balance in ((0.0, 1.5), (40.0, 3.0), (0.0, 2.5)):
        budget.begin(0, level)
        budget.end(0, total)
        assert budget.balance == pytest.approx(balance)
    # Against the baseline the run has gained a total loss
    assert budget.lost == pytest.approx(-1.0) and budget.lost_to_champion == pytest.approx(1.0)


@pytest.mark.parametrize("n_episodes", [40, 800])
def test_an_earlier_gain_does_not_prolong_a_series_of_losses(n_episodes: int) -> None:
    """Trials that return as little as possible go on for as long as the episodes have paid for, whatever was gained before."""
    rules = Rules(risk_budget=0.1, futility=0.0, exploration_share=0.0, max_trial_episodes=2)
    at_risk = {}
    for gain in (0.0, 1e6):
        contest = Contest(rules, Contender(0))
        totals = iter([1.0 + gain])
        kinds = []
        for i in range(n_episodes):
            kind = contest.begin(0, lambda: Contender(1)).kind
            kinds.append(kind)
            contest.end(0, 0.9 + 0.2 * (i % 2) if kind is Kind.SERVE else next(totals, 0.0))
        at_risk[gain] = kinds.count(Kind.TRIAL)
    assert at_risk[0.0] <= at_risk[1e6] <= at_risk[0.0] + 1 and at_risk[0.0] > 2


def test_the_share_of_explorations() -> None:
    shares = {}
    for share in (0.0, 0.3, 0.9):
        contest = Contest(Rules(risk_budget=0.9, exploration_share=share, baseline_episodes=10), Contender(0))
        kinds = []
        for i in range(2010):
            # An offer of which nothing comes
            kinds.append(contest.begin(0, lambda: None, explores=True).kind)
            contest.end(0, 9.0 + 2.0 * (i % 2))
        assert set(kinds[:10]) == {Kind.SERVE}
        shares[share] = kinds.count(Kind.EXPLORE) / 2000
    assert shares[0.0] == 0
    # Five standard deviations of a coin
    assert shares[0.3] == pytest.approx(0.3, abs=0.052) and shares[0.9] == pytest.approx(0.9, abs=0.034)


def test_only_the_champion_acts_outside_the_canary_places() -> None:
    rules = Rules(risk_budget=0.9, canary_envs=2, baseline_episodes=5, exploration_share=0.9, futility=0.0)
    contest, seen = Contest(rules, Contender(0), 4), set()
    for i in range(400):
        for place in range(4):
            offer = (lambda: Contender(1)) if i % 20 == 0 else None
            seen.add((place, contest.begin(place, offer, explores=True).kind))
        for place in range(4):
            contest.end(place, 9.0 + 2.0 * (i % 2))
    assert {kind for place, kind in seen if place < 2} == {*Kind}
    assert {kind for place, kind in seen if place >= 2} == {Kind.SERVE}


# The baseline


def falls(place: int, i: int) -> tuple[float, float]:
    """Length and return of an episode: half of them end early, and are bad."""
    return (1.0, 1.0) if (place + i) % 2 else (10.0, 10.0)


@pytest.mark.parametrize(("n_places", "n_first"), [(1, 10), (4, 3), (16, 1)])
def test_the_baseline_of_several_places_is_not_that_of_short_episodes(n_places: int, n_first: int) -> None:
    contest, ends = Contest(Rules(risk_budget=0.5, baseline_episodes=10), Contender(0), n_places), []
    counts = [0] * n_places
    for place in range(n_places):
        contest.begin(place, lambda: Contender(1))
        ends.append((falls(place, 0)[0], place))
    while contest.budget is None:
        assert {episode.kind for episode in contest.running} == {Kind.SERVE}
        now, place = min(ends)
        contest.end(place, falls(place, counts[place])[1])
        counts[place] += 1
        ends[place] = (now + falls(place, counts[place])[0], place)
        contest.begin(place, lambda: Contender(1))
    # As soon as each has its share of the episodes, which is those that it finished first
    assert min(counts) == n_first
    expected = [falls(place, i)[1] for place in range(n_places) for i in range(n_first)]
    assert contest.budget.baseline.expected == pytest.approx(np.mean(expected))
    assert sorted(contest.champion.returns) == sorted(expected) and contest.budget.n_episodes == sum(counts)
    assert contest.champion.mean == pytest.approx(5.5, abs=0.5)


@pytest.mark.parametrize("n_later", [3, 2])
def test_a_baseline_that_was_interrupted(n_later: int) -> None:
    """What each place has finished is known after it; another number of places begins anew."""
    rules = Rules(risk_budget=0.5, baseline_episodes=6)
    contest = Contest(rules, Contender(0), 3)
    for place in (0, 0, 0, 1):
        contest.begin(place, None)
        contest.end(place, 10.0 + place)
    state = contest.state_dict()
    contest = Contest(rules, Contender(0), n_later)
    contest.load_state_dict(state, {"champion": None})
    n_episodes = 0
    while contest.budget is None:
        for place in range(n_later):
            contest.begin(place, lambda: None)
            if contest.budget is None:
                contest.end(place, 20.0 + place)
                n_episodes += 1
    # Two of each place, or three
    expected = [10.0, 10.0, 11.0, 21.0, 22.0, 22.0] if n_later == 3 else [20.0, 21.0] * 3
    # The first episode of each place had begun before
    assert sorted(contest.champion.returns) == sorted(expected)
    assert contest.budget.n_episodes == 4 + n_episodes


def test_returns_as_low_as_those_of_a_random_policy() -> None:
    """A champion that always fails, as random policies do: there is no distance, and trials go on all the same."""
    contest = Contest(Rules(risk_budget=0.5, baseline_episodes=5, controls="historical"), Contender(0))
    kinds = []
    for _ in range(40):
        kinds.append(contest.begin(0, lambda: Contender(1)).kind)
        contest.end(0, 0.0 if kinds[-1] is Kind.SERVE or contest.champion.name else 1.0)
    assert Kind.TRIAL in kinds and contest.champion.name == 1
