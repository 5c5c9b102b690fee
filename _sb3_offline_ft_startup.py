"""Registers our algorithms with rl_zoo3 when rl_zoo3 is imported, so that ``python -m rl_zoo3.train --algo td3c`` works.

The startup files ``sb3_offline_ft.pth`` and ``sb3_offline_ft.start`` (Python >= 3.15) call :func:`install` at every start
of Python, so this module imports nothing that Python has not loaded already. ``SB3_OFFLINE_FT_NO_HOOK=1`` turns it off.
"""

from __future__ import annotations

import os
import sys

# The name is what type checkers look for; importing it from typing would cost more than the whole module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

DISABLE_VARIABLE = "SB3_OFFLINE_FT_NO_HOOK"

installed = False


class _CallbackLoader:
    """Runs the pending callbacks of a module right after the module's own loader has executed it."""

    def __init__(self, loader: Loader, finder: _PostImportFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had never been watched: inspect, pickle and importlib.resources ask its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.executing.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.executing.discard(module.__name__)
        self._finder.run(module.__name__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _PostImportFinder:
    """A ``sys.meta_path`` entry that watches some modules and leaves once each of them has been imported."""

    def __init__(self) -> None:
        self.pending: dict[str, list[Callable[[], None]]] = {}
        self.executing: set[str] = set()
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Other finders that look through sys.meta_path, as we do, would call us for ever.
        if name not in self.pending or name in self._searching:
            return None
        self._searching.add(name)
        try:
            for finder in list(sys.meta_path):
                spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _CallbackLoader(spec.loader, self)  # type: ignore[assignment]
                    return spec
        finally:
            self._searching.discard(name)
        return None

    def run(self, name: str) -> None:
        callbacks = self.pending.pop(name, [])
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)
        for callback in callbacks:
            callback()


_finder = _PostImportFinder()


def after_import(name: str, callback: Callable[[], None]) -> bool:
    """
    Call ``callback`` once, right after the module ``name`` has been imported; now, if it already has been.

    :param name: the full name of the module
    :param callback: what to call, without arguments
    :return: False if the module is being imported at this moment by an import that is not watched, so that the callback
        can never be called
    """
    module = sys.modules.get(name)
    if module is not None and name not in _finder.executing:
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            return False
        callback()
        return True
    _finder.pending.setdefault(name, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return True


def _register() -> None:
    try:
        from sb3_offline_ft.zoo import register

        register()
    except Exception as error:
        print(
            f"sb3_offline_ft: its algorithms could not be registered with rl_zoo3 ({type(error).__name__}: {error}). "
            f"`python -m sb3_offline_ft.zoo.train --help` shows the whole error, `sb3-offline-ft doctor` what to do; "
            f"{DISABLE_VARIABLE}=1 turns the automatic registration off.",
            file=sys.stderr,
        )


def is_disabled() -> bool:
    """Whether the environment variable turns the automatic registration off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def install() -> None:
    """Watch for the import of ``rl_zoo3.utils``, where the table of algorithms is; called at the start of Python."""
    global installed
    if installed or is_disabled():
        return
    installed = True
    after_import("rl_zoo3.utils", _register)
