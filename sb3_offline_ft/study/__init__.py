"""Studies: methods of finetuning compared on datasets and seeds. The names are imported on first use (PEP 562)."""

from typing import TYPE_CHECKING

from sb3_offline_ft.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_offline_ft.study.design.init import init_study
    from sb3_offline_ft.study.design.protocol import Cell, EvaluationPlan, Method, Protocol
    from sb3_offline_ft.study.engine.folder import CellResult
    from sb3_offline_ft.study.engine.results import Run, StudyResults, study_results
    from sb3_offline_ft.study.engine.run import run_study
    from sb3_offline_ft.study.report.page import write_report

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "design.init": ("init_study",),
        "design.protocol": ("Cell", "EvaluationPlan", "Method", "Protocol"),
        "engine.folder": ("CellResult",),
        "engine.results": ("Run", "StudyResults", "study_results"),
        "engine.run": ("run_study",),
        "report.page": ("write_report",),
    },
)
