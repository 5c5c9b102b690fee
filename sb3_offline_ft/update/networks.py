"""Which networks the fast kernel understands, and their parameters in one piece of memory."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sb3_offline_ft.policies.layers import NormalizedFlattenExtractor
from sb3_offline_ft.policies.policies import LayerNormContinuousCritic

ALIGNMENT = 16
"""Numbers to whose multiples the layers' parameters are aligned: 64 bytes, a cache line."""
CRITICS = (ContinuousCritic, LayerNormContinuousCritic)
REPLACEABLE = frozenset({"forward", "q1_forward", "extract_features"})
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class NotSupportedError(ValueError):
    """
    The fast kernel cannot compute these networks or this optimizer.

    :param reason: Why, as a clause
    :param surprising: Whether one would expect it to: the networks are those of an ``MlpPolicy``
    """

    def __init__(self, reason: str, surprising: bool = True) -> None:
        super().__init__(reason)
        self.surprising = surprising


@dataclass(frozen=True)
class Layer:
    """The same layer of several networks of one shape: linear, normalization if any, activation if any."""

    linears: tuple[nn.Linear, ...]
    norms: tuple[nn.LayerNorm, ...]
    activation: str | None

    @property
    def parameter_groups(self) -> list[tuple[th.Tensor, ...]]:
        """What is kept side by side in memory: weights, biases, weights and biases of the normalization."""
        groups = [tuple(linear.weight for linear in self.linears), tuple(linear.bias for linear in self.linears)]
        if self.norms:
            groups += [tuple(norm.weight for norm in self.norms), tuple(norm.bias for norm in self.norms)]
        return groups


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What calling a module, or going back through it, calls besides its methods."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does nothing but its class's ``forward``."""
    return not any(hooks_of(module)) and module.__dict__.keys().isdisjoint(REPLACEABLE)


def read_layers(networks: Sequence[nn.Module], what: str) -> tuple[Layer, ...]:
    """
    Read MLPs of one shape, such as the critics of an ensemble, layer by layer.

    :param networks: The networks
    :param what: What they are, for messages
    :raises NotSupportedError: They are something else
    """
    for network in networks:
        if type(network) is not nn.Sequential or not is_plain(network):
            raise NotSupportedError(f"{what} is not a plain Sequential of layers")
    return tuple(_read_layers([list(network) for network in networks], what))  # type: ignore[call-overload]


def _read_layers(columns: list[list[nn.Module]], what: str) -> Iterable[Layer]:
    if len({len(column) for column in columns}) != 1:
        raise NotSupportedError(f"{what} has networks of different shapes")
    rows = list(zip(*columns, strict=True))
    for row in rows:
        if len({type(module) for module in row}) != 1 or not all(map(is_plain, row)):
            raise NotSupportedError(f"{what} has networks of different kinds, or hooks on {type(row[0]).__name__}")
    position = 0
    while position < len(rows):
        linears = rows[position]
        if type(linears[0]) is not nn.Linear:
            raise NotSupportedError(f"{what} has a {type(linears[0]).__name__} where a Linear is expected")
        if len({(linear.in_features, linear.out_features, linear.bias is None) for linear in linears}) != 1:
            raise NotSupportedError(f"{what} has networks of different shapes")
        if linears[0].bias is None:
            raise NotSupportedError(f"{what} has a Linear without bias")
        position += 1
        norms: tuple[nn.Module, ...] = ()
        if position < len(rows) and type(rows[position][0]) is nn.LayerNorm:
            norms = rows[position]
            for norm in norms:
                assert isinstance(norm, nn.LayerNorm)
                if norm.normalized_shape != (linears[0].out_features,) or norm.weight is None or norm.bias is None:
                    raise NotSupportedError(f"{what} has a LayerNorm without weight and bias, or over other axes")
            position += 1
        activation = None
        if position < len(rows) and type(rows[position][0]) is not nn.Linear:
            kind = type(rows[position][0])
            if kind not in ACTIVATIONS:
                raise NotSupportedError(f"{what} has {kind.__name__}: known are Linear, LayerNorm, ReLU and Tanh")
            activation = ACTIVATIONS[kind]
            position += 1
        yield Layer(linears, norms, activation)  # type: ignore[arg-type]


class PolicyNetworks(NamedTuple):
    """The layers of the networks of a TD3 policy."""

    actor: tuple[Layer, ...]
    actor_target: tuple[Layer, ...]
    critic: tuple[Layer, ...]
    critic_target: tuple[Layer, ...]


def networks_of(policy: TD3Policy) -> tuple[Actor, Actor, ContinuousCritic, ContinuousCritic]:
    """Actor, target actor, critic and target critic."""
    return policy.actor, policy.actor_target, policy.critic, policy.critic_target


def read_policy(policy: TD3Policy) -> PolicyNetworks:
    """
    Read a policy's networks.

    :raises NotSupportedError: It has others than MLPs on flat observations, or somebody changed what calling them does
    """
    space = policy.observation_space
    if not isinstance(space, spaces.Box) or is_image_space(space):
        raise NotSupportedError(f"the observations are not vectors ({type(space).__name__} {space.shape})", surprising=False)
    if not is_plain(policy) or _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise NotSupportedError("there are hooks on the policy, or on all modules")
    for network, classes in zip(networks_of(policy), ((Actor,),) * 2 + (CRITICS,) * 2, strict=True):
        if type(network) not in classes:
            raise NotSupportedError(f"{type(network).__name__} is a network class of your own")
        if not is_plain(network):
            raise NotSupportedError(f"{type(network).__name__} has hooks")
        extractor = network.features_extractor
        if type(extractor) not in (FlattenExtractor, NormalizedFlattenExtractor):
            raise NotSupportedError(f"the features extractor is {type(extractor).__name__}", surprising=False)
        assert isinstance(extractor, FlattenExtractor)
        flatten = extractor.flatten
        if not is_plain(extractor) or type(flatten) is not nn.Flatten or not is_plain(flatten) or flatten.start_dim != 1:
            raise NotSupportedError("the features extractor has hooks, or does something else than it is made for")
    networks = PolicyNetworks(
        read_layers([policy.actor.mu], "the actor"),
        read_layers([policy.actor_target.mu], "the target actor"),
        read_layers(policy.critic.q_networks, "the critic"),
        read_layers(policy.critic_target.q_networks, "the target critic"),
    )
    if any(p.is_shared() for p in policy.parameters() if p.device.type == "cpu"):  # type: ignore[no-untyped-call]
        raise NotSupportedError("parameters are in memory that is shared between processes, from which they would be moved")
    addresses = [p.data_ptr() for layers in networks for layer in layers for g in layer.parameter_groups for p in g]
    if len(set(addresses)) != len(addresses):
        raise NotSupportedError("layers share parameters")
    for live, target in ((networks.actor, networks.actor_target), (networks.critic, networks.critic_target)):
        shapes = [
            [[p.shape for p in group] for layer in layers for group in layer.parameter_groups] for layers in (live, target)
        ]
        if shapes[0] != shapes[1]:
            raise NotSupportedError("a target network has another shape than its network")
    return networks


def check_trainable(parameters: Iterable[th.Tensor]) -> None:
    """Raise :class:`NotSupportedError` if a parameter is frozen, or has hooks on its gradient."""
    for parameter in parameters:
        if not parameter.requires_grad:
            raise NotSupportedError("a parameter is frozen (`requires_grad=False`)")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise NotSupportedError("a parameter has hooks on its gradient")


class ModuleWatch:
    """
    Notices whether somebody has changed modules: hooks, replaced children or parameters, replaced methods.

    It takes a few microseconds, since the dictionaries of the modules are looked at without calling Python code for each.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self._modules = modules
        self._attributes = [module.__dict__ for module in modules]
        self._containers = [
            members for module in modules for members in (module._modules, module._parameters, module._buffers)
        ]
        self._members = [members for members in self._containers if members]
        self._seen = self._look()

    def _look(self) -> tuple[list[type], list[int], list[int], list[list[int]]]:
        return (
            list(map(type, self._modules)),
            list(map(len, self._attributes)),
            list(map(len, self._containers)),
            [list(map(id, members.values())) for members in self._members],
        )

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing has changed."""
        return not (any(self._hooks) or _has_any_global_hook()) and self._look() == self._seen  # type: ignore[no-untyped-call]


class FlatParameters:
    """
    Parameters of networks in one piece of memory, in which they stay the same objects with the same values.

    One operation then works on all of them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        groups = [group for layer in layers for group in layer.parameter_groups]
        self.parameters = [parameter for group in groups for parameter in group]
        self._places: list[tuple[int, th.Size]] = []
        start = 0
        for group in groups:
            for parameter in group:
                self._places.append((start, parameter.shape))
                start += parameter.numel()
            start = math.ceil(start / ALIGNMENT) * ALIGNMENT
        self.size = start
        first = self.parameters[0]
        for parameter in self.parameters:
            if parameter.dtype != th.float32:
                raise NotSupportedError(f"parameters are {parameter.dtype}, not float32")
            if parameter.device != first.device:
                raise NotSupportedError("parameters are on several devices")
        self.values = self.zeros()
        with th.no_grad():
            for parameter, view in zip(self.parameters, self.views(self.values), strict=True):
                view.copy_(parameter)
                parameter.data = view
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

    @property
    def is_current(self) -> bool:
        """Whether the parameters are still kept here: ``.to(device)`` and the like move them elsewhere."""
        return [parameter.data_ptr() for parameter in self.parameters] == self._addresses

    def gather(self) -> None:
        """Take parameters that somebody has put elsewhere back to this memory, with their present values."""
        with th.no_grad():
            for parameter, view, address in zip(self.parameters, self.views(self.values), self._addresses, strict=True):
                if parameter.data_ptr() != address:
                    view.copy_(parameter)
                    parameter.data = view

    def zeros(self) -> th.Tensor:
        """New memory of the same layout."""
        first = self.parameters[0]
        return th.zeros(self.size, dtype=first.dtype, device=first.device)

    def views(self, memory: th.Tensor) -> list[th.Tensor]:
        """The part of each parameter in memory of this layout."""
        return [memory[start : start + shape.numel()].view(shape) for start, shape in self._places]
