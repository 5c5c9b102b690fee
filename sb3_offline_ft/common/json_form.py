"""Values in the form of JSON."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def json_form(value: Any, other: Callable[[Any], Any] = str) -> Any:
    """
    :param value: Anything
    :param other: Gives the form of an object that is neither a number, a text nor a collection of such
    :return: The same in the form of JSON, but that numbers may be infinite or NaN
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # Of a subclass, the text itself
        return str.__str__(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): json_form(entry, other) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_form(entry, other) for entry in value]
    # NumPy's numbers and arrays, and torch's tensors
    if hasattr(value, "tolist") and not isinstance(value, type):
        return json_form(value.tolist(), other)
    return other(value)
