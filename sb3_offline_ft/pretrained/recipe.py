"""What a pretrained learner depends on, so that equal recipes are pretrained once."""

import hashlib
import inspect
import json
import marshal
from collections.abc import Mapping
from functools import cached_property
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from minari.serialization import serialize_space
from stable_baselines3.common.utils import ConstantSchedule, get_device
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped, unwrap_vec_normalize

import sb3_offline_ft
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.machine import code_digest
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.offline_td3 import OfflineTD3

SAME_THROUGHOUT = ("policy", "policy_kwargs", "env", "dataset", "offline_steps", "normalize_observations", "seed", "device")
"""Arguments that cannot have another value in the finetuning than in the pretraining."""
SHARED_WITH_PRETRAINING = tuple(name for name in SAME_THROUGHOUT if name not in ("env", "dataset", "seed", "device"))
"""Those among them that are hyperparameters."""

_ELSEWHERE = frozenset({"env", "dataset", "seed", "device", "_init_setup_model"})
_PACKAGES = (sb3_offline_ft, stable_baselines3, th, np)


def online_only_arguments(algorithm: type) -> frozenset[str]:
    """
    :param algorithm: A class of this package, or derived from one
    :return: Arguments of its constructor that do not act before the first interaction; all others are part of the recipe
    """
    return frozenset().union(*(vars(base).get("online_only_arguments", ()) for base in algorithm.__mro__))


class Recipe:
    """
    A pretraining: the same recipe gives the same weights.

    :param algorithm: The algorithm's class
    :param hyperparams: Arguments of its constructor; those that act online only are left out
    :param dataset: The data
    :param env: An environment, whose spaces and normalization count, not its dynamics
    :param seed: Seed of the learner
    :param device: Where it is trained
    """

    def __init__(
        self,
        algorithm: type[OfflineTD3],
        hyperparams: Mapping[str, Any],
        dataset: OfflineDataset,
        env: VecEnv,
        seed: int,
        device: th.device | str = "auto",
    ) -> None:
        self.algorithm = algorithm
        self._left_out = online_only_arguments(algorithm) | _ELSEWHERE
        self.hyperparams = {name: value for name, value in hyperparams.items() if name not in self._left_out}
        self.dataset = dataset
        self.seed = seed
        self.device = get_device(device)
        self._env_facts = {
            "observation_space": _described(env.observation_space),
            "action_space": _described(env.action_space),
            "normalization": _normalization(env),
        }

    @property
    def offline_steps(self) -> int:
        """Gradient steps of the pretraining."""
        return int(self._settings["offline_steps"])

    @property
    def _settings(self) -> dict[str, Any]:
        arguments = constructor_arguments(self.algorithm)
        defaults = {name: default for name, default in arguments.items() if default is not inspect.Parameter.empty}
        return {name: value for name, value in defaults.items() if name not in self._left_out} | self.hyperparams

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the weights depend on, in the form of JSON."""
        return {
            "algorithm": _name(self.algorithm),
            "dataset": {
                "fingerprint": self.dataset.fingerprint,
                "parts": [(part.begin, part.end, part.weight) for part in self.dataset.sources],
            },
            "hyperparams": _canonical(self._settings),
            "seed": self.seed,
            "device": self.device.type,
            **self._env_facts,
            "versions": {package.__name__: package.__version__ for package in _PACKAGES},
            "code": code_digest(self.algorithm),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the facts: equal recipes have equal digests."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.algorithm.__name__}, {self.offline_steps:,} steps on {self.dataset.name}, seed {self.seed}"


def _described(space: spaces.Space[Any]) -> dict[str, str]:
    # What is printed of a space leaves out the bounds of large ones
    return {"space": str(space), "sha256": hashlib.sha256(serialize_space(space).encode()).hexdigest()}


def _normalization(env: VecEnv) -> Any:
    if not is_vecenv_wrapped(env, VecNormalize):
        return None
    vec_normalize = unwrap_vec_normalize(env)
    assert vec_normalize is not None
    names = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys", "ret_rms", "obs_rms")
    return _canonical({"num_envs": env.num_envs, **{name: vars(vec_normalize).get(name) for name in names}})


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _canonical(value: Any) -> Any:
    """Something that JSON can hold and that is the same in each process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "sha256": content}
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    if isinstance(value, ConstantSchedule):
        return value(1.0)
    if isinstance(value, set | frozenset):
        return sorted((_canonical(entry) for entry in value), key=json.dumps)
    if isinstance(value, FunctionType) and "<" in value.__qualname__:
        return _canonical_code(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name(value)
    # What pickle would write of it
    reduced = value.__reduce_ex__(2)
    return reduced if isinstance(reduced, str) else [_canonical(part) for part in reduced]


def _canonical_code(function: FunctionType) -> Any:
    """For a function that no name leads to, such as a lambda."""
    code = hashlib.sha256(marshal.dumps(function.__code__)).hexdigest()
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return {
        "code": code,
        "defaults": _canonical([function.__defaults__, function.__kwdefaults__]),
        "closure": _canonical(cells),
    }
