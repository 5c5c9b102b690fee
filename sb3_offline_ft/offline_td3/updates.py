"""How gradient steps are done: drawing batches, choosing the update kernel, rewinding, means for the log."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.update import AutogradKernel, Batch, FastKernel, NotSupportedError, UpdateKernel
from sb3_offline_ft.update.products import UPDATE_PRECISIONS

if TYPE_CHECKING:
    from sb3_offline_ft.offline_td3.learner import OfflineLearner

KERNELS = ("auto", "fast", "autograd")
BATCHES_AT_ONCE = 64
BYTES_AT_ONCE = 2**24
"""Batches drawn at once share their overhead, but large ones, such as those of images, shall not fill the memory."""


class OfflineRandomness:
    """
    The random streams of offline updates, which are saved, so that pretraining resumes to the bit.

    :param generator: That of noise
    :param buffer: The replay buffer, whose sampler of offline rows has others
    """

    def __init__(self, generator: th.Generator, buffer: ReplayBuffer | None) -> None:
        self.generator = generator
        self._buffer = buffer if isinstance(buffer, OfflineToOnlineReplayBuffer) else None

    def seed(self, seed: int | None) -> None:
        """Begin the streams of a seed, or of any."""
        self.generator.manual_seed(derive_seed(seed, stream=1))
        if self._buffer is not None:
            self._buffer.seed_sampler(seed)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        sampler = {} if self._buffer is None else {"offline_sampler": np.array(self._buffer.get_sampler_state())}
        return {"noise_generator": self.generator.get_state().numpy(), **sampler}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on with the streams of a state."""
        # The state of a generator on another kind of device has another size, and its stream cannot go on here
        if "noise_generator" in state and state["noise_generator"].size == self.generator.get_state().numel():
            self.generator.set_state(th.from_numpy(state["noise_generator"].copy()))
        if "offline_sampler" in state and self._buffer is not None:
            self._buffer.set_sampler_state(str(state["offline_sampler"]))


def check_kernel(kernel: str, precision: str) -> None:
    """Check the options by which a kernel is chosen."""
    for name, value, known in (("kernel", kernel, KERNELS), ("update_precision", precision, UPDATE_PRECISIONS)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, found {value!r}.")
    if kernel == "autograd" and precision != "float32":
        raise ValueError("`update_precision='bfloat16'` needs the fast kernel: leave out `kernel='autograd'`.")


class Updater:
    """Does what is the same in all gradient steps; what they are, the learner says."""

    kernel: UpdateKernel
    """The update kernel in use, from the first update on."""

    def __init__(self) -> None:
        self.kernel = None  # type: ignore[assignment]
        self._logged: dict[str, list[th.Tensor | float]] = {}

    # Logging

    def log(self, name: str, value: th.Tensor | float) -> None:
        """Note a value of the current gradient step."""
        # Tensors are kept as they are: reading their values here would stall each gradient step
        self._logged.setdefault(name, []).append(value.detach() if isinstance(value, th.Tensor) else value)

    def pop_means(self) -> dict[str, float]:
        """The means of what has been noted since the last call."""
        means = {name: _mean(values) for name, values in self._logged.items()}
        self._logged.clear()
        return means

    def record(self, buffer: ReplayBuffer | None, logger: Logger) -> None:
        """Give the logger the means of what was noted, and how many rows each source of the data gave."""
        for name, mean in self.pop_means().items():
            logger.record(name, mean)
        rows = buffer.sampled_rows_by_source() if isinstance(buffer, OfflineToOnlineReplayBuffer) else {}
        for number, (name, count) in enumerate(rows.items() if len(rows) > 1 else ()):
            # Numbered, since SB3's logger refuses names whose first 30 characters or so are the same
            logger.record(f"replay/{number}: {name}", count)

    # The kernel

    def check(self, learner: "OfflineLearner") -> None:
        """Say before the first update that the fast kernel cannot be used where it must."""
        if _is_fast_demanded(learner):
            try:
                FastKernel.check(learner.policy)
            except NotSupportedError as error:
                self._fall_back(learner, error)

    def choose_kernel(self, learner: "OfflineLearner") -> UpdateKernel:
        """Choose the kernel for the next updates: the one in use if it still serves."""
        self.kernel = self._chosen(learner)
        return self.kernel

    def _chosen(self, learner: "OfflineLearner") -> UpdateKernel:
        policy, precision = learner.policy, learner.update_precision
        kernel = self.kernel if self.kernel is not None and self.kernel.policy is policy else None
        if learner.kernel == "autograd":
            return kernel if isinstance(kernel, AutogradKernel) else AutogradKernel(policy)
        try:
            if not isinstance(kernel, FastKernel) or not kernel.is_current or kernel.precision != precision:
                kernel = FastKernel(policy, precision)
            kernel.prepare()
        except NotSupportedError as error:
            return self._fall_back(learner, error)
        if learner.verbose >= 1 and not isinstance(self.kernel, FastKernel):
            print(f"Update kernel: fast ({kernel.products.name})")
        return kernel

    def _fall_back(self, learner: "OfflineLearner", error: NotSupportedError) -> UpdateKernel:
        if _is_fast_demanded(learner):
            precision = f"update_precision={learner.update_precision!r}"
            option = "kernel='fast'" if learner.kernel == "fast" else precision
            raise ValueError(f"`{option}` cannot be used: {error}. Change that, or leave the option out.") from error
        if isinstance(self.kernel, AutogradKernel) and self.kernel.policy is learner.policy:
            return self.kernel
        if error.surprising:
            warn(f"Updates are done by autograd, which is slower, since {error}.")
        elif learner.verbose >= 1:
            print(f"Update kernel: autograd, since {error}")
        return AutogradKernel(learner.policy)

    # Batches

    def draw_batch(self, learner: "OfflineLearner", batch_size: int) -> Batch:
        """Draw a batch as for the next update, and make it the one that the kernel works on."""
        kernel = self.choose_kernel(learner)
        ((rows, n_rows),) = _draw_rows(learner, 1, batch_size)
        return next(kernel.batches(rows, n_rows))

    def run(self, learner: "OfflineLearner", gradient_steps: int, batch_size: int, update: Callable[[Batch], None]) -> None:
        """Do gradient steps with the kernel that was chosen, each by ``update``, which counts it first."""
        buffer, at_once = learner.replay_buffer, BATCHES_AT_ONCE
        ours = buffer if isinstance(buffer, OfflineToOnlineReplayBuffer) else None
        if ours is not None:
            at_once = max(1, min(at_once, BYTES_AT_ONCE // max(ours.nbytes_per_row * batch_size, 1)))
        for start in range(0, gradient_steps, at_once):
            n_batches, n_before = min(at_once, gradient_steps - start), learner._n_updates
            position = ours.sampler_position() if ours is not None and learner.life_cycle.is_pretraining else None
            try:
                for rows, n_rows in _draw_rows(learner, n_batches, batch_size):
                    for batch in self.kernel.batches(rows, n_rows):
                        update(batch)
            except BaseException:
                n_used = learner._n_updates - n_before
                if ours is not None and position is not None and n_used < n_batches:
                    # Batches that have been drawn and not been used are drawn again when pretraining goes on
                    ours.rewind(position)
                    for _ in _draw_rows(learner, n_used, batch_size) if n_used > 0 else ():
                        pass
                raise


def _is_fast_demanded(learner: "OfflineLearner") -> bool:
    return learner.kernel == "fast" or learner.update_precision != "float32"


def _draw_rows(learner: "OfflineLearner", n_batches: int, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Batches, one behind the other in as few pieces as the buffer allows, and the number of rows of each."""
    buffer, env = learner.replay_buffer, learner.get_vec_normalize_env()
    fraction = 1.0 if learner.life_cycle.is_pretraining else None
    assert buffer is not None
    if not isinstance(buffer, OfflineToOnlineReplayBuffer):
        for _ in range(n_batches):
            rows = buffer.sample(batch_size, env=env)
            yield rows, len(rows.actions)
    elif getattr(buffer.sample, "__func__", None) is OfflineToOnlineReplayBuffer.sample:
        yield buffer.sample_batches(n_batches, batch_size, env, fraction), batch_size
    else:
        # Somebody chooses rows in another way, perhaps by what was learned from the last ones
        for _ in range(n_batches):
            chosen = buffer.sample(batch_size, env, fraction)
            yield chosen, len(chosen.actions)


def _mean(values: list[th.Tensor | float]) -> float:
    if len(values) == 1:
        return float(values[0])
    return float(th.stack([th.as_tensor(value, dtype=th.float64) for value in values]).mean())
