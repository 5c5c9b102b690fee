"""The learners of a study's cells: made from a method's settings, and started from a pretrained one."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft import algorithms
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.recipe import Recipe
from sb3_offline_ft.pretrained.start import Pretrained, finetuning_learner

PLAIN_TD3 = "td3"
"""In a study it is :class:`OfflineTD3`: SB3's TD3, which can start from pretrained weights and data."""
NOISES: dict[str, type[NormalActionNoise] | type[OrnsteinUhlenbeckActionNoise]] = {
    "normal": NormalActionNoise,
    "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise,
}


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """The class of an algorithm by its name in rl_zoo3, ours included."""
    if name == PLAIN_TD3:
        return OfflineTD3
    algorithm: type[BaseAlgorithm] = ALGOS[name] if name in ALGOS else algorithms.algorithm_class(name)
    return algorithm


def our_class(name: str) -> type[OfflineTD3]:
    """The class of an algorithm that can start from a pretrained policy."""
    cls = algorithm_class(name)
    assert issubclass(cls, OfflineTD3)
    return cls


def arguments_of(hyperparams: Mapping[str, Any], action_space: spaces.Space[Any]) -> dict[str, Any]:
    """Arguments of a constructor from hyperparameters as rl_zoo3 writes them, perhaps with a noise."""
    # Learners write into mappings that they are given
    arguments: dict[str, Any] = ExperimentManager._preprocess_schedules(copy.deepcopy(dict(hyperparams)))
    noise_type, noise_std = arguments.pop("noise_type", None), arguments.pop("noise_std", 0.0)
    if noise_type is not None:
        arguments["action_noise"] = _action_noise(noise_type, noise_std, action_space)
    if isinstance(arguments.get("train_freq"), list):
        arguments["train_freq"] = tuple(arguments["train_freq"])
    return arguments


def _action_noise(noise_type: str, noise_std: float, action_space: spaces.Space[Any]) -> ActionNoise:
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"`noise_type` needs a Box action space, found {action_space}: leave it out.")
    ones = np.ones(action_space.shape)
    return NOISES[noise_type](0.0 * ones, noise_std * ones)


def pretraining_recipe(
    algorithm: str, hyperparams: Mapping[str, Any], dataset: OfflineDataset, env: VecEnv, seed: int, device: str
) -> Recipe:
    """What the pretrained learner is made of."""
    return Recipe(our_class(algorithm), arguments_of(hyperparams, env.action_space), dataset, env, seed, device)


def pretrained_learner(
    algorithm: str, hyperparams: Mapping[str, Any], pretrained: Pretrained, env: VecEnv, seed: int
) -> OfflineTD3:
    """A learner of an algorithm, constructed as any other, which starts from the pretrained one."""
    return finetuning_learner(our_class(algorithm), arguments_of(hyperparams, env.action_space), pretrained, env, seed)


def learner_from_scratch(algorithm: str, hyperparams: Mapping[str, Any], env: VecEnv, seed: int, device: str) -> BaseAlgorithm:
    """A learner that knows nothing."""
    arguments = {"policy": "MlpPolicy", **arguments_of(hyperparams, env.action_space)}
    return algorithm_class(algorithm)(env=env, seed=seed, device=device, **arguments)
