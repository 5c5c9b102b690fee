"""What is said of a learner is read off the learner."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise

from sb3_offline_ft import TD3BC, load_dataset, register
from sb3_offline_ft.common.live import as_json, live_arguments, replay_facts
from sb3_offline_ft.pretrained.recipe import Recipe
from sb3_offline_ft.pretrained.start import finetuning_learner, pretrain, start_from
from tests.hooks import n_updates

register()
DISCRETE = ("dqn", "qrdqn")
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "device": "cpu"}


class Mine(TD3BC):
    """An algorithm that names its own arguments only."""

    def __init__(self, *args: Any, mine: int = 1, **kwargs: Any) -> None:
        self.mine = mine
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("name", sorted(ALGOS))
def test_the_arguments_of_every_algorithm_can_be_read(name: str) -> None:
    policy = "MlpLstmPolicy" if name == "ppo_lstm" else "LinearPolicy" if name == "ars" else "MlpPolicy"
    model = ALGOS[name](policy, "CartPole-v1" if name in DISCRETE else "Pendulum-v1", seed=3, device="cpu")
    told = live_arguments(model)
    assert told["seed"] == 3 and told["policy"] == type(model.policy).__name__
    # What is not kept is named; nothing is said of it
    assert not set(told.get("not_kept", ())) & told.keys()
    # SB3 puts this one into the policy's keywords
    assert (name == "a2c") == ("rms_prop_eps" in told.get("not_kept", ()))


def test_arguments_are_those_that_the_learner_has_now() -> None:
    model = Mine("MlpPolicy", "Pendulum-v1", mine=5, buffer_size=123, learning_rate=lambda progress: 1e-4 * progress, **SMALL)
    told = live_arguments(model)
    assert (told["mine"], told["buffer_size"], told["policy_averaging"]) == (5, 123, 0.0)
    model.buffer_size = 7
    assert live_arguments(model)["buffer_size"] == 7
    facts = replay_facts(model)
    assert facts is not None and (facts["capacity"], facts["rows"], "batch" in facts) == (123, 0, False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (partial(max, 1, key=abs), {"class": "partial", "function": "max", "arguments": [[1], {"key": "abs"}]}),
        (th.float32, "torch.float32"),
        ({"a": (np.float32(0.5), {1})}, {"a": [0.5, [1]]}),
        (th.device("cpu"), "cpu"),
    ],
)
def test_values_have_a_form_in_json(value: Any, expected: Any) -> None:
    assert as_json(value) == expected


def test_the_present_value_of_a_noise_is_no_setting() -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    before = as_json(noise)
    noise()
    assert as_json(noise) == before and before["_sigma"] == [1.0]


def test_a_recipe_knows_the_defaults_that_an_algorithm_passes_on() -> None:
    model = Mine("MlpPolicy", "Pendulum-v1", **SMALL)
    env = model.get_env()
    assert env is not None
    data = load_dataset("bundled:pendulum-medium")
    recipes = [
        Recipe(Mine, {"policy": "MlpPolicy", **given}, data, env, 0, "cpu") for given in ({}, {"gamma": 0.99}, {"gamma": 0.9})
    ]
    assert recipes[0].offline_steps == 0
    assert recipes[0].digest == recipes[1].digest != recipes[2].digest


@pytest.mark.parametrize("generators", [True, False])
def test_only_what_was_learned_is_taken_over(generators: bool) -> None:
    """Whatever is an argument of the learner stays as the learner was constructed."""
    first = TD3BC("MlpPolicy", "Pendulum-v1", **SMALL)
    env, data = first.get_env(), load_dataset("bundled:pendulum-medium")
    assert env is not None
    settings = {"policy": "MlpPolicy", "offline_steps": 4, "policy_kwargs": {"net_arch": [8]}, "batch_size": 8}
    pretrained = pretrain(
        Recipe(TD3BC, settings | {"learning_rate": 1e-2, "gamma": 0.5, "tau": 0.5}, data, env, 0, "cpu"), env
    )
    own = {"learning_starts": 500, "buffer_size": 900, "gradient_steps": 2, "warmup_steps": 3, "gamma": 0.98, "train_freq": 4}
    model = TD3BC(env=env, dataset=data, device="cpu", **settings, **own)
    before = live_arguments(model)
    start_from(model, pretrained, generators=generators)
    assert live_arguments(model) == before
    assert model.remaining_offline_steps == 0 and n_updates(model) == 4
    other = finetuning_learner(TD3BC, settings | own, pretrained, env, 0)
    assert {name: live_arguments(other)[name] for name in before} == before | {"seed": 0}
    for name, value in pretrained.snapshot.policy_state.items():
        assert th.equal(model.policy.state_dict()[name], value) and th.equal(other.policy.state_dict()[name], value)
