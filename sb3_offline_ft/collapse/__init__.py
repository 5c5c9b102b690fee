"""Noticing and undoing policy collapse. The names are imported on first use (PEP 562)."""

from typing import TYPE_CHECKING

from sb3_offline_ft.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_offline_ft.collapse.detectors import Alarm, BettingDetector, CusumDetector, Detector, DeteriorationDetector
    from sb3_offline_ft.collapse.guard import CollapseGuard
    from sb3_offline_ft.collapse.remedies import Remedy
    from sb3_offline_ft.collapse.snapshot import LearnerSnapshot

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "detectors": ("Alarm", "BettingDetector", "CusumDetector", "Detector", "DeteriorationDetector"),
        "guard": ("CollapseGuard",),
        "remedies": ("Remedy",),
        "snapshot": ("LearnerSnapshot",),
    },
)
