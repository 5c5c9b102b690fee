"""What rl_zoo3's ``ExperimentManager`` does differently for our algorithms: presets, early checks, no empty run folders."""

import copy
import inspect
import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

import optuna
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.algorithms import ALGORITHMS, preset_path
from sb3_offline_ft.tuning.search_spaces import split_finetuning, split_tuning

# Modules that only our own runs need are imported where they are used: this one is loaded with rl_zoo3, whoever uses it.

DEFAULT_EVALUATIONS = 10

_EXTENDED = "_extended_by_sb3_offline_ft"
_RUN_FOLDER = "_run_folder_created_by_sb3_offline_ft"
_FINETUNING = "_finetuning_of_sb3_offline_ft"
_PRETRAINING = "_pretraining_of_sb3_offline_ft"
_SEED = "_study_seed_of_sb3_offline_ft"
_DIP_PENALTY = "_dip_penalty_of_sb3_offline_ft"

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


class _TrialNumber(int):
    """A trial's number. rl_zoo3 asks for its truth, and would overlook trial 0."""

    def __bool__(self) -> bool:
        return True


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
        if _is_ours(self):
            _check_study_arguments(self)
        hyperparams, saved_hyperparams = original(self)
        dataset = hyperparams.get("dataset")
        if _is_ours(self) and dataset is not None:
            from sb3_offline_ft.datasets import check_spec, without_trust

            # The consent to unpickle comes from the command line, not from a file of hyperparameters
            saved_hyperparams["dataset"] = without_trust(dataset)
            if "dataset" not in (self.custom_hyperparams or {}):
                hyperparams["dataset"] = dataset = saved_hyperparams["dataset"]
            check_spec(dataset)
        if _is_ours(self) and self.optimize_hyperparameters and self.storage is not None:
            from sb3_offline_ft.tuning.storage import open_storage

            open_storage(self.storage, create=True)
        return hyperparams, saved_hyperparams

    return read_hyperparameters


def _check_study_arguments(manager: Any) -> None:
    if manager.optimize_hyperparameters and manager.continue_training:
        raise ValueError("`-optimize` pretrains by itself, and cannot start from an agent: leave out `-i`.")
    if manager.storage is not None:
        from sb3_offline_ft.tuning.storage import with_absolute_path

        manager.storage = with_absolute_path(manager.storage)
    if manager.trial_id is None:
        return
    if not (manager.storage and manager.study_name):
        raise ValueError("`--trial-id` needs the study that the trial is of: give `--storage` and `--study-name`.")
    from sb3_offline_ft.tuning.storage import describe_trial

    manager.trial_id = _TrialNumber(manager.trial_id)
    print(describe_trial(manager.storage, manager.study_name, manager.trial_id))


def _with_finetuning_arguments(original: Method) -> Method:
    @wraps(original)
    def _preprocess_hyperparams(self: Any, hyperparams: dict[str, Any]) -> Any:
        if not _is_ours(self):
            return original(self, hyperparams)
        hyperparams, dip_penalty = split_tuning(hyperparams)
        setattr(self, _DIP_PENALTY, dip_penalty)
        hyperparams, finetuning = split_finetuning(hyperparams)
        setattr(self, _FINETUNING, self._preprocess_schedules(finetuning))
        if self.optimize_hyperparameters and self.n_evaluations is None:
            self.n_evaluations = DEFAULT_EVALUATIONS
            print(f"Doing {self.n_evaluations} evaluations in each trial: change it with `--n-evaluations`.")
        return original(self, hyperparams)

    return _preprocess_hyperparams


def _with_pretraining(original: Method) -> Method:
    @wraps(original)
    def _preprocess_action_noise(self: Any, hyperparams: Any, saved_hyperparams: Any, env: VecEnv) -> Any:
        if not _is_ours(self):
            return original(self, hyperparams, saved_hyperparams, env)
        try:
            if not isinstance(env.action_space, spaces.Box):
                raise ValueError(
                    f"{self.algo} needs a Box action space with finite bounds, {self.env_name} has {env.action_space}: "
                    "use an environment with continuous actions, or an algorithm for discrete ones such as dqn."
                )
            from sb3_offline_ft.zoo.pretraining import Pretraining

            processed = original(self, hyperparams, saved_hyperparams, env)
            pretraining = Pretraining(self, processed, getattr(self, _FINETUNING))
        except Exception:
            env.close()
            raise
        setattr(self, _PRETRAINING, pretraining)
        return processed | pretraining.finetuning

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
            experiment = original(self)
        except Exception:
            if _is_ours(self):
                _remove_created_folder(self)
            raise
        if _is_ours(self) and experiment is None:
            # A study has no model, for which enjoy would look in the folder
            _remove_created_folder(self)
        return experiment

    return setup_experiment


def _pretrain(manager: Any, model: BaseAlgorithm) -> None:
    try:
        getattr(manager, _PRETRAINING).begin(model)
    except BaseException:
        # As rl_zoo3 does when its own part fails
        if model.env is not None:
            model.env.close()
        raise


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
            _pretrain(self, model)
            original(self, model)
        except (Exception, KeyboardInterrupt):
            # Without a model inside, the folder would only be in the way: enjoy takes the latest one.
            if not watch.stepped and getattr(model, "_n_updates", 0) == updates:
                _remove_created_folder(self)
            raise
        finally:
            self.callbacks.remove(watch)

    return learn


def _with_own_start(original: Method) -> Method:
    @wraps(original)
    def objective(self: Any, trial: optuna.Trial) -> float:
        if not _is_ours(self):
            return float(original(self, trial))
        from sb3_offline_ft.zoo.tuning import run_trial

        seed, dip_penalty = getattr(self, _SEED)(trial.study), getattr(self, _DIP_PENALTY)
        return run_trial(original, self, trial, getattr(self, _PRETRAINING), seed, dip_penalty)

    return objective


def _with_own_seeds(original: Method) -> Method:
    @wraps(original)
    def _create_sampler(self: Any, sampler_method: str) -> Any:
        if not _is_ours(self):
            return original(self, sampler_method)
        from sb3_offline_ft.zoo.tuning import TrialSeededSampler

        def create(seed: int) -> Any:
            seeded = copy.copy(self)
            seeded.seed = seed
            return original(seeded, sampler_method)

        return TrialSeededSampler(create, getattr(self, _SEED))

    return _create_sampler


def _with_clear_study_errors(original: Method) -> Method:
    @wraps(original)
    def hyperparameters_optimization(self: Any) -> None:
        if not _is_ours(self):
            original(self)
            return
        from sb3_offline_ft.zoo.tuning import StudySeed

        pretraining = getattr(self, _PRETRAINING)
        setattr(self, _SEED, StudySeed(self.seed, None if self.storage is None else pretraining.cache))
        try:
            original(self)
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            raise ValueError(
                "No trial was completed, so there is nothing to report: see above why trials failed, or let more of them run."
            ) from None
        finally:
            pretraining.close()

    return hyperparameters_optimization


_EXTENSIONS: dict[str, Callable[[Method], Method]] = {
    "__init__": _with_preset,
    "read_hyperparameters": _with_dataset_check,
    "create_log_folder": _with_clear_folder_error,
    "_preprocess_hyperparams": _with_finetuning_arguments,
    "_preprocess_action_noise": _with_pretraining,
    "setup_experiment": _with_cleanup_of_setup,
    "learn": _with_cleanup_of_learn,
    "_create_sampler": _with_own_seeds,
    "objective": _with_own_start,
    "hyperparameters_optimization": _with_clear_study_errors,
}


def extend_experiment_manager() -> None:
    """Wrap the methods of rl_zoo3's ``ExperimentManager``, once; for other algorithms they do what they did."""
    if _EXTENDED in vars(ExperimentManager):
        return
    for name, extension in _EXTENSIONS.items():
        setattr(ExperimentManager, name, extension(getattr(ExperimentManager, name)))
    setattr(ExperimentManager, _EXTENDED, True)
