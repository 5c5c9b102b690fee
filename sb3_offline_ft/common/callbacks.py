"""Helpers for callbacks and progress bars."""

from collections.abc import Iterator
from typing import Any, TypeVar

from stable_baselines3.common import callbacks
from stable_baselines3.common.callbacks import BaseCallback, EventCallback

CallbackType = TypeVar("CallbackType", bound=BaseCallback)


def find_callbacks(callback: BaseCallback | None, kind: type[CallbackType]) -> Iterator[CallbackType]:
    """
    Find the callbacks of a kind, in lists and as children of others.

    :param callback: Where to look
    :param kind: The class to look for
    :return: The callbacks, outer ones first
    """
    if callback is None:
        return
    if isinstance(callback, kind):
        yield callback
    for child in getattr(callback, "callbacks", []):
        yield from find_callbacks(child, kind)
    if isinstance(callback, EventCallback):
        yield from find_callbacks(callback.callback, kind)


def progress_bar(total: int, description: str) -> Any:
    """
    A progress bar that looks like SB3's own.

    :param total: Number of steps
    :param description: What it counts
    :return: The bar
    :raises ImportError: tqdm or rich is missing
    """
    # SB3 chooses tqdm.rich and silences its warning there
    tqdm = getattr(callbacks, "tqdm", None)
    if tqdm is None:
        raise ImportError("A progress bar needs tqdm and rich: `pip install tqdm rich`.")
    return tqdm(total=total, desc=description)
