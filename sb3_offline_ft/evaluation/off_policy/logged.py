"""Logged transitions in the form that a policy's environment has, and what the policy would have done in them."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PolicyPredictor

from sb3_offline_ft.buffers.offline_part import OfflinePart
from sb3_offline_ft.common.observations import Observations, take_rows
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.datasets import DatasetSpec, OfflineDataset, load_dataset, scale_actions

Array = npt.NDArray[np.float32]

ROWS_AT_ONCE = 4096


class Acts(Protocol):
    """Anything that answers one observation with one action, such as a controller."""

    def act(self, observation: Any) -> npt.ArrayLike:
        """
        :param observation: One observation as the environment gives it
        :return: An action in the units of the environment, shape ``action_shape``
        """


Policy = PolicyPredictor | Acts
"""An SB3 algorithm or policy, anything else with its ``predict`` for many observations, or something with ``act`` for one."""


class LoggedData:
    """
    A dataset as a policy's environment would have given it.

    :param dataset: The data, or its spec
    :param policy: The policy; the spaces are its own if it knows them, else the data's
    :param seed: Seed of the draws
    :raises ValueError: Nobody knows the spaces, they do not fit, or the actions are not continuous
    """

    def __init__(self, dataset: DatasetSpec, policy: Policy, seed: int = 0) -> None:
        given = load_dataset(dataset)
        observation_space = getattr(policy, "observation_space", None) or given.observation_space
        action_space = getattr(policy, "action_space", None) or given.action_space
        if observation_space is None or action_space is None:
            raise ValueError(
                f"Dataset {given.name!r} does not say what its spaces are, and neither does the policy: give the data as a "
                "Minari dataset, or to `OfflineDataset.from_columns` with `observation_space` and `action_space`."
            )
        self.observation_space: spaces.Space[Any] = observation_space
        self.action_space: spaces.Box = action_space
        self._part = OfflinePart(None)
        self._part.seed(derive_seed(seed, stream=10))
        self._part.set(given, observation_space, action_space, handle_timeout_termination=True, gamma=0.99)
        assert self._part.dataset is not None and self._part.transitions is not None
        self.dataset: OfflineDataset = self._part.dataset
        self.actions: Array = self._part.transitions.actions
        """``(N, action_dim)``, scaled to [-1, 1]."""

    def draw(self, n_batches: int, batch_size: int) -> npt.NDArray[np.int64]:
        """Rows by the shares of the sources, shape ``(n_batches, batch_size)``."""
        rows: npt.NDArray[np.int64] = self._part.draw((n_batches, batch_size), by_priority=False)
        return rows

    def actions_of(self, policy: Policy) -> "PolicyActions":
        """
        Ask a policy for its (deterministic) actions along the logged episodes.

        A controller with memory is reset at the start of each episode and sees the observations that were logged, not those
        that its own actions would have led to.

        :param policy: The policy
        :return: Its actions
        :raises ValueError: An action has another shape than the data's, or is not finite
        """
        data = self.dataset
        ends = take_rows(data.next_observations, data.episode_ends)
        if not hasattr(policy, "act"):
            now, last = (np.concatenate(list(_predicted(policy, part))) for part in (data.observations, ends))
        else:
            acted: list[npt.ArrayLike] = []
            for episode, (start, end) in enumerate(zip(data.episode_starts, data.episode_ends, strict=True)):
                getattr(policy, "reset", lambda: None)()
                acted += [policy.act(take_rows(data.observations, row)) for row in range(start, end + 1)]
                acted.append(policy.act(take_rows(ends, episode)))
            # Behind the rows of each episode there is its last observation
            both = np.asarray(acted, dtype=np.float64)
            behind = data.episode_ends + 1 + np.arange(data.n_episodes)
            now, last = np.delete(both, behind, axis=0), both[behind]
        if now.shape[1:] != self.action_space.shape or not (np.isfinite(now).all() and np.isfinite(last).all()):
            not_finite = ", some of them not finite" if now.shape[1:] == self.action_space.shape else ""
            raise ValueError(
                f"The policy's actions must be finite and have the shape {self.action_space.shape}, found {now.shape[1:]}"
                f"{not_finite}: check that it is a policy for the environment of dataset {data.name!r}."
            )
        now, last = (scale_actions(each, self.action_space).reshape(len(each), -1) for each in (now, last))
        after = np.empty_like(now)
        after[:-1] = now[1:]
        after[data.episode_ends] = last
        return PolicyActions(now, after)


class PolicyActions:
    """
    What a policy does in the rows of a dataset.

    :param now: At the observations, shape ``(N, action_dim)``, in [-1, 1]
    :param after: At the next observations, the same shape
    """

    def __init__(self, now: Array, after: Array) -> None:
        self.now, self.after = now, after


def _predicted(policy: PolicyPredictor, observations: Observations) -> Iterator[npt.NDArray[Any]]:
    n = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
    for start in range(0, n, ROWS_AT_ONCE):
        yield policy.predict(take_rows(observations, slice(start, start + ROWS_AT_ONCE)), deterministic=True)[0]
