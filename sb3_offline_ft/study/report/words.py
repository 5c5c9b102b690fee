"""Numbers as a report writes them."""

import math
from collections.abc import Iterable, Sequence

from sb3_offline_ft.evaluation.statistics import Estimate

NONE = "\N{EN DASH}"
"""Stands where there is no number."""
NBSP = "\N{NO-BREAK SPACE}"
LEVEL = f"95{NBSP}%"
MOST_NAMED = 8


def number(value: float | None, digits: int | None = None) -> str:
    """
    :param value: A number, None if there is none
    :param digits: Digits after the point; by default so many that about three are telling
    :return: It in words
    """
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
    """
    :param estimate: An estimate
    :param digits: As for :func:`number`
    :return: The bounds of its interval
    """
    if not estimate.has_interval:
        return "no interval"
    return f"{number(estimate.low, digits)} to {number(estimate.high, digits)}"


def ranged(estimate: Estimate | None, digits: int | None = None) -> str:
    """
    :param estimate: An estimate, None if there is none
    :param digits: As for :func:`number`
    :return: It with its interval
    """
    if estimate is None:
        return NONE
    return f"{number(estimate.value, digits)} ({interval(estimate, digits)})"


def percent(rate: Estimate) -> str:
    """
    :param rate: A share
    :return: Its interval in per cent
    """
    if not rate.has_interval:
        return "no interval"
    return f"{100 * rate.low:.0f}\N{EN DASH}{100 * rate.high:.0f}{NBSP}%"


def listed(texts: Iterable[str], separator: str = ",") -> str:
    """
    :param texts: Texts
    :param separator: What stands between them
    :return: One text, the last two joined by "and" if commas separate them
    """
    texts = list(texts)
    if separator == "," and len(texts) > 1:
        return f"{', '.join(texts[:-1])} and {texts[-1]}"
    return f"{separator} ".join(texts)


def some(texts: Sequence[str]) -> str:
    """
    :param texts: Texts
    :return: The first of them, and how many more there are
    """
    more = len(texts) - MOST_NAMED
    return listed([*texts[:MOST_NAMED], *([f"{more} more"] if more > 0 else [])])


def counted(n: int, noun: str) -> str:
    """
    :param n: How many
    :param noun: Of what, in the singular
    :return: Both in words
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def probability(p: float) -> str:
    """
    :param p: A p-value
    :return: It, with ``=`` or ``<``
    """
    return f"p{NBSP}<{NBSP}0.001" if p < 0.001 else f"p{NBSP}={NBSP}{p:.{3 if p < 0.1 else 2}f}"


def capital(text: str) -> str:
    """
    :param text: A sentence
    :return: It with a capital letter
    """
    return text[:1].upper() + text[1:]
