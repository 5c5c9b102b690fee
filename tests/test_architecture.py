"""No import runs upward in the house, and no modules import one another in a circle."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = "sb3_offline_ft"
ROOT = REPOSITORY / PACKAGE

FLOORS = [
    {"common"},
    {"algorithms", "policies", "pages", "collapse"},
    {"update", "deployment", "checkpoints"},
    {"datasets"},
    {"buffers"},
    {"offline_td3"},
    {"td3bc", "td3c", "rebrac"},
    {"controllers", "pretrained", "testing"},
    {"evaluation"},
    {"tuning", "export"},
    {"zoo", "study", "trial"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
"""The rooms, from the ground up. A room may use itself and those on lower floors, not its neighbours."""

FEWER = {
    "algorithms": {"common"},
    "common": set(),
    # They serve the algorithms of SB3 and sb3-contrib as well as ours
    "collapse": {"common"},
    "deployment": {"common", "collapse"},
    "checkpoints": {"common", "collapse"},
}
"""What rooms may use that stand on less than all floors below them."""

EXCEPTIONS = {
    ("common.policies", "policies"): "files of version 0.1.0 name the classes of their policies by this module",
}
"""Modules with a room that they use although it is not below theirs, and the reason."""

FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    """A module's full name."""
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_for_types(node: ast.AST) -> bool:
    """Whether it is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_statements(tree: ast.AST, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module but those for type checkers; with or without those that functions make when they are called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_for_types(node):
            assert isinstance(node, ast.If)
            yield from import_statements(ast.Module(node.orelse, []), in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from import_statements(node, in_functions)


@cache
def names_on_first_use(package: str) -> dict[str, str]:
    """Names that a package imports on first use (PEP 562) with their modules, as it tells type checkers."""
    return {
        alias.name: node.module or ""
        for block in tree_of(package).body
        if is_for_types(block)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imported_modules(tree: ast.AST, in_functions: bool) -> set[str]:
    """The modules of this package that are named in imports, or have the names that are imported."""
    found = set()
    for node in import_statements(tree, in_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name in MODULES:
                found.add(name)
            elif node.module in MODULES:
                found |= {node.module, names_on_first_use(node.module).get(alias.name, node.module)}
    return found & MODULES.keys()


def room_of(module: str) -> str:
    """The first part of a module's name within the package; nothing for the package itself."""
    return f"{module}.".split(".")[1]


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES} - {""}))
def test_no_import_runs_upward(room: str) -> None:
    assert room in FLOOR, "a new room needs a floor"
    below = FEWER.get(room, {other for other, height in FLOOR.items() if height < FLOOR[room]})
    upward = [
        f"{module} uses {used}"
        for module in MODULES
        if room_of(module) == room
        for used in sorted(imported_modules(tree_of(module), in_functions=True))
        if (there := room_of(used)) not in below | {room, ""} and (module.removeprefix(f"{PACKAGE}."), there) not in EXCEPTIONS
    ]
    assert not upward, "\n".join(upward)


def test_the_package_itself_imports_its_rooms_on_first_use_only() -> None:
    rooms = {room_of(module) for module in imported_modules(tree_of(PACKAGE), in_functions=True)}
    assert rooms <= {"common", ""}


@pytest.mark.parametrize(("module", "room"), EXCEPTIONS)
def test_exceptions_are_still_needed(module: str, room: str) -> None:
    assert room in {room_of(used) for used in imported_modules(tree_of(f"{PACKAGE}.{module}"), in_functions=True)}


def imported_first(module: str) -> set[str]:
    """The modules that are imported before a module is complete: those that it names, and the packages around them."""
    found = imported_modules(tree_of(module), in_functions=False)
    around = {name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count(".") + 1)}
    # The packages around the module itself began before it
    return found | {package for package in around if not module.startswith(f"{package}.")} - {module}


def test_no_modules_import_one_another_in_a_circle() -> None:
    # Raises an error that names a circle
    TopologicalSorter({module: imported_first(module) for module in MODULES}).prepare()


def test_imports_are_found_wherever_they_are() -> None:
    source = f"""
from typing import TYPE_CHECKING
import {PACKAGE}.common.io
from {PACKAGE} import OfflineTD3
if TYPE_CHECKING:
    import {PACKAGE}.cli
else:
    from {PACKAGE}.datasets import sources, load_dataset
def later():
    from {PACKAGE}.study import engine
try:
    import {PACKAGE}.doctor
finally:
    import numpy
class Own:
    import {PACKAGE}.zoo
    def later(self):
        import {PACKAGE}.tuning
"""
    names = {"", ".common.io", ".offline_td3", ".datasets.sources", ".datasets", ".doctor", ".zoo"}
    assert imported_modules(ast.parse(source), in_functions=False) == {PACKAGE + name for name in names}
    names |= {".study.engine", ".tuning"}
    assert imported_modules(ast.parse(source), in_functions=True) == {PACKAGE + name for name in names}
