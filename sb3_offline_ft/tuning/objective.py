"""What a tuning maximises: the return at the end, less the dip on the way there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from sb3_offline_ft.common.search_space import Hyperparams
from sb3_offline_ft.evaluation.finetuning_metrics import LAST

DIP_PENALTY = "tuning_dip_penalty"
"""A setting of ``-optimize``, which is none of the algorithm: the weight of the dip."""
_SETTINGS = DIP_PENALTY.removesuffix("dip_penalty")


@dataclass(frozen=True)
class Objective:
    """
    The value of a run: ``(J_end - J0 - w max(0, J0 - min J)) / |J0 - J_random|``.

    ``J0`` is the mean return of the pretrained policy over the evaluations that all trials have of it, ``J_end`` the mean of
    the last evaluations, ``min J`` the lowest one after the warm-up. 0 is as good as the pretrained policy all the time, 1 is
    better than it by as much as it is better than a random one. If ``J_random`` is not known, the unit is ``|J0|``.

    :param dip_penalty: Weight ``w`` of the dip
    :param random_return: ``J_random``, None if it is not known
    :param baseline_until: Interactions with the pretrained policy in all trials
    :param n_last: Number of evaluations that ``J_end`` is the mean of
    """

    dip_penalty: float
    random_return: float | None
    baseline_until: int
    n_last: int

    def score(self, timesteps: Sequence[int], means: Sequence[float], frozen_until: int) -> "Score | None":
        """
        Value a run, which may go on.

        :param timesteps: Interactions at each evaluation, the first one 0
        :param means: Their mean returns
        :param frozen_until: Interactions with the pretrained policy in this run
        :return: Its value if it ended here; None while the policy has been the pretrained one at all evaluations
        """
        free = [mean for timestep, mean in zip(timesteps, means, strict=True) if timestep > frozen_until]
        if not free:
            return None
        frozen = [mean for timestep, mean in zip(timesteps, means, strict=True) if timestep <= self.baseline_until]
        initial, lowest = float(np.mean(frozen)), min(free)
        last = float(np.mean(free[-self.n_last :]))
        unit = self._unit(initial)
        dip = (initial - lowest) / unit
        value = (last - initial) / unit - self.dip_penalty * max(0.0, dip)
        return Score(value, initial, last, lowest, dip)

    def _unit(self, initial: float) -> float:
        if self.random_return is not None and self.random_return != initial:
            return abs(initial - self.random_return)
        return abs(initial) or 1.0

    @property
    def unit_text(self) -> str:
        """The unit in words."""
        if self.random_return is None:
            return "|J0|, since the return of a random policy is not known: give `random_return` in study.yml"
        return f"|J0 - J_random|, with J_random = {self.random_return:g}"


@dataclass(frozen=True)
class Score:
    """
    The value of a run, and what it comes from.

    :param value: See :class:`Objective`
    :param initial_return: ``J0``
    :param last_return: ``J_end``
    :param lowest_return: ``min J``
    :param dip_depth: ``(J0 - min J)`` in the objective's unit; negative if the returns were always higher
    """

    value: float
    initial_return: float
    last_return: float
    lowest_return: float
    dip_depth: float


def number_of_last(n_evaluations: int) -> int:
    """How many of a run's evaluations, without that before the first interaction, are its end: ten, or a third of all."""
    return max(1, min(LAST, n_evaluations // 3))


def split_tuning(hyperparams: Mapping[str, Any]) -> tuple[Hyperparams, float]:
    """
    Take out what says how ``-optimize`` values trials.

    :param hyperparams: Hyperparameters of a configuration, perhaps with ``tuning_dip_penalty``
    :return: The others, and the weight of a trial's dip in its value, 0 if it is not given
    :raises ValueError: There is no such setting, or it is no finite number of at least 0
    """
    others = {name: value for name, value in hyperparams.items() if not name.startswith(_SETTINGS)}
    for name in hyperparams.keys() - others.keys() - {DIP_PENALTY}:
        raise ValueError(f"`{name}` is no known setting of the tuning: there is `{DIP_PENALTY}`.")
    penalty = hyperparams.get(DIP_PENALTY, 0.0)
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
        raise ValueError(f"`{DIP_PENALTY}` must be a finite number of at least 0, found {penalty!r}.")
    return others, float(penalty)


class ObservedTrial:
    """
    A trial of ``-optimize`` as rl_zoo3's objective sees it: what is reported is also told in the trial's user attributes.

    The evaluation before the first interaction has step 0 and is not reported to the pruner, which compares what trials
    have learned.

    :param trial: The trial
    :param frozen_steps: The last evaluation of the pretrained policy
    :param random_return: Mean return of a random policy, if known
    :param dip_penalty: Weight of the dip in the trial's value
    """

    def __init__(self, trial: optuna.Trial, frozen_steps: int, random_return: float | None, dip_penalty: float = 0.0) -> None:
        self._trial = trial
        self._frozen_steps = frozen_steps
        self._random_return = random_return
        self._dip_penalty = dip_penalty
        self._frozen: list[float] = []
        self._free: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def report(self, value: float, step: int) -> None:
        """
        :param value: Mean return of an evaluation
        :param step: Its number
        """
        (self._frozen if step <= self._frozen_steps else self._free).append(float(value))
        if step > 0:
            self._trial.report(self.penalized(float(value)), step)
        for name, fact in self._facts().items():
            self._trial.set_user_attr(name, fact)

    def penalized(self, value: float) -> float:
        """
        :param value: Mean return of an evaluation
        :return: The trial's value if it was the last one: the dip so far, times its weight, is taken off
        :raises RuntimeError: There is a weight, and no evaluation that the dip is measured from
        """
        if self._dip_penalty > 0 and not self._frozen:
            # No ValueError, which rl_zoo3 takes for bad luck of a trial
            raise RuntimeError(
                f"`{DIP_PENALTY}` is {self._dip_penalty:g}, and there was no evaluation of the pretrained policy, before the "
                "first interaction or in the warm-up, that the dip could be measured from."
            )
        return value - self._dip_penalty * max(0.0, self._facts().get("dip", 0.0))

    def _facts(self) -> dict[str, float]:
        facts: dict[str, float] = {}
        if self._frozen:
            facts["initial_return"] = initial = sum(self._frozen) / len(self._frozen)
        if self._free:
            facts["lowest_return"] = lowest = min(self._free)
        if self._frozen and self._free:
            facts["dip"] = initial - lowest
            if self._random_return not in (None, initial):
                facts["dip_depth"] = (initial - lowest) / abs(initial - self._random_return)
        return facts
