"""Clauses about observation and action spaces."""

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_offline_ft.testing.clause import clause
from sb3_offline_ft.testing.learners import (
    Algorithm,
    actions_of,
    assert_finite,
    assert_same,
    expect_error,
    make,
    moving,
    small_extractor,
    state,
)
from sb3_offline_ft.testing.point_env import PointEnv, record

IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
VECTORS: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "unbounded float64": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "integers": spaces.Box(0, 9, (2,), np.int64),
    "bytes": spaces.Box(0, 255, (2,), np.uint8),
    "matrix": spaces.Box(-2.0, 5.0, (2, 3), np.float32),
}
OTHERS_WITH_DATA: dict[str, spaces.Space[Any]] = {
    "image": IMAGE,
    "image, channels last": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "dict of vectors": spaces.Dict({"position": VECTORS["vector"], "fine": VECTORS["unbounded float64"]}),
    "dict with an image": spaces.Dict({"view": IMAGE, "position": VECTORS["vector"]}),
    "dict with a discrete": spaces.Dict({"position": VECTORS["vector"], "cell": spaces.Discrete(6)}),
}
WITHOUT_DATA: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(6),
    "multi-discrete": spaces.MultiDiscrete([4, 5]),
    "multi-binary": spaces.MultiBinary(4),
}
ACTIONS: dict[str, spaces.Box] = {
    "one number in [-2, 2]": spaces.Box(-2.0, 2.0, (1,), np.float32),
    "bounds that differ": spaces.Box(np.array([-3.0, 0.0, 10.0], np.float32), np.array([-1.0, 0.5, 20.0], np.float32)),
    "float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
    "matrix": spaces.Box(-2.0, 3.0, (2, 2), np.float32),
}


def _check_actions(model: Any, where: str) -> None:
    space = model.action_space
    actions = actions_of(model)
    assert actions.shape == (5, *space.shape), f"{where}: `predict` gives actions of shape {actions.shape[1:]}"
    assert np.isfinite(actions).all(), f"{where}: `predict` gives {actions}"
    inside = (actions >= space.low - 1e-6).all() and (actions <= space.high + 1e-6).all()
    assert inside, f"{where}: `predict` leaves the bounds {space.low} to {space.high}: {actions}"


@clause
def check_observation_spaces(algorithm: Algorithm, **settings: Any) -> None:
    """Without data, it trains on every observation space that SB3's ``TD3`` takes."""
    for name, space in {**VECTORS, **OTHERS_WITH_DATA, **WITHOUT_DATA}.items():
        env = PointEnv(space)
        model = make(algorithm, settings, env, dataset=None, policy_kwargs=small_extractor(space), buffer_size=100)
        with moving(model, f"training on observations {name}"):
            model.learn(30)
        _check_actions(model, f"observations {name}")


@clause
def check_observation_spaces_with_data(algorithm: Algorithm, **settings: Any) -> None:
    """It pretrains and finetunes on vectors, matrices, images and dictionaries of them."""
    for name, space in {**VECTORS, **OTHERS_WITH_DATA}.items():
        dataset, extractor = record(PointEnv(space), 60), small_extractor(space)
        model = make(algorithm, settings, PointEnv(space), dataset=dataset, policy_kwargs=extractor, buffer_size=100)
        with moving(model, f"pretraining on observations {name}"):
            model.pretrain(6)
        with moving(model, f"finetuning on observations {name}"):
            model.learn(12)
        _check_actions(model, f"observations {name}")


@clause
def check_observations_that_data_cannot_hold(algorithm: Algorithm, **settings: Any) -> None:
    """With a dataset, an observation space that is not supported is refused by an error that names it."""
    dataset = record(PointEnv(), 60)

    def train(space: spaces.Space[Any]) -> None:
        make(algorithm, settings, PointEnv(space), dataset=dataset).pretrain(1)

    for name, space in WITHOUT_DATA.items():
        expect_error((ValueError,), type(space).__name__, partial(train, space), f"data with observations {name}")


@clause
def check_wrong_data(algorithm: Algorithm, **settings: Any) -> None:
    """Data of another environment is refused before anything is trained."""
    for what, mentions, env in (
        ("observations of another shape", "observation", PointEnv(spaces.Box(-1.0, 1.0, (7,), np.float32))),
        ("actions of another shape", "action", PointEnv(action_space=spaces.Box(-1.0, 1.0, (5,), np.float32))),
        ("actions with other bounds", "action", PointEnv(action_space=spaces.Box(-5.0, 5.0, (2,), np.float32))),
        ("a dictionary in place of a vector", "observation", PointEnv(OTHERS_WITH_DATA["dict of vectors"])),
    ):
        model = make(algorithm, settings, PointEnv(), dataset=record(env, 60), offline_steps=5)
        before = state(model)
        for train in (model.pretrain, model.learn):
            expect_error((ValueError,), mentions, partial(train, 5), what)
        assert model.offline_dataset is None, f"{what}: it is kept all the same"
        assert_same(state(model), before, f"{what} leaves the networks as they are")


@clause
def check_action_spaces(algorithm: Algorithm, **settings: Any) -> None:
    """Actions of any shape within any finite bounds are learned from, chosen and stored as they should be."""
    for name, space in ACTIONS.items():
        dataset = record(PointEnv(action_space=space), 100)
        model = make(algorithm, settings, PointEnv(action_space=space), dataset=dataset)
        model.pretrain(10)
        # PointEnv refuses actions that are not in its space
        model.learn(30)
        _check_actions(model, f"actions {name}")
        buffer = model.replay_buffer
        assert buffer is not None
        batch = buffer.sample(64, offline_fraction=1.0)  # type: ignore[call-arg]
        assert float(batch.actions.abs().max()) <= 1.0, f"actions {name}: offline actions are not scaled to [-1, 1]"
        scaled = batch.actions.numpy().reshape(64, *space.shape)
        found = model.policy.unscale_action(scaled).reshape(64, -1)
        recorded = dataset.actions.reshape(len(dataset), -1)
        distances = np.abs(found[:, None] - recorded[None]).max(axis=2).min(axis=1)
        assert distances.max() < 1e-4, f"actions {name}: what is sampled was not recorded"
        online = buffer.actions[: buffer.size()]
        assert np.abs(online).max() <= 1.0, f"actions {name}: online actions are not scaled to [-1, 1]"


@clause
def check_unsupported_action_spaces(algorithm: Algorithm, **settings: Any) -> None:
    """Discrete and unbounded actions, and spaces that SB3 has no policy for, are refused by an error that says so."""
    errors = (ValueError, AssertionError, NotImplementedError)
    unbounded = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    nested = spaces.Dict({"outer": spaces.Dict({"inner": VECTORS["vector"]})})
    cases: dict[str, tuple[str, gym.Env[Any, Any]]] = {
        "discrete actions": ("discrete", PointEnv(action_space=spaces.Discrete(4))),
        "unbounded actions": ("bound", PointEnv(action_space=unbounded)),
        "observations in a tuple": ("tuple", PointEnv(spaces.Tuple((VECTORS["vector"], VECTORS["vector"])))),
        "nested dictionaries": ("nested", PointEnv(nested)),
    }
    for what, (mentions, env) in cases.items():
        expect_error(errors, mentions, partial(make, algorithm, settings, env, dataset=None), what)


@clause
def check_predict(algorithm: Algorithm, **settings: Any) -> None:
    """``predict`` works as in SB3: single and several observations, always the same answer, no trace left behind."""
    model = make(algorithm, settings)
    space, shape = model.observation_space, model.action_space.shape
    assert shape is not None
    observations = np.stack([space.sample() for _ in range(4)])
    before = state(model)
    for trained in (False, True):
        if trained:
            model.learn(40)
            before = state(model)
        several, hidden = model.predict(observations, deterministic=True)
        assert several.shape == (4, *shape) and hidden is None, f"`predict` of 4 gives shape {several.shape}"
        assert np.issubdtype(several.dtype, np.floating), f"`predict` gives {several.dtype}"
        for observation, expected in zip(observations, several, strict=True):
            action, _ = model.predict(observation, deterministic=True)
            assert action.shape == shape, f"`predict` of one observation gives shape {action.shape}"
            assert np.allclose(action, expected, atol=1e-5), "an action depends on which observations come with it"
        assert np.array_equal(model.predict(observations, deterministic=True)[0], several), "`predict` does not repeat itself"
        vec_env = model.get_env()
        assert vec_env is not None
        first: Any = vec_env.reset()
        assert model.predict(first, deterministic=True)[0].shape == (1, *shape), "`predict` of a vectorized environment's"
        assert_same(state(model), before, "`predict` leaves the networks as they are")
    expect_error(
        (ValueError,), "shape", lambda: model.predict(np.zeros(9, np.float32)), "`predict` of an observation of another shape"
    )
    assert_finite(model)
