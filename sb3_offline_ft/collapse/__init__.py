"""Noticing and undoing policy collapse. The names are imported on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sb3_offline_ft.collapse.detectors import Alarm, BettingDetector, CusumDetector, Detector, DeteriorationDetector
    from sb3_offline_ft.collapse.guard import CollapseGuard
    from sb3_offline_ft.collapse.remedies import Remedy
    from sb3_offline_ft.collapse.snapshot import LearnerSnapshot

_MODULE_OF = {
    "Alarm": "detectors",
    "BettingDetector": "detectors",
    "CusumDetector": "detectors",
    "Detector": "detectors",
    "DeteriorationDetector": "detectors",
    "CollapseGuard": "guard",
    "Remedy": "remedies",
    "LearnerSnapshot": "snapshot",
}

__all__ = [
    "Alarm",
    "BettingDetector",
    "CollapseGuard",
    "CusumDetector",
    "Detector",
    "DeteriorationDetector",
    "LearnerSnapshot",
    "Remedy",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
