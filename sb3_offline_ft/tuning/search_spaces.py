"""What ``-optimize`` tunes: hyperparameters of the finetuning, while the pretraining stays as it is."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft.algorithms import ALGORITHMS

FINETUNING_PREFIX = "finetuning_"
"""Before an argument's name: the value it has after the pretraining only."""
TUNING_PREFIX = "tuning_"
"""Before a setting of the tuning, which is none of the algorithm."""
DIP_PENALTY = "dip_penalty"
N_TIMESTEPS = "n_timesteps"
FIXED = "fixed"
"""Names of a trial's user attributes that say how long it is and what the user has fixed."""
DEFAULT_TIMESTEPS = 100_000
NOISE = ("noise_type", "noise_std")
DECAY = 100.0
"""What a geometric schedule divides its value by, over the run."""

Hyperparams = dict[str, Any]
Suggest = Callable[[optuna.trial.BaseTrial, str, int], Any]


@dataclass(frozen=True)
class Tuned:
    """
    One parameter of a search space.

    :param hyperparam: The hyperparameter that it sets, alone or with others; not tuned if the user has fixed that
    :param suggest: Draws it, given the trial, its name and the number of interactions of the run
    """

    hyperparam: str
    suggest: Suggest


def _scheduled(kind: str, value: float) -> float | str:
    if kind == "linear":
        return f"lin_{value!r}"
    return f"geo_{value!r}_{value / DECAY!r}" if kind == "geometric" else value


def _schedule(*kinds: str) -> Suggest:
    return lambda trial, name, _: trial.suggest_categorical(name, kinds)


def _log_float(low: float, high: float) -> Suggest:
    return lambda trial, name, _: trial.suggest_float(name, low, high, log=True)


_COMMON = {
    "finetuning_learning_rate": Tuned("learning_rate", _log_float(3e-5, 1e-3)),
    "offline_fraction": Tuned("offline_fraction", lambda trial, name, _: trial.suggest_float(name, 0.0, 0.9)),
    "offline_fraction_schedule": Tuned("offline_fraction", _schedule("constant", "linear")),
    "warmup_steps": Tuned(
        "warmup_steps", lambda trial, name, n: trial.suggest_int(name, max(1, n // 20), max(1, n // 5), log=True)
    ),
    "critic_warmup_steps": Tuned("critic_warmup_steps", lambda trial, name, n: trial.suggest_int(name, 0, n // 10)),
    "noise_std": Tuned("noise_std", lambda trial, name, _: trial.suggest_float(name, 0.0, 0.3)),
    "policy_averaging": Tuned(
        "policy_averaging", lambda trial, name, _: trial.suggest_categorical(name, (0.0, 0.9, 0.99, 0.999))
    ),
    "gradient_steps": Tuned("gradient_steps", lambda trial, name, _: trial.suggest_categorical(name, (1, 2))),
}

_TD3BC = {
    "online_bc": Tuned("online_bc", _log_float(0.01, 3.0)),
    "online_bc_schedule": Tuned("online_bc", _schedule("constant", "linear", "geometric")),
}

_TD3C = {
    "constraint_reference": Tuned(
        "constraint_reference", lambda trial, name, _: trial.suggest_categorical(name, ("best", "pretrained", "target"))
    ),
    "epsilon": Tuned("epsilon", _log_float(1e-4, 0.1)),
    "epsilon_end_factor": Tuned("epsilon", _log_float(0.1, 10.0)),
    "multiplier_learning_rate": Tuned("multiplier_learning_rate", _log_float(1e-3, 0.1)),
}

_REBRAC = {
    "online_actor_bc": Tuned("online_actor_bc", _log_float(0.05, 2.0)),
    "online_actor_bc_schedule": Tuned("online_actor_bc", _schedule("constant", "linear", "geometric")),
    "online_critic_bc": Tuned("online_critic_bc", lambda trial, name, _: trial.suggest_float(name, 0.0, 1.0)),
}


class SearchSpace:
    """
    The search space of an algorithm, as rl_zoo3's two tables want it: a sampler and a converter.

    :param algo: The algorithm's name in rl_zoo3
    :param tuned: Its parameters by name
    """

    def __init__(self, algo: str, tuned: Mapping[str, Tuned]) -> None:
        self.algo = algo
        self.tuned = tuned

    def sample(self, trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Mapping[str, Any]) -> Hyperparams:
        """
        Draw a trial's hyperparameters.

        :param trial: The trial; its user attributes ``n_timesteps`` and ``fixed`` say how many interactions it has and which
            hyperparameters are not to be tuned
        :param n_actions: Number of action dimensions
        :param n_envs: Number of environments
        :param additional_args: What else rl_zoo3 passes to samplers
        :return: Arguments of the constructor for the finetuning
        """
        return constructor_arguments(self.convert(self.draw(trial)), n_actions)

    def draw(self, trial: optuna.trial.BaseTrial, names: Collection[str] | None = None) -> Hyperparams:
        """
        Draw a trial's parameters.

        :param trial: The trial, as for :meth:`sample`
        :param names: Names of the parameters to draw, None for all
        :return: The parameters by name
        """
        n_timesteps = int(trial.user_attrs.get(N_TIMESTEPS, DEFAULT_TIMESTEPS))
        fixed = trial.user_attrs.get(FIXED, ())
        return {
            name: tuned.suggest(trial, name, n_timesteps)
            for name, tuned in self.tuned.items()
            if tuned.hyperparam not in fixed and (names is None or name in names)
        }

    def convert(self, sampled_params: Mapping[str, Any]) -> Hyperparams:
        """
        Turn a trial's parameters into hyperparameters as a configuration of rl_zoo3 has them.

        :param sampled_params: The parameters by name; those that were not tuned are missing
        :return: The hyperparameters
        :raises ValueError: A parameter is not of this search space
        """
        unknown = [name for name in sampled_params if name not in self.tuned]
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} is not in the search space of {self.algo}, which has "
                f"{', '.join(self.tuned)}: the trial is of another algorithm, or of another version of sb3_offline_ft."
            )
        hyperparams = dict(sampled_params)
        if "noise_std" in hyperparams:
            hyperparams["noise_type"] = "normal"
        for name in self.tuned:
            scheduled = name.removesuffix("_schedule")
            if scheduled != name and name in hyperparams:
                hyperparams[scheduled] = _scheduled(hyperparams.pop(name), hyperparams[scheduled])
        if "epsilon_end_factor" in hyperparams:
            start, factor = hyperparams["epsilon"], hyperparams.pop("epsilon_end_factor")
            hyperparams["epsilon"] = f"geo_{start!r}_{start * factor!r}"
        return hyperparams


def constructor_arguments(hyperparams: Mapping[str, Any], n_actions: int) -> Hyperparams:
    """
    Turn converted hyperparameters into arguments of the constructor for the finetuning.

    :param hyperparams: What :meth:`SearchSpace.convert` returned
    :param n_actions: Number of action dimensions
    :return: The arguments
    """
    whole_run, finetuning = split_finetuning(hyperparams)
    arguments = {name: value for name, value in whole_run.items() if name not in NOISE} | finetuning
    if "noise_std" in hyperparams:
        sigma = hyperparams["noise_std"] * np.ones(n_actions)
        arguments["action_noise"] = NormalActionNoise(mean=np.zeros(n_actions), sigma=sigma)
    return arguments


def split_finetuning(hyperparams: Mapping[str, Any]) -> tuple[Hyperparams, Hyperparams]:
    """
    :param hyperparams: Hyperparameters of a configuration
    :return: Those of the whole run, and without their prefix those of the finetuning only
    """
    whole_run = {name: value for name, value in hyperparams.items() if not name.startswith(FINETUNING_PREFIX)}
    finetuning = {
        name.removeprefix(FINETUNING_PREFIX): value
        for name, value in hyperparams.items()
        if name.startswith(FINETUNING_PREFIX)
    }
    return whole_run, finetuning


def split_tuning(hyperparams: Mapping[str, Any]) -> tuple[Hyperparams, float]:
    """
    Take out what says how ``-optimize`` values trials.

    :param hyperparams: Hyperparameters of a configuration, perhaps with ``tuning_dip_penalty``
    :return: The others, and the weight of a trial's dip in its value, 0 if it is not given
    :raises ValueError: There is no such setting, or it is no finite number of at least 0
    """
    known = TUNING_PREFIX + DIP_PENALTY
    others = {name: value for name, value in hyperparams.items() if not name.startswith(TUNING_PREFIX)}
    for name in hyperparams.keys() - others.keys() - {known}:
        raise ValueError(f"`{name}` is no known setting of the tuning: there is `{known}`.")
    penalty = hyperparams.get(known, 0.0)
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
        raise ValueError(f"`{known}` must be a finite number of at least 0, found {penalty!r}.")
    return others, float(penalty)


SEARCH_SPACES = {
    algo: SearchSpace(algo, {**own, **_COMMON}) for algo, own in {"td3bc": _TD3BC, "td3c": _TD3C, "rebrac": _REBRAC}.items()
}
"""The search spaces by the algorithm's name in rl_zoo3."""


def register_search_spaces() -> None:
    """Add our search spaces to rl_zoo3's two tables, in place; an algorithm that has one there keeps it."""
    for algo in SEARCH_SPACES.keys() & ALGORITHMS.keys() - HYPERPARAMS_SAMPLER.keys():
        HYPERPARAMS_SAMPLER[algo] = SEARCH_SPACES[algo].sample
        HYPERPARAMS_CONVERTER[algo] = SEARCH_SPACES[algo].convert
