"""How commands report what went wrong."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from sb3_offline_ft.common.console import echo
from sb3_offline_ft.common.termination import EXIT_CODE, Terminated, raising_terminated


@contextmanager
def reporting(command: str, interrupted: str = "interrupted, nothing was written", exit_code: int = 1) -> Iterator[None]:
    """
    Report errors in one line, warnings as notes, Ctrl-C with exit code 130 and SIGTERM with 143.

    :param command: The command's name after ``sb3-offline-ft``
    :param interrupted: What is said after Ctrl-C or SIGTERM
    :param exit_code: The exit code after an error
    :raises typer.Exit: There was an error, Ctrl-C or SIGTERM
    """

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        echo(f"Note: {message}", err=True)

    try:
        with raising_terminated(), warnings.catch_warnings():
            warnings.showwarning = note
            yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        echo(f"sb3-offline-ft {command}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(exit_code) from None
    except KeyboardInterrupt as error:
        echo(f"sb3-offline-ft {command}: {interrupted}", err=True)
        raise typer.Exit(EXIT_CODE if isinstance(error, Terminated) else 130) from None
