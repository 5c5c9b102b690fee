from sb3_offline_ft.td3bc.td3bc import TD3BC

__all__ = ["TD3BC"]
