"""What somebody meant who wrote a name that is not known."""

import difflib
from collections.abc import Collection, Iterable


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """
    :param name: What was written
    :param known: What can be meant
    :param most: Number of answers
    :return: The known names that are most like it, perhaps none
    """
    plain = {each.lower().replace("-", "_"): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=most)
    return [plain[each] for each in near]


def hint(name: str, known: Collection[str]) -> str:
    """
    :param name: What was written
    :param known: What can be meant
    :return: The end of a sentence: the nearest known names, or all of them
    """
    near = nearest(name, known, 3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(sorted(known))}."


def suggestion(name: str, known: Collection[str]) -> str:
    """
    :param name: What was written
    :param known: What can be meant
    :return: A sentence of its own: the nearest known names, or all of them
    """
    found = hint(name, known)
    return found[0].upper() + found[1:]
