"""Pretrain on recorded data, finetune online under the collapse guard, save, load and watch. About 2 minutes on one core."""

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import TD3C, CollapseGuard

ENV = "Hopper-v5"
PRETRAINING = 10_000  # gradient steps
WARMUP = 3000  # interactions in which the pretrained policy acts unchanged; its returns are the guard's baseline
FINETUNING = 6_000  # interactions with one gradient step each

model = TD3C(
    "MlpPolicy",
    ENV,
    dataset="bundled:hopper-medium",
    offline_steps=PRETRAINING,
    warmup_steps=WARMUP,
    warmup_action_noise=True,
    action_noise=NormalActionNoise(np.zeros(3), 0.1 * np.ones(3)),
    seed=0,
)

# The whole run: pretraining, warm-up, finetuning. The constraint's reference is the best policy that was evaluated.
evaluation = EvalCallback(Monitor(gym.make(ENV)), eval_freq=1000, n_eval_episodes=10, log_path="hopper", verbose=0)
guard = CollapseGuard(random_return=17.1, path="hopper")
model.learn(WARMUP + FINETUNING, callback=[evaluation, guard])
model.save("hopper/finetuned")

results = np.load("hopper/evaluations.npz")
for step, returns in zip(results["timesteps"], results["results"], strict=True):
    print(f"step {step:6,}: mean return {returns.mean():7.1f} of {len(returns)} episodes")
print(f"The guard raised {guard.alarms} alarms and went back {guard.rollbacks} times; its picture is hopper/collapse.png")

# The policy normalizes observations by itself: a loaded model needs no wrapper and no data to act
loaded = TD3C.load("hopper/finetuned")
mean, std = evaluate_policy(loaded, Monitor(gym.make(ENV)), n_eval_episodes=10)
print(f"Loaded from hopper/finetuned.zip: mean return {mean:.1f}, standard deviation {std:.1f}")
