"""
Measure how much memory a run with 1,000,000 Hopper transitions takes at its peak, next to SB3's.

    python benchmarks/speed/memory.py            # some three minutes
    python benchmarks/speed/memory.py --quick    # 100,000 rows, once

Each case is a fresh process with Hopper-v5's own spaces (float64 observations): make the learner, fill it, take 200 gradient
steps. The peak is that of the resident memory of the whole process, Python and torch included: the median of the repeats.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from candidates import BATCH_SIZE, HIDDEN, REFERENCE, SHAPES
from machine import manifest, slug

HERE = Path(__file__).parent
PARTS = HERE.parents[1] / "logs" / "speed"
ENV = "Hopper-v5"
SHAPE = SHAPES["hopper"]
ROWS, STEPS = 1_000_000, 200
CHUNK = 1_000
TIMEOUT = 900
LABELS = {
    REFERENCE: "SB3 TD3, rows in its replay buffer",
    "td3bc-offline": "TD3BC, rows in its dataset, pretraining",
    "td3bc-online": "TD3BC, rows in its replay buffer, online updates",
}


def peak() -> int:
    """
    :return: Largest resident memory of this process until now, in bytes
    """
    status = Path("/proc/self/status")
    if not status.exists():
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest
    # ru_maxrss would include the parent process at the time of the fork
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def fill(buffer: Any, rows: int) -> None:
    """
    :param buffer: A replay buffer of SB3
    :param rows: Number of transitions to add
    """
    import numpy as np

    rng, never = np.random.default_rng(0), np.zeros(1, dtype=bool)
    for start in range(0, rows, CHUNK):
        observations = rng.normal(size=(CHUNK + 1, 1, SHAPE.observation))
        actions = rng.uniform(-1, 1, size=(CHUNK, 1, SHAPE.action)).astype(np.float32)
        rewards = rng.normal(size=(CHUNK, 1))
        for row in range(min(CHUNK, rows - start)):
            buffer.add(observations[row], observations[row + 1], actions[row], rewards[row], never, [{}])


def sb3(rows: int) -> None:
    from stable_baselines3 import TD3

    model = TD3("MlpPolicy", ENV, buffer_size=rows, policy_kwargs={"net_arch": [HIDDEN, HIDDEN]}, seed=0, device="cpu")
    _online(model, rows)


def td3bc_online(rows: int) -> None:
    from sb3_offline_ft import TD3BC

    _online(TD3BC("MlpPolicy", ENV, buffer_size=rows, seed=0, device="cpu"), rows)


def _online(model: Any, rows: int) -> None:
    from stable_baselines3.common.logger import Logger

    model.set_logger(Logger(None, []))
    fill(model.replay_buffer, rows)
    model.train(STEPS, BATCH_SIZE)


def td3bc_offline(rows: int) -> None:
    import gymnasium as gym
    import numpy as np

    from sb3_offline_ft import TD3BC, OfflineDataset

    rng, env = np.random.default_rng(0), gym.make(ENV)
    columns = {
        "observations": rng.standard_normal((rows, SHAPE.observation), dtype=np.float32),
        "actions": 2 * rng.random((rows, SHAPE.action), dtype=np.float32) - 1,
        "rewards": rng.standard_normal(rows, dtype=np.float32),
        "next_observations": np.empty((rows, SHAPE.observation), dtype=np.float32),
        "terminations": np.zeros(rows, dtype=bool),
        "truncations": np.arange(1, rows + 1) % 1_000 == 0,
    }
    columns["next_observations"][:-1] = columns["observations"][1:]
    columns["next_observations"][-1] = columns["observations"][0]
    dataset = OfflineDataset.from_columns(**columns, action_space=env.action_space, copy=False)
    TD3BC("MlpPolicy", env, buffer_size=rows, seed=0, device="cpu", dataset=dataset).pretrain(STEPS)


CASES: dict[str, Callable[[int], None]] = {REFERENCE: sb3, "td3bc-offline": td3bc_offline, "td3bc-online": td3bc_online}


def run_case(name: str, rows: int) -> None:
    """
    Run a case and print its peak.

    :param name: Of the case
    :param rows: Number of transitions
    """
    import stable_baselines3  # noqa: F401  # loaded before the baseline is taken
    import torch as th

    if name != REFERENCE:
        import sb3_offline_ft  # noqa: F401
    th.set_num_threads(1)
    after_imports = peak()
    CASES[name](rows)
    print(json.dumps({"peak": peak(), "after_imports": after_imports}))


def measure(name: str, rows: int, repeats: int) -> dict[str, Any]:
    """
    :param name: Of the case
    :param rows: Number of transitions
    :param repeats: Fresh processes, one after the other
    :return: Its peak
    """
    command = [sys.executable, str(HERE / "memory.py"), "--case", name, "--rows", str(rows)]
    found = []
    for _ in range(repeats):
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if process.returncode != 0:
            sys.exit(f"{LABELS[name]} failed: {process.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(process.stdout.splitlines()[-1]))
    peaks = [entry["peak"] for entry in found]
    after_imports = statistics.median(entry["after_imports"] for entry in found)
    return {
        "name": name,
        "label": LABELS[name],
        "peak": statistics.median(peaks),
        "peaks": peaks,
        "after_imports": after_imports,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="number of transitions (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer rows, once: shows whether it works, and no more")
    parser.add_argument("--case", choices=tuple(CASES), help="run this one here and print its peak")
    arguments = parser.parse_args()
    if arguments.case is not None:
        run_case(arguments.case, arguments.rows)
        return
    # Here, so that the cases' processes do without what they import
    from report import MEMORY, RESULTS, fill_readme, memory_markdown

    from sb3_offline_ft.common.io import atomic_write

    whole = not arguments.quick and arguments.rows == ROWS
    rows, repeats = (ROWS // 10, 1) if arguments.quick else (arguments.rows, arguments.repeats)
    facts = manifest() | {"command": "python benchmarks/speed/memory.py" + (" --quick" if arguments.quick else "")}
    cases = []
    for name in CASES:
        cases.append(measure(name, rows, repeats))
        print(f"{cases[-1]['label']}: {cases[-1]['peak'] / 1e6:.0f} MB", flush=True)
    for case in cases:
        case["ratio"] = case["peak"] / cases[0]["peak"]
    content = {"rows": rows, "steps": STEPS, "repeats": repeats, "manifest": facts, "cases": cases}
    folder = RESULTS if whole else PARTS
    with atomic_write(folder / f"{slug()}{MEMORY}") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    print(memory_markdown(content))
    if whole:
        fill_readme()


if __name__ == "__main__":
    main()
