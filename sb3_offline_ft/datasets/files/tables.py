"""CSV and Parquet files as datasets: their values are checked on the way in."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from packaging.version import Version

from sb3_offline_ft.common.observations import Observations, map_observations
from sb3_offline_ft.datasets.columns import split_ends
from sb3_offline_ft.datasets.files.arrays import dataset_from_arrays
from sb3_offline_ft.datasets.files.column_map import ColumnMap, Names, VectorNames
from sb3_offline_ft.datasets.files.reading import Source, reading
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.validation import ACTION_TOLERANCE

RewardFunction = Callable[[Any, npt.NDArray[np.float32], Any], npt.ArrayLike]
"""Takes observations, actions and next observations of ``N`` rows, returns their ``N`` rewards."""

_CSV = (".csv", ".tsv")
_PARQUET = (".parquet", ".pq")
_PACKED = (".gz", ".bz2", ".xz", ".zst")

_LISTS = (list, tuple, np.ndarray)
_NESTED = (*_LISTS, dict)

_TRUE, _FALSE = ("true", "t", "yes", "1", "1.0"), ("false", "f", "no", "0", "0.0")


def is_table(path: Path) -> bool:
    """
    :param path: A file.
    :return: Whether its name says that it is a table we read.
    """
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1].lower() in (*_CSV, *_PARQUET)


def table_columns(path: Path) -> list[str]:
    """
    :param path: A table.
    :return: The names of its columns.
    :raises ValueError: if it cannot be read, or two columns have the same name.
    """
    where = f"Table {str(path)!r}"
    with reading(where, path):
        if _is_parquet(path):
            names = list(_parquet().read_schema(path).names)
        else:
            import pandas as pd

            # Without a header, so that pandas does not rename columns with the same name
            first = pd.read_csv(path, sep=_separator(path), header=None, nrows=1, dtype=str, keep_default_na=False)
            names = [str(name).strip() for name in first.iloc[0]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where} has more than one column {twice[0]!r}: rename all but one.")
    return names


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
    """Read tables whose rows are steps.

    Where there is no column of next observations, they are taken from the following row of the same episode; the last row of
    an episode that did not terminate is dropped then, with a warning.

    :param paths: The files, in order.
    :param columns: Which columns mean what.
    :param join: Let an episode go on in the next file; otherwise every file begins a new one.
    :param reward_function: Computes the rewards, instead of a column.
    :param action_space: Actions must lie within it.
    :param name: The dataset's name.
    :param progress: Called with every file before it is read.
    :param announce: Called with the columns that were found in the first file.
    :return: The dataset; it has no spec.
    :raises OSError: if a file cannot be opened.
    :raises ValueError: if something in a file is wrong: the message names the file, the column and the row.
    """
    pieces: list[_Piece] = []
    found: ColumnMap | None = None
    for path in map(Path, paths):
        if progress is not None:
            progress(path)
        in_this = (columns or ColumnMap()).resolve(
            table_columns(path), f"Table {str(path)!r}", needs_reward=reward_function is None
        )
        if found is None:
            found = in_this
            if announce is not None:
                announce(found)
        elif in_this != found:
            here, there = dict(in_this.lines()), dict(found.lines())
            other = next(key for key in here | there if here.get(key) != there.get(key))
            raise ValueError(
                f"Table {str(path)!r} does not go with {str(paths[0])!r}: expected {there.get(other, 'no columns')} for "
                f"{other}, found {here.get(other, 'none')}."
            )
        pieces.append(_Reader(path, in_this).read(action_space))
    if found is None:
        raise ValueError("There are no tables to read.")
    dataset = _put_together(pieces, found, join, name, [Path(path) for path in paths])
    return dataset if reward_function is None else with_rewards(dataset, reward_function)


@dataclass
class _Piece:
    """What one file holds."""

    observations: Observations
    next_observations: Observations | None
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_] | None
    episodes: npt.NDArray[Any] | None
    first_episode: Any = None
    last_episode: Any = None


class _Reader:
    """Reads one table with the columns that were found in it.

    :param path: The file.
    :param columns: The columns.
    """

    def __init__(self, path: Path, columns: ColumnMap) -> None:
        self.path, self.columns, self.where = path, columns, f"Table {str(path)!r}"
        self.frame = self._frame()
        self.rows = np.arange(len(self.frame))

    def read(self, action_space: spaces.Box | None) -> _Piece:
        names = self.columns
        if not len(self.frame):
            raise ValueError(f"{self.where} has no rows.")
        episodes = None if names.episode is None else self._labels(names.episode)
        if names.time is not None:
            episodes = self._sort(names.time, episodes)
        if episodes is not None and names.episode is not None:
            self._check_contiguous(names.episode, episodes)
        parts = self._parts(names.actions or (), "actions")
        actions = np.concatenate(parts, axis=1)
        if action_space is not None:
            self._check_bounds(actions, np.repeat(names.actions or (), [part.shape[1] for part in parts]), action_space)
        called = {"terminations": names.terminated, "truncations": names.truncated, "dones": names.done}
        columns = {meaning: name for meaning, name in called.items() if name is not None}
        ends = split_ends({meaning: self._flags(name) for meaning, name in columns.items()}, columns, self.where, self._row)
        return _Piece(
            observations=self._observations(names.observations or (), "observations"),
            next_observations=(
                None if names.next_observations is None else self._observations(names.next_observations, "next_observations")
            ),
            actions=actions,
            rewards=np.zeros(len(actions), np.float32) if names.reward is None else self._numbers(names.reward),
            terminated=ends.get("terminations", np.zeros(len(self.frame), np.bool_)),
            truncated=ends.get("truncations"),
            episodes=episodes,
            first_episode=None if names.episode is None else self._values(names.episode).iloc[0],
            last_episode=None if names.episode is None else self._values(names.episode).iloc[-1],
        )

    def _frame(self) -> Any:
        wanted = self.columns.columns()
        with reading(self.where, self.path):
            if _is_parquet(self.path):
                return _parquet().read_table(self.path, columns=wanted).to_pandas()
            import pandas as pd

            # The default reads every digit since pandas 3, and naming a precision is deprecated there
            exact: dict[str, Any] = {} if Version(pd.__version__).major >= 3 else {"float_precision": "round_trip"}
            # All columns, as pandas does not see cells too many when it is asked for some
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                frame = pd.read_csv(
                    self.path,
                    sep=_separator(self.path),
                    names=table_columns(self.path),
                    header=None,
                    skiprows=1,
                    index_col=False,
                    low_memory=False,
                    **exact,
                )
            return frame[wanted]

    def _row(self, index: Any) -> str:
        row = int(self.rows[index])
        return f"row {row + 1}" + ("" if _is_parquet(self.path) else f" (line {row + 2})")

    def _values(self, name: str) -> Any:
        series = self.frame[name]
        return series if self.columns.time is None else series.iloc[self.rows]

    def _numbers(self, name: str) -> npt.NDArray[np.float32]:
        import pandas as pd

        series = self._values(name)
        if len(bad := np.flatnonzero(_are(_NESTED, series))):
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(bad[0])}: expected a number, found a "
                f"{type(series.iloc[bad[0]]).__name__}. Is this the right column?"
            )
        values = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            cell = series.iloc[bad[0]]
            is_text = isinstance(cell, str)
            advice = (
                "Is this the right column?"
                if is_text and len(bad) == len(values)
                else "Repair the value or remove the episode."
            )
            found = f"the text {cell!r}" if is_text else "an empty cell or NaN" if pd.isna(cell) else str(cell)
            more = f"; {len(bad):,} of {len(values):,} rows are like that" if len(bad) > 1 else ""
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(bad[0])}: expected a number, found {found}{more}. {advice}"
            )
        with np.errstate(over="ignore"):
            numbers: npt.NDArray[np.float32] = values.astype(np.float32)
        if len(large := np.flatnonzero(~np.isfinite(numbers))):
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(large[0])}: {values[large[0]]} is too large for float32, in which "
                "datasets are kept. Use other units."
            )
        return numbers

    def _parts(self, names: Names, meaning: str) -> list[npt.NDArray[np.float32]]:
        """Read the columns of a vector: one of lists gives as many numbers as a list holds, any other one."""
        return [
            self._lists(name, meaning) if _are(_LISTS, self._values(name)).any() else self._numbers(name)[:, None]
            for name in names
        ]

    def _lists(self, name: str, meaning: str) -> npt.NDArray[np.float32]:
        length = None
        rows: list[npt.NDArray[np.float64]] = []
        for index, cell in enumerate(self._values(name)):
            place = f"{self.where}, column {name!r}, {self._row(index)}"
            if not isinstance(cell, _LISTS):
                raise ValueError(f"{place}: expected a list of numbers, found an empty cell.")
            if any(isinstance(number, _NESTED) for number in cell):
                raise ValueError(
                    f"{place}: expected a list of numbers, found lists within it; a table holds vectors, so flatten them, or "
                    "take a .npz file or a Minari dataset for images."
                )
            length = len(cell) if length is None else length
            if len(cell) != length or length == 0:
                raise ValueError(
                    f"{place}: expected {length or 'some'} numbers as in the first row, found {len(cell)}. Every row of "
                    f"{meaning} must be of the same length."
                )
            try:
                rows.append(np.array(cell, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: expected a list of numbers ({error}).") from None
            if not np.isfinite(rows[-1]).all():
                raise ValueError(
                    f"{place}: expected numbers, found {', '.join(map(str, cell))}. Repair the value or remove the episode."
                )
        return np.asarray(rows, np.float32)

    def _observations(self, names: VectorNames, meaning: str) -> Observations:
        if isinstance(names, dict):
            return {key: np.concatenate(self._parts(one, f"{meaning}[{key!r}]"), axis=1) for key, one in names.items()}
        return np.concatenate(self._parts(names, meaning), axis=1)

    def _flags(self, name: str) -> npt.NDArray[np.bool_]:
        series = self._values(name)
        if series.dtype == np.bool_:
            return np.asarray(series.to_numpy(), np.bool_)
        texts = series.astype(str).str.strip().str.lower()
        true, false = texts.isin(_TRUE).to_numpy(np.bool_), texts.isin(_FALSE).to_numpy(np.bool_)
        if len(bad := np.flatnonzero(~(true | false))):
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(bad[0])}: expected 0 or 1, or true or false, found "
                f"{str(series.iloc[bad[0]])!r}."
            )
        return np.asarray(true)

    def _labels(self, name: str) -> npt.NDArray[Any]:
        """Number the values of a column, in the order in which they turn up."""
        import pandas as pd

        if len(bad := np.flatnonzero(_are(_NESTED, self.frame[name]))):
            raise ValueError(f"{self.where}, column {name!r}, {self._row(bad[0])}: expected a number or name, found a list.")
        codes, _ = pd.factorize(self.frame[name])
        if len(bad := np.flatnonzero(codes < 0)):
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(bad[0])}: expected the number or name of the episode, found "
                "an empty cell."
            )
        return np.asarray(codes)

    def _sort(self, name: str, episodes: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        import pandas as pd

        series = self.frame[name]
        if len(bad := np.flatnonzero(series.isna())):
            raise ValueError(f"{self.where}, column {name!r}, {self._row(bad[0])}: expected a time, found an empty cell.")
        if pd.api.types.is_numeric_dtype(series):
            times = series.to_numpy()
        else:
            try:
                with warnings.catch_warnings():
                    # pandas says that it tries one format after the other
                    warnings.simplefilter("ignore", UserWarning)
                    times = pd.to_datetime(series, utc=True).to_numpy(dtype="datetime64[ns]")
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.where}, column {name!r}: expected numbers or dates ({' '.join(str(error).split())})."
                ) from None
        groups = np.zeros(len(series), np.int64) if episodes is None else episodes
        self.rows = np.lexsort((times, groups))
        values, groups = times[self.rows], groups[self.rows]
        same = np.flatnonzero((values[1:] == values[:-1]) & (groups[1:] == groups[:-1]))
        if len(same):
            raise ValueError(
                f"{self.where}, column {name!r}, {self._row(same[0] + 1)}: the time {series.iloc[self.rows[same[0]]]} is "
                f"also in {self._row(same[0])} of the same episode, so the order of the rows is not known."
            )
        return None if episodes is None else groups

    def _check_contiguous(self, name: str, episodes: npt.NDArray[Any]) -> None:
        starts = np.flatnonzero(np.diff(episodes, prepend=-1))
        seen: set[int] = set()
        for start in starts.tolist():
            if (episode := int(episodes[start])) in seen:
                label = self.frame[name].iloc[self.rows[start]]
                raise ValueError(
                    f"{self.where}, column {name!r}, {self._row(start)}: the episode {label!s} goes on here after another. "
                    "Expected the rows of an episode one after the other: sort the file, or name the column of time with "
                    "--time."
                )
            seen.add(episode)

    def _check_bounds(self, actions: npt.NDArray[np.float32], columns: npt.NDArray[np.str_], space: spaces.Box) -> None:
        low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
        if actions.shape[1] != low.size:
            raise ValueError(
                f"{self.where}: expected {low.size} columns of actions, as the action space has, found {actions.shape[1]}: "
                f"{', '.join(self.columns.actions or ())}."
            )
        extent = np.where(np.isfinite(high - low), high - low, 1.0)
        beyond = np.maximum(low - actions, actions - high) > ACTION_TOLERANCE * extent
        if beyond.any():
            row, dimension = (int(i) for i in np.argwhere(beyond)[0])
            raise ValueError(
                f"{self.where}, column {str(columns[dimension])!r}, {self._row(row)}: expected an action from "
                f"{low[dimension]:g} to {high[dimension]:g}, found {actions[row, dimension]:g}; "
                f"{int(beyond.any(axis=1).sum()):,} of {len(actions):,} rows are out of bounds. Convert the actions to the "
                "units of the environment, or clip those that were recorded before the environment clipped them, with "
                "--clip-actions."
            )


def _put_together(pieces: list[_Piece], columns: ColumnMap, join: bool, name: str, paths: Sequence[Path]) -> OfflineDataset:
    starts = []
    for index, piece in enumerate(pieces):
        here = np.zeros(len(piece.actions), np.bool_)
        here[0] = index == 0 or not join or piece.first_episode != pieces[index - 1].last_episode
        if piece.episodes is not None:
            here[1:] = piece.episodes[1:] != piece.episodes[:-1]
        starts.append(here)
    terminations = np.concatenate([piece.terminated for piece in pieces])
    truncated = [piece.truncated for piece in pieces if piece.truncated is not None]
    truncations = np.concatenate(truncated) if truncated else np.zeros(len(terminations), np.bool_)
    truncations |= np.roll(np.concatenate(starts), -1) & ~terminations
    arrays = {
        "actions": np.concatenate([piece.actions for piece in pieces]),
        "rewards": np.concatenate([piece.rewards for piece in pieces]),
        "terminations": terminations,
        "truncations": truncations,
    }
    for meaning in ("observations", "next_observations"):
        parts = [observations for piece in pieces if (observations := getattr(piece, meaning)) is not None]
        if parts:
            joined = map_observations(lambda *one: np.concatenate(one), *parts)
            arrays |= {f"{meaning}/{key}": array for key, array in joined.items()} if isinstance(joined, dict) else {
                meaning: joined
            }  # fmt: skip
    # The kind of file makes no difference to what is made of arrays
    dataset = dataset_from_arrays(arrays, Source("npz", name, name, paths[0]), f"Dataset {name!r}")
    known = {key: value for key, value in dataset.provenance.items() if key not in ("source", "file")}
    facts = {"source": "tables", "files": [path.name for path in paths], "columns": dict(columns.lines())}
    return dataset.with_facts(spec=None, provenance=facts | known)


def with_rewards(dataset: OfflineDataset, function: RewardFunction) -> OfflineDataset:
    """Replace the rewards by computed ones.

    :param dataset: The dataset.
    :param function: Computes them.
    :return: A dataset with them, which shares the other columns and has no spec.
    :raises ValueError: if the function returns something else than ``N`` finite numbers.
    """
    where = f"Dataset {dataset.name!r}"
    rewards = np.asarray(function(dataset.observations, dataset.actions, dataset.next_observations))
    if rewards.shape != (len(dataset),) or rewards.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}: the reward function must return one number for each of the {len(dataset):,} rows, an array of shape "
            f"({len(dataset)},), found {rewards.dtype} of shape {rewards.shape}."
        )
    if len(bad := np.flatnonzero(~np.isfinite(rewards))):
        raise ValueError(f"{where}: the reward function returned {rewards[bad[0]]} for row {bad[0] + 1}, expected a number.")
    rewarded = OfflineDataset.from_columns(
        dataset.observations,
        dataset.actions,
        rewards,
        dataset.next_observations,
        dataset.terminations,
        dataset.truncations,
        episode_starts=dataset.episode_starts,
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        name=dataset.name,
        provenance=dataset.provenance,
        key_order=dataset.key_order,
        copy=False,
    )
    # Whether to clip actions is said there
    return replace(rewarded, sources=tuple(replace(part, spec=None) for part in dataset.sources))


def _are(kinds: tuple[type, ...], series: Any) -> npt.NDArray[np.bool_]:
    """Tell which cells are of a kind; only columns of objects hold others than numbers and texts."""
    if series.dtype != object:
        return np.zeros(len(series), np.bool_)
    return np.array([isinstance(cell, kinds) for cell in series], np.bool_)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in _PARQUET


def _separator(path: Path) -> str:
    """Take the sign that is most frequent in the header."""
    import pandas as pd

    header = str(pd.read_csv(path, sep="\x01", header=None, nrows=1, dtype=str, quoting=3).iloc[0, 0])
    return max(",;\t|", key=header.count)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            'Parquet files need pyarrow, which is not installed: pip install "sb3-offline-ft[parquet]".', name="pyarrow"
        ) from None
    return parquet
