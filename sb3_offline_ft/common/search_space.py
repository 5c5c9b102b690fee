"""Search spaces: what tuning draws for a finetuning, as hyperparameters and as arguments of a constructor."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from optuna.trial import BaseTrial, FixedTrial
from stable_baselines3.common.noise import NormalActionNoise

FINETUNING_PREFIX = "finetuning_"
"""Before an argument's name: the value it has after the pretraining only."""
N_TIMESTEPS = "n_timesteps"
FIXED = "fixed"
"""Names of a trial's user attributes that say how long it is and what the user has fixed."""
DEFAULT_TIMESTEPS = 100_000
NOISE = ("noise_type", "noise_std")
DECAY = 100.0
"""What a geometric schedule divides its value by, over the run."""
SCHEDULE, END_FACTOR = "_schedule", "_end_factor"
"""After a hyperparameter's name: the kind of its schedule; the multiple of itself that it goes to in equal ratios."""

Hyperparams = dict[str, Any]
Suggest = Callable[[BaseTrial, str, int], Any]
"""Draws a parameter, given the trial, its name and the number of interactions of the run."""


def choice(*values: Any) -> Suggest:
    """One of some values."""
    return lambda trial, name, _: trial.suggest_categorical(name, values)


def real(low: float, high: float, log: bool = False) -> Suggest:
    """A number in a range."""
    return lambda trial, name, _: trial.suggest_float(name, low, high, log=log)


COMMON: Mapping[str, Suggest] = {
    "finetuning_learning_rate": real(3e-5, 1e-3, log=True),
    "offline_fraction": real(0.0, 0.9),
    "offline_fraction_schedule": choice("constant", "linear"),
    "warmup_steps": lambda trial, name, n: trial.suggest_int(name, max(1, n // 20), max(1, n // 5), log=True),
    "critic_warmup_steps": lambda trial, name, n: trial.suggest_int(name, 0, n // 10),
    "noise_std": real(0.0, 0.3),
    "policy_averaging": choice(0.0, 0.9, 0.99, 0.999),
    "gradient_steps": choice(1, 2),
}
"""What all algorithms have in their search space."""


def tuned_hyperparam(name: str) -> str:
    """The hyperparameter that a parameter sets, alone or with others; it is not tuned if the user has fixed that."""
    return name.removeprefix(FINETUNING_PREFIX).removesuffix(SCHEDULE).removesuffix(END_FACTOR)


class SearchSpace:
    """
    The search space of an algorithm, as rl_zoo3's two tables want it: a sampler and a converter.

    :param algo: The algorithm's name in rl_zoo3
    :param tuned: What draws its parameters, by their names. A parameter is called as the hyperparameter that it sets, with
        ``finetuning_`` before it if the pretraining has a value of its own. ``<name>_schedule`` is the kind of a schedule that
        starts at ``<name>``: constant, linear (to 0) or geometric (to a hundredth); ``<name>_end_factor`` the multiple of
        ``<name>`` that it goes to
    """

    def __init__(self, algo: str, tuned: Mapping[str, Suggest]) -> None:
        self.algo = algo
        self.tuned = tuned

    @property
    def hyperparams(self) -> list[str]:
        """The hyperparameters that are tuned, sorted."""
        return sorted({tuned_hyperparam(name) for name in self.tuned})

    def sample(self, trial: BaseTrial, n_actions: int, n_envs: int, additional_args: Mapping[str, Any]) -> Hyperparams:
        """
        Draw a trial's hyperparameters.

        :param trial: The trial; its user attributes ``n_timesteps`` and ``fixed`` say how many interactions it has and which
            hyperparameters are not to be tuned
        :param n_actions: Number of action dimensions
        :param n_envs: Number of environments
        :param additional_args: What else rl_zoo3 passes to samplers
        :return: Arguments of the constructor for the finetuning
        """
        return finetuning_arguments(self.convert(self.draw(trial)), n_actions)

    def draw(self, trial: BaseTrial, names: Collection[str] | None = None) -> Hyperparams:
        """
        Draw a trial's parameters.

        :param trial: The trial, as for :meth:`sample`
        :param names: Names of the parameters to draw, None for all
        :return: The parameters by name
        """
        n_timesteps = int(trial.user_attrs.get(N_TIMESTEPS, DEFAULT_TIMESTEPS))
        fixed = trial.user_attrs.get(FIXED, ())
        return {
            name: suggest(trial, name, n_timesteps)
            for name, suggest in self.tuned.items()
            if tuned_hyperparam(name) not in fixed and (names is None or name in names)
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
        for name in sampled_params:
            scheduled = name.removesuffix(SCHEDULE).removesuffix(END_FACTOR)
            start = hyperparams.get(scheduled)
            if name.endswith(SCHEDULE):
                hyperparams[scheduled] = _scheduled(hyperparams.pop(name), start)
            elif name.endswith(END_FACTOR):
                hyperparams[scheduled] = f"geo_{start!r}_{start * hyperparams.pop(name)!r}"
        return hyperparams

    def find(self, value_of: Callable[[str], Any], facts: Mapping[str, Any]) -> Hyperparams:
        """
        Find hyperparameters in the search space: the inverse of :meth:`convert`.

        :param value_of: Gives the value of a hyperparameter
        :param facts: Attributes of a trial, as for :meth:`sample`
        :return: The parameters that give these values, as far as the space has them
        """
        found: Hyperparams = {}
        for hyperparam in self.hyperparams:
            found |= self._find_one(hyperparam, value_of(hyperparam), facts)
        return found

    def _find_one(self, hyperparam: str, value: Any, facts: Mapping[str, Any]) -> Hyperparams:
        names = [name for name in self.tuned if tuned_hyperparam(name) == hyperparam]
        trial = FixedTrial({name: self._parameter(name, value) for name in names})
        for attribute, fact in facts.items():
            trial.set_user_attr(attribute, fact)
        with warnings.catch_warnings():
            # That a value is out of range is a warning
            warnings.simplefilter("error")
            try:
                return self.draw(trial, names)
            except (ValueError, TypeError, UserWarning):
                return {}

    def _parameter(self, name: str, value: Any) -> Any:
        """The value that a parameter needs to have for its hyperparameter to have a value; None if there is none."""
        if name == "noise_std":
            return value if value is not None else 0.0
        start, kind, factor = _schedule_parts(value)
        if name.endswith(SCHEDULE):
            return kind
        if name.endswith(END_FACTOR):
            return factor
        if name + END_FACTOR in self.tuned:
            return start if kind in ("constant", "geometric") else None
        if name + SCHEDULE in self.tuned:
            ends_as_drawn = kind != "geometric" or (factor is not None and math.isclose(factor, 1 / DECAY))
            return start if kind is not None and ends_as_drawn else None
        return value


def _scheduled(kind: str, value: float | None) -> Any:
    if kind == "linear":
        return f"lin_{value!r}"
    return f"geo_{value!r}_{value / DECAY!r}" if kind == "geometric" and value is not None else value


def _schedule_parts(value: Any) -> tuple[Any, str | None, float | None]:
    """Begin of a schedule, which of the search space's kinds it is, and what its end is as a multiple of its begin."""
    words = {"keep": 1.0, "drop": 0.0}
    value = words.get(value, value) if isinstance(value, str) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), "constant", 1.0
    kind, *numbers = value.split("_") if isinstance(value, str) else ("",)
    try:
        start, end = (*map(float, numbers), 0.0)[:2]
    except ValueError:
        return None, None, None
    if kind == "lin" and end == 0:
        return start, "linear", 0.0
    if kind == "geo" and start > 0 and end > 0:
        return start, "geometric", end / start
    return None, None, None


def finetuning_arguments(hyperparams: Mapping[str, Any], n_actions: int) -> Hyperparams:
    """
    :param hyperparams: What :meth:`SearchSpace.convert` returned
    :param n_actions: Number of action dimensions
    :return: Arguments of the constructor for the finetuning
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
    whole_run: Hyperparams = {}
    finetuning: Hyperparams = {}
    for name, value in hyperparams.items():
        (finetuning if name.startswith(FINETUNING_PREFIX) else whole_run)[name.removeprefix(FINETUNING_PREFIX)] = value
    return whole_run, finetuning
