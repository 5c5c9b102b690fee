"""A replay buffer with an immutable offline part and SB3's ring for what is gathered online."""

import json
import math
from typing import Any, ClassVar, Never

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.buffers.augmentation import Augmentation, Augmenter, make_augmentation
from sb3_offline_ft.buffers.balanced_replay import make_balanced_replay
from sb3_offline_ft.buffers.batch_columns import BatchColumns
from sb3_offline_ft.buffers.files import (
    KIND,
    File,
    check_columns,
    check_facts,
    facts_of,
    read_arrays,
    ring_columns,
    write_arrays,
)
from sb3_offline_ft.buffers.offline_part import OfflinePart, SamplerPosition, parts_of_pickled
from sb3_offline_ft.buffers.sampling import draw_ring_rows
from sb3_offline_ft.buffers.transitions import OnlineTransitions, RingReturns
from sb3_offline_ft.common.checks import known_keywords, whole_number
from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.observations import by_key, map_observations
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples, Schedule, ScheduleLike
from sb3_offline_ft.datasets import OfflineDataset

Array = npt.NDArray[Any]

BALANCED_PREFIX = "balanced/"


class OfflineToOnlineReplayBuffer(ReplayBuffer):
    """
    Replay buffer for offline pretraining and online finetuning.

    The offline part is immutable, has its own index space and its own random generator; the online part is SB3's ring.
    A batch holds exactly ``round(offline_fraction * batch_size)`` offline rows, or offline rows only as long as
    nothing has been gathered online. Without offline data it draws the same batches as SB3's ``ReplayBuffer``, or
    ``NStepReplayBuffer`` for ``n_steps > 1``.

    Observations are kept and returned as float32, whatever the space says (but for uint8): networks compute in
    float32, and MuJoCo's float64 would double the memory. Images (uint8) stay uint8.

    :param buffer_size: Max number of online transitions
    :param observation_space: Observation space, a ``Box``
    :param action_space: Action space, a ``Box``
    :param device: PyTorch device
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Not supported, must be False: sharing observations between rows cannot represent
        transitions that end in a time limit
    :param handle_timeout_termination: Bootstrap the value at time limits (recommended)
    :param offline_fraction: Share of offline rows in a batch, in [0, 1], or a schedule of the remaining progress
        (see :func:`sb3_offline_ft.common.schedules.make_schedule`)
    :param seed: Seed of the offline part's own generators
    :param n_steps: Number of steps of the n-step return; it never goes beyond the end of an episode
    :param gamma: Discount factor of n-step and Monte-Carlo returns
    :param next_actions: Whether batches have the actions taken at the next observations
    :param returns: Whether batches have Monte-Carlo returns
    :param offline_sampling: How offline rows are drawn. ``"uniform"``: all alike, or by the weights of the dataset's
        ``sources``. ``"balanced"``: the more often, the more they resemble online rows (see
        :class:`~sb3_offline_ft.buffers.balanced_replay.BalancedReplay`)
    :param balanced_kwargs: Keyword arguments of balanced replay: ``temperature``, ``learning_rate``,
        ``batch_size``, ``net_arch``
    :param augmentation: Random change of sampled observations, a name such as ``"gaussian_noise"`` or an
        :class:`~sb3_offline_ft.buffers.augmentation.Augmentation`; observations and next observations are changed
        independently
    :param unknown: There must not be any others
    :raises ValueError: A parameter is out of range or not supported
    :raises TypeError: There is no such parameter
    """

    _space_class: ClassVar[type[spaces.Space[Any]]] = spaces.Box
    _other_space_hint: ClassVar[str] = "For a Dict space use DictOfflineToOnlineReplayBuffer."
    _sb3_classes: ClassVar[tuple[type[ReplayBuffer], ...]] = (ReplayBuffer, NStepReplayBuffer)
    """SB3's buffers whose content can be taken over."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        offline_fraction: ScheduleLike = 0.5,
        seed: int | None = None,
        *,
        n_steps: int = 1,
        gamma: float = 0.99,
        next_actions: bool = False,
        returns: bool = False,
        offline_sampling: str = "uniform",
        balanced_kwargs: dict[str, Any] | None = None,
        augmentation: str | Augmentation | None = None,
        **unknown: Never,
    ) -> None:
        # Python's own message names neither near matches nor what is known
        known_keywords(type(self), unknown, type(self).__name__)
        if optimize_memory_usage:
            raise ValueError(
                "`optimize_memory_usage=True` cannot represent transitions that end in a time limit, which logged data has; "
                "use `optimize_memory_usage=False` (observations are kept in float32, which saves half of MuJoCo's memory)."
            )
        if not isinstance(observation_space, self._space_class) or not isinstance(action_space, spaces.Box):
            hint = "" if isinstance(observation_space, self._space_class) else f" {self._other_space_hint}"
            raise ValueError(
                f"{type(self).__name__} needs a {self._space_class.__name__} observation space and a Box action space, "
                f"found {observation_space} and {action_space}.{hint}"
            )
        super().__init__(
            buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage, handle_timeout_termination
        )
        space: Any = observation_space
        self.observations = map_observations(_as_float32, self.observations, space)
        self.next_observations = map_observations(_as_float32, self.next_observations, space)
        self._progress_remaining = 1.0
        self._offline_fraction: Schedule = make_schedule(offline_fraction, "offline_fraction", 0.0, 1.0)
        chosen = make_augmentation(augmentation)
        self._augmenter = None if chosen is None else Augmenter(chosen, observation_space)
        balanced_kwargs = {} if balanced_kwargs is None else balanced_kwargs
        self._offline = OfflinePart(make_balanced_replay(offline_sampling, balanced_kwargs, observation_space, self.device))
        self._next_actions = False
        self._returns: RingReturns | None = None
        self.seed_sampler(seed)
        self.n_steps, self.gamma = 1, 1.0
        self.set_n_steps(n_steps, gamma)
        self.require(next_actions, returns)

    # Options

    def set_n_steps(self, n_steps: int, gamma: float) -> None:
        """
        Set the number of steps of the n-step return.

        :param n_steps: The number, at least 1
        :param gamma: Discount factor in [0, 1], for Monte-Carlo returns too
        """
        n_steps = whole_number(n_steps, "n_steps", least=1)
        if not 0 <= gamma <= 1:
            raise ValueError(f"`gamma` must be in [0, 1], found {gamma!r}.")
        self.n_steps, self.gamma = n_steps, float(gamma)
        if self._offline.transitions is not None:
            self._offline.transitions.gamma = self.gamma
        if self._returns is not None:
            self._returns = RingReturns(self, self.gamma)

    def require(self, next_actions: bool = False, returns: bool = False) -> None:
        """
        Put more into the batches from now on; what an earlier call has asked for stays in them.

        :param next_actions: Whether ``next_actions`` and ``has_next_actions`` are needed
        :param returns: Whether ``returns`` and ``has_returns`` are needed
        """
        self._next_actions |= next_actions
        if returns and self._returns is None:
            self._returns = RingReturns(self, self.gamma)

    @property
    def needs_following_rows(self) -> bool:
        """Whether batches depend on which row follows which, so that single rows of the ring cannot be moved or removed."""
        return self.n_steps > 1 or self._next_actions or self._returns is not None

    @property
    def needs_offline_data(self) -> bool:
        """Whether nothing can be sampled before offline data is set, as the augmentation is in units of its spread."""
        return self._augmenter is not None and self._augmenter.needs_offline_data

    @property
    def nbytes_per_row(self) -> int:
        """Size of the observations of one row of a batch in bytes."""
        arrays = [*by_key(self.observations).values(), *by_key(self.next_observations).values()]
        return sum(array[0, 0].nbytes for array in arrays)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model's file may hold a buffer of former versions, by `save(..., include=["replay_buffer"])`
        self.__dict__.update(parts_of_pickled(state) if "_balanced" in state else state)

    # Offline data

    @property
    def offline_data(self) -> OfflineDataset | None:
        """The offline transitions, their observations in the form of the environment's space."""
        return self._offline.dataset

    @property
    def offline_size(self) -> int:
        """Number of offline transitions."""
        return 0 if self.offline_data is None else len(self.offline_data)

    @property
    def online_size(self) -> int:
        """Number of online transitions, over all environments."""
        return self.size() * self.n_envs

    @property
    def offline_fraction(self) -> float:
        """Share of offline rows in a batch, now. May be set to a number, a string or a schedule."""
        return self._offline_fraction(self._progress_remaining)

    @offline_fraction.setter
    def offline_fraction(self, value: ScheduleLike) -> None:
        self._offline_fraction = make_schedule(value, "offline_fraction", 0.0, 1.0)

    def update_progress_remaining(self, progress_remaining: float) -> None:
        """
        Tell the buffer how far the run is, for a scheduled ``offline_fraction``.

        :param progress_remaining: From 1 (start) to 0 (end)
        """
        self._progress_remaining = progress_remaining

    def seed_sampler(self, seed: int | None) -> None:
        """
        Start the random streams anew: those of the offline rows, of the augmentation and of balanced replay.

        :param seed: The seed; None for fresh entropy
        """
        self._offline.seed(seed)
        if self._augmenter is not None:
            self._augmenter.seed(derive_seed(seed, stream=2))

    def set_offline_data(self, dataset: OfflineDataset) -> None:
        """
        Set the offline part. Actions are scaled from the environment's bounds to [-1, 1], as the policy's are.

        :param dataset: The logged data; it is kept by reference, not copied, unless images have to be transposed or
            observations flattened for the environment's space
        :raises ValueError: The dataset's spaces are not the environment's, or its actions are out of bounds
        """
        assert isinstance(self.action_space, spaces.Box)
        self._offline.set(dataset, self.observation_space, self.action_space, self.handle_timeout_termination, self.gamma)
        if self._augmenter is not None and self._offline.dataset is not None:
            self._augmenter.set_offline_data(self._offline.dataset.observations)

    def sampled_rows_by_source(self) -> dict[str, int]:
        """
        :return: How many rows have been sampled from each source of the offline data since it was set
        """
        return dict(zip(self._offline.shares.names, self._offline.rows_by_source.tolist(), strict=True))

    def update_density_ratio(self) -> th.Tensor | None:
        """
        Do one step of the training on which balanced replay's priorities rest, and estimate anew the priorities of the
        offline rows drawn since the last one. To be called once per gradient step of the algorithm.

        :return: A lower bound of the divergence of online from offline rows (see
            :meth:`~sb3_offline_ft.buffers.balanced_replay.BalancedReplay.update`); None if nothing was done, as with uniform
            sampling, and as long as there are no online or no offline rows
        """
        balanced = self._offline.balanced
        if balanced is None or self.offline_data is None or self.size() == 0:
            return None
        return balanced.update(OnlineTransitions(self), self.online_size)

    # Online data

    def add(
        self, obs: Any, next_obs: Any, action: np.ndarray, reward: np.ndarray, done: np.ndarray, infos: list[dict[str, Any]]
    ) -> None:
        """
        Add one transition of each environment.

        :param obs: Observations
        :param next_obs: Observations of the next states, those before a reset where an episode ended
        :param action: Actions, scaled to [-1, 1]
        :param reward: Rewards
        :param done: Whether the episodes ended
        :param infos: Whether they ended by a time limit (``TimeLimit.truncated``)
        """
        slot = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        if self._returns is not None:
            self._returns.row_added(self, slot)

    def reset(self) -> None:
        """Empty the online part."""
        super().reset()
        if self._returns is not None:
            self._returns = RingReturns(self, self.gamma)

    def cut_episodes(self) -> None:
        """
        Say that the transitions added next do not continue the newest ones, such as after the environments were reset in the
        middle of an episode. Nothing is then summed or looked up across this place.
        """
        if self.size() > 0:
            newest = (self.pos - 1) % self.buffer_size
            # A time limit without an end: the value of the next state counts as before, but no row follows
            self.timeouts[newest][self.dones[newest] == 0] = 1.0
        if self._returns is not None:
            self._returns.cut()

    # Sampling

    def split(self, batch_size: int, offline_fraction: float | None = None) -> tuple[int, int]:
        """
        How many rows of a batch come from where.

        :param batch_size: Number of rows
        :param offline_fraction: Share of offline rows, by default the buffer's own
        :return: Number of offline and of online rows
        :raises ValueError: The buffer is empty
        """
        if self.offline_data is None:
            if self.size() == 0:
                raise ValueError("The replay buffer is empty: add transitions or call `set_offline_data` before sampling.")
            return 0, batch_size
        if self.size() == 0:
            return batch_size, 0
        fraction = self.offline_fraction if offline_fraction is None else offline_fraction
        n_offline = round(fraction * batch_size)
        return n_offline, batch_size - n_offline

    def sample(  # type: ignore[override]  # the batch has more fields than SB3's
        self, batch_size: int, env: VecNormalize | None = None, offline_fraction: float | None = None
    ) -> OfflineToOnlineReplayBufferSamples:
        """
        Sample a batch: offline rows first, then online rows.

        :param batch_size: Number of rows
        :param env: VecNormalize whose statistics are applied to observations and rewards of both parts
        :param offline_fraction: Share of offline rows for this batch only, by default the buffer's own
        :return: The batch
        :raises ValueError: The buffer is empty
        """
        return self.sample_batches(1, batch_size, env, offline_fraction)

    def sample_batches(
        self, n_batches: int, batch_size: int, env: VecNormalize | None = None, offline_fraction: float | None = None
    ) -> OfflineToOnlineReplayBufferSamples:
        """
        Sample several batches at once, to the bit those of as many calls of :meth:`sample`: batch ``i`` is rows
        ``i * batch_size`` to ``(i + 1) * batch_size`` of every column.

        :param n_batches: Number of batches
        :param batch_size: Number of rows of a batch
        :param env: VecNormalize whose statistics are applied to observations and rewards of both parts
        :param offline_fraction: Share of offline rows in each of these batches, by default the buffer's own
        :return: The batches one after the other, shapes ``(n_batches * batch_size, ...)``
        :raises ValueError: The buffer is empty, or the augmentation needs offline data and there is none
        """
        n_offline, n_online = self.split(batch_size, offline_fraction)
        offline = self._offline.transitions if n_offline > 0 else None
        columns = BatchColumns.empty(
            (n_batches, batch_size),
            self,
            self.observations if offline is None else offline.observations,
            discounts=self.n_steps > 1,
            next_actions=self._next_actions,
            returns=self._returns is not None,
        )
        if offline is not None:
            columns.is_offline[:, :n_offline] = True
            rows = self._offline.draw((n_batches, n_offline), by_priority=self.size() > 0)
            columns.fill(slice(0, n_offline), offline, rows, self.n_steps, self.gamma, env)
        if n_online > 0:
            rows = draw_ring_rows((n_batches, n_online), self.size(), self.n_envs)
            online = OnlineTransitions(self, self._returns)
            columns.fill(slice(n_offline, None), online, rows, self.n_steps, self.gamma, env)
        if self._augmenter is not None:
            self._augmenter(columns.observations, columns.next_observations)
        return columns.as_samples(env, self.device)

    # Random streams

    def get_sampler_state(self) -> str:
        """
        :return: State of the generators of the offline rows and of the augmentation, as JSON
        """
        state = dict(self._offline.generator.bit_generator.state)
        if self._augmenter is not None:
            state["augmentation"] = self._augmenter.generator.bit_generator.state
        return json.dumps(state)

    def set_sampler_state(self, state: str) -> None:
        """
        Continue the random streams from a saved state. The augmentation's goes on as it is if it has none in it.

        :param state: What :meth:`get_sampler_state` returned
        """
        saved = json.loads(state)
        augmentation = saved.pop("augmentation", None)
        self._offline.generator.bit_generator.state = saved
        if self._augmenter is not None and augmentation is not None:
            self._augmenter.generator.bit_generator.state = augmentation

    def sampler_position(self) -> SamplerPosition:
        """
        :return: What :meth:`rewind` goes back to
        """
        drawn = () if self._offline.balanced is None else self._offline.balanced.drawn
        return SamplerPosition(self.get_sampler_state(), self._offline.rows_by_source.copy(), drawn)

    def rewind(self, position: SamplerPosition) -> None:
        """
        Take back the draws of offline rows since a position, as if they had not been made: the next draws are those again, and
        they are counted once. With balanced replay this holds as long as the priorities have not been updated since.

        :param position: What :meth:`sampler_position` returned, after the offline data was set
        """
        self.set_sampler_state(position.state)
        self._offline.rows_by_source = position.rows_by_source.copy()
        if self._offline.balanced is not None:
            self._offline.balanced.drawn = position.drawn

    # Checkpoints

    def run_state(self) -> dict[str, Any]:
        """What a run in progress keeps here beside the rows of the ring, as plain values and arrays."""
        state = {"progress_remaining": self._progress_remaining, "sampler": self.get_sampler_state()}
        return state | {
            "offline": self._offline.run_state(),
            "returns": None if self._returns is None else self._returns.state_dict(self.size()),
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`run_state` returned, after the offline data was set and with the same rows in the ring."""
        self._progress_remaining = state["progress_remaining"]
        self.set_sampler_state(state["sampler"])
        self._offline.load_run_state(state["offline"])
        if self._returns is not None and state["returns"] is not None:
            self._returns.load_state_dict(state["returns"])

    # Files

    def save_online(self, path: File) -> None:
        """
        Write the online part and the state of the sampler to a file, without pickle. With balanced replay, the network and
        the priorities are in it.

        :param path: The file, written whole or not at all; or a binary stream
        """
        facts = {
            **facts_of(self),
            "buffer_size": self.buffer_size,
            "handle_timeout_termination": self.handle_timeout_termination,
            "pos": self.pos,
            "full": self.full,
            "sampler": self.get_sampler_state(),
        }
        arrays = {name: array[: self.size()] for name, array in ring_columns(self).items()}
        if self._offline.balanced is not None:
            arrays |= {BALANCED_PREFIX + name: array for name, array in self._offline.balanced.get_state().items()}
        write_arrays(path, facts, arrays)

    def load_online(self, path: File) -> None:
        """
        Replace the online part by one written with :meth:`save_online`. The offline part stays.

        If the file holds more rows than fit here, the newest are kept. What is added next does not continue them.

        :param path: The file or binary stream
        :raises ValueError: It is not such a file, or it was written for other spaces, another number of
            environments or of steps, or other offline data; the buffer is then unchanged
        """
        facts, arrays = read_arrays(path)
        check_facts(facts, facts_of(self), str(path))
        with naming_damage(path, KIND):
            columns = {name: arrays[name] for name in ring_columns(self)}
            check_columns(columns, self, str(path))
            place = int(facts["pos"]), bool(facts["full"]), int(facts["buffer_size"])
            sampler = str(facts["sampler"])
        if self._offline.balanced is not None:
            prefix = BALANCED_PREFIX
            state = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
            self._offline.balanced.set_state(state, str(path))
        self.set_sampler_state(sampler)
        self._fill_ring(columns, *place)

    def copy_online(self, other: ReplayBuffer, name: str = "the buffer") -> None:
        """
        Replace the online part by the contents of another buffer, for example one saved by SB3. What is added next does not
        continue them.

        :param other: SB3's ``ReplayBuffer``
        :param name: What it is called in messages
        :raises ValueError: It has other spaces, another number of environments or of steps
        """
        if type(other) not in self._sb3_classes and not isinstance(other, OfflineToOnlineReplayBuffer):
            raise ValueError(f"{name} holds a {type(other).__name__}: expected a {self._sb3_classes[0].__name__}.")
        own = facts_of(self)
        # Ours are float32, whatever the other's are
        check_facts({**facts_of(other), "observation dtype": own["observation dtype"]}, own, name)
        if other.optimize_memory_usage:
            raise ValueError(f"{name} was filled with `optimize_memory_usage=True`: expected False; gather it anew without.")
        columns = {column: array[: other.size()] for column, array in ring_columns(other).items()}
        check_columns(columns, self, name)
        self._fill_ring(columns, other.pos, other.full, other.buffer_size)

    def _fill_ring(self, columns: dict[str, Array], pos: int, full: bool, capacity: int) -> None:
        if capacity != self.buffer_size:
            if full:
                columns = {name: np.roll(values, -pos, axis=0) for name, values in columns.items()}
            columns = {name: values[-self.buffer_size :] for name, values in columns.items()}
            n_rows = len(columns["rewards"])
            pos, full = n_rows % self.buffer_size, n_rows == self.buffer_size
        for name, array in ring_columns(self).items():
            array[: len(columns[name])] = columns[name]
        self.pos, self.full = pos, full
        self.cut_episodes()
        if self._returns is not None:
            self._returns = RingReturns(self, self.gamma)

    def __repr__(self) -> str:
        fraction = self.offline_fraction
        shown = f"{fraction:g}" if math.isfinite(fraction) else "?"
        return f"{type(self).__name__}(offline={self.offline_size}, online={self.online_size}, offline_fraction={shown})"


def _as_float32(ring: Array, space: spaces.Space[Any]) -> Array:
    if ring.dtype == np.uint8 or isinstance(space, spaces.Discrete):
        return ring
    # Fresh zeros rather than a conversion: untouched pages cost no memory
    return np.zeros(ring.shape, np.float32)
