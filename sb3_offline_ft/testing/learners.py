"""How the clauses make learners and compare them."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_offline_ft.common.observations import kind_of
from sb3_offline_ft.datasets import OfflineDataset
from sb3_offline_ft.offline_td3 import OfflineTD3
from sb3_offline_ft.testing.point_env import VECTOR, PointEnv, record

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
NETWORKS = ("actor.", "actor_target.", "critic.", "critic_target.")


@lru_cache(maxsize=4)
def vector_data() -> OfflineDataset:
    """Data of a :class:`PointEnv` with its default spaces."""
    return record(PointEnv(), N_ROWS)


def vec_env(n_envs: int, space: spaces.Space[Any] = VECTOR) -> DummyVecEnv:
    """Several :class:`PointEnv` at once."""
    return DummyVecEnv([partial(_monitored, space) for _ in range(n_envs)])


def _monitored(space: spaces.Space[Any]) -> Monitor[Any, Any]:
    return Monitor(PointEnv(space))


def make(algorithm: Algorithm, settings: Mapping[str, Any], env: GymEnv | str | None = None, **wanted: Any) -> OfflineTD3:
    """
    Make a learner with the caller's settings, where the clause's prevail; of ``policy_kwargs`` each entry by itself. It has
    the policy that the environment's observations need, unless ``policy`` is given.
    """
    env = PointEnv() if env is None else env
    arguments = DEFAULTS | dict(settings) | wanted
    parts = (DEFAULTS, settings, wanted)
    arguments["policy_kwargs"] = {key: value for part in parts for key, value in (part.get("policy_kwargs") or {}).items()}
    arguments.setdefault("policy", "MlpPolicy" if isinstance(env, str) else _policy_for(env.observation_space))
    return algorithm(env=env, **arguments)


def _policy_for(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if _is_image(space) else "MlpPolicy"


def _is_image(space: spaces.Space[Any]) -> bool:
    return kind_of(space) == "image" and len(space.shape or ()) == 3


def small_extractor(space: spaces.Space[Any]) -> dict[str, Any]:
    """``policy_kwargs`` for a small features extractor."""
    if isinstance(space, spaces.Dict):
        return {"features_extractor_kwargs": {"cnn_output_dim": 8}}
    return {"features_extractor_kwargs": {"features_dim": 8}} if _is_image(space) else {}


@contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)


def reloaded(model: OfflineTD3, env: GymEnv | None = None, with_buffer: bool = False, **options: Any) -> OfflineTD3:
    """The learner as it comes back from a file, perhaps with its replay buffer."""
    with folder() as path:
        model.save(path / "model")
        loaded = type(model).load(path / "model", env=env, device="cpu", **options)
        if with_buffer:
            model.save_replay_buffer(path / "buffer")
            loaded.load_replay_buffer(path / "buffer")
    return loaded


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


# Comparison


def state(model: TD3) -> State:
    """Copies of all parameters and buffers of a learner's policy, targets included."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def moments(model: TD3) -> State:
    """Copies of what a learner's optimizers keep, by name."""
    return {
        f"{network}.optimizer.{index}.{name}": th.as_tensor(value).clone()
        for network in ("actor", "critic")
        for index, kept in getattr(model, network).optimizer.state_dict()["state"].items()
        for name, value in kept.items()
    }


def extra_state(model: OfflineTD3) -> ExtraState:
    """Copies of what a learner keeps beyond networks and optimizers."""
    return {name: np.array(value) for name, value in model.extra_state().items()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Tensors or arrays by name must be the same to the bit; ``what`` is promised."""
    assert found.keys() == expected.keys(), f"{what}: the names differ in {sorted(found.keys() ^ expected.keys())}"
    # NaN is equal to itself here
    different = [name for name, value in expected.items() if _bytes(value) != _bytes(found[name])]
    assert not different, f"{what}, but {len(different)} of {len(expected)} differ: {', '.join(different[:5])}"


def _bytes(value: th.Tensor | npt.NDArray[Any]) -> bytes:
    return (value.numpy() if isinstance(value, th.Tensor) else value).tobytes()


def assert_same_learner(found: TD3, expected: TD3, what: str, extra: bool = False) -> None:
    """Networks and optimizers must be the same to the bit, if asked for also what the learners keep besides."""
    assert_same(state(found), state(expected), f"{what} (networks)")
    assert_same(moments(found), moments(expected), f"{what} (optimizers)")
    if extra and isinstance(found, OfflineTD3) and isinstance(expected, OfflineTD3):
        assert_same(extra_state(found), extra_state(expected), f"{what} (extra state)")


def differs(found: State, expected: State, prefix: str = "") -> bool:
    """Whether any tensor whose name begins like this differs."""
    return any(not th.equal(value, expected[name]) for name, value in found.items() if name.startswith(prefix))


def assert_finite(model: TD3) -> None:
    """No parameter may be NaN or infinite."""
    wrong = [name for name, value in model.policy.state_dict().items() if not bool(th.isfinite(value).all())]
    assert not wrong, f"training made parameters NaN or infinite: {', '.join(wrong[:5])}"


def assert_moved(model: TD3, before: State, what: str) -> None:
    """Policy, critics and target networks must differ from an earlier state, and be finite."""
    after = state(model)
    for network in NETWORKS:
        assert differs(after, before, network), f"{what} changed nothing in {network.rstrip('.')}"
    assert_finite(model)


@contextmanager
def moving(model: TD3, what: str) -> Iterator[None]:
    """What is done in this block must move policy, critics and target networks."""
    before = state(model)
    yield
    assert_moved(model, before, what)


def actions_of(model: TD3, n: int = 5) -> npt.NDArray[Any]:
    """Deterministic actions at ``n`` observations that are always the same."""
    model.observation_space.seed(123)
    return np.stack([model.predict(model.observation_space.sample(), deterministic=True)[0] for _ in range(n)])


def expect_error(kinds: tuple[type[Exception], ...], mentions: str, call: Callable[[], object], what: str) -> None:
    """The call must fail with an error of such a kind whose message mentions this, whatever the case."""
    try:
        call()
    except kinds as error:
        assert mentions.lower() in str(error).lower(), f"the error for {what} should mention {mentions!r}, found: {error}"
        return
    except Exception as error:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise AssertionError(f"{what} should raise {expected}, found {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what} should be refused")
