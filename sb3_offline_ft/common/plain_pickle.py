"""
Pickles of Stable-Baselines3, read without running code that they hold.

A pickle is a program that names functions and calls them. Here it can name only what follows, none of which does more than
hold data: arrays, random generators, spaces, and the classes of policies, networks, optimizers and replay buffers of
Stable-Baselines3, sb3-contrib, PyTorch and this package.
"""

import base64
import enum
import io
import pickle
import re
from typing import IO, Any

from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from torch import nn, optim

_NAMES = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor"},
    "numpy.random._mt19937": {"MT19937"},
    "numpy.random._pcg64": {"PCG64"},
    "numpy.random.bit_generator": {"SeedSequence", "__pyx_unpickle_SeedSequence"},
    "torch": {"device"},
}
_MODULES = re.compile(
    r"gymnasium\.spaces\.\w+|torch\.nn\.modules\.\w+|torch\.optim\.\w+|(stable_baselines3|sb3_contrib|sb3_offline_ft)\.[\w.]+"
    r"\.(policies|torch_layers|buffers|her_replay_buffer|goal_selection_strategy)"
)
_CLASSES = (spaces.Space, nn.Module, optim.Optimizer, BaseBuffer, enum.Enum)


class NotPlainError(ValueError):
    """A pickle names something that could run code."""


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles that name nothing else than the module's docstring says."""

    def find_class(self, module: str, name: str) -> Any:
        """
        :param module: A module that the pickle names
        :param name: A name in it
        :return: What has the name
        :raises NotPlainError: It is none of those that are known to be harmless
        """
        # NumPy 1 called it so
        known = name in _NAMES.get(module.replace("numpy.core.", "numpy._core."), ())
        if known or (_MODULES.fullmatch(module) and "." not in name):
            found = super().find_class(module, name)
            if known or (isinstance(found, type) and issubclass(found, _CLASSES)):
                return found
        raise NotPlainError(f"it names {module}.{name}, which could run code")


def load_plain(stream: IO[bytes]) -> Any:
    """
    :param stream: A pickle
    :return: The object
    :raises NotPlainError: It names something that could run code; nothing has run
    :raises Exception: It is damaged: whatever unpickling raises
    """
    return PlainUnpickler(stream).load()


def plain_setting(setting: Any) -> Any:
    """
    :param setting: One of the settings in a zip file of Stable-Baselines3, as JSON has it
    :return: Its value
    :raises NotPlainError: It is pickled, and names something that could run code; nothing has run
    :raises Exception: It is damaged: whatever unpickling raises
    """
    if isinstance(setting, dict) and ":serialized:" in setting:
        return load_plain(io.BytesIO(base64.b64decode(setting[":serialized:"])))
    return setting
