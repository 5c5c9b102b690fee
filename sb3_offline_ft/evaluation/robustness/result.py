"""What perturbations do to policies: the numbers, and the range in which a policy keeps what it is worth."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.reading import read_json

RETURN = "return"
FILE = "robustness.json"
FORMAT = 1
KEPT = 0.9
"""Share of the nominal return, above that of a random policy, that counts as kept."""

Values = Mapping[str, tuple[float, ...]]
"""Of each metric, one number an episode."""


@dataclass(frozen=True)
class Policy:
    """Who was tried: the name that the user gave, and the SHA-256 of the file."""

    name: str
    sha256: str | None


@dataclass(frozen=True)
class Range:
    """
    Levels around the nominal one at which a policy keeps its return.

    :param low: The lowest
    :param high: The highest
    :param low_is_last: Whether that is below the nominal one, and no lower one was tried
    :param high_is_last: Whether that is above the nominal one, and no higher one was tried
    """

    low: float
    high: float
    low_is_last: bool
    high_is_last: bool

    def __str__(self) -> str:
        """With an arrow where it may go on, as nothing beyond was tried."""
        below, above = "\u2190" if self.low_is_last else "", "\u2192" if self.high_is_last else ""
        return f"{below}{self.low:g} to {self.high:g}{above}"


@dataclass(frozen=True)
class Response:
    """
    What one perturbation does.

    :param name: Its name
    :param what: What its level is, in words
    :param nominal: The level that changes nothing
    :param levels: All levels, this one included, ascending
    :param values: By role, at each level, of each metric, one number an episode
    """

    name: str
    what: str
    nominal: float
    levels: tuple[float, ...]
    values: Mapping[str, tuple[Values, ...]]

    def means(self, role: str, metric: str = RETURN) -> np.ndarray:
        """
        :param role: A policy's role
        :param metric: A metric
        :return: Its mean at each level; nan where an episode has none
        """
        return np.array([np.mean(values[metric]) for values in self.values[role]])

    def kept(self, role: str, threshold: float) -> Range:
        """
        :param role: A policy's role
        :param threshold: Mean return that counts as kept
        :return: The levels around the nominal one at which it is
        """
        enough = [bool(mean >= threshold) for mean in self.means(role)]
        nominal, end = self.levels.index(self.nominal), len(self.levels) - 1
        first = last = nominal
        while first > 0 and enough[first - 1]:
            first -= 1
        while last < end and enough[last + 1]:
            last += 1
        return Range(self.levels[first], self.levels[last], first == 0 < nominal, last == end > nominal)


@dataclass(frozen=True)
class RobustnessResult:
    """
    Policies in an environment that was changed in many ways.

    :param env_id: The environment
    :param env_kwargs: Its arguments
    :param seed: The number that all seeds were derived from
    :param random_return: Mean return of a random policy
    :param policies: Who was tried, by role
    :param responses: What came of it
    :param versions: Of the packages that matter
    """

    env_id: str
    env_kwargs: Mapping[str, Any]
    seed: int
    random_return: float
    policies: Mapping[str, Policy]
    responses: tuple[Response, ...]
    versions: Mapping[str, str]

    def nominal_return(self, role: str) -> float:
        """Mean return of a policy where nothing is changed."""
        first = self.responses[0]
        return float(first.means(role)[first.levels.index(first.nominal)])

    def threshold(self, role: str) -> float | None:
        """The mean return that counts as kept; None if the policy is no better than a random one."""
        above = self.nominal_return(role) - self.random_return
        return self.random_return + KEPT * above if above > 0 else None

    def kept(self, role: str, response: Response) -> Range | None:
        """The levels of a perturbation at which a policy keeps its return; None if it has none to keep."""
        threshold = self.threshold(role)
        return None if threshold is None else response.kept(role, threshold)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The return, and what was measured beside it."""
        first = next(iter(self.responses[0].values.values()))
        return tuple(first[0])

    @property
    def n_seeds(self) -> int:
        """Number of episodes at each level."""
        first = next(iter(self.responses[0].values.values()))
        return len(first[0][RETURN])

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; what is not a number is null. For people, it has what is derived too."""
        derived = {
            role: {
                "nominal_return": _finite(self.nominal_return(role)),
                "threshold": self.threshold(role),
                "kept": {each.name: (kept := self.kept(role, each)) and asdict(kept) for each in self.responses},
            }
            for role in self.policies
        }
        content = {"format": FORMAT, **_finite(asdict(self)), "derived": derived}
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode("ascii") + b"\n")

    @classmethod
    def read(cls, path: Path) -> "RobustnessResult":
        """
        :param path: What :meth:`save` wrote
        :raises ValueError: It is damaged, or written by a later version
        """
        with naming_damage(path, "written by `sb3-offline-ft robustness`"):
            content = read_json(path)
            if content.pop("format") != FORMAT:
                raise ValueError(f"it has another format than {FORMAT}, which this version reads")
            content.pop("derived")
            policies = {role: Policy(**facts) for role, facts in content.pop("policies").items()}
            responses = tuple(_response(**response) for response in content.pop("responses"))
            if content["random_return"] is None:
                content["random_return"] = math.nan
            return _checked(cls(policies=policies, responses=responses, **content))


def _checked(result: RobustnessResult) -> RobustnessResult:
    """Check that what is computed of a result can be computed of one that was read."""
    roles, responses = set(result.policies), result.responses
    if not roles or not responses or not isinstance(result.env_kwargs, dict):
        raise ValueError("it lacks policies, responses or the arguments of the environment")
    for one in responses:
        sizes = {len(one.levels), *map(len, one.values.values())}
        if set(one.values) != roles or one.nominal not in one.levels or len(sizes) > 1:
            raise ValueError(f"{one.name!r} has other policies or levels than it should have")
    rows = [row for one in responses for of in one.values.values() for row in of]
    if any(row.keys() != rows[0].keys() or RETURN not in row or not all(row.values()) for row in rows):
        raise ValueError("its levels do not all have the same metrics")
    texts = [result.env_id, *result.versions.values(), *(text for one in responses for text in (one.name, one.what))]
    texts += [text for policy in result.policies.values() for text in (policy.name, policy.sha256 or "")]
    numbers = [result.random_return, result.seed, *(level for one in responses for level in one.levels)]
    numbers += [value for row in rows for values in row.values() for value in values]
    if not all(isinstance(text, str) for text in texts) or any(type(number) not in (int, float) for number in numbers):
        raise ValueError("a name is no text, or a value no number")
    # Raises an OverflowError of whole numbers that no float holds
    list(map(float, numbers))
    return result


def _response(values: Any, levels: Any, **facts: Any) -> Response:
    read = {
        role: tuple({name: tuple(math.nan if x is None else x for x in row) for name, row in at.items()} for at in rows)
        for role, rows in values.items()
    }
    return Response(levels=tuple(levels), values=read, **facts)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
