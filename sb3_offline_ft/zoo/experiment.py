"""What rl_zoo3's ``ExperimentManager`` does differently for our algorithms: presets, early checks, no empty run folders."""

import inspect
import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.zoo.presets import ALGORITHMS, preset_path

_EXTENDED = "_extended_by_sb3_offline_ft"
_RUN_FOLDER = "_run_folder_created_by_sb3_offline_ft"

Method = Callable[..., Any]


class _RunWatch(BaseCallback):
    """
    Notes whether training has made a step. It comes first in the list of callbacks because ``ExperimentManager.learn``
    ends the first one by hand, and rl_zoo3's progress bar fails there, hiding the true error, if it never started.

    :param followed: the callback that ``ExperimentManager.learn`` would have ended by hand
    """

    def __init__(self, followed: BaseCallback | None) -> None:
        super().__init__()
        self._followed = followed
        self._started = False
        self.stepped = False

    def _on_training_start(self) -> None:
        self._started = True

    def _on_step(self) -> bool:
        self.stepped = True
        return True

    def _on_training_end(self) -> None:
        if self._started and self._followed is not None:
            self._followed.on_training_end()


def _is_ours(manager: Any) -> bool:
    return manager.algo in ALGORITHMS


def _remove_created_folder(manager: Any) -> None:
    folder = manager.__dict__.pop(_RUN_FOLDER, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _with_preset(original: Method) -> Method:
    signature = inspect.signature(original)

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _is_ours(self) and not signature.bind(self, *args, **kwargs).arguments.get("config"):
            self.config = preset_path(self.algo)

    return __init__


def _with_dataset_check(original: Method) -> Method:
    @wraps(original)
    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if _is_ours(self) and self.optimize_hyperparameters:
            raise ValueError(
                f"`-optimize` is not supported for {self.algo} yet: set hyperparameters with `-params` or `-conf`."
            )
        hyperparams, saved_hyperparams = original(self)
        dataset = hyperparams.get("dataset")
        if _is_ours(self) and isinstance(dataset, str):
            from sb3_offline_ft.datasets import check_spec

            check_spec(dataset)
        return hyperparams, saved_hyperparams

    return read_hyperparameters


def _with_action_space_check(original: Method) -> Method:
    @wraps(original)
    def _preprocess_action_noise(self: Any, hyperparams: Any, saved_hyperparams: Any, env: VecEnv) -> Any:
        if _is_ours(self) and not isinstance(env.action_space, spaces.Box):
            raise ValueError(
                f"{self.algo} needs a Box action space with finite bounds, {self.env_name} has {env.action_space}: "
                "use an environment with continuous actions, or an algorithm for discrete ones such as dqn."
            )
        return original(self, hyperparams, saved_hyperparams, env)

    return _preprocess_action_noise


def _create_run_folder(manager: Any) -> None:
    # Exclusive creation: another run may have taken the number since it was chosen.
    while True:
        try:
            os.makedirs(manager.save_path)
        except FileExistsError:
            stem, _, number = manager.save_path.rpartition("_")
            if not (os.path.isdir(manager.save_path) and number.isdigit()):
                raise
            manager.save_path = f"{stem}_{int(number) + 1}"
            manager.params_path = f"{manager.save_path}/{manager.env_name}"
        else:
            setattr(manager, _RUN_FOLDER, manager.save_path)
            return


def _with_clear_folder_error(original: Method) -> Method:
    @wraps(original)
    def create_log_folder(self: Any) -> None:
        if not _is_ours(self):
            original(self)
            return
        try:
            _create_run_folder(self)
            original(self)
        except OSError as error:
            raise OSError(
                f"The run folder {self.save_path!r} cannot be created: {error.strerror or error} ({error.filename!r}). "
                "Choose a folder that can be written to with `-f <log folder>`."
            ) from None

    return create_log_folder


def _with_cleanup_of_setup(original: Method) -> Method:
    @wraps(original)
    def setup_experiment(self: Any) -> Any:
        try:
            return original(self)
        except Exception:
            if _is_ours(self):
                _remove_created_folder(self)
            raise

    return setup_experiment


def _with_cleanup_of_learn(original: Method) -> Method:
    @wraps(original)
    def learn(self: Any, model: BaseAlgorithm) -> None:
        guards = [callback for callback in self.callbacks if hasattr(callback, "use_default_path")]
        for guard in guards:
            guard.use_default_path(self.save_path)
        try:
            _learn(self, model)
        finally:
            # rl-zoo3 ends only the first callback after an interrupt
            for guard in guards:
                guard.on_training_end()

    def _learn(self: Any, model: BaseAlgorithm) -> None:
        if not _is_ours(self):
            original(self, model)
            return
        watch = _RunWatch(self.callbacks[0] if self.callbacks else None)
        self.callbacks.insert(0, watch)
        updates = getattr(model, "_n_updates", 0)
        try:
            original(self, model)
        except Exception:
            # Without a model inside, the folder would only be in the way: enjoy takes the latest one.
            if not watch.stepped and getattr(model, "_n_updates", 0) == updates:
                _remove_created_folder(self)
            raise
        finally:
            self.callbacks.remove(watch)

    return learn


_EXTENSIONS: dict[str, Callable[[Method], Method]] = {
    "__init__": _with_preset,
    "read_hyperparameters": _with_dataset_check,
    "create_log_folder": _with_clear_folder_error,
    "_preprocess_action_noise": _with_action_space_check,
    "setup_experiment": _with_cleanup_of_setup,
    "learn": _with_cleanup_of_learn,
}


def extend_experiment_manager() -> None:
    """Wrap the methods of rl_zoo3's ``ExperimentManager``, once; for other algorithms they do what they did."""
    if _EXTENDED in vars(ExperimentManager):
        return
    for name, extension in _EXTENSIONS.items():
        setattr(ExperimentManager, name, extension(getattr(ExperimentManager, name)))
    setattr(ExperimentManager, _EXTENDED, True)
