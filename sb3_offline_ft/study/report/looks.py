"""How the methods of a study look in all pictures: one colour, line and marker each, whatever else is in the study."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Chosen so that any two differ by at least 20 in CIELAB for normal, protanopic and deuteranopic sight (Machado et al., 2009),
# and by a contrast of at least 3.3 from the page: light and dark
_COLOURS = (
    ("#6f7a8d", "#768588"),
    ("#18181b", "#f1f1f1"),
    ("#1b9960", "#45f08b"),
    ("#c77113", "#c26918"),
    ("#108cdb", "#94c4f2"),
    ("#62106c", "#da17f2"),
    ("#5e1be1", "#a66ac7"),
    ("#493200", "#f5d419"),
)
_LINES: tuple[Any, ...] = (
    (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)), (0, (5, 2)), (0, (3, 1)), "-", (0, (9, 1.5)), (0, (5, 1, 1, 1, 1, 1)), (0, (2, 2))
)  # fmt: skip
_MARKERS = ("X", "s", "D", "^", "o", "P", "v", "*")
USUAL = ("scratch", "offline", "td3bc", "td3", "td3c", "td3c-guard")
"""The methods that every new study has; their looks are the same in all studies."""


@dataclass(frozen=True)
class Look:
    """How a method looks: the page's name of its colour, this on light and dark ground, Matplotlib's line style and marker."""

    variable: str
    light: str
    dark: str
    line: Any
    marker: str


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """Looks of methods by name. After eight methods colours come again, with other lines and markers."""
    names = list(dict.fromkeys(names))
    places = {name: USUAL.index(name) for name in names if name in USUAL}
    free = (place for place in range(len(names) + len(USUAL)) if place not in places.values())
    # First the places that no usual method has in other studies
    later = sorted(free, key=lambda place: (place < len(USUAL), place))
    others = [name for name in names if name not in places]
    places |= dict(zip(others, later, strict=False))
    return {name: _look(place) for name, place in places.items()}


def _look(place: int) -> Look:
    n = len(_COLOURS)
    light, dark = _COLOURS[place % n]
    shift = place % n + place // n
    return Look(f"--method-{place % n}", light, dark, _LINES[shift % n], _MARKERS[shift % n])


def page_colours() -> list[tuple[str, str, str]]:
    """The colours' names on the page, and what they are on light and on dark ground."""
    return [(f"--method-{index}", light, dark) for index, (light, dark) in enumerate(_COLOURS)]
