"""Checks of what users pass."""

import inspect
import math
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from sb3_offline_ft.common.suggestions import hint

VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def whole_number(value: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """
    Check a number of steps; YAML files write large ones as floats.

    :param value: The number
    :param name: Its name, for the message
    :param least: Smallest value allowed
    :param most: Largest value allowed, if any
    :raises ValueError: It is not a whole number, too small or too large
    """
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    is_whole = number and (isinstance(value, int) or (math.isfinite(value) and int(value) == value))
    if not is_whole or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, found {value!r}.")
    if most is not None and value > most:
        found = f"{value:.6g}" if value <= sys.float_info.max else "one of more than 300 digits"
        raise ValueError(f"`{name}` must be at most {most:,}, found {found}.")
    return int(value)


def number(value: Any, name: str) -> float:
    """
    Check a number.

    :raises ValueError: It is something else
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}` must be a number, found {value!r}.")
    return float(value)


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


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """
    :param cls: A class
    :return: All parameters of its constructor by name, those that it passes on to its bases' included: those that are given by
        position, in this order, and then the others, its own last
    """
    constructors: list[list[inspect.Parameter]] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            constructors.append(list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:])
            # A constructor that takes any keyword passes them on to the next one
            if not any(one.kind is VAR_KEYWORD for one in constructors[-1]):
                break
    parameters: dict[str, inspect.Parameter] = {}
    for found in reversed(constructors):
        named = {one.name: one for one in found if one.kind not in (VAR_POSITIONAL, VAR_KEYWORD)}
        first = {name: one for name, one in named.items() if one.kind is not KEYWORD_ONLY}
        # A default that a subclass changes is at the place that the parameter has
        passed = {
            name: one.replace(default=named[name].default) if name in named else one
            for name, one in parameters.items()
            if name not in first and (name not in named or one.default is not one.empty)
        }
        if not any(one.kind is VAR_POSITIONAL for one in found):
            passed = {name: one.replace(kind=KEYWORD_ONLY) for name, one in passed.items()}
        own = {name: one for name, one in named.items() if name not in passed}
        parameters = _in_order((first | passed | own).values())
    return parameters


def _in_order(parameters: Iterable[inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """Parameters as Python demands them: none by position that needs a value after one that does not, the others last."""
    ordered, has_default = list[inspect.Parameter](), False
    for one in parameters:
        has_default |= one.default is not one.empty
        ordered.append(one.replace(kind=KEYWORD_ONLY) if has_default and one.default is one.empty else one)
    return {one.name: one for one in sorted(ordered, key=lambda one: one.kind)}


def constructor_arguments(cls: type) -> dict[str, Any]:
    """
    :param cls: A class
    :return: The arguments of :func:`constructor_parameters` by name with their defaults; ``inspect.Parameter.empty`` is for
        none
    """
    return {name: one.default for name, one in constructor_parameters(cls).items()}


def show_constructor(cls: type) -> None:
    """
    Let ``inspect.signature`` of a class and of its constructor show all parameters, those passed on to its bases included.

    :param cls: The class
    """
    parameters = list(constructor_parameters(cls).values())
    setattr(cls, "__signature__", inspect.Signature(parameters))  # noqa: B010  # mypy knows of no such attribute
    if "__init__" in vars(cls):
        this = inspect.Parameter("self", min([inspect.Parameter.POSITIONAL_OR_KEYWORD, *(one.kind for one in parameters)]))
        vars(cls)["__init__"].__signature__ = inspect.Signature([this, *parameters])


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
