"""Agents that rl-zoo3 or SB3 saved, in the environment that they were trained in."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_offline_ft.common.plain_settings import safe_load
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.datasets.files.zoo import ARGUMENTS, read_zoo_yaml, saved_hyperparams
from sb3_offline_ft.datasets.tools.recorder import EpisodeEnds, EpisodeRecorder

RANDOM = "random"
"""Name of the uniformly random policy."""


@dataclass(frozen=True)
class SavedAgent:
    """An agent on disk, and what rl-zoo3 knows about how it was trained; without a file the uniformly random policy."""

    name: str = "uniformly random"
    file: Path | None = None
    algorithm: str = RANDOM
    hyperparams: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    stats_folder: str | None = None

    def make_environment(self, env_id: str, seed: int, vecnormalize: str | Path | None) -> VecEnv:
        """The environment with the agent's wrappers, below them an :class:`EpisodeRecorder`."""
        from rl_zoo3 import create_test_env

        wrappers = self.hyperparams.get("env_wrapper") or []
        wrappers = wrappers if isinstance(wrappers, list) else [wrappers]
        recorded = [{EpisodeRecorder: {"seed": seed}}, *wrappers, EpisodeEnds]
        try:
            venv: VecEnv = create_test_env(
                env_id,
                stats_path=self.stats_folder,
                seed=seed,
                should_render=False,
                hyperparams=self.hyperparams | {"env_wrapper": recorded},
                env_kwargs=self.env_kwargs,
            )
        except gym.error.Error as error:
            raise ValueError(f"Cannot make the environment {env_id!r} ({type(error).__name__}: {error}).") from error
        return venv if vecnormalize is None else self._normalized(venv, Path(vecnormalize))

    def _normalized(self, venv: VecEnv, statistics: Path) -> VecEnv:
        try:
            if self.stats_folder is not None and self.hyperparams.get("normalize"):
                raise ValueError(
                    f"The agent's folder {self.stats_folder!r} has its own VecNormalize: leave --vecnormalize out."
                )
            if not statistics.is_file():
                raise FileNotFoundError(f"No VecNormalize {str(statistics.absolute())!r}.")
            normalized = VecNormalize.load(str(statistics), venv)
        except Exception:
            venv.close()
            raise
        normalized.training = normalized.norm_reward = False
        return normalized

    def load(self, venv: VecEnv, seed: int, device: str) -> BaseAlgorithm | None:
        """The agent, which must fit the environment; none if it is the random policy."""
        if self.file is None:
            return None
        try:
            model = self._load(self.file, venv, seed, device)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"Cannot load {str(self.file)!r} as {self.algorithm} ({type(error).__name__}: {error})."
            ) from error
        for what in ("observation", "action"):
            ours, theirs = getattr(model, f"{what}_space"), getattr(venv, f"{what}_space")
            if ours.shape != theirs.shape or type(ours) is not type(theirs):
                raise ValueError(
                    f"The agent {str(self.file)!r} does not fit the environment: it was trained with {what}s {ours}, the "
                    f"environment has {theirs}."
                )
        return model

    def load_alone(self, device: str, safe_load: bool = False) -> BaseAlgorithm | None:
        """The agent without an environment; None if it needs one, or wrappers or statistics that change what it sees."""
        beside = ("normalize", "env_wrapper", "vec_env_wrapper", "frame_stack")
        if self.file is None or any(self.hyperparams.get(name) for name in beside):
            return None
        try:
            return self._load(self.file, None, 0, device, safe_load)
        except (OSError, MemoryError):
            raise
        # Libraries raise anything about a file that they cannot read
        except Exception:
            return None

    def _load(self, file: Path, venv: VecEnv | None, seed: int, device: str, without_pickle: bool = False) -> BaseAlgorithm:
        from rl_zoo3 import ALGOS

        algorithm: type[BaseAlgorithm] = ALGOS[self.algorithm]
        options: dict[str, Any] = {"seed": seed, "device": device}
        if issubclass(algorithm, OffPolicyAlgorithm):
            options["buffer_size"] = 1
            if "optimize_memory_usage" in self.hyperparams:
                options["optimize_memory_usage"] = False
        if "HerReplayBuffer" in str(self.hyperparams.get("replay_buffer_class", "")):
            options["env"] = venv
        if without_pickle:
            return safe_load(file, algorithm, **options)
        # Schedules are not needed, and those of other versions of Python cannot be read
        objects: dict[str, Any] = {"learning_rate": 0.0, "lr_schedule": _zero, "clip_range": _zero}
        try:
            return algorithm.load(file, custom_objects=objects, **options)
        except ModuleNotFoundError as error:
            if venv is None or error.name is None or error.name.partition(".")[0] != "gym":
                raise
            # Agents from the time of gym have its spaces inside
            objects |= {"observation_space": venv.observation_space, "action_space": venv.action_space}
            return algorithm.load(file, custom_objects=objects, **options)


def find_agent(
    env_id: str, algorithm: str | None, log_folder: Path, file: Path | None, exp_id: int, load_best: bool
) -> SavedAgent:
    """Find an agent in rl-zoo3's folder, or a file, and what rl-zoo3 wrote beside it; nothing of it is unpickled yet."""
    from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
    from rl_zoo3 import ALGOS
    from rl_zoo3.utils import get_model_path

    env_name, known = EnvironmentName(env_id), [RANDOM, *ALGOS]
    if file is not None:
        file = file.expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"No agent {str(file.absolute())!r}: expected a .zip saved by SB3's model.save().")
        algorithm, folder = algorithm or _algorithm_of(file, ALGOS), file.parent
    elif algorithm is None:
        raise ValueError(f"Name the agent's algorithm, one of {', '.join(known)}, or its file.")
    if algorithm not in ALGOS:
        raise ValueError(f"Unknown algorithm {algorithm!r}. {suggestion(algorithm, known)}")
    if file is None:
        try:
            _, path, log_path = get_model_path(exp_id, str(log_folder), algorithm, env_name, load_best)
        except (AssertionError, ValueError) as error:
            raise FileNotFoundError(
                f"No trained agent: {str(error).rstrip('.')}. Expected rl-zoo3's form, "
                f"{log_folder / algorithm / (env_name + '_1') / (env_name + '.zip')}; another file can be named with --agent."
            ) from None
        file, folder = Path(path), Path(log_path)
    hyperparams, stats_folder = saved_hyperparams(folder / env_name)
    env_kwargs = hyperparams.pop("env_kwargs", None) or {}
    arguments = folder / env_name / ARGUMENTS
    if arguments.is_file():
        env_kwargs = env_kwargs | (read_zoo_yaml(arguments, ("env_kwargs",)).get("env_kwargs") or {})
    package = ALGOS[algorithm].__module__.partition(".")[0].replace("_", "-")
    return SavedAgent(f"{ALGOS[algorithm].__name__} ({package})", file, algorithm, hyperparams, env_kwargs, stats_folder)


def _algorithm_of(file: Path, known: dict[str, Any]) -> str:
    """Find out from the module of its policy which algorithm saved a model; nothing is unpickled."""
    module = ""
    try:
        with zipfile.ZipFile(file) as archive:
            module = str(json.loads(archive.read("data"))["policy_class"].get("__module__", ""))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    for name, algorithm in known.items():
        if module and module == f"{algorithm.__module__.rpartition('.')[0]}.policies":
            return name
    raise ValueError(f"{str(file)!r} does not say which algorithm saved it: name it with --algo, one of {', '.join(known)}.")


def _zero(_: float) -> float:
    return 0.0
