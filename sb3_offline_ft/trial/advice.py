"""Which recipe of finetuning for which data."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_ind_from_stats

Regime = Literal["superior", "comparable", "inferior"]

MARGIN = 0.05
"""Of the distance from a random policy to the better of the two: what is less is no difference (as in the paper)."""
LEVEL = 0.05

SOURCE = (
    "This rule is that of The Three Regimes of Offline-to-Online RL (arXiv 2510.01460): it was right in 45 of the 63 cases "
    "that were tried there, and the opposite was right in 3. Our own runs are few: see docs/findings.md."
)
RECIPES = {
    "superior": (
        "The policy is better than the data, so the policy is what to keep: warm up with it before the first update, and keep "
        "what is learned near to it, as TD3C does, or TD3BC with its behavior cloning kept on. In our runs on Hopper, plain "
        "TD3 fell by more than half of the way to a random policy in each of nine; TD3C kept eight of nine."
    ),
    "inferior": (
        "The data are better than the policy, so the data are what to keep: let half of each batch be offline data, and do "
        "not hold on to the policy; resetting the networks helped as well in 13 of 23 cases there. In our runs on Hopper with "
        "medium-replay data, plain TD3 learned far more than what kept the policy, and went on falling: let the pretrained "
        "policy act meanwhile (ChampionChallenger)."
    ),
    "comparable": (
        "Policy and data are about as good, so either may be kept. In our runs on Hopper with half of each batch offline, "
        "TD3BC with its behavior cloning kept on and TD3C lost least."
    ),
}


@dataclass(frozen=True)
class Advice:
    """
    Which recipe of finetuning is likely to work.

    :param regime: Whether the pretrained policy is superior, comparable or inferior to the data
    :param policy: Mean return of the policy
    :param data: Mean return of the data
    """

    regime: Regime
    policy: float
    data: float

    @property
    def text(self) -> str:
        """In words, with where it comes from."""
        means = f"The policy returns {self.policy:.4g} on average, the data {self.data:.4g}."
        return f"{means} {RECIPES[self.regime]} {SOURCE}"


def recipe_for(data: npt.ArrayLike, policy: npt.ArrayLike, random_return: float | None = None) -> Advice:
    """
    Advise on finetuning, by whether the pretrained policy is better than the data that it was trained on (Li, Ni, Sun & Bacon
    2025, The Three Regimes of Offline-to-Online Reinforcement Learning, arXiv 2510.01460): Welch's t-tests with a margin.

    :param data: Returns of the episodes of the data, at least two
    :param policy: Returns of the pretrained policy, at least two
    :param random_return: Mean return of a random policy, for the margin; without it, there is none
    :return: The advice
    :raises ValueError: There are too few returns
    """
    samples = [np.asarray(one, dtype=float) for one in (policy, data)]
    for name, sample in zip(("policy", "data"), samples, strict=True):
        if len(sample) < 2:
            raise ValueError(f"Advice on the recipe needs at least two returns of the {name}, found {len(sample)}.")
    means, spreads = [float(one.mean()) for one in samples], [max(float(one.std(ddof=1)), 1e-12) for one in samples]
    margin = 0.0 if random_return is None else MARGIN * abs(max(means) - random_return)

    def is_above(first: int, second: int) -> bool:
        """Whether one is better by more than the margin."""
        (m, s, n), (m2, s2, n2) = [(means[i], spreads[i], len(samples[i])) for i in (first, second)]
        test = ttest_ind_from_stats(m - margin, s, n, m2, s2, n2, equal_var=False, alternative="greater")
        return bool(test.pvalue < LEVEL)

    regime: Regime = "superior" if is_above(0, 1) else "inferior" if is_above(1, 0) else "comparable"
    return Advice(regime, *means)
