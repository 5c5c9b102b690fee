"""The weight of behavior cloning, controlled by the returns of training episodes (Zhao et al. 2022)."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped

from sb3_offline_ft.common.checks import number_pair

NO_RETURNS = (
    "`online_bc='adaptive'` needs the returns of training episodes, which this environment does not report: "
    "wrap it in SB3's `Monitor`, or a vectorized one in `VecMonitor`."
)
AVERAGE_DECAY = 0.95
"""Of the running average of returns, as in the authors' code."""


def check_returns_are_reported(env: VecEnv) -> None:
    """Check that an environment tells the returns of episodes, before a run that needs them."""
    reports = (env.env_is_wrapped(wrapper) for wrapper in (Monitor, RecordEpisodeStatistics))
    if not is_vecenv_wrapped(env, VecMonitor) and not all(map(any, zip(*reports, strict=True))):
        raise ValueError(NO_RETURNS)


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
    :raises ValueError: A number is out of range
    """

    def __init__(self, target: float, gains: Sequence[float], unit: Sequence[float] | None = None) -> None:
        if isinstance(target, bool) or not isinstance(target, Real) or not math.isfinite(target):
            raise ValueError(f"`adaptive_bc_target` must be a finite number, found {target!r}.")
        self.target: float = float(target)
        self.gains: tuple[float, float] = number_pair(gains, "adaptive_bc_gains")
        if min(self.gains) < 0:
            raise ValueError(f"`adaptive_bc_gains` must be at least 0, found {self.gains}.")
        self.given_unit: tuple[float, float] | None = None
        if unit is not None:
            self.given_unit = number_pair(unit, "adaptive_bc_returns")
        if self.given_unit is not None and not self.given_unit[0] < self.given_unit[1]:
            raise ValueError(
                "`adaptive_bc_returns` must be the return of a random policy and the larger one of an expert, found "
                f"{self.given_unit}."
            )
        self.begin(None)

    def begin(self, unit: Sequence[float] | None) -> None:
        """
        Begin a run.

        :param unit: The returns that are 0 and 1, for want of given ones; if there are none, 1 is the return of the pretrained
            policy and 0 is as far below it as 0 reward is from it
        """
        self.zero = self.one = math.nan
        self.offer_unit(self.given_unit or unit)
        self.weight = 1.0
        self.average = math.nan
        self._expected = math.nan
        self._frozen_sum, self._n_frozen = 0.0, 0

    def offer_unit(self, unit: Sequence[float] | None) -> None:
        """Use the returns that are 0 and 1 if none are known yet."""
        if unit is not None and math.isnan(self.zero):
            self.zero, self.one = unit

    def normalized(self, episode_return: float) -> float:
        """A return in the units of the target."""
        return (episode_return - self.zero) / (self.one - self.zero)

    @property
    def average_score(self) -> float:
        """The running average of returns in the units of the target; NaN before the first episode."""
        return self.normalized(self.average)

    def expect(self, mean_return: float) -> None:
        """Tell the mean return of the pretrained policy, for want of episodes in which it acts unchanged."""
        self._expected = mean_return

    def observe_ended(self, infos: Sequence[Mapping[str, Any]], dones: np.ndarray, is_frozen: bool) -> None:
        """Take the episodes into account that ended in the last step of the environments."""
        for done, info in zip(dones, infos, strict=True):
            if done and "episode" not in info:
                raise ValueError(NO_RETURNS)
            if done:
                self.observe(float(info["episode"]["r"]), int(info["episode"]["l"]), is_frozen)

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
        """The state as arrays."""
        state = (self.weight, self.average, self.zero, self.one, self._expected, self._frozen_sum, self._n_frozen)
        return {"adaptive_weight": np.array(state, dtype=np.float64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state, but keep what it does not know yet of the pretrained policy, which cannot be measured again."""
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
        if self.given_unit is not None:
            self.zero, self.one = self.given_unit
