"""Guard SB3's own SAC: a learning rate that is far too high ruins the policy, the guard puts it back. About 1 minute."""

import gymnasium as gym
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import CollapseGuard

ENV = "Pendulum-v1"
RANDOM_RETURN = -1309  # mean return of random actions: losses are measured in units of the distance to it

model = SAC("MlpPolicy", ENV, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=0)
model.learn(5_000)
model.save("sac_pendulum")

# SAC has no warm-up, so the baseline is given: returns of the policy as it explores
returns, _ = evaluate_policy(
    model, Monitor(gym.make(ENV)), n_eval_episodes=20, deterministic=False, return_episode_rewards=True
)
print(f"Before: mean return {sum(returns) / len(returns):.0f} of {len(returns)} episodes")

for guarded in (False, True):
    env = Monitor(gym.make(ENV))
    model = SAC.load("sac_pendulum", env=env, learning_rate=0.03)
    guard = CollapseGuard(baseline=returns, random_return=RANDOM_RETURN, path="sac_guard", verbose=1)
    model.learn(3_000, callback=guard if guarded else None, reset_num_timesteps=False)
    print(f"{'With' if guarded else 'Without'} guard, returns: {[round(value) for value in env.get_episode_rewards()]}")

# What happened, step by step:
#   sb3-offline-ft guard show sac_guard
