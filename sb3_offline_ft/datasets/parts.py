"""The sources that a dataset was put together from, and their shares of what is sampled."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DatasetPart:
    """
    One of the sources that a dataset was put together from.

    :param name: For titles and logs; no two parts of a dataset have the same
    :param spec: The string that :func:`load_dataset` loads it from, if there is one
    :param begin: Its first row
    :param end: The row after its last one
    :param weight: Its share of the offline rows that a replay buffer samples; ``None`` in all parts stands for shares
        in proportion to the numbers of rows
    :param clip_actions: Whether its actions are clipped to the bounds of the environment's instead of being refused
    """

    name: str
    spec: str | None
    begin: int
    end: int
    weight: float | None = None
    clip_actions: bool = False


def with_shares(parts: Sequence[DatasetPart]) -> tuple[DatasetPart, ...]:
    """Make the shares sum to 1; a single part has none."""
    if len(parts) == 1:
        return (replace(parts[0], weight=None),)
    if any(part.weight is None for part in parts):
        return tuple(parts)
    total = math.fsum(part.weight or 0.0 for part in parts)
    return tuple(replace(part, weight=(part.weight or 0.0) / total) for part in parts)


def distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    counts, taken = Counter(names), Counter[str]()
    distinct: list[str] = []
    for name in names:
        taken[name] += 1
        distinct.append(name if counts[name] == 1 else f"{name} ({taken[name]})")
    return distinct
