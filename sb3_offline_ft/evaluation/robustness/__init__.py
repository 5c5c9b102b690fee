"""Policies in environments that are other ones than they were made for."""

from sb3_offline_ft.evaluation.robustness.episodes import InfoMetric
from sb3_offline_ft.evaluation.robustness.perturbations import PERTURBATIONS, Perturbation, find_perturbation
from sb3_offline_ft.evaluation.robustness.result import Policy, Range, Response, RobustnessResult
from sb3_offline_ft.evaluation.robustness.running import run_robustness
from sb3_offline_ft.evaluation.robustness.show import drawing, print_tables, write_files

__all__ = [
    "PERTURBATIONS",
    "InfoMetric",
    "Perturbation",
    "Policy",
    "Range",
    "Response",
    "RobustnessResult",
    "drawing",
    "find_perturbation",
    "print_tables",
    "run_robustness",
    "write_files",
]
