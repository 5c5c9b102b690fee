"""What was tuned, as a configuration of rl_zoo3."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sb3_offline_ft.algorithms import DISTRIBUTION, distribution_of, preset_path
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX
from sb3_offline_ft.datasets.specs import join_specs, parse_spec
from sb3_offline_ft.pretrained.recipe import SHARED_WITH_PRETRAINING
from sb3_offline_ft.study.design.learners import PLAIN_TD3, algorithm_class
from sb3_offline_ft.study.design.methods import Method, known_hyperparams, online_only
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.tuning.plan import TuningPlan

CALLBACKS = {"guard": "sb3_offline_ft.CollapseGuard", "champion": "sb3_offline_ft.ChampionChallenger"}


def spec_seen_from(study: Protocol, label: str, folder: Path) -> str:
    """
    The spec of a study's dataset for a file in another folder, from which relative paths lead to the same data; it has no path
    of this machine that the study has not.
    """
    written = study.specs[label]

    def seen(base: str) -> str:
        path = Path(base)
        if path.is_relative_to(study.folder) and base not in written:
            start, path = study.folder, path.relative_to(study.folder)
        elif not path.is_absolute() and (base.startswith(".") or path.is_file()):
            start = Path.cwd()
        else:
            return base
        try:
            # Where a folder is a link, the system looks for `..` in what it links to
            way = Path(os.path.relpath(os.path.realpath(start), os.path.realpath(folder)))
        except ValueError:
            # Another drive on Windows
            return str(start / path)
        return f"{way.as_posix()}/{path.as_posix()}"

    parts = parse_spec(study.datasets[label])
    texts = [part.text(seen(str(part.base)), part.trust_pickle) for part in parts]
    return join_specs(texts, [part.weight for part in parts]) or texts[0]


def zoo_entry(plan: TuningPlan, method: Method, folder: Path) -> dict[str, Any]:
    """
    Write a method as rl_zoo3 has it: what acts in the pretraining keeps the value that it was tuned with, and is given once
    more with the prefix ``finetuning_`` where the finetuning differs.
    """
    known, left_out = known_hyperparams(method.algorithm), online_only(method.algorithm)
    defaults = constructor_arguments(algorithm_class(plan.study.pretraining.algorithm))
    offline = {name: value for name, value in method.pretraining_hyperparams.items() if name in known - left_out}
    entry: dict[str, Any] = {
        "policy": "MlpPolicy",
        "n_timesteps": plan.study.interactions,
        "dataset": spec_seen_from(plan.study, plan.dataset, folder),
        **offline,
    }
    for name, value in method.hyperparams.items():
        if name in SHARED_WITH_PRETRAINING:
            continue
        differs = name not in left_out and value != offline.get(name, defaults.get(name, value))
        entry[FINETUNING_PREFIX + name if differs else name] = value
    callback = _callback(plan, method)
    return entry | ({} if callback is None else {"callback": callback})


def _callback(plan: TuningPlan, method: Method) -> Any:
    if method.callbacks:
        return [{CALLBACKS[name]: dict(arguments)} for name, arguments in method.callbacks.items()]
    presets = yaml.safe_load(Path(preset_path(method.algorithm)).read_text(encoding="utf-8"))
    return presets.get(_env_id(plan), presets["default"]).get("callback")


def _env_id(plan: TuningPlan) -> str:
    return plan.study.env.rpartition(":")[2]


def pretrains_alike(one: str, other: str) -> bool:
    """Whether two algorithms do the same offline, as those of this package do that add the same hyperparameters there."""
    if one == other:
        return True
    if any(distribution_of(name) != DISTRIBUTION for name in (one, other)):
        return False
    added, others = (known_hyperparams(name) - online_only(name) - known_hyperparams(PLAIN_TD3) for name in (one, other))
    return added == others != set()


def zoo_command(plan: TuningPlan, file: Path) -> str:
    """How to train with a configuration, in its folder."""
    module, _, env = plan.study.env.rpartition(":")
    evaluation = plan.study.learner_evaluation
    words = ["python", "-m", "rl_zoo3.train", "--algo", plan.method.algorithm, "--env", env, "-conf", file.name]
    words += ["--eval-freq", str(evaluation.every), "--eval-episodes", str(evaluation.episodes)]
    return shlex.join([*words, *(["--gym-packages", module] if module else [])])


def write_entry(plan: TuningPlan, method: Method, file: Path, facts: Mapping[str, str]) -> str:
    """Write a configuration file of rl_zoo3, with facts as comments, and give what is in it."""
    pretraining = plan.study.pretraining.algorithm
    lines = [f"Tuned with `sb3-offline-ft study tune` for {plan.study.env} on {plan.study.specs[plan.dataset]}"]
    lines += [f"{name}: {text}" for name, text in facts.items()]
    if not method.callbacks and _callback(plan, method) is not None:
        lines.append("The callbacks are the preset's, and were not there in the trials.")
    if not pretrains_alike(method.algorithm, pretraining):
        lines.append(
            f"The trials started from policies pretrained by {pretraining}; rl_zoo3 pretrains by {method.algorithm}, so the "
            "result may be another one."
        )
    entry = zoo_entry(plan, method, file.absolute().parent)
    is_moved = entry["dataset"] != plan.study.specs[plan.dataset]
    lines.append(f"In this file's folder{', from which `dataset` leads to the data' if is_moved else ''}:")
    lines.append(zoo_command(plan, file))
    comment = "".join(f"# {line}\n" for line in lines)
    text = comment + yaml.safe_dump({_env_id(plan): entry}, sort_keys=False, allow_unicode=True)
    with atomic_write(file) as stream:
        stream.write(text.encode("utf-8"))
    return text
