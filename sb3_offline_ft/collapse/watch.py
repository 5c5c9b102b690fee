"""Watching the returns of a run: its baseline, monitoring periods and promotions, as they come."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.detectors import Alarm
from sb3_offline_ft.collapse.episodes import RunningEpisodes
from sb3_offline_ft.collapse.good_states import GoodStates
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.collapse.non_finite import NonFiniteNumbers
from sb3_offline_ft.collapse.poisoned import PoisonedData
from sb3_offline_ft.collapse.remedies import RemediesOfRun
from sb3_offline_ft.collapse.reporting import Reporter

LEAST_BASELINE = 5
RATCHET_LEVEL = 0.01


class EpisodeWatch:
    """
    Takes steps, episodes and evaluations of a run, and tells when something is wrong.

    :param model: The learner
    :param monitor: Compares episodes with the baseline
    :param good: States of the learner, which it promotes
    :param poisoned: Takes broken transitions out of the replay buffer
    :param remedies: Told of promotions
    :param report: Told of everything
    :param of_evaluations: Whether evaluations are watched in place of training episodes
    :param promotion_episodes: Number of episodes that a higher baseline has at least
    :param ratchet: Whether there may be one
    :param update_reference: Whether a better policy becomes the reference of a constrained algorithm
    """

    def __init__(
        self,
        model: OffPolicyAlgorithm,
        monitor: EpisodeMonitor,
        good: GoodStates,
        poisoned: PoisonedData,
        remedies: RemediesOfRun,
        report: Reporter,
        of_evaluations: bool,
        promotion_episodes: int,
        ratchet: bool,
        update_reference: bool,
    ) -> None:
        self._model, self._monitor, self._good = model, monitor, good
        self._poisoned, self._remedies, self._report = poisoned, remedies, report
        self._of_evaluations, self._promotion_episodes = of_evaluations, promotion_episodes
        self._ratchet, self._update_reference = ratchet, update_reference
        self._updates_at_start = model._n_updates
        self._non_finite = NonFiniteNumbers(model)
        self._has_warned_of_environment = False
        self.begin_episodes()

    def begin_episodes(self) -> None:
        """Begin a call of ``learn``."""
        self._non_finite.go_on()
        # An episode that was running before the guard came is not a whole one
        is_new, random = self._model.num_timesteps == 0, self._acts_randomly()
        self._running = RunningEpisodes(self._model.n_envs, is_new, random, self._monitor.needs_rewards)

    def _acts_randomly(self) -> bool:
        return self._model.num_timesteps < self._model.learning_starts

    def after_updates(self) -> Alarm | None:
        """Look at what updates have made of the learner, before a broken policy acts."""
        reason = self._non_finite.in_updates()
        return None if reason is None else self.alarm(reason, f"{reason[0].upper()}{reason[1:]}.")

    def after_alarm(self) -> None:
        """What is known now shall not raise the next one."""
        self._non_finite.forget_updates()

    def after_rollback(self, reference: list[Any]) -> None:
        """Begin a new monitoring period with the policy that is there again, if returns are watched."""
        # What is running was begun by the policy that is gone
        self._running.ignore(only_begun=True)
        self._monitor.better = None
        if self._monitor.phase != "monitoring":
            return
        try:
            self.begin_monitoring(reference or self._monitor.reference, "restored")
        except ValueError as error:
            self._monitor.phase = "unwatched"
            self._report.warn(f"{error} Returns are not watched any more.")

    def step(self, local: Mapping[str, Any], evaluations: Iterator[float]) -> Alarm | None:
        """
        Take a step of the environments.

        :param local: What SB3 tells callbacks about it
        :param evaluations: Returns of evaluations since the last step
        :return: An alarm, if there is a reason for one
        """
        if self._monitor.phase == "baseline" and self._model._n_updates != self._updates_at_start:
            self._end_baseline()
        vec_normalize, dones = self._model.get_vec_normalize_env(), local["dones"]
        rewards = local["rewards"] if vec_normalize is None else vec_normalize.get_original_reward()
        alarm = None
        culprit = self._non_finite.in_step(local, rewards)
        if culprit is not None:
            # The transition is taken out of the replay buffer, and the episode does not count
            self._poisoned.repair_present_step()
            self._running.ignore()
            # A copy: SB3 stores the array itself, and what is not finite there is to be found
            rewards = np.nan_to_num(rewards, nan=0.0, posinf=0.0, neginf=0.0)
            if culprit == "policy":
                alarm = self.alarm("non-finite action", "The policy chose a non-finite action.")
            else:
                self._warn_of_environment()
        self._running.add(rewards)
        if self._monitor.needs_rewards and self._monitor.phase == "monitoring":
            for index, so_far in self._running.to_look_at(dones):
                alarm = alarm or self._monitor.judge_within(so_far, index)
        for index in np.flatnonzero(dones).tolist():
            at_its_end = self._end_episode(index)
            alarm = alarm or at_its_end
        if self._of_evaluations:
            alarm = self._take_evaluations(evaluations) or alarm
        return alarm

    def _warn_of_environment(self) -> None:
        if not self._has_warned_of_environment:
            self._has_warned_of_environment = True
            self._report.warn(
                "The environment gave a non-finite observation or reward. Such transitions are replaced in the replay buffer "
                "by copies of others: look into the environment."
            )

    def _end_episode(self, index: int) -> Alarm | None:
        # The next episode's first action has been chosen when `num_timesteps` was what it is now
        finished = self._running.finish(index, self._acts_randomly())
        self._report.counts.episodes += 1
        alarm, phase = None, "ignored"
        if finished.counts and not self._of_evaluations:
            episode: Any = np.array(finished.rewards) if self._monitor.needs_rewards else finished.total
            alarm, phase = self._take(episode, finished.total, index)
            if phase == "baseline":
                self._good.renew_first()
        self._tell_episode("episode", finished.total, phase, length=finished.length)
        if self._monitor.phase == "monitoring":
            level = {"statistic": self._monitor.statistic, "threshold": self._monitor.threshold}
            self._report.record(**level, baseline_mean=self._monitor.summary["mean"])
        return alarm

    def _take_evaluations(self, returns: Iterator[float]) -> Alarm | None:
        alarm = None
        for value in returns:
            phase = "ignored"
            if alarm is None and math.isfinite(value):
                alarm, phase = self._take(value, value)
            elif alarm is None:
                alarm = self.alarm("non-finite evaluation", "An evaluation had a non-finite return.")
            self._tell_episode("evaluation", value, phase)
        return alarm

    def _tell_episode(self, kind: str, total: float, phase: str, **details: int) -> None:
        level = {"statistic": self._monitor.statistic, "threshold": self._monitor.threshold}
        self._report.event(kind, **{"return": total}, **details, **level, phase=phase)

    def _take(self, episode: Any, total: float, index: int = 0) -> tuple[Alarm | None, str]:
        """Take an episode that counts into account; tells what it was."""
        if self._monitor.phase == "baseline":
            self._monitor.gathered.append(episode)
            return None, "baseline"
        if self._monitor.phase != "monitoring":
            return None, "unwatched"
        alarm = self._monitor.judge(episode, index)
        if alarm is None:
            higher = self._monitor.higher_baseline(episode, least=self._promotion_episodes)
            if higher is not None:
                self._raise_baseline(higher)
            if self._good.judge(total):
                self._promote()
        return alarm, "monitoring"

    def alarm(self, reason: str, message: str, statistic: float = math.inf, threshold: float = 0.0) -> Alarm:
        """An alarm that is not a detector's."""
        return Alarm(reason, statistic, threshold, self._report.counts.episodes, message)

    def _end_baseline(self) -> None:
        self._good.end_of_baseline()
        gathered = self._monitor.gathered
        problem = (
            f"The baseline has {len(gathered)} episodes, expected at least {LEAST_BASELINE}: use a longer `warmup_steps`, or "
            "give returns as `baseline=[...]`."
        )
        if len(gathered) >= LEAST_BASELINE:
            try:
                self.begin_monitoring(gathered, "evaluations" if self._of_evaluations else "warmup")
                return
            except ValueError as error:
                problem = str(error)
        self._monitor.phase = "unwatched"
        self._report.tell_trial(is_watched=False)
        self._report.warn(f"{problem} Returns are not watched in this run, only non-finite values and `secondary_alarms`.")

    def begin_monitoring(self, reference: Sequence[Any], source: str) -> None:
        """
        Begin a monitoring period.

        :param reference: Episodes of its baseline
        :param source: Where they come from, in a word
        :raises ValueError: They cannot be a baseline
        """
        self._monitor.begin(reference)
        facts, needed = self._monitor.summary, self._monitor.episodes_to_alarm()
        self._report.event("baseline", source=source, threshold=self._monitor.threshold, episodes_to_alarm=needed, **facts)
        soon = "not be noticed within 200" if needed is None else f"be noticed after {needed}"
        self._report.say(
            f"baseline of {facts['n']} episodes ({source}): mean return {facts['mean']:.1f}, "
            f"standard deviation {facts['sd']:.1f}; a total collapse would {soon} episodes."
        )
        noise = self._model.action_noise
        if source == "warmup" and noise is not None and not getattr(self._model, "warmup_action_noise", True):
            self._report.warn(
                "The baseline was measured without the exploration noise of the episodes to come: false alarms are likely. "
                "Use `warmup_action_noise=True`."
            )
        self._good.begin_period()
        self._report.tell_trial(is_watched=True)

    def _raise_baseline(self, reference: list[Any]) -> None:
        old_mean = float(self._monitor.returns.mean())
        try:
            self.begin_monitoring(reference, "ratchet")
        except ValueError as error:
            self._report.event("warning", message=f"The baseline is not raised: {error}")
            return
        self._report.event("ratchet", old_mean=old_mean, new_mean=float(self._monitor.returns.mean()))

    def _promote(self) -> None:
        window = self._good.window
        is_better = self._monitor.is_better(window, RATCHET_LEVEL)
        good = self._good.promote(is_reference=is_better and self._update_reference)
        self._report.counts.promotions += 1
        mean = float(np.mean(window))
        self._report.event("promotion", candidate_timestep=good.timestep, n_episodes=len(window), mean=mean)
        self._report.say(f"the learner of step {good.timestep} is promoted, mean return {mean:.1f}.", level=2)
        self._report.record(promotions=self._report.counts.promotions)
        self._remedies.move(good.snapshot.policy_state)
        self._good.refer_to(good)
        if is_better and self._ratchet:
            # Episodes after the decision: those that led to it were chosen for being good
            self._monitor.gather_better()
        self._good.new_candidate()
