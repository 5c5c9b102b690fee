"""ReBRAC (Tarasov et al. 2023)."""

from sb3_offline_ft.rebrac.rebrac import ReBRAC

__all__ = ["ReBRAC"]
