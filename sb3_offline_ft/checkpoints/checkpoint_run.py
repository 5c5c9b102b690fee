"""A callback that keeps a run on the disk, so that it goes on exactly where it was."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self
from weakref import WeakKeyDictionary

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.checkpoints.arguments import saved_arguments
from sb3_offline_ft.checkpoints.callbacks import callbacks_state
from sb3_offline_ft.checkpoints.environments import NoStateError, vec_env_state
from sb3_offline_ft.checkpoints.folder import NAME, CheckpointFolder, has_checkpoint
from sb3_offline_ft.checkpoints.learner import model_state
from sb3_offline_ft.checkpoints.outputs import logger_state
from sb3_offline_ft.checkpoints.ring import check_buffer
from sb3_offline_ft.collapse.learner import is_pretraining
from sb3_offline_ft.collapse.reporting import run_folder
from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.common.checks import known_keywords, whole_number
from sb3_offline_ft.common.warning import warn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WRITTEN: "WeakKeyDictionary[OffPolicyAlgorithm, Path]" = WeakKeyDictionary()
"""Where this process has written checkpoints of a learner."""


class CheckpointRun(BaseCallback):
    """
    Keeps a run on the disk: a run that dies goes on where its newest checkpoint was, to the bit on one machine (see
    :func:`resume`).

    A checkpoint holds the learner with targets, optimizers and all that it keeps, the replay buffer (of which only new rows
    are written), counters, the states of the other callbacks, what the logger has noted, all random generators, and the state
    of the environments where that can be had: of those whose attributes hold numbers and arrays, of MuJoCo, and of those with
    ``get_state`` and ``set_state``. Of others the run goes on at the start of an episode, and one warning says so. The dataset
    is not in it, only its fingerprint. Nothing is pickled.

    It is written between an update and the next step, to a folder of its own that gets its name when the disk has all of it.
    On SIGTERM and SIGINT there is a last one, and then the signal does what it did before. For every off-policy algorithm of
    SB3 and sb3-contrib with SB3's replay buffers or ours, but for ``HerReplayBuffer``; in ``pretrain`` as well.

    :param save_freq: Environment steps (in the pretraining: gradient steps) between two checkpoints
    :param keep: Number of checkpoints to keep
    :param path: The run's folder, in which there will be a folder ``checkpoints``; by default that of the run's
        ``EvalCallback``, the logger or a ``Monitor`` that keeps files
    :param verbose: 1 to tell of each checkpoint
    :raises ValueError: A parameter is out of range
    """

    model: OffPolicyAlgorithm
    keeps_no_state = True
    """What it knows is in the checkpoint itself."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, since Python's own message names neither near matches nor what is known
        known_keywords(cls, kwargs, cls.__name__)
        return super().__new__(cls)

    def __init__(self, save_freq: int = 10_000, keep: int = 2, path: str | Path | None = None, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.save_freq = whole_number(save_freq, "save_freq", least=1)
        self.keep = whole_number(keep, "keep", least=1)
        self.path = None if path is None else Path(path)
        self._is_off = False
        self._default_path: Path | None = None
        self._folder: CheckpointFolder | None = None
        self._before: tuple[bool, int] | None = None
        self._call: dict[str, Any] = {}
        self._has_failed = self._has_told = False
        self._restore: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}
        self._signal: int | None = None

    def use_default_path(self, path: str | Path) -> None:
        """
        Tell the run's folder, as rl-zoo3's runs do.

        :param path: The folder if it was not given another one
        """
        self._default_path = Path(path)

    def go_on(self, folder: CheckpointFolder, call: dict[str, Any], restore: Callable[[], None]) -> None:
        """
        Let the next call of ``learn`` or ``pretrain`` go on with a checkpoint.

        :param folder: Where it is
        :param call: What is known of the call that was interrupted
        :param restore: Called where the checkpoint was written, before anything is done
        """
        self._folder, self._call, self._restore = folder, call, restore

    # When

    def _init_callback(self) -> None:
        if self._restore is not None:
            return
        self._call, self._before, self._signal = {}, None, None
        if not isinstance(self.model, OffPolicyAlgorithm):
            raise ValueError(f"CheckpointRun needs an off-policy algorithm (TD3C, TD3, SAC, TQC, ...), found {self.model}.")
        check_buffer(self.model.replay_buffer)

    def _on_training_start(self) -> None:
        is_offline = is_pretraining(self.model)
        callbacks = self.locals.get("callback") if not is_offline else self.locals["started"]
        self._is_off = _is_in_trial(callbacks)
        if self._is_off:
            return
        if self._restore is None:
            self._begin(callbacks)
            self._call = {
                "total_timesteps": int(self.locals["total_timesteps"]),
                "begun_at": self.model._num_timesteps_at_start,
            }
        self._call["method"] = "pretrain" if is_offline else "learn"
        self._take_signals()

    def on_offline_start(self, callbacks: BaseCallback) -> None:
        """Called between two updates of a pretraining."""
        self._is_off = _is_in_trial(callbacks)
        if self._is_off:
            return
        if not self._call:
            # Of the pretraining within `learn`, before callbacks start
            self._begin(callbacks)
            self._call = {
                "method": "learn",
                "total_timesteps": self.model._total_timesteps,
                "begun_at": self.model._num_timesteps_at_start,
            }
        self._take_signals()
        self._at_boundary(callbacks)

    def _on_rollout_start(self) -> None:
        if not self._is_off:
            self._at_boundary(self.locals["callback"])

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._give_signals_back()
        self._call, self._before = {}, None

    def _begin(self, callbacks: BaseCallback | None) -> None:
        path = self.path or self._default_path or run_folder(callbacks, self.logger, self.training_env)
        if path is None:
            raise ValueError(
                "CheckpointRun does not know where to write: give it the run's folder, `CheckpointRun(path=...)`."
            )
        if has_checkpoint(path) and _WRITTEN.get(self.model) != path.absolute():
            raise ValueError(
                f"{path / NAME} holds checkpoints of another run. To go on with that, use `resume` (of rl-zoo3's runs "
                f"`python -m sb3_offline_ft.zoo.train --resume {path}`); to begin anew, remove the folder or give "
                "another `path`."
            )
        _WRITTEN[self.model] = path.absolute()
        self._folder = CheckpointFolder(path)

    @property
    def _place(self) -> tuple[bool, int]:
        """Whether the learner is pretraining, and how far it is in that, or in the environment."""
        is_offline = is_pretraining(self.model)
        return is_offline, int(getattr(self.model, "offline_steps_done" if is_offline else "num_timesteps"))

    def _at_boundary(self, callbacks: BaseCallback) -> None:
        place = self._place
        if self._restore is not None:
            restore, self._restore = self._restore, None
            restore()
            _WRITTEN[self.model] = self._folder.path.parent.absolute()  # type: ignore[union-attr]
            self._before = place = self._place
        if self._before is None or self._before[0] != place[0]:
            self._before = place
        if self._signal is not None or place[1] - self._before[1] >= self.save_freq:
            self._before = place
            self.write(callbacks)
        if self._signal is not None:
            self._obey(self._signal)

    # What

    def write(self, callbacks: BaseCallback) -> Path | None:
        """
        Write a checkpoint now; only between an update and the next step is it exact.

        :param callbacks: All callbacks of the run
        :return: Its folder; None, with a warning, if the disk does not take it
        """
        assert self._folder is not None
        model = self.model
        assert model.env is not None
        environments = vec_env_state(model.env)
        states, missing = callbacks_state(callbacks)
        self._tell_missing(environments["missing"], missing)
        arguments, not_held = saved_arguments(model)
        facts = {
            "algorithm": [type(model).__module__, type(model).__qualname__],
            "call": self._call,
            "is_pretraining": is_pretraining(model),
            "num_timesteps": int(model.num_timesteps),
            "n_updates": int(model._n_updates),
            "dataset_fingerprint": getattr(model, "dataset_fingerprint", None),
            "not_held": not_held,
            "settings": {"save_freq": self.save_freq, "keep": self.keep},
        }
        try:
            state = {
                "arguments": arguments,
                "model": model_state(model),
                "environments": environments,
                "callbacks": states,
                "logger": logger_state(model.logger),
            }
            cycle = getattr(model, "life_cycle", None)
            steps = getattr(cycle, "environment_steps", None)
            name = f"step_{model.num_timesteps if steps is None else steps}_{model._n_updates}"
            written = self._folder.write(name, facts, state, model.replay_buffer, self.keep)
        except (OSError, NoStateError) as error:
            if not self._has_failed:
                self._has_failed = True
                warn(
                    f"CheckpointRun: a checkpoint cannot be written to {self._folder.path} ({error}); training goes on "
                    "without."
                )
            return None
        self._has_failed = False
        if self.verbose >= 1:
            print(f"CheckpointRun: {written}")
        return written

    def _tell_missing(self, of_environments: list[str], of_callbacks: list[str]) -> None:
        if self._has_told or not (of_environments or of_callbacks):
            return
        self._has_told = True
        if of_environments:
            warn(
                f"CheckpointRun: the state of the environment cannot be had ({', '.join(of_environments)}), so "
                "that a resumed run goes on at the start of an episode. Give the environment `get_state` and `set_state` for "
                "an exact one."
            )
        if of_callbacks:
            warn(
                f"CheckpointRun: what callbacks keep in {', '.join(of_callbacks)} is not in the checkpoints. Give them "
                "`state_dict` and `load_state_dict`."
            )

    # Signals

    def _take_signals(self) -> None:
        # Only there can Python take signals, and only there would they be seen
        is_waiting = self._signal is not None
        if threading.current_thread() is threading.main_thread() and not self._previous and not is_waiting:
            for number in SIGNALS:
                previous: Any = signal.getsignal(number)
                while isinstance(getattr(previous, "__self__", None), CheckpointRun):
                    # Left behind by a run that ended by an error
                    previous = previous.__self__._previous.get(number, signal.SIG_DFL)
                if previous not in (None, signal.SIG_IGN):
                    self._previous[number] = previous
                    signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._give_signals_back()
        if not self._is_training(frame):
            # The run has ended by an error, and nobody would come to the signal
            os.kill(os.getpid(), number)
            return
        self._signal = number

    def _is_training(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name in ("learn", "pretrain") and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        return False

    def _give_signals_back(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _obey(self, number: int) -> None:
        self._signal = None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)


def _is_in_trial(callbacks: BaseCallback | None) -> bool:
    """Whether rl_zoo3's tuner evaluates the run, which begins again when it dies."""
    return any(hasattr(evaluation, "trial") for evaluation in find_callbacks(callbacks, EvalCallback))
