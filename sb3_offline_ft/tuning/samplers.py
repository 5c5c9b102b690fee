"""Samplers whose draws are the same again, however many processes share a study."""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.pretrained.cache import PretrainedCache

SEED = "seed"
"""User attribute of a study, and of a trial."""
TRIALS_STREAM, SAMPLERS_STREAM = 2, 3


class StudySeed:
    """
    The seed of a study, which all its processes use: that of the one which came first.

    :param own: The seed this process would use
    :param cache: The folder that they share, None for a study of one process
    """

    def __init__(self, own: int, cache: PretrainedCache | None) -> None:
        self.own = own
        self._cache = cache
        self._seed: int | None = None

    def __call__(self, study: Study) -> int:
        """The study's seed."""
        if self._seed is None:
            with nullcontext() if self._cache is None else self._cache.lock("study", "another process that begins a study"):
                known = study.user_attrs.get(SEED)
                if known is None:
                    study.set_user_attr(SEED, self.own)
                elif known != self.own:
                    print(f"The study's seed is {known}, which is used in place of {self.own}.", flush=True)
            self._seed = int(self.own if known is None else known)
        return self._seed

    def of_trial(self, trial: Any) -> int:
        """The seed of a trial's learner."""
        return derive_seed(derive_seed(self(trial.study), TRIALS_STREAM), trial.number)


class TrialSeededSampler(BaseSampler):
    """
    A sampler whose draws depend on the study's seed, the trial's number and the trials before it only, not on the process:
    processes that share a study draw different parameters, and a study that goes on draws other ones than at its beginning.

    :param create: Makes the sampler for a seed
    :param seed: The study's seed
    """

    def __init__(self, create: Callable[[int], BaseSampler], seed: StudySeed) -> None:
        self._create = create
        self._seed = seed
        self._samplers: dict[int, BaseSampler] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # rl_zoo3 pickles the study with its sampler
        return copy.copy, (self._create(self._seed.own),)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = derive_seed(derive_seed(self._seed(study), SAMPLERS_STREAM), trial.number)
        self._samplers[trial.number] = self._create(seed)
        self._samplers[trial.number].before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._samplers[trial.number].sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Iterable[float] | None) -> None:
        self._samplers.pop(trial.number).after_trial(study, trial, state, None if values is None else list(values))
