"""TD3 whose policy may not move far from a reference while it is finetuned."""

from sb3_offline_ft.td3c.td3c import TD3C

__all__ = ["TD3C"]
