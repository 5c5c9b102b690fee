"""Champion and challenger: who acts next, what it may cost, and who is proved to be better. Knows no environment."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sb3_offline_ft.collapse.detectors import BettingDetector
from sb3_offline_ft.common.io import arrays_from_json, arrays_to_json
from sb3_offline_ft.deployment.budget import Level, RiskBudget
from sb3_offline_ft.deployment.promotion import ConcurrentTest, HistoricalTest, PromotionTest, chance_of_lead, spread_of
from sb3_offline_ft.deployment.roles import Challenge, Contender, Episode, Kind, Verdict
from sb3_offline_ft.deployment.rules import LEAST_KNOWN, LEAST_TO_LEAD, LIKELY, PROVABLE, Rules, share_of_test, trial_length

WATCH_HORIZON = 1000


class Contest:
    """
    Says of each episode who acts in it, is told what it returned, and decides.

    A state machine that knows neither environments nor learners: what runs episodes calls :meth:`begin` and :meth:`end`, in
    each of several places (environments) that run at the same time.

    :param rules: The rules
    :param champion: Who acts at first, the *baseline*
    :param n_places: Number of episodes that run at the same time
    :param seed: Seed of the coin
    """

    def __init__(self, rules: Rules, champion: Contender, n_places: int = 1, seed: int = 0) -> None:
        self.rules = rules
        self.champion = champion
        self.predecessor: Contender | None = None
        self.challenge: Challenge | None = None
        self.rival: Contender | None = None
        """A newer policy than the challenger's, which has an episode meanwhile: if it is better, it takes the place."""
        self.budget: RiskBudget | None = None
        """None until the baseline is known; before, only the champion acts."""
        self.running = [Episode(counts=False) for _ in range(n_places)]
        self.n_tests = 0
        """Tests that were begun, each of which had a share of the false-promotion rate."""
        self._coin = np.random.default_rng(seed)
        self._watch: BettingDetector | None = None
        self._baseline: list[list[float]] = [[] for _ in range(n_places)]
        """Of each place, the returns that there were before the baseline is known."""
        self._n_baseline = 0
        """Episodes that ended before it, also those that do not count."""
        self._exploration_losses: list[float] = []

    @property
    def contenders(self) -> dict[str, Contender]:
        """Those that there are, by their roles."""
        challenger = None if self.challenge is None else self.challenge.challenger
        roles = {
            "champion": self.champion,
            "predecessor": self.predecessor,
            "challenger": challenger,
            "rival": self.rival,
        }
        return {role: contender for role, contender in roles.items() if contender is not None}

    @property
    def level(self) -> Level:
        """What the champion is expected to return."""
        return Level(self.champion.mean, self.rules.random_return)

    @property
    def unit(self) -> float:
        """A total loss of the champion."""
        return self.level.unit

    # Who acts

    def begin(self, place: int, offer: Callable[[], Contender | None] | None, explores: bool = False) -> Episode:
        """
        An episode begins.

        :param place: Where
        :param offer: Gives a new challenger if one is wanted; None if there is none yet
        :param explores: Whether exploring differs from serving
        :return: The episode
        """
        self._abandon(place)
        episode = self.running[place] = Episode()
        if self.budget is None and offer is not None:
            self._open_budget()
        if self.budget is None or not self._knows_champion or not self.budget.covers(self.level):
            return episode
        if self.rules.canary_envs is not None and place >= self.rules.canary_envs:
            return episode
        if self.challenge is None and offer is not None:
            challenger = offer()
            if challenger is not None:
                self.challenge = Challenge(challenger)
        elif self._has_room_for_rival and offer is not None:
            self.rival = offer()
            episode.is_rival = self.rival is not None
        if episode.is_rival:
            episode.kind = Kind.TRIAL
        elif self.challenge is not None:
            self._draw(episode, self.challenge)
        elif explores and self._coin.random() < self.rules.exploration_share and self._covers_exploration(self.budget):
            episode.kind = Kind.EXPLORE
        if episode.kind is Kind.TRIAL:
            episode.tried = self.contenders[episode.role].name
        if episode.kind is not Kind.SERVE:
            self.budget.begin(place, self.level)
        return episode

    def _open_budget(self) -> None:
        """The baseline is known as soon as there are enough rounds of it, each of one episode of every place."""
        n_rounds = min(map(len, self._baseline))
        if n_rounds * len(self._baseline) < self.rules.baseline_episodes:
            return
        # The episodes that end first are the short ones, which often are the bad ones
        first = [total for returns in self._baseline for total in returns[:n_rounds]]
        # The baseline itself may have shown that less is possible
        worst = min(self.rules.worst_return, *self.champion.returns)
        self.champion.returns = first
        self.budget = RiskBudget(self.rules.risk_budget, self.level, worst, self._n_baseline)

    @property
    def _has_room_for_rival(self) -> bool:
        challenge = self.challenge
        if challenge is None or challenge.test is None or self.rival is not None:
            return False
        return len(challenge.challenger.returns) >= challenge.n_rival

    def _abandon(self, place: int) -> None:
        """What runs here will not be finished."""
        if self.running[place].is_rival:
            self.rival = None
        if self.budget is not None:
            self.budget.abandon(place)
        if self.challenge is not None and self.challenge.test is not None and self.running[place].bet is not None:
            self._begin_test(self.challenge)

    @property
    def _knows_champion(self) -> bool:
        """Whether there are enough episodes of it to compare others with; of the first one, the baseline's are."""
        return len(self.champion.returns) >= LEAST_KNOWN or (self.predecessor is None and self.rules.controls == "concurrent")

    def _draw(self, episode: Episode, challenge: Challenge) -> None:
        if challenge.test is None:
            others = (other.actor is Kind.TRIAL for other in self.running if other is not episode)
            episode.kind = Kind.SERVE if any(others) else Kind.TRIAL
        else:
            share, challenger = self.rules.trial_share, challenge.challenger
            episode.bet = challenge.test.bet(share, self.champion.returns, challenger.returns, self.unit)
            is_trial = not challenge.test.has_coin or self._coin.random() < share
            episode.kind = Kind.TRIAL if is_trial else Kind.SERVE

    def _begin_test(self, challenge: Challenge) -> None:
        # The levels sum to the whole rate
        level = self.rules.false_promotion_rate * share_of_test(self.n_tests)
        challenge.max_episodes = self._trial_length
        if self.rules.controls == "historical":
            ties = int(self._coin.integers(2**32))
            n_left = max(1, challenge.max_episodes - len(challenge.challenger.returns))
            challenge.test = HistoricalTest(level, self.champion.returns, self.unit, n_left, ties)
        else:
            challenge.test = ConcurrentTest(level)
        self.n_tests += 1
        for episode in self.running:
            episode.bet = None

    @property
    def _champion_spread(self) -> float:
        """Standard deviation of the champion's returns, in total losses."""
        return spread_of(self.champion.returns, self.unit) / self.unit

    @property
    def _trial_length(self) -> int:
        return self.rules.max_trial_episodes or trial_length(self._champion_spread)

    def _provable_lead(self, challenge: Challenge) -> float:
        """The lead, in total losses, that the whole trial could just prove."""
        length = self._trial_length if challenge.test is None else challenge.max_episodes
        return PROVABLE * self._champion_spread * math.sqrt(1 / length + 1 / len(self.champion.returns))

    def _covers_exploration(self, budget: RiskBudget) -> bool:
        """Whether it can be paid without keeping the next challenger waiting."""
        losses = self._exploration_losses
        return budget.covers(self.level, float(np.mean(losses)) if losses else 0.0)

    @property
    def leader(self) -> Contender:
        """Who is likely the best, without proof: whom a learner may follow."""
        challenge = self.challenge
        if challenge is None or len(challenge.challenger.returns) < (1 if challenge.has_overtaken else LEAST_TO_LEAD):
            return self.champion
        challenger = challenge.challenger
        is_likely = chance_of_lead(self.champion.returns, challenger.returns, self.unit, 0.0) > LIKELY
        return challenger if is_likely else self.champion

    # What came of it

    def stop_trial(self, place: int, reason: str) -> Verdict | None:
        """
        Give up who is tried within its episode, of which the champion acts in the rest.

        :param place: Where
        :param reason: Why, such as an action that was not finite
        :return: What is decided; None if nobody is tried there any more
        """
        episode = self.running[place]
        if self.challenge is None or episode.actor is not Kind.TRIAL:
            return None
        if not episode.is_rival:
            return self._reject(self.challenge, reason)
        self._hand_back(episode)
        return self._reject_rival(self.challenge, reason)

    def end(self, place: int, total: float) -> Verdict | None:
        """
        An episode ends.

        :param place: Where
        :param total: Its return
        :return: What is decided; None if nothing. The champion acts in what is left of other running trials then
        """
        episode, challenge = self.running[place], self.challenge
        bet, episode.bet = episode.bet, None
        is_rival, episode.is_rival = episode.is_rival, False
        if self.budget is None:
            self._n_baseline += 1
        else:
            loss = self.budget.end(place, total)
            if episode.kind is Kind.EXPLORE:
                self._exploration_losses.append(loss)
        if not episode.counts or episode.kind is Kind.EXPLORE:
            self.rival = None if is_rival else self.rival
            return None
        if is_rival and challenge is not None:
            return self._judge_rival(challenge, total)
        if bet is not None:
            bet.settle(total, episode.kind is Kind.TRIAL)
        if episode.kind is Kind.TRIAL and challenge is not None:
            challenge.challenger.returns.append(total)
        elif episode.kind is Kind.SERVE:
            self.champion.returns.append(total)
            if self.budget is None:
                self._baseline[place].append(total)
            if self._watch is not None and self._watch.update(total) is not None:
                return self._demote()
        return None if challenge is None else self._judge(challenge)

    def _judge(self, challenge: Challenge) -> Verdict | None:
        challenger, champion = challenge.challenger, self.champion
        if not challenger.returns:
            return None
        if challenge.test is not None and challenge.test.is_proved and challenger.mean > champion.mean:
            return self._promote(challenge)
        worth = max(self.rules.least_lead, self._provable_lead(challenge))
        if chance_of_lead(champion.returns, challenger.returns, self.unit, worth) < self.rules.futility:
            return self._reject(challenge, "hopeless")
        if challenge.test is not None and len(challenger.returns) >= challenge.max_episodes:
            return self._reject(challenge, "undecided")
        if challenge.test is None:
            self._begin_test(challenge)
        return None

    def _judge_rival(self, challenge: Challenge, total: float) -> Verdict:
        rival, challenger = self.rival, challenge.challenger
        assert rival is not None
        rival.returns.append(total)
        if chance_of_lead(challenger.returns, rival.returns, self.unit, self.rules.least_lead) <= LIKELY:
            return self._reject_rival(challenge, "behind the challenger")
        self.rival = None
        verdict = self._reject(challenge, f"overtaken by the policy of step {rival.name:,}", is_failure=False)
        self.challenge = Challenge(rival, has_overtaken=True)
        self._begin_test(self.challenge)
        return verdict

    # Decisions

    @staticmethod
    def _hand_back(episode: Episode) -> None:
        episode.counts, episode.is_handed_back, episode.is_rival = False, True, False

    def _end_challenge(self) -> None:
        """The challenger acts no more; a rival whose episode is running is the next one."""
        self.challenge = None if self.rival is None else Challenge(self.rival)
        self.rival = None
        for episode in self.running:
            if episode.is_rival:
                episode.is_rival = False
            elif episode.kind is Kind.TRIAL:
                self._hand_back(episode)

    def _enthrone(self, champion: Contender, predecessor: Contender | None) -> None:
        # Of the rival nobody knows whether it is better than this one
        self.rival = None
        for episode in self.running:
            episode.counts = episode.is_rival = False
        self._end_challenge()
        self.champion, self.predecessor, self._watch = champion, predecessor, None
        known = [] if predecessor is None else predecessor.returns
        if len(known) >= LEAST_KNOWN and len({*known}) > 1:
            self._watch = BettingDetector(self.rules.false_promotion_rate, WATCH_HORIZON)
            self._watch.calibrate(known)

    def _promote(self, challenge: Challenge) -> Verdict:
        before, new = self.champion, challenge.challenger
        self._enthrone(new, before)
        return Verdict("promotion", f"mean return {new.mean:.1f} against {before.mean:.1f}", new, before)

    def _reject(self, challenge: Challenge, reason: str, is_failure: bool = True) -> Verdict:
        self._end_challenge()
        return Verdict("rejection", reason, challenge.challenger, self.champion, is_failure)

    def _reject_rival(self, challenge: Challenge, reason: str) -> Verdict:
        rival, self.rival = self.rival, None
        assert rival is not None
        challenge.n_rival = 2 * len(challenge.challenger.returns)
        return Verdict("rejection", reason, rival, self.champion)

    def _demote(self) -> Verdict:
        fallen, predecessor = self.champion, self.predecessor
        assert predecessor is not None
        self._enthrone(predecessor, None)
        return Verdict("demotion", "its episodes have become worse than its predecessor's", fallen, fallen)

    # Files

    def state_dict(self) -> dict[str, Any]:
        """
        The state in the form of JSON, without policies. Episodes that are running will not be finished: those at risk are
        charged their worst case, and a test begins anew, since which episodes are cut off may depend on who acts.
        """
        budget, challenge = self.budget, self.challenge
        return {
            "contenders": {
                role: {"name": one.name, "returns": one.returns} if (one := self.contenders.get(role)) else None
                for role in ("champion", "predecessor", "challenger")
            },
            "challenge": None
            if challenge is None
            else {n: getattr(challenge, n) for n in ("has_overtaken", "n_rival", "max_episodes")},
            "budget": None if budget is None else budget.state_dict(),
            "n_tests": self.n_tests,
            "baseline": self._baseline if budget is None else None,
            "n_baseline": self._n_baseline,
            "exploration_losses": self._exploration_losses,
            "coin": self._coin.bit_generator.state,
            "watch": None if self._watch is None else arrays_to_json(self._watch.state_dict()),
        }

    def run_state(self) -> dict[str, Any]:
        """The state as it is, running episodes and their bets included, as plain values and arrays, without policies."""
        test = None if self.challenge is None else self.challenge.test
        kept = None if test is None else test.state_dict()
        budget = None if self.budget is None else self.budget.run_state()
        bets: list[Any] = [] if test is None else list(test.open_bets)
        running = [
            {
                "kind": episode.kind.value,
                "bet": next((place for place, bet in enumerate(bets) if bet is episode.bet), None),
                "counts": episode.counts,
                "is_handed_back": episode.is_handed_back,
                "is_rival": episode.is_rival,
                "tried": episode.tried,
            }
            for episode in self.running
        ]
        whole = {"whole_budget": budget, "test": kept, "running": running}
        return self.state_dict() | {"budget": None, **whole, "rival": None if self.rival is None else self.rival.name}

    def load_run_state(self, state: dict[str, Any], policies: dict[str, Any]) -> None:
        """Go on from what :meth:`run_state` returned, with the policies of its contenders."""
        contenders = state["contenders"]
        # Without a challenger that has episodes no test is begun; its own is taken up below
        self.load_state_dict(state | {"contenders": contenders | {"challenger": None}}, policies)
        self.budget = None if state["whole_budget"] is None else RiskBudget.from_run_state(state["whole_budget"])
        self.challenge = None
        if (facts := contenders["challenger"]) is not None:
            challenger = Contender(facts["name"], policies["challenger"], list(facts["returns"]))
            # Before there were rivals, nothing was written of them
            self.challenge = Challenge(challenger, self._test_of(state["test"]), **state.get("challenge") or {})
        self.rival = None if state.get("rival") is None else Contender(state["rival"], policies["rival"])
        test = None if self.challenge is None else self.challenge.test
        bets: list[Any] = [] if test is None else list(test.open_bets)
        self.running = [
            Episode(**one | {"kind": Kind(one["kind"]), "bet": None if one["bet"] is None else bets[one["bet"]]})
            for one in state["running"]
        ]

    def _test_of(self, state: dict[str, Any] | None) -> PromotionTest | None:
        if state is None:
            return None
        test: PromotionTest
        if self.rules.controls == "historical":
            test = HistoricalTest(state["level"], self.champion.returns, self.unit, state["max_episodes"])
        else:
            test = ConcurrentTest(state["level"])
        test.load_state_dict(state)
        return test

    def load_state_dict(self, state: dict[str, Any], policies: dict[str, Any]) -> None:
        """
        Go on from a state.

        :param state: What :meth:`state_dict` returned
        :param policies: The policies of ``"champion"``, and of ``"predecessor"`` and ``"challenger"`` where there are any
        """
        contenders = {
            role: None if facts is None else Contender(facts["name"], policies[role], list(facts["returns"]))
            for role, facts in state["contenders"].items()
        }
        champion, challenger = contenders["champion"], contenders["challenger"]
        assert champion is not None
        self.champion, self.predecessor = champion, contenders["predecessor"]
        # Before there were rivals, nothing was written of them
        self.challenge = None if challenger is None else Challenge(challenger, **state.get("challenge") or {})
        self.rival = None
        self.budget = None if state["budget"] is None else RiskBudget.from_state_dict(state["budget"])
        self.n_tests, self._n_baseline = state["n_tests"], state["n_baseline"]
        if state["baseline"] is not None and len(state["baseline"]) == len(self.running):
            self._baseline = [list(returns) for returns in state["baseline"]]
        self._exploration_losses = list(state["exploration_losses"])
        self._coin.bit_generator.state = state["coin"]
        if self.challenge is not None and self.challenge.challenger.returns:
            self._begin_test(self.challenge)
        self._watch = None
        if state["watch"] is not None:
            self._watch = BettingDetector(self.rules.false_promotion_rate, WATCH_HORIZON)
            self._watch.load_state_dict(arrays_from_json(state["watch"]))
        self.running = [Episode(counts=False) for _ in self.running]
