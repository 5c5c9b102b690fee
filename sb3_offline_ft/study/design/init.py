"""Writes the file of a new study."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sb3_offline_ft.algorithms import ALGORITHMS
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.strict_yaml import flow, listed
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.datasets import without_trust
from sb3_offline_ft.study.design.learners import algorithm_class
from sb3_offline_ft.study.design.methods import is_ours, known_algorithms, preset
from sb3_offline_ft.study.design.protocol import STUDY_FILE, Protocol
from sb3_offline_ft.study.design.reading import LABEL, default_every, place_paths, resolve_paths

DEFAULT_METHODS: dict[str, dict[str, Any]] = {
    "scratch": {"label": "TD3 from scratch", "algorithm": "td3", "start": "scratch"},
    "offline": {"label": "offline policy as it is", "frozen": True},
    "td3bc": {"label": "TD3BC kept", "algorithm": "td3bc"},
    "td3": {"label": "plain TD3", "algorithm": "td3"},
    "td3c": {"label": "TD3C, champion serves", "algorithm": "td3c", "champion": True},
    "td3c-guard": {"label": "TD3C with guard", "algorithm": "td3c", "guard": True},
}
PRETRAINING = "td3bc"
REFERENCE = "td3c"
WARMUP_SHARE = 6
"""In a run that is too short for the preset's warm-up, one interaction in so many is the warm-up."""

_TEMPLATE = """\
# A study: ways of finetuning, compared on the same data and seeds.
#   sb3-offline-ft study run {folder}        runs what is missing, and can be interrupted at any time
#   sb3-offline-ft study report {folder}     says what came out
# Change it whenever you like: finished runs that it still asks for are not run again.

name: {name}
env: {env}

# A label and the data: a Minari id, a file, a folder (relative to this file) or bundled:<name>; parts of it, mixtures:
#   few: bundled:hopper-medium?episodes=20&seed=0
#   best: bundled:hopper-medium?top_fraction=0.25
#   narrow: bundled:hopper-medium?min_return=1000&max_return=1500
#   mixed: 0.9*logs/medium.npz + 0.1*logs/expert.npz
datasets:
{datasets}

# What all methods start from but those with `start: scratch`; done once for each dataset and seed.
pretraining:
  algorithm: {pretraining}
  hyperparams: {{}}  # over the preset of this environment

seeds: {seeds}  # a number n for 0 to n-1, or a list
interactions: {interactions}  # environment steps of each run

evaluation: {{every: {every}, episodes: 10}}  # what is measured, and no learner sees
learner_evaluation: {{every: {every}, episodes: 10}}  # for learners that need some, such as TD3C; their steps are counted
# random_return: 17.1  # mean return of a random policy; by default what is known of the environment or the data

# Over the presets, for all methods with the algorithms of sb3-offline-ft that take it: warmup_steps, offline_fraction, ...
hyperparams: {hyperparams}

# Keys of a method: label, algorithm, start (pretrained or scratch), frozen, guard (true, or arguments of CollapseGuard),
# champion (true, or arguments of ChampionChallenger) and hyperparams. Any algorithm of Stable-Baselines3 can start from
# scratch: sac: {{algorithm: sac, start: scratch}}. A method can be a command: external: {{command: [python, learn.py]}}
methods:
{methods}

# Each value makes a variant of the methods that it acts in, such as
#   offline_fraction: [0, 0.25, 0.5, lin_0.5_0.0]
#   ensemble_size: [2, 10]
#   replay_buffer_kwargs.offline_sampling: [uniform, balanced]
#   finetuning_learning_rate: [1e-4, 3e-4]
# one factor at a time, or all combinations with `factors_combined: true`.
factors: {{}}
{reference}
# Hyperparameters before what is said above: the presets of sb3-offline-ft for this environment when this file was written, so
# that those of a newer version change nothing. Without this section they are those of the installed version.
presets:
{presets}
"""


def init_study(
    folder: str | Path,
    *,
    env: str,
    datasets: Mapping[str, str] | Sequence[str],
    seeds: int | Sequence[int] = 5,
    interactions: int = 30_000,
    methods: Sequence[str] | None = None,
    name: str | None = None,
    trust_pickle: bool = False,
) -> Path:
    """
    Write the file of a new study, after a check that its environment, data and methods go together.

    :param folder: Folder of the study, which is made if it is missing
    :param env: Gymnasium id of the environment; ``module:id`` imports the module first
    :param datasets: Specs of datasets by label, or a list of specs, each perhaps as ``label=spec``
    :param seeds: Their number, or a list of them
    :param interactions: Environment steps of each run
    :param methods: Names out of :data:`DEFAULT_METHODS`, or of algorithms, by default all of :data:`DEFAULT_METHODS`
    :param name: Name of the study, by default that of the folder
    :param trust_pickle: Whether datasets may be read from pickle files, as with ``?trust_pickle=1`` in their specs: that runs
        code which these hold. The study's file does not keep it
    :return: The file
    :raises FileExistsError: There is a study already
    :raises NotADirectoryError: The folder is a file
    :raises FileNotFoundError: A dataset is not there
    :raises ValueError: Something is unknown, or does not go together
    """
    folder = Path(folder).expanduser()
    file = folder.absolute() / STUDY_FILE
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder for the study.")
    if file.exists():
        raise FileExistsError(
            f"There is a study already: {file}. Edit it to change the study, delete it to begin anew, or take another folder."
        )
    chosen = {each: _method(each) for each in dict.fromkeys(DEFAULT_METHODS if methods is None else methods)}
    used = {entry.get("algorithm", PRETRAINING) for entry in chosen.values()} | {PRETRAINING}
    algorithms = [each for each in ALGORITHMS if each in used]
    labelled = datasets if isinstance(datasets, Mapping) else _labelled(datasets, env)
    here = {label: resolve_paths(spec, Path.cwd()) for label, spec in labelled.items()}
    # What is given relative to the working folder is written relative to the study's, so that both can be moved together
    beside = {
        label: place_paths(spec, Path.cwd(), lambda base: _seen_from(file.parent, base)) for label, spec in labelled.items()
    }

    def text(specs: Mapping[str, str]) -> str:
        return _TEMPLATE.format(
            folder=shlex.quote(str(folder)),
            name=flow(folder.absolute().name if name is None else name),
            env=flow(env),
            datasets=listed({label: without_trust(spec) for label, spec in specs.items()}),
            pretraining=PRETRAINING,
            seeds=flow(seeds if isinstance(seeds, int) else list(seeds)),
            interactions=flow(interactions),
            every=default_every(interactions) if isinstance(interactions, int) else 1000,
            hyperparams=flow(_shorter_warmup(algorithms, env, interactions)),
            methods=listed(chosen),
            presets=_presets(algorithms, env),
            reference=f"\nreference_method: {REFERENCE}  # the others are compared with it\n" if REFERENCE in chosen else "",
        )

    # The folder from which the relative paths lead is not made before all is well
    # Of specs that are given here, trust counts
    Protocol.parse(text(here), file, trust_pickle).changed(datasets=here).check()
    with atomic_write(file) as stream:
        stream.write(text(beside).encode())
    return file


def next_steps(file: Path, trust_pickle: bool = False) -> str:
    """What to do with the file that :func:`init_study` wrote, for people."""
    protocol = Protocol.load(file)
    runs, folder = len(protocol.cells()), shlex.quote(str(file.parent))
    trust = " --trust-pickle" * trust_pickle
    return f"{file}: {runs} run{'s' * (runs != 1)}. Edit it if you like, then run `sb3-offline-ft study run {folder}{trust}`"


def _method(name: str) -> dict[str, Any]:
    if name in DEFAULT_METHODS:
        return DEFAULT_METHODS[name]
    if name not in known_algorithms():
        raise ValueError(f"Unknown method {name!r}. {suggestion(name, [*DEFAULT_METHODS, *known_algorithms()])}")
    start = {} if is_ours(name) else {"start": "scratch"}
    return {"label": algorithm_class(name).__name__, "algorithm": name, **start}


def _labelled(specs: Sequence[str], env: str) -> dict[str, str]:
    labelled: dict[str, str] = {}
    for text in specs:
        label, equals, spec = text.partition("=")
        given = bool(equals and LABEL.fullmatch(label))
        if not given:
            label, spec = _label(without_trust(text), env), text
        if given and label in labelled:
            raise ValueError(
                f"Two datasets are called {label!r}: give each a label of its own, as in `--dataset {label}2=...`."
            )
        number, first = 2, label
        while label in labelled:
            label, number = f"{first}-{number}", number + 1
        labelled[label] = spec
    return labelled


def _label(spec: str, env: str) -> str:
    body = env.rpartition(":")[2].partition("-")[0].lower()
    words = []
    for part in re.split(r"\s\+\s", spec):
        base, _, options = part.rpartition("*")[2].strip().partition("?")
        base = re.split(r"[/\\:]", base.rstrip("/\\"))[-1]
        base = re.sub(r"(-v\d+|\.(npz|hdf5|h5|pkl))$", "", base).removeprefix(f"{body}-")
        words.append("-".join([base, *(re.sub("=", "", option) for option in options.split("&") if option)]))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words)).strip("-._") or "data"


def _seen_from(folder: Path, base: str) -> str:
    path = Path.cwd() / base
    try:
        return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
    except ValueError:
        # Another drive
        return str(path)


def _shorter_warmup(algorithms: Sequence[str], env: str, interactions: int) -> dict[str, int]:
    longest = max(preset(each, env)[0].get("warmup_steps", 0) for each in algorithms)
    is_short = isinstance(interactions, int) and 2 * longest > interactions
    return {"warmup_steps": max(1, interactions // WARMUP_SHARE)} if is_short else {}


def _presets(algorithms: Sequence[str], env: str) -> str:
    lines: list[str] = []
    for each in algorithms:
        hyperparams, callbacks = preset(each, env)
        lines += [f"  {each}:", *(f"    {name}: {flow(value)}" for name, value in (hyperparams | callbacks).items())]
    return "\n".join(lines)
