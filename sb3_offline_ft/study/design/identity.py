"""What the result of a cell depends on, in the form of JSON: equal facts are run once."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.policies.policies import OfflinePolicy
from sb3_offline_ft.study.design.learners import algorithm_class
from sb3_offline_ft.study.design.methods import Method, is_ours, online_only

RESULTS_VERSION = 2
"""Raised by a release whose runs give other results, as by another default: then finished cells are run again, else never."""

ALGORITHM_VERSIONS: Mapping[type, int] = {}
"""The same for the online phase of single algorithms, 1 where nothing is said."""


def _canonical(value: Any) -> Any:
    """The same for equal values: ``1e4`` is 10000, a tuple a list."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return value


def _chosen(algorithm: str, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
    """What is not the default of one of our constructors, so that a new argument changes no facts."""
    if not is_ours(algorithm):
        return dict(_canonical(hyperparams))
    policy_kwargs = _without_defaults(OfflinePolicy, hyperparams.get("policy_kwargs") or {})
    return _without_defaults(algorithm_class(algorithm), dict(hyperparams) | {"policy_kwargs": policy_kwargs or None})


def _without_defaults(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    defaults = constructor_arguments(cls)
    chosen = {name: _canonical(value) for name, value in arguments.items()}
    return {name: value for name, value in chosen.items() if name not in defaults or value != _canonical(defaults[name])}


def _algorithm_version(algorithm: str) -> dict[str, int]:
    cls = algorithm_class(algorithm)
    version = max((version for base, version in ALGORITHM_VERSIONS.items() if issubclass(cls, base)), default=1)
    return {"algorithm_version": version} if version > 1 else {}


def _pretraining_facts(algorithm: str, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
    chosen = _chosen(algorithm, hyperparams)
    acting = {name: value for name, value in chosen.items() if name not in online_only(algorithm)}
    return {"algorithm": algorithm, "hyperparams": acting}


def method_facts(method: Method, pretraining: str) -> dict[str, Any]:
    """
    What the results of a method depend on, besides the study's plan, the data and the seed; not its name.

    :param method: The method
    :param pretraining: Algorithm of the pretraining that it starts from, if it does
    """
    if method.external is not None:
        # How long it may take changes nothing of what comes out
        asked = {name: _canonical(value) for name, value in method.external.items() if name != "timeout"}
        return {"external": asked, "pretrained": method.pretrained}
    learns = not method.frozen
    return {
        "algorithm": method.algorithm if learns else None,
        "pretrained": method.pretrained,
        "frozen": method.frozen,
        **(_algorithm_version(method.algorithm) if learns else {}),
        "hyperparams": _chosen(method.algorithm, method.hyperparams) if learns else None,
        "guard": _canonical(method.guard),
        **({} if method.champion is None else {"champion": _canonical(method.champion)}),
        "pretraining": _pretraining_facts(pretraining, method.pretraining_hyperparams) if method.pretrained else None,
    }


def is_same(facts: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two methods with these facts learn alike, be it that defaults of the replay buffer are written out."""
    if "external" in facts or "external" in others:
        # A command may tell 1 from true
        return digest(facts) == digest(others)
    return _shortest(facts) == _shortest(others)


def _shortest(facts: Mapping[str, Any]) -> dict[str, Any]:
    short = {name: _shortest(value) if isinstance(value, Mapping) else value for name, value in facts.items()}
    if "replay_buffer_kwargs" in short:
        kwargs = _without_defaults(OfflineToOnlineReplayBuffer, short.pop("replay_buffer_kwargs") or {})
        short |= {"replay_buffer_kwargs": kwargs} if kwargs else {}
    return short


def data_facts(dataset: OfflineDataset) -> dict[str, Any]:
    """What learning from a dataset depends on; not where it is from."""
    scores = dataset.reference_scores
    return {
        "fingerprint": dataset.fingerprint,
        "parts": [[part.begin, part.end, part.weight] for part in dataset.sources],
        "reference_scores": None if scores is None else [scores.random, scores.expert],
    }


def cell_facts(method: Method, pretraining: str, data: Mapping[str, Any] | None, plan: Mapping[str, Any]) -> dict[str, Any]:
    """
    All that a cell's result depends on.

    :param method: The cell's method
    :param pretraining: Algorithm of the pretraining
    :param data: :func:`data_facts` of the cell's dataset, None without data
    :param plan: Environment, seed, lengths and evaluations of the run
    """
    facts = {
        "results_version": RESULTS_VERSION,
        **plan,
        **method_facts(method, pretraining),
        "dataset": dict(data) if data is not None else None,
    }
    if not method.learns_from_evaluations:
        del facts["learner_evaluation"]
    if data is not None and method.hyperparams.get("online_bc") != "adaptive":
        # Nobody else looks at them
        del facts["dataset"]["reference_scores"]
    return facts


def digest(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, equal for equal facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
