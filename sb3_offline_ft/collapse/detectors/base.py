"""What all detectors of policy collapse share: has a stream of episodes become worse than a reference?"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.common.checks import whole_number

MIN_REFERENCE = 5

Episodes = Sequence[Any] | npt.NDArray[Any]


@dataclass(frozen=True)
class Alarm:
    """
    What a detector reports.

    :param detector: Name of the detector
    :param statistic: Its statistic
    :param threshold: The threshold, which the statistic has reached
    :param episode: Number of finished episodes monitored when it fired (a running one is not counted)
    :param message: One plain sentence
    """

    detector: str
    statistic: float
    threshold: float
    episode: int
    message: str


class Detector(ABC):
    """
    Base class of the detectors.

    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :param n_simulations: Number of simulated streams that thresholds are computed from; by default enough
    :param seed: Seed of the simulations and of random tie-breaking
    :raises ValueError: A parameter is out of range
    """

    name: ClassVar[str]
    """Name in :data:`DETECTORS`."""
    needs_rewards: ClassVar[bool] = False
    """Whether episodes are given as per-step rewards rather than as returns."""
    _state_names: ClassVar[tuple[str, ...]]
    """Names, without underscore, of the attributes that make the state once there is a reference."""

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        horizon: int = 1000,
        n_simulations: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"`false_alarm_rate` must be above 0 and below 1, found {false_alarm_rate!r}.")
        self.false_alarm_rate = float(false_alarm_rate)
        self.horizon = whole_number(horizon, "horizon", 1)
        self.seed = whole_number(seed, "seed")
        least = math.ceil(1 / self.false_alarm_rate)
        chosen = self._default_n_simulations() if n_simulations is None else n_simulations
        self.n_simulations = whole_number(chosen, "n_simulations", least)
        self._arguments: dict[str, Any] = {
            "false_alarm_rate": self.false_alarm_rate,
            "horizon": self.horizon,
            "n_simulations": n_simulations,
            "seed": self.seed,
        }
        self._calibrated = False
        self.n_episodes = 0
        self._statistic = 0.0
        self._threshold = math.inf

    def _default_n_simulations(self) -> int:
        # Any number above 1 / rate keeps the rate; more make the threshold vary less, as far as there is time
        return min(max(10_000, math.ceil(100 / self.false_alarm_rate)), max(20_000, math.ceil(3 / self.false_alarm_rate)))

    @property
    def is_calibrated(self) -> bool:
        """Whether a reference has been given."""
        return self._calibrated

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, besides rate and horizon."""
        return {name: value for name, value in self._arguments.items() if name not in ("false_alarm_rate", "horizon")}

    @property
    def statistic(self) -> float:
        """The statistic; it grows towards an alarm, which there is as long as it is at least :attr:`threshold`."""
        return self._statistic

    @property
    def threshold(self) -> float:
        """The threshold of :attr:`statistic`; infinite before calibration."""
        return self._threshold

    def calibrate(self, reference: Episodes) -> None:
        """
        Set the reference and start monitoring.

        :param reference: At least 5 finished episodes of the reference policy: their returns, or where
            :attr:`needs_rewards` is set the 1-D arrays of their per-step rewards; the more episodes, the faster the alarms
        :raises ValueError: There are too few, all have the same return, or a value is not finite
        """
        n_reference = len(reference)
        if n_reference < MIN_REFERENCE:
            raise ValueError(
                f"A reference for the {self.name} detector needs at least {MIN_REFERENCE} finished episodes, "
                f"found {n_reference}: gather more (a longer warm-up), or give more returns."
            )
        self._calibrated = False
        self._calibrate(reference)
        self._calibrated = True
        self.reset()

    def update(self, x: Any, episode_key: int = 0) -> Alarm | None:
        """
        Take one finished episode.

        :param x: Its return, or where :attr:`needs_rewards` is set its per-step rewards, shape (n_steps,)
        :param episode_key: Which of several concurrently running episodes it was, as in :meth:`update_within`
        :return: An alarm if the statistic is at its threshold or above
        :raises RuntimeError: The detector is not calibrated
        :raises ValueError: A value is not finite
        """
        self._check_calibrated()
        self._statistic = self._update(x, episode_key)
        return self._alarm()

    def update_within(self, rewards: Any, episode_key: int = 0) -> Alarm | None:
        """
        Take the rewards that a running episode has given so far; only some detectors make use of them.

        :param rewards: All its per-step rewards so far, shape (n_steps,)
        :param episode_key: Which of several concurrently running episodes it is, for example the index of its environment
        :return: An alarm if something new could be tested and the statistic is at its threshold or above
        :raises RuntimeError: The detector is not calibrated
        """
        self._check_calibrated()
        return None

    def reset(self) -> None:
        """Start monitoring again, with the same calibration."""
        self.n_episodes = 0
        self._statistic = 0.0

    def fresh(self, false_alarm_rate: float) -> Self:
        """
        Make an uncalibrated detector with the same settings but another rate.

        :param false_alarm_rate: Its rate of false alarms
        :return: The detector
        """
        arguments = {**self._arguments, "false_alarm_rate": false_alarm_rate}
        if arguments["n_simulations"] is not None:
            arguments["n_simulations"] = max(arguments["n_simulations"], math.ceil(1 / false_alarm_rate))
        return type(self)(**arguments)

    def state_dict(self) -> dict[str, np.ndarray]:
        """
        The whole state with the calibration, from which an identical detector continues to the bit.

        :return: Arrays by name
        """
        state: dict[str, np.ndarray] = {"detector": np.array(self.name), "calibrated": np.array(self._calibrated)}
        state |= {f"argument_{key}": np.array(self._as_float(value)) for key, value in self._arguments.items()}
        if self._calibrated:
            state["n_episodes"] = np.array(self.n_episodes)
            names = ("statistic", "threshold", *self._state_names)
            state |= {name: np.array(getattr(self, f"_{name}")) for name in names}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """
        Continue from a saved state.

        :param state: What :meth:`state_dict` of a detector with the same settings gave
        :raises ValueError: It is of another kind of detector or of other settings, or something is missing
        """
        kind = str(state["detector"]) if "detector" in state else None
        if kind != self.name:
            raise ValueError(
                f"The state is one of detector {kind!r}, expected {self.name!r}: load it into a detector of its kind."
            )
        for key, value in self._arguments.items():
            saved, own = state.get(f"argument_{key}"), np.array(self._as_float(value))
            if saved is None or not np.array_equal(saved, own, equal_nan=True):
                raise ValueError(
                    f"The state of detector {self.name!r} was saved with {key}={None if saved is None else saved.tolist()}, "
                    f"this one has {own.tolist()} (nan: the default): make it with the same settings."
                )
        calibrated = bool(state["calibrated"]) if "calibrated" in state else False
        names = ("statistic", "threshold", *self._state_names) if calibrated else ()
        missing = [name for name in ("calibrated", *(["n_episodes"] if calibrated else []), *names) if name not in state]
        if missing:
            raise ValueError(
                f"The state of detector {self.name!r} lacks {', '.join(missing)}: save it again with state_dict()."
            )
        self._calibrated = calibrated
        self.n_episodes = int(state["n_episodes"]) if calibrated else 0
        self._statistic, self._threshold = 0.0, math.inf
        for name in names:
            value = np.array(state[name])
            setattr(self, f"_{name}", value if value.ndim else value.item())

    @staticmethod
    def _as_float(value: Any) -> Any:
        return np.asarray(math.nan if value is None else value, np.float64)

    def _check_calibrated(self) -> None:
        if not self._calibrated:
            raise RuntimeError(f"The {self.name} detector has no reference yet: call calibrate() first.")

    def _alarm(self) -> Alarm | None:
        if self._statistic < self._threshold:
            return None
        message = (
            f"Episodes have become worse than the reference ({self.name} detector: statistic {self._statistic:.4g} reached "
            f"its threshold {self._threshold:.4g} after {self.n_episodes} finished episodes)."
        )
        return Alarm(self.name, self._statistic, self._threshold, self.n_episodes, message)

    @abstractmethod
    def _calibrate(self, reference: Episodes) -> None:
        """Set threshold and what else is needed from the reference."""

    @abstractmethod
    def _update(self, x: Any, episode_key: int) -> float:
        """Take one finished episode, count it, and return the statistic."""
