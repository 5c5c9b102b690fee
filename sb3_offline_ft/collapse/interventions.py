"""What is done at an alarm."""

from dataclasses import dataclass

from sb3_offline_ft.collapse.brake import PolicyBrake
from sb3_offline_ft.collapse.detectors import Alarm
from sb3_offline_ft.collapse.good_states import GoodState, GoodStates
from sb3_offline_ft.collapse.poisoned import PoisonedData
from sb3_offline_ft.collapse.remedies import RemediesOfRun
from sb3_offline_ft.collapse.reporting import Reporter

ENDINGS = {
    "freeze": "the last good policy acts unchanged for the rest of the run",
    "stop": "the last good policy is restored and training ends",
    "continue": "training goes on unguarded",
}


@dataclass
class Interventions:
    """Rolls back the learner, and after the last rollback does what the ending says."""

    good: GoodStates
    poisoned: PoisonedData
    remedies: RemediesOfRun
    brake: PolicyBrake
    report: Reporter
    max_rollbacks: int
    ending: str
    poisoned_data: str | float

    def react(self, alarm: Alarm) -> GoodState | None:
        """Do what an alarm asks for, and tell to which state the learner was rolled back, if it was."""
        counts, report = self.report.counts, self.report
        counts.alarms += 1
        report.record(alarms=counts.alarms)
        level = {"statistic": alarm.statistic, "threshold": alarm.threshold}
        report.event("alarm", reason=alarm.detector, **level, message=alarm.message)
        report.say(f"ALARM at step {report.model.num_timesteps}, episode {counts.episodes}: {alarm.message}")
        if counts.rollbacks < self.max_rollbacks:
            return self._roll_back()
        self._give_up()
        return None

    def _roll_back(self) -> GoodState:
        good = self.good.restore(is_rollback=True)
        counts, report = self.report.counts, self.report
        counts.rollbacks += 1
        self.poisoned.remove_since(good, counts.rollbacks)
        report.record(rollbacks=counts.rollbacks)
        goal = {"to_timestep": good.timestep, "to_n_updates": good.snapshot.n_updates}
        report.event("rollback", number=counts.rollbacks, **goal, poisoned_data=self.poisoned_data)
        where = f"the learner is that of step {good.timestep} again"
        report.say(f"rollback {counts.rollbacks} of at most {self.max_rollbacks}: {where}.")
        self.remedies.apply(good.snapshot.policy_state)
        return good

    def _give_up(self) -> None:
        if self.ending != "continue":
            self.good.restore(is_rollback=False)
        if self.ending == "freeze":
            self.remedies.forget_ends()
            self.brake.hold(True)
        self.report.counts.is_stopped = self.ending == "stop"
        self.report.event("escalation", action=self.ending, message=ENDINGS[self.ending])
        self.report.say(f"{self.report.counts.rollbacks} rollbacks have been made: {ENDINGS[self.ending]}.")
