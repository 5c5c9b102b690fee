"""The state of environments and of what they are wrapped in, so that a running episode goes on."""

import contextlib
import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

State = dict[str, Any]

KIND = "__kind__"
SETTINGS = ("observation_space", "action_space", "metadata", "render_mode", "spec", "num_envs", "class_attributes")
"""Attributes of vectorized environments that a new one has by itself."""
DEEPEST = 3
"""How far objects within objects are looked into."""
WRITER = "results_writer"
"""Where SB3's monitors have their files."""
OF_VEC_ENVS = ("_seeds", "_options")
HARMLESS = (EnvSpec, type, types.ModuleType, types.FunctionType, types.MethodType, Path)
"""What an attribute may hold that is no state: what is made anew with the environment."""
OF_THE_ARENA = ("efc_", "iefc_", "contact")
"""Arrays of MuJoCo that the next step computes anew, and whose sizes change."""


class NoStateError(Exception):
    """A value is none that can be kept."""


# Values


def value_state(value: Any, depth: int = 0) -> Any:
    """A value of an attribute as plain values, arrays and tensors; ``NoStateError`` if it cannot be kept."""
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, np.generic | th.Tensor):
        return value
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(value_state(entry, depth) for entry in value)
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {key: value_state(entry, depth) for key, entry in value.items()}
    if isinstance(value, deque):
        return {KIND: "deque", "values": [value_state(entry, depth) for entry in value], "maxlen": value.maxlen}
    if isinstance(value, np.random.Generator):
        return {KIND: "generator", "state": value_state(value.bit_generator.state)}
    if isinstance(value, Enum):
        return {KIND: "enum", "value": value_state(value.value, depth)}
    if isinstance(value, random.Random):
        return {KIND: "random", "state": value.getstate()}
    if hasattr(value, "__dict__") and depth < DEEPEST:
        state, missing = attributes_state(value, depth=depth + 1)
        if not missing:
            return {KIND: "object", "attributes": state}
    raise NoStateError


def _made(saved: Any, live: Any) -> Any:
    """The value that :func:`value_state` was taken of; objects are changed in place."""
    if isinstance(saved, dict) and KIND in saved:
        if saved[KIND] == "deque":
            return deque((_made(value, None) for value in saved["values"]), saved["maxlen"])
        if saved[KIND] == "generator":
            generator = np.random.Generator(getattr(np.random, saved["state"]["bit_generator"])())
            generator.bit_generator.state = saved["state"]
            return generator
        if saved[KIND] == "enum":
            return type(live)(saved["value"])
        if saved[KIND] == "random":
            live.setstate(saved["state"])
        else:
            load_attributes(live, saved["attributes"])
        return live
    if isinstance(saved, dict):
        known = live if isinstance(live, dict) else {}
        return {key: _made(value, known.get(key)) for key, value in saved.items()}
    return type(saved)(_made(value, None) for value in saved) if type(saved) in (list, tuple) else saved


def attributes_state(owner: Any, excluded: Iterable[str] = (), depth: int = 0) -> tuple[State, list[str]]:
    """What an object's attributes hold, by name, and the names of those of which that cannot be had."""
    state, missing = {}, []
    for name, value in vars(owner).items():
        if name in excluded or isinstance(value, HARMLESS):
            continue
        try:
            state[name] = _space_state(value) if isinstance(value, spaces.Space) else value_state(value, depth)
        except NoStateError:
            missing.append(f"{type(owner).__name__}.{name}")
    return state, missing


def load_attributes(owner: Any, state: State) -> None:
    """Take up what :func:`attributes_state` returned."""
    for name, saved in state.items():
        live = vars(owner).get(name)
        if isinstance(saved, dict) and saved.get(KIND) == "space":
            _load_space(live, saved)
        else:
            setattr(owner, name, _made(saved, live))


def _space_state(space: spaces.Space[Any]) -> State:
    generator = space._np_random
    inner = {name: _space_state(one) for name, one in _inner(space).items()}
    return {KIND: "space", "generator": None if generator is None else value_state(generator), "inner": inner}


def _load_space(space: Any, saved: State) -> None:
    if saved["generator"] is not None:
        space._np_random = _made(saved["generator"], None)
    for name, one in _inner(space).items():
        _load_space(one, saved["inner"][name])


def _inner(space: Any) -> dict[str, Any]:
    inner = getattr(space, "spaces", {})
    return {str(name): one for name, one in (inner.items() if isinstance(inner, dict) else enumerate(inner))}


# MuJoCo


def _mujoco_arrays(data: Any) -> dict[str, np.ndarray]:
    arrays = {}
    for name in dir(data):
        if not name.startswith(("_", *OF_THE_ARENA)):
            with contextlib.suppress(Exception):
                # Of an option that this model does not have, reading is an error
                value = getattr(data, name)
                if isinstance(value, np.ndarray) and value.size:
                    arrays[name] = value
    return arrays


def _mujoco_state(env: Any) -> State:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, integration, kind)
    # Observations such as those of Ant and Humanoid read what was computed on the way to that state
    return {"integration": integration, "arrays": {name: array.copy() for name, array in _mujoco_arrays(env.data).items()}}


def _load_mujoco(env: Any, state: State) -> None:
    import mujoco

    mujoco.mj_setState(env.model, env.data, state["integration"], mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in _mujoco_arrays(env.data).items():
        saved = state["arrays"].get(name)
        if saved is not None and saved.shape == array.shape and array.flags.writeable:
            array[...] = saved


def _is_mujoco(env: Any) -> bool:
    return all(type(getattr(env, name, None)).__module__.startswith("mujoco") for name in ("model", "data"))


# Environments


def _layers(env: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


def environment_state(env: gym.Env[Any, Any]) -> State:
    """
    :param env: An environment
    :return: Its state and that of its wrappers as plain values and arrays: all attributes that hold such, generators, what
        MuJoCo integrates, and what ``get_state`` gives where there is a ``set_state`` too; ``"missing"`` names what cannot
        be had
    """
    states: list[State] = []
    missing: list[str] = []
    for layer in _layers(env):
        # What a wrapper wraps has a state of its own
        excluded, own = [WRITER, *(["env"] if isinstance(layer, gym.Wrapper) else [])], State()
        if _is_mujoco(layer):
            excluded += ["model", "data", "mujoco_renderer"]
            own["mujoco"] = _mujoco_state(layer)
        own["attributes"], unknown = attributes_state(layer, excluded)
        if not isinstance(layer, gym.Wrapper) and all(
            callable(getattr(layer, name, None)) for name in ("get_state", "set_state")
        ):
            own["own"], unknown = value_state(layer.get_state()), []  # type: ignore[attr-defined]
        states.append(own)
        own["file"] = _size(layer)
        missing += unknown
    return {"layers": states, "missing": missing}


def load_environment(env: gym.Env[Any, Any], state: State) -> bool:
    """
    Take up a state, and cut the files of ``Monitor`` back to what they were.

    :param env: An environment of the same kind
    :param state: What :func:`environment_state` returned
    :return: Whether the environment has the state; if not, it has to be reset
    """
    layers = _layers(env)
    if len(layers) != len(state["layers"]):
        raise ValueError(f"The environment has {len(layers) - 1} wrappers, and the run had {len(state['layers']) - 1}.")
    for layer, saved in zip(layers, state["layers"], strict=True):
        _cut(layer, saved["file"])
        if state["missing"]:
            # Generators and what counts over episodes go on all the same
            kept = {name: value for name, value in saved["attributes"].items() if _lives_longer(name, value)}
            load_attributes(layer, kept)
            continue
        load_attributes(layer, saved["attributes"])
        if "mujoco" in saved:
            _load_mujoco(layer, saved["mujoco"])
        if "own" in saved:
            layer.set_state(_made(saved["own"], None))  # type: ignore[attr-defined]
    return not state["missing"]


def _lives_longer(name: str, value: Any) -> bool:
    return name in ("t_start", "total_steps", "episode_returns", "episode_lengths", "episode_times") or (
        isinstance(value, dict) and value.get(KIND) in ("generator", "random", "space", "object")
    )


def _size(monitor: Any) -> int | None:
    writer = getattr(monitor, WRITER, None) if WRITER in vars(monitor) else None
    if writer is None:
        return None
    writer.file_handler.flush()
    return Path(writer.file_handler.name).stat().st_size


def _cut(monitor: Any, size: int | None) -> None:
    found = _size(monitor)
    if found is None or size is None:
        return
    file = getattr(monitor, WRITER).file_handler
    if found < size:
        raise ValueError(
            f"{file.name} holds less than it did at the checkpoint: `Monitor` empties a file that it opens. Make "
            "the environment with `override_existing=False` (of `make_vec_env`: `monitor_kwargs`), and put the file back if "
            "you can."
        )
    with open(file.name, "rb+") as whole:
        whole.truncate(size)
    # A file that was opened for writing, and not for appending, would get a hole
    file.seek(0, 2)


# Vectorized environments


class _WithState:
    """Sent to a process of ``SubprocVecEnv``, it becomes the class of the environment there with its state as methods."""

    def __init__(self, own: type) -> None:
        self._own = own

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type]]:
        return _with_state, (self._own,)


def _with_state(own: type) -> type:
    return type(own.__name__, (own,), {"checkpoint_state": environment_state, "load_checkpoint_state": _load_or_say})


def _load_or_say(env: gym.Env[Any, Any], state: State) -> str | None:
    """Load a state in another process, which an error would end: gives its message."""
    try:
        load_environment(env, state)
    except ValueError as error:
        return str(error)
    return None


def _reach(env: SubprocVecEnv) -> None:
    if not env.has_attr("checkpoint_state"):
        for index, own in enumerate(env.get_attr("__class__")):
            env.set_attr("__class__", _WithState(own), indices=index)


def _vec_layers(env: VecEnv) -> list[VecEnv]:
    layers = [env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    return layers


def vec_env_state(env: VecEnv) -> State:
    """
    :param env: Vectorized environments
    :return: The state of all of them and of their wrappers; ``"missing"`` names what cannot be had
    """
    *wrappers, base = _vec_layers(env)
    states: list[State] = []
    missing: list[str] = []
    each: list[State] = []
    for layer in wrappers:
        own, unknown = attributes_state(layer, (*SETTINGS, WRITER, "venv"))
        states.append({"attributes": own, "file": _size(layer)})
        missing += unknown
    if isinstance(base, SubprocVecEnv):
        _reach(base)
        each = base.env_method("checkpoint_state")
    elif isinstance(base, DummyVecEnv):
        each = list(map(environment_state, base.envs))
    else:
        missing.append(f"{type(base).__name__}, whose environments cannot be reached")
    seeds = {name: value_state(getattr(base, name)) for name in OF_VEC_ENVS}
    missing += [name for one in each for name in one["missing"]]
    return {"wrappers": states, "base": seeds, "each": each, "missing": sorted(set(missing))}


def load_vec_env(env: VecEnv, state: State) -> bool:
    """
    Take up a state.

    :param env: Vectorized environments of the same kind
    :param state: What :func:`vec_env_state` returned
    :return: Whether the running episodes go on; if not, the environments have to be reset
    :raises ValueError: They are others
    """
    *wrappers, base = _vec_layers(env)
    if len(wrappers) != len(state["wrappers"]):
        raise ValueError(
            f"The environments have {len(wrappers)} wrappers for vectorized environments, and the run had "
            f"{len(state['wrappers'])}: make them as they were made for the run."
        )
    load_attributes(base, state["base"])
    if isinstance(base, SubprocVecEnv) and state["each"]:
        _reach(base)
        for index, one in enumerate(state["each"]):
            (problem,) = base.env_method("load_checkpoint_state", one, indices=index)
            if problem is not None:
                raise ValueError(problem)
    elif isinstance(base, DummyVecEnv):
        for one, saved in zip(base.envs, state["each"], strict=True):
            load_environment(one, saved)
    for layer, own in zip(wrappers, state["wrappers"], strict=True):
        _cut(layer, own["file"])
        load_attributes(layer, own["attributes"])
    return not state["missing"]
