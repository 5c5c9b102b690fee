"""Balanced replay, and weights of sources: which offline rows are drawn, and how often."""

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sb3_offline_ft import OfflineDataset
from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.buffers.sampling import SourceShares, SumTree
from sb3_offline_ft.datasets import DatasetPart
from tests.replay_data import (
    ACTION_SPACE,
    DICT,
    IMAGE,
    VECTOR,
    VECTORS,
    assert_same,
    by_name,
    fill_online,
    make_buffer,
    make_dataset,
)

LEVEL = 1e-6
"""Error rate of each statistical test: its generator is seeded, so that this is the chance that the seed was unlucky."""
SMALL = {"net_arch": [16], "batch_size": 32, "learning_rate": 1e-2}


def two_clusters(n: int) -> OfflineDataset:
    """The first half of the rows is around -2, the other half around 2."""
    generator = np.random.default_rng(0)
    observations = generator.normal(np.repeat([-2.0, 2.0], n // 2)[:, None], 0.5, (n, 3)).astype(np.float32)
    return OfflineDataset.from_columns(
        observations=observations,
        actions=generator.uniform(-1, 1, (n, 2)).astype(np.float32),
        rewards=np.arange(n, dtype=np.float32),
        next_observations=observations,
        terminations=np.zeros(n, dtype=bool),
        episode_starts=[0],
        observation_space=VECTOR,
        action_space=ACTION_SPACE,
    )


def add_around_two(buffer: OfflineToOnlineReplayBuffer, steps: int) -> None:
    generator = np.random.default_rng(1)
    for _ in range(steps):
        observations = generator.normal(2.0, 0.5, (buffer.n_envs, 3))
        actions = (generator.uniform(-1, 1, (buffer.n_envs, 2)) - [0, 1]) / 2  # scaled, unlike the dataset's
        zeros = np.zeros(buffer.n_envs)
        buffer.add(observations, observations, actions, zeros, zeros, [{}] * buffer.n_envs)


def priorities_of(buffer: OfflineToOnlineReplayBuffer) -> np.ndarray:
    file = io.BytesIO()
    buffer.save_online(file)
    with np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as arrays:
        return arrays["balanced/priorities"]


@settings(max_examples=100, deadline=None)
@given(
    n_rows=st.integers(1, 70),
    changes=st.lists(st.lists(st.tuples(st.integers(0, 69), st.floats(0, 1e3)), max_size=20), max_size=4),
)
def test_sum_tree_keeps_what_is_set(n_rows: int, changes: list[list[tuple[int, float]]]) -> None:
    expected = np.linspace(1.0, 2.0, n_rows)
    tree = SumTree(expected)
    for change in changes:
        latest = {row % n_rows: priority for row, priority in change}
        rows = np.array([row % n_rows for row, _ in change], np.int64)
        priorities = np.array([latest[int(row)] for row in rows])
        tree.set(rows, priorities)
        expected[rows] = priorities
    assert np.array_equal(tree.priorities, expected)
    if expected.sum() > 0:
        drawn = tree.draw(np.random.default_rng(0), 300)
        assert ((drawn >= 0) & (drawn < n_rows)).all() and (expected[drawn] > 0).all()


@pytest.mark.parametrize("n_rows", [1, 2, 37, 64])
def test_sum_tree_draws_in_proportion_to_priorities(n_rows: int) -> None:
    generator = np.random.default_rng(n_rows)
    tree = SumTree(np.ones(n_rows))
    priorities = generator.uniform(0.1, 5.0, n_rows)
    tree.set(np.arange(n_rows), priorities)
    counts = np.bincount(tree.draw(generator, 100_000), minlength=n_rows)
    assert n_rows == 1 or stats.chisquare(counts, priorities / priorities.sum() * 100_000).pvalue > LEVEL


@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), (1e-3, 0.0, 0.999), None])
def test_sources_are_drawn_by_their_shares_and_their_rows_alike(weights: tuple[float, ...] | None) -> None:
    bounds = [0, 10, 40, 45]
    parts = [
        DatasetPart(f"part{i}", None, bounds[i], bounds[i + 1], None if weights is None else weights[i]) for i in range(3)
    ]
    shares = SourceShares(parts)
    rows = shares.draw(np.random.default_rng(0), 100_000)
    lengths = np.diff(bounds)
    probabilities = np.repeat(lengths / 45 if weights is None else np.array(weights), lengths) / np.repeat(lengths, lengths)
    assert shares.relative_probabilities(np.arange(45)) == pytest.approx(probabilities * 45)
    counts, possible = np.bincount(rows, minlength=45), probabilities > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], probabilities[possible] * 100_000).pvalue > LEVEL
    assert np.array_equal(shares.count(rows), np.add.reduceat(counts, bounds[:-1]))
    if weights is None:
        assert np.array_equal(rows, np.random.default_rng(0).integers(0, 45, size=100_000))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-9, 1.0), min_size=5, max_size=5),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_shares_draw_the_same_rows_however_draws_are_grouped(
    lengths: list[int], weights: list[float], sizes: list[int]
) -> None:
    ends = np.cumsum(lengths)
    shares = SourceShares(
        [
            DatasetPart(str(i), None, int(end) - length, int(end), weight)
            for i, (end, length, weight) in enumerate(zip(ends, lengths, weights, strict=False))
        ]
    )
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    rows = shares.draw(one, sum(sizes))
    assert np.array_equal(rows, np.concatenate([shares.draw(other, size) for size in sizes]))
    assert (rows >= 0).all() and (rows < ends[-1]).all()


def test_buffer_counts_rows_by_source() -> None:
    generator = np.random.default_rng(0)
    parts = [make_dataset(VECTOR, [length], [True], generator) for length in (10, 30)]
    named = [part.with_facts(name=name) for part, name in zip(parts, ("small", "large"), strict=True)]
    buffer = make_buffer(VECTOR, seed=0)
    assert buffer.sampled_rows_by_source() == {}
    buffer.set_offline_data(OfflineDataset.concatenate(named, weights=[3, 1]))
    fill_online([buffer], 5, generator)
    batch = buffer.sample_batches(40, 100)
    rewards = batch.rewards[batch.is_offline].numpy()
    from_small = int(np.isin(rewards, parts[0].rewards).sum())
    assert buffer.sampled_rows_by_source() == {"small": from_small, "large": 2000 - from_small}
    # Binomial(2000, 0.75): mean 1500, standard deviation 19.4
    assert stats.binomtest(from_small, 2000, 0.75).pvalue > LEVEL
    buffer.sample(10, offline_fraction=1.0)
    assert sum(buffer.sampled_rows_by_source().values()) == 2010


@pytest.mark.parametrize("n_envs", [1, 2])
def test_rows_near_the_online_ones_are_drawn_more_often(n_envs: int) -> None:
    buffer = make_buffer(VECTOR, 4000, n_envs, seed=0, offline_sampling="balanced")
    buffer.set_offline_data(two_clusters(4000))
    assert buffer.update_density_ratio() is None
    add_around_two(buffer, 4000)

    def near(n_batches: int) -> int:
        batch = buffer.sample_batches(n_batches, 100)
        assert batch.is_offline.view(n_batches, 100).sum(dim=1).tolist() == n_batches * [50]
        return int((batch.observations[batch.is_offline.flatten()].mean(dim=1) > 0).sum())

    # As long as there are no estimates, both halves are alike
    assert stats.binomtest(near(20), 1000, 0.5).pvalue > LEVEL
    bounds = []
    for _ in range(150):
        buffer.sample_batches(4, 100)
        bounds.append(buffer.update_density_ratio())
    # At the start the network cannot tell online from offline rows; the divergence of P from (P + Q) / 2 (times 2) is 0.43
    assert abs(float(bounds[0])) < 0.05 and 0.3 < np.mean([float(bound) for bound in bounds[-50:]]) < 0.55
    n_near = near(20)
    assert stats.binomtest(n_near, 1000, 0.5, alternative="greater").pvalue < LEVEL
    # A temperature of 5 is meant to keep the others in play
    assert n_near < 990


def test_a_higher_temperature_is_nearer_to_uniform() -> None:
    priorities = []
    for temperature in (1.0, 5.0, 100.0):
        kwargs = {"temperature": temperature, **SMALL}
        buffer = make_buffer(VECTOR, 200, seed=0, offline_sampling="balanced", balanced_kwargs=kwargs)
        buffer.set_offline_data(two_clusters(100))
        add_around_two(buffer, 100)
        for _ in range(100):
            buffer.sample(200)
            buffer.update_density_ratio()
        priorities.append(priorities_of(buffer))
        # All have been drawn, and priorities are relative to their mean
        assert priorities[-1].mean() == pytest.approx(1.0, rel=0.3)
    ratios = [values[50:].mean() / values[:50].mean() for values in priorities]
    assert ratios[0] > ratios[1] > ratios[2] > 1
    assert all(1e-3 <= values.min() and values.max() <= 1e3 for values in priorities)


def test_priorities_start_from_the_shares_of_sources() -> None:
    parts = [two_clusters(20).with_facts(name="a"), two_clusters(80).with_facts(name="b")]
    buffer = make_buffer(VECTOR, seed=0, offline_sampling="balanced", balanced_kwargs=SMALL)
    buffer.set_offline_data(OfflineDataset.concatenate(parts, weights=[0.5, 0.5]))
    add_around_two(buffer, 10)
    buffer.sample_batches(200, 20)
    # Binomial(2000, 0.5)
    assert stats.binomtest(buffer.sampled_rows_by_source()["a"], 2000, 0.5).pvalue > LEVEL
    before = priorities_of(buffer)
    buffer.update_density_ratio()
    after = priorities_of(buffer)
    # Both sources hold the same kind of rows; all have been drawn, and the ratio of densities is about the same for all
    assert (after != before).all()
    assert after[:20].mean() / after[20:].mean() == pytest.approx(4.0, rel=0.2)


def test_priorities_of_drawn_rows_are_estimated_once() -> None:
    buffer = make_buffer(VECTOR, seed=0, offline_sampling="balanced", balanced_kwargs=SMALL)
    buffer.set_offline_data(two_clusters(50))
    add_around_two(buffer, 10)
    for _ in range(2):
        before = priorities_of(buffer)
        drawn = buffer.sample(20).rewards[:10].long().flatten().numpy()
        assert np.array_equal(priorities_of(buffer), before)
        buffer.update_density_ratio()
        changed = np.flatnonzero(priorities_of(buffer) != before)
        assert np.array_equal(changed, np.unique(drawn))
    before = priorities_of(buffer)
    buffer.update_density_ratio()
    assert np.array_equal(priorities_of(buffer), before)


def test_offline_phase_and_uniform_sampling_draw_todays_rows() -> None:
    dataset = two_clusters(50)
    batches = []
    for options in ({}, {"offline_sampling": "balanced"}):
        buffer = make_buffer(VECTOR, seed=4, **options)
        buffer.set_offline_data(dataset)
        assert buffer.update_density_ratio() is None
        batches.append(buffer.sample(64).rewards.flatten().tolist())
    assert batches[0] == batches[1]


def test_the_global_generators_are_left_alone() -> None:
    buffer = make_buffer(VECTOR, seed=4, offline_sampling="balanced", balanced_kwargs=SMALL)
    buffer.set_offline_data(two_clusters(50))
    add_around_two(buffer, 5)
    np.random.seed(0)
    th.manual_seed(0)
    for _ in range(3):
        buffer.update_density_ratio()
    found = np.random.rand(), th.rand(1)
    np.random.seed(0)
    th.manual_seed(0)
    assert found == (np.random.rand(), th.rand(1))


def run(buffer: OfflineToOnlineReplayBuffer, steps: int) -> list[Any]:
    np.random.seed(0)
    results: list[Any] = []
    for _ in range(steps):
        results += [by_name(buffer.sample(16)), buffer.update_density_ratio()]
    return results


@pytest.mark.parametrize("space", ["vector", "dict"])
@pytest.mark.parametrize("data_first", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, space: str, data_first: bool) -> None:
    chosen: spaces.Space[Any] = VECTORS if space == "dict" else VECTOR
    dataset = make_dataset(chosen, [30, 20], [True, False], np.random.default_rng(0))
    options: dict[str, Any] = {"offline_sampling": "balanced", "balanced_kwargs": SMALL}
    original = make_buffer(chosen, seed=1, **options)
    original.set_offline_data(dataset)
    fill_online([original], 20, np.random.default_rng(1))
    run(original, 5)
    original.sample(16)
    path = tmp_path / "buffer.npz"
    original.save_online(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)

    resumed = make_buffer(chosen, seed=2, **options)
    if data_first:
        resumed.set_offline_data(dataset)
    resumed.load_online(path)
    if not data_first:
        # What has been loaded is not lost if it is saved again before there is data
        resumed.save_online(path)
        resumed = make_buffer(chosen, **options)
        resumed.load_online(path)
        resumed.set_offline_data(dataset)
    for found, expected in zip(run(resumed, 4), run(original, 4), strict=True):
        if isinstance(found, dict):
            assert_same(found, expected)
        else:
            assert th.equal(found, expected)
    assert np.array_equal(priorities_of(resumed), priorities_of(original))


def test_same_seed_same_course_and_copies_are_independent() -> None:
    courses = []
    for _ in range(2):
        buffer = make_buffer(VECTOR, seed=7, offline_sampling="balanced", balanced_kwargs=SMALL)
        buffer.set_offline_data(two_clusters(60))
        add_around_two(buffer, 20)
        copied = deepcopy(buffer)
        courses += [run(buffer, 3), run(copied, 3)]
    for course in courses[1:]:
        for found, expected in zip(course, courses[0], strict=True):
            assert th.equal(*(one["rewards"] if isinstance(one, dict) else one for one in (found, expected)))


def test_state_for_other_data_or_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "buffer.npz"
    options: dict[str, Any] = {"offline_sampling": "balanced", "balanced_kwargs": SMALL}
    saved = make_buffer(VECTOR, **options)
    saved.set_offline_data(two_clusters(50))
    add_around_two(saved, 5)
    run(saved, 1)
    saved.save_online(path)
    smaller = make_buffer(VECTOR, **options)
    smaller.set_offline_data(two_clusters(40))
    with pytest.raises(ValueError, match="saved for 50 offline rows, the dataset has 40"):
        smaller.load_online(path)
    assert smaller.size() == 0
    late = make_buffer(VECTOR, **options)
    late.load_online(path)
    with pytest.raises(ValueError, match=r"in .*buffer\.npz were saved for 50 offline rows, the dataset has 40"):
        late.set_offline_data(two_clusters(40))
    assert late.offline_data is None
    # The priorities are gone then, the learner is not
    late.set_offline_data(two_clusters(40))
    run(late, 1)
    assert len(priorities_of(late)) == 40 and late.size() == 5
    late = make_buffer(VECTOR, **options)
    late.load_online(path)
    fresh = make_buffer(VECTOR, **options)
    fill_online([fresh], 3, np.random.default_rng(0))
    fresh.save_online(tmp_path / "fresh.npz")
    late.load_online(tmp_path / "fresh.npz")
    late.set_offline_data(two_clusters(40))
    deeper = make_buffer(VECTOR, offline_sampling="balanced", balanced_kwargs={"net_arch": [16, 16]})
    with pytest.raises(ValueError, match=r"saved with layers \[16\], this learner has \[16, 16\]"):
        deeper.load_online(path)
    # A buffer that draws uniformly needs none of it, and a file without it is no obstacle
    uniform = make_buffer(VECTOR)
    uniform.load_online(path)
    uniform.save_online(path)
    late = make_buffer(VECTOR, **options)
    late.load_online(path)
    assert late.size() == 5


def test_images_are_refused() -> None:
    for space in (IMAGE, DICT):
        with pytest.raises(ValueError, match=r"densities of vectors, found images: .*offline_sampling='uniform'"):
            make_buffer(space, offline_sampling="balanced")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offline_sampling": "balance"}, ValueError, "must be one of 'uniform', 'balanced', found 'balance'"),
        ({"balanced_kwargs": {"temperature": 2.0}}, ValueError, "have no effect without"),
        (
            {"offline_sampling": "balanced", "balanced_kwargs": {"temprature": 2.0}},
            TypeError,
            "unknown keyword 'temprature': did you mean 'temperature'",
        ),
        ({"offline_sampling": "balanced", "balanced_kwargs": {"temperature": 0.0}}, ValueError, "`temperature` .* positive"),
        ({"offline_sampling": "balanced", "balanced_kwargs": {"batch_size": 0}}, ValueError, "`batch_size` must be"),
        ({"offline_sampling": "balanced", "balanced_kwargs": {"temperature": "hot"}}, ValueError, "must be positive.*'hot'"),
        ({"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": 64}}, ValueError, r"such as \[256, 256\], found 64"),
        ({"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": [0]}}, ValueError, r"`net_arch` must be a whole"),
        ({"offline_sampling": "balanced", "balanced_kwargs": 5}, TypeError, "`balanced_kwargs` must be a dictionary.*found 5"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_buffer(VECTOR, **options)
