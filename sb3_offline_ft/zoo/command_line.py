"""Options in the command line of ``rl_zoo3.train``, as argparse reads them."""

from collections.abc import Iterable, Sequence


def option_in(word: str, names: Iterable[str]) -> tuple[str, str | None] | None:
    """Which of some options a word is, maybe abbreviated, and the value in the word, if any; None for none of them."""
    name, equals, value = word.partition("=")
    for known in names:
        if len(known) == 2 and word.startswith(known):
            return known, word[2:].removeprefix("=") or None
        if name.strip("-") and known.startswith(name):
            return known, value if equals else None
    return None


def last_value(words: Sequence[str], names: Sequence[str]) -> tuple[str, str] | None:
    """The last of some options that has a value, with it; None for none of them."""
    found = None
    for number, word in enumerate(words):
        option = option_in(word, names)
        if option is not None:
            value = option[1] if option[1] is not None else "".join(words[number + 1 : number + 2])
            found = option[0], value
    return found


def without_options(words: Sequence[str], with_value: Sequence[str] = (), flags: Sequence[str] = ()) -> list[str]:
    """The command line without some options and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        option = option_in(word, (*with_value, *flags))
        if option is None:
            kept.append(word)
        elif option[0] in with_value and option[1] is None:
            next(rest, None)
    return kept
