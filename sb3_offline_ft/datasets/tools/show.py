"""A dataset in numbers: for the terminal and for programs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.common.observations import named_arrays
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
        """
        :param values: At least one number.
        :return: Their spread.
        """
        numbers = np.asarray(values, np.float64)
        return cls(*(float(f(numbers)) for f in (np.mean, np.std, np.min, np.median, np.max)))


@dataclass(frozen=True)
class ObservationFacts:
    """One observation: the only one, or a key of a Dict.

    :param name: ``observations``, or with the key in brackets.
    :param shape: Of one row.
    :param dtype: As stored.
    :param space: The space in words, ``None`` if it is not known.
    :param is_image: Whether it is stored as an image; then all numbers are over all pixels.
    :param rows_sampled: Number of rows behind ``mean`` and ``std`` (for images behind all numbers).
    :param min: Smallest value of each dimension, flattened.
    :param max: Largest value of each dimension.
    :param mean: Mean of each dimension.
    :param std: Standard deviation of each dimension.
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
    """One dimension of the actions.

    :param low: Lower bound, ``None`` if it is not known.
    :param high: Upper bound, ``None`` if it is not known.
    :param at_bounds: Share of rows with an action beyond :data:`SATURATED` on the scale from -1 to 1 of the bounds, ``None``
        if they are not known.
    :param min: Smallest value.
    :param max: Largest value.
    :param mean: Mean.
    :param std: Standard deviation.
    """

    low: float | None
    high: float | None
    at_bounds: float | None
    min: float
    max: float
    mean: float
    std: float


@dataclass(frozen=True)
class DatasetFacts:
    """What :func:`describe_dataset` finds out.

    :param name: The dataset's name.
    :param spec: What loads it.
    :param env_id: Its environment.
    :param transitions: Number of rows.
    :param episodes: Number of episodes.
    :param terminated: Episodes that reached a terminal state.
    :param truncated: Episodes that were cut, by a time limit or the end of the recording.
    :param duplicates: Rows that equal an earlier row in every column.
    :param bytes: Size in memory.
    :param fingerprint: SHA-256 of the content.
    :param returns: Undiscounted return of the episodes.
    :param lengths: Steps of the episodes.
    :param rewards: Rewards of the rows.
    :param zero_rewards: Share of rows with a reward of exactly 0.
    :param normalized_returns: Mean, smallest and largest return with 0 for a random policy and 100 for an expert, and the
        ``random`` and ``expert`` scores with their ``source``; ``None`` without reference scores.
    :param observations: The observations.
    :param actions: The dimensions of the actions.
    :param action_shape: Shape of one action.
    :param parts: Name, spec, rows, episodes, mean return and share of the sampled offline rows of every part.
    :param provenance: What is known about the origin.
    """

    name: str
    spec: str | None
    env_id: str | None
    transitions: int
    episodes: int
    terminated: int
    truncated: int
    duplicates: int
    bytes: int
    fingerprint: str
    returns: Spread
    lengths: Spread
    rewards: Spread
    zero_rewards: float
    normalized_returns: dict[str, Any] | None
    observations: list[ObservationFacts]
    actions: list[ActionFacts]
    action_shape: tuple[int, ...]
    parts: list[dict[str, Any]]
    provenance: dict[str, Any]

    def as_json(self) -> str:
        """
        :return: Everything, as JSON.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False, default=str)


def describe_dataset(dataset: OfflineDataset) -> DatasetFacts:
    """Count and measure everything that a look at a dataset should show.

    :param dataset: The dataset.
    :return: The facts.
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
        observations=_observation_facts(dataset),
        actions=_action_facts(dataset),
        action_shape=dataset.actions.shape[1:],
        parts=_part_facts(dataset),
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
    """Print what is in a dataset.

    :param spec: What :func:`load_dataset` takes.
    :param as_json: Print JSON instead of tables.
    :param every_dimension: Show every dimension of observations and actions, not only the first :data:`MOST_DIMENSIONS`.
    :param console: Where to print.
    :param options: Passed to :func:`load_dataset`.
    :raises OSError: as :func:`load_dataset`.
    :raises ValueError: as :func:`load_dataset`.
    """
    console = console or Console()
    facts = describe_dataset(load_dataset(spec, **options))
    if as_json:
        console.file.write(facts.as_json() + "\n")
        return
    most = None if every_dimension else MOST_DIMENSIONS
    console.print(summary_table(facts))
    console.print(_actions_table(facts, most))
    for observation in facts.observations:
        console.print(_observation_table(observation, most))
    if len(facts.parts) > 1:
        console.print(_parts_table(facts))


def summary_table(facts: DatasetFacts) -> Table:
    """
    :param facts: What is known about a dataset.
    :return: The table that comes first.
    """
    table = Table(title=Text(facts.name), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary_rows(facts):
        table.add_row(name, Text(value))
    return table


def summary_rows(facts: DatasetFacts) -> list[tuple[str, str]]:
    """
    :param facts: What is known about a dataset.
    :return: Names and values of the main facts in words.
    """
    rows = [("data", f"{facts.transitions:,} transitions in {facts.episodes:,} episodes, {facts.bytes / 1e6:,.1f} MB")]
    if facts.spec is not None and facts.spec != facts.name:
        rows.append(("spec", facts.spec))
    rows.append(("environment", facts.env_id or "not known"))
    rows.append(("return", _in_words(facts.returns)))
    if facts.normalized_returns is not None:
        scores = facts.normalized_returns
        rows.append(("normalised return", f"{scores['mean']:.1f} ({scores['min']:.1f} to {scores['max']:.1f})"))
        references = f"0 is {scores['random']:g} (random), 100 is {scores['expert']:g} (expert): {scores['source']}"
        rows.append(("reference scores", references))
    else:
        rows.append(("reference scores", "none known, so returns are not normalised"))
    rows.append(("episode length", _in_words(facts.lengths)))
    rows.append(("ends of episodes", f"{facts.terminated:,} terminated, {facts.truncated:,} truncated"))
    zeros = f"; {facts.zero_rewards:.1%} are 0" if facts.zero_rewards else ""
    rows.append(("reward", _in_words(facts.rewards) + zeros))
    rows.append(("duplicates", f"{facts.duplicates:,} transitions equal an earlier one" if facts.duplicates else "none"))
    rows.append(("NaN or infinity", "none: datasets that hold any are refused"))
    rows += provenance_rows(facts.provenance)
    rows.append(("fingerprint", facts.fingerprint))
    return rows


def provenance_rows(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """
    :param provenance: A dataset's provenance.
    :return: Names and values of what is known of the origin, in words.
    """
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


def count_duplicates(dataset: OfflineDataset) -> int:
    """
    :param dataset: The dataset.
    :return: Number of rows that equal an earlier row in every column.
    """
    images: list[npt.NDArray[Any]] = []
    others: list[npt.NDArray[Any]] = [dataset.actions, dataset.rewards, dataset.terminations]
    for _, array in (*named_arrays(dataset.observations, ""), *named_arrays(dataset.next_observations, "")):
        (images if array.dtype == np.uint8 else others).append(array)
    hashes = row_hashes(*others)
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    if images:
        # Rows can only be equal where all the rest is
        candidates = np.flatnonzero(sizes[group] > 1)
        if not len(candidates):
            return 0
        pairs = np.stack([hashes[candidates], row_hashes(*(array[candidates] for array in images))], axis=1)
        return len(pairs) - len(np.unique(pairs, axis=0))
    return len(dataset) - len(sizes)


def _observation_facts(dataset: OfflineDataset) -> list[ObservationFacts]:
    facts = []
    space = dataset.observation_space
    keys = list(dataset.observations) if isinstance(dataset.observations, dict) else [""]
    for (name, array), key in zip(named_arrays(dataset.observations, "observations"), keys, strict=True):
        one_space = space[key] if isinstance(space, spaces.Dict) else space
        is_image = array.dtype == np.uint8
        sample = array[sample_rows(len(array), MOST_IMAGES if is_image else MOST_ROWS, seed=0)]
        flat = sample.reshape(-1, 1) if is_image else sample.reshape(len(sample), -1)
        whole = flat if is_image else array.reshape(len(array), -1)
        facts.append(
            ObservationFacts(
                name=name,
                shape=array.shape[1:],
                dtype=str(array.dtype),
                space=None if one_space is None else str(one_space),
                is_image=is_image,
                rows_sampled=len(sample),
                min=whole.min(axis=0).tolist(),
                max=whole.max(axis=0).tolist(),
                mean=flat.mean(axis=0, dtype=np.float64).tolist(),
                std=flat.std(axis=0, dtype=np.float64).tolist(),
            )
        )
    return facts


def _action_facts(dataset: OfflineDataset) -> list[ActionFacts]:
    flat = dataset.actions.reshape(len(dataset), -1)
    low, high = action_bounds(dataset)
    space = dataset.action_space
    known = np.zeros(flat.shape[1], np.bool_)
    if space is not None:
        known = (np.isfinite(space.low) & np.isfinite(space.high)).reshape(-1)
    facts = []
    for index in range(flat.shape[1]):
        values, bounds = flat[:, index], (float(low[index]), float(high[index]))
        at_bounds = None
        if known[index] and bounds[1] > bounds[0]:
            middle, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
            at_bounds = float(np.mean(np.abs(values - middle) > SATURATED * half))
        facts.append(
            ActionFacts(
                low=bounds[0] if known[index] else None,
                high=bounds[1] if known[index] else None,
                at_bounds=at_bounds,
                min=float(values.min()),
                max=float(values.max()),
                mean=float(values.mean(dtype=np.float64)),
                std=float(values.std(dtype=np.float64)),
            )
        )
    return facts


def _part_facts(dataset: OfflineDataset) -> list[dict[str, Any]]:
    facts = []
    for part in dataset.sources:
        mine = (dataset.episode_starts >= part.begin) & (dataset.episode_starts < part.end)
        rows = part.end - part.begin
        facts.append(
            {
                "name": part.name,
                "spec": part.spec,
                "transitions": rows,
                "episodes": int(mine.sum()),
                "mean_return": float(dataset.episode_returns[mine].mean()),
                "share_of_batches": rows / len(dataset) if part.weight is None else part.weight,
            }
        )
    return facts


def _in_words(spread: Spread) -> str:
    numbers = (number_text(value) for value in (spread.mean, spread.std, spread.min, spread.median, spread.max))
    return "{} ± {} (lowest {}, median {}, highest {})".format(*numbers)


def number_text(value: float) -> str:
    """
    :param value: A number.
    :return: It with four significant digits, or one decimal if that is more; no exponent within 1e-4 to 1e6.
    """
    if abs(value) >= 1000:
        return f"{value:,.1f}".removesuffix(".0") if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _rest(console_table: Table, shown: int, total: int) -> None:
    if shown < total:
        console_table.caption = f"{total - shown:,} more dimensions are not shown; --all shows them."
        console_table.caption_justify = "left"


def _actions_table(facts: DatasetFacts, most: int | None) -> Table:
    table = Table(title=f"Actions ({_shape(facts.action_shape)})", title_justify="left")
    for name in ("dimension", "low", "high", "smallest", "largest", "mean", "std", "at a bound"):
        table.add_column(name, justify="right")
    for index, action in enumerate(facts.actions[:most]):
        bounds = ["?" if value is None else number_text(value) for value in (action.low, action.high)]
        numbers = [number_text(value) for value in (action.min, action.max, action.mean, action.std)]
        table.add_row(str(index), *bounds, *numbers, "?" if action.at_bounds is None else f"{action.at_bounds:.1%}")
    _rest(table, len(facts.actions[:most]), len(facts.actions))
    return table


def _observation_table(facts: ObservationFacts, most: int | None) -> Table:
    name = facts.name[0].upper() + facts.name[1:]
    kind = f"images, {_shape(facts.shape)}, over the pixels of {facts.rows_sampled:,} rows" if facts.is_image else None
    table = Table(title=Text(f"{name} ({kind or _shape(facts.shape)})"), title_justify="left")
    for column in ("dimension", "smallest", "largest", "mean", "std"):
        table.add_column(column, justify="right")
    rows = list(zip(facts.min, facts.max, facts.mean, facts.std, strict=True))
    for index, row in enumerate(rows[:most]):
        constant = " (constant)" if row[0] == row[1] else ""
        table.add_row("all" if facts.is_image else f"{index}{constant}", *map(number_text, row))
    _rest(table, len(rows[:most]), len(rows))
    return table


def _parts_table(facts: DatasetFacts) -> Table:
    table = Table(title="Parts", title_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("transitions", "episodes", "mean return", "share of the batches"):
        table.add_column(column, justify="right")
    for part in facts.parts:
        table.add_row(
            Text(part["name"]), f"{part['transitions']:,}", f"{part['episodes']:,}", number_text(part["mean_return"]),
            f"{part['share_of_batches']:.1%}",
        )  # fmt: skip
    return table
