"""What the readers of all kinds of files share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Source:
    """Where a spec leads; ``path`` is a Minari ``data`` folder or a file, None for an id still to be downloaded."""

    kind: Literal["minari", "minari-folder", "bundled", "npz", "hdf5", "replay-buffer", "own-replay-buffer"]
    spec: str
    name: str
    path: Path | None


@contextmanager
def reading(where: str, path: Path) -> Iterator[None]:
    """Turn whatever a storage library raises about a damaged file into one error that names the file."""
    try:
        yield
    except ImportError:
        raise
    except ContentError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise ValueError(
            f"{where}: cannot read {str(path)!r}, it is damaged or incomplete "
            f"({type(error).__name__}: {error}). Copy or download it again."
        ) from error


class ContentError(ValueError):
    """An error that already says what is wrong."""
