"""Episodes of a trial in its environment."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.controllers import Controller, check_fits, load_controller
from sb3_offline_ft.trial.actuators import Actuators
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm, Assignment
from sb3_offline_ft.trial.measuring import EpisodeMeter, check_sources
from sb3_offline_ft.trial.pilot import Pilot, Takeover
from sb3_offline_ft.trial.plan import TrialPlan

KEPT_STEPS = 100
"""Steps before an abort that are kept in a file."""


class LastSteps:
    """The last steps of an episode."""

    def __init__(self) -> None:
        self._steps: deque[dict[str, Any]] = deque(maxlen=KEPT_STEPS)

    def add(self, observation: Any, action: Any, reward: float, actor: Arm, values: Mapping[str, float | None]) -> None:
        """A step; the observation is the one that the action was decided on."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        # Environments may change the array that they returned
        seen = {f"observation.{key}".rstrip("."): np.array(part) for key, part in parts.items()}
        watched = {source: math.nan if value is None else value for source, value in values.items()}
        self._steps.append({**seen, "action": np.array(action), "actor": actor, **watched, "reward": reward})

    def write(self, path: Path) -> None:
        """Write an ``.npz`` with an array for each part, whose first axis is that of the steps."""
        names = self._steps[0] if self._steps else ()
        arrays: dict[str, Any] = {name: np.stack([step[name] for step in self._steps]) for name in names}
        with atomic_write(path) as file:
            np.savez(file, **arrays)


@dataclass
class Outcome:
    """What came of an episode."""

    metrics: dict[str, float | None]
    steps: int
    seconds: float
    acted: dict[str, int]
    """Steps in which each policy acted."""
    travel: dict[str, Any] | None
    """What the policy that was to act did to the actuators, as long as it acted: :meth:`ActionLog.summary`."""
    shadow: dict[str, Any] | None
    """What the candidate would have done, in the stage ``shadow``: :meth:`ShadowLog.summary`."""
    violations: dict[str, dict[str, Any]]
    regime: str | None
    takeover: Takeover | None


OnTakeover = Callable[[Takeover, LastSteps], None]


class EpisodeRunner:
    """
    Runs the episodes of a trial in its environment.

    :param plan: The plan
    :param measured: Names of metrics that an episode has reported before
    :param device: Torch device of policies
    :raises ValueError: There is no environment, a policy does not fit it, or a metric or limit cannot come from one
    :raises OSError: A policy's file cannot be read
    :raises ImportError: A policy needs a package that is missing
    """

    def __init__(self, plan: TrialPlan, measured: Collection[str] = (), device: str = "cpu") -> None:
        if plan.env is None:
            raise ValueError(
                "This trial has no environment to run in: use `trial next` and `trial record` for a system without one, or "
                "name `env` in the plan."
            )
        check_sources(plan)
        self._plan, self._device = plan, device
        self._known = {plan.metric(name).source for name in measured}
        self._env = _make(plan.env, plan.env_kwargs)
        try:
            specs: dict[Arm, str] = {BASELINE: plan.baseline, CANDIDATE: plan.candidate}
            self.controllers = {arm: self._load(spec) for arm, spec in specs.items()}
            """Both policies."""
        except BaseException:
            self.close()
            raise
        self._actuators = Actuators(self._env.action_space, plan.abort.actions_beyond)

    def _load(self, spec: str) -> Controller:
        controller = load_controller(spec, self._plan.env, action_space=self._env.action_space, device=self._device)
        check_fits(controller, self._env)
        return controller

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    @property
    def time_limit(self) -> int | None:
        """Steps of an episode at most, if the environment says so."""
        return None if self._env.spec is None else self._env.spec.max_episode_steps

    def run(self, assignment: Assignment, *, drill_at: int | None = None, on_takeover: OnTakeover | None = None) -> Outcome:
        """
        Run an episode, seeded by the plan's seed and the episode's number.

        :param assignment: Which episode, and who is to act
        :param drill_at: Let the baseline take over before this step, on purpose
        :param on_takeover: Is told of a takeover as soon as the baseline has acted, and of the last steps
        :return: What came of it
        :raises ValueError: Environment or baseline failed, or the environment does not report a metric or limit
        """
        pilot, meter = Pilot(assignment, self.controllers, self._actuators), EpisodeMeter(self._plan, self._known)
        last_steps, begin, step, is_over = LastSteps(), time.perf_counter(), 0, False
        tell = on_takeover or (lambda takeover, steps: None)
        seed = derive_seed(self._plan.seed, assignment.episode)
        observation, _ = self._ask(assignment, self._env.reset, seed=seed)
        pilot.reset(seed)
        while not is_over:
            if step == drill_at:
                pilot.take_over(step, "rollback drill", is_drill=True)
            action = pilot.act(observation, step)
            try:
                after, reward, terminated, truncated, info = self._ask(assignment, self._env.step, action)
            except ValueError:
                if pilot.takeover is not None and pilot.takeover.n_after == 1:
                    tell(pilot.takeover, last_steps)
                raise
            problem = meter.take(float(reward), info)
            last_steps.add(observation, action, float(reward), pilot.actor, meter.values)
            if pilot.takeover is not None and pilot.takeover.n_after == 1:
                tell(pilot.takeover, last_steps)
            observation, step, is_over = after, step + 1, bool(terminated or truncated)
            if problem is not None:
                pilot.take_over(step, problem)
        metrics = meter.metrics()
        if missing := [name for name, value in metrics.items() if value is None]:
            pilot.take_over(step, f"no value of {', '.join(missing)}")
        if pilot.takeover is not None and pilot.takeover.n_after == 0:
            tell(pilot.takeover, last_steps)
        shadow = None if pilot.shadow is None else pilot.shadow.summary()
        seconds = time.perf_counter() - begin
        return Outcome(
            metrics, step, seconds, pilot.steps, pilot.log.summary(), shadow, meter.watch.summary(), meter.regime,
            pilot.takeover,
        )  # fmt: skip

    def _ask(self, assignment: Assignment, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"Episode {assignment.episode} was lost: the environment failed with {type(error).__name__}: {error}"
            ) from error


def _make(env_id: str, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    try:
        return gym.make(env_id, **kwargs)
    except (gym.error.Error, TypeError) as error:
        raise ValueError(f"Cannot make the environment {env_id!r} ({type(error).__name__}: {error}).") from error
