"""TD3+BC (Fujimoto & Gu 2021), finetuned with all, less or none of the cloning."""

from sb3_offline_ft.td3bc.td3bc import TD3BC

__all__ = ["TD3BC"]
