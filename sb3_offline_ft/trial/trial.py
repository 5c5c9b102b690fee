"""A trial: its folder, and what people and programs do with it."""

import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sb3_offline_ft.common.io import remove_unfinished
from sb3_offline_ft.common.suggestions import hint
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.trial.amending import check_amendment
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Assignment
from sb3_offline_ft.trial.checklist import tick, update_checklist
from sb3_offline_ft.trial.init import EPISODES, init_trial
from sb3_offline_ft.trial.journal import JOURNAL_FILE, Event, Journal
from sb3_offline_ft.trial.machine import ABORTED, DRILL, EpisodeRecord, Finished, TrialMachine
from sb3_offline_ft.trial.plan import RETURN, TrialPlan, differences
from sb3_offline_ft.trial.reading import parse_plan, read_plan

if TYPE_CHECKING:
    from sb3_offline_ft.evaluation.robustness import RobustnessResult
    from sb3_offline_ft.trial.decision import Decision
    from sb3_offline_ft.trial.planning import PlanResult

PACKAGES = ("sb3-offline-ft", "stable-baselines3", "gymnasium", "numpy", "scipy", "torch")
"""Whose versions the journal notes."""
STEPS_FOLDER = "steps"
"""Has the last steps before each abort."""


@dataclass(frozen=True)
class Recorded:
    """
    What :meth:`Trial.record` did.

    :param record: The episode
    :param is_new: Whether it was written now; False if the same was there already
    :param decision: The decision that it led to, None if the trial goes on
    """

    record: EpisodeRecord
    is_new: bool
    decision: "Decision | None" = None


class Trial:
    """
    A trial, in its folder. Everything that happens is an event of its journal, and its state follows from these.

    Reading methods need no lock. Those that write take it, for the time of the call or of a block ``with trial.locked():``.

    :param folder: The folder
    :raises FileNotFoundError: There is no trial
    :raises ValueError: The plan is wrong, or the journal was changed after it was written
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.journal = Journal(self.folder / JOURNAL_FILE)
        self.machine: TrialMachine
        """The state, by the events so far."""
        self._start: Event | None
        self._is_tidy = False
        self._replay()

    @classmethod
    def create(
        cls, folder: str | Path, *, baseline: str, candidate: str, env: str | None = None, episodes: int = EPISODES,
        **sections: Any,
    ) -> Self:  # fmt: skip
        """
        Write the files of a new trial.

        :param folder: Its folder, which is made if it is missing
        :param baseline: Spec of the policy that runs today; any words without ``env``
        :param candidate: Spec of the policy that is tried
        :param env: Gymnasium id of the environment, None for a system without one
        :param episodes: Budget of the default stages
        :param sections: Other keys of the plan, such as ``primary={"metric": "return", "smallest_effect": 50}``
        :return: The trial
        :raises FileExistsError: There is a trial already
        :raises NotADirectoryError: The folder is a file
        :raises ValueError: A value is not possible
        """
        init_trial(folder, {"env": env, "baseline": baseline, "candidate": candidate, **sections}, episodes)
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a trial; arguments and errors as of the class."""
        return cls(folder)

    @property
    def is_begun(self) -> bool:
        """Whether the plan is frozen: the first episode has been assigned."""
        return self._start is not None

    @property
    def plan_in_force(self) -> TrialPlan:
        """The frozen plan with its amendments; before the first episode, that of the file."""
        return self.machine.plan

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keep other processes from writing to this trial.

        :raises ValueError: Another process has locked it
        """
        with self.journal.locked():
            if not self._is_tidy:
                for folder in (self.folder, self.folder / STEPS_FOLDER):
                    remove_unfinished(folder)
                self._is_tidy = True
            self._catch_up()
            yield

    def refresh(self) -> None:
        """Read what other processes have written."""
        self.journal.refresh()
        self._catch_up()

    def append(self, event: str, **fields: Any) -> Event:
        """
        Write an event into the journal and take it into the state.

        :param event: Its kind
        :param fields: What it says, in the form of JSON
        :return: The event as it was written
        """
        with self.locked():
            draft = self.journal.draft(event, **fields)
            try:
                # What cannot follow is not written
                self.machine.apply(draft)
                written = self.journal.write(draft)
            except BaseException:
                self._replay()
                raise
            self._seen = self.journal.last_hash
            return written

    def begin(self, files: Mapping[str, str | None] | None = None) -> None:
        """
        Freeze the plan, if that has not been done; if it has, note whether the file was changed since.

        :param files: Hashes of the policies' files by ``baseline`` and ``candidate``, where they are known
        :raises ValueError: Another file is in the place of a policy than the trial began with
        """
        with self.locked():
            if self._start is None:
                plan = self.machine.plan
                update_checklist(self.folder, plan)
                known = {arm: _hash_of_file(getattr(plan, arm)) for arm in ("baseline", "candidate")} | dict(files or {})
                self._start = self.append(
                    "start",
                    plan=plan.as_mapping(),
                    digest=plan.digest,
                    files=known,
                    versions={"python": platform.python_version(), **installed_versions(PACKAGES)},
                )
                return
            for arm, found in (files or {}).items():
                before = self._start["files"].get(arm)
                if before is not None and found != before:
                    raise ValueError(
                        f"The file of the {arm} is not the one that the trial began with (SHA-256 {found}, it was {before}): "
                        "bring it back, or begin a new trial."
                    )
            self._note_changed_plan()

    def next(self, drill: bool = False) -> Assignment | Finished:
        """
        Say which policy drives the next episode, and why. Asked again before the episode is recorded, it says the same.

        :param drill: Whether it shall be a rollback drill, an episode of the candidate that is not part of the comparison
        :return: The assignment; :class:`Finished` if there is no next episode
        """
        with self.locked():
            self.begin()
            if isinstance(self.machine.next(), Finished):
                self._settle()
            upcoming = self.machine.drill() if drill else self.machine.next()
            if isinstance(upcoming, Finished) or upcoming == self.machine.open:
                return upcoming
            before = self.machine.episodes[-1].stage if self.machine.episodes else None
            if upcoming.stage != before:
                self.append("stage", name=upcoming.stage, **{"from": before})
            self.append("assignment", **upcoming.as_event())
            return upcoming

    def record(
        self,
        returns: float | None = None,
        *,
        metrics: Mapping[str, float | None] | None = None,
        episode: int | None = None,
        csv: str | Path | None = None,
        regime: str | None = None,
        aborted: str | None = None,
        seconds_to_baseline: float | None = None,
        excluded: str | None = None,
        **details: Any,
    ) -> Recorded:
        """
        Record what came of the episode under way.

        To record the same again changes nothing, if the number of the episode is given.

        :param returns: Its return, the sum of rewards
        :param metrics: Values of other metrics by name; None for one that could not be measured
        :param episode: Its number, by default that of the one under way
        :param csv: Its log, a CSV or Parquet file, for the metrics that are not given
        :param regime: The operating regime that it was in
        :param aborted: Why the baseline took over within it, if it did
        :param seconds_to_baseline: How long that took, if it is known
        :param excluded: Why it shall not be part of the comparison, if so
        :param details: What else is known: steps, seconds, shadow, travel, violations, acted
        :return: What was done, and whether it led to a decision
        :raises ValueError: No such episode is under way, or another result was recorded for it, or a metric that the plan
            needs is missing, or is no finite number
        """
        with self.locked():
            self._note_changed_plan()
            number = self._number(episode)
            values: dict[str, float | None] = dict(metrics or {}) if returns is None else {**(metrics or {}), RETURN: returns}
            log = None
            if csv is not None:
                from sb3_offline_ft.trial.logs import read_log

                log = read_log(Path(csv), self.machine.plan, number, frozenset(values))
                values, regime = {**log.metrics, **values}, regime or log.regime
            values = self._checked(values, number, is_needed=aborted is None and excluded is None)
            if (done := self._recorded(number, values, regime)) is not None:
                return Recorded(done, is_new=False)
            assignment = self.machine.open
            assert assignment is not None
            crossed = None if log is None else log.crossed
            step, reason = (None, aborted) if aborted is not None or crossed is None else crossed
            takeover = {"episode": number, "step": step, "seconds_to_baseline": seconds_to_baseline}
            if assignment.is_drill and excluded is None:
                self.append("drill", **takeover, baseline_took_over=reason is not None)
                excluded = DRILL
            elif aborted is not None or (crossed is not None and assignment.arm == CANDIDATE and excluded is None):
                whose = {"stage": assignment.stage, "arm": assignment.arm, "reason": reason}
                self.append("abort", **takeover, **whose, steps_file=None)
                excluded = ABORTED
            if log is not None:
                is_whole = assignment.arm == BASELINE or reason is None
                n_own = log.steps if is_whole else None if step is None else step + 1
                details = {**log.details(assignment.arm, n_own), **details}
            where = {name: getattr(assignment, name) for name in ("episode", "stage", "arm", "block")}
            self.append("episode", **where, metrics=values, regime=regime, excluded=excluded, **details)
            return Recorded(self.machine.episodes[-1], is_new=True, decision=self._review())

    def give_up(self, reason: str, episode: int | None = None) -> Recorded:
        """
        Note that the episode under way gives no result, such as after a power cut.

        :param reason: Why
        :param episode: Its number, by default that of the one under way
        :return: What was done
        :raises ValueError: No such episode is under way
        """
        with self.locked():
            self._note_changed_plan()
            number = self._number(episode)
            if self.machine.open is None:
                raise ValueError(f"Episode {number} has been recorded already.")
            self.append("missing", episode=number, reason=reason)
            return Recorded(self.machine.episodes[-1], is_new=True, decision=self._review())

    def plan(
        self, *, ask_data: bool = True, n_trials: int = 400, on_progress: Callable[[str], None] = lambda doing: None
    ) -> "PlanResult":
        """
        Say what to expect: how long, at what risk and cost, with which chances. It is kept in the folder as ``plan.json``.

        :param ask_data: Whether to ask the plan's dataset what candidate and baseline return, which takes minutes
        :param n_trials: Simulated trials for each chance
        :param on_progress: Is told what is being done
        :return: What to expect
        :raises ValueError: Nothing is known of the primary metric, or something does not fit
        :raises OSError: A policy or the data cannot be read
        """
        from sb3_offline_ft.trial.planning import plan_of

        self.refresh()
        if not self.is_begun:
            update_checklist(self.folder, self.machine.plan)
        return plan_of(self, ask_data=ask_data, n_trials=n_trials, on_progress=on_progress)

    def decide(self) -> "Decision":
        """
        Decide by the rules of the plan. Nothing is written.

        :return: Go, no-go or not yet, with reasons
        """
        from sb3_offline_ft.trial.decision import decide

        self.refresh()
        return decide(self.machine.plan, self.machine)

    def run(self, progress_bar: bool = True, **options: Any) -> Finished | None:
        """
        Run the episodes in the plan's environment, from where the trial is.

        :param progress_bar: Whether to show the progress
        :param options: Passed to :func:`~sb3_offline_ft.trial.run_trial`
        :return: Why there is no next episode; None if there is one, after a drill or a stage
        """
        from sb3_offline_ft.trial.running import run_trial

        return run_trial(self, progress_bar=progress_bar, **options)

    def robustness(self, **options: Any) -> "RobustnessResult":
        """
        Try both policies in the plan's environment, changed in the ways that the plan names.

        :param options: Passed to :func:`~sb3_offline_ft.trial.robustness.try_robustness`
        :return: What came of it, which is also in the folder as ``robustness.json``
        """
        from sb3_offline_ft.trial.robustness import try_robustness

        return try_robustness(self, **options)

    def report(self, output: str | Path | None = None) -> Path:
        """
        Write the page of the trial.

        :param output: The file, ``report.html`` in the folder by default
        :return: The file
        :raises OSError: It cannot be written
        """
        from sb3_offline_ft.trial.report import write_report

        return write_report(self, output)

    def amend(self, reason: str) -> list[str]:
        """
        Let the plan of the file be in force from now on, after the first episode. That is marked as such wherever the trial is
        shown.

        :param reason: Why
        :return: What has changed
        :raises ValueError: The trial has not begun, nothing was changed, or something that cannot be
        """
        with self.locked():
            if not self.is_begun:
                raise ValueError("The trial has not begun, so nothing has to be amended: edit the plan as you like.")
            before, after = self.machine.plan, read_plan(self.folder)
            if not (changed := differences(before, after)):
                raise ValueError(f"The plan in {str(self.folder)!r} is the one in force: edit it first.")
            check_amendment(self.machine, after)
            self.append("amendment", plan=after.as_mapping(), digest=after.digest, reason=reason, difference=changed)
            return changed

    def tick(self, item: str, who: str) -> None:
        """
        Tick a line of the checklist.

        :param item: Its name
        :param who: Who does
        :raises ValueError: There is no such line
        """
        with self.locked():
            tick(self.folder, item, who)
            self.append("ticked", item=item, who=who)

    def _replay(self) -> None:
        """Make the state anew of the journal's events, and of the file if there are none."""
        self._start = next((event for event in self.journal.events if event["event"] == "start"), None)
        plan = read_plan(self.folder) if self._start is None else parse_plan(self._start["plan"], self.journal.path)
        self.machine = TrialMachine(plan)
        for event in self.journal.events:
            try:
                self.machine.apply(event)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.journal.path}, line {event['n'] + 1} cannot follow the lines before it: {error}"
                ) from None
        self._seen = self.journal.last_hash

    def _catch_up(self) -> None:
        """Take in what others have written; before the first episode, the file of the plan may have been edited, too."""
        if self._start is None or self.journal.last_hash != self._seen:
            self._replay()

    def _note_changed_plan(self) -> None:
        """Say, and note once, that the file is not the plan in force."""
        if not self.is_begun:
            return
        try:
            found = read_plan(self.folder)
        except (OSError, ValueError) as error:
            warn(f"The file of the plan cannot be read, and the plan that was frozen stays in force. {error}")
            return
        if not (changed := differences(self.machine.plan, found)):
            return
        warn(
            f"The plan was changed after the first episode ({'; '.join(changed)}). The one that was frozen stays in force: "
            "undo the change, or let it count with `sb3-offline-ft trial amend --reason ...`."
        )
        noted = [event["digest"] for event in self.journal.events if event["event"] == "plan_changed"]
        if found.digest not in noted:
            self.append("plan_changed", digest=found.digest, difference=changed)

    def _number(self, episode: int | None) -> int:
        """Number of the episode that a record is for: the one under way, or one that is there."""
        under_way, done = self.machine.open, len(self.machine.episodes)
        if episode is not None and 0 <= episode < done:
            return episode
        if under_way is None:
            last = f"Episode {done - 1} was the last to be recorded. " if done else ""
            asked = "" if episode is None else f" {episode}"
            raise ValueError(f"No episode{asked} is under way. {last}`trial next` says which policy drives the next one.")
        if episode not in (None, under_way.episode):
            raise ValueError(f"Episode {episode} is not under way: expected {under_way.episode}, which comes before it.")
        return under_way.episode

    def _checked(self, values: Mapping[str, float | None], episode: int, is_needed: bool) -> dict[str, float | None]:
        """Values of all metrics of the plan."""
        plan = self.machine.plan
        names = [metric.name for metric in plan.metrics]
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"The plan has no metric {name!r}: {hint(name, names)}")
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise ValueError(f"Episode {episode}: {name} must be a finite number, found {value!r}.")
        for name in names:
            if is_needed and name in plan.needed_metrics and name not in values:
                raise ValueError(
                    f"Episode {episode}: the plan needs {name}, and it is not given: add it, give a log that has it, or say "
                    "that the episode is missing."
                )
        return {name: None if (value := values.get(name)) is None else float(value) for name in names}

    def _recorded(self, number: int, values: Mapping[str, float | None], regime: str | None) -> EpisodeRecord | None:
        """The record of an episode that is over, if it is the same; None for the one under way."""
        if number == len(self.machine.episodes):
            return None
        there = self.machine.episodes[number]
        if {name: there.metrics.get(name) for name in values} != dict(values) or there.regime != regime:
            raise ValueError(
                f"Episode {number} was recorded with {_in_words(there.metrics, there.regime)}, and cannot be changed to "
                f"{_in_words(values, regime)}. If the record is wrong, the episode counts as it is; say so in the report."
            )
        return there

    def _review(self) -> "Decision | None":
        """Whether the trial ends with the last episode; writes the decision down if it does."""
        from sb3_offline_ft.trial.decision import review

        decision = review(self.machine.plan, self.machine)
        if decision is not None and decision.decision != self.machine.decision:
            self._write(decision)
            return decision
        return None

    def _settle(self) -> None:
        """Write down what is decided at the end of the stages."""
        decision = self.decide()
        if decision.decision != self.machine.decision:
            self._write(decision)

    def _write(self, decision: "Decision") -> None:
        effect = {name: getattr(decision.effect, name) for name in ("value", "low", "high")}
        effect = {name: value if math.isfinite(value) else None for name, value in effect.items()}
        self.append("decision", decision=decision.decision, reasons=decision.reasons, effect=effect)


def _in_words(metrics: Mapping[str, float | None], regime: str | None) -> str:
    words = [f"{name}={'missing' if value is None else format(value, 'g')}" for name, value in metrics.items()]
    return ", ".join([*words, *([] if regime is None else [f"regime={regime}"])]) or "no metrics"


def _hash_of_file(spec: str) -> str | None:
    """SHA-256 of a file; None if the spec is something else."""
    path = Path(spec).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
