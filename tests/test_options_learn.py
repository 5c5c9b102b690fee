"""Learners with the options of the replay buffer and of the online phase learn: whole runs, offline and online."""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3
from tests.hooks import n_updates
from tests.learning import p_value_of_no_better_than_random

SETTINGS: dict[str, Any] = {
    "dataset": "bundled:pendulum-medium",
    "policy_kwargs": {"net_arch": [64, 64]},
    "gamma": 0.95,
    "learning_rate": 2e-3,
    "batch_size": 64,
    "seed": 2,
    "device": "cpu",
    "offline_steps": 700,
    "warmup_steps": 200,
    "action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)),
}


def make(algorithm: type[OfflineTD3], **settings: Any) -> OfflineTD3:
    model = algorithm("MlpPolicy", "Pendulum-v1", **(SETTINGS | settings))
    assert p_value_of_no_better_than_random(model) > 0.01, "the test would not notice that nothing was learned"
    return model


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (TD3C, {"critic_penalty": 1.0, "constraint_reference": "best"}),
        (TD3BC, {"guide_policy": "pretrained", "guide_steps": "lin_150_0"}),
        (TD3BC, {"n_steps": 3}),
        (TD3BC, {"replay_buffer_kwargs": {"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": [64]}}}),
        (TD3BC, {"replay_buffer_kwargs": {"augmentation": "gaussian_noise"}}),
        (TD3BC, {"dataset": [("bundled:pendulum-medium?top_fraction=0.3", 0.7), ("bundled:pendulum-medium", 0.3)]}),
    ],
    ids=["critic penalty", "guide", "n-step returns", "balanced replay", "augmentation", "weighted sources"],
)
def test_a_run_ends_with_a_policy_that_has_learned(algorithm: type[OfflineTD3], settings: dict[str, Any]) -> None:
    """Better than random actions, at a level of 0.01."""
    model = make(algorithm, **settings)
    evaluation = EvalCallback(make_vec_env("Pendulum-v1", seed=1), eval_freq=500, n_eval_episodes=2, verbose=0)
    model.learn(1000, callback=evaluation)
    assert n_updates(model) > 1400
    assert p_value_of_no_better_than_random(model) < 0.01
