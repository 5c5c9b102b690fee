"""The rules of a contest."""

import math
from dataclasses import dataclass

CONTROLS = ("historical", "concurrent")
LEAST_KNOWN = 5
"""Episodes of a champion without which nobody can tell whether another is better or worse."""
LEAST_TO_LEAD, LIKELY = 2, 0.9
"""Episodes of a challenger, and its chance of being better, from which on it leads."""
TRIAL_LENGTHS = (10, 20, 40)
"""Episodes that a trial may have, the more the champion's returns spread."""
PROVED_LEAD, POWER = 0.1, 3.0
"""In total losses, a lead that trials shall be long enough for; in standard errors of its mean, how large it is then."""
PROVABLE = 2.0
"""Standard errors: what leads by less after a whole trial is hardly ever proved to be better."""
SPENDING = 2
"""The larger, the more evenly the false-promotion rate is spent over tests: for a run with about as many of them."""


def share_of_test(i: int) -> float:
    """Share of the false-promotion rate that the i-th test of a run has, counted from 0; all of them sum to 1."""
    return SPENDING / ((i + SPENDING) * (i + SPENDING + 1))


def trial_length(spread: float) -> int:
    """
    How many episodes a trial is planned for.

    :param spread: Standard deviation of the champion's returns, in total losses
    :return: The fewest of :data:`TRIAL_LENGTHS` whose mean proves a lead of :data:`PROVED_LEAD`, or the most of them
    """
    needed = (POWER * spread / PROVED_LEAD) ** 2
    return next((length for length in TRIAL_LENGTHS if length >= needed), TRIAL_LENGTHS[-1])


@dataclass(frozen=True)
class Rules:
    """The rules of a contest; they are described at :class:`ChampionChallenger`."""

    risk_budget: float = 0.1
    random_return: float = 0.0
    worst_return: float = 0.0
    false_promotion_rate: float = 0.1
    controls: str = "historical"
    baseline_episodes: int = 10
    trial_share: float = 0.5
    futility: float = 0.1
    least_lead: float = 0.05
    max_trial_episodes: int | None = None
    exploration_share: float = 0.3
    canary_envs: int | None = None

    def __post_init__(self) -> None:
        shares = ("risk_budget", "futility", "least_lead", "exploration_share")
        for name in (*shares, "false_promotion_rate", "trial_share"):
            value, may_be_zero = getattr(self, name), name in shares
            if not (0 <= value < 1 and (value > 0 or may_be_zero)):
                raise ValueError(f"`{name}` must be {'at least' if may_be_zero else 'above'} 0 and below 1, found {value!r}.")
        if self.controls not in CONTROLS:
            raise ValueError(f"`controls` must be one of {', '.join(map(repr, CONTROLS))}, found {self.controls!r}.")
        if self.controls == "historical" and self.baseline_episodes < LEAST_KNOWN:
            raise ValueError(
                f"`controls='historical'` compares with at least {LEAST_KNOWN} episodes, found "
                f"`baseline_episodes={self.baseline_episodes}`: give more, or choose 'concurrent'."
            )
        for name in ("random_return", "worst_return"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, found {getattr(self, name)!r}.")
