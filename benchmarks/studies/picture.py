"""
The picture of the README: three ways of finetuning on data of three kinds, every seed.

    python benchmarks/studies/picture.py    # hopper.png beside this file, from the runs of the study in hopper
"""

from pathlib import Path

import matplotlib
import numpy as np

from sb3_offline_ft.evaluation import finetuning_metrics
from sb3_offline_ft.study import study_results
from sb3_offline_ft.study.looks import looks_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
METHODS = ("td3", "td3bc", "td3c")
TITLES = {
    "medium": "medium data",
    "medium-expert": "medium and expert data",
    "medium-replay": "medium-replay data: diverse",
}


def main() -> None:
    results = study_results(HERE / "hopper")
    protocol = results.protocol
    labels = {method.name: method.label for method in protocol.methods}
    looks = looks_of(METHODS)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, panels = plt.subplots(1, len(TITLES), figsize=(11, 3.9), sharex=True, sharey=True, layout="constrained")
    for axes, (dataset, title) in zip(panels, TITLES.items(), strict=True):
        before = []
        for name in METHODS:
            runs = [run.result for run in results.runs if run.cell.dataset == dataset and run.cell.method.name == name]
            thousands = runs[0].timesteps / 1000
            curves = np.stack([run.returns.mean(axis=1) for run in runs])
            look = looks[name]
            axes.plot(thousands, curves.T, color=look.light, linewidth=0.7, alpha=0.45)
            axes.plot(thousands, curves.mean(axis=0), color=look.light, linewidth=2.4, label=labels[name])
            for run in runs:
                metrics = finetuning_metrics(run.timesteps, run.returns, run.frozen_until, protocol.random_return)
                before.append(metrics.initial_return)
        axes.axvspan(0, runs[0].frozen_until / 1000, color="0.93", label="warm-up, policy unchanged")
        axes.axhline(np.mean(before), color="black", linestyle="--", linewidth=1.2, label="pretrained policy, mean")
        axes.set(title=title, xlabel="interactions (thousands)", xlim=(0, protocol.interactions / 1000))
    panels[0].set_ylabel("return, 10 episodes")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(HERE / "hopper.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
