"""A stream of episodes against a baseline: is it worse, not worse, or better?"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from sb3_offline_ft.collapse.detectors import Alarm, Detector

PROMOTION_LEVEL = 0.05
MOST_EPISODES_TO_ALARM = 200
TOTAL_COLLAPSE = 1e3
"""Standard deviations below the baseline, for the answer to how soon a total collapse is noticed."""

Phase = Literal["baseline", "monitoring", "unwatched", "done"]


class EpisodeMonitor:
    """
    Compares episodes with a baseline by a detector, in monitoring periods that share one false-alarm rate.

    :param prototype: Detector whose kind and settings are used
    :param false_alarm_rate: Probability of any false alarm in all periods together; the i-th, counted from 0, gets
        ``false_alarm_rate / ((i + 1) (i + 2))``, which sum to it
    :param tolerance: Share of the distance between baseline and ``random_return`` that an episode is credited with
    :param random_return: Mean return of a random policy
    :raises ValueError: ``tolerance`` or ``random_return`` is out of range
    """

    def __init__(self, prototype: Detector, false_alarm_rate: float, tolerance: float, random_return: float) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"`tolerance` must be in [0, 1), found {tolerance!r}.")
        if not math.isfinite(random_return):
            raise ValueError(f"`random_return` must be finite, found {random_return!r}.")
        self._prototype = prototype
        self._false_alarm_rate = false_alarm_rate
        self._tolerance = tolerance
        self._random_return = random_return
        self.needs_rewards = prototype.needs_rewards
        self.phase: Phase = "baseline"
        self.gathered: list[Any] = []
        """Episodes of the first baseline, as long as there is none."""
        self.better: list[Any] | None = None
        """Episodes of a policy that was found better, of which a higher baseline may be made; None where none is in sight."""
        self.periods = 0
        self.detector = prototype
        self._set_reference([])

    def _set_reference(self, reference: list[Any]) -> None:
        self.reference = reference
        self.returns = np.array([float(np.sum(episode)) for episode in reference])
        self.margin = self._tolerance * abs(float(self.returns.mean()) - self._random_return) if reference else 0.0
        self._credit_per_step = self.margin / float(np.mean([np.size(episode) for episode in reference])) if reference else 0.0

    def begin(self, reference: Sequence[Any]) -> None:
        """
        Begin a monitoring period.

        :param reference: Episodes of the baseline: returns, or arrays of rewards if the detector ``needs_rewards``
        :raises ValueError: They are too few, constant or not finite; the present period goes on then
        """
        detector = self._prototype.fresh(self._false_alarm_rate / ((self.periods + 1) * (self.periods + 2)))
        detector.calibrate(reference)
        self.detector = detector
        self.periods += 1
        self.phase = "monitoring"
        self._set_reference(list(reference))

    @property
    def level(self) -> dict[str, float | None]:
        """Statistic and threshold, while episodes are monitored."""
        is_monitoring, detector = self.phase == "monitoring", self.detector
        return {name: getattr(detector, name) if is_monitoring else None for name in ("statistic", "threshold")}

    def _credited(self, episode: Any) -> Any:
        if not self.needs_rewards:
            return episode + self.margin
        return np.asarray(episode, dtype=np.float64) + self._credit_per_step

    def judge(self, episode: Any, key: int = 0) -> Alarm | None:
        """Take a finished episode, which was the running one of this key, into account: its return, or its rewards."""
        return self.detector.update(self._credited(episode), key)

    def judge_within(self, rewards: Sequence[float], key: int) -> Alarm | None:
        """Look at the rewards that a running episode has given so far."""
        return self.detector.update_within(self._credited(rewards), key)

    def higher_baseline(self, episode: Any, least: int) -> list[Any] | None:
        """
        Add an episode to those of a better policy, if such are gathered.

        :param episode: The episode
        :param least: Number of episodes that are needed at least
        :return: All of them when there are enough, if they are fit to be the baseline
        """
        if self.better is None:
            return None
        self.better.append(episode)
        if len(self.better) < max(len(self.reference), least):
            return None
        gathered, self.better = self.better, None
        returns = [float(np.sum(episode)) for episode in gathered]
        # An episode below all that were known before may be the first of a collapse, which must not become the measure
        if min(returns) >= self.returns.min() - self.margin and self.is_better(returns, PROMOTION_LEVEL):
            return gathered
        # Its share is spent all the same: what is accepted has been selected for being high
        self.periods += 1
        return None

    def gather_better(self) -> None:
        """The policy was found better: a higher baseline may be made of the episodes to come."""
        if self.better is None:
            self.better = []

    def is_not_worse(self, returns: Sequence[float], level: float = PROMOTION_LEVEL) -> bool:
        """Whether Welch's test rejects that the mean is below the baseline's by more than the tolerated loss."""
        return self._exceeds(returns, float(self.returns.mean()) - self.margin, level)

    def is_better(self, returns: Sequence[float], level: float) -> bool:
        """Whether Welch's test rejects that the mean is not above the baseline's."""
        return self._exceeds(returns, float(self.returns.mean()), level)

    def _exceeds(self, returns: Sequence[float], bound: float, level: float) -> bool:
        shifted = self.returns + (bound - self.returns.mean())
        result = stats.ttest_ind(returns, shifted, equal_var=False, alternative="greater")
        return bool(result.pvalue < level)

    def episodes_to_alarm(self) -> int | None:
        """Number of episodes of a total collapse after which the detector raises an alarm; None if it is more than 200."""
        detector = copy.deepcopy(self.detector)
        worst = float(self.returns.mean() - TOTAL_COLLAPSE * max(float(self.returns.std()), 1e-12))
        length = max((len(episode) for episode in self.reference), default=1) if self.needs_rewards else 1
        episode: Any = np.full(length, worst / length) if self.needs_rewards else worst
        numbers = range(1, MOST_EPISODES_TO_ALARM + 1)
        return next((number for number in numbers if detector.update(episode) is not None), None)

    @property
    def summary(self) -> dict[str, float | int]:
        """Mean, standard deviation, 5 and 95 % quantiles and number of the baseline's returns."""
        returns = self.returns
        low, high = np.quantile(returns, [0.05, 0.95])
        sd = float(returns.std(ddof=1)) if len(returns) > 1 else math.nan
        return {"mean": float(returns.mean()), "sd": sd, "low": float(low), "high": float(high), "n": len(returns)}

    def run_state(self) -> dict[str, Any]:
        """The whole state, with what has been gathered for baselines to come, as plain values and arrays."""
        return {"period": self.state_dict(), "phase": self.phase, "gathered": list(self.gathered), "better": self.better}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`run_state` returned."""
        self.load_state_dict(state["period"])
        self.phase, self.gathered, self.better = state["phase"], list(state["gathered"]), state["better"]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that is needed to go on with the present period, as arrays by name."""
        state = {f"detector.{name}": value for name, value in self.detector.state_dict().items()} if self.reference else {}
        values = [np.empty(0), *(np.atleast_1d(episode) for episode in self.reference)]
        return {
            **state,
            "periods": np.array(self.periods),
            "rate": np.array(self.detector.false_alarm_rate),
            "lengths": np.array([np.size(episode) for episode in self.reference], np.int64),
            "values": np.concatenate(values),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """
        :param state: What :meth:`state_dict` returned
        :raises ValueError: It is of a detector of another kind
        """
        self.periods = int(state["periods"])
        pieces = np.split(state["values"], np.cumsum(state["lengths"])[:-1]) if len(state["lengths"]) else []
        self._set_reference([piece if self.needs_rewards else float(piece[0]) for piece in pieces])
        if self.reference:
            detector = self._prototype.fresh(float(state["rate"]))
            prefix = "detector."
            detector.load_state_dict({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
            self.detector = detector
