"""
How much slower Adam becomes by the fading moments of units that are never active, and what clearing them gives.

    python benchmarks/speed/subnormal.py    # half a minute; writes results/<cpu>-subnormal.json
"""

import json
import time
import warnings
from typing import Any

import numpy as np
import torch as th
from machine import manifest, slug
from report import RESULTS
from worker import use_cores

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.update import FastKernel, adam

SMALLEST_NORMAL = 1.1754944e-38
STEPS, REPEATS = 2_000, 50


def measure(clear_every: int) -> dict[str, float]:
    """
    :param clear_every: Steps of the optimizer after which tiny moments are cleared
    :return: Microseconds of a step of the critics' Adam, and the share of its first moments that are subnormal
    """
    adam.CLEAR_EVERY = clear_every
    model = OfflineTD3("MlpPolicy", "Hopper-v5", policy_kwargs={"layer_norm": False}, seed=0, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trains online like TD3")
        model.learn(300)
    model.train(STEPS, 256)
    kernel: Any = model.updater.kernel
    assert isinstance(kernel, FastKernel)
    first = kernel.critic_adam._first
    share = float(((first != 0) & (first.abs() < SMALLEST_NORMAL)).float().mean())
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        kernel.critic_adam.step()
        seconds.append(time.process_time() - start)
    return {"microseconds": 1e6 * float(np.median(seconds)), "subnormal": share}


def main() -> None:
    """Measure both and write them."""
    use_cores(1)
    th.set_num_threads(1)
    content = {"manifest": manifest(), "steps": STEPS, "cleared": measure(adam.CLEAR_EVERY), "kept": measure(2**62)}
    path = RESULTS / f"{slug()}-subnormal.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    for name in ("kept", "cleared"):
        print(name, content[name])


if __name__ == "__main__":
    main()
