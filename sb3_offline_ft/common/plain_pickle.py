"""Settings that Stable-Baselines3 has pickled, read without running code that they hold."""

import base64
import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_CALLS = "REDUCE BUILD NEWOBJ NEWOBJ_EX INST OBJ EXT1 EXT2 EXT4 PERSID BINPERSID NEXT_BUFFER READONLY_BUFFER".split()


class NotPlainError(ValueError):
    """A pickle does more than naming classes and holding plain values."""


@dataclass(frozen=True)
class Name:
    """What a pickle names; nothing has been imported."""

    module: str
    name: str

    def find(self, roots: Iterable[str], kinds: tuple[type, ...]) -> type:
        """
        Look the class up.

        :param roots: Modules, or packages of which any module may be, that may be imported
        :param kinds: What it may be a subclass of
        :return: The class
        :raises NotPlainError: It is none of these
        """
        if any(self.module == root or self.module.startswith(f"{root}.") for root in roots):
            found = getattr(import_module(self.module), self.name, None)
            if isinstance(found, type) and issubclass(found, kinds):
                return found
        raise NotPlainError(f"it names {self.module}.{self.name}, which could run code")


# The one that is written in Python: the other one has its instructions in C
class _PlainUnpickler(pickle._Unpickler):
    """
    A pickle is a program: it names functions, calls them and writes into objects. This reader has none of these
    instructions. It puts together texts, numbers, lists, tuples, sets and dictionaries, and keeps names as names.
    """

    dispatch = {  # noqa: RUF012  # as in its base class
        code: action
        for code, action in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in {getattr(pickle, name) for name in _CALLS}
    }

    def find_class(self, module: str, name: str) -> Name:
        return Name(module, name)


def load_plain(content: bytes) -> Any:
    """
    :param content: A pickle
    :return: What it holds, its names as :class:`Name`
    :raises NotPlainError: It calls something
    :raises Exception: It is damaged: whatever unpickling raises
    """
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except KeyError as error:
        if error.args and isinstance(error.args[0], int):
            raise NotPlainError("it calls functions, which could be any") from None
        raise


def plain_setting(setting: Any) -> Any:
    """
    :param setting: One of the settings in a zip file of Stable-Baselines3, as JSON has it
    :return: Its value
    :raises NotPlainError: It is pickled, and calls something
    :raises Exception: It is damaged: whatever unpickling raises
    """
    if isinstance(setting, dict) and ":serialized:" in setting:
        return load_plain(base64.b64decode(setting[":serialized:"]))
    return setting
