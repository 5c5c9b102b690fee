"""What a policy is asked at every environment step, without what SB3 does to be ready for any policy."""

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from sb3_offline_ft.policies.layers import NormalizedFlattenExtractor

ACTIVATIONS = {nn.ReLU: th.relu_, nn.Tanh: th.tanh_}
"""What the ``forward`` of these layers calls, but in place."""

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

PREDICT, OBS_TO_TENSOR = TD3Policy._predict, BaseModel.obs_to_tensor
FORWARD, EXTRACT_FEATURES = Actor.forward, BaseModel.extract_features
SET_TRAINING_MODE = BaseModel.set_training_mode

ACTING = ("_predict", "obs_to_tensor", "forward", "extract_features", "_call_impl", "_compiled_call_impl")
"""Attributes that change how a policy acts when somebody sets them on the policy, a network or a layer."""
SWITCHING = ("train", "children", "named_children", "set_training_mode")
"""Attributes that change how a module switches its mode when somebody sets them on it."""


class PlainActor:
    """
    The actions of an MLP on vectors, from the same operations as in ``Actor.forward`` and hence the same to the bit.

    Parameters are read at each call: what has set them, and where they are kept, makes no difference.

    :param policy: The policy; if its actor is something else, or if somebody changed what calling it does, there are no
        actions and SB3's own way must be gone
    """

    def __init__(self, policy: TD3Policy) -> None:
        self._policy, self._actor = policy, policy.actor
        self._space = policy.observation_space
        self._size = math.prod(self._space.shape or ())
        self._normalizer: NormalizedFlattenExtractor | None = None
        self._layers: list[tuple[Any, nn.Module]] = []
        self._hooked: list[nn.Module] = []
        self._is_plain = self._read()

    def _read(self) -> bool:
        """Returns whether the actor is an MLP on vectors; what it consists of is noted then."""
        actor, space = self._actor, self._space
        if type(actor) is not Actor or not isinstance(space, spaces.Box) or is_image_space(space) or not space.shape:
            return False
        extractor, mu = actor.features_extractor, actor.mu
        if type(extractor) is NormalizedFlattenExtractor:
            self._normalizer = extractor
        elif type(extractor) is not FlattenExtractor:
            return False
        flatten = extractor.flatten
        if type(flatten) is not nn.Flatten or (flatten.start_dim, flatten.end_dim) != (1, -1) or type(mu) is not nn.Sequential:
            return False
        self._hooked = [actor, extractor, flatten, mu]
        is_fresh = False
        for layer in mu:
            is_linear = type(layer) is nn.Linear
            # Only what a linear layer has just made may be changed in place
            function = F.linear if is_linear else ACTIVATIONS.get(type(layer)) if is_fresh else None
            self._layers.append((function or layer, layer))
            if function is not None:
                self._hooked.append(layer)
            is_fresh = is_linear
        return (
            len(mu) > 0
            and type(mu[0]) is nn.Linear
            and all({"weight", "bias"} <= layer._parameters.keys() for function, layer in self._layers if function is F.linear)
            and all(module.__dict__.keys().isdisjoint(ACTING) for module in (self._policy, *self._hooked))
        )

    def _is_usual(self) -> bool:
        """Returns whether nobody has changed what the policy and the actor do, by a subclass, a hook or another space."""
        policy, kind = self._policy, type(self._policy)
        if (
            kind._predict is not PREDICT
            or kind.obs_to_tensor is not OBS_TO_TENSOR
            or Actor.forward is not FORWARD
            or Actor.extract_features is not EXTRACT_FEATURES
            or policy.observation_space is not self._space
            or self._actor.observation_space is not self._space
            or not policy.squash_output
            or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        ):
            return False
        for module in self._hooked:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                return False
        return True

    def can_act_on(self, observations: np.ndarray) -> bool:
        """
        Whether :meth:`act` gives the actions of ``policy.predict``, now.

        :param observations: One observation, or several along the first axis
        :return: False if only SB3 can tell the actions
        """
        shape = self._space.shape
        return (
            self._is_plain
            and observations.dtype in FLOATS
            and (observations.shape[1:] == shape or observations.shape == shape)
            and self._is_usual()
            and self._layers[0][1]._parameters["weight"].is_cpu  # type: ignore[union-attr]
        )

    def act(self, observations: np.ndarray) -> np.ndarray:
        """
        The actions of ``policy.predict``, for a policy that is in evaluation mode.

        :param observations: One observation, or several along the first axis
        :return: The action or actions
        """
        policy = self._policy
        values = th.from_numpy(self._features(observations))
        with th.no_grad():
            for function, layer in self._layers:
                if function is F.linear:
                    parameters: dict[str, Any] = layer._parameters
                    values = F.linear(values, parameters["weight"], parameters["bias"])
                else:
                    values = function(values)
            scaled = values.numpy()
        assert policy.action_space.shape is not None
        actions = policy.unscale_action(scaled.reshape((-1, *policy.action_space.shape)))
        return actions.squeeze(axis=0) if observations.shape == self._space.shape else actions

    def _features(self, observations: np.ndarray) -> np.ndarray:
        # NumPy rounds as PyTorch does and is sooner done with a few numbers, but it warns of infinite ones
        with np.errstate(all="ignore"):
            features: np.ndarray = np.array(observations, dtype=np.float32).reshape(-1, self._size)
            if self._normalizer is not None:
                statistics: dict[str, Any] = self._normalizer._buffers
                features = (features - statistics["observation_mean"].numpy()) / statistics["observation_std"].numpy()
        return features


class Networks:
    """
    The modules that a policy acts with and switches between modes, looked at once instead of at each step.

    It belongs to the policy that it was made for, so that a copy or a pickle of it is None.

    :param policy: The policy
    """

    def __init__(self, policy: TD3Policy) -> None:
        modules = list(dict.fromkeys([policy, *policy.actor.modules(), *policy.critic.modules()]))
        self._states = [module.__dict__ for module in modules]
        self._sizes = list(map(len, self._states))
        children = [module._modules for module in modules]
        self._parents = [each for each in children if each]
        self._leaves = [each for each in children if not each]
        self._children = [list(each.values()) for each in self._parents]
        self.switch_as_usual = all(map(_switches_as_usual, modules))
        self.actor = PlainActor(policy)
        assert isinstance(policy.action_space, spaces.Box)
        self.action_space: spaces.Box = policy.action_space
        self.has_unit_actions = bool((self.action_space.low == -1).all() and (self.action_space.high == 1).all())

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def are_current(self) -> bool:
        """
        :return: Whether no module has been replaced and no attribute added since they were looked at
        """
        return (
            list(map(len, self._states)) == self._sizes
            and [list(each.values()) for each in self._parents] == self._children
            and not any(self._leaves)
        )

    def set_mode(self, mode: bool) -> None:
        """
        Switch all modules, each of which may be in another mode.

        :param mode: True for training mode, False for evaluation mode
        """
        for state in self._states:
            # What `nn.Module.train` sets in the end
            state["training"] = mode


def _switches_as_usual(module: nn.Module) -> bool:
    """Whether setting the module's mode does nothing but to note it, in the module and below."""
    kind, plain = type(module), nn.Module
    return (
        (kind.train, kind.children, kind.named_children) == (plain.train, plain.children, plain.named_children)
        and kind.__setattr__ is plain.__setattr__
        and not hasattr(kind, "training")
        and "training" in module.__dict__
        and module.__dict__.keys().isdisjoint(SWITCHING)
        and getattr(kind, "set_training_mode", SET_TRAINING_MODE) in (SET_TRAINING_MODE, ActingPolicy.set_training_mode)
    )


class ActingPolicy(TD3Policy):
    """A TD3 policy that acts and switches its mode at a fraction of the usual cost, with the same results."""

    _networks: Networks | None = None

    def _current_networks(self) -> Networks:
        networks = self._networks
        if networks is None or not networks.are_current():
            networks = self._networks = Networks(self)
        return networks

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        This affects certain modules, such as batch normalisation and dropout.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        networks = self._current_networks()
        if networks.switch_as_usual and isinstance(mode, bool):
            networks.set_mode(mode)
        else:
            super().set_training_mode(mode)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [low, high] to [-1, 1]

        :param action: Action to scale
        :return: Scaled action
        """
        networks = self._networks
        if networks is None or not networks.has_unit_actions or networks.action_space is not self.action_space:
            return super().scale_action(action)
        # Without SB3's division by 2 and multiplication by 2, which are exact
        scaled: np.ndarray = (action - networks.action_space.low) - 1.0
        return scaled

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [-1, 1] to [low, high]

        :param scaled_action: Action to un-scale
        :return: Action
        """
        networks = self._networks
        if networks is None or not networks.has_unit_actions or networks.action_space is not self.action_space:
            return super().unscale_action(scaled_action)
        action: np.ndarray = networks.action_space.low + (scaled_action + 1.0)
        return action

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation (and optional hidden state).

        :param observation: the input observation
        :param state: The last hidden states (not used, returned as it is)
        :param episode_start: The last masks (not used)
        :param deterministic: Whether or not to return deterministic actions, which a TD3 policy always does
        :return: the model's action and the next hidden state
        """
        if type(observation) is np.ndarray:
            networks = self._current_networks()
            if networks.switch_as_usual and networks.actor.can_act_on(observation):
                networks.set_mode(False)
                return networks.actor.act(observation), state
        return super().predict(observation, state, episode_start, deterministic)
