"""The state of a trial, rebuilt from its events: who acts next, what was measured. It knows no environment and no file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sb3_offline_ft.deployment.budget import Level, RiskBudget
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm, Assignment, Slot, schedule
from sb3_offline_ft.trial.plan import PLAN_FILE, RETURN, TrialPlan, kind_of
from sb3_offline_ft.trial.reading import parse_plan

ABORTED = "aborted"
"""Why an episode is excluded in which the baseline took over."""
DRILL = "drill"
"""Why the episode of a rollback drill is excluded."""
MISSING = "missing"
BASELINE_EPISODES = 3
"""Returns of the baseline that must be known before the candidate may act, if the plan does not say what it returns."""
UNKNOWN = (
    f"What is at risk is known after {BASELINE_EPISODES} returns of the baseline, which acts until then. Not part of the "
    "comparison."
)


DETAILS = ("steps", "seconds", "regime", "shadow", "travel", "violations", "acted", "time")
"""What an event says of an episode besides its metrics."""


@dataclass(frozen=True)
class EpisodeRecord:
    """
    What came of an episode.

    :param assignment: Who was to act, and why
    :param metrics: Values of the metrics by name, None where one is missing
    :param steps: Number of steps, if known
    :param seconds: Duration, if known
    :param excluded: Why it is not part of the comparison; None if nothing speaks against it
    :param regime: The operating regime, if named
    :param shadow: What a candidate that did not act would have done
    :param travel: What the actuators did
    :param violations: How limits were crossed, by their sources
    :param acted: Steps in which each policy acted
    :param time: When it was recorded, as the journal says
    """

    assignment: Assignment
    metrics: Mapping[str, float | None]
    steps: int | None = None
    seconds: float | None = None
    excluded: str | None = None
    regime: str | None = None
    shadow: Mapping[str, Any] | None = None
    travel: Mapping[str, Any] | None = None
    violations: Mapping[str, Any] | None = None
    acted: Mapping[str, int] | None = None
    time: str | None = None

    @property
    def episode(self) -> int:
        """Its number."""
        return self.assignment.episode

    @property
    def arm(self) -> Arm:
        """Who acted, at first if the baseline took over."""
        return self.assignment.arm

    @property
    def stage(self) -> str:
        """Name of its stage."""
        return self.assignment.stage

    @property
    def block(self) -> int | None:
        """Number of its block, None if it is not part of the comparison."""
        return self.assignment.block

    @property
    def share(self) -> float:
        """Probability that the candidate got it."""
        return self.assignment.share

    @property
    def is_compared(self) -> bool:
        """Whether it is part of the comparison, as a measured episode."""
        return self.block is not None and self.excluded is None

    @property
    def is_aborted(self) -> bool:
        """Whether the baseline took over."""
        return self.excluded == ABORTED

    @property
    def is_missing(self) -> bool:
        """Whether it was assigned and never recorded."""
        return self.excluded is not None and self.excluded.startswith(MISSING)


@dataclass(frozen=True)
class Finished:
    """
    There is no next episode.

    :param reason: Why, in words
    :param awaits_go: Whether there would be one after a go, in the stage ``full``
    :param is_cut: Whether the trial ended before the stages did
    """

    reason: str
    awaits_go: bool = False
    is_cut: bool = False


@dataclass
class TrialBudget(RiskBudget):
    """
    A risk budget that is granted as a whole before the start: a trial has a planned end.

    :param n_planned: The largest number of episodes of the trial
    """

    n_planned: int = 0

    @property
    def allowance(self) -> float:
        """What all episodes at risk together may lose."""
        return self.share * self.n_planned


@dataclass
class _Place:
    """Where the trial is: index of the stage, and of the next slot in it."""

    stage: int = 0
    slot: int = 0


@dataclass
class TrialMachine:
    """
    The state machine of a trial. The same events give the same state.

    An episode is assigned, and then recorded; only then the next one is assigned. Stages follow each other by themselves, but
    for ``full``, which needs a decision for go. A go ends the comparison, a no-go or a stop the trial.

    While the candidate may act, its worst case must be within the risk budget; where it is not, the trial is over. As long as
    it is not known what the baseline returns, the baseline acts, and these episodes are not part of the comparison.

    :param plan: The plan
    """

    plan: TrialPlan
    episodes: list[EpisodeRecord] = field(default_factory=list)
    """All that were assigned and are over, in order."""
    aborts: list[Mapping[str, Any]] = field(default_factory=list)
    """Events of aborts of the candidate, without those of drills."""
    drills: list[Mapping[str, Any]] = field(default_factory=list)
    """Events of drills."""
    robustness: Mapping[str, Any] | None = None
    """The event of the last try of both policies in changed environments."""
    open: Assignment | None = None
    """The episode under way."""
    decision: str | None = None
    """The last decision that was written down."""
    stopped: str | None = None
    """Why the trial was stopped, None while it may go on."""
    risk: TrialBudget | None = None
    """The account of what the candidate's episodes have lost; None until one began, and if the plan has no ``risk``."""
    _place: _Place = field(default_factory=_Place)
    _schedules: dict[int, list[Slot]] = field(default_factory=dict, compare=False, repr=False)

    def apply(self, event: Mapping[str, Any]) -> None:
        """
        Take an event of the journal; kinds that change nothing are ignored.

        :param event: The event
        :raises ValueError: It cannot follow what was before
        """
        match event["event"]:
            case "assignment":
                self._assign(event)
            case "episode":
                self._record(event, event["metrics"], event.get("excluded"))
            case "missing":
                self._record(event, {}, f"{MISSING}: {event['reason']}")
            case "abort":
                # Whoever stops an episode of the baseline says nothing against the candidate
                if self.open is None or self.open.arm == CANDIDATE:
                    self.aborts.append(event)
            case "robustness":
                self.robustness = event
            case "drill":
                self.drills.append(event)
            case "decision":
                self._decide(event["decision"], event["reasons"])
            case "stop":
                self.stopped = event["reason"]
            case "amendment":
                self._amend(event)

    def next(self) -> Assignment | Finished:
        """
        :return: The episode under way, or the one to assign next; :class:`Finished` if there is none
        """
        if self.open is not None:
            return self.open
        if self.stopped is not None:
            return Finished(f"The trial was stopped: {self.stopped}", is_cut=True)
        place = self._place
        if place.stage == len(self.plan.stages):
            return Finished("All stages are done.")
        stage = self.plan.stages[place.stage]
        if stage.kind == "full" and self.decision != "go":
            return Finished(f"The comparison is done; the stage {stage.name!r} needs a decision for go.", awaits_go=True)
        if stage.kind != "shadow" and len(self.episodes) >= self.plan.budget <= self.n_counted:
            return Finished(f"The budget of {self.plan.budget} episodes is used up.", is_cut=True)
        slot = self._slots(place.stage)[place.slot]
        if slot.share > 0 and self.plan.risk is not None:
            if (risk := self._risk_now()) is None:
                return self._assignment(stage.name, BASELINE, 0.0, UNKNOWN)
            if not risk.covers(risk.baseline):
                return Finished(_too_risky(risk), is_cut=True)
        why = {
            "shadow": "The candidate computes its actions, and the baseline acts.",
            "full": "The candidate acts in all episodes, watched.",
        }.get(stage.kind)
        why = why or f"Block {slot.block}, episode {slot.position + 1} of {slot.size}, in an order that was drawn."
        return self._assignment(stage.name, slot.arm, slot.share, why, slot.block, place.slot)

    def drill(self) -> Assignment | Finished:
        """
        :return: An episode of the candidate for a rollback drill, besides those of the stage; :class:`Finished` if there is no
            next episode, or the risk budget does not cover it
        """
        upcoming = self.next()
        if isinstance(upcoming, Finished):
            return upcoming
        if self.open is not None:
            return Finished("An episode is under way: record it first.")
        risk = self._risk_now()
        if risk is None and self.plan.risk is not None:
            return Finished(f"There can be no drill yet. {UNKNOWN}")
        if risk is not None and not risk.covers(risk.baseline):
            return Finished(_too_risky(risk), is_cut=True)
        return self._assignment(upcoming.stage, CANDIDATE, 1.0, "Rollback drill: the baseline takes over on purpose.")

    @property
    def stage(self) -> str | None:
        """Name of the stage of the next episode, None after the last."""
        stages = self.plan.stages
        return stages[self._place.stage].name if self._place.stage < len(stages) else None

    @property
    def begun_stages(self) -> int:
        """How many stages have begun."""
        last = self.open or (self.episodes[-1].assignment if self.episodes else None)
        return 0 if last is None else 1 + [stage.name for stage in self.plan.stages].index(last.stage)

    @property
    def n_counted(self) -> int:
        """How many episodes count against ``budget.episodes``: those of the stages, not those besides, such as drills."""
        return sum(kind_of(one.stage) != "shadow" and one.assignment.slot is not None for one in self.episodes)

    @property
    def is_compared_fully(self) -> bool:
        """Whether all episodes of the comparison are over."""
        stages = self.plan.stages[self._place.stage :]
        return self.open is None and not any(stage.compares for stage in stages)

    def _slots(self, stage: int) -> list[Slot]:
        if stage not in self._schedules:
            self._schedules[stage] = schedule(self.plan, stage)
        return self._schedules[stage]

    def _assignment(
        self, stage: str, arm: Arm, share: float, why: str, block: int | None = None, slot: int | None = None
    ) -> Assignment:
        return Assignment(len(self.episodes), stage, arm, share, block, slot, why)

    def _risk_now(self) -> TrialBudget | None:
        """The account; None if it cannot be opened yet."""
        plan = self.plan.risk
        if plan is None or self.risk is not None:
            return self.risk
        returns = [record.metrics.get(RETURN) for record in self.episodes if record.arm == BASELINE]
        known = [value for value in returns if value is not None]
        expected = plan.baseline_return
        if expected is None and len(known) >= BASELINE_EPISODES:
            expected = sum(known) / len(known)
        if expected is None:
            return None
        level = Level(expected, plan.random_return)
        return TrialBudget(plan.budget, level, plan.worst_return, n_planned=self.plan.budget)

    def _assign(self, event: Mapping[str, Any]) -> None:
        expected = len(self.episodes)
        if self.open is not None or event["episode"] != expected:
            raise ValueError(f"Episode {event['episode']} cannot be assigned: {self._expected()}")
        names = ("episode", "stage", "arm", "share", "block", "slot", "why")
        self.open = Assignment(**{name: event[name] for name in names})
        if self.open.arm == CANDIDATE and (risk := self._risk_now()) is not None:
            self.risk = risk
            risk.begin(expected, risk.baseline)

    def _expected(self) -> str:
        if self.open is not None:
            return f"episode {self.open.episode} is under way."
        return f"the next episode to assign is {len(self.episodes)}."

    def _record(self, event: Mapping[str, Any], metrics: Mapping[str, float | None], excluded: str | None) -> None:
        if self.open is None or event["episode"] != self.open.episode:
            raise ValueError(f"Episode {event['episode']} cannot be recorded: {self._expected()}")
        assignment, self.open = self.open, None
        details = {name: event.get(name) for name in DETAILS}
        self.episodes.append(EpisodeRecord(assignment, dict(metrics), excluded=excluded, **details))
        if self.risk is not None:
            total = metrics.get(RETURN)
            self.risk.end(assignment.episode, self.risk.worst_return if total is None else total)
        if assignment.slot is not None and self.stage == assignment.stage:
            self._place.slot = assignment.slot + 1
            if self._place.slot == self.plan.stages[self._place.stage].episodes:
                self._place = _Place(self._place.stage + 1)

    def _decide(self, decision: str, reasons: list[str]) -> None:
        self.decision = decision
        if decision == "no-go":
            self.stopped = f"no-go. {reasons[0] if reasons else ''}".strip()
        elif decision == "go" and self.stage is not None and kind_of(self.stage) != "full":
            kinds = [stage.kind for stage in self.plan.stages]
            self._place = _Place(kinds.index("full") if "full" in kinds else len(kinds))

    def _amend(self, event: Mapping[str, Any]) -> None:
        self.plan = parse_plan(event["plan"], Path(PLAN_FILE))
        self._schedules.clear()
        if self.risk is not None:
            self.risk.n_planned = self.plan.budget


def _too_risky(risk: TrialBudget) -> str:
    """Why the candidate must not act any more."""
    worst = risk.worst_loss(risk.baseline)
    return (
        f"The risk budget is used up: of {risk.allowance:.2f} total losses the candidate's episodes have taken "
        f"{risk.allowance - risk.balance:.2f}, and one more may take {worst:.2f}. A `risk.budget` of "
        f"{(risk.allowance - risk.balance + worst) / risk.n_planned:.3g} would cover it."
    )


def replay(plan: TrialPlan, events: list[dict[str, Any]]) -> TrialMachine:
    """The state after these events."""
    machine = TrialMachine(plan)
    for event in events:
        machine.apply(event)
    return machine
