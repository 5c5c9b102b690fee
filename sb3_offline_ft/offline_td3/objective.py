"""The objective of TD3+BC, which several algorithms pretrain with."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch as th
from torch.nn import functional as F

from sb3_offline_ft.update import ActorObjective, Attraction


def check_alpha(alpha: Any) -> float:
    """Check the weight of the value against behavior cloning."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not float(alpha) >= 0:
        raise ValueError(f"`alpha` must be a number of at least 0, found {alpha!r}.")
    return float(alpha)


def behavior_cloning(
    alpha: float,
    weight: float,
    data_actions: th.Tensor,
    actions: th.Tensor,
    q_values: th.Tensor,
    log: Callable[[str, th.Tensor | float], None],
) -> ActorObjective:
    """
    Fujimoto & Gu 2021, equation 5: ``lambda * Q1(s, pi(s)) - weight * mean((pi(s) - a)**2)`` is maximised, where ``lambda``
    is ``alpha / mean|Q1(s, pi(s))|``.

    :param alpha: Weight of the value; infinite for the value alone
    :param weight: Weight of behavior cloning
    :param data_actions: The batch's actions, shape ``(batch, action_dim)``
    :param actions: The policy's actions, shape ``(batch, action_dim)``
    :param q_values: Their values, shape ``(batch, 1)``
    :param log: Notes a value by its name
    :return: The policy's loss
    """
    if math.isinf(alpha):
        return ActorObjective()
    mean_abs_q = q_values.detach().abs().mean()
    log("train/mean_abs_q", mean_abs_q)
    log("train/bc_loss", F.mse_loss(actions.detach(), data_actions))
    log("train/bc_weight", weight)
    return ActorObjective(alpha / mean_abs_q, (Attraction(weight, data_actions),))
