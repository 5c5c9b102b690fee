"""Numbers and lists as a report writes them."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

NONE = "\N{EN DASH}"
"""Stands where there is no number."""
NBSP = "\N{NO-BREAK SPACE}"
LEVEL = f"95{NBSP}%"
NO_INTERVAL = "no interval"
MOST_NAMED = 8


class Estimate(Protocol):
    """What is written as a number with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def has_interval(self) -> bool: ...


def number(value: float | None, digits: int | None = None) -> str:
    """A number with so many digits after the point, by default as many as make about three telling ones."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    if digits is None:
        size = abs(value)
        digits = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate, digits: int | None = None) -> str:
    """The bounds of an estimate's interval."""
    return f"{number(estimate.low, digits)} to {number(estimate.high, digits)}" if estimate.has_interval else NO_INTERVAL


def ranged(estimate: Estimate | None, digits: int | None = None) -> str:
    """An estimate with its interval."""
    return NONE if estimate is None else f"{number(estimate.value, digits)} ({interval(estimate, digits)})"


def percent(rate: Estimate) -> str:
    """The interval of a share in per cent."""
    return f"{100 * rate.low:.0f}\N{EN DASH}{100 * rate.high:.0f}{NBSP}%" if rate.has_interval else NO_INTERVAL


def listed(texts: Iterable[str], separator: str = ",") -> str:
    """One text of several, the last two joined by "and" if commas separate them."""
    texts = list(texts)
    if separator == "," and len(texts) > 1:
        return f"{', '.join(texts[:-1])} and {texts[-1]}"
    return f"{separator} ".join(texts)


def some(texts: Sequence[str]) -> str:
    """The first of several texts, and how many more there are."""
    more = len(texts) - MOST_NAMED
    return listed([*texts[:MOST_NAMED], *([f"{more} more"] if more > 0 else [])])


def counted(n: int, noun: str) -> str:
    """A number of things, which are given in the singular."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def probability(p: float) -> str:
    """A p-value, with ``=`` or ``<``."""
    return f"p{NBSP}<{NBSP}0.001" if p < 0.001 else f"p{NBSP}={NBSP}{p:.{3 if p < 0.1 else 2}f}"


def capital(text: str) -> str:
    """A sentence with a capital letter."""
    return text[:1].upper() + text[1:]
