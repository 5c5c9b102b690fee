"""
Measure how often the detectors of collapse alarm although nothing has changed.

    python benchmarks/detection/calibration.py             # measure what is missing, then write the tables
    python benchmarks/detection/calibration.py --report    # write the tables from the results that are there

Each run draws a fresh reference and a fresh stream from the same population, calibrates a detector and monitors the stream
up to the horizon. Recorded populations (see record_streams.py) are drawn with replacement from all recorded episodes.
Results are saved after each cell, with what it was measured by, and cells that are there are skipped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from sb3_offline_ft.collapse.detectors import Detector, make_detector
from sb3_offline_ft.common.io import atomic_write

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "speed"))
from machine import manifest  # noqa: E402  # as in the other benchmark

STREAMS, RESULTS = HERE / "streams", HERE / "results"
N_RUNS = 2000
N_SEEDS = 20  # of the simulations that a CUSUM threshold comes from, taken in turn
MAX_STEPS = 50

Draw = Callable[[np.random.Generator, int], np.ndarray]

SYNTHETIC: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "-lognormal": lambda rng, n: -np.exp(rng.normal(size=n)),
    "two modes 90/10": lambda rng, n: np.where(rng.random(n) < 0.1, -10.0, 0.0) + rng.normal(size=n),
    "two modes 50/50": lambda rng, n: np.where(rng.random(n) < 0.5, -10.0, 0.0) + rng.normal(size=n),
    "rare low mode 5 %": lambda rng, n: np.where(rng.random(n) < 0.05, -10.0, 0.0) + rng.normal(size=n),
    "t(3)": lambda rng, n: rng.standard_t(3, n),
}
RECORDED = ("td3-hopper", "sac-hopper", "sac-halfcheetah", "sac-pendulum")

# (detectors, populations, sizes of the reference, false-alarm rate, horizon)
PLAN: list[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], float, int]] = [
    (("cusum", "betting"), (*SYNTHETIC, *RECORDED), (10, 20, 30), 0.05, 200),
    (("deterioration",), ("normal", "td3-hopper"), (10, 20, 30), 0.05, 200),
    (("deterioration",), ("two modes 90/10", "sac-pendulum"), (10, 30), 0.05, 200),
    (("deterioration",), ("-lognormal", "t(3)"), (10,), 0.05, 200),
    (("deterioration",), ("sac-halfcheetah",), (20,), 0.05, 200),
    (("cusum",), ("normal", "two modes 90/10", "td3-hopper"), (20,), 0.01, 1000),
    (("betting",), ("td3-hopper",), (20,), 0.01, 1000),
]
N_SIMULATIONS = {("deterioration", 200): 1000}  # a threshold for each run costs most of the time


def load_streams(path: Path) -> dict[str, list[np.ndarray]]:
    """
    Read recorded rewards.

    :param path: Folder of the files that record_streams.py wrote
    :return: For each stream the per-step rewards of its episodes
    """
    streams = {}
    for file in sorted(path.glob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            streams[file.stem] = np.split(arrays["rewards"].astype(np.float64), ends)
    return streams


def as_episodes(rng: np.random.Generator, returns: np.ndarray) -> list[np.ndarray]:
    """
    Turn returns into rewards that add up to them: 25 to 50 steps with AR(1) noise whose sum is 0.

    :param rng: Source of randomness
    :param returns: Shape (n_episodes,)
    :return: Rewards of each episode
    """
    episodes = []
    for value in returns:
        noise = rng.normal(size=int(rng.integers(MAX_STEPS // 2, MAX_STEPS + 1)))
        for step in range(1, len(noise)):
            noise[step] += 0.8 * noise[step - 1]
        episodes.append(value / len(noise) + 0.1 * (noise - noise.mean()))
    return episodes


def draw(rng: np.random.Generator, population: str, n: int, rewards: bool, streams: dict[str, list[np.ndarray]]) -> list[Any]:
    """
    Draw episodes.

    :param rng: Source of randomness
    :param population: Name in ``SYNTHETIC`` or of a recorded stream
    :param n: How many
    :param rewards: Rewards instead of returns
    :param streams: The recorded streams
    :return: Returns, or rewards of each episode
    """
    if population in SYNTHETIC:
        returns = SYNTHETIC[population](rng, n)
        return as_episodes(rng, returns) if rewards else list(returns)
    episodes = [streams[population][i] for i in rng.integers(len(streams[population]), size=n)]
    return episodes if rewards else [float(episode.sum()) for episode in episodes]


def monitor(detector: Detector, episodes: list[Any]) -> bool:
    """
    Monitor a stream.

    :param detector: A calibrated detector
    :param episodes: The stream
    :return: Whether there was an alarm
    """
    return any(detector.update(episode) is not None for episode in episodes)


def measure(
    detector: str, population: str, n_reference: int, rate: float, horizon: int, streams: dict[str, list[np.ndarray]]
) -> dict[str, Any]:
    """
    Measure one cell of the table.

    :return: Counts and the exact 95 % confidence interval (Clopper-Pearson)
    """
    facts, seconds, n_alarms = manifest("scipy"), time.perf_counter(), 0
    label = f"{detector}, {population}, {n_reference}, {rate}/{horizon}"
    n_simulations = N_SIMULATIONS.get((detector, horizon))
    for run in tqdm(range(N_RUNS), desc=label, mininterval=5):
        rng = np.random.default_rng([run, n_reference, horizon])
        seed = run if detector == "deterioration" else run % N_SEEDS
        kind = make_detector({detector: {"n_simulations": n_simulations, "seed": seed}}, rate, horizon)
        episodes = draw(rng, population, n_reference + horizon, kind.needs_rewards, streams)
        kind.calibrate(episodes[:n_reference])
        n_alarms += monitor(kind, episodes[n_reference:])
    interval = binomtest(n_alarms, N_RUNS).proportion_ci(0.95, method="exact")
    return {
        "detector": detector,
        "population": population,
        "n_reference": n_reference,
        "promised": rate,
        "horizon": horizon,
        "n_runs": N_RUNS,
        "n_false_alarms": n_alarms,
        "measured": n_alarms / N_RUNS,
        "low": float(interval.low),
        "high": float(interval.high),
        "seconds": round(time.perf_counter() - seconds, 1),
        "manifest": facts,
    }


def report(cells: dict[str, dict[str, Any]]) -> str:
    """
    Lay the results out.

    :param cells: Results by key
    :return: Markdown
    """
    n_runs = " or ".join(map(str, sorted({cell["n_runs"] for cell in cells.values()})))
    lines = [
        "# False alarms of the detectors of collapse",
        "",
        f"Share of {n_runs} runs that end in a false alarm within the horizon, with the exact 95 % confidence interval "
        "(Clopper-Pearson). Each run has its own reference and stream. A cell whose whole interval is above the promised "
        "rate is marked with **!**.",
    ]
    for rate, horizon in sorted({(cell["promised"], cell["horizon"]) for cell in cells.values()}, reverse=True):
        here = [cell for cell in cells.values() if (cell["promised"], cell["horizon"]) == (rate, horizon)]
        sizes = sorted({cell["n_reference"] for cell in here})
        lines += ["", f"## Promised: at most {rate:.0%} within {horizon} episodes", ""]
        lines += ["| detector | population | " + " | ".join(f"{size} reference episodes" for size in sizes) + " |"]
        lines += ["|---|---|" + "---|" * len(sizes)]
        for detector, population in dict.fromkeys((cell["detector"], cell["population"]) for cell in here):
            row = []
            for size in sizes:
                key = cell_key(detector, population, size, rate, horizon)
                cell = cells.get(key)
                mark = " **!**" if cell and cell["low"] > rate else ""
                row.append(f"{cell['measured']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]{mark}" if cell else "")
            lines.append(f"| {detector} | {population} | " + " | ".join(row) + " |")
    marked = sum(cell["low"] > cell["promised"] for cell in cells.values())
    lines += ["", f"{marked} of {len(cells)} intervals are above the promised rate."]
    return "\n".join(lines) + "\n"


def cell_key(detector: str, population: str, n_reference: int, rate: float, horizon: int) -> str:
    return f"{detector}|{population}|{n_reference}|{rate}|{horizon}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    path = RESULTS / "calibration.json"
    saved = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    cells = saved["cells"]
    streams = {} if arguments.report else load_streams(STREAMS)
    for detectors, populations, sizes, rate, horizon in [] if arguments.report else PLAN:
        for detector in detectors:
            for population in populations:
                if population in RECORDED and population not in streams:
                    print(f"Skipped {population}: {STREAMS} has no recording of it, see record_streams.py.")
                    continue
                for size in sizes:
                    key = cell_key(detector, population, size, rate, horizon)
                    if key in cells:
                        continue
                    cells[key] = measure(detector, population, size, rate, horizon, streams)
                    with atomic_write(path) as file:
                        file.write((json.dumps(saved, indent=1) + "\n").encode())
    with atomic_write(RESULTS / "calibration.md") as file:
        file.write(report(cells).encode())


if __name__ == "__main__":
    main()
