"""YAML files that are read strictly: whatever is not understood is an error that says where, and what was meant."""

import re
import sys
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sb3_offline_ft.common.checks import whole_number
from sb3_offline_ft.common.reading import shortened
from sb3_offline_ft.common.suggestions import suggestion

MOST = 10**9
"""Of anything that is counted, where nothing says otherwise: what is more is a slip."""
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_MERGE = "tag:yaml.org,2002:merge"
_DEEPEST = 50
_MOST_NODES = 1_000_000
"""With what is repeated by an alias counted each time: nine lines can stand for a billion."""


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader that refuses what is nested deeply, holds itself, grows by repetition, or has a key twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"is nested more than {_DEEPEST} deep", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse(f"the alias {event.anchor!r} stands for what it is in", event)
        else:
            value = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [each for pair in value for each in pair] if isinstance(node, yaml.MappingNode) else value
            self._sizes[id(node)] = 1 + sum(self._sizes[id(each)] for each in inner)
            if self._sizes[id(node)] > _MOST_NODES:
                self._refuse(f"has more than {_MOST_NODES:,} values, those that aliases repeat included", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            # 1 and 0x1 are the same
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {shortened(repr(key.value))} is given twice: leave one", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def _refuse(self, problem: str, event: Any) -> NoReturn:
        raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)


class _StrictLoader(BoundedLoader):
    """Reads ``3e-4`` as a number, as YAML 1.2 does."""


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str, file: Path, loader: type[BoundedLoader] = _StrictLoader) -> Any:
    """
    Read YAML.

    :param text: The text
    :param file: Where it is from, for messages
    :param loader: What makes values of it
    :raises ValueError: It is no YAML, or a key is given twice
    """
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{file}{where}: {shortened(problem or ' '.join(str(error).split()))}.") from None
    # PyYAML makes dates, numbers and binary data of text without care: AttributeError, OverflowError, ...
    except Exception as error:
        raise ValueError(
            f"{file} holds a value that cannot be read ({type(error).__name__}: {shortened(str(error))})."
        ) from None


def flow(value: Any) -> str:
    """A value as YAML in one line, which :func:`load_yaml` reads as the same value."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # Our reader takes more for numbers than PyYAML does
    quoted = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True).strip()
    return text if load_yaml(text, Path()) == value else quoted


def listed(entries: Mapping[str, Any]) -> str:
    """A mapping as YAML, indented, with one entry a line."""
    keys = [f"{flow(name)}:" for name in entries]
    width = max(map(len, keys), default=0)
    lines = (f"  {key:{width}} {flow(entry)}" for key, entry in zip(keys, entries.values(), strict=True))
    return "\n".join(lines) or "  {}"


class Reader:
    """
    Checks what a file says under a key, whose path is such as ``methods.td3c.guard``.

    Every method raises a ``ValueError`` that names the file and the key if the value is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def fail(self, key: str, problem: str) -> NoReturn:
        """Say what is wrong with a key, as a sentence that goes on after it."""
        raise ValueError(f"{self.file}: `{shortened(key)}` {shortened(problem)}")

    def mapping(self, value: Any, key: str, known: Collection[str] | None = None) -> dict[str, Any]:
        """A mapping with no other than the known keys, if these are given; an empty one for nothing."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(key or "study", f"must be a mapping of names to values, found {value!r}.")
        for name in value:
            path = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                self.fail(path, f"must be text, found {name!r}: put it in quotes.")
            if known is not None and name not in known:
                self.fail(path, f"is no known key. {suggestion(name, known)}")
        return dict(value)

    def text(self, value: Any, key: str) -> str:
        """A text that is not empty."""
        if not isinstance(value, str):
            self.fail(key, f"must be text, found {value!r}{'' if value is None else ': put it in quotes'}.")
        if not value.strip():
            self.fail(key, "must not be empty.")
        return value.strip()

    def truth(self, value: Any, key: str) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, found {value!r}.")
        return value

    def whole(self, value: Any, key: str, least: int = 1, most: int | None = MOST) -> int:
        """A whole number from ``least`` to ``most``."""
        try:
            return whole_number(value, key, least, most)
        except ValueError as error:
            raise ValueError(f"{self.file}: {shortened(str(error))}") from None

    def number(self, value: Any, key: str) -> float:
        """A finite number."""
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -sys.float_info.max <= value <= sys.float_info.max
        ):
            self.fail(key, f"must be a finite number, found {value!r}.")
        return float(value)
