"""What is changed after a rollback, so that the restored learner does not collapse in the same way again."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.brake import PolicyBrake
from sb3_offline_ft.collapse.learner import PolicyState
from sb3_offline_ft.collapse.reporting import Reporter
from sb3_offline_ft.common.checks import whole_number
from sb3_offline_ft.common.suggestions import suggestion

Settings = dict[str, Any]
"""What a remedy has set, for the log."""


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
    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
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

    def on_promotion(self, brake: PolicyBrake, center: PolicyState) -> Settings | None:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
        radius = brake.radius * self.shrink if math.isfinite(brake.radius) else self.radius
        brake.confine(min(radius, self.radius), center)
        return {"radius": brake.radius}

    def on_promotion(self, brake: PolicyBrake, center: PolicyState) -> Settings | None:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
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

    def apply(self, model: OffPolicyAlgorithm, brake: PolicyBrake, n: int, center: PolicyState) -> Settings:
        model.begin_warmup(self.steps)  # type: ignore[attr-defined]
        return {"steps": self.steps}


REMEDIES: dict[str, type[Remedy]] = {
    remedy.name: remedy for remedy in (SlowerActor, CriticWarmup, TrustRegion, TighterConstraint, MoreOfflineData, Warmup)
}
DEFAULT_REMEDIES: tuple[Mapping[str, Any], ...] = (
    {"critic_warmup": {"steps": 1000}},
    {"trust_region": {"radius": 0.01}},
    {"tighter_constraint": {"factor": 0.5}},
)


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
        entry = {remedy: None} if isinstance(remedy, str) else remedy
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise ValueError(f"A remedy must be a name or {{name: {{keyword: value}}}}, found {remedy!r}.")
        ((name, keywords),) = entry.items()
        if name not in REMEDIES:
            raise ValueError(f"Unknown remedy {name!r}. {suggestion(name, REMEDIES)}")
        try:
            made.append(REMEDIES[name](**(keywords or {})))
        except TypeError as error:
            raise ValueError(f"The remedy {name!r} cannot be made from {dict(keywords or {})!r}: {error}.") from None
    return made


@dataclass
class RemediesOfRun:
    """The remedies that a run has, and when those that end will."""

    remedies: Sequence[Remedy]
    model: OffPolicyAlgorithm
    brake: PolicyBrake
    report: Reporter

    def __post_init__(self) -> None:
        self._ends: list[tuple[int, Remedy]] = []

    @property
    def ends(self) -> list[tuple[int, str]]:
        """Timesteps at which remedies end, and their names."""
        return [(timestep, remedy.name) for timestep, remedy in self._ends]

    def apply(self, center: PolicyState) -> None:
        """Apply one after the other after a rollback to a policy."""
        self.forget_ends()
        self.brake.hold(False)
        for remedy in self.remedies:
            settings = remedy.apply(self.model, self.brake, self.report.counts.rollbacks, center)
            if "until" in settings:
                self._ends.append((settings["until"], remedy))
            message = f"{remedy.name}: {_described(settings)}"
            self.report.event("remedy", name=remedy.name, parameters=settings, message=message)
            self.report.say(f"remedy {message}.")

    def move(self, center: PolicyState) -> None:
        """A later policy has been promoted."""
        for remedy in self.remedies if self.report.counts.rollbacks > 0 else ():
            settings = remedy.on_promotion(self.brake, center)
            if settings is not None:
                message = f"{remedy.name} moves with the promotion: {_described(settings)}"
                self.report.event("remedy", name=remedy.name, parameters=settings, message=message)

    def end_due(self) -> None:
        """End those whose time has come."""
        for entry in [entry for entry in self._ends if entry[0] <= self.model.num_timesteps]:
            self._ends.remove(entry)
            entry[1].release(self.model, self.brake)
            self.report.event("release", name=entry[1].name)

    def forget_ends(self) -> None:
        self._ends = []

    def take_up(self, ends: Sequence[tuple[int, str]]) -> None:
        """Go on with what :attr:`ends` was; remedies that are not in use any more are left out."""
        by_name = {remedy.name: remedy for remedy in self.remedies}
        self._ends = [(timestep, by_name[name]) for timestep, name in ends if name in by_name]


def applicable(remedies: Sequence[Remedy], model: OffPolicyAlgorithm, required: bool) -> list[Remedy]:
    """Those of the remedies that can be applied to a learner; ``ValueError`` if all are required and one cannot."""
    found = []
    for remedy in remedies:
        problem = remedy.problem(model)
        if problem is None:
            found.append(remedy)
        elif required:
            raise ValueError(f"The remedy {remedy.name!r} cannot be applied: {problem}. Leave it out of `remedies`.")
    return found


def _described(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if isinstance(value, int | float))
