"""Drawing many batches at once: to the bit the batches, and the random streams, of drawing them one by one."""

import json
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_offline_ft import OfflineDataset, OfflineToOnlineReplayBuffer
from tests import replay_data

OBSERVATION_SPACES = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
    "bytes": spaces.Box(0, 255, (3,), np.uint8),
}
ACTION_SPACE = spaces.Box(np.array([-2.0, -1.0], np.float32), np.array([2.0, 3.0], np.float32))
COLUMNS = ("observations", "actions", "next_observations", "dones", "rewards", "is_offline")


class Still(gym.Env):
    """Only its spaces are needed."""

    def __init__(self, observation_space: spaces.Box) -> None:
        self.observation_space, self.action_space = observation_space, ACTION_SPACE


def make_vec_normalize(observation_space: spaces.Box) -> VecNormalize:
    env = VecNormalize(DummyVecEnv([lambda: Still(observation_space)]), clip_obs=2.0)
    shape = observation_space.shape
    env.obs_rms.mean, env.obs_rms.var = np.linspace(-1, 1, np.prod(shape)).reshape(shape), np.full(shape, 1.7)
    env.ret_rms.var = np.array(3.1)
    return env


def make_dataset(n_rows: int, observation_space: spaces.Box, generator: np.random.Generator) -> OfflineDataset:
    terminations = generator.random(n_rows) < 0.3
    return OfflineDataset.from_columns(
        observations=(generator.random((n_rows, *observation_space.shape)) * 9).astype(observation_space.dtype),
        actions=generator.uniform(-1, 1, (n_rows, 2)).astype(np.float32),
        rewards=generator.normal(size=n_rows).astype(np.float32),
        next_observations=(generator.random((n_rows, *observation_space.shape)) * 9).astype(observation_space.dtype),
        terminations=terminations,
        truncations=~terminations & (generator.random(n_rows) < 0.3),
        episode_starts=[0],
        observation_space=observation_space,
        action_space=ACTION_SPACE,
    )


def fill_online(buffer: ReplayBuffer, n_steps: int, generator: np.random.Generator) -> None:
    for _ in range(n_steps):
        observations, next_observations = generator.random((2, buffer.n_envs, *buffer.obs_shape)) * 9
        dones = generator.random(buffer.n_envs) < 0.5
        buffer.add(
            observations.astype(np.float32),
            next_observations.astype(np.float32),
            generator.uniform(-1, 1, (buffer.n_envs, 2)),
            generator.normal(size=buffer.n_envs),
            dones,
            [{"TimeLimit.truncated": bool(done and generator.random() < 0.5)} for done in dones],
        )


def stream_states(buffer: OfflineToOnlineReplayBuffer) -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return json.loads(buffer.get_sampler_state()), name, keys.tolist(), *rest


@settings(max_examples=200, deadline=None)
@given(
    space=st.sampled_from(sorted(OBSERVATION_SPACES)),
    n_offline_rows=st.sampled_from([0, 1, 2, 3, 64, 100]),
    n_steps=st.sampled_from([0, 1, 2, 5, 40]),
    n_envs=st.integers(1, 3),
    fraction=st.sampled_from([None, 0.0, 1.0, 0.5]) | st.floats(0, 1),
    n_batches=st.integers(1, 7),
    batch_size=st.integers(1, 33),
    handle_timeout_termination=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_batches_drawn_at_once_are_those_drawn_one_by_one(
    space, n_offline_rows, n_steps, n_envs, fraction, n_batches, batch_size, handle_timeout_termination, normalize, seed
):
    observation_space, generator = OBSERVATION_SPACES[space], np.random.default_rng(seed)
    one_by_one = OfflineToOnlineReplayBuffer(
        20 * n_envs,
        observation_space,
        ACTION_SPACE,
        "cpu",
        n_envs,
        handle_timeout_termination=handle_timeout_termination,
        offline_fraction=0.3,
        seed=seed,
    )
    if n_offline_rows > 0:
        one_by_one.set_offline_data(make_dataset(n_offline_rows, observation_space, generator))
    fill_online(one_by_one, n_steps, generator)
    at_once = deepcopy(one_by_one)
    env = make_vec_normalize(observation_space) if normalize else None
    if n_offline_rows == n_steps == 0:
        with pytest.raises(ValueError, match="is empty"):
            at_once.sample_batches(n_batches, batch_size, env, fraction)
        return

    # The second round starts in the middle of both streams
    for n in (n_batches, 2):
        np.random.seed(seed)
        batches = [one_by_one.sample(batch_size, env, fraction) for _ in range(n)]
        expected_states = stream_states(one_by_one)
        np.random.seed(seed)
        found = at_once.sample_batches(n, batch_size, env, fraction)
        assert stream_states(at_once) == expected_states
        assert found.discounts is None
        for name in COLUMNS:
            column, parts = getattr(found, name), [getattr(batch, name) for batch in batches]
            assert column.dtype == parts[0].dtype and column.is_contiguous(), name
            assert th.equal(column, th.cat(parts)), name
        n_offline, n_online = at_once.split(batch_size, fraction)
        assert found.is_offline.flatten().tolist() == n * ([True] * n_offline + [False] * n_online)


AUGMENTATIONS = {
    "vector": [
        "gaussian_noise_0.3",
        "uniform_noise",
        "amplitude_scaling",
        "dimension_dropout",
        "state_switch",
        "state_switch_0_2",
    ],
    "image": ["random_shift_2"],
}
AUGMENTATIONS["dict"] = [*AUGMENTATIONS["image"], *AUGMENTATIONS["vector"][:4]]
AUGMENTATIONS["vectors"] = AUGMENTATIONS["vector"][:4]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_with_every_option_batches_drawn_at_once_are_those_drawn_one_by_one(data):
    name = data.draw(st.sampled_from(sorted(AUGMENTATIONS)))
    space = {**replay_data.SPACES, "vectors": replay_data.VECTORS}[name]
    balanced = name.startswith("vector") and data.draw(st.booleans())
    seed, n_envs = data.draw(st.integers(0, 2**31 - 1)), data.draw(st.integers(1, 3))
    generator = np.random.default_rng(seed)
    one_by_one = replay_data.make_buffer(
        space,
        15,
        n_envs,
        offline_fraction=data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        seed=seed,
        n_steps=data.draw(st.sampled_from([1, 2, 3, 9])),
        gamma=0.9,
        next_actions=data.draw(st.booleans()),
        returns=data.draw(st.booleans()),
        offline_sampling="balanced" if balanced else "uniform",
        balanced_kwargs={"net_arch": [4], "batch_size": 8} if balanced else None,
        augmentation=data.draw(st.sampled_from([None, *AUGMENTATIONS[name]])),
    )
    parts = [replay_data.make_dataset(space, lengths, [True, False], generator) for lengths in ([4, 1], [7, 20])]
    one_by_one.set_offline_data(OfflineDataset.concatenate(parts, data.draw(st.sampled_from([None, [0.3, 0.7]]))))
    replay_data.fill_online([one_by_one], data.draw(st.sampled_from([0, 1, 10, 25])), generator)
    env = replay_data.make_vec_normalize(space) if data.draw(st.booleans()) else None
    at_once = deepcopy(one_by_one)
    batch_size = data.draw(st.integers(1, 12))
    # Between the rounds priorities change, and the second one starts in the middle of the streams
    for n in (data.draw(st.integers(1, 5)), 2):
        np.random.seed(seed)
        expected = replay_data.concatenated([one_by_one.sample(batch_size, env) for _ in range(n)])
        np.random.seed(seed)
        found = at_once.sample_batches(n, batch_size, env)
        replay_data.assert_same(replay_data.by_name(found), expected)
        assert at_once.get_sampler_state() == one_by_one.get_sampler_state()
        assert at_once.sampled_rows_by_source() == one_by_one.sampled_rows_by_source()
        assert at_once.update_density_ratio() == one_by_one.update_density_ratio()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("space", OBSERVATION_SPACES)
def test_online_batches_are_those_of_sb3(space, n_envs, normalize):
    observation_space = OBSERVATION_SPACES[space]
    env = make_vec_normalize(observation_space) if normalize else None
    ours = OfflineToOnlineReplayBuffer(50, observation_space, ACTION_SPACE, "cpu", n_envs, offline_fraction=0.0)
    ours.set_offline_data(make_dataset(9, observation_space, np.random.default_rng(0)))
    theirs = ReplayBuffer(50, observation_space, ACTION_SPACE, "cpu", n_envs)
    for buffer in (ours, theirs):
        fill_online(buffer, 70, np.random.default_rng(1))
    np.random.seed(3)
    batches = [theirs.sample(32, env) for _ in range(6)]
    expected_state = np.random.get_state()[1:3]
    np.random.seed(3)
    found = ours.sample_batches(6, 32, env)
    np.testing.assert_equal(np.random.get_state()[1:3], expected_state)
    for name in COLUMNS[:-1]:
        expected = th.cat([getattr(batch, name) for batch in batches])
        dtype = th.uint8 if expected.dtype == th.uint8 else th.float32
        assert getattr(found, name).dtype == dtype and th.equal(getattr(found, name), expected.to(dtype)), name
    assert not found.is_offline.any()


@pytest.mark.parametrize("handle_timeout_termination", [False, True])
def test_offline_rows_are_those_the_generator_names(handle_timeout_termination):
    observation_space = OBSERVATION_SPACES["vector"]
    dataset = make_dataset(100, observation_space, np.random.default_rng(0))
    buffer = OfflineToOnlineReplayBuffer(
        50, observation_space, ACTION_SPACE, "cpu", handle_timeout_termination=handle_timeout_termination, seed=4
    )
    buffer.set_offline_data(dataset)
    generator = np.random.default_rng()
    generator.bit_generator.state = json.loads(buffer.get_sampler_state())
    rows = np.concatenate([generator.integers(0, 100, size=16) for _ in range(5)])
    found = buffer.sample_batches(5, 16)
    ended = dataset.terminations if handle_timeout_termination else dataset.terminations | dataset.truncations
    assert np.array_equal(found.observations, dataset.observations[rows])
    assert np.array_equal(found.next_observations, dataset.next_observations[rows])
    assert np.array_equal(found.rewards, dataset.rewards[rows, None])
    assert np.array_equal(found.dones, ended[rows, None])
    assert found.actions.numpy() == pytest.approx((dataset.actions[rows] - [0, 1]) / 2, abs=1e-6)


def test_batches_share_no_memory_with_the_data_and_lie_on_the_device():
    observation_space, generator = OBSERVATION_SPACES["vector"], np.random.default_rng(0)
    for device in ("cpu", "meta"):
        buffer = OfflineToOnlineReplayBuffer(50, observation_space, ACTION_SPACE, device)
        buffer.set_offline_data(make_dataset(9, observation_space, generator))
        fill_online(buffer, 5, generator)
        found = buffer.sample_batches(3, 8)
        for name in COLUMNS:
            column = getattr(found, name)
            assert column.device.type == device and len(column) == 24, name
            column.zero_()
    assert buffer.observations[:5].all() and buffer.offline_data.observations.all()
