"""Snapshots and states with missing or damaged fields: one clear error or warning, and nothing is changed."""

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft import TD3C, ChampionChallenger, CollapseGuard, LearnerSnapshot

SMALL: dict[str, Any] = {"device": "cpu", "batch_size": 4, "seed": 0}
ODD: tuple[Any, ...] = (None, "x", [], {}, -1.5, True, [[1]], 10**400)


def state_of(model: OffPolicyAlgorithm) -> list[Any]:
    """All that a snapshot keeps, as text that can be compared."""
    content = LearnerSnapshot.take(model)._content  # what is private here is all of it, and nothing else shows it
    return [repr(leaf.tolist() if isinstance(leaf, th.Tensor | np.ndarray) else leaf) for leaf in leaves(content)]


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, list | tuple) else [value]


def paths(value: Any, depth: int = 5) -> list[tuple[Any, ...]]:
    """The ways to entries of nested dictionaries and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    here = [((key,), entry) for key, entry in entries]
    return [path for path, _ in here] + [
        path + more for path, entry in here if depth > 1 for more in paths(entry, depth - 1)
    ]  # fmt: skip


def changed(content: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    made = copy.deepcopy(content)
    place = made
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return made


@pytest.fixture(scope="module", params=[TD3C, SAC])
def model(request: pytest.FixtureRequest) -> OffPolicyAlgorithm:
    venv = VecNormalize(make_vec_env("Pendulum-v1"))
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    made: OffPolicyAlgorithm = request.param(
        "MlpPolicy", venv, learning_starts=5, action_noise=noise, policy_kwargs={"net_arch": [4]}, **SMALL
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.learn(12)
    return made


def test_a_damaged_snapshot_is_one_clear_error_and_changes_nothing(model: OffPolicyAlgorithm) -> None:
    whole = LearnerSnapshot.take(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(3, reset_num_timesteps=False)
    before, rng = state_of(model), np.random.default_rng(0)
    ways = [path for path in paths(whole._content) if path[0] not in ("generators", "extra")]
    refused = 0
    for number in rng.permutation(len(ways))[:120]:
        path = ways[number]
        if number % 2:
            content = changed(whole._content, path, lambda place, key: place.pop(key))
        else:
            odd = ODD[rng.integers(len(ODD))]
            content = changed(whole._content, path, lambda place, key, odd=odd: place.__setitem__(key, odd))
        try:
            LearnerSnapshot(content).restore(model)
        except ValueError as error:
            assert "snapshot" in str(error), path
            assert state_of(model) == before, path
            refused += 1
        else:
            # What is information only, or has a default
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.learn(2, reset_num_timesteps=False)
            before = state_of(model)
    assert refused > 60


def test_lost_moments_are_found_before_they_end_training(model: OffPolicyAlgorithm) -> None:
    content = copy.deepcopy(LearnerSnapshot.take(model)._content)
    del content["optimizers"]["actor.optimizer"]["state"]["state"][0]["exp_avg"]
    before = state_of(model)
    for act in ("check", "restore"):
        with pytest.raises(ValueError, match=r"actor.optimizer lacks moments of some parameters"):
            getattr(LearnerSnapshot(content), act)(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("callback", "attribute"),
    [
        (lambda: CollapseGuard(verbose=0, signal_freq=0), "collapse_guard_state"),
        (
            lambda: ChampionChallenger(verbose=0, random_return=-1600.0, min_updates=3, risk_budget=0.9),
            "champion_challenger_state",
        ),
    ],
)
def test_a_damaged_state_in_a_model_is_left_out_with_a_warning(callback: Callable[[], Any], attribute: str) -> None:
    env = Monitor(gym.make("Pendulum-v1", max_episode_steps=5))
    model = TD3C("MlpPolicy", env, learning_starts=5, policy_kwargs={"net_arch": [4]}, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(80, callback=callback())
    text = getattr(model, attribute)
    content, rng, warned = json.loads(text), np.random.default_rng(1), 0
    ways = paths(content, 3)
    for number in rng.permutation(len(ways))[:25]:
        odd = ODD[rng.integers(len(ODD))]
        if number % 2:
            damaged = changed(content, ways[number], lambda place, key: place.pop(key))
        else:
            damaged = changed(content, ways[number], lambda place, key, odd=odd: place.__setitem__(key, odd))
        setattr(model, attribute, json.dumps(damaged))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.learn(12, callback=callback(), reset_num_timesteps=False)
            except ValueError as error:
                # Segments of another length cannot be compared
                assert "segment_steps" in str(error), ways[number]
        warned += any("cannot be taken up" in str(each.message) for each in caught)
    assert warned >= 5
