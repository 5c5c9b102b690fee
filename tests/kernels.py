"""What the tests of the update kernels share: small learners, and how far what they have learned differs."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3

from sb3_offline_ft import TD3BC, OfflineDataset, OfflineTD3, load_dataset
from sb3_offline_ft.update import UpdateKernel

DATASET = "bundled:pendulum-medium"
# Not a power of two, so that rows, layers and batches end in the middle of vectors and cache lines
SMALL = {"net_arch": [13, 11]}
BY_AUTOGRAD = "Updates are done by autograd, which is slower, since .*"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs CUDA"))]
TOLERANCE = 1e-4
"""Of results after a few steps, relative to the distance moved: rounding is amplified where Adam divides by small moments."""


@functools.cache
def data() -> OfflineDataset:
    """Pendulum's dataset, read once."""
    return load_dataset(DATASET)


def make(algorithm: type[OfflineTD3] = TD3BC, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dataset": data(), "policy_kwargs": SMALL, "seed": 0, "device": "cpu"}
    defaults |= {"learning_rate": 1e-3, "batch_size": 16}
    return algorithm("MlpPolicy", "Pendulum-v1", **(defaults | settings))


class State(NamedTuple):
    """What a learner has learned, by name of the parameter."""

    weights: dict[str, th.Tensor]
    first: dict[str, th.Tensor]
    second: dict[str, th.Tensor]
    counts: dict[str, float]


def state_of(model: TD3) -> State:
    """A copy of parameters (targets included), Adam's moments and step counts."""
    weights = {name: value.detach().cpu().double().clone() for name, value in model.policy.named_parameters()}
    first, second, counts = {}, {}, {}
    for network in ("actor", "critic"):
        module = getattr(model.policy, network)
        names = {parameter: f"{network}.{name}" for name, parameter in module.named_parameters()}
        for parameter, entry in module.optimizer.state.items():
            first[names[parameter]] = entry["exp_avg"].cpu().double().clone()
            second[names[parameter]] = entry["exp_avg_sq"].cpu().double().clone()
            counts[names[parameter]] = float(entry["step"])
    return State(weights, first, second, counts)


def norm(tensors: Mapping[str, th.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def difference(first: Mapping[str, th.Tensor], second: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    assert first.keys() == second.keys()
    return {name: value - second[name] for name, value in first.items()}


def relative_distance(
    found: Mapping[str, th.Tensor], expected: Mapping[str, th.Tensor], start: Mapping[str, th.Tensor]
) -> float:
    """Norm of the difference in units of the distance moved."""
    moved = norm(difference(expected, start))
    assert moved > 0
    return norm(difference(found, expected)) / moved


def assert_agree(found: TD3, expected: TD3, start: State, tolerance: float = TOLERANCE) -> None:
    """Parameters, targets, moments and step counts are the same up to rounding."""
    ours, theirs = state_of(found), state_of(expected)
    assert ours.counts == theirs.counts
    assert relative_distance(ours.weights, theirs.weights, start.weights) <= tolerance
    for moments, others in ((ours.first, theirs.first), (ours.second, theirs.second)):
        assert norm(difference(moments, others)) <= tolerance * norm(others)


def assert_identical(first: TD3, second: TD3) -> None:
    """Parameters, targets, moments and step counts are the same to the bit."""
    for ours, theirs in zip(state_of(first), state_of(second), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert np.array_equal(value, theirs[name]), name


def kernel_of(model: OfflineTD3) -> UpdateKernel:
    """What did the last gradient steps is for nobody to depend on, and has no public name."""
    return model.updater.kernel


def is_fast(model: OfflineTD3) -> bool:
    return kernel_of(model).name == "fast"


def count_steps(optimizer: th.optim.Optimizer) -> set[float]:
    return {float(entry["step"]) for entry in optimizer.state.values()}
