"""What is done with the transitions that were gathered on the way to a collapse, and with broken ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.replay import ReplayMark, replace_last_if_not_finite, thin_out_since
from sb3_offline_ft.collapse.reporting import Reporter

if TYPE_CHECKING:
    from sb3_offline_ft.collapse.good_states import GoodState


@dataclass(frozen=True)
class Mark:
    """A moment of the run: where the replay buffer's ring was, and how many rows had been stored in all."""

    ring: ReplayMark
    rows: int


class PoisonedData:
    """
    Counts the rows of a replay buffer, gives those since a restored state the weight that they shall have, and replaces broken
    ones. SB3 stores a step after its callbacks, so that this waits for the next one.
    """

    def __init__(self, model: OffPolicyAlgorithm, weight: float, report: Reporter) -> None:
        assert model.replay_buffer is not None
        self._model, self._weight, self._report = model, weight, report
        self._generator = np.random.default_rng(0)
        self._rows = self._unstored = 0
        self._removal: tuple[GoodState, int] | None = None
        self._is_broken = False

    def go_on(self) -> None:
        """Begin another call of ``learn``: SB3 does not store the step at which a callback has ended the run."""
        self._rows -= self._unstored
        self._unstored = 0
        self._is_broken = False

    def begin_step(self, states: Iterable["GoodState"]) -> None:
        self.end_step(states)
        self._rows += 1
        self._unstored = 1

    def end_step(self, states: Iterable["GoodState"]) -> None:
        """The last step has been stored; do what waited for it. Marks of states are set anew where rows have moved."""
        self._unstored = 0
        buffer = self._model.replay_buffer
        assert buffer is not None
        if self._is_broken:
            self._is_broken = False
            replace_last_if_not_finite(buffer)
        if self._removal is None:
            return
        (good, number), self._removal = self._removal, None
        if self._weight == 1:
            return
        added = self._rows - good.mark.rows
        try:
            removed = thin_out_since(buffer, good.mark.ring, added, self._weight, self._generator)
        except ValueError as error:
            self._report.event("warning", message=f"The data since step {good.timestep} is kept: {error}")
            return
        if not buffer.full:
            self._rows -= removed // buffer.n_envs
        since = good.mark.rows
        for state in states:
            if state is good or state.mark.rows > since:
                state.mark = self.stored_so_far()
        self._report.event("removal", number=number, removed=removed)

    def stored_so_far(self) -> Mark:
        """Mark what is stored now."""
        return self._mark(ahead=0)

    def gathered_so_far(self) -> Mark:
        """Mark what is stored now and the present step, if that is still to be stored."""
        return self._mark(ahead=self._unstored)

    def _mark(self, ahead: int) -> Mark:
        buffer = self._model.replay_buffer
        assert buffer is not None
        return Mark(ReplayMark.here(buffer, ahead), self._rows - self._unstored + ahead)

    def remove_since(self, good: "GoodState", number: int) -> None:
        """Give what was gathered since a good state less weight, as part of the rollback of this number."""
        self._removal = good, number

    def repair_present_step(self) -> None:
        """The present step holds a non-finite number: replace it."""
        self._is_broken = True
