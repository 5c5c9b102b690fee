"""The contract of an exported policy: what it takes and gives, in a JSON file beside it."""

import hashlib
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_offline_ft.common.io import naming_damage
from sb3_offline_ft.common.reading import MOST_JSON, parse_json, read_bytes

CONTRACT, VERSION = "sb3-offline-ft policy", 1
OBSERVATION, ACTION = "observation", "action"
"""What the input is called that is no key of a ``Dict``, and the output."""


def output_name(inputs: Collection[str]) -> str:
    """What the output is called beside inputs of these names: ``action``, with underscores if one of them is so."""
    name = ACTION
    while name in inputs:
        name += "_"
    return name


def contract_file(policy: Path) -> Path:
    """Where the contract of an exported policy is."""
    return policy.with_suffix(".json")


def read_contract(policy: Path) -> dict[str, Any] | None:
    """
    :param policy: The exported policy
    :return: Its contract; None if there is none, as beside files that were made in another way
    :raises ValueError: It is damaged, of a later version, or of another policy
    """
    path = contract_file(policy)
    # What is there and no file is an error, as `read_bytes` says
    if not os.path.lexists(path):
        return None
    with naming_damage(path, "a contract that `sb3-offline-ft export` wrote"):
        content = parse_json(read_bytes(path, MOST_JSON), str(path))
        if not isinstance(content, dict) or content.get("contract") != CONTRACT:
            return None
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, expected {VERSION}")
        sha256 = content["policy"]["sha256"]
    if sha256 != hashlib.sha256(read_bytes(policy)).hexdigest():
        raise ValueError(
            f"{str(path)!r} is the contract of another file than {str(policy)!r}, whose contents have changed since: export "
            "the policy again, or move the contract away."
        )
    return content


def spaces_of(contract: dict[str, Any], path: Path) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """
    :param contract: A contract
    :param path: Its file, for messages
    :return: The spaces of observations and actions
    :raises ValueError: It is damaged
    """
    with naming_damage(path, "a contract that `sb3-offline-ft export` wrote"):
        inputs = {facts["name"]: _space(facts) for facts in contract["observations"]}
        is_dict, action = contract["observations_are_dict"], _space(contract["action"])
        return spaces.Dict(inputs) if is_dict else inputs[OBSERVATION], action


def space_facts(name: str, space: spaces.Space[Any]) -> dict[str, Any]:
    """
    :param name: Of the input or output
    :param space: What it takes or gives: a ``Box``, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``
    :return: The same in the form of JSON. Bounds are one number where they are the same for all, and null where there is none
    """
    facts = {"name": name, "kind": type(space).__name__, "shape": list(space.shape or ()), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Box):
        return facts | {"low": _bounds(space.low), "high": _bounds(space.high)}
    if isinstance(space, spaces.Discrete):
        return facts | {"low": int(space.start), "high": int(space.start + space.n - 1)}
    if isinstance(space, spaces.MultiDiscrete):
        return facts | {"low": space.start.tolist(), "high": (space.start + space.nvec - 1).tolist()}
    return facts | {"low": 0, "high": 1}


def _space(facts: dict[str, Any]) -> spaces.Space[Any]:
    kind, shape, dtype = facts["kind"], tuple(facts["shape"]), np.dtype(facts["dtype"])
    low, high = facts["low"], facts["high"]
    if kind == "Box":
        return spaces.Box(_array(low, -math.inf, shape, dtype), _array(high, math.inf, shape, dtype), shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(high - low + 1, start=low)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.subtract(high, low) + 1, start=np.array(low))
    if kind == "MultiBinary":
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    raise ValueError(f"{facts['name']!r} is a {kind}, expected a Box, Discrete, MultiDiscrete or MultiBinary")


def _bounds(values: Any) -> Any:
    """JSON has no infinities."""
    if values.size and (values == values.flat[0]).all():
        return _finite(values.flat[0].item())
    return [_finite(value) for value in values.tolist()] if values.ndim == 1 else [_bounds(part) for part in values]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _array(bounds: Any, without: float, shape: tuple[int, ...], dtype: Any) -> Any:
    if isinstance(bounds, list):
        return np.stack([_array(part, without, shape[1:], dtype) for part in bounds])
    return np.full(shape, without if bounds is None else bounds, dtype)
