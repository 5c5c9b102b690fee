"""What learners may have beyond SB3's: read off them by name, since the guard knows no algorithm of this package."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn

PolicyState = Mapping[str, th.Tensor]


def is_pretraining(model: OffPolicyAlgorithm) -> bool:
    return bool(getattr(getattr(model, "life_cycle", None), "is_pretraining", False))


def learned_weights(model: OffPolicyAlgorithm) -> Any:
    """What an actor has during a step in place of the average that acts (``LearnedWeights``); None if it acts itself."""
    learned: Any = getattr(getattr(model, "acting", None), "learned_weights", None)
    return learned if learned is not None and learned.average else None


def has_extra_state(model: OffPolicyAlgorithm) -> bool:
    return hasattr(model, "extra_state") and hasattr(model, "load_extra_state")


def extra_state(model: Any) -> dict[str, np.ndarray]:
    return dict(model.extra_state()) if has_extra_state(model) else {}


def set_extra_state(model: Any, state: Mapping[str, np.ndarray], generators: bool) -> None:
    if has_extra_state(model):
        model.load_extra_state(state, generators)


def position(model: Any) -> dict[str, Any]:
    """Where in its life the learner is, but for what counts progress."""
    return dict(model.position()) if has_extra_state(model) else {}


def set_position(model: Any, position: Mapping[str, Any]) -> None:
    if has_extra_state(model):
        model.set_position(position)


def move_reference(model: Any, policy_state: PolicyState) -> None:
    """Make a policy the reference of a constrained algorithm, if it is one."""
    if hasattr(model, "set_reference_policy"):
        model.set_reference_policy(policy_state)


def policy_network(model: OffPolicyAlgorithm) -> tuple[str, nn.Module, th.optim.Optimizer]:
    """Name, within the policy, of the network that chooses actions; the network; and what optimizes it."""
    policy: Any = model.policy
    name = next((name for name in ("actor", "quantile_net", "q_net") if hasattr(policy, name)), None)
    if name is None:
        raise ValueError(
            f"CollapseGuard does not know where {type(policy).__name__} keeps its policy: expected an attribute `actor`, "
            "`quantile_net` or `q_net`."
        )
    return name, getattr(policy, name), policy.actor.optimizer if name == "actor" else policy.optimizer
