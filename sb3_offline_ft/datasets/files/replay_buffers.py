"""Saved replay buffers as datasets: those of SB3, and our own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_offline_ft.common.observations import Array, Observations, map_observations
from sb3_offline_ft.common.reading import ArrayFile, ContentError, open_file, parse_json
from sb3_offline_ft.common.suggestions import first_of
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets.columns import as_flags, as_float
from sb3_offline_ft.datasets.files.npz import open_archive, read_array
from sb3_offline_ft.datasets.files.reading import Source, by_column, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.spaces import check_spaces_supported

_RING_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_ZIP_MAGIC = b"PK"


def has_own_format(path: Path) -> bool:
    """Tell the files of our replay buffers, arrays and JSON which rl-zoo3 names ``.pkl`` too, from others, damaged or not."""
    with open_file(path) as file:
        if path.suffix == ".pkl":
            return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        try:
            names = ArrayFile(file, str(path)).files
        # The reader of other files says what is wrong
        except Exception:
            return False
    return _is_own(names) and not {"terminations", "terminals"} & set(names)


def _is_own(names: Iterable[str]) -> bool:
    return {"facts", *_RING_COLUMNS} <= {name.partition("/")[0] for name in names}


@contextmanager
def own_replay_buffer_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    """The online part of a buffer of this package, written without pickle; the bounds of its observations are not known."""
    with open_archive(source) as archive:
        if not _is_own(archive.files):
            raise ValueError(
                f"Dataset {str(source.path)!r}: expected a replay buffer saved by save_replay_buffer, found "
                f"{first_of(archive.files, 8) or 'an empty archive'}."
            )
        yield lambda: _read_own(archive, source)


def _read_own(archive: ArrayFile, source: Source) -> OfflineDataset:
    names = [name for name in archive.files if name.partition("/")[0] in _RING_COLUMNS]
    arrays = {name: read_array(archive, name, source) for name in names}
    with reading(source.where, source.file):
        facts = parse_json(str(archive["facts"]), f"{source.where}: facts")
        low, high = (np.array(bound, np.float32).reshape(tuple(facts["action shape"])) for bound in facts["action bounds"])
        n_slots, n_envs, first = int(facts["pos"]), int(facts["n_envs"]), 0
        if facts["full"]:
            n_slots, first = int(facts["buffer_size"]), n_slots
        action_space = spaces.Box(low, high, dtype=np.float32)
    for name, array in arrays.items():
        if array.shape[:2] != (n_slots, n_envs):
            raise ValueError(
                f"{source.where}: {name} must hold {n_slots} steps of {n_envs} environments, found shape {array.shape}: the "
                "file is damaged."
            )
    # Files of earlier versions do not say
    handles_timeouts = facts.get("handle_timeout_termination", True)
    ring = _Ring(**by_column(arrays), n_slots=n_slots, first=first, n_envs=n_envs, is_full=bool(facts["full"]))
    return _dataset_of(ring, handles_timeouts, None, action_space, source)


@contextmanager
def replay_buffer_reader(source: Source) -> Iterator[Callable[[], OfflineDataset]]:
    """A buffer written by SB3's ``save_replay_buffer``; each environment's transitions in the order of collection."""
    if not source.trust_pickle:
        raise ValueError(
            f"{str(source.path)!r} is a pickle file, and reading one runs whatever code it holds. If you trust where it comes "
            "from, allow it yourself: with `--trust-pickle` of the commands of sb3-offline-ft, with load_dataset(..., "
            "trust_pickle=True), or with ?trust_pickle=1 after its name in your own code or command line. What a saved model, "
            "a study.yml or another file says does not count."
        )
    yield lambda: _read_pickled(source)


def _read_pickled(source: Source) -> OfflineDataset:
    where = source.where
    with reading(where, source.file):
        try:
            with open_file(source.file) as file:
                buffer = load_from_pkl(file)
        except ImportError as error:
            raise ContentError(
                f"{where} was saved with classes that cannot be imported here ({error}): install them."
            ) from error
        if not isinstance(buffer, ReplayBuffer):
            raise ContentError(
                f"{where} holds a {type(buffer).__name__}: expected a replay buffer written by SB3's save_replay_buffer."
            )
    check_spaces_supported(buffer.observation_space, buffer.action_space, where)
    if buffer.optimize_memory_usage:
        raise ValueError(
            f"{where} was filled with optimize_memory_usage=True: it holds neither time limits nor the observations at the "
            "ends of episodes. Gather it again with optimize_memory_usage=False."
        )
    ring = _Ring(
        **{name: getattr(buffer, name) for name in _RING_COLUMNS},
        n_slots=buffer.size(),
        first=buffer.pos if buffer.full else 0,
        n_envs=buffer.n_envs,
        is_full=buffer.full,
    )
    known = (buffer.handle_timeout_termination, buffer.observation_space, buffer.action_space)
    return _dataset_of(ring, *known, source, buffer_class=type(buffer).__name__)


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """The content of a replay buffer: columns of shape ``(slots, n_envs, ...)``, of which ``n_slots`` are filled."""

    observations: Observations
    next_observations: Observations
    actions: Array
    rewards: Array
    dones: Array
    timeouts: Array
    n_slots: int
    first: int
    n_envs: int
    is_full: bool

    def in_order(self, column: Array) -> Array:
        """From the ring, (slot, environment), to one environment after the other, each from its oldest step."""
        rows = np.roll(column[: self.n_slots], -self.first, axis=0)
        return rows.swapaxes(0, 1).reshape(self.n_slots * self.n_envs, *column.shape[2:])


def _dataset_of(
    ring: _Ring,
    handles_timeouts: bool,
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any],
    source: Source,
    **more: str,
) -> OfflineDataset:
    where = source.where
    if not handles_timeouts:
        warn(f"{where} was filled with handle_timeout_termination=False: its time limits count as terminations.")
    if ring.n_slots == 0:
        raise ValueError(f"{where} is empty: expected at least one transition, found none.")
    dones = as_flags(ring.in_order(ring.dones), "dones", where)
    # Where the recording was cut, without the end of an episode, too
    truncations = as_flags(ring.in_order(ring.timeouts), "timeouts", where)
    terminations = dones & ~truncations
    # The last step of each environment, unless it ended an episode
    last = slice(ring.n_slots - 1, None, ring.n_slots)
    truncations[last] |= ~dones[last]
    provenance: dict[str, Any] = {"source": source.kind, "file": source.file.name, "env_id": None, **more}
    provenance |= {"n_envs": ring.n_envs, "oldest_transitions_overwritten": bool(ring.is_full)}
    return OfflineDataset.from_columns(
        map_observations(ring.in_order, ring.observations),
        _unscale(as_float(ring.in_order(ring.actions), "actions", where, copy=False), action_space, where),
        ring.in_order(ring.rewards),
        map_observations(ring.in_order, ring.next_observations),
        terminations,
        truncations,
        observation_space=observation_space,
        action_space=action_space,
        spec=source.spec,
        name=source.name,
        provenance=provenance,
        copy=False,
    )


def _unscale(actions: Array, space: spaces.Space[Any], where: str) -> Array:
    """Bring the policy's actions in [-1, 1] back to the bounds of the environment, as SB3's ``policy.unscale_action`` does."""
    assert isinstance(space, spaces.Box)
    if not space.is_bounded():
        raise ValueError(f"{where}: actions must have finite bounds to be scaled back, found {space}.")
    if actions[:1].size != space.low.size:
        raise ValueError(
            f"{where}: actions must have the shape {space.shape}, found {actions.shape[1:]}: the file is damaged."
        )
    scaled = actions.reshape(len(actions), *space.shape).astype(np.float64)
    unscaled: Array = space.low + 0.5 * (scaled + 1.0) * (space.high - space.low)
    return unscaled.astype(np.float32)
