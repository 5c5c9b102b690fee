"""Studies: methods of finetuning compared on datasets and seeds. The names are imported on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sb3_offline_ft.study.init import init_study
    from sb3_offline_ft.study.protocol import Cell, EvaluationPlan, Method, Protocol

_MODULE_OF = {
    "Cell": "protocol",
    "EvaluationPlan": "protocol",
    "Method": "protocol",
    "Protocol": "protocol",
    "init_study": "init",
}

__all__ = ["Cell", "EvaluationPlan", "Method", "Protocol", "init_study"]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
