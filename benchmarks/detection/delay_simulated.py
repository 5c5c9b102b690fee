"""
Measure how fast declines are noticed at equal rates of false alarms.

    python benchmarks/detection/delay_simulated.py             # measure what is missing, then write the tables
    python benchmarks/detection/delay_simulated.py --report    # write the tables from the results that are there

The detectors of this library are calibrated on a reference of 20 episodes alone. The competitors are the rule "the mean of the
last 5 returns is below the reference's mean by t standard deviations", and river's PageHinkley and ADWIN if river is
installed. These have no level, so their thresholds are tuned beforehand on simulated streams of the very population to the
same probability of a false alarm; users cannot do that.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from calibration import RESULTS, STREAMS, as_episodes, load_streams, manifest
from tqdm import tqdm

from sb3_offline_ft.collapse.detectors import DETECTORS, CusumDetector, make_detector
from sb3_offline_ft.common.io import atomic_write

try:
    from river import drift as river_drift
except ImportError:
    river_drift = None

RATE, HORIZON, CHANGE, N_REFERENCE = 0.05, 200, 50, 20
N_RUNS, N_TUNING = 1000, 4000
COLLAPSED_STEPS = 20  # a collapsed hopper falls at once
SCENARIOS: dict[str, float] = {"0.5 SD": 0.5, "1 SD": 1.0, "2 SD": 2.0, "collapse": math.inf}
POPULATIONS = ("normal", "td3-hopper")

LORDEN_SHIFTS, LORDEN_REFERENCES, LORDEN_STEPS = (0.5, 1.0, 2.0), (20, 30, 100, 1000), 600

Paths = Callable[[np.ndarray, np.ndarray], np.ndarray]


def draw(population: str, n: int, rng: np.random.Generator, streams: dict[str, list[np.ndarray]]) -> list[np.ndarray]:
    """
    Draw episodes.

    :return: Per-step rewards of each
    """
    if population == "normal":
        return as_episodes(rng, rng.normal(size=n))
    return [streams[population][i] for i in rng.integers(len(streams[population]), size=n)]


def decline(episodes: list[np.ndarray], scenario: str, population: str, deviation: float) -> list[np.ndarray]:
    """
    Make episodes worse, the return by a number of standard deviations or to next to nothing.

    :param deviation: Standard deviation of the population's returns
    :return: Rewards of each episode
    """
    shift = SCENARIOS[scenario]
    if math.isfinite(shift):
        return [rewards - shift * deviation / len(rewards) for rewards in episodes]
    if population == "normal":
        return [rewards - 50 * deviation / len(rewards) for rewards in episodes]
    return [rewards[:COLLAPSED_STEPS] for rewards in episodes]


def mean_of_five(reference: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Statistic of the fixed rule, -inf before the 5th episode; shape (n_stream,)."""
    z = (reference.mean() - stream) / reference.std(ddof=1)
    sums = np.convolve(z, np.ones(5))[: len(z)] / 5
    sums[:4] = -np.inf
    return sums


def page_hinkley(delta: float) -> Paths:
    """Statistic of river's PageHinkley, fed with the standardised reference and stream."""

    def path(reference: np.ndarray, stream: np.ndarray) -> np.ndarray:
        detector = river_drift.PageHinkley(
            min_instances=len(reference) + 1, delta=delta, threshold=math.inf, alpha=1 - 1e-4, mode="down"
        )
        mean, deviation = reference.mean(), reference.std(ddof=1)
        statistics = []
        for x in np.concatenate([reference, stream]):
            detector.update((x - mean) / deviation)
            statistics.append(detector._max_decrease - detector._sum_decrease)
        return np.array(statistics[len(reference) :])

    return path


def adwin_alarm(reference: np.ndarray, stream: np.ndarray, delta: float) -> int | None:
    """Index of the first episode at which river's ADWIN notices a change for the worse."""
    detector = river_drift.ADWIN(delta=delta, clock=1)
    mean, deviation = reference.mean(), reference.std(ddof=1)
    for i, x in enumerate(np.concatenate([reference, stream])):
        before = detector.estimation
        detector.update((x - mean) / deviation)
        if detector.drift_detected and i >= len(reference) and detector.estimation < before:
            return i - len(reference)
    return None


def draw_returns(population: str, n: int, rng: np.random.Generator, returns: np.ndarray) -> np.ndarray:
    """Returns only, which are cheaper than rewards; ``returns`` are those of the recorded population."""
    return rng.normal(size=n) if population == "normal" else returns[rng.integers(len(returns), size=n)]


def tune(population: str, returns: np.ndarray) -> dict[str, float]:
    """
    Tune the competitors on the population.

    :return: Threshold of each
    """
    rng = np.random.default_rng(99)
    draws = [draw_returns(population, N_REFERENCE + HORIZON, rng, returns) for _ in range(N_TUNING)]
    pairs = [(values[:N_REFERENCE], values[N_REFERENCE:]) for values in draws]
    thresholds = {}
    for name, path in competitors().items():
        maxima = [path(*pair).max() for pair in tqdm(pairs, desc=f"tuning {name}", mininterval=5)]
        thresholds[name] = float(np.quantile(maxima, 1 - RATE))
    if river_drift is not None:
        low, high = -12.0, 0.0
        for _ in tqdm(range(10), desc="tuning ADWIN"):
            middle = (low + high) / 2
            rate = np.mean([adwin_alarm(*pair, delta=10**middle) is not None for pair in pairs[:2000]])
            low, high = (middle, high) if rate <= RATE else (low, middle)
        thresholds["river ADWIN"] = 10**low
    return thresholds


def competitors() -> dict[str, Paths]:
    paths: dict[str, Paths] = {"mean of 5": mean_of_five}
    if river_drift is not None:
        paths |= {"river PageHinkley, delta 0.005": page_hinkley(0.005), "river PageHinkley, delta 0.5": page_hinkley(0.5)}
    return paths


def first_at_least(path: np.ndarray, threshold: float) -> int | None:
    found = np.flatnonzero(path >= threshold)
    return int(found[0]) if len(found) else None


def summary(alarms: list[int | None], change: int, n_steps: int) -> dict[str, float]:
    """
    Summarise when a detector alarmed.

    :param alarms: Index of the first alarming episode of each run
    :return: Share of alarms before the change; of the other runs the share that noticed it, and the mean and median
        number of episodes until then, at most all that there were
    """
    false = [alarm is not None and alarm < change for alarm in alarms]
    delays = np.array(
        [
            n_steps - change if alarm is None else alarm - change + 1
            for alarm, wrong in zip(alarms, false, strict=True)
            if not wrong
        ]
    )
    noticed = np.mean([alarm is not None for alarm, wrong in zip(alarms, false, strict=True) if not wrong])
    return {
        "false_before": float(np.mean(false)),
        "noticed": float(noticed),
        "mean": float(delays.mean()),
        "median": float(np.median(delays)),
        "mean_error": float(delays.std() / math.sqrt(len(delays))),
    }


def measure(population: str, streams: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """
    Measure all detectors and scenarios on one population.

    :return: Thresholds of the competitors, and a summary by detector and scenario
    """
    facts = manifest("scipy", "river")
    recorded = np.array([rewards.sum() for rewards in streams.get(population, [])])
    deviation = 1.0 if population == "normal" else float(recorded.std())
    thresholds = tune(population, recorded)
    alarms: dict[str, dict[str, list[int | None]]] = {}
    for run in tqdm(range(N_RUNS), desc=population, mininterval=5):
        rng = np.random.default_rng([run, 7])
        episodes = draw(population, N_REFERENCE + HORIZON, rng, streams)
        reference, stream = episodes[:N_REFERENCE], episodes[N_REFERENCE:]
        reference_returns = np.array([rewards.sum() for rewards in reference])
        detectors = {}
        for name in DETECTORS:
            options = {"n_simulations": 1000, "seed": run} if name == "deterioration" else {"seed": run % 20}
            detectors[name] = make_detector({name: options}, RATE, HORIZON)
            detectors[name].calibrate(reference if detectors[name].needs_rewards else reference_returns)
        for scenario in SCENARIOS:
            rewards = stream[:CHANGE] + decline(stream[CHANGE:], scenario, population, deviation)
            returns = np.array([episode.sum() for episode in rewards])
            result: dict[str, int | None] = {}
            for name, detector in detectors.items():
                detector.reset()
                xs = rewards if detector.needs_rewards else returns
                result[name] = next((i for i, x in enumerate(xs) if detector.update(x) is not None), None)
            for name, path in competitors().items():
                result[name] = first_at_least(path(reference_returns, returns), thresholds[name])
            if river_drift is not None:
                result["river ADWIN"] = adwin_alarm(reference_returns, returns, thresholds["river ADWIN"])
            for name, alarm in result.items():
                alarms.setdefault(name, {}).setdefault(scenario, []).append(alarm)
    return {
        "manifest": facts,
        "n_runs": N_RUNS,
        "thresholds": thresholds,
        "delays": {
            name: {scenario: summary(of, CHANGE, HORIZON) for scenario, of in by_scenario.items()}
            for name, by_scenario in alarms.items()
        },
    }


def known_cusum(shift: float) -> dict[str, float]:
    """
    The CUSUM that knows the distributions before and after the change, at the same rate of false alarms.

    :return: Summary of its delays
    """
    rng = np.random.default_rng(5)

    def path(values: np.ndarray) -> np.ndarray:
        sums, total = np.zeros_like(values), np.zeros(len(values))
        for step in range(values.shape[1]):
            total = np.maximum(0.0, total - values[:, step] - shift / 2)
            sums[:, step] = total
        return sums

    threshold = float(np.quantile(path(rng.normal(size=(20_000, HORIZON))).max(axis=1), 1 - RATE))
    values = rng.normal(size=(N_RUNS, CHANGE + LORDEN_STEPS))
    values[:, CHANGE:] -= shift
    return summary([first_at_least(sums, threshold) for sums in path(values)], CHANGE, CHANGE + LORDEN_STEPS)


def lorden() -> dict[str, Any]:
    """
    Compare CUSUM with Lorden's bound for shifts of normal returns.

    :return: By shift the bound in episodes, and summaries by size of the reference
    """
    average_run_length = HORIZON / -math.log(1 - RATE)
    facts = manifest("scipy")
    results: dict[str, Any] = {"manifest": facts, "average_run_length": average_run_length, "shifts": {}}
    for shift in LORDEN_SHIFTS:
        bound = math.log(average_run_length) / (shift**2 / 2)
        entry: dict[str, Any] = {"bound": bound, "known": known_cusum(shift)}
        for n_reference in LORDEN_REFERENCES:
            alarms: list[int | None] = []
            for run in tqdm(range(N_RUNS), desc=f"Lorden, {shift} SD, {n_reference}", mininterval=5):
                rng = np.random.default_rng([run, 11])
                reference = rng.normal(size=n_reference)
                values = rng.normal(size=CHANGE + LORDEN_STEPS)
                values[CHANGE:] -= shift
                detector = CusumDetector(RATE, HORIZON, drift=shift / 2)
                detector.calibrate(reference)
                alarms.append(next((i for i, x in enumerate(values) if detector.update(x) is not None), None))
            entry[str(n_reference)] = summary(alarms, CHANGE, CHANGE + LORDEN_STEPS)
        results["shifts"][str(shift)] = entry
    return results


def report(results: dict[str, Any]) -> str:
    """
    Lay the results out.

    :return: Markdown
    """
    populations = results.get("populations", {})
    # Once the number of runs was not recorded
    n_runs = " or ".join(sorted({str(result.get("n_runs", N_RUNS)) for result in populations.values()}))
    lines = [
        "# Delay of alarms, simulated",
        "",
        f"Change at episode {CHANGE} of {HORIZON}, reference of {N_REFERENCE} episodes, {n_runs} runs, false-alarm "
        f"probability {RATE:.0%} within {HORIZON} episodes. Mean / median number of episodes from the change to the alarm; "
        f"runs without alarm count as {HORIZON - CHANGE}; in brackets the share of runs that noticed the change. Runs with an "
        "alarm before the change are left out (last column: their share).",
        "",
        "The rules below the first three are told more: their thresholds are tuned on the population itself. So they may "
        "count on its tails, and take a single return far outside for a collapse, which a reference of 20 episodes cannot "
        "justify. On recorded rewards a decline is a constant taken from each step's reward, which suits the deterioration "
        "detector.",
    ]
    for population, result in populations.items():
        lines += ["", f"## {population}", "", "| detector | " + " | ".join(SCENARIOS) + " | before |"]
        lines += ["|---|" + "---|" * (len(SCENARIOS) + 1)]
        for name, by_scenario in result["delays"].items():
            row = [f"{of['mean']:.1f} / {of['median']:.0f} ({of['noticed']:.0%})" for of in by_scenario.values()]
            before = next(iter(by_scenario.values()))["false_before"]
            lines.append(f"| {name} | " + " | ".join(row) + f" | {before:.1%} |")
        tuned = ", ".join(f"{name} {value:.3g}" for name, value in result["thresholds"].items())
        lines += ["", f"Tuned: {tuned}."]
    if "lorden" in results:
        arl = results["lorden"]["average_run_length"]
        lines += [
            "",
            "## CUSUM and Lorden's bound",
            "",
            f"Mean / median delay in episodes (share that noticed within {LORDEN_STEPS}), and the ratio of the mean to "
            "Lorden's (1971) lower bound log(ARL) / KL for normal returns, at the mean time to a false alarm "
            f"ARL = {HORIZON} / -log(1 - {RATE}) = {arl:.0f}; drift is half the shift. The bound is of first order in ARL; "
            'the "known" CUSUM, which is told both distributions, shows what is attainable at this ARL.',
            "",
            "| shift | bound | known | " + " | ".join(f"{n} reference episodes" for n in LORDEN_REFERENCES) + " |",
            "|---|---|---|" + "---|" * len(LORDEN_REFERENCES),
        ]
        for shift, entry in results["lorden"]["shifts"].items():
            row = []
            for key in ("known", *map(str, LORDEN_REFERENCES)):
                of = entry[key]
                row.append(
                    f"{of['mean']:.1f} / {of['median']:.0f} ({of['noticed']:.0%}), ratio {of['mean'] / entry['bound']:.2f}"
                )
            lines.append(f"| {shift} SD | {entry['bound']:.1f} | " + " | ".join(row) + " |")
    if any("river ADWIN" not in result["thresholds"] for result in populations.values()):
        lines += ["", "Where river was not installed, PageHinkley and ADWIN are missing."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    path = RESULTS / "delay_simulated.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save() -> None:
        with atomic_write(path) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())

    if not arguments.report:
        streams = load_streams(STREAMS)
        for population in POPULATIONS:
            if population not in results.setdefault("populations", {}):
                results["populations"][population] = measure(population, streams)
                save()
        if "lorden" not in results:
            results["lorden"] = lorden()
            save()
    with atomic_write(RESULTS / "delay_simulated.md") as file:
        file.write(report(results).encode())


if __name__ == "__main__":
    main()
