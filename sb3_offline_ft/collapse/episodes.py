"""Episodes of a run, its baseline, monitoring periods and promotions, as they come."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.detectors import Alarm
from sb3_offline_ft.collapse.good_states import GoodStates
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.collapse.poisoned import PoisonedData
from sb3_offline_ft.collapse.remedies import RemediesOfRun
from sb3_offline_ft.collapse.reporting import Reporter
from sb3_offline_ft.collapse.signals import NonFiniteNumbers, SignalMonitor

LEAST_BASELINE = 5
RATCHET_LEVEL = 0.01
WITHIN_FREQ = 5
"""Steps between two looks at a running episode."""


RUNNING = ("returns", "lengths", "ignored", "random")
"""What is known of running episodes, an array each."""


@dataclass(frozen=True)
class Episode:
    """A finished episode; it counts if the policy acted in it, from its beginning."""

    total: float
    length: int
    rewards: list[float]
    counts: bool


class RunningEpisodes:
    """The running episodes of a learner's environments, whose single rewards are only kept where they are asked for."""

    def __init__(self, model: OffPolicyAlgorithm, keep_rewards: bool) -> None:
        self._model, self._keep_rewards = model, keep_rewards
        self._returns = np.zeros(model.n_envs)
        self._lengths = np.zeros(model.n_envs, dtype=np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(model.n_envs)]
        # An episode that was running before the guard came is not a whole one
        self._ignored = np.full(model.n_envs, model.num_timesteps > 0)
        self._random = np.full(model.n_envs, self._acts_randomly())

    def _acts_randomly(self) -> bool:
        return self._model.num_timesteps < self._model.learning_starts

    def add(self, rewards: np.ndarray) -> None:
        self._returns += rewards
        self._lengths += 1
        for so_far, reward in zip(self._rewards, rewards, strict=True) if self._keep_rewards else ():
            so_far.append(float(reward))

    def to_look_at(self, dones: np.ndarray) -> list[tuple[int, list[float]]]:
        """Environments whose episode goes on and is to be looked at now, with its rewards so far."""
        chosen = ~(np.asarray(dones, bool) | self._ignored) & (self._lengths % WITHIN_FREQ == 0)
        return [(index, self._rewards[index]) for index in np.flatnonzero(chosen).tolist()]

    def finish(self, index: int) -> Episode:
        counts = not (self._ignored[index] or self._random[index])
        episode = Episode(float(self._returns[index]), int(self._lengths[index]), self._rewards[index], counts)
        self._returns[index] = self._lengths[index] = 0
        self._rewards[index] = []
        self._ignored[index] = False
        # The next episode's first action has been chosen when `num_timesteps` was what it is now
        self._random[index] = self._acts_randomly()
        return episode

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values and arrays."""
        arrays = {name: getattr(self, f"_{name}").copy() for name in RUNNING}
        return {**arrays, "rewards": [list(so_far) for so_far in self._rewards]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        for name in RUNNING:
            setattr(self, f"_{name}", state[name].copy())
        self._rewards = [list(so_far) for so_far in state["rewards"]]

    def ignore(self, only_begun: bool = False) -> None:
        """Do not count the episodes that are running, or only those of which there has been a step."""
        self._ignored |= self._lengths > 0 if only_begun else True


@dataclass
class EpisodeWatch:
    """Takes steps, episodes and evaluations of a run, promotes states of the learner, and tells when something is wrong."""

    model: OffPolicyAlgorithm
    monitor: EpisodeMonitor
    good: GoodStates
    poisoned: PoisonedData
    remedies: RemediesOfRun
    signals: SignalMonitor
    limits: Mapping[str, float]
    """Of signals; above them there is an alarm."""
    report: Reporter
    evaluations: list[EvalCallback] | None
    """Whose episodes are watched in place of training episodes."""
    ratchet: bool
    update_reference: bool

    def __post_init__(self) -> None:
        self._updates_at_start = self.model._n_updates
        self._non_finite = NonFiniteNumbers(self.model)
        self._has_warned_of_environment = False
        self.begin_episodes(self.evaluations)

    def begin_episodes(self, evaluations: list[EvalCallback] | None) -> None:
        """Begin a call of ``learn``."""
        self.evaluations = evaluations
        self._seen = [len(evaluation.evaluations_results) for evaluation in evaluations or ()]
        self._non_finite.go_on()
        self._running = RunningEpisodes(self.model, keep_rewards=self.monitor.needs_rewards)

    def state_dict(self) -> dict[str, Any]:
        """Where the watch is, as plain values and arrays."""
        return {
            "updates_at_start": self._updates_at_start,
            "seen": list(self._seen),
            "has_warned_of_environment": self._has_warned_of_environment,
            "non_finite": self._non_finite.state_dict(),
            "running": self._running.state_dict(),
            "signals": self.signals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._updates_at_start, self._seen = state["updates_at_start"], list(state["seen"])
        self._has_warned_of_environment = state["has_warned_of_environment"]
        self._non_finite.load_state_dict(state["non_finite"])
        self._running.load_state_dict(state["running"])
        self.signals.load_state_dict(state["signals"])

    def episodes_are_cut(self) -> None:
        """The running episodes will not be finished."""
        self._running = RunningEpisodes(self.model, keep_rewards=self.monitor.needs_rewards)
        self._running.ignore(only_begun=True)

    def after_updates(self) -> Alarm | None:
        """Look at what updates have made of the learner, before a broken policy acts."""
        reason = self._non_finite.in_updates()
        return None if reason is None else self._alarm(reason, f"{reason[0].upper()}{reason[1:]}.")

    def after_alarm(self) -> None:
        """What is known now shall not raise the next one."""
        self._non_finite.forget_updates()

    def after_rollback(self, reference: list[Any]) -> None:
        """Begin a new monitoring period with the policy that is there again, if returns are watched."""
        # What is running was begun by the policy that is gone
        self._running.ignore(only_begun=True)
        self.monitor.better = None
        self.signals.reset()
        if self.monitor.phase != "monitoring":
            return
        try:
            self.begin_monitoring(reference or self.monitor.reference, "restored")
        except ValueError as error:
            self.monitor.phase = "unwatched"
            self.report.warn(f"{error} Returns are not watched any more.")

    def step(self, local: Mapping[str, Any]) -> Alarm | None:
        """Take a step of the environments, of which SB3 tells callbacks this."""
        if self.monitor.phase == "baseline" and self.model._n_updates != self._updates_at_start:
            self._end_baseline()
        vec_normalize, dones = self.model.get_vec_normalize_env(), local["dones"]
        rewards = local["rewards"] if vec_normalize is None else vec_normalize.get_original_reward()
        alarm = None
        culprit = self._non_finite.in_step(local, rewards)
        if culprit is not None:
            # The transition is taken out of the replay buffer, and the episode does not count
            self.poisoned.repair_present_step()
            self._running.ignore()
            # A copy: SB3 stores the array itself, and what is not finite there is to be found
            rewards = np.nan_to_num(rewards, nan=0.0, posinf=0.0, neginf=0.0)
            if culprit == "policy":
                alarm = self._alarm("non-finite action", "The policy chose a non-finite action.")
            elif not self._has_warned_of_environment:
                self._has_warned_of_environment = True
                self.report.warn(
                    "The environment gave a non-finite observation or reward. Such transitions are replaced in the replay "
                    "buffer by copies of others: look into the environment."
                )
        self._running.add(rewards)
        if self.monitor.needs_rewards and self.monitor.phase == "monitoring":
            for index, so_far in self._running.to_look_at(dones):
                alarm = alarm or self.monitor.judge_within(so_far, index)
        for index in np.flatnonzero(dones).tolist():
            at_its_end = self._end_episode(index)
            alarm = alarm or at_its_end
        if self.evaluations is not None:
            alarm = self._take_evaluations() or alarm
        return alarm

    def _end_episode(self, index: int) -> Alarm | None:
        finished = self._running.finish(index)
        self.report.counts.episodes += 1
        alarm, phase = None, "ignored"
        if finished.counts and self.evaluations is None:
            episode: Any = np.array(finished.rewards) if self.monitor.needs_rewards else finished.total
            alarm, phase = self._take(episode, finished.total, index)
            if phase == "baseline":
                self.good.renew_first()
        self._tell_episode("episode", finished.total, phase, length=finished.length)
        if self.monitor.phase == "monitoring":
            self.report.record(**self.monitor.level, baseline_mean=self.monitor.summary["mean"])
        return alarm

    def _take_evaluations(self) -> Alarm | None:
        alarm = None
        for value in self._new_evaluations():
            phase = "ignored"
            if alarm is None and math.isfinite(value):
                alarm, phase = self._take(value, value)
            elif alarm is None:
                alarm = self._alarm("non-finite evaluation", "An evaluation had a non-finite return.")
            self._tell_episode("evaluation", value, phase)
        return alarm

    def _new_evaluations(self) -> Iterator[float]:
        for number, evaluation in enumerate(self.evaluations or ()):
            results: list[Any] = evaluation.evaluations_results[self._seen[number] :]
            self._seen[number] += len(results)
            for returns in results:
                yield from np.ravel(returns).tolist()

    def _tell_episode(self, kind: str, total: float, phase: str, **details: int) -> None:
        self.report.event(kind, **{"return": total}, **details, **self.monitor.level, phase=phase)

    def _take(self, episode: Any, total: float, index: int = 0) -> tuple[Alarm | None, str]:
        """Take an episode that counts into account; tells what it was."""
        if self.monitor.phase == "baseline":
            self.monitor.gathered.append(episode)
            return None, "baseline"
        if self.monitor.phase != "monitoring":
            return None, "unwatched"
        alarm = self.monitor.judge(episode, index)
        if alarm is None:
            higher = self.monitor.higher_baseline(episode, least=self.good.window_size)
            if higher is not None:
                self._raise_baseline(higher)
            if self.good.judge(total):
                self._promote()
        return alarm, "monitoring"

    def measure_signals(self) -> Alarm | None:
        signals = self.signals.measure(self.good.newest.snapshot.policy_state)
        if signals:
            self.report.record(**signals)
            self.report.event("signal", **signals)
        is_watched = bool(signals) and self.monitor.phase in ("monitoring", "unwatched")
        for name, limit in self.limits.items() if is_watched else ():
            # A slope is there after two measurements
            value = signals.get(name, -math.inf)
            if not value <= limit:
                message = f"The signal {name} is {value:.3g}, above its limit {limit:.3g}."
                return self._alarm(name, message, value, limit)
        return None

    def _alarm(self, reason: str, message: str, statistic: float = math.inf, threshold: float = 0.0) -> Alarm:
        """An alarm that is not a detector's."""
        return Alarm(reason, statistic, threshold, self.report.counts.episodes, message)

    def _end_baseline(self) -> None:
        self.good.end_of_baseline()
        gathered = self.monitor.gathered
        problem = (
            f"The baseline has {len(gathered)} episodes, expected at least {LEAST_BASELINE}: use a longer `warmup_steps`, or "
            "give returns as `baseline=[...]`."
        )
        if len(gathered) >= LEAST_BASELINE:
            try:
                self.begin_monitoring(gathered, "warmup" if self.evaluations is None else "evaluations")
                return
            except ValueError as error:
                problem = str(error)
        self.monitor.phase = "unwatched"
        self.report.tell_trial(is_watched=False)
        self.report.warn(f"{problem} Returns are not watched in this run, only non-finite values and `secondary_alarms`.")

    def begin_monitoring(self, reference: Sequence[Any], source: str) -> None:
        """Begin a monitoring period with a baseline; ``ValueError`` if it cannot be one."""
        self.monitor.begin(reference)
        facts, needed = self.monitor.summary, self.monitor.episodes_to_alarm()
        threshold = self.monitor.detector.threshold
        self.report.event("baseline", source=source, threshold=threshold, episodes_to_alarm=needed, **facts)
        soon = "not be noticed within 200" if needed is None else f"be noticed after {needed}"
        self.report.say(
            f"baseline of {facts['n']} episodes ({source}): mean return {facts['mean']:.1f}, "
            f"standard deviation {facts['sd']:.1f}; a total collapse would {soon} episodes."
        )
        noise = self.model.action_noise
        if source == "warmup" and noise is not None and not getattr(self.model, "warmup_action_noise", True):
            self.report.warn(
                "The baseline was measured without the exploration noise of the episodes to come: false alarms are likely. "
                "Use `warmup_action_noise=True`."
            )
        self.good.begin_period()
        self.report.tell_trial(is_watched=True)

    def _raise_baseline(self, reference: list[Any]) -> None:
        old_mean = float(self.monitor.returns.mean())
        try:
            self.begin_monitoring(reference, "ratchet")
        except ValueError as error:
            self.report.event("warning", message=f"The baseline is not raised: {error}")
            return
        self.report.event("ratchet", old_mean=old_mean, new_mean=float(self.monitor.returns.mean()))

    def _promote(self) -> None:
        window = self.good.window
        is_better = self.monitor.is_better(window, RATCHET_LEVEL)
        good = self.good.promote(is_reference=is_better and self.update_reference)
        self.report.counts.promotions += 1
        mean = float(np.mean(window))
        self.report.event("promotion", candidate_timestep=good.timestep, n_episodes=len(window), mean=mean)
        self.report.say(f"the learner of step {good.timestep} is promoted, mean return {mean:.1f}.", level=2)
        self.report.record(promotions=self.report.counts.promotions)
        self.remedies.move(good.snapshot.policy_state)
        self.good.refer_to(good)
        if is_better and self.ratchet:
            # Episodes after the decision: those that led to it were chosen for being good
            self.monitor.gather_better()
        self.good.new_candidate()
