"""Warnings that name the user's line."""

import sys
import warnings

INNER = ("sb3_offline_ft", "stable_baselines3")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if the line had done it that called this package, directly or by way of Stable-Baselines3."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
