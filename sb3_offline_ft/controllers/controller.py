"""What a controller is, and those that need no file."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.preprocessing import maybe_transpose


class Controller(Protocol):
    """Decides actions, one at a time, in the units of the system; the same ones whenever it sees the same."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    @property
    def sha256(self) -> str | None:
        """Of its file, in hexadecimal digits; of more than one, of their contents one after the other. None without a file."""

    @property
    def observation_space(self) -> spaces.Space[Any] | None:
        """The observations that it was made for; None if it does not say."""

    @property
    def action_space(self) -> spaces.Space[Any] | None:
        """The actions that it was made for; None if it does not say."""

    def reset(self, seed: int | None = None) -> None:
        """
        Begin an episode.

        :param seed: Seed of a controller that draws numbers
        """

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """
        Decide.

        :param observation: One observation, as the environment gives it
        :return: The action. It may lie beyond the bounds of the action space
        """


def check_fits(controller: Controller, env: gym.Env[Any, Any]) -> None:
    """
    Check that a controller was made for spaces like those of an environment.

    :param controller: The controller; one that does not say what it was made for passes
    :param env: The environment
    :raises ValueError: Kinds, shapes, keys or numbers of choices differ, or one has whole numbers only
    """
    for what in ("observation", "action"):
        made_for, found = getattr(controller, f"{what}_space"), getattr(env, f"{what}_space")
        if made_for is not None and not _are_alike(made_for, found):
            name = "the environment" if env.spec is None else env.spec.id
            raise ValueError(
                f"The controller {controller.name!r} does not fit {name}: it was made for {what}s {made_for}, the environment "
                f"has {found}. Use a controller that was made for this environment."
            )


def _are_alike(made_for: spaces.Space[Any], found: spaces.Space[Any]) -> bool:
    if isinstance(made_for, spaces.Box) and isinstance(found, spaces.Box):
        if found.dtype.kind == "f" and made_for.dtype.kind in "iu":
            return False
        # SB3's policies turn images themselves
        return maybe_transpose(np.zeros(found.shape, np.uint8), made_for).shape == made_for.shape
    if isinstance(made_for, spaces.Dict) and isinstance(found, spaces.Dict):
        both = made_for.spaces.keys() & found.spaces.keys()
        return made_for.keys() == found.keys() and all(_are_alike(made_for[key], found[key]) for key in both)
    return made_for == found


class ZeroController:
    """Does nothing: its action is zero, or the bound that is nearest to it."""

    name, sha256, observation_space = "zero", None, None

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"The controller 'zero' needs actions that are a Box of numbers, found {action_space}.")
        self.action_space: spaces.Space[Any] = action_space
        self._action = np.clip(np.zeros(action_space.shape), action_space.low, action_space.high).astype(action_space.dtype)

    def reset(self, seed: int | None = None) -> None:
        """Nothing to begin."""

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """The same always."""
        return self._action.copy()


class RandomController:
    """Draws its actions uniformly; the same ones after a reset with the same seed."""

    name, sha256, observation_space = "random", None, None

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        # The environment's own one is left alone
        self.action_space = copy.deepcopy(action_space)

    def reset(self, seed: int | None = None) -> None:
        """Begin to draw anew, if there is a seed."""
        if seed is not None:
            self.action_space.seed(seed)

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """Draw."""
        return np.asarray(self.action_space.sample())


class FunctionController:
    """
    A function of the observation that returns the action, or another object that can be called like one.

    :param name: As the user gave it
    :param function: The function; its attribute ``reset``, if it has one, is called without arguments when an episode begins
    """

    sha256, observation_space, action_space = None, None, None

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        self.name, self._function = name, function
        self._reset: Callable[[], Any] = getattr(function, "reset", lambda: None)

    def reset(self, seed: int | None = None) -> None:
        """Tell the function that an episode begins."""
        self._reset()

    def act(self, observation: Any) -> npt.NDArray[Any]:
        """Ask the function."""
        return np.asarray(self._function(observation))
