"""The columns of an offline dataset: checked once on the way in, read-only afterwards."""

import hashlib
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.datasets.reference_scores import ReferenceScores

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_FLOAT_COLUMNS = ("observations", "actions", "rewards", "next_observations")
_FLAG_COLUMNS = ("terminations", "truncations")
_COLUMNS = (*_FLOAT_COLUMNS, *_FLAG_COLUMNS, "episode_starts")
_FINITE_CHECK_ROWS = 65_536


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OfflineDataset:
    """Logged transitions, episode after episode, as read-only columns of ``N`` rows.

    Use :meth:`from_columns` or :func:`load_dataset` to make one: they check the data, this constructor does not.
    A row is one transition. Every episode's last row carries exactly one of the two flags, no other row carries any.

    :param observations: ``(N, *obs_shape)`` float32.
    :param actions: ``(N, *act_shape)`` float32, as recorded: in the units of the environment, not scaled to [-1, 1].
    :param rewards: ``(N,)`` float32.
    :param next_observations: ``(N, *obs_shape)`` float32; within an episode, the next row's observation.
    :param terminations: ``(N,)`` bool: the environment reached a terminal state, so no bootstrap.
    :param truncations: ``(N,)`` bool: the episode was cut (time limit or end of the recording) without terminating.
    :param episode_starts: ``(E,)`` int64, index of the first row of each episode.
    :param observation_space: The space the data was recorded in, if known.
    :param action_space: The space the data was recorded in, if known.
    :param spec: The string that :func:`load_dataset` loads this dataset from, if there is one.
    :param name: For titles and logs.
    :param provenance: What is known about where the data comes from; JSON-able.
    :param reference_scores: Scores of a random policy and an expert, if known.
    """

    observations: FloatArray
    actions: FloatArray
    rewards: FloatArray
    next_observations: FloatArray
    terminations: BoolArray
    truncations: BoolArray
    episode_starts: IntArray
    observation_space: spaces.Space[Any] | None = None
    action_space: spaces.Box | None = None
    spec: str | None = None
    name: str = "arrays"
    provenance: dict[str, Any] = field(default_factory=dict)
    reference_scores: ReferenceScores | None = None

    @classmethod
    def from_columns(
        cls,
        observations: npt.ArrayLike,
        actions: npt.ArrayLike,
        rewards: npt.ArrayLike,
        next_observations: npt.ArrayLike,
        terminations: npt.ArrayLike,
        truncations: npt.ArrayLike | None = None,
        *,
        episode_starts: npt.ArrayLike | None = None,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        spec: str | None = None,
        name: str = "arrays",
        provenance: dict[str, Any] | None = None,
        reference_scores: ReferenceScores | None = None,
        copy: bool = True,
    ) -> Self:
        """Check columns and make a dataset of them.

        An episode ends at every row with a flag, before every row in ``episode_starts`` and at the last row. Without
        ``episode_starts`` it also ends where the next row's observation is not this row's next observation. A row
        that ends an episode without a flag becomes a truncation; a row with both flags is a termination.

        :param observations: ``(N, *obs_shape)`` real numbers.
        :param actions: ``(N, *act_shape)`` real numbers, in the units of the environment.
        :param rewards: ``(N,)``.
        :param next_observations: ``(N, *obs_shape)``.
        :param terminations: ``(N,)`` booleans (or 0 and 1): true terminations only, never time limits.
        :param truncations: ``(N,)`` booleans (or 0 and 1): time limits and other cuts. None if omitted.
        :param episode_starts: ``(E,)`` increasing row indices beginning with 0.
        :param observation_space: A ``Box`` of ``obs_shape``, if known.
        :param action_space: A ``Box`` of ``act_shape``, if known.
        :param spec: A string that :func:`load_dataset` gets the same data from.
        :param name: For titles and logs.
        :param provenance: Anything JSON-able about the origin of the data.
        :param reference_scores: Scores of a random policy and an expert.
        :param copy: Copy the columns. ``False`` keeps arrays that already have the right type and makes
            them read-only: only for a caller that gives them away.
        :return: The dataset.
        :raises ValueError: if the data is empty, a column has a wrong shape or type or holds NaN or infinity,
            the spaces do not fit or are not supported, or ``episode_starts`` is not increasing from 0.
        """
        where = f"Dataset {name!r}"
        check_spaces_supported(observation_space, action_space, where)
        columns: dict[str, Any] = {
            "observations": _as_float(observations, "observations", where, copy),
            "actions": _as_float(actions, "actions", where, copy),
            "rewards": _as_float(rewards, "rewards", where, copy),
            "next_observations": _as_float(next_observations, "next_observations", where, copy),
            "terminations": _as_flags(terminations, "terminations", where),
        }
        n_rows = len(columns["observations"])
        if truncations is None:
            columns["truncations"] = np.zeros(n_rows, dtype=np.bool_)
        else:
            columns["truncations"] = _as_flags(truncations, "truncations", where)
        _check_shapes(columns, observation_space, action_space, where)

        starts_here = np.zeros(n_rows, dtype=np.bool_)
        starts_here[0] = True
        starts_here[1:] = (columns["terminations"] | columns["truncations"])[:-1]
        provenance = dict(provenance or {})
        if episode_starts is not None:
            starts_here[_as_starts(episode_starts, n_rows, where)] = True
        else:
            n_joints = _mark_joints(starts_here, columns["observations"], columns["next_observations"])
            if n_joints:
                provenance["unflagged_episode_ends"] = n_joints
                warnings.warn(
                    f"{where}: {n_joints} of {n_rows} rows carry no flag although the next row does not continue from their "
                    "next_observations. Each is taken as the end of an episode (a truncation). If that is not meant, "
                    "set `truncations` at the ends of episodes, or pass `episode_starts`.",
                    stacklevel=2,
                )
        starts = np.flatnonzero(starts_here).astype(np.int64)
        ends_here = np.roll(starts_here, -1)
        columns["truncations"] = ends_here & ~columns["terminations"]
        _check_finite(columns, starts, where)

        columns["episode_starts"] = starts
        for column in columns.values():
            column.flags.writeable = False
        assert action_space is None or isinstance(action_space, spaces.Box)
        return cls(
            **columns,
            observation_space=observation_space,
            action_space=action_space,
            spec=spec,
            name=name,
            provenance=provenance,
            reference_scores=reference_scores,
        )

    def with_facts(self, **facts: Any) -> Self:
        """Copy the dataset with other facts about it; the columns are shared.

        :param facts: New values of ``spec``, ``name``, ``provenance`` or ``reference_scores``.
        :return: The new dataset.
        :raises ValueError: if a column or a space is named.
        """
        allowed = {"spec", "name", "provenance", "reference_scores"}
        if wrong := sorted(set(facts) - allowed):
            raise ValueError(f"with_facts changes {', '.join(sorted(allowed))}; found {', '.join(wrong)}: use from_columns")
        return replace(self, **facts)

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def n_episodes(self) -> int:
        """Number of episodes ``E``."""
        return len(self.episode_starts)

    @property
    def env_id(self) -> str | None:
        """Gymnasium id of the environment the data was recorded in, if known."""
        env_id = self.provenance.get("env_id")
        return None if env_id is None else str(env_id)

    @cached_property
    def episode_lengths(self) -> IntArray:
        """``(E,)`` int64, number of rows of each episode."""
        return _frozen(np.diff(self.episode_starts, append=len(self)))

    @cached_property
    def episode_returns(self) -> npt.NDArray[np.float64]:
        """``(E,)`` float64, undiscounted sum of the rewards of each episode."""
        return _frozen(np.add.reduceat(self.rewards, self.episode_starts, dtype=np.float64))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every column's name, type, shape and bytes: equal data has equal fingerprints, however stored."""
        digest = hashlib.sha256()
        for name in _COLUMNS:
            column: npt.NDArray[Any] = getattr(self, name)
            little_endian = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
            digest.update(f"{name} {little_endian.dtype.str} {column.shape}\n".encode())
            digest.update(little_endian.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of all columns together in bytes."""
        return sum(getattr(self, name).nbytes for name in _COLUMNS)

    def __repr__(self) -> str:
        returns = self.episode_returns
        return (
            f"OfflineDataset({self.name!r}, {len(self):,} transitions in {self.n_episodes:,} episodes, "
            f"observations {self.observations.shape[1:]}, actions {self.actions.shape[1:]}, "
            f"return {returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f}), "
            f"{int(self.terminations.sum()):,} terminated, {int(self.truncations.sum()):,} truncated)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _COLUMNS:
            getattr(self, name).flags.writeable = False


def check_spaces_supported(
    observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any] | None, where: str
) -> None:
    """Refuse spaces that the columns cannot hold.

    :param observation_space: ``None`` is not checked.
    :param action_space: ``None`` is not checked.
    :param where: Names the dataset or environment at the start of the message.
    :raises ValueError: if observations are not a ``Box`` of numbers, are images, or actions are not a ``Box`` of floats.
    """
    if observation_space is not None:
        if not isinstance(observation_space, spaces.Box):
            raise ValueError(
                f"{where}: observations must be a Box, found {type(observation_space).__name__}, which is not supported. "
                "Flatten them before recording (gymnasium.wrappers.FlattenObservation)."
            )
        if len(observation_space.shape) > 1 and observation_space.dtype == np.uint8:
            raise ValueError(
                f"{where}: image observations (uint8 {observation_space.shape}) are not supported, "
                "expected a Box of numbers. Record features or states instead of frames."
            )
    if action_space is not None and not (
        isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    ):
        raise ValueError(
            f"{where}: actions must be a Box of floats, found {action_space}. "
            "TD3-based algorithms need continuous actions; discrete ones are not supported."
        )


def _as_float(column: npt.ArrayLike, name: str, where: str, copy: bool) -> FloatArray:
    if isinstance(column, dict | tuple):
        raise ValueError(f"{where}: {name} must be one array, found a {type(column).__name__}; it is not supported")
    array = np.asarray(column)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where}: {name} must hold real numbers, found dtype {array.dtype}. Convert them to float32.")
    if array.dtype == np.uint8 and array.ndim > 2:
        raise ValueError(
            f"{where}: {name} look like images (uint8 {array.shape[1:]}), which are not supported, expected numbers. "
            "Record features or states instead of frames."
        )
    if array.dtype.kind not in "f" and name == "actions":
        raise ValueError(
            f"{where}: actions must be floats, found dtype {array.dtype}. "
            "TD3-based algorithms need continuous actions; discrete ones are not supported."
        )
    with np.errstate(over="ignore"):
        return np.array(array, dtype=np.float32, order="C") if copy else np.ascontiguousarray(array, dtype=np.float32)


def _as_flags(column: npt.ArrayLike, name: str, where: str) -> BoolArray:
    array = np.asarray(column)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: {name} must be booleans, found dtype {array.dtype}")
    flags = array.astype(np.bool_)
    if array.dtype.kind != "b":
        wrong = np.flatnonzero(array.reshape(-1) != flags.reshape(-1))
        if len(wrong):
            raise ValueError(
                f"{where}: {name} must be booleans (or 0 and 1), found {array.reshape(-1)[wrong[0]]} in row {wrong[0]}"
            )
    return flags


def _as_starts(episode_starts: npt.ArrayLike, n_rows: int, where: str) -> IntArray:
    starts = np.asarray(episode_starts)
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: episode_starts must be a 1-d array of row indices, found dtype {starts.dtype} and shape {starts.shape}"
        )
    if len(starts) == 0 or starts[0] != 0 or starts[-1] >= n_rows or np.any(np.diff(starts.astype(np.int64)) <= 0):
        raise ValueError(
            f"{where}: episode_starts must increase from 0 and stay below the number of rows ({n_rows}), found {starts}"
        )
    return starts.astype(np.int64)


def _check_shapes(
    columns: dict[str, Any],
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any] | None,
    where: str,
) -> None:
    observations = columns["observations"]
    n_rows = len(observations) if observations.ndim else 0
    if n_rows == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found observations {observations.shape}")
    for name, space in (("observations", observation_space), ("actions", action_space)):
        array = columns[name]
        if array.ndim < 2:
            raise ValueError(
                f"{where}: {name} must have the shape (rows, dimensions), found {array.shape}. "
                f"Reshape one-dimensional {name} to (rows, 1)."
            )
        if space is not None and array.shape[1:] != space.shape:
            raise ValueError(f"{where}: {name} have rows of shape {array.shape[1:]}, but its space has shape {space.shape}")
    expected = {name: (n_rows,) for name in ("rewards", *_FLAG_COLUMNS)}
    expected["next_observations"] = observations.shape
    expected["actions"] = (n_rows, *columns["actions"].shape[1:])
    for name, shape in expected.items():
        if columns[name].shape != shape:
            raise ValueError(
                f"{where}: {name} must have shape {shape} to go with observations {observations.shape}, "
                f"found {columns[name].shape}"
            )


def _mark_joints(starts_here: BoolArray, observations: FloatArray, next_observations: FloatArray) -> int:
    """Mark the rows that do not continue the row before, and count them."""
    n_joints = 0
    for begin in range(1, len(observations), _FINITE_CHECK_ROWS):
        end = min(begin + _FINITE_CHECK_ROWS, len(observations))
        before, after = next_observations[begin - 1 : end - 1], observations[begin:end]
        differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
        new = differs.reshape(end - begin, -1).any(axis=1) & ~starts_here[begin:end]
        starts_here[begin:end] |= new
        n_joints += int(new.sum())
    return n_joints


def _check_finite(columns: dict[str, Any], starts: IntArray, where: str) -> None:
    for name in _FLOAT_COLUMNS:
        column = columns[name]
        count, first = 0, -1
        for begin in range(0, len(column), _FINITE_CHECK_ROWS):
            chunk = column[begin : begin + _FINITE_CHECK_ROWS]
            bad = ~np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
            if bad.any():
                first = begin + int(bad.argmax()) if first < 0 else first
                count += int(bad.sum())
        if count:
            episode = int(np.searchsorted(starts, first, side="right")) - 1
            raise ValueError(
                f"{where}: {name} hold NaN or infinity in {count} of {len(column)} rows, first in row {first} "
                f"(episode {episode}, step {first - int(starts[episode])}): {column[first]}. "
                "Remove these episodes or repair the values."
            )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array
