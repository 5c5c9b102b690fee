"""
Measure how long one decision takes: SB3's predict, the exported policy in onnxruntime, and as TorchScript.

    python benchmarks/export/latency.py     # about a minute on one core; writes latency.json and latency.md

One observation at a time, one thread. In each of many rounds every way gets a turn, so that what else the machine does is
shared by all; a turn counts by its median call, a way by the median of its turns. Weights are random: they do not matter.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3

from sb3_offline_ft import TD3C
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.controllers import load_controller
from sb3_offline_ft.export import export_policy
from sb3_offline_ft.testing import PointEnv

HERE = Path(__file__).parent
RESULTS, TABLES = HERE / "latency.json", HERE / "latency.md"
CAMERA = "Camera-v0"
ONNX, PREDICT, CONTROLLER, TORCHSCRIPT = "onnxruntime", "SB3 predict", "controller", "TorchScript"

gym.register(CAMERA, lambda: PointEnv(spaces.Box(0, 255, (64, 64, 3), np.uint8)))

POLICIES: dict[str, Callable[[], tuple[Any, str]]] = {
    "TD3C, Hopper-v5, 256 x 256": lambda: (
        TD3C("MlpPolicy", "Hopper-v5", policy_kwargs={"net_arch": [256, 256]}, device="cpu", seed=0),
        "Hopper-v5",
    ),
    "SAC, Hopper-v5, 256 x 256": lambda: (SAC("MlpPolicy", "Hopper-v5", device="cpu", seed=0), "Hopper-v5"),
    "TD3, image of 64 x 64, NatureCNN": lambda: (TD3("CnnPolicy", CAMERA, buffer_size=10, device="cpu", seed=0), CAMERA),
}


def ways(model: Any, env_id: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """What decides about one observation, by name."""
    model.save(folder / "model.zip")
    export_policy(folder / "model.zip", folder / "policy.onnx", env=env_id)
    export_policy(folder / "model.zip", folder / "script.pt", env=env_id)
    observation, _ = gym.make(env_id).reset(seed=0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "policy.onnx", options, providers=["CPUExecutionProvider"])
    controller, script = load_controller(str(folder / "policy.onnx")), th.jit.load(folder / "script.pt")
    row = observation[None].astype(np.uint8 if observation.dtype == np.uint8 else np.float32)

    def torchscript() -> Any:
        with th.inference_mode():
            return script(th.from_numpy(row)).numpy()

    return {
        PREDICT: lambda: model.predict(observation, deterministic=True),
        ONNX: lambda: session.run(None, {"observation": row}),
        CONTROLLER: lambda: controller.act(observation),
        TORCHSCRIPT: torchscript,
    }


def measure(decide: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Microseconds of each way: median, and the quartiles of its turns."""
    turns: dict[str, list[float]] = {name: [] for name in decide}
    for each in decide.values():
        for _ in range(calls):
            each()
    for _ in range(rounds):
        for name, each in decide.items():
            seconds = []
            for _ in range(calls):
                start = time.perf_counter()
                each()
                seconds.append(time.perf_counter() - start)
            turns[name].append(1e6 * float(np.median(seconds)))
    found = {name: np.quantile(values, (0.5, 0.25, 0.75)).round(1).tolist() for name, values in turns.items()}
    return {name: dict(zip(("median", "low", "high"), values, strict=True)) for name, values in found.items()}


def cpu_name() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def tables(results: dict[str, Any]) -> str:
    """The page of the results."""
    lines = [
        "Made by `python benchmarks/export/latency.py`. Microseconds for one decision, one thread, batch 1: the median, with",
        "the quartiles of the rounds. *controller* is the ONNX file as `robustness` and `trial` use it, Python around it.",
        f"{results['cpu']}; load average {results['load']:.1f} on {results['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        "",
        f"| policy | {PREDICT} | {ONNX} | {CONTROLLER} | {TORCHSCRIPT} | {PREDICT} / {ONNX} |",
        "|---|---|---|---|---|---|",
    ]
    for policy, found in results["policies"].items():
        cells = [
            "{median:.0f} ({low:.0f} to {high:.0f})".format(**found[way]) for way in (PREDICT, ONNX, CONTROLLER, TORCHSCRIPT)
        ]
        ratio = found[PREDICT]["median"] / found[ONNX]["median"]
        lines.append(f"| {policy} | {' | '.join(cells)} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write results and tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="Turns of each way")
    parser.add_argument("--calls", type=int, default=200, help="Decisions in a turn")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    policies = {}
    for name, make in POLICIES.items():
        with tempfile.TemporaryDirectory() as folder:
            policies[name] = measure(ways(*make(), Path(folder)), arguments.rounds, arguments.calls)
        print(name, policies[name], flush=True)
    results = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "calls": arguments.calls,
        "versions": installed_versions(("stable-baselines3", "torch", "onnxruntime", "numpy")),
        "policies": policies,
    }
    with atomic_write(RESULTS) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    with atomic_write(TABLES) as file:
        file.write(tables(results).encode())


if __name__ == "__main__":
    main()
