"""What was put into a replay buffer since a mark is taken out again, and nothing else is touched."""

import warnings

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_offline_ft import load_dataset
from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.collapse.poisoned import (
    ReplayMark,
    check_can_thin_out,
    replace_last_if_not_finite,
    thin_out_since,
)

OBSERVATION = spaces.Box(-1e6, 1e6, (3,), np.float32)
ACTION = spaces.Box(-1, 1, (1,), np.float32)
DICT = spaces.Dict({"a": OBSERVATION, "b": spaces.Box(-1e6, 1e6, (1,), np.float32)})


def make(kind=ReplayBuffer, rows=10, n_envs=1, **settings):
    space = DICT if kind is DictReplayBuffer else OBSERVATION
    return kind(rows * n_envs, space, ACTION, device="cpu", n_envs=n_envs, **settings)


def add(buffer, *numbers):
    """Stores rows in which every value tells the row's number and the environment."""
    for number in numbers:
        values = number * 10.0 + np.arange(buffer.n_envs)
        observations = np.stack([values, values + 0.25, values + 0.5], axis=1).astype(np.float32)
        following = observations + 1e4
        if isinstance(buffer, DictReplayBuffer):
            observations, following = ({"a": array, "b": array[:, :1]} for array in (observations, following))
        ended = np.full(buffer.n_envs, number % 2 == 0)
        infos = [{"TimeLimit.truncated": number % 4 == 0}] * buffer.n_envs
        buffer.add(observations, following, np.full((buffer.n_envs, 1), number / 1e3), values + 2e4, ended, infos)


def stored(buffer):
    """The numbers of the rows that can be drawn, in the order of the ring; checks that each row is whole."""
    size = buffer.size()
    numbers = ((buffer.rewards[:size, 0] - 2e4) / 10).round().astype(int)
    expected = make(type(buffer), max(size, 1), buffer.n_envs)
    add(expected, *numbers)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        found, wanted = getattr(buffer, name), getattr(expected, name)
        if not isinstance(found, dict):
            found, wanted = {"": found}, {"": wanted}
        for key in found:
            there = found[key][:size]
            if name == "timeouts":
                # Where the next row does not follow, there is a mark beside those of the rows themselves
                there = there * buffer.dones[:size]
            np.testing.assert_array_equal(there, wanted[key][:size], err_msg=name)
    return numbers.tolist()


def check_followers(buffer, next_number):
    """Rows that are said to go on do so in the row behind them, of which the newest is still to come."""
    add(buffer, next_number)
    numbers = stored(buffer)
    for slot, number in enumerate(numbers):
        goes_on = (buffer.dones[slot] == 0) & (buffer.timeouts[slot] == 0)
        assert (goes_on == goes_on[0]).all()
        if goes_on[0] and (slot + 1) % buffer.buffer_size != buffer.pos:
            assert numbers[(slot + 1) % buffer.buffer_size] == number + 1


def everything(buffer):
    arrays = (value for value in vars(buffer).values() if isinstance(value, np.ndarray | dict))
    parts = (part for array in arrays for part in (array.values() if isinstance(array, dict) else [array]))
    return buffer.pos, buffer.full, [np.asarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("kind", [ReplayBuffer, DictReplayBuffer, OfflineToOnlineReplayBuffer])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_rows_since_the_mark_are_dropped(kind, n_envs):
    buffer = make(kind, n_envs=n_envs)
    add(buffer, 1, 2, 3)
    mark = ReplayMark.here(buffer)
    add(buffer, 4, 5, 6, 7)
    assert thin_out_since(buffer, mark, 4, 0.0, np.random.default_rng(0)) == 4 * n_envs
    assert (stored(buffer), buffer.pos, buffer.full) == ([1, 2, 3], 3, False)
    add(buffer, 8)
    assert stored(buffer) == [1, 2, 3, 8]


@pytest.mark.parametrize("kind", [ReplayBuffer, DictReplayBuffer, OfflineToOnlineReplayBuffer])
def test_in_a_full_ring_removed_rows_become_copies_of_others(kind):
    buffer = make(kind)
    add(buffer, *range(8))
    mark = ReplayMark.here(buffer)
    add(buffer, *range(8, 13))
    assert thin_out_since(buffer, mark, 5, 0.0, np.random.default_rng(0)) == 5
    left = stored(buffer)
    assert (buffer.pos, buffer.full) == (3, True)
    assert left[3:8] == [3, 4, 5, 6, 7] and set(left) <= set(range(3, 8))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_against_a_list(data):
    capacity, before = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 30))
    ahead = data.draw(st.integers(0, 2))
    after = data.draw(st.integers(-ahead, 30))
    weight = data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    kind = data.draw(st.sampled_from([ReplayBuffer, DictReplayBuffer, OfflineToOnlineReplayBuffer]))
    buffer = make(kind, capacity, n_envs=data.draw(st.integers(1, 2)))
    model = [None] * capacity
    for number in range(before + ahead + after):
        model[number % capacity] = number
    add(buffer, *range(before))
    mark = ReplayMark.here(buffer, ahead)
    add(buffer, *range(before, before + ahead + after))
    unchanged, pos = everything(buffer), buffer.pos
    seed = data.draw(st.integers(0, 99))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        removed = thin_out_since(buffer, mark, after, weight, np.random.default_rng(seed))

    assert removed % buffer.n_envs == 0
    removed //= buffer.n_envs
    since = {number for number in model if number is not None and number >= before + ahead}
    keep = {before + ahead + i for i, kept in enumerate(np.random.default_rng(seed).random(max(after, 0)) < weight) if kept}
    numbers = stored(buffer)
    if weight == 1 or not since:
        assert everything(buffer) == unchanged and removed == 0 and not caught
    elif after >= capacity:
        assert everything(buffer) == unchanged and removed == 0
        assert [str(warning.message)[:3] for warning in caught] == ["All"]
    elif buffer.full:
        assert buffer.pos == pos and removed == len(since - keep) and not caught
        outside = set(model) - since
        for number, now in zip(model, numbers, strict=True):
            assert now == number or (number in since - keep and now in outside | keep)
        assert keep <= set(numbers) and outside <= set(numbers)
    elif before + ahead == 0 and not keep:
        assert everything(buffer) == unchanged and removed == 0
        assert ["nothing but" in str(warning.message) for warning in caught] == [True]
    else:
        assert numbers == [number for number in model if number is not None and (number not in since or number in keep)]
        assert buffer.pos == len(numbers) and removed == len(since - keep) and not caught
    check_followers(buffer, before + ahead + after)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("weight", [0.2, 0.6])
def test_uniform_sampling_gives_the_rows_their_weight(full, weight):
    buffer = make(rows=4000 if full else 5000)
    add(buffer, *range(1000 if full else 2000))
    if full:
        add(buffer, *range(1000, 4000))
    mark = ReplayMark.here(buffer)
    add(buffer, *range(10_000, 12_000))
    thin_out_since(buffer, mark, 2000, weight, np.random.default_rng(0))
    numbers = np.round((buffer.rewards[: buffer.size(), 0] - 2e4) / 10)
    share = (numbers >= 10_000).mean()
    # 2000 rows of weight 1 and 2000 of the given weight
    assert share == pytest.approx(weight / (1 + weight), abs=0.03)


def test_the_online_part_may_become_empty_beside_offline_data():
    dataset = load_dataset("bundled:pendulum-medium")
    # As many rows as the dataset has: its arrays must not be taken for the ring's
    buffer = OfflineToOnlineReplayBuffer(len(dataset), dataset.observation_space, dataset.action_space, device="cpu", seed=0)
    buffer.set_offline_data(dataset)
    mark = ReplayMark.here(buffer)
    for number in range(5):
        row = np.full((1, 3), number / 10, np.float32)
        buffer.add(row, row, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    position = buffer.sampler_position()
    offline = buffer.sample(len(dataset), offline_fraction=1.0).actions
    assert thin_out_since(buffer, mark, 5, 0.0, np.random.default_rng(0)) == 5
    assert (buffer.online_size, buffer.pos) == (0, 0)
    buffer.rewind(position)
    np.testing.assert_array_equal(buffer.sample(len(dataset)).actions, offline)
    assert buffer.sample(8).is_offline.all()


def her_buffer():
    from stable_baselines3 import HerReplayBuffer
    from stable_baselines3.common.envs import BitFlippingEnv
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True)])
    return HerReplayBuffer(10, env.observation_space, env.action_space, env, device="cpu")


class Prioritized(ReplayBuffer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.priorities = np.zeros((self.buffer_size, self.n_envs))

    def add(self, *args):
        self.priorities[self.pos] = 1
        super().add(*args)


class Counting(ReplayBuffer):
    def add(self, *args):
        super().add(*args)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(NStepReplayBuffer), "n-step returns, .* need the rows that follow"),
        (her_buffer, "relabels goals"),
        (lambda: make(optimize_memory_usage=True, handle_timeout_termination=False), "next observation is in the next row"),
        (lambda: make(Prioritized), "keeps more than SB3's arrays .priorities."),
    ],
)
def test_buffers_whose_rows_belong_together_are_refused(build, message):
    buffer = build()
    with pytest.raises(ValueError, match=f"{message}.*use weight 1"):
        check_can_thin_out(buffer)
    with pytest.raises(ValueError, match=message):
        thin_out_since(buffer, ReplayMark.here(buffer), 0, 0.5, np.random.default_rng(0))
    assert thin_out_since(buffer, ReplayMark.here(buffer), 0, 1.0, np.random.default_rng(0)) == 0


@pytest.mark.parametrize("kind", [ReplayBuffer, DictReplayBuffer, OfflineToOnlineReplayBuffer, Counting])
def test_buffers_with_sb3s_arrays_are_accepted(kind):
    check_can_thin_out(make(kind))


def test_a_wrong_count_or_weight_changes_nothing():
    buffer = make()
    add(buffer, 1, 2, 3)
    mark = ReplayMark.here(buffer)
    add(buffer, 4, 5)
    before = everything(buffer)
    for added in (1, 3, 12):
        with pytest.raises(ValueError, match="count the steps stored behind the mark"):
            thin_out_since(buffer, mark, added, 0.5, np.random.default_rng(0))
    buffer.reset()
    with pytest.raises(ValueError, match="emptied"):
        thin_out_since(buffer, mark, 2, 0.5, np.random.default_rng(0))
    buffer.pos = 5
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`weight` must be in"):
            thin_out_since(buffer, mark, 2, weight, np.random.default_rng(0))
    with pytest.raises(ValueError, match="`ahead` must be at least 0"):
        ReplayMark.here(buffer, -1)
    assert everything(buffer) == before


def test_global_generators_are_left_alone():
    buffer = make()
    add(buffer, *range(12))
    mark = ReplayMark.here(buffer)
    add(buffer, 12, 13, 14)
    state = np.random.get_state()[1].tobytes()
    thin_out_since(buffer, mark, 3, 0.5, np.random.default_rng(0))
    assert np.random.get_state()[1].tobytes() == state


@pytest.mark.parametrize("full", [False, True])
def test_what_follows_a_row_is_known_to_a_learner_that_asks_for_it(full, tmp_path):
    """Saved after some rows were taken out, loaded where batches have next actions and returns."""
    buffer = make(OfflineToOnlineReplayBuffer, 60, n_envs=2)
    add(buffer, *range(1, 2 * (100 if full else 20), 2))
    mark = ReplayMark.here(buffer)
    # Odd numbers: no row ends an episode
    add(buffer, *range(1001, 1061, 2))
    before = buffer.sample(100)
    assert not before.dones.any()
    assert thin_out_since(buffer, mark, 30, 0.5, np.random.default_rng(0)) > 0
    assert not buffer.sample(500).dones.any()
    buffer.save_online(tmp_path / "buffer.npz")
    other = make(OfflineToOnlineReplayBuffer, 60, n_envs=2, next_actions=True, returns=True, n_steps=1)
    other.load_online(tmp_path / "buffer.npz")
    batch = other.sample(2000)
    known = batch.has_next_actions.flatten().bool()
    assert known.any() and not known.all() and not batch.has_returns.any()
    # An action is a thousandth of the row's number
    steps = (batch.next_actions - batch.actions).flatten()[known] * 1e3
    np.testing.assert_allclose(steps, 2.0, atol=1e-3)


def test_a_row_that_replaces_a_broken_one_stands_alone():
    buffer = make(n_envs=2)
    add(buffer, 1, 3, 5)
    buffer.rewards[2, 1] = np.nan
    assert replace_last_if_not_finite(buffer)
    assert stored(buffer) == [1, 3, 3]
    assert buffer.timeouts[:3].tolist() == [[0, 0], [1, 1], [1, 1]] and not buffer.dones.any()
    add(buffer, 7)
    assert not replace_last_if_not_finite(buffer)
    assert stored(buffer) == [1, 3, 3, 7] and not buffer.timeouts[3].any()
