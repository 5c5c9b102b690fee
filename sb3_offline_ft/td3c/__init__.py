from sb3_offline_ft.td3c.td3c import TD3C

__all__ = ["TD3C"]
