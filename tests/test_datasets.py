"""Loading datasets: every row comes back as it was recorded, whatever it was stored in."""

import copy
import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.parse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from stable_baselines3 import TD3

from sb3_offline_ft.datasets import (
    BUNDLED,
    OfflineDataset,
    ReferenceScores,
    check_compatible,
    check_spec,
    load_dataset,
    reference_scores_for,
    scale_actions,
)

BUNDLED_PENDULUM = Path(__file__).parent.parent / "sb3_offline_ft" / "datasets" / "bundled" / "pendulum-medium"
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations", "episode_starts")
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))

pytestmark = pytest.mark.usefixtures("minari_root")


@dataclass
class Episode:
    """One recorded episode, with one observation more than steps."""

    observations: npt.NDArray[np.float64]
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float64]
    end: str

    @classmethod
    def make(cls, rng: np.random.Generator, length: int, end: str) -> "Episode":
        return cls(
            rng.normal(size=(length + 1, 3)),
            rng.uniform(ACTIONS.low, ACTIONS.high, (length, 2)).astype(np.float32),
            rng.normal(size=length),
            end,
        )

    def flags(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        terminations, truncations = np.zeros((2, len(self.rewards)), dtype=np.bool_)
        terminations[-1] = self.end in ("terminated", "both")
        truncations[-1] = self.end in ("truncated", "both")
        return terminations, truncations


def write_minari(dataset_id: str, episodes: list[Episode], data_format: str = "hdf5", **facts: Any) -> None:
    """Write episodes with Minari itself."""
    buffers = []
    for episode in episodes:
        terminations, truncations = episode.flags()
        buffers.append(
            EpisodeBuffer(
                observations=episode.observations,
                actions=episode.actions,
                rewards=episode.rewards,
                terminations=terminations,
                truncations=truncations,
            )
        )
    facts = {"observation_space": OBSERVATIONS, "action_space": ACTIONS} | facts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author, a permalink, ...
        minari.create_dataset_from_buffers(dataset_id, buffers, data_format=data_format, **facts)


def write_npz(path: Path, episodes: list[Episode], **more: Any) -> None:
    """Write episodes as flat arrays."""
    flags = [episode.flags() for episode in episodes]
    np.savez(
        path,
        observations=np.concatenate([episode.observations[:-1] for episode in episodes]),
        next_observations=np.concatenate([episode.observations[1:] for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminations=np.concatenate([terminations for terminations, _ in flags]),
        truncations=np.concatenate([truncations for _, truncations in flags]),
        **more,
    )


def assert_holds(dataset: OfflineDataset, episodes: list[Episode]) -> None:
    """Compare a dataset with episodes row by row, in the plainest way."""
    row = 0
    assert dataset.n_episodes == len(episodes)
    for index, episode in enumerate(episodes):
        assert dataset.episode_starts[index] == row
        assert dataset.episode_lengths[index] == len(episode.rewards)
        assert dataset.episode_returns[index] == pytest.approx(episode.rewards.sum(), rel=1e-5, abs=1e-5)
        for step in range(len(episode.rewards)):
            np.testing.assert_array_equal(dataset.observations[row], episode.observations[step].astype(np.float32))
            np.testing.assert_array_equal(dataset.next_observations[row], episode.observations[step + 1].astype(np.float32))
            np.testing.assert_array_equal(dataset.actions[row], episode.actions[step])
            assert dataset.rewards[row] == np.float32(episode.rewards[step])
            is_last = step == len(episode.rewards) - 1
            is_terminal = is_last and episode.end in ("terminated", "both")
            assert dataset.terminations[row] == is_terminal
            assert dataset.truncations[row] == (is_last and not is_terminal)
            row += 1
    assert row == len(dataset)


@pytest.fixture(scope="module")
def hopper() -> OfflineDataset:
    return load_dataset("bundled:hopper-medium")


episode_lists = st.builds(
    lambda seed, shapes: [
        Episode.make(np.random.default_rng((seed, i)), length, end) for i, (length, end) in enumerate(shapes)
    ],
    st.integers(0, 2**32 - 1),
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["terminated", "truncated", "both", "cut"])),
        min_size=1,
        max_size=6,
    ),
)
unique = count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episode_lists, st.sampled_from(["hdf5", "arrow", "parquet"]))
def test_minari_data_comes_back_row_by_row(episodes: list[Episode], data_format: str) -> None:
    dataset_id = f"random/episodes{next(unique)}-v0"
    write_minari(dataset_id, episodes, data_format)
    dataset = load_dataset(dataset_id)
    assert_holds(dataset, episodes)
    assert dataset.observation_space == OBSERVATIONS
    assert dataset.action_space == ACTIONS
    assert dataset.spec == dataset.name == dataset_id


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episode_lists)
def test_npz_data_comes_back_row_by_row(tmp_path: Path, episodes: list[Episode]) -> None:
    path = tmp_path / "episodes.npz"
    write_npz(path, episodes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_dataset(path)
    assert_holds(dataset, episodes)
    # The end of the file is an end anyway; every other cut without a flag must be seen and said.
    n_unflagged = sum(episode.end == "cut" for episode in episodes[:-1])
    assert dataset.provenance.get("unflagged_episode_ends", 0) == n_unflagged
    assert [str(n_unflagged) in str(warning.message) for warning in caught] == [True] * bool(n_unflagged)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episode_lists)
def test_npz_without_next_observations_drops_only_what_is_unknown(tmp_path: Path, episodes: list[Episode]) -> None:
    for episode in episodes:
        episode.end = "truncated" if episode.end == "cut" else episode.end
    path = tmp_path / "episodes.npz"
    write_npz(path, episodes)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "next_observations"}
    arrays["terminals"], arrays["timeouts"] = arrays.pop("terminations"), arrays.pop("truncations")
    np.savez(path, **arrays)

    expected: list[Episode] = []
    for episode in episodes:
        if episode.end == "truncated":
            kept = Episode(episode.observations[:-1], episode.actions[:-1], episode.rewards[:-1], "cut")
        else:
            # A terminated row's own observation stands in for its next one, which is never used.
            observations = np.concatenate([episode.observations[:-1], episode.observations[-2:-1]])
            kept = Episode(observations, episode.actions, episode.rewards, episode.end)
        expected += [kept] if len(kept.rewards) else []
    n_dropped = sum(episode.end == "truncated" for episode in episodes)
    if not expected:
        with pytest.raises(ValueError, match=r"has no transition: in '.*episodes\.npz' each episode has one row and goes on"):
            load_dataset(path)
        return
    with pytest.warns(UserWarning, match=f"{n_dropped} last rows"):
        dataset = load_dataset(path)
    assert_holds(dataset, expected)
    assert dataset.provenance["rows_dropped"] == n_dropped


def test_shuffled_transitions_never_join(tmp_path: Path) -> None:
    episode = Episode.make(np.random.default_rng(0), 50, "terminated")
    order = np.random.default_rng(1).permutation(50)
    columns: dict[str, Any] = {
        "observations": episode.observations[:-1][order],
        "next_observations": episode.observations[1:][order],
        "actions": episode.actions[order],
        "rewards": episode.rewards[order],
        "terminations": episode.flags()[0][order],
    }
    with pytest.warns(UserWarning, match="carry no flag"):
        dataset = OfflineDataset.from_columns(**columns)
    inner = ~(dataset.terminations | dataset.truncations)
    after = np.flatnonzero(inner) + 1
    np.testing.assert_array_equal(dataset.next_observations[inner], dataset.observations[after])
    assert int(dataset.terminations.sum()) == 1


def test_a_flag_inside_a_recorded_episode_ends_an_episode(tmp_path: Path) -> None:
    rewards = np.arange(6.0)
    observations = np.arange(7.0)[:, None]
    dataset = OfflineDataset.from_columns(
        observations[:-1],
        np.zeros((6, 1)),
        rewards,
        observations[1:],
        np.array([0, 1, 0, 0, 0, 0]),
        np.array([0, 0, 0, 1, 0, 0]),
        episode_starts=[0, 5],
    )
    assert dataset.episode_starts.tolist() == [0, 2, 4, 5]
    assert dataset.terminations.tolist() == [False, True, False, False, False, False]
    assert dataset.truncations.tolist() == [False, False, False, True, True, True]
    assert dataset.episode_returns.tolist() == [1.0, 5.0, 4.0, 5.0]


def test_data_recorded_in_a_real_environment() -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=30)
    env.action_space.seed(0)
    episodes = []
    for seed, n_steps in enumerate((30, 30, 11)):
        observations = [env.reset(seed=seed)[0]]
        actions, rewards = [], []
        for _ in range(n_steps):
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
        assert not terminated
        episodes.append(
            Episode(np.stack(observations), np.stack(actions), np.array(rewards), "truncated" if truncated else "cut")
        )
    assert [episode.end for episode in episodes] == ["truncated", "truncated", "cut"]
    write_minari("test/pendulum-v0", episodes, env=env, algorithm_name="random", observation_space=None, action_space=None)
    dataset = load_dataset("test/pendulum-v0")
    assert_holds(dataset, episodes)
    assert dataset.env_id == "Pendulum-v1"
    assert dataset.provenance["algorithm"] == "random"
    assert dataset.reference_scores == reference_scores_for("Pendulum-v1")
    check_compatible(dataset, env.observation_space, env.action_space)
    env.close()


def test_observations_with_several_dimensions() -> None:
    space = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
    frames = np.random.default_rng(0).uniform(-1, 1, (6, 2, 2)).astype(np.float32)
    episode = Episode(frames, np.zeros((5, 2), np.float32), np.ones(5), "terminated")  # type: ignore[arg-type]
    for data_format in ("hdf5", "arrow"):
        write_minari(f"grid/{data_format}-v0", [episode], data_format, observation_space=space)
        assert_holds(load_dataset(f"grid/{data_format}-v0"), [episode])


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("hopper-medium", "112bc3ca61deb2eade18976476dd2f20b0cbc1f9fbcf12dc5d4a39be82f1f92c"),
        ("pendulum-medium", "b478f5e36a554e6ab778dcf8d7243dd512a9129c992ae91dac5cae964e20fc80"),
    ],
)
def test_fingerprints_stay_what_saved_models_and_results_know(name: str, fingerprint: str) -> None:
    assert load_dataset(f"bundled:{name}").fingerprint == fingerprint


def test_fingerprint_depends_on_the_data_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    episodes = [Episode.make(rng, length, end) for length, end in ((4, "terminated"), (1, "truncated"), (6, "terminated"))]
    fingerprints = set()
    for data_format in ("hdf5", "arrow", "parquet"):
        write_minari(f"same/{data_format}-v0", episodes, data_format)
        fingerprints.add(load_dataset(f"same/{data_format}-v0").fingerprint)
    write_npz(tmp_path / "same.npz", episodes, action_low=ACTIONS.low, action_high=ACTIONS.high)
    dataset = load_dataset(tmp_path / "same.npz")
    assert dataset.action_space == ACTIONS
    fingerprints.add(dataset.fingerprint)
    assert len(fingerprints) == 1
    assert len(dataset.fingerprint) == 64

    columns = {name: np.array(getattr(dataset, name)) for name in COLUMNS}
    assert OfflineDataset.from_columns(**columns).fingerprint == dataset.fingerprint
    for name in ("observations", "actions", "rewards", "next_observations"):
        changed = columns | {name: columns[name].copy()}
        changed[name].flat[-1] = np.nextafter(changed[name].flat[-1], np.float32(np.inf))
        assert OfflineDataset.from_columns(**changed).fingerprint != dataset.fingerprint, name
    assert OfflineDataset.from_columns(**(columns | {"episode_starts": [0, 2, 4, 5]})).fingerprint != dataset.fingerprint
    swapped = columns | {
        "observations": columns["observations"][::-1],
        "next_observations": columns["next_observations"][::-1],
    }
    assert OfflineDataset.from_columns(**swapped).fingerprint != dataset.fingerprint


def test_columns_cannot_be_changed(hopper: OfflineDataset) -> None:
    for dataset in (hopper, pickle.loads(pickle.dumps(hopper)), copy.deepcopy(hopper)):
        for name in (*COLUMNS, "episode_returns", "episode_lengths"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(dataset, name)[0] = 0
        with pytest.raises(AttributeError):
            dataset.rewards = np.zeros(len(dataset), np.float32)  # type: ignore[misc]
        assert dataset.fingerprint == hopper.fingerprint


def test_columns_given_by_the_caller_are_copied() -> None:
    rewards = np.ones(3, np.float32)
    zeros = np.zeros((3, 1), np.float32)
    dataset = OfflineDataset.from_columns(zeros, zeros, rewards, zeros, [False] * 3)
    rewards[0] = 7.0
    assert dataset.rewards.tolist() == [1.0, 1.0, 1.0]
    assert dataset.truncations.tolist() == [False, False, True]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_data_is_a_minari_dataset(name: str, minari_root: Path) -> None:
    dataset = load_dataset(f"bundled:{name}")
    check_spec(f"bundled:{name}")
    folder = BUNDLED_PENDULUM.parent / name
    dataset_id = dataset.provenance["dataset_id"]
    shutil.copytree(folder, minari_root / dataset_id)
    recorded = minari.load_dataset(dataset_id)
    begin = 0
    for episode in recorded.iterate_episodes():
        rows = slice(begin, begin + len(episode.rewards))
        np.testing.assert_array_equal(dataset.observations[rows], episode.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(dataset.next_observations[rows], episode.observations[1:].astype(np.float32))
        np.testing.assert_array_equal(dataset.actions[rows], episode.actions)
        np.testing.assert_array_equal(dataset.rewards[rows], episode.rewards.astype(np.float32))
        np.testing.assert_array_equal(dataset.terminations[rows], episode.terminations)
        np.testing.assert_array_equal(dataset.truncations[rows], episode.truncations)
        begin = rows.stop
    assert begin == len(dataset) == recorded.total_steps
    assert dataset.spec == f"bundled:{name}"
    assert "/" not in (dataset.provenance["author"] or ["/"])[0]
    json.dumps(dataset.provenance)
    for spec in (dataset_id, folder, folder / "data", str(folder)):
        check_spec(spec)
        again = load_dataset(spec)
        assert again.fingerprint == dataset.fingerprint
        assert load_dataset(again.spec or "").fingerprint == dataset.fingerprint
    env = recorded.recover_environment()
    check_compatible(dataset, env.observation_space, env.action_space)
    env.close()


def test_bundled_data_is_what_its_description_says(hopper: OfflineDataset) -> None:
    pendulum = load_dataset("bundled:pendulum-medium")
    assert (len(hopper), hopper.n_episodes, int(hopper.truncations.sum())) == (100_045, 236, 23)
    assert (len(pendulum), pendulum.n_episodes, int(pendulum.truncations.sum())) == (20_000, 100, 100)
    assert hopper.episode_returns.mean() == pytest.approx(1548.5, abs=0.05)
    assert pendulum.episode_returns.mean() == pytest.approx(-888.4, abs=0.05)
    assert hopper.env_id == "Hopper-v5"
    assert "100,045 transitions in 236 episodes" in repr(hopper)
    for dataset in (hopper, pendulum):
        inner = np.flatnonzero(~(dataset.terminations | dataset.truncations))
        np.testing.assert_array_equal(dataset.next_observations[inner], dataset.observations[inner + 1])


def test_a_dataset_is_its_own_spec(hopper: OfflineDataset) -> None:
    check_spec(hopper)
    assert load_dataset(hopper) is hopper
    renamed = hopper.with_facts(name="mine", spec=None)
    assert (renamed.name, renamed.spec) == ("mine", None)
    assert renamed.rewards is hopper.rewards


def test_local_id_comes_before_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    write_minari("which/one-v0", [Episode.make(rng, 3, "terminated")])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    write_minari("which/one-v0", [Episode.make(rng, 8, "terminated")])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path / "work")
    assert len(load_dataset("which/one-v0")) == 3
    assert len(load_dataset("./which/one-v0")) == 8


@st.composite
def datasets(draw: st.DrawFn) -> OfflineDataset:
    """A dataset of a few episodes of any lengths and ends."""
    ends = draw(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = [length for length, _ in ends]
    n_rows, n_dims = sum(lengths), draw(st.integers(1, 3))
    terminations = np.zeros(n_rows, np.bool_)
    terminations[np.cumsum(lengths) - 1] = [terminated for _, terminated in ends]
    return OfflineDataset.from_columns(
        rng.normal(size=(n_rows, 2)),
        rng.normal(size=(n_rows, n_dims)),
        rng.normal(size=n_rows) * 10 ** draw(st.integers(-2, 3)),
        rng.normal(size=(n_rows, 2)),
        terminations,
        episode_starts=np.cumsum([0, *lengths[:-1]]),
    )


@settings(max_examples=150, deadline=None)
@given(datasets(), st.sampled_from([0.0, 1e-200, 0.5, 0.99, 1.0]))
def test_derived_columns_are_those_of_a_plain_loop(dataset: OfflineDataset, gamma: float) -> None:
    ends = [*(dataset.episode_starts[1:] - 1), len(dataset) - 1]
    assert dataset.episode_ends.tolist() == ends
    returns = np.zeros(len(dataset))
    episode_of_rows = np.zeros(len(dataset), np.int64)
    for episode, (start, end) in enumerate(zip(dataset.episode_starts, ends, strict=True)):
        following = 0.0
        for row in range(end, start - 1, -1):
            following = returns[row] = float(dataset.rewards[row]) + gamma * following
            episode_of_rows[row] = episode
            assert dataset.has_next_action[row] == (row < end)
            expected = dataset.actions[row + 1] if row < end else np.zeros_like(dataset.actions[row])
            np.testing.assert_array_equal(dataset.next_actions[row], expected)
    np.testing.assert_array_equal(dataset.episode_of_rows(), episode_of_rows)
    found = dataset.monte_carlo_returns(gamma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, returns, rtol=1e-6, atol=1e-6 * np.abs(dataset.rewards).sum())
    assert dataset.monte_carlo_returns(gamma) is found
    np.testing.assert_allclose(
        dataset.monte_carlo_returns(1.0)[dataset.episode_starts], dataset.episode_returns, rtol=1e-5, atol=1e-3
    )


@settings(max_examples=100, deadline=None)
@given(datasets(), st.data())
def test_selected_episodes_are_the_recorded_ones(dataset: OfflineDataset, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, dataset.n_episodes - 1), min_size=1))
    mask = np.isin(np.arange(dataset.n_episodes), list(chosen))
    for indices in (list(chosen), np.array(sorted(chosen, reverse=True)), mask):
        selected = dataset.select_episodes(indices)
        assert selected.spec is None
        assert selected.n_episodes == len(chosen)
        for new, old in enumerate(sorted(chosen)):
            rows = slice(dataset.episode_starts[old], dataset.episode_ends[old] + 1)
            new_rows = slice(selected.episode_starts[new], selected.episode_ends[new] + 1)
            for name in COLUMNS[:-1]:
                np.testing.assert_array_equal(getattr(selected, name)[new_rows], getattr(dataset, name)[rows])
        np.testing.assert_array_equal(selected.episode_returns, dataset.episode_returns[mask])
        with pytest.raises(ValueError, match="read-only"):
            selected.actions[0] = 0


@settings(max_examples=60, deadline=None)
@given(datasets(), st.data())
def test_split_and_concatenated_data_is_the_same_data(dataset: OfflineDataset, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, dataset.n_episodes))
    episodes = np.arange(dataset.n_episodes)
    halves = [dataset.select_episodes(part) for part in (episodes[:cut], episodes[cut:]) if part.size]
    again = OfflineDataset.concatenate(halves)
    assert again.fingerprint == dataset.fingerprint
    assert [(part.begin, part.end) for part in again.sources] == (
        [(0, len(dataset))] if len(halves) == 1 else [(0, len(halves[0])), (len(halves[0]), len(dataset))]
    )
    assert {part.weight for part in again.sources} == {None}


def test_weights_of_parts(hopper: OfflineDataset) -> None:
    first, second, third = (
        hopper.select_episodes(range(*span)).with_facts(name=name)
        for name, span in (("a", (0, 10)), ("b", (10, 30)), ("a", (30, 31)))
    )
    parts = OfflineDataset.concatenate([first, second, third], weights=[1, 2, 1]).sources
    assert [(part.name, part.weight) for part in parts] == [("a (1)", 0.25), ("b", 0.5), ("a (2)", 0.25)]
    assert [part.begin for part in parts] == [0, len(first), len(first) + len(second)]

    # A dataset of parts within another: its parts share its weight
    pair = OfflineDataset.concatenate([first, second])
    nested = OfflineDataset.concatenate([pair, third], weights=[3.0, 1.0])
    share = len(first) / len(pair)
    assert [part.weight for part in nested.sources] == pytest.approx([0.75 * share, 0.75 * (1 - share), 0.25])
    weighted = OfflineDataset.concatenate([first, second], weights=[1.0, 3.0])
    within = OfflineDataset.concatenate([weighted, third])
    share = len(weighted) / len(within)
    assert [part.weight for part in within.sources] == pytest.approx([share / 4, share * 3 / 4, 1 - share])

    fewer = within.select_episodes([0, 30])
    assert [(part.name, part.begin, part.end) for part in fewer.sources] == [
        ("a (1)", 0, fewer.episode_lengths[0]),
        ("a (2)", fewer.episode_lengths[0], len(fewer)),
    ]
    assert sum(part.weight or 0.0 for part in fewer.sources) == pytest.approx(1.0)
    (only,) = within.select_episodes([0]).sources
    assert only.weight is None
    (part,) = hopper.with_facts(name="mine").sources
    assert (part.name, part.spec, part.begin, part.end) == ("mine", "bundled:hopper-medium", 0, len(hopper))


def test_what_cannot_be_selected_or_put_together(hopper: OfflineDataset) -> None:
    for indices, message in (
        ([0, 0], "once only"),
        ([236], "has the episodes 0 to 235"),
        ([-1], "has the episodes 0 to 235"),
        ([], "select at least one of the 236 episodes"),
        (np.zeros(236, bool), "select at least one"),
        (np.ones(5, bool), r"a mask of shape \(236,\), found an array of bool of shape \(5,\)"),
        ([0.5], "found an array of float64"),
    ):
        with pytest.raises(ValueError, match=message):
            hopper.select_episodes(indices)
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`gamma` must be in \[0, 1\]"):
            hopper.monte_carlo_returns(gamma)
    with pytest.raises(ValueError, match="at least one dataset"):
        OfflineDataset.concatenate([])
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [True, 1.0]):
        with pytest.raises(ValueError, match="weight"):
            OfflineDataset.concatenate([hopper, hopper], weights=weights)
    pendulum = load_dataset("bundled:pendulum-medium")
    with pytest.raises(
        ValueError, match=r"'hopper-medium' and 'pendulum-medium' cannot .* in Hopper-v5, the second in Pendulum-v1"
    ):
        OfflineDataset.concatenate([hopper, pendulum])
    with pytest.raises(ValueError, match=r"observations of shape \(11,\) and type float32, the second of shape \(3,\)"):
        OfflineDataset.concatenate([hopper, pendulum.with_facts(provenance={})])
    zeros = np.zeros((2, 11), np.float32)
    actions = np.zeros((2, 3), np.float32)
    other = OfflineDataset.from_columns(zeros, actions, zeros[:, 0], zeros, [0, 1], action_space=spaces.Box(-2, 2, (3,)))
    with pytest.raises(ValueError, match="the action space's low differs in 3 of 3"):
        OfflineDataset.concatenate([hopper, other])


def test_scaled_actions_are_those_of_sb3() -> None:
    model = TD3("MlpPolicy", "Pendulum-v1", buffer_size=1, device="cpu")
    actions = np.random.default_rng(0).uniform(-2, 2, (1000, 1)).astype(np.float32)
    scaled = scale_actions(actions, model.action_space)
    np.testing.assert_array_equal(scaled, model.policy.scale_action(actions))
    assert scaled.dtype == np.float32

    lopsided = spaces.Box(np.array([-1.0, 0.0, 10.0]), np.array([3.0, 0.5, 30.0]), dtype=np.float64)
    np.testing.assert_allclose(
        scale_actions(np.array([[-1.0, 0.25, 30.0], [1.0, 0.6, 9.0]], np.float32), lopsided),
        [[-1, 0, 1], [0, 1, -1]],
        atol=1e-6,
    )


def test_float_width_of_spaces_does_not_matter(hopper: OfflineDataset) -> None:
    env = gym.make("Hopper-v5")
    narrow = spaces.Box(-np.inf, np.inf, (11,), np.float32)
    wide = spaces.Box(-1.0, 1.0, (3,), np.float64)
    check_compatible(hopper, env.observation_space, env.action_space)
    check_compatible(hopper, narrow, wide)
    env.close()


def test_rounded_actions_at_the_bounds_are_accepted() -> None:
    actions = np.array([[2.0 + 3e-3, 1.0], [-2.0 - 3e-3, -9e-4]], np.float32)
    columns = np.zeros((2, 3), np.float32)
    dataset = OfflineDataset.from_columns(columns, actions, np.zeros(2), columns, [False, True])
    check_compatible(dataset, OBSERVATIONS, ACTIONS)
    assert np.abs(scale_actions(dataset.actions, ACTIONS)).max() == 1.0


def test_reference_scores_are_never_mixed(minari_root: Path) -> None:
    measured, d4rl = reference_scores_for("Hopper-v5"), reference_scores_for("Hopper-v5", scale="d4rl")
    assert measured is not None and d4rl is not None
    assert (measured.random, measured.expert) == (24.8, 3857.8)
    assert (d4rl.random, d4rl.expert) == (-20.272305, 3234.3)
    assert d4rl.normalized(3234.3) == pytest.approx(100.0)
    assert measured.normalized(24.8) == 0.0
    assert reference_scores_for("Hopper-v4") is None
    assert reference_scores_for("NoSuchEnv-v0") is None
    with pytest.raises(ValueError, match=r"expected one of v5-measured, d4rl, found 'v4'"):
        reference_scores_for("Hopper-v5", scale="v4")
    with pytest.raises(ValueError, match="must differ"):
        ReferenceScores(1.0, 1.0, "nowhere")
    with pytest.raises(ValueError, match="need a source"):
        ReferenceScores(1.0, 2.0, " ")

    target = minari_root / "scores"
    shutil.copytree(BUNDLED_PENDULUM, target)
    metadata = json.loads((target / "data" / "metadata.json").read_text())

    def scores(env: str, low: float | None, high: float | None) -> ReferenceScores | None:
        changed = metadata | {"ref_min_score": low, "ref_max_score": high}
        changed["env_spec"] = metadata["env_spec"].replace("Pendulum-v1", env)
        (target / "data" / "metadata.json").write_text(json.dumps(changed))
        return load_dataset(target).reference_scores

    assert scores("Hopper-v5", -20.272305, 3234.3) == measured
    assert scores("Hopper-v5", None, None) == measured
    assert scores("Hopper-v5", 24.8, 3857.8) == measured
    assert scores("Hopper-v5", 0.0, 4000.0) == ReferenceScores(0.0, 4000.0, "given by the dataset")
    assert scores("Hopper-v4", -20.272305, 3234.3) == ReferenceScores(
        -20.272305, 3234.3, "D4RL constants, given by the dataset"
    )
    assert scores("Hopper-v4", None, None) is None


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of Hugging Face's hub that a download needs, for the files in ``root/<repository>``."""

    root: Path
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        match url.path.strip("/").split("/"):
            case ["api", "datasets"]:
                wanted = urllib.parse.parse_qs(url.query).get("search", [""])[0]
                self.answer(json.dumps([{"id": f"farama-minari/{repo.name}"} for repo in self.root.glob(f"*{wanted}*")]))
            case ["api", "datasets", author, repo, "revision", _]:
                self.answer(json.dumps({"id": f"{author}/{repo}", "sha": self.commit, "siblings": []}))
            case ["api", "datasets", _, repo, "tree", _]:
                files = [file for file in (self.root / repo).rglob("*") if file.is_file()]
                entries = [
                    {
                        "type": "file",
                        "path": file.relative_to(self.root / repo).as_posix(),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
                self.answer(json.dumps(entries))
            case ["datasets", _, repo, "resolve", _, *path]:
                file = self.root.joinpath(repo, *path)
                self.answer(file.read_bytes() if file.is_file() else None)
            case _:
                self.answer(None)

    def answer(self, content: str | bytes | None) -> None:
        body = content.encode() if isinstance(content, str) else content or b""
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server on this machine that Hugging Face's own client can download from; yields its address and its files."""
    root = tmp_path / "hub"
    repo = root / "classic"
    shutil.copytree(BUNDLED_PENDULUM, repo / "pendulum" / "medium-v0")
    metadata = repo / "pendulum" / "medium-v0" / "data" / "metadata.json"
    facts = json.loads(metadata.read_text()) | {"dataset_id": "classic/pendulum/medium-v0"}
    metadata.write_text(json.dumps(facts))
    (repo / "namespace_metadata.json").write_text(
        json.dumps({"datasets": ["classic/pendulum/medium-v0"], "namespaces": ["classic/pendulum"]})
    )
    (repo / "pendulum" / "namespace_metadata.json").write_text("{}")
    handler = type("FilledHub", (Hub,), {"root": root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", repo
        server.shutdown()
        thread.join()


def test_download_from_the_hub(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, _ = hub
    minari_root = tmp_path / "downloaded"
    minari_root.mkdir()
    # A download that was interrupted before its metadata arrived must not count as a dataset.
    (minari_root / "classic" / "pendulum" / "medium-v0" / "data").mkdir(parents=True)
    script = """
from sb3_offline_ft.datasets import check_spec, load_dataset
check_spec("classic/pendulum/medium-v0")
for spec in ("classic/pendulun/medium-v0", "clasic/pendulum/medium-v0"):
    try:
        check_spec(spec)
    except FileNotFoundError as error:
        print(error)
print(load_dataset("classic/pendulum/medium-v0").fingerprint)
print(load_dataset("classic/pendulum/medium-v0", download=False).fingerprint)
"""
    # huggingface_hub reads its address once, when it is imported.
    variables = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "MINARI_DATASETS_PATH": str(minari_root),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for misspelt in lines[:2]:
        assert "Minari's hub: no dataset with this id" in misspelt
        assert "Did you mean classic/pendulum/medium-v0" in misspelt
    assert lines[-1] == lines[-2] == load_dataset("bundled:pendulum-medium").fingerprint


def test_loading_is_fast_and_lean(hopper: OfflineDataset) -> None:
    load_dataset("bundled:hopper-medium")
    durations = []
    for _ in range(3):
        begin = time.process_time()
        load_dataset("bundled:hopper-medium")
        durations.append(time.process_time() - begin)
    assert len(hopper) / min(durations) > 200_000

    tracemalloc.start()
    try:
        kept = load_dataset("bundled:hopper-medium")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * kept.nbytes
