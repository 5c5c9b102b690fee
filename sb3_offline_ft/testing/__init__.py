"""
A contract for algorithms: what :class:`~sb3_offline_ft.OfflineTD3` and its subclasses promise, as functions that check it.

No test framework is needed: a broken promise is an ``AssertionError`` that says what was expected and what was found.
"""

from sb3_offline_ft.testing.contract import CLAUSES, check_algorithm
from sb3_offline_ft.testing.point_env import PointEnv, record

__all__ = ["CLAUSES", "PointEnv", "check_algorithm", "record"]
