"""
Whether `update_precision="bfloat16"` learns as float32 does: TD3BC on Hopper-medium, offline, then TD3C online.

    python benchmarks/speed/precision.py            # 5 seeds, resumable; an hour or more on one core
    python benchmarks/speed/precision.py --report   # test and figure from the committed results

Both precisions have the same initial weights and evaluation episodes, and offline the same batches and noise, so runs are
compared in pairs. The test,
fixed beforehand: the mean evaluation return over a run (the area under its curve), difference bfloat16 - float32 by seed,
Student's t for pairs, two-sided at 5 %. Its power is small with 5 seeds, so the 95 % interval of the difference is given too.
As a yardstick there is a third set of runs: float32 with other batches (another seed of the samplers, same initial weights).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from machine import manifest
from scipy import stats
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_offline_ft import TD3C

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "precision.json"
FIGURE = RESULTS.with_suffix(".png")
VARIANTS = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 0), "float32, other batches": ("float32", 1000)}
SEEDS = range(5)
OFFLINE_STEPS, ONLINE_STEPS, EVERY, EPISODES = 20_000, 3_000, 2_000, 10
ONLINE_EVERY = 1_000


def evaluate(model: TD3C, environment: gym.Env[Any, Any]) -> float:
    """
    :param model: The learner
    :param environment: Where it is evaluated
    :return: Mean return of episodes that begin in the same states each time
    """
    environment.reset(seed=12345)
    state = th.random.get_rng_state(), np.random.get_state()
    mean, _ = evaluate_policy(model, environment, EPISODES)
    th.random.set_rng_state(state[0])
    np.random.set_state(state[1])
    return float(mean)  # type: ignore[arg-type]


def run(variant: str, seed: int) -> dict[str, Any]:
    """
    :param variant: Name in ``VARIANTS``
    :param seed: Seed of the run
    :return: Returns, offline and online
    """
    precision, shift = VARIANTS[variant]
    facts = manifest("scipy")
    model = TD3C(
        "MlpPolicy",
        "Hopper-v5",
        dataset="bundled:hopper-medium",
        seed=seed,
        device="cpu",
        constraint_reference="pretrained",
        warmup_steps=500,
        learning_rate=3e-4,
        update_precision=precision,
    )
    if shift:
        model.set_random_seed(seed + shift)
    environment = Monitor(gym.make("Hopper-v5"))
    offline = [evaluate(model, environment)]
    for _ in range(OFFLINE_STEPS // EVERY):
        model.pretrain(EVERY)
        offline.append(evaluate(model, environment))
    online = []
    for index in range(ONLINE_STEPS // ONLINE_EVERY):
        model.learn(ONLINE_EVERY, reset_num_timesteps=index == 0)
        online.append(evaluate(model, environment))
    return {"variant": variant, "seed": seed, "offline": offline, "online": online, "manifest": facts}


def load() -> list[dict[str, Any]]:
    """
    :return: The runs so far, each with the manifest that it was made with
    """
    if not RESULTS.exists():
        return []
    content = json.loads(RESULTS.read_text())
    # Once there was one for all runs
    return [{"manifest": content.get("manifest"), **entry} for entry in content["runs"]]


def save(runs: list[dict[str, Any]]) -> None:
    """
    :param runs: The runs so far
    """
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    lines = ",\n".join(json.dumps(entry) for entry in runs)
    temporary.write_text(f'{{"runs": [\n{lines}\n]}}\n')
    temporary.replace(RESULTS)


def compare(runs: list[dict[str, Any]], part: str, variant: str) -> str:
    """
    :param runs: All runs
    :param part: ``"offline"`` or ``"online"``
    :param variant: What is compared with float32
    :return: A row of the table
    """
    means = {(entry["variant"], entry["seed"]): float(np.mean(entry[part])) for entry in runs}
    seeds = [seed for seed in SEEDS if (variant, seed) in means and ("float32", seed) in means]
    difference = np.array([means[variant, seed] - means["float32", seed] for seed in seeds])
    result = stats.ttest_1samp(difference, 0.0)
    low, high = result.confidence_interval(0.95)
    average = np.mean([means["float32", seed] for seed in seeds])
    return (
        f"| {part} | {variant} | {len(seeds)} | {average:.0f} | {difference.mean():+.0f} [{low:+.0f}, {high:+.0f}] "
        f"| {result.pvalue:.2f} |"
    )


def report(runs: list[dict[str, Any]]) -> str:
    """
    :param runs: All runs
    :return: The table; the figure is written to a file
    """
    others = [name for name in VARIANTS if name != "float32"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, part, step in zip(axes, ("offline", "online"), (EVERY, ONLINE_EVERY), strict=True):
        for name, color in zip(VARIANTS, ("tab:blue", "tab:orange", "0.6"), strict=True):
            curves = np.array([entry[part] for entry in runs if entry["variant"] == name])
            x = np.arange(curves.shape[1]) * step if part == "offline" else (np.arange(curves.shape[1]) + 1) * step
            axis.plot(x, curves.T, color=color, alpha=0.3, linewidth=0.8)
            axis.plot(x, curves.mean(axis=0), color=color, linewidth=2, label=name)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("gradient steps, offline" if part == "offline" else "environment steps, online")
    axes[0].set_ylabel("mean return of 10 episodes")
    axes[0].legend()
    figure.savefig(FIGURE, dpi=120)
    heading = "| phase | variant | seeds | mean return, float32 | difference, 95 % interval | p |\n|---|---|---|---|---|---|"
    rows = [compare(runs, part, name) for part in ("offline", "online") for name in others]
    return "\n".join([heading, *rows])


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="do not run anything")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    runs = load()
    if not arguments.report:
        for seed in SEEDS:
            for variant in VARIANTS:
                if not any(entry["variant"] == variant and entry["seed"] == seed for entry in runs):
                    runs.append(run(variant, seed))
                    save(runs)
                    print(
                        f"{variant}, seed {seed}: offline end {runs[-1]['offline'][-1]:.0f}, online {runs[-1]['online']}",
                        flush=True,
                    )
    print(report(runs))


if __name__ == "__main__":
    main()
