"""Helpers for callbacks and progress bars."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common import callbacks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

STEP_NAMES = frozenset(
    "actions buffer_actions clipped_actions new_obs rewards dones infos num_collected_steps num_collected_episodes".split()
)
"""What SB3 tells callbacks about the environment's last step."""
NO_EPISODES = (
    "there are no episodes in `pretrain`, which takes no step in the environment and works on logged transitions only. Pass "
    "the callback to `learn`; the length of the pretraining is given by `gradient_steps`."
)

CallbackType = TypeVar("CallbackType", bound=BaseCallback)


def as_list(callback: MaybeCallback) -> list[BaseCallback]:
    """A new list of the callbacks of whatever ``learn`` accepts."""
    if callback is None:
        return []
    if isinstance(callback, list):
        return list(callback)
    return [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]


def find_callbacks(callback: BaseCallback | None, kind: type[CallbackType]) -> Iterator[CallbackType]:
    """Find the callbacks of a kind, in lists and as children of others; outer ones first."""
    if callback is None:
        return
    if isinstance(callback, kind):
        yield callback
    for child in getattr(callback, "callbacks", []):
        yield from find_callbacks(child, kind)
    if isinstance(callback, EventCallback):
        yield from find_callbacks(callback.callback, kind)


def callbacks_with(callback: BaseCallback | None, attribute: str) -> Iterator[BaseCallback]:
    """Find the callbacks that have an attribute which is not false, as those of other packages may."""
    for found in find_callbacks(callback, BaseCallback):  # type: ignore[type-abstract]
        if getattr(found, attribute, False):
            yield found


def monitor_folder(env: VecEnv) -> Path | None:
    """
    :param env: Environments
    :return: Where their episodes are written, as rl_zoo3 has them written to a run's folder; None if they are not, or in other
        processes
    """
    for each in getattr(env.unwrapped, "envs", ()):
        monitor = unwrap_wrapper(each, Monitor)
        if isinstance(monitor, Monitor) and monitor.results_writer is not None:
            return Path(monitor.results_writer.file_handler.name).parent
    return None


class NoEpisodesError(ValueError, KeyError):
    """A callback asks for the environment's steps while there are none."""

    def __str__(self) -> str:
        # A KeyError shows its message in quotes
        return str(self.args[0])


class PretrainingLocals(dict[str, Any]):
    """What callbacks read as ``locals`` while pretraining: whatever they ask of the environment's steps is an error."""

    def __missing__(self, name: str) -> Any:
        raise NoEpisodesError(f"A callback reads `locals[{name!r}]`, but {NO_EPISODES}")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name in STEP_NAMES and self.__missing__(str(name)))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


@contextmanager
def telling_of_episodes() -> Iterator[None]:
    """
    For a callback that keeps ``locals`` as a dictionary of its own.

    :raises NoEpisodesError: The block asks for what only steps of the environment have
    """
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        if isinstance(error, NoEpisodesError) or name not in STEP_NAMES:
            raise
        raise NoEpisodesError(f"A callback reads {name!r}, but {NO_EPISODES}") from error


def check_needs_no_episodes(callback: MaybeCallback) -> None:
    """Raise :class:`NoEpisodesError` if a callback that ``pretrain`` was given counts episodes."""
    for given in as_list(callback):
        for found in find_callbacks(given, StopTrainingOnMaxEpisodes) if isinstance(given, BaseCallback) else ():
            raise NoEpisodesError(f"{type(found).__name__} counts episodes, but {NO_EPISODES}")


class InitialEvaluation(BaseCallback):
    """
    Lets every ``EvalCallback`` evaluate a pretrained policy before its first step.

    SB3 evaluates after ``eval_freq`` calls at the earliest, but the start is what everything is compared with.
    """

    keeps_no_state = True

    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[EvalCallback] = []
        self._go_on = True

    def _on_training_start(self) -> None:
        for evaluation in self.evaluations:
            n_calls, evaluation.n_calls = evaluation.n_calls, 0
            self._go_on &= evaluation._on_step()
            evaluation.n_calls = n_calls

    def _on_step(self) -> bool:
        # A callback asked to stop: the first opportunity that SB3 gives
        return self._go_on


class BestEvaluation:
    """The best mean reward that the EvalCallbacks of a run have found."""

    def __init__(self) -> None:
        self.mean_reward = -math.inf
        self.follow(None)

    def follow(self, callback: BaseCallback | None) -> None:
        """Look at the callbacks of the present call of ``learn``, or at none."""
        self.callbacks = list(find_callbacks(callback, EvalCallback))
        self.has_judge = any(True for _ in callbacks_with(callback, "moves_reference"))
        """Whether another callback says which policy is good, and makes it the reference of a learner that has one."""

    @property
    def _best(self) -> float:
        return max((callback.best_mean_reward for callback in self.callbacks), default=-math.inf)

    def begin_run(self) -> None:
        """What has been found before is the best of the run so far."""
        self.mean_reward = self._best

    def has_new(self, learner: BaseAlgorithm) -> bool:
        """Whether a learner has been found better since the last call than whatever was evaluated before."""
        # A callback may have another policy evaluated than the learner's
        own = (callback.best_mean_reward for callback in self.callbacks if callback.model is learner)
        has_new = max(own, default=-math.inf) > self.mean_reward
        self.mean_reward = max(self.mean_reward, self._best)
        return has_new

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        return {"best_mean_reward": np.array(self.mean_reward)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state; what has been found since then was another policy's."""
        if "best_mean_reward" in state:
            self.mean_reward = max(self.mean_reward, float(state["best_mean_reward"]), self._best)


def progress_bar(total: int, description: str) -> Any:
    """
    A progress bar that looks like SB3's own.

    :raises ImportError: tqdm or rich is missing
    """
    # SB3 chooses tqdm.rich and silences its warning there
    tqdm = getattr(callbacks, "tqdm", None)
    if tqdm is None:
        raise ImportError("A progress bar needs tqdm and rich: `pip install tqdm rich`.")
    return tqdm(total=total, desc=description)
