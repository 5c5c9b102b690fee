"""Features extractors of the policies."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

__all__ = ["NormalizedCombinedExtractor", "NormalizedFlattenExtractor", "is_vector_space"]


def is_vector_space(space: spaces.Space[Any]) -> bool:
    """Whether normalizing the observations of a space, not a ``Dict``, makes sense: a ``Box``, and not one of images."""
    return isinstance(space, spaces.Box) and not is_image_space(space)


class NormalizedFlattenExtractor(FlattenExtractor):
    """
    Flatten the observation and normalize it by fixed statistics: ``(observation - mean) / std``.

    The statistics are buffers of the module: they are saved with the policy, need no environment wrapper,
    and never drift. Until :meth:`set_statistics` is called they are 0 and 1, which changes nothing, to the bit.

    :param observation_space: Observation space, a ``Box``
    """

    observation_mean: th.Tensor
    observation_std: th.Tensor

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)
        self.register_buffer("observation_mean", th.zeros(self.features_dim))
        self.register_buffer("observation_std", th.ones(self.features_dim))

    @property
    def is_fitted(self) -> bool:
        """Whether the statistics have been set."""
        return bool((self.observation_mean != 0).any() or (self.observation_std != 1).any())

    def set_statistics(self, mean: np.ndarray, std: np.ndarray) -> None:
        """
        Set the statistics.

        :param mean: Means, shape ``(features_dim,)``, in the observation's units
        :param std: Standard deviations, same shape, positive
        """
        self.observation_mean.copy_(th.as_tensor(mean))
        self.observation_std.copy_(th.as_tensor(std))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.flatten(observations)
        return (features - self.observation_mean) / self.observation_std


class NormalizedCombinedExtractor(CombinedExtractor):
    """
    SB3's ``CombinedExtractor`` that normalizes the vectors among the keys, each by a :class:`NormalizedFlattenExtractor`.

    Images go through SB3's ``NatureCNN``, and discrete observations are one-hot, as there.

    :param observation_space: Observation space, a ``Dict``
    :param cnn_output_dim: Number of features of each image
    :param normalized_image: Whether images are normalized already, see SB3's ``CombinedExtractor``
    """

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False) -> None:
        super().__init__(observation_space, cnn_output_dim, normalized_image)
        for key, module in self.extractors.items():
            if isinstance(module, nn.Flatten) and is_vector_space(observation_space[key]):
                self.extractors[key] = NormalizedFlattenExtractor(observation_space[key])
