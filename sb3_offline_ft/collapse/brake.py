"""Slowing, holding and confining a learner's policy from outside."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn

from sb3_offline_ft.collapse.learner import PolicyState, learned_weights, policy_network
from sb3_offline_ft.collapse.signals import Observations, draw_rows, greedy_actions, observations_at, policy_distance

PROBE_SIZE = 256
PROBE_LIFE = 50
"""Steps of the optimizer after which the trust region is measured on other states."""
SHRINKS = 12


def _mode_matters(module: nn.Module) -> bool:
    """Whether a network computes something else while training. Switching takes as long as a small network's pass."""
    normalizes = any(name.endswith("running_mean") for name, _ in module.named_buffers())
    return normalizes or any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())


def _on_device(value: Any, device: th.device) -> Any:
    if isinstance(value, dict):
        return {name: _on_device(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, th.Tensor) else value


class PolicyBrake:
    """
    Slows, holds or confines the policy of an SB3 learner through hooks on the optimizer of its actor.

    It works for every algorithm whose policy has an ``actor``, and for value-based ones (DQN, QRDQN), whose network is the
    policy. Where the policy that acts is an average of what is learned, it is the average that is held and confined, and what
    is learned goes with it. Nothing is hooked before the first use.

    :param model: The learner
    :param seed: Seed of the choice of states on which the trust region is measured
    """

    def __init__(self, model: OffPolicyAlgorithm, seed: int = 0) -> None:
        self._model = model
        name, self.module, self._optimizer = policy_network(model)
        self._prefix = f"{name}."
        self._generator = np.random.default_rng(seed)
        self._mode_matters = _mode_matters(model.policy)
        self._handles: list[Any] = []
        self._learning_rates: list[float] = []
        self._held: dict[str, th.Tensor] = {}
        self._run: float = model.start_time
        self._probe: Observations | None = None
        self._probe_age = 0
        self._center: PolicyState | None = None
        self._center_actions: th.Tensor | None = None
        self.learning_rate_factor = 1.0
        self.radius = math.inf
        self.held = False

    @property
    def facts(self) -> dict[str, Any]:
        """How the policy is slowed, confined and held now, in the form of JSON."""
        radius = self.radius if math.isfinite(self.radius) else None
        return {"learning_rate_factor": self.learning_rate_factor, "radius": radius, "held": self.held}

    def take_up(self, learning_rate_factor: float, radius: float | None, held: bool, center: PolicyState) -> None:
        """Go on with what :attr:`facts` were; the region lies around this center."""
        if learning_rate_factor != 1:
            self.slow_down(learning_rate_factor)
        if radius is not None:
            self.confine(radius, center)
        self.hold(held)

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values and tensors."""
        return {
            **self.facts,
            "center": None if self._center is None else dict(self._center),
            "held_weights": dict(self._held),
            "generator": self._generator.bit_generator.state,
            "probe": self._probe,
            "probe_age": self._probe_age,
            "center_actions": self._center_actions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self.take_up(state["learning_rate_factor"], None, False, {})
        if state["center"] is not None:
            self.confine(math.inf if state["radius"] is None else state["radius"], state["center"])
        self.held, self._held = state["held"], _on_device(state["held_weights"], self._model.device)
        self._generator.bit_generator.state = state["generator"]
        self._probe, self._probe_age = _on_device(state["probe"], self._model.device), state["probe_age"]
        self._center_actions = _on_device(state["center_actions"], self._model.device)
        self.attach()

    def attach(self) -> None:
        """Act on the optimizer in the present run of ``learn``, if there is anything to do."""
        self._run = self._model.start_time
        if (self.held or self.learning_rate_factor != 1 or self._center is not None) and not self._handles:
            self._handles = [
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]

    def remove(self) -> None:
        """Let the optimizer alone, until the next :meth:`attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def slow_down(self, factor: float) -> None:
        """Multiply the learning rate of the policy with a factor, in place of the present one."""
        self.learning_rate_factor = factor
        self.attach()

    def hold(self, held: bool) -> None:
        """Leave the policy as it is, or let it learn on; the critics learn on."""
        self.held = held
        self._held = {name: value.clone() for name, value in self.module.state_dict().items()} if held else {}
        self.attach()

    def confine(self, radius: float, center: PolicyState) -> None:
        """
        Keep the policy within a trust region: after each step of the optimizer that leaves it, the parameters are moved back
        on the straight line to those of the center until they are inside.

        :param radius: Largest :func:`policy_distance` to the center, on states of the replay buffer
        :param center: Parameters of the whole policy
        """
        self.radius = radius
        self._center = {name: value.to(self._model.device) for name, value in center.items()}
        self._probe = None
        self.attach()

    def _before_step(self, optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # After an interrupt nobody removes the hooks; a run that began without this brake is none of its business
        if self._model.start_time != self._run:
            return
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        factor = 0.0 if self.held else self.learning_rate_factor
        for group in optimizer.param_groups:
            group["lr"] *= factor

    def _after_step(self, optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._model.start_time != self._run:
            return
        for group, learning_rate in zip(optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate
        if self.held:
            # Batch normalization learns without an optimizer, and a learning rate of 0 does not stop a non-finite gradient
            self.module.load_state_dict(self._held)
            if (learned := learned_weights(self._model)) is not None:
                learned.undo_step(self.module)
        elif self._center is not None and math.isfinite(self.radius):
            if (learned := learned_weights(self._model)) is not None:
                learned.call_afterwards(partial(self._move_inside, learned.values))
            else:
                self._move_inside({})

    @th.no_grad()
    def _move_inside(self, learned: Mapping[str, th.Tensor]) -> None:
        model, center = self._model, self._center
        assert center is not None
        buffer = model.replay_buffer
        assert buffer is not None
        training = model.policy.training
        if self._mode_matters:
            model.policy.set_training_mode(False)
        try:
            self._probe_age += 1
            if self._probe is None or self._probe_age >= PROBE_LIFE:
                self._probe = observations_at(model, *draw_rows(buffer, PROBE_SIZE, self._generator))
                self._center_actions = greedy_actions(model, self._probe, center)
                self._probe_age = 0
            assert self._center_actions is not None
            for _ in range(SHRINKS):
                distance = policy_distance(greedy_actions(model, self._probe), self._center_actions)
                if not distance > self.radius:
                    return
                # Small steps change actions in proportion, so the squared distance shrinks with the square of the share
                share = 0.98 * math.sqrt(self.radius / distance) if isinstance(model.action_space, spaces.Box) else 0.8
                for name, value in (*self.module.named_parameters(), *self.module.named_buffers(), *learned.items()):
                    if value.is_floating_point():
                        origin = center[self._prefix + name]
                        value.copy_(origin + share * (value - origin))
        finally:
            if self._mode_matters:
                model.policy.set_training_mode(training)
