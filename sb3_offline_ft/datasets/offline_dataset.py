"""The columns of an offline dataset: checked once on the way in, read-only afterwards."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_offline_ft.common.observations import (
    Observations,
    by_key,
    map_observations,
    n_rows,
    named_arrays,
    nbytes,
    take_rows,
)
from sb3_offline_ft.common.returns import discounted_returns
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets.columns import (
    COLUMNS,
    BoolArray,
    FloatArray,
    IntArray,
    as_columns,
    check_finite,
    frozen,
    split_episodes,
)
from sb3_offline_ft.datasets.keys import choose_keys, dict_of, no_keys, parse_keys
from sb3_offline_ft.datasets.parts import DatasetPart, distinct, with_shares
from sb3_offline_ft.datasets.reference_scores import ReferenceScores
from sb3_offline_ft.datasets.spaces import check_spaces_supported, space_difference

KeyOrder: TypeAlias = Literal["recorded", "named", "unknown"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OfflineDataset:
    """
    Logged transitions, episode after episode, as read-only columns of ``N`` rows.

    Use :meth:`from_columns` or :func:`load_dataset` to make one: they check the data, this constructor does not.
    A row is one transition. Every episode's last row carries exactly one of the two flags, no other row carries any.

    :param observations: ``(N, *obs_shape)`` float32, or uint8 for images (uint8 of two dimensions or more); for ``Dict``
        spaces a dictionary of such arrays. ``Discrete`` keys are float32 of shape ``(N, 1)``
    :param actions: ``(N, *act_shape)`` float32, as recorded: in the units of the environment, not scaled to [-1, 1]
    :param rewards: ``(N,)`` float32
    :param next_observations: Like ``observations``; within an episode, the next row's observation
    :param terminations: ``(N,)`` bool: the environment reached a terminal state, so no bootstrap
    :param truncations: ``(N,)`` bool: the episode was cut (time limit or end of the recording) without terminating
    :param episode_starts: ``(E,)`` int64, index of the first row of each episode
    :param observation_space: The space the data was recorded in, if known
    :param action_space: The space the data was recorded in, if known
    :param spec: The string that :func:`load_dataset` loads this dataset from, if there is one
    :param name: For titles and logs
    :param provenance: What is known about where the data comes from; JSON-able
    :param reference_scores: Scores of a random policy and an expert, if known
    :param sources: What the rows come from, in order; by default one part, the dataset itself
    :param key_order: What the order of the keys of ``Dict`` observations is: ``"recorded"`` that of the environment they were
        recorded in, ``"named"`` the one that the user asked for, ``"unknown"`` any. It counts where they are flattened
    """

    observations: Observations
    actions: FloatArray
    rewards: FloatArray
    next_observations: Observations
    terminations: BoolArray
    truncations: BoolArray
    episode_starts: IntArray
    observation_space: spaces.Space[Any] | None = None
    action_space: spaces.Box | None = None
    spec: str | None = None
    name: str = "arrays"
    provenance: dict[str, Any] = field(default_factory=dict)
    reference_scores: ReferenceScores | None = None
    sources: tuple[DatasetPart, ...] = ()
    key_order: KeyOrder = "recorded"

    def __post_init__(self) -> None:
        if not self.sources:
            object.__setattr__(self, "sources", (DatasetPart(self.name, self.spec, 0, len(self)),))

    @classmethod
    def from_columns(
        cls,
        observations: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        actions: npt.ArrayLike,
        rewards: npt.ArrayLike,
        next_observations: npt.ArrayLike | Mapping[str, npt.ArrayLike],
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
        key_order: KeyOrder = "recorded",
        copy: bool = True,
    ) -> Self:
        """
        Check columns and make a dataset of them.

        An episode ends at every row with a flag, before every row in ``episode_starts`` and at the last row. Without
        ``episode_starts`` it also ends where the next row's observation is not this row's next observation. A row
        that ends an episode without a flag becomes a truncation; a row with both flags is a termination.

        :param observations: ``(N, *obs_shape)`` real numbers, or a dictionary of them. Arrays of uint8 with two dimensions
            or more a row are images and stay uint8
        :param actions: ``(N, *act_shape)`` real numbers, in the units of the environment
        :param rewards: ``(N,)``
        :param next_observations: Like ``observations``
        :param terminations: ``(N,)`` booleans (or 0 and 1): true terminations only, never time limits
        :param truncations: ``(N,)`` booleans (or 0 and 1): time limits and other cuts. None if omitted
        :param episode_starts: ``(E,)`` increasing row indices beginning with 0
        :param observation_space: A ``Box`` of ``obs_shape``, or a ``Dict`` of ``Box`` and ``Discrete`` spaces, if known
        :param action_space: A ``Box`` of ``act_shape``, if known
        :param spec: A string that :func:`load_dataset` gets the same data from
        :param name: For titles and logs
        :param provenance: Anything JSON-able about the origin of the data
        :param reference_scores: Scores of a random policy and an expert
        :param key_order: What the order of the keys of ``observation_space`` is
        :param copy: Copy the columns. ``False`` keeps arrays that already have the right type and makes
            them read-only: only for a caller that gives them away
        :return: The dataset
        :raises ValueError: The data is empty, a column has a wrong shape or type or holds NaN or infinity,
            the spaces do not fit or are not supported, or ``episode_starts`` is not increasing from 0
        """
        where = f"Dataset {spec or name!r}"
        check_spaces_supported(observation_space, action_space, where)
        given = (observations, actions, rewards, next_observations, terminations, truncations)
        columns = as_columns(dict(zip(COLUMNS[:-1], given, strict=True)), observation_space, action_space, where, copy)
        columns["episode_starts"], n_joints = split_episodes(columns, episode_starts, where)
        check_finite(columns, columns["episode_starts"], where)
        provenance = dict(provenance or {})
        if n_joints:
            provenance["unflagged_episode_ends"] = n_joints
            warn(
                f"{where}: {n_joints} of {n_rows(columns['observations'])} rows carry no flag although the next row does not "
                "continue from their next_observations. Each is taken as the end of an episode (a truncation). If that is not "
                "meant, set `truncations` at the ends of episodes, or pass `episode_starts`."
            )
        assert action_space is None or isinstance(action_space, spaces.Box)
        return cls(
            **{name: map_observations(frozen, column) for name, column in columns.items()},
            observation_space=observation_space,
            action_space=action_space,
            spec=spec,
            name=name,
            provenance=provenance,
            reference_scores=reference_scores,
            key_order=key_order,
        )

    def with_facts(self, **facts: Any) -> Self:
        """
        Copy the dataset with other facts about it; the columns are shared.

        :param facts: New values of ``spec``, ``name``, ``provenance`` or ``reference_scores``
        :return: The new dataset
        :raises ValueError: A column or a space is named
        """
        allowed = {"spec", "name", "provenance", "reference_scores"}
        if wrong := sorted(set(facts) - allowed):
            raise ValueError(f"with_facts changes {', '.join(sorted(allowed))}; found {', '.join(wrong)}: use from_columns")
        sources = self.sources
        if len(sources) == 1:
            sources = (replace(sources[0], **{key: facts[key] for key in ("name", "spec") if key in facts}),)
        return replace(self, **facts, sources=sources)

    def select_episodes(self, indices: npt.ArrayLike) -> Self:
        """
        Copy some episodes into a dataset of their own.

        Its ``spec`` is ``None``, as no string names it. Shares of parts that lose all episodes go to the others in
        proportion.

        :param indices: Numbers of episodes, in any order and each at most once, or a mask ``(E,)``; the episodes keep the
            order that they have here
        :return: The dataset
        :raises ValueError: No episode is named, or one that does not exist, or one twice
        """
        mask = np.asarray(indices)
        if mask.dtype == np.bool_ and mask.shape == (self.n_episodes,):
            chosen = np.flatnonzero(mask)
        elif mask.ndim == 1 and (mask.dtype.kind in "iu" or mask.size == 0):
            chosen = np.unique(mask.astype(np.int64))
            if len(chosen) < mask.size:
                raise ValueError(f"Dataset {self.name!r}: every episode can be selected once only, found {mask}.")
            if chosen.size and not (0 <= chosen[0] and chosen[-1] < self.n_episodes):
                raise ValueError(f"Dataset {self.name!r}: has the episodes 0 to {self.n_episodes - 1}, found {mask}.")
        else:
            raise ValueError(
                f"Dataset {self.name!r}: episodes are selected by their numbers or a mask of shape ({self.n_episodes},), "
                f"found an array of {mask.dtype} of shape {mask.shape}."
            )
        if not chosen.size:
            raise ValueError(f"Dataset {self.name!r}: select at least one of the {self.n_episodes} episodes, found none.")
        keep = np.zeros(self.n_episodes, dtype=np.bool_)
        keep[chosen] = True
        rows = np.flatnonzero(keep[self.episode_of_rows()])
        lengths = self.episode_lengths[chosen]
        columns = {name: map_observations(frozen, take_rows(getattr(self, name), rows)) for name in COLUMNS[:-1]}
        parts = [
            replace(part, begin=int(np.searchsorted(rows, part.begin)), end=int(np.searchsorted(rows, part.end)))
            for part in self.sources
        ]
        return replace(
            self,
            **columns,
            episode_starts=frozen(np.cumsum(lengths) - lengths),
            spec=None,
            sources=with_shares([replace(part, spec=None) for part in parts if part.end > part.begin]),
        )

    def select_keys(self, keys: Sequence[str] | str) -> Self:
        """
        Take some of the keys of ``Dict`` observations, in the order in which a flattened environment puts them together.

        The columns are shared. Its ``spec`` is ``None``.

        :param keys: Names; those of nested Dicts are joined by ``/``, and the name of one stands for all in it
        :return: The dataset
        :raises ValueError: The observations have no keys, or no such key, or one is named twice
        """
        where = f"Dataset {self.name!r}"
        if not isinstance(self.observations, dict):
            raise no_keys(where, self.observations.shape[1:])
        chosen = choose_keys(parse_keys(keys, where), list(self.observations), where)
        return replace(
            self._with_keys(chosen),
            spec=None,
            provenance=self.provenance | {"keys": chosen},
            sources=tuple(replace(part, spec=None) for part in self.sources),
            key_order="named",
        )

    def _with_keys(self, keys: Sequence[str]) -> Self:
        assert isinstance(self.observations, dict) and isinstance(self.next_observations, dict)
        space = self.observation_space
        return replace(
            self,
            observations={key: self.observations[key] for key in keys},
            next_observations={key: self.next_observations[key] for key in keys},
            observation_space=dict_of({key: space[key] for key in keys}) if isinstance(space, spaces.Dict) else space,
        )

    @classmethod
    def concatenate(cls, datasets: Sequence[Self], weights: Sequence[float] | None = None) -> Self:
        """
        Put datasets together, one after the other.

        :param datasets: Datasets of the same spaces
        :param weights: Shares of the offline rows that a replay buffer samples from each, of any sum; without them every row
            is as likely as any other
        :return: A dataset with the ``sources`` of all of them; their shares sum to 1. It has no ``spec``
        :raises ValueError: There is none, the observations or actions differ, they were recorded in different
            environments, or a weight is not a positive number
        """
        datasets = list(datasets)
        if not datasets:
            raise ValueError("Give at least one dataset to concatenate, found none.")
        for other in datasets[1:]:
            _check_same_kind(datasets[0], other)
        datasets, key_order = _with_one_order(datasets)
        shares = _shares(datasets, weights)
        offsets = np.cumsum([0, *map(len, datasets)]).tolist()
        names = iter(distinct([part.name for dataset in datasets for part in dataset.sources]))
        parts: list[DatasetPart] = []
        for dataset, offset, share in zip(datasets, offsets, shares, strict=False):
            for part in dataset.sources:
                within = (part.end - part.begin) / len(dataset) if part.weight is None else part.weight
                weight = None if share is None else share * within
                begin, end = offset + part.begin, offset + part.end
                parts.append(replace(part, name=next(names), begin=begin, end=end, weight=weight))
        columns = {
            name: map_observations(
                lambda *arrays: frozen(np.concatenate(arrays)), *(getattr(dataset, name) for dataset in datasets)
            )
            for name in COLUMNS[:-1]
        }
        starts = np.concatenate([one.episode_starts + offset for one, offset in zip(datasets, offsets[:-1], strict=True)])
        env_ids = {dataset.env_id for dataset in datasets} - {None}
        scores = {dataset.reference_scores for dataset in datasets}
        lossy = {"lossy_images": True} if any(dataset.provenance.get("lossy_images") for dataset in datasets) else {}
        return cls(
            **columns,
            episode_starts=frozen(starts),
            observation_space=next((one.observation_space for one in datasets if one.observation_space is not None), None),
            action_space=next((one.action_space for one in datasets if one.action_space is not None), None),
            name=" + ".join(part.name for part in parts),
            provenance={
                "source": "list",
                "env_id": next(iter(env_ids), None),
                "parts": [dict(dataset.provenance) | {"name": dataset.name} for dataset in datasets],
                **lossy,
            },
            reference_scores=scores.pop() if len(scores) == 1 else None,
            sources=with_shares(parts),
            key_order=key_order,
        )

    def __len__(self) -> int:
        return n_rows(self.observations)

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
        return frozen(np.diff(self.episode_starts, append=len(self)))

    @cached_property
    def episode_ends(self) -> IntArray:
        """``(E,)`` int64, index of the last row of each episode."""
        return frozen(self.episode_starts + self.episode_lengths - 1)

    def episode_of_rows(self) -> IntArray:
        """
        :return: ``(N,)`` int64, number of the episode that each row belongs to
        """
        return np.repeat(np.arange(self.n_episodes), self.episode_lengths)

    @cached_property
    def has_next_action(self) -> BoolArray:
        """``(N,)`` bool, whether the episode goes on after the row."""
        column = np.ones(len(self), dtype=np.bool_)
        column[self.episode_ends] = False
        return frozen(column)

    @cached_property
    def next_actions(self) -> FloatArray:
        """``(N, *act_shape)`` float32, the action of the following row of the same episode; zeros where there is none."""
        column = np.zeros_like(self.actions)
        column[:-1] = self.actions[1:]
        column[self.episode_ends] = 0.0
        return frozen(column)

    def monte_carlo_returns(self, gamma: float) -> FloatArray:
        """
        Discounted sums of the rewards from each row to the end of its episode.

        Nothing is added for what would have come after a truncation, so there they are too small in magnitude.

        :param gamma: Discount factor in [0, 1]
        :return: ``(N,)`` float32, read-only; kept for the next call with the same factor
        :raises ValueError: The factor is out of range
        """
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"`gamma` must be in [0, 1], found {gamma!r}.")
        cache: dict[float, FloatArray] = self.__dict__.setdefault("_monte_carlo_returns", {})
        if gamma not in cache:
            remaining = np.repeat(self.episode_ends, self.episode_lengths) - np.arange(len(self))
            cache[gamma] = frozen(discounted_returns(self.rewards, remaining, gamma))
        return cache[gamma]

    @cached_property
    def episode_returns(self) -> npt.NDArray[np.float64]:
        """``(E,)`` float64, undiscounted sum of the rewards of each episode."""
        return frozen(np.add.reduceat(self.rewards, self.episode_starts, dtype=np.float64))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every column's name, type, shape and bytes: equal data has equal fingerprints, however stored."""
        digest = hashlib.sha256()
        if self.key_order == "named" and isinstance(self.observations, dict):
            digest.update(f"keys in the order {list(self.observations)}\n".encode())
        for column in COLUMNS:
            # The order of keys is the source's
            for name, array in sorted(named_arrays(getattr(self, column), column)):
                little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
                digest.update(f"{name} {little_endian.dtype.str} {array.shape}\n".encode())
                digest.update(little_endian.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of all columns together in bytes."""
        return sum(nbytes(getattr(self, name)) for name in COLUMNS)

    def __repr__(self) -> str:
        returns = self.episode_returns
        return (
            f"OfflineDataset({self.name!r}, {len(self):,} transitions in {self.n_episodes:,} episodes, "
            f"observations {_shapes(self.observations)}{', lossy images' * bool(self.provenance.get('lossy_images'))}, "
            f"actions {self.actions.shape[1:]}, "
            f"return {returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f}), "
            f"{int(self.terminations.sum()):,} terminated, {int(self.truncations.sum()):,} truncated)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in COLUMNS:
            map_observations(frozen, getattr(self, name))


def _shapes(observations: Observations) -> str:
    shapes = map_observations(lambda array: f"{array.shape[1:]}{' uint8' * (array.dtype == np.uint8)}", observations)
    return shapes if isinstance(shapes, str) else "{" + ", ".join(f"{key}: {one}" for key, one in shapes.items()) + "}"


def _shares(datasets: Sequence[OfflineDataset], weights: Sequence[float] | None) -> list[float | None]:
    """Share of each dataset, all ``None`` if every row of all of them is as likely."""
    if weights is not None:
        if len(weights) != len(datasets):
            raise ValueError(f"Give one weight for each of the {len(datasets)} datasets, found {len(weights)}.")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0.0 < weight < math.inf:
                raise ValueError(f"The weight of a dataset must be a positive number, found {weight!r}.")
        return [float(weight / math.fsum(weights)) for weight in weights]
    if all(part.weight is None for dataset in datasets for part in dataset.sources):
        return [None] * len(datasets)
    return [len(dataset) / sum(map(len, datasets)) for dataset in datasets]


def _with_one_order(datasets: list[Any]) -> tuple[list[Any], KeyOrder]:
    """Bring Dict observations into the order of keys that is known of some of the datasets, if they agree."""
    known = {
        tuple(one.observations): one for one in datasets if isinstance(one.observations, dict) and one.key_order != "unknown"
    }
    if len(known) != 1:
        return datasets, "unknown" if isinstance(datasets[0].observations, dict) else "recorded"
    ((keys, one),) = known.items()
    return [dataset._with_keys(keys) for dataset in datasets], one.key_order


def _check_same_kind(first: OfflineDataset, other: OfflineDataset) -> None:
    where = f"The datasets {first.name!r} and {other.name!r} cannot be put together"
    hint = "Use data that was recorded in the same environment (and wrappers)."
    if None not in (first.env_id, other.env_id) and first.env_id != other.env_id:
        raise ValueError(f"{where}: the first was recorded in {first.env_id}, the second in {other.env_id}. {hint}")
    arrays = [{**dict(named_arrays(one.observations, "observations")), "actions": one.actions} for one in (first, other)]
    if arrays[0].keys() != arrays[1].keys():
        raise ValueError(f"{where}: the first has {', '.join(arrays[0])}, the second {', '.join(arrays[1])}. {hint}")
    for name, array in arrays[0].items():
        found = arrays[1][name]
        if array.shape[1:] != found.shape[1:] or array.dtype != found.dtype:
            raise ValueError(
                f"{where}: the first has {name} of shape {array.shape[1:]} and type {array.dtype}, the second of shape "
                f"{found.shape[1:]} and type {found.dtype}. {hint}"
            )
    found_spaces = by_key(other.observation_space)
    pairs = [("action", first.action_space, other.action_space)] + [
        (f"observation {key!r}" if key else "observation", space, found_spaces.get(key))
        for key, space in by_key(first.observation_space).items()
    ]
    for what, space, found_space in pairs:
        if space is not None and found_space is not None and (difference := space_difference(space, found_space, what)):
            raise ValueError(f"{where}: {difference}. {hint}")
