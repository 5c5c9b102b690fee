"""Scores of runs, grouped by dataset, and their stratified bootstrap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Scores = Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike]
Curves = Mapping[str, Any] | Sequence[Any]

MOST_NUMBERS = 4_000_000
"""At a time, in resamples"""


def resample(
    samples: Sequence[Array],
    function: Callable[..., Array],
    confidence: float,
    n_resamples: int,
    seed: int,
    numbers_per_run: int = 1,
) -> Any:
    """
    The stratified bootstrap with percentile intervals: each dataset's sample, runs on the last axis, is resampled by itself.
    What the statistic needs for each run of a resample bounds how many are held at a time.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, found {confidence}.")
    if n_resamples < 1:
        raise ValueError(f"`n_resamples` must be at least 1, found {n_resamples}.")
    n_runs = sum(sample.shape[-1] for sample in samples)
    return stats.bootstrap(
        samples,
        function,
        n_resamples=n_resamples,
        batch=max(1, MOST_NUMBERS // (n_runs * numbers_per_run)),
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def checked_scores(scores: Scores, name: str = "scores") -> list[Array]:
    """Of each dataset the runs, shape ``(runs,)``; the name of the argument is for the message."""
    samples = []
    for dataset, values in _by_dataset(scores, name):
        sample = np.asarray(values, dtype=np.float64)
        if sample.ndim != 1 or sample.size == 0:
            raise ValueError(
                f"`{name}` must have one array of runs per dataset, with at least one run: "
                f"dataset {dataset} has shape {sample.shape}."
            )
        samples.append(_finite(sample, dataset))
    return samples


def matching_scores(x: Scores, y: Scores) -> tuple[list[Array], list[Array]]:
    """The checked scores of two methods on the same datasets, which are in the order of the first one."""
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        if set(x) != set(y):
            raise ValueError(f"Both methods must have the same datasets: found {sorted(x)} and {sorted(y)}.")
        y = {dataset: y[dataset] for dataset in x}
    x_samples, y_samples = checked_scores(x, "x"), checked_scores(y, "y")
    if len(x_samples) != len(y_samples):
        raise ValueError(f"Both methods must have the same datasets: found {len(x_samples)} and {len(y_samples)}.")
    return x_samples, y_samples


def checked_curves(curves: Curves, n_points: int) -> list[Array]:
    """Of each dataset the curves of all runs, which must have so many points; shape ``(points, runs)``."""
    samples = []
    for dataset, values in _by_dataset(curves, "curves"):
        rows = [np.asarray(row, dtype=np.float64) for row in values]
        if not rows:
            raise ValueError(f"Dataset {dataset} has no runs.")
        for run, row in enumerate(rows):
            if row.shape != (n_points,):
                raise ValueError(
                    f"All runs must have the same evaluations: run {run} of dataset {dataset} has shape {row.shape}, "
                    f"expected ({n_points},). Leave out unfinished runs, or cut all of them to the timesteps they share."
                )
        samples.append(np.ascontiguousarray(_finite(np.stack(rows), dataset).T))
    return samples


def _by_dataset(scores: Mapping[str, Any] | Sequence[Any], name: str) -> list[tuple[str, Any]]:
    if len(scores) == 0:
        raise ValueError(f"`{name}` is empty: expected at least one dataset with runs.")
    if isinstance(scores, Mapping):
        return [(repr(dataset), values) for dataset, values in scores.items()]
    return [(str(position), values) for position, values in enumerate(scores)]


def _finite(sample: Array, dataset: str) -> Array:
    if not np.isfinite(sample).all():
        run = int(np.argwhere(~np.isfinite(sample))[0][0])
        raise ValueError(f"Run {run} of dataset {dataset} has a score of nan or inf: statistics need finite numbers.")
    return sample
