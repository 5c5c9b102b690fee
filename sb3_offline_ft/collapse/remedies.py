"""What is changed after a rollback, so that the restored learner does not collapse in the same way again."""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.td3.policies import Actor
from torch import nn

from sb3_offline_ft.collapse.signals import (
    Observations,
    PolicyState,
    draw_rows,
    greedy_actions,
    observations_at,
    policy_distance,
)
from sb3_offline_ft.common.checks import whole_number
from sb3_offline_ft.policies.averaging import LearnedWeights

PROBE_SIZE = 256
PROBE_LIFE = 50
"""Steps of the optimizer after which the trust region is measured on other states."""
SHRINKS = 12


def _mode_matters(module: nn.Module) -> bool:
    """Whether a network computes something else while training. Switching takes as long as a small network's pass."""
    normalizes = any(name.endswith("running_mean") for name, _ in module.named_buffers())
    return normalizes or any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())


class PolicyBrake:
    """
    Slows, holds or confines the policy of an SB3 learner from outside, through hooks on the optimizer of its actor.

    It works for every algorithm whose policy has an ``actor``, and for value-based ones (DQN, QRDQN), whose network is the
    policy. Where the policy that acts is an average of what is learned, it is the average that is held and confined, and what
    is learned goes with it. Nothing is hooked before the first use.

    :param model: The learner
    :param seed: Seed of the choice of states on which the trust region is measured
    """

    def __init__(self, model: OffPolicyAlgorithm, seed: int = 0) -> None:
        self._model = model
        policy: Any = model.policy
        name = next((name for name in ("actor", "quantile_net", "q_net") if hasattr(policy, name)), None)
        if name is None:
            raise ValueError(
                f"CollapseGuard does not know where {type(policy).__name__} keeps its policy: expected an attribute `actor`, "
                "`quantile_net` or `q_net`."
            )
        self.module: nn.Module = getattr(policy, name)
        self._prefix = f"{name}."
        self._optimizer: th.optim.Optimizer = policy.actor.optimizer if name == "actor" else policy.optimizer
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
    def _is_needed(self) -> bool:
        return self.held or self.learning_rate_factor != 1 or self._center is not None

    def attach(self) -> None:
        """Act on the optimizer in the present run of ``learn``, if there is anything to do."""
        self._run = self._model.start_time
        if self._is_needed and not self._handles:
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
        """
        :param factor: What the learning rate of the policy is multiplied with, in place of the present factor
        """
        self.learning_rate_factor = factor
        self.attach()

    def hold(self, held: bool) -> None:
        """
        :param held: Whether the policy stays as it is; the critics learn on
        """
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
            if (learned := self._learned_weights) is not None:
                learned.undo_step(cast(Actor, self.module))
        elif self._center is not None and math.isfinite(self.radius):
            if (learned := self._learned_weights) is not None:
                learned.call_afterwards(partial(self._move_inside, learned.values))
            else:
                self._move_inside({})

    @property
    def _learned_weights(self) -> LearnedWeights | None:
        """What the actor has during a step in place of the average that acts; None if it acts itself."""
        learned: LearnedWeights | None = getattr(getattr(self._model, "acting", None), "learned_weights", None)
        return learned if learned is not None and learned.average else None

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


class Remedy(ABC):
    """
    One change after a rollback. Numbers are those of the ``n``-th rollback, so that repeated ones become stronger.

    Remedies hold no state of their own: what they did is in the learner and in its :class:`PolicyBrake`.
    """

    name: ClassVar[str]

    def problem(self, model: OffPolicyAlgorithm) -> str | None:
        """
        :param model: The learner
        :return: Why this remedy cannot be applied to it, None if it can
        """
        return None

    @abstractmethod
    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        """
        :param model: The learner, restored
        :param brake: Its brake
        :param n: Number of the rollback, from 1
        :param center: Parameters of the restored policy
        :return: What was set, for the log; ``"until"`` is the environment step at which it ends by itself, if it does
        """

    def release(self, model: OffPolicyAlgorithm, brake: PolicyBrake) -> None:  # noqa: B027  # most remedies do not end
        """
        Called at the environment step that :meth:`apply` returned as ``"until"``.

        :param model: The learner
        :param brake: Its brake
        """

    def on_promotion(self, brake: PolicyBrake, center: PolicyState) -> dict[str, Any] | None:
        """
        Called when a later policy has been found not worse, after this remedy has been applied.

        :param brake: The brake
        :param center: Parameters of the promoted policy
        :return: What was set, for the log; None if nothing
        """
        return None


def _share(value: float, name: str) -> float:
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], found {value!r}.")
    return float(value)


class SlowerActor(Remedy):
    """
    A lower learning rate of the policy: the critics have more time to follow it.

    :param factor: What the learning rate is multiplied with at each rollback
    :param least: Smallest factor in all
    """

    name = "slower_actor"

    def __init__(self, factor: float = 0.5, least: float = 0.05) -> None:
        self.factor, self.least = _share(factor, "factor"), _share(least, "least")

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        brake.slow_down(max(self.least, self.factor**n))
        return {"learning_rate_factor": brake.learning_rate_factor}


class CriticWarmup(Remedy):
    """
    The restored policy acts unchanged for a while and only the critics learn, also from what the collapsed policy did.

    :param steps: Environment steps
    """

    name = "critic_warmup"

    def __init__(self, steps: int = 2000) -> None:
        self.steps = whole_number(steps, "steps", least=1)

    def problem(self, model: OffPolicyAlgorithm) -> str | None:
        return None if hasattr(model.policy, "actor") else f"the policy of {type(model).__name__} is its critic"

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        brake.hold(True)
        return {"steps": self.steps, "until": model.num_timesteps + self.steps}

    def release(self, model: OffPolicyAlgorithm, brake: PolicyBrake) -> None:
        brake.hold(False)


class TrustRegion(Remedy):
    """
    The policy stays near the last policy that was found good: a bound on the mean squared difference of their actions on
    states of the replay buffer. With each promotion the region moves to the promoted policy.

    :param radius: Bound after the first rollback: mean squared difference of actions scaled to [-1, 1], or the share of states
        with another action where actions are discrete
    :param shrink: What the bound is multiplied with at each further rollback
    :param growth: What the bound is multiplied with at each promotion
    :param largest: The bound never exceeds it
    """

    name = "trust_region"

    def __init__(self, radius: float = 0.01, shrink: float = 0.5, growth: float = 1.0, largest: float = 0.1) -> None:
        if not 0 < radius <= largest < math.inf:
            raise ValueError(f"Expected 0 < radius <= largest < inf, found {radius!r}, {largest!r}.")
        if not 1 <= growth < math.inf:
            raise ValueError(f"`growth` must be at least 1, found {growth!r}.")
        self.radius, self.shrink, self.growth, self.largest = radius, _share(shrink, "shrink"), growth, largest

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        radius = brake.radius * self.shrink if math.isfinite(brake.radius) else self.radius
        brake.confine(min(radius, self.radius), center)
        return {"radius": brake.radius}

    def on_promotion(self, brake: PolicyBrake, center: PolicyState) -> dict[str, Any] | None:
        if not math.isfinite(brake.radius):
            return None
        brake.confine(min(brake.radius * self.growth, self.largest), center)
        return {"radius": brake.radius}


class TighterConstraint(Remedy):
    """
    A smaller ``epsilon`` of a constrained algorithm such as TD3C.

    :param factor: What ``epsilon`` is multiplied with at each rollback
    """

    name = "tighter_constraint"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = _share(factor, "factor")

    def problem(self, model: OffPolicyAlgorithm) -> str | None:
        return None if hasattr(model, "scale_epsilon") else f"{type(model).__name__} has no `epsilon`"

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        model.scale_epsilon(self.factor)  # type: ignore[attr-defined]
        return {"factor": self.factor, "epsilon": model.epsilon}  # type: ignore[attr-defined]


class MoreOfflineData(Remedy):
    """
    A larger share of offline transitions in each batch, from now on constant.

    :param factor: What the share of online transitions is multiplied with at each rollback
    """

    name = "more_offline_data"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = _share(factor, "factor")

    def problem(self, model: OffPolicyAlgorithm) -> str | None:
        if getattr(model.replay_buffer, "offline_size", 0) > 0:
            return None
        return "its replay buffer has no offline data"

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        buffer: Any = model.replay_buffer
        fraction = 1 - self.factor * (1 - buffer.offline_fraction)
        buffer.offline_fraction = fraction
        if hasattr(model, "offline_fraction"):
            # What a saved model starts its buffer with
            model.offline_fraction = fraction
        return {"offline_fraction": fraction}


class Warmup(Remedy):
    """
    The restored policy acts unchanged for a while and nothing is updated.

    :param steps: Environment steps
    """

    name = "warmup"

    def __init__(self, steps: int = 2000) -> None:
        self.steps = whole_number(steps, "steps", least=1)

    def problem(self, model: OffPolicyAlgorithm) -> str | None:
        return None if hasattr(model, "begin_warmup") else f"{type(model).__name__} has no `begin_warmup`"

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> dict[str, Any]:
        model.begin_warmup(self.steps)  # type: ignore[attr-defined]
        return {"steps": self.steps}


REMEDIES: dict[str, type[Remedy]] = {
    remedy.name: remedy for remedy in (SlowerActor, CriticWarmup, TrustRegion, TighterConstraint, MoreOfflineData, Warmup)
}


def make_remedies(remedies: Sequence[str | Mapping[str, Any] | Remedy]) -> list[Remedy]:
    """
    :param remedies: Names, ``{name: {keyword: value}}`` as in YAML files, or remedies
    :return: The remedies
    :raises ValueError: A name or keyword is not known, or a value is out of range
    """
    if isinstance(remedies, str | Mapping):
        raise ValueError(f"`remedies` must be a list, found {remedies!r}: write [{remedies!r}].")
    made: list[Remedy] = []
    for remedy in remedies:
        if isinstance(remedy, Remedy):
            made.append(remedy)
            continue
        name, keywords = (remedy, {}) if isinstance(remedy, str) else _single_entry(remedy)
        if name not in REMEDIES:
            near = difflib.get_close_matches(name, REMEDIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(REMEDIES)}."
            raise ValueError(f"Unknown remedy {name!r}: {hint}")
        try:
            made.append(REMEDIES[name](**keywords))
        except TypeError as error:
            raise ValueError(f"The remedy {name!r} cannot be made from {dict(keywords)!r}: {error}.") from None
    return made


def _single_entry(remedy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(remedy, Mapping) or len(remedy) != 1:
        raise ValueError(f"A remedy must be a name or {{name: {{keyword: value}}}}, found {remedy!r}.")
    ((name, keywords),) = remedy.items()
    return name, keywords or {}
