"""Which offline rows are drawn: uniformly, by shares of the sources they come from, or by priorities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.datasets import DatasetPart

Array = npt.NDArray[Any]


class SourceShares:
    """
    Draws rows of a dataset: first a source by its share, then a row of it uniformly.

    Without shares all rows are equally likely, and the draws are those of a plain ``integers(0, n)``.

    :param parts: The sources, one after the other; either all have a weight or none
    """

    def __init__(self, parts: Sequence[DatasetPart]) -> None:
        self.names = [part.name for part in parts]
        self._begins = np.array([part.begin for part in parts], np.int64)
        self._lengths = np.array([part.end - part.begin for part in parts], np.int64)
        self._n_rows = int(self._lengths.sum())
        self._shares: Array | None = None
        weights = [part.weight for part in parts if part.weight is not None]
        if weights:
            self._shares = np.array(weights, np.float64) / sum(weights)
            self._cumulative = np.cumsum(self._shares)
            self._cumulative[-1] = 1.0

    def draw(self, generator: np.random.Generator, size: int) -> Array:
        """Draw rows, shape ``(size,)``; several calls draw the rows of one call of their total size."""
        if self._shares is None:
            return generator.integers(0, self._n_rows, size=size)
        # One number says both source and row, so that how draws are grouped does not change them
        points = generator.random(size)
        sources = np.searchsorted(self._cumulative, points, side="right")
        within = (points - self._cumulative[sources]) / self._shares[sources] + 1.0
        steps = np.clip((within * self._lengths[sources]).astype(np.int64), 0, self._lengths[sources] - 1)
        rows: Array = self._begins[sources] + steps
        return rows

    def relative_probabilities(self, rows: Array) -> Array:
        """The rows' probabilities times the number of all rows."""
        if self._shares is None:
            return np.ones(rows.shape)
        probabilities: Array = (self._shares * self._n_rows / self._lengths)[self._sources(rows)]
        return probabilities

    def count(self, rows: Array) -> Array | int:
        """How many rows come from each source, shape ``(n_sources,)``; a number if there is one source."""
        if len(self.names) == 1:
            return rows.size
        return np.bincount(self._sources(rows).ravel(), minlength=len(self.names))

    def _sources(self, rows: Array) -> Array:
        sources: Array = np.searchsorted(self._begins, rows, side="right") - 1
        return sources


def draw_ring_rows(shape: tuple[int, int], n_filled: int, n_envs: int) -> Array:
    """
    Draw rows of a ring with the calls of SB3's ``ReplayBuffer``, hence the same ones for the same seed.

    :param shape: ``(n_batches, batch_size)``
    :param n_filled: Number of steps in the ring
    :param n_envs: Number of environments
    :return: Indices into the flattened ring
    """
    if n_envs == 1:
        # SB3's draw of the environment takes nothing from the stream
        return np.random.randint(0, n_filled, size=shape)
    rows = np.empty(shape, np.intp)
    for batch in rows:
        np.multiply(np.random.randint(0, n_filled, size=shape[1]), n_envs, out=batch)
        batch += np.random.randint(0, high=n_envs, size=shape[1])
    return rows


class SumTree:
    """
    Priorities of rows in a binary tree of sums, for drawing rows in proportion to them (Schaul et al. 2016, arXiv
    1511.05952, appendix B.2.1). All operations work on many rows at once and take a number of array operations that grows
    with the logarithm of the number of rows.

    :param priorities: Not negative and not all 0, shape ``(n,)``
    """

    def __init__(self, priorities: Array) -> None:
        self._n_rows = len(priorities)
        self._first_leaf = 1 << max(self._n_rows - 1, 1).bit_length()
        # Node i has the children 2 i and 2 i + 1; the root is 1
        self._sums = np.zeros(2 * self._first_leaf)
        self._sums[self._first_leaf : self._first_leaf + self._n_rows] = priorities
        level = self._first_leaf
        while level > 1:
            children = self._sums[level : 2 * level]
            level //= 2
            self._sums[level : 2 * level] = children[::2] + children[1::2]

    @property
    def priorities(self) -> Array:
        """``(n,)``, to be changed with :meth:`set` only."""
        return self._sums[self._first_leaf : self._first_leaf + self._n_rows]

    def set(self, rows: Array, priorities: Array) -> None:
        """Change priorities of rows; one that is given twice must have the same priority both times."""
        nodes = rows + self._first_leaf
        self._sums[nodes] = priorities
        while nodes.size and nodes[0] > 1:
            nodes = nodes // 2
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def draw(self, generator: np.random.Generator, size: int) -> Array:
        """Draw rows independently in proportion to their priorities, shape ``(size,)``."""
        rest = generator.random(size) * self._sums[1]
        nodes = np.ones(size, np.int64)
        while nodes.size and nodes[0] < self._first_leaf:
            nodes *= 2
            left = self._sums[nodes]
            # The sum on the right is asked too, since rounding must not lead to a row of priority 0
            to_the_right = (rest >= left) & (self._sums[nodes + 1] > 0)
            rest -= left * to_the_right
            nodes += to_the_right
        return nodes - self._first_leaf
