"""Augmentations change what is sampled, as stated, and never what is stored."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_offline_ft.buffers.augmentation import AUGMENTATIONS, Augmentation, make_augmentation
from sb3_offline_ft.buffers.files import ring_columns
from tests.replay_data import DICT, IMAGE, VECTOR, by_name, fill_online, make_buffer, make_dataset, make_vec_normalize

GENERATOR = np.random.default_rng


def augmented(name: str, values: np.ndarray, std: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    augmentation = make_augmentation(name)
    assert augmentation is not None
    changed = augmentation(values.copy(), GENERATOR(seed), std)
    assert changed.shape == values.shape and changed.dtype == values.dtype
    return changed


def vectors(n: int = 20_000, size: int = 4) -> np.ndarray:
    return GENERATOR(1).normal(2.0, 1.0, (n, size)).astype(np.float32)


def test_gaussian_noise_has_the_stated_size_in_each_dimension() -> None:
    values, std = vectors(), np.array([1.0, 10.0, 0.1, 3.0], np.float32)
    noise = (augmented("gaussian_noise_0.05", values, std) - values) / (0.05 * std)
    # Mean of 20,000 normals: 5 standard errors, error below 3e-6 for 4 dimensions; float32 rounding adds 1e-4
    assert np.abs(noise.mean(axis=0)).max() < 5 / np.sqrt(20_000) + 1e-3
    assert np.abs(noise.std(axis=0) - 1).max() < 5 / np.sqrt(2 * 20_000) + 1e-3


def test_uniform_noise_fills_the_stated_interval() -> None:
    values, std = vectors(), np.array([1.0, 10.0, 2.0, 3.0], np.float32)
    noise = (augmented("uniform_noise_0.05", values, std) - values) / (0.05 * std)
    assert np.abs(noise).max() < 1 + 1e-3
    # 20,000 draws all stay within 99.8 % of the interval with probability 4e-18
    assert noise.max() > 0.998 - 1e-3 and noise.min() < -0.998 + 1e-3
    assert np.abs(noise.mean(axis=0)).max() < 5 / np.sqrt(3 * 20_000) + 1e-3


def test_amplitude_scaling_has_one_factor_for_each_row() -> None:
    values = vectors()
    factors = augmented("amplitude_scaling_0.5_1.5", values) / values
    assert np.abs(factors - factors[:, :1]).max() < 1e-5
    assert 0.5 <= factors.min() < 0.501 and 1.499 < factors.max() <= 1.5 + 1e-6


def test_dimension_dropout_sets_one_dimension_of_each_row_to_zero() -> None:
    values = vectors()
    changed = augmented("dimension_dropout", values)
    dropped = changed != values
    assert (dropped.sum(axis=1) == 1).all() and not changed[dropped].any()
    # Binomial(20000, 1/4): standard deviation 61; 5 of them for 4 counts: error below 3e-6
    assert np.abs(dropped.sum(axis=0) - 5000).max() < 5 * 61


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_state_switch_exchanges_two_dimensions(shape: tuple[int, ...]) -> None:
    values = vectors().reshape(-1, *shape)
    for name, pairs in (
        ("state_switch_0_3_1_2", [(0, 3), (1, 2)]),
        ("state_switch", [(a, b) for b in range(4) for a in range(b)]),
    ):
        changed, flat = augmented(name, values).reshape(-1, 4), values.reshape(-1, 4)
        counts = []
        for a, b in pairs:
            order = np.arange(4)
            order[[a, b]] = b, a
            counts.append(int((changed == flat[:, order]).all(axis=1).sum()))
        assert sum(counts) == 20_000
        expected, deviation = 20_000 / len(pairs), np.sqrt(20_000 / len(pairs))
        assert max(abs(count - expected) for count in counts) < 5 * deviation


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)])
def test_random_shift_shifts_whole_images_and_repeats_the_border(shape: tuple[int, ...]) -> None:
    images = GENERATOR(2).integers(0, 256, (400, *shape), dtype=np.uint8)
    changed = augmented("random_shift_2", images)
    seen = set()
    for image, shifted in zip(images, changed, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if np.array_equal(
                shifted, image[..., np.clip(np.arange(6) + down, 0, 5)[:, None], np.clip(np.arange(5) + right, 0, 4)]
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    # One of 25 shifts is missed by 400 images with probability 25 * (24/25)^400 = 2e-6
    assert len(seen) == 25


def test_random_shift_pads_by_four_pixels_by_default() -> None:
    images = np.zeros((2000, 1, 9, 9), np.uint8)
    images[:, :, 4, 4] = 255
    at = np.argwhere(augmented("random_shift", images) == 255)[:, 2:]
    # (80/81)^2000 is 2e-11
    assert len(np.unique(at, axis=0)) == 81


@pytest.mark.parametrize("name", ["gaussian_noise", "uniform_noise", "amplitude_scaling", "dimension_dropout", "state_switch"])
def test_both_observations_are_changed_independently_and_nothing_else_is(name: str) -> None:
    dataset = make_dataset(VECTOR, [20], [True], GENERATOR(0))
    plain, changing = (make_buffer(VECTOR, seed=3, **options) for options in ({}, {"augmentation": name}))
    for buffer in (plain, changing):
        buffer.set_offline_data(dataset)
        fill_online([buffer], 20, GENERATOR(1))
    stored = {key: array.copy() for key, array in ring_columns(changing).items()}
    batches = []
    for buffer in (plain, changing):
        np.random.seed(0)
        batches.append(by_name(buffer.sample_batches(2, 32)))
    for column in batches[0]:
        same = th.equal(batches[0][column], batches[1][column])
        assert same == (column not in ("observations", "next_observations")), column
    changes = [batches[1][column] - batches[0][column] for column in ("observations", "next_observations")]
    assert not th.allclose(changes[0], changes[1])
    # Both the offline and the online half of a batch
    assert changes[0][:16].any() and changes[0][16:32].any()
    for key, array in ring_columns(changing).items():
        assert np.array_equal(array, stored[key]), key
    assert dataset.fingerprint == make_dataset(VECTOR, [20], [True], GENERATOR(0)).fingerprint


def test_noise_is_in_units_of_the_dataset_and_comes_before_vec_normalize() -> None:
    dataset = make_dataset(VECTOR, [500], [True], GENERATOR(0))
    plain, noisy = (make_buffer(VECTOR, seed=3, **options) for options in ({}, {"augmentation": "gaussian_noise_0.5"}))
    env = make_vec_normalize(VECTOR)
    env.clip_obs = 1e6
    batches = []
    for buffer in (plain, noisy):
        buffer.set_offline_data(dataset)
        batches.append(buffer.sample(20_000, env).observations.numpy())
    # The dataset's standard deviation is about 3, VecNormalize divides by the square root of 1.7
    expected = 0.5 * np.asarray(dataset.observations).std(axis=0) / np.sqrt(1.7)
    assert (batches[1] - batches[0]).std(axis=0) == pytest.approx(expected, rel=0.03)


def test_in_a_dict_only_keys_of_the_kind_are_changed() -> None:
    dataset = make_dataset(DICT, [20], [True], GENERATOR(0))
    for name, key in (("gaussian_noise_0.1", "joints"), ("random_shift_2", "camera")):
        batches = []
        for options in ({}, {"augmentation": name}):
            buffer = make_buffer(DICT, seed=3, **options)
            buffer.set_offline_data(dataset)
            batches.append(by_name(buffer.sample(32)))
        changed = {column for column in batches[0] if not th.equal(batches[0][column], batches[1][column])}
        assert changed == {f"observations/{key}", f"next_observations/{key}"}


def test_sampler_state_holds_the_augmentations_stream_and_old_states_are_accepted() -> None:
    buffer = make_buffer(VECTOR, seed=3, augmentation="gaussian_noise")
    buffer.set_offline_data(make_dataset(VECTOR, [20], [True], GENERATOR(0)))
    buffer.sample(5)
    state = buffer.get_sampler_state()
    first = by_name(buffer.sample(8))
    buffer.set_sampler_state(state)
    again = by_name(buffer.sample(8))
    assert all(th.equal(first[name], again[name]) for name in first)
    plain = make_buffer(VECTOR, seed=5)
    old = plain.get_sampler_state()
    assert "augmentation" not in old
    buffer.set_sampler_state(old)
    plain.set_sampler_state(state)
    plain.set_offline_data(make_dataset(VECTOR, [20], [True], GENERATOR(0)))
    assert th.equal(plain.sample(8).actions, first["actions"])


class Negated(Augmentation):
    """One's own: gives a new array."""

    name = "negated"

    def __call__(self, values: np.ndarray, generator: np.random.Generator, std: np.ndarray | None) -> np.ndarray:
        return -values


def test_an_augmentation_of_ones_own() -> None:
    batches = []
    for options in ({}, {"augmentation": Negated()}):
        buffer = make_buffer(VECTOR, seed=3, **options)
        buffer.set_offline_data(make_dataset(VECTOR, [20], [True], GENERATOR(0)))
        batches.append(buffer.sample(8).next_observations)
    assert th.equal(batches[0], -batches[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gausian_noise", "'gausian_noise': did you mean 'gaussian_noise'"),
        ("blur", "'blur': known are amplitude_scaling, .*random_shift"),
        ("gaussian_noise_0.1_0.2", "at most the numbers std"),
        ("dimension_dropout_3", "at most the numbers none"),
        ("gaussian_noise_0", "needs a positive std, found 0"),
        ("uniform_noise_nan", "needs a positive width"),
        ("amplitude_scaling_1.2_0.8", "low <= high"),
        ("random_shift_1.5", "whole number of pixels"),
        ("state_switch_1", "pairs of dimensions"),
        ("random_shift", "'random_shift' is for images, which the observation space has not"),
        ("state_switch_0_3", "exchanges dimensions 0 to 2, found 0, 3"),
    ],
)
def test_what_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_buffer(VECTOR, augmentation=name)


def test_vectors_augmentations_are_refused_for_images_and_other_types_at_all() -> None:
    for name in AUGMENTATIONS:
        if name != "random_shift":
            with pytest.raises(ValueError, match=f"'{name}' is for vectors"):
                make_buffer(IMAGE, augmentation=name)
    with pytest.raises(ValueError, match="is for vectors"):
        make_buffer(spaces.Box(0, 255, (3,), np.uint8), augmentation="gaussian_noise")
    with pytest.raises(TypeError, match=r"must be a name .* found 3"):
        make_buffer(VECTOR, augmentation=3)
    with pytest.raises(ValueError, match="found two random ones"):
        make_buffer(spaces.Box(-1, 1, (1,)), augmentation="state_switch")


def test_noise_without_offline_data_has_no_unit() -> None:
    buffer: Any = make_buffer(VECTOR, augmentation="uniform_noise")
    fill_online([buffer], 5, GENERATOR(0))
    with pytest.raises(ValueError, match="no offline data: set it"):
        buffer.sample(4)
