"""Discounted sums of rewards."""

from typing import Any

import numpy as np
import numpy.typing as npt


def discounted_returns(rewards: npt.NDArray[Any], remaining: npt.NDArray[Any], gamma: float) -> npt.NDArray[np.float32]:
    """
    Sum the rewards from each row to the end of its episode, for all rows at once.

    :param rewards: Rewards of successive steps, shape ``(n,)``
    :param remaining: Number of steps of the same episode that follow each row, shape ``(n,)``; at most as many as rows
    :param gamma: Discount factor in [0, 1]
    :return: Shape ``(n,)``, summed in float64
    """
    returns = rewards.astype(np.float64)
    longest = remaining.max(initial=0)
    n_steps = 1
    with np.errstate(invalid="ignore", over="ignore"):
        # Sums over n steps, for n = 1, 2, 4, ...: each is made of two of the sums before
        while n_steps <= longest and gamma**n_steps > 0.0:
            rows = np.flatnonzero(remaining >= n_steps)
            returns[rows] += gamma**n_steps * returns[rows + n_steps]
            n_steps *= 2
        return returns.astype(np.float32)
