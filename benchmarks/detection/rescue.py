"""
Plain TD3 finetuned on Hopper-v5 from weights pretrained with TD3BC, with and without CollapseGuard.

    python benchmarks/detection/rescue.py            # what is missing of the runs, then table and figure
    python benchmarks/detection/rescue.py --report   # table and figure from the committed results only

Runs are skipped when their result exists, so that an interrupted benchmark goes on where it stopped. The unguarded runs also
record the rewards of all training episodes, which delay.py replays through the detectors.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.common.io import atomic_write

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "finetuning"))
import hopper  # noqa: E402  # the pretraining of the other benchmark

ENV = hopper.ENV
WARMUP_STEPS = 5_000
ONLINE_STEPS = 25_000
MEASURE_FREQ = 250
EVAL_EPISODES = 10
RESULTS = HERE / "results" / "rescue"

METHODS: dict[str, dict[str, Any] | None] = {
    "unguarded": None,
    "guarded": {},
    "no-remedies": {"remedies": []},
    "critic-warmup-only": {"remedies": ["critic_warmup"]},
}


class Recorder(BaseCallback):
    """
    Evaluates the policy at fixed intervals and keeps the rewards of all training steps, without being noticed.

    :param seed: Seed of the evaluation environment
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.env = Monitor(gym.make(ENV))
        self.env.reset(seed=seed)
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []
        self.rewards: list[float] = []
        self.ends: list[int] = []

    def _measure(self) -> None:
        returns, _ = evaluate_policy(self.model, self.env, EVAL_EPISODES, return_episode_rewards=True)
        self.timesteps.append(self.num_timesteps)
        self.returns.append([float(value) for value in returns])

    def _on_training_start(self) -> None:
        self._measure()

    def _on_step(self) -> bool:
        self.rewards.append(float(self.locals["rewards"][0]))
        if self.locals["dones"][0]:
            self.ends.append(len(self.rewards))
        if self.num_timesteps % MEASURE_FREQ == 0:
            self._measure()
        return True


def result_path(method: str, seed: int) -> Path:
    return RESULTS / f"{method}_seed{seed}.json"


def finetune(method: str, seed: int) -> str:
    th.set_num_threads(1)
    start = time.monotonic()
    model = OfflineTD3.load(
        hopper.pretrained_path(seed),
        env=Monitor(gym.make(ENV)),
        device="cpu",
        seed=seed,
        action_noise=NormalActionNoise(np.zeros(3), 0.1 * np.ones(3)),
        warmup_steps=WARMUP_STEPS,
        warmup_action_noise=True,
        offline_fraction=0.5,
    )
    recorder = Recorder(seed=30_000 + seed)
    callbacks: list[BaseCallback] = [recorder]
    settings = METHODS[method]
    content: dict[str, Any] = {"method": method, "settings": settings, "seed": seed}
    if settings is not None:
        from sb3_offline_ft import CollapseGuard

        guard = CollapseGuard(**settings, path=RESULTS / f"{method}_seed{seed}")
        # Before the recorder, so that an evaluation at the step of a rollback measures the restored policy
        callbacks.insert(0, guard)
    model.learn(ONLINE_STEPS, callback=callbacks)
    content |= {
        "dataset_fingerprint": model.dataset_fingerprint,
        "timesteps": recorder.timesteps,
        "returns": np.mean(recorder.returns, axis=1).tolist(),
        "episode_returns": recorder.returns,
        "training_episode_ends": recorder.ends,
        **hopper.facts(start),
        "constants": {
            "offline_steps": hopper.OFFLINE_STEPS,
            "online_steps": ONLINE_STEPS,
            "warmup_steps": WARMUP_STEPS,
            "eval_episodes": EVAL_EPISODES,
            "dataset": hopper.DATASET,
        },
    }
    if settings is None:
        with atomic_write(RESULTS / f"{method}_seed{seed}.npz") as file:
            np.savez_compressed(file, rewards=np.float32(recorder.rewards), ends=np.array(recorder.ends))
    hopper.write_json(result_path(method, seed), content)
    return f"{method}, seed {seed}: {' '.join(f'{value:.0f}' for value in content['returns'][:: 1000 // MEASURE_FREQ])}"


def run_missing(methods: list[str], seeds: list[int], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pretraining = {seed: pool.submit(hopper.pretrain, seed) for seed in seeds if not hopper.pretrained_path(seed).exists()}
        for future in pretraining.values():
            print(future.result(), flush=True)
        jobs = [
            pool.submit(finetune, method, seed)
            for method in methods
            for seed in seeds
            if not result_path(method, seed).exists()
        ]
        for number, job in enumerate(as_completed(jobs), start=1):
            print(f"[{number}/{len(jobs)}] {job.result()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    run_missing(arguments.methods, arguments.seeds, arguments.workers)


if __name__ == "__main__":
    main()
