"""Schedules of a quantity over an online run, in a form that a YAML file or a command line can hold."""

import math
from collections.abc import Mapping
from numbers import Real

from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from sb3_offline_ft.common.type_aliases import Schedule, ScheduleLike


class GeometricSchedule:
    """
    From ``start`` to ``end`` in equal ratios.

    :param start: Value at the beginning of the run (progress remaining 1), positive
    :param end: Value at the end of the run (progress remaining 0), positive
    """

    def __init__(self, start: float, end: float) -> None:
        self.start = start
        self.end = end

    def __call__(self, progress_remaining: float) -> float:
        return float(self.start * (self.end / self.start) ** (1.0 - progress_remaining))

    def __repr__(self) -> str:
        return f"GeometricSchedule(start={self.start}, end={self.end})"


class ScaledSchedule:
    """
    A schedule times a constant.

    :param schedule: The schedule
    :param factor: The constant
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        self.schedule = schedule
        self.factor = factor

    def __call__(self, progress_remaining: float) -> float:
        return self.factor * float(self.schedule(progress_remaining))


class BoundedSchedule:
    """
    A schedule whose every value is checked.

    :param schedule: The schedule
    :param name: What the value is, for the message
    :param low: Smallest value allowed
    :param high: Largest value allowed
    """

    def __init__(self, schedule: Schedule, name: str, low: float, high: float) -> None:
        self.schedule = schedule
        self.name = name
        self.low = low
        self.high = high

    def __call__(self, progress_remaining: float) -> float:
        # SB3 overshoots the end of a run by up to one rollout
        progress_remaining = min(1.0, max(0.0, progress_remaining))
        value = float(self.schedule(progress_remaining))
        # Written so that NaN is refused too
        if not self.low <= value <= self.high:
            raise ValueError(
                f"`{self.name}` must be in [{self.low:g}, {self.high:g}], found {value:g} "
                f"at progress remaining {progress_remaining:g}; pass a value or a schedule that stays inside."
            )
        return value


def make_schedule(
    value: ScheduleLike, name: str, low: float = 0.0, high: float = math.inf, words: Mapping[str, float] | None = None
) -> Schedule:
    """
    Turn a number, a string or a function into a schedule of the remaining progress (1 at the start, 0 at the end).

    Strings: ``"lin_A"`` falls linearly from A to 0 (as in rl-zoo3), ``"lin_A_B"`` goes linearly from A to B,
    ``"geo_A_B"`` in equal ratios.

    :param value: The number, string or function
    :param name: Name of the setting, used in messages
    :param low: Smallest value allowed
    :param high: Largest value allowed
    :param words: Names of numbers that are understood as well
    :return: A function of the remaining progress whose values are checked against the bounds
    :raises ValueError: The string is not understood, or a value at the start, the middle or the end is out of bounds
    :raises TypeError: ``value`` is none of the three
    """
    schedule: Schedule
    words = words or {}
    if isinstance(value, str):
        value = words.get(value, value)
    if isinstance(value, bool) or not (isinstance(value, Real | str) or callable(value)):
        raise TypeError(f"`{name}` must be a number, a string such as 'lin_1.0_0.1' or a function, found {value!r}.")
    if isinstance(value, str):
        schedule = _parse(value, name, words)
    elif callable(value):
        schedule = value
    else:
        schedule = ConstantSchedule(float(value))
    bounded = BoundedSchedule(schedule, name, low, high)
    for progress_remaining in (1.0, 0.5, 0.0):
        bounded(progress_remaining)
    return bounded


def scale_schedule(value: ScheduleLike, factor: float) -> ScheduleLike:
    """
    Multiply what :func:`make_schedule` understands by a constant.

    :param value: The number, string or function
    :param factor: The constant
    :return: The same kind of thing
    """
    if isinstance(value, str):
        kind, *numbers = value.split("_")
        return "_".join([kind, *(f"{factor * float(number):.12g}" for number in numbers)])
    return ScaledSchedule(value, factor) if callable(value) else factor * float(value)


def _parse(text: str, name: str, words: Mapping[str, float]) -> Schedule:
    kind, *numbers = text.split("_")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if kind == "lin" and len(values) in (1, 2):
        return LinearSchedule(values[0], values[1] if len(values) == 2 else 0.0, end_fraction=1.0)
    if kind == "geo" and len(values) == 2 and min(values) > 0:
        return GeometricSchedule(values[0], values[1])
    known = "".join(f"{word!r}, " for word in words)
    raise ValueError(
        f"`{name}` is {text!r}: expected a number, {known}'lin_A' (from A to 0), 'lin_A_B' (from A to B) "
        "or 'geo_A_B' (in equal ratios, both positive)."
    )
