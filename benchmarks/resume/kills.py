"""
Runs that are killed at random moments and go on: do they come out as if nothing had happened, and what do checkpoints cost?

    python benchmarks/resume/kills.py            # about ten minutes; writes kills.json and kills.md beside this file
    python benchmarks/resume/kills.py --kills 3  # a look

In each row a run is killed with SIGKILL, each time at a random moment of one phase, and goes on after each kill; if it ends
before it was killed as often as asked for, there is another one. Each is compared with a run that was left alone: weights,
optimizers, replay buffer, returns, evaluations, random numbers.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_offline_ft import TD3BC, TD3C, ChampionChallenger, CheckpointRun, CollapseGuard, resume
from sb3_offline_ft.checkpoints.folder import has_checkpoint
from sb3_offline_ft.checkpoints.ring import columns_of

HERE = Path(__file__).parent
SAVE_FREQ = 100
PHASES = ("pretraining", "warm-up", "finetuning")
SIZES: dict[str, dict[str, int]] = {
    "pretraining": {"offline_steps": 4_000, "warmup_steps": 100, "total": 300},
    "warm-up": {"offline_steps": 200, "warmup_steps": 5_000, "total": 5_200},
    "finetuning": {"offline_steps": 200, "warmup_steps": 600, "total": 2_400},
}

SETTINGS = [
    *(("champion", phase) for phase in PHASES),
    *(("guard", phase) for phase in PHASES),
    ("sac", "finetuning"),
    *(("processes", phase) for phase in PHASES),
]


class Told(BaseCallback):
    """Tells the process that kills in which phase the learner is."""

    keeps_no_state = True

    def __init__(self, phase: Any) -> None:
        super().__init__()
        self.phase = phase

    def on_offline_start(self, callbacks: BaseCallback) -> None:
        self.phase.value = 1

    def _on_rollout_start(self) -> None:
        end = getattr(self.model, "first_warmup_end", 0)
        self.phase.value = 2 if self.model.num_timesteps < end else 3

    def _on_step(self) -> bool:
        return True


def make_env(setting: str) -> Any:
    def short() -> Any:
        return gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 30)

    n_envs, subproc = {"champion": (1, False), "guard": (4, False), "processes": (4, True), "sac": (1, False)}[setting]
    return make_vec_env(short, n_envs, seed=3, vec_env_cls=SubprocVecEnv if subproc else None)


def make_model(setting: str, phase: str) -> Any:
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    common: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "buffer_size": 3000, "seed": 0}
    if setting == "sac":
        return SAC("MlpPolicy", make_env(setting), learning_starts=SIZES[phase]["warmup_steps"], **common)
    sizes = {name: SIZES[phase][name] for name in ("offline_steps", "warmup_steps")}
    ours = {"dataset": "bundled:pendulum-medium", "action_noise": noise, "warmup_action_noise": True, **sizes}
    if setting == "champion":
        return TD3C("MlpPolicy", make_env(setting), constraint_reference="champion", n_steps=3, **ours, **common)
    balanced = {"replay_buffer_kwargs": {"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": [16]}}}
    return TD3BC("MlpPolicy", make_env(setting), **ours, **common, **balanced)


def callbacks(setting: str, folder: Path, phase: Any) -> list[BaseCallback]:
    made: list[BaseCallback] = [
        EvalCallback(
            make_vec_env("Pendulum-v1", seed=5), eval_freq=500, n_eval_episodes=1, verbose=0, log_path=str(folder), warn=False
        )
    ]
    if setting == "champion":
        budget = {"random_return": -250.0, "worst_return": -500.0, "risk_budget": 0.9}
        made.append(ChampionChallenger(path=folder, min_updates=50, verbose=0, **budget))
    elif setting == "guard":
        made.append(CollapseGuard(path=folder, random_return=-250.0, promotion_episodes=3, signal_freq=100, verbose=0))
    return [*made, CheckpointRun(SAVE_FREQ, path=folder), Told(phase)]


def run(setting: str, phase: str, folder: Path, told: Any) -> None:
    """Do the run, or what is left of it, and write what came out."""
    th.set_num_threads(1)
    model = resume(folder, make_env(setting)) if has_checkpoint(folder) else make_model(setting, phase)
    model.learn(SIZES[phase]["total"], callback=callbacks(setting, folder, told))
    outcome = {
        "weights": digest(model.get_parameters()),
        "buffer": digest(
            {name: array[: model.replay_buffer.size()] for name, array in columns_of(model.replay_buffer).items()}
        ),
        "returns": [episode["r"] for episode in model.ep_info_buffer],
        "counts": [model.num_timesteps, model._n_updates, model._episode_num],
        "random": [float(th.rand(1)), float(np.random.rand())],
    }
    for path in folder.glob("*_events.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        outcome[path.name] = digest([{key: value for key, value in line.items() if key != "time"} for line in lines])
    if (folder / "evaluations.npz").exists():
        with np.load(folder / "evaluations.npz") as evaluations:
            outcome["evaluations"] = digest({name: evaluations[name] for name in evaluations.files})
    model.env.close()
    (folder / "outcome.json").write_text(json.dumps(outcome))


def digest(value: Any) -> str:
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                sha.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        elif isinstance(part, th.Tensor | np.ndarray):
            sha.update(np.ascontiguousarray(part if isinstance(part, np.ndarray) else part.detach().cpu().numpy()).tobytes())
        else:
            sha.update(repr(part).encode())

    add(value)
    return sha.hexdigest()


def killed_run(setting: str, phase: str, kills: int, randomness: random.Random) -> dict[str, Any]:
    """One run, killed until it ends."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        for folder in (whole, killed):
            folder.mkdir()
        told = context.Value("i", 0)
        process = context.Process(target=run, args=(setting, phase, whole, told))
        process.start()
        process.join()
        done, attempts = 0, 0
        while not (killed / "outcome.json").exists():
            told.value, attempts = 0, attempts + 1
            if attempts > 3 * kills + 10:
                raise RuntimeError(f"{setting}, {phase}: the run does not come to its end.")
            process = context.Process(target=run, args=(setting, phase, killed, told))
            process.start()
            wanted = PHASES.index(phase) + 1
            while process.is_alive() and told.value != wanted:
                time.sleep(0.002)
            if done < kills and told.value == wanted:
                time.sleep(randomness.uniform(0.0, 0.5))
                if process.is_alive() and told.value == wanted:
                    os.kill(process.pid, signal.SIGKILL)
                    done += 1
            process.join()
        first, second = (json.loads((folder / "outcome.json").read_text()) for folder in (whole, killed))
        different = sorted(name for name in first if first[name] != second.get(name))
    return {"setting": setting, "phase": phase, "kills": done, "compared": sorted(first), "different": different}


def killed_runs(setting: str, phase: str, kills: int, randomness: random.Random) -> dict[str, Any]:
    """One row of the table."""
    row = killed_run(setting, phase, kills, randomness) | {"runs": 1}
    while row["kills"] < kills:
        if row["runs"] > kills:
            raise RuntimeError(f"{setting}, {phase}: the runs end before they can be killed.")
        another = killed_run(setting, phase, kills - row["kills"], randomness)
        row["different"] = sorted({*row["different"], *another["different"]})
        row |= {"kills": row["kills"] + another["kills"], "runs": row["runs"] + 1}
    return row


# Cost


def measure_cost(n_rows: int, new_rows: int = 10_000, repeats: int = 5) -> dict[str, float]:
    """Seconds for a checkpoint of a TD3C learner on Hopper-v5 of which so many rows are new."""
    settings: dict[str, Any] = {"buffer_size": n_rows, "dataset": "bundled:hopper-medium", "offline_steps": 50, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        model = TD3C(
            "MlpPolicy", make_vec_env("Hopper-v5", seed=0), warmup_steps=100, constraint_reference="pretrained", **settings
        )
        checkpoints = CheckpointRun(10**9, path=folder)
        model.learn(150, callback=checkpoints)
        buffer, generator = model.replay_buffer, np.random.default_rng(0)
        fill(buffer, 0, n_rows, generator)
        buffer.pos, buffer.full = 0, True
        seconds = []
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            assert checkpoints.write(checkpoints) is not None
            seconds.append(time.perf_counter() - began)
            fill(buffer, buffer.pos, new_rows, generator)
            buffer.pos = (buffer.pos + new_rows) % n_rows
            model._n_updates += repeat + 1
    return {
        "rows": n_rows,
        "new_rows": new_rows,
        "first": seconds[0],
        "median": float(np.median(seconds[1:])),
        "most": max(seconds[1:]),
    }


def fill(buffer: Any, start: int, n_rows: int, generator: np.random.Generator) -> None:
    rows = (start + np.arange(n_rows)) % buffer.buffer_size
    for array in columns_of(buffer).values():
        array[rows] = generator.random((n_rows, *array.shape[1:]), dtype=np.float32).astype(array.dtype)


def measure_speed(steps: int = 400) -> dict[str, float]:
    """
    Processor seconds of a run for what lies between two checkpoints at the default rate, as in the preset of td3c for
    Hopper-v5; those of the clock would be more on a machine with other work.
    """
    settings: dict[str, Any] = {
        "dataset": "bundled:hopper-medium",
        "offline_steps": 1000,
        "warmup_steps": 10,
        "gradient_steps": 2,
    }
    model = TD3C("MlpPolicy", make_vec_env("Hopper-v5", seed=0), constraint_reference="pretrained", seed=0, **settings)
    began = time.process_time()
    model.pretrain()
    offline = (time.process_time() - began) / 1000
    began = time.process_time()
    model.learn(steps)
    return {"offline": 10_000 * offline, "online": 10_000 * (time.process_time() - began) / steps}


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Runs that were killed",
        "",
        "Written by `kills.py`. A run is the same if nothing of what is compared differs.",
        "",
    ]
    lines += ["| run | killed in | kills | of runs | compared | different |", "|---|---|---|---|---|---|"]
    for row in result["runs"]:
        names = ", ".join(row["different"]) or "nothing"
        what = ", ".join(row["compared"])
        lines.append(f"| {row['setting']} | {row['phase']} | {row['kills']} | {row['runs']} | {what} | {names} |")
    if note := result.get("note"):
        lines += ["", note]
    lines += ["", "## Cost", "", "TD3C on Hopper-v5, two layers of 256 units, 10,000 new rows a checkpoint.", ""]
    lines += ["| rows of the buffer | first checkpoint | a later one (median) | longest |", "|---|---|---|---|"]
    for row in result["cost"]:
        lines.append(f"| {row['rows']:,} | {row['first']:.2f} s | {row['median']:.2f} s | {row['most']:.2f} s |")
    speed, usual = result["speed"], result["cost"][0]["median"]
    lines += ["", "10,000 steps of such a run take, in seconds of the processor"]
    for phase, seconds in speed.items():
        lines.append(
            f"- {phase}: {seconds:.0f} s; a checkpoint of {result['cost'][0]['rows']:,} rows is {100 * usual / seconds:.1f} %"
        )
    lines += ["", f"Measured with a load of {result['load'][0]:.1f} on {result['cores']} cores."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    result: dict[str, Any] = {"cost": [measure_cost(100_000), measure_cost(1_000_000)], "speed": measure_speed(), "runs": []}
    result |= {"load": list(os.getloadavg()), "cores": os.cpu_count()}
    for number, (setting, phase) in enumerate(SETTINGS):
        began = time.monotonic()
        row = killed_runs(setting, phase, arguments.kills, random.Random(arguments.seed + 100 * number))
        result["runs"].append(row)
        print(
            f"{setting}, {phase}: {row['kills']} kills, different: {row['different']}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        (HERE / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "kills.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
