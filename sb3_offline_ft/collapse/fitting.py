"""Whether networks, optimizers and counters that were saved fit those of a learner."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_offline_ft.collapse.learner import position

COUNTERS = ("_n_updates", "_n_calls", "exploration_rate", "_current_progress_remaining")
FIX = "Restore it into a model made with the same algorithm, policy and network sizes."
SETTINGS = frozenset({"params", "lr", "betas", "eps", "weight_decay"})
"""What an optimizer needs of a group of parameters."""
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "square_avg"})
"""What it keeps in the shape of a parameter."""


def described(value: Any) -> str:
    if isinstance(value, th.Tensor):
        return f"shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return "nothing" if value is None else type(value).__name__


def check_tensors(what: str, prefix: str, saved: dict[str, Any], live: Mapping[str, Any]) -> None:
    for name in [*live, *(name for name in saved if name not in live)]:
        expected, found = described(live.get(name)), described(saved.get(name))
        if expected != found:
            raise ValueError(f"{what}: {prefix}{name} has {expected} in the model and {found} in the snapshot. {FIX}")


def check_optimizer(what: str, name: str, saved: dict[str, Any], live: th.optim.Optimizer) -> None:
    state, live_state = saved["state"], live.state_dict()
    expected = (type(live).__name__, [len(group["params"]) for group in live_state["param_groups"]])
    found = (saved["class"], [len(group["params"]) for group in state["param_groups"]])
    if expected != found:
        raise ValueError(
            f"{what}: {name} is {expected[0]} over {expected[1]} parameters in the model, "
            f"{found[0]} over {found[1]} in the snapshot. {FIX}"
        )
    for own, other in zip(live_state["param_groups"], state["param_groups"], strict=True):
        # Newer versions of PyTorch have more settings, and defaults for them
        for setting in ("lr", "eps", "weight_decay"):
            if isinstance(own.get(setting), float):
                check_is_number(what, f"{setting} of {name}", other.get(setting, own[setting]))
        if lacking := (own.keys() & SETTINGS) - other.keys():
            raise ValueError(f"{what}: {name} lacks {', '.join(sorted(lacking))} in the snapshot. {FIX}")
    known = [entry.keys() for entry in (*state["state"].values(), *live_state["state"].values())]
    if any(keys != known[0] for keys in known):
        raise ValueError(f"{what}: {name} lacks moments of some parameters in the snapshot. {FIX}")
    shapes = [parameter.shape for group in live.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        if index not in range(len(shapes)):
            raise ValueError(f"{what}: {name} has moments of a parameter {index!r:.20} in the snapshot. {FIX}")
        for key in moments.keys() & MOMENTS:
            if not isinstance(moments[key], th.Tensor) or moments[key].shape != shapes[index]:
                raise ValueError(f"{what}: {name} {index}.{key} has {described(moments[key])} in the snapshot. {FIX}")


def check_counters(what: str, saved: Mapping[str, Any], model: OffPolicyAlgorithm) -> None:
    live = {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)} | position(model)
    for name, value in live.items():
        found = saved.get(name, value)
        kinds = bool if isinstance(value, bool) else int | float
        if isinstance(value, int | float) and (not isinstance(found, kinds) or isinstance(found, bool) != (kinds is bool)):
            raise ValueError(f"{what}: {name} is {value!r} in the model and {found!r:.40} in the snapshot. {FIX}")


def check_is_number(what: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or np.asarray(value).dtype.kind not in "fiu":
        raise ValueError(f"{what}: {name} must be numbers, found {value!r:.40} in the snapshot. {FIX}")
