"""The file that the online part of a replay buffer is saved to, without pickle, and what must agree to load it."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.observations import by_key, map_observations
from sb3_offline_ft.common.reading import ArrayFile, open_file, parse_json
from sb3_offline_ft.datasets.columns import as_flags, check_numbers

Array = npt.NDArray[Any]
File = str | os.PathLike[str] | IO[bytes]

RING_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
KIND = "a replay buffer saved by `save_replay_buffer`"


def write_arrays(file: File, facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write arrays and facts in NumPy's npz format: a file, whole or not at all, or a binary stream."""
    with atomic_write(file) if isinstance(file, str | os.PathLike) else nullcontext(file) as stream:
        np.savez(stream, facts=np.array(json.dumps(facts)), **dict(arrays))  # type: ignore[arg-type]  # see arrays_to_text


def read_arrays(file: File) -> tuple[dict[str, Any], dict[str, Array]]:
    """
    :return: Facts and arrays that :func:`write_arrays` wrote
    :raises ValueError: The file is another one
    """
    with naming_damage(file, KIND):
        with open_file(file) if isinstance(file, str | os.PathLike) else nullcontext(file) as stream:
            content = ArrayFile(stream, "it")
            facts = parse_json(str(content["facts"]), "its facts")
            return facts, {name: content[name] for name in content.files if name != "facts"}


def ring_columns(ring: ReplayBuffer) -> dict[str, Array]:
    """
    :param ring: A buffer of SB3's kind
    :return: The arrays of its ring by the names that they have in files
    """
    named = {name: by_key(getattr(ring, name)) for name in RING_COLUMNS}
    return {f"{name}/{key}" if key else name: array for name, parts in named.items() for key, array in parts.items()}


def facts_of(ring: ReplayBuffer) -> dict[str, Any]:
    """
    :param ring: A buffer of SB3's kind
    :return: What must agree for its rows to be those of another one
    """
    assert isinstance(ring.action_space, spaces.Box)
    n_steps = getattr(ring, "n_steps", 1)
    shape: Any = ring.obs_shape
    return {
        "observation shape": {key: list(part) for key, part in shape.items()} if isinstance(shape, dict) else list(shape),
        "observation dtype": map_observations(lambda array: str(array.dtype), ring.observations),
        "action shape": list(ring.action_space.shape),
        "action bounds": [ring.action_space.low.ravel().tolist(), ring.action_space.high.ravel().tolist()],
        "n_envs": ring.n_envs,
        "n_steps": n_steps,
        "gamma": getattr(ring, "gamma", None) if n_steps > 1 else None,
    }


def check_facts(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    """
    :param found: Facts of the buffer that is loaded
    :param expected: Those of the buffer that takes its rows
    :param name: Name of the former, for messages
    :raises ValueError: They differ
    """
    for key, wanted in expected.items():
        value = found.get(key)
        same = value == wanted
        if key == "action bounds":
            same = np.shape(value) == np.shape(wanted) and np.allclose(value, wanted)  # type: ignore[arg-type]
        if not same:
            what = "`n_steps` and `gamma`" if key in ("n_steps", "gamma") else "environment and number of environments"
            raise ValueError(
                f"{name} was saved with {key} {value}, this learner has {wanted}: load it into a learner with the same {what}."
            )


def check_columns(columns: Mapping[str, Array], ring: ReplayBuffer, where: str) -> None:
    """
    :param columns: Rows by the names of :func:`ring_columns`
    :param ring: The buffer that they are for
    :param where: Where they come from, for messages
    :raises ValueError: They cannot be rows of it
    """
    for name, own in ring_columns(ring).items():
        if columns[name].shape != (len(columns["rewards"]), *own.shape[1:]):
            raise ValueError(f"{name} has the shape {columns[name].shape}")
        if name in ("dones", "timeouts"):
            as_flags(columns[name], name, where)
        else:
            check_numbers(columns[name], name, where, own.dtype)
