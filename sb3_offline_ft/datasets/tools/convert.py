"""Logs of any kind as a Minari dataset."""

import glob
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sb3_offline_ft.common.observations import Observations, map_observations, named_arrays
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.minari_writing import check_new_id, write_minari
from sb3_offline_ft.datasets.files.tables import RewardFunction, is_table, read_tables, with_rewards
from sb3_offline_ft.datasets.keys import dict_of
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.reference_scores import ReferenceScores, reference_scores_for
from sb3_offline_ft.datasets.sources import load_dataset
from sb3_offline_ft.datasets.validation import as_flattened_by, check_compatible, fit_to_space, with_clipping
from sb3_offline_ft.datasets.validation import clip_actions as clipped_to


@dataclass(frozen=True)
class ConvertedDataset:
    """What came of a conversion.

    :param dataset_id: The Minari id.
    :param folder: Where the dataset is.
    :param transitions: Number of rows.
    :param episodes: Number of episodes.
    :param notes: What had to be assumed or changed, in words.
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
    """Write logs as a Minari dataset into the local Minari folder, whole or not at all.

    :param logs: Tables (CSV, TSV or Parquet files whose rows are steps, folders of them, or wildcards), and whatever
        :func:`load_dataset` takes.
    :param dataset_id: The new dataset's id.
    :param columns: Which columns of the tables mean what; guessed from their names where not said.
    :param env: The environment the logs come from: a Gymnasium id, or an environment. Its spaces become the dataset's.
    :param action_low: Lower bounds of the actions where neither an environment nor the logs tell: a number, or one for each
        dimension.
    :param action_high: Upper bounds.
    :param join_files: Let an episode go on from one table to the next.
    :param clip_actions: Clip all actions to their bounds instead of refusing those beyond.
    :param reward_function: Computes all rewards from observations, actions and next observations of ``N`` rows.
    :param random_score: Mean return of a random policy; by default that known for the environment.
    :param expert_score: Mean return of an expert.
    :param facts: Metadata: any of ``algorithm_name, author, author_email, code_permalink, description, requirements``.
    :param overwrite: Replace a dataset with this id. It is kept until the new one is complete.
    :param keep_in: Folder that gets the dataset if it cannot be written to its place, as on a full disk. ``OSError`` is raised
        then too.
    :param console: Where to show the columns found and the progress; nothing is shown if omitted.
    :param options: Passed to :func:`load_dataset`.
    :return: What was written.
    :raises OSError: if a log cannot be opened, or the dataset cannot be written: the message says what became of it.
    :raises FileExistsError: if there is such a dataset already, or there is one by the end: then the new one is kept, in
        ``keep_in`` or under the next free version, and the message says where.
    :raises ValueError: if the id, a log, or what is said about them is wrong.
    """
    check_new_id(dataset_id, overwrite)
    if (random_score is None) != (expert_score is None):
        raise ValueError("Give both a random and an expert score, or none of them.")
    console = console or Console(quiet=True)
    tables, others = find_logs(logs)
    if columns is not None and not tables:
        raise ValueError("Columns were named, but there is no table (CSV, TSV or Parquet) among the logs.")
    with warnings.catch_warnings(record=True) as caught, _environment(env) as (made, env_spaces):
        warnings.simplefilter("always")
        bounds = _bounds(action_low, action_high)
        options |= {"clip_actions": True} if clip_actions else {}
        datasets = _read(tables, others, columns, env_spaces, bounds, join_files, reward_function, console, options)
        observation_space, action_space = _spaces(datasets, env_spaces, bounds)
        if made is not None:
            datasets = [as_flattened_by(dataset, made) for dataset in datasets]
        for dataset in datasets:
            check_compatible(dataset, observation_space, action_space)
        assert isinstance(action_space, spaces.Box)
        datasets = [clipped_to(fit_to_space(dataset, observation_space), action_space) for dataset in datasets]
        scores = _scores(datasets, made, random_score, expert_score)
        written = _Episodes(datasets, console)
        folder = write_minari(
            dataset_id,
            written,
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
    notes = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    for dataset in datasets:
        if (clipped := dataset.provenance.get("actions_clipped", {}).get("rows", 0)) > 0:
            notes[f"{dataset.name}: actions of {clipped:,} transitions were clipped to their bounds."] = None
    if written.n_split:
        notes[
            f"{written.n_split:,} episode{'s were' if written.n_split > 1 else ' was'} cut where a row does not continue from "
            "the next observation of the row before, as Minari keeps each observation once."
        ] = None
    return ConvertedDataset(dataset_id, folder, sum(map(len, datasets)), written.n_episodes, tuple(notes))


def find_logs(logs: Sequence[str | Path | OfflineDataset]) -> tuple[list[Path], list[str | Path | OfflineDataset]]:
    """Tell tables from what :func:`load_dataset` takes.

    :param logs: As for :func:`convert_logs`.
    :return: The tables, folders and wildcards replaced by the files in them, and the others.
    :raises FileNotFoundError: if there is no such table.
    :raises ValueError: if there are no logs.
    """
    tables: list[Path] = []
    others: list[str | Path | OfflineDataset] = []
    for log in logs:
        if isinstance(log, OfflineDataset):
            others.append(log)
            continue
        path = Path(str(log)).expanduser()
        if path.is_dir() and not _is_minari(path):
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
        elif is_table(path):
            if not path.is_file():
                raise FileNotFoundError(f"No table {str(path.absolute())!r}.")
            tables.append(path)
        else:
            others.append(log)
    if not tables and not others:
        raise ValueError("There are no logs to convert.")
    return tables, others


def load_function(name: str) -> RewardFunction:
    """Import a reward function.

    :param name: ``module:function``; the module may lie in the working directory.
    :return: The function.
    :raises ValueError: if there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"The reward function must be given as module:function, found {name!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Cannot import the reward function {name!r}: {error}.") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ValueError(f"The reward function {name!r} is a {type(function).__name__}, expected a function.")
    checked: RewardFunction = function
    return checked


class _Episodes:
    """Goes through the episodes of datasets in the form that Minari writes, once.

    :param datasets: The datasets.
    :param console: Where to show the progress.
    """

    def __init__(self, datasets: Sequence[OfflineDataset], console: Console) -> None:
        self.datasets, self.console = datasets, console
        self.n_episodes = self.n_split = 0

    def __iter__(self) -> Iterator[EpisodeBuffer]:
        with progress_bar(self.console) as progress:
            task = progress.add_task("writing episodes", total=sum(dataset.n_episodes for dataset in self.datasets))
            for dataset in self.datasets:
                for start, length in zip(dataset.episode_starts.tolist(), dataset.episode_lengths.tolist(), strict=True):
                    cuts = [start, *(start + _breaks(dataset, start, length)).tolist(), start + length]
                    self.n_split += len(cuts) > 2
                    for begin, end in pairwise(cuts):
                        self.n_episodes += 1
                        yield episode_of(dataset, begin, end)
                    progress.advance(task)


def episode_of(dataset: OfflineDataset, begin: int, end: int) -> EpisodeBuffer:
    """
    :param dataset: A dataset.
    :param begin: A row.
    :param end: The row after the last one.
    :return: The rows as an episode with one observation more than steps; a truncation if its last row has no flag.
    """

    def with_last(observations: npt.NDArray[Any], next_observations: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([observations[begin:end], next_observations[end - 1 : end]])

    truncations = dataset.truncations[begin:end].copy()
    truncations[-1] = not dataset.terminations[end - 1]
    return EpisodeBuffer(
        observations=map_observations(with_last, dataset.observations, dataset.next_observations),
        actions=dataset.actions[begin:end],
        rewards=dataset.rewards[begin:end],
        terminations=dataset.terminations[begin:end],
        truncations=truncations,
    )


def progress_bar(console: Console, *columns: TextColumn) -> Progress:
    """
    :param console: Where to show it.
    :param columns: More columns, at the end.
    :return: A progress bar that leaves nothing behind.
    """
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *columns,
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


class _environment:
    """Makes an environment for as long as it is needed; knows its spaces."""

    def __init__(self, env: str | gym.Env[Any, Any] | None) -> None:
        self.given = env
        self.made: gym.Env[Any, Any] | None = None

    def __enter__(self) -> tuple[gym.Env[Any, Any] | None, tuple[spaces.Space[Any], spaces.Space[Any]] | None]:
        if self.given is None:
            return None, None
        if isinstance(self.given, str):
            try:
                self.made = gym.make(self.given)
            except Exception as error:
                raise ValueError(f"Cannot make the environment {self.given!r} ({type(error).__name__}: {error}).") from error
        env = self.made if isinstance(self.given, str) else self.given
        assert isinstance(env, gym.Env)
        return env, (env.observation_space, env.action_space)

    def __exit__(self, *_: object) -> None:
        if self.made is not None:
            self.made.close()


def _read(
    tables: list[Path],
    others: Sequence[str | Path | OfflineDataset],
    columns: ColumnMap | None,
    env_spaces: tuple[spaces.Space[Any], spaces.Space[Any]] | None,
    bounds: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
    join_files: bool,
    reward_function: RewardFunction | None,
    console: Console,
    options: dict[str, Any],
) -> list[OfflineDataset]:
    datasets: list[OfflineDataset] = []
    action_space = env_spaces[1] if env_spaces is not None else None
    with progress_bar(console) as progress:
        task = progress.add_task("reading", total=len(tables) + len(others))
        if tables:
            clips = options.get("clip_actions", False)
            table = read_tables(
                tables,
                columns,
                join=join_files,
                reward_function=reward_function,
                action_space=action_space if isinstance(action_space, spaces.Box) and not clips else None,
                name=_sources(tables, ()),
                progress=lambda path: progress.update(task, advance=1, description=f"reading {path.name}"),
                announce=lambda found: _announce(found, tables[0], console),
            )
            datasets.append(with_clipping(table) if clips else table)
        for other in others:
            dataset = load_dataset(other, **options)
            if reward_function is not None:
                dataset = with_rewards(dataset, reward_function)
            datasets.append(dataset)
            progress.advance(task)
    return datasets


def _announce(columns: ColumnMap, path: Path, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Columns of {path.name}"), title_justify="left", show_header=False)
    for name, names in columns.lines():
        table.add_row(Text(name), Text(names))
    if columns.episode is None and columns.truncated is None and columns.done is None:
        table.add_row("episode", Text("no column: an episode ends at a termination and at the end of a file"))
    if columns.terminated is None and columns.done is None:
        table.add_row("terminated", Text("no column: every episode counts as cut by a time limit"))
    if columns.done is not None and columns.truncated is None:
        known = (
            f"{columns.done} counts as a termination, so it must not be set at time limits"
            if columns.terminated is None
            else f"where {columns.done} is set and {columns.terminated} is not"
        )
        table.add_row("truncated", Text(f"no column: {known}"))
    if columns.next_observations is None:
        table.add_row("next_observations", Text("no column: taken from the following row"))
    console.print(table)


def _bounds(
    low: npt.ArrayLike | None, high: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ValueError("Give both lower and upper bounds of the actions, or none of them.")
    lower, upper = np.broadcast_arrays(np.asarray(low, np.float32), np.asarray(high, np.float32))
    if not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower < upper).all()):
        raise ValueError(f"Bounds of actions must be finite, the lower ones below the upper ones, found {lower} and {upper}.")
    return lower, upper


def _spaces(
    datasets: Sequence[OfflineDataset],
    env_spaces: tuple[spaces.Space[Any], spaces.Space[Any]] | None,
    bounds: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    if env_spaces is not None:
        if bounds is not None:
            raise ValueError("The environment knows the bounds of the actions: give the bounds or --env, not both.")
        return env_spaces
    first = datasets[0]
    for other in datasets[1:]:
        for what, one, two in (
            *zip(_names(first), _shapes(first.observations), _shapes(other.observations), strict=False),
            ("actions", first.actions.shape[1:], other.actions.shape[1:]),
        ):
            if one != two or _names(first) != _names(other):
                raise ValueError(
                    f"{other.name!r} does not go with {first.name!r}: expected {what} of shape {one}, found {two}."
                )
    known = next((dataset.observation_space for dataset in datasets if dataset.observation_space is not None), None)
    observation_space = known if known is not None else _space_of(first.observations)
    shape = first.actions.shape[1:]
    action_space: spaces.Space[Any] | None = next(
        (dataset.action_space for dataset in datasets if dataset.action_space is not None), None
    )
    if bounds is not None:
        lower, upper = bounds
        if lower.size not in (1, int(np.prod(shape))):
            raise ValueError(f"Expected one bound or {int(np.prod(shape))} of the actions, found {lower.size}.")
        action_space = spaces.Box(np.resize(lower, shape), np.resize(upper, shape))
    if action_space is None:
        smallest, largest = (f(first.actions.reshape(len(first), -1), axis=0) for f in (np.min, np.max))
        raise ValueError(
            "The bounds of the actions are not known, and algorithms scale actions by them: name the environment with --env, "
            f"or give --action-low and --action-high. The actions go from {_numbers(smallest)} to {_numbers(largest)}."
        )
    return observation_space, action_space


def _space_of(observations: Observations) -> spaces.Space[Any]:
    def one(array: npt.NDArray[Any]) -> spaces.Box:
        if array.dtype == np.uint8:
            return spaces.Box(0, 255, array.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    boxes = map_observations(one, observations)
    return dict_of(boxes) if isinstance(boxes, dict) else boxes


def _names(dataset: OfflineDataset) -> list[str]:
    return [name for name, _ in named_arrays(dataset.observations, "observations")]


def _shapes(observations: Observations) -> list[tuple[int, ...]]:
    return [array.shape[1:] for _, array in named_arrays(observations, "")]


def _breaks(dataset: OfflineDataset, start: int, length: int) -> npt.NDArray[np.int64]:
    """Find the steps of an episode that do not continue from the step before."""
    breaks = np.zeros(length - 1, np.bool_)
    for (_, after), (_, before) in zip(
        named_arrays(dataset.observations, ""), named_arrays(dataset.next_observations, ""), strict=True
    ):
        differs = after[start + 1 : start + length] != before[start : start + length - 1]
        breaks |= differs.reshape(length - 1, -1).any(axis=1) if length > 1 else False
    return np.flatnonzero(breaks) + 1


def _scores(
    datasets: Sequence[OfflineDataset], env: gym.Env[Any, Any] | None, random: float | None, expert: float | None
) -> ReferenceScores | None:
    if random is not None and expert is not None:
        return ReferenceScores(random, expert, "given by the user")
    if env is not None and env.spec is not None and (known := reference_scores_for(env.spec.id)) is not None:
        return known
    found = {dataset.reference_scores for dataset in datasets}
    return found.pop() if len(found) == 1 else None


def _check_same(folder: Path, datasets: Sequence[OfflineDataset]) -> None:
    """Read what was written, and compare it with what it was written from."""
    written = load_dataset(folder)
    begin = 0
    for dataset in datasets:
        end = begin + len(dataset)
        pairs = [
            *zip(_arrays(written.observations), _arrays(dataset.observations), strict=True),
            *zip(_arrays(written.next_observations), _arrays(dataset.next_observations), strict=True),
            (written.actions, dataset.actions),
            (written.rewards, dataset.rewards),
            (written.terminations, dataset.terminations),
        ]
        if not all(np.array_equal(ours[begin:end], theirs) for ours, theirs in pairs):
            raise ValueError(
                f"What was written to {str(folder)!r} reads back differently from {dataset.name!r}: nothing is kept."
            )
        begin = end
    if len(written) != begin:
        raise ValueError(f"{begin:,} rows were written to {str(folder)!r}, {len(written):,} read back: nothing is kept.")


def _arrays(observations: Observations) -> list[npt.NDArray[Any]]:
    return [array for _, array in sorted(named_arrays(observations, ""))]


def _description(tables: list[Path], others: Sequence[str | Path | OfflineDataset], first: OfflineDataset) -> str:
    text = f"Converted by sb3-offline-ft {_version()} from {_sources(tables, others)}."
    if tables:
        text += " Columns: " + "; ".join(f"{key}: {names}" for key, names in first.provenance["columns"].items()) + "."
    return text


def _sources(tables: Sequence[Path], others: Sequence[str | Path | OfflineDataset]) -> str:
    names = [path.name for path in tables]
    names += [other.name if isinstance(other, OfflineDataset) else str(other) for other in others]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _numbers(values: npt.NDArray[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _natural(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def _is_minari(path: Path) -> bool:
    return any((folder / "metadata.json").is_file() for folder in (path, path / "data"))


def _version() -> str:
    try:
        return importlib.metadata.version("sb3-offline-ft")
    except importlib.metadata.PackageNotFoundError:
        return "0"
