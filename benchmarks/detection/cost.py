"""
Measure what CollapseGuard costs while nothing is wrong: time per environment step with and without it, and snapshots.

    python benchmarks/detection/cost.py

Runs alternate between with and without, in one process and thread; the time is the process's own (CPU) time. Each ratio is the
median over rounds of with / without in the same round. Since the difference is smaller than the noise of such ratios, the time
that is spent inside the guard is measured too: its ratio is total / (total - inside). The clock starts when the
replay buffer has a batch, so that each step is followed by its update.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rescue import HERE, hopper
from stable_baselines3 import SAC
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft import TD3C, CollapseGuard, LearnerSnapshot
from sb3_offline_ft.common.io import atomic_write

ROUNDS, STEPS, SEED = 3, 1_500, 1
# Below anything the runs earn: the guard watches, and never finds reason to act
NEVER = (-1e6 + np.arange(20.0)).tolist()
GUARD = {"baseline": NEVER, "ratchet": False, "verbose": 0}


def finetuned(train_freq: int) -> OffPolicyAlgorithm:
    # Pretrained, so that episodes are as long as those of a policy worth guarding.
    # A train_freq as long as the run: collection, and one update at its end
    path = hopper.pretrained_path(SEED)
    return TD3C.load(path, env=Monitor(gym.make(hopper.ENV)), device="cpu", seed=0, warmup_steps=0, train_freq=train_freq)


def from_scratch() -> OffPolicyAlgorithm:
    return SAC("MlpPolicy", hopper.ENV, learning_starts=0, device="cpu", seed=0)


# What makes the learner, and how many updates it must make while it is timed
SETTINGS: dict[str, tuple[Callable[[], OffPolicyAlgorithm], int]] = {
    "TD3C finetuned on Hopper-v5, an update each step": (lambda: finetuned(1), STEPS),
    "TD3C on Hopper-v5, no updates": (lambda: finetuned(STEPS), 1),
    "SAC from scratch on Hopper-v5 (episodes of about 20 steps), an update each step": (from_scratch, STEPS),
}


class TimedGuard(CollapseGuard):
    """A guard that measures the time spent in it."""

    inside = 0.0

    def _timed(self, method: Callable[[], Any]) -> Any:
        start = time.process_time()
        try:
            return method()
        finally:
            self.inside += time.process_time() - start

    def on_step(self) -> bool:
        return bool(self._timed(super().on_step))

    def on_rollout_start(self) -> None:
        self._timed(super().on_rollout_start)

    def on_rollout_end(self) -> None:
        self._timed(super().on_rollout_end)


def seconds(make: Callable[[], OffPolicyAlgorithm], expected: int, guard: CollapseGuard | None) -> float:
    model = make()
    model.learn(model.batch_size, log_interval=10**9)
    before = model._n_updates
    start = time.process_time()
    model.learn(STEPS, callback=guard, log_interval=10**9, reset_num_timesteps=False)
    taken = time.process_time() - start
    made = model._n_updates - before
    if made != expected:
        raise RuntimeError(f"{made} updates were made, expected {expected}: the time is that of something else.")
    return taken


def measure(make: Callable[[], OffPolicyAlgorithm], expected: int) -> dict[str, Any]:
    without, within, shares = [], [], []
    for _ in range(ROUNDS):
        without.append(seconds(make, expected, None))
        within.append(seconds(make, expected, CollapseGuard(**GUARD)))
        timed = TimedGuard(**GUARD)
        total = seconds(make, expected, timed)
        shares.append(total / (total - timed.inside))
    ratios = np.array(within) / np.array(without)
    return {
        "updates": expected,
        "microseconds per step without": round(1e6 * float(np.median(without)) / STEPS, 1),
        "microseconds per step with": round(1e6 * float(np.median(within)) / STEPS, 1),
        "ratio with / without": round(float(np.median(ratios)), 4),
        "ratios": [round(float(ratio), 4) for ratio in sorted(ratios)],
        "ratio by time inside": round(float(np.median(shares)), 4),
        "ratios by time inside": [round(share, 4) for share in sorted(shares)],
    }


def main() -> None:
    th.set_num_threads(1)
    results: dict[str, Any] = {"rounds": ROUNDS, "steps": STEPS, "manifest": hopper.manifest(), "time_per_step": {}}
    for name, (make, expected) in SETTINGS.items():
        results["time_per_step"][name] = measure(make, expected)
        print(name, results["time_per_step"][name], flush=True)
    model = finetuned(1)
    model.learn(300)
    start = time.process_time()
    snapshots = [LearnerSnapshot.take(model) for _ in range(20)]
    taken = time.process_time()
    for snapshot in snapshots:
        snapshot.restore(model)
    restored = time.process_time()
    path = HERE / "results" / "snapshot.tmp"
    snapshots[0].save(path)
    results["snapshot of TD3C, 256x256"] = {
        "bytes": snapshots[0].nbytes,
        "bytes of the model's parameters": sum(4 * value.numel() for value in model.policy.state_dict().values()),
        "file bytes": path.stat().st_size,
        "milliseconds to take": round(1000 * (taken - start) / 20, 2),
        "milliseconds to restore": round(1000 * (restored - taken) / 20, 2),
    }
    path.unlink()
    print(results["snapshot of TD3C, 256x256"])
    with atomic_write(Path(HERE / "results" / "cost.json")) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
