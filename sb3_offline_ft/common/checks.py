"""Checks of what users pass."""

import inspect
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from sb3_offline_ft.common.suggestions import hint

VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def whole_number(value: Any, name: str, least: int = 0) -> int:
    """
    Check a number of steps; YAML files write large ones as floats.

    :param value: The number
    :param name: Its name, for the message
    :param least: Smallest value allowed
    :raises ValueError: It is not a whole number, or too small
    """
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or int(value) != value or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, found {value!r}.")
    return int(value)


def number_pair(value: Any, name: str) -> tuple[float, float]:
    """
    Check a pair of numbers; YAML files and saved models write it as a list.

    :raises ValueError: It is something else, or a number is not finite
    """
    pair = tuple(value) if isinstance(value, list | tuple | np.ndarray) else ()
    if len(pair) != 2 or any(isinstance(number, bool) or not isinstance(number, Real) for number in pair):
        raise ValueError(f"`{name}` must be two numbers, found {value!r}.")
    if not all(math.isfinite(number) for number in pair):
        raise ValueError(f"`{name}` must be finite, found {value!r}.")
    return float(pair[0]), float(pair[1])


def constructor_arguments(cls: type) -> dict[str, Any]:
    """
    :param cls: A class
    :return: All arguments that its constructor takes, those that it passes on to its bases' included, by name with their
        defaults; ``inspect.Parameter.empty`` is for none
    """
    arguments: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = {one.name: one.default for one in parameters if one.kind not in (VAR_POSITIONAL, VAR_KEYWORD)}
        arguments = named | arguments
        # A constructor that takes any keyword passes them on to the next one
        if not any(parameter.kind is VAR_KEYWORD for parameter in parameters):
            break
    return {name: default for name, default in arguments.items() if name != "self"}


def known_keywords(cls: type, keywords: Iterable[str], function: str, excluded: Iterable[str] = ()) -> None:
    """
    Check that keywords are arguments of a class's constructor.

    :param cls: The class
    :param keywords: The keywords
    :param function: Who asks, for the message
    :param excluded: Arguments of the constructor that are not allowed here
    :raises TypeError: One is not
    """
    known = constructor_arguments(cls).keys() - set(excluded)
    for name in keywords:
        if name not in known:
            raise TypeError(f"{function} got an unknown keyword {name!r}: {hint(name, known)}")
