"""Standard TD3 with offline data, and the life cycle that all algorithms of this package share."""

from sb3_offline_ft.offline_td3.arguments import OfflineTD3Arguments, SharedArguments
from sb3_offline_ft.offline_td3.life_cycle import Phase
from sb3_offline_ft.offline_td3.offline_td3 import OfflineTD3

__all__ = ["OfflineTD3", "OfflineTD3Arguments", "Phase", "SharedArguments"]
