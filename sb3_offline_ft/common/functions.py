"""Functions that users name."""

import importlib
import os
import sys
from typing import Any


def load_function(name: str, what: str) -> Any:
    """
    Import a function ``module:function``; the module may lie in the working directory.

    :param name: Where it is
    :param what: What it is for, for messages
    :return: The function, or another object that can be called
    :raises ValueError: There is no such function
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"The {what} must be given as module:function, found {name!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Cannot import the {what} {name!r}: {error}.") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ValueError(f"The {what} {name!r} is a {type(function).__name__}, expected a function.")
    return function
