"""A stream of episodes against a baseline: is it worse, not worse, or better?"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sb3_offline_ft.collapse.detectors import Alarm, Detector

MOST_EPISODES_TO_ALARM = 200
TOTAL_COLLAPSE = 1e3
"""Standard deviations below the baseline, for the answer to how soon a total collapse is noticed."""


class EpisodeMonitor:
    """
    Compares episodes with a baseline by a detector, in monitoring periods that share one false-alarm rate.

    :param prototype: Detector whose kind and settings are used
    :param false_alarm_rate: Probability of any false alarm in all periods together; the i-th, counted from 0, gets
        ``false_alarm_rate / ((i + 1) (i + 2))``, which sum to it
    :param tolerance: Share of the distance between baseline and ``random_return`` that an episode is credited with
    :param random_return: Mean return of a random policy
    """

    def __init__(self, prototype: Detector, false_alarm_rate: float, tolerance: float, random_return: float) -> None:
        self._prototype = prototype
        self._false_alarm_rate = false_alarm_rate
        self._tolerance = tolerance
        self._random_return = random_return
        self.needs_rewards = prototype.needs_rewards
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
        self._set_reference(list(reference))

    def _credited(self, episode: Any) -> Any:
        if not self.needs_rewards:
            return episode + self.margin
        return np.asarray(episode, dtype=np.float64) + self._credit_per_step

    def judge(self, episode: Any, key: int = 0) -> Alarm | None:
        """
        :param episode: A finished episode: its return, or its rewards
        :param key: Which of several running episodes it was
        :return: An alarm, or None
        """
        return self.detector.update(self._credited(episode), key)

    def judge_within(self, rewards: Sequence[float], key: int) -> Alarm | None:
        """
        :param rewards: Rewards of a running episode so far
        :param key: Which of several running episodes it is
        :return: An alarm, or None
        """
        return self.detector.update_within(self._credited(rewards), key)

    def is_not_worse(self, returns: Sequence[float], level: float) -> bool:
        """
        Welch's one-sided test of the hypothesis that the mean is below the baseline's by more than the tolerated loss.

        :param returns: Returns of at least two episodes
        :param level: Level of the test
        :return: Whether the hypothesis is rejected
        """
        return self._exceeds(returns, float(self.returns.mean()) - self.margin, level)

    def is_better(self, returns: Sequence[float], level: float) -> bool:
        """
        Welch's one-sided test of the hypothesis that the mean is not above the baseline's.

        :param returns: Returns of at least two episodes
        :param level: Level of the test
        :return: Whether the hypothesis is rejected
        """
        return self._exceeds(returns, float(self.returns.mean()), level)

    def _exceeds(self, returns: Sequence[float], bound: float, level: float) -> bool:
        baseline = self.returns
        shifted = baseline + (bound - baseline.mean())
        result = stats.ttest_ind(returns, shifted, equal_var=False, alternative="greater")
        return bool(result.pvalue < level)

    def episodes_to_alarm(self) -> int | None:
        """
        :return: Number of episodes of a total collapse after which the detector raises an alarm; None if it is more than 200
        """
        detector = copy.deepcopy(self.detector)
        worst = float(self.returns.mean() - TOTAL_COLLAPSE * max(float(self.returns.std()), 1e-12))
        length = max((len(episode) for episode in self.reference), default=1) if self.needs_rewards else 1
        episode: Any = np.full(length, worst / length) if self.needs_rewards else worst
        for number in range(1, MOST_EPISODES_TO_ALARM + 1):
            if detector.update(episode) is not None:
                return number
        return None

    def state_dict(self) -> dict[str, np.ndarray]:
        """
        :return: Everything needed to go on, as arrays by name
        """
        state = {f"detector.{name}": value for name, value in self.detector.state_dict().items()} if self.reference else {}
        lengths = [np.size(episode) for episode in self.reference]
        values = np.concatenate([np.atleast_1d(episode) for episode in self.reference]) if self.reference else np.empty(0)
        rate = np.array(self.detector.false_alarm_rate)
        return {
            **state,
            "periods": np.array(self.periods),
            "rate": rate,
            "lengths": np.array(lengths, np.int64),
            "values": values,
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
            detector.load_state_dict(
                {name.removeprefix("detector."): value for name, value in state.items() if name.startswith("detector.")}
            )
            self.detector = detector

    @property
    def summary(self) -> dict[str, float | int]:
        """Mean, standard deviation, 5 and 95 % quantiles and number of the baseline's returns."""
        returns = self.returns
        low, high = np.quantile(returns, [0.05, 0.95])
        sd = float(returns.std(ddof=1)) if len(returns) > 1 else math.nan
        return {"mean": float(returns.mean()), "sd": sd, "low": float(low), "high": float(high), "n": len(returns)}
