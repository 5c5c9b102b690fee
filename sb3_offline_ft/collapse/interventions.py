"""What is done at an alarm."""

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


class Interventions:
    """
    Rolls back the learner, and gives up after some rollbacks.

    :param good: States to go back to
    :param poisoned: What was gathered since
    :param remedies: Applied after a rollback
    :param brake: Holds the policy after the last one
    :param report: Told of everything
    :param most: Number of rollbacks before it gives up
    :param ending: What is done then, one of :data:`ENDINGS`
    :param how_poisoned: What is done with poisoned data, for the log
    """

    def __init__(
        self,
        good: GoodStates,
        poisoned: PoisonedData,
        remedies: RemediesOfRun,
        brake: PolicyBrake,
        report: Reporter,
        most: int,
        ending: str,
        how_poisoned: str | float,
    ) -> None:
        self._good, self._poisoned, self._remedies, self._brake, self._report = good, poisoned, remedies, brake, report
        self._most, self._ending, self._how_poisoned = most, ending, how_poisoned

    def react(self, alarm: Alarm) -> GoodState | None:
        """Do what an alarm asks for, and tell to which state the learner was rolled back, if it was."""
        counts = self._report.counts
        counts.alarms += 1
        self._report.record(alarms=counts.alarms)
        self._report.event(
            "alarm", reason=alarm.detector, statistic=alarm.statistic, threshold=alarm.threshold, message=alarm.message
        )
        place = f"step {self._good.model.num_timesteps}, episode {counts.episodes}"
        self._report.say(f"ALARM at {place}: {alarm.message}")
        if counts.rollbacks < self._most:
            return self._roll_back()
        self._give_up()
        return None

    def _roll_back(self) -> GoodState:
        good = self._good.restore(is_rollback=True)
        counts = self._report.counts
        counts.rollbacks += 1
        self._poisoned.remove_since(good, counts.rollbacks)
        self._report.record(rollbacks=counts.rollbacks)
        goal = {"to_timestep": good.timestep, "to_n_updates": good.snapshot.n_updates}
        self._report.event("rollback", number=counts.rollbacks, **goal, poisoned_data=self._how_poisoned)
        where = f"the learner is that of step {good.timestep} again"
        self._report.say(f"rollback {counts.rollbacks} of at most {self._most}: {where}.")
        self._remedies.apply(good.snapshot.policy_state)
        return good

    def _give_up(self) -> None:
        if self._ending != "continue":
            self._good.restore(is_rollback=False)
        if self._ending == "freeze":
            self._remedies.forget_ends()
            self._brake.hold(True)
        self._report.counts.is_stopped = self._ending == "stop"
        self._report.event("escalation", action=self._ending, message=ENDINGS[self._ending])
        self._report.say(f"{self._report.counts.rollbacks} rollbacks have been made: {ENDINGS[self._ending]}.")
