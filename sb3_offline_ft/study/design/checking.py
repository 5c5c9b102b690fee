"""Finds out before a study starts what would fail only after minutes of it."""

import os
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets import OfflineDataset, as_flattened_by, check_compatible
from sb3_offline_ft.study.design.learners import learner_from_scratch
from sb3_offline_ft.study.design.methods import known_hyperparams

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.protocol import Protocol

SMALL_BUFFER = 1000


def check_protocol(protocol: "Protocol", labels: Iterable[str], commands: Collection[str] | None = None) -> None:
    """
    Make the environment, load the data with these labels, construct each method's learner.

    :param protocol: The protocol
    :param labels: Labels of the datasets
    :param commands: Names of the methods whose commands must be there, by default all

    :raises FileNotFoundError: A dataset is not there
    :raises ValueError: The data does not fit the environment, or a hyperparameter is not possible
    """
    try:
        env = make_vec_env(protocol.env, n_envs=1)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"The environment {protocol.env!r} cannot be made: {error}") from None
    try:
        dataset: OfflineDataset | None = None
        for label in labels:
            dataset = protocol.dataset(label)
            _check_data(dataset, env, protocol.env, f"{protocol.file}: `datasets.{label}`")
            if protocol.commands:
                try:
                    check_for_commands(dataset)
                except ValueError as error:
                    raise ValueError(f"{protocol.file}: `datasets.{label}`: {error}") from None
        seen: list[Any] = []
        for method in protocol.methods:
            if method.external is not None:
                if commands is None or method.name in commands:
                    where = f"{protocol.file}: `methods.{method.name}.external`"
                    check_command(method.external["command"][0], protocol.folder, where)
                continue
            data = dataset if method.pretrained else None
            made = [(f"methods.{method.name}", method.algorithm, method.hyperparams)]
            if method.pretrained:
                made.insert(0, ("pretraining", protocol.pretraining.algorithm, method.pretraining_hyperparams))
            for what, algorithm, hyperparams in made:
                settings = (algorithm, dict(hyperparams), data is None)
                if settings not in seen:
                    seen.append(settings)
                    _check_learner(f"{protocol.file}: `{what}`", algorithm, hyperparams, data, env)
    finally:
        env.close()


def _check_data(dataset: OfflineDataset, env: VecEnv, env_id: str, where: str) -> None:
    try:
        check_compatible(as_flattened_by(dataset, env), env.observation_space, env.action_space)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if dataset.env_id not in (None, env_id, env_id.rpartition(":")[2]):
        warn(f"{where} was recorded in {dataset.env_id}, the study is about {env_id}.")


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
            learner_from_scratch(algorithm, arguments, env, 0, "cpu")
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"{what} is not possible with {algorithm}: {error}") from None


def check_for_commands(dataset: OfflineDataset) -> None:
    """
    Check that methods which are commands can be given a dataset.

    :raises ValueError: They cannot
    """
    if isinstance(dataset.observations, dict):
        raise ValueError(f"{dataset.name} has `Dict` observations: commands are given data with one array of them.")
    if any(part.weight is not None for part in dataset.sources):
        raise ValueError(f"{dataset.name} has weighted parts, of which commands know nothing: leave out the weights.")


def check_command(word: str, folder: Path, what: str) -> None:
    """
    Check that there is a command; one with a path is looked for in the study's folder, others where the system looks.

    :raises ValueError: There is none
    """
    if shutil.which(word if os.path.dirname(word) == "" else str(folder / word)) is None:
        raise ValueError(f"{what} has the command {word!r}, which is not there or cannot be run. Install it, or name another.")
