"""Studies: methods of finetuning compared on datasets and seeds. The names are imported on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sb3_offline_ft.study.init import init_study
    from sb3_offline_ft.study.protocol import Cell, EvaluationPlan, Method, Protocol
    from sb3_offline_ft.study.report import study_results, write_report
    from sb3_offline_ft.study.results import Run, StudyResults
    from sb3_offline_ft.study.run import run_study
    from sb3_offline_ft.study.run_folder import CellResult

_MODULE_OF = {
    "Cell": "protocol",
    "CellResult": "run_folder",
    "EvaluationPlan": "protocol",
    "Method": "protocol",
    "Protocol": "protocol",
    "Run": "results",
    "StudyResults": "results",
    "init_study": "init",
    "run_study": "run",
    "study_results": "report",
    "write_report": "report",
}

__all__ = [
    "Cell",
    "CellResult",
    "EvaluationPlan",
    "Method",
    "Protocol",
    "Run",
    "StudyResults",
    "init_study",
    "run_study",
    "study_results",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
