"""The trace of a run: what its weights were at some updates, and what its episodes returned, to compare runs by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_offline_ft.collapse.events import Event, EventLog, read_events
from sb3_offline_ft.common.live import weights_digest
from sb3_offline_ft.deployment.history import lived

TRACE = "trace.jsonl"
WEIGHTS, EPISODE = "weights", "episode"
EVERY = 1_000
"""Updates between two digests; less at the beginning, where runs that differ begin to."""

_OF_EPISODES: dict[str, type] = {"timestep": int, "env": int, "return": float, "length": int}

Position = tuple[int, int]
"""Environment steps and updates."""


def _mark(updates: int) -> int:
    """The number of updates, rounded down to its first digit or to :data:`EVERY`: a digest is due when it changes."""
    unit = min(EVERY, int(10 ** (len(str(updates)) - 1)))
    return updates - updates % unit


class RunTrace(BaseCallback):
    """
    Writes a run's trace: SHA-256 of all weights after updates 1 to 10, 20, ..., 100, 200, ..., 1,000, 2,000 and so on, or as
    soon after them as ``train`` returns, and the return of each training episode.

    :param folder: The run's folder, whose trace it goes on with if there is one
    :param when_begun: Called when the learner has loaded its data, and again when it begins to act
    """

    def __init__(self, folder: Path, when_begun: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._when_begun = when_begun
        self._log = EventLog(folder / TRACE)
        self._marked = -1

    def begin(self, model: BaseAlgorithm) -> None:
        """Note the weights that a learner has before its first update, or goes on with."""
        self.model = model
        self._log.append({"event": "start", "timestep": model.num_timesteps})
        self._note_weights(model.num_timesteps)

    def state_dict(self) -> dict[str, Any]:
        """How far the trace is."""
        return {"log": self._log.state_dict(), "marked": self._marked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: what came later is forgotten, also that the learner began anew."""
        self._log.load_state_dict(state["log"])
        self._marked = state["marked"]

    def _init_callback(self) -> None:
        self._when_begun()

    def _on_training_start(self) -> None:
        self._when_begun()

    def after_offline_updates(self) -> None:
        """Called by our learners while ``learn`` pretrains."""
        # Gradient steps are counted as steps meanwhile
        self._note_weights_if_due(0)

    def _on_step(self) -> bool:
        self._note_weights_if_due(self.num_timesteps)
        for number, info in enumerate(self.locals.get("infos", ())):
            if "episode" in info:
                facts = {"env": number, "return": info["episode"]["r"], "length": info["episode"]["l"]}
                self._log.append({"event": EPISODE, "timestep": self.num_timesteps, **facts})
        return True

    def _on_training_end(self) -> None:
        # Not after Ctrl-C, which may come in the midst of an update
        self.note_end()

    def note_end(self) -> None:
        """Note the weights that the learner has at the end."""
        self._note_weights(self.model.num_timesteps)

    def _note_weights_if_due(self, timestep: int) -> None:
        if _mark(_updates(self.model)) != self._marked:
            self._note_weights(timestep)

    def _note_weights(self, timestep: int) -> None:
        updates = _updates(self.model)
        self._marked = _mark(updates)
        facts = {"updates": updates, "sha256": weights_digest(self.model)}
        self._log.append({"event": WEIGHTS, "timestep": timestep, **facts})


def _updates(model: BaseAlgorithm) -> int:
    return int(getattr(model, "_n_updates", 0))


@dataclass(frozen=True)
class Trace:
    """
    What a run's trace says.

    :param weights: SHA-256 of the weights by position, in the order of the run
    :param episodes: Its training episodes
    """

    weights: dict[Position, str]
    episodes: list[Event]

    @classmethod
    def read(cls, folder: Path) -> "Trace":
        """
        :param folder: The run's folder
        :return: Its trace, as far as the run has come; empty if it has not begun
        :raises ValueError: A line is damaged
        """
        path = folder / TRACE
        events = read_events(path) if path.is_file() else []
        try:
            events = lived(events)
            weights = {
                (int(event["timestep"]), int(event["updates"])): str(event["sha256"])
                for event in events
                if event["event"] == WEIGHTS
            }
            episodes = [
                {name: kind(event[name]) for name, kind in _OF_EPISODES.items()}
                for event in events
                if event["event"] == EPISODE
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is damaged or not the trace of a run ({type(error).__name__}: {error}).") from None
        return cls(weights, episodes)

    @property
    def end(self) -> Position:
        """Where it ends."""
        return next(reversed(self.weights), (0, 0))


@dataclass(frozen=True)
class Difference:
    """
    Where two runs part.

    :param updates: Updates after which their weights are known to differ, None if they never are
    :param same_until: Updates after which they were still the same, None if they never were
    :param episode: Number of the first training episode that differs, from 1; None for none
    :param first: This episode in the first run, None if it has none
    :param second: This episode in the second run, None if it has none
    :param ends: Positions at which the runs end, if they end at different ones
    """

    updates: int | None
    same_until: int | None
    episode: int | None
    first: Event | None
    second: Event | None
    ends: tuple[Position, Position] | None


def compare(first: Trace, second: Trace, whole: bool = True) -> Difference | None:
    """
    :param first: A run
    :param second: The run that is to be the same
    :param whole: Whether they must end at the same position; else the second may go on where the first one was stopped, but
        must have come as far
    :return: Where they part, None if they are the same
    """
    common = [position for position in first.weights if position in second.weights]
    parted = next((n for n, position in enumerate(common) if first.weights[position] != second.weights[position]), None)
    same = common if parted is None else common[:parted]
    ends = (first.end, second.end) if (first.end != second.end if whole else first.end > second.end) else None
    episode = _first_different(first.episodes, second.episodes, whole)
    if parted is None and ends is None and episode is None and common:
        return None
    return Difference(
        updates=None if parted is None else common[parted][1],
        same_until=same[-1][1] if same else None,
        episode=None if episode is None else episode + 1,
        first=_at(first.episodes, episode),
        second=_at(second.episodes, episode),
        ends=ends,
    )


def _first_different(first: Sequence[Event], second: Sequence[Event], whole: bool) -> int | None:
    length = max(len(first), len(second)) if whole else min(len(first), len(second))
    # An episode that is not there is another one; NaN, which no number equals, is the same as NaN
    return next((n for n in range(length) if repr(_at(first, n)) != repr(_at(second, n))), None)


def _at(episodes: Sequence[Event], number: int | None) -> Any:
    return episodes[number] if number is not None and number < len(episodes) else None
