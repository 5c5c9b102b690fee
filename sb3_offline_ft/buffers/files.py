"""The file that the online part of a replay buffer is saved to: arrays and JSON, no pickle."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.common.io import atomic_write

File = str | os.PathLike[str] | IO[bytes]


def write_arrays(file: File, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """
    Write arrays and facts in NumPy's npz format.

    :param file: The file, written whole or not at all; or a binary stream
    :param facts: Anything that JSON can hold
    :param arrays: Arrays by name
    """
    with atomic_write(file) if isinstance(file, str | os.PathLike) else nullcontext(file) as stream:
        np.savez(stream, facts=np.array(json.dumps(facts)), **dict(arrays))  # type: ignore[arg-type]  # see arrays_to_text


def read_arrays(file: File) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """
    Read what :func:`write_arrays` wrote.

    :param file: The file or binary stream
    :return: Facts and arrays
    :raises ValueError: It is not such a file
    """
    try:
        # Opened here, since NumPy leaves a damaged file open
        stream = open(file, "rb") if isinstance(file, str | os.PathLike) else nullcontext(file)
        with stream as opened, np.load(opened, allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            return facts, {name: content[name] for name in content.files if name != "facts"}
    except FileNotFoundError:
        raise
    # NumPy, zipfile and JSON raise anything about a damaged file
    except Exception as error:
        raise damaged(file, error) from error


def damaged(file: File, error: Exception) -> ValueError:
    """
    :param file: The file or binary stream
    :param error: What is wrong
    :return: The error to raise
    """
    return ValueError(
        f"{file} is damaged or not a replay buffer saved by `save_replay_buffer` ({type(error).__name__}: {error})."
    )
