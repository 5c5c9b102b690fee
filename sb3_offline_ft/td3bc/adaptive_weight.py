"""The weight of behavior cloning, controlled by the returns of training episodes (Zhao et al. 2022)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

AVERAGE_DECAY = 0.95
"""Of the running average of returns, as in the authors' code."""


class AdaptiveWeight:
    """
    A proportional-derivative controller: less behavior cloning while returns are below a target, more when they fall.

    Zhao et al. 2022, "Adaptive Behavior Cloning Regularization for Stable Offline-to-Online Reinforcement Learning",
    https://arxiv.org/abs/2210.13846. After an episode of length ``L`` and return ``R``, in this order::

        weight  <- clip(weight + L * (k_p * (average - target) + k_d * max(0, average - R)), 0, 1)
        average <- 0.95 * average + 0.05 * R

    Returns are in units in which 0 and 1 are the returns of a random policy and of an expert. The average begins with the
    return of the pretrained policy. Returns that are not finite are ignored.

    :param target: The target, in these units
    :param gains: ``k_p`` and ``k_d``, per environment step
    :param unit: The returns that are 0 and 1; None to take those of :meth:`begin`
    """

    def __init__(self, target: float, gains: Sequence[float], unit: Sequence[float] | None = None) -> None:
        self.target = target
        self.gains = gains
        self._given_unit = unit
        self.begin(None)

    def begin(self, unit: Sequence[float] | None) -> None:
        """
        Begin a run.

        :param unit: The returns that are 0 and 1, for want of given ones; if there are none, 1 is the return of the pretrained
            policy and 0 is as far below it as 0 reward is from it
        """
        self.zero = self.one = math.nan
        self.offer_unit(self._given_unit or unit)
        self.weight = 1.0
        self.average = math.nan
        self._expected = math.nan
        self._frozen_sum, self._n_frozen = 0.0, 0

    def offer_unit(self, unit: Sequence[float] | None) -> None:
        """
        Use a unit for returns if none is known yet.

        :param unit: The returns that are 0 and 1; None for none
        """
        if unit is not None and math.isnan(self.zero):
            self.zero, self.one = unit

    def normalized(self, episode_return: float) -> float:
        """
        :param episode_return: An undiscounted return
        :return: It in the units of the target
        """
        return (episode_return - self.zero) / (self.one - self.zero)

    @property
    def average_score(self) -> float:
        """The running average of returns in the units of the target; NaN before the first episode."""
        return self.normalized(self.average)

    def expect(self, mean_return: float) -> None:
        """
        Tell what the pretrained policy achieves, for want of episodes in which it acts unchanged.

        :param mean_return: A mean undiscounted return
        """
        self._expected = mean_return

    def observe(self, episode_return: float, length: int, is_frozen: bool) -> None:
        """
        Take an episode into account.

        :param episode_return: Its undiscounted return
        :param length: Its number of steps
        :param is_frozen: Whether it ended while the policy was not being updated; the weight stays then
        :raises ValueError: There is no unit for returns
        """
        if not math.isfinite(episode_return):
            return
        is_first = math.isnan(self.average)
        if is_first and is_frozen:
            self._frozen_sum += episode_return
            self._n_frozen += 1
            return
        if is_first:
            self._start_from(episode_return)
        if not is_frozen:
            proportional, derivative = self.gains
            average, current = self.average_score, self.normalized(episode_return)
            change = proportional * (average - self.target) + derivative * max(0.0, average - current)
            self.weight = min(1.0, max(0.0, self.weight + length * change))
        self.average = AVERAGE_DECAY * self.average + (1 - AVERAGE_DECAY) * episode_return

    @property
    def _pretrained_return(self) -> float:
        return self._frozen_sum / self._n_frozen if self._n_frozen > 0 else self._expected

    def _start_from(self, episode_return: float) -> None:
        if math.isnan(self._pretrained_return):
            self._expected = episode_return
        self.average = self._pretrained_return
        if math.isnan(self.zero):
            if self.average == 0:
                raise ValueError(
                    "`online_bc='adaptive'` measures returns in units of the pretrained policy's, which is 0, and the dataset "
                    "has no reference scores: set `adaptive_bc_returns` to the returns of a random policy and of an expert."
                )
            self.zero, self.one = self.average - abs(self.average), self.average

    def state_dict(self) -> dict[str, np.ndarray]:
        """
        :return: The state as arrays
        """
        state = (self.weight, self.average, self.zero, self.one, self._expected, self._frozen_sum, self._n_frozen)
        return {"adaptive_weight": np.array(state, dtype=np.float64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """
        Take up a state, but keep what it does not know yet of the pretrained policy, which cannot be measured again.

        :param state: What :meth:`state_dict` returned
        """
        if "adaptive_weight" not in state:
            return
        *numbers, n_frozen = map(float, state["adaptive_weight"])
        self.weight, average, zero, one, expected, frozen_sum = numbers
        has_average = not math.isnan(self.average)
        if has_average and math.isnan(average):
            self.average = self._pretrained_return
        else:
            self.average = average
            if not math.isnan(average) or n_frozen > self._n_frozen:
                self._frozen_sum, self._n_frozen = frozen_sum, int(n_frozen)
            if not math.isnan(expected):
                self._expected = expected
        if not math.isnan(zero):
            self.zero, self.one = zero, one
        if self._given_unit is not None:
            self.zero, self.one = self._given_unit
