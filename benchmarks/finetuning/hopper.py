"""
Four ways of finetuning from the same pretrained weights on Hopper-v5: the picture of the README.

    python benchmarks/finetuning/hopper.py            # what is missing of the runs, then table and figure
    python benchmarks/finetuning/hopper.py --report   # table and figure from the committed results only

Each seed pretrains TD3BC on the bundled hopper data, then finetunes with each method. Runs are skipped when their result
exists, so that an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, load_dataset
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.live import live_arguments, replay_facts

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "speed"))
from machine import manifest  # noqa: E402  # as in the other benchmark

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ENV = "Hopper-v5"
DATASET = "bundled:hopper-medium"
OFFLINE_STEPS = 50_000
ONLINE_STEPS = 15_000
WARMUP_STEPS = 2_000
EVAL_FREQ = 1_000  # evaluations that TD3C's reference "best" learns from
MEASURE_FREQ = 500
MEASURE_FREQ_AFTER_SWITCH = 100  # within the first 1,000 updates, where policies collapse and, some, recover
EVAL_EPISODES = 10
RANDOM_RETURN = 17.1  # uniform random actions, 900 episodes

METHODS: dict[str, tuple[type[OfflineTD3], dict[str, Any]]] = {
    "TD3BC, kept": (TD3BC, {"online_bc": "keep"}),
    "TD3": (OfflineTD3, {}),
    "TD3C, target": (TD3C, {"constraint_reference": "target", "epsilon": 1e-3}),
    "TD3C, best": (TD3C, {"constraint_reference": "best", "epsilon": 1e-2}),
}
COLORS = {"TD3BC, kept": "tab:gray", "TD3": "tab:red", "TD3C, target": "tab:orange", "TD3C, best": "tab:blue"}

RESULTS = HERE / "results" / "hopper"
WEIGHTS = HERE / "weights"


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def pretrained_path(seed: int) -> Path:
    return WEIGHTS / f"pretrained_seed{seed}.zip"


def result_path(method: str, seed: int) -> Path:
    return RESULTS / f"{method.replace(', ', '-').lower()}_seed{seed}.json"


class Measure(BaseCallback):
    """
    Evaluates the policy without being noticed by the learner.

    :param seed: Seed of the evaluation environment
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.env = Monitor(gym.make(ENV))
        self.env.reset(seed=seed)
        self.timesteps: list[int] = []
        self.returns: list[list[float]] = []

    def _measure(self) -> None:
        returns, _ = evaluate_policy(self.model, self.env, EVAL_EPISODES, return_episode_rewards=True)
        self.timesteps.append(self.num_timesteps)
        self.returns.append([float(value) for value in returns])

    def _on_training_start(self) -> None:
        self._measure()

    def _on_step(self) -> bool:
        just_switched = 0 < self.num_timesteps - WARMUP_STEPS <= 1_000
        if self.num_timesteps % (MEASURE_FREQ_AFTER_SWITCH if just_switched else MEASURE_FREQ) == 0:
            self._measure()
        return True


def pretrain(seed: int) -> str:
    th.set_num_threads(1)
    started = begin()
    model = TD3BC("MlpPolicy", ENV, dataset=DATASET, offline_steps=OFFLINE_STEPS, seed=seed, device="cpu")
    env = Monitor(gym.make(ENV))
    env.reset(seed=10_000 + seed)
    returns = {}
    while model.offline_steps_done < OFFLINE_STEPS:
        model.pretrain(10_000)
        returns[model.offline_steps_done] = float(evaluate_policy(model, env, EVAL_EPISODES)[0])
    model.save(pretrained_path(seed))
    write_json(RESULTS / f"pretraining_seed{seed}.json", {"seed": seed, "returns": returns, **facts(started, model)})
    return f"pretraining seed {seed}: {' '.join(f'{value:.0f}' for value in returns.values())}"


def finetune(method: str, seed: int) -> str:
    th.set_num_threads(1)
    started = begin()
    algorithm, settings = METHODS[method]
    noise = NormalActionNoise(np.zeros(3), 0.1 * np.ones(3))
    model = algorithm.load(
        pretrained_path(seed),
        env=Monitor(gym.make(ENV)),
        device="cpu",
        seed=seed,
        action_noise=noise,
        warmup_steps=WARMUP_STEPS,
        offline_fraction=0.5,
        **settings,
    )
    check_pretrained(model, seed)
    eval_env = Monitor(gym.make(ENV))
    eval_env.reset(seed=20_000 + seed)
    measure = Measure(seed=30_000 + seed)
    evaluations = EvalCallback(eval_env, eval_freq=EVAL_FREQ, n_eval_episodes=EVAL_EPISODES, verbose=0)
    model.learn(ONLINE_STEPS, callback=[measure, evaluations])
    returns = np.mean(measure.returns, axis=1).tolist()
    content = {
        "method": method,
        "settings": settings,
        "seed": seed,
        "timesteps": measure.timesteps,
        "returns": returns,
        "episode_returns": measure.returns,
        **facts(started, model),
    }
    write_json(result_path(method, seed), content)
    return f"{method}, seed {seed}: {' '.join(f'{value:.0f}' for value in returns)}"


def begin() -> dict[str, Any]:
    """What a run comes from, before it; ends as part of :func:`facts`."""
    return {"manifest": manifest("minari"), "clock": time.monotonic()}


def facts(started: dict[str, Any], model: OfflineTD3) -> dict[str, Any]:
    """
    :param started: What :func:`begin` gave
    :param model: The learner, after the run: what it has done is read off it, and not what the constants above say
    """
    return {
        "seconds": round(time.monotonic() - started["clock"], 1),
        "manifest": started["manifest"],
        "learner": {
            "dataset": model.dataset,
            "dataset_fingerprint": model.dataset_fingerprint,
            "offline_steps": model.offline_steps_done,
            "online_steps": model.num_timesteps,
            "warmup_steps": model.first_warmup_end,
            "updates": model._n_updates,
            "arguments": live_arguments(model),
            "replay_buffer": replay_facts(model),
        },
    }


def check_pretrained(model: OfflineTD3, seed: int) -> None:
    """Weights are kept between runs of this script, and may be those of other settings."""
    found, expected = (model.offline_steps_done, model.dataset), (OFFLINE_STEPS, DATASET)
    if found != expected:
        raise ValueError(f"{pretrained_path(seed)} was pretrained with {found}, expected {expected}: remove the file.")


def warmup_steps(run: dict[str, Any]) -> int:
    """Of a result; older ones have the script's constants in place of what the learner says."""
    return int((run.get("learner") or run["constants"])["warmup_steps"])


def run_missing(seeds: list[int], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pretraining = {seed: pool.submit(pretrain, seed) for seed in seeds if not pretrained_path(seed).exists()}
        jobs = []
        for seed in sorted(seeds, key=lambda seed: seed in pretraining):
            if seed in pretraining:
                print(pretraining[seed].result(), flush=True)
            missing = [method for method in METHODS if not result_path(method, seed).exists()]
            jobs += [pool.submit(finetune, method, seed) for method in missing]
        for number, job in enumerate(as_completed(jobs), start=1):
            print(f"[{number}/{len(jobs)}] {job.result()}", flush=True)


def report() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_seed*.json"))]
    runs = [result for result in results if "method" in result]
    table = Table(title=f"{ENV}, {DATASET}, {ONLINE_STEPS:,} interactions after {OFFLINE_STEPS:,} offline gradient steps")
    columns = ("method", "seed", "J0", "lowest", "dip depth", "dip area", "best", "last", "mean")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = []
    for run in sorted(runs, key=lambda run: (list(METHODS).index(run["method"]), run["seed"])):
        steps, returns = np.array(run["timesteps"]), np.array(run["returns"])
        # The policy is frozen in the warm-up: all evaluations up to its end measure the same policy
        warmup = warmup_steps(run)
        baseline = returns[steps <= warmup].mean()
        scale = abs(baseline - RANDOM_RETURN)
        steps, returns = steps[steps >= warmup], returns[steps >= warmup]
        rows.append(
            {
                "method": run["method"],
                "seed": run["seed"],
                "J0": baseline,
                "lowest": returns.min(),
                "dip depth": (baseline - returns.min()) / scale,
                "dip area": average(np.maximum(0, baseline - returns), steps) / scale,
                "best": returns.max(),
                "last": returns[-1],
                "mean": average(returns, steps),
            }
        )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{value:.2f}" if "dip" in name else f"{round(value)}" if isinstance(value, float) else str(value)
            for name, value in row.items()
        ]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=140).print(table)
    (HERE / "hopper.md").write_text("\n".join(lines) + "\n")
    draw(runs)


def average(values: np.ndarray, steps: np.ndarray) -> float:
    """Mean over time: evaluations are closer together after the switch."""
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def draw(runs: list[dict[str, Any]]) -> None:
    data_return = float(np.mean(load_dataset(DATASET).episode_returns))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for method in METHODS:
        curves = [run for run in runs if run["method"] == method]
        if not curves:
            continue
        steps = np.array(curves[0]["timesteps"]) / 1000
        values = np.array([run["returns"] for run in curves])
        for curve in values:
            axes.plot(steps, curve, color=COLORS[method], alpha=0.25, linewidth=0.8)
        axes.plot(steps, values.mean(axis=0), color=COLORS[method], linewidth=2.2, label=method)
    axes.axvspan(0, WARMUP_STEPS / 1000, color="0.93", zorder=0)
    axes.text(WARMUP_STEPS / 2000, 0.03, "warm-up", ha="center", va="bottom", fontsize=8, transform=axes.get_xaxis_transform())
    axes.axhline(data_return, color="0.5", linewidth=0.8, linestyle="--")
    axes.text(ONLINE_STEPS / 1000, data_return, "mean of the data", ha="right", va="bottom", fontsize=8, color="0.35")
    seeds = len({run["seed"] for run in runs})
    axes.set(
        xlabel="thousand interactions",
        ylabel=f"return ({EVAL_EPISODES} evaluation episodes)",
        title=f"Finetuning on {ENV} from the same pretrained weights ({seeds} seeds, thick: mean)",
        xlim=(0, ONLINE_STEPS / 1000),
        ylim=(0, None),
    )
    axes.legend(frameon=False, loc="upper center", ncols=len(METHODS), bbox_to_anchor=(0.5, 1.02))
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "hopper.png", dpi=150)
    print(f"written: {HERE / 'hopper.png'}, {HERE / 'hopper.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    arguments = parser.parse_args()
    if not arguments.report:
        run_missing(arguments.seeds, arguments.workers)
    report()


if __name__ == "__main__":
    main()
