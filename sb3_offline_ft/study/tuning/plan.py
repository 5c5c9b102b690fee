"""What a tuning searches: which method of a study, on which data and seeds, in which space."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from sb3_offline_ft.algorithms import ALGORITHMS, search_space
from sb3_offline_ft.common.search_space import FIXED, N_TIMESTEPS, Hyperparams, SearchSpace, split_finetuning
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.study.design.methods import Method, default_of
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.worker import WorkerSettings
from sb3_offline_ft.tuning.objective import Objective, number_of_last
from sb3_offline_ft.tuning.pruner import PRUNERS, DipPruner, make_pruner
from sb3_offline_ft.tuning.samplers import StudySeed, TrialSeededSampler

SAMPLERS = ("tpe", "random")
FEWEST_SEEDS = 2
FEWEST_TO_SHOW = 6
"""Seeds without which no p-value of the sign-flip test is below 0.05: with 6 the smallest is 2 / 2^6 = 0.031."""
FIRST_FRESH_SEED = 1000
"""Far from a study's seeds, so that it may get more of them."""


@dataclass(frozen=True)
class TuningSettings(WorkerSettings):
    """
    What is asked of a tuning, besides what :class:`WorkerSettings` says.

    :param algo: Algorithm to tune, by its name in rl_zoo3
    :param method: Name of the study's method to tune; None for the first without guard and champion that has the
        algorithm
    :param dataset: Label of the dataset, None for the study's first
    :param n_trials: Trials in all, those of earlier calls included
    :param n_seeds: Seeds that each trial is averaged over
    :param same_seeds: Whether these are the study's first ones instead of seeds that it does not have
    :param dip_penalty: Weight of the dip in a trial's value
    :param prune_dip: Depth of a dip beyond which a trial is given up at once
    :param sampler: ``"tpe"`` or ``"random"``
    :param pruner: ``"median"``, ``"hyperband"`` or ``"none"``
    :param startup_trials: Random trials before the sampler learns from them, and finished ones that the pruner waits for
    :param fixed: Hyperparameters that are not tuned
    """

    algo: str = "td3c"
    method: str | None = None
    dataset: str | None = None
    n_trials: int = 30
    n_seeds: int = FEWEST_SEEDS
    same_seeds: bool = False
    dip_penalty: float = 1.0
    prune_dip: float = 0.5
    sampler: str = "tpe"
    pruner: str = "median"
    startup_trials: int = 10
    fixed: tuple[str, ...] = ()

    @property
    def search_facts(self) -> dict[str, Any]:
        """How trials are drawn and given up, in the form of JSON; no depth of a dip if all are allowed."""
        facts = {name: getattr(self, name) for name in ("sampler", "pruner", "startup_trials", "prune_dip")}
        return facts | ({"prune_dip": None} if math.isinf(self.prune_dip) else {})

    def check(self) -> None:
        """Refuse numbers that are out of range, and unknown names."""
        if self.n_seeds < FEWEST_SEEDS:
            raise ValueError(
                f"`--seeds` must be at least {FEWEST_SEEDS}, found {self.n_seeds}: the best of many trials with one seed each "
                "is the luckiest one, not the best one."
            )
        for name, value, least in (("--n-trials", self.n_trials, 1), ("--startup-trials", self.startup_trials, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, found {value}.")
        if not 0 <= self.dip_penalty < math.inf:
            raise ValueError(f"`--dip-penalty` must be a finite number of at least 0, found {self.dip_penalty}.")
        if not self.prune_dip > 0:
            raise ValueError(f"`--prune-dip` must be above 0, or inf for never, found {self.prune_dip}.")
        for name, word, known in (
            ("--algo", self.algo, ALGORITHMS),
            ("--sampler", self.sampler, SAMPLERS),
            ("--pruner", self.pruner, PRUNERS),
        ):
            if word not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, found {word!r}.")


class TuningPlan:
    """
    A tuning of the finetuning, in the conditions of a study.

    :param settings: What is asked for
    :param protocol: The study's protocol
    :raises ValueError: Method, dataset or hyperparameter is unknown
    """

    def __init__(self, settings: TuningSettings, protocol: Protocol) -> None:
        settings.check()
        self.settings = settings
        self.study = protocol
        self.method = self._method()
        self.dataset = self._dataset()
        self.space: SearchSpace = search_space(self.method.algorithm)
        self._check_fixed()
        self.seeds = self._seeds()
        self.protocol = protocol.changed(
            methods=(self.method,), seeds=self.seeds, datasets={self.dataset: protocol.datasets[self.dataset]}
        )
        self.n_evaluations = protocol.interactions // protocol.evaluation.every

    def _method(self) -> Method:
        candidates = [
            each for each in self.study.methods if each.algorithm in ALGORITHMS and each.pretrained and not each.frozen
        ]
        file, settings = self.study.file, self.settings
        if settings.method is not None:
            names = [each.name for each in candidates]
            if settings.method not in names:
                raise ValueError(
                    f"{file}: `--method {settings.method}` is no method that can be tuned: it must start from the pretrained "
                    f"policy, and its algorithm be {', '.join(ALGORITHMS)}. "
                    + (suggestion(settings.method, names) if names else "There is none.")
                )
            return candidates[names.index(settings.method)]
        with_algorithm = [each for each in candidates if each.algorithm == settings.algo and not each.variant]
        if not with_algorithm:
            raise ValueError(
                f"{file}: no method has the algorithm {settings.algo} and starts from the pretrained policy: add "
                f"`{settings.algo}: {{algorithm: {settings.algo}}}` to `methods`."
            )
        return next((each for each in with_algorithm if not each.callbacks), with_algorithm[0])

    def _dataset(self) -> str:
        label, labels = self.settings.dataset, list(self.study.datasets)
        if label is None:
            return labels[0]
        if label not in labels:
            file = self.study.file
            raise ValueError(f"{file}: `--dataset {label}` is no dataset of the study. {suggestion(label, labels)}")
        return label

    def _check_fixed(self) -> None:
        known, fixed = self.space.hyperparams, set(self.settings.fixed)
        for name in sorted(fixed - set(known)):
            raise ValueError(f"`--fix {name}` is no hyperparameter that is tuned. {suggestion(name, known)}")
        if len(fixed) == len(known):
            raise ValueError("All hyperparameters are fixed with `--fix`: leave one to tune.")

    def _seeds(self) -> tuple[int, ...]:
        """Fresh ones: what was tuned on seeds looks better on them than on others."""
        known, n = self.study.seeds if self.settings.same_seeds else (), self.settings.n_seeds
        return (*known, *_fresh(n, self.study.seeds))[:n]

    def fresh_seeds(self, n: int) -> list[int]:
        """Seeds that neither the study nor this tuning has."""
        return _fresh(n, (*self.study.seeds, *self.seeds))

    @cached_property
    def name(self) -> str:
        """Name of the Optuna study: another one for other conditions, so that only comparable trials are in it."""
        return f"{self.study.name}/tune/{self.dataset}/{self.method.name}/{self.digest}"

    @cached_property
    def digest(self) -> str:
        """8 hexadecimal digits, equal for trials that can be compared."""
        facts = {
            "runs": [self.protocol.cell_key(self.cell(self.method, seed)) for seed in self.seeds],
            "penalty": self.settings.dip_penalty,
            "fixed": sorted(set(self.settings.fixed)),
            "space": sorted(self.space.tuned),
            "random_return": self.study.random_return,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def cell(self, method: Method, seed: int) -> Cell:
        """What a trial runs."""
        return Cell(self.dataset, method, seed)

    @cached_property
    def objective(self) -> Objective:
        """What is maximised."""
        # No trial has a shorter warm-up than the space allows, unless the preset has
        shortest = min(self.study.interactions // 20, self.frozen_until(self.method.hyperparams))
        last = number_of_last(self.n_evaluations)
        return Objective(self.settings.dip_penalty, self.study.random_return, shortest, last)

    def frozen_until(self, hyperparams: Mapping[str, Any]) -> int:
        """Interactions with the pretrained policy, by hyperparameters of the finetuning."""
        return int(hyperparams.get("warmup_steps", default_of(self.method.algorithm, "warmup_steps")))

    @property
    def facts(self) -> dict[str, Any]:
        """Attributes that the search space wants each trial to have."""
        return {N_TIMESTEPS: self.study.interactions, FIXED: sorted(set(self.settings.fixed))}

    def changed(self, parameters: Mapping[str, Any]) -> Hyperparams:
        """The hyperparameters of the finetuning that parameters of a trial set."""
        whole_run, finetuning = split_finetuning(self.space.convert(parameters))
        return whole_run | finetuning

    def tuned(self, parameters: Mapping[str, Any] | None) -> Method:
        """The method with the parameters of a trial, None for the preset's."""
        if parameters is None:
            return self.method
        return replace(
            self.method, name="tuned", label="tuned", hyperparams=dict(self.method.hyperparams) | self.changed(parameters)
        )

    def preset_parameters(self) -> Hyperparams:
        """The parameters of the search space that the method has as it is, as far as the space has its values."""

        def value_of(hyperparam: str) -> Any:
            return self.method.hyperparams.get(hyperparam, default_of(self.method.algorithm, hyperparam))

        return self.space.find(value_of, self.facts)

    def sampler(self) -> BaseSampler:
        """The sampler, whose draws depend on the study's seeds and the earlier trials only."""

        def create(seed: int) -> BaseSampler:
            if self.settings.sampler == "random":
                return RandomSampler(seed=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return TPESampler(n_startup_trials=self.settings.startup_trials, seed=seed, constant_liar=True)

        return TrialSeededSampler(create, StudySeed(self.seeds[0], None))

    def pruner(self) -> DipPruner:
        """Which trials are given up."""
        settings = self.settings
        return make_pruner(settings.pruner, settings.prune_dip, settings.startup_trials, self.n_evaluations, len(self.seeds))


def _fresh(n: int, taken: Sequence[int]) -> list[int]:
    return list(islice((seed for seed in count(FIRST_FRESH_SEED) if seed not in taken), n))
