"""
Measure how well fitted Q evaluation tells from logged data what policies return, from poor ones to good ones.

    python benchmarks/off_policy/accuracy.py                # measure what is missing, then write the tables
    python benchmarks/off_policy/accuracy.py --only pendulum
    python benchmarks/off_policy/accuracy.py --report       # write the tables from the results that are there

Results are saved after each policy, policies are kept in a folder beside, and what is there is not done again. All of it takes
about ten minutes on one core.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from scipy import stats

from sb3_offline_ft import TD3BC, load_dataset
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.evaluation import rate
from sb3_offline_ft.evaluation.off_policy import coverage, fitted_q_evaluation, initial_value_of_critics
from sb3_offline_ft.evaluation.off_policy.coverage import MOST_OUTSIDE
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData

HERE = Path(__file__).parent
RESULTS, TABLES, POLICIES = HERE / "accuracy.json", HERE / "accuracy.md", HERE / "policies"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is measured on one environment: fixed before the first run."""

    env_id: str
    data: str
    gamma: float
    layers: tuple[int, ...]
    learning_rate: float
    gradient_steps: int
    checkpoints: dict[str, tuple[int, ...]]
    """Of pretraining runs by name (a name with ``best`` is pretrained on the best episodes only), in gradient steps."""
    random_shares: tuple[float, ...]
    """Of policies that are the last checkpoint of the first run, but for this share of uniformly random actions."""
    n_episodes: int
    n_steps: int
    """Of the episodes that tell the truth, so many that what is beyond counts for nothing after discounting."""
    time_limit: int
    best: str = ""
    n_bootstraps: int = 8
    seed: int = 0


TASKS = {
    "pendulum": Task(
        "Pendulum-v1", "bundled:pendulum-medium", 0.98, (64, 64), 1e-3, 2_500,
        {"seed 0": (0, 250, 500, 1000, 2000, 4000, 8000), "seed 1": (500, 1500, 4000)},
        (0.25, 0.5, 0.75, 1.0), n_episodes=200, n_steps=400, time_limit=200,
    ),
    "hopper": Task(
        "Hopper-v5", "bundled:hopper-medium", 0.99, (64, 64), 1e-3, 2_500,
        {"seed 0": (0, 250, 500, 1000, 2000, 4000, 8000), "best episodes": (1000, 4000)},
        (0.1, 0.3, 1.0), n_episodes=30, n_steps=1000, time_limit=1000, best="?min_return=2500",
    ),
}  # fmt: skip


class Zero:
    """The action in the middle, always."""

    def __init__(self, like: TD3BC) -> None:
        self.observation_space, self.action_space = like.observation_space, like.action_space

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        return np.zeros((len(observation), *self.action_space.shape), np.float32), None


class PartlyRandom(Zero):
    """A policy, but for a share of uniformly random actions."""

    def __init__(self, policy: TD3BC, share: float) -> None:
        super().__init__(policy)
        self._policy, self._share, self._rng = policy, share, np.random.default_rng(0)

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        actions, _state = self._policy.predict(observation, deterministic=True)
        low, high = self.action_space.low, self.action_space.high
        uniform = self._rng.uniform(low, high, size=actions.shape).astype(actions.dtype)
        is_random = self._rng.random(len(actions)) < self._share
        return np.where(is_random[:, None], uniform, actions), None


class SwingUp(Zero):
    """Pumps energy into a pendulum until it is up, then holds it; with a small gain weakly, with a negative one wrongly."""

    def __init__(self, like: TD3BC, gain: float) -> None:
        super().__init__(like)
        self._gain = gain

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        cos, sin, speed = observation.T
        # It is 0 when the pendulum stands
        energy = speed**2 / 6 + 5 * (cos - 1)
        hold = -12 * np.arctan2(sin, cos) - 3 * speed
        torque = self._gain * np.where(cos > 0.9, hold, -2 * np.sign(speed * energy))
        return np.clip(torque, -2, 2)[:, None].astype(np.float32), None


SWING_UPS = (-1.0, 0.5, 1.0)
"""Gains. They were added when the first results were known, since no learner on Pendulum was good."""


def checkpoint(task: Task, run: str, steps: int) -> TD3BC:
    """A policy that was pretrained for so many steps; from its file, or made with all others of its run."""
    folder = POLICIES / task.env_id / run
    if not (folder / f"{steps}.zip").exists():
        model = TD3BC(
            "MlpPolicy", task.env_id, dataset=task.data + (task.best if "best" in run else ""), gamma=task.gamma,
            learning_rate=task.learning_rate, policy_kwargs={"net_arch": list(task.layers)},
            seed=int(run[-1]) if run[-1].isdigit() else 0, device="cpu",
        )  # fmt: skip
        model.load_offline_data()
        for wanted in task.checkpoints[run]:
            model.pretrain(wanted - model.offline_steps_done)
            model.save(folder / f"{wanted}.zip")
    return TD3BC.load(folder / f"{steps}.zip", device="cpu")


def policies(task: Task) -> Iterator[tuple[str, Any]]:
    first, *_ = task.checkpoints
    for run, steps in task.checkpoints.items():
        for wanted in steps:
            yield f"{run}, {wanted} steps", lambda run=run, wanted=wanted: checkpoint(task, run, wanted)
    for share in task.random_shares:
        yield (
            f"{100 * share:.0f} % random",
            lambda share=share: PartlyRandom(checkpoint(task, first, task.checkpoints[first][-1]), share),
        )
    yield "zero", lambda: Zero(checkpoint(task, first, 0))
    for gain in SWING_UPS if task.env_id == "Pendulum-v1" else ():
        yield f"swing-up by hand, gain {gain:g}", lambda gain=gain: SwingUp(checkpoint(task, first, 0), gain)


def true_returns(policy: Any, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discounted returns without the time limit and returns with it, shape ``(n_episodes,)``, and states of some episodes."""
    envs = [gym.make(task.env_id, max_episode_steps=task.n_steps) for _ in range(task.n_episodes)]
    observations = np.stack([env.reset(seed=10_000 + i)[0] for i, env in enumerate(envs)])
    discounted, plain, running, visited = np.zeros(len(envs)), np.zeros(len(envs)), np.ones(len(envs), bool), []
    for step in range(task.n_steps):
        visited.append(observations[:10][running[:10]].copy())
        actions, _ = policy.predict(observations.astype(np.float32), deterministic=True)
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            discounted[i] += task.gamma**step * float(reward)
            plain[i] += float(reward) * (step < task.time_limit)
            running[i] = not (terminated or truncated)
        if not running.any():
            break
    return discounted, plain, np.concatenate(visited)


def measure(name: str, policy: Any, task: Task) -> Cell:
    data = LoggedData(task.data, policy, task.seed)
    actions = data.actions_of(policy)
    discounted, plain, visited = true_returns(policy, task)
    covered = coverage(policy, data, visited=visited, seed=task.seed, actions=actions)
    found = fitted_q_evaluation(
        policy, data, gamma=task.gamma, gradient_steps=task.gradient_steps, n_bootstraps=task.n_bootstraps,
        net_arch=task.layers, seed=task.seed, actions=actions,
    )  # fmt: skip
    return {
        "policy": name,
        "true": float(discounted.mean()),
        "true_error": float(discounted.std(ddof=1) / np.sqrt(len(discounted))),
        "true_return": float(plain.mean()),
        "estimate": found.estimate.value,
        "low": found.estimate.low,
        "high": found.estimate.high,
        "settled": found.is_settled,
        "clipped": found.clipped,
        "curve": np.round(found.curve.mean(axis=1), 2).tolist(),
        "own_critics": initial_value_of_critics(policy, data, actions),
        "actions_outside": covered.outside,
        "states_outside": covered.states_outside,
        "action_distance": covered.action_distance,
    }


def settings_of(task: Task) -> Cell:
    return json.loads(json.dumps(asdict(task)))


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def run(names: list[str]) -> None:
    for name in names:
        task, results = TASKS[name], read_results()
        if results.get(name, {}).get("settings") != settings_of(task):
            logged = load_dataset(task.data)
            value = float(logged.monte_carlo_returns(task.gamma)[logged.episode_starts].mean())
            results[name] = {"settings": settings_of(task), "data_value": value, "cells": {}}
        for policy_name, make in policies(task):
            if policy_name in results[name]["cells"]:
                continue
            cell = measure(policy_name, make(), task)
            results[name]["cells"][policy_name] = cell
            with atomic_write(RESULTS) as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())
            print(f"{name}: {policy_name}: true {cell['true']:.1f}, estimate {cell['estimate']:.1f} "
                  f"({cell['low']:.1f} to {cell['high']:.1f}), own critics {cell['own_critics']}", flush=True)  # fmt: skip


# Tables


def rank_correlation(first: list[float], second: list[float]) -> str:
    if len(first) < 4:
        return "too few"
    low, high = _rank_interval(np.array(first), np.array(second))
    return f"{stats.spearmanr(first, second).statistic:.2f} ({low:.2f} to {high:.2f})"


def _rank_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    rng, n = np.random.default_rng(0), len(first)
    drawn = [rows for rows in rng.integers(n, size=(2000, n)) if len(set(rows)) > 2]
    low, high = np.quantile([stats.spearmanr(first[rows], second[rows]).statistic for rows in drawn], [0.025, 0.975])
    return float(low), float(high)


def table(name: str, result: Cell) -> list[str]:
    cells = sorted(result["cells"].values(), key=lambda cell: cell["true"])
    lines = [
        f"### {name.capitalize()}",
        "",
        f"{result['settings']['data']}, discount factor {result['settings']['gamma']}; the logged episodes are worth "
        f"{result['data_value']:.0f}. {len(cells)} policies, in the order of their true values.",
        "",
        "| policy | true return | true value | estimate | 95 % interval | covers | own critics | actions outside | states "
        "outside |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        own = "" if cell["own_critics"] is None else f"{cell['own_critics']:.0f}"
        lines.append(
            f"| {cell['policy']} | {cell['true_return']:.0f} | {cell['true']:.1f} ± {1.96 * cell['true_error']:.1f} | "
            f"{cell['estimate']:.1f}{'' if cell['settled'] else ' (not settled)'} | {cell['low']:.1f} to {cell['high']:.1f} | "
            f"{'yes' if covers(cell) else 'no'} | {own} | {100 * cell['actions_outside']:.0f} % | "
            f"{100 * cell['states_outside']:.0f} % |"
        )
    return [*lines, "", *summary(result, cells), ""]


def covers(cell: Cell) -> bool:
    return bool(cell["low"] <= cell["true"] <= cell["high"])


def summary(result: Cell, cells: list[Cell]) -> list[str]:
    covered = [cell for cell in cells if cell["actions_outside"] <= MOST_OUTSIDE]
    outside = [cell for cell in cells if cell not in covered]
    learners = [cell for cell in cells if cell["own_critics"] is not None]
    lines = ["| | |", "|---|---|"]

    def correlations(what: str, of: list[Cell], key: str) -> None:
        for label, truth in (("true value", "true"), ("true return", "true_return")):
            found = rank_correlation([cell[key] for cell in of], [cell[truth] for cell in of])
            lines.append(f"| rank correlation of {what} with the {label}, {len(of)} policies | {found} |")

    correlations("the estimate", cells, "estimate")
    correlations("the estimate, learners only,", learners, "estimate")
    correlations("the own critics", learners, "own_critics")
    for what, of in (("all policies", cells), ("without a warning", covered), ("with a warning", outside)):
        if of:
            share = rate(sum(map(covers, of)), len(of))
            errors = [abs(cell["estimate"] - cell["true"]) for cell in of]
            lines.append(
                f"| {what}: intervals that cover | {sum(map(covers, of))} of {len(of)} ({100 * share.low:.0f} to "
                f"{100 * share.high:.0f} %) |"
            )
            lines.append(f"| {what}: median, largest error | {np.median(errors):.1f}, {max(errors):.1f} |")
    return lines + choices(result)


def choices(result: Cell) -> list[str]:
    """Which checkpoint of each run is chosen by whom, and what it returns."""
    lines = []
    for run_name, steps in result["settings"]["checkpoints"].items():
        cells = [result["cells"].get(f"{run_name}, {wanted} steps") for wanted in steps]
        if any(cell is None for cell in cells):
            continue
        by_estimate, by_critics = (max(cells, key=lambda cell: cell[key]) for key in ("estimate", "own_critics"))
        best = max(cells, key=lambda cell: cell["true_return"])
        lines.append(
            f"| {run_name}: checkpoint chosen by the estimate, by the own critics, the last, the best | "
            + ", ".join(
                f"{cell['true_return']:.0f} ({cell['policy'].rpartition(', ')[2]})"
                for cell in (by_estimate, by_critics, cells[-1], best)
            )
            + " |"
        )
    return lines


def report(results: dict[str, Any]) -> str:
    """The tables of results."""
    lines = [
        "Made by `python benchmarks/off_policy/accuracy.py`. Values are discounted returns of the task without a time limit,",
        "returns are sums of rewards of an episode. Errors are in units of the value. Intervals of rank correlations are by",
        "a bootstrap over policies, those of shares are exact. *Outside* is the share beyond 95 % of the data's own",
        f"distances. There is a warning if more than {100 * MOST_OUTSIDE:.0f} % of the actions are outside; the states that a",
        "policy visits are known here only because it ran.",
        "",
    ]
    for name, result in results.items():
        lines += table(name, result)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Write the tables from the results that are there.")
    parser.add_argument("--only", choices=TASKS, help="One environment.")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    if not arguments.report:
        run([arguments.only] if arguments.only else list(TASKS))
    with atomic_write(TABLES) as file:
        file.write(report(read_results()).encode())


if __name__ == "__main__":
    main()
