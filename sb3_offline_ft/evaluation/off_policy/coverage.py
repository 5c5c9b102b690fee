"""Whether the data shows what a policy does: distances to the nearest logged states and actions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from sb3_offline_ft.common.observations import Observations, by_key
from sb3_offline_ft.datasets import DatasetSpec
from sb3_offline_ft.datasets.tools.diversity import sample_rows, state_matrix
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData, Policy, PolicyActions

Array = npt.NDArray[np.float64]

OWN_QUANTILE = 0.95
"""Of the data's own distances: what is farther counts as outside."""
MOST_OUTSIDE = 0.1
"""Share outside above which a policy is said to leave the data: twice that of the data itself."""
MOST_REFERENCES, MOST_QUERIES = 50_000, 2_000


@dataclass(frozen=True)
class PolicyCoverage:
    """
    How far what a policy does is from what was logged.

    Half of the episodes are the reference, and distances are from rows of the other half to the nearest row of the reference.
    States are in standard deviations, actions in half ranges; a distance is the root of the mean square over state dimensions
    plus that over action dimensions.

    :param distances: Of logged states with the policy's actions, shape ``(n,)``
    :param own_distances: Of the same states with the logged actions, shape ``(n,)``
    :param action_distance: Root mean square difference of the policy's actions to the logged ones at the same states, in half
        ranges
    :param states_outside: Share of the states that the policy visited, if they were given, which are farther from logged
        states than 95 % of logged ones are
    """

    distances: Array
    own_distances: Array
    action_distance: float
    states_outside: float | None = None

    @property
    def limit(self) -> float:
        """The distance beyond which something is outside the data: 5 % of the data itself is."""
        return float(np.quantile(self.own_distances, OWN_QUANTILE))

    @property
    def outside(self) -> float:
        """Share of the policy's actions, at logged states, that are outside the data; 0.05 for a policy like the data's."""
        return float(np.mean(self.distances > self.limit))

    @property
    def leaves_data(self) -> bool:
        """Whether more than twice as much is outside as of the data itself: then an estimate is a guess."""
        return max(self.outside, self.states_outside or 0.0) > MOST_OUTSIDE

    @property
    def text(self) -> str:
        """In one sentence."""
        states = ""
        if self.states_outside is not None:
            states = f", and {100 * self.states_outside:.0f} % of the states that it visits"
        return (
            f"{100 * self.outside:.0f} % of its actions at logged states{states} are farther from the data than 95 % of the "
            f"data itself; it differs from the logged actions by {self.action_distance:.2f} of half their range."
        )


def coverage(
    policy: Policy,
    dataset: DatasetSpec | LoggedData,
    *,
    visited: Observations | None = None,
    seed: int = 0,
    actions: PolicyActions | None = None,
) -> PolicyCoverage:
    """
    Measure how well data covers what a policy does.

    Which states the policy would visit, logged data cannot say: that is measured only if some are given. Images are left out.

    :param policy: The policy
    :param dataset: The data or its spec, of at least two episodes
    :param visited: Observations from episodes of the policy itself, in the form of the dataset's, shape ``(n, ...)``
    :param seed: Of the samples of rows
    :param actions: What :meth:`LoggedData.actions_of` said, to save time
    :return: The distances
    :raises ValueError: There are fewer than two episodes, or policy and data do not fit
    """
    data = dataset if isinstance(dataset, LoggedData) else LoggedData(dataset, policy, seed)
    logged = data.dataset
    if logged.n_episodes < 2:
        raise ValueError(f"Coverage needs at least two episodes, since it compares them: dataset {logged.name!r} has one.")
    actions = data.actions_of(policy) if actions is None else actions
    is_reference = np.zeros(logged.n_episodes, np.bool_)
    is_reference[np.random.default_rng(seed).permutation(logged.n_episodes)[: logged.n_episodes // 2]] = True
    in_reference = is_reference[logged.episode_of_rows()]
    rows, queries = (np.flatnonzero(part) for part in (in_reference, ~in_reference))
    rows = rows[sample_rows(len(rows), MOST_REFERENCES, seed)]
    queries = queries[sample_rows(len(queries), MOST_QUERIES, seed + 1)]
    states = state_matrix(logged)
    scaled = _Scale(states)
    points = np.concatenate([scaled(states[rows]), _per_dimension(data.actions[rows])], axis=1)
    tree, query_states = cKDTree(points), scaled(states[queries])

    def distances(of: npt.NDArray[Any]) -> Array:
        found, _ = tree.query(np.concatenate([query_states, _per_dimension(of)], axis=1))
        return np.asarray(found, np.float64)

    outside = None
    if visited is not None:
        state_tree = cKDTree(scaled(states[rows]))
        limit = np.quantile(state_tree.query(query_states)[0], OWN_QUANTILE)
        outside = float(np.mean(state_tree.query(scaled(_flat(visited)))[0] > limit))
    difference = actions.now[queries] - data.actions[queries]
    return PolicyCoverage(
        distances(actions.now[queries]),
        distances(data.actions[queries]),
        float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))),
        outside,
    )


def _flat(observations: Observations) -> npt.NDArray[Any]:
    arrays = [array.reshape(len(array), -1) for array in by_key(observations).values() if array.dtype != np.uint8]
    return np.concatenate(arrays, axis=1)


def _per_dimension(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """So that Euclidean distances are root mean squares, and a few actions count as much as many states."""
    return np.asarray(rows / np.sqrt(max(1, rows.shape[1])))


class _Scale:
    """Standardizes states by the data's statistics; dimensions that never change are left out."""

    def __init__(self, states: npt.NDArray[Any]) -> None:
        std = states.std(axis=0, dtype=np.float64)
        self._varies = std > 0
        self._mean, self._std = states.mean(axis=0, dtype=np.float64)[self._varies], std[self._varies]

    def __call__(self, states: npt.NDArray[Any]) -> Array:
        return np.asarray(_per_dimension((states[:, self._varies] - self._mean) / self._std), np.float64)
