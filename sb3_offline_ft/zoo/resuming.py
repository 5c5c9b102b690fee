"""``--resume <run folder>``: a run of rl_zoo3 that died goes on in its own folder."""

import argparse
import importlib
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.checkpoints import CheckpointRun
from sb3_offline_ft.checkpoints.folder import CheckpointFolder
from sb3_offline_ft.checkpoints.resuming import go_on_with
from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.datasets.files.zoo import ARGUMENTS, CONFIG, OF_ENVIRONMENT, read_zoo_yaml
from sb3_offline_ft.zoo.manifest import MANIFEST
from sb3_offline_ft.zoo.recording import RecordingManager

OF_A_RUN = {"callback", "monitor_kwargs", "n_envs", "n_timesteps", "noise_std", "noise_type"}
"""Hyperparameters of rl_zoo3 that are no arguments of an algorithm."""


class _Resumed:
    """What differs in an ``ExperimentManager`` whose run goes on: hyperparameters, folder and files are there."""

    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        print(f"Going on with {self.save_path}")
        # The manifest has them from when the run began
        self.configured, self.sources = self.saved_hyperparams, dict[str, str]()
        return dict(self.saved_hyperparams), dict(self.saved_hyperparams)

    def create_log_folder(self) -> None:
        pass

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        pass

    def create_envs(self: Any, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        kwargs = self.monitor_kwargs
        if not (eval_env or no_log):
            self.monitor_kwargs = {**kwargs, "override_existing": False}
        try:
            return cast(VecEnv, super().create_envs(n_envs, eval_env=eval_env, no_log=no_log))  # type: ignore[misc]
        finally:
            self.monitor_kwargs = kwargs

    def _pretrain(self, model: BaseAlgorithm) -> None:
        """It is in the checkpoint, or goes on from there."""


@cache
def _resumed(cls: type[ExperimentManager]) -> type[ExperimentManager]:
    return type(cls.__name__, (_Resumed, cls), {"__module__": cls.__module__})


def resume_run(folder: Path) -> BaseAlgorithm:
    """
    Go on with a run, and save its agent at the end as rl_zoo3 does.

    :param folder: The run's folder, such as ``logs/td3c/Hopper-v5_1``
    :return: The agent
    :raises ValueError: It is no folder of a run, or there is no intact checkpoint in it
    """
    settings = next(iter(folder.glob(f"*/{ARGUMENTS}")), None)
    if settings is None:
        raise ValueError(
            f"{folder} is no folder of a run of rl_zoo3: expected one with <environment>/{ARGUMENTS} in it, such as "
            "logs/td3c/Hopper-v5_1."
        )
    checkpoints = CheckpointFolder(folder)
    # Whatever is wrong with it is said before environments and data are made
    checkpoint = checkpoints.newest()
    args = argparse.Namespace(**read_zoo_yaml(settings))
    for module in args.gym_packages:
        importlib.import_module(module)
    set_random_seed(args.seed)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    needed = {*constructor_arguments(ALGOS[args.algo]), *OF_ENVIRONMENT, *OF_A_RUN}
    manager = _manager(args, folder, read_zoo_yaml(settings.with_name(CONFIG), needed))
    model, _ = manager.setup_experiment()
    assert isinstance(model, OffPolicyAlgorithm)
    for checkpoint_run in (found for each in manager.callbacks for found in find_callbacks(each, CheckpointRun)):
        checkpoint_run.use_default_path(folder)
    go_on_with(model, checkpoints, checkpoint)
    manager.learn(model)
    manager.save_trained_model(model)
    return model


def _manager(args: argparse.Namespace, folder: Path, hyperparams: dict[str, Any]) -> Any:
    # A run of rl_zoo3's own train may have no manifest, and gets none when half of it is over
    cls = _resumed(RecordingManager if (folder / MANIFEST).is_file() else ExperimentManager)
    manager: Any = cls(
        args,
        args.algo,
        args.env,
        args.log_folder,
        args.tensorboard_log,
        args.n_timesteps,
        args.eval_freq,
        args.eval_episodes,
        args.save_freq,
        args.hyperparams,
        args.env_kwargs,
        args.eval_env_kwargs,
        args.trained_agent,
        seed=args.seed,
        log_interval=args.log_interval,
        save_replay_buffer=args.save_replay_buffer,
        verbose=args.verbose,
        vec_env_type=args.vec_env,
        n_eval_envs=args.n_eval_envs,
        device=args.device,
        config=args.conf_file,
        show_progress=args.progress,
    )
    manager.saved_hyperparams = hyperparams
    manager.save_path = str(folder)
    manager.params_path = f"{folder}/{manager.env_name}"
    return manager
