"""A dataset in numbers: for the terminal, for pages and for programs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.observations import by_key, mean_and_std, named_arrays
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.sources import load_dataset
from sb3_offline_ft.datasets.tools.diversity import action_bounds, row_hashes, sample_rows

SATURATED = 0.99
"""Actions beyond this share of the way from the middle to a bound count as being at the bound."""

MOST_DIMENSIONS = 16
MOST_ROWS, MOST_IMAGES = 1_000_000, 1_000
"""Means and standard deviations come from a random sample if there are more rows."""


@dataclass(frozen=True)
class Spread:
    """How numbers are spread."""

    mean: float
    std: float
    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> "Spread":
        """The spread of at least one number."""
        numbers = np.asarray(values, np.float64)
        return cls(*(float(f(numbers)) for f in (np.mean, np.std, np.min, np.median, np.max)))

    def in_words(self) -> str:
        """All five numbers."""
        mean, std, smallest, median, largest = map(number_text, (self.mean, self.std, self.min, self.median, self.max))
        return f"{mean} ± {std} (lowest {smallest}, median {median}, highest {largest})"


@dataclass(frozen=True)
class ObservationFacts:
    """
    One observation: the only one, or a key of a Dict. Numbers are of each dimension, flattened; of an image, over all pixels.

    ``rows_sampled`` is the number of rows behind ``mean`` and ``std``, for images behind all numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    space: str | None
    is_image: bool
    rows_sampled: int
    min: list[float]
    max: list[float]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ActionFacts:
    """One dimension of the actions; the bounds are ``None`` if they are not known."""

    low: float | None
    high: float | None
    at_bounds: float | None
    """Share of rows beyond :data:`SATURATED` on the scale from -1 to 1 of the bounds."""
    min: float
    max: float
    mean: float
    std: float


@dataclass(frozen=True)
class DatasetFacts:
    """What :func:`describe_dataset` finds out; returns are undiscounted, the size is that in memory."""

    name: str
    spec: str | None
    env_id: str | None
    transitions: int
    episodes: int
    terminated: int
    truncated: int
    """Episodes that were cut, by a time limit or the end of the recording."""
    duplicates: int
    """Rows that equal an earlier row in every column."""
    bytes: int
    fingerprint: str
    returns: Spread
    lengths: Spread
    rewards: Spread
    zero_rewards: float
    """Share of rows with a reward of exactly 0."""
    normalized_returns: dict[str, Any] | None
    """Mean, smallest and largest return with 0 for a random policy and 100 for an expert, and these two with their source."""
    observations: list[ObservationFacts]
    actions: list[ActionFacts]
    action_shape: tuple[int, ...]
    parts: list[dict[str, Any]]
    """Name, spec, rows, episodes, mean return and share of the sampled offline rows of every part."""
    provenance: dict[str, Any]

    def as_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False, default=str)


@dataclass(frozen=True)
class FactTable:
    """A table of texts; the first column has names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def describe_dataset(dataset: OfflineDataset) -> DatasetFacts:
    """
    Count and measure everything that a look at a dataset should show.

    :param dataset: The dataset
    :return: The facts
    """
    returns, scores = dataset.episode_returns, dataset.reference_scores
    normalized: dict[str, Any] | None = None
    if scores is not None:
        normalized = {name: scores.normalized(float(getattr(returns, name)())) for name in ("mean", "min", "max")}
        normalized |= {"random": scores.random, "expert": scores.expert, "source": scores.source}
    return DatasetFacts(
        name=dataset.name,
        spec=dataset.spec,
        env_id=dataset.env_id,
        transitions=len(dataset),
        episodes=dataset.n_episodes,
        terminated=int(dataset.terminations.sum()),
        truncated=int(dataset.truncations.sum()),
        duplicates=count_duplicates(dataset),
        bytes=dataset.nbytes,
        fingerprint=dataset.fingerprint,
        returns=Spread.of(returns),
        lengths=Spread.of(dataset.episode_lengths),
        rewards=Spread.of(dataset.rewards),
        zero_rewards=float(np.mean(dataset.rewards == 0)),
        normalized_returns=normalized,
        observations=list(_observation_facts(dataset)),
        actions=_action_facts(dataset),
        action_shape=dataset.actions.shape[1:],
        parts=list(_part_facts(dataset)),
        provenance=dict(dataset.provenance),
    )


def show_dataset(
    spec: str | Path | OfflineDataset,
    *,
    as_json: bool = False,
    every_dimension: bool = False,
    console: Console | None = None,
    **options: Any,
) -> None:
    """
    Print what is in a dataset.

    :param spec: What :func:`load_dataset` takes
    :param as_json: Print JSON instead of tables
    :param every_dimension: Show every dimension of observations and actions, not only the first :data:`MOST_DIMENSIONS`
    :param console: Where to print
    :param options: Passed to :func:`load_dataset`
    """
    console = console or PlainConsole()
    facts = describe_dataset(load_dataset(spec, **options))
    if as_json:
        console.file.write(facts.as_json() + "\n")
        return
    summary = Table(title=Text(facts.name), show_header=False, title_justify="left")
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    for name, value in summary_rows(facts):
        summary.add_row(name, Text(value))
    console.print(summary)
    for table in detail_tables(facts):
        is_cut = table.columns[0] == "dimension" and not every_dimension
        console.print(_printed(table, MOST_DIMENSIONS if is_cut else len(table.rows)))


def _printed(facts: FactTable, most: int) -> Table:
    more = f"{len(facts.rows) - most:,} more dimensions are not shown; --all shows them." if len(facts.rows) > most else ""
    caption = " ".join(filter(None, (facts.note, more))) or None
    table = Table(title=Text(facts.title), title_justify="left", caption=caption, caption_justify="left")
    for index, name in enumerate(facts.columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in facts.rows[:most]:
        table.add_row(*map(Text, row))
    return table


def summary_rows(facts: DatasetFacts) -> list[tuple[str, str]]:
    """Names and values of the main facts in words."""
    rows = [("data", f"{facts.transitions:,} transitions in {facts.episodes:,} episodes, {facts.bytes / 1e6:,.1f} MB")]
    if facts.spec is not None and facts.spec != facts.name:
        rows.append(("spec", facts.spec))
    rows.append(("environment", facts.env_id or "not known"))
    rows.append(("return", facts.returns.in_words()))
    if (scores := facts.normalized_returns) is not None:
        rows.append(("normalised return", f"{scores['mean']:.1f} ({scores['min']:.1f} to {scores['max']:.1f})"))
        references = f"0 is {scores['random']:g} (random), 100 is {scores['expert']:g} (expert): {scores['source']}"
        rows.append(("reference scores", references))
    else:
        rows.append(("reference scores", "none known, so returns are not normalised"))
    rows.append(("episode length", facts.lengths.in_words()))
    rows.append(("ends of episodes", f"{facts.terminated:,} terminated, {facts.truncated:,} truncated"))
    zeros = f"; {facts.zero_rewards:.1%} are 0" if facts.zero_rewards else ""
    rows.append(("reward", facts.rewards.in_words() + zeros))
    rows.append(("duplicates", f"{facts.duplicates:,} transitions equal an earlier one" if facts.duplicates else "none"))
    rows.append(("NaN or infinity", "none: datasets that hold any are refused"))
    return [*rows, *provenance_rows(facts.provenance), ("fingerprint", facts.fingerprint)]


def provenance_rows(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what is known of the origin, in words."""
    names = {"dataset_id": "Minari id", "algorithm": "recorded with", "code_permalink": "code"}
    hidden = {"env_id", "env_spec", "ref_min_score", "ref_max_score", "parts"}
    rows = []
    for key, value in provenance.items():
        if key in hidden or value is None or value == "" or value == [] or value == {}:
            continue
        if isinstance(value, dict):
            value = [f"{name}={one}" for name, one in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        rows.append((names.get(key, key.replace("_", " ")), text))
    return rows


def detail_tables(facts: DatasetFacts) -> list[FactTable]:
    """Parts, if there are several, actions, and each of the observations."""
    tables = []
    if len(facts.parts) > 1:
        parts = [
            (part["name"], f"{part['transitions']:,}", f"{part['episodes']:,}", number_text(part["mean_return"]),
             f"{part['share_of_batches']:.1%}")
            for part in facts.parts
        ]  # fmt: skip
        tables.append(FactTable("Parts", ("name", "transitions", "episodes", "mean return", "share of the batches"), parts))
    actions = [
        (
            str(index),
            *("?" if bound is None else number_text(bound) for bound in (one.low, one.high)),
            *map(number_text, (one.min, one.max, one.mean, one.std)),
            "?" if one.at_bounds is None else f"{one.at_bounds:.1%}",
        )
        for index, one in enumerate(facts.actions)
    ]
    names = ("dimension", "low", "high", "smallest", "largest", "mean", "std", "at a bound")
    tables.append(FactTable(f"Actions ({_shape(facts.action_shape)})", names, actions))
    for observation in facts.observations:
        title = f"{observation.name[0].upper()}{observation.name[1:]} ({_shape(observation.shape)})"
        note, rows = "", []
        if observation.is_image:
            note = f"Images, {_shape(observation.shape)}; over all pixels of {observation.rows_sampled:,} rows."
        numbers = zip(observation.min, observation.max, observation.mean, observation.std, strict=True)
        for index, row in enumerate(numbers):
            constant = " (constant)" if row[0] == row[1] else ""
            rows.append(("all" if observation.is_image else f"{index}{constant}", *map(number_text, row)))
        tables.append(FactTable(title, ("dimension", "smallest", "largest", "mean", "std"), rows, note))
    return tables


def count_duplicates(dataset: OfflineDataset) -> int:
    """Number of rows that equal an earlier row in every column."""
    images: list[npt.NDArray[Any]] = []
    others: list[npt.NDArray[Any]] = [dataset.actions, dataset.rewards, dataset.terminations]
    for array in (*by_key(dataset.observations).values(), *by_key(dataset.next_observations).values()):
        (images if array.dtype == np.uint8 else others).append(array)
    hashes = row_hashes(*others)
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    if not images:
        return len(dataset) - len(sizes)
    # Rows can only be equal where all the rest is
    candidates = np.flatnonzero(sizes[group] > 1)
    different = {(hashes[row], *(hash(array[row].tobytes()) for array in images)) for row in candidates}
    return len(candidates) - len(different)


def _observation_facts(dataset: OfflineDataset) -> Iterator[ObservationFacts]:
    known = by_key(dataset.observation_space)
    arrays = zip(named_arrays(dataset.observations, "observations"), by_key(dataset.observations), strict=True)
    for (name, array), key in arrays:
        space = known.get(key)
        is_image = array.dtype == np.uint8
        sample = array[sample_rows(len(array), MOST_IMAGES if is_image else MOST_ROWS, seed=0)]
        flat = sample.reshape(-1, 1) if is_image else sample.reshape(len(sample), -1)
        whole = flat if is_image else array.reshape(len(array), -1)
        mean, std = mean_and_std(flat)
        yield ObservationFacts(
            name=name,
            shape=array.shape[1:],
            dtype=str(array.dtype),
            space=None if space is None else str(space),
            is_image=is_image,
            rows_sampled=len(sample),
            min=whole.min(axis=0).tolist(),
            max=whole.max(axis=0).tolist(),
            mean=mean.tolist(),
            std=std.tolist(),
        )


def _action_facts(dataset: OfflineDataset) -> list[ActionFacts]:
    flat = dataset.actions.reshape(len(dataset), -1)
    low, high, known = action_bounds(dataset)
    saturated = (np.abs(flat - (low + high) / 2) > SATURATED * (high - low) / 2).mean(axis=0)
    numbers = zip(flat.min(axis=0), flat.max(axis=0), *mean_and_std(flat), strict=True)
    facts = []
    for index, row in enumerate(numbers):
        smallest, largest, mean, std = map(float, row)
        lower, upper = (float(low[index]), float(high[index])) if known[index] else (None, None)
        share = float(saturated[index]) if known[index] and high[index] > low[index] else None
        facts.append(ActionFacts(lower, upper, share, smallest, largest, mean, std))
    return facts


def _part_facts(dataset: OfflineDataset) -> Iterator[dict[str, Any]]:
    for part in dataset.sources:
        mine = (dataset.episode_starts >= part.begin) & (dataset.episode_starts < part.end)
        rows = part.end - part.begin
        yield {
            "name": part.name,
            "spec": part.spec,
            "transitions": rows,
            "episodes": int(mine.sum()),
            "mean_return": float(dataset.episode_returns[mine].mean()),
            "share_of_batches": rows / len(dataset) if part.weight is None else part.weight,
        }


def number_text(value: float) -> str:
    """A number with four significant digits, or one decimal if that is more; no exponent within 1e-4 to 1e6."""
    if abs(value) >= 1000:
        return f"{value:,.1f}".removesuffix(".0") if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def progress_bar(console: Console, *columns: TextColumn) -> Progress:
    """A progress bar that leaves nothing behind, with more columns at the end."""
    shown = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
    )
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
