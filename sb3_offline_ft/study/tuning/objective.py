"""What a tuning maximises: the return at the end, less the dip on the way there."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from sb3_offline_ft.evaluation.finetuning_metrics import LAST
from sb3_offline_ft.study.engine.folder import CellResult


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

    def to_dict(self) -> dict[str, float]:
        """
        :return: It in the form of JSON
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Self:
        """
        :param facts: What :meth:`to_dict` gave, perhaps with more
        :return: The score
        """
        return cls(**{name: facts[name] for name in cls.__dataclass_fields__})


def final_score(objective: Objective, result: CellResult) -> Score:
    """
    :param objective: The objective
    :param result: A run that has ended
    :return: Its value
    :raises ValueError: It is not finite, or nothing was evaluated after the warm-up
    """
    score = objective.score(result.timesteps.tolist(), result.returns.mean(axis=1).tolist(), result.frozen_until)
    if score is None:
        raise ValueError(
            f"The last evaluation is at {result.timesteps[-1]:,} interactions, and the warm-up ends at "
            f"{result.frozen_until:,}: nothing was measured after it. Set a smaller `evaluation.every` in study.yml."
        )
    if not math.isfinite(score.value):
        raise ValueError(
            f"The returns are not finite: the run ended with {score.last_return}, the lowest is {score.lowest_return}."
        )
    return score


def number_of_last(n_evaluations: int) -> int:
    """
    :param n_evaluations: Evaluations of a run, without that before the first interaction
    :return: How many of the last ones count as its end: ten, or a third of all if that is fewer
    """
    return max(1, min(LAST, n_evaluations // 3))
