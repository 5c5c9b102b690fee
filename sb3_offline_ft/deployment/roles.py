"""Who takes part in a contest, what an episode is for, and what is decided of them."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from sb3_offline_ft.deployment.promotion import Bet, PromotionTest, TrialEpisode
from sb3_offline_ft.deployment.rules import TRIAL_LENGTHS

RIVAL_AFTER = 2
"""Episodes of a challenger after which a newer policy of the learner may have one, and again whenever they have doubled."""


class Kind(Enum):
    """What an episode is for."""

    SERVE = "serve"
    """The champion acts as well as it can."""
    EXPLORE = "explore"
    """The champion acts with the learner's exploration, to gather data."""
    TRIAL = "trial"
    """The challenger, or its rival, acts as well as it can."""


@dataclass
class Contender:
    """
    A policy that acts, and what it returned.

    :param name: What it is called in events: the time at which the learner had this policy
    :param policy: The policy, whatever it is
    :param returns: Of its whole episodes, in order
    """

    name: int
    policy: Any = None
    returns: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean return; not a number without episodes."""
        return sum(self.returns) / len(self.returns) if self.returns else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean; not a number with fewer than two episodes."""
        n = len(self.returns)
        return float(np.std(self.returns, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


@dataclass
class Episode:
    """An episode, or a segment of one, that is running."""

    kind: Kind = Kind.SERVE
    bet: Bet | TrialEpisode | None = None
    """The test's, if there is one."""
    counts: bool = True
    """Whether one policy acts in it from beginning to end."""
    is_handed_back: bool = False
    """Whether the champion acts in what is left of it."""
    is_rival: bool = False
    """Whether it is the trial of the rival, not of the challenger."""
    tried: int | None = None
    """Name of whom it tries, also after it has been given up."""

    @property
    def actor(self) -> Kind:
        """For what somebody acts now."""
        return Kind.SERVE if self.is_handed_back else self.kind

    @property
    def role(self) -> str:
        """The role of the contender who acts now."""
        if self.actor is not Kind.TRIAL:
            return "champion"
        return "rival" if self.is_rival else "challenger"


@dataclass
class Challenge:
    """
    A challenger's trial: a first episode that can only end it, then a test.

    :param challenger: Who challenges
    :param test: None until the challenger has survived its first episode, which costs nothing of the false-promotion rate
    :param has_overtaken: Whether it took the place of another one, which it was better than in its first episode
    """

    challenger: Contender
    test: PromotionTest | None = None
    has_overtaken: bool = False
    n_rival: int = RIVAL_AFTER
    """Episodes of the challenger at which the next rival may have one."""
    max_episodes: int = TRIAL_LENGTHS[0]
    """Episodes of the challenger after which it is given up; planned when its test begins."""


@dataclass(frozen=True)
class Verdict:
    """
    A decision.

    :param kind: What happens: a challenger becomes champion, a challenger is given up, or the champion is put down
    :param reason: Why, in words
    :param contender: Who was promoted, rejected or demoted
    :param champion: The champion before
    :param is_failure: Whether a challenger was given up that no newer policy has overtaken
    """

    kind: Literal["promotion", "rejection", "demotion"]
    reason: str
    contender: Contender
    champion: Contender
    is_failure: bool = False
