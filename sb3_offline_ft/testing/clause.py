"""What makes a function a clause of the contract."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from sb3_offline_ft.offline_td3 import OfflineTD3

Clause = Callable[..., None]
"""A function of an algorithm's class and arguments of its constructor, which raises ``AssertionError``."""


def require_algorithm(algorithm: Any) -> None:
    """Refuse what is no subclass of ``OfflineTD3`` by a ``TypeError``."""
    if not (inspect.isclass(algorithm) and issubclass(algorithm, OfflineTD3)):
        raise TypeError(f"The contract is for OfflineTD3 and its subclasses, found {algorithm!r}.")


def clause(function: Clause) -> Clause:
    """
    Make a function a clause: it refuses what is no algorithm, and hears no ``UserWarning``, as what an algorithm warns of is
    its own business.
    """

    @functools.wraps(function)
    def checked(algorithm: type[OfflineTD3], **settings: Any) -> None:
        require_algorithm(algorithm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            function(algorithm, **settings)

    return checked
