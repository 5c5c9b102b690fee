"""Three ways of finetuning from the same weights, over three seeds, with a picture. About 4 minutes."""

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3

ENV, DATA, SEEDS = "Pendulum-v1", "bundled:pendulum-medium", (0, 1, 2)
WARMUP = 1_000
SETTINGS = {"gamma": 0.98, "learning_rate": 1e-3, "warmup_steps": WARMUP}
METHODS = {"TD3BC, kept": TD3BC, "TD3": OfflineTD3, "TD3C": TD3C}


def finetune(method: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interactions and mean return of each evaluation."""
    model = METHODS[method].load(f"pretrained{seed}", env=gym.make(ENV), **SETTINGS)
    folder = f"logs/{method}{seed}"
    env = Monitor(gym.make(ENV))
    model.learn(4_000, callback=EvalCallback(env, eval_freq=500, n_eval_episodes=10, log_path=folder, verbose=0))
    results = np.load(f"{folder}/evaluations.npz")
    return results["timesteps"], results["results"].mean(axis=1)


for seed in SEEDS:
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    TD3C("MlpPolicy", ENV, dataset=DATA, action_noise=noise, seed=seed, **SETTINGS).pretrain(3_000).save(f"pretrained{seed}")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.axvspan(0, WARMUP, color="0.93")
for method, color in zip(METHODS, ("tab:gray", "tab:red", "tab:blue"), strict=True):
    runs = [finetune(method, seed) for seed in SEEDS]
    steps, returns = runs[0][0], np.stack([run[1] for run in runs])
    axes.plot(steps, returns.T, color=color, linewidth=1, alpha=0.35)
    axes.plot(steps, returns.mean(axis=0), color=color, linewidth=2.5, label=method)
    print(f"{method:12} before {returns[:, 0].round()}, lowest {returns.min(axis=1).round()}, last {returns[:, -1].round()}")
axes.set(xlabel="interactions", ylabel="mean return of 10 episodes", title="Single runs, and their means")
axes.legend()
figure.savefig("comparison.png", dpi=120)
print("Picture: comparison.png")
