"""The one road from a pretraining to a finetuning learner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse import LearnerSnapshot
from sb3_offline_ft.common.live import live_arguments, network_arguments
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.pretrained.recipe import SHARED_WITH_PRETRAINING, Recipe

REPORT_STEPS = 500
"""Gradient steps between two reports of a pretraining's progress."""

Progress = Callable[[int, int], None]
"""Is told how many gradient steps have been done, and of how many."""


@dataclass(frozen=True)
class Pretrained:
    """
    A pretrained learner.

    :param recipe: What it was made of
    :param snapshot: Its state
    :param arguments: All arguments of its constructor as the learner had them, in the form of JSON
    """

    recipe: Recipe
    snapshot: LearnerSnapshot
    arguments: Mapping[str, Any]


def new_pretraining_learner(recipe: Recipe, env: VecEnv) -> OfflineTD3:
    """The learner that is pretrained. It never acts, so its buffer has hardly any room."""
    return recipe.algorithm(
        env=env,
        seed=recipe.seed,
        device=recipe.device,
        dataset=recipe.dataset,
        buffer_size=env.num_envs,
        **recipe.hyperparams,
    )


def pretrain(recipe: Recipe, env: VecEnv, progress_bar: bool = False, on_progress: Progress | None = None) -> Pretrained:
    """Follow a recipe, with an environment that has its spaces and is not acted in."""
    model = new_pretraining_learner(recipe, env)
    if on_progress is None:
        model.pretrain(progress_bar=progress_bar)
    else:
        # SB3 makes a folder for each logger, so for each of the many calls below
        model.set_logger(Logger(folder=None, output_formats=[]))
        total = model.remaining_offline_steps
        while model.remaining_offline_steps > 0:
            model.pretrain(min(REPORT_STEPS, model.remaining_offline_steps))
            on_progress(total - model.remaining_offline_steps, total)
    return Pretrained(recipe, LearnerSnapshot.take(model), live_arguments(model))


def start_from(model: OfflineTD3, pretrained: Pretrained, *, generators: bool = False) -> None:
    """
    Let a learner that was constructed as any other take over what a pretraining has learned: the networks with their targets
    and normalizer, the optimizers' moments, the counts of gradient steps. All else stays as its own arguments made it.

    :param model: A new learner with the recipe's networks
    :param pretrained: The pretrained learner
    :param generators: Whether random numbers go on as after the pretraining too, as if the learner had been pretrained itself;
        for a learner of the same class only
    """
    snapshot = pretrained.snapshot
    if generators:
        # They act online only, and may be others than in the pretraining
        noise, learning_starts = model.action_noise, model.learning_starts
        model.action_noise = None
        try:
            snapshot.restore(model)
        finally:
            model.action_noise, model.learning_starts = noise, learning_starts
    else:
        model.set_parameters(snapshot.parameters)
        model._n_updates = snapshot.n_updates
    model.life_cycle.offline_steps_done = pretrained.recipe.offline_steps


def finetuning_learner(
    algorithm: type[OfflineTD3], arguments: Mapping[str, Any], pretrained: Pretrained, env: VecEnv, seed: int
) -> OfflineTD3:
    """A learner of any algorithm that starts from a pretrained one; arguments that both share are the recipe's."""
    recipe = pretrained.recipe
    own = {name: value for name, value in arguments.items() if name not in SHARED_WITH_PRETRAINING}
    shared = {name: recipe.hyperparams[name] for name in SHARED_WITH_PRETRAINING if name in recipe.hyperparams}
    # Algorithms differ in their default networks
    shared["policy_kwargs"] = network_arguments(new_pretraining_learner(recipe, env).policy)
    model = algorithm(env=env, seed=seed, device=recipe.device, dataset=recipe.dataset, **own, **shared)
    start_from(model, pretrained)
    return model
