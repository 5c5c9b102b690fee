"""Copies of a policy as it is now, and their weights as arrays."""

import copy
from collections.abc import Mapping

import numpy as np
import torch as th
from stable_baselines3.td3.policies import Actor, TD3Policy


def frozen_actor(policy: TD3Policy) -> Actor:
    """
    :param policy: A policy
    :return: A copy of its actor with the present weights, in evaluation mode and without gradients
    """
    # The target has the same modules and no optimizer, which would be copied too
    actor = copy.deepcopy(policy.actor_target)
    actor.load_state_dict(policy.actor.state_dict())
    actor.set_training_mode(False)
    return actor.requires_grad_(False)


def weights_to_arrays(module: th.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """
    :param module: A module
    :param prefix: What the names begin with
    :return: Its parameters and buffers by name
    """
    return tensors_to_arrays(module.state_dict(), prefix)


def tensors_to_arrays(tensors: Mapping[str, th.Tensor], prefix: str) -> dict[str, np.ndarray]:
    """
    :param tensors: Tensors by name
    :param prefix: What the names begin with
    :return: They as arrays
    """
    return {prefix + name: value.cpu().numpy() for name, value in tensors.items()}


def weights_from_arrays(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, th.Tensor]:
    """
    :param arrays: Arrays, among them what :func:`weights_to_arrays` or :func:`tensors_to_arrays` returned
    :param prefix: What the names of those begin with
    :return: What ``load_state_dict`` takes; empty if there are none
    """
    return {
        name.removeprefix(prefix): th.from_numpy(value.copy()) for name, value in arrays.items() if name.startswith(prefix)
    }
