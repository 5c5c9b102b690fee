"""Which columns of a table mean what: said by the user, or guessed from the names."""

import fnmatch
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sb3_offline_ft.common.reading import read_text, shortened
from sb3_offline_ft.common.strict_yaml import load_yaml
from sb3_offline_ft.common.suggestions import first_of, nearest, suggestion

Names = tuple[str, ...]
VectorNames = Names | dict[str, Names]

MOST_NAMED = 30
OPTION = "--{}"
"""How a column is named on the command line of `dataset convert`, with dashes in the name of the key."""
_VECTORS: dict[str, tuple[str, ...]] = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
    "actions": ("actions", "action", "act"),
}
VECTORS = tuple(_VECTORS)
_SCALARS: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "rewards", "rew", "next.reward"),
    "terminated": ("terminated", "terminations", "termination", "terminal", "terminals"),
    "truncated": ("truncated", "truncations", "truncation", "timeout", "timeouts", "time_limit"),
    "done": ("done", "dones", "next.done"),
    "episode": ("episode", "episode_id", "episode_index", "episodes", "trajectory", "trajectory_id"),
}


@dataclass(frozen=True)
class ColumnMap:
    """
    Which columns of a table mean what.

    What is ``None`` is guessed from the names. Names of vectors may hold wildcards: ``theta_*`` stands for all columns that it
    fits, by their numbers if that is all they differ in, else in the order of the table.

    :param observations: Columns of the observations; a dictionary of them makes Dict observations
    :param next_observations: Columns of the next observations; without any they are taken from the following row
    :param actions: Columns of the actions
    :param reward: Column of the reward
    :param terminated: Column that says whether the task ended: never true at a time limit
    :param truncated: Column that says whether a time limit, or something else from outside, ended the episode
    :param done: Column that says whether the episode ended, one way or the other
    :param episode: Column that numbers or names the episode: another value begins another episode
    :param time: Column that the rows of an episode are sorted by
    """

    observations: VectorNames | None = None
    next_observations: VectorNames | None = None
    actions: Names | None = None
    reward: str | None = None
    terminated: str | None = None
    truncated: str | None = None
    done: str | None = None
    episode: str | None = None
    time: str | None = None

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], where: str) -> "ColumnMap":
        """
        Make a map of what a file or the command line says.

        :param content: Values by the names of the parameters: for vectors a list, a string with commas between the names, or
            (observations only) a dictionary of those; for the others a string. ``None`` is left to be guessed
        :param where: Names the source at the start of messages
        :return: The map
        :raises ValueError: A key is unknown or a value of the wrong kind
        """
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"{where}: unknown key {shortened(repr(key))}. {suggestion(str(key), known)}")
        values: dict[str, Any] = {}
        for key, value in content.items():
            if value is None:
                continue
            if isinstance(value, Mapping) and key in _VECTORS and key != "actions":
                values[key] = {str(name): _names(one, f"{key}[{shortened(repr(name))}]", where) for name, one in value.items()}
            elif key in _VECTORS:
                values[key] = _names(value, key, where)
            elif isinstance(value, str) and value.strip():
                values[key] = value.strip()
            else:
                raise ValueError(f"{where}: {key} must be the name of a column, found {shortened(repr(value))}.")
        return cls(**values)

    @classmethod
    def from_file(cls, path: Path) -> "ColumnMap":
        """
        Read a map from a YAML or TOML file.

        :param path: The file, ``.yml``, ``.yaml`` or ``.toml``
        :return: The map
        :raises OSError: It cannot be read
        :raises ValueError: It is no such file, or holds something else
        """
        where = f"Column map {str(path)!r}"
        if path.suffix not in (".yml", ".yaml", ".toml"):
            raise ValueError(f"{where}: expected a .yml, .yaml or .toml file.")
        text = read_text(path)
        try:
            content: Any = tomllib.loads(text) if path.suffix == ".toml" else load_yaml(text, path)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is no TOML file: {' '.join(str(error).split())}.") from None
        except ValueError as error:
            raise ValueError(f"{where} is no YAML file: {error}") from None
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: expected keys such as observations and actions, found {type(content).__name__}.")
        return cls.from_mapping(content, where)

    @classmethod
    def from_options(cls, file: Path | None, options: Mapping[str, Any]) -> "ColumnMap | None":
        """Make a map of a file, if there is one, and of options, which come first; ``None`` if nothing is given."""
        chosen = cls.from_mapping(options, "The options")
        if file is None:
            return None if chosen == cls() else chosen
        given = [key for key, value in options.items() if value is not None]
        return replace(cls.from_file(file), **{key: getattr(chosen, key) for key in given})

    def resolve(
        self,
        columns: Sequence[str],
        where: str,
        needs_reward: bool = True,
        vectors: Collection[str] = VECTORS,
        named_by: str = OPTION,
    ) -> "ColumnMap":
        """
        Find the columns in a table that has these ones: the map with everything found, and no wildcards. ``named_by`` is how
        errors say that a column is named, with ``{}`` for the key.
        """
        found: dict[str, Any] = dict.fromkeys(_VECTORS)
        for key in vectors:
            given = getattr(self, key)
            if isinstance(given, dict):
                found[key] = {name: _expand(one, columns, f"{key}[{name!r}]", where) for name, one in given.items()}
            elif given is not None:
                found[key] = _expand(given, columns, key, where)
            else:
                found[key] = _guess_vector(_VECTORS[key], columns, key, where, named_by)
            if found[key] is None and key != "next_observations":
                raise ValueError(_missing(key, _VECTORS[key], columns, where, named_by))
        for key in ("reward", "terminated", "truncated", "done", "episode", "time"):
            given = getattr(self, key)
            is_named = given is not None
            found[key] = one_column(given, columns, key, where) if is_named else _guess_scalar(key, columns, where, named_by)
        if self.terminated is not None and self.truncated is not None and self.done is None:
            # Both were named, so a column that happens to be called done adds nothing
            found["done"] = None
        if not needs_reward and self.reward is None:
            found["reward"] = None
        if needs_reward and found["reward"] is None:
            message = _missing("reward", _SCALARS["reward"], columns, where, named_by)
            computed = " Rewards that were not logged can be computed with --reward-function." if named_by == OPTION else ""
            raise ValueError(message + computed)
        now, following = found["observations"], found["next_observations"]
        if isinstance(now, dict) and following is not None and (not isinstance(following, dict) or set(following) != set(now)):
            raise ValueError(f"{where}: next_observations must have the same keys as observations ({', '.join(now)}).")
        return ColumnMap(**found)

    def lines(self) -> list[tuple[str, str]]:
        """Meanings and columns in words."""
        return [(meaning, ", ".join(names)) for meaning, names in self._groups()]

    def columns(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys(name for _, names in self._groups() for name in names))

    def _groups(self) -> Iterator[tuple[str, Names]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                yield from ((f"{field.name}[{key!r}]", names) for key, names in value.items())
            elif value is not None:
                yield field.name, (value,) if isinstance(value, str) else value


def _names(value: Any, key: str, where: str) -> Names:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: {key} must be a list of columns, or their names with commas between, found {shortened(repr(value))}."
        )
    stripped = tuple(name.strip() for name in names if name.strip())
    if not stripped:
        raise ValueError(f"{where}: {key} names no column.")
    return stripped


def _expand(names: Names, columns: Sequence[str], key: str, where: str) -> Names:
    expanded: dict[str, None] = {}
    known = set(columns)
    for name in names:
        if name in known:
            expanded[name] = None
            continue
        matches = _matches(name, columns)
        if not matches:
            raise ValueError(f"{where} has no column {shortened(repr(name))} for {key}{_near(name, columns)}")
        expanded |= dict.fromkeys(_by_number(matches))
    return tuple(expanded)


def _matches(pattern: str, columns: Sequence[str]) -> list[str]:
    """Find the columns that wildcards fit; brackets stand for themselves first, as in ``obs[*]``."""
    for one in (pattern.replace("[", "[[]"), pattern) if any(sign in pattern for sign in "*?[") else ():
        if matches := [name for name in columns if fnmatch.fnmatchcase(name, one)]:
            return matches
    return []


def one_column(name: str, columns: Sequence[str], key: str, where: str) -> str:
    """A column's name; ``ValueError`` with near matches if there is no such column."""
    if name not in columns:
        raise ValueError(f"{where} has no column {shortened(repr(name))} for {key}{_near(name, columns)}")
    return name


def _by_number(names: Sequence[str]) -> list[str]:
    parts = [re.split(r"(\d+)", name.lower()) for name in names]
    if len({tuple(part[::2]) for part in parts}) == 1:
        return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return list(names)


def _guess_vector(stems: Names, columns: Sequence[str], key: str, where: str, named_by: str) -> Names | None:
    families: dict[str, Names] = {}
    for stem in stems:
        beginning = [name for name in columns if name.lower().startswith(stem)]
        exact = [name for name in beginning if name.lower() == stem]
        others = [name for name in beginning if re.fullmatch(rf"(?i:{stem})([\W\d_]|(?<=[a-z])[A-Z]).*", name)]
        is_named = [re.search(r"[^\W\d_]", name[len(stem) :]) is not None for name in others]
        numbered = [name for name, named in zip(others, is_named, strict=True) if not named]
        named = [name for name, named in zip(others, is_named, strict=True) if named]
        kinds = [kind for kind in (exact, numbered, named) if kind]
        if len(kinds) > 1:
            left_out = first_of([name for kind in kinds[1:] for name in kind], MOST_NAMED)
            raise ValueError(
                f"{where}: {key} could be {first_of(kinds[0], MOST_NAMED)}, but that leaves out {left_out}. Say which with "
                f"{_named(key, named_by)}."
            )
        if kinds:
            families[stem] = tuple(_by_number(kinds[0]))
    if len(families) > 1:
        found = " and ".join(first_of(family, MOST_NAMED) for family in families.values())
        raise ValueError(f"{where}: {key} could be {found}. Say which with {_named(key, named_by)}.")
    return next(iter(families.values()), None)


def _guess_scalar(key: str, columns: Sequence[str], where: str, named_by: str) -> str | None:
    found = [name for name in columns if name.lower() in _SCALARS.get(key, ())]
    if len(found) > 1:
        raise ValueError(
            f"{where}: {key} could be {' or '.join(map(shortened, found))}. Say which with {_named(key, named_by)}."
        )
    return found[0] if found else None


def _missing(key: str, stems: Names, columns: Sequence[str], where: str, named_by: str) -> str:
    examples = f"{stems[0]}, {stems[1]}" + (f", {stems[2]}_0 and the like" if key in _VECTORS else " and the like")
    return (
        f"{where}: no column was recognised as {key} (looked for {examples}). Name it with {_named(key, named_by)}; "
        f"there are {first_of(columns, MOST_NAMED)}."
    )


def _named(key: str, named_by: str) -> str:
    return named_by.format(key.replace("_", "-") if named_by == OPTION else key)


def _near(name: str, columns: Sequence[str]) -> str:
    if near := nearest(name.strip("*?"), columns, 3):
        return f". Did you mean {' or '.join(map(shortened, near))}?"
    return f"; there are {first_of(columns, MOST_NAMED)}."
