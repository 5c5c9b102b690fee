"""Offline pretraining and safe online finetuning for Stable-Baselines3. The names are imported on first use (PEP 562)."""

from typing import TYPE_CHECKING

from sb3_offline_ft.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
    from sb3_offline_ft.checkpoints import CheckpointRun, resume
    from sb3_offline_ft.collapse import (
        Alarm,
        BettingDetector,
        CollapseGuard,
        CusumDetector,
        Detector,
        DeteriorationDetector,
        LearnerSnapshot,
    )
    from sb3_offline_ft.common.plain_settings import safe_load
    from sb3_offline_ft.datasets import OfflineDataset, load_dataset
    from sb3_offline_ft.deployment import ChampionChallenger
    from sb3_offline_ft.offline_td3 import OfflineTD3
    from sb3_offline_ft.rebrac import ReBRAC
    from sb3_offline_ft.td3bc import TD3BC
    from sb3_offline_ft.td3c import TD3C
    from sb3_offline_ft.trial import Trial
    from sb3_offline_ft.zoo import register

    __version__: str

__all__ = [
    "TD3BC",
    "TD3C",
    "Alarm",
    "BettingDetector",
    "ChampionChallenger",
    "CheckpointRun",
    "CollapseGuard",
    "CusumDetector",
    "Detector",
    "DeteriorationDetector",
    "DictOfflineToOnlineReplayBuffer",
    "LearnerSnapshot",
    "OfflineDataset",
    "OfflineTD3",
    "OfflineToOnlineReplayBuffer",
    "ReBRAC",
    "Trial",
    "__version__",
    "load_dataset",
    "register",
    "resume",
    "safe_load",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sb3-offline-ft")
    except PackageNotFoundError:
        return "0+not.installed"


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "common.plain_settings": ("safe_load",),
        "buffers": ("DictOfflineToOnlineReplayBuffer", "OfflineToOnlineReplayBuffer"),
        "checkpoints": ("CheckpointRun", "resume"),
        "collapse": (
            "Alarm",
            "BettingDetector",
            "CollapseGuard",
            "CusumDetector",
            "Detector",
            "DeteriorationDetector",
            "LearnerSnapshot",
        ),
        "datasets": ("OfflineDataset", "load_dataset"),
        "deployment": ("ChampionChallenger",),
        "offline_td3": ("OfflineTD3",),
        "rebrac": ("ReBRAC",),
        "td3bc": ("TD3BC",),
        "td3c": ("TD3C",),
        "trial": ("Trial",),
        "zoo": ("register",),
    },
    {"__version__": _version},
)
