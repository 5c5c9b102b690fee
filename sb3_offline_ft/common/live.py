"""What a learner is, read off the learner itself: a run claims nothing that it did not have."""

import hashlib
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.json_form import json_form

ATTRIBUTES = {"stats_window_size": "_stats_window_size"}
"""Attributes that are not called as the argument is."""
_ELSEWHERE = frozenset({"env", "policy", "policy_kwargs", "dataset", "_init_setup_model"})
_NOT_NETWORKS = frozenset({"observation_space", "action_space", "lr_schedule"})


def live_arguments(model: BaseAlgorithm) -> dict[str, Any]:
    """
    Read all arguments of a learner's constructor off the learner, as they are now.

    :param model: The learner
    :return: By name, in the form of JSON; ``policy_kwargs`` are those of the policy that there is. Environment and data are
        not among them, nor what the learner does not keep, whose names are in ``not_kept``, if there are any
    """
    names = sorted(constructor_arguments(type(model)).keys() - _ELSEWHERE)
    kept = {name: attribute for name in names if hasattr(model, attribute := ATTRIBUTES.get(name, name))}
    not_kept = [name for name in names if name not in kept]
    return {
        "policy": type(model.policy).__name__,
        "policy_kwargs": as_json(network_arguments(model.policy)),
        **{name: as_json(getattr(model, attribute)) for name, attribute in kept.items()},
        **({"not_kept": not_kept} if not_kept else {}),
    }


def network_arguments(policy: BasePolicy) -> dict[str, Any]:
    """The ``policy_kwargs`` that make the same networks, defaults included."""
    return {name: value for name, value in policy._get_constructor_parameters().items() if name not in _NOT_NETWORKS}


def as_json(value: Any) -> Any:
    """The form of JSON, in which classes and functions have their names, and other objects their attributes."""
    return json_form(value, other=_described)


def _described(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, th.device):
        return str(value)
    if isinstance(value, VectorizedActionNoise):
        # What SB3 makes of a noise for several environments
        return as_json(value.base_noise)
    if isinstance(value, partial):
        return {"class": "partial", "function": as_json(value.func), "arguments": as_json([value.args, value.keywords])}
    if hasattr(value, "__name__"):
        return value.__name__
    if not hasattr(value, "__dict__"):
        return repr(value)
    # A noise's present value is no setting
    attributes = {name: as_json(entry) for name, entry in vars(value).items() if name != "noise_prev"}
    return {"class": type(value).__name__, **attributes}


def weights_digest(model: BaseAlgorithm) -> str:
    """SHA-256 of the weights that a learner has now, target networks included."""
    digest = hashlib.sha256()
    for name, tensor in model.policy.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def buffer_facts(model: BaseAlgorithm) -> dict[str, Any] | None:
    """What of :func:`replay_facts` costs nothing: nothing is drawn, and no rows are compared."""
    if not isinstance(model, OffPolicyAlgorithm) or (buffer := model.replay_buffer) is None:
        return None
    return {
        "class": type(buffer).__name__,
        "capacity": buffer.buffer_size * buffer.n_envs,
        "rows": buffer.size() * buffer.n_envs,
        "offline_rows": int(getattr(buffer, "offline_size", 0)),
    }


def replay_facts(model: BaseAlgorithm) -> dict[str, Any] | None:
    """
    Read off a learner's replay buffer what it can hold, holds and gives. One batch is drawn, so call it after the last update.

    :param model: The learner
    :return: In the form of JSON, in transitions: ``capacity`` and ``rows`` of the online part, how many of these are distinct,
        ``offline_rows`` beside them, and of one batch how many rows it has, and how many are distinct; None without a buffer
        or before the first row
    """
    facts = buffer_facts(model)
    if facts is None:
        return None
    assert isinstance(model, OffPolicyAlgorithm) and model.replay_buffer is not None
    buffer = model.replay_buffer
    facts["distinct_rows"] = _distinct(*_stored(buffer))
    if facts["rows"] + facts["offline_rows"] > 0:
        batch = buffer.sample(model.batch_size, env=model.get_vec_normalize_env())
        parts = [batch.observations, batch.actions, batch.next_observations, batch.rewards]
        offline = int(getattr(batch, "is_offline", np.zeros(0)).sum())
        facts["batch"] = {"rows": len(batch.actions), "distinct_rows": _distinct(*_columns(parts)), "offline_rows": offline}
    return facts


def _stored(buffer: ReplayBuffer) -> list[np.ndarray]:
    parts = [buffer.observations, buffer.actions, buffer.rewards]
    return [column[: buffer.size()].reshape(buffer.size() * buffer.n_envs, *column.shape[2:]) for column in _columns(parts)]


def _columns(parts: list[Any]) -> list[np.ndarray]:
    flat = [column for part in parts for column in (part.values() if isinstance(part, Mapping) else [part])]
    return [column.cpu().numpy() if isinstance(column, th.Tensor) else column for column in flat]


def _distinct(*columns: np.ndarray) -> int:
    """Number of different rows of columns side by side."""
    if len(columns[0]) == 0:
        return 0
    rows = np.hstack([np.ascontiguousarray(column.reshape(len(column), -1)).view(np.uint8) for column in columns])
    return len(np.unique(rows, axis=0))
