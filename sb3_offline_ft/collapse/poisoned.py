"""What is done with the transitions that were gathered on the way to a collapse, and with broken ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her import HerReplayBuffer

from sb3_offline_ft.collapse.reporting import Reporter
from sb3_offline_ft.common.warning import warn

if TYPE_CHECKING:
    from sb3_offline_ft.collapse.good_states import GoodState

ROW_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
WEIGHTS = {"keep": 1.0, "drop": 0.0}


@dataclass(frozen=True)
class ReplayMark:
    """A place in a replay buffer's ring: the row that is written next, and whether every row has been written by then."""

    pos: int
    full: bool

    @classmethod
    def here(cls, buffer: ReplayBuffer, ahead: int = 0) -> "ReplayMark":
        """The end of what is in the buffer now, and of as many rows more as are ``ahead`` and still to be stored."""
        if ahead < 0:
            raise ValueError(f"`ahead` must be at least 0, found {ahead}.")
        end = buffer.pos + ahead
        return cls(end % buffer.buffer_size, buffer.full or end >= buffer.buffer_size)


def weight_of_poisoned(data: str | float) -> float:
    """The weight, in [0, 1], that a word or number stands for; ``ValueError`` if it stands for none."""
    weight = WEIGHTS.get(data) if isinstance(data, str) else data
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise ValueError(f"`poisoned_data` must be 'keep', 'drop' or a weight in [0, 1], found {data!r}.")
    return float(weight)


def check_can_thin_out(buffer: ReplayBuffer) -> None:
    """``ValueError`` if single rows cannot be taken out of a replay buffer, since its rows depend on one another."""
    problem = None
    if isinstance(buffer, NStepReplayBuffer) or getattr(buffer, "needs_following_rows", False):
        problem = "its n-step returns, next actions or Monte-Carlo returns need the rows that follow"
    elif isinstance(buffer, HerReplayBuffer):
        problem = "it relabels goals with the other rows of an episode"
    elif buffer.optimize_memory_usage:
        problem = "with `optimize_memory_usage=True` a row's next observation is in the next row"
    elif type(buffer).add not in (ReplayBuffer.add, DictReplayBuffer.add):
        arrays = {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
        extra = {name for name, value in arrays.items() if value.shape[:2] == (buffer.buffer_size, buffer.n_envs)}
        unknown = ", ".join(sorted(extra - set(ROW_ARRAYS)))
        problem = f"it has an `add` of its own and keeps more than SB3's arrays ({unknown})" if unknown else None
    if problem is not None:
        raise ValueError(
            f"Rows cannot be taken out of a {type(buffer).__name__}, since {problem}: use weight 1, which keeps all "
            "(`poisoned_data='keep'` of a CollapseGuard)."
        )


def thin_out_since(buffer: ReplayBuffer, mark: ReplayMark, added: int, weight: float, generator: np.random.Generator) -> int:
    """
    Give the rows since a mark less weight than the others have in uniform sampling.

    Each row (a step of all environments) is kept with probability ``weight``. In a buffer that is not full the kept rows
    move together behind the mark, and ``pos`` goes back. In a full buffer the rows that those since the mark have overwritten
    are gone; there the removed rows become copies of rows that are left, drawn uniformly, and ``pos`` stays.
    Marks set since then lose their meaning. Rows that the next one does not follow any more are marked as cut, as by
    ``cut_episodes`` of our buffers: ``timeouts`` is 1 where ``dones`` is 0, which changes no batch of single steps.

    :param added: Number of rows stored behind the mark, that is without those that were ``ahead``
    :return: Number of transitions (rows times environments) removed
    :raises ValueError: ``weight`` is out of range, the buffer's rows depend on one another, or the buffer is not where it
        would be after ``added`` rows; nothing is changed then
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"`weight` must be in [0, 1], found {weight!r}.")
    if weight == 1:
        return 0
    check_can_thin_out(buffer)
    if added <= 0:
        return 0
    capacity = buffer.buffer_size
    expected = ((mark.pos + added) % capacity, mark.full or mark.pos + added >= capacity)
    if (buffer.pos, buffer.full) != expected:
        raise ValueError(
            f"{added} rows after the mark the buffer should be at row {expected[0]} (full: {expected[1]}), found row "
            f"{buffer.pos} (full: {buffer.full}): count the steps stored behind the mark, each once for all environments, "
            "and set a new mark when the buffer is emptied, loaded or thinned out."
        )
    if added >= capacity:
        warn(
            f"All {capacity} rows of the replay buffer were gathered since the mark ({added} rows): no older ones are left to "
            "learn from, and all are kept. Use a larger `buffer_size`, or react earlier."
        )
        return 0
    rows = (mark.pos + np.arange(added)) % capacity
    keep = generator.random(added) < weight
    if buffer.full:
        left = np.ones(capacity, dtype=bool)
        left[rows[~keep]] = False
        pool = np.flatnonzero(left)
        _copy_rows(buffer, pool[generator.integers(len(pool), size=added - keep.sum())], rows[~keep])
        _cut_around(buffer, rows[~keep])
    else:
        start, n_kept = int(rows[0]), int(keep.sum())
        if start + n_kept == 0 and not getattr(buffer, "offline_size", 0):
            warn(
                f"The replay buffer holds nothing but the {added} rows gathered since the mark, and without them it would be "
                "empty: they are kept."
            )
            return 0
        _copy_rows(buffer, rows[keep], rows[:n_kept])
        buffer.pos = start + n_kept
        # What was where before, from the row before the mark to the one that is written next
        came_from = np.concatenate([[-1], np.flatnonzero(keep), [added]])
        cut = start - 1 + np.flatnonzero(np.diff(came_from) > 1)
        _cut_after(buffer, cut[cut >= 0])
    return int(added - keep.sum()) * buffer.n_envs


def replace_last_if_not_finite(buffer: ReplayBuffer) -> bool:
    """
    If the last stored row holds a non-finite number, which would spoil every batch it is drawn into, make it a copy of the
    last finite row before; if there is none, and where rows depend on one another, its non-finite numbers become 0. Tells
    whether it held one.
    """
    last = (buffer.pos - 1) % buffer.buffer_size
    arrays = _row_arrays(buffer)
    places = [(array, last) for array in arrays]
    if buffer.optimize_memory_usage:
        # Where the next observation is
        places.append((buffer.observations, buffer.pos))
    if all(_is_finite([array], row) for array, row in places):
        return False
    try:
        check_can_thin_out(buffer)
    except ValueError:
        source = None
    else:
        before = ((last - back) % buffer.buffer_size for back in range(1, buffer.size()))
        source = next((row for row in before if _is_finite(arrays, row)), None)
    for array, row in places:
        array[row] = np.nan_to_num(array[row], nan=0.0, posinf=0.0, neginf=0.0) if source is None else array[source]
    if source is not None:
        _cut_around(buffer, np.array([last]))
    return True


def _row_arrays(buffer: ReplayBuffer) -> list[np.ndarray]:
    found = (getattr(buffer, name) for name in ROW_ARRAYS if hasattr(buffer, name))
    return [array for values in found for array in (values.values() if isinstance(values, dict) else (values,))]


def _is_finite(arrays: list[np.ndarray], row: int) -> bool:
    return all(bool(np.isfinite(array[row]).all()) for array in arrays)


def _cut_around(buffer: ReplayBuffer, rows: np.ndarray) -> None:
    _cut_after(buffer, np.concatenate([rows, (rows - 1) % buffer.buffer_size]))


def _cut_after(buffer: ReplayBuffer, rows: np.ndarray) -> None:
    buffer.timeouts[rows] = np.where(buffer.dones[rows] == 0, 1.0, buffer.timeouts[rows])


def _copy_rows(buffer: ReplayBuffer, sources: np.ndarray, targets: np.ndarray) -> None:
    for array in _row_arrays(buffer):
        array[targets] = array[sources]


def _place_of(good: "GoodState", states: Sequence["GoodState"]) -> int | None:
    return next((place for place, state in enumerate(states) if state is good), None)


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

    def state_dict(self, states: Sequence["GoodState"]) -> dict[str, Any]:
        """What is counted and what waits for the next step, of a removal the place of its good state among ``states``."""
        removal = None if self._removal is None else _place_of(self._removal[0], states)
        return {
            "generator": self._generator.bit_generator.state,
            "rows": self._rows,
            "unstored": self._unstored,
            "removal": None if removal is None or self._removal is None else (removal, self._removal[1]),
            "is_broken": self._is_broken,
        }

    def load_state_dict(self, state: dict[str, Any], states: Sequence["GoodState"]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._generator.bit_generator.state = state["generator"]
        self._rows, self._unstored, self._is_broken = state["rows"], state["unstored"], state["is_broken"]
        self._removal = None if state["removal"] is None else (states[state["removal"][0]], state["removal"][1])

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
