"""Which episodes of a dataset to take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset

_WHOLE = ("min_length", "max_length", "episodes", "seed")


@dataclass(frozen=True, kw_only=True)
class EpisodeFilters:
    """
    Conditions on episodes, applied in the order in which they are listed here; bounds are inclusive.

    :param min_return: Least undiscounted return
    :param max_return: Largest undiscounted return
    :param min_length: Least number of transitions
    :param max_length: Largest number of transitions
    :param top_fraction: Share of the episodes that are left, those of the highest returns, in (0, 1]; rounded up. Of equal
        ones the earlier are taken
    :param episodes: At most so many: the first ones, or a random choice if there is a seed
    :param seed: Seed of that choice. With the same seed, fewer episodes are some of those that more would be
    """

    min_return: float | None = None
    max_return: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    top_fraction: float | None = None
    episodes: int | None = None
    seed: int | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> Self:
        """Read filters from a spec, a file or keywords; numbers may be written as strings."""
        check_option_names(options, FILTERS, where)
        values = {name: _number(value, name, where) for name, value in options.items()}
        for name, value in values.items():
            least = 0 if name == "seed" else 1
            if name in _WHOLE and (value != int(value) or value < least):
                raise ValueError(f"{where}: {name} must be a whole number of at least {least}, found {options[name]!r}.")
        if not 0.0 < values.get("top_fraction", 1.0) <= 1.0:
            raise ValueError(f"{where}: top_fraction must be above 0 and at most 1, found {options['top_fraction']!r}.")
        for what in ("return", "length"):
            low, high = values.get(f"min_{what}", -math.inf), values.get(f"max_{what}", math.inf)
            if low > high:
                raise ValueError(f"{where}: min_{what} ({low:g}) must not be above max_{what} ({high:g}).")
        if "seed" in values and "episodes" not in values:
            raise ValueError(f"{where}: seed has no effect without episodes; add episodes=..., or leave it out.")
        return cls(**{name: int(value) if name in _WHOLE else value for name, value in values.items()})  # type: ignore[arg-type]

    def given(self) -> dict[str, float]:
        """The filters that are set, in order."""
        values = {name: getattr(self, name) for name in FILTERS}
        return {name: value for name, value in values.items() if value is not None}

    def apply(self, dataset: OfflineDataset) -> OfflineDataset:
        """Take the episodes that meet all conditions; the provenance tells the filters and what they left."""
        given = self.given()
        if not given:
            return dataset
        returns, lengths = dataset.episode_returns, dataset.episode_lengths
        keep = np.ones(dataset.n_episodes, dtype=np.bool_)
        for values, low, high in ((returns, self.min_return, self.max_return), (lengths, self.min_length, self.max_length)):
            if low is not None:
                keep &= values >= low
            if high is not None:
                keep &= values <= high
        chosen = np.flatnonzero(keep)
        if not chosen.size:
            raise ValueError(
                f"Dataset {dataset.name!r}: {format_options(given)} leaves none of its {dataset.n_episodes} episodes, whose "
                f"returns are {returns.min():.6g} to {returns.max():.6g} and lengths {lengths.min()} to {lengths.max()}."
            )
        if self.top_fraction is not None:
            # The product of a fraction such as 0.1 and a multiple of ten can come out just above a whole number
            n_best = math.ceil(self.top_fraction * len(chosen) - 1e-9)
            chosen = np.sort(chosen[np.argsort(-returns[chosen], kind="stable")[:n_best]])
        if self.episodes is not None:
            if self.seed is not None:
                chosen = chosen[np.random.default_rng(self.seed).permutation(len(chosen))]
            chosen = np.sort(chosen[: self.episodes])
        filtered = dataset if len(chosen) == dataset.n_episodes else dataset.select_episodes(chosen)
        facts = {
            "filters": given,
            "episodes_before_filters": dataset.n_episodes,
            "transitions_before_filters": len(dataset),
            "episodes": filtered.n_episodes,
            "transitions": len(filtered),
        }
        return filtered.with_facts(provenance=dataset.provenance | facts)


FILTERS: tuple[str, ...] = tuple(field.name for field in fields(EpisodeFilters))


def check_option_names(names: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: unknown filter or option {name!r}. {suggestion(str(name), known)}")


def format_number(value: float) -> str:
    """The shortest text that gives the same number again."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def format_options(options: Mapping[str, float]) -> str:
    """The text after the question mark of a spec."""
    return "&".join(f"{name}={format_number(value)}" for name, value in options.items())


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: {name} must be a finite number, found {value!r}.")
    return number
