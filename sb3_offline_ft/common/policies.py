"""Policies for offline pretraining and online finetuning: observation normalizer and LayerNorm critics."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3 import policies as td3_policies
from torch import nn

from sb3_offline_ft.common.acting import ActingPolicy
from sb3_offline_ft.common.torch_layers import NormalizedFlattenExtractor

__all__ = ["CnnPolicy", "LayerNormContinuousCritic", "MlpPolicy", "MultiInputPolicy", "NormalizedFlattenExtractor"]

STD_OFFSET = 1e-3
"""Added to the standard deviations, as in the authors' code of TD3+BC (Fujimoto & Gu 2021)."""


class LayerNormContinuousCritic(ContinuousCritic):
    """
    SB3's critics with a ``LayerNorm`` between each hidden linear layer and its activation.

    It bounds how far the critic extrapolates beyond the data (Ball et al. 2023, "Efficient Online Reinforcement
    Learning with Offline Data", section 4.2). Parameters as in SB3's ``ContinuousCritic``; the linear layers start
    from the same weights as there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, q_network in enumerate(self.q_networks):
            assert isinstance(q_network, nn.Sequential)
            layers: list[nn.Module] = []
            for layer in q_network:
                layers.append(layer)
                if isinstance(layer, nn.Linear) and layer is not q_network[-1]:
                    layers.append(nn.LayerNorm(layer.out_features))
            self.q_networks[index] = nn.Sequential(*layers)
            setattr(self, f"qf{index}", self.q_networks[index])


class MlpPolicy(ActingPolicy):
    """
    Actor and critics for vector observations.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy and value networks, two layers of 256 by default
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor to use; the default can normalize observations
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether to share or not the features extractor between the actor and the critic
    :param layer_norm: Whether the critics have a ``LayerNorm`` after each hidden linear layer
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = NormalizedFlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        layer_norm: bool = True,
    ) -> None:
        self.layer_norm = layer_norm
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [256, 256] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "layer_norm": self.layer_norm}

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        if not self.layer_norm:
            return super().make_critic(features_extractor)
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LayerNormContinuousCritic(**critic_kwargs).to(self.device)

    def normalizers(self) -> list[NormalizedFlattenExtractor]:
        """
        :return: The observation normalizers of all networks, none if another features extractor is used
        """
        return [module for module in self.modules() if isinstance(module, NormalizedFlattenExtractor)]


class CnnPolicy(ActingPolicy, td3_policies.CnnPolicy):
    """SB3's actor and critics for images."""


class MultiInputPolicy(ActingPolicy, td3_policies.MultiInputPolicy):
    """SB3's actor and critics for observations that are a ``Dict``."""
