"""Who becomes champion has been proved to be better, at the promised rate of errors."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scipy.stats import binomtest

from sb3_offline_ft.deployment import ConcurrentTest, Contender, Contest, HistoricalTest, Kind, Rules, Verdict
from sb3_offline_ft.deployment.promotion import TrialEpisode
from sb3_offline_ft.deployment.rules import CONTROLS, share_of_test
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


@pytest.mark.parametrize(("controls", "n_most"), [("concurrent", 14), ("historical", 4)])
def test_better_challengers_are_promoted_soon(controls: str, n_most: int) -> None:
    """
    A lead of 5 standard deviations; the best that any test at this level can do is 5 episodes with a coin, and 2 above 10 of
    the champion, whose probability is 1 in 66 otherwise.
    """
    world = simulation.World(*[lambda mean: simulation.Policy(mean, lambda rng: rng.normal(mean, 0.1))] * 2)
    for seed in range(20):
        rules = Rules(risk_budget=0.99, controls=controls)
        verdicts, contest = simulation.simulated_promotions(world, (0.5,), rules, 10 + 1 + n_most, seed)
        assert "promotion" in [verdict.kind for verdict in verdicts], seed
        # Newer policies had an episode each meanwhile
        assert not {"hopeless", "undecided"} & {verdict.reason for verdict in verdicts}
        assert contest.champion.policy.mean >= 1.5


def settled(test: ConcurrentTest, total: float, is_challenger: bool) -> float:
    """What a test's evidence becomes by an episode with this return."""
    test.bet(0.5, CHAMPION, [], 10.0).settle(total, is_challenger)
    return test.evidence


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
    assert test.evidence == 0.0
    first.settle(14.0, True)
    assert test.evidence == pytest.approx(2 * (first.log_gain or 0.0)) and test.evidence > 0


def contest_in_a_test(n_places: int) -> Contest:
    """A champion with returns around 10, and a challenger that has survived its first episode."""
    rules = Rules(risk_budget=0.9, baseline_episodes=10, controls="concurrent")
    contest = Contest(rules, Contender(0), n_places)
    for i in range(64):
        contest.begin(i % n_places, None)
        contest.end(i % n_places, 9.0 + 2.0 * (i // n_places % 2))
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
    free = next(place for place in range(8) if place not in late)
    contest.stop_trial(free, "broken")
    contest.end(free, 0.0)
    assert contest.begin(free, lambda: Contender(2)).kind is Kind.TRIAL
    contest.end(free, 13.0)
    for place in late:
        contest.end(place, 0.0)
    assert contest.challenge is not None and contest.challenge.test is not None
    assert contest.n_tests == 2 and contest.challenge.test.evidence == 0.0


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
    assert len(levels) == contest.n_tests > 50 and levels[0] == pytest.approx(0.1 / 3)
    assert 0.09 < sum(levels) < 0.1


# Historical controls


def settle(test: HistoricalTest, total: float) -> float:
    test.bet(0.5, CHAMPION, [], 10.0).settle(total, True)
    return test.evidence


def test_evidence_of_ranks() -> None:
    reference = list(range(10))
    test = HistoricalTest(0.05, reference, 10.0, 9)
    evidence = [settle(test, 100.0) for _ in range(4)]
    assert evidence[0] > 0 and (np.diff(evidence) > 0).all() and test.is_proved
    assert evidence[0] == pytest.approx((sum(1 / np.arange(1, 12)) - 1) / np.std(np.cumsum(1 / np.arange(11, 0, -1))))
    # Ranks, not distances, and one return among many says little
    assert settle(HistoricalTest(0.05, reference, 10.0, 9), 9.5) == pytest.approx(evidence[0])
    test = HistoricalTest(0.05, reference, 10.0, 9)
    assert settle(test, -100.0) < 0 and settle(test, -200.0) < 0
    # The probability that two more are above ten is 1 / 66
    assert not HistoricalTest(0.005, reference, 10.0, 9).is_proved
    test = HistoricalTest(0.005, reference, 10.0, 9)
    assert all(settle(test, 100.0) < test.threshold for _ in range(2))


@pytest.mark.parametrize("finds", [True, False], ids=["finds more", "falls less"])
def test_leads_in_some_episodes_are_proved_whichever_they_are(finds: bool) -> None:
    """
    The challenger is ahead in a part of its episodes only: high ones that the champion does not have, or low ones that it does
    not have itself.
    """
    rng = np.random.default_rng(0)
    champion, challenger = ((0.0, 0.5), (2.0, 0.5)) if finds else ((-2.0, 0.5), (0.0, 0.5))

    def returns(kind: tuple[float, float], n: int) -> list[float]:
        other, share = kind
        return list(np.where(rng.random(n) < share, other, 0.0) + rng.normal(0.0, 0.3, n))

    n_proved = 0
    for _ in range(100):
        test = HistoricalTest(0.02, returns(champion, 20), 10.0, 39)
        for total in returns(challenger, 39):
            settle(test, total)
        n_proved += test.is_proved
    # If 9 of 10 are proved, fewer than 80 of 100 have a probability below 0.001
    assert n_proved >= 80


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_overlapping_ranks_count_in_the_order_of_their_beginnings(order: list[int]) -> None:
    totals, test = [100.0, 4.5, 9.5], HistoricalTest(0.05, list(range(10)), 10.0, 9)
    expected, evidence = [0.0], HistoricalTest(0.05, list(range(10)), 10.0, 9)
    expected += [settle(evidence, total) for total in totals]
    bets, ended = [test.bet(0.5, CHAMPION, [], 10.0) for _ in totals], set()
    assert all(isinstance(bet, TrialEpisode) for bet in bets)
    for index in order:
        bets[index].settle(totals[index], True)
        ended.add(index)
        # None before those ahead of it
        n = next(n for n in range(4) if n not in ended)
        assert test.evidence == pytest.approx(expected[n])


@pytest.mark.parametrize("champion", [[10.0] * 10, [0.0] * 10, [-1e6] * 5, [10.0] * 9 + [11.0]])
def test_equal_returns_of_the_champion(champion: list[float]) -> None:
    """They are no proof of anything: what returns the same is not better, what returns much more is."""
    unit = max(abs(champion[0]), 1e-18)
    same, better = (HistoricalTest(0.05, champion, unit, 9) for _ in range(2))
    for _ in range(9):
        settle(same, champion[0])
        settle(better, champion[0] + 2 * unit)
    assert better.is_proved and not same.is_proved


def test_equal_returns_are_ordered_otherwise_in_each_test() -> None:
    evidence = {settle(HistoricalTest(0.05, [0.0, 1.0] * 5, 1.0, 9, seed), 1.0) for seed in range(20)}
    assert len(evidence) > 2


def normal(rng: np.random.Generator) -> float:
    return float(rng.normal())


def success(rng: np.random.Generator) -> float:
    return float(rng.random() < 0.5)


def fall(rng: np.random.Generator) -> float:
    return float(rng.random() > 0.1) + 0.01 * float(rng.random())


@pytest.mark.parametrize(("draw", "n_reference", "level"), [(normal, 10, 0.05), (success, 10, 0.15), (fall, 30, 0.05)])
def test_the_level_of_ranks(draw: Callable[[np.random.Generator], float], n_reference: int, level: float) -> None:
    """It holds for exchangeable returns, discrete ones too: a true rate of at most the level fails once in 10,000 times."""
    rng, n_runs, n_proved = np.random.default_rng(n_reference), 2000, 0
    for seed in range(n_runs):
        test = HistoricalTest(level, [draw(rng) for _ in range(n_reference)], 1.0, 9, seed)
        for _ in range(9):
            settle(test, draw(rng))
        n_proved += test.is_proved
    assert binomtest(n_proved, n_runs, level, "greater").pvalue > 1e-4
    # The level is used: what never proves anything keeps it too
    assert n_proved > 0.1 * level * n_runs or draw is not normal


def test_the_rate_of_contests_with_historical_controls() -> None:
    """Challengers of which all are as good as the champion, one after the other, against the same returns of it."""
    rate, n_runs, false = 0.3, 2000, 0
    rules = Rules(risk_budget=0.99, random_return=-5.0, worst_return=-9.0, false_promotion_rate=rate, max_trial_episodes=5)
    rng = np.random.default_rng(0)
    for seed in range(n_runs):
        contest = Contest(rules, Contender(0), seed=seed)
        for _ in range(40):
            contest.begin(0, lambda: Contender(1))
            verdict = contest.end(0, max(-9.0, normal(rng)))
            if verdict is not None and verdict.kind == "promotion":
                false += 1
                break
    assert 0 < false and binomtest(false, n_runs, rate, "greater").pvalue > 1e-4


def test_no_coin_is_thrown_with_historical_controls() -> None:
    """Once a challenger has survived its first episode, all are its own, in as many places as may be at risk."""
    contest = Contest(Rules(risk_budget=0.99, futility=0.0, trial_share=0.01, baseline_episodes=10), Contender(0), 2)
    kinds = []
    for i in range(60):
        for place in range(2):
            kinds.append(contest.begin(place, lambda: Contender(1)).kind if i > 20 else contest.begin(place, None).kind)
        for place in range(2):
            contest.end(place, 9.0 + 2.0 * (i % 2))
        challenge = contest.challenge
        if challenge is not None and len(challenge.challenger.returns) >= 2:
            assert kinds[-2:] == [Kind.TRIAL, Kind.TRIAL] or len(challenge.challenger.returns) == 2
    assert kinds.count(Kind.TRIAL) > 30


@pytest.mark.parametrize("controls", ["historical", "concurrent"])
def test_a_new_champion_is_known_before_anything_new_is_tried(controls: str) -> None:
    rules = Rules(risk_budget=0.9, false_promotion_rate=0.9, exploration_share=0.9, baseline_episodes=10, controls=controls)
    contest, names, kinds = Contest(rules, Contender(0)), iter(range(1, 100)), []
    for i in range(200):
        kinds.append(contest.begin(0, lambda: Contender(next(names)), explores=True).kind)
        before = len(contest.champion.returns)
        if contest.champion.name:
            assert kinds[-1] is Kind.SERVE or before >= 5
        total = 10.0 + contest.champion.name + i % 2 + (5.0 if kinds[-1] is Kind.TRIAL else 0.0)
        verdict = contest.end(0, total)
        if verdict is not None and verdict.kind == "promotion" and len(verdict.contender.returns) < 5:
            after = [contest.begin(0, lambda: Contender(next(names)), explores=True).kind]
            for _ in range(5 - len(verdict.contender.returns) - 1):
                contest.end(0, 15.0 + contest.champion.name)
                after.append(contest.begin(0, lambda: Contender(next(names)), explores=True).kind)
            assert set(after) == {Kind.SERVE}
            break
    else:
        pytest.fail("no promotion of few episodes")
    contest.end(0, 16.0 + contest.champion.name)
    later = []
    for _ in range(20):
        later.append(contest.begin(0, lambda: Contender(next(names)), explores=True).kind)
        contest.end(0, 15.0 + contest.champion.name)
    assert set(later) != {Kind.SERVE}


@pytest.mark.parametrize("controls", ["historical", "concurrent"])
def test_the_leader_needs_no_proof(controls: str) -> None:
    """Two episodes of which it is likely that they are better; it leads no more once it has returned less, or is given up."""
    rules = Rules(risk_budget=0.9, false_promotion_rate=0.001, baseline_episodes=10, trial_share=0.9, controls=controls)
    contest = Contest(rules, Contender(0))
    leaders: dict[int, set[int]] = {}
    for i in range(120):
        kind = contest.begin(0, (lambda: Contender(1)) if i == 60 else None).kind
        if contest.challenge is not None:
            n = len(contest.challenge.challenger.returns)
            leaders.setdefault(n, set()).add(contest.leader.name)
        total = (13.0 if n < 3 else 0.0) if kind is Kind.TRIAL else 9.0 + 2.0 * (i % 2)
        verdict = contest.end(0, total)
        if verdict is not None:
            assert verdict.kind == "rejection"
            break
    assert leaders[0] == leaders[1] == {0} and leaders[2] == leaders[3] == {1} and leaders[4] == {0}
    assert contest.challenge is None and contest.leader is contest.champion


# A newer policy than the one that is tested


def with_champion(n_places: int = 1, spread: float = 1.0, **rules: Any) -> Contest:
    """A contest whose champion returns about 10 in its first episodes."""
    contest = Contest(Rules(risk_budget=0.99, baseline_episodes=10, **rules), Contender(0), n_places)
    for i in range(40):
        for place in range(n_places):
            contest.begin(place, None)
        for place in range(n_places):
            contest.end(place, 10.0 - spread + 2 * spread * (i % 2))
    return contest


def one(contest: Contest, totals: dict[str, float], names: Iterator[int]) -> tuple[str, Verdict | None]:
    """An episode in the first place that returns what its contender does; who it was, and what was decided."""
    episode = contest.begin(0, lambda: Contender(next(names)))
    role = episode.role
    return role, contest.end(0, totals[role])


@pytest.mark.parametrize(("spread", "given", "length"), [(0.5, None, 10), (1.2, None, 20), (9.0, None, 40), (9.0, 7, 7)])
def test_trials_are_as_long_as_the_spread_asks_for(spread: float, given: int | None, length: int) -> None:
    contest, names, verdict = with_champion(spread=spread, max_trial_episodes=given, futility=0.0), itertools.count(1), None
    # Half of the champion's returns are higher, so it is not proved
    totals = {"champion": 10.0, "challenger": 10.0 + 0.6 * spread, "rival": 10.0}
    while verdict is None or verdict.reason == "behind the challenger":
        _, verdict = one(contest, totals, names)
    assert verdict.reason == "undecided" and len(verdict.contender.returns) == length


@pytest.mark.parametrize("controls", CONTROLS)
def test_a_newer_policy_that_is_better_takes_the_place_of_the_challenger(controls: str) -> None:
    contest = with_champion(controls=controls, trial_share=0.9)
    names = itertools.count(1)
    roles = []
    while not roles or roles[-1] != "rival":
        role, verdict = one(contest, {"champion": 10.0, "challenger": 13.0, "rival": 19.0}, names)
        roles.append(role)
    assert roles.count("challenger") == 2 and contest.leader.name == 2
    assert verdict is not None and (verdict.kind, verdict.contender.name) == ("rejection", 1)
    assert verdict.reason == "overtaken by the policy of step 2"
    challenge = contest.challenge
    assert challenge is not None and challenge.test is not None and contest.rival is None
    # Its first episode decided that it is tested, so that it says nothing in the test
    assert (challenge.challenger.name, challenge.challenger.returns) == (2, [19.0])
    assert contest.n_tests == 2 and challenge.test.evidence == 0.0


def test_a_newer_policy_that_is_no_better_gets_one_episode() -> None:
    contest = with_champion(false_promotion_rate=1e-9, max_trial_episodes=20)
    names, roles, verdicts = itertools.count(1), [], []
    while contest.challenge is None or len(contest.challenge.challenger.returns) < 19:
        role, verdict = one(contest, {"champion": 10.0, "challenger": 13.0, "rival": 13.0}, names)
        roles.append(role)
        verdicts += [] if verdict is None else [verdict]
    # When its episodes have doubled: of a challenger that stays, few are lost to others
    at = [roles[:i].count("challenger") for i, role in enumerate(roles) if role == "rival"]
    assert at == [2, 4, 8, 16]
    assert {(verdict.kind, verdict.reason) for verdict in verdicts} == {("rejection", "behind the challenger")}
    assert [verdict.contender.name for verdict in verdicts] == [2, 3, 4, 5] and contest.n_tests == 1


def test_a_rival_is_at_risk_as_others_are() -> None:
    contest = with_champion(worst_return=-30.0)
    names = itertools.count(1)
    totals = {"champion": 10.0, "challenger": 13.0, "rival": -30.0}
    while one(contest, totals, names)[0] != "rival":
        pass
    assert contest.budget is not None and contest.challenge is not None and contest.rival is None
    lost = contest.budget.lost
    assert lost == pytest.approx((40.0 - 2 * 3.0) / 10.0)
    # It is paid before another one is tried
    while (kind := contest.begin(0, lambda: Contender(next(names))).kind) is Kind.SERVE:
        contest.end(0, 10.0)
    assert kind is Kind.TRIAL and contest.budget.balance >= contest.budget.worst_loss(contest.level)


@pytest.mark.parametrize("what", ["rejected", "promoted", "rival stopped", "cut off"])
def test_what_becomes_of_a_rival_whose_episode_runs(what: str) -> None:
    """In another place than the challenger's, whose trial ends meanwhile."""
    contest = with_champion(n_places=2, max_trial_episodes=4 if what == "rejected" else 20, false_promotion_rate=1e-4)
    names = itertools.count(1)
    while contest.rival is None:
        for place in range(2):
            contest.begin(place, lambda: Contender(next(names)))
        if contest.rival is None:
            for place in range(2):
                contest.end(place, {"champion": 10.0, "challenger": 13.0}[contest.running[place].role])
    place = next(place for place, episode in enumerate(contest.running) if episode.is_rival)
    other, rival, challenge = 1 - place, contest.rival, contest.challenge
    assert challenge is not None and contest.contenders["rival"] is rival
    if what == "rival stopped":
        verdict = contest.stop_trial(place, "non-finite action")
        assert verdict is not None and verdict.contender is rival and contest.challenge is challenge
        assert contest.running[place].role == "champion" and contest.stop_trial(place, "again") is None
        # What was tried there is charged all the same, and counts for nobody
        assert contest.end(place, 5.0) is None and contest.rival is None
        assert contest.challenge is challenge and rival.returns == []
    elif what == "cut off":
        assert contest.budget is not None
        lost = contest.budget.lost
        contest.begin(place, None)
        assert contest.rival is None and contest.challenge is challenge and contest.budget.lost == pytest.approx(lost + 1.0)
    else:
        verdict = None
        while verdict is None:
            is_better = what == "promoted" and contest.running[other].role == "challenger"
            verdict = contest.end(other, 13.0 if is_better else 10.0)
            if verdict is None:
                contest.begin(other, None)
        assert verdict.kind == {"promoted": "promotion", "rejected": "rejection"}[what], verdict
        assert contest.rival is None
        if what == "rejected":
            # It is the next challenger, and its episode the first of its trial
            assert contest.challenge is not None and contest.challenge.challenger is rival
            assert contest.running[place].role == "challenger"
            contest.end(place, 13.0)
            assert rival.returns == [13.0] and contest.challenge.test is not None
        else:
            assert contest.challenge is None and contest.running[place].role == "champion"
            contest.end(place, 13.0)
            assert contest.challenge is None and rival.returns == []


@pytest.mark.parametrize("has_same_object", [True, False])
def test_a_contest_goes_on_from_a_file_where_it_was(has_same_object: bool) -> None:
    """But for episodes that were running, a rival's too."""
    contest = with_champion()
    names = itertools.count(1)
    totals = {"champion": 10.0, "challenger": 16.0, "rival": 30.0}
    while one(contest, totals, names)[0] != "rival":
        pass
    overtaken = Contest(contest.rules, Contender(0), 1)
    overtaken.load_state_dict(contest.state_dict(), {"champion": None, "challenger": None})
    assert overtaken.leader.name == contest.leader.name == 2
    while contest.begin(0, lambda: Contender(next(names))).role != "rival":
        contest.end(0, 30.0)
    challenge = contest.challenge
    assert challenge is not None
    again = contest if has_same_object else Contest(contest.rules, Contender(0), 1)
    again.load_state_dict(json.loads(json.dumps(contest.state_dict())), {"champion": None, "challenger": None})
    assert again.rival is None and again.leader.name == 2 and again.challenge is not None
    assert (again.challenge.n_rival, again.challenge.has_overtaken) == (challenge.n_rival, challenge.has_overtaken)
    assert again.begin(0, lambda: Contender(9)).role == "rival"
    assert again.end(0, 0.0) is not None and again.challenge.n_rival == 2 * len(challenge.challenger.returns)
    # And from one that was written when there were no rivals
    state = contest.state_dict()
    del state["challenge"]
    again.load_state_dict(state, {"champion": None, "challenger": None})
    assert again.challenge is not None and again.challenge.challenger.name == 2
    running = contest.run_state()
    del running["challenge"], running["rival"], running["running"][0]["is_rival"], running["running"][0]["tried"]
    again.load_run_state(running, {"champion": None, "challenger": None})
    assert again.challenge is not None and again.challenge.challenger.name == 2 and again.rival is None


def test_only_challengers_that_nobody_overtook_have_failed() -> None:
    contest = with_champion(n_places=2, max_trial_episodes=4, false_promotion_rate=1e-4)
    names = itertools.count(1)

    def until_rival() -> int:
        while contest.rival is None:
            for place in range(2):
                contest.begin(place, lambda: Contender(next(names)))
            if contest.rival is None:
                for place in range(2):
                    contest.end(place, {"champion": 10.0, "challenger": 13.0}[contest.running[place].role])
        return next(place for place, episode in enumerate(contest.running) if episode.is_rival)

    place, verdict = until_rival(), None
    while verdict is None:
        # It is given up while a rival acts elsewhere, which is the next challenger
        verdict = contest.end(1 - place, 10.0)
        contest.begin(1 - place, None)
    assert verdict.contender.name == 1 and verdict.is_failure and contest.challenge is not None
    for total in (13.0, 99.0):
        place = until_rival()
        verdict = contest.end(place, total)
        assert verdict is not None and not verdict.is_failure
        contest.end(1 - place, 10.0)


class AnyContest(RuleBasedStateMachine):
    """Episodes begin, are cut off, stopped and end in any order in several places, and the contest goes on from its state."""

    @initialize(n_places=st.integers(1, 4), controls=st.sampled_from(CONTROLS), share=st.sampled_from([0.0, 0.5]))
    def open(self, n_places: int, controls: str, share: float) -> None:
        self.rules = Rules(
            risk_budget=0.99, baseline_episodes=5, max_trial_episodes=6, exploration_share=share, controls=controls,
            false_promotion_rate=0.5,
        )  # fmt: skip
        self.contest = Contest(self.rules, Contender(0, 0), n_places)
        self.names = itertools.count(1)
        self.ended = set(range(n_places))
        for i in range(40):
            # A rival is soon wanted
            self.begin_all()
            for place in range(n_places):
                self.end(place, 14.0 if self.contest.running[place].kind is Kind.TRIAL else 9.0 + 2.0 * (i % 2))
            if self.contest.challenge is not None and self.contest.challenge.challenger.returns:
                break

    def offer(self) -> Contender:
        name = next(self.names)
        return Contender(name, name)

    @rule(place=st.integers(0, 3), has_learned=st.booleans())
    def begin(self, place: int, has_learned: bool) -> None:
        place %= len(self.contest.running)
        self.contest.begin(place, self.offer if has_learned else None, explores=True)
        self.ended.discard(place)

    @precondition(lambda self: self.ended)
    @rule()
    def begin_all(self) -> None:
        for place in sorted(self.ended):
            self.begin(place, True)

    @rule(place=st.integers(0, 3), total=st.sampled_from([0.0, 9.0, 10.0, 11.0, 14.0, 20.0]))
    def end(self, place: int, total: float) -> None:
        place %= len(self.contest.running)
        if place not in self.ended:
            self.contest.end(place, total)
            self.ended.add(place)

    @rule(place=st.integers(0, 3))
    def stop(self, place: int) -> None:
        place %= len(self.contest.running)
        if place not in self.ended and self.contest.running[place].actor is Kind.TRIAL:
            role = self.contest.running[place].role
            tried = self.contest.contenders[role]
            verdict = self.contest.stop_trial(place, "stopped")
            assert verdict is not None and verdict.contender is tried
            assert self.contest.running[place].role == "champion" and tried not in self.contest.contenders.values()

    @rule()
    def go_on_exactly(self) -> None:
        state, policies = self.contest.run_state(), {role: one.policy for role, one in self.contest.contenders.items()}
        again = Contest(self.rules, Contender(0, 0), len(self.contest.running))
        again.load_run_state(copy.deepcopy(state), policies)
        assert repr(again.run_state()) == repr(state)
        self.contest = again

    @rule(has_same_object=st.booleans())
    def go_on_from_a_file(self, has_same_object: bool) -> None:
        state, policies = self.contest.state_dict(), {role: one.policy for role, one in self.contest.contenders.items()}
        leader = self.contest.leader.name
        again = self.contest if has_same_object else Contest(self.rules, Contender(0, 0), len(self.contest.running))
        again.load_state_dict(json.loads(json.dumps(state)), policies)
        assert again.leader.name == leader
        self.contest, self.ended = again, set()

    @invariant()
    def a_rival_has_one_episode(self) -> None:
        if not hasattr(self, "contest"):
            return
        running, rival = self.contest.running, self.contest.rival
        assert sum(episode.is_rival for episode in running) == (rival is not None)
        for place, episode in enumerate(running):
            if place not in self.ended:
                assert episode.role in self.contest.contenders
        if rival is not None:
            challenge = self.contest.challenge
            assert challenge is not None and challenge.test is not None and rival.name > challenge.challenger.name
        levels = self.rules.false_promotion_rate * sum(map(share_of_test, range(self.contest.n_tests)))
        assert levels < self.rules.false_promotion_rate


TestAnyContest = AnyContest.TestCase
TestAnyContest.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
