"""What the readers of all kinds of files share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import minari

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.common.reading import ContentError, check_is_file, check_memory, reason_of, too_large
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset

Kind: TypeAlias = Literal["minari", "minari-folder", "bundled", "npz", "hdf5", "replay-buffer", "own-replay-buffer"]


@dataclass(frozen=True)
class Source:
    """
    Where a spec leads, and how it shall be read.

    :param kind: The kind of file, which has its reader
    :param spec: The spec without options, as the dataset keeps it
    :param name: For titles and logs
    :param path: A Minari ``data`` folder or a file; ``None`` for an id still to be downloaded
    :param keys: The keys of ``Dict`` observations that are wanted, if not all
    :param trust_pickle: Whether it may be unpickled
    :param given: The Minari dataset, if it is open already
    :param progress_bar: Whether to show what has been read
    """

    kind: Kind
    spec: str
    name: str
    path: Path | None
    keys: tuple[str, ...] | None = None
    trust_pickle: bool = False
    given: minari.MinariDataset | None = None
    progress_bar: bool = False

    @property
    def where(self) -> str:
        """Names the dataset at the start of messages."""
        return f"Dataset {self.spec!r}"

    @property
    def file(self) -> Path:
        assert self.path is not None, "not downloaded yet"
        return self.path


Reader: TypeAlias = Callable[[Source], AbstractContextManager[Callable[[], OfflineDataset]]]
"""Opens a source, checks all of it that can be checked without its data, and gives a function that reads the data."""


@contextmanager
def reading(where: str, path: Path) -> Iterator[None]:
    """Turn whatever a storage library raises about a damaged file into one error that names the file."""
    try:
        yield
    except ImportError:
        raise
    except ContentError as error:
        raise ValueError(str(error)) from None
    except MemoryError as error:
        raise too_large(f"{where}: {str(path)!r}", error) from error
    except Exception as error:
        raise ValueError(
            f"{where}: cannot read {str(path)!r}, it is damaged or incomplete ({reason_of(error)}). Copy or download it again."
        ) from error


def by_column(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Put arrays that are named ``column/key`` into one dictionary a column."""
    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        column, _, key = name.partition("/")
        if key:
            columns.setdefault(column, {})[key] = array
        else:
            columns[name] = array
    return columns


def import_parquet() -> Any:
    """PyArrow's module for Parquet files, an extra."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            'Parquet files need pyarrow, which is not installed: pip install "sb3-offline-ft[parquet]".', name="pyarrow"
        ) from None
    return parquet


def read_parquet(path: Path, columns: Sequence[str], **options: Any) -> Any:
    """Columns of a Parquet file as a table of PyArrow's, if there is memory for as many as it says."""
    check_is_file(path)
    with import_parquet().ParquetFile(path) as file:
        # Of lists, all their values
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        parts = [group.column(index) for group in groups for index in range(group.num_columns)]
        wanted = [part for part in parts if any(f"{part.path_in_schema}.".startswith(f"{name}.") for name in columns)]
        check_memory(8 * sum(part.num_values for part in wanted), str(path))
        return file.read(columns=columns, **options)
