"""n-step returns: offline those of a plain loop, online those of SB3, never across the end of an episode."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from tests.replay_data import ACTION_SPACE, VECTOR, by_name, fill_online, make_buffer, make_dataset, make_vec_normalize

COLUMNS = ("observations", "actions", "next_observations", "dones", "rewards", "discounts")


@settings(max_examples=150, deadline=None)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    n_steps=st.integers(1, 8),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    handle_timeout_termination=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_offline_rows_are_those_of_a_plain_loop(
    episodes: list[tuple[int, bool]], n_steps: int, gamma: float, handle_timeout_termination: bool, normalize: bool, seed: int
) -> None:
    lengths, endings = zip(*episodes, strict=True)
    dataset = make_dataset(VECTOR, lengths, endings, np.random.default_rng(seed))
    buffer = make_buffer(
        VECTOR, n_steps=n_steps, gamma=gamma, handle_timeout_termination=handle_timeout_termination, seed=seed
    )
    buffer.set_offline_data(dataset)
    env = make_vec_normalize(VECTOR) if normalize else None
    if env is not None:
        env.norm_obs = False
    batch = buffer.sample(64, env)

    row_of = {observation.tobytes(): row for row, observation in enumerate(dataset.observations)}
    ends = dataset.terminations | dataset.truncations
    rewards = dataset.rewards if env is None else env.normalize_reward(dataset.rewards)
    for k in range(64):
        row = row_of[batch.observations[k].numpy().tobytes()]
        total, steps = 0.0, 0
        while True:
            total += gamma**steps * float(rewards[row + steps])
            steps += 1
            if steps == n_steps or ends[row + steps - 1]:
                break
        last = row + steps - 1
        assert float(batch.rewards[k]) == pytest.approx(total, rel=1e-5, abs=1e-5)
        assert np.array_equal(batch.next_observations[k], dataset.next_observations[last])
        done = dataset.terminations[last] or (dataset.truncations[last] and not handle_timeout_termination)
        assert float(batch.dones[k]) == float(done)
        if n_steps == 1:
            assert batch.discounts is None
        else:
            assert batch.discounts is not None and float(batch.discounts[k]) == pytest.approx(gamma**steps, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    n_envs=st.integers(1, 3),
    rows=st.integers(1, 15),
    steps=st.integers(1, 40),
    n_steps=st.integers(2, 6),
    gamma=st.floats(0, 1),
    ends=st.sampled_from([0.0, 0.1, 0.5]),
    handle_timeout_termination=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_online_batches_are_those_of_sb3(
    n_envs: int,
    rows: int,
    steps: int,
    n_steps: int,
    gamma: float,
    ends: float,
    handle_timeout_termination: bool,
    normalize: bool,
    seed: int,
) -> None:
    common: dict[str, Any] = {"n_steps": n_steps, "gamma": gamma, "handle_timeout_termination": handle_timeout_termination}
    ours = make_buffer(VECTOR, rows, n_envs, **common)
    theirs = NStepReplayBuffer(rows * n_envs, VECTOR, ACTION_SPACE, "cpu", n_envs, **common)
    generator = np.random.default_rng(seed)
    fill_online([ours, theirs], steps, generator, ends)
    if seed % 2:
        ours.set_offline_data(make_dataset(VECTOR, [5], [True], generator))
    env = make_vec_normalize(VECTOR) if normalize else None
    np.random.seed(seed)
    expected = [theirs.sample(16, env) for _ in range(3)]
    expected_state = np.random.get_state()[1:3]
    np.random.seed(seed)
    found = ours.sample_batches(3, 16, env, offline_fraction=0.0)
    np.testing.assert_equal(np.random.get_state()[1:3], expected_state)
    for name in COLUMNS:
        wanted = th.cat([getattr(batch, name) for batch in expected]).float()
        assert th.equal(getattr(found, name), wanted), name
    assert not found.is_offline.any()


def test_mixed_batches_keep_their_exact_split() -> None:
    buffer = make_buffer(VECTOR, n_steps=3, offline_fraction=0.3)
    buffer.set_offline_data(make_dataset(VECTOR, [9, 4], [True, False], np.random.default_rng(0)))
    fill_online([buffer], 20, np.random.default_rng(1))
    batch = buffer.sample_batches(4, 10)
    assert batch.is_offline.view(4, 10).tolist() == 4 * [3 * [True] + 7 * [False]]
    assert batch.discounts is not None and batch.discounts.shape == (40, 1)
    possible = th.tensor([0.99, 0.99**2, 0.99**3])
    assert bool(((batch.discounts - possible).abs().min(dim=1).values < 1e-6).all())


def test_nothing_is_summed_across_a_reset_in_the_middle_of_an_episode() -> None:
    buffer = make_buffer(VECTOR, 20, n_envs=2, n_steps=4, gamma=1.0, next_actions=True, returns=True)
    generator = np.random.default_rng(0)
    fill_online([buffer], 5, generator, ends=0.0)
    buffer.cut_episodes()
    fill_online([buffer], 3, generator, ends=0.0)
    buffer.dones[7] = 1.0
    batch = buffer.sample(500)
    for k in range(500):
        slot, env = np.argwhere((buffer.observations == batch.observations[k].numpy()).all(axis=-1))[0]
        last = min(slot + 3, 4 if slot < 5 else 7)
        assert float(batch.rewards[k]) == pytest.approx(buffer.rewards[slot : last + 1, env].sum(), rel=1e-5, abs=1e-6)
        # The value of the state in which the recording was cut counts
        assert float(batch.dones[k]) == float(last == 7)
        assert batch.has_next_actions is not None and bool(batch.has_next_actions[k]) == (last not in (4, 7))


def test_the_algorithm_can_set_the_number_of_steps_at_any_time() -> None:
    dataset = make_dataset(VECTOR, [30, 3], [True, False], np.random.default_rng(0))
    early, late = make_buffer(VECTOR, n_steps=4, gamma=0.9, seed=1), make_buffer(VECTOR, seed=1)
    for buffer in (early, late):
        fill_online([buffer], 20, np.random.default_rng(1))
        buffer.set_offline_data(dataset)
    late.set_n_steps(4, 0.9)
    batches = []
    for buffer in (early, late):
        np.random.seed(0)
        batches.append(by_name(buffer.sample(32)))
    assert all(th.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize(("n_steps", "gamma"), [(0, 0.9), (1.5, 0.9), (3, 1.1), (3, float("nan"))])
def test_numbers_out_of_range_are_refused(n_steps: Any, gamma: float) -> None:
    with pytest.raises(ValueError, match=r"`n_steps` must be a whole number|`gamma` must be in \[0, 1\]"):
        make_buffer(VECTOR, n_steps=n_steps, gamma=gamma)


def test_files_of_other_steps_are_refused_and_old_files_load(tmp_path: Path) -> None:
    path = tmp_path / "buffer.npz"
    saved = make_buffer(VECTOR, n_steps=3, gamma=0.9)
    fill_online([saved], 30, np.random.default_rng(0))
    saved.save_online(path)
    same = make_buffer(VECTOR, n_steps=3, gamma=0.9)
    same.load_online(path)
    assert np.array_equal(same.rewards, saved.rewards)
    for others, message in (
        ({"n_steps": 1}, "n_steps 3, this learner has 1: .* same `n_steps` and `gamma`"),
        ({"n_steps": 3, "gamma": 0.99}, "gamma 0.9, this learner has 0.99"),
    ):
        other = make_buffer(VECTOR, **others)
        with pytest.raises(ValueError, match=message):
            other.load_online(path)
        with pytest.raises(ValueError, match=message):
            other.copy_online(saved)
        assert other.size() == 0 and not other.rewards.any()

    # A file from before there were n-step returns: it says n_steps 1 and nothing of gamma
    with np.load(path, allow_pickle=False) as file:
        facts, arrays = json.loads(str(file["facts"])), {name: file[name] for name in file.files if name != "facts"}
    del facts["gamma"]
    facts["n_steps"] = 1
    np.savez(path, facts=np.array(json.dumps(facts)), **arrays)
    plain = make_buffer(VECTOR)
    plain.load_online(path)
    assert np.array_equal(plain.rewards, saved.rewards)
    with pytest.raises(ValueError, match="n_steps 1, this learner has 3"):
        same.load_online(path)


def test_the_ring_of_sb3_is_taken_over() -> None:
    theirs = NStepReplayBuffer(20, VECTOR, ACTION_SPACE, "cpu", n_steps=3, gamma=0.9)
    ours = make_buffer(VECTOR, 20, n_steps=3, gamma=0.9)
    fill_online([theirs], 27, np.random.default_rng(0))
    ours.copy_online(theirs)
    batches = []
    for buffer in (ours, theirs):
        np.random.seed(4)
        batches.append(buffer.sample(64))
    for name in COLUMNS:
        assert th.equal(getattr(batches[0], name), getattr(batches[1], name).float()), name
    one_step = ReplayBuffer(20, VECTOR, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match="n_steps 1, this learner has 3"):
        ours.copy_online(one_step)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_broken_reward_after_the_end_does_not_reach_an_episode(broken: float, gamma: float) -> None:
    buffer = make_buffer(VECTOR, 20, n_steps=3, gamma=gamma, next_actions=True)
    fill_online([buffer], 12, np.random.default_rng(0), ends=0.0)
    buffer.dones[5] = 1.0
    expected = buffer.sample_batches(1, 500)
    buffer.rewards[6] = broken
    buffer.actions[6] = np.nan
    np.random.seed(0)
    batch = buffer.sample(500)
    slots = (batch.observations[:, None] == th.from_numpy(buffer.observations[None, :12, 0])).all(dim=2).int().argmax(dim=1)
    for slot in range(6):
        values = batch.rewards[slots == slot]
        summed = [gamma**k * float(buffer.rewards[row, 0]) for k, row in enumerate(range(slot, min(slot + 3, 6)))]
        assert len(values) and values.numpy() == pytest.approx(sum(summed), rel=1e-5, abs=1e-6)
    assert expected.rewards.isfinite().all() and not batch.rewards[slots == 6].isfinite().any()
    # The episode that ends in row 5 has no action behind it
    assert batch.next_actions is not None and batch.has_next_actions is not None
    assert not batch.next_actions[(slots < 6) & ~batch.has_next_actions.flatten()].any()
