"""Batches in the making: arrays that rows of both parts of a buffer are copied into."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.buffers.transitions import Transitions, n_step_rows
from sb3_offline_ft.common.observations import Observations, map_observations
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples

Array = npt.NDArray[Any]


@dataclass(slots=True)
class BatchColumns:
    """Several batches in the making: arrays of shape ``(n_batches, batch_size, ...)``."""

    observations: Observations
    next_observations: Observations
    actions: Array
    dones: Array
    rewards: Array
    is_offline: Array
    discounts: Array | None = None
    next_actions: Array | None = None
    has_next_actions: Array | None = None
    returns: Array | None = None
    has_returns: Array | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        ring: ReplayBuffer,
        offline: Observations,
        discounts: bool = False,
        next_actions: bool = False,
        returns: bool = False,
    ) -> "BatchColumns":
        """
        :param shape: ``(n_batches, batch_size)``
        :param ring: Whose rows are to fit in
        :param offline: Observations of which the types are taken
        :param discounts: Whether returns are over several steps
        :param next_actions: Whether the next actions are wanted
        :param returns: Whether the Monte-Carlo returns are wanted
        """
        actions = (*shape, ring.action_dim), ring.actions.dtype
        columns = cls(
            observations=_empty_rows(shape, ring.observations, offline),
            next_observations=_empty_rows(shape, ring.next_observations, offline),
            actions=np.empty(*actions),
            dones=np.empty(shape, np.float32),
            rewards=np.empty(shape, np.float32),
            is_offline=np.zeros(shape, dtype=bool),
        )
        if discounts:
            columns.discounts = np.empty(shape, np.float32)
        if next_actions:
            columns.next_actions, columns.has_next_actions = np.empty(*actions), np.empty(shape, dtype=bool)
        if returns:
            columns.returns, columns.has_returns = np.empty(shape, np.float32), np.empty(shape, dtype=bool)
        return columns

    def fill(
        self, span: slice, transitions: Transitions, rows: Array, n_steps: int, gamma: float, env: VecNormalize | None
    ) -> None:
        """
        :param span: Which part of each batch is filled
        :param transitions: Where the rows are
        :param rows: Shape ``(n_batches, size of span)``
        :param n_steps: Number of steps of the returns
        :param gamma: Their discount factor
        :param env: Normalizes the rewards of n-step returns before they are summed
        """
        last = rows
        if self.discounts is None:
            _gather(transitions.rewards, rows, self.rewards[:, span])
        else:
            following = n_step_rows(transitions, rows.ravel(), n_steps)
            rewards = ReplayBuffer._normalize_reward(transitions.rewards.take(following.rows), env)
            self.rewards[:, span] = following.rewards(rewards, gamma).reshape(rows.shape)
            self.discounts[:, span] = following.discounts(gamma).reshape(rows.shape)
            last = following.last.reshape(rows.shape)
        _gather_observations(transitions.observations, rows, self.observations, span)
        _gather_observations(transitions.next_observations, last, self.next_observations, span)
        _gather(transitions.actions, rows, self.actions[:, span])
        self.dones[:, span] = transitions.dones(last)
        if self.next_actions is not None and self.has_next_actions is not None:
            self.next_actions[:, span], self.has_next_actions[:, span] = transitions.next_actions(last)
        if self.returns is not None and self.has_returns is not None:
            self.returns[:, span], self.has_returns[:, span] = transitions.returns(rows)

    def as_samples(self, env: VecNormalize | None, device: th.device) -> OfflineToOnlineReplayBufferSamples:
        """
        :param env: Normalizes observations and rewards
        :param device: Where the tensors are wanted
        :return: The batches one after the other, in memory of their own
        """
        rewards = self.rewards
        if self.discounts is None:
            rewards = ReplayBuffer._normalize_reward(rewards, env)
        if self.returns is not None and env is not None and env.norm_reward:
            self.returns /= np.sqrt(env.ret_rms.var + env.epsilon)
        extra = (self.next_actions, self.has_next_actions, self.returns, self.has_returns)

        def tensor(array: Array) -> th.Tensor:
            # SB3's `to_torch` calls `th.as_tensor`, which takes three times as long
            rows = th.from_numpy(array.reshape(len(array) * array.shape[1], *array.shape[2:]))
            return rows if device.type == "cpu" else rows.to(device)

        def column(array: Array) -> th.Tensor:
            return tensor(array if array.ndim == 3 else array[..., None])

        def normalized(observations: Observations) -> Any:
            return map_observations(tensor, ReplayBuffer._normalize_obs(observations, env))

        return OfflineToOnlineReplayBufferSamples(
            normalized(self.observations),
            column(self.actions),
            normalized(self.next_observations),
            column(self.dones),
            column(rewards),
            None if self.discounts is None else column(self.discounts),
            column(self.is_offline),
            *(None if array is None else column(array) for array in extra),
        )


def _empty_rows(shape: tuple[int, int], ring: Observations, offline: Observations) -> Observations:
    """Arrays for observations of both parts, of the offline part's types."""
    if isinstance(ring, dict):
        assert isinstance(offline, dict)
        # Numbers of a Discrete space are integers, as in SB3
        types = {key: array.dtype if array.dtype.kind == "i" else offline[key].dtype for key, array in ring.items()}
        return {key: np.empty((*shape, *array.shape[2:]), types[key]) for key, array in ring.items()}
    assert not isinstance(offline, dict)
    return np.empty((*shape, *ring.shape[2:]), offline.dtype)


def _gather_observations(columns: Observations, rows: Array, out: Observations, span: slice) -> None:
    if isinstance(columns, dict):
        for key, column in columns.items():
            _gather(column, rows, out[key][:, span])
    else:
        assert not isinstance(out, dict)
        _gather(columns, rows, out[:, span])


def _gather(column: Array, rows: Array, out: Array) -> None:
    """Copy valid rows of a column, shape ``(n_batches, batch)``."""
    # mode="clip" spares the check of the indices, and the temporary copy of `out` that it needs
    if out.flags.c_contiguous and out.dtype == column.dtype:
        column.take(rows, axis=0, out=out, mode="clip")
    else:
        # Numbers of a Discrete space are floats in a dataset
        np.copyto(out, column.take(rows, axis=0, mode="clip"), casting="unsafe")
