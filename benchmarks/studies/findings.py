"""
Write what the studies beside this file say into README.md and docs/findings.md, and draw their curves.

    python benchmarks/studies/findings.py

Tables are made from each study's ``results.csv``, which `sb3-offline-ft study report` writes, and stand between the comments
``<!-- results:<study> begin -->`` and ``<!-- results:<study> end -->``. ``curves.png`` is drawn where the study's runs are
unpacked. Nothing between the comments is written by hand. Results of other settings than ``study.yml`` has now are an error.
"""

import csv
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.evaluation.statistics import aggregate
from sb3_offline_ft.pages.words import NONE, number, ranged
from sb3_offline_ft.study import Protocol, StudyResults, study_results
from sb3_offline_ft.study.engine.folder import RUNS
from sb3_offline_ft.study.engine.results import Run, remember_data_of_runs
from sb3_offline_ft.study.report.looks import looks_of
from sb3_offline_ft.study.report.runs import SERVED_POINTS, Array, acted_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md")
ANSWER = "answer"
"""Name of the comments between which the studies of what is served share one table."""
ASKED = ("hopper-champion", "halfcheetah-champion", "walker2d-champion", "pendulum-champion")
"""These studies."""
REGIMES = "regimes"
"""Name of the comments between which it says whether a rule from the literature predicted who ends higher."""
KEEPS_POLICY, PLAIN = ("td3c", "champion"), "td3"
EITHER, MARGIN = "either", 0.05
"""Of the way from a random policy to an expert, within which the rule calls policy and data alike."""
DRAWN = ("offline", "td3", "td3bc", "td3c", "champion", "td3-champion")
RESULTS, TABLES, CURVES, ARCHIVE = "results.csv", "tables.md", "curves.png", "runs.tar.xz"
DRAWN_FROM = "Results"
"""Text in the picture: the digest of the results that it was drawn with."""
NOT_YET = "No results of this are in the repository yet, so nothing is claimed."
BLOCK = re.compile(r"(<!-- results:([\w-]+) begin -->\n).*?(<!-- results:\2 end -->)", re.DOTALL)

Row = Mapping[str, str]


def studies(folder: Path = HERE) -> dict[str, Path]:
    """
    :param folder: Where studies are
    :return: Their folders by name
    """
    return {file.parent.name: file.parent for file in sorted(folder.glob("*/study.yml"))}


def read(study: Path) -> list[Row]:
    """
    :param study: Folder of a study
    :return: The rows of its ``results.csv``, none if there is no such file
    """
    file = study / RESULTS
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@contextmanager
def unpacked(study: Path) -> Iterator[Path]:
    """
    :param study: Folder of a study
    :return: A context in which its runs are in the folder that is given, from its archive if they are not in its own
    """
    if (study / RUNS).exists() or not (study / ARCHIVE).exists():
        yield study
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(study / ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def check(study: Path) -> None:
    """
    Check that a study's results, if it has some, are of what its file describes now, and its picture of the same runs.

    :param study: Folder of a study
    :raises ValueError: They are not
    """
    rows = read(study)
    if not rows:
        return
    protocol = Protocol.load(study)
    with unpacked(study) as folder:
        # Facts about data that is not here are in the runs
        remember_data_of_runs(protocol.changed(folder=folder))
    others = {row["key"] for row in rows} - {protocol.cell_key(cell) for cell in protocol.cells()}
    if others:
        raise ValueError(
            f"{study / RESULTS}: {len(others)} of {len(rows)} runs are of other settings than study.yml: write it again with "
            f"`sb3-offline-ft study report {study}`, or delete it."
        )
    if (study / CURVES).exists():
        with Image.open(study / CURVES) as picture:
            drawn_from = picture.info.get(DRAWN_FROM)
        if drawn_from != digest(study):
            raise ValueError(f"{study / CURVES} is not of these results: run this script where the runs are, or delete it.")


def digest(study: Path) -> str:
    """
    :param study: Folder of a study that has results
    :return: SHA-256 of its results
    """
    return hashlib.sha256((study / RESULTS).read_bytes()).hexdigest()


def starts(runs: Iterable[Row]) -> dict[str, str]:
    """
    :param runs: Runs on a dataset
    :return: Level of the pretrained policy by seed, from the run that measured it by most evaluations
    """
    known = [run for run in runs if run["initial_return"]]
    known.sort(key=lambda run: -float(run["initial_standard_error"] or "inf"))
    best = {run["seed"]: run["initial_return"] for run in known}
    return {seed: best[seed] for seed in sorted(best, key=int)}


def last(rows: Iterable[Row]) -> str:
    """
    :param rows: Runs
    :return: How many evaluations their ends are means of, such as ``10`` or ``3 to 10``
    """
    counts = sorted({int(row["last_evaluations"]) for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def of(rows: Iterable[Row], dataset: str, method: str) -> list[Row]:
    """
    :param rows: A study's runs
    :param dataset: Label of the dataset
    :param method: Name of the method
    :return: Its runs on this dataset, in the order of their seeds
    """
    found = (row for row in rows if row["dataset"] == dataset and row["method"] == method)
    return sorted(found, key=lambda row: int(row["seed"]))


def _number(text: str, digits: int = 0) -> str:
    # Lists are separated by commas
    return number(float(text) if text else None, digits).replace(",", "")


def _mean(runs: Sequence[Row], metric: str) -> str:
    return _average(run[metric] for run in runs)


def _average(values: Iterable[str], unit: float = 1.0, digits: int = 0) -> str:
    known = [float(value) / unit for value in values if value]
    return _number(str(np.mean(known)) if known else "", digits)


def _collapsed(runs: Sequence[Row]) -> str:
    known = [run["collapsed"] for run in runs if run["collapsed"]]
    return f"{known.count('true')} of {len(known)}" if known else NONE


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def seeds_table(rows: Sequence[Row], protocol: Protocol, dataset: str) -> str:
    """
    :param rows: A study's runs
    :param protocol: Its protocol
    :param dataset: Label of the dataset
    :return: A Markdown table of every seed of every method
    """
    seeds = sorted({row["seed"] for row in rows if row["dataset"] == dataset}, key=int)
    head = ["method", "collapsed", "dip depth, per seed", f"last {last(rows)}, per seed", "mean", "best kept"]
    body = []
    for method in protocol.methods:
        runs = of(rows, dataset, method.name)
        if runs:
            by_seed = {run["seed"]: run for run in runs}
            dips = ", ".join(_number(by_seed[seed]["dip_depth"], 2) if seed in by_seed else NONE for seed in seeds)
            ends = ", ".join(_number(by_seed[seed]["last_return"]) if seed in by_seed else NONE for seed in seeds)
            means = _mean(runs, "last_return"), _mean(runs, "selected_return")
            body.append([method.label, _collapsed(runs), dips, ends, *means])
    return _table(head, body)


def has_champion(protocol: Protocol) -> bool:
    """
    :param protocol: A study's protocol
    :return: Whether it is about what is served while a champion acts
    """
    return any(method.champion is not None for method in protocol.methods)


def served_ratios(runs: Sequence[Row], levels: Mapping[str, str], random: float | None) -> dict[str, float]:
    """
    :param runs: Runs of one method on a dataset
    :param levels: Levels of the pretrained policies by seed
    :param random: Mean return of a random policy, None if it is not known
    :return: By seed, how far above that the return was that was served in the last third, as a multiple of how far the
        pretrained policy's is; only where the pretrained policy is better than a random one
    """
    if random is None:
        return {}
    return {
        run["seed"]: (float(run["served_last_third_return"]) - random) / (float(levels[run["seed"]]) - random)
        for run in runs
        if run["served_last_third_return"] and run["seed"] in levels and float(levels[run["seed"]]) > random
    }


def served_table(rows: Sequence[Row], protocol: Protocol, dataset: str) -> str:
    """
    :param rows: A study's runs
    :param protocol: Its protocol
    :param dataset: Label of the dataset
    :return: A Markdown table of what each method has served, and of the policy that it ends with
    """
    levels = starts(row for row in rows if row["dataset"] == dataset)
    body = []
    for method in protocol.methods:
        runs = of(rows, dataset, method.name)
        if runs:
            ratios = served_ratios(runs, levels, protocol.random_return)
            counted = [run for run in runs if run["served_collapsed_episodes"]]
            fallen = sum(int(run["served_collapsed_episodes"]) for run in counted)
            episodes = sum(int(run["served_episodes"]) for run in counted)
            collapsed = f"{fallen} of {episodes}" if counted else NONE
            per_seed = ", ".join(_number(str(ratios[seed]), 2) if seed in ratios else NONE for seed in levels)
            final = {run["seed"]: _number(run["final_return"]) for run in runs}
            ends = ", ".join(final.get(seed, NONE) for seed in levels)
            body.append([method.label, per_seed, _ratio(ratios), collapsed, ends])
    return _table(["method", "last third in J0, per seed", "mean", "lost episodes", "final policy, per seed"], body)


def _ratio(ratios: Mapping[str, float]) -> str:
    return _number(str(np.mean([*ratios.values()])) if ratios else "", 2)


def answer(folders: Mapping[str, Path]) -> str:
    """
    :param folders: Studies by name
    :return: One Markdown table of what methods have served and ended with, a row for each method on each dataset
    """
    body = []
    for folder in (folders[name] for name in ASKED if name in folders):
        rows, protocol = read(folder), Protocol.load(folder / "study.yml")
        for dataset in protocol.datasets:
            level = _average(starts(row for row in rows if row["dataset"] == dataset).values())
            about = f"{protocol.env}, {dataset}, {protocol.interactions:,}; J0 {level}"
            for method in protocol.methods:
                if runs := of(rows, dataset, method.name):
                    means = (_interval(runs, f"served_{part}_return") for part in ("mean", "last_third"))
                    lost = _average((run["served_collapsed_share"] for run in runs), unit=0.01, digits=1)
                    body.append([about, method.label, str(len(runs)), *means, lost, _interval(runs, "final_return")])
                    about = ""
    if not body:
        return NOT_YET
    head = ["environment, data, interactions", "method", "seeds", "served", "last third", "lost episodes (%)", "final policy"]
    words = (
        "*Served* is the mean return of everything that acted, over all interactions, and over their last third. J0 is the "
        "return of the pretrained policies. A *lost episode*, of those after the warm-up, has at most a quarter of what the "
        "pretrained policy has over a random one. The *final policy* is what would be deployed: the champion where there is "
        "one, else the learner. Means over the seeds, in brackets 95 % bootstrap intervals, which are too narrow where seeds "
        "are few."
    )
    return f"{_table(head, body)}\n\n{words}"


def _interval(runs: Sequence[Row], metric: str) -> str:
    values = [float(run[metric]) for run in runs if run[metric]]
    return ranged(aggregate([values], "mean"), 0).replace(",", "") if values else NONE


def data_returns(study: Path) -> dict[str, float]:
    """
    :param study: Folder of a study
    :return: Mean returns of its datasets by label, as its runs found them
    """
    with unpacked(study) as folder:
        manifests = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{RUNS}/*/*/*/manifest.json")]
    found = [manifest["dataset"] for manifest in manifests if manifest.get("dataset")]
    return {str(facts["label"]): float(facts["mean_return"]) for facts in found}


def regimes(folders: Mapping[str, Path]) -> str:
    """
    Whether the rule of Li et al. (arXiv 2510.01460) predicts who ends higher: keep whichever returns more, the pretrained
    policy (TD3C, which stays near it) or the data (plain TD3, of whose batches one half is offline).

    :param folders: Studies by name
    :return: A Markdown table with a row for each dataset on which both were run, and how often the rule was right
    """
    body, told = [], []
    for folder in folders.values():
        rows, protocol = read(folder), Protocol.load(folder / "study.yml")
        scores = reference_scores_for(protocol.env)
        keeper = next((method for method in protocol.methods if method.name in KEEPS_POLICY), None)
        if not rows or scores is None or keeper is None:
            continue
        returns = data_returns(folder)
        for dataset in protocol.datasets:
            levels = starts(row for row in rows if row["dataset"] == dataset)
            pair = (of(rows, dataset, name) for name in (keeper.name, PLAIN))
            near, plain = ({run["seed"]: run["last_return"] for run in runs} for runs in pair)
            seeds = [seed for seed in levels if seed in near and seed in plain]
            if not seeds:
                continue
            values = [np.array([float(known[seed]) for seed in seeds]) for known in (levels, near, plain)]
            start, end, other = (float(one.mean()) for one in values)
            unit = scores.expert - scores.random
            says, higher = _kept((start - returns[dataset]) / unit), _kept((end - other) / unit)
            if EITHER not in (says, higher):
                told.append(says == higher)
            level, of_data, end_near, end_plain = (_number(str(one)) for one in (start, returns[dataset], end, other))
            above = f"{np.sum(values[1] > values[2])} of {len(seeds)}"
            body.append([protocol.name, dataset, level, of_data, says, f"{keeper.label}: {end_near}", end_plain, above])
    if not body:
        return NOT_YET
    head = ["study", "data", "J0", "return of the data", "rule: keep", "near the policy", "plain TD3", "near is higher"]
    words = (
        f"Of the {len(told)} rows in which the rule names one and the ends differ by more than its margin, the one that it "
        f"names ended higher in {sum(told)}."
    )
    return f"{_table(head, body)}\n\n{words}"


def _kept(lead: float) -> str:
    """What is better, by the lead of the policy in normalised scores."""
    return "the policy" if lead > MARGIN else "the data" if lead < -MARGIN else EITHER


def headline(folder: Path) -> str:
    """
    :param folder: Folder of a study that has results
    :return: What its report says first: who served most, and what the tests prove
    """
    return (folder / TABLES).read_text(encoding="utf-8").split("\n\n")[1]


def single(folder: Path, page: Path) -> str:
    """
    :param folder: A study
    :param page: The page that it is written into
    :return: Its curves and a table of every seed for each dataset; else why there are none
    """
    rows, protocol = read(folder), Protocol.load(folder / "study.yml")
    if not rows:
        return NOT_YET
    parts = [headline(folder)] if has_champion(protocol) else []
    if (folder / CURVES).exists():
        parts.append(f"![Curves of {protocol.name}]({Path(os.path.relpath(folder / CURVES, page.parent)).as_posix()})")
        what = "What was served. " if has_champion(protocol) else ""
        parts.append(f"{what}Thin lines are seeds, thick ones their means.")
    for dataset in protocol.datasets:
        runs = [row for row in rows if row["dataset"] == dataset]
        if runs:
            seeds = ", ".join(sorted({run["seed"] for run in runs}, key=int))
            levels = ", ".join(_number(level) for level in starts(runs).values())
            parts.append(f"**{dataset}**, seeds {seeds}, J0 {levels or NONE}:")
            make = served_table if has_champion(protocol) else seeds_table
            parts.append(make(rows, protocol, dataset))
    return "\n\n".join(parts)


def filled(text: str, page: Path, folders: Mapping[str, Path]) -> str:
    """
    :param text: A page
    :param page: Where it is
    :param folders: Studies by name
    :return: The page with what the studies say now
    :raises KeyError: A comment names no study
    :raises ValueError: Results are of other settings than the study has now
    """
    for folder in folders.values():
        check(folder)

    def replace(block: re.Match[str]) -> str:
        of_all = {ANSWER: answer, REGIMES: regimes}
        content = of_all[block[2]](folders) if block[2] in of_all else single(folders[block[2]], page)
        return f"{block[1]}\n{content}\n\n{block[3]}"

    return BLOCK.sub(replace, text)


def curve(run: Run, protocol: Protocol) -> tuple[Array, Array]:
    """
    :param run: A run
    :param protocol: Its study's protocol
    :return: Interactions and returns of what is drawn of it: what it served if the study is about that, else its evaluations
    """
    if not has_champion(protocol):
        return np.asarray(run.result.timesteps, np.float64), np.asarray(run.result.returns.mean(axis=1), np.float64)
    acted, width = acted_in(run, protocol.interactions), protocol.interactions / SERVED_POINTS
    if acted is None:
        return np.zeros(0), np.zeros(0)
    n = int(min(acted.lengths.sum(), protocol.interactions) / width)
    ends = np.asarray(width * np.arange(1, n + 1), np.float64)
    return ends, np.array([acted.mean_return(end - width, end) for end in ends])


def draw(results: StudyResults) -> None:
    """
    :param results: A study with a ``results.csv``, whose curves are drawn
    """
    protocol, looks = results.protocol, looks_of(DRAWN)
    methods = {method.name: method.label for method in protocol.methods if method.name in DRAWN}
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    datasets = [name for name in protocol.datasets if any(run.cell.dataset == name for run in results.runs)]
    n = len(datasets)
    figure, panels = plt.subplots(
        1, n, figsize=(max(6.0, 3.7 * n), 3.9), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes, dataset in zip(panels[0], datasets, strict=True):
        of_dataset = [run for run in results.runs if run.cell.dataset == dataset]
        for name, label in methods.items():
            curves = [curve(run, protocol) for run in of_dataset if run.cell.method.name == name]
            # A guard may end a run early: the mean is of what all have
            length = min((len(values) for _, values in curves), default=0)
            if length:
                for interactions, values in curves:
                    axes.plot(interactions / 1000, values, color=looks[name].light, linewidth=0.7, alpha=0.45)
                mean = np.mean([values[:length] for _, values in curves], axis=0)
                axes.plot(curves[0][0][:length] / 1000, mean, color=looks[name].light, linewidth=2.4, label=label)
        warmup = min((run.result.frozen_until for run in of_dataset), default=0) / 1000
        axes.axvspan(0, warmup, color="0.93", label="warm-up, policy unchanged")
        axes.set(title=f"{protocol.env}, {dataset}", xlabel="interactions (thousands)", xlim=(0, protocol.interactions / 1000))
    shown = "served return" if has_champion(protocol) else f"return, {protocol.evaluation.episodes} episodes"
    panels[0, 0].set_ylabel(shown)
    handles = {label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=max(2, n), frameon=False)
    figure.savefig(protocol.folder / CURVES, dpi=100, metadata={"Software": None, DRAWN_FROM: digest(protocol.folder)})
    plt.close(figure)


def main() -> None:
    folders = studies()
    for folder in folders.values():
        # Without runs here, neither is the data, perhaps
        results = study_results(folder) if (folder / RUNS).exists() else None
        if results is None or not results.runs:
            continue
        if {run.key for run in results.runs} != {row["key"] for row in read(folder)}:
            raise ValueError(f"{folder / RESULTS} is not of the runs in {folder}: run `sb3-offline-ft study report {folder}`.")
        draw(results)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, page, folders), encoding="utf-8")


if __name__ == "__main__":
    main()
