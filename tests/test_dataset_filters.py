"""Episodes chosen by filters: the same whether the filters are written in a spec or given as keywords."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sb3_offline_ft.datasets import OfflineDataset, check_spec, load_dataset

HOPPER = "bundled:hopper-medium"


@pytest.fixture(scope="module")
def hopper() -> OfflineDataset:
    return load_dataset(HOPPER)


returns = st.floats(-100.0, 4000.0)
lengths = st.integers(1, 1100)
fractions = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1.0, 0.1, 0.3, 0.5]))
filters = st.fixed_dictionaries(
    {},
    optional={
        "min_return": returns,
        "max_return": returns,
        "min_length": lengths,
        "max_length": lengths,
        "top_fraction": fractions,
        "episodes": st.integers(1, 300),
    },
).filter(
    lambda chosen: (
        chosen.get("min_return", -1e9) <= chosen.get("max_return", 1e9)
        and chosen.get("min_length", 0) <= chosen.get("max_length", 9999)
    )
)


def expected_episodes(dataset: OfflineDataset, chosen: dict[str, Any]) -> list[int]:
    """The definition, one episode at a time."""
    left = []
    for episode in range(dataset.n_episodes):
        total, length = dataset.episode_returns[episode], dataset.episode_lengths[episode]
        if chosen.get("min_return", -np.inf) <= total <= chosen.get("max_return", np.inf) and chosen.get(
            "min_length", 0
        ) <= length <= chosen.get("max_length", np.inf):
            left.append(episode)
    if "top_fraction" in chosen:
        best = sorted(left, key=lambda episode: -dataset.episode_returns[episode])
        n_best = 1
        while n_best < chosen["top_fraction"] * len(left) - 1e-9:
            n_best += 1
        left = sorted(best[:n_best])
    return left[: chosen.get("episodes", len(left))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=filters)
def test_filters_leave_what_they_say(hopper: OfflineDataset, chosen: dict[str, Any]) -> None:
    dataset = hopper
    expected = expected_episodes(dataset, chosen)
    if not expected:
        with pytest.raises(ValueError, match="leaves none of its 236 episodes"):
            load_dataset(dataset, **chosen)
        return
    filtered = load_dataset(dataset, **chosen)
    assert filtered.fingerprint == dataset.select_episodes(expected).fingerprint
    if chosen:
        assert filtered.provenance["episodes_before_filters"] == 236
        assert filtered.provenance["transitions_before_filters"] == 100_045
        assert filtered.provenance["episodes"] == len(expected)
        assert filtered.provenance["transitions"] == len(filtered)
        assert filtered.provenance["filters"] == chosen
        json.dumps(filtered.provenance)
    assert filtered.env_id == dataset.env_id
    assert filtered.reference_scores == dataset.reference_scores


def test_a_filtered_dataset_has_a_spec_that_loads_it_again(hopper: OfflineDataset) -> None:
    chosen = {"episodes": 5, "seed": 3, "min_return": 1000.5, "top_fraction": 0.3, "max_length": 900}
    spec = f"{HOPPER}?min_return=1000.5&max_length=900&top_fraction=0.3&episodes=5&seed=3"
    mixed = load_dataset(f"{HOPPER}?seed=3&max_length=900", episodes=5, min_return=1000.5, top_fraction=0.3)
    text = {name: str(value) for name, value in chosen.items()}
    for dataset in (
        load_dataset(HOPPER, **chosen),
        load_dataset(HOPPER, **text),
        load_dataset(hopper, **chosen),
        load_dataset({"spec": HOPPER, **chosen}),
        load_dataset([{"spec": HOPPER, **chosen}]),
        load_dataset(spec),
        mixed,
    ):
        assert dataset.spec == spec
        assert dataset.name == spec.removeprefix("bundled:")
        assert [(part.name, part.spec, part.end) for part in dataset.sources] == [(dataset.name, spec, len(dataset))]
        assert dataset.fingerprint == mixed.fingerprint
        check_spec(dataset.spec)
    assert mixed.n_episodes == 5
    assert load_dataset(mixed, episodes=2).spec is None


def test_filters_that_do_nothing_change_nothing(hopper: OfflineDataset) -> None:
    everything = load_dataset(HOPPER, min_return=-1e6, top_fraction=1.0, episodes=10_000)
    assert everything.fingerprint == hopper.fingerprint
    assert everything.spec == f"{HOPPER}?min_return=-1000000&top_fraction=1&episodes=10000"
    assert load_dataset(HOPPER).provenance.get("filters") is None


def test_random_choices_are_nested_and_depend_on_the_seed_alone(hopper: OfflineDataset) -> None:
    def starts(n_episodes: int, seed: int) -> set[bytes]:
        chosen = load_dataset(hopper, episodes=n_episodes, seed=seed)
        assert chosen.n_episodes == n_episodes
        return {chosen.observations[start].tobytes() for start in chosen.episode_starts}

    assert starts(20, seed=1) == starts(20, seed=1)
    assert starts(20, seed=1) < starts(50, seed=1)
    assert starts(20, seed=1) != starts(20, seed=2)
    # Each episode is as likely as any other: 200 choices of 20 of 236 episodes give each 17.0 on average
    counts = np.zeros(236)
    position = {hopper.observations[start].tobytes(): index for index, start in enumerate(hopper.episode_starts)}
    for seed in range(200):
        for start in starts(20, seed):
            counts[position[start]] += 1
    # Binomial(200, 20/236): with fixed seeds the outcome is certain; for fresh ones the chance of a count outside is 1e-4
    assert 0 < counts.min() and counts.max() < 40
    assert counts.sum() == 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_retrun": 1}, "'bundled:hopper-medium': unknown filter or option 'min_retrun'. Did you mean 'min_return'?"),
        ({"zzz": 1}, "unknown filter or option 'zzz'. Known are clip_actions, episodes, keys"),
        ({"min_return": "many"}, "min_return must be a finite number, found 'many'"),
        ({"min_return": float("nan")}, "min_return must be a finite number, found nan"),
        ({"min_return": None}, "min_return must be a finite number, found None"),
        ({"episodes": True}, "episodes must be a finite number, found True"),
        ({"episodes": 0}, "episodes must be a whole number of at least 1, found 0"),
        ({"episodes": 2.5}, "episodes must be a whole number of at least 1, found 2.5"),
        ({"min_length": -1}, "min_length must be a whole number of at least 1, found -1"),
        ({"top_fraction": 0}, "top_fraction must be above 0 and at most 1, found 0"),
        ({"top_fraction": 1.5}, "top_fraction must be above 0 and at most 1, found 1.5"),
        ({"min_return": 5, "max_return": 4}, r"min_return \(5\) must not be above max_return \(4\)"),
        ({"min_length": 5, "max_length": 4}, r"min_length \(5\) must not be above max_length \(4\)"),
        ({"seed": 1}, "seed has no effect without episodes"),
        ({"seed": -1, "episodes": 1}, "seed must be a whole number of at least 0, found -1"),
    ],
)
def test_wrong_filters(options: dict[str, Any], message: str) -> None:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    for function in (check_spec, load_dataset):
        with pytest.raises(ValueError, match=message):
            function(HOPPER, **options)
        with pytest.raises(ValueError, match=message.partition(", found")[0]):
            function(f"{HOPPER}?{query}")


def test_filters_that_leave_nothing() -> None:
    message = (
        r"Dataset 'hopper-medium': min_return=9000 leaves none of its 236 episodes, whose returns are [\d.]+ to [\d.]+ and "
        r"lengths \d+ to 1000"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset(f"{HOPPER}?min_return=9000")
    check_spec(f"{HOPPER}?min_return=9000")


def test_filters_given_twice() -> None:
    assert load_dataset(f"{HOPPER}?episodes=3", episodes=3).n_episodes == 3
    with pytest.raises(ValueError, match="episodes is 3 in the spec and 4 as a keyword: give it once"):
        load_dataset(f"{HOPPER}?episodes=3", episodes=4)
    with pytest.raises(ValueError, match="has episodes twice"):
        load_dataset(f"{HOPPER}?episodes=3&episodes=3")
    with pytest.raises(ValueError, match="episodes is 3 and 4: give it once"):
        load_dataset({"spec": f"{HOPPER}?episodes=3", "episodes": 4})
