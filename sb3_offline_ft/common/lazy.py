"""Names of a package that are imported on first use (PEP 562), so that importing the package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]], others: Mapping[str, Callable[[], object]] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """
    :param package: The package's ``__name__``
    :param modules: Names by the module, relative to the package, that has them
    :param others: What makes names that no module has
    :return: The package's ``__getattr__`` and ``__dir__``
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    makers = dict(others or {})

    def __getattr__(name: str) -> object:
        if name in makers:
            value = makers[name]()
        elif name in module_of:
            value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *makers})

    return __getattr__, __dir__
