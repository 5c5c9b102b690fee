"""From logs to a report: may the finetuned policy replace the one that runs today? About 5 minutes."""

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import TD3BC
from sb3_offline_ft.trial import Trial

LOGS = "bundled:pendulum-medium"

# What runs today was imitated from the logs; the candidate was pretrained on them for longer.
for name, steps in {"baseline": 1_000, "candidate": 10_000}.items():
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset=LOGS, gamma=0.98, learning_rate=1e-3, seed=0)
    model.pretrain(steps)
    model.save(name)
    mean, std = evaluate_policy(model, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=10)
    print(f"{name}: mean return {mean:.0f}, standard deviation {std:.0f}")

# The plan is written down before anything runs. The same is written by `sb3-offline-ft trial init`, to be edited.
trial = Trial.create(
    "pendulum",
    env="Pendulum-v1",
    baseline="baseline.zip",
    candidate="candidate.zip",
    data=LOGS,
    primary={"metric": "return", "smallest_effect": 200},
    risk={"budget": 0.2, "random_return": -1309, "worst_return": -1900},
    stages=[
        {"name": "shadow", "episodes": 2},
        {"name": "pilot", "episodes": 12, "share": 0.25, "supervised": True},
        {"name": "ramp 50 %", "episodes": 24, "share": 0.5},
        {"name": "full", "episodes": 4, "share": 1.0},
    ],
    budget={"episodes": 60},
    sign_off=["plant manager", "control engineer"],
)

trial.run(until="shadow", progress_bar=False)  # the candidate computes, the baseline acts
trial.run(progress_bar=False)  # Ctrl-C is safe: the same line goes on
decision = trial.decide()
print(decision.decision.upper(), *decision.reasons, sep="\n- ")
print(f"The page to read, print and sign: {trial.report()}")
