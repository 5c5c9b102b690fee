"""Copies of a policy as it is now, and their weights as arrays."""

import copy
from collections.abc import Mapping

import numpy as np
import torch as th
from stable_baselines3.td3.policies import Actor, TD3Policy


def frozen_actor(policy: TD3Policy) -> Actor:
    """A copy of a policy's actor with the present weights, in evaluation mode and without gradients."""
    # The target has the same modules and no optimizer, which would be copied too
    actor = copy.deepcopy(policy.actor_target)
    actor.load_state_dict(policy.actor.state_dict())
    actor.set_training_mode(False)
    return actor.requires_grad_(False)


def weights_to_arrays(module: th.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """Parameters and buffers of a module by prefixed names."""
    return tensors_to_arrays(module.state_dict(), prefix)


def tensors_to_arrays(tensors: Mapping[str, th.Tensor], prefix: str) -> dict[str, np.ndarray]:
    """Tensors as arrays by prefixed names."""
    return {prefix + name: value.cpu().numpy() for name, value in tensors.items()}


def weights_from_arrays(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, th.Tensor]:
    """What ``load_state_dict`` takes, of the arrays whose names have the prefix; empty if there are none."""
    return {
        name.removeprefix(prefix): th.from_numpy(value.copy()) for name, value in arrays.items() if name.startswith(prefix)
    }
