"""rl_zoo3's ``ExperimentManager`` for our algorithms: presets, early checks, one pretraining, no empty run folders."""

import copy
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import optuna
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_offline_ft.algorithms import preset_path
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.search_space import split_finetuning
from sb3_offline_ft.common.statistics_file import WholeVecNormalize
from sb3_offline_ft.common.termination import EXIT_CODE, raising_terminated
from sb3_offline_ft.datasets import check_spec, without_trust
from sb3_offline_ft.datasets.files.zoo import LEARNER_STATISTICS
from sb3_offline_ft.deployment.champion_challenger import BEST_MODEL, STATISTICS
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.tuning.objective import split_tuning
from sb3_offline_ft.tuning.samplers import StudySeed, TrialSeededSampler
from sb3_offline_ft.tuning.storage import describe_trial, open_storage, with_absolute_path
from sb3_offline_ft.zoo.pretraining import Pretraining
from sb3_offline_ft.zoo.recording import RecordingManager
from sb3_offline_ft.zoo.trials import prepare_trial

DEFAULT_EVALUATIONS = 10


class _RunWatch(BaseCallback):
    """
    Notes whether training has made a step. It comes first in the list of callbacks because ``ExperimentManager.learn``
    ends the first one by hand, and rl_zoo3's progress bar fails there, hiding the true error, if it never started.

    :param followed: The callback that ``ExperimentManager.learn`` would have ended by hand
    """

    keeps_no_state = True

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


class OfflineExperimentManager(RecordingManager):
    """
    What ``ExperimentManager(args, "td3c", ...)`` gives for each of our algorithms. The parameters are those of rl_zoo3's
    class; without ``config`` the hyperparameters are our preset's.
    """

    pretraining: Pretraining
    study_seed: StudySeed
    dip_penalty = 0.0
    evaluation_seed: int | None = None
    """The seed of environments for evaluation, None for the run's own."""
    _is_terminated = False
    _new_folder: str | None = None
    """The run's folder, as long as it would be in the way if the run failed: enjoy takes the latest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(ExperimentManager.__init__).bind(self, *args, **kwargs).arguments
        if not given.get("config"):
            self.config = preset_path(self.algo)

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """As rl_zoo3's; a folder that no model will be in is removed."""
        try:
            experiment: tuple[BaseAlgorithm, dict[str, Any]] | None = super().setup_experiment()
        except Exception:
            self._remove_new_folder()
            raise
        if experiment is None:
            self._remove_new_folder()
        return experiment

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As rl_zoo3's; data and study are checked before anything is made."""
        self._check_study_arguments()
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        dataset = hyperparams.get("dataset")
        if dataset is not None:
            # The consent to unpickle comes from the command line, not from a file of hyperparameters
            saved_hyperparams["dataset"] = without_trust(dataset)
            if "dataset" not in (self.custom_hyperparams or {}):
                hyperparams["dataset"] = dataset = saved_hyperparams["dataset"]
            check_spec(dataset)
        if self.optimize_hyperparameters and self.storage is not None:
            open_storage(self.storage, create=True)
        return hyperparams, saved_hyperparams

    def _check_study_arguments(self) -> None:
        if self.optimize_hyperparameters and self.continue_training:
            raise ValueError("`-optimize` pretrains by itself, and cannot start from an agent: leave out `-i`.")
        if self.storage is not None:
            self.storage = with_absolute_path(self.storage)
        if self.trial_id is None:
            return
        if not (self.storage and self.study_name):
            raise ValueError("`--trial-id` needs the study that the trial is of: give `--storage` and `--study-name`.")
        self.trial_id = _TrialNumber(self.trial_id)
        print(describe_trial(self.storage, self.study_name, self.trial_id))

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        hyperparams, self.dip_penalty = split_tuning(hyperparams)
        hyperparams, finetuning = split_finetuning(hyperparams)
        self._finetuning = self._preprocess_schedules(finetuning)
        if self.optimize_hyperparameters and self.n_evaluations is None:
            self.n_evaluations = DEFAULT_EVALUATIONS
            print(f"Doing {self.n_evaluations} evaluations in each trial: change it with `--n-evaluations`.")
        return super()._preprocess_hyperparams(hyperparams)

    def _preprocess_action_noise(
        self, hyperparams: dict[str, Any], saved_hyperparams: dict[str, Any], env: VecEnv
    ) -> dict[str, Any]:
        try:
            if not isinstance(env.action_space, spaces.Box):
                raise ValueError(
                    f"{self.algo} needs a Box action space with finite bounds, {self.env_name} has {env.action_space}: "
                    "use an environment with continuous actions, or an algorithm for discrete ones such as dqn."
                )
            processed: dict[str, Any] = super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)
            self.pretraining = Pretraining(self, processed, self._finetuning)
        except Exception:
            env.close()
            raise
        return processed | self._finetuning

    def create_log_folder(self) -> None:
        """As rl_zoo3's, with a folder that no other run has, and a clear error."""
        try:
            self._create_new_folder()
            super().create_log_folder()  # type: ignore[no-untyped-call]
        except OSError as error:
            raise OSError(
                f"The run folder {self.save_path!r} cannot be created: {error.strerror or error} ({error.filename!r}). "
                "Choose a folder that can be written to with `-f <log folder>`."
            ) from None

    def _create_new_folder(self) -> None:
        # Exclusive creation: another run may have taken the number since it was chosen.
        while True:
            try:
                os.makedirs(self.save_path)
            except FileExistsError:
                stem, _, number = self.save_path.rpartition("_")
                if not (os.path.isdir(self.save_path) and number.isdigit()):
                    raise
                self.save_path = f"{stem}_{int(number) + 1}"
                self.params_path = f"{self.save_path}/{self.env_name}"
            else:
                self._new_folder = self.save_path
                return

    def _remove_new_folder(self) -> None:
        if self._new_folder is not None:
            shutil.rmtree(self._new_folder, ignore_errors=True)
            self._new_folder = None

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As rl_zoo3's; all trials begin with the same evaluation episodes."""
        maker = self
        if eval_env and self.evaluation_seed is not None:
            maker = copy.copy(self)
            maker.seed = self.evaluation_seed
        env: VecEnv = ExperimentManager.create_envs(maker, n_envs, eval_env=eval_env, no_log=no_log)
        return env

    def learn(self, model: BaseAlgorithm) -> None:
        """As rl_zoo3's, after a pretraining if the finetuning differs from it; an early error leaves no folder."""
        keeping_files = [callback for callback in self.callbacks if hasattr(callback, "use_default_path")]
        for callback in keeping_files:
            callback.use_default_path(self.save_path)
        watch = _RunWatch(self.callbacks[0] if self.callbacks else None)
        self.callbacks.insert(0, watch)
        updates = getattr(model, "_n_updates", 0)
        try:
            with self._noting_termination():
                self._pretrain(model)
                super().learn(model)
        except (Exception, KeyboardInterrupt):
            if not watch.stepped and getattr(model, "_n_updates", 0) == updates:
                self._remove_new_folder()
            self._exit_if_terminated("no model is saved")
            raise
        finally:
            self.callbacks.remove(watch)
            # rl-zoo3 ends only the first callback after an interrupt
            for callback in keeping_files:
                callback.on_training_end()

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        As rl_zoo3's; the statistics of ``VecNormalize`` that enjoy finds are a champion's, if the run has one.

        :raises SystemExit: SIGTERM had ended the training; all is saved
        """
        super().save_trained_model(model)
        champions, found = Path(self.save_path, STATISTICS), Path(self.params_path, STATISTICS)
        if champions.is_file() and found.is_file():
            found.replace(found.with_name(LEARNER_STATISTICS))
            with atomic_write(found) as file:
                file.write(champions.read_bytes())
        self._exit_if_terminated(f"the model is saved in {self.save_path}")

    @contextmanager
    def _noting_termination(self) -> Iterator[None]:
        # Not again: rl-zoo3 catches it, and goes on to save what there is
        with raising_terminated(again=False) as has_come:
            try:
                yield
            finally:
                self._is_terminated = has_come()

    def _exit_if_terminated(self, what: str) -> None:
        if self._is_terminated:
            print(f"Ended by SIGTERM: {what}.", file=sys.stderr)
            raise SystemExit(EXIT_CODE)

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        agent = Path(self.trained_agent)
        learners = agent.parent / self.env_name / LEARNER_STATISTICS
        if agent.name == BEST_MODEL or not learners.is_file():
            normalized: VecEnv = super()._maybe_normalize(env, eval_env)
        else:
            normalized = VecNormalize.load(str(learners), env)
            if eval_env:
                normalized.training = normalized.norm_reward = False
        if type(normalized) is VecNormalize:
            normalized.__class__ = WholeVecNormalize
        return normalized

    def _pretrain(self, model: BaseAlgorithm) -> None:
        try:
            self.pretraining.begin(cast(OfflineTD3, model))
        except BaseException:
            # As rl_zoo3 does when its own part fails
            if model.env is not None:
                model.env.close()
            raise

    def _create_sampler(self, sampler_method: str) -> optuna.samplers.BaseSampler:
        def create(seed: int) -> Any:
            seeded = copy.copy(self)
            seeded.seed = seed
            return ExperimentManager._create_sampler(seeded, sampler_method)

        return TrialSeededSampler(create, self.study_seed)

    def objective(self, trial: optuna.Trial) -> float:
        """As rl_zoo3's, on a learner that is pretrained; the dip, times its weight, is taken off the value."""
        run, observed = prepare_trial(self, trial)
        return observed.penalized(ExperimentManager.objective(run, cast(optuna.Trial, observed)))

    def hyperparameters_optimization(self) -> None:
        """As rl_zoo3's, with a clear error if no trial was completed."""
        self.study_seed = StudySeed(self.seed, None if self.storage is None else self.pretraining.cache)
        try:
            with self._noting_termination():
                super().hyperparameters_optimization()
            self._exit_if_terminated("what is done is kept")
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            raise ValueError(
                "No trial was completed, so there is nothing to report: see above why trials failed, or let more of them run."
            ) from None
        finally:
            self.pretraining.close()


@cache
def offline_manager(cls: type[ExperimentManager]) -> type[OfflineExperimentManager]:
    """
    :param cls: rl_zoo3's class, or a user's that derives from it
    :return: The class for our algorithms; what the user's overrides comes before ours
    """
    if issubclass(OfflineExperimentManager, cls):
        return OfflineExperimentManager
    if issubclass(cls, OfflineExperimentManager):
        return cls

    def __reduce__(self: Any) -> tuple[Any, ...]:
        # The module has no such class, so it is made again
        return cls.__new__, (cls, None, self.algo), self.__getstate__()

    return type(cls.__name__, (cls, OfflineExperimentManager), {"__module__": cls.__module__, "__reduce__": __reduce__})
