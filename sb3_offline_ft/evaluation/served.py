"""
Served return: what everything that acted in the environment earned, against all interactions that this took.

The system does not know why somebody acts on it: a policy that is served, one that explores, and one that is evaluated because
a method wants to learn from it cost the same. So all their episodes count, one after the other, on one axis.

At each interaction, the served return is that of the episode which the interaction belongs to. A mean over a stretch of a run
is over its interactions: where the stretch is cut does not matter, and ten short episodes count no more than one that is as
long as they are together. Where long episodes have higher returns, such a mean is above that over episodes: means over
interactions are comparable with one another, and losses, which are sums over episodes, with ``J0``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import stats

from sb3_offline_ft.evaluation.finetuning_metrics import collapse_threshold
from sb3_offline_ft.evaluation.resampling import Array

SERVE, EXPLORE, TRIAL, EVALUATION = KINDS = ("serve", "explore", "trial", "evaluation")
"""Kinds of episodes: of the policy in service, with noise on purpose, of a policy on trial, of a method's own evaluations."""
AT = (5_000, 10_000, 30_000, 100_000)
WINDOW = 5_000
"""The return after so many interactions is the mean over those of this window before."""
IN_A_ROW = 10
"""A dip is the lowest mean of so many episodes in a row."""


@dataclass(frozen=True)
class ActedEpisodes:
    """
    The episodes that acted in the environment, in the order in which they ended, each as if nobody had interrupted it.

    :param returns: Undiscounted return of each, shape ``(episodes,)``
    :param lengths: Interactions of each, shape ``(episodes,)``
    :param kinds: The kind of each, such as those of :data:`KINDS`
    :param n_warmup: So many of them, the first ones, ended before the policy was set free
    :param interactions: Interactions of the whole run, those of an episode that did not end included
    :raises ValueError: A return is not finite, or a length is not positive
    """

    returns: Array
    lengths: npt.NDArray[np.int64]
    kinds: Sequence[str]
    n_warmup: int
    interactions: int

    def __post_init__(self) -> None:
        if not np.isfinite(self.returns).all():
            raise ValueError("Returns of episodes that acted must be finite numbers: found nan or inf.")
        if np.any(self.lengths < 1):
            raise ValueError(f"Episodes must end one after the other, found a length of {self.lengths.min()} interactions.")

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """Interactions at the end of each."""
        return np.cumsum(self.lengths)

    @property
    def warmup_end(self) -> int:
        """Interactions at the end of the last one that ended in the warm-up."""
        return int(self.lengths[: self.n_warmup].sum())

    def mean_return(self, start: float, end: float) -> float | None:
        """
        :param start: Interactions before the stretch
        :param end: Interactions at its end
        :return: Mean served return over its interactions; None if none of them belongs to an episode that ended
        """
        ends = self.ends
        inside = np.clip(ends, start, end) - np.clip(ends - self.lengths, start, end)
        return float(np.average(self.returns, weights=inside)) if inside.sum() > 0 else None


def acted_episodes(
    timesteps: npt.ArrayLike,
    returns: npt.ArrayLike,
    frozen_until: int,
    *,
    interactions: int | None = None,
    kinds: Sequence[str] | None = None,
    evaluation_timesteps: npt.ArrayLike = (),
    evaluation_returns: npt.ArrayLike = (),
    evaluation_lengths: npt.ArrayLike = (),
) -> ActedEpisodes:
    """
    Put a run's training episodes and its own evaluations onto one axis, on which both are interactions.

    :param timesteps: Interactions of the training alone at the end of each training episode, shape ``(episodes,)``
    :param returns: Undiscounted return of each training episode, shape ``(episodes,)``
    :param frozen_until: Interactions of the training with the frozen policy, -1 if the run was not pretrained
    :param interactions: Interactions of the training, by default up to the end of the last episode
    :param kinds: The kind of each training episode, by default ``"serve"``
    :param evaluation_timesteps: Interactions of the training before each evaluation, shape ``(evaluations,)``
    :param evaluation_returns: Undiscounted returns of its episodes, shape ``(evaluations, episodes)``
    :param evaluation_lengths: Their lengths, shape ``(evaluations, episodes)``
    :return: All episodes
    :raises ValueError: What belongs together has different lengths or shapes, timesteps do not increase, or a return is not
        finite
    """
    times, own_times = np.asarray(timesteps, np.int64), np.asarray(evaluation_timesteps, np.int64)
    trained, names = np.asarray(returns, np.float64), [SERVE] * times.size if kinds is None else list(kinds)
    own_returns, own_lengths = np.asarray(evaluation_returns, np.float64), np.asarray(evaluation_lengths, np.int64)
    if not times.size == trained.size == len(names):
        raise ValueError(
            "Each training episode needs a timestep, a return and a kind: found "
            f"{times.size}, {trained.size} and {len(names)}."
        )
    if own_returns.shape != own_lengths.shape or own_returns.shape[:1] != own_times.shape:
        raise ValueError(
            "Evaluations need a timestep each, and a return and a length for each episode: found shapes "
            f"{own_times.shape}, {own_returns.shape} and {own_lengths.shape}."
        )
    keys = np.concatenate([times, np.repeat(own_times, own_returns.size // max(1, own_times.size))])
    # Stable: an evaluation comes after the episode that ended with the same step
    order = np.argsort(keys, kind="stable")
    lengths = np.concatenate([np.diff(times, prepend=0), own_lengths.ravel()])
    names += [EVALUATION] * own_returns.size
    steps = interactions if interactions is not None else int(times[-1]) if times.size else 0
    return ActedEpisodes(
        returns=np.concatenate([trained, own_returns.ravel()])[order],
        lengths=lengths[order],
        kinds=[names[i] for i in order],
        n_warmup=int((keys <= frozen_until).sum()),
        interactions=steps + int(own_lengths.sum()),
    )


@dataclass(frozen=True)
class Losses:
    """
    What episodes after the warm-up lost against the baseline ``J0``, in the order in which they ended. None if ``J0`` or
    ``J_random`` is not known, or both are equal.

    :param episodes: How many there are
    :param shortfall: Sum of ``(J0 - return) / |J0 - J_random|`` over all of them: the unit is an episode in which all is lost
        that the baseline has over a random policy; negative if they earned more than the baseline
    :param largest_shortfall: The largest value that the sum had on the way, at least 0
    :param collapsed_episodes: How many returned at most ``J_random + 0.25 (J0 - J_random)``; None also if the baseline is no
        better than a random policy
    :param collapsed_share: The same as a share of them; None also if there are none
    :param longest_collapse: The most of these in a row
    :param dip_depth: ``(J0 - m) / |J0 - J_random|`` with the lowest mean ``m`` of ten in a row; None if there are fewer
    """

    episodes: int
    shortfall: float | None = None
    largest_shortfall: float | None = None
    collapsed_episodes: int | None = None
    collapsed_share: float | None = None
    longest_collapse: int | None = None
    dip_depth: float | None = None


@dataclass(frozen=True)
class ServedMetrics:
    """
    The served return of a run. What cannot be said is None.

    If nothing ended after the warm-up, as with a policy that is frozen all the time, losses are those of all episodes.

    :param initial_return: ``J0``: mean return of the episodes that ended in the warm-up, evaluations included
    :param initial_standard_error: Its standard error; None if there was only one episode. A shortfall is uncertain by it
        times the number of episodes
    :param warmup_return: Mean served return in the warm-up
    :param mean_return: Mean served return over all interactions, those of the warm-up included
    :param last_third_return: Mean served return over the last third of the interactions
    :param return_at: After 5,000, 10,000, 30,000 and 100,000 interactions: mean over the 5,000 before; None if the run was
        shorter
    :param losses: What all episodes lost
    :param losses_by_kind: What those of each kind lost, such as served ones, counted apart from trials
    """

    initial_return: float | None
    initial_standard_error: float | None
    warmup_return: float | None
    mean_return: float | None
    last_third_return: float | None
    return_at: Mapping[int, float | None]
    losses: Losses
    losses_by_kind: Mapping[str, Losses] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """
        :return: All numbers of the run by names that begin with ``served_``, those of single kinds left out
        """
        found = asdict(self)
        losses, _ = found.pop("losses"), found.pop("losses_by_kind")
        at = {f"return_at_{steps}": value for steps, value in found.pop("return_at").items()}
        return {f"served_{name}": value for name, value in (found | at | losses).items()}


def served_metrics(
    episodes: ActedEpisodes, random_return: float | None = None, interactions: int | None = None
) -> ServedMetrics:
    """
    Measure what a run served.

    :param episodes: All that acted
    :param random_return: Mean return of a random policy, None if it is not known
    :param interactions: Only so many of the interactions count, the first ones, except for ``return_at``: runs are compared at
        equal interactions. By default all
    :return: The metrics
    """
    until = episodes.interactions if interactions is None else min(interactions, episodes.interactions)
    is_counted = episodes.ends <= until
    is_warmup = np.arange(len(is_counted)) < episodes.n_warmup
    is_free = is_counted & ~is_warmup
    if not is_free.any():
        is_free = is_counted
    baseline = episodes.returns[is_counted & is_warmup]
    initial = float(baseline.mean()) if baseline.size else None
    kinds, returns = np.array(episodes.kinds, dtype=object), episodes.returns
    return ServedMetrics(
        initial_return=initial,
        initial_standard_error=float(stats.sem(baseline)) if baseline.size > 1 else None,
        warmup_return=episodes.mean_return(0, min(episodes.warmup_end, until)),
        mean_return=episodes.mean_return(0, until),
        last_third_return=episodes.mean_return(2 / 3 * until, until),
        return_at={
            steps: episodes.mean_return(steps - WINDOW, steps) if steps <= episodes.interactions else None for steps in AT
        },
        losses=_losses(returns[is_free], initial, random_return),
        losses_by_kind={
            kind: _losses(returns[is_free & (kinds == kind)], initial, random_return) for kind in dict.fromkeys(episodes.kinds)
        },
    )


def shortfall(returns: npt.ArrayLike, initial_return: float, random_return: float) -> Array:
    """
    What episodes had earned less than the baseline by the end of each of them.

    :param returns: Their undiscounted returns, shape ``(episodes,)``
    :param initial_return: ``J0``
    :param random_return: ``J_random``, another number
    :return: Cumulative sum of ``(J0 - return) / |J0 - J_random|``, shape ``(episodes,)``
    """
    return np.cumsum((initial_return - np.asarray(returns, np.float64)) / abs(initial_return - random_return))


def _losses(returns: Array, initial: float | None, random: float | None) -> Losses:
    n = returns.size
    if initial is None or random is None or initial == random:
        return Losses(n)
    path = shortfall(returns, initial, random)
    collapsed = returns <= collapse_threshold(initial, random) if initial > random else None
    windows = np.lib.stride_tricks.sliding_window_view(returns, IN_A_ROW) if n >= IN_A_ROW else None
    return Losses(
        episodes=n,
        shortfall=float(path[-1]) if n else 0.0,
        largest_shortfall=float(max(0.0, path.max(initial=0.0))),
        collapsed_episodes=None if collapsed is None else int(collapsed.sum()),
        collapsed_share=None if collapsed is None or not n else float(collapsed.mean()),
        longest_collapse=None if collapsed is None else _longest(collapsed),
        dip_depth=None if windows is None else float((initial - windows.mean(axis=1).min()) / abs(initial - random)),
    )


def _longest(flags: npt.NDArray[np.bool_]) -> int:
    """Most in a row that are true."""
    gaps = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(gaps).max()) - 1
