"""What the events of a contest tell: who acted, who was champion, what it cost."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from sb3_offline_ft.collapse.events import Event, read_events
from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.deployment.roles import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENTS_FILE, FIGURE = "deployment_events.jsonl", "deployment.png"
EVENTS = "the events of a ChampionChallenger"
DECISIONS = ("promotion", "rejection", "demotion")
COLLAPSED = 0.25
"""Share of the distance from a random policy to the baseline at which a return is a collapse."""


def mean_interval(returns: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval (Student's t) for the mean of returns; infinitely wide for fewer than two."""
    if len(returns) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(returns) - 1) * stats.sem(returns))
    mean = float(np.mean(returns))
    return mean - half, mean + half


def level_words(returns: Sequence[float], what: str = "episodes") -> str:
    """The mean of returns with its uncertainty, such as ``"1248.0 (95 % interval 1101.2 to 1394.8, 10 episodes)"``."""
    if not returns:
        return f"not known (no {what})"
    low, high = mean_interval(returns)
    interval = f"95 % interval {low:.1f} to {high:.1f}, " if len(returns) > 2 else ""
    return f"{np.mean(returns):.1f} ({interval}{counted(len(returns), what)})"


def counted(n: int, what: str) -> str:
    """A number with its plural, such as ``"1 promotion"``."""
    return f"{n:,} {what.removesuffix('s') if n == 1 else what}"


def cost_words(lost: float, allowance: float) -> str:
    """What episodes have cost, in total losses, and what they might."""
    cost = f"lost {lost:.2f}" if lost > 0 else f"gained {-lost:.2f}" if lost < 0 else "lost nothing"
    return f"{cost} against the baseline; the budget allowed a loss of {allowance:.2f} (1: all is lost in one episode)"


def lived(events: Sequence[Event]) -> list[Event]:
    """The events without those that a run left behind which went on from an earlier checkpoint."""
    kept: list[Event] = []
    for event in events:
        while event["event"] == "start" and kept and kept[-1]["timestep"] > event["timestep"]:
            kept.pop()
        kept.append(event)
    return kept


@dataclass
class Champion:
    """
    A policy that was champion.

    :param name: The environment step at which the learner had this policy
    :param tried: Returns of its trial; none for the first champion
    :param served: Returns of the whole episodes that it served
    """

    name: int
    tried: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    @property
    def returns(self) -> list[float]:
        """Those that tell what it is worth: since it was chosen for those of its trial, they promise too much."""
        return self.served if len(self.served) > 1 else self.tried + self.served


class History:
    """
    The history of a contest.

    :param events: Its events, oldest first
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = lived(events)
        self.counts = Counter(event["event"] for event in self.events)
        self.reigns: list[tuple[int, Champion]] = []
        """When champions began to serve; a predecessor may come back."""
        champions: dict[int, Champion] = {}
        for event in self.events:
            kind = event["event"]
            if (kind == "episode" and not self.reigns) or kind in ("promotion", "demotion"):
                name = event["champion"]
                tried = event["returns"] if kind == "promotion" else []
                champion = champions.setdefault(name, Champion(name, tried))
                self.reigns.append((event["timestep"] if self.reigns else self.events[0]["timestep"], champion))
            if kind == "episode" and event["kind"] == Kind.SERVE.value and event["counts"]:
                champions.setdefault(event["champion"], Champion(event["champion"])).served.append(event["return"])

    @classmethod
    def read(cls, folder: Path) -> "History | None":
        """
        The history of the contest in a run's folder; None if there was none.

        :raises ValueError: The file of events is damaged
        """
        path = folder / EVENTS_FILE
        if not path.is_file():
            return None
        with naming_damage(path, EVENTS):
            history = cls(read_events(path))
            # What lacks a value is damaged, though each line is JSON
            history.in_words()
            return history

    @property
    def settings(self) -> dict[str, Any]:
        """Those with which the run was started last."""
        starts = [event for event in self.events if event["event"] == "start"]
        return starts[-1]["settings"] | {"algorithm": starts[-1]["algorithm"]} if starts else {}

    @property
    def baseline(self) -> Event | None:
        """The event that tells the baseline."""
        return next((event for event in self.events if event["event"] == "baseline"), None)

    @property
    def account(self) -> list[Event]:
        """The episodes since there is a budget."""
        return [event for event in self.episodes() if "balance" in event]

    def episodes(self, *kinds: Kind) -> list[Event]:
        """The episodes of these kinds, or all."""
        names = {kind.value for kind in kinds or Kind}
        return [event for event in self.events if event["event"] == "episode" and event["kind"] in names]

    @property
    def unit(self) -> str:
        """What is compared."""
        return "segments" if self.settings.get("segment_steps") else "episodes"

    def draw(self, path: Path | None = None) -> "Figure":
        """The picture, which is also written to ``path``, as PNG."""
        from sb3_offline_ft.deployment.figure import draw_history

        return draw_history(self, path)

    def in_words(self) -> dict[str, str]:
        """What was served, at what risk, and what came out: a sentence for each, by these names."""
        return {"served": self._served_words(), "at risk": self._risk_words(), "outcome": self._outcome_words()}

    def _served_words(self) -> str:
        served, everything = column(self.episodes(Kind.SERVE), "return"), self.episodes()
        words = f"{len(served):,} of {counted(len(everything), self.unit)}"
        if len(served):
            words += f": mean return {served.mean():.1f}, in the last third {served[-(-len(served) // 3) :].mean():.1f}"
        if self.baseline is None:
            return f"{words}; there is no baseline yet"
        low, high, n = (self.baseline[name] for name in ("low", "high", "n"))
        return (
            f"{words}; baseline {self.baseline['mean']:.1f} (95 % interval {low:.1f} to {high:.1f}, {counted(n, self.unit)})"
        )

    def _risk_words(self) -> str:
        if not self.account:
            return "nothing was tried: there is no budget before the baseline is known"
        trials, explorations = len(self.episodes(Kind.TRIAL)), len(self.episodes(Kind.EXPLORE))
        last = self.account[-1]
        tried = f"{counted(trials, 'trials')} and {counted(explorations, 'explorations')}"
        words = f"{tried} {cost_words(last['lost'], last['allowance'])}"
        if n := self.counts["below_worst"]:
            words += f"; {counted(n, self.unit)} returned less than `worst_return`, on which the promise rests"
        return words

    def _outcome_words(self) -> str:
        counts = ", ".join(counted(self.counts[name], f"{name}s") for name in DECISIONS)
        if not self.reigns:
            return counts
        champion = self.reigns[-1][1]
        return f"{counts}; the champion is the policy of step {champion.name:,}: {level_words(champion.returns, self.unit)}"


def column(episodes: Sequence[Event], name: str) -> npt.NDArray[np.float64]:
    """A value of all these episodes."""
    return np.array([event[name] for event in episodes], dtype=np.float64)
