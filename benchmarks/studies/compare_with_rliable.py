"""
Compute aggregates, intervals and profiles of made-up scores with rliable, for the tests of our own.

    pip install rliable                                       # brings arch and statsmodels
    python benchmarks/studies/compare_with_rliable.py         # write tests/data/rliable_reference.json, print both
    python benchmarks/studies/compare_with_rliable.py --show  # compare ours with what is there; needs no rliable

rliable holds scores as a matrix of runs x tasks; a task is what we call a dataset. Adjusted p-values and McNemar's test are
statsmodels'.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.evaluation.comparisons import compare_paired_rates, holm
from sb3_offline_ft.evaluation.statistics import aggregate, performance_profile, probability_of_improvement

REFERENCE = Path(__file__).parents[2] / "tests" / "data" / "rliable_reference.json"
N_RESAMPLES, N_RESAMPLES_PAIR = 50_000, 10_000
SEED = 0
P_VALUES = [0.004, 0.03, 0.011, 0.9, 0.03, 0.2]
COLLAPSED = {"x": [1, 1, 1, 1, 0, 1, 0, 0, 1, 1], "y": [0, 0, 1, 0, 1, 0, 0, 0, 0, 0]}


def made_up_scores() -> dict[str, np.ndarray]:
    """Runs x tasks: heavy tails, ties, and different numbers of runs."""
    rng = np.random.default_rng(SEED)
    x = rng.normal([0.4, 0.6, 1.0], [0.1, 0.3, 0.2], (10, 3)) - 0.5 * (rng.random((10, 3)) < 0.15)
    y = rng.normal([0.4, 0.5, 0.7], [0.2, 0.2, 0.3], (7, 3))
    return {"x": x.round(1), "y": y.round(1), "five": rng.normal(0.8, 0.3, (5, 1)).round(3)}


def reference() -> dict[str, Any]:
    """
    :return: What rliable and statsmodels compute
    """
    from rliable import library, metrics
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    scores = made_up_scores()
    # rliable draws from NumPy's global generator, whatever it is given
    np.random.seed(SEED)
    aggregates = {"iqm": metrics.aggregate_iqm, "mean": metrics.aggregate_mean, "task_median": metrics.aggregate_median}
    content: dict[str, Any] = {
        "versions": {name: version(name) for name in ("rliable", "arch", "statsmodels", "numpy", "scipy")},
        "python": platform.python_version(),
        "seed": SEED,
        "n_resamples": N_RESAMPLES,
        "scores": {name: matrix.tolist() for name, matrix in scores.items()},
        "aggregates": {},
    }
    for name, matrix in scores.items():
        points, intervals = library.get_interval_estimates(
            {name: matrix}, lambda m: np.array([function(m) for function in aggregates.values()]), reps=N_RESAMPLES
        )
        content["aggregates"][name] = {
            statistic: {"value": points[name][i], "low": intervals[name][0, i], "high": intervals[name][1, i]}
            for i, statistic in enumerate(aggregates)
        }
    points, intervals = library.get_interval_estimates(
        {"pair": (scores["x"], scores["y"])}, metrics.probability_of_improvement, reps=N_RESAMPLES_PAIR
    )
    low, high = np.ravel(intervals["pair"])
    content["probability_of_improvement"] = {"value": float(np.squeeze(points["pair"])), "low": low, "high": high}
    thresholds = np.linspace(-0.2, 1.6, 19)
    profiles, bands = library.create_performance_profile({"x": scores["x"]}, thresholds, reps=N_RESAMPLES_PAIR)
    content["performance_profile"] = {
        "thresholds": thresholds.tolist(),
        "value": profiles["x"].tolist(),
        "low": bands["x"][0].tolist(),
        "high": bands["x"][1].tolist(),
    }
    content["iqm_of_the_first"] = [metrics.aggregate_iqm(scores["x"].ravel()[:n]) for n in range(1, 31)]
    content["holm"] = {"p_values": P_VALUES, "adjusted": multipletests(P_VALUES, method="holm")[1].tolist()}
    first, second = np.array(COLLAPSED["x"]), np.array(COLLAPSED["y"])
    table = [[int(np.sum((first == i) & (second == j))) for j in (1, 0)] for i in (1, 0)]
    content["mcnemar"] = {**COLLAPSED, "p_value": float(mcnemar(table, exact=True).pvalue)}
    return content


def show(content: dict[str, Any]) -> None:
    """
    Print ours beside the reference.

    :param content: The reference
    """
    names = ", ".join(f"{name} {content['versions'][name]}" for name in ("rliable", "arch", "statsmodels"))
    table = Table("", "theirs", "ours", title=f"{names}; {N_RESAMPLES:,} resamples", title_justify="left")
    for scores, aggregates in content["aggregates"].items():
        for statistic, theirs in aggregates.items():
            ours = aggregate(list(np.array(content["scores"][scores]).T), statistic, n_resamples=N_RESAMPLES)
            table.add_row(f"{statistic} of {scores}", _text(**theirs), _text(ours.value, ours.low, ours.high))
    x, y = (list(np.array(content["scores"][name]).T) for name in ("x", "y"))
    ours = probability_of_improvement(x, y, n_resamples=N_RESAMPLES_PAIR)
    theirs = content["probability_of_improvement"]
    table.add_row("probability of improvement", _text(**theirs), _text(ours.value, ours.low, ours.high))
    theirs = content["performance_profile"]
    band = performance_profile(x, theirs["thresholds"], n_resamples=N_RESAMPLES_PAIR)
    for name in ("value", "low", "high"):
        difference = np.abs(np.array(theirs[name]) - getattr(band, name)).max()
        table.add_row(f"performance profile, {name}", "", f"largest difference {difference:.4f}")
    table.add_row("Holm", str(content["holm"]["adjusted"]), str(holm(content["holm"]["p_values"]).tolist()))
    pairs = content["mcnemar"]
    table.add_row("McNemar", str(pairs["p_value"]), str(compare_paired_rates(pairs["x"], pairs["y"]).p_value))
    Console(width=140).print(table)


def _text(value: float, low: float, high: float) -> str:
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="only compare with what is there")
    if not parser.parse_args().show:
        REFERENCE.parent.mkdir(exist_ok=True)
        with atomic_write(REFERENCE) as file:
            file.write((json.dumps(reference(), indent=1) + "\n").encode())
    show(json.loads(REFERENCE.read_text()))


if __name__ == "__main__":
    main()
