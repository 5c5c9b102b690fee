"""
Measure how often intervals from few runs contain the truth, and how often an unchanged policy exceeds the noise floor of dips.

    python benchmarks/studies/interval_coverage.py    # a few minutes; writes interval_coverage.md beside itself
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.evaluation.finetuning_metrics import dip_noise_floor
from sb3_offline_ft.evaluation.statistics import aggregate, performance_profile

RESULT = Path(__file__).with_suffix(".md")
N_STUDIES, N_RESAMPLES = 2_000, 1_000
N_POLICIES, N_EVALUATIONS, N_EPISODES, J0_EPISODES = 1_000, 28, 10, 30
N_TRUTH = 2_000_000

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _one_in(k: int, rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(size) < 1 / k, 0.0, 1.0) + rng.normal(0, 0.1, size)


RUNS: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "lognormal": lambda rng, size: rng.lognormal(size=size),
    "one in five fails": partial(_one_in, 5),
}
EPISODES: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(1.0, 0.1, size),
    "one in ten fails": partial(_one_in, 10),
    "-lognormal": lambda rng, size: 1.0 - 0.1 * rng.lognormal(size=size),
}


def interval_rows() -> Iterator[tuple[str, ...]]:
    """Coverage of 95 % intervals: distribution, datasets, runs of each, coverage for IQM, mean and median."""
    rng = np.random.default_rng(0)
    for name, draw in RUNS.items():
        population = draw(rng, (N_TRUTH,))
        truths = {"iqm": stats.trim_mean(population, 0.25), "mean": population.mean(), "median": np.median(population)}
        for n_datasets, n_runs in ((1, 5), (1, 10), (1, 20), (3, 5)):
            hits = dict.fromkeys(truths, 0)
            for study in range(N_STUDIES):
                scores = list(draw(rng, (n_datasets, n_runs)))
                for statistic, truth in truths.items():
                    estimate = aggregate(scores, statistic, n_resamples=N_RESAMPLES, seed=study)
                    hits[statistic] += estimate.low <= truth <= estimate.high
            yield name, str(n_datasets), str(n_runs), *(f"{count / N_STUDIES:.2f}" for count in hits.values())


def band_rows() -> Iterator[tuple[str, ...]]:
    """Coverage of simultaneous 95 % bands of performance profiles: distribution, datasets, runs of each, coverage."""
    rng, thresholds = np.random.default_rng(1), np.linspace(-3, 6, 181)
    for name, shift in (("normal", 0.0), ("normal, datasets one standard deviation apart", 1.0)):
        for n_datasets, n_runs in ((1, 5), (3, 5), (3, 10)):
            means = shift * np.arange(n_datasets)
            truth = stats.norm.sf(thresholds[:, None] - means).mean(axis=1)
            hits = 0
            for _ in range(N_STUDIES):
                band = performance_profile(list(rng.normal(means, 1, (n_runs, n_datasets)).T), thresholds, "simultaneous")
                hits += bool(np.all((band.low <= truth) & (truth <= band.high)))
            if n_datasets > 1 or shift == 0:
                yield name, str(n_datasets), str(n_runs), f"{hits / N_STUDIES:.2f}"


def floor_rows() -> Iterator[tuple[str, ...]]:
    """Unchanged policies above the 95 % quantile of their noise floor: distribution, frozen episodes, mean dip, share."""
    rng = np.random.default_rng(2)
    for name, draw in EPISODES.items():
        for n_frozen in (10, 30, 100, 300):
            above, dips = 0, []
            for policy in range(N_POLICIES):
                before = draw(rng, (J0_EPISODES,))
                frozen = before if n_frozen == J0_EPISODES else draw(rng, (n_frozen,))
                curve = draw(rng, (N_EVALUATIONS, N_EPISODES)).mean(axis=1)
                floor = dip_noise_floor(
                    frozen, N_EVALUATIONS, N_EPISODES, 0.0, initial_episodes=J0_EPISODES, n_resamples=N_RESAMPLES, seed=policy
                )
                dips.append((before.mean() - curve.min()) / abs(before.mean()))
                above += floor is not None and dips[-1] > floor.quantile
            yield name, str(n_frozen), f"{np.mean(dips):.3f}", f"{above / N_POLICIES:.2f}"


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    text = "\n\n".join(
        (
            "# What intervals from few runs are worth",
            f"Written by `interval_coverage.py`, with SciPy {version('scipy')}. Each share is from {N_STUDIES:,} simulated "
            f"studies, {N_POLICIES:,} simulated policies in the last table: its standard error is at most 0.011 and 0.016.",
            "## Percentile intervals of the stratified bootstrap",
            "How often an interval of 95 % contains the truth. Those of the mean of few runs fail most.",
            _table(("runs", "datasets", "runs per dataset", "IQM", "mean", "median"), interval_rows()),
            "## Simultaneous bands of performance profiles",
            "How often a band of 95 % contains the whole profile.",
            _table(("runs", "datasets", "runs per dataset", "coverage"), band_rows()),
            "## Noise floor of dips",
            f"Policies that do not change, J0 of {J0_EPISODES} episodes, {N_EVALUATIONS} evaluations of {N_EPISODES} "
            "episodes, a random policy with return 0: their mean dip depth, and the share whose dip is deeper than the 95 % "
            "quantile of the floor, which should be 0.05. It is more with few episodes of the frozen policy, and where falls "
            "are rare and deep.",
            _table(("episodes", "frozen episodes", "mean dip depth", "deeper than the floor"), floor_rows()),
        )
    )
    with atomic_write(RESULT) as file:
        file.write((text + "\n").encode())
    print(text)


if __name__ == "__main__":
    main()
