"""What changes with a factor of a study: its values with their runs."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sb3_offline_ft.policies.policies import OfflinePolicy
from sb3_offline_ft.study.design.methods import Method, default_of, factor_path
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.report.runs import Group, RunNumbers

AS_LISTED = "as listed"

Levels = dict[str, list[tuple[str, Group]]]
"""By listed method, the values of a factor in the protocol's order, with their runs."""


def factor_levels(protocol: Protocol, factor: str, groups: Sequence[Group]) -> Levels:
    """The values of a factor, after the method as it is listed; each averaged over other factors if they were combined."""
    levels = {}
    for base in dict.fromkeys(group.method.base for group in groups if factor in group.method.variant):
        of_base = [group for group in groups if group.method.base == base]
        if any(len(group.method.variant) > 1 for group in of_base):
            points = _averaged_levels(protocol, factor, of_base)
        else:
            points = [(str(group.method.variant[factor]), group) for group in of_base if factor in group.method.variant]
            listed = [(_listed_value(group, factor), group) for group in of_base if not group.method.variant]
            points = [*listed, *points]
        if points:
            levels[base] = points
    return levels


def _averaged_levels(protocol: Protocol, factor: str, groups: Sequence[Group]) -> list[tuple[str, Group]]:
    """Only seeds of which all combinations have runs: others would be averaged over other values."""
    planned = [method for method in protocol.methods if method.base == groups[0].method.base]
    listed = next(method for method in planned if not method.variant)
    names = list(dict.fromkeys(name for method in planned for name in method.variant))
    runs_as_listed = [one for group in groups if not group.method.variant for one in group.runs]
    own = {name: _own_value(listed, name, runs_as_listed) for name in names}
    # The combination that the method has anyway makes no variant
    is_in_grid = all(own[name] in protocol.factors[name] for name in names)
    combinations = {method.name: dict(method.variant) for method in planned if method.variant}
    if is_in_grid and own not in combinations.values():
        combinations[listed.name] = own
    runs = {group.method.name: {one.seed: one for one in group.runs} for group in groups}
    seeds = [seed for seed in protocol.seeds if all(seed in runs.get(name, {}) for name in combinations)]
    points: dict[str, list[RunNumbers]] = {str(value): [] for value in protocol.factors[factor]}
    for name, values in combinations.items():
        points[str(values[factor])] += [runs[name][seed] for seed in seeds]
    return [(value, Group(listed, tuple(chosen), is_averaged=True)) for value, chosen in points.items() if chosen]


def _own_value(method: Method, factor: str, runs: Iterable[RunNumbers]) -> Any:
    """The value of a factor that a method has as it is listed: its own, else what its runs had, else a default."""
    path = factor_path(factor)
    for settings in (method.hyperparams, *(one.manifest.get("hyperparams") or {} for one in runs)):
        value: Any = settings
        for key in path:
            value = value[key] if isinstance(value, Mapping) and key in value else ...
        if value is not ...:
            return value
    if len(path) == 1:
        return default_of(method.algorithm, path[0])
    within = inspect.signature(OfflinePolicy.__init__).parameters if path[0] == "policy_kwargs" else {}
    return within[path[1]].default if path[1] in within else None


def _listed_value(group: Group, factor: str) -> str:
    value = _own_value(group.method, factor, group.runs)
    return AS_LISTED if value is None or isinstance(value, dict) else f"{value} ({AS_LISTED})"
