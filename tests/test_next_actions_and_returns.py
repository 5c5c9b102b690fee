"""Next actions and Monte-Carlo returns of sampled rows: those of plain loops over what was put in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from tests.replay_data import ACTION_SPACE, VECTOR, by_name, fill_online, make_buffer, make_dataset, make_vec_normalize

EVERYTHING = {"next_actions": True, "returns": True}


class Recorder(ReplayBuffer):
    """Remembers all steps ever added, for each environment."""

    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs, VECTOR, ACTION_SPACE, "cpu", n_envs)
        self.steps: list[list[tuple[bytes, np.ndarray, float, bool]]] = [[] for _ in range(n_envs)]

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
        for env, steps in enumerate(self.steps):
            steps.append(
                (obs[env].astype(np.float32).tobytes(), action[env].copy(), float(np.float32(reward[env])), bool(done[env]))
            )


def rows(batch: Any) -> Iterator[tuple[bytes, dict[str, th.Tensor]]]:
    """Each online row by the bytes of its observation."""
    named = by_name(batch)
    for k in range(len(batch.actions)):
        if not batch.is_offline[k]:
            yield batch.observations[k].numpy().tobytes(), {name: column[k] for name, column in named.items()}


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 25),
    n_envs=st.integers(1, 3),
    added=st.integers(1, 60),
    ends=st.sampled_from([0.05, 0.3, 1.0]),
    n_steps=st.integers(1, 4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    late=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_online_rows_are_those_of_plain_loops(
    capacity: int, n_envs: int, added: int, ends: float, n_steps: int, gamma: float, late: bool, seed: int
) -> None:
    np.random.seed(seed)
    recorder = Recorder(n_envs)
    buffer = make_buffer(VECTOR, capacity, n_envs, n_steps=n_steps, gamma=gamma, **({} if late else EVERYTHING))
    fill_online([buffer, recorder], added, np.random.default_rng(seed), ends)
    if late:
        # What is asked for later is found out from the ring
        buffer.require(next_actions=True, returns=True)
    where = {step[0]: (env, t) for env, steps in enumerate(recorder.steps) for t, step in enumerate(steps)}
    for observation, row in rows(buffer.sample(40)):
        env, t = where[observation]
        steps = recorder.steps[env]
        last = t
        while last < t + n_steps - 1 and not steps[last][3] and last + 1 < added:
            last += 1
        has_next = not steps[last][3] and last + 1 < added
        assert bool(row["has_next_actions"]) == has_next
        expected = steps[last + 1][1] if has_next else np.zeros(2)
        np.testing.assert_allclose(row["next_actions"], expected, rtol=1e-6)
        end = next((later for later in range(t, added) if steps[later][3]), None)
        assert bool(row["has_returns"]) == (end is not None)
        total = sum(gamma ** (later - t) * steps[later][2] for later in range(t, end + 1)) if end is not None else 0.0
        assert float(row["returns"]) == pytest.approx(total, rel=1e-5, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    n_steps=st.integers(1, 5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_offline_rows_are_those_of_plain_loops(
    episodes: list[tuple[int, bool]], n_steps: int, gamma: float, seed: int
) -> None:
    lengths, endings = zip(*episodes, strict=True)
    dataset = make_dataset(VECTOR, lengths, endings, np.random.default_rng(seed))
    buffer = make_buffer(VECTOR, n_steps=n_steps, gamma=gamma, seed=seed, **EVERYTHING)
    buffer.set_offline_data(dataset)
    batch = buffer.sample(40)
    assert batch.next_actions is not None and batch.has_next_actions is not None
    assert batch.returns is not None and batch.has_returns is not None and batch.has_returns.all()
    assert batch.next_actions.shape == (40, 2) and batch.returns.shape == batch.has_returns.shape == (40, 1)
    ends = np.repeat(np.cumsum(lengths) - 1, lengths)
    scaled = (dataset.actions - [0, 1]) / 2
    row_of = {observation.tobytes(): row for row, observation in enumerate(dataset.observations)}
    for k in range(40):
        row = row_of[batch.observations[k].numpy().tobytes()]
        following = row + n_steps
        assert bool(batch.has_next_actions[k]) == (following <= ends[row])
        expected = scaled[following] if following <= ends[row] else np.zeros(2)
        np.testing.assert_allclose(batch.next_actions[k], expected, atol=1e-6)
        total = sum(gamma**step * float(reward) for step, reward in enumerate(dataset.rewards[row : ends[row] + 1]))
        assert float(batch.returns[k]) == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_nothing_is_there_unless_asked_for() -> None:
    buffer = make_buffer(VECTOR)
    fill_online([buffer], 5, np.random.default_rng(0))
    batch = buffer.sample(4)
    assert batch[7:] == (None, None, None, None)
    buffer.require(returns=True)
    buffer.require(next_actions=True)
    assert None not in buffer.sample(4)[7:]


def test_returns_are_in_the_units_of_normalized_rewards() -> None:
    buffer = make_buffer(VECTOR, **EVERYTHING)
    buffer.set_offline_data(make_dataset(VECTOR, [9], [True], np.random.default_rng(0)))
    fill_online([buffer], 30, np.random.default_rng(1))
    env = make_vec_normalize(VECTOR)
    env.norm_obs = False
    found, plain = [], []
    for vec_normalize, batches in ((env, found), (None, plain)):
        np.random.seed(0)
        buffer.seed_sampler(0)
        batches.append(buffer.sample(32, vec_normalize).returns)
    assert th.allclose(found[0] * np.sqrt(3.1 + env.epsilon), plain[0], atol=1e-6)


def test_saved_and_emptied_buffers_agree_with_their_rows(tmp_path: Path) -> None:
    buffer = make_buffer(VECTOR, 20, 2, **EVERYTHING)
    fill_online([buffer], 33, np.random.default_rng(0), ends=0.2)
    buffer.save_online(tmp_path / "buffer.npz")
    loaded, smaller = (make_buffer(VECTOR, rows, 2, **EVERYTHING) for rows in (20, 11))
    for other in (loaded, smaller):
        other.load_online(tmp_path / "buffer.npz")
    batches = []
    for other in (buffer, loaded):
        np.random.seed(0)
        batches.append(by_name(other.sample(64)))
    assert all(th.equal(batches[0][name], batches[1][name]) for name in batches[0])
    expected = {observation: row for observation, row in rows(buffer.sample(500))}
    for observation, row in rows(smaller.sample(100)):
        assert row["returns"] == expected[observation]["returns"]
        assert row["has_returns"] == expected[observation]["has_returns"]

    # Rows that follow a loaded buffer belong to another episode
    before, unfinished = loaded.online_size, (loaded.pos - 1) % loaded.buffer_size
    fill_online([loaded], 1, np.random.default_rng(5), ends=1.0)
    assert before == loaded.online_size
    newest = (loaded.pos - 1) % loaded.buffer_size
    drawn = dict(rows(loaded.sample(1000)))
    for env in range(2):
        assert drawn[loaded.observations[newest, env].tobytes()]["has_returns"]
        assert loaded.dones[unfinished, env] or not drawn[loaded.observations[unfinished, env].tobytes()]["has_returns"]
    loaded.reset()
    fill_online([loaded], 2, np.random.default_rng(6), ends=0.0)
    assert not loaded.sample(9).has_returns.any()


def test_returns_of_an_interrupted_episode_stay_unknown() -> None:
    buffer = make_buffer(VECTOR, 10, **EVERYTHING)
    fill_online([buffer], 3, np.random.default_rng(0), ends=0.0)
    buffer.cut_episodes()
    fill_online([buffer], 2, np.random.default_rng(1), ends=0.0)
    fill_online([buffer], 1, np.random.default_rng(2), ends=1.0)
    drawn = dict(rows(buffer.sample(300)))
    are_known = [bool(drawn[observation.tobytes()]["has_returns"]) for observation in buffer.observations[:6, 0]]
    assert are_known == 3 * [False] + 3 * [True]


def test_a_reward_that_is_not_finite_leaves_returns_unknown() -> None:
    buffer = make_buffer(VECTOR, 10, **EVERYTHING)
    zeros = np.zeros((1, 3), np.float32)
    steps = ((1.0, False), (np.nan, False), (2.0, True), (np.inf, False), (-np.inf, True), (3.0, True))
    for number, (reward, done) in enumerate(steps):
        buffer.add(zeros + number, zeros, np.zeros((1, 2)), np.array([reward]), np.array([done]), [{}])
    drawn = {int(row["observations"][0]): row for _, row in rows(buffer.sample(300))}
    assert [bool(drawn[number]["has_returns"]) for number in range(6)] == [False, False, True, False, False, True]
    assert [float(drawn[number]["returns"]) for number in range(6)] == [0, 0, 2, 0, 0, 3]


def test_rows_that_need_others_say_so() -> None:
    assert not make_buffer(VECTOR).needs_following_rows
    for options in ({"n_steps": 2}, {"next_actions": True}, {"returns": True}):
        assert OfflineToOnlineReplayBuffer(5, VECTOR, ACTION_SPACE, "cpu", **options).needs_following_rows
