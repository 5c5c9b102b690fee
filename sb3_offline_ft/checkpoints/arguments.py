"""The arguments that a learner was made with, as plain values, so that it can be made again without unpickling anything."""

import sys
from importlib import import_module
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.live import ATTRIBUTES

KIND = "__made__"
NOT_KEPT = frozenset({"env", "device", "policy", "monitor_wrapper", "_init_setup_model"})
TRUSTED = ("stable_baselines3", "sb3_contrib", "sb3_offline_ft", "torch")
"""Packages whose classes a checkpoint may name."""
NOISES = {cls.__name__: cls for cls in (NormalActionNoise, OrnsteinUhlenbeckActionNoise)}
NOISE_ARGUMENTS = {"mean": "_mu", "sigma": "_sigma", "theta": "_theta", "dt": "_dt", "initial_noise": "initial_noise"}
CHOSEN_BY_SB3 = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


class _NotPlainError(Exception):
    pass


def saved_arguments(model: OffPolicyAlgorithm) -> tuple[dict[str, Any], list[str]]:
    """
    :param model: A learner
    :return: The arguments of its constructor, as they are now, and the names of those that only code can make
    """
    values: dict[str, Any] = {"policy": model.policy_class}
    for name in constructor_arguments(type(model)).keys() - NOT_KEPT:
        if hasattr(model, attribute := ATTRIBUTES.get(name, name)):
            values[name] = getattr(model, attribute)
    if hasattr(model, "arguments_for_files"):
        values |= model.arguments_for_files()
    if values.get("replay_buffer_class") in CHOSEN_BY_SB3:
        values["replay_buffer_class"] = None
    if values.get("replay_buffer_class") is None:
        kwargs = values.get("replay_buffer_kwargs") or {}
        values["replay_buffer_kwargs"] = {name: value for name, value in kwargs.items() if name not in ("n_steps", "gamma")}
    kept, not_held = {}, []
    for name, value in sorted(values.items()):
        try:
            kept[name] = _plain(value)
        except _NotPlainError:
            not_held.append(name)
    return kept, not_held


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, np.generic):
        return value
    if isinstance(value, TrainFreq):
        return value.frequency, value.unit.value
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, type) and value.__module__.split(".")[0] in TRUSTED:
        return {KIND: "class", "module": value.__module__, "name": value.__qualname__}
    if isinstance(value, VectorizedActionNoise):
        value = value.noises[0]
    if isinstance(value, ActionNoise) and type(value) in NOISES.values():
        arguments = {name: vars(value)[kept] for name, kept in NOISE_ARGUMENTS.items() if kept in vars(value)}
        return {KIND: "noise", "name": type(value).__name__, "arguments": arguments}
    raise _NotPlainError


def made_again(value: Any) -> Any:
    """What was given to :func:`saved_arguments`."""
    if isinstance(value, dict) and value.get(KIND) == "class":
        return class_named(value["module"], value["name"])
    if isinstance(value, dict) and value.get(KIND) == "noise":
        return NOISES[value["name"]](**value["arguments"])
    if isinstance(value, dict):
        return {key: made_again(entry) for key, entry in value.items()}
    return type(value)(map(made_again, value)) if type(value) in (list, tuple) else value


def class_named(module: str, name: str) -> Any:
    """A class of one of the known packages; ``ValueError`` if it is another one's, of which code would have to be run."""
    if module.split(".")[0] not in TRUSTED:
        raise ValueError(
            f"The checkpoint names the class {name} of {module}: give it yourself, `resume(..., algorithm={name})`."
        )
    found: Any = sys.modules.get(module) or import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, type):
        raise ValueError(f"The checkpoint names {name} of {module} as a class, and it is none.")
    return found
