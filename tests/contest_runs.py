"""A short run with champion and challenger in which what happens is known: the learner becomes good, then lost."""

from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft import ChampionChallenger
from tests.guarded_runs import CALM, make

GOOD_AT, LOST_AT = 300, 700


@th.no_grad()
def push(model: OffPolicyAlgorithm, by: float) -> None:
    """Add to the policy's action before it is squashed; at 0, its returns are the best."""
    policy: Any = model.policy
    policy.actor.mu[-2].bias += by


class Fate(BaseCallback):
    """Makes the learner good at one time, and worse than it ever was at another."""

    def _on_step(self) -> bool:
        by = {GOOD_AT: -1.0, LOST_AT: 3.0}.get(self.num_timesteps)
        if by is not None:
            push(self.model, by)  # type: ignore[arg-type]
        return True


def learner(noise: bool = True, algorithm: type[OffPolicyAlgorithm] = TD3, **settings: Any) -> OffPolicyAlgorithm:
    """Episodes of it take 10 steps, gradient steps come each 100."""
    model = make(algorithm, **CALM, **settings)
    if noise:
        model.action_noise = NormalActionNoise(np.zeros(1), 1.0 * np.ones(1))
    return model


def contest(path: Path | None, **settings: Any) -> ChampionChallenger:
    return ChampionChallenger(
        **{
            "risk_budget": 0.08,
            "random_return": -5,
            "min_updates": 20,
            "max_trial_episodes": 8,
            "path": path,
            "verbose": 0,
            **settings,
        }
    )


def run(path: Path | None, steps: int = 1000, **settings: Any) -> ChampionChallenger:
    model, callback = learner(), contest(path, **settings)
    push(model, 1.0)
    model.learn(steps, callback=[Fate(), callback])
    return callback


def of(events: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in kinds]
