"""Minari's own dataset objects as data."""

import warnings
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC, load_dataset
from sb3_offline_ft.datasets import check_spec, spec_text

pytestmark = pytest.mark.usefixtures("minari_root")

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
OBSERVATIONS = spaces.Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32))
ACTIONS = spaces.Box(-2, 2, (1,))
LENGTHS = (5, 7, 3, 9)


def write(dataset_id: str, data_format: str = "hdf5") -> minari.MinariDataset:
    generator = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations=generator.uniform(-1, 1, (length + 1, 3)).astype(np.float32),
            actions=generator.uniform(-2, 2, (length, 1)).astype(np.float32),  # type: ignore[arg-type]
            rewards=np.full(length, index, float).tolist(),
            terminations=[False] * length,
            truncations=[False] * (length - 1) + [True],
        )
        for index, length in enumerate(LENGTHS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            dataset_id, buffers, observation_space=OBSERVATIONS, action_space=ACTIONS, data_format=data_format
        )


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_episodes_that_were_filtered(data_format: str) -> None:
    write("object/data-v0", data_format)
    whole = load_dataset("object/data-v0")
    given = minari.load_dataset("object/data-v0").filter_episodes(lambda episode: len(episode.rewards) > 4)
    check_spec(given)
    dataset = load_dataset(given)
    assert dataset.fingerprint == whole.select_episodes([0, 1, 3]).fingerprint
    assert dataset.spec is None and spec_text(given) is None
    assert dataset.name == "object/data-v0 (3 of 4 episodes)"
    facts = dataset.provenance
    assert (facts["dataset_id"], facts["episodes_chosen"], facts["episodes_stored"]) == ("object/data-v0", 3, 4)
    assert load_dataset(given, max_length=5).episode_lengths.tolist() == [5]
    assert "episodes_chosen" not in whole.provenance


def test_the_order_of_the_indices_is_kept() -> None:
    given = minari.MinariDataset(write("object/data-v0").storage, episode_indices=np.array([3, 0, 0]))
    assert load_dataset(given).episode_lengths.tolist() == [9, 5, 5]
    assert load_dataset(given).episode_returns.tolist() == [27.0, 0.0, 0.0]


@pytest.mark.parametrize("indices", [[], [4], [-1]])
def test_indices_that_choose_nothing(indices: list[int]) -> None:
    given = minari.MinariDataset(write("object/data-v0").storage, episode_indices=np.array(indices, int))
    for function in (check_spec, load_dataset):
        with pytest.raises(ValueError, match=r"'object/data-v0'.* (is empty|has the episodes 0 to 3)"):
            function(given)


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C, ReBRAC])
def test_every_algorithm_takes_it(algorithm: type[OfflineTD3], tmp_path: Path) -> None:
    write("object/data-v0")
    whole = minari.load_dataset("object/data-v0")
    some = whole.filter_episodes(lambda episode: len(episode.rewards) > 4)
    model = algorithm("MlpPolicy", "Pendulum-v1", dataset=some, **TINY).pretrain(2)
    model.save(tmp_path / "model")
    # The file cannot name these episodes
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    assert loaded.dataset is None and model.dataset is some
    with pytest.raises(ValueError, match="pretrained on data given as an object"):
        loaded.pretrain(1)
    again = algorithm.load(tmp_path / "model", env=model.get_env(), dataset=some).pretrain(1)
    assert again.dataset_fingerprint == model.dataset_fingerprint
    # All of them are what the id names
    model = algorithm("MlpPolicy", "Pendulum-v1", dataset=whole, **TINY).pretrain(2)
    assert model.dataset == "object/data-v0"
    model.save(tmp_path / "whole")
    assert algorithm.load(tmp_path / "whole", env=model.get_env()).pretrain(1).dataset == "object/data-v0"


def test_in_lists(tmp_path: Path) -> None:
    write("object/data-v0")
    whole = minari.load_dataset("object/data-v0")
    some = whole.filter_episodes(lambda episode: len(episode.rewards) > 4)
    for spec in (
        [(some, 0.7), ("object/data-v0", 0.3)],
        [{"spec": some, "weight": 0.7}, {"spec": whole, "weight": 0.3}],
    ):
        dataset = load_dataset(spec)
        assert [(part.begin, part.end, part.weight) for part in dataset.sources] == [(0, 21, 0.7), (21, 45, 0.3)]
        assert dataset.spec is None
    assert load_dataset([(whole, 0.7), (whole, 0.3)]).spec == "0.7*object/data-v0 + 0.3*object/data-v0"
    assert spec_text({"spec": whole, "episodes": 2}) == "object/data-v0?episodes=2"
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset=[(some, 0.7), (whole, 0.3)], **TINY).pretrain(1)
    assert len(model.replay_buffer.sampled_rows_by_source()) == 2


def test_a_dataset_that_lies_elsewhere(tmp_path: Path, minari_root: Path) -> None:
    write("object/data-v0")
    (minari_root / "object" / "data-v0").rename(tmp_path / "moved")
    given = minari.MinariDataset(tmp_path / "moved" / "data")
    dataset = load_dataset(given)
    assert dataset.spec == spec_text(given) == str(tmp_path / "moved")
    assert load_dataset(dataset.spec).fingerprint == dataset.fingerprint
