"""How the clauses make learners and compare them."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv

from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing.point_env import PointEnv, record

Algorithm = type[OfflineTD3]
State = dict[str, th.Tensor]
ExtraState = dict[str, npt.NDArray[Any]]

DEFAULTS: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16, 16]},
    "learning_rate": 1e-3,
    "buffer_size": 1000,
    "learning_starts": 20,
    "batch_size": 8,
    "warmup_steps": 0,
    "seed": 0,
    "device": "cpu",
}
"""What learners are made with where neither a clause nor the caller says otherwise: small and fast."""

N_ROWS = 300
SMALL_IMAGES = {"features_extractor_kwargs": {"features_dim": 8}}
SMALL_DICTS = {"features_extractor_kwargs": {"cnn_output_dim": 8}}


@lru_cache(maxsize=4)
def _vector_data() -> OfflineDataset:
    return record(PointEnv(), N_ROWS)


def vector_data() -> OfflineDataset:
    """
    :return: Data of a :class:`PointEnv` with its default spaces
    """
    return _vector_data()


def make(algorithm: Algorithm, settings: Mapping[str, Any], env: GymEnv | str | None = None, **wanted: Any) -> OfflineTD3:
    """
    Make a learner.

    :param algorithm: Its class
    :param settings: The caller's arguments of the constructor
    :param env: The environment, a :class:`PointEnv` by default
    :param wanted: The clause's arguments, which prevail; of ``policy_kwargs`` each entry by itself
    :return: The learner; it has the policy that the environment's observations need, unless ``policy`` is given
    """
    env = PointEnv() if env is None else env
    arguments = DEFAULTS | dict(settings) | wanted
    parts = (DEFAULTS, settings, wanted)
    arguments["policy_kwargs"] = {key: value for part in parts for key, value in (part.get("policy_kwargs") or {}).items()}
    arguments.setdefault("policy", "MlpPolicy" if isinstance(env, str) else policy_for(env.observation_space))
    return algorithm(env=env, **arguments)


def is_image(space: spaces.Space[Any]) -> bool:
    """
    :param space: A space
    :return: Whether SB3 takes it for images
    """
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def policy_for(space: spaces.Space[Any]) -> str:
    """
    :param space: Observation space
    :return: Name of the policy that SB3 recommends for it
    """
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image(space) else "MlpPolicy"


def small_extractor(space: spaces.Space[Any]) -> dict[str, Any]:
    """
    :param space: Observation space
    :return: ``policy_kwargs`` for a small features extractor
    """
    if isinstance(space, spaces.Dict):
        return SMALL_DICTS
    return SMALL_IMAGES if is_image(space) else {}


# Comparison


def state(model: TD3) -> State:
    """
    :param model: A learner
    :return: Copies of all parameters and buffers of its policy, targets included
    """
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def moments(model: TD3) -> State:
    """
    :param model: A learner
    :return: Copies of what its optimizers keep, by name
    """
    found: State = {}
    for network, optimizer in (("actor", model.actor.optimizer), ("critic", model.critic.optimizer)):
        for index, kept in optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                found[f"{network}.optimizer.{index}.{name}"] = th.as_tensor(value).clone()
    return found


def assert_same(found: Mapping[str, th.Tensor], expected: Mapping[str, th.Tensor], what: str) -> None:
    """
    :param found: Tensors by name
    :param expected: The same names
    :param what: What is promised, for the message
    :raises AssertionError: A name is missing or a tensor differs, be it by a bit
    """
    assert found.keys() == expected.keys(), f"{what}: the names differ in {sorted(found.keys() ^ expected.keys())}"
    # NaN is equal to itself here
    different = [name for name, value in expected.items() if value.numpy().tobytes() != found[name].numpy().tobytes()]
    assert not different, f"{what}, but {len(different)} of {len(expected)} tensors differ: {', '.join(different[:5])}"


def assert_same_learner(found: TD3, expected: TD3, what: str) -> None:
    """
    :param found: A learner
    :param expected: Another
    :param what: What is promised, for the message
    :raises AssertionError: Networks or optimizers differ, be it by a bit
    """
    assert_same(state(found), state(expected), f"{what} (networks)")
    assert_same(moments(found), moments(expected), f"{what} (optimizers)")


def assert_same_extra_state(found: OfflineTD3, expected: OfflineTD3, what: str) -> None:
    """
    :param found: A learner
    :param expected: Another of the same class
    :param what: What is promised, for the message
    :raises AssertionError: What they keep beyond networks and optimizers differs
    """
    assert_same_arrays(found.extra_state(), expected.extra_state(), what)


def assert_same_arrays(found: ExtraState, expected: ExtraState, what: str) -> None:
    """
    :param found: What a learner keeps beyond networks and optimizers
    :param expected: The same
    :param what: What is promised, for the message
    :raises AssertionError: They differ
    """
    assert found.keys() == expected.keys(), f"{what}: the extra state differs in {sorted(found.keys() ^ expected.keys())}"
    # NaN is equal to itself here
    different = [name for name, value in expected.items() if value.tobytes() != found[name].tobytes()]
    assert not different, f"{what}, but the extra state differs in {', '.join(different)}"


def differs(found: State, expected: State, prefix: str = "") -> bool:
    """
    :param found: Tensors by name
    :param expected: The same names
    :param prefix: Which names count
    :return: Whether any tensor differs
    """
    return any(not th.equal(value, expected[name]) for name, value in found.items() if name.startswith(prefix))


def assert_finite(model: TD3) -> None:
    """
    :param model: A learner
    :raises AssertionError: A parameter is NaN or infinite
    """
    wrong = [name for name, value in model.policy.state_dict().items() if not bool(th.isfinite(value).all())]
    assert not wrong, f"training made parameters NaN or infinite: {', '.join(wrong[:5])}"


def assert_moved(model: TD3, before: State, what: str) -> None:
    """
    :param model: A learner
    :param before: Its state before
    :param what: What should have moved it
    :raises AssertionError: Policy, critics or a target network are as before, or not finite
    """
    after = state(model)
    for network in ("actor.", "actor_target.", "critic.", "critic_target."):
        assert differs(after, before, network), f"{what} changed nothing in {network.rstrip('.')}"
    assert_finite(model)


def actions_of(model: TD3, env: GymEnv | None = None, n: int = 5) -> npt.NDArray[Any]:
    """
    :param model: A learner
    :param env: Whose observations; by default the learner's own space
    :param n: How many
    :return: Deterministic actions at ``n`` observations that are always the same
    """
    space = model.observation_space if env is None else env.observation_space
    space.seed(123)
    return np.stack([model.predict(space.sample(), deterministic=True)[0] for _ in range(n)])


def expect_error(kinds: tuple[type[Exception], ...], mentions: str, call: Callable[[], object], what: str) -> None:
    """
    :param kinds: Kinds of errors that are right
    :param mentions: What the message must contain, whatever the case
    :param call: What must fail
    :param what: What it does
    :raises AssertionError: It does not fail, or its message lacks that
    """
    try:
        call()
    except kinds as error:
        assert mentions.lower() in str(error).lower(), f"the error for {what} should mention {mentions!r}, found: {error}"
        return
    except Exception as error:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise AssertionError(f"{what} should raise {expected}, found {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what} should be refused")


@contextmanager
def folder() -> Iterator[pathlib.Path]:
    """
    :return: A temporary folder
    """
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)


class Record(BaseCallback):
    """Notes, at each step, the observation that was acted on, the action, the number of updates and the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[Any] = []
        self.actions: list[npt.NDArray[Any]] = []
        self.updates: list[int] = []
        self.states: list[State] = []

    def _on_step(self) -> bool:
        assert isinstance(self.model, TD3)
        self.observations.append(self.model._last_obs)
        self.actions.append(np.array(self.locals["actions"]))
        self.updates.append(self.model._n_updates)
        self.states.append(state(self.model))
        return True
