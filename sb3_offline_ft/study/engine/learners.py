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

_NOISES: dict[str, type[NormalActionNoise] | type[OrnsteinUhlenbeckActionNoise]] = {
    "normal": NormalActionNoise,
    "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise,
}


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """
    :param name: An algorithm's name in rl_zoo3, ours included; ``"td3"`` is :class:`OfflineTD3`
    :return: Its class
    """
    if name == PLAIN_TD3:
        return OfflineTD3
    algorithm: type[BaseAlgorithm] = ALGOS[name] if name in ALGOS else algorithms.algorithm_class(name)
    return algorithm


def constructor_arguments(hyperparams: Mapping[str, Any], action_space: spaces.Space[Any]) -> dict[str, Any]:
    """
    Turn hyperparameters as rl_zoo3 writes them into arguments of a constructor.

    :param hyperparams: Hyperparameters, perhaps with ``noise_type`` and ``noise_std``
    :param action_space: Space of the actions
    :return: The arguments
    """
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
    return _NOISES[noise_type](0.0 * ones, noise_std * ones)


def pretraining_recipe(
    algorithm: str, hyperparams: Mapping[str, Any], dataset: OfflineDataset, env: VecEnv, seed: int, device: str
) -> Recipe:
    """
    :param algorithm: Name of the algorithm that pretrains
    :param hyperparams: Its hyperparameters
    :param dataset: The data
    :param env: An environment
    :param seed: Seed of the pretraining
    :param device: Where it is trained
    :return: The recipe of the pretrained learner
    """
    cls = algorithm_class(algorithm)
    assert issubclass(cls, OfflineTD3)
    return Recipe(cls, constructor_arguments(hyperparams, env.action_space), dataset, env, seed, device)


def pretrained_learner(
    algorithm: str, hyperparams: Mapping[str, Any], pretrained: Pretrained, env: VecEnv, seed: int
) -> OfflineTD3:
    """
    :param algorithm: Name of the algorithm that finetunes
    :param hyperparams: Its hyperparameters
    :param pretrained: The pretrained learner
    :param env: The environment to act in
    :param seed: Seed of the finetuning
    :return: A learner of that algorithm, constructed as any other, which starts from the pretrained one
    """
    cls = algorithm_class(algorithm)
    assert issubclass(cls, OfflineTD3)
    return finetuning_learner(cls, constructor_arguments(hyperparams, env.action_space), pretrained, env, seed)


def new_learner_from_scratch(
    algorithm: str, hyperparams: Mapping[str, Any], env: VecEnv, seed: int, device: str
) -> BaseAlgorithm:
    """
    :param algorithm: Name of an algorithm
    :param hyperparams: Its hyperparameters
    :param env: The environment to act in
    :param seed: Its seed
    :param device: Where it is trained
    :return: A learner that knows nothing
    """
    arguments = {"policy": "MlpPolicy", **constructor_arguments(hyperparams, env.action_space)}
    return algorithm_class(algorithm)(env=env, seed=seed, device=device, **arguments)
