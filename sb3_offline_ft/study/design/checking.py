"""Finds out before a study starts what would fail only after minutes of it."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.datasets import OfflineDataset, as_flattened_by, check_compatible
from sb3_offline_ft.study.design.methods import known_hyperparams
from sb3_offline_ft.study.engine.learners import new_learner_from_scratch

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Protocol

SMALL_BUFFER = 1000


def make_env(env: str) -> VecEnv:
    """
    :param env: Gymnasium id of an environment
    :return: The environment, as runs of a study have it
    :raises ValueError: It cannot be made
    """
    try:
        return make_vec_env(env, n_envs=1)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"The environment {env!r} cannot be made: {error}") from None


def check_protocol(protocol: "Protocol", labels: Iterable[str]) -> None:
    """
    Make the environment, load the data, construct each method's learner.

    :param protocol: The protocol
    :param labels: Labels of the datasets to load
    :raises FileNotFoundError: A dataset is not there
    :raises ValueError: The data does not fit the environment, or a hyperparameter is not possible
    """
    env = make_env(protocol.env)
    try:
        dataset: OfflineDataset | None = None
        for label in labels:
            dataset = protocol.dataset(label)
            check_data(dataset, env, protocol.env, f"{protocol.file}: `datasets.{label}`")
        seen: list[Any] = []
        for method in protocol.methods:
            data = dataset if method.pretrained else None
            for what, algorithm, hyperparams in (
                ("pretraining", protocol.pretraining.algorithm, method.pretraining_hyperparams),
                (f"methods.{method.name}", method.algorithm, method.hyperparams),
            ):
                settings = (algorithm, dict(hyperparams), data is None)
                if (what == "pretraining" and not method.pretrained) or settings in seen:
                    continue
                seen.append(settings)
                _check_learner(f"{protocol.file}: `{what}`", algorithm, hyperparams, data, env)
    finally:
        env.close()


def check_data(dataset: OfflineDataset, env: VecEnv, env_id: str, where: str) -> None:
    """
    :param dataset: A dataset
    :param env: The environment
    :param env_id: Its id
    :param where: Names the dataset in messages
    :raises ValueError: It does not fit the environment
    """
    try:
        check_compatible(as_flattened_by(dataset, env), env.observation_space, env.action_space)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if dataset.env_id not in (None, env_id, env_id.rpartition(":")[2]):
        warnings.warn(f"{where} was recorded in {dataset.env_id}, the study is about {env_id}.", stacklevel=3)


def _check_learner(
    what: str, algorithm: str, hyperparams: Mapping[str, Any], dataset: OfflineDataset | None, env: VecEnv
) -> None:
    arguments = dict(hyperparams)
    if "buffer_size" in known_hyperparams(algorithm):
        # No memory for a learner that never learns
        arguments["buffer_size"] = min(arguments.get("buffer_size", SMALL_BUFFER), SMALL_BUFFER)
    if dataset is not None:
        arguments["dataset"] = dataset
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            new_learner_from_scratch(algorithm, arguments, env, 0, "cpu")
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"{what} is not possible with {algorithm}: {error}") from None
