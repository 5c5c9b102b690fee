"""Replay buffers that hold logged and new transitions."""

from sb3_offline_ft.buffers.dict_offline_to_online import DictOfflineToOnlineReplayBuffer
from sb3_offline_ft.buffers.offline_to_online import OfflineToOnlineReplayBuffer

__all__ = ["DictOfflineToOnlineReplayBuffer", "OfflineToOnlineReplayBuffer"]
