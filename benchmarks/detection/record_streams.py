"""
Record the per-step rewards of frozen policies, for calibration.py and delay_simulated.py.

    python benchmarks/detection/record_streams.py --td3-hopper td3bc_hopper.zip --sac-hopper sac_Hopper-v5.zip \\
        --sac-halfcheetah sac_HalfCheetah-v5.zip --sac-pendulum sac_Pendulum-v1.zip

Only what is given is recorded. The SAC agents act stochastically, TD3 with Gaussian noise of standard deviation 0.1 on its
actions: as in finetuning. Each file in streams/ has ``lengths``, shape (n_episodes,), and ``rewards``, the episodes' float32
rewards one after the other.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from tqdm import tqdm

from sb3_offline_ft.common.io import atomic_write

STREAMS = Path(__file__).parent / "streams"
ACTION_NOISE = 0.1

# Name of the stream: the algorithm that loads its policy, the environment, and the number of episodes
SOURCES: dict[str, tuple[type[BaseAlgorithm], str, int]] = {
    "td3-hopper": (TD3, "Hopper-v5", 300),
    "sac-hopper": (SAC, "Hopper-v5", 300),
    "sac-halfcheetah": (SAC, "HalfCheetah-v5", 150),
    "sac-pendulum": (SAC, "Pendulum-v1", 300),
}


def record(name: str, policy: Path, seed: int) -> None:
    """
    Record one stream.

    :param name: Which of ``SOURCES``
    :param policy: The agent, saved by SB3
    :param seed: Seed of environment and actions
    """
    algorithm, env_id, n_episodes = SOURCES[name]
    model = algorithm.load(policy, device="cpu")
    env = gym.make(env_id)
    generator = np.random.default_rng(seed)
    th.manual_seed(seed)
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    rewards, lengths = [], []
    for _ in tqdm(range(n_episodes), desc=name):
        length, ended = 0, False
        while not ended:
            action, _ = model.predict(observation, deterministic=algorithm is TD3)
            if algorithm is TD3:
                scale = (env.action_space.high - env.action_space.low) / 2
                action = action + scale * generator.normal(0.0, ACTION_NOISE, action.shape)
            action = np.clip(action, env.action_space.low, env.action_space.high).astype(np.float32)
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
            length += 1
            ended = terminated or truncated
        lengths.append(length)
        observation, _ = env.reset()
    with atomic_write(STREAMS / f"{name}.npz") as file:
        np.savez_compressed(file, lengths=np.array(lengths), rewards=np.array(rewards, np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (algorithm, env_id, n_episodes) in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, help=f"{algorithm.__name__} agent for {env_id}, {n_episodes} episodes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    th.set_num_threads(1)
    for index, name in enumerate(SOURCES):
        policy = arguments[name.replace("-", "_")]
        if policy is not None:
            record(name, policy, arguments["seed"] + index)


if __name__ == "__main__":
    main()
