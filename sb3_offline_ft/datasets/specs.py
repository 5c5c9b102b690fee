"""How data is named: one string, or a list, of sources with weights and filters."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import minari

from sb3_offline_ft.datasets.filters import FILTERS, EpisodeFilters, check_option_names, format_number, format_options
from sb3_offline_ft.datasets.keys import format_keys, parse_keys
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset

Base: TypeAlias = str | os.PathLike[str] | OfflineDataset | minari.MinariDataset
DatasetSpec: TypeAlias = Base | Mapping[str, Any] | Sequence[Any]
"""What :func:`load_dataset` takes."""

BUNDLED: tuple[str, ...] = ("hopper-medium", "pendulum-medium")
"""Names of the datasets that come with the package; load one with ``load_dataset("bundled:<name>")``."""

BUNDLED_PREFIX = "bundled:"
BUNDLED_SPECS = tuple(BUNDLED_PREFIX + name for name in BUNDLED)
ACCEPTED = (
    "A spec is a Minari id (mujoco/hopper/medium-v0), a folder holding a Minari dataset, a .npz, .hdf5 or .pkl file, "
    f"or one of {', '.join(BUNDLED_SPECS)}; filters follow after a question mark, and several are joined by ' + '."
)

TRUST = "trust_pickle"
"""The option that lets a file be unpickled. What is read from files loses it, see ``sources.without_trust``."""
_OPTIONS = (*FILTERS, "keys", "clip_actions", TRUST)
_QUERY = re.compile(r"[A-Za-z_]\w*=[^=&?]*(&[A-Za-z_]\w*=[^=&?]*)*")
_WEIGHTED = re.compile(r"([\d.][\d.eE+-]*)\s*\*\s*(.+)", re.DOTALL)
_PLUS = re.compile(r"\s\+\s")
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


@dataclass(frozen=True)
class PartSpec:
    """One source, without options, and what is wanted of it; the weight is not normalised."""

    base: Base
    filters: EpisodeFilters
    trust_pickle: bool
    weight: float | None = None
    keys: tuple[str, ...] | None = None
    clip_actions: bool = False

    def text(self, base: str, needs_trust: bool) -> str:
        """The text that names a source with these options, and with the consent to unpickle it if it shall be in it."""
        numbers = ({"clip_actions": 1} if self.clip_actions else {}) | self.filters.given()
        numbers |= {TRUST: 1} if needs_trust else {}
        texts = [f"keys={format_keys(self.keys)}"] if self.keys else []
        texts += [format_options(numbers)] if numbers else []
        return "?".join([base, "&".join(texts)]) if texts else base


def parse_spec(spec: Any, options: Mapping[str, Any] | None = None, trust_pickle: bool = False) -> list[PartSpec]:
    """Take a spec apart; the options are for all of its parts, as is the consent to unpickle."""
    if isinstance(spec, str):
        entries = _parse_text(spec)
    elif isinstance(spec, Sequence) and not isinstance(spec, bytes | bytearray):
        if not spec:
            raise ValueError(f"The list of datasets is empty. {ACCEPTED}")
        entries = [_parse_entry(entry) for entry in spec]
    else:
        entries = [_parse_entry(spec)]
    parts = [_part(*entry, options or {}, trust_pickle) for entry in entries]
    unweighted = [str(part.base) for part in parts if part.weight is None]
    if 0 < len(unweighted) < len(parts):
        raise ValueError(
            f"Give a weight for every dataset of a list or for none: {', '.join(map(repr, unweighted))} "
            f"{'has' if len(unweighted) == 1 else 'have'} none."
        )
    return parts


def _part(base: Base, weight: float | None, given: dict[str, Any], options: Mapping[str, Any], trust_pickle: bool) -> PartSpec:
    called = base.id if isinstance(base, minari.MinariDataset) else base.name if isinstance(base, OfflineDataset) else base
    where = f"Dataset {str(called)!r}"
    check_option_names({**given, **options}, _OPTIONS, where)
    for name in given.keys() & options.keys():
        if _differs(name, given[name], options[name]):
            raise ValueError(f"{where}: {name} is {given[name]} in the spec and {options[name]} as a keyword: give it once.")
    chosen = {**options, **given}
    trusted = _truth(chosen.pop(TRUST, False), where) or trust_pickle
    keys, clipped = chosen.pop("keys", None), _truth(chosen.pop("clip_actions", False), where, "clip_actions")
    keys = None if keys is None else parse_keys(keys, where)
    return PartSpec(base, EpisodeFilters.parse(chosen, where), trusted, weight, keys, clipped)


def _differs(name: str, one: Any, other: Any) -> bool:
    """Whether an option that is given twice means two things."""
    if name == "keys":
        return parse_keys(one, name) != parse_keys(other, name)
    if name == "clip_actions":
        return _truth(one, name, name) != _truth(other, name, name)
    return str(one) != str(other)


_Entry = tuple[Base, float | None, dict[str, Any]]


def _parse_entry(entry: Any) -> _Entry:
    """One entry of a list: a spec of one source, a pair of it and a weight, or a mapping with options."""
    if isinstance(entry, OfflineDataset | minari.MinariDataset | os.PathLike):
        return entry, None, {}
    if isinstance(entry, str):
        entries = _parse_text(entry)
        if len(entries) > 1:
            raise ValueError(f"An entry of a list names one dataset, found {entry!r}: give each as an entry of its own.")
        return entries[0]
    weight: Any = None
    options: dict[str, Any] = {}
    if isinstance(entry, Mapping):
        options = dict(entry)
        if "spec" not in options:
            raise ValueError(f"An entry of a list of datasets needs a `spec`, found {entry!r}.")
        base, weight = options.pop("spec"), options.pop("weight", None)
    elif isinstance(entry, Sequence) and len(entry) == 2 and not isinstance(entry, bytes | bytearray):
        base, weight = entry
    else:
        base = entry
    if not isinstance(base, str | os.PathLike | OfflineDataset | minari.MinariDataset):
        raise TypeError(
            "A dataset spec must be a string, a path, an OfflineDataset, a MinariDataset or a list of those, found "
            f"{type(base).__name__}. {ACCEPTED}"
        )
    base, own_weight, own_options = _parse_entry(base)
    if weight is not None and own_weight is not None:
        raise ValueError(f"Dataset {str(base)!r} has two weights, {own_weight:g} and {weight!r}: give one.")
    for name in options.keys() & own_options.keys():
        if _differs(name, options[name], own_options[name]):
            raise ValueError(f"Dataset {str(base)!r}: {name} is {own_options[name]} and {options[name]}: give it once.")
    return base, own_weight if weight is None else _weight(weight, str(base)), options | own_options


def _parse_text(text: str) -> list[_Entry]:
    text = text.strip()
    if not text:
        raise ValueError(f"The dataset spec is empty. {ACCEPTED}")
    if _is_path_with_options(text):
        return [_parse_part(text, text)]
    return [_parse_part(part.strip(), text) for part in _PLUS.split(f" {text} ")]


def _parse_part(part: str, whole: str) -> _Entry:
    weight = None
    if not _is_path(part) and (match := _WEIGHTED.fullmatch(part)):
        weight, part = _weight(match[1], match[2]), match[2].strip()
    if not part:
        raise ValueError(f"The dataset spec {whole!r} has an empty part: write a dataset on both sides of each +. {ACCEPTED}")
    base, options = (part, {}) if _is_path(part) else _split_query(part)
    return base, weight, options


def _split_query(text: str) -> tuple[str, dict[str, Any]]:
    base, mark, query = text.rpartition("?")
    if not mark or not base or not _QUERY.fullmatch(query):
        return text, {}
    options: dict[str, Any] = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name in options:
            raise ValueError(f"The dataset spec {text!r} has {name} twice: give it once.")
        options[name] = value
    return base, options


def _is_path_with_options(text: str) -> bool:
    base, options = _split_query(text)
    # A plus after the options joins another dataset
    return _is_path(text) or (_is_path(base) and not any(_PLUS.search(value) for value in options.values()))


def _is_path(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text))


def _weight(value: Any, base: str) -> float:
    try:
        weight = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = 0.0
    if not 0.0 < weight < float("inf"):
        raise ValueError(f"The weight of the dataset {base!r} must be a positive number, found {value!r}.")
    return weight


def _truth(value: Any, where: str, name: str = "trust_pickle") -> bool:
    text = str(value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError(f"{where}: {name} must be 1 or 0, found {value!r}.")
    return text in _TRUE


def join_specs(specs: Sequence[str | None], weights: Sequence[float | None]) -> str | None:
    """Put the specs of a list into one string, if there is one: a path with a plus between spaces can only stand alone."""
    texts: list[str] = []
    for spec, weight in zip(specs, weights, strict=True):
        alone = len(specs) == 1 and weight is None
        if spec is None or (_PLUS.search(spec) and not (alone and _is_path_with_options(spec))):
            return None
        texts.append(spec if weight is None else f"{format_number(weight)}*{spec}")
    return " + ".join(texts)
