"""Learners, environments and helpers for tests of the collapse guard."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft import CollapseGuard

EPISODE_LENGTH = 10


def small() -> dict[str, Any]:
    # A new dictionary each time, since SB3's SAC adds to it
    return {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", "seed": 0}


class Hold(gym.Env[np.ndarray, Any]):
    """Short episodes whose return is high as long as the action is small (or the discrete action is not the last one)."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self._discrete = discrete

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._step += 1
        loss = float(action == 2) if self._discrete else float(action[0]) ** 2
        reward = 1 - loss + 0.05 * self.np_random.normal()
        return self._observation(), reward, False, self._step >= EPISODE_LENGTH, {}


def hold_discrete() -> Hold:
    return Hold(discrete=True)


BASELINE = np.random.default_rng(0).normal(9.5, 0.3, 20)


def make(algorithm: type[OffPolicyAlgorithm], **settings: Any) -> OffPolicyAlgorithm:
    discrete = issubclass(algorithm, DQN | QRDQN)
    env = make_vec_env(hold_discrete if discrete else Hold, n_envs=settings.pop("n_envs", 1), seed=0)
    defaults: dict[str, Any] = {**small(), "learning_starts": 20, "buffer_size": 5000, "batch_size": 32, "train_freq": 1}
    if discrete:
        defaults |= {"exploration_fraction": 0.01, "exploration_final_eps": 0.0, "target_update_interval": 50}
    return algorithm("MlpPolicy", env, **{**defaults, **settings})


# So small a learning rate that nothing happens by itself. The first update comes after ten episodes of baseline
CALM = {"learning_starts": 0, "train_freq": (100, "step"), "gradient_steps": 20, "learning_rate": 1e-5}


def make_td3(**settings: Any) -> OffPolicyAlgorithm:
    return make(TD3, **{**CALM, **settings})


@th.no_grad()
def ruin(model: OffPolicyAlgorithm) -> None:
    """Make the policy choose the worst action everywhere."""
    policy: Any = model.policy
    if hasattr(policy, "actor"):
        last = [module for module in policy.actor.modules() if isinstance(module, th.nn.Linear)]
        final = policy.actor.mu if isinstance(policy.actor.mu, th.nn.Linear) else last[-1]
        final.bias += 20
    else:
        network = getattr(policy, "quantile_net" if hasattr(policy, "quantile_net") else "q_net")
        final = [module for module in network.modules() if isinstance(module, th.nn.Linear)][-1]
        # Of QRDQN's outputs every third belongs to the last action
        final.bias[2::3] += 1000


class At(BaseCallback):
    """Does something to the learner at the given environment steps, after the guard's turn."""

    def __init__(self, steps: list[int], action: Callable[[OffPolicyAlgorithm], object]) -> None:
        super().__init__()
        self.steps, self.action = steps, action

    def _on_step(self) -> bool:
        if self.num_timesteps in self.steps:
            self.action(self.model)  # type: ignore[arg-type]
        return True


def of(guard: CollapseGuard, kind: str) -> list[dict[str, Any]]:
    return [event for event in guard.events if event["event"] == kind]


def parameters(model: OffPolicyAlgorithm) -> list[th.Tensor]:
    return [value.clone() for value in model.policy.state_dict().values()]


def same(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    return all(th.equal(a, b) for a, b in zip(first, second, strict=True))
