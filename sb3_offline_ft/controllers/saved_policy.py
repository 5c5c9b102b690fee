"""Policies that SB3, sb3-contrib or this package saved, alone or in a run's folder of rl-zoo3."""

import hashlib
import inspect
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import json_to_data
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.observations import by_key
from sb3_offline_ft.common.plain_settings import policy_settings
from sb3_offline_ft.common.reading import read_bytes
from sb3_offline_ft.datasets.files.zoo import CONFIG, LEARNER_STATISTICS, saved_hyperparams
from sb3_offline_ft.deployment.champion_challenger import BEST_MODEL, STATISTICS
from sb3_offline_ft.policies.guide import read_zip

CHAMPION, CHECKPOINTS = "champion.zip", "rl_model_"
CHECKPOINT = re.compile(r"(.+)_(\d+)_steps\.zip")
NEEDED = ("policy_class", "policy_kwargs", "observation_space", "action_space", "use_sde")


class PolicyController:
    """
    A policy whose deterministic actions are taken.

    Its attributes ``policy`` and ``statistics`` are SB3's policy, and the ``VecNormalize`` of the run, or None.

    :param name: As the user gave it
    :param file: The zip file of an algorithm
    :param device: Torch device of the policy
    :param safe_load: Whether nothing may be unpickled
    """

    def __init__(self, name: str, file: Path, device: str, safe_load: bool = False) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"No policy {str(file.absolute())!r}: expected a .zip saved by an algorithm's save().")
        self.name = name
        statistics = _statistics_for(file)
        if safe_load and statistics is not None:
            raise ValueError(
                f"The policy {str(file)!r} needs {str(statistics)!r}, which is a pickle, and nothing is unpickled with "
                "`safe_load`: leave that out if you trust the file."
            )
        files = [file] if statistics is None else [file, statistics]
        self.sha256: str | None = hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()
        self.file, self.policy = file, _load_policy(file, device, safe_load)
        self.observation_space, self.action_space = self.policy.observation_space, self.policy.action_space
        self.statistics = None if statistics is None else _read_statistics(statistics)
        if statistics is not None and self.statistics is not None:
            _check_of_policy(self.statistics, statistics, self.policy, file)
        self._normalize: Callable[[Any], Any] = (
            self.statistics.normalize_obs if self.statistics is not None else lambda seen: seen
        )
        self._memory: Any = None

    def reset(self, seed: int | None = None) -> None:
        """Begin without memory."""
        self._memory = None

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """Ask the policy. SB3's policies keep their actions within the bounds that they were trained with."""
        action, self._memory = self.policy.predict(self._normalize(observation), self._memory, deterministic=True)
        return action


def policy_file(folder: Path) -> Path:
    """
    :param folder: A run's folder of rl-zoo3
    :return: The best model if there is one, else the last one
    :raises ValueError: There is none, or it is not clear which one is meant
    """
    found = sorted(path for path in folder.glob("*.zip") if not path.name.startswith(CHECKPOINTS))
    of_run = [path for path in found if path.name == BEST_MODEL] or [path for path in found if (folder / path.stem).is_dir()]
    chosen = of_run or found
    if len(chosen) != 1:
        what = f"several policies, {', '.join(path.name for path in chosen)}" if chosen else "no policy"
        raise ValueError(
            f"The folder {str(folder)!r} has {what}: expected a run's folder such as logs/td3c/Pendulum-v1_1, with "
            f"{BEST_MODEL} or <environment>.zip. A file can be named itself."
        )
    return chosen[0]


def _load_policy(file: Path, device: str, safe_load: bool) -> BasePolicy:
    plain = policy_settings(file) if safe_load else None
    with naming_damage(f"The policy {str(file)!r}", "a zip file saved by a Stable-Baselines3 algorithm"):
        settings, weights = read_zip(file, th.device(device))
        found = plain or json_to_data(json.dumps({key: settings[key] for key in NEEDED if key in settings}))
        policy_class, kwargs = found["policy_class"], dict(found["policy_kwargs"])
        known = inspect.signature(policy_class).parameters
        if found.get("use_sde"):
            # On-policy algorithms pass it beside
            kwargs.setdefault("use_sde", True)
        if "lr_schedule" in known:
            # Nothing is learned here
            kwargs["lr_schedule"] = lambda _: 0.0
        with th.random.fork_rng(devices=[]):
            policy: BasePolicy = policy_class(found["observation_space"], found["action_space"], **kwargs)
        policy.load_state_dict(weights)
        policy.set_training_mode(False)
        return policy.to(device)


def settings_folder(file: Path) -> Path | None:
    """Where rl-zoo3 keeps the settings of the run that a policy is of; None if it is of none."""
    runs = [path.parent for path in file.parent.glob(f"*/{CONFIG}")]
    return next((path for path in runs if path.name == file.stem), runs[0] if len(runs) == 1 else None)


def _statistics_for(file: Path) -> Path | None:
    """The statistics that the policy's observations were normalized with, where rl-zoo3 and champions have them."""
    folder, settings = file.parent, settings_folder(file)
    # Of SB3's CheckpointCallback, which also saves those of each moment
    checkpoint = CHECKPOINT.fullmatch(file.name)
    of_checkpoint = [] if checkpoint is None else [folder / "{}_vecnormalize_{}_steps.pkl".format(*checkpoint.groups())]
    places = [*of_checkpoint, folder / STATISTICS]
    is_normalized = False
    if settings is not None:
        hyperparams, _ = saved_hyperparams(settings)
        for wrapper in ("env_wrapper", "vec_env_wrapper", "frame_stack"):
            if hyperparams.get(wrapper):
                raise ValueError(
                    f"The policy {str(file)!r} was trained with {wrapper}: {hyperparams[wrapper]}, which changes what it sees "
                    "or does. Register an environment with these wrappers inside, or give a module:function that applies them."
                )
        is_normalized = bool(hyperparams["normalize"]) and hyperparams["normalize_kwargs"].get("norm_obs", True)
        if file.name in (BEST_MODEL, CHAMPION):
            places = [folder / STATISTICS, settings / STATISTICS]
        else:
            places = [*of_checkpoint, settings / LEARNER_STATISTICS, settings / STATISTICS]
    found = next((path for path in places if path.is_file()), None)
    if is_normalized and found is None:
        raise FileNotFoundError(
            f"The policy {str(file)!r} was trained on normalized observations, but {str(places[-1])!r} with their statistics "
            "is missing."
        )
    return found


def _read_statistics(statistics: Path) -> VecNormalize:
    with naming_damage(statistics, "a VecNormalize that Stable-Baselines3 saved"):
        normalize = pickle.loads(read_bytes(statistics))
        if not isinstance(normalize, VecNormalize):
            raise TypeError(f"found a {type(normalize).__name__}")
    return normalize


def _check_of_policy(statistics: VecNormalize, path: Path, policy: BasePolicy, file: Path) -> None:
    """Those of another model may lie beside this one."""
    if not statistics.norm_obs:
        return
    seen = {key: space.shape for key, space in by_key(policy.observation_space).items()}
    found = {key: moments.mean.shape for key, moments in by_key(statistics.obs_rms).items()}
    if not found.items() <= seen.items():
        raise ValueError(
            f"{str(path)!r} is not of the policy {str(file)!r}: it normalizes {_in_words(found)}, the policy sees "
            f"{_in_words(seen)}. If it belongs to another model, keep the two in folders of their own."
        )


def _in_words(shapes: dict[str, Any]) -> str:
    return f"observations of shape {shapes['']}" if "" in shapes else f"observations that are a Dict of {shapes}"
