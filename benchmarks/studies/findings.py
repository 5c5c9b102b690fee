"""
The picture and the tables of "What we found", from the runs of the studies beside this file.

    python benchmarks/studies/findings.py    # writes hopper.png, prints the tables
"""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from sb3_offline_ft.evaluation import FinetuningMetrics, finetuning_metrics
from sb3_offline_ft.study import StudyResults, study_results
from sb3_offline_ft.study.looks import looks_of
from sb3_offline_ft.study.words import NONE, number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SHOWN = ("td3", "td3bc", "td3c")
TITLES = {
    "medium": "medium data",
    "medium-expert": "medium and expert data",
    "medium-replay": "medium-replay data: diverse",
}


def metrics_of(results: StudyResults, dataset: str, method: str) -> list[FinetuningMetrics]:
    """
    :param results: A study's results
    :param dataset: Label of the dataset, empty for methods without data
    :param method: Name of the method
    :return: Metrics of its finished runs, in the order of their seeds
    """
    runs = sorted(
        (run for run in results.runs if (run.cell.dataset or "") == dataset and run.cell.method.name == method),
        key=lambda run: run.cell.seed,
    )
    random_return = results.protocol.random_return
    return [
        finetuning_metrics(run.result.timesteps, run.result.returns, run.result.frozen_until, random_return) for run in runs
    ]


def _number(value: float | None, digits: int = 0) -> str:
    # Lists are separated by commas
    return number(value, digits).replace(",", "")


def rows(results: StudyResults, dataset: str) -> Iterator[str]:
    """
    :param results: A study's results
    :param dataset: Label of the dataset
    :return: A row of a Markdown table for each method with runs on it
    """
    for method in results.protocol.methods:
        runs = metrics_of(results, dataset, method.name)
        if not runs:
            continue
        collapsed = [run.collapsed for run in runs]
        cells = [
            method.label,
            NONE if None in collapsed else f"{sum(map(bool, collapsed))} of {len(runs)}",
            ", ".join(_number(run.dip_depth, 2) for run in runs),
            ", ".join(_number(run.last_return) for run in runs),
            _number(float(np.mean([run.last_return for run in runs]))),
            _number(float(np.mean([run.selected_return for run in runs if run.selected_return is not None]))),
        ]
        yield "| " + " | ".join(cells) + " |"


def table(results: StudyResults, dataset: str) -> str:
    """
    :param results: A study's results
    :param dataset: Label of the dataset, empty for methods without data
    :return: A Markdown table of every seed of every method
    """
    head = ["method", "collapsed", "dip depth, per seed", "last ten, per seed", "mean", "best kept"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows(results, dataset)])


def paint(results: StudyResults) -> None:
    """
    :param results: Results of the study in ``hopper``
    """
    protocol = results.protocol
    labels = {method.name: method.label for method in protocol.methods}
    looks = looks_of(SHOWN)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, panels = plt.subplots(1, len(TITLES), figsize=(11, 3.9), sharex=True, sharey=True, layout="constrained")
    for axes, (dataset, title) in zip(panels, TITLES.items(), strict=True):
        for name in SHOWN:
            runs = [run.result for run in results.runs if run.cell.dataset == dataset and run.cell.method.name == name]
            thousands = runs[0].timesteps / 1000
            curves = np.stack([run.returns.mean(axis=1) for run in runs])
            look = looks[name]
            axes.plot(thousands, curves.T, color=look.light, linewidth=0.7, alpha=0.45)
            axes.plot(thousands, curves.mean(axis=0), color=look.light, linewidth=2.4, label=labels[name])
        before = [run.initial_return for name in SHOWN for run in metrics_of(results, dataset, name)]
        axes.axvspan(0, runs[0].frozen_until / 1000, color="0.93", label="warm-up, policy unchanged")
        axes.axhline(np.mean(before), color="black", linestyle="--", linewidth=1.2, label="pretrained policy, mean")
        axes.set(title=title, xlabel="interactions (thousands)", xlim=(0, protocol.interactions / 1000))
    panels[0].set_ylabel("return, 10 episodes")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(HERE / "hopper.png", dpi=130, metadata={"Software": None})


def main() -> None:
    for file in sorted(HERE.glob("*/study.yml")):
        results = study_results(file.parent)
        for dataset in ("", *results.protocol.datasets):
            if any((run.cell.dataset or "") == dataset for run in results.runs):
                print(f"\n{results.protocol.name}, {dataset or 'without data'}\n\n{table(results, dataset)}")
        if file.parent.name == "hopper":
            paint(results)


if __name__ == "__main__":
    main()
