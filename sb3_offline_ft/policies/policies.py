"""Policies for offline pretraining and online finetuning: observation normalizer, LayerNorm critics, ensembles of critics."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from sb3_offline_ft.common.checks import whole_number
from sb3_offline_ft.common.observations import mean_and_std
from sb3_offline_ft.policies.layers import NormalizedCombinedExtractor, NormalizedFlattenExtractor, is_vector_space

__all__ = [
    "CnnPolicy",
    "LayerNormContinuousCritic",
    "MlpPolicy",
    "MultiInputPolicy",
    "NormalizedCombinedExtractor",
    "NormalizedFlattenExtractor",
    "OfflinePolicy",
]

STD_OFFSET = 1e-3
"""Added to the standard deviations, as in the authors' code of TD3+BC (Fujimoto & Gu 2021)."""
ACTOR_VALUES = ("first", "mean", "min")


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


class OfflinePolicy(TD3Policy):
    """
    Actor and critics: what the policies of this package have in common.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy and value networks, two layers of 256 by default
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor to use, by default the policy's own
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of critic networks to create
    :param share_features_extractor: Whether to share or not the features extractor between the actor and the critic
    :param layer_norm: Whether the critics have a ``LayerNorm`` after each hidden linear layer
    :param target_critics: Number of target critics, drawn anew at each gradient step, whose minimum is the critics' target
        (Chen et al. 2021, "Randomized Ensembled Double Q-Learning", https://arxiv.org/abs/2101.05982); None for all
    :param actor_value: Which value the actor maximises: the ``"first"`` critic's as in TD3, the ``"mean"`` of all as in REDQ,
        or the ``"min"`` of all
    :raises ValueError: ``n_critics``, ``target_critics`` or ``actor_value`` is out of range
    """

    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = NormalizedFlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        layer_norm: bool = True,
        target_critics: int | None = None,
        actor_value: str = "first",
    ) -> None:
        n_critics = whole_number(n_critics, "n_critics", least=1)
        if target_critics is not None:
            target_critics = whole_number(target_critics, "target_critics", least=1)
            if target_critics > n_critics:
                raise ValueError(
                    f"`target_critics` must be at most `n_critics`, found {target_critics} of {n_critics}: "
                    "use more critics, or None for the minimum over all of them."
                )
        if actor_value not in ACTOR_VALUES:
            raise ValueError(f"`actor_value` must be one of {', '.join(map(repr, ACTOR_VALUES))}, found {actor_value!r}.")
        self.layer_norm = layer_norm
        self.target_critics = target_critics
        self.actor_value = actor_value
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [256, 256] if net_arch is None else net_arch,
            activation_fn,
            self.default_features_extractor_class if features_extractor_class is None else features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("layer_norm", "target_critics", "actor_value")
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        if not self.layer_norm:
            return super().make_critic(features_extractor)
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LayerNormContinuousCritic(**critic_kwargs).to(self.device)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        :param mode: True for training mode, False for evaluation mode
        """
        # SB3 asks for it at every step in the environment, and switching takes as long there as acting
        if self.training is not mode or not (_all_in_mode(self.actor, mode) and _all_in_mode(self.critic, mode)):
            super().set_training_mode(mode)

    def normalizers(self) -> list[NormalizedFlattenExtractor]:
        """
        :return: The observation normalizers of all networks, none if another features extractor is used
        """
        return [module for module in self.modules() if isinstance(module, NormalizedFlattenExtractor)]

    @property
    def has_fitted_normalizer(self) -> bool:
        """Whether the policy normalizes observations by statistics that have been set."""
        return any(normalizer.is_fitted for normalizer in self.normalizers())

    def fit_normalizers(self, observations: np.ndarray | Mapping[str, np.ndarray]) -> bool:
        """
        Set the statistics of the observation normalizers to mean and standard deviation of observations.

        Images are left alone, as networks get them divided by 255, and so are discrete observations.

        :param observations: The observations, shape ``(n, ...)``; for a ``Dict`` an array for each key
        :return: Whether there was anything to set
        """
        by_key = observations if isinstance(observations, Mapping) else {None: observations}
        fitted = False
        for key, values in by_key.items():
            normalizers = self._normalizers_of(key)
            if normalizers:
                mean, std = mean_and_std(values)
                for normalizer in normalizers:
                    normalizer.set_statistics(mean, std + STD_OFFSET)
            fitted |= bool(normalizers)
        return fitted

    def _normalizers_of(self, key: str | None) -> list[NormalizedFlattenExtractor]:
        """Those of one key of a ``Dict``; None for observations that are no ``Dict``."""
        if key is None:
            # Networks get images divided by 255, to which the statistics of the observations do not apply
            return self.normalizers() if is_vector_space(self.observation_space) else []
        combined = [module.extractors for module in self.modules() if isinstance(module, CombinedExtractor)]
        found = [extractors[key] for extractors in combined if key in extractors]
        return [module for module in found if isinstance(module, NormalizedFlattenExtractor)]


def _all_in_mode(module: nn.Module, mode: bool) -> bool:
    children = module._modules.values()
    return module.training is mode and all([child is None or _all_in_mode(child, mode) for child in children])


class MlpPolicy(OfflinePolicy):
    """
    Actor and critics for vector observations, which the default features extractor can normalize.

    Parameters as in :class:`OfflinePolicy`.
    """

    default_features_extractor_class = NormalizedFlattenExtractor


class CnnPolicy(OfflinePolicy):
    """
    Actor and critics for images, with SB3's ``NatureCNN`` as the default features extractor.

    Parameters as in :class:`OfflinePolicy`.
    """

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(OfflinePolicy):
    """
    Actor and critics for observations that are a ``Dict``. The default features extractor passes images through a CNN each and
    can normalize vectors.

    Parameters as in :class:`OfflinePolicy`.
    """

    default_features_extractor_class = NormalizedCombinedExtractor
