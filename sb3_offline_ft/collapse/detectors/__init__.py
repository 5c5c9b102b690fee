"""
Sequential detectors of policy collapse.

A detector is calibrated on the episodes of a reference policy and then fed one episode after the other. If these come
independently from the reference's distribution, the probability of any alarm within ``horizon`` episodes is at most
``false_alarm_rate``.
"""

from collections.abc import Mapping
from typing import Any

from sb3_offline_ft.collapse.detectors.base import Alarm, Detector
from sb3_offline_ft.collapse.detectors.betting import BettingDetector
from sb3_offline_ft.collapse.detectors.cusum import CusumDetector
from sb3_offline_ft.collapse.detectors.deterioration import DeteriorationDetector
from sb3_offline_ft.common.checks import known_keywords
from sb3_offline_ft.common.suggestions import suggestion

__all__ = [
    "DETECTORS",
    "Alarm",
    "BettingDetector",
    "CusumDetector",
    "Detector",
    "DeteriorationDetector",
    "make_detector",
]

DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector for detector in (CusumDetector, BettingDetector, DeteriorationDetector)
}
"""The detectors by name."""


def make_detector(
    detector: str | Mapping[str, Mapping[str, Any] | None] | Detector, false_alarm_rate: float = 0.01, horizon: int = 1000
) -> Detector:
    """
    Make a detector.

    :param detector: A name in :data:`DETECTORS`, or a name with further settings as in ``{"cusum": {"drift": 0.25}}``, or a
        detector, which is returned as it is
    :param false_alarm_rate: Probability of any alarm within ``horizon`` episodes as long as nothing has changed, in (0, 1)
    :param horizon: Number of episodes for which ``false_alarm_rate`` is promised
    :return: The detector
    :raises ValueError: There is no detector of that name
    :raises TypeError: It has no such setting
    """
    if isinstance(detector, Detector):
        return detector
    options: Mapping[str, Any] | None = None
    name: Any = detector
    if isinstance(detector, Mapping):
        if len(detector) != 1:
            raise ValueError(
                f"A detector with settings is one name with them, {{'cusum': {{'drift': 0.25}}}}, found {detector!r}."
            )
        ((name, options),) = detector.items()
    if not isinstance(name, str) or name not in DETECTORS:
        raise ValueError(f"Unknown detector {name!r}. {suggestion(str(name), DETECTORS)}")
    options = dict(options or {})
    known_keywords(DETECTORS[name], options, f"Detector {name!r}")
    return DETECTORS[name](**{"false_alarm_rate": false_alarm_rate, "horizon": horizon, **options})
