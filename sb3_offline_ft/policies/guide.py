"""A guide: another policy that begins the training episodes (Uchendu et al. 2023, "Jump-Start Reinforcement Learning")."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import data_to_json

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.plain_pickle import Name, NotPlainError, plain_setting
from sb3_offline_ft.common.reading import open_file, parse_json, read_member
from sb3_offline_ft.common.schedules import make_schedule
from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike

PRETRAINED = "pretrained"
NOT_SAVED = "<object>"
"""What a saved model holds in place of a guide that was given as an object."""
POLICIES = ("stable_baselines3", "sb3_contrib", "sb3_offline_ft")
"""Packages whose policies a file may name."""
PARTS_OF_POLICIES = (
    ("torch.nn.modules", "torch.optim", "stable_baselines3.common.torch_layers", "sb3_offline_ft.policies.layers"),
    (th.nn.Module, th.optim.Optimizer),
)
"""Where their parts may be from, and of what kind."""
SPACE_PARTS = (":type:", "_shape", "dtype", "low", "high", "n", "nvec", "spaces")
"""What SB3 writes of a space in plain text."""

GuideLike = str | os.PathLike[str] | BaseAlgorithm | BasePolicy | None
"""``"pretrained"``, the path of a zip file that an algorithm saved, an algorithm or a policy; None for no guide."""


def check_guide(guide_policy: GuideLike, guide_steps: ScheduleLike) -> tuple[GuideLike, Schedule]:
    """
    Check the settings of a guide.

    :param guide_policy: The guide
    :param guide_steps: Number of steps at the start of each episode that it acts
    :return: The guide, a path made absolute so that a saved model finds it from any folder; and the schedule of the steps
    :raises TypeError: The guide is of another kind
    :raises ValueError: There is a guide without steps, or steps without a guide
    """
    if isinstance(guide_policy, str | os.PathLike) and guide_policy not in (PRETRAINED, NOT_SAVED):
        guide_policy = os.path.abspath(guide_policy)
    if guide_policy is not None and not isinstance(guide_policy, str | BaseAlgorithm | BasePolicy):
        raise TypeError(
            "`guide_policy` must be 'pretrained', the path of a zip file saved by an algorithm, an algorithm or a policy, "
            f"found {guide_policy!r}."
        )
    schedule = make_schedule(guide_steps, "guide_steps")
    has_steps = callable(guide_steps) or any(schedule(progress) > 0 for progress in (1.0, 0.5, 0.0))
    if guide_policy is None and has_steps:
        raise ValueError(
            f"`guide_steps` is {guide_steps!r} but there is no guide: set `guide_policy`, for example to 'pretrained', "
            "or leave `guide_steps` at 0."
        )
    if guide_policy is not None and not has_steps:
        raise ValueError(
            "`guide_policy` has no effect with `guide_steps=0`: set `guide_steps` to the number of steps at the start of each "
            "episode that it shall act, for example 'lin_200_0', or leave `guide_policy` out."
        )
    return guide_policy, schedule


def find_guide(
    guide_policy: GuideLike, observation_space: spaces.Space[Any], action_space: spaces.Box, device: th.device
) -> BaseAlgorithm | BasePolicy:
    """
    :param guide_policy: The path of a zip file, an algorithm or a policy
    :param observation_space: The learner's observation space
    :param action_space: The learner's action space
    :param device: Where a policy from a file is kept
    :return: What predicts the guide's actions
    :raises FileNotFoundError: There is no such file
    :raises ValueError: The file cannot be read without running code that it holds, or is damaged, or the guide was made for
        other spaces
    """
    if guide_policy == NOT_SAVED:
        raise ValueError(
            "The guide policy was given as an object, which a saved model does not hold: pass `guide_policy=...` to `load`, "
            "or `guide_policy=None, guide_steps=0` to go on without it."
        )
    name = f"`guide_policy` {guide_policy if isinstance(guide_policy, str) else type(guide_policy).__name__}"
    guide = guide_policy
    if isinstance(guide, str):
        guide = _policy_from_zip(guide, name, device, observation_space, action_space)
    assert isinstance(guide, BaseAlgorithm | BasePolicy)
    for what, expected, found in (
        ("observation", observation_space, guide.observation_space),
        ("action", action_space, guide.action_space),
    ):
        if expected != found:
            raise ValueError(
                f"{name} was made for the {what} space {found}, the environment has {expected}: "
                "use a guide that was trained on this environment."
            )
    policy = guide.policy if isinstance(guide, BaseAlgorithm) else guide
    if hasattr(policy, "lstm_actor"):
        raise ValueError(f"{name} is recurrent, which is not supported: use a guide without memory.")
    return guide


def _policy_from_zip(
    path: str, name: str, device: th.device, observation_space: spaces.Space[Any], action_space: spaces.Box
) -> BasePolicy:
    file = next((each for each in (Path(path), Path(f"{path}.zip")) if each.exists()), None)
    if file is None:
        raise FileNotFoundError(f"{name} does not exist: expected 'pretrained' or a zip file that an algorithm saved.")
    try:
        with naming_damage(name, "a zip file saved by a Stable-Baselines3 algorithm"):
            settings, weights = read_zip(file, device)
        _check_recorded_spaces(settings, name, observation_space, action_space)
        with naming_damage(name, "a zip file saved by a Stable-Baselines3 algorithm"):
            return _make_policy(settings, weights, observation_space, action_space).to(device)
    except ValueError as error:
        if not isinstance(error.__cause__, NotPlainError):
            raise
        raise ValueError(
            f"{name} cannot be read without running code that it may hold: {error.__cause__}. If you trust the file, load it "
            "in your own code and give the algorithm instead of the path: `guide_policy=TD3.load(...)`, say."
        ) from None


def read_zip(file: Path, device: th.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a model as JSON has them, none unpickled as SB3's own reader does with all, and its policy's weights."""
    with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
        settings: dict[str, Any] = parse_json(read_member(archive, "data"), "data")
        if not all(isinstance(settings[key], dict) for key in ("observation_space", "action_space")):
            raise ValueError("it does not say what its spaces are")
        weights = th.load(io.BytesIO(read_member(archive, "policy.pth")), map_location=device, weights_only=True)
    return settings, weights


def _check_recorded_spaces(
    settings: dict[str, Any], name: str, observation_space: spaces.Space[Any], action_space: spaces.Box
) -> None:
    """Spaces are pickled in the file, but SB3 writes the texts of their attributes beside."""
    wanted = {"observation_space": observation_space, "action_space": action_space}
    for key, expected in json.loads(data_to_json(wanted)).items():
        found = settings[key]
        differ = [part for part in SPACE_PARTS if part in expected and found.get(part, expected[part]) != expected[part]]
        if differ:
            told = ", ".join(f"{part.strip(':_')} {found[part]}" for part in differ)
            raise ValueError(
                f"{name} was made for the {key.replace('_', ' ')} with {told}, the environment has {wanted[key]}: "
                "use a guide that was trained on this environment."
            )


def _make_policy(
    settings: dict[str, Any], weights: dict[str, Any], observation_space: spaces.Space[Any], action_space: spaces.Box
) -> BasePolicy:
    named, kwargs = plain_setting(settings["policy_class"]), plain_setting(settings["policy_kwargs"])
    if not isinstance(named, Name):
        raise TypeError(f"policy_class must be a class, found {named!r:.60}")
    if not named.module.endswith(".policies"):
        # Before anything is imported
        raise NotPlainError(f"it names {named.module}.{named.name}, which is no module of policies")
    policy_class = named.find(POLICIES, (BasePolicy,))
    kwargs = {key: value.find(*PARTS_OF_POLICIES) if isinstance(value, Name) else value for key, value in dict(kwargs).items()}
    if settings.get("use_sde") and "use_sde" not in kwargs:
        # On-policy algorithms pass it beside
        kwargs["use_sde"] = True
    # The learner's random streams shall not depend on where its guide comes from
    with th.random.fork_rng(devices=[]):
        policy: BasePolicy = policy_class(observation_space, action_space, lambda _: 0.0, **kwargs)
    policy.load_state_dict(weights)
    policy.set_training_mode(False)
    return policy


def guide_actions(guide: BaseAlgorithm | BasePolicy, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """The guide's deterministic actions ``(n_envs, *action_shape)``, within the bounds of the action space."""
    actions, _ = guide.predict(observations, deterministic=True)
    assert isinstance(guide.action_space, spaces.Box)
    clipped: np.ndarray = np.clip(actions, guide.action_space.low, guide.action_space.high)
    return clipped
