"""Where runs and trials of rl_zoo3's ``ExperimentManager`` start from: data loaded once, learners pretrained once."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, cast

from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.common.checks import constructor_arguments, known_keywords
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX
from sb3_offline_ft.datasets import OfflineDataset, load_dataset
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.cache import PretrainedCache, default_folder
from sb3_offline_ft.pretrained.recipe import SAME_THROUGHOUT, Recipe
from sb3_offline_ft.pretrained.start import pretrain, start_from


class Pretraining:
    """
    The pretraining of a manager's runs and trials.

    :param manager: rl_zoo3's manager
    :param hyperparams: Arguments of the algorithm's constructor for the whole run
    :param finetuning: Arguments that differ in the finetuning
    :raises ValueError: One of them cannot differ
    :raises TypeError: There is no such argument
    """

    def __init__(self, manager: Any, hyperparams: Mapping[str, Any], finetuning: Mapping[str, Any]) -> None:
        self.manager = manager
        self.algorithm = cast(type[OfflineTD3], ALGOS[manager.algo])
        self.hyperparams = dict(hyperparams)
        self.finetuning = dict(finetuning)
        show = manager.show_progress or (manager.optimize_hyperparameters and manager.verbose > 0)
        self.cache = PretrainedCache(default_folder(manager.log_path), progress_bar=show, verbose=manager.verbose > 0)
        self._datasets: dict[str, OfflineDataset] = {}
        self._lock = Lock()
        self._env: VecEnv | None = None
        for name in self.finetuning:
            if name in SAME_THROUGHOUT:
                raise ValueError(f"`{FINETUNING_PREFIX}{name}`: {name} cannot be another one than in the pretraining.")
        known_keywords(self.algorithm, self.finetuning, f"{self.algorithm.__name__} (`{FINETUNING_PREFIX}...`)")

    def dataset(self, hyperparams: Mapping[str, Any]) -> OfflineDataset | None:
        """The data that arguments of the constructor name, if any, which is loaded at the first call."""
        spec = hyperparams.get("dataset")
        if spec is None or isinstance(spec, OfflineDataset):
            return spec
        with self._lock:
            key = repr(spec)
            if key not in self._datasets:
                self._datasets[key] = load_dataset(spec)
            return self._datasets[key]

    def env(self) -> VecEnv:
        """An environment for what must be known of it; nobody acts in it."""
        with self._lock:
            if self._env is None:
                self._env = self.manager.create_envs(self.manager.n_envs, no_log=True)
            return self._env

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def argument(self, name: str, hyperparams: Mapping[str, Any]) -> Any:
        """An argument of the algorithm's constructor, given or by default."""
        return hyperparams.get(name, constructor_arguments(self.algorithm)[name])

    def recipe(self, hyperparams: Mapping[str, Any], seed: int, env: VecEnv) -> Recipe | None:
        """The recipe with arguments of the constructor for the whole run, None without a pretraining."""
        dataset = self.dataset(hyperparams)
        if dataset is None or self.argument("offline_steps", hyperparams) == 0:
            return None
        return Recipe(self.algorithm, hyperparams, dataset, env, seed, self.manager.device)

    def begin(self, model: OfflineTD3) -> None:
        """
        Pretrain a run's model, if the run is of a study or its finetuning differs from its pretraining; else ``learn`` does.

        :param model: The model, new or loaded
        :raises ValueError: A loaded model has not finished its pretraining, and its finetuning shall differ
        """
        of_study, env = self.manager.trial_id is not None, model.get_env()
        if self.manager.continue_training:
            self._check_loaded(model)
        elif (of_study or self.finetuning) and env is not None:
            recipe = self.recipe(self.hyperparams, self.manager.seed, env)
            if recipe is not None:
                # A study's is kept for others, and looked for first
                pretrained = self.cache.get(recipe, env) if of_study else pretrain(recipe, env, self.cache.progress_bar)
                start_from(model, pretrained, generators=True)

    def _check_loaded(self, model: OfflineTD3) -> None:
        if self.finetuning and model.remaining_offline_steps > 0:
            names = ", ".join(f"`{FINETUNING_PREFIX}{name}`" for name in self.finetuning)
            raise ValueError(
                f"The loaded agent has {model.remaining_offline_steps:,} offline steps left to do, in which {names} must not "
                "apply: finish its pretraining without them first."
            )
