"""How a contest tells what happens."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.events import Event, EventLog
from sb3_offline_ft.collapse.reporting import start_log
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.deployment.contest import Contest, Episode, Kind, Verdict

EVENTS_FILE = "deployment_events.jsonl"
SERVED_WINDOW = 10
"""Episodes that the logged served return is the mean of."""
NORMAL_95 = 1.96


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
        self._knew_baseline = any(event["event"] == "baseline" for event in self.log.events)

    def event(self, name: str, **details: Any) -> None:
        place = {"timestep": self._model.num_timesteps, "n_updates": self._model._n_updates, "time": time.time()}
        self.log.append({"event": name, **place, **details})

    def say(self, message: str, level: int = 1) -> None:
        if self._verbose >= level:
            print(f"ChampionChallenger: {message}")

    def warn(self, message: str) -> None:
        self.event("warning", message=message)
        warn(f"ChampionChallenger: {message}")

    def episode(self, place: int, episode: Episode, total: float, length: int, contest: Contest) -> None:
        """Tell of an episode that has ended."""
        budget, challenge = contest.budget, contest.challenge
        if budget is not None and not self._knew_baseline:
            self._tell_baseline(contest)
        test = None if challenge is None else challenge.test
        facts = {
            "kind": episode.kind.value,
            "env": place,
            "return": total,
            "length": length,
            "counts": episode.counts,
            "champion": contest.champion.name,
            "challenger": None if challenge is None else challenge.challenger.name,
            "evidence": None if test is None else test.log_evidence,
            "needed": None if test is None else test.log_threshold,
        }
        self.event("episode", **facts, **({} if budget is None else {"balance": budget.balance, "lost": budget.lost}))
        if budget is not None and episode.kind is not Kind.SERVE and total < contest.rules.worst_return:
            self._tell_below_worst(total, contest)
        self._record(contest)

    def _record(self, contest: Contest) -> None:
        logger, budget = self._model.logger, contest.budget
        episodes = [event for event in self.log.events[-20 * SERVED_WINDOW :] if event["event"] == "episode"]
        served = [event["return"] for event in episodes if event["kind"] == Kind.SERVE.value][-SERVED_WINDOW:]
        if served:
            logger.record("deployment/served_return", float(np.mean(served)))
        logger.record("deployment/champion_return", contest.champion.mean)
        if budget is not None:
            logger.record("deployment/budget_left", budget.balance)
            logger.record("deployment/shortfall", budget.lost)
        for name in ("promotion", "rejection", "demotion"):
            logger.record(f"deployment/{name}s", sum(event["event"] == name for event in self.log.events))

    def _tell_baseline(self, contest: Contest) -> None:
        self._knew_baseline = True
        budget, rules = contest.budget, contest.rules
        assert budget is not None
        first = contest.champion
        error = NORMAL_95 * first.standard_error
        self.event(
            "baseline",
            mean=budget.baseline.expected,
            standard_error=first.standard_error,
            n=len(first.returns),
            random_return=rules.random_return,
            worst_return=rules.worst_return,
        )
        self.say(
            f"baseline of {len(first.returns)} episodes: mean return {budget.baseline.expected:.1f}, 95 % interval "
            f"{budget.baseline.expected - error:.1f} to {budget.baseline.expected + error:.1f}; an episode may cost "
            f"{rules.risk_budget:g} of the distance to {rules.random_return:g} on average."
        )

    def _tell_below_worst(self, total: float, contest: Contest) -> None:
        budget = contest.budget
        assert budget is not None
        self.event("below_worst", **{"return": total}, worst_return=contest.rules.worst_return, balance=budget.balance)
        debt = f"The budget is in debt by {-budget.balance:.2f} until it is repaid. " if budget.balance < 0 else ""
        self.warn(
            f"An episode returned {total:.1f}, less than `worst_return={contest.rules.worst_return:g}`, on which the promise "
            f"rests. {debt}Give a lower one."
        )

    def verdict(self, verdict: Verdict, contest: Contest) -> None:
        """Tell of a decision."""
        one = verdict.contender
        facts = {"contender": one.name, "returns": one.returns, "mean": one.mean, "champion_mean": verdict.champion.mean}
        self.event(verdict.kind, reason=verdict.reason, champion=contest.champion.name, **facts)
        words = {"promotion": "is the champion now", "rejection": "is given up", "demotion": "is champion no more"}
        n, level = len(one.returns), 2 if verdict.kind == "rejection" else 1
        self.say(f"the policy of step {one.name} {words[verdict.kind]} after {n} episodes: {verdict.reason}.", level)

    def end(self, contest: Contest) -> None:
        """Tell the end of a run."""
        events: list[Event] = self.log.events
        counts = {name: sum(event["event"] == name for event in events) for name in ("promotion", "rejection", "demotion")}
        budget, champion = contest.budget, contest.champion
        self.event("end", champion=champion.name, mean=champion.mean, **counts)
        if budget is None and contest.rules.risk_budget > 0:
            self.say(
                f"nothing was tried: {len(champion.returns)} whole episodes were served before the end, expected at least "
                f"{contest.rules.baseline_episodes} (`baseline_episodes`) and updates of the learner after them."
            )
