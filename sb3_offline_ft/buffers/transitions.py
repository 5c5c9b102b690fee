"""Rows of transitions of which some continue others, be they logged or gathered online, and n-step returns over them."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_offline_ft.common.observations import Observations, map_observations
from sb3_offline_ft.common.returns import discounted_returns
from sb3_offline_ft.datasets import OfflineDataset

Array = npt.NDArray[Any]


class Transitions(ABC):
    """
    Columns of transitions, and which row continues which.

    Rows are given by arrays of indices of any shape; results have that shape.
    """

    @property
    @abstractmethod
    def observations(self) -> Observations:
        """``(N, *obs_shape)``, or a dictionary of such."""

    @property
    @abstractmethod
    def next_observations(self) -> Observations:
        """``(N, *obs_shape)``, or a dictionary of such."""

    @property
    @abstractmethod
    def actions(self) -> Array:
        """``(N, action_dim)``, scaled to [-1, 1]."""

    @property
    @abstractmethod
    def rewards(self) -> Array:
        """``(N,)`` float32."""

    @abstractmethod
    def dones(self, rows: Array) -> Array:
        """Whether the value of the next state counts as 0."""

    @abstractmethod
    def is_last(self, rows: Array) -> Array:
        """Whether nothing that is known continues the row: its episode ended there, or it is the newest one."""

    @abstractmethod
    def ahead(self, rows: Array, steps: Array | int) -> Array:
        """The rows that many steps later, if the episode goes on that far, else any valid ones."""

    @abstractmethod
    def returns(self, rows: Array) -> tuple[Array, Array]:
        """Discounted sums of the rewards to the end of the episode, and whether they are known; unknown ones are 0."""

    def next_actions(self, rows: Array) -> tuple[Array, Array]:
        """The actions taken after the rows, shape ``(*rows.shape, action_dim)``, and whether there are; else they are 0."""
        has_next = ~self.is_last(rows)
        actions = self.actions.take(self.ahead(rows, 1), axis=0)
        actions[~has_next] = 0.0
        return actions, has_next


class OfflineTransitions(Transitions):
    """The rows of a dataset in the form of the environment's space, with its actions scaled to [-1, 1]."""

    def __init__(self, dataset: OfflineDataset, actions: Array, handle_timeout_termination: bool, gamma: float) -> None:
        self._dataset = dataset
        self._actions = actions
        self._handle_timeout_termination = handle_timeout_termination
        self.gamma = gamma

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def observations(self) -> Observations:
        return self._dataset.observations

    @property
    def next_observations(self) -> Observations:
        return self._dataset.next_observations

    @property
    def actions(self) -> Array:
        return self._actions

    @property
    def rewards(self) -> Array:
        return self._dataset.rewards

    @cached_property
    def _ends(self) -> Array:
        return self._dataset.terminations | self._dataset.truncations

    def dones(self, rows: Array) -> Array:
        ended = self._dataset.terminations.take(rows)
        if not self._handle_timeout_termination:
            ended |= self._dataset.truncations.take(rows)
        return ended

    def is_last(self, rows: Array) -> Array:
        return self._ends.take(rows)

    def ahead(self, rows: Array, steps: Array | int) -> Array:
        return np.minimum(rows + steps, len(self._dataset) - 1)

    def returns(self, rows: Array) -> tuple[Array, Array]:
        return self._dataset.monte_carlo_returns(self.gamma).take(rows), np.ones(rows.shape, dtype=bool)


class OnlineTransitions(Transitions):
    """The rows of a ring of SB3, numbered step by step and within a step environment by environment."""

    def __init__(self, ring: ReplayBuffer, returns: "RingReturns | None" = None) -> None:
        self._ring = ring
        self._returns = returns
        self._n_slots = ring.buffer_size * ring.n_envs

    def _flat(self, column: Array) -> Array:
        return column.reshape(self._n_slots, *column.shape[2:])

    @property
    def observations(self) -> Observations:
        flat: Observations = map_observations(self._flat, self._ring.observations)
        return flat

    @property
    def next_observations(self) -> Observations:
        flat: Observations = map_observations(self._flat, self._ring.next_observations)
        return flat

    @property
    def actions(self) -> Array:
        return self._flat(self._ring.actions)

    @property
    def rewards(self) -> Array:
        return self._flat(self._ring.rewards)

    def dones(self, rows: Array) -> Array:
        dones: Array = self._flat(self._ring.dones).take(rows) * (1 - self._flat(self._ring.timeouts).take(rows))
        return dones

    def is_last(self, rows: Array) -> Array:
        ring = self._ring
        newest = (ring.pos - 1) % ring.buffer_size
        is_last: Array = (self._flat(ring.dones).take(rows) != 0) | (self._flat(ring.timeouts).take(rows) != 0)
        # What follows the newest row in a full ring is the oldest one
        is_last |= rows // ring.n_envs == newest
        return is_last

    def ahead(self, rows: Array, steps: Array | int) -> Array:
        ahead: Array = (rows + steps * np.intp(self._ring.n_envs)) % self._n_slots
        return ahead

    def returns(self, rows: Array) -> tuple[Array, Array]:
        assert self._returns is not None
        return self._flat(self._returns.values).take(rows), self._flat(self._returns.are_known).take(rows)


class NStepRows(NamedTuple):
    """
    The rows over which n-step returns are summed.

    :param rows: Shape ``(n, n_steps)``: a row and those that follow it
    :param mask: Shape ``(n, n_steps)``: which of these belong to the return, the first ones
    :param last: Shape ``(n,)``: the last row of each that does
    """

    rows: Array
    mask: Array
    last: Array

    def rewards(self, rewards: Array, gamma: float) -> Array:
        """Discounted sums ``(n,)``, in the order of SB3's ``NStepReplayBuffer`` and hence the same float32 numbers."""
        discounts = gamma ** np.arange(rewards.shape[1], dtype=np.float32).reshape(1, -1)
        # Chosen rather than multiplied by 0: a reward of another episode may not be finite
        sums: Array = (np.where(self.mask, rewards, 0.0) * discounts).sum(axis=1)
        return sums

    def discounts(self, gamma: float) -> Array:
        """Discounts of the values after the last rows, shape ``(n,)``."""
        discounts: Array = gamma ** self.mask.sum(axis=1).astype(np.float32)
        return discounts


def n_step_rows(transitions: Transitions, rows: Array, n_steps: int) -> NStepRows:
    """Follow each row until ``n_steps`` rows are together or its episode ends."""
    following = transitions.ahead(rows[:, None], np.arange(n_steps))
    is_last = transitions.is_last(following)
    n_ahead = np.where(is_last.any(axis=1), is_last.argmax(axis=1), n_steps - 1)
    mask = np.arange(n_steps) <= n_ahead[:, None]
    return NStepRows(following, mask, following[np.arange(len(rows)), n_ahead])


class RingReturns:
    """Monte-Carlo returns of a ring's rows, filled in when an episode ends."""

    def __init__(self, ring: ReplayBuffer, gamma: float) -> None:
        self._gamma = gamma
        self.values = np.zeros((ring.buffer_size, ring.n_envs), np.float32)
        self.are_known = np.zeros((ring.buffer_size, ring.n_envs), dtype=bool)
        self._n_unfinished = np.zeros(ring.n_envs, np.int64)
        size = ring.size()
        oldest = ring.pos if ring.full else 0
        slots = (oldest + np.arange(size)) % ring.buffer_size
        for env in range(ring.n_envs):
            ends = np.flatnonzero((ring.dones[slots, env] != 0) | (ring.timeouts[slots, env] != 0))
            n_finished = int(ends[-1]) + 1 if len(ends) else 0
            self._n_unfinished[env] = size - n_finished
            rows = np.arange(n_finished)
            end_of_rows = ends[np.searchsorted(ends, rows)]
            # Where a recording was cut, nobody knows what would have come
            are_known = ring.dones[slots[end_of_rows], env] != 0
            self._set(ring, slots[:n_finished], env, end_of_rows - rows, are_known)

    def row_added(self, ring: ReplayBuffer, slot: int) -> None:
        """Take note of a new row, already stored, and of the returns of the episodes that it ends."""
        self.values[slot] = 0.0
        self.are_known[slot] = False
        self._n_unfinished += 1
        for env in np.flatnonzero(ring.dones[slot]).tolist():
            length = min(int(self._n_unfinished[env]), ring.buffer_size)
            remaining = np.arange(length)[::-1]
            self._set(ring, (slot - remaining) % ring.buffer_size, env, remaining, np.ones(length, dtype=bool))
            self._n_unfinished[env] = 0

    def cut(self) -> None:
        """Forget the unfinished episodes: they will not be continued."""
        self._n_unfinished[:] = 0

    def state_dict(self, n_rows: int) -> dict[str, Array]:
        """The state as arrays, of so many rows."""
        return {
            "values": self.values[:n_rows].copy(),
            "are_known": self.are_known[:n_rows].copy(),
            "n_unfinished": self._n_unfinished.copy(),
        }

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take up a state."""
        n_rows = len(state["values"])
        self.values[:n_rows], self.are_known[:n_rows] = state["values"], state["are_known"]
        self._n_unfinished = state["n_unfinished"].copy()

    def _set(self, ring: ReplayBuffer, slots: Array, env: int, remaining: Array, are_known: Array) -> None:
        returns = discounted_returns(ring.rewards[slots, env], remaining, self._gamma)
        # An environment that broke down does not spoil what is learned from its other episodes
        are_known = are_known & np.isfinite(returns)
        self.values[slots, env] = np.where(are_known, returns, 0.0)
        self.are_known[slots, env] = are_known
