"""Keys of Dict observations: which to take, and in which order a flattened environment puts them together."""

import json
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten_space
from gymnasium.wrappers import DtypeObservation, FlattenObservation
from minari.serialization import deserialize_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft.common.suggestions import suggestion

_NOTE = "sb3_offline_ft_flattened_space"


def parse_keys(value: Any, where: str) -> tuple[str, ...]:
    """Read a sequence of names, or a text with commas between them, in which ``%2C`` stands for a comma in a name."""
    names = [urllib.parse.unquote(name).strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: keys must be names of observations with commas between them, found {value!r}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: keys has {', '.join(twice)} twice: give it once.")
    return tuple(names)


def format_keys(keys: Iterable[str]) -> str:
    """The text that :func:`parse_keys` reads, fit for a spec."""
    return ",".join(urllib.parse.quote(key, safe="/") for key in keys)


def choose_keys(wanted: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """Look up keys, in the order in which they are wanted; the name of a nested Dict stands for all keys in it."""
    chosen: list[str] = []
    for name in wanted:
        found = [name] if name in known else [key for key in known if key.startswith(f"{name}/")]
        if not found:
            raise ValueError(f"{where}: the observations have no key {name!r}. {suggestion(name, known)}")
        if twice := [key for key in found if key in chosen]:
            raise ValueError(f"{where}: keys names {', '.join(twice)} twice: give it once.")
        chosen += found
    return chosen


def no_keys(where: str, shape: Any) -> ValueError:
    """The error to raise if keys are wanted of observations that have none."""
    return ValueError(f"{where}: keys are those of Dict observations, found one array of shape {shape}. Leave out `keys`.")


def leaf_spaces(space: spaces.Dict, prefix: str = "") -> dict[str, spaces.Space[Any]]:
    """The spaces in a Dict in order, those of nested ones under names joined by ``/``."""
    leaves: dict[str, spaces.Space[Any]] = {}
    for key, one in space.spaces.items():
        leaves |= leaf_spaces(one, f"{prefix}{key}/") if isinstance(one, spaces.Dict) else {f"{prefix}{key}": one}
    return leaves


def dict_of(leaves: dict[str, spaces.Space[Any]]) -> spaces.Dict:
    """A space with the keys in this order; that of a plain dictionary would be sorted."""
    return spaces.Dict(list(leaves.items()))


def space_in_order(serialized: str) -> spaces.Space[Any]:
    """What Minari wrote of a space, its keys in the order in which they were written; Minari's own function sorts them."""
    content = json.loads(serialized)
    return _in_order(deserialize_space(content), content)


def _in_order(space: spaces.Space[Any], content: dict[str, Any]) -> spaces.Space[Any]:
    if not isinstance(space, spaces.Dict):
        return space
    return dict_of({key: _in_order(space[key], inner) for key, inner in content["subspaces"].items()})


def fitting_orders(leaves: dict[str, spaces.Space[Any]], flat: spaces.Box) -> Iterator[list[str]]:
    """Find the orders of keys in which spaces make up a flat one; that of ``leaves`` comes first, if it is one."""
    boxes = {key: flatten_space(one) for key, one in leaves.items()}
    bounds = {key: (one.low, one.high) for key, one in boxes.items() if isinstance(one, spaces.Box)}

    def extend(order: list[str], begin: int) -> Iterator[list[str]]:
        if len(order) == len(leaves):
            if begin == flat.shape[0]:
                yield order
            return
        for key, (low, high) in bounds.items():
            end = begin + len(low)
            if (
                key not in order
                and end <= flat.shape[0]
                and np.allclose(flat.low[begin:end], low, rtol=1e-5, atol=1e-6)
                and np.allclose(flat.high[begin:end], high, rtol=1e-5, atol=1e-6)
            ):
                yield from extend([*order, key], end)

    return extend([], 0)


def flattened_space(env: VecEnv | gym.Env[Any, Any]) -> spaces.Space[Any] | None:
    """
    The space that a ``FlattenObservation`` flattens, be it in other processes.

    ``None`` if there is no such wrapper, or the observations are changed once more behind it.
    """
    if isinstance(env, gym.Env):
        return _flattened_by(env)
    try:
        if not all(env.env_is_wrapped(_LeavesNote())):  # type: ignore[arg-type]  # anything that isinstance takes
            return None
        found = env.get_attr(_NOTE)
    except Exception:
        # Vectorized environments of others need not know their wrappers
        return None
    return found[0] if all(_is_same(found[0], other) for other in found[1:]) else None


class _LeavesNote:
    """Is asked whether it is the class of a wrapper, and leaves at it what it flattens: a way into another process."""

    def __instancecheck__(self, env: Any) -> bool:
        setattr(env, _NOTE, _flattened_by(env))
        return True


def _flattened_by(env: Any) -> spaces.Space[Any] | None:
    while isinstance(env, gym.Wrapper):
        inner: spaces.Space[Any] = env.env.observation_space
        if isinstance(env, FlattenObservation):
            return inner
        # A change of type alone keeps the order
        changes = isinstance(env, gym.ObservationWrapper) or env.observation_space != inner
        if changes and not isinstance(env, DtypeObservation):
            return None
        env = env.env
    return None


def _is_same(one: spaces.Space[Any] | None, other: spaces.Space[Any] | None) -> bool:
    if isinstance(one, spaces.Dict) and isinstance(other, spaces.Dict):
        return list(leaf_spaces(one)) == list(leaf_spaces(other)) and one == other
    return one == other
