"""The methods of a study, and what their hyperparameters come from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.algorithms import ALGORITHMS, preset_path
from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX
from sb3_offline_ft.deployment import ChampionChallenger
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.recipe import online_only_arguments
from sb3_offline_ft.study.design.learners import algorithm_class

CALLBACKS: dict[str, type[BaseCallback]] = {"guard": CollapseGuard, "champion": ChampionChallenger}
"""What a method can have besides its algorithm, by the keys of a study."""
ENSEMBLE_SIZE = "ensemble_size"
EXTERNAL = "external"
NOISE = frozenset({"noise_type", "noise_std"})
SET_BY_STUDY = {
    "env": "`env` of the study",
    "dataset": "`datasets` of the study",
    "seed": "`seeds` of the study",
    "n_timesteps": "`interactions` of the study",
    "callback": "`guard` and `champion` of the method",
    "action_noise": "`noise_type` and `noise_std`",
    "device": "`study run --device`",
}
"""Names that are no hyperparameters of a study, and what is in their place."""
_NEVER = {*SET_BY_STUDY, "args", "kwargs", "_init_setup_model", "verbose", "tensorboard_log", "stats_window_size"}


@dataclass(frozen=True)
class Method:
    """
    A way of finetuning.

    :param name: Its name in the study, unique; a variant's is ``<method>+<factor>=<value>``
    :param label: Its name for people
    :param algorithm: Name of its algorithm; :data:`EXTERNAL` if it is a command
    :param pretrained: Whether it starts from the pretrained policy
    :param frozen: Whether the pretrained policy stays as it is
    :param external: The command that is the method, as ``command`` and ``options``; None if it is an algorithm here. It is
        given the data, and pretrains by itself if ``pretrained``
    :param guard: Arguments of its :class:`CollapseGuard`, None if it has none
    :param champion: Arguments of its :class:`ChampionChallenger`, None if it has none
    :param hyperparams: All hyperparameters that are not the algorithm's defaults, as rl_zoo3 writes them
    :param pretraining_hyperparams: The same for the pretraining that it starts from
    :param variant: The values of factors that make it, by the names of the factors; empty for a method as it is listed
    :param base: The listed method that it is a variant of, or its own name
    """

    name: str
    label: str
    algorithm: str
    pretrained: bool = True
    frozen: bool = False
    guard: Mapping[str, Any] | None = field(default=None, hash=False)
    champion: Mapping[str, Any] | None = field(default=None, hash=False)
    external: Mapping[str, Any] | None = field(default=None, hash=False)
    hyperparams: Mapping[str, Any] = field(default_factory=dict, hash=False)
    pretraining_hyperparams: Mapping[str, Any] = field(default_factory=dict, hash=False)
    variant: Mapping[str, Any] = field(default_factory=dict, hash=False)
    base: str = ""

    @property
    def callbacks(self) -> dict[str, Mapping[str, Any]]:
        """Arguments of those of :data:`CALLBACKS` that it has."""
        given = {name: getattr(self, name) for name in CALLBACKS}
        return {name: arguments for name, arguments in given.items() if arguments is not None}

    @property
    def uses_data(self) -> bool:
        """Whether it is run on each dataset."""
        return self.pretrained or self.external is not None

    @property
    def learns_from_evaluations(self) -> bool:
        """Whether the learner needs evaluations of its own, as the reference ``"best"`` of TD3C does without a champion."""
        if self.external is not None:
            return False
        arguments = constructor_arguments(algorithm_class(self.algorithm))
        if self.frozen or self.champion is not None or "constraint_reference" not in arguments:
            return False
        return bool(self.hyperparams.get("constraint_reference", arguments["constraint_reference"]) == "best")


def known_hyperparams(algorithm: str) -> set[str]:
    """The hyperparameters that an algorithm has in a study."""
    cls = algorithm_class(algorithm)
    noise = NOISE if issubclass(cls, OffPolicyAlgorithm) else set()
    return constructor_arguments(cls).keys() - _NEVER | noise


def online_only(algorithm: str) -> frozenset[str]:
    """The hyperparameters that do not act before the first interaction."""
    return online_only_arguments(algorithm_class(algorithm)) | NOISE


def default_of(algorithm: str, name: str) -> Any:
    """An argument's default in the algorithm's own constructor, None if there is no such argument."""
    return constructor_arguments(algorithm_class(algorithm)).get(name)


def known_algorithms() -> list[str]:
    """Names of all algorithms that a study can have."""
    return sorted({*ALGOS, *ALGORITHMS})


def is_ours(algorithm: str) -> bool:
    """Whether an algorithm can start from a pretrained policy."""
    return issubclass(algorithm_class(algorithm), OfflineTD3)


@cache
def _read_preset(algorithm: str) -> dict[str, Any]:
    presets: dict[str, Any] = yaml.safe_load(Path(preset_path(algorithm)).read_text(encoding="utf-8"))
    return presets


class Preset(NamedTuple):
    """What a method begins with: hyperparameters, and arguments of callbacks by what a study calls them."""

    hyperparams: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]


def preset(algorithm: str, env: str) -> Preset:
    """Read the preset of one of our algorithms; an environment without an entry of its own has the default one."""
    presets = _read_preset(algorithm)
    entry = copy.deepcopy(presets.get(env.rpartition(":")[2], presets["default"]))
    names = {cls.__name__: name for name, cls in CALLBACKS.items()}
    callbacks: dict[str, dict[str, Any]] = {name: {} for name in CALLBACKS}
    for callback in entry.pop("callback", None) or ():
        path, arguments = next(iter(callback.items())) if isinstance(callback, Mapping) else (callback, None)
        if path.rpartition(".")[2] in names:
            callbacks[names[path.rpartition(".")[2]]] = dict(arguments or {})
    return Preset({name: value for name, value in entry.items() if name not in ("n_timesteps", "dataset")}, callbacks)


def factor_path(factor: str) -> list[str]:
    """The hyperparameter that a factor sets, and the keys within it."""
    if factor == ENSEMBLE_SIZE:
        return ["policy_kwargs", "n_critics"]
    return factor.removeprefix(FINETUNING_PREFIX).split(".")


def set_path(hyperparams: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested mappings by its path of keys; those within are copied."""
    first, *rest = path
    if rest:
        inner = dict(hyperparams.get(first) or {})
        set_path(inner, rest, value)
        value = inner
    hyperparams[first] = value
