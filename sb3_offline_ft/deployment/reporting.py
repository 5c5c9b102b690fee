"""How a contest tells what happens."""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.events import Event, EventLog
from sb3_offline_ft.collapse.reporting import start_log
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.budget import RiskBudget
from sb3_offline_ft.deployment.contest import Contest
from sb3_offline_ft.deployment.history import DECISIONS, EVENTS_FILE, cost_words, counted, level_words, lived, mean_interval
from sb3_offline_ft.deployment.roles import Challenge, Contender, Episode, Kind, Verdict

SERVED_WINDOW = 10
"""Episodes that the logged served return is the mean of."""

Then = tuple[Mapping[str, Contender], Challenge | None]
"""The contenders and the challenge while an episode ran, before anything was decided."""


class Reporter:
    """
    Writes events into a log of events, values into that of SB3, warns, and prints.

    :param model: The learner
    :param folder: Where the events are written; None for memory only
    :param verbose: As of the callback
    :param resume: Whether the run goes on
    """

    def __init__(self, model: OffPolicyAlgorithm, folder: Path | None, verbose: int, resume: bool) -> None:
        self._model, self._verbose = model, verbose
        self.log: EventLog = start_log(folder, resume, EVENTS_FILE)
        self._counts: Counter[str] = Counter()
        self._served: deque[float] = deque(maxlen=SERVED_WINDOW)
        self._knows_baseline = False
        # Episodes after the checkpoint that a run goes on from have been left behind
        for event in lived([*self.log.events, {"event": "start", "timestep": model.num_timesteps}])[:-1]:
            self._count(event)

    def _count(self, event: Event) -> None:
        self._counts[event["event"]] += 1
        if event["event"] == "episode" and event["kind"] == Kind.SERVE.value:
            self._served.append(event["return"])

    def state_dict(self) -> dict[str, Any]:
        """What has been told, as plain values."""
        told = {"counts": dict(self._counts), "served": list(self._served), "knows_baseline": self._knows_baseline}
        return told | {"log": self.log.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._counts, self._served = Counter(state["counts"]), deque(state["served"], SERVED_WINDOW)
        self._knows_baseline = state["knows_baseline"]
        self.log.load_state_dict(state["log"])

    def event(self, name: str, **details: Any) -> None:
        place = {"timestep": self._model.num_timesteps, "n_updates": self._model._n_updates, "time": time.time()}
        event = {"event": name, **place, **details}
        self.log.append(event)
        self._count(event)

    def say(self, message: str, level: int = 1) -> None:
        if self._verbose >= level:
            print(f"ChampionChallenger: {message}")

    def warn(self, message: str) -> None:
        self.event("warning", message=message)
        warn(f"ChampionChallenger: {message}")

    def start(self, contest: Contest, settings: dict[str, Any], explores: bool, resumed: bool) -> None:
        """Tell the beginning of a run, or that it goes on."""
        self._knows_baseline = contest.budget is not None
        algorithm, n_envs = type(self._model).__name__, self._model.n_envs
        self.event("start", algorithm=algorithm, n_envs=n_envs, resumed=resumed, explores=explores, settings=settings)
        if not explores and not resumed and contest.rules.risk_budget > 0:
            message = (
                "nothing will be explored but by challengers: the policy is deterministic and there is no action noise. Give "
                "the learner an `action_noise` if its data shall vary."
            )
            self.event("warning", message=message)
            self.say(message)

    def baseline(self, contest: Contest) -> None:
        """Tell the baseline, once, before the first episode that is paid from the budget."""
        budget, rules, first = contest.budget, contest.rules, contest.champion
        if budget is None or self._knows_baseline:
            return
        self._knows_baseline = True
        low, high = mean_interval(first.returns)
        level = {"mean": budget.baseline.expected, "standard_error": first.standard_error, "low": low, "high": high}
        worst = {"random_return": rules.random_return, "worst_return": budget.worst_return}
        self.event("baseline", **level, n=len(first.returns), **worst)
        self.say(
            f"the baseline is known: mean return {level_words(first.returns)}. Trials and explorations may cost an episode of "
            f"the run {rules.risk_budget:g} of the distance to {rules.random_return:g} on average."
        )

    def challenge(self, challenger: Contender, contest: Contest) -> None:
        """Tell that a policy challenges the champion."""
        self.baseline(contest)
        self.event("challenge", challenger=challenger.name)
        champion = contest.champion
        self.say(f"the policy of step {challenger.name:,} challenges that of step {champion.name:,} ({champion.mean:.1f}).", 2)

    def episode(self, place: int, episode: Episode, total: float, length: int, contest: Contest, then: Then) -> None:
        """Tell of an episode that has ended."""
        budget, (contenders, challenge) = contest.budget, then
        challenger = None if challenge is None else challenge.challenger.name
        test = None if challenge is None or episode.tried not in (None, challenger) else challenge.test
        facts = {
            "kind": episode.kind.value,
            "env": place,
            "return": total,
            "length": length,
            "counts": episode.counts,
            "champion": contenders["champion"].name,
            "challenger": challenger if episode.tried is None else episode.tried,
            "evidence": None if test is None else test.evidence,
            "needed": None if test is None else test.threshold if math.isfinite(test.threshold) else None,
        }
        if budget is not None:
            facts |= {"allowance": budget.allowance, "balance": budget.balance, "lost": budget.lost}
        self.event("episode", **facts)
        if budget is not None and episode.kind is not Kind.SERVE and total < budget.worst_return:
            self._tell_below_worst(total, budget)
        self._record(contest)

    def _record(self, contest: Contest) -> None:
        logger, budget = self._model.logger, contest.budget
        if self._served:
            logger.record("deployment/served_return", float(np.mean(self._served)))
        if contest.champion.returns:
            logger.record("deployment/champion_return", contest.champion.mean)
        if budget is not None:
            logger.record("deployment/allowance", budget.allowance)
            logger.record("deployment/budget_left", budget.balance)
            logger.record("deployment/shortfall", budget.lost)
        for name in DECISIONS:
            logger.record(f"deployment/{name}s", self._counts[name])

    def _tell_below_worst(self, total: float, budget: RiskBudget) -> None:
        self.event("below_worst", **{"return": total}, worst_return=budget.worst_return, balance=budget.balance)
        debt = f"The budget is in debt by {-budget.balance:.2f} until it is repaid. " if budget.balance < 0 else ""
        self.warn(
            f"An episode returned {total:.1f}, less than `worst_return={budget.worst_return:g}`, on which the promise "
            f"rests. {debt}Give a lower one."
        )

    def verdict(self, verdict: Verdict, contest: Contest) -> None:
        """Tell of a decision."""
        one, before = verdict.contender, verdict.champion
        facts = {"contender": one.name, "returns": one.returns, "mean": one.mean, "champion_mean": before.mean}
        self.event(verdict.kind, reason=verdict.reason, champion=contest.champion.name, **facts)
        who, level = f"the policy of step {one.name:,}", level_words(one.returns)
        if verdict.kind == "promotion":
            self.say(f"{who} is champion now: mean return {level} against {level_words(before.returns)} before.")
        elif verdict.kind == "rejection":
            self.say(f"{who} is given up, {verdict.reason}: mean return {level} against {before.mean:.1f}.", 2)
        else:
            successor = f"the policy of step {contest.champion.name:,} serves again"
            self.say(f"{who} is champion no more, {verdict.reason}: mean return {level}; {successor}.")

    def end(self, contest: Contest) -> None:
        """Tell the end of a run."""
        budget, champion = contest.budget, contest.champion
        counts = {name: self._counts[name] for name in DECISIONS}
        self.event("end", champion=champion.name, mean=champion.mean, **counts)
        if budget is not None:
            decisions = ", ".join(counted(n, f"{name}s") for name, n in counts.items())
            self.say(f"{decisions}; trials and explorations {cost_words(budget.lost, budget.allowance)}.")
        elif contest.rules.risk_budget > 0:
            self.say(
                f"nothing was tried: {len(champion.returns)} whole episodes were served before the end, expected at least "
                f"{contest.rules.baseline_episodes} (`baseline_episodes`) and updates of the learner after them."
            )
