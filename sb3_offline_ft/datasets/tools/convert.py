"""Logs of any kind as a Minari dataset."""

import glob
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft import __version__
from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.observations import Observations, by_key, map_observations, named_arrays
from sb3_offline_ft.common.suggestions import first_of
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.minari_writing import check_new_id, write_minari
from sb3_offline_ft.datasets.files.tables import RewardFunction, is_table, read_tables, with_rewards
from sb3_offline_ft.datasets.keys import dict_of
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reference_scores import ReferenceScores, reference_scores_for
from sb3_offline_ft.datasets.sources import load_dataset
from sb3_offline_ft.datasets.tools.show import progress_bar
from sb3_offline_ft.datasets.validation import as_flattened_by, check_compatible, fit_to_space, with_clipping
from sb3_offline_ft.datasets.validation import clip_actions as clipped_to

Log = str | Path | OfflineDataset
Bounds = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ConvertedDataset:
    """
    What came of a conversion.

    :param dataset_id: The Minari id
    :param folder: Where the dataset is
    :param transitions: Number of rows
    :param episodes: Number of episodes
    :param notes: What had to be assumed or changed, in words
    """

    dataset_id: str
    folder: Path
    transitions: int
    episodes: int
    notes: tuple[str, ...]


def convert_logs(
    logs: Sequence[str | Path | OfflineDataset],
    dataset_id: str,
    *,
    columns: ColumnMap | None = None,
    env: str | gym.Env[Any, Any] | None = None,
    action_low: npt.ArrayLike | None = None,
    action_high: npt.ArrayLike | None = None,
    join_files: bool = False,
    clip_actions: bool = False,
    reward_function: RewardFunction | None = None,
    random_score: float | None = None,
    expert_score: float | None = None,
    facts: dict[str, Any] | None = None,
    overwrite: bool = False,
    keep_in: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> ConvertedDataset:
    """
    Write logs as a Minari dataset into the local Minari folder, whole or not at all.

    :param logs: Tables (CSV, TSV or Parquet files whose rows are steps, folders of them, or wildcards), and whatever
        :func:`load_dataset` takes
    :param dataset_id: The new dataset's id
    :param columns: Which columns of the tables mean what; guessed from their names where not said
    :param env: The environment the logs come from: a Gymnasium id, or an environment. Its spaces become the dataset's
    :param action_low: Lower bounds of the actions where neither an environment nor the logs tell: a number, or one for each
        dimension
    :param action_high: Upper bounds
    :param join_files: Let an episode go on from one table to the next
    :param clip_actions: Clip all actions to their bounds instead of refusing those beyond
    :param reward_function: Computes all rewards from observations, actions and next observations of ``N`` rows
    :param random_score: Mean return of a random policy; by default that known for the environment
    :param expert_score: Mean return of an expert
    :param facts: Metadata: any of ``algorithm_name, author, author_email, code_permalink, description, requirements``
    :param overwrite: Replace a dataset with this id. It is kept until the new one is complete
    :param keep_in: Folder that gets the dataset if it cannot be written to its place, as on a full disk. ``OSError`` is raised
        then too
    :param console: Where to show the columns found and the progress; nothing is shown if omitted
    :param options: Passed to :func:`load_dataset`
    :return: What was written
    :raises OSError: A log cannot be opened, or the dataset cannot be written: the message says what became of it
    :raises FileExistsError: There is such a dataset already, or there is one by the end: then the new one is kept, in
        ``keep_in`` or under the next free version, and the message says where
    :raises ValueError: The id, a log, or what is said about them is wrong
    """
    check_new_id(dataset_id, overwrite)
    if (random_score is None) != (expert_score is None):
        raise ValueError("Give both a random and an expert score, or none of them.")
    console = console or PlainConsole(quiet=True)
    tables, others = find_logs(logs)
    if columns is not None and not tables:
        raise ValueError("Columns were named, but there is no table (CSV, TSV or Parquet) among the logs.")
    if clip_actions:
        options["clip_actions"] = True
    with warnings.catch_warnings(record=True) as caught, _environment(env) as made:
        warnings.simplefilter("always")
        bounds = _bounds(action_low, action_high)
        table_options = {"columns": columns, "join": join_files, "reward_function": reward_function}
        datasets = _read_tables(tables, made, clip_actions, console, table_options) if tables else []
        datasets += _load(others, reward_function, console, options)
        observation_space, action_space = _spaces(datasets, made, bounds)
        datasets = [_as_seen_in(made, dataset, observation_space, action_space) for dataset in datasets]
        episodes = [(dataset, pieces) for dataset in datasets for pieces in _continuous_pieces(dataset)]
        scores = _scores(datasets, made, random_score, expert_score)
        folder = write_minari(
            dataset_id,
            _buffers(episodes, console),
            observation_space=observation_space,
            action_space=action_space,
            env=made,
            facts={
                "description": _description(tables, others, datasets[0]),
                **{key: value for key, value in (facts or {}).items() if value is not None},
                **({} if scores is None else {"ref_min_score": scores.random, "ref_max_score": scores.expert}),
            },
            overwrite=overwrite,
            keep_in=keep_in,
            check=lambda folder: _check_same(folder, datasets),
        )
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for dataset in datasets:
        if (clipped := dataset.provenance.get("actions_clipped", {}).get("rows", 0)) > 0:
            notes.append(f"{dataset.name}: actions of {clipped:,} transitions were clipped to their bounds.")
    if n_split := sum(len(pieces) > 1 for _, pieces in episodes):
        notes.append(
            f"{n_split:,} episode{'s were' if n_split > 1 else ' was'} cut where a row does not continue from the next "
            "observation of the row before, as Minari keeps each observation once."
        )
    n_episodes = sum(len(pieces) for _, pieces in episodes)
    return ConvertedDataset(dataset_id, folder, sum(map(len, datasets)), n_episodes, tuple(dict.fromkeys(notes)))


def find_logs(logs: Sequence[Log]) -> tuple[list[Path], list[Log]]:
    """Tell tables, in place of folders and wildcards the files in them, from what :func:`load_dataset` takes."""
    tables: list[Path] = []
    others: list[Log] = []
    for log in logs:
        path = None if isinstance(log, OfflineDataset) else Path(log).expanduser()
        if path is None:
            others.append(log)
        elif path.is_dir() and not _is_minari(path):
            inside = sorted((file for file in path.rglob("*") if file.is_file() and is_table(file)), key=_natural)
            if not inside:
                raise FileNotFoundError(
                    f"The folder {str(path)!r} holds neither a Minari dataset nor a table (.csv, .tsv, .parquet)."
                )
            tables += inside
        elif not path.exists() and (matches := glob.glob(str(path), recursive=True)):
            inside, specs = find_logs([*sorted(map(Path, matches), key=_natural)])
            tables += inside
            others += specs
        elif not is_table(path):
            others.append(log)
        elif path.is_file():
            tables.append(path)
        else:
            raise FileNotFoundError(f"No table {str(path.absolute())!r}.")
    if not tables and not others:
        raise ValueError("There are no logs to convert.")
    return tables, others


# Reading


@contextmanager
def _environment(env: str | gym.Env[Any, Any] | None) -> Iterator[gym.Env[Any, Any] | None]:
    """The environment, closed at the end if it was made here."""
    if not isinstance(env, str):
        yield env
        return
    try:
        made = gym.make(env)
    except Exception as error:
        raise ValueError(f"Cannot make the environment {env!r} ({type(error).__name__}: {error}).") from error
    with closing(made):
        yield made


def _read_tables(
    tables: list[Path], env: gym.Env[Any, Any] | None, clips: bool, console: Console, options: dict[str, Any]
) -> list[OfflineDataset]:
    action_space = None if env is None or clips else env.action_space
    with progress_bar(console) as progress:
        task = progress.add_task("reading", total=len(tables))
        table = read_tables(
            tables,
            action_space=action_space if isinstance(action_space, spaces.Box) else None,
            name=_sources(tables, ()),
            progress=lambda path: progress.update(task, advance=1, description=f"reading {path.name}"),
            announce=lambda found: console.print(_columns_table(found, tables[0])),
            **options,
        )
    return [with_clipping(table) if clips else table]


def _load(
    specs: Sequence[Log], reward_function: RewardFunction | None, console: Console, options: dict[str, Any]
) -> list[OfflineDataset]:
    with progress_bar(console) as progress:
        datasets = [load_dataset(spec, **options) for spec in progress.track(specs, description="reading")]
    return datasets if reward_function is None else [with_rewards(dataset, reward_function) for dataset in datasets]


def _columns_table(columns: ColumnMap, path: Path) -> Table:
    """The columns that were found, and what follows from those that were not."""
    rows = list(columns.lines())
    if columns.episode is None and columns.truncated is None and columns.done is None:
        rows.append(("episode", "no column: an episode ends at a termination and at the end of a file"))
    if columns.terminated is None and columns.done is None:
        rows.append(("terminated", "no column: every episode counts as cut by a time limit"))
    if columns.done is not None and columns.truncated is None:
        known = f"where {columns.done} is set and {columns.terminated} is not"
        if columns.terminated is None:
            known = f"{columns.done} counts as a termination, so it must not be set at time limits"
        rows.append(("truncated", f"no column: {known}"))
    if columns.next_observations is None:
        rows.append(("next_observations", "no column: taken from the following row"))
    table = Table(title=Text(f"Columns of {path.name}"), title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# Spaces and scores


def _bounds(low: npt.ArrayLike | None, high: npt.ArrayLike | None) -> Bounds | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ValueError("Give both lower and upper bounds of the actions, or none of them.")
    lower, upper = np.broadcast_arrays(np.asarray(low, np.float32), np.asarray(high, np.float32))
    if not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower < upper).all()):
        raise ValueError(f"Bounds of actions must be finite, the lower ones below the upper ones, found {lower} and {upper}.")
    return lower, upper


def _spaces(
    datasets: Sequence[OfflineDataset], env: gym.Env[Any, Any] | None, bounds: Bounds | None
) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    if env is not None:
        if bounds is not None:
            raise ValueError("The environment knows the bounds of the actions: give the bounds or --env, not both.")
        return env.observation_space, env.action_space
    first = datasets[0]
    for other in datasets[1:]:
        if (expected := _shapes(first)) != (found := _shapes(other)):
            raise ValueError(f"{other.name!r} does not go with {first.name!r}: expected {expected}, found {found}.")
    shape = first.actions.shape[1:]
    if bounds is not None:
        if bounds[0].size not in (1, np.prod(shape)):
            raise ValueError(f"Expected one bound or {np.prod(shape)} of the actions, found {bounds[0].size}.")
        action_space: spaces.Space[Any] | None = spaces.Box(np.resize(bounds[0], shape), np.resize(bounds[1], shape))
    else:
        action_space = next((one.action_space for one in datasets if one.action_space is not None), None)
    if action_space is None:
        flat = first.actions.reshape(len(first), -1)
        smallest, largest = (", ".join(f"{value:g}" for value in extreme(flat, axis=0)) for extreme in (np.min, np.max))
        raise ValueError(
            "The bounds of the actions are not known, and algorithms scale actions by them: name the environment with --env, "
            f"or give --action-low and --action-high. The actions go from {smallest} to {largest}."
        )
    known = next((one.observation_space for one in datasets if one.observation_space is not None), None)
    return _space_of(first.observations) if known is None else known, action_space


def _shapes(dataset: OfflineDataset) -> str:
    """Shapes of one observation and of one action, in words."""
    arrays = [*named_arrays(dataset.observations, "observations"), ("actions", dataset.actions)]
    return ", ".join(f"{name} of shape {array.shape[1:]}" for name, array in arrays)


def _space_of(observations: Observations) -> spaces.Space[Any]:
    def one(array: npt.NDArray[Any]) -> spaces.Box:
        if array.dtype == np.uint8:
            return spaces.Box(0, 255, array.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    boxes = map_observations(one, observations)
    return dict_of(boxes) if isinstance(boxes, dict) else boxes


def _as_seen_in(
    env: gym.Env[Any, Any] | None,
    dataset: OfflineDataset,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> OfflineDataset:
    """The dataset as the environment shows it, or these spaces do; it must fit them."""
    if env is not None:
        dataset = as_flattened_by(dataset, env)
    check_compatible(dataset, observation_space, action_space)
    assert isinstance(action_space, spaces.Box)
    return clipped_to(fit_to_space(dataset, observation_space), action_space)


def _scores(
    datasets: Sequence[OfflineDataset], env: gym.Env[Any, Any] | None, random: float | None, expert: float | None
) -> ReferenceScores | None:
    if random is not None and expert is not None:
        return ReferenceScores(random, expert, "given by the user")
    if env is not None and env.spec is not None and (known := reference_scores_for(env.spec.id)) is not None:
        return known
    found = {dataset.reference_scores for dataset in datasets}
    return found.pop() if len(found) == 1 else None


# Writing


def _continuous_pieces(dataset: OfflineDataset) -> Iterator[list[tuple[int, int]]]:
    """First row and row after the last one of the pieces of each episode in which every step continues from the one before."""
    pairs = list(zip(by_key(dataset.observations).values(), by_key(dataset.next_observations).values(), strict=True))
    for start, length in zip(dataset.episode_starts.tolist(), dataset.episode_lengths.tolist(), strict=True):
        breaks = np.zeros(length - 1, np.bool_)
        for observations, following in pairs:
            differs = observations[start + 1 : start + length] != following[start : start + length - 1]
            breaks |= differs.any(axis=tuple(range(1, differs.ndim)))
        yield list(pairwise([start, *(start + 1 + np.flatnonzero(breaks)).tolist(), start + length]))


def _buffers(episodes: Sequence[tuple[OfflineDataset, list[tuple[int, int]]]], console: Console) -> Iterator[EpisodeBuffer]:
    with progress_bar(console) as progress:
        for dataset, pieces in progress.track(episodes, description="writing episodes"):
            for begin, end in pieces:
                yield _buffer(dataset, begin, end)


def _buffer(dataset: OfflineDataset, begin: int, end: int) -> EpisodeBuffer:
    """Rows in the form that Minari writes, with one observation more than steps."""
    rows = slice(begin, end)
    truncations = dataset.truncations[rows].copy()
    truncations[-1] = not dataset.terminations[end - 1]
    return EpisodeBuffer(
        observations=map_observations(
            lambda observations, following: np.concatenate([observations[rows], following[end - 1 : end]]),
            dataset.observations,
            dataset.next_observations,
        ),
        actions=dataset.actions[rows],
        rewards=dataset.rewards[rows],
        terminations=dataset.terminations[rows],
        truncations=truncations,
    )


def _check_same(folder: Path, datasets: Sequence[OfflineDataset]) -> None:
    """Read what was written, and compare it with what it was written from."""
    written, begin = load_dataset(folder), 0
    for dataset in datasets:
        rows = slice(begin, begin + len(dataset))
        for name in ("observations", "next_observations", "actions", "rewards", "terminations"):
            ours, theirs = by_key(getattr(written, name)), by_key(getattr(dataset, name))
            if ours.keys() != theirs.keys() or not all(np.array_equal(ours[key][rows], theirs[key]) for key in ours):
                raise ValueError(
                    f"What was written to {str(folder)!r} reads back differently from {dataset.name!r}: nothing is kept."
                )
        begin += len(dataset)
    if len(written) != begin:
        raise ValueError(f"{begin:,} rows were written to {str(folder)!r}, {len(written):,} read back: nothing is kept.")


def _description(tables: list[Path], others: Sequence[Log], first: OfflineDataset) -> str:
    text = f"Converted by sb3-offline-ft {__version__} from {_sources(tables, others)}."
    if tables:
        text += " Columns: " + "; ".join(f"{key}: {names}" for key, names in first.provenance["columns"].items()) + "."
    return text


def _sources(tables: Sequence[Path], others: Sequence[Log]) -> str:
    names = [path.name for path in tables]
    names += [other.name if isinstance(other, OfflineDataset) else str(other) for other in others]
    return first_of(names, 5)


def _natural(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def _is_minari(path: Path) -> bool:
    return any((folder / "metadata.json").is_file() for folder in (path, path / "data"))
