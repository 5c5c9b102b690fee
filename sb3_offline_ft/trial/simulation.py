"""Simulated trials: the machine and the decisions that will run, on made-up episodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sb3_offline_ft.trial.assignment import CANDIDATE
from sb3_offline_ft.trial.comparison import Array
from sb3_offline_ft.trial.decision import Decision, decide, review
from sb3_offline_ft.trial.evidence import Evidence
from sb3_offline_ft.trial.machine import Finished, TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan

Episodes = Mapping[str, Array]
"""Of each metric, what each episode would give: shape ``(episodes, 2)``, of the baseline and of the candidate."""
Draw = Callable[[np.random.Generator, int], Episodes]
"""Makes so many episodes."""


@dataclass(frozen=True)
class SimulatedTrial:
    """
    What came of a trial.

    :param decision: Its decision
    :param machine: Its end
    """

    decision: Decision
    machine: TrialMachine

    @property
    def is_stopped(self) -> bool:
        """Whether "worse: stop now" fired."""
        return self.decision.deterioration_p <= self.machine.plan.error_rates.false_stop


def simulate_trial(plan: TrialPlan, episodes: Episodes) -> SimulatedTrial:
    """
    Run a trial until it is decided or at its end.

    :param plan: The plan
    :param episodes: At least as many as the trial takes
    :return: The decision, and the trial at its end
    """
    machine, deterioration = TrialMachine(plan), Evidence(plan, []).deterioration()
    while not isinstance(upcoming := machine.next(), Finished):
        column = int(upcoming.arm == CANDIDATE)
        metrics = {name: float(values[upcoming.episode, column]) for name, values in episodes.items()}
        machine.apply({"event": "assignment", **vars(upcoming)})
        machine.apply({"event": "episode", "episode": upcoming.episode, "metrics": metrics})
        if upcoming.block is not None:
            value = plan.sign(plan.primary.metric) * metrics[plan.primary.metric]
            deterioration.take(value, upcoming.arm == CANDIDATE, upcoming.share)
        if (decision := review(plan, machine, deterioration)) is not None:
            return SimulatedTrial(decision, machine)
    return SimulatedTrial(decide(plan, machine, deterioration), machine)


@dataclass(frozen=True)
class Outcomes:
    """
    How many of many trials ended how.

    :param trials: All
    :param go: With a go
    :param no_go: With a no-go
    :param stopped: Because the candidate was found to be worse
    :param episodes: Mean number of episodes
    """

    trials: int
    go: int
    no_go: int
    stopped: int
    episodes: float


def simulate(plan: TrialPlan, draw: Draw, n_trials: int, seed: int = 0) -> Outcomes:
    """
    Run many trials, each with an order of arms of its own.

    :param plan: The plan
    :param draw: Makes the episodes of a trial
    :param n_trials: Number of trials
    :param seed: Seed of all of them
    :return: How they ended
    """
    go = no_go = stopped = episodes = 0
    for trial in range(n_trials):
        rng = np.random.default_rng([seed, trial])
        planned = replace(plan, seed=int(rng.integers(2**31)))
        # Before the account of what is at risk opens, the baseline may act in a few more
        n = plan.budget + sum(stage.episodes for stage in plan.stages if stage.kind == "shadow") + 10
        end = simulate_trial(planned, draw(rng, n))
        go += end.decision.decision == "go"
        no_go += end.decision.decision == "no-go"
        stopped += end.is_stopped
        episodes += len(end.machine.episodes)
    return Outcomes(n_trials, go, no_go, stopped, episodes / n_trials)
