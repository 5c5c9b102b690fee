"""Pretrained learners, each recipe's made once, however many trials and processes ask for it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.collapse import LearnerSnapshot
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.reading import read_json
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.pretrained.recipe import Recipe
from sb3_offline_ft.pretrained.start import Pretrained, Progress, pretrain

FOLDER_VARIABLE = "SB3_OFFLINE_FT_PRETRAINED"
POLL_SECONDS = 0.5
ARGUMENTS = "arguments"
"""Of the learner that was pretrained, in the file beside it."""


def default_folder(log_path: str | Path) -> Path:
    """What the environment variable ``SB3_OFFLINE_FT_PRETRAINED`` says, else ``pretrained`` in the folder of runs."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(log_path) / "pretrained").absolute()


class PretrainedCache:
    """
    Pretrained learners in a folder, found by the digest of their recipe.

    ``<digest>.pt`` is a :class:`LearnerSnapshot`, ``<digest>.json`` says what it was made of, and what the learner was. While
    one process pretrains, others that want the same wait for it; the operating system takes the lock from a process that dies.

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
        self._last: Pretrained | None = None
        self._memory = Lock()

    def path(self, recipe: Recipe) -> Path:
        """Where a recipe's learner is, or would be."""
        return self.folder / f"{recipe.digest}.pt"

    def get(self, recipe: Recipe, env: VecEnv) -> Pretrained:
        """The learner of a recipe: from memory, from the folder, or pretrained now."""
        with self._memory:
            if self._last is None or self._last.recipe.digest != recipe.digest:
                with self.lock(recipe.digest, f"another process that pretrains {recipe}"):
                    self._last = self._read(recipe) or self._make(recipe, env)
            return self._last

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)

    @contextmanager
    def lock(self, name: str, waiting_for: str) -> Iterator[None]:
        """Hold a lock that all processes with this folder respect, and say what is waited for if another one has it."""
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

    def _read(self, recipe: Recipe) -> Pretrained | None:
        path = self.path(recipe)
        if not path.exists():
            return None
        try:
            pretrained = Pretrained(recipe, LearnerSnapshot.load(path), _read_arguments(path.with_suffix(".json")))
        except ValueError as error:
            warn(f"{error} It is pretrained again.")
            return None
        self._say(f"Pretrained learner: {path}")
        return pretrained

    def _make(self, recipe: Recipe, env: VecEnv) -> Pretrained:
        path = self.path(recipe)
        self._say(f"Pretraining {recipe}, once for all that start from it: {path}")
        pretrained = pretrain(recipe, env, self.progress_bar, self.on_progress)
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(recipe.facts | {ARGUMENTS: pretrained.arguments}, indent=2).encode())
        pretrained.snapshot.save(path)
        return pretrained


def _read_arguments(path: Path) -> dict[str, Any]:
    try:
        arguments = read_json(path)[ARGUMENTS]
        return dict(arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say what the pretrained learner beside it was ({error!r}).") from error
