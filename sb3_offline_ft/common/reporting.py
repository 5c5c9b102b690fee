"""How commands report what went wrong."""

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def reporting(command: str, interrupted: str = "interrupted, nothing was written", exit_code: int = 1) -> Iterator[None]:
    """
    Report errors in one line, warnings as notes, and Ctrl-C or SIGTERM with exit code 130.

    :param command: The command's name after ``sb3-offline-ft``
    :param interrupted: What is said after Ctrl-C
    :param exit_code: The exit code after an error
    :raises typer.Exit: There was an error, or Ctrl-C
    """

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"Note: {message}", err=True)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = note
            yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        typer.echo(f"sb3-offline-ft {command}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(exit_code) from None
    except KeyboardInterrupt:
        typer.echo(f"sb3-offline-ft {command}: {interrupted}", err=True)
        raise typer.Exit(130) from None
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
