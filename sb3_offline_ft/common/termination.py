"""SIGTERM as an exception in the main thread, as Ctrl-C is one."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN_SECONDS = 0.1
EXIT_CODE = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whoever started the process wants it to end in order."""


@contextmanager
def raising_terminated(again: bool = True) -> Iterator[Callable[[], bool]]:
    """
    Let SIGTERM raise :class:`Terminated` within the block; in another thread than the main one, or if whoever started the
    process had it ignored, nothing changes. A process that is forked within the block ends as it would without.

    Python loses an exception that a signal raises where it cannot go on: in a destructor, a callback of a C library, a part
    of an import. So it is raised again until somebody deals with it.

    :param again: Whether to do so; not if somebody may catch it and go on
    :return: Tells whether SIGTERM has come
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) in (signal.SIG_IGN, None):
        yield lambda: False
        return
    came, process = False, os.getpid()
    alarm = getattr(signal, "SIGALRM", None) if again else None

    def end(number: int, _: object) -> None:
        nonlocal came
        if os.getpid() != process:
            signal.signal(number, before[number])
            signal.raise_signal(number)
            return
        came = True
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        # Whoever asks twice does not want to wait for what is cleaned up
        if number != alarm or not _is_being_handled():
            raise Terminated

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, alarm) if number is not None}
    try:
        yield lambda: came
    finally:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block, in which C code calls what they must not break off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = [number for name in ("SIGINT", "SIGTERM", "SIGALRM") if (number := getattr(signal, name, None)) is not None]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def _is_being_handled() -> bool:
    error = sys.exception()
    while error is not None:
        if isinstance(error, Terminated):
            return True
        error = error.__context__
    return False
