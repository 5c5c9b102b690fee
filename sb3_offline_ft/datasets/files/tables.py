"""CSV and Parquet files as datasets: their values are checked on the way in."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from packaging.version import Version

from sb3_offline_ft.common.observations import Array
from sb3_offline_ft.common.reading import check_is_file, shortened
from sb3_offline_ft.datasets.columns import FloatArray, frozen, split_ends
from sb3_offline_ft.datasets.files.arrays import dataset_from_arrays
from sb3_offline_ft.datasets.files.column_map import OPTION, VECTORS, ColumnMap, one_column
from sb3_offline_ft.datasets.files.packed_text import PACKED, open_text
from sb3_offline_ft.datasets.files.reading import Source, import_parquet, read_parquet, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.validation import ACTION_TOLERANCE

RewardFunction = Callable[[Any, FloatArray, Any], npt.ArrayLike]
"""Takes observations, actions and next observations of ``N`` rows, returns their ``N`` rewards."""

_CSV = (".csv", ".tsv")
_PARQUET = (".parquet", ".pq")

_LISTS = (list, tuple, np.ndarray)
_NESTED = (*_LISTS, dict)

_TRUE, _FALSE = ("true", "t", "yes", "1", "1.0"), ("false", "f", "no", "0", "0.0")


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it is a table we read."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1].lower() in (*_CSV, *_PARQUET)


def read_tables(
    paths: Sequence[str | Path],
    columns: ColumnMap | None = None,
    *,
    join: bool = False,
    reward_function: RewardFunction | None = None,
    action_space: spaces.Box | None = None,
    name: str = "tables",
    progress: Callable[[Path], None] | None = None,
    announce: Callable[[ColumnMap], None] | None = None,
) -> OfflineDataset:
    """
    Read tables whose rows are steps.

    Where there is no column of next observations, they are taken from the following row of the same episode; the last row of
    an episode that did not terminate is dropped then, with a warning.

    :param paths: The files, in order
    :param columns: Which columns mean what
    :param join: Let an episode go on in the next file; otherwise every file begins a new one
    :param reward_function: Computes the rewards, instead of a column
    :param action_space: Actions must lie within it
    :param name: The dataset's name
    :param progress: Called with every file before it is read
    :param announce: Called with the columns that were found in the first file
    :return: The dataset; it has no spec
    :raises OSError: A file cannot be opened
    :raises ValueError: Something in a file is wrong: the message names the file, the column and the row
    """
    tables: list[_Table] = []
    pieces: list[dict[str, Array]] = []
    for path in map(Path, paths):
        if progress is not None:
            progress(path)
        tables.append(table := _Table(path, columns or ColumnMap(), needs_reward=reward_function is None))
        if table.columns != tables[0].columns:
            here, there = dict(table.columns.lines()), dict(tables[0].columns.lines())
            other = next(key for key in here | there if here.get(key) != there.get(key))
            raise ValueError(
                f"{table.where} does not go with {str(paths[0])!r}: expected {there.get(other, 'no columns')} for {other}, "
                f"found {here.get(other, 'none')}."
            )
        if len(tables) == 1 and announce is not None:
            announce(table.columns)
        pieces.append(piece := table.read(action_space))
        piece["starts"][0] = not (join and len(tables) > 1 and tables[-2].episodes[1] == table.episodes[0])
        table.frame = None
    if not tables:
        raise ValueError("There are no tables to read.")
    arrays = {meaning: np.concatenate([piece[meaning] for piece in pieces]) for meaning in pieces[0]}
    ends = np.roll(arrays.pop("starts"), -1) & ~arrays["terminations"]
    arrays["truncations"] = arrays.get("truncations", False) | ends
    # The kind of file makes no difference to what is made of arrays
    dataset = dataset_from_arrays(arrays, Source("npz", name, name, tables[0].path))
    known = {key: value for key, value in dataset.provenance.items() if key not in ("source", "file")}
    facts = {
        "source": "tables",
        "files": [table.path.name for table in tables],
        "columns": dict(tables[0].columns.lines()),
    }
    dataset = dataset.with_facts(spec=None, provenance=facts | known)
    return dataset if reward_function is None else with_rewards(dataset, reward_function)


@dataclass(frozen=True)
class Signals:
    """
    Columns of a table whose rows are steps.

    :param rewards: The rewards, shape ``(steps,)``, None if no column was asked for or found
    :param actions: The actions, shape ``(steps, actuators)``, None if they were not asked for
    :param numbers: Other columns of numbers
    :param texts: Columns of anything, as text
    :param episodes: What the episode of each row is called, None without such a column
    :param n_rows: Number of the rows
    """

    rewards: npt.NDArray[np.float64] | None
    actions: FloatArray | None
    numbers: dict[str, npt.NDArray[np.float64]]
    texts: dict[str, npt.NDArray[np.str_]]
    episodes: npt.NDArray[np.str_] | None
    n_rows: int


def read_signals(
    path: Path,
    columns: ColumnMap | None = None,
    *,
    needs_reward: bool,
    needs_actions: bool = False,
    numbers: Sequence[str] = (),
    texts: Sequence[str] = (),
    named_by: str = OPTION,
) -> Signals:
    """
    Read single columns of a table, exactly, in order of time if there is such a column.

    :param path: The file
    :param columns: Which columns mean actions, reward, episode and time
    :param needs_reward: Whether there has to be a column of rewards
    :param needs_actions: Whether there have to be columns of actions; they are read only then
    :param numbers: Names of other columns of numbers
    :param texts: Names of columns of anything
    :param named_by: How errors say that a column is named, with ``{}`` for the key of the column map
    :return: The columns
    :raises OSError: The file cannot be opened
    :raises ValueError: Something in it is wrong: the message names the file, the column and the row
    """
    given = columns or ColumnMap()
    asked = ColumnMap(actions=given.actions, reward=given.reward, episode=given.episode, time=given.time)
    table = _Table(path, asked, needs_reward, ("actions",) if needs_actions else (), [*numbers, *texts], named_by)
    table.load()
    reward, episode = table.columns.reward, table.columns.episode
    return Signals(
        None if reward is None else table.exact_numbers(reward),
        table.actions()[0] if needs_actions else None,
        {name: table.exact_numbers(name) for name in numbers},
        {name: table.values(name).astype(str).to_numpy(np.str_) for name in texts},
        None if episode is None else table.values(episode).astype(str).to_numpy(np.str_),
        len(table.rows),
    )


def with_rewards(dataset: OfflineDataset, function: RewardFunction) -> OfflineDataset:
    """A dataset with these rewards, which shares the other columns and has no spec."""
    where = f"Dataset {dataset.name!r}"
    rewards = np.asarray(function(dataset.observations, dataset.actions, dataset.next_observations))
    if rewards.shape != (len(dataset),) or rewards.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}: the reward function must return one number for each of the {len(dataset):,} rows, an array of shape "
            f"({len(dataset)},), found {rewards.dtype} of shape {rewards.shape}."
        )
    with np.errstate(over="ignore"):
        column = frozen(np.array(rewards, np.float32))
    if len(bad := np.flatnonzero(~np.isfinite(column))):
        raise ValueError(f"{where}: the reward function returned {rewards[bad[0]]} for row {bad[0] + 1}, expected a number.")
    # Whether to clip actions is said in the parts
    parts = tuple(replace(part, spec=None) for part in dataset.sources)
    return replace(dataset, rewards=column, spec=None, reference_scores=None, sources=parts)


class _Table:
    """One table with the columns that were found in it."""

    def __init__(
        self,
        path: Path,
        columns: ColumnMap,
        needs_reward: bool,
        vectors: Collection[str] = VECTORS,
        others: Sequence[str] = (),
        named_by: str = OPTION,
    ) -> None:
        self.path, self.where = path, f"Table {str(path)!r}"
        self.is_parquet = path.suffix.lower() in _PARQUET
        self.separator = ""
        self.names = self._column_names()
        self.columns = columns.resolve(self.names, self.where, needs_reward, vectors, named_by)
        self.others = [one_column(name, self.names, "the plan", self.where) for name in others]
        self.frame: Any = None
        self.rows = np.arange(0)
        self.episodes: tuple[Any, Any] = (None, None)
        """What the first and the last row's episode are called."""

    def load(self) -> npt.NDArray[np.bool_]:
        """Read the rows, in order of time if there is such a column; returns whether each starts an episode."""
        names = self.columns
        self.frame = self._read_frame()
        self.rows = np.arange(len(self.frame))
        if not len(self.frame):
            raise ValueError(f"{self.where} has no rows.")
        episodes = np.zeros(len(self.frame), np.int64) if names.episode is None else self._labels(names.episode)
        if names.time is not None:
            episodes = self._sort(names.time, episodes)
        starts = np.diff(episodes, prepend=-1) != 0
        if names.episode is not None:
            self._check_contiguous(names.episode, episodes, np.flatnonzero(starts))
            labels = self.values(names.episode)
            self.episodes = (labels.iloc[0], labels.iloc[-1])
        return np.asarray(starts, np.bool_)

    def read(self, action_space: spaces.Box | None) -> dict[str, Array]:
        """Columns by the names that they have in files of arrays, and ``starts``: whether a row starts an episode."""
        starts, names = self.load(), self.columns
        actions, columns = self.actions()
        arrays: dict[str, Any] = {"starts": starts, "actions": actions}
        if action_space is not None:
            self._check_bounds(actions, columns, action_space)
        flags = {"terminations": names.terminated, "truncations": names.truncated, "dones": names.done}
        called = {meaning: name for meaning, name in flags.items() if name is not None}
        arrays |= {"terminations": np.zeros(len(self.frame), np.bool_)}
        arrays |= split_ends({key: self._flags(name) for key, name in called.items()}, called, self.where, self._row)
        arrays["rewards"] = np.zeros(len(self.frame), np.float32) if names.reward is None else self._numbers(names.reward)
        for meaning in ("observations", "next_observations"):
            vectors = getattr(names, meaning) or {}
            for key, one in vectors.items() if isinstance(vectors, dict) else [(None, vectors)]:
                of = meaning if key is None else f"{meaning}[{key!r}]"
                arrays[meaning if key is None else f"{meaning}/{key}"], _ = self._vector(one, of)
        return arrays

    def actions(self) -> tuple[FloatArray, npt.NDArray[np.str_]]:
        """The actions, and the column that each of their dimensions is from."""
        return self._vector(self.columns.actions or (), "actions")

    def _column_names(self) -> list[str]:
        check_is_file(self.path)
        with reading(self.where, self.path):
            if self.is_parquet:
                names = list(import_parquet().read_schema(self.path).names)
            else:
                import pandas as pd

                # Without a header, so that pandas does not rename columns with the same name
                header: dict[str, Any] = {"header": None, "nrows": 1, "dtype": str}
                with open_text(self.path, self.where) as text:
                    line = str(pd.read_csv(text, sep="\x01", quoting=3, **header).iloc[0, 0])
                self.separator = max(",;\t|", key=line.count)
                with open_text(self.path, self.where) as text:
                    first = pd.read_csv(text, sep=self.separator, keep_default_na=False, **header)
                names = [str(name).strip() for name in first.iloc[0]]
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise ValueError(f"{self.where} has more than one column {shortened(repr(twice[0]))}: rename all but one.")
        return names

    def _read_frame(self) -> Any:
        wanted = list(dict.fromkeys([*self.columns.columns(), *self.others]))
        with reading(self.where, self.path), warnings.catch_warnings():
            if self.is_parquet:
                # What pandas has noted in the file makes an index of columns
                return read_parquet(self.path, wanted).to_pandas(ignore_metadata=True)
            import pandas as pd

            # The default reads every digit since pandas 3, and naming a precision is deprecated there
            exact: dict[str, Any] = {} if Version(pd.__version__).major >= 3 else {"float_precision": "round_trip"}
            # All columns, as pandas does not see cells too many when it is asked for some
            layout: dict[str, Any] = {"names": self.names, "header": None, "skiprows": 1, "index_col": False}
            warnings.simplefilter("error", pd.errors.ParserWarning)
            with open_text(self.path, self.where) as text:
                return pd.read_csv(text, sep=self.separator, low_memory=False, **layout, **exact)[wanted]

    def _row(self, index: Any) -> str:
        row = int(self.rows[index])
        return f"row {row + 1}" + ("" if self.is_parquet else f" (line {row + 2})")

    def _wrong(self, name: str, index: Any, problem: str) -> ValueError:
        return ValueError(f"{self.where}, column {shortened(repr(name))}, {self._row(index)}: {shortened(problem)}")

    def values(self, name: str) -> Any:
        """The values of a column, as pandas reads them."""
        series = self.frame[name]
        return series if self.columns.time is None else series.iloc[self.rows]

    def _vector(self, names: Sequence[str], meaning: str) -> tuple[FloatArray, npt.NDArray[np.str_]]:
        """The columns of a vector side by side, and the column that each of its dimensions is from."""
        frame = self.frame[list(names)]
        if all(isinstance(kind, np.dtype) and kind.kind in "iuf" for kind in frame.dtypes):
            with np.errstate(over="ignore"):
                numbers = frame.to_numpy(np.float64)[self.rows].astype(np.float32)
            if np.isfinite(numbers).all():
                return numbers, np.array(names)
        # What is wrong is told column by column
        parts = [self._part(name, meaning) for name in names]
        return np.concatenate(parts, axis=1), np.repeat(names, [part.shape[1] for part in parts])

    def _part(self, name: str, meaning: str) -> FloatArray:
        """Read a column of a vector: one of lists gives as many numbers as a list holds, any other one."""
        is_of_lists = _are(_LISTS, self.values(name)).any()
        return self._lists(name, meaning) if is_of_lists else self._numbers(name)[:, None]

    def _numbers(self, name: str) -> FloatArray:
        return self._as_float32(name, self.exact_numbers(name))

    def exact_numbers(self, name: str) -> npt.NDArray[np.float64]:
        """The values of a column, all of which have to be numbers."""
        import pandas as pd

        series = self.values(name)
        # pandas counts nanoseconds
        is_time = (isinstance(series.dtype, np.dtype) and series.dtype.kind in "mM") or hasattr(series.dtype, "tz")
        if len(bad := np.arange(len(series)) if is_time else np.flatnonzero(_are(_NESTED, series))):
            found = type(series.iloc[bad[0]]).__name__
            raise self._wrong(name, bad[0], f"expected a number, found a {found}. Is this the right column?")
        values = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        # A cell of a CSV file has no type, one of a Parquet file has
        wrong = ~np.isfinite(values) | (_are((str,), series) if self.is_parquet else False)
        if len(bad := np.flatnonzero(wrong)):
            cell = series.iloc[bad[0]]
            is_text = isinstance(cell, str)
            advice = "Repair the value or remove the episode."
            if is_text and np.isfinite(values[bad[0]]):
                advice = "The file keeps it as text: write the column as numbers."
            elif is_text and len(bad) == len(values):
                advice = "Is this the right column?"
            found = f"the text {cell!r}" if is_text else "an empty cell or NaN" if pd.isna(cell) else str(cell)
            more = f"; {len(bad):,} of {len(values):,} rows are like that" if len(bad) > 1 else ""
            raise self._wrong(name, bad[0], f"expected a number, found {found}{more}. {advice}")
        return np.asarray(values, np.float64)

    def _lists(self, name: str, meaning: str) -> FloatArray:
        cells = list(self.values(name))
        length = len(cells[0]) if isinstance(cells[0], _LISTS) else 0
        for index, cell in enumerate(cells):
            is_typed = isinstance(cell, np.ndarray) and cell.dtype != object
            if not isinstance(cell, _LISTS):
                problem = "a list of numbers, found an empty cell."
            elif any(isinstance(number, _NESTED) for number in (() if is_typed else cell)):
                problem = (
                    "a list of numbers, found lists within it; a table holds vectors, so flatten them, or take a .npz file or "
                    "a Minari dataset for images."
                )
            elif len(cell) != length or not length:
                problem = (
                    f"{length or 'some'} numbers as in the first row, found {len(cell)}. Every row of {meaning} must be of "
                    "the same length."
                )
            elif texts := [number for number in (() if is_typed else cell) if isinstance(number, str)]:
                problem = f"a list of numbers (could not convert the text {texts[0]!r}): write the column as lists of numbers."
            else:
                continue
            raise self._wrong(name, index, f"expected {problem}")
        try:
            values = np.array(cells, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where}, column {name!r}: expected lists of numbers ({error}).") from None
        if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
            found = ", ".join(map(str, cells[bad[0]]))
            raise self._wrong(name, bad[0], f"expected numbers, found {found}. Repair the value or remove the episode.")
        return self._as_float32(name, values)

    def _as_float32(self, name: str, values: npt.NDArray[np.float64]) -> FloatArray:
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float32)
        for at in np.argwhere(~np.isfinite(numbers))[:1]:
            problem = f"{values[tuple(at)]} is too large for float32, in which datasets are kept. Use other units."
            raise self._wrong(name, at[0], problem)
        return numbers

    def _flags(self, name: str) -> npt.NDArray[np.bool_]:
        series = self.values(name)
        if series.dtype == np.bool_:
            return np.asarray(series.to_numpy(), np.bool_)
        texts = series.astype(str).str.strip().str.lower()
        true, false = texts.isin(_TRUE).to_numpy(np.bool_), texts.isin(_FALSE).to_numpy(np.bool_)
        if len(bad := np.flatnonzero(~(true | false))):
            problem = f"expected 0 or 1, or true or false, found {str(series.iloc[bad[0]])!r}."
            raise self._wrong(name, bad[0], problem)
        return np.asarray(true)

    def _labels(self, name: str) -> npt.NDArray[np.int64]:
        """Number the values of a column, in the order in which they turn up."""
        import pandas as pd

        if len(bad := np.flatnonzero(_are(_NESTED, self.frame[name]))):
            raise self._wrong(name, bad[0], "expected a number or name, found a list.")
        codes, _ = pd.factorize(self.frame[name])
        if len(bad := np.flatnonzero(codes < 0)):
            raise self._wrong(name, bad[0], "expected the number or name of the episode, found an empty cell.")
        return np.asarray(codes, np.int64)

    def _sort(self, name: str, episodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort the rows of every episode by time; returns the episode of each row then."""
        import pandas as pd

        series = self.frame[name]
        if len(bad := np.flatnonzero(series.isna())):
            raise self._wrong(name, bad[0], "expected a time, found an empty cell.")
        if pd.api.types.is_numeric_dtype(series):
            times = series.to_numpy()
        else:
            try:
                with warnings.catch_warnings():
                    # pandas says that it tries one format after the other
                    warnings.simplefilter("ignore", UserWarning)
                    times = pd.to_datetime(series, utc=True).to_numpy(dtype="datetime64[ns]")
            except (TypeError, ValueError) as error:
                problem = " ".join(str(error).split())
                raise ValueError(f"{self.where}, column {name!r}: expected numbers or dates ({problem}).") from None
        self.rows = np.lexsort((times, episodes))
        times, episodes = times[self.rows], episodes[self.rows]
        same = np.flatnonzero((times[1:] == times[:-1]) & (episodes[1:] == episodes[:-1]))
        if len(same):
            problem = (
                f"the time {series.iloc[self.rows[same[0]]]} is also in {self._row(same[0])} of the same episode, so the "
                "order of the rows is not known."
            )
            raise self._wrong(name, same[0] + 1, problem)
        return episodes

    def _check_contiguous(self, name: str, episodes: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> None:
        _, first = np.unique(episodes[starts], return_index=True)
        for start in np.delete(starts, first)[:1]:
            problem = (
                f"the episode {self.values(name).iloc[start]!s} goes on here after another. Expected the rows of an "
                "episode one after the other: sort the file, or name the column of time with --time."
            )
            raise self._wrong(name, start, problem)

    def _check_bounds(self, actions: FloatArray, columns: npt.NDArray[np.str_], space: spaces.Box) -> None:
        low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
        if actions.shape[1] != low.size:
            raise ValueError(
                f"{self.where}: expected {low.size} columns of actions, as the action space has, found {actions.shape[1]}: "
                f"{', '.join(self.columns.actions or ())}."
            )
        extent = np.where(np.isfinite(high - low), high - low, 1.0)
        beyond = np.maximum(low - actions, actions - high) > ACTION_TOLERANCE * extent
        for row, dimension in np.argwhere(beyond)[:1]:
            problem = (
                f"expected an action from {low[dimension]:g} to {high[dimension]:g}, found {actions[row, dimension]:g}; "
                f"{int(beyond.any(axis=1).sum()):,} of {len(actions):,} rows are out of bounds. Convert the actions to the "
                "units of the environment, or clip those that were recorded before the environment clipped them, with "
                "--clip-actions."
            )
            raise self._wrong(str(columns[dimension]), row, problem)


def _are(kinds: tuple[type, ...], series: Any) -> npt.NDArray[np.bool_]:
    """Tell which cells are of a kind, which no cell of a column of numbers is."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(series):
        return np.zeros(len(series), np.bool_)
    return np.array([isinstance(cell, kinds) for cell in series], np.bool_)
