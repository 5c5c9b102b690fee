"""Where a study's results are from: data, versions, machines, pretrained weights, and how to get them again."""

import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import MOST_NAMED, NONE, counted, listed, number
from sb3_offline_ft.study.design.protocol import STUDY_FILE, Protocol
from sb3_offline_ft.study.engine.results import Run
from sb3_offline_ft.study.report.analysis import StudyNumbers

OWN = "sb3-offline-ft"
NOT_RECORDED = "not recorded"
MACHINE = ("cpu", "cpu_model", "gpu", "platform", "device")
"""What a manifest says of the machine."""
CODE_DIGITS = 12


@dataclass(frozen=True)
class DataFacts:
    """What is known of a dataset; the returns of its episodes are in words."""

    transitions: int
    episodes: int
    returns: str
    mean_return: float
    fingerprint: str
    remark: str


def data_facts(protocol: Protocol, runs: Iterable[Run]) -> dict[str, DataFacts]:
    """What is known of a study's datasets by label: from the data if it is here, else from the finished runs."""
    recorded: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.cell.dataset is not None:
            recorded.setdefault(run.cell.dataset, run.result.manifest["dataset"])
    facts = {}
    for label, spec in protocol.datasets.items():
        known = recorded.get(label)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                dataset = load_dataset(spec, download=False, trust_pickle=protocol.trust_pickle)
        except (OSError, ValueError, ImportError):
            if known is not None:
                facts[label] = _as_recorded(known, "not readable here: as the runs recorded it")
            continue
        if known is not None and known["fingerprint"] != dataset.fingerprint:
            facts[label] = _as_recorded(known, "as the runs recorded it; the data that is here now is NOT what they had")
            continue
        returns = dataset.episode_returns
        mean, lowest, highest = (number(float(value)) for value in (returns.mean(), returns.min(), returns.max()))
        words = f"mean {mean}, from {lowest} to {highest}"
        facts[label] = DataFacts(
            len(dataset), dataset.n_episodes, words, float(np.mean(returns)), dataset.fingerprint,
            "as the runs had it" if known is not None else "",
        )  # fmt: skip
    return facts


def _as_recorded(known: Mapping[str, Any], remark: str) -> DataFacts:
    mean = known["mean_return"]
    return DataFacts(known["transitions"], known["episodes"], f"mean {number(mean)}", mean, known["fingerprint"], remark)


def data_card(numbers: StudyNumbers, facts: dict[str, DataFacts]) -> TextTable:
    """A row for each dataset, with what is known of it."""
    scales = {one.label: one.scale for one in numbers.datasets}
    rows = []
    for label, spec in numbers.protocol.specs.items():
        one, scale = facts.get(label), scales.get(label)
        if one is None:
            rows.append([label, spec, NONE, NONE, NONE, NONE, "not readable here, and no run has finished"])
            continue
        score = NONE if scale is None else number(scale.normalized(one.mean_return), 1)
        counts = f"{one.transitions:,} in {counted(one.episodes, 'episode')}"
        rows.append([label, spec, counts, one.returns, score, one.fingerprint[:16], one.remark])
    columns = ["dataset", "spec", "transitions", "returns", "normalised mean", "fingerprint", "state"]
    return TextTable("data", columns, rows, "", numbers.scale_words)


def machines_table(runs: Iterable[Run]) -> TextTable:
    """Versions and machines of finished runs, with the number of runs where they differ."""
    machines = [_machine(run) for run in runs]
    n = len(machines)
    counts: dict[str, Counter[str]] = {}
    for name in dict.fromkeys([OWN, *(name for machine in machines for name in machine)]):
        counts[name] = Counter(machine.get(name, NOT_RECORDED) for machine in machines)
    rows = []
    for name, values in counts.items():
        texts = [value if times == n else f"{value} ({counted(times, 'run')})" for value, times in sorted(values.items())]
        rows.append([name, "; ".join(texts)])
    return TextTable("machines", ["", "of the runs"], rows)


def _machine(run: Run) -> dict[str, str]:
    manifest = run.result.manifest
    machine = {str(name): str(version) for name, version in (manifest.get("versions") or {}).items()}
    if manifest.get("code"):
        machine["code"] = str(manifest["code"])[:CODE_DIGITS]
    return machine | {name: str(manifest[name]) for name in ("python", *MACHINE) if manifest.get(name) is not None}


def provenance(runs: Iterable[Run]) -> list[str]:
    """What can be said of versions, machines, times and pretrained weights of finished runs."""
    runs = list(runs)
    machines = [_machine(run) for run in runs]
    names = sorted({name for machine in machines for name in machine} - {"cpu", "cpu_model", "gpu", "platform"})
    different = [name for name in names if len({machine.get(name) for machine in machines}) > 1]
    unknown = sum(OWN not in machine for machine in machines)
    if unknown:
        different = [name for name in different if name != OWN]
        which = "" if unknown == len(runs) else f" of {unknown} of {counted(len(runs), 'run')}"
        rest = f"Differences are known of {listed(different)}, see below." if different else "No other one differs."
        texts = [f"The version of {OWN}{which} was not recorded: whether all runs had the same cannot be said. {rest}"]
    elif different:
        texts = [f"Not all runs had the same versions: {listed(different)} differ, see below."]
    else:
        same = ["Python" if name == "python" else name for name in names if name not in ("code", "device")]
        of_code = "and the same code" if "code" in names else "and whether they had the same code was not recorded"
        texts = [f"All {counted(len(runs), 'run')} had the same versions of {listed(same)}, {of_code}."]
    texts += [_kinds_in_words(machines, "cpu", "cpu_model", "processor")]
    if on_gpu := [machine for machine in machines if machine.get("device", "").startswith("cuda")]:
        texts.append(_kinds_in_words(on_gpu, "gpu", "", "GPU"))
    texts += _weights_in_words(runs)
    changed = [run for run in runs if run.result.manifest.get("changed_hyperparams")]
    if changed:
        arguments = sorted({name for run in changed for name in run.result.manifest["changed_hyperparams"]})
        texts.append(f"Hyperparameters changed during {len(changed)} of {counted(len(runs), 'run')}: {listed(arguments)}.")
    started = sorted(str(run.result.manifest["started"]) for run in runs if run.result.manifest.get("started"))
    seconds = [sum(float(value) for value in (run.result.manifest.get("seconds") or {}).values()) for run in runs]
    if started:
        hours = sum(seconds) / 3600
        time = f"{number(hours, 1)} hours" if hours >= 1 else f"{number(sum(seconds) / 60, 1)} minutes"
        texts.append(f"The first run was begun at {started[0]}, the last at {started[-1]} (UTC); together they took {time}.")
    return texts


def _kinds_in_words(machines: list[dict[str, str]], name: str, model: str, noun: str) -> str:
    """Processors of one name may be of several models; which, older runs do not say."""
    models: dict[str, set[str]] = {}
    for machine in machines:
        if name in machine:
            models.setdefault(machine[name], set()).update({machine[model]} if model in machine else ())
    unknown = sum(name not in machine for machine in machines)
    if unknown:
        n = counted(len(machines), "run")
        return f"The {noun} of {unknown} of {n} was not recorded: whether all had the same kind cannot be said."
    kinds = sum(max(1, len(each)) for each in models.values())
    if kinds == 1:
        return f"All runs were made on the same kind of {noun}."
    return f"Runs were made on {kinds} kinds of {noun}s: their rounding differs, and with it long runs."


def _weights_in_words(runs: list[Run]) -> list[str]:
    """Methods are compared fairly only if those with the same pretraining, data and seed began with the same weights."""
    starts: dict[tuple[str | None, int, str], dict[str, list[str]]] = {}
    for run in runs:
        facts = run.result.manifest.get("pretrained")
        if facts is not None:
            start = starts.setdefault((run.cell.dataset, run.cell.seed, str(facts["recipe"])), {})
            start.setdefault(str(facts["weights_sha256"]), []).append(run.cell.method.name)
    if not starts:
        return []
    shared = {key: weights for key, weights in starts.items() if sum(map(len, weights.values())) > 1}
    different = [key for key, weights in shared.items() if len(weights) > 1]
    case = "in which several methods share dataset, seed and pretraining"
    if different:
        named = [f"{dataset}, seed {seed}" for dataset, seed, _ in different[:MOST_NAMED]]
        more = f" and {len(different) - MOST_NAMED} more" if len(different) > MOST_NAMED else ""
        texts = [
            f"In {len(different)} of {len(shared)} cases {case}, they did NOT start from the same weights: {'; '.join(named)}"
            f"{more}. They were pretrained more than once, on machines or with versions that round differently."
        ]
    elif shared:
        texts = [f"In all {len(shared)} cases {case}, they started from exactly the same weights (SHA-256 of the parameters)."]
    else:
        texts = ["No two runs share a pretraining."]
    recipes = Counter((dataset, seed) for dataset, seed, _ in starts)
    if max(recipes.values()) > 1:
        texts.append("Some variants need a pretraining of their own, as their networks or its settings differ.")
    return texts


def commands(numbers: StudyNumbers) -> str:
    """What to type to get the results again."""
    machines = [_machine(run) for run in numbers.results.runs]
    name = shlex.quote(numbers.protocol.folder.name or "study")
    lines = []
    names = dict.fromkeys(name for machine in machines for name in machine if name not in ("python", "code", *MACHINE))
    versions = {package: {machine.get(package) for machine in machines} for package in names}
    different = [package for package, found in versions.items() if len(found) > 1]
    if different:
        lines.append(f"# the runs had several versions of {listed(different)}, see the table above: none are named here")
    else:
        fixed = {package: str(found.pop()).partition("+")[0] for package, found in versions.items()}
        own = fixed.pop(OWN, None)
        if own is not None:
            lines.append(f"# with {OWN} {own} installed, and the versions of the runs:")
        else:
            lines.append(f"# with {OWN} installed (its version was not recorded), and the versions of the runs:")
        pinned = " ".join(shlex.quote(f"{package}=={version}") for package, version in fixed.items())
        lines.append(f"python -m pip install {pinned}")
    lines.append(f"mkdir -p {name}    # then save the protocol as {name}/{STUDY_FILE}")
    lines.append(f"sb3-offline-ft study run {name} --workers 2")
    lines.append(f"sb3-offline-ft study report {name}")
    return "\n".join(lines)


def missing_table(numbers: StudyNumbers) -> TextTable:
    """The runs that are not in the report, and why."""
    rows = [[cell.name, f"failed: {_last_line(error)}"] for cell, error in numbers.results.failed.items()]
    rows += [[name, f"not measurable: {' '.join(error.split())}"] for name, error in numbers.unusable.items()]
    damaged = numbers.results.damaged
    rows += [
        [cell.name, "its run folder is damaged, and made anew by `study run`" if cell in damaged else "not finished"]
        for cell in numbers.results.missing
    ]
    return TextTable("missing", ["run", "why"], rows)


def _last_line(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1] if lines else "no error was recorded"
