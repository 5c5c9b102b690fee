"""The log of an episode, a CSV or Parquet file: its metrics, and the limits that it crossed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.suggestions import first_of
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.tables import Signals, read_signals
from sb3_offline_ft.trial.aborting import LimitWatch
from sb3_offline_ft.trial.actuators import ActionLog, Actuators
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm
from sb3_offline_ft.trial.measuring import REWARD, aggregate
from sb3_offline_ft.trial.plan import ActionBounds, TrialPlan

COLUMN = "column."
MOST_NAMED = 10
NAMED_BY = "the key `{}` of the column map, the file that `columns` of the plan names"


@dataclass(frozen=True)
class LoggedActions:
    """
    The actions of an episode.

    :param actions: Of each step
    :param actuators: What took them
    """

    actions: npt.NDArray[np.float32]
    actuators: Actuators

    def summary(self, n: int) -> dict[str, Any] | None:
        """What the first ``n`` of them did: :meth:`ActionLog.summary`."""
        log = ActionLog(self.actuators)
        for action in self.actions[:n]:
            log.add(action)
        return log.summary()


@dataclass(frozen=True)
class LoggedEpisode:
    """
    What a log says of an episode.

    :param metrics: Values of those metrics that come from rewards or columns
    :param steps: Number of its steps
    :param regime: The operating regime that most of its steps were in, None if the plan names no column of it
    :param violations: How limits were crossed
    :param crossed: The first step that crossed a limit, and what it did, in words; None if all were kept
    :param actions: The actions, None if the plan does not say what their bounds are
    """

    metrics: dict[str, float | None]
    steps: int
    regime: str | None
    violations: dict[str, dict[str, Any]]
    crossed: tuple[int, str] | None
    actions: LoggedActions | None

    def details(self, arm: Arm, n_own: int | None) -> dict[str, Any]:
        """
        What the journal says of the episode besides its metrics.

        :param arm: Who was to act
        :param n_own: In how many steps it did, until the baseline took over; None if that is not known
        """
        known: dict[str, Any] = {"steps": self.steps, "violations": self.violations}
        if n_own is not None:
            n_candidate = n_own if arm == CANDIDATE else 0
            known["acted"] = {BASELINE: self.steps - n_candidate, CANDIDATE: n_candidate}
            known["travel"] = None if self.actions is None else self.actions.summary(n_own)
        return known


def read_log(path: Path, plan: TrialPlan, episode: int, known: frozenset[str] = frozenset()) -> LoggedEpisode:
    """
    :param path: The file, whose rows are steps
    :param plan: The plan
    :param episode: Number of the episode, by which its rows are found if there is a column of episodes with more than one
    :param known: Metrics that are known already, and not looked for
    :return: What it says
    :raises OSError: The file cannot be opened
    :raises ValueError: It has no such columns or rows, or a value is no number
    """
    wanted = [metric for metric in plan.metrics if metric.source is not None and metric.name not in known]
    sources = dict.fromkeys([*(str(one.source) for one in wanted), *(one.source for one in plan.abort.limits)])
    needed = {one.source for one in wanted if one.name in plan.needed_metrics} | {one.source for one in plan.abort.limits}
    columns = None if plan.columns is None else ColumnMap.from_file(Path(plan.columns))
    signals = read_signals(
        path,
        columns,
        needs_reward=REWARD in needed,
        numbers=[source.removeprefix(COLUMN) for source in sources if source != REWARD],
        needs_actions=plan.action_bounds is not None,
        named_by=NAMED_BY,
        texts=[] if plan.regime is None else [plan.regime.removeprefix(COLUMN)],
    )
    rows = _rows(signals, episode, path)
    washed_in = rows[plan.blocks.wash_in_steps :]
    if not len(washed_in):
        raise ValueError(
            f"Table {str(path)!r}: episode {episode} has {len(rows)} steps, all of which belong to the wash-in of "
            f"{plan.blocks.wash_in_steps} steps."
        )
    values = {COLUMN + name: column for name, column in signals.numbers.items()}
    if signals.rewards is not None:
        values[REWARD] = signals.rewards
    measured = {one: values[str(one.source)][washed_in] for one in wanted if one.source in values}
    metrics = {one.name: aggregate(one.aggregate, of_steps.tolist()) for one, of_steps in measured.items()}
    regime = None
    if plan.regime is not None:
        names, counts = np.unique(next(iter(signals.texts.values()))[rows], return_counts=True)
        regime = str(names[counts.argmax()])
    watch, crossed = LimitWatch(plan.abort.limits), None
    for step, row in enumerate(rows):
        problem = watch.take({limit.source: float(values[limit.source][row]) for limit in plan.abort.limits})
        crossed = crossed or (None if problem is None else (step, problem))
    log = None
    if plan.action_bounds is not None and signals.actions is not None:
        log = LoggedActions(signals.actions[rows], _actuators(plan.action_bounds, signals.actions.shape[1], path))
    return LoggedEpisode(metrics, len(rows), regime, watch.summary(), crossed, log)


def _actuators(bounds: ActionBounds, n: int, path: Path) -> Actuators:
    if (n_bounds := max(len(bounds.low), len(bounds.high))) not in (1, n):
        raise ValueError(
            f"Table {str(path)!r} has {n} actions, and `action_bounds` of the plan {n_bounds}: give one for all or for each."
        )
    low, high = (np.broadcast_to(np.array(side, np.float32), n) for side in (bounds.low, bounds.high))
    return Actuators(spaces.Box(low, high))


def _rows(signals: Signals, episode: int, path: Path) -> npt.NDArray[np.int64]:
    """Indices of the rows of an episode."""
    if signals.episodes is None or len(set(signals.episodes)) == 1:
        return np.arange(signals.n_rows)
    found = np.flatnonzero(signals.episodes == str(episode))
    if not len(found):
        there = first_of(sorted(set(signals.episodes)), MOST_NAMED)
        raise ValueError(f"Table {str(path)!r}: none of its rows is of episode {episode}; it has the episodes {there}.")
    return found
