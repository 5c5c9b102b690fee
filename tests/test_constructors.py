"""Constructors of algorithms name their own arguments only; whoever asks is told all of them."""

import hashlib
import inspect
import json
from typing import Any, get_type_hints

import pytest
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC, load_dataset
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.offline_td3 import OfflineTD3Arguments
from sb3_offline_ft.pretrained.recipe import Recipe, online_only_arguments

ALGORITHMS = [OfflineTD3, TD3BC, TD3C, ReBRAC]
OF_TD3 = list(inspect.signature(TD3).parameters)


class Own(TD3C):
    """With an argument of its own, and another default."""

    online_only_arguments = frozenset({"zeal"})

    def __init__(self, *args: Any, zeal: float = 2.0, gamma: float = 0.9, **kwargs: Any) -> None:
        self.zeal = zeal
        super().__init__(*args, gamma=gamma, **kwargs)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, Own])
def test_signatures_show_all_arguments(algorithm: type[OfflineTD3]) -> None:
    shown = inspect.signature(algorithm).parameters
    assert list(shown)[: len(OF_TD3)] == OF_TD3
    assert list(shown)[: len(inspect.signature(OfflineTD3).parameters)] == list(inspect.signature(OfflineTD3).parameters)
    assert {name: one.default for name, one in shown.items()} == constructor_arguments(algorithm)
    of_init = inspect.signature(algorithm.__init__).parameters
    assert list(of_init) == ["self", *shown]
    for name, one in shown.items():
        expected = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in OF_TD3 else inspect.Parameter.KEYWORD_ONLY
        assert one.kind is expected and one.annotation is not inspect.Parameter.empty


def test_own_arguments_come_last_and_other_defaults_are_shown() -> None:
    assert list(inspect.signature(TD3BC).parameters)[-5:] == ["alpha", "online_bc", "adaptive_bc_target", "adaptive_bc_gains",
                                                              "adaptive_bc_returns"]  # fmt: skip
    shown = inspect.signature(Own).parameters
    assert list(shown)[-1] == "zeal" and shown["zeal"].default == 2.0
    assert shown["gamma"].default == 0.9 and shown["policy_averaging"].default == 0.99
    assert inspect.signature(OfflineTD3).parameters["policy_averaging"].default == 0.0


def test_the_arguments_for_type_checkers_are_those_of_the_constructor() -> None:
    hints = get_type_hints(OfflineTD3Arguments)
    parameters = inspect.signature(OfflineTD3).parameters
    assert hints.keys() == parameters.keys() - {"policy", "env"}
    assert {name: parameters[name].annotation for name in hints} == hints


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_of_td3_may_be_given_by_position(algorithm: type[OfflineTD3]) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", 1e-4, 50, 7, 16, 0.1, 0.9, device="cpu", policy_kwargs={"net_arch": [8]})
    given = (model.learning_rate, model.buffer_size, model.learning_starts, model.batch_size, model.tau, model.gamma)
    assert given == (1e-4, 50, 7, 16, 0.1, 0.9)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, Own])
def test_online_only_arguments_are_arguments(algorithm: type[OfflineTD3]) -> None:
    named = online_only_arguments(algorithm)
    assert named <= constructor_arguments(algorithm).keys()
    assert "warmup_steps" in named and ("epsilon" in named) == issubclass(algorithm, TD3C)
    assert ("zeal" in named) == (algorithm is Own)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [(OfflineTD3, "612d44669fe300d2"), (TD3BC, "88718bb2c44a71f4"), (TD3C, "8cb5b77303ab350c"), (ReBRAC, "49d5024129884562")],
)
def test_what_a_pretraining_depends_on_stays_what_it_is(algorithm: type[OfflineTD3], expected: str) -> None:
    """Written down from the first version: a change lets users pretrain again what they have."""
    hyperparams = {"policy": "MlpPolicy", "offline_steps": 4, "policy_kwargs": {"net_arch": [8]}, "buffer_size": 9,
                   "policy_averaging": 0.5}  # fmt: skip
    env, data = make_vec_env("Pendulum-v1", seed=0), load_dataset("bundled:pendulum-medium")
    facts = Recipe(algorithm, hyperparams, data, env, 1, "cpu").facts
    told = json.dumps([facts["algorithm"], facts["hyperparams"]], sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == expected


class EnvironmentFirst(OfflineTD3):
    """With arguments in an order of its own, and no others by position."""

    def __init__(self, env: Any, policy: str = "MlpPolicy", zeal: float = 2.0, **kwargs: Any) -> None:
        self.zeal = zeal
        super().__init__(policy, env, **kwargs)


class OwnPolicy(TD3BC):
    """With a default for an argument that has none."""

    def __init__(self, *args: Any, policy: str = "MlpPolicy", **kwargs: Any) -> None:
        super().__init__(policy, *args, **kwargs)


class OwnEnvironment(TD3C):
    """With the policy chosen by the class."""

    def __init__(self, env: str = "Pendulum-v1", *args: Any, **kwargs: Any) -> None:
        super().__init__("MlpPolicy", env, *args, **kwargs)


class ByPositionOnly(TD3BC):
    """With arguments that have no names for the caller."""

    def __init__(self, policy: str, env: Any, /, **kwargs: Any) -> None:
        super().__init__(policy, env, **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "args", "by_position"),
    [
        (EnvironmentFirst, ("Pendulum-v1",), ["env", "policy", "zeal"]),
        (OwnPolicy, ("Pendulum-v1", 1e-4), [name for name in OF_TD3 if name != "policy"]),
        (OwnEnvironment, ("Pendulum-v1", 1e-4), OF_TD3[1:]),
        (ByPositionOnly, ("MlpPolicy", "Pendulum-v1"), ["policy", "env"]),
    ],
)
def test_a_constructor_may_change_the_order_of_arguments(
    algorithm: type[OfflineTD3], args: tuple[Any, ...], by_position: list[str]
) -> None:
    model = algorithm(*args, policy_kwargs={"net_arch": [8]}, device="cpu", warmup_steps=3)
    assert model.warmup_steps == 3 and model.learning_rate == (1e-4 if 1e-4 in args else 3e-4)
    shown = inspect.signature(algorithm).parameters
    assert [name for name, one in shown.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY] == by_position
    assert shown.keys() == inspect.signature(OfflineTD3).parameters.keys() | constructor_arguments(algorithm).keys()
    assert list(inspect.signature(algorithm.__init__).parameters) == ["self", *shown]
