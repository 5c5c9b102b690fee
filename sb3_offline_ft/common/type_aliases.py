"""Types that several modules share."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

Schedule = Callable[[float], float]
"""A value as a function of the remaining progress of a run, from 1 (start) to 0 (end), as in Stable-Baselines3."""

ScheduleLike = float | str | Schedule
"""A constant, a schedule written as a string (see :func:`sb3_offline_ft.common.schedules.make_schedule`), or a function."""


class OfflineToOnlineReplayBufferSamples(NamedTuple):
    """
    A batch of transitions, in the form of SB3's ``ReplayBufferSamples`` plus the origin of each row.

    Shapes are ``(batch, ...)``; observations are dictionaries of tensors for ``Dict`` spaces; ``actions`` are in the
    policy's scaled range [-1, 1]; ``dones`` is 1 only where the task itself ended (a time limit is 0, so that the value of
    the next state is bootstrapped).

    With n-step returns, ``rewards`` are discounted sums over up to n steps of one episode, ``next_observations`` and
    ``dones`` are those of the last of these steps, and ``discounts`` is ``gamma**k`` with their number k; else it is None.

    The last fields are None unless asked for. ``next_actions`` are the actions that were taken at ``next_observations``, 0
    where ``has_next_actions`` is False; ``returns`` are the discounted sums of the rewards from the row to the end of its
    episode, 0 where ``has_returns`` is False.
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    is_offline: th.Tensor
    next_actions: th.Tensor | None = None
    has_next_actions: th.Tensor | None = None
    returns: th.Tensor | None = None
    has_returns: th.Tensor | None = None
