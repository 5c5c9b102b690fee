"""The model card of a run on the Hugging Face Hub: data, baseline, dips, what was served, and how to run it."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sb3_offline_ft.algorithms import algorithm_class
from sb3_offline_ft.deployment.champion_challenger import BEST_MODEL
from sb3_offline_ft.deployment.history import History, level_words
from sb3_offline_ft.evaluation.run_summary import EVALUATIONS, summarize_run
from sb3_offline_ft.zoo.manifest import DEFAULT, MANIFEST, read_manifest
from sb3_offline_ft.zoo.reproduce import COMMANDS
from sb3_offline_ft.zoo.trace import Trace

HOME = "https://github.com/DLR-RM"
_BEGIN = r"(?:~|[A-Za-z]:)?[/\\]"
PATHS = (
    re.compile(rf"(?<=['\"]){_BEGIN}[^'\"]*[/\\](?=[^'\"/\\]*['\"])"),
    re.compile(rf"(?<![\w/:.]){_BEGIN}(?:[^\s'\"`|,;:*?<>/\\]+[/\\])+"),
)
"""Folders of absolute paths: in quotes, where they may hold spaces, and elsewhere, but not those of URLs."""
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
    card = f"""
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
{_training(manifest, options)}
"""
    return without_folders(card)


def without_folders(text: str) -> str:
    """A text in which absolute paths are replaced by the names of the files."""
    for pattern in PATHS:
        text = pattern.sub("", text)
    return text


def public_spec(spec: Any) -> str:
    """The name of a dataset, without the folders of this machine."""
    words = [public_spec(each) for each in spec] if isinstance(spec, list) else str(spec).split(" ")
    return " ".join(Path(word).name if Path(word.partition("?")[0]).exists() else word for word in words)


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
    data = None if manifest is None else manifest.get("dataset")
    if data:
        counts = f"{data['transitions']:,} transitions in {data['episodes']:,} episodes"
        yield "data", f"`{public_spec(data['spec'] or data['name'])}`: {counts}, mean return {data['mean_return']:.1f}"
        yield "fingerprint of the data", f"`{data['fingerprint'][:16]}`"


def _run_rows(folder: Path, manifest: Mapping[str, Any] | None, contest: History | None) -> Rows:
    if (folder / EVALUATIONS).is_file():
        summary = summarize_run(folder)
        # Its data is in other rows, and where its files are is nobody's business
        for part in (summary.contest_rows, summary.served_rows, summary.evaluation_rows):
            yield from part()
        return
    if manifest is not None and manifest.get("warmup_end", 0) > 0:
        episodes = [each for each in Trace.read(folder).episodes if each["timestep"] <= manifest["warmup_end"]]
        yield "J0", f"{level_words([each['return'] for each in episodes])}, in the warm-up"
    if contest is not None:
        yield from contest.in_words().items()
    returns = [each["return"] for each in Trace.read(folder).episodes]
    if returns:
        last = returns[-(-2 * len(returns) // 3) :] or returns
        yield (
            "return of training episodes",
            f"mean {np.mean(returns):.1f}, lowest {min(returns):.1f}, in the last third {np.mean(last):.1f}",
        )


def _training(manifest: Mapping[str, Any] | None, options: str) -> str:
    if manifest is None:
        return f"\n```bash\npython -m rl_zoo3.train {options} -f logs/\n```"
    rows = "\n".join(
        f"| {name} | `{json.dumps(public_spec(fact['value']) if name == 'dataset' else fact['value'])}` | {fact['source']} |"
        for name, fact in manifest["hyperparameters"].items()
        if fact["source"] != DEFAULT and name != "tensorboard_log"
    )
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    steps, updates = manifest.get("timesteps", manifest["n_timesteps"]), manifest.get("updates", 0)
    return f"""
```bash
python -m rl_zoo3.train {shlex.join(_arguments(manifest)) or options} --seed {manifest["seed"]}
```

| not a default of the algorithm | value | set by |
|---|---|---|
{rows}

Seed {manifest["seed"]}, {steps:,} interactions, {updates:,} updates. Versions: {versions}."""


def _arguments(manifest: Mapping[str, Any]) -> list[str]:
    """What others can type of a run's command line; nothing if it was started in another way."""
    words, kept = iter(manifest["arguments"] if manifest["module"] in COMMANDS else ()), []
    for word in words:
        if word in _OF_ONE_MACHINE:
            next(words, None)
        else:
            kept.append(word)
    return kept
