"""Measure how fast and how lean datasets load; prints JSON.

    python benchmarks/speed/loading.py [spec ...] > benchmarks/speed/loading.json

Without arguments: the bundled datasets, ten copies of the bundled Hopper data as one hdf5 dataset (1,000,450 transitions),
and one copy in Arrow and Parquet, all written by Minari into a temporary folder. Each spec is loaded in a fresh process
after one load to warm the file cache; the peak is the growth of the process's resident memory in the first load (Linux).
pyarrow's pools take some 60 MB whatever the size of the data, which dominates the peak of the small Arrow and Parquet sets.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from machine import manifest

ROUNDS = 5

MEASURE = """
import json, re, sys, time
from sb3_offline_ft.datasets import load_dataset
import h5py, pyarrow.parquet
def peak():
    # ru_maxrss would include the parent process at the time of the fork.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
load_dataset("bundled:pendulum-medium")
before, grown, seconds, cpu_seconds = peak(), None, [], []
for _ in range(int(sys.argv[2]) + 1):
    dataset = None
    begin, cpu_begin = time.perf_counter(), time.process_time()
    dataset = load_dataset(sys.argv[1])
    seconds.append(time.perf_counter() - begin)
    cpu_seconds.append(time.process_time() - cpu_begin)
    grown = peak() - before if grown is None else grown
print(json.dumps({
    "transitions": len(dataset), "episodes": dataset.n_episodes, "columns_bytes": dataset.nbytes,
    "peak_bytes": grown, "peak_over_columns": round(grown / dataset.nbytes, 2),
    "seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "fingerprint": dataset.fingerprint,
}))
"""


def measure(spec: str) -> dict[str, Any]:
    """Load one spec ``ROUNDS`` times in a fresh process.

    :param spec: What to load.
    :return: Throughput in transitions per second (median, best) and per second of CPU time, which other load on the machine
        disturbs less, and peak memory in bytes and relative to the columns.
    """
    command = [sys.executable, "-c", MEASURE, spec, str(ROUNDS)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    seconds, cpu_seconds = result.pop("seconds"), result.pop("cpu_seconds")
    result["transitions_per_second_median"] = round(result["transitions"] / statistics.median(seconds))
    result["transitions_per_second_best"] = round(result["transitions"] / min(seconds))
    result["transitions_per_cpu_second_median"] = round(result["transitions"] / statistics.median(cpu_seconds))
    return result


def write_hopper(data_format: str, copies: int) -> str:
    """Write the bundled Hopper data with Minari itself.

    :param data_format: A Minari storage format.
    :param copies: How many times over.
    :return: The id of the dataset.
    """
    import minari
    from minari.data_collector import EpisodeBuffer

    from sb3_offline_ft.datasets import load_dataset

    dataset = load_dataset("bundled:hopper-medium")
    buffers = []
    for _ in range(copies):
        for start, length in zip(dataset.episode_starts, dataset.episode_lengths, strict=True):
            rows = slice(start, start + length)
            observations: Any = np.concatenate([dataset.observations[rows], dataset.next_observations[rows][-1:]]).astype(
                np.float64
            )
            buffers.append(
                EpisodeBuffer(
                    observations=observations,
                    actions=list(dataset.actions[rows]),
                    rewards=list(dataset.rewards[rows]),
                    terminations=list(dataset.terminations[rows]),
                    truncations=list(dataset.truncations[rows]),
                )
            )
    dataset_id = f"benchmark/hopper-{data_format}-v0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            data_format=data_format,
        )
    return dataset_id


def main() -> None:
    """Measure the specs named on the command line, else the standard ones."""
    facts = manifest("minari", "h5py", "pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        specs = sys.argv[1:]
        if not specs:
            os.environ["MINARI_DATASETS_PATH"] = folder
            specs = ["bundled:hopper-medium", "bundled:pendulum-medium"]
            # Minari sums up the sizes of all files after each episode: ten copies in Arrow would take it half an hour.
            specs += [write_hopper("hdf5", 10), write_hopper("arrow", 1), write_hopper("parquet", 1)]
        results = {Path(spec).name if os.path.exists(spec) else spec: measure(spec) for spec in specs}
    print(json.dumps({"manifest": facts, "rounds": ROUNDS, "results": results}, indent=1))


if __name__ == "__main__":
    main()
