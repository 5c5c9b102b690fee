"""Which trials of a tuning are given up early."""

import copy
import math

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial

DEEPEST_DIP = "deepest_dip"
"""A trial's user attribute: the depth of its deepest dip so far."""
PRESET = "preset"
"""The user attribute of the trial that has the preset's hyperparameters."""
PRUNERS = ("median", "hyperband", "none")


class DipPruner(BasePruner):
    """
    Gives up trials that dip too deep, at once, and others as another pruner says. The preset's trial is never given up, since
    all others are compared with it.

    :param deepest: Depth of the deepest dip that is allowed, ``inf`` for any
    :param other: The other pruner
    """

    def __init__(self, deepest: float, other: BasePruner) -> None:
        self.deepest = deepest
        self.other = other

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to give a trial up, which has the user attribute :data:`DEEPEST_DIP` once it has dipped."""
        if PRESET in trial.user_attrs:
            return False
        if trial.user_attrs.get(DEEPEST_DIP, -math.inf) > self.deepest:
            return True
        return self.other.prune(study, trial)


class LatestMedianPruner(MedianPruner):
    """
    Optuna's median pruner, which looks at the end of each seed's run but the last, and for which the latest value of the trial
    counts and not its best: before a dip it was good. With a look at every evaluation, noise would end almost every trial that
    is as good as the others.

    :param n_startup_trials: Finished trials that it waits for
    :param n_evaluations: Evaluations in a run
    :param n_seeds: Runs in a trial
    """

    def __init__(self, n_startup_trials: int, n_evaluations: int, n_seeds: int) -> None:
        super().__init__(n_startup_trials)
        self.looks = range(n_evaluations, n_seeds * n_evaluations, n_evaluations)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether a run has just ended and its latest value is below the median of what the finished trials had then."""
        step = trial.last_step
        if step is None or step not in self.looks:
            return False
        latest = copy.copy(trial)
        latest.intermediate_values = {step: trial.intermediate_values[step]}
        return super().prune(study, latest)


def make_pruner(name: str, deepest_dip: float, startup_trials: int, n_evaluations: int, n_seeds: int) -> DipPruner:
    """
    :param name: One of :data:`PRUNERS`
    :param deepest_dip: Depth of a dip beyond which a trial is given up at once
    :param startup_trials: Finished trials that the median pruner waits for
    :param n_evaluations: Evaluations in a run, each of which is a step
    :param n_seeds: Runs in a trial
    :return: The pruner
    """
    other: BasePruner
    if name == "median":
        other = LatestMedianPruner(startup_trials, n_evaluations, n_seeds)
    elif name == "hyperband":
        first = max(1, n_evaluations // 3)
        other = HyperbandPruner(min_resource=first, max_resource=max(first, n_evaluations * n_seeds))
    else:
        other = NopPruner()
    return DipPruner(deepest_dip, other)
