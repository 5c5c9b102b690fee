"""Pretrained learners, each recipe's made once, however many trials and processes ask for it."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse import LearnerSnapshot
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.zoo.recipe import Recipe

FOLDER_VARIABLE = "SB3_OFFLINE_FT_PRETRAINED"
POLL_SECONDS = 0.5
REPORT_STEPS = 500
"""Gradient steps between two reports of a pretraining's progress."""

Progress = Callable[[int, int], None]
"""Is told how many gradient steps have been done, and of how many."""


def default_folder(log_path: str | Path) -> Path:
    """
    Where pretrained learners are kept.

    :param log_path: Folder of the algorithm's runs
    :return: What the environment variable ``SB3_OFFLINE_FT_PRETRAINED`` says, else ``pretrained`` in that folder
    """
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(log_path) / "pretrained").absolute()


def new_learner(recipe: Recipe, env: VecEnv) -> OfflineTD3:
    """
    :param recipe: The recipe
    :param env: An environment with the recipe's spaces
    :return: A learner with the recipe's settings, before its first update
    """
    return recipe.algorithm(
        env=env,
        seed=recipe.seed,
        device=recipe.device,
        dataset=recipe.dataset,
        buffer_size=env.num_envs,
        **recipe.hyperparams,
    )


def pretrain(recipe: Recipe, env: VecEnv, progress_bar: bool = False, on_progress: Progress | None = None) -> LearnerSnapshot:
    """
    Follow a recipe.

    :param recipe: The recipe
    :param env: An environment with the recipe's spaces; it is not acted in
    :param progress_bar: Whether to show a progress bar
    :param on_progress: Is told the progress from time to time
    :return: The pretrained learner
    """
    model = new_learner(recipe, env)
    if on_progress is None:
        model.pretrain(progress_bar=progress_bar)
    else:
        # SB3 makes a folder for each logger, so for each of the many calls below
        model.set_logger(Logger(folder=None, output_formats=[]))
        total = model.remaining_offline_steps
        while model.remaining_offline_steps > 0:
            model.pretrain(min(REPORT_STEPS, model.remaining_offline_steps))
            on_progress(total - model.remaining_offline_steps, total)
    return LearnerSnapshot.take(model)


def start_from(model: OfflineTD3, snapshot: LearnerSnapshot, recipe: Recipe, generators: bool) -> None:
    """
    Put a learner where it would be had it been pretrained itself.

    :param model: A new learner with the recipe's networks
    :param snapshot: The pretrained learner
    :param recipe: Its recipe
    :param generators: Whether random numbers go on as after the pretraining too
    """
    # Noise acts online only, and may be another one than in the pretraining
    noise, model.action_noise = model.action_noise, None
    try:
        snapshot.restore(model, generators)
    finally:
        model.action_noise = noise
    model.offline_steps_done = recipe.offline_steps


class PretrainedCache:
    """
    Pretrained learners in a folder, found by the digest of their recipe.

    ``<digest>.pt`` is a :class:`LearnerSnapshot`, ``<digest>.json`` says what it was made of. While one process pretrains,
    others that want the same wait for it; the operating system takes the lock from a process that dies.

    :param folder: The folder, shared by all processes and machines that shall share the work
    :param progress_bar: Whether to show a progress bar
    :param verbose: Whether to say what is done
    :param on_progress: Is told the progress of a pretraining from time to time
    """

    def __init__(
        self, folder: Path, progress_bar: bool = False, verbose: bool = True, on_progress: Progress | None = None
    ) -> None:
        self.folder = folder
        self.progress_bar = progress_bar
        self.verbose = verbose
        self.on_progress = on_progress
        self._last: tuple[str, LearnerSnapshot] | None = None
        self._memory = Lock()

    def path(self, recipe: Recipe) -> Path:
        """
        :param recipe: A recipe
        :return: Where its learner is, or would be
        """
        return self.folder / f"{recipe.digest}.pt"

    def get(self, recipe: Recipe, env: VecEnv) -> LearnerSnapshot:
        """
        The learner of a recipe: from memory, from the folder, or pretrained now.

        :param recipe: The recipe
        :param env: An environment with the recipe's spaces
        :return: The pretrained learner
        :raises OSError: The folder cannot be used
        """
        with self._memory:
            if self._last is None or self._last[0] != recipe.digest:
                with self.lock(recipe.digest, f"another process that pretrains {recipe}"):
                    self._last = recipe.digest, self._read(recipe) or self._make(recipe, env)
            return self._last[1]

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)

    @contextmanager
    def lock(self, name: str, waiting_for: str) -> Iterator[None]:
        """
        Hold a lock that all processes with this folder respect.

        :param name: Its name
        :param waiting_for: What is waited for if another process has it, to be said then
        :raises OSError: The folder cannot be used
        """
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                self._say(f"Waiting for {waiting_for} ({lock.lock_file})")
                lock.acquire(poll_interval=POLL_SECONDS)
        except OSError as error:
            raise OSError(
                f"The folder of pretrained learners {str(self.folder)!r} cannot be used: {error.strerror or error}. Choose "
                f"another one with `-f <log folder>`, or with the environment variable {FOLDER_VARIABLE}."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _read(self, recipe: Recipe) -> LearnerSnapshot | None:
        path = self.path(recipe)
        if not path.exists():
            return None
        try:
            snapshot = LearnerSnapshot.load(path)
        except ValueError as error:
            warnings.warn(f"{error} It is pretrained again.", stacklevel=2)
            return None
        self._say(f"Pretrained learner: {path}")
        return snapshot

    def _make(self, recipe: Recipe, env: VecEnv) -> LearnerSnapshot:
        path = self.path(recipe)
        self._say(f"Pretraining {recipe}, once for all that start from it: {path}")
        snapshot = pretrain(recipe, env, self.progress_bar, self.on_progress)
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(recipe.facts, indent=2).encode())
        snapshot.save(path)
        return snapshot
