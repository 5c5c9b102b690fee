"""Who acts in an episode of a trial, and how the baseline takes over."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sb3_offline_ft.controllers import Controller
from sb3_offline_ft.trial.actuators import ActionLog, Actuators
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm, Assignment
from sb3_offline_ft.trial.shadow import ShadowLog

CANDIDATES_FAILURES = (Exception, SystemExit)
"""Whatever a candidate raises, the baseline can act; Ctrl-C is not the candidate's."""


@dataclass
class Takeover:
    """
    The baseline takes over.

    :param step: The first step that is the baseline's, counted from 0
    :param reason: Why
    :param is_drill: Whether it was on purpose
    """

    step: int
    reason: str
    is_drill: bool = False
    seconds: float | None = None
    """From when it was decided until the baseline's action was there; None if no step was left."""
    n_after: int = 0
    """Steps in which the baseline has acted since."""
    _decided: float = field(default_factory=time.perf_counter)

    def count(self) -> None:
        """The baseline's action for a step is there."""
        if self.seconds is None:
            self.seconds = time.perf_counter() - self._decided
        self.n_after += 1


class Pilot:
    """
    Decides the actions of an episode. While the candidate acts, the baseline computes along, so that it knows all that a
    policy with a memory has to know when it takes over.

    :param assignment: Who is to act; in the stage ``shadow``, the candidate computes along
    :param controllers: Both policies
    :param actuators: What takes the actions
    """

    def __init__(self, assignment: Assignment, controllers: Mapping[Arm, Controller], actuators: Actuators) -> None:
        self._arm, self._actuators = assignment.arm, actuators
        self._baseline, self._candidate = controllers[BASELINE], controllers[CANDIDATE]
        self.log = ActionLog(actuators)
        """Of the policy that is to act, as long as it does."""
        self.shadow = ShadowLog(actuators) if assignment.kind == "shadow" else None
        self.takeover: Takeover | None = None
        self.steps: dict[str, int] = {BASELINE: 0, CANDIDATE: 0}
        """In which each has acted."""

    def reset(self, seed: int) -> None:
        """
        Begin the episode.

        :param seed: Seed of policies that draw numbers
        :raises ValueError: The baseline cannot begin
        """
        try:
            self._baseline.reset(seed)
        except Exception as error:
            raise ValueError(f"The baseline {self._baseline.name!r} cannot begin: {_failure(error)}.") from error
        try:
            self._candidate.reset(seed)
        except CANDIDATES_FAILURES as error:
            self.take_over(0, f"the candidate cannot begin: {_failure(error)}")
            if self.shadow is not None:
                self.shadow.faults[_failure(error)] += 1

    @property
    def actor(self) -> Arm:
        """Who acts now."""
        return BASELINE if self.takeover is not None else self._arm

    def take_over(self, step: int, reason: str, is_drill: bool = False) -> None:
        """Let the baseline act from this step on, if it does not act already."""
        if self.actor == CANDIDATE:
            self.takeover = Takeover(step, reason, is_drill)

    def act(self, observation: Any, step: int) -> Any:
        """
        :param observation: The present one
        :param step: Number of the step
        :return: The action to send
        :raises ValueError: The baseline failed, or its action is to be sent and cannot be
        """
        action = self._candidates_action(observation, step) if self.actor == CANDIDATE else None
        standby = self._baselines_action(observation, step)
        if self.actor == BASELINE:
            action = standby
            if (fault := self._actuators.fault(action)) is not None:
                raise ValueError(f"The baseline {self._baseline.name!r} cannot act in step {step}: {fault}.")
        if self.takeover is None:
            self.log.add(action)
        else:
            self.takeover.count()
        if self.shadow is not None:
            self._compute_along(self.shadow, observation, action)
        self.steps[self.actor] += 1
        return self._actuators.command(action)

    def _baselines_action(self, observation: Any, step: int) -> Any:
        try:
            if self._arm == BASELINE:
                return self.log.timed(self._baseline.act, observation)
            return self._baseline.act(observation)
        except Exception as error:
            raise ValueError(f"The baseline {self._baseline.name!r} cannot act in step {step}: {_failure(error)}.") from error

    def _candidates_action(self, observation: Any, step: int) -> Any:
        action, fault = self._try_candidate(self.log, observation)
        if fault is not None:
            self.take_over(step, f"the candidate cannot act: {fault}")
        return action

    def _compute_along(self, shadow: ShadowLog, observation: Any, acted: Any) -> None:
        action, fault = self._try_candidate(shadow, observation)
        if fault is None:
            shadow.compare(action, acted)
        else:
            shadow.faults[fault] += 1

    def _try_candidate(self, log: ActionLog, observation: Any) -> tuple[Any, str | None]:
        """Its action, and what is wrong with it."""
        try:
            # It may write into what it gets, which can be the environment's own state
            action = log.timed(self._candidate.act, copy.deepcopy(observation))
            return action, self._actuators.fault(action)
        except CANDIDATES_FAILURES as error:
            return None, _failure(error)


def _failure(error: BaseException) -> str:
    return f"it failed with {type(error).__name__}: {error}"
