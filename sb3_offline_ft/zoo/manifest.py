"""``manifest.json`` of a run of rl-zoo3: how it was started, with what, and what became of it, read off live objects."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_normalize

from sb3_offline_ft.algorithms import preset_path
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.common.live import as_json, buffer_facts, live_arguments
from sb3_offline_ft.common.machine import PACKAGES, machine_facts
from sb3_offline_ft.common.reading import MOST_JSON, parse_json, read_bytes
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX, NOISE
from sb3_offline_ft.common.warning import warn
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.datasets.files.zoo import LEARNER_STATISTICS
from sb3_offline_ft.deployment.champion_challenger import STATISTICS
from sb3_offline_ft.tuning.storage import SECRETS, without_password
from sb3_offline_ft.zoo.command_line import last_value
from sb3_offline_ft.zoo.trace import RunTrace

MANIFEST = "manifest.json"
FORMAT = 1
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "ATEN_CPU_CAPABILITY")
"""Environment variables that rounding, or the order of things, may depend on."""
COMMAND_LINE, AGENT, DEFAULT = "command line", "the agent that was loaded (-i)", "default of the algorithm"
CHANGED = ", changed when the training began"
OPTIONS = {
    "seed": ("--seed",),
    "device": ("--device",),
    "verbose": ("--verbose",),
    "tensorboard_log": ("-tb", "--tensorboard-log"),
}
"""Arguments of constructors that are options of rl_zoo3's command, not hyperparameters."""
REPLAY_BUFFER = "replay_buffer.pkl"


class RunRecord:
    """
    The manifest of a run in progress.

    :param manager: rl_zoo3's manager, when the learner has been made
    :param model: The learner, before its first update
    :param sources: What set each hyperparameter of the configuration, by name
    """

    def __init__(self, manager: Any, model: BaseAlgorithm, sources: Mapping[str, str]) -> None:
        self.folder = Path(manager.save_path)
        self.trace = RunTrace(self.folder, lambda: self._begin_training(model))
        self._clock = time.monotonic()
        self._arguments = live_arguments(model)
        self._updates = _updates(model)
        if (self.folder / MANIFEST).is_file():
            # Only the folder of a run that goes on has one
            note_resume(self.folder)
            self.content = read_manifest(self.folder)
        else:
            self.content = _begun(manager, model, self._arguments, sources)
            self._write()

    @contextmanager
    def training(self, model: BaseAlgorithm, callbacks: list[BaseCallback], n_timesteps: int) -> Iterator[None]:
        """While a run trains, keep its trace; afterwards say what became of it."""
        self.trace.begin(model)
        callbacks.append(self.trace)
        try:
            yield
        except BaseException as error:
            self.trace.note_end()
            self._end(model, FAILED, f"{type(error).__name__}: {error}")
            raise
        else:
            self._end(model, FINISHED if model.num_timesteps >= n_timesteps else STOPPED)
        finally:
            callbacks.remove(self.trace)

    def saved(self, model_file: Path) -> None:
        """The model has been saved."""
        if model_file.is_file():
            self._write(files={model_file.name: file_digest(model_file)})

    def _begin_training(self, model: BaseAlgorithm) -> None:
        if _updates(model) == self._updates:
            # Others may have changed it since it was made
            now = live_arguments(model)
            for name in now.keys() & self.content["hyperparameters"].keys():
                if now[name] != self._arguments[name]:
                    fact = self.content["hyperparameters"][name]
                    source = fact["source"].removesuffix(CHANGED) + CHANGED
                    self.content["hyperparameters"][name] = (
                        {"given": fact["value"]} | fact | {"value": now[name], "source": source}
                    )
            self._arguments = now
        self._write(dataset=_dataset(model))

    def _end(self, model: BaseAlgorithm, state: str, error: str | None = None) -> None:
        now = live_arguments(model)
        self._write(
            state=state,
            error=error,
            # What the run itself made of its arguments, as remedies do
            changed_hyperparameters={name: value for name, value in now.items() if value != self._arguments.get(name)},
            replay_buffer=buffer_facts(model),
            timesteps=model.num_timesteps,
            updates=_updates(model),
            warmup_end=getattr(model, "first_warmup_end", 0),
            finished=_now(),
            seconds=round(time.monotonic() - self._clock, 1),
        )

    def _write(self, **facts: Any) -> None:
        self.content |= facts
        try:
            write_manifest(self.folder, self.content)
        except OSError as error:
            # As with events: a disk that fails stops no training
            warn(f"{self.folder / MANIFEST} cannot be written ({error}). The training goes on.", RuntimeWarning)


def _updates(model: BaseAlgorithm) -> int:
    return int(getattr(model, "_n_updates", 0))


def _begun(manager: Any, model: BaseAlgorithm, arguments: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a run that begins."""
    return {
        "format": FORMAT,
        "state": RUNNING,
        **_command(),
        "algorithm": manager.algo,
        "environment": str(manager.env_name.gym_id),
        "seed": manager.seed,
        "n_timesteps": manager.n_timesteps,
        "dataset": None,
        "agent": _agent(manager),
        "hyperparameters": _hyperparameters(manager, model, arguments, sources),
        "environments": _environments(model.get_env()),
        "callbacks": [_callback(callback) for callback in manager.callbacks],
        "device": str(model.device),
        "gpu": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "threads": th.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **machine_facts(("rl_zoo3", *PACKAGES)),
        "git": _checkout(),
        "started": _now(),
        "resumed": [],
    }


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a run's manifest, whole or not at all."""
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(json_form(content), indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    :param folder: A run's folder
    :return: Its manifest
    :raises FileNotFoundError: It has none
    :raises ValueError: It is damaged, of a later version, or that of another run
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: expected the folder of a run of rl_zoo3 that this package recorded, such as "
            "logs/td3c/Hopper-v5_1. Runs of earlier versions have none."
        )
    with naming_damage(path, "the manifest of a run"):
        content = parse_json(read_bytes(path, MOST_JSON), str(path))
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("expected facts by name with a `format`")
        if content["format"] > FORMAT:
            raise ValueError(
                f"its format is {content['format']}, and this version reads up to {FORMAT}: update sb3-offline-ft"
            )
        for name, kind in _NEEDED.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"`{name}` must be {_KINDS[kind]}, found {content.get(name)!r:.60}")
        _check_texts(content)
    for name, digest in content.get("files", {}).items():
        file = folder / Path(name).name
        if file.is_file() and file_digest(file) != digest:
            raise ValueError(
                f"{path} is that of another run: {file.name} beside it is not the model that it tells of (its SHA-256 "
                "differs). Put the files of one run together again."
            )
    return cast(dict[str, Any], content)


_NEEDED: dict[str, type] = {
    "state": str, "module": str, "arguments": list, "working_folder": str, "algorithm": str, "environment": str, "seed": int,
    "n_timesteps": int, "threads": int, "variables": dict, "versions": dict, "hyperparameters": dict,
}  # fmt: skip
_KINDS = {str: "a text", list: "a list", int: "a whole number", dict: "a mapping"}


def _check_texts(content: Mapping[str, Any]) -> None:
    texts = [*content["arguments"], *content["variables"].values(), *content["versions"].values()]
    files = content.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in [*texts, *files.values()]):
        raise ValueError("`arguments`, `variables`, `versions` and `files` must hold texts")
    facts = [content.get(name) or {} for name in ("dataset", "agent", "git")]
    settings = content["hyperparameters"].values()
    if not all(isinstance(fact, dict) for fact in (*facts, *settings)) or not all(
        {"value", "source"} <= fact.keys() for fact in settings
    ):
        raise ValueError(
            "`dataset`, `agent` and `git` must be mappings, and each of `hyperparameters` one with value and source"
        )


def note_resume(folder: Path) -> None:
    """A run goes on: add when, and with what, to its manifest, if it has one."""
    if (folder / MANIFEST).is_file():
        content = read_manifest(folder)
        facts = {"at": _now(), "command": _command()["command"], **machine_facts(("rl_zoo3", *PACKAGES))}
        # No digest of a model that is written anew: who is killed in between could not be resumed again
        write_manifest(folder, content | {"state": RUNNING, "files": {}, "resumed": [*content.get("resumed", []), facts]})


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_source(algo: str, config: str) -> str:
    """What a file of hyperparameters is, in words."""
    path = Path(config)
    try:
        if config == preset_path(algo):
            return f"preset ({path.name})"
    except ValueError:
        pass
    return f"rl-zoo3's {path.name}" if path.parts[-3:-1] == ("rl_zoo3", "hyperparams") else f"-conf {shlex.quote(config)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command() -> dict[str, Any]:
    """How this process was started; ``module`` is that of ``python -m``, or the script."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return {
        "command": [_without_password(word) for word in sys.orig_argv],
        "module": spec.name if spec is not None else sys.argv[0],
        "arguments": [_without_password(word) for word in sys.argv[1:]],
        "working_folder": os.getcwd(),
    }


def _without_password(word: str) -> str:
    url = re.search(r"[A-Za-z][\w+.-]*://.*", word, re.DOTALL)
    if url is None or not any(text in word.lower() for text in ("@", *SECRETS)):
        return word
    return word[: url.start()] + without_password(url[0])


def _checkout() -> dict[str, Any] | None:
    """The commit of the working folder, and whether files differ from it; None if it is no checkout."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return {"commit": commit, "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout


def _agent(manager: Any) -> dict[str, Any] | None:
    """The agent that the run goes on from, with the files that rl_zoo3 loads beside it."""
    if not manager.continue_training:
        return None
    agent = Path(manager.trained_agent)
    beside = agent.parent / manager.env_name
    files = [agent, agent.with_name(REPLAY_BUFFER), beside / STATISTICS, beside / LEARNER_STATISTICS]
    return {"path": str(agent), "files": {path.name: file_digest(path) for path in files if path.is_file()}}


def _dataset(model: BaseAlgorithm) -> dict[str, Any] | None:
    """The data that a learner has, or would have loaded."""
    dataset = getattr(model, "offline_dataset", None)
    if not isinstance(dataset, OfflineDataset):
        return None
    return {
        "spec": dataset.spec,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "transitions": len(dataset),
        "episodes": dataset.n_episodes,
        "mean_return": float(dataset.episode_returns.mean()),
    }


def _environments(env: VecEnv | None) -> dict[str, Any]:
    assert env is not None
    wrappers: list[str] = []
    inner: Any = env
    while isinstance(inner, VecEnvWrapper):
        wrappers.append(type(inner).__name__)
        inner = inner.venv
    normalize = unwrap_vec_normalize(env)
    first = getattr(inner, "envs", [None])[0]
    return {
        "n_envs": env.num_envs,
        "vec_env": type(inner).__name__,
        "vec_env_wrappers": wrappers,
        # In other processes they are not seen
        "environment": None if first is None else str(first),
        "normalization": None if normalize is None else _normalization(normalize),
    }


def _normalization(env: VecNormalize) -> dict[str, Any]:
    return {name: as_json(getattr(env, name)) for name in ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma")}


def _callback(callback: BaseCallback) -> dict[str, Any]:
    """A callback's class, and the settings that it keeps under their names."""
    settings = {}
    for name in constructor_arguments(type(callback)):
        value = getattr(callback, name, None)
        if isinstance(value, bool | int | float | str | list | tuple | dict):
            settings[name] = json_form(value, lambda other: type(other).__name__)
    return {"class": type(callback).__name__, "settings": settings}


def _hyperparameters(
    manager: Any, model: BaseAlgorithm, live: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Every argument that the learner has, and every other setting of the run, with what set it."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in live.items():
        if name != "not_kept":
            found[name] = {"value": value, "source": _source(name, manager, sources)}
            given = as_json(manager._hyperparams[name]) if name in manager._hyperparams else value
            if name not in ("policy", "policy_kwargs") and given != value:
                # The learner made something else of it
                found[name]["given"] = given
    found["n_timesteps"] = {
        "value": manager.n_timesteps,
        "source": _option(("-n", "--n-timesteps")) or sources.get("n_timesteps", COMMAND_LINE),
    }
    for name, source in sources.items():
        argument = name.removeprefix(FINETUNING_PREFIX)
        if argument not in found and name not in NOISE:
            found[name] = {"value": manager.configured.get(name), "source": source}
        elif name != argument and not manager.continue_training:
            found[argument]["in_pretraining"] = as_json(manager.pretraining.argument(argument, manager.configured))
    return found


def _source(name: str, manager: Any, sources: Mapping[str, str]) -> str:
    if name in OPTIONS:
        return _option(OPTIONS[name]) or ("drawn by rl-zoo3" if name == "seed" else "rl-zoo3's default")
    if FINETUNING_PREFIX + name in sources:
        return f"{sources[FINETUNING_PREFIX + name]}, for the finetuning"
    if name == "action_noise" and "noise_type" in sources:
        set_by = dict.fromkeys(sources[each] for each in ("noise_type", "noise_std") if each in sources)
        return f"made by rl-zoo3 of noise_type and noise_std, {' and '.join(set_by)}"
    if manager.continue_training and (name not in sources or name in ("policy", "policy_kwargs")):
        return AGENT
    return sources.get(name, DEFAULT)


def _option(names: tuple[str, ...]) -> str | None:
    found = last_value(sys.argv[1:], names)
    # rl_zoo3 takes a negative number for none
    return None if found is None or found[1].startswith("-") else f"{COMMAND_LINE} ({found[0]})"
