"""Dict observations and images in the replay buffer: as in SB3's buffers, and as vectors in all that is ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import SimpleMultiObsEnv

from sb3_offline_ft import OfflineDataset
from sb3_offline_ft.buffers import DictOfflineToOnlineReplayBuffer, OfflineToOnlineReplayBuffer
from sb3_offline_ft.buffers.files import ring_columns
from tests.replay_data import (
    ACTION_SPACE,
    DICT,
    IMAGE,
    SPACES,
    VECTOR,
    assert_same,
    by_name,
    fill_online,
    make_buffer,
    make_dataset,
    make_vec_normalize,
)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_online_batches_are_those_of_sb3(n_envs: int, normalize: bool) -> None:
    ours, theirs = make_buffer(DICT, 30, n_envs), DictReplayBuffer(30 * n_envs, DICT, ACTION_SPACE, "cpu", n_envs)
    assert isinstance(ours, DictReplayBuffer) and isinstance(ours, OfflineToOnlineReplayBuffer)
    fill_online([ours, theirs], 40, np.random.default_rng(0))
    ours.set_offline_data(make_dataset(DICT, [6], [True], np.random.default_rng(1)))
    env = make_vec_normalize(DICT) if normalize else None
    np.random.seed(3)
    batches = [by_name(theirs.sample(16, env)) for _ in range(4)]
    np.random.seed(3)
    found = by_name(ours.sample_batches(4, 16, env, offline_fraction=0.0))
    assert not found.pop("is_offline").any()
    for name, column in found.items():
        expected = th.cat([batch[name] for batch in batches])
        if expected.dtype == th.float64:
            expected = expected.float()
        assert column.dtype == expected.dtype and th.equal(column, expected), name
    assert found["observations/camera"].dtype == th.uint8 and found["observations/mode"].dtype == th.int64


@settings(max_examples=60, deadline=None)
@given(
    space=st.sampled_from(sorted(SPACES)),
    episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    n_envs=st.integers(1, 3),
    n_steps=st.integers(0, 30),
    fraction=st.floats(0, 1),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_sampled_rows_are_rows_that_were_put_in(
    space: str, episodes: list[tuple[int, bool]], n_envs: int, n_steps: int, fraction: float, batch_size: int, seed: int
) -> None:
    np.random.seed(seed)
    generator = np.random.default_rng(seed)
    lengths, endings = zip(*episodes, strict=True)
    dataset = make_dataset(SPACES[space], lengths, endings, generator)
    buffer = make_buffer(SPACES[space], 20, n_envs, offline_fraction=fraction, seed=seed)
    buffer.set_offline_data(dataset)
    fill_online([buffer], n_steps, generator)
    batch = by_name(buffer.sample(batch_size))
    n_offline = batch_size if n_steps == 0 else round(fraction * batch_size)
    assert batch.pop("is_offline").flatten().tolist() == [True] * n_offline + [False] * (batch_size - n_offline)

    for name, column in batch.items():
        kind = {"camera": th.uint8, "mode": th.int64}.get(name.split("/")[-1], th.float32)
        assert column.dtype == (th.uint8 if space == "image" and name.endswith("observations") else kind), name

    def named(observations: Any, name: str) -> dict[str, np.ndarray]:
        return (
            {f"{name}/{key}": one for key, one in observations.items()}
            if isinstance(observations, dict)
            else {name: observations}
        )

    offline = {
        **named(dataset.observations, "observations"),
        **named(dataset.next_observations, "next_observations"),
        "actions": (dataset.actions - [0, 1]) / 2,
        "rewards": dataset.rewards[:, None],
        "dones": dataset.terminations[:, None],
    }
    online = {
        **named(buffer.observations, "observations"),
        **named(buffer.next_observations, "next_observations"),
        "actions": buffer.actions,
        "rewards": buffer.rewards[..., None],
        "dones": (buffer.dones * (1 - buffer.timeouts))[..., None],
    }
    flat = {name: array[: buffer.size()].reshape(-1, *array.shape[2:]) for name, array in online.items()}
    for k in range(batch_size):
        rows = offline if k < n_offline else flat
        (row,) = np.flatnonzero(rows["rewards"][:, 0] == float(batch["rewards"][k]))
        for name, column in batch.items():
            np.testing.assert_allclose(column[k].numpy(), rows[name][row], rtol=1e-6, atol=1e-6, err_msg=name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "n-step": {"n_steps": 3, "gamma": 0.9},
    "next actions and returns": {"next_actions": True, "returns": True},
    "augmentation": {"augmentation": "uniform_noise_0.1"},
    "balanced": {"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": [8], "batch_size": 16}},
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_dict_with_one_key_behaves_as_a_box(options: dict[str, Any], normalize: bool, tmp_path: Path) -> None:
    single = spaces.Dict({"only": VECTOR})
    box, nested = (make_buffer(space, 25, 2, seed=3, **options) for space in (VECTOR, single))
    for buffer in (box, nested):
        buffer.set_offline_data(make_dataset(buffer.observation_space, [7, 5], [True, False], np.random.default_rng(0)))
        fill_online([buffer], 30, np.random.default_rng(1))
    assert box.nbytes_per_row == nested.nbytes_per_row == 2 * 3 * 4
    for step in range(4):
        divergences, batches = [], []
        for buffer in (box, nested):
            np.random.seed(step)
            env = make_vec_normalize(buffer.observation_space) if normalize else None
            divergences.append(buffer.update_density_ratio())
            batches.append(by_name(buffer.sample_batches(2, 8, env)))
        assert divergences[0] == divergences[1]
        assert_same({name.removesuffix("/only"): column for name, column in batches[1].items()}, batches[0])
        if step == 1:
            # Saving and loading make no difference either
            nested.save_online(tmp_path / "buffer.npz")
            nested = make_buffer(single, 25, 2, **options)
            nested.load_online(tmp_path / "buffer.npz")
            nested.set_offline_data(make_dataset(single, [7, 5], [True, False], np.random.default_rng(0)))


@pytest.mark.parametrize("space", SPACES)
def test_saved_online_part_continues_to_the_bit(tmp_path: Path, space: str) -> None:
    dataset = make_dataset(SPACES[space], [12, 9], [True, False], np.random.default_rng(0))
    buffers = [make_buffer(SPACES[space], 20, 2, n_steps=2, seed=seed) for seed in (1, 2)]
    for buffer in buffers:
        buffer.set_offline_data(dataset)
    fill_online(buffers[:1], 25, np.random.default_rng(1))
    buffers[0].sample(8)
    buffers[0].save_online(tmp_path / "buffer.npz")
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    buffers[1].load_online(tmp_path / "buffer.npz")
    for _ in range(3):
        batches = []
        for buffer in buffers:
            np.random.seed(9)
            batches.append(by_name(buffer.sample(16)))
        assert_same(*batches)
    copied = make_buffer(SPACES[space], 20, 2, n_steps=2)
    copied.copy_online(buffers[0])
    for name, array in ring_columns(copied).items():
        assert name == "timeouts" or np.array_equal(array, ring_columns(buffers[0])[name]), name


def test_the_content_of_sb3s_buffer_is_taken_over() -> None:
    theirs, ours = DictReplayBuffer(20, DICT, ACTION_SPACE, "cpu"), make_buffer(DICT, 20)
    fill_online([theirs], 25, np.random.default_rng(0))
    ours.copy_online(theirs)
    for key, column in theirs.observations.items():
        assert np.allclose(ours.observations[key], column), key  # type: ignore[call-overload]
    assert (ours.pos, ours.full) == (theirs.pos, theirs.full)


def test_files_of_another_kind_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "buffer.npz"
    other_keys = spaces.Dict({"camera": IMAGE, "arm": VECTOR, "mode": spaces.Discrete(4)})
    saved = make_buffer(DICT)
    fill_online([saved], 5, np.random.default_rng(0))
    saved.save_online(path)
    for space in (other_keys, VECTOR, spaces.Dict({**DICT.spaces, "joints": IMAGE})):
        buffer = make_buffer(space)
        with pytest.raises(ValueError, match="saved with observation shape"):
            buffer.load_online(path)
        with pytest.raises(ValueError, match="saved with observation shape"):
            buffer.copy_online(saved)
        assert buffer.size() == 0
    with pytest.raises(ValueError, match="holds a ReplayBuffer: expected a DictReplayBuffer"):
        make_buffer(DICT).copy_online(ReplayBuffer(5, VECTOR, ACTION_SPACE, "cpu"), "it")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["observations/joints"] = arrays["observations/joints"][:-1]
    np.savez(path, **arrays)
    buffer = make_buffer(DICT)
    with pytest.raises(ValueError, match=r"is damaged .*observations/joints has the shape"):
        buffer.load_online(path)
    assert buffer.size() == 0


def test_each_class_names_the_other_for_its_spaces() -> None:
    with pytest.raises(ValueError, match=r"needs a Box observation space .* use DictOfflineToOnlineReplayBuffer\."):
        OfflineToOnlineReplayBuffer(5, DICT, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match=r"needs a Dict observation space .* use OfflineToOnlineReplayBuffer\."):
        DictOfflineToOnlineReplayBuffer(5, VECTOR, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        DictOfflineToOnlineReplayBuffer(5, DICT, ACTION_SPACE, "cpu", optimize_memory_usage=True)


@pytest.mark.parametrize("nested", [False, True])
def test_images_stay_bytes_and_are_transposed_to_the_environments_order(nested: bool) -> None:
    generator = np.random.default_rng(0)
    recorded = spaces.Box(0, 255, (6, 5, 2), np.uint8)
    dataset = make_dataset(spaces.Dict({"camera": recorded}) if nested else recorded, [8], [True], generator)
    buffer = make_buffer(spaces.Dict({"camera": IMAGE}) if nested else IMAGE, 10, seed=0)
    buffer.set_offline_data(dataset)
    fill_online([buffer], 4, generator)
    batch = by_name(buffer.sample(32))
    name = "observations/camera" if nested else "observations"
    assert batch[name].dtype == th.uint8 and batch[name].shape == (32, 2, 6, 5)
    columns = dataset.observations["camera"] if isinstance(dataset.observations, dict) else dataset.observations
    possible = {image.transpose(2, 0, 1).tobytes() for image in columns}
    assert {image.numpy().tobytes() for image in batch[name][:16]} <= possible
    ring = buffer.observations["camera"] if isinstance(buffer.observations, dict) else buffer.observations
    assert ring.dtype == np.uint8


def test_dict_data_is_flattened_for_an_environment_that_does() -> None:
    from gymnasium.spaces.utils import flatten, flatten_space

    space = spaces.Dict({"joints": VECTOR, "mode": spaces.Discrete(4)})
    dataset = make_dataset(space, [6], [True], np.random.default_rng(0))
    flat_space = flatten_space(space)
    buffer = make_buffer(flat_space, 10, seed=0)
    buffer.set_offline_data(dataset)
    assert isinstance(dataset.observations, dict)
    modes = dataset.observations["mode"].astype(np.int64).ravel()
    expected = {
        flatten(space, {"joints": joints, "mode": mode}).astype(np.float32).tobytes()
        for joints, mode in zip(dataset.observations["joints"], modes, strict=True)
    }
    assert {row.numpy().tobytes() for row in buffer.sample(64).observations} == expected


@pytest.mark.parametrize("n_steps", [1, 3])
def test_sb3_learns_from_both_parts(n_steps: int) -> None:
    env = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
    model = TD3(
        "MultiInputPolicy",
        env,
        learning_starts=20,
        batch_size=16,
        replay_buffer_class=DictOfflineToOnlineReplayBuffer,
        replay_buffer_kwargs={"n_steps": n_steps, "gamma": 0.99, "seed": 0},
        buffer_size=200,
        policy_kwargs={"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
        seed=0,
        device="cpu",
    )
    model.learn(30)
    buffer = model.replay_buffer
    assert isinstance(buffer, DictOfflineToOnlineReplayBuffer) and model.env is not None
    n = buffer.pos
    dataset = OfflineDataset.from_columns(
        observations={key: column[:n, 0] for key, column in buffer.observations.items()},
        actions=model.policy.unscale_action(buffer.actions[:n, 0]),
        rewards=buffer.rewards[:n, 0],
        next_observations={key: column[:n, 0] for key, column in buffer.next_observations.items()},
        terminations=buffer.dones[:n, 0] * (1 - buffer.timeouts[:n, 0]),
        truncations=buffer.dones[:n, 0] * buffer.timeouts[:n, 0],
        observation_space=model.observation_space,
        action_space=model.action_space,
        episode_starts=[0],
    )
    buffer.set_offline_data(dataset)
    before = model.critic.state_dict()["qf0.0.weight"].clone()
    model.learn(10, reset_num_timesteps=False)
    assert not th.equal(before, model.critic.state_dict()["qf0.0.weight"])
    batch = buffer.sample(16)
    assert int(batch.is_offline.sum()) == 8
    values = th.cat(model.critic(batch.observations, batch.actions))
    assert values.isfinite().all()
