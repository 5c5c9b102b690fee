"""Reads the parts of a study's file that are not about methods."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import ENV_ID_RE

from sb3_offline_ft.common.search_space import FINETUNING_PREFIX
from sb3_offline_ft.common.strict_yaml import Reader
from sb3_offline_ft.datasets import without_trust
from sb3_offline_ft.datasets.specs import join_specs, parse_spec
from sb3_offline_ft.pretrained.recipe import SHARED_WITH_PRETRAINING
from sb3_offline_ft.study.design.methods import factor_path

NO_DATA = "no-data"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MOST_OF_LABEL = 80
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MOST_SEED = 2**32 - 1
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class EvaluationPlan:
    """
    When and how often a policy is evaluated.

    :param every: Interactions between two evaluations
    :param episodes: Episodes in each
    """

    every: int
    episodes: int


def read_env(reader: Reader, value: Any) -> str:
    """The id of an environment that is registered, or will be when the module before it is imported."""
    env = reader.text(value, "env")
    module, colon, env_id = env.rpartition(":")
    if not colon:
        import_env(reader, env)
    elif not (_MODULE.fullmatch(module) and ENV_ID_RE.fullmatch(env_id)):
        reader.fail("env", f"is {env!r}: expected an id of Gymnasium, or module:id.")
    return env


def import_env(reader: Reader, env: str) -> None:
    """Import the module before the id of an environment, if there is one, which runs that module's code."""
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        reader.fail("env", f"is {env!r}, which Gymnasium does not know as an id (module:id imports the module first): {error}")


def read_seeds(reader: Reader, value: Any) -> tuple[int, ...]:
    """The seeds from their number, or from a list of them."""
    if not isinstance(value, list):
        return tuple(range(reader.whole(value, "seeds", 1, MOST_SEEDS)))
    if len(value) > MOST_SEEDS:
        reader.fail("seeds", f"must be at most {MOST_SEEDS:,}, found {len(value):,}.")
    seeds = tuple(reader.whole(seed, f"seeds[{index}]", 0, None) for index, seed in enumerate(value))
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) > _MOST_SEED:
        reader.fail("seeds", f"must be a number of seeds, or a list of different ones up to {_MOST_SEED}, found {value!r}.")
    return seeds


def read_evaluation(reader: Reader, value: Any, key: str, interactions: int) -> EvaluationPlan:
    """The plan; by default :func:`default_every`, 10 episodes."""
    given = reader.mapping(value, key, ("every", "episodes"))
    every = reader.whole(given.get("every", default_every(interactions)), f"{key}.every")
    if every > interactions:
        reader.fail(f"{key}.every", f"must be at most `interactions`, which are {interactions:,}, found {every:,}.")
    return EvaluationPlan(every, reader.whole(given.get("episodes", 10), f"{key}.episodes"))


def default_every(interactions: int) -> int:
    """Every 1,000 interactions, or every tenth of them if they are fewer than 10,000."""
    return min(1000, max(1, interactions // 10))


def read_datasets(reader: Reader, value: Any, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """
    Read the datasets, without any consent to unpickle.

    :param folder: Where relative paths are looked for first
    :return: By label, specs as they are written, and with absolute paths
    """
    specs: dict[str, str] = {}
    resolved: dict[str, str] = {}
    for label, spec in reader.mapping(value, "datasets").items():
        key = f"datasets.{label}"
        if not LABEL.fullmatch(label) or label == NO_DATA:
            reader.fail(key, f"must be a label of letters, digits, '.', '_' and '-', and not {NO_DATA!r}.")
        if len(label) > MOST_OF_LABEL:
            reader.fail(key, f"must have at most {MOST_OF_LABEL} characters, as folders are called so, found {len(label)}.")
        if spec is None:
            reader.fail(key, "has no dataset.")
        try:
            spec = without_trust(spec)
            specs[label] = spec if isinstance(spec, str) else place_paths(spec, folder, str)
            resolved[label] = resolve_paths(spec, folder)
        except (ValueError, TypeError) as error:
            reader.fail(key, f"is no dataset: {error}")
    return specs, resolved


def resolve_paths(spec: Any, folder: Path) -> str:
    """Make relative paths in a spec absolute that lead somewhere from a folder."""
    return place_paths(spec, folder, lambda base: str(folder / base))


def place_paths(spec: Any, folder: Path, place: Callable[[str], str]) -> str:
    """
    Write a spec as one string, with relative paths otherwise that lead somewhere from a folder.

    :param place: Says how to write such a path
    :raises ValueError: The spec is malformed
    :raises TypeError: It is of another type
    """

    def is_here(base: str) -> bool:
        return not Path(base).is_absolute() and (folder / base.strip()).exists()

    if isinstance(spec, str) and is_here(spec):
        return place(spec.strip())
    parts = parse_spec(spec)
    bases = [str(part.base) for part in parts]
    if isinstance(spec, str) and not any(map(is_here, bases)):
        return spec.strip()
    placed = [place(base) if is_here(base) else base for base in bases]
    texts = [part.text(base, part.trust_pickle) for part, base in zip(parts, placed, strict=True)]
    joined = join_specs(texts, [part.weight for part in parts])
    if joined is None:
        raise ValueError(f"{spec!r} has a path with a plus between spaces, which can only stand alone: rename it.")
    return joined


def read_factors(reader: Reader, value: Any) -> dict[str, list[Any]]:
    """Values by name, of factors that can be ones."""
    factors = reader.mapping(value, "factors")
    for name, values in factors.items():
        key = f"factors.{name}"
        if not isinstance(values, list) or not values:
            reader.fail(key, f"must be a list of values, found {values!r}.")
        if any(other == each for index, each in enumerate(values) for other in values[:index]):
            reader.fail(key, f"has a value twice: {values!r}.")
        if name.startswith(FINETUNING_PREFIX) and factor_path(name)[0] in SHARED_WITH_PRETRAINING:
            plain = name.removeprefix(FINETUNING_PREFIX)
            reader.fail(key, f"cannot be another one than in the pretraining: use {plain!r}, which varies both.")
    return factors
