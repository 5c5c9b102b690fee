"""Numbers that were written into texts by hand are those of the committed results."""

import ast
import csv
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_offline_ft.collapse.events import EVENTS_FILE, read_events
from sb3_offline_ft.evaluation import dip_noise_floor
from sb3_offline_ft.study.report import definitions
from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
RESCUE, HOPPER = BENCHMARKS / "detection/results/rescue", BENCHMARKS / "finetuning/results/hopper"


def text(path: str) -> str:
    """Of a file of the repository, its line breaks as spaces."""
    return " ".join((REPOSITORY / path).read_text(encoding="utf-8").split()).replace("\N{MINUS SIGN}", "-")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def after_warmup(path: Path) -> np.ndarray:
    run = read(path)
    warmup = (run.get("learner") or run["constants"])["warmup_steps"]
    return np.array(run["returns"])[np.array(run["timesteps"]) >= warmup]


def test_speed() -> None:
    result = read(BENCHMARKS / "speed/results/intel-xeon-processor.json")
    rounds, page, script = result["settings"]["rounds"], text("benchmarks/speed/README.md"), BENCHMARKS / "speed/run.py"
    assert f"{rounds} rounds of {result['settings']['seconds_per_round']:g} s per candidate" in page
    assert {len(each["seconds"]) for each in result["measurements"] if not each.get("not_measured")} == {rounds}
    defaults = ast.literal_eval(re.findall(r"^SETTINGS = (.*)$", script.read_text(), re.MULTILINE)[0])
    assert f"by default it is {defaults['rounds']} and {defaults['seconds_per_round']:g} seconds" in page
    rows = [row for row in result["summary"] if row["group"] == "offline/hopper"]
    ratios = {(row["candidate"], row["threads"]): f"{row['times SB3']['median']:.1f}" for row in rows}
    shown = [ratios[name, threads] for name in ("td3bc-nonorm", "td3bc") for threads in (1, 2)]
    said = "are {} times as fast as SB3's with one thread and {} times with two, for networks like SB3's; {} and {} times"
    assert said.format(*shown) in text("README.md")


def test_rescue() -> None:
    lowest = [round(after_warmup(RESCUE / f"guarded_seed{seed}.json").min()) for seed in range(5)]
    events = [read_events(RESCUE / f"guarded_seed{seed}" / EVENTS_FILE) for seed in range(5)]
    alarms = [next(event["timestep"] for event in run if event["event"] == "alarm") - 5000 for run in events]
    for path in ("README.md", "docs/index.md", "benchmarks/detection/README.md"):
        assert f"{min(alarms)} to {max(alarms)} steps after the first update" in text(path), path
    for path in ("README.md", "docs/index.md", "docs/findings.md"):
        assert re.search(rf"lowest evaluation (is|was) {min(lowest)}\b", text(path)), path
    for path in ("docs/collapse.md", "benchmarks/detection/README.md"):
        assert f"| {', '.join(map(str, lowest))} |" in text(path), path
    dirty = [seed for seed in range(5) if read(RESCUE / f"guarded_seed{seed}.json")["git_commit"] == "405ca6e-dirty"]
    assert f"those of seeds {' and '.join(map(str, dirty))} say `405ca6e-dirty`" in text("benchmarks/detection/README.md")


def test_calibration() -> None:
    cells = read(BENCHMARKS / "detection/results/calibration.json")["cells"].values()
    for detector in ("cusum", "betting", "deterioration"):
        shares = [cell["measured"] for cell in cells if (cell["detector"], cell["promised"]) == (detector, 0.05)]
        row = rf"\| {detector} \| {len(shares)}( \([^)]*\))? \| {100 * min(shares):.1f} % to {100 * max(shares):.1f} % \|"
        assert re.search(row, text("benchmarks/detection/README.md")), row


def test_finetuning() -> None:
    found = {name: [after_warmup(HOPPER / f"{name}_seed{seed}.json") for seed in range(3)] for name in
             ("td3", "td3bc-kept", "td3c-best")}  # fmt: skip
    lowest = {name: [round(float(returns.min())) for returns in runs] for name, runs in found.items()}
    page = text("docs/findings.md")
    for name in ("td3bc-kept", "td3c-best"):
        assert f"lowest {', '.join(map(str, lowest[name]))}" in page
    assert f"and {min(lowest['td3'])} to {max(lowest['td3'])} on 3 of 3" in page
    assert f"after 13,000 updates {', '.join(str(round(float(returns[-1]))) for returns in found['td3'])}" in page


def test_latency_of_exported_policies() -> None:
    results, page = read(BENCHMARKS / "export/latency.json"), text("docs/export.md")
    ratios = []
    for name, found in results["policies"].items():
        ratios.append(found["SB3 predict"]["median"] / found["onnxruntime"]["median"])
        ways = ("SB3 predict", "onnxruntime", "controller", "TorchScript")
        cells = ["{median:.0f} ({low:.0f} to {high:.0f})".format(**found[way]) for way in ways]
        row = f"| {name} | {' | '.join(cells)} | {ratios[-1]:.1f} |"
        assert row in page and row in text("benchmarks/export/latency.md")
    assert f"`onnxruntime` was {min(ratios):.0f} to {max(ratios):.0f} times as fast" in page
    assert f"quartiles of {results['rounds']} rounds" in page


def test_what_noise_costs_in_a_warmup() -> None:
    with (BENCHMARKS / "studies/hopper/results.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["dataset"] == "medium-expert"]

    def mean(method: str, metric: str) -> int:
        return round(float(np.mean([float(row[metric]) for row in rows if row["method"] == method])))

    measured, served = mean("offline", "initial_return"), mean("td3bc", "served_initial_return")
    said = f"medium-expert data return {measured} when they are measured, and {served} in the warm-up of `TD3BC`"
    assert said in text("docs/study.md")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (r"\| normal \| 1 \| 5 \| [\d.]+ \| ([\d.]+) \|", "in about {} % of the cases with 5 seeds"),
        (r"\| normal \| 1 \| 10 \| [\d.]+ \| ([\d.]+) \|", "and in {} % with 10"),
        (r"\| -lognormal \| 30 \| [\d.]+ \| ([\d.]+) \|", "{} % were deeper with 30 episodes"),
        (r"\| -lognormal \| 300 \| [\d.]+ \| ([\d.]+) \|", "and {} % with 300"),
    ],
)
def test_definitions(row: str, said: str) -> None:
    # The parts of a text that is split between lines
    source = re.sub(r'"\s+f?"', "", inspect.getsource(definitions))
    (share,) = re.findall(row, text("benchmarks/studies/interval_coverage.md"))
    assert said.format(round(100 * float(share))) in source
    assert f"{inspect.signature(dip_noise_floor).parameters['n_resamples'].default:,} times for each seed" in source
