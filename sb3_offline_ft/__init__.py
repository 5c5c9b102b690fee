"""Offline pretraining and safe online finetuning for Stable-Baselines3.

The public names are imported on first use (PEP 562), so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
    from sb3_offline_ft.collapse import (
        Alarm,
        BettingDetector,
        CollapseGuard,
        CusumDetector,
        Detector,
        DeteriorationDetector,
        LearnerSnapshot,
    )
    from sb3_offline_ft.datasets import OfflineDataset, load_dataset
    from sb3_offline_ft.offline_td3 import OfflineTD3
    from sb3_offline_ft.rebrac import ReBRAC
    from sb3_offline_ft.td3bc import TD3BC
    from sb3_offline_ft.td3c import TD3C
    from sb3_offline_ft.zoo import register

    __version__: str

_MODULE_OF = {
    "OfflineTD3": "sb3_offline_ft.offline_td3",
    "TD3BC": "sb3_offline_ft.td3bc",
    "TD3C": "sb3_offline_ft.td3c",
    "ReBRAC": "sb3_offline_ft.rebrac",
    "OfflineDataset": "sb3_offline_ft.datasets",
    "load_dataset": "sb3_offline_ft.datasets",
    "DictOfflineToOnlineReplayBuffer": "sb3_offline_ft.buffers",
    "OfflineToOnlineReplayBuffer": "sb3_offline_ft.buffers",
    "Alarm": "sb3_offline_ft.collapse",
    "BettingDetector": "sb3_offline_ft.collapse",
    "CollapseGuard": "sb3_offline_ft.collapse",
    "CusumDetector": "sb3_offline_ft.collapse",
    "Detector": "sb3_offline_ft.collapse",
    "DeteriorationDetector": "sb3_offline_ft.collapse",
    "LearnerSnapshot": "sb3_offline_ft.collapse",
    "register": "sb3_offline_ft.zoo",
}

__all__ = [
    "TD3BC",
    "TD3C",
    "Alarm",
    "BettingDetector",
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
    "__version__",
    "load_dataset",
    "register",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sb3-offline-ft")
    except PackageNotFoundError:
        return "0+not.installed"


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
