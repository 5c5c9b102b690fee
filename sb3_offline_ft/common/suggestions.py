"""What somebody meant who wrote a name that is not known."""

import difflib
from collections.abc import Collection, Iterable, Sequence

from sb3_offline_ft.common.reading import shortened


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """At most so many of the known names that are most like what was written, perhaps none."""
    plain = {each.lower().replace("-", "_"): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=most)
    return [plain[each] for each in near]


def hint(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known names, or all of them."""
    near = nearest(name, known, 3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(sorted(known))}."


def suggestion(name: str, known: Collection[str]) -> str:
    """As :func:`hint`, but a sentence of its own."""
    found = hint(name, known)
    return found[0].upper() + found[1:]


def first_of(names: Sequence[str], most: int) -> str:
    """The first names with commas between them, and how many more there are."""
    return ", ".join(map(shortened, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
