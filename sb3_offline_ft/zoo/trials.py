"""``-optimize`` for our algorithms: trials that share data and pretrained learners, are seeded, and report their dip."""

import copy
from typing import Any

import optuna
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from sb3_offline_ft.common.callbacks import callbacks_with, find_callbacks
from sb3_offline_ft.common.search_space import (
    FINETUNING_PREFIX,
    FIXED,
    N_TIMESTEPS,
    NOISE,
    Hyperparams,
    SearchSpace,
    split_finetuning,
)
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.start import Pretrained, start_from
from sb3_offline_ft.tuning.objective import DIP_PENALTY, ObservedTrial, split_tuning
from sb3_offline_ft.tuning.samplers import SEED


class TrialStart(BaseCallback):
    """Lets a trial's learner start as the pretrained one, if there is one, with random numbers of its own."""

    def __init__(self, pretrained: Pretrained | None, seed: int, quiet: bool) -> None:
        super().__init__()
        self._pretrained = pretrained
        self._seed = seed
        self._quiet = quiet

    def _init_callback(self) -> None:
        assert isinstance(self.model, OfflineTD3)
        if self._pretrained is not None:
            start_from(self.model, self._pretrained)
        self.model.set_random_seed(self._seed)

    def _on_training_start(self) -> None:
        siblings = self.locals.get("callback")
        if self._pretrained is not None:
            for evaluation in find_callbacks(siblings, TrialEvalCallback):
                # The evaluation before the first interaction is one more than rl_zoo3 counts
                evaluation.eval_idx = -1
        if self._quiet:
            # Those of us that tell of what they do
            for sibling in callbacks_with(siblings, "use_default_path"):
                sibling.verbose = 0

    def _on_step(self) -> bool:
        return True


def prepare_trial(manager: Any, trial: optuna.Trial) -> tuple[Any, ObservedTrial]:
    """
    :param manager: The study's :class:`~sb3_offline_ft.zoo.experiment.OfflineExperimentManager`
    :param trial: The trial
    :return: The manager whose objective runs the trial on a learner that is pretrained, and the trial as it shall be given it
    :raises ValueError: There is no pretrained policy to dip below, or nothing after its warm-up
    """
    pretraining, dip_penalty = manager.pretraining, manager.dip_penalty
    eval_freq = max(int(manager.n_timesteps / manager.n_evaluations) // manager.n_envs, 1) * manager.n_envs
    seed, trial_seed = manager.study_seed(trial.study), manager.study_seed.of_trial(trial)
    told = {SEED: trial_seed, N_TIMESTEPS: manager.n_timesteps, "eval_freq": eval_freq, FIXED: _fixed(manager)}
    for name, value in told.items():
        trial.set_user_attr(name, value)
    sampled, sampled_for_whole_run = _sample(manager, trial)
    hyperparams = pretraining.hyperparams | sampled_for_whole_run
    dataset = pretraining.dataset(hyperparams)
    recipe = pretraining.recipe(hyperparams, seed, pretraining.env())
    pretrained = None if recipe is None else pretraining.cache.get(recipe, pretraining.env())
    if recipe is not None:
        trial.set_user_attr("pretrained", recipe.digest)
    elif dip_penalty > 0:
        raise ValueError(
            f"`{DIP_PENALTY}` is {dip_penalty:g}, and without `dataset` and `offline_steps` there is no pretrained policy "
            "whose return a trial could dip below: leave it out."
        )

    run = copy.copy(manager)
    run.seed, run.evaluation_seed = trial_seed, seed
    run._hyperparams = manager._hyperparams | {"dataset": dataset}
    given = manager.specified_callbacks or []
    start = TrialStart(pretrained, trial_seed, quiet=manager.verbose < 2)
    run.specified_callbacks = [start, *(given if isinstance(given, list) else [given])]
    # For the first weights of a learner without a pretraining
    set_random_seed(trial_seed)
    frozen_steps = -1
    if pretrained is not None:
        warmup_steps = pretraining.argument("warmup_steps", run._hyperparams | sampled)
        frozen_steps = warmup_steps // eval_freq
        if dip_penalty > 0 and frozen_steps >= manager.n_timesteps // eval_freq:
            raise ValueError(
                f"`{DIP_PENALTY}` is {dip_penalty:g}, `warmup_steps` are {warmup_steps:,} of {manager.n_timesteps:,} "
                f"interactions, and there is no evaluation after them, every {eval_freq:,}: use fewer."
            )
    scores = None if dataset is None else dataset.reference_scores
    return run, ObservedTrial(trial, frozen_steps, None if scores is None else scores.random, dip_penalty)


def _fixed(manager: Any) -> list[str]:
    given = {name.removeprefix(FINETUNING_PREFIX) for name in split_tuning(manager.custom_hyperparams or {})[0]}
    return sorted(given | {"noise_std"} if given & {"noise_type", "action_noise"} else given)


def _sample(manager: Any, trial: optuna.Trial) -> tuple[Hyperparams, Hyperparams]:
    """Arguments of the constructor that a trial sets, and those among them that act in the pretraining too."""
    sampler = HYPERPARAMS_SAMPLER[manager.algo]
    kwargs = manager._hyperparams.get("replay_buffer_kwargs", {})
    sampled = sampler(trial, manager.n_actions, manager.n_envs, {"using_her_replay_buffer": False, "her_kwargs": kwargs})
    if not isinstance(getattr(sampler, "__self__", None), SearchSpace):
        return sampled, sampled
    whole_run, _ = split_finetuning(HYPERPARAMS_CONVERTER[manager.algo](trial.params))
    return sampled, {name: value for name, value in whole_run.items() if name not in NOISE}
