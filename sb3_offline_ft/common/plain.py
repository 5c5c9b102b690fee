"""Nested states as plain values and tensors, which torch reads again with ``weights_only``: no code is run."""

from typing import Any

import numpy as np
import torch as th

ARRAY = "__array__"


def to_plain(value: Any, where: str, advice: str = "") -> Any:
    """
    :param value: Plain values, arrays and tensors in dictionaries, lists and tuples
    :param where: What it is, for messages
    :param advice: What to do if it holds anything else, for messages
    :return: The same with tensors in place of arrays
    :raises ValueError: It holds something else
    """
    if value is None or type(value) in (bool, int, float, str, th.Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        content = th.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        shape = list(value.shape) if isinstance(value, np.ndarray) else None
        return {ARRAY: value.dtype.str, "shape": shape, "content": content}
    if isinstance(value, dict):
        return {key: to_plain(entry, f"{where}, {key}", advice) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(to_plain(entry, f"{where}, {index}", advice) for index, entry in enumerate(value))
    found = f"found {type(value).__name__} in {where}{advice and f': {advice}'}"
    raise ValueError(f"A file holds tensors, arrays and plain values only, {found}.")


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given."""
    if isinstance(value, dict) and ARRAY in value:
        flat = np.frombuffer(value["content"].numpy().tobytes(), np.dtype(value[ARRAY]))
        # A scalar, such as the variance of VecNormalize's returns, has no shape in the file
        return flat[0] if value["shape"] is None else flat.reshape(value["shape"]).copy()
    if isinstance(value, dict):
        return {key: from_plain(entry) for key, entry in value.items()}
    return type(value)(map(from_plain, value)) if isinstance(value, list | tuple) else value
