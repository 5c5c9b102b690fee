"""Learners and helpers for tests of champion and challenger."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_offline_ft.deployment import ChampionChallenger, Contender, Kind
from tests.guarded_runs import EPISODE_LENGTH, Hold, small

# So small a learning rate that nothing happens by itself
CALM = {
    "learning_rate": 1e-6,
    "learning_starts": 0,
    "batch_size": 8,
    "buffer_size": 3000,
    "train_freq": 5,
    "gradient_steps": 1,
}
# The return of Hold is 10 (1 - action**2), so that this is its scale
QUICK: dict[str, Any] = {
    "risk_budget": 0.5, "random_return": 0.0, "baseline_episodes": 5, "min_updates": 5, "verbose": 0
}  # fmt: skip
GOOD, FAIR, BAD = 0.0, 0.6, 0.99


def make(algorithm: type[OffPolicyAlgorithm] = TD3, n_envs: int = 1, **settings: Any) -> Any:
    """A learner in Hold whose policy is fair."""
    env = make_vec_env(Hold, n_envs=n_envs, seed=0)
    model = algorithm("MlpPolicy", env, **{**small(), **CALM, **settings})
    aim(model, FAIR)
    return model


def noise(scale: float = 0.1) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(1), scale * np.ones(1))


@th.no_grad()
def aim(model: Any, action: float) -> None:
    """Make the learner choose an action, nearly the same for all observations."""
    actor = model.policy.actor
    last = actor.mu if isinstance(actor.mu, th.nn.Linear) else [part for part in actor.mu if hasattr(part, "weight")][-1]
    last.weight *= 1e-3
    last.bias.fill_(math.atanh(action))
    if hasattr(actor, "log_std") and isinstance(actor.log_std, th.nn.Linear):
        actor.log_std.weight.zero_()
        actor.log_std.bias.fill_(-2.0)
    learned = getattr(getattr(model, "acting", None), "learned_weights", None)
    if learned is not None:
        for name, value in actor.named_parameters():
            learned.values[name].copy_(value)


class Aim(BaseCallback):
    """Does something to the learner when there have been so many steps, by default makes its policy a good one."""

    def __init__(self, step: int, action: float | Callable[[Any], object] = GOOD) -> None:
        super().__init__()
        self.step, self.action, self.is_done = step, action, False

    def _on_step(self) -> bool:
        if not self.is_done and self.num_timesteps >= self.step:
            self.is_done = True
            _ = self.action(self.model) if callable(self.action) else aim(self.model, self.action)
        return True


@dataclass
class Step:
    """What was done in one step of all environments."""

    observations: Any
    originals: Any
    actions: np.ndarray
    buffer_actions: np.ndarray
    actors: list[Kind]
    contenders: dict[str, Contender]
    roles: list[str]
    """Of those who acted in each environment."""
    rewards: np.ndarray
    dones: np.ndarray

    @property
    def champion(self) -> Contender:
        return self.contenders["champion"]


class Record(BaseCallback):
    """Keeps all steps; before the contest in the list of callbacks, so that it knows who acted."""

    def __init__(self, contest: ChampionChallenger) -> None:
        super().__init__()
        self.contest, self.steps = contest, list[Step]()

    def _on_step(self) -> bool:
        contest, model, found = self.contest.contest, self.model, self.locals
        self.steps.append(
            Step(
                copy.deepcopy(model._last_obs),  # type: ignore[attr-defined]
                copy.deepcopy(model._last_original_obs),  # type: ignore[attr-defined]
                *(np.array(found[name], copy=True) for name in ("actions", "buffer_actions")),
                [episode.actor for episode in contest.running],
                contest.contenders,
                [episode.role for episode in contest.running],
                *(np.array(found[name], copy=True) for name in ("rewards", "dones")),
            )
        )
        return True


def choice(model: Any, contender: Contender, observations: Any) -> np.ndarray:
    """What a contender does, by SB3 alone: in each row as if it were the only one."""
    policy: BasePolicy = model.policy
    own = {name: value.clone() for name, value in policy.state_dict().items()}
    training = policy.training
    policy.load_state_dict(dict(contender.policy.state))
    policy.set_training_mode(False)
    actions = policy.predict(observations, deterministic=True)[0]
    policy.load_state_dict(own)
    policy.set_training_mode(training)
    return actions


def episodes(contest: ChampionChallenger, kind: Kind | None = None) -> list[dict[str, Any]]:
    found = [event for event in contest.events if event["event"] == "episode"]
    return [event for event in found if kind is None or event["kind"] == kind.value]


def of(contest: ChampionChallenger, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in contest.events if event["event"] in kinds]


def shape_of(contest: ChampionChallenger) -> list[tuple[Any, ...]]:
    """What happened, without the clock."""
    return [tuple((k, repr(v)) for k, v in event.items() if k != "time") for event in contest.events]


__all__ = [
    "BAD", "CALM", "EPISODE_LENGTH", "FAIR", "GOOD", "QUICK", "Aim", "Hold", "Record", "aim", "choice", "episodes", "make",
    "noise", "of", "shape_of", "small",
]  # fmt: skip
