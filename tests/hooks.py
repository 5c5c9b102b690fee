"""
Where tests reach behind the public names of a learner: the hooks that docs/custom_algorithms.md names for subclasses, and what
Stable-Baselines3 keeps of a run, both of which have no other name.
"""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.update import ActorObjective, Batch


def n_updates(model: BaseAlgorithm) -> int:
    """Number of gradient steps."""
    return int(model._n_updates)  # type: ignore[attr-defined]


def last_observations(model: BaseAlgorithm) -> Any:
    return model._last_obs


def progress_remaining(model: BaseAlgorithm) -> float:
    return model._current_progress_remaining


def set_progress_remaining(model: BaseAlgorithm, value: float) -> None:
    model._current_progress_remaining = value


def targets(model: OfflineTD3, batch: Batch) -> th.Tensor:
    return model._target_q_values(batch)


def target_critics(model: OfflineTD3) -> th.Tensor:
    chosen = model._choose_target_critics()
    assert chosen is not None
    return chosen


def next_value_penalty(model: OfflineTD3, batch: Batch, next_actions: th.Tensor, values: th.Tensor) -> th.Tensor | None:
    return model._next_value_penalty(batch, next_actions, values)


def objective(model: OfflineTD3, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective:
    found = model._actor_loss(batch, actions, q_values)
    assert isinstance(found, ActorObjective)
    return found


def update_actor(model: OfflineTD3, batch: Batch) -> None:
    model._update_actor(batch)


def update_critic(model: OfflineTD3, batch: Batch) -> None:
    model._update_critic(batch)


def noise_generator(model: OfflineTD3) -> th.Generator:
    """A copy of the generator of offline updates."""
    return th.Generator().set_state(th.from_numpy(np.array(model.extra_state()["noise_generator"])))


def observe_batches(model: OfflineTD3) -> list[Batch]:
    """The batches that the critics are updated with, from now on."""
    batches: list[Batch] = []
    update = model._update_critic

    def observe(batch: Batch) -> None:
        batches.append(batch)
        update(batch)

    model._update_critic = observe  # type: ignore[method-assign]
    return batches
