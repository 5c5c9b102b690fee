"""
Plain TD3 finetuned on Hopper-v5 from weights pretrained with TD3BC, with and without CollapseGuard.

    python benchmarks/detection/rescue.py            # what is missing of the runs, then table and figure
    python benchmarks/detection/rescue.py --report   # table and figure from the committed results only

Runs are skipped when their result exists, so that an interrupted benchmark goes on where it stopped. The unguarded runs also
record the rewards of all training episodes, which delay.py replays through the detectors.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from rich.console import Console
from rich.table import Table
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.collapse.events import EVENTS_FILE, read_events
from sb3_offline_ft.common.io import atomic_write

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "finetuning"))
import hopper  # noqa: E402  # the pretraining of the other benchmark

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ENV = hopper.ENV
WARMUP_STEPS = 5_000
ONLINE_STEPS = 25_000
MEASURE_FREQ = 250
EVAL_EPISODES = 10
LAST = 20  # evaluations that count as the end of a run: the last 5,000 steps
EXAMPLE = "guarded_seed1"
RESULTS = HERE / "results" / "rescue"

METHODS: dict[str, dict[str, Any] | None] = {
    "unguarded": None,
    "guarded": {},
    "no-remedies": {"remedies": []},
}
NAMES = {
    "unguarded": "without guard",
    "guarded": "with guard",
    "no-remedies": "with guard, no remedies",
}
COLORS = {"unguarded": "#D55E00", "guarded": "#0072B2", "no-remedies": "#CC79A7"}


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
    started = hopper.begin()
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
    hopper.check_pretrained(model, seed)
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
        "timesteps": recorder.timesteps,
        "returns": np.mean(recorder.returns, axis=1).tolist(),
        "episode_returns": recorder.returns,
        "training_episode_ends": recorder.ends,
        **hopper.facts(started, model),
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


def measures(run: dict[str, Any]) -> dict[str, Any]:
    """What is reported of one run; all but J0 counts evaluations after the warm-up only."""
    steps, returns = np.array(run["timesteps"]), np.array(run["returns"])
    # The policy is frozen in the warm-up: all evaluations up to its end measure the same policy
    warmup = hopper.warmup_steps(run)
    baseline = float(returns[steps <= warmup].mean())
    scale = abs(baseline - hopper.RANDOM_RETURN)
    returns = returns[steps > warmup]
    events_file = RESULTS / f"{run['method']}_seed{run['seed']}" / EVENTS_FILE
    events = read_events(events_file) if events_file.exists() else []
    alarms = [event for event in events if event["event"] == "alarm"]
    return {
        "method": run["method"],
        "seed": run["seed"],
        "J0": baseline,
        "lowest": float(returns.min()),
        "dip depth": (baseline - float(returns.min())) / scale,
        "dip area": float(np.maximum(0, baseline - returns).mean()) / scale,
        "share below": float((returns < baseline - 0.25 * scale).mean()),
        "mean": float(returns.mean()),
        "best": float(returns.max()),
        "end": float(returns[-LAST:].mean()),
        "rollbacks": sum(event["event"] == "rollback" for event in events) if events else None,
        "first alarm": alarms[0]["timestep"] - warmup if alarms else None,
    }


def cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if name.startswith("dip") else f"{value:.1%}" if name.startswith("share") else f"{value:.0f}"
    return str(value)


def report() -> None:
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_seed*.json"))]
    rows = sorted((measures(run) for run in runs), key=lambda row: (list(METHODS).index(str(row["method"])), int(row["seed"])))
    if not rows:
        return
    table = Table(title=f"Plain TD3 on {ENV}, {ONLINE_STEPS - WARMUP_STEPS:,} steps after the warm-up")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "method" else "right")
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [cell(name, NAMES[value] if name == "method" else value) for name, value in row.items()]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=160).print(table)
    lines += ["", f"Mean of the last {LAST} evaluations, difference to the unguarded run of the same seed:", ""]
    without = {row["seed"]: row["end"] for row in rows if row["method"] == "unguarded"}
    for method in METHODS:
        differences = [row["end"] - without[row["seed"]] for row in rows if row["method"] == method and row["seed"] in without]
        if method == "unguarded" or len(differences) < 2:
            continue
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        each = ", ".join(f"{value:+.0f}" for value in differences)
        mean = f"{np.mean(differences):+.0f} (95 % t interval {interval.low:+.0f} to {interval.high:+.0f})"
        lines.append(f"- {NAMES[method]}: {each}; mean {mean}")
    with atomic_write(HERE / "results" / "rescue.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines[-len(METHODS) :]))
    draw(runs)
    example = RESULTS / EXAMPLE / "collapse.png"
    if example.exists():
        shutil.copyfile(example, HERE.parent.parent / "docs" / "collapse_example.png")


def draw(runs: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for method in ("no-remedies", "unguarded", "guarded"):
        curves = [run for run in runs if run["method"] == method]
        if not curves:
            continue
        steps = np.array(curves[0]["timesteps"]) / 1000
        # In units of each seed's own start, since the pretrained policies differ
        values = np.array(
            [np.array(run["returns"]) / np.mean(np.array(run["returns"])[steps <= WARMUP_STEPS / 1000]) for run in curves]
        )
        for curve in values:
            axes.plot(steps, curve, color=COLORS[method], alpha=0.25, linewidth=0.8)
        label = f"{NAMES[method]} ({len(curves)} seeds)"
        axes.plot(steps, values.mean(axis=0), color=COLORS[method], linewidth=2.2, label=label)
    axes.axvspan(0, WARMUP_STEPS / 1000, color="0.93", zorder=0)
    axes.text(WARMUP_STEPS / 2000, 0.03, "warm-up", ha="center", va="bottom", fontsize=8, transform=axes.get_xaxis_transform())
    axes.axhline(0.75, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="thousand interactions",
        ylabel="evaluation return / J0",
        title=f"Plain TD3 finetuned on {ENV}: single runs and means",
        xlim=(0, ONLINE_STEPS / 1000),
        ylim=(0, None),
    )
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_write(HERE / "rescue.png") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="only what is there")
    arguments = parser.parse_args()
    if not arguments.report:
        run_missing(arguments.methods, arguments.seeds, arguments.workers)
    report()


if __name__ == "__main__":
    main()
