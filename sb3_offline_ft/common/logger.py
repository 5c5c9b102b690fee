"""Logging of the offline phase beside the online one."""

from typing import Any

from stable_baselines3.common.logger import Logger

OFFLINE_NAMES = {"time/total_timesteps": "offline/gradient_steps"}


class OfflineLogger(Logger):
    """
    Writes to another logger's outputs under ``offline/``.

    ``train/x`` becomes ``offline/x`` and ``eval/x`` becomes ``offline/eval_x``.

    Offline values are plotted against gradient steps and online values against environment steps: without another name
    the two curves would overlap.

    :param base: The logger whose outputs are used
    """

    def __init__(self, base: Logger) -> None:
        super().__init__(base.dir, base.output_formats)

    @staticmethod
    def _offline_name(key: str) -> str:
        if key.startswith("offline/"):
            return key
        return OFFLINE_NAMES.get(key, "offline/" + key.removeprefix("train/").replace("/", "_"))

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        super().record(self._offline_name(key), value, exclude)

    def record_mean(self, key: str, value: float | None, exclude: str | tuple[str, ...] | None = None) -> None:
        super().record_mean(self._offline_name(key), value, exclude)
