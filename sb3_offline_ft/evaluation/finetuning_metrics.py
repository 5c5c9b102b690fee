"""
How a finetuning run went: what was lost of the pretrained policy, for how long, and what was gained.

``J(t)`` is the mean return of the evaluation after ``t`` interactions, ``J0`` that of the pretrained policy, ``J_random`` that
of a random policy. An average over time lets each evaluation stand for the interactions since the one before it, or since the
policy was set free: with evaluations at equal distances it is their plain mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import stats

from sb3_offline_ft.evaluation.resampling import MOST_NUMBERS, Array

COLLAPSE_SHARE = 0.25
"""A collapsed policy keeps at most this share of what the pretrained one has over a random one. The threshold is ours."""
BAND_SHARE = 0.1
"""Returns count as those of the pretrained policy if at most this share of ``|J0 - J_random|`` is missing."""
CONSECUTIVE = 3
"""So many evaluations in a row above the band make a recovery, and the best of a run."""
LAST = 10
"""The end of a run is judged by so many evaluations, because a single one is noisy."""

Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FinetuningMetrics:
    """
    The metrics of one run. Returns are undiscounted, times are interactions with the environment.

    Only evaluations after the warm-up count, except for ``initial_return``. A policy that was frozen during the whole run is
    measured by all evaluations in the same way: its dip is made by noise alone (see :func:`dip_noise_floor`).

    What cannot be said is None: everything relative to ``J0`` if the run was not pretrained, and everything relative to
    ``J_random`` if that is not known or equals ``J0``.

    :param initial_return: ``J0``, the mean over all episodes of the evaluations of the frozen policy
    :param initial_standard_error: Its standard error; None if there was only one episode
    :param band: ``J0 - max(2 SE(J0), 0.1 |J0 - J_random|)``; at or above it, a return counts as that of the pretrained policy
    :param lowest_return: ``min J``
    :param lowest_at: When that was, the first time
    :param dip_depth: ``(J0 - min J) / |J0 - J_random|``: 1 is as bad as a random policy, negative if ``J`` was always
        above ``J0``
    :param dip_area: Average over time of ``max(0, J0 - J) / |J0 - J_random|``
    :param time_below_band: Share of the time with ``J`` below the band
    :param recovered: Whether ``J`` was back at the band, and stayed for several evaluations, after its lowest point
    :param recovery_time: Interactions from the lowest point to the first of these evaluations, 0 if the lowest point is not
        below the band; None also if the run ended before it had recovered
    :param collapsed: Whether some ``J <= J_random + 0.25 (J0 - J_random)``; None also if the pretrained policy was no better
        than a random one
    :param final_return: ``J`` at the last evaluation
    :param last_return: Mean of the last ten evaluations, or of all if there are fewer
    :param best_return: ``max J``, the larger the more evaluations there are, even of an unchanged policy
    :param best_sustained_return: Highest mean of three evaluations in a row, or of all if there are fewer: less of it is luck
    :param mean_return: Average of ``J`` over time: what users of the learning policy would have got
    :param max_drawdown: Largest loss from a peak of the curve (``J0`` included) to a later point, in units of the return
        (Chan et al. 2020, Measuring the Reliability of Reinforcement Learning Algorithms)
    :param training_return: Mean return of the training episodes, with exploration noise; None if there were none
    :param selected_return: Return of the policy that one has at the end who keeps the best evaluated one so far, the
        pretrained one included: half of the episodes of each evaluation choose, the other half measure what was chosen, and
        this is the mean of both ways round. Choosing does not flatter it, as the best of many does. None if an evaluation has
        a single episode
    :param selected_dip_depth: Dip depth of the policies kept in this way
    """

    initial_return: float | None
    initial_standard_error: float | None
    band: float | None
    lowest_return: float
    lowest_at: int
    dip_depth: float | None
    dip_area: float | None
    time_below_band: float | None
    recovered: bool | None
    recovery_time: int | None
    collapsed: bool | None
    final_return: float
    last_return: float
    best_return: float
    best_sustained_return: float
    mean_return: float
    max_drawdown: float
    training_return: float | None
    selected_return: float | None
    selected_dip_depth: float | None


def finetuning_metrics(
    timesteps: npt.ArrayLike,
    returns: Sequence[npt.ArrayLike] | npt.NDArray[np.floating],
    frozen_until: int,
    random_return: float | None,
    training_timesteps: npt.ArrayLike | None = None,
    training_returns: npt.ArrayLike | None = None,
    consecutive: int = CONSECUTIVE,
) -> FinetuningMetrics:
    """
    Measure a run.

    :param timesteps: Interactions before each evaluation, increasing, shape ``(evaluations,)``
    :param returns: Undiscounted returns of the episodes of each evaluation, shape ``(evaluations, episodes)``; evaluations may
        also have different numbers of episodes
    :param frozen_until: Interactions with the frozen policy: the length of the warm-up, -1 if the run was not pretrained
    :param random_return: Mean return of a random policy, None if it is not known
    :param training_timesteps: Interactions at the end of each training episode, shape ``(training episodes,)``
    :param training_returns: Undiscounted return of each training episode
    :param consecutive: So many evaluations in a row above the band make a recovery
    :return: The metrics
    :raises ValueError: There is no evaluation, timesteps do not increase, lengths differ, or a number is not finite
    """
    steps, episodes = _checked_evaluations(timesteps, returns)
    if random_return is not None and not math.isfinite(random_return):
        raise ValueError(f"`random_return` must be a finite number, or None if it is not known; found {random_return}.")
    is_frozen = steps <= frozen_until
    is_measured = ~is_frozen if not is_frozen.all() else np.ones_like(is_frozen)
    free_from = 0 if is_frozen.all() else max(frozen_until, 0)
    means = np.array([episode_returns.mean() for episode_returns in episodes])
    curve, times = means[is_measured], steps[is_measured]
    weights = _time_weights(times, free_from)
    lowest = int(curve.argmin())

    initial, error = None, None
    if is_frozen.any():
        frozen = np.concatenate([episodes[i] for i in np.flatnonzero(is_frozen)])
        initial, error = float(frozen.mean()), float(stats.sem(frozen)) if frozen.size > 1 else None
    scale = _scale(initial, random_return)
    selected = _selected_curve(episodes, is_frozen)
    depth = area = below = recovered = recovery_time = collapsed = band = selected_depth = None
    if initial is not None and random_return is not None and scale is not None:
        band = initial - max(2 * (error or 0.0), BAND_SHARE * scale)
        depth = float((initial - curve[lowest]) / scale)
        area = float(np.average(np.maximum(0.0, initial - curve), weights=weights) / scale)
        below = float(np.average(curve < band, weights=weights))
        recovered, recovery_time = _recovery(curve, times, band, consecutive)
        selected_depth = None if selected is None else float((initial - selected.min()) / scale)
        if initial > random_return:
            collapsed = bool(curve[lowest] <= collapse_threshold(initial, random_return))
    path = curve if initial is None else np.concatenate([[initial], curve])
    return FinetuningMetrics(
        initial_return=initial,
        initial_standard_error=error,
        band=band,
        lowest_return=float(curve[lowest]),
        lowest_at=int(times[lowest]),
        dip_depth=depth,
        dip_area=area,
        time_below_band=below,
        recovered=recovered,
        recovery_time=recovery_time,
        collapsed=collapsed,
        final_return=float(curve[-1]),
        last_return=float(curve[-LAST:].mean()),
        best_return=float(curve.max()),
        best_sustained_return=float(_running_means(curve, CONSECUTIVE).max()),
        mean_return=float(np.average(curve, weights=weights)),
        max_drawdown=float(np.max(np.maximum.accumulate(path) - path)),
        training_return=_training_return(training_timesteps, training_returns, -1 if is_frozen.all() else frozen_until),
        selected_return=None if selected is None else float(selected[-1]),
        selected_dip_depth=selected_depth,
    )


def collapse_threshold(initial_return: float, random_return: float) -> float:
    """
    The return at or below which a policy counts as collapsed. Papers name no number; a quarter is ours.

    :param initial_return: ``J0``
    :param random_return: ``J_random``
    :return: ``J_random + 0.25 (J0 - J_random)``
    """
    return random_return + COLLAPSE_SHARE * (initial_return - random_return)


@dataclass(frozen=True)
class DipNoiseFloor:
    """
    The dips that evaluations of an unchanged policy show by chance.

    :param mean: Mean dip depth
    :param quantile: Dip depth that is exceeded with probability ``1 - confidence``: a deeper dip is hardly noise
    :param area_mean: Mean dip area
    :param area_quantile: The same quantile of the dip area
    :param collapse_probability: Share of unchanged runs that would count as collapsed
    :param confidence: Which quantile, such as 0.95
    :param n_episodes: Episodes of the frozen policy that this was estimated from
    :param depths: The simulated dip depths, in increasing order
    """

    mean: float
    quantile: float
    area_mean: float
    area_quantile: float
    collapse_probability: float | None
    confidence: float
    n_episodes: int
    depths: Array = field(repr=False, compare=False)

    def probability(self, dip_depth: float) -> float:
        """
        :param dip_depth: An observed dip depth
        :return: Probability that an unchanged policy shows a dip at least so deep: ``(1 + simulated ones) / (1 +
            simulations)``, never 0 (Phipson & Smyth 2010)
        """
        at_least = self.depths.size - int(np.searchsorted(self.depths, dip_depth - 1e-12))
        return (1 + at_least) / (1 + self.depths.size)


def dip_noise_floor(
    frozen_episode_returns: npt.ArrayLike,
    n_evaluations: int,
    episodes_per_evaluation: int,
    random_return: float | None,
    *,
    initial_episodes: int | None = None,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> DipNoiseFloor | None:
    """
    How deep the dip of an unchanged policy looks: the lowest of many noisy evaluations is below ``J0`` anyway.

    Bootstrap (Efron 1979) of the frozen policy's episodes: each resample draws the episodes of ``J0`` and of all evaluations
    after the warm-up anew, with replacement, and measures the dip as in :func:`finetuning_metrics`. The noise of ``J0`` itself
    is therefore included. What no frozen episode shows, such as a rare fall, is not in the floor either: give all episodes of
    the frozen policy that there are, those of a run that kept it frozen too. From 30 episodes the 95 % quantile is exceeded by
    about 10 % of unchanged policies if returns are normally distributed, from 100 by about 5 %. For returns that are skewed
    towards low values it is optimistic: in a simulation it was exceeded by 44 % with 30 episodes and still by 15 % with 300
    (``benchmarks/studies/interval_coverage.md``).

    :param frozen_episode_returns: Undiscounted returns of episodes of the frozen policy, of any shape
    :param n_evaluations: Evaluations after the warm-up
    :param episodes_per_evaluation: Episodes of each
    :param random_return: ``J_random``
    :param initial_episodes: Episodes that ``J0`` of the run is the mean of, by default as many as given
    :param confidence: Which quantile of the dips shall be given
    :param n_resamples: Simulated runs
    :param seed: Same seed, same result
    :return: The floor; None if dips cannot be measured (``J_random`` not known, or equal to ``J0``) or fewer than two episodes
        are given, which say nothing about noise
    :raises ValueError: A number is out of range or not finite
    """
    episodes = np.asarray(frozen_episode_returns, dtype=np.float64).ravel()
    if not np.isfinite(episodes).all():
        raise ValueError("The returns of the frozen policy must be finite numbers: found nan or inf.")
    if min(n_evaluations, episodes_per_evaluation, n_resamples) < 1:
        raise ValueError(
            "`n_evaluations`, `episodes_per_evaluation` and `n_resamples` must be at least 1, "
            f"found {n_evaluations}, {episodes_per_evaluation} and {n_resamples}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, found {confidence}.")
    scale = _scale(float(episodes.mean()), random_return) if episodes.size >= 2 else None
    if scale is None or random_return is None:
        return None
    rng = np.random.default_rng(seed)
    initial = _resampled_means(rng, episodes, n_resamples, initial_episodes or episodes.size)
    curves = _resampled_means(rng, episodes, n_resamples * n_evaluations, episodes_per_evaluation)
    curves = curves.reshape(n_resamples, n_evaluations)
    lowest = curves.min(axis=1)
    depths = np.sort((initial - lowest) / scale)
    areas = np.maximum(0.0, initial[:, None] - curves).mean(axis=1) / scale
    is_better = episodes.mean() > random_return
    collapsed = lowest <= random_return + COLLAPSE_SHARE * (initial - random_return)
    return DipNoiseFloor(
        mean=float(depths.mean()),
        quantile=float(np.quantile(depths, confidence)),
        area_mean=float(areas.mean()),
        area_quantile=float(np.quantile(areas, confidence)),
        collapse_probability=float(collapsed.mean()) if is_better else None,
        confidence=confidence,
        n_episodes=int(episodes.size),
        depths=depths,
    )


def _checked_evaluations(
    timesteps: npt.ArrayLike, returns: Sequence[npt.ArrayLike] | npt.NDArray[np.floating]
) -> tuple[Steps, list[Array]]:
    steps = np.asarray(timesteps, dtype=np.int64)
    episodes = [np.asarray(episode_returns, dtype=np.float64).ravel() for episode_returns in returns]
    if steps.ndim != 1 or steps.size == 0:
        raise ValueError(f"A run must have at least one evaluation, found timesteps of shape {steps.shape}.")
    if len(episodes) != steps.size:
        raise ValueError(f"Each evaluation needs a timestep: found {len(episodes)} evaluations, {steps.size} timesteps.")
    if np.any(np.diff(steps) <= 0):
        position = int(np.argmax(np.diff(steps) <= 0))
        raise ValueError(f"Timesteps of evaluations must increase, found {steps[position]} before {steps[position + 1]}.")
    for step, episode_returns in zip(steps, episodes, strict=True):
        if episode_returns.size == 0 or not np.isfinite(episode_returns).all():
            found = "no episodes" if episode_returns.size == 0 else f"returns {episode_returns}"
            raise ValueError(
                f"The evaluation at timestep {step} has {found}: expected finite numbers. "
                "A run whose returns are nan or inf has no metrics; look for diverged networks or a faulty environment."
            )
    return steps, episodes


def _resampled_means(rng: np.random.Generator, values: Array, n_means: int, size: int) -> Array:
    at_a_time = max(1, MOST_NUMBERS // size)
    parts = (min(at_a_time, n_means - start) for start in range(0, n_means, at_a_time))
    return np.concatenate([rng.choice(values, (n, size)).mean(axis=1) for n in parts])


def _scale(initial: float | None, random_return: float | None) -> float | None:
    if initial is None or random_return is None or initial == random_return:
        return None
    return abs(initial - random_return)


def _running_means(curve: Array, length: int) -> Array:
    length = min(length, curve.size)
    return np.convolve(curve, np.full(length, 1 / length), mode="valid")


def _selected_curve(episodes: Sequence[Array], is_frozen: npt.NDArray[np.bool_]) -> Array | None:
    """Return of the best evaluated policy so far, after each evaluation that is not of the frozen policy."""
    if min(values.size for values in episodes) < 2:
        return None
    # The frozen policy is one, with all its evaluations
    pooled = [np.flatnonzero(is_frozen)] if is_frozen.any() else []
    policies = [*pooled, *np.flatnonzero(~is_frozen)[:, None]]
    halves = [[values[: values.size // 2] for values in episodes], [values[values.size // 2 :] for values in episodes]]
    means = [np.array([np.concatenate([half[i] for i in policy]).mean() for policy in policies]) for half in halves]
    curves = []
    for choosing, measuring in (means, means[::-1]):
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(choosing)[:-1]])
        kept = np.maximum.accumulate(np.where(choosing > best_before, np.arange(len(policies)), 0))
        curves.append(measuring[kept])
    curve = np.asarray(np.mean(curves, axis=0), np.float64)
    return curve[1:] if pooled and len(policies) > 1 else curve


def _time_weights(times: Steps, free_from: int) -> Array:
    weights = np.diff(times, prepend=min(free_from, int(times[0]))).astype(np.float64)
    return weights if weights.sum() > 0 else np.ones_like(weights)


def _recovery(curve: Array, times: Steps, band: float, consecutive: int) -> tuple[bool, int | None]:
    lowest = int(curve.argmin())
    is_back = curve >= band
    if is_back[lowest]:
        return True, 0
    for first in range(lowest + 1, len(curve) - consecutive + 1):
        if is_back[first : first + consecutive].all():
            return True, int(times[first] - times[lowest])
    return False, None


def _training_return(timesteps: npt.ArrayLike | None, returns: npt.ArrayLike | None, frozen_until: int) -> float | None:
    if timesteps is None or returns is None:
        return None
    steps, values = np.asarray(timesteps, dtype=np.int64), np.asarray(returns, dtype=np.float64)
    if steps.shape != values.shape:
        raise ValueError(f"Each training episode must have a timestep: shapes are {values.shape} and {steps.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("Returns of training episodes must be finite numbers: found nan or inf.")
    values = values[steps > frozen_until]
    return float(values.mean()) if values.size else None
