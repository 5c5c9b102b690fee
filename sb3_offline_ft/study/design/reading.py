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
_ACCEPTED = "See `sb3_offline_ft.load_dataset` for what a spec can be."
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class EvaluationPlan:
    """
    When and how often a policy is evaluated.

    :param every: Interactions between two evaluations
    :param episodes: Episodes in each
    """

    every: int
    episodes: int


def check_env(reader: Reader, value: Any) -> str:
    """
    :param reader: For errors
    :param value: ``env`` of the file
    :return: The id of an environment that is registered, or will be when the module before it is imported
    :raises ValueError: It is neither
    """
    env = reader.text(value, "env")
    module, colon, env_id = env.rpartition(":")
    if not colon:
        import_env(reader, env)
    elif not (_MODULE.fullmatch(module) and ENV_ID_RE.fullmatch(env_id)):
        reader.fail("env", f"is {env!r}: expected an id of Gymnasium, or module:id.")
    return env


def import_env(reader: Reader, env: str) -> None:
    """
    Import the module before the id of an environment, if there is one, which runs that module's code.

    :param reader: For errors
    :param env: ``env`` of the file
    :raises ValueError: There is no such module, or Gymnasium does not know the id
    """
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        reader.fail("env", f"is {env!r}, which Gymnasium does not know as an id (module:id imports the module first): {error}")


def read_seeds(reader: Reader, value: Any) -> tuple[int, ...]:
    """
    :param reader: For errors
    :param value: ``seeds`` of the file: their number, or a list of them
    :return: The seeds
    :raises ValueError: There is none, or one is there twice or out of range
    """
    if not isinstance(value, list):
        return tuple(range(reader.whole(value, "seeds")))
    seeds = tuple(reader.whole(seed, f"seeds[{index}]", 0) for index, seed in enumerate(value))
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) > _MOST_SEED:
        reader.fail("seeds", f"must be a number of seeds, or a list of different ones up to {_MOST_SEED}, found {value!r}.")
    return seeds


def read_evaluation(reader: Reader, value: Any, key: str, interactions: int) -> EvaluationPlan:
    """
    :param reader: For errors
    :param value: What is found
    :param key: Its key
    :param interactions: Interactions of each run
    :return: The plan; by default every 1,000 interactions, or every tenth of them if they are fewer than 10,000, 10 episodes
    :raises ValueError: A number is out of range
    """
    given = reader.mapping(value, key, ("every", "episodes"))
    every = reader.whole(given.get("every", default_every(interactions)), f"{key}.every")
    if every > interactions:
        reader.fail(f"{key}.every", f"must be at most `interactions`, which are {interactions:,}, found {every:,}.")
    return EvaluationPlan(every, reader.whole(given.get("episodes", 10), f"{key}.episodes"))


def default_every(interactions: int) -> int:
    """
    :param interactions: Interactions of each run
    :return: Interactions between two evaluations
    """
    return min(1000, max(1, interactions // 10))


def read_datasets(reader: Reader, value: Any, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """
    :param reader: For errors
    :param value: ``datasets`` of the file
    :param folder: Where relative paths are looked for first
    :return: By label, specs as they are written, and with absolute paths; both without any consent to unpickle
    :raises ValueError: A label or a spec is malformed
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
            specs[label] = spec if isinstance(spec, str) else as_text(spec)
            resolved[label] = resolve_paths(spec, folder)
        except (ValueError, TypeError) as error:
            reader.fail(key, f"is no dataset: {error}")
    return specs, resolved


def as_text(spec: Any) -> str:
    """
    :param spec: A dataset spec that is no string, as YAML can hold it
    :return: The string that means the same
    :raises ValueError: There is none
    """
    parts = parse_spec(spec, {}, False, _ACCEPTED)
    text = join_specs([part.text(str(part.base), part.trust_pickle) for part in parts], [part.weight for part in parts])
    if text is None:
        raise ValueError(f"{spec!r} cannot be written as one string: a path in it has a plus between spaces.")
    return text


def resolve_paths(spec: Any, folder: Path) -> str:
    """
    Make relative paths absolute that lead somewhere from a folder.

    :param spec: A dataset spec
    :param folder: The folder
    :return: The spec, in which all else is as before
    :raises ValueError: It is malformed
    :raises TypeError: It is of another type
    """
    return place_paths(spec, folder, lambda base: str(folder / base))


def place_paths(spec: Any, folder: Path, place: Callable[[str], str]) -> str:
    """
    Write relative paths otherwise that lead somewhere from a folder.

    :param spec: A dataset spec
    :param folder: The folder
    :param place: Says how to write such a path
    :return: The spec, in which all else is as before
    :raises ValueError: It is malformed
    :raises TypeError: It is of another type
    """
    if isinstance(spec, str) and _is_in(spec, folder):
        return place(spec.strip())
    parts = parse_spec(spec, {}, False, _ACCEPTED)
    bases = [str(part.base) for part in parts]
    if not any(_is_in(base, folder) for base in bases):
        return spec.strip() if isinstance(spec, str) else as_text(spec)
    texts = [
        part.text(place(base) if _is_in(base, folder) else base, part.trust_pickle)
        for base, part in zip(bases, parts, strict=True)
    ]
    joined = join_specs(texts, [part.weight for part in parts])
    if joined is None:
        raise ValueError(f"{spec!r} has a path with a plus between spaces, which can only stand alone: rename it.")
    return joined


def _is_in(base: str, folder: Path) -> bool:
    return not Path(base).is_absolute() and (folder / base.strip()).exists()


def read_factors(reader: Reader, value: Any) -> dict[str, list[Any]]:
    """
    :param reader: For errors
    :param value: ``factors`` of the file
    :return: Values by name
    :raises ValueError: A factor has no values or one twice, or cannot be one
    """
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
