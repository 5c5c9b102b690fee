"""The offline part of a replay buffer: a dataset, its own random stream, and how often each source has been drawn from."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.buffers.augmentation import Augmenter
from sb3_offline_ft.buffers.balanced_replay import BalancedReplay
from sb3_offline_ft.buffers.sampling import SourceShares
from sb3_offline_ft.buffers.transitions import OfflineTransitions
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, clip_actions, fit_to_space, scale_actions

Array = npt.NDArray[Any]


class SamplerPosition(NamedTuple):
    """
    How far the draws of offline rows are.

    :param state: The random streams
    :param rows_by_source: Number of rows drawn from each source, shape ``(n_sources,)``
    :param drawn: With balanced replay, the rows whose priorities are to be estimated
    """

    state: str
    rows_by_source: Array
    drawn: tuple[Array, ...]


class OfflinePart:
    """
    Immutable rows with an index space of their own, and the draws of them.

    :param balanced: Priorities of the rows; None draws them by the shares of their sources
    """

    def __init__(self, balanced: BalancedReplay | None) -> None:
        self.balanced = balanced
        self.dataset: OfflineDataset | None = None
        self.transitions: OfflineTransitions | None = None
        self.shares = SourceShares([])
        self.rows_by_source = np.zeros(0, np.int64)

    def seed(self, seed: int | None) -> None:
        """Start the random streams anew; None takes fresh entropy."""
        self.generator = np.random.default_rng(derive_seed(seed, stream=0))
        if self.balanced is not None:
            self.balanced.seed(derive_seed(seed, stream=3))

    def set(
        self,
        dataset: OfflineDataset,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        handle_timeout_termination: bool,
        gamma: float,
    ) -> None:
        """
        :param dataset: The logged data
        :param observation_space: The environment's
        :param action_space: The environment's; actions are scaled from its bounds to [-1, 1]
        :param handle_timeout_termination: Whether to bootstrap the value at truncations
        :param gamma: Discount factor of Monte-Carlo returns
        :raises ValueError: The spaces differ, actions are out of bounds, or restored priorities are of other data
        """
        check_compatible(dataset, observation_space, action_space)
        dataset = clip_actions(dataset, action_space)
        actions = scale_actions(dataset.actions, action_space).reshape(len(dataset), -1)
        dataset = fit_to_space(dataset, observation_space)
        transitions = OfflineTransitions(dataset, actions, handle_timeout_termination, gamma)
        shares = SourceShares(dataset.sources)
        if self.balanced is not None:
            self.balanced.set_offline_data(transitions, shares)
        self.dataset, self.transitions, self.shares = dataset, transitions, shares
        self.rows_by_source = np.zeros(len(shares.names), np.int64)

    def draw(self, shape: tuple[int, int], by_priority: bool) -> Array:
        """
        :param shape: Shape of the rows that are wanted
        :param by_priority: Whether priorities count, if there are any
        :return: Rows
        """
        size = shape[0] * shape[1]
        source = self.shares if self.balanced is None or not by_priority else self.balanced
        rows = source.draw(self.generator, size)
        self.rows_by_source += self.shares.count(rows)
        return rows.reshape(shape)

    def run_state(self) -> dict[str, Any]:
        """How far the draws are, without the generator's state, and the priorities, as arrays."""
        balanced = None if self.balanced is None else self.balanced.get_state()
        return {"rows_by_source": self.rows_by_source.copy(), "balanced": balanced}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`run_state` returned."""
        self.rows_by_source = state["rows_by_source"].copy()
        if self.balanced is not None and state["balanced"] is not None:
            self.balanced.set_state(state["balanced"])


def parts_of_pickled(state: dict[str, Any]) -> dict[str, Any]:
    """What a replay buffer's attributes would be now that was pickled when its parts were no objects of their own."""
    state = dict(state)
    part = OfflinePart(state.pop("_balanced"))
    part.dataset, part.transitions = state.pop("offline_data"), state.pop("_offline")
    part.shares, part.rows_by_source = state.pop("_shares"), state.pop("_rows_by_source")
    part.generator = state.pop("_offline_generator")
    augmentation, augmenter = state.pop("_augmentation"), None
    if augmentation is not None:
        augmenter = Augmenter(augmentation, state["observation_space"])
        augmenter.generator = state.pop("_augmentation_generator")
        if part.dataset is not None:
            augmenter.set_offline_data(part.dataset.observations)
    return {name: value for name, value in state.items() if name not in ("_augmented", "_std")} | {
        "_offline": part,
        "_augmenter": augmenter,
    }
