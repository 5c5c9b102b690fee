"""Who becomes champion has been proved to be better, at the promised rate of errors."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from sb3_offline_ft.deployment import ConcurrentTest, Contender, Contest, Kind, Rules
from sb3_offline_ft.deployment.contest import CONTROLS
from tests.simulated_contests import simulation

CHAMPION = [9.0, 10.0, 11.0]
PROMISED = [(name, controls) for name in simulation.WORLDS for controls in CONTROLS if simulation.is_promised(name, controls)]


@pytest.mark.parametrize(("name", "controls"), PROMISED)
def test_false_promotions(name: str, controls: str) -> None:
    """Challengers that are as good as the champion: a true rate of at most 0.3 fails by chance once in 10,000 times."""
    rules, n_runs, false = Rules(risk_budget=0.99, false_promotion_rate=0.3, controls=controls), 40, 0
    for seed in range(n_runs):
        verdicts, _ = simulation.simulated_promotions(simulation.WORLDS[name], (0.0,), rules, 60, seed)
        false += any(verdict.kind == "promotion" for verdict in verdicts)
    assert binomtest(false, n_runs, rules.false_promotion_rate, "greater").pvalue > 1e-4


def test_better_challengers_are_promoted_soon() -> None:
    """A lead of 5 standard deviations; the best that any test by a coin can do at this level is 5 episodes."""
    world = simulation.World(*[lambda mean: simulation.Policy(mean, lambda rng: rng.normal(mean, 0.1))] * 2)
    for seed in range(20):
        verdicts, contest = simulation.simulated_promotions(world, (0.5,), Rules(risk_budget=0.99), 10 + 1 + 12, seed)
        assert [verdict.kind for verdict in verdicts][:1] == ["promotion"], seed
        assert contest.champion.policy.mean >= 1.5


def settled(test: ConcurrentTest, total: float, is_challenger: bool) -> float:
    """What a test's evidence becomes by an episode with this return."""
    test.bet(0.5, CHAMPION, [], 10.0).settle(total, is_challenger)
    return test.log_evidence


def test_evidence() -> None:
    # The challenger returns much, or the champion returns little
    assert settled(ConcurrentTest(0.05), 14.0, True) > 0 and settled(ConcurrentTest(0.05), 6.0, False) > 0
    assert settled(ConcurrentTest(0.05), 6.0, True) < 0 and settled(ConcurrentTest(0.05), 14.0, False) < 0
    # Capital can be won back, however low it was, and one episode never multiplies it by more than 1 / share
    assert settled(ConcurrentTest(0.05), -1e9, True) == pytest.approx(math.log(0.1))
    assert settled(ConcurrentTest(0.05), 1e9, True) <= math.log(2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("challenger", [[], [12.0], [5.0], [100.0] * 5])
def test_bets_are_fair_at_worst(share: float, challenger: list[float]) -> None:
    """At each return, the capital is multiplied by 1 on average if that return does not tell who acted, and more is better."""
    chances = []
    for total in np.linspace(-20, 40, 61):
        bets = [ConcurrentTest(0.05).bet(share, CHAMPION, challenger, 10.0) for _ in range(2)]
        for bet, is_challenger in zip(bets, (True, False), strict=True):
            bet.settle(float(total), is_challenger)
        gains = [math.exp(bet.log_gain or 0.0) for bet in bets]
        assert share * gains[0] + (1 - share) * gains[1] == pytest.approx(1.0)
        chances.append(gains[0])
    # So it is at most 1 on average if the challenger's returns are lower in stochastic order
    assert (np.diff(chances) >= 0).all() and chances[-1] > chances[0]


def test_overlapping_episodes_count_in_the_order_of_their_coins() -> None:
    test = ConcurrentTest(0.05)
    first, second = (test.bet(0.5, CHAMPION, [], 10.0) for _ in range(2))
    second.settle(14.0, True)
    assert test.log_evidence == 0.0
    first.settle(14.0, True)
    assert test.log_evidence == pytest.approx(2 * (first.log_gain or 0.0)) and test.log_evidence > 0


def contest_in_a_test(n_places: int) -> Contest:
    """A champion with returns around 10, and a challenger that has survived its first episode."""
    contest = Contest(Rules(risk_budget=0.9, controls="concurrent"), Contender(0), n_places)
    for i in range(60):
        contest.begin(0, None)
        contest.end(0, 9.0 + 2.0 * (i % 2))
    assert contest.begin(0, lambda: Contender(1)).kind is Kind.TRIAL
    contest.end(0, 13.0)
    assert contest.challenge is not None and contest.challenge.test is not None
    return contest


def test_episodes_of_an_earlier_challenge_do_not_count() -> None:
    """The champion's are still there when the challenger's are not: by themselves they would speak for anybody."""
    contest, late = contest_in_a_test(8), []
    for place in range(8):
        if contest.begin(place, None).kind is Kind.SERVE:
            late.append(place)
    assert 0 < len(late) < 8
    contest.stop_trial("broken")
    free = next(place for place in range(8) if place not in late)
    contest.end(free, 0.0)
    assert contest.begin(free, lambda: Contender(2)).kind is Kind.TRIAL
    contest.end(free, 13.0)
    for place in late:
        contest.end(place, 0.0)
    assert contest.challenge is not None and contest.challenge.test is not None
    assert contest.n_tests == 2 and contest.challenge.test.log_evidence == 0.0


def test_what_returns_while_an_episode_runs_does_not_change_its_bet() -> None:
    contest = contest_in_a_test(2)
    running = contest.begin(0, None)
    before = running.bet
    assert before is not None
    terms = (before.center, before.spread, before.lead)
    contest.begin(1, None)
    contest.end(1, 10.0)
    assert running.bet is before and (before.center, before.spread, before.lead) == terms


def test_levels_of_all_tests_sum_to_the_rate() -> None:
    contest, levels = Contest(Rules(risk_budget=0.9, max_trial_episodes=2, futility=0), Contender(0)), []
    for _ in range(600):
        contest.begin(0, lambda: Contender(1))
        contest.end(0, 1.0)
        if contest.challenge is not None and contest.challenge.test is not None:
            levels.append(contest.challenge.test.level)
    levels = sorted(set(levels), reverse=True)
    assert len(levels) == contest.n_tests > 50 and levels[0] == pytest.approx(0.05)
    assert 0.09 < sum(levels) < 0.1
