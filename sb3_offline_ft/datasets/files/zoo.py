"""What rl-zoo3 keeps beside an agent, read without running code; rl-zoo3's own readers make any Python object."""

import ast
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from sb3_offline_ft.common.reading import read_text
from sb3_offline_ft.common.strict_yaml import BoundedLoader, load_yaml

CONFIG, ARGUMENTS = "config.yml", "args.yml"
LEARNER_STATISTICS = "vecnormalize_learner.pkl"
"""rl_zoo3 has one file of statistics for all models of a run, and the one to deploy is the champion."""
OF_ENVIRONMENT = ("env_wrapper", "vec_env_wrapper", "frame_stack", "normalize", "env_kwargs")
"""Hyperparameters without which an environment would be another one than the agent's."""
_PYTHON = "tag:yaml.org,2002:python/"


class _Unread:
    """Stands for a Python object that a file describes."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _ZooLoader(BoundedLoader):
    """Makes tuples and, of ordered dictionaries, dictionaries, as rl-zoo3 writes them, and of all other objects none."""


def _tuple(loader: _ZooLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _ordered(loader: _ZooLoader, node: yaml.SequenceNode) -> dict[Any, Any]:
    # A list of its pairs within a list
    pairs = [pair for pairs in _tuple(loader, node) for pair in pairs]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise yaml.constructor.ConstructorError(
            problem="an OrderedDict has a key twice: leave one", problem_mark=node.start_mark
        )
    return found


_ZooLoader.add_constructor(f"{_PYTHON}tuple", _tuple)
_ZooLoader.add_constructor(f"{_PYTHON}object/apply:collections.OrderedDict", _ordered)
_ZooLoader.add_multi_constructor(_PYTHON, lambda loader, kind, node: _Unread(kind))


def read_zoo_yaml(path: Path, needed: Collection[str] = OF_ENVIRONMENT) -> dict[str, Any]:
    """Read a ``config.yml`` or ``args.yml``; settings that hold Python objects are left out, or refused if they are needed."""
    try:
        content = load_yaml(read_text(path), path, _ZooLoader)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not written by rl-zoo3: {error}") from None
    if not isinstance(content, dict):
        found = f"the Python object {content.kind}" if isinstance(content, _Unread) else type(content).__name__
        raise ValueError(f"{path} must hold settings by name, found {found}: nothing of it was run.")
    unread = {name: kind for name, value in content.items() if (kind := _unread(value)) is not None}
    for name in needed:
        if name in unread:
            raise ValueError(
                f"{path}: {name} holds the Python object {unread[name]}, and files are not trusted to make any: nothing of it "
                "was run. Write it with numbers, texts, lists and mappings."
            )
    return {name: value for name, value in content.items() if name not in unread}


def _unread(value: Any) -> str | None:
    if isinstance(value, _Unread):
        return value.kind
    inner = (*value.keys(), *value.values()) if isinstance(value, Mapping) else value
    if not isinstance(inner, list | tuple):
        return None
    return next((kind for each in inner if (kind := _unread(each)) is not None), None)


def saved_hyperparams(folder: Path) -> tuple[dict[str, Any], str | None]:
    """
    Read what rl-zoo3 needs of a run to make its environment again, as its ``get_saved_hyperparams`` does, from the folder
    beside its agent. Gives the hyperparameters, and the folder if it is there; rewards are not normalized.
    """
    if not folder.is_dir():
        return {}, None
    config = folder / CONFIG
    hyperparams: dict[str, Any]
    hyperparams = read_zoo_yaml(config) if config.is_file() else {"normalize": (folder / "obs_rms.pkl").is_file()}
    if normalize := hyperparams.setdefault("normalize", False):
        kwargs = _literal(normalize, config) if isinstance(normalize, str) else normalize
        kwargs = kwargs if isinstance(kwargs, dict) else {"norm_obs": kwargs}
        hyperparams["normalize_kwargs"] = {**kwargs, "norm_reward": False}
    return hyperparams, str(folder)


def _literal(text: str, path: Path) -> Any:
    """What rl-zoo3 evaluates: a Python literal, or ``dict(...)`` of some."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"{path}: normalize must be a Python literal such as {{'norm_obs': True}}, found {text!r:.80}: nothing of it was "
            "run."
        ) from None
