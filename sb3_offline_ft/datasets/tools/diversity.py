"""How good and how diverse a dataset is: measures of returns, of the states and actions visited, and of the action noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import by_key, take_rows
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.spaces import flatten_rows

Array = npt.NDArray[np.float64]

FINE_BINS, COARSE_BINS = 100, 5
"""Bins of each dimension for the coverage: as in the paper, and so few that high-dimensional data still shares some."""


@dataclass(frozen=True)
class Coverage:
    """
    Distinct state-action bins of a dataset, and of two baselines of the same size.

    :param rows: Number of rows binned
    :param unique: Distinct bins of these rows
    :param unique_shuffled: Distinct bins after each dimension was shuffled on its own: the same range of every dimension
        without their dependence
    :param unique_uniform: Distinct bins of the same states with actions drawn uniformly within their bounds
    :param bins: Bins of each dimension
    """

    rows: int
    unique: int
    unique_shuffled: int
    unique_uniform: int
    bins: int

    @property
    def per_row(self) -> float:
        """``unique / rows``, at most 1."""
        return self.unique / self.rows

    @property
    def per_shuffled(self) -> float:
        """``unique / unique_shuffled``: 1 if no two dimensions depend on each other."""
        return self.unique / self.unique_shuffled

    @property
    def per_uniform(self) -> float:
        """``unique / unique_uniform``: 1 if the actions cover as much as uniform ones do."""
        return self.unique / self.unique_uniform


@dataclass(frozen=True)
class ActionNoise:
    """
    How much actions differ between similar states.

    :param std: ``(A,)``, estimated standard deviation of each dimension given the state, in the units of the actions
    :param total_std: ``(A,)``, standard deviation of each dimension over the ``references``
    :param neighbours: Number of neighbours ``k``
    :param references: Number of rows in which neighbours were sought
    :param queries: Number of rows whose neighbours were sought
    """

    std: Array
    total_std: Array
    neighbours: int
    references: int
    queries: int

    @property
    def mean_std(self) -> float:
        """Root of the mean over dimensions of the squared ``std``."""
        return float(np.sqrt(np.mean(self.std**2)))

    @property
    def unexplained(self) -> float:
        """Share of the actions' variance that similar states leave unexplained: 1 if actions ignore the state."""
        total = float(np.sum(self.total_std**2))
        return min(1.0, float(np.sum(self.std**2)) / total) if total > 0 else 0.0


@dataclass(frozen=True)
class Diversity:
    """
    All measures of one dataset. What cannot be measured on it is None.

    :param trajectory_quality: See :func:`trajectory_quality`; None without reference scores
    :param positive_sided_variance: See :func:`positive_sided_variance`
    :param state_dimensions: Number of state dimensions that vary; images are left out
    :param entropy_rows: Rows in the sample behind ``state_entropy``
    :param vendi_rows: Rows in the sample behind ``vendi_score``
    :param seed: Seed of the samples
    :param coverage: See :func:`state_action_coverage`, with :data:`FINE_BINS`
    :param coarse_coverage: The same with :data:`COARSE_BINS`
    :param state_entropy: See :func:`knn_entropy`, of the standardised states, in nats
    :param gaussian_entropy: Entropy of independent Gaussians of variance 1, as many as there are state dimensions: the
        largest that standardised states can have, up to the error of the estimate
    :param vendi_score: See :func:`vendi_score`, of standardised states and scaled actions
    :param action_noise: See :func:`action_noise`, of the scaled actions
    """

    trajectory_quality: float | None
    positive_sided_variance: float
    state_dimensions: int
    entropy_rows: int
    vendi_rows: int
    seed: int
    coverage: Coverage | None = None
    coarse_coverage: Coverage | None = None
    state_entropy: float | None = None
    gaussian_entropy: float | None = None
    vendi_score: float | None = None
    action_noise: ActionNoise | None = None


def trajectory_quality(returns: npt.ArrayLike, random: float, expert: float) -> float:
    """
    Place the mean return of a dataset between a random policy and an expert (TQ).

    ``(mean(returns) - random) / (expert - random)``. Schweighofer et al. (2022, arXiv 2111.04714) take the best online
    policy for the expert.

    :param returns: ``(E,)``, undiscounted return of each episode
    :param random: Mean return of a uniformly random policy
    :param expert: Mean return of an expert
    :return: 0 for random data, 1 for an expert's; beyond both is possible
    :raises ValueError: There are no returns, or the two scores are equal
    """
    values = _vector(returns, "returns")
    if random == expert:
        raise ValueError(f"The scores of random policy and expert must differ, found {random} for both")
    return float((values.mean() - random) / (expert - random))


def positive_sided_variance(returns: npt.ArrayLike) -> float:
    """
    Measure how far episodes lie above the mean return: the positive-sided variance of the returns (RPSV).

    ``mean over all episodes of max(return - mean, 0)**2``, after Hong et al. (2023, arXiv 2306.13085).

    :param returns: ``(E,)``, undiscounted return of each episode
    :return: In squared units of the return; 0 if all returns are equal
    :raises ValueError: There are no returns
    """
    values = _vector(returns, "returns")
    return float(np.mean(np.maximum(values - values.mean(), 0.0) ** 2))


def state_action_coverage(
    states: npt.NDArray[Any],
    actions: npt.NDArray[Any],
    bins: int = FINE_BINS,
    action_low: npt.ArrayLike | None = None,
    action_high: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Coverage:
    """
    Count distinct state-action bins (binned SACo).

    Each dimension is cut into ``bins`` equal bins from its smallest to its largest value, for actions from their lower to
    their upper bound. Schweighofer et al. (2022, arXiv 2111.04714) divide the count by that of an online replay buffer of
    the same size; logged data has none, so the baselines are the data itself, shuffled or with uniform actions.

    :param states: ``(N, S)``
    :param actions: ``(N, A)``
    :param bins: Bins of each dimension
    :param action_low: ``(A,)``, lower bounds; the smallest values if omitted
    :param action_high: ``(A,)``, upper bounds; the largest values if omitted
    :param seed: Seed of the baselines
    :return: The counts
    :raises ValueError: There are no rows or fewer than two bins
    """
    _check_matrix(states, "states")
    _check_matrix(actions, "actions")
    if bins < 2:
        raise ValueError(f"There must be at least 2 bins, found {bins}")
    low = actions.min(axis=0) if action_low is None else np.asarray(action_low, np.float64)
    high = actions.max(axis=0) if action_high is None else np.asarray(action_high, np.float64)
    binned_states = _bin(states, states.min(axis=0), states.max(axis=0), bins)
    binned = np.concatenate([binned_states, _bin(actions, low, high, bins)], axis=1)
    generator = np.random.default_rng(seed)
    uniform = generator.integers(bins, size=actions.shape).astype(binned.dtype)
    uniform[:, ~(np.broadcast_to(high, actions.shape[1:]) > low)] = 0
    with_uniform = np.concatenate([binned_states, uniform], axis=1)
    shuffled = generator.permuted(np.ascontiguousarray(binned.T), axis=1).T
    counts = [len(np.unique(row_hashes(rows))) for rows in (binned, shuffled, with_uniform)]
    return Coverage(len(states), counts[0], counts[1], counts[2], bins)


def knn_entropy(samples: npt.NDArray[Any], k: int = 3) -> float:
    """
    Estimate the differential entropy of the distribution that samples come from (Kozachenko and Leonenko 1987).

    ``psi(n) - psi(k) + log(c_d) + d * mean(log(eps))``: ``eps`` is the distance of a sample to its ``k``-th neighbour, ``c_d``
    the volume of the unit ball in ``d`` dimensions, ``psi`` the digamma function.

    :param samples: ``(n, d)``
    :param k: Number of the neighbour
    :return: In nats; minus infinity if more than ``k`` samples coincide somewhere
    :raises ValueError: There are not more than ``k`` samples
    """
    from scipy.spatial import cKDTree
    from scipy.special import digamma, gammaln

    _check_matrix(samples, "samples")
    points = np.asarray(samples, np.float64)
    n, d = points.shape
    if not 1 <= k < n:
        raise ValueError(f"k must be from 1 to {n - 1}, one less than the number of samples, found {k}")
    distances, _ = cKDTree(points).query(points, k=[k + 1])
    if not distances.all():
        return -np.inf
    log_unit_ball = 0.5 * d * np.log(np.pi) - gammaln(0.5 * d + 1.0)
    return float(digamma(n) - digamma(k) + log_unit_ball + d * np.log(distances).mean())


def vendi_score(
    samples: npt.NDArray[Any], kernel: Literal["gaussian", "cosine"] = "gaussian", bandwidth: float | None = None
) -> float:
    """
    Count the effectively different samples (Friedman and Dieng 2023).

    ``exp(-sum(lambda * log(lambda)))`` over the eigenvalues ``lambda`` of ``K / n``, where ``K`` holds the similarities of
    all pairs of samples: 1 if all samples are alike, ``n`` if no two are similar.

    :param samples: ``(n, d)``. The cost grows with the cube of ``n``
    :param kernel: Similarity of ``x`` and ``y``: ``"gaussian"`` is ``exp(-|x - y|**2 / (2 * bandwidth**2))``, ``"cosine"`` the
        cosine of the angle between them, for which the score is at most ``d``
    :param bandwidth: Of the Gaussian kernel; ``sqrt(d)`` if omitted
    :return: The score, from 1 to ``n``. It depends on ``n``, the kernel and its bandwidth: compare only where they agree
    :raises ValueError: The kernel is unknown, the bandwidth not positive, or a sample without direction has no cosine
    """
    from scipy.linalg import eigvalsh
    from scipy.spatial.distance import pdist, squareform

    _check_matrix(samples, "samples")
    points = np.asarray(samples, np.float64)
    n, d = points.shape
    if kernel == "gaussian":
        width = float(np.sqrt(d)) if bandwidth is None else float(bandwidth)
        if not width > 0:
            raise ValueError(f"The bandwidth must be positive, found {bandwidth}")
        similarity = squareform(np.exp(-pdist(points, "sqeuclidean") / (2.0 * width**2)))
        np.fill_diagonal(similarity, 1.0)
    elif kernel == "cosine":
        lengths = np.linalg.norm(points, axis=1, keepdims=True)
        if not lengths.all():
            raise ValueError(f"Sample {int(lengths.argmin())} is zero in every dimension: it has no cosine with others")
        units = points / lengths
        # The smaller of the two matrices with the same eigenvalues other than zero
        similarity = units.T @ units if d < n else units @ units.T
    else:
        raise ValueError(f"The kernel must be 'gaussian' or 'cosine', found {kernel!r}")
    shares = eigvalsh(similarity / n)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def action_noise(
    states: npt.NDArray[Any],
    actions: npt.NDArray[Any],
    k: int = 10,
    max_references: int = 100_000,
    max_queries: int = 2_000,
    seed: int = 0,
) -> ActionNoise:
    """
    Estimate the standard deviation of the actions given the state from the ``k`` nearest neighbours.

    A row's residual is its action less the mean action of the ``k`` rows with the nearest standardised states. The mean
    squared residual times ``k / (k + 1)`` is the variance of the action given the state where the mean action does not
    change between neighbours; where it changes, the estimate is too large.

    :param states: ``(N, S)``
    :param actions: ``(N, A)``
    :param k: Number of neighbours
    :param max_references: Rows in which neighbours are sought; a random sample if there are more
    :param max_queries: Rows whose neighbours are sought; a random sample if there are more
    :param seed: Seed of the samples
    :return: The estimate
    :raises ValueError: There are not more than ``k`` rows
    """
    from scipy.spatial import cKDTree

    _check_matrix(states, "states")
    _check_matrix(actions, "actions")
    if not 1 <= k < min(len(states), max_references):
        raise ValueError(f"k must be from 1 to {min(len(states), max_references) - 1}, found {k}")
    references = sample_rows(len(states), max_references, seed)
    queries = sample_rows(len(references), max_queries, seed + 1)
    points, nearby_actions = standardized(states[references]), actions[references].astype(np.float64)
    _, neighbours = cKDTree(points).query(points[queries], k=k + 1)
    # A row is its own nearest neighbour, unless so many rows coincide that it is not among those returned
    own = neighbours == queries[:, None]
    own[~own.any(axis=1), -1] = True
    neighbours = neighbours[~own].reshape(len(queries), k)
    residuals = nearby_actions[queries] - nearby_actions[neighbours].mean(axis=1)
    std = np.sqrt((residuals**2).mean(axis=0) * k / (k + 1))
    return ActionNoise(std, nearby_actions.std(axis=0), k, len(references), len(queries))


def measure_diversity(
    dataset: OfflineDataset,
    entropy_rows: int = 5_000,
    vendi_rows: int = 1_000,
    most_rows: int = 500_000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Diversity:
    """
    Measure a dataset.

    States are all vectors of the observations, flattened and standardised; images are left out. Actions are scaled to
    [-1, 1] by the bounds of the action space, without a space by their own range.

    :param dataset: The dataset
    :param entropy_rows: Most rows for the entropy; a random sample if there are more
    :param vendi_rows: Most rows for the Vendi score
    :param most_rows: Most rows for everything else that looks at states and actions
    :param seed: Seed of all samples: the same seed gives the same numbers
    :param progress: Called with the name of each measure before it is taken
    :return: The measures
    """
    tell = progress or (lambda name: None)
    scores, returns = dataset.reference_scores, dataset.episode_returns
    quality = trajectory_quality(returns, scores.random, scores.expert) if scores is not None else None
    rows = sample_rows(len(dataset), most_rows, seed)
    states, actions = state_matrix(dataset, rows), scaled_actions(dataset, rows)
    varying = np.ptp(states, axis=0) > 0
    states = states[:, varying]
    n_rows, n_dimensions = states.shape
    diversity = Diversity(
        trajectory_quality=quality,
        positive_sided_variance=positive_sided_variance(returns),
        state_dimensions=n_dimensions,
        entropy_rows=min(n_rows, entropy_rows),
        vendi_rows=min(n_rows, vendi_rows),
        seed=seed,
    )
    if n_dimensions == 0 or n_rows < 20:
        return diversity
    tell("coverage")
    fine, coarse = (state_action_coverage(states, actions, bins, -1.0, 1.0, seed) for bins in (FINE_BINS, COARSE_BINS))
    tell("entropy")
    points = standardized(states)
    entropy = knn_entropy(points[sample_rows(n_rows, entropy_rows, seed)])
    tell("Vendi score")
    chosen = sample_rows(n_rows, vendi_rows, seed + 1)
    vendi = vendi_score(np.concatenate([points[chosen], actions[chosen]], axis=1))
    tell("action noise")
    return replace(
        diversity,
        coverage=fine,
        coarse_coverage=coarse,
        state_entropy=entropy,
        gaussian_entropy=0.5 * n_dimensions * float(np.log(2.0 * np.pi * np.e)),
        vendi_score=vendi,
        action_noise=action_noise(states, actions, seed=seed),
    )


def state_matrix(dataset: OfflineDataset, rows: Any = slice(None)) -> npt.NDArray[np.float32]:
    """
    ``(N, S)``, every observation but images flattened, one after the other, ``Discrete`` ones as one-hot vectors; ``S`` may be
    0.
    """
    length = len(dataset.rewards[rows])
    columns = [np.zeros((length, 0), np.float32)]
    known = by_key(dataset.observation_space)
    for key, array in by_key(take_rows(dataset.observations, rows)).items():
        if isinstance(known.get(key), spaces.Discrete):
            columns.append(flatten_rows(array, known[key]))
        elif array.dtype != np.uint8:
            columns.append(array.reshape(length, -1))
    return np.concatenate(columns, axis=1)


def scaled_actions(dataset: OfflineDataset, rows: Any = slice(None)) -> npt.NDArray[np.float32]:
    """``(N, A)``, the actions on the scale where their bounds, or else the range of the data, are -1 and 1."""
    low, high, _ = action_bounds(dataset)
    flat = dataset.actions[rows].reshape(len(dataset.rewards[rows]), -1)
    extent = np.where(high > low, high - low, 1.0)
    return np.asarray(2.0 * (flat - low) / extent - 1.0, np.float32)


def action_bounds(
    dataset: OfflineDataset,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Lower and upper bounds ``(A,)`` of the actions, and whether they are known; else they are the range of the data."""
    flat = dataset.actions.reshape(len(dataset), -1)
    low, high = flat.min(axis=0), flat.max(axis=0)
    known = np.zeros(len(low), np.bool_)
    if dataset.action_space is not None:
        known_low, known_high = dataset.action_space.low.reshape(-1), dataset.action_space.high.reshape(-1)
        known = np.isfinite(known_low) & np.isfinite(known_high)
        low, high = np.where(known, known_low, low), np.where(known, known_high, high)
    return low.astype(np.float32), high.astype(np.float32), known


def sample_rows(n_rows: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of ``most`` rows drawn without replacement, increasing; of all rows if there are no more."""
    if n_rows <= most:
        return np.arange(n_rows, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(n_rows, most, replace=False)).astype(np.int64)


def standardized(rows: npt.NDArray[Any]) -> Array:
    """Shift and scale every column to mean 0 and variance 1; constant columns become 0."""
    values = np.asarray(rows, np.float64)
    std = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(std > 0, std, 1.0))


def row_hashes(*columns: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """``(N,)``, numbers that are equal for equal rows, and for others with a probability of about 2**-64."""
    import pandas as pd

    flat = [column.reshape(len(column), -1) for column in columns]
    # Zero has two signs
    table = pd.concat([pd.DataFrame(one + one.dtype.type(0) if one.dtype.kind == "f" else one) for one in flat], axis=1)
    return np.asarray(pd.util.hash_pandas_object(table, index=False).to_numpy(), np.uint64)


def _bin(values: npt.NDArray[Any], low: Any, high: Any, bins: int) -> npt.NDArray[np.uint16]:
    low, extent = np.asarray(low, np.float64), np.asarray(high, np.float64) - np.asarray(low, np.float64)
    position = (values - low) / np.where(extent > 0, extent, 1.0) * bins
    return np.asarray(np.clip(np.floor(position), 0, bins - 1), np.uint16)


def _vector(values: npt.ArrayLike, name: str) -> Array:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be a vector with at least one number, found shape {vector.shape}")
    return vector


def _check_matrix(values: npt.NDArray[Any], name: str) -> None:
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must have the shape (rows, dimensions) with at least one of each, found {values.shape}")
