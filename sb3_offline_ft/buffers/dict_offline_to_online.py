"""The offline-to-online replay buffer for observations that are dictionaries."""

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_offline_ft.buffers.offline_to_online import OfflineToOnlineReplayBuffer


class DictOfflineToOnlineReplayBuffer(OfflineToOnlineReplayBuffer, DictReplayBuffer):  # type: ignore[misc]  # as in SB3
    """
    :class:`OfflineToOnlineReplayBuffer` for ``Dict`` observation spaces of one level, whose keys are vectors (kept as
    float32), images (uint8) or ``Discrete`` (integers, which SB3's networks encode as one-hot vectors).

    Parameters are those of :class:`OfflineToOnlineReplayBuffer`. It is also a ``DictReplayBuffer`` of SB3, with whose batches
    it agrees without offline data.
    """

    _space_class: ClassVar[type[spaces.Space[Any]]] = spaces.Dict
    _other_space_hint: ClassVar[str] = "For a Box space use OfflineToOnlineReplayBuffer."
    _sb3_classes: ClassVar[tuple[type[ReplayBuffer], ...]] = (DictReplayBuffer,)

    observation_space: spaces.Dict
    obs_shape: dict[str, tuple[int, ...]]
    observations: dict[str, np.ndarray]
    next_observations: dict[str, np.ndarray]
