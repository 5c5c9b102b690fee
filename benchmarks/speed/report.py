"""
Tables and figure from what `run.py` and `memory.py` measured.

    python benchmarks/speed/report.py    # from the committed results, into README.md
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from candidates import FASTEST_PEER, GEMM_SIZE, GROUPS, REFERENCE, Candidate, Group

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
PARTIAL, MEMORY, ABLATION = ".partial.json", "-memory.json", "-ablation.json"
HEADINGS = ("candidate", "ms, median", "quartiles", "least", "times SB3's speed", "times SBX's", "GFLOP/s", "share of limit")
TOO_BUSY = 0.1
"""Processors that others may take before the results say so."""
OFFLINE = ("offline/hopper", "offline/halfcheetah")
AIMS: tuple[tuple[str, tuple[str, ...], str, str, float], ...] = (
    ("TD3BC offline, no LayerNorm, against SB3", OFFLINE, "td3bc-nonorm", REFERENCE, 3.0),
    ("TD3C offline, no LayerNorm, against SB3", OFFLINE, "td3c-nonorm", REFERENCE, 3.0),
    ("TD3BC offline, LayerNorm, against SB3 without", OFFLINE, "td3bc", REFERENCE, 2.3),
    ("TD3BC offline, no LayerNorm, against SBX", OFFLINE, "td3bc-nonorm", FASTEST_PEER, 1.0),
    ("TD3BC offline, LayerNorm, against SBX without", OFFLINE, "td3bc", FASTEST_PEER, 1.0),
    ("TD3BC offline, no LayerNorm, against a single-file TD3+BC", OFFLINE, "td3bc-nonorm", "corl_style", 3.0),
    ("TD3BC offline, no LayerNorm, against d3rlpy", OFFLINE, "td3bc-nonorm", "d3rlpy", 4.0),
    ("TD3BC offline, bfloat16, no LayerNorm, against SB3", OFFLINE, "td3bc-bfloat16-nonorm", REFERENCE, 4.0),
    ("`learn()` on Hopper-v5, no LayerNorm, against SB3", ("online/hopper",), "td3bc-nodata-nonorm", REFERENCE, 2.5),
    ("collection without updates, against SB3", ("collect/noise", "collect/nonoise"), "td3bc", REFERENCE, 1 / 0.6),
    ("ELU, dictionaries, images, against SB3", ("train/elu", "train/dict", "train/cnn"), "offline_td3", REFERENCE, 1.0),
)
"""What was aimed at: a description, groups, a candidate, what it is compared with, and how many times as fast it should be."""
PRECISION = """\
TD3C with the default LayerNorm critics on Hopper-v5: 20,000 gradient steps on `bundled:hopper-medium`, then 3,000 environment
steps. A run's number is the mean of its evaluations (10 episodes each, from the same states). The test was fixed beforehand:
Student's t for the differences by seed, two-sided at 5 %; with so few seeds it has little power, so the interval counts.
*float32, other batches* shows how much chance alone does. Online, runs of one seed part soon, since rounding changes what they
meet."""
PEER_PACKAGES = ("sbx-rl", "jax", "d3rlpy")
FAMILIES = {"sb3": "0.45", "corl_style": "0.65", "d3rlpy": "0.65", "sbx": "tab:orange"}
OURS = "tab:blue"


def limits(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """
    :param content: What was measured
    :return: By number of threads and arithmetic, the highest rate of matrix products in FLOP/s, over rounds and libraries
    """
    found: dict[str, dict[str, float]] = {}
    for measurement in content["measurements"]:
        if measurement["kind"] != "gemm" or not measurement["seconds"]:
            continue
        shortest = min(value for value in measurement["extra"]["shortest"] if value is not None)
        rates = found.setdefault(str(measurement["threads"]), {})
        arithmetic = measurement["settings"]["arithmetic"]
        rates[arithmetic] = max(rates.get(arithmetic, 0.0), 2 * GEMM_SIZE**3 / shortest)
    return found


def times(measurement: dict[str, Any] | None, clock: str) -> np.ndarray:
    """
    :param measurement: A candidate's
    :param clock: ``"wall"`` or ``"cpu"``
    :return: Milliseconds per step of each round, NaN where there is none
    """
    if measurement is None:
        return np.full(1, np.nan)
    seconds = measurement["seconds" if clock == "wall" else "cpu_seconds"]
    return np.array([np.nan if value is None else 1e3 * value / measurement["steps"] for value in seconds], dtype=float)


def ratio(reference: np.ndarray, values: np.ndarray) -> dict[str, float] | None:
    """
    :param reference: Times of the reference per round
    :param values: Times of a candidate in the same rounds
    :return: How many times as fast the candidate is: median and quartiles of the rounds' ratios
    """
    n_rounds = min(len(reference), len(values))
    ratios = reference[:n_rounds] / values[:n_rounds]
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        return None
    quartiles = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"median": float(quartiles[1]), "quartile1": float(quartiles[0]), "quartile3": float(quartiles[2])}


def summarize(content: dict[str, Any]) -> list[dict[str, Any]]:
    """
    :param content: What was measured
    :return: One row for each candidate that had a turn, in the order of `candidates.py`
    """
    clock, ceilings = content["settings"]["clock"], limits(content)
    found = {(entry["group"], entry["candidate"], entry["threads"]): entry for entry in content["measurements"]}
    rows = []
    for threads in content["settings"]["threads"]:
        for group in GROUPS:
            reference, peer = (times(found.get((group.name, name, threads)), clock) for name in (REFERENCE, FASTEST_PEER))
            for candidate in group.candidates:
                measurement = found.get((group.name, candidate.name, threads))
                if measurement is None or not measurement["seconds"] or candidate.kind == "gemm":
                    continue
                values = times(measurement, clock)
                row = {"group": group.name, "candidate": candidate.name, "threads": threads, "unit": group.unit}
                row |= _row(values[~np.isnan(values)], group, candidate, ceilings.get(str(threads), {}))
                rows.append(row | {"times SB3": ratio(reference, values), "times SBX": ratio(peer, values)})
    return rows


def _row(values: np.ndarray, group: Group, candidate: Candidate, ceilings: dict[str, float]) -> dict[str, Any]:
    quartile1, median, quartile3 = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    row: dict[str, Any] = {"ms": median, "ms quartile1": quartile1, "ms quartile3": quartile3, "ms least": float(values.min())}
    row |= {"rounds": len(values), "GFLOP/s": None, "share of limit": None}
    if group.flops is not None and candidate.arithmetic is not None:
        rate = group.flops / (1e-3 * median)
        row["GFLOP/s"] = rate / 1e9
        if candidate.arithmetic in ceilings:
            row["share of limit"] = rate / ceilings[candidate.arithmetic]
    return row


def aims(content: dict[str, Any]) -> str:
    """
    :param content: What was measured
    :return: A table of what was aimed at and what was reached, and of what the arithmetic allows
    """
    clock, ceilings, threads_used = content["settings"]["clock"], limits(content), content["settings"]["threads"]
    found = {(entry["group"], entry["candidate"], entry["threads"]): entry for entry in content["measurements"]}
    heading = [f"reached, {threads} thread{'s' * (threads > 1)}" for threads in threads_used]
    lines = [f"| aim, times as fast | at least | {' | '.join(heading)} | limit |", "|---" * (3 + len(heading)) + "|"]
    for label, groups, name, other, least in AIMS:
        reached, allowed = [], []
        for threads in threads_used:
            ratios = []
            for group in groups:
                reference = times(found.get((group, other, threads)), clock)
                measured = ratio(reference, times(found.get((group, name, threads)), clock))
                ratios.append("-" if measured is None else f"{measured['median']:.2f}")
                candidate = next(entry for entry in GROUPS if entry.name == group).find(name)
                ceiling = ceilings.get(str(threads), {}).get(candidate.arithmetic or "")
                flops = next(entry for entry in GROUPS if entry.name == group).flops
                if ceiling is not None and flops is not None and threads == 1 and measured is not None:
                    allowed.append(f"{1e-3 * np.nanmedian(reference) * ceiling / flops:.1f}")
            reached.append(", ".join(ratios))
        lines.append(f"| {label} | {least:.2g} | {' | '.join(reached)} | {', '.join(allowed)} |")
    note = (
        "Hopper and HalfCheetah (with noise and without; ELU, dictionaries, images). The *limit* is what an update would "
        "reach with one thread if it did nothing but its matrix products, at the rate of the fastest ones "
        "of the same run."
    )
    return f"{note}\n\n" + "\n".join(lines)


def cells(row: dict[str, Any], label: str) -> list[str]:
    """
    :param row: Of :func:`summarize`
    :param label: Of the candidate
    :return: What a table shows
    """
    digits = max(0, 2 - math.floor(math.log10(row["ms"])))
    spread = f"{row['ms quartile1']:.{digits}f} to {row['ms quartile3']:.{digits}f}"
    shown = [label, f"{row['ms']:.{digits}f}", spread, f"{row['ms least']:.{digits}f}"]
    for name in ("times SB3", "times SBX"):
        found = row[name]
        shown.append("" if found is None else _with_quartiles(found))
    shown.append("" if row["GFLOP/s"] is None else f"{row['GFLOP/s']:.0f}")
    shown.append("" if row["share of limit"] is None else f"{row['share of limit']:.0%}")
    return shown


def _with_quartiles(found: dict[str, float]) -> str:
    if found["quartile1"] == found["quartile3"]:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['quartile1']:.2f} to {found['quartile3']:.2f})"


def tables(content: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """
    :param content: What was measured
    :return: Title and rows of one table for each group and number of threads
    """
    rows, found = summarize(content), []
    for group in GROUPS:
        labels = {candidate.name: candidate.label for candidate in group.candidates}
        for threads in content["settings"]["threads"]:
            shown = [
                cells(row, labels[row["candidate"]])
                for row in rows
                if row["group"] == group.name and row["threads"] == threads
            ]
            if shown:
                plural = "" if threads == 1 else "s"
                found.append((f"{group.title}; ms per {group.unit}, {threads} thread{plural}", shown))
    return found


def missing(content: dict[str, Any]) -> list[str]:
    """
    :param content: What was measured
    :return: A line for each reason why candidates were not measured
    """
    reasons: dict[str, list[str]] = {}
    for entry in content["measurements"]:
        if entry.get("not_measured"):
            reasons.setdefault(entry["not_measured"], []).append(f"{entry['group']}/{entry['candidate']} ({entry['threads']})")
    return [f"not measured: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def contention(content: dict[str, Any]) -> list[str]:
    """
    :param content: What was measured
    :return: A line on what other processes took, none if it is unknown
    """
    shares = [value for entry in content["measurements"] for value in entry["extra"].get("others", []) if value is not None]
    if not shares:
        return []
    middle, high = np.quantile(shares, [0.5, 0.9])
    line = f"during the turns, other processes took {middle:.2f} processors (median; 0.9 quantile {high:.2f})"
    return [line if high < TOO_BUSY else f"**the machine was busy**: {line}"]


def _software(content: dict[str, Any]) -> list[str]:
    """Versions of the peers, and what computes our updates."""
    peers: dict[str, str] = {}
    kernels: dict[str, set[str]] = {}
    for entry in content["measurements"]:
        versions = entry.get("versions", {})
        peers |= {name: versions[name] for name in PEER_PACKAGES if name in versions}
        names = [entry.get("facts", {}).get(name) for name in ("kernel", "products")]
        if names[0] is not None:
            kernels.setdefault(", ".join(filter(None, names)), set()).add(entry["candidate"])
    lines = [", ".join(f"{name} {version}" for name, version in peers.items())] if peers else []
    shown = "; ".join(f"{name} ({', '.join(sorted(candidates))})" for name, candidates in kernels.items())
    return [*lines, *([f"update kernels: {shown}"] if shown else [])]


def _episodes(content: dict[str, Any]) -> list[str]:
    """How long episodes were: their resets are part of the steps of `learn()`."""
    lengths: dict[str, list[float]] = {}
    for entry in content["measurements"]:
        found = [value for value in entry["extra"].get("episode_length", []) if value is not None]
        if found:
            lengths.setdefault(f"{entry['group']}/{entry['candidate']}", []).extend(found)
    shown = "; ".join(f"{name} {min(values):.0f} to {max(values):.0f}" for name, values in lengths.items())
    return [f"mean steps of an episode, lowest to highest turn: {shown}"] if shown else []


def facts(content: dict[str, Any]) -> list[str]:
    """
    :param content: What was measured
    :return: Lines about the machine and the run
    """
    manifest, settings = content["manifest"], content["settings"]
    flags = ", ".join(name for name, present in manifest["flags"].items() if present) or "none of those looked for"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    lines = [
        f"{manifest['cpu']}, {manifest['processors']} processors, {flags}",
        f"{manifest['date']}, commit {manifest['git_commit']}",
        f"{versions}; load average {manifest['load_average_before']:.2f} before, {manifest['load_average_after']:.2f} after",
        f"{settings['rounds']} rounds of {settings['seconds_per_round']:g} s per candidate, {settings['clock']} clock; "
        f"`{manifest['command']}`",
    ]
    lines += _software(content)
    for threads, rates in limits(content).items():
        measured = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
        lines.append(f"limit with {threads} thread{'' if threads == '1' else 's'}: {measured}")
    lines += _episodes(content) + contention(content)
    if not content["complete"]:
        lines.append("**incomplete**: the run was interrupted")
    return lines


def markdown(content: dict[str, Any], figure: str | None) -> str:
    """
    :param content: What was measured
    :param figure: Path of the figure, relative to the text
    :return: All of it as Markdown
    """
    parts = ["\n".join(f"- {line}" for line in [*facts(content), *missing(content)])]
    if figure is not None:
        parts.append(f"![Times SB3's speed]({figure})")
    parts.append(f"**Aims**\n\n{aims(content)}")
    for title, rows in tables(content):
        used = [index for index in range(len(HEADINGS)) if any(row[index] for row in rows)]
        lines = [[HEADINGS[index] for index in used], ["---"] * len(used), *([row[index] for index in used] for row in rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def memory_markdown(content: dict[str, Any]) -> str:
    """
    :param content: What `memory.py` measured
    :return: A table
    """
    heading = f"{content['rows']:,} rows, {content['steps']} gradient steps"
    lines = [f"| {heading} | peak, MB | after the imports, MB | peak, times SB3's |", "|---|---|---|---|"]
    for case in content["cases"]:
        share = "" if case["ratio"] is None else f"{case['ratio']:.3f}"
        lines.append(f"| {case['label']} | {case['peak'] / 1e6:.0f} | {case['after_imports'] / 1e6:.0f} | {share} |")
    manifest = content["manifest"]
    return f"Memory, {manifest['date']}, commit {manifest['git_commit']}:\n\n" + "\n".join(lines) + "\n"


def ablation_markdown(content: dict[str, Any]) -> str:
    """
    :param content: What `ablation.py` measured
    :return: A table
    """
    lines = ["| variant | ms per update | times SB3's speed, quartiles |", "|---|---|---|"]
    for variant in content["variants"]:
        low, high = variant["quartiles"]
        compiling = f", {variant['first_call']:.0f} s to compile" if "compile" in variant["label"] else ""
        label = variant["label"] + compiling
        lines.append(f"| {label} | {variant['ms']:.2f} | {variant['ratio']:.2f} ({low:.2f}-{high:.2f}) |")
    manifest = content["manifest"]
    heading = f"{content['rounds']} rounds of {content['steps']} updates, one thread, processor time"
    return f"{heading}; {manifest['date']}, commit {manifest['git_commit']}:\n\n" + "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> bool:
    """
    Draw how many times as fast as SB3 the candidates are.

    :param content: What was measured
    :param path: Where the figure shall be
    :return: Whether there was something to draw
    """
    rows = [row for row in summarize(content) if row["times SB3"] is not None]
    shown = [group for group in GROUPS if any(row["group"] == group.name for row in rows)]
    if not shown:
        return False
    threads = content["settings"]["threads"]
    # Pairs of ours and SB3's make one panel together
    panels: list[list[Group]] = [[group] for group in shown if len(group.candidates) > 2]
    pairs = [group for group in shown if len(group.candidates) == 2]
    panels += [pairs] if pairs else []
    sizes = [len(_bars(panel, rows)) for panel in panels]
    height = 0.30 * len(threads) * sum(sizes) + 0.9 * len(panels)
    ratios = [size + 1 for size in sizes]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, max(3, height)), height_ratios=ratios, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, panel, rows, threads)
    axes[-1, 0].set_xlabel("times SB3's speed in the same round (median, quartiles)")
    shades = f"{threads[0]} thread(s)" if len(threads) == 1 else f"{', '.join(map(str, threads))} threads: dark to pale"
    figure.suptitle(f"{content['manifest']['cpu']}, {shades}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _bars(panel: list[Group], rows: list[dict[str, Any]]) -> list[tuple[Group, Candidate]]:
    """What has a bar: the reference has one where it is not the only thing to compare with."""
    return [
        (group, candidate)
        for group in panel
        for candidate in group.candidates
        if ((len(panel) == 1 and len(group.candidates) > 2) or candidate.name != REFERENCE)
        and any(row["group"] == group.name and row["candidate"] == candidate.name for row in rows)
    ]


def _draw_panel(axis: Any, panel: list[Group], rows: list[dict[str, Any]], threads: list[int]) -> None:
    bars = _bars(panel, rows)
    found = {(row["group"], row["candidate"], row["threads"]): row["times SB3"] for row in rows}
    thickness, longest = 0.8 / len(threads), 1.0
    for position, (group, candidate) in enumerate(bars):
        color = FAMILIES.get(candidate.name, OURS)
        for index, n_threads in enumerate(threads):
            values = found.get((group.name, candidate.name, n_threads))
            if values is None:
                continue
            y = position + (index - (len(threads) - 1) / 2) * thickness
            below, above = values["median"] - values["quartile1"], values["quartile3"] - values["median"]
            # Paler with each further number of threads
            alpha = 1.0 - 0.5 * index / max(1, len(threads) - 1)
            axis.barh(y, values["median"], thickness * 0.92, color=color, alpha=alpha, edgecolor="none")
            axis.errorbar(values["median"], y, xerr=[[below], [above]], color="black", linewidth=1, capsize=2)
            axis.text(values["quartile3"] + 0.03, y, f"{values['median']:.2f}", va="center", fontsize=8)
            longest = max(longest, values["quartile3"])
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    names = [candidate.label if len(panel) == 1 else group.title.replace("`", "") for group, candidate in bars]
    axis.set_yticks(range(len(bars)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.12)
    # What is in parentheses does not fit, and is in the tables
    title = panel[0].title.replace("`", "").split(" (")[0] if len(panel) == 1 else "Ours against SB3, the same networks"
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def fill_readme(results: Path = RESULTS, readme: Path = README) -> None:
    """
    Put the tables of all complete results between the markers of the README.

    :param results: Folder of the results
    :param readme: The README, in the folder above
    """
    parts = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        if "measurements" not in content or not content["complete"]:
            # Of another script of this folder, or of an interrupted run
            continue
        figure = path.with_suffix(".png")
        parts.append(f"### {content['manifest']['cpu']}\n")
        parts.append(markdown(content, f"{results.name}/{figure.name}" if figure.exists() else None))
    for path in sorted(results.glob(f"*{MEMORY}")):
        content = json.loads(path.read_text())
        parts.append(f"### Memory, {content['manifest']['cpu']}\n")
        parts.append(memory_markdown(content))
    for path in sorted(results.glob(f"*{ABLATION}")):
        content = json.loads(path.read_text())
        parts.append(f"### What each technique gives, {content['manifest']['cpu']}\n")
        parts.append(ablation_markdown(content))
    if (results / "precision.json").exists():
        # Not at the top, since it needs the package
        from precision import load, report

        runs = load()
        processors = ", ".join(sorted({run["manifest"]["cpu"] for run in runs}))
        parts.append(f"### Does bfloat16 learn as float32 does? {processors}\n")
        parts.append(f"{PRECISION}\n\n{report(runs)}\n\n![Learning curves]({results.name}/precision.png)\n")
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} has no place for the results: put `{BEGIN}` and `{END}` on lines of their own.")
    filled = f"{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}"
    readme.write_text(re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: filled, text, flags=re.DOTALL))


if __name__ == "__main__":
    fill_readme()
