"""A replay buffer with an immutable offline part and SB3's ring for what is gathered online."""

import json
import math
import os
import zipfile
import zlib
from contextlib import nullcontext
from typing import IO, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples, Schedule, ScheduleLike
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, scale_actions

RING_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class OfflineToOnlineReplayBuffer(ReplayBuffer):
    """
    Replay buffer for offline pretraining and online finetuning.

    The offline part is immutable, has its own index space and its own random generator; the online part is SB3's ring.
    A batch holds exactly ``round(offline_fraction * batch_size)`` offline rows, or offline rows only as long as
    nothing has been gathered online. Without offline data it draws the same batches as SB3's ``ReplayBuffer``.

    Observations are kept and returned as float32, whatever the space says (but for uint8): networks compute in
    float32, and MuJoCo's float64 would double the memory.

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
    :param seed: Seed of the offline part's own generator
    :raises ValueError: A parameter is out of range or not supported
    """

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
    ) -> None:
        if optimize_memory_usage:
            raise ValueError(
                "`optimize_memory_usage=True` cannot represent transitions that end in a time limit, which logged data has; "
                "use `optimize_memory_usage=False` (observations are kept in float32, which saves half of MuJoCo's memory)."
            )
        if not isinstance(observation_space, spaces.Box) or not isinstance(action_space, spaces.Box):
            raise ValueError(
                "OfflineToOnlineReplayBuffer needs a Box observation space and a Box action space, "
                f"found {observation_space} and {action_space}."
            )
        super().__init__(
            buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage, handle_timeout_termination
        )
        if self.observations.dtype != np.uint8:
            # Fresh zeros rather than a conversion: untouched pages cost no memory
            self.observations = np.zeros(self.observations.shape, np.float32)
            self.next_observations = np.zeros(self.next_observations.shape, np.float32)
        self.offline_data: OfflineDataset | None = None
        self._offline_actions = np.empty((0, self.action_dim), np.float32)
        self.seed_sampler(seed)
        self._progress_remaining = 1.0
        self._offline_fraction: Schedule = make_schedule(offline_fraction, "offline_fraction", 0.0, 1.0)

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
        Start the offline part's random stream anew.

        :param seed: The seed; None for fresh entropy
        """
        self._offline_generator = np.random.default_rng(derive_seed(seed, stream=0))

    def set_offline_data(self, dataset: OfflineDataset) -> None:
        """
        Set the offline part. Actions are scaled from the environment's bounds to [-1, 1], as the policy's are.

        :param dataset: The logged data; it is kept by reference, not copied
        :raises ValueError: The dataset's spaces are not the environment's, or its actions are out of bounds
        """
        assert isinstance(self.action_space, spaces.Box)
        check_compatible(dataset, self.observation_space, self.action_space)
        actions = scale_actions(dataset.actions, self.action_space)
        self._offline_actions = actions.reshape(len(dataset), self.action_dim)
        self.offline_data = dataset

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

    def sample(  # type: ignore[override]  # the batch has one more field than SB3's
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
        :raises ValueError: The buffer is empty
        """
        n_offline, n_online = self.split(batch_size, offline_fraction)
        dtype = np.float32 if n_offline > 0 else self.observations.dtype
        observations = np.empty((n_batches, batch_size, *self.obs_shape), dtype)
        next_observations = np.empty_like(observations)
        actions = np.empty((n_batches, batch_size, self.action_dim), self.actions.dtype)
        dones = np.empty((n_batches, batch_size), np.float32)
        rewards = np.empty_like(dones)
        is_offline = np.zeros((n_batches, batch_size), dtype=bool)
        if n_offline > 0:
            data = self.offline_data
            assert data is not None
            rows = self._offline_generator.integers(0, len(data), size=n_batches * n_offline)
            rows = rows.reshape(n_batches, n_offline)
            _gather(data.observations, rows, observations[:, :n_offline])
            _gather(data.next_observations, rows, next_observations[:, :n_offline])
            _gather(self._offline_actions, rows, actions[:, :n_offline])
            _gather(data.rewards, rows, rewards[:, :n_offline])
            ended = data.terminations.take(rows)
            if not self.handle_timeout_termination:
                ended |= data.truncations.take(rows)
            dones[:, :n_offline] = ended
            is_offline[:, :n_offline] = True
        if n_online > 0:
            rows = self._draw_online_rows(n_batches, n_online)
            n_slots = self.buffer_size * self.n_envs
            _gather(self.observations.reshape(n_slots, *self.obs_shape), rows, observations[:, n_offline:])
            _gather(self.next_observations.reshape(n_slots, *self.obs_shape), rows, next_observations[:, n_offline:])
            _gather(self.actions.reshape(n_slots, self.action_dim), rows, actions[:, n_offline:])
            _gather(self.rewards.reshape(n_slots), rows, rewards[:, n_offline:])
            dones[:, n_offline:] = self.dones.reshape(n_slots).take(rows) * (1 - self.timeouts.reshape(n_slots).take(rows))
        n_rows = n_batches * batch_size
        observations = observations.reshape(n_rows, *self.obs_shape)
        next_observations = next_observations.reshape(n_rows, *self.obs_shape)
        return OfflineToOnlineReplayBufferSamples(
            observations=self._to_tensor(np.asarray(self._normalize_obs(observations, env))),
            actions=self._to_tensor(actions.reshape(n_rows, self.action_dim)),
            next_observations=self._to_tensor(np.asarray(self._normalize_obs(next_observations, env))),
            dones=self._to_tensor(dones.reshape(n_rows, 1)),
            rewards=self._to_tensor(self._normalize_reward(rewards.reshape(n_rows, 1), env)),
            discounts=None,
            is_offline=self._to_tensor(is_offline.reshape(n_rows, 1)),
        )

    def _to_tensor(self, array: np.ndarray) -> th.Tensor:
        """
        Make a tensor of a fresh array, whose memory it may share.

        :param array: Any shape
        :return: The same shape, on the buffer's device
        """
        # SB3's `to_torch` calls `th.as_tensor`, which takes three times as long
        tensor = th.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def _draw_online_rows(self, n_batches: int, n_online: int) -> np.ndarray:
        """
        Draw with the calls of SB3's ``ReplayBuffer``, hence the same rows for the same seed.

        :param n_batches: Number of batches
        :param n_online: Number of online rows in each
        :return: Indices into the flattened ring, shape ``(n_batches, n_online)``
        """
        if self.n_envs == 1:
            # SB3's draw of the environment takes nothing from the stream
            return np.random.randint(0, self.size(), size=(n_batches, n_online))
        rows = np.empty((n_batches, n_online), np.intp)
        for batch in rows:
            np.multiply(np.random.randint(0, self.size(), size=n_online), self.n_envs, out=batch)
            batch += np.random.randint(0, high=self.n_envs, size=n_online)
        return rows

    def get_sampler_state(self) -> str:
        """
        :return: State of the offline part's generator, as JSON
        """
        return json.dumps(self._offline_generator.bit_generator.state)

    def set_sampler_state(self, state: str) -> None:
        """
        Continue the offline part's random stream from a saved state.

        :param state: What :meth:`get_sampler_state` returned
        """
        self._offline_generator.bit_generator.state = json.loads(state)

    def _signature(self) -> dict[str, Any]:
        assert isinstance(self.action_space, spaces.Box)
        return {
            "observation shape": list(self.obs_shape),
            "observation dtype": str(self.observations.dtype),
            "action shape": list(self.action_space.shape),
            "action bounds": [self.action_space.low.ravel().tolist(), self.action_space.high.ravel().tolist()],
            "n_envs": self.n_envs,
            "n_steps": 1,
        }

    def save_online(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """
        Write the online part and the state of the sampler to a file, without pickle.

        :param path: The file, written whole or not at all; or a binary stream
        """
        size = self.size()
        facts = {
            **self._signature(),
            "buffer_size": self.buffer_size,
            "pos": self.pos,
            "full": self.full,
            "sampler": self.get_sampler_state(),
        }
        columns = {name: getattr(self, name)[:size] for name in RING_COLUMNS}
        with atomic_write(path) if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **columns)

    def load_online(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """
        Replace the online part by one written with :meth:`save_online`. The offline part stays.

        If the file holds more rows than fit here, the newest are kept.

        :param path: The file or binary stream
        :raises ValueError: It is not such a file, or it was written for other spaces, another number of
            environments or another number of steps; the buffer is then unchanged
        """
        try:
            # Opened here, since NumPy leaves a damaged file open
            stream = open(path, "rb") if isinstance(path, str | os.PathLike) else nullcontext(path)
            with stream as opened, np.load(opened, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                columns = {name: file[name] for name in RING_COLUMNS}
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged or not a replay buffer saved by `save_replay_buffer` ({type(error).__name__}: {error})."
            ) from error
        self._check_signature({name: facts.get(name) for name in self._signature()}, str(path))
        self._fill(columns, int(facts["pos"]), bool(facts["full"]), int(facts["buffer_size"]))
        self.set_sampler_state(facts["sampler"])

    def copy_online(self, other: ReplayBuffer, name: str = "the buffer") -> None:
        """
        Replace the online part by the contents of another buffer, for example one saved by SB3.

        :param other: SB3's ``ReplayBuffer``
        :param name: What it is called in messages
        :raises ValueError: It has other spaces or another number of environments
        """
        if type(other) is not ReplayBuffer and not isinstance(other, OfflineToOnlineReplayBuffer):
            raise ValueError(f"{name} holds a {type(other).__name__}: expected a ReplayBuffer.")
        assert isinstance(other.action_space, spaces.Box) and isinstance(self.action_space, spaces.Box)
        found = {
            **self._signature(),
            "observation shape": list(other.obs_shape),
            "action shape": list(other.action_space.shape),
            "action bounds": [other.action_space.low.ravel().tolist(), other.action_space.high.ravel().tolist()],
            "n_envs": other.n_envs,
        }
        self._check_signature(found, name)
        if other.optimize_memory_usage:
            raise ValueError(f"{name} was filled with `optimize_memory_usage=True`: expected False; gather it anew without.")
        columns = {column: getattr(other, column)[: other.size()] for column in RING_COLUMNS}
        self._fill(columns, other.pos, other.full, other.buffer_size)

    def _check_signature(self, found: dict[str, Any], name: str) -> None:
        for key, expected in self._signature().items():
            same = found[key] == expected
            if key == "action bounds":
                same = np.shape(found[key]) == np.shape(expected) and np.allclose(found[key], expected)
            if not same:
                raise ValueError(
                    f"{name} was saved with {key} {found[key]}, this learner has {expected}: "
                    "load it into a learner with the same environment and number of environments."
                )

    def _fill(self, columns: dict[str, np.ndarray], pos: int, full: bool, capacity: int) -> None:
        if capacity != self.buffer_size:
            if full:
                columns = {name: np.roll(values, -pos, axis=0) for name, values in columns.items()}
            columns = {name: values[-self.buffer_size :] for name, values in columns.items()}
            n_rows = len(columns["rewards"])
            pos, full = n_rows % self.buffer_size, n_rows == self.buffer_size
        for name, values in columns.items():
            getattr(self, name)[: len(values)] = values
        self.pos, self.full = pos, full

    def __repr__(self) -> str:
        fraction = self.offline_fraction
        shown = f"{fraction:g}" if math.isfinite(fraction) else "?"
        return f"{type(self).__name__}(offline={self.offline_size}, online={self.online_size}, offline_fraction={shown})"


def _gather(column: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """
    Copy rows of a column.

    :param column: Shape ``(n_rows, ...)``
    :param rows: Valid indices, shape ``(n_batches, batch)``
    :param out: Where to, shape ``(n_batches, batch, ...)``
    """
    # mode="clip" spares the check of the indices, and the temporary copy of `out` that it needs
    if out.flags.c_contiguous and out.dtype == column.dtype:
        column.take(rows, axis=0, out=out, mode="clip")
    else:
        np.copyto(out, column.take(rows, axis=0, mode="clip"))
