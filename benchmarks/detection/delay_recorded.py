"""
Measure how fast real collapses are noticed: plain TD3 finetuned on Hopper-v5, recorded by rescue.py.

    python benchmarks/detection/delay_recorded.py

The reference are the episodes that end within the warm-up, the stream those that follow. All rules have a false-alarm
probability of 5 % within 200 episodes: ours by calibration on the reference, the competitors by the thresholds that
delay_simulated.py has tuned on normal returns. Ours are also shown with the guard's first share of its default rate.
"""

import json
from collections.abc import Sequence

import numpy as np
from calibration import RESULTS, manifest
from delay_simulated import HORIZON, RATE, adwin_alarm, competitors, first_at_least
from rescue import RESULTS as RECORDED
from rescue import WARMUP_STEPS

from sb3_offline_ft import CollapseGuard
from sb3_offline_ft.collapse.detectors import DETECTORS, Detector, make_detector
from sb3_offline_ft.collapse.episodes import WITHIN_FREQ
from sb3_offline_ft.collapse.monitor import EpisodeMonitor
from sb3_offline_ft.common.io import atomic_write

GUARD = CollapseGuard()


def first_share() -> float:
    """The rate with which a guard of default settings begins."""
    monitor = EpisodeMonitor(GUARD.detector, GUARD.false_alarm_rate, GUARD.tolerance, GUARD.random_return)
    monitor.begin(np.arange(20.0).tolist())
    return monitor.detector.false_alarm_rate


def alarm_of(detector: Detector, episodes: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """
    Feed episodes until the alarm.

    :return: Number of finished episodes and number of steps until then
    """
    steps = 0
    for number, rewards in enumerate(episodes):
        if detector.needs_rewards:
            for length in range(WITHIN_FREQ, len(rewards), WITHIN_FREQ):
                if detector.update_within(rewards[:length]) is not None:
                    return number, steps + length
        steps += len(rewards)
        if detector.update(rewards if detector.needs_rewards else rewards.sum()) is not None:
            return number + 1, steps
    return None


def measure(seed: int, thresholds: dict[str, float]) -> dict[str, object]:
    with np.load(RECORDED / f"unguarded_seed{seed}.npz") as file:
        rewards, ends = file["rewards"].astype(np.float64), file["ends"]
    episodes = np.split(rewards[: ends[-1]], ends[:-1])
    n_reference = int((ends <= WARMUP_STEPS).sum())
    reference, stream = episodes[:n_reference], episodes[n_reference:]
    # The first episode of the stream began before the first update
    early = WARMUP_STEPS - int(ends[n_reference - 1])
    returns = np.array([episode.sum() for episode in episodes])
    alarms: dict[str, tuple[int, int] | None] = {}
    for rate, horizon in ((RATE, HORIZON), (first_share(), GUARD.horizon_episodes)):
        for name in DETECTORS:
            detector = make_detector(name, rate, horizon)
            detector.calibrate(reference if detector.needs_rewards else returns[:n_reference])
            alarms[f"{name} ({rate:.1%} in {horizon})"] = alarm_of(detector, stream)
    lasting = np.cumsum([len(episode) for episode in stream])
    for name, path in competitors().items():
        index = first_at_least(path(returns[:n_reference], returns[n_reference:]), thresholds[name])
        alarms[name] = None if index is None else (index + 1, int(lasting[index]))
    if "river ADWIN" in thresholds:
        index = adwin_alarm(returns[:n_reference], returns[n_reference:], thresholds["river ADWIN"])
        alarms["river ADWIN"] = None if index is None else (index + 1, int(lasting[index]))
    return {
        "seed": seed,
        "reference": {"n": n_reference, "mean": returns[:n_reference].mean(), "sd": returns[:n_reference].std(ddof=1)},
        "first_returns": returns[n_reference : n_reference + 10].round(1).tolist(),
        "alarms": {
            name: None if alarm is None else {"episodes": alarm[0], "steps": alarm[1] - early}
            for name, alarm in alarms.items()
        },
    }


def main() -> None:
    facts = manifest("scipy", "river")
    simulated = json.loads((RESULTS / "delay_simulated.json").read_text())
    thresholds = simulated["populations"]["normal"]["thresholds"]
    seeds = sorted(int(path.stem.rpartition("seed")[2]) for path in RECORDED.glob("unguarded_seed*.npz"))
    results = [measure(seed, thresholds) for seed in seeds]
    with atomic_write(RESULTS / "delay_recorded.json") as file:
        file.write((json.dumps({"manifest": facts, "thresholds": thresholds, "runs": results}, indent=1) + "\n").encode())
    lines = [
        "# Delay of alarms, real collapses",
        "",
        "Plain TD3 on Hopper-v5 from weights pretrained with TD3BC. Finished episodes / environment steps from the first "
        "update to the first alarm.",
        "",
        "| detector | " + " | ".join(f"seed {seed}" for seed in seeds) + " | median steps |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for name in results[0]["alarms"]:
        cells = [result["alarms"][name] for result in results]
        steps = [np.inf if cell is None else cell["steps"] for cell in cells]
        shown = ["none" if cell is None else f"{cell['episodes']} / {cell['steps']}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {np.median(steps):.0f} |")
    lines += [
        "",
        "Reference episodes: "
        + ", ".join(
            f"{result['reference']['n']} (mean {result['reference']['mean']:.0f}, SD {result['reference']['sd']:.0f})"
            for result in results
        )
        + ".",
    ]
    with atomic_write(RESULTS / "delay_recorded.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
