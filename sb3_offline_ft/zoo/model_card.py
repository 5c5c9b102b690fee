"""The model card of a run on the Hugging Face Hub: data, baseline, dips, what was served, and how to run it."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.algorithms import algorithm_class
from sb3_offline_ft.deployment.champion_challenger import BEST_MODEL
from sb3_offline_ft.deployment.history import History, level_words
from sb3_offline_ft.evaluation.run_summary import EVALUATIONS, summarize_run
from sb3_offline_ft.zoo.command_line import without_options
from sb3_offline_ft.zoo.manifest import DEFAULT, MANIFEST, read_manifest
from sb3_offline_ft.zoo.reproduce import COMMANDS
from sb3_offline_ft.zoo.trace import Trace

HOME = "https://github.com/DLR-RM"
_PATHS = re.compile(
    r"""(?P<url>\b(?!file:)[A-Za-z][\w+.-]*://[^\s'"`]*)
    | (?P<quoted>(?<=['"])[^'"]*[/\\][^'"]*(?=['"]))
    | (?P<bare>(?:\b[A-Za-z]:(?=[/\\]))?[^\s'"`|,;:*?<>()\[\]{}=]*[/\\][^\s'"`|,;:*?<>()\[\]{}=]*)""",
    re.VERBOSE,
)
"""What may be paths: in quotes, where they may hold spaces, and elsewhere. URLs are none."""
_ABSOLUTE = re.compile(r"\s*(~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[/\\])")
_SUFFIXES = (
    ".npz",
    ".hdf5",
    ".h5",
    ".pkl",
    ".csv",
    ".parquet",
    ".zip",
    ".onnx",
    ".yml",
    ".yaml",
    ".json",
    ".py",
    ".log",
    ".db",
)
_BETWEEN = re.compile(r"(\s\+\s|\?.*?(?=\s\+\s|$))")
"""What stands between the paths of a dataset spec: filters, and the plus before the next one."""
_OF_ONE_MACHINE = ("-f", "--log-folder", "-tb", "--tensorboard-log", "--storage", "--study-name", "--trial-id")
"""Options that say where a run writes, or what others do not have."""

Rows = Iterator[tuple[str, str]]


def model_card(
    folder: Path, model_file: Path, algo: str, environment: str, repository: str, results: Mapping[str, Any]
) -> str:
    """
    :param folder: The run's folder
    :param model_file: The model that is pushed
    :param algo: The algorithm's name in rl_zoo3
    :param environment: Gymnasium id of the environment
    :param repository: ``organization/name`` on the hub
    :param results: What huggingface_sb3 wrote of its evaluation: ``mean_reward``, ``std_reward`` and so on
    :return: The text in Markdown, without metadata, and without the folders of this machine
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    contest = History.read(folder)
    organization, name = repository.split("/")
    class_name = algorithm_class(algo).__name__
    rows = [
        *_evaluation_rows(results),
        ("model", _model_in_words(model_file, contest is not None)),
        *_data_rows(manifest),
        *_run_rows(folder, manifest, contest),
    ]
    table = "\n".join(f"| {title} | {text} |" for title, text in rows)
    options = f"--algo {algo} --env {environment}"
    source = f"{options} -orga {organization} -f logs/" + ("" if name == f"{algo}-{environment}" else f" -name {name}")
    return f"""
# **{class_name}** on **{environment}**

A policy that was pretrained on logged data and finetuned online with `{class_name}` of sb3_offline_ft, a plugin for
[Stable-Baselines3]({HOME}/stable-baselines3) and [RL Zoo]({HOME}/rl-baselines3-zoo).

| | |
|---|---|
{table}

Returns are undiscounted sums of rewards of an episode. J0 or "J after pretraining" is the mean return of the pretrained
policy, before its first online update.

## Use it

```bash
pip install sb3-offline-ft
# Reading a model unpickles parts of it, which can run code: do it only if you trust {organization}
export TRUST_REMOTE_CODE=True
python -m rl_zoo3.load_from_hub {source}
python -m rl_zoo3.enjoy {options} -f logs/
```

In Python, if it needs no statistics of `VecNormalize`:

```python
from huggingface_sb3 import load_from_hub
from sb3_offline_ft import {class_name}

model = {class_name}.load(load_from_hub("{repository}", "{algo}-{environment.replace("/", "-")}.zip"))
```

## Train it
{_training(folder, manifest, options)}
"""


def without_folders(text: str, folder: str | Path = "") -> str:
    """
    :param text: Any text, such as a path, a dataset spec or a word of a command
    :param folder: Where relative paths in it begin
    :return: The same, in which paths are replaced by the names of the files
    """

    def name(path: str) -> str:
        is_path = _ABSOLUTE.match(path) or path.endswith(_SUFFIXES) or os.path.exists(Path(folder, path))
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_path else path

    def names(found: re.Match[str]) -> str:
        spec: str = found[0]
        return (
            spec if found["url"] else "".join(piece if n % 2 else name(piece) for n, piece in enumerate(_BETWEEN.split(spec)))
        )

    if _ABSOLUTE.match(text):
        # As a whole: unquoted, and with spaces
        return "".join(piece if n % 2 else name(piece) for n, piece in enumerate(_BETWEEN.split(text)))
    return _PATHS.sub(names, text)


def _code(text: str) -> str:
    """A text to be shown as it is, in a cell of a table."""
    ticks, space = "`" * (_longest_ticks(text) + 1), " " if "`" in text else ""
    return f"{ticks}{space}{' '.join(text.split())}{space}{ticks}".replace("|", r"\|")


def _plain(text: str) -> str:
    """A text of which nothing is Markdown or HTML, in a cell of a table."""
    return re.sub(r"[\\`*<>|\[\]!&]", r"\\\g<0>", " ".join(text.split()))


def _block(command: str) -> str:
    """A command to be shown as it is."""
    ticks = "`" * max(3, _longest_ticks(command) + 1)
    return f"{ticks}bash\n{command}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _evaluation_rows(results: Mapping[str, Any]) -> Rows:
    n, kind = results["n_eval_episodes"], "deterministic" if results["is_deterministic"] else "stochastic"
    yield (
        "return",
        f"{results['mean_reward']:.1f} ± {results['std_reward']:.1f} ({n} episodes, {kind} actions, when it was pushed)",
    )


def _model_in_words(model_file: Path, has_champion: bool) -> str:
    if model_file.name == BEST_MODEL:
        return "the champion at the end of the run" if has_champion else "the best at evaluations"
    return "a checkpoint" if model_file.name.startswith("rl_model") else "the learner at the end of the run"


def _data_rows(manifest: Mapping[str, Any] | None) -> Rows:
    if manifest is not None and (data := manifest.get("dataset")):
        counts = f"{data['transitions']:,} transitions in {data['episodes']:,} episodes"
        spec = without_folders(str(data["spec"] or data["name"]), manifest["working_folder"])
        yield "data", f"{_code(spec)}: {counts}, mean return {data['mean_return']:.1f}"
        yield "fingerprint of the data", f"`{data['fingerprint'][:16]}`"


def _run_rows(folder: Path, manifest: Mapping[str, Any] | None, contest: History | None) -> Rows:
    if (folder / EVALUATIONS).is_file():
        summary = summarize_run(folder)
        # Its data is in other rows, and where its files are is nobody's business
        for part in (summary.contest_rows, summary.served_rows, summary.evaluation_rows):
            for title, text in part():
                yield _plain(title), _plain(text)
        return
    if manifest is not None and manifest.get("warmup_end", 0) > 0:
        episodes = [each for each in Trace.read(folder).episodes if each["timestep"] <= manifest["warmup_end"]]
        yield "J0", f"{level_words([each['return'] for each in episodes])}, in the warm-up"
    if contest is not None:
        for title, text in contest.in_words().items():
            yield _plain(title), _plain(text)
    returns = [each["return"] for each in Trace.read(folder).episodes]
    if returns:
        last = returns[-(-2 * len(returns) // 3) :] or returns
        yield (
            "return of training episodes",
            f"mean {np.mean(returns):.1f}, lowest {min(returns):.1f}, in the last third {np.mean(last):.1f}",
        )


def _training(folder: Path, manifest: Mapping[str, Any] | None, options: str) -> str:
    if manifest is None:
        return "\n" + _block(f"python -m rl_zoo3.train {options} -f logs/")
    public = partial(without_folders, folder=manifest["working_folder"])
    settings = [
        (name, public(json.dumps(fact["value"], ensure_ascii=False)), public(fact["source"]))
        for name, fact in manifest["hyperparameters"].items()
        if fact["source"] != DEFAULT and name != "tensorboard_log"
    ]
    rows = "\n".join(f"| {_plain(name)} | {_code(value)} | {_plain(source)} |" for name, value, source in settings)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    # A run that was killed has not said how far it came
    steps, updates = (
        manifest.get(name, end) for name, end in zip(("timesteps", "updates"), Trace.read(folder).end, strict=True)
    )
    command = f"python -m rl_zoo3.train {shlex.join(_arguments(manifest)) or options} --seed {manifest['seed']}"
    return f"""
{_block(command)}

| not a default of the algorithm | value | set by |
|---|---|---|
{rows}

Seed {manifest["seed"]}, {steps:,} interactions, {updates:,} updates. Versions: {_plain(versions)}."""


def _arguments(manifest: Mapping[str, Any]) -> list[str]:
    """What others can type of a run's command line; nothing if it was started in another way."""
    words = manifest["arguments"] if manifest["module"] in COMMANDS else []
    return [without_folders(word, manifest["working_folder"]) for word in without_options(words, _OF_ONE_MACHINE)]
