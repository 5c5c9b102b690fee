"""Each measure of diversity against cases whose value is known."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import polygamma

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.datasets.tools.diversity import (
    action_bounds,
    action_noise,
    knn_entropy,
    measure_diversity,
    positive_sided_variance,
    row_hashes,
    sample_rows,
    scaled_actions,
    standardized,
    state_action_coverage,
    state_matrix,
    trajectory_quality,
    vendi_score,
)


def entropy_tolerance(n: int, k: int, variance_of_log_density: float) -> float:
    """
    Five standard errors of the estimator: a wrong alarm in 2 million seeds if it is normally distributed. The seeds are fixed,
    so that the tests give the same result every time.

    :param variance_of_log_density: Of the samples' distribution
    """
    return 5 * float(np.sqrt((variance_of_log_density + polygamma(1, k)) / n))


class TestReturns:
    def test_quality_is_0_for_random_and_1_for_expert_returns(self) -> None:
        assert trajectory_quality([10.0, 30.0], 20.0, 120.0) == 0.0
        assert trajectory_quality([120.0], 20.0, 120.0) == 1.0
        assert trajectory_quality([45.0], 20.0, 120.0) == 0.25
        with pytest.raises(ValueError, match="must differ"):
            trajectory_quality([1.0], 5.0, 5.0)

    def test_only_episodes_above_the_mean_count(self) -> None:
        # Mean 2; one episode 6 above it, the other three 2 below
        assert positive_sided_variance([0.0, 0.0, 0.0, 8.0]) == 6.0**2 / 4
        assert positive_sided_variance([3.0, 3.0]) == 0.0

    @given(st.lists(st.floats(-100, 100), min_size=1, max_size=50))
    def test_both_sides_add_up_to_the_variance(self, returns: list[float]) -> None:
        both = positive_sided_variance(returns) + positive_sided_variance([-value for value in returns])
        assert both == pytest.approx(float(np.var(returns)), abs=1e-9)

    def test_no_returns_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one number"):
            positive_sided_variance([])


class TestCoverage:
    def test_bins_are_counted(self) -> None:
        # Four states on a line and two actions: 2 x 2 bins, of which three are visited
        states = np.array([[0.0], [0.1], [0.9], [1.0]])
        actions = np.array([[-1.0], [1.0], [1.0], [1.0]])
        coverage = state_action_coverage(states, actions, bins=2, action_low=-1.0, action_high=1.0)
        assert (coverage.rows, coverage.unique) == (4, 3)
        assert coverage.per_row == 0.75

    def test_a_full_grid_is_covered_whatever_the_order(self) -> None:
        grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), axis=-1).reshape(-1, 2)
        coverage = state_action_coverage(grid[:, :1], grid[:, 1:], bins=10)
        assert coverage.unique == 100 and coverage.per_row == 1.0
        # Independent dimensions cover as much as their shuffled selves, up to what shuffling leaves out by chance
        repeated = np.repeat(grid, 30, axis=0)
        coverage = state_action_coverage(repeated[:, :1], repeated[:, 1:], bins=10)
        assert (coverage.unique, coverage.unique_shuffled, coverage.unique_uniform) == (100, 100, 100)

    def test_a_deterministic_policy_covers_a_line(self) -> None:
        states = np.linspace(0, 1, 5_000)[:, None]
        coverage = state_action_coverage(states, 2 * states - 1, bins=10, action_low=-1.0, action_high=1.0)
        assert coverage.unique == 10
        assert coverage.unique_shuffled == coverage.unique_uniform == 100
        assert coverage.per_shuffled == coverage.per_uniform == 0.1

    def test_bounds_make_the_bins_of_the_actions(self) -> None:
        states, actions = np.zeros((100, 1)), np.linspace(0, 1, 100)[:, None]
        assert state_action_coverage(states, actions, bins=10).unique == 10
        assert state_action_coverage(states, actions, bins=10, action_low=0.0, action_high=10.0).unique == 2

    def test_the_baselines_follow_the_seed(self) -> None:
        generator = np.random.default_rng(0)
        states, actions = generator.normal(size=(300, 2)), generator.uniform(size=(300, 1))
        one, same, other = (state_action_coverage(states, actions, bins=8, seed=seed) for seed in (1, 1, 2))
        assert one == same
        assert one.unique == other.unique and one != other

    def test_too_few_bins_and_empty_data_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least 2 bins"):
            state_action_coverage(np.zeros((3, 1)), np.zeros((3, 1)), bins=1)
        with pytest.raises(ValueError, match="states must have the shape"):
            state_action_coverage(np.zeros((3, 0)), np.zeros((3, 1)))


class TestEntropy:
    @pytest.mark.parametrize("d", [1, 3])
    @pytest.mark.parametrize("k", [1, 4])
    def test_gaussian(self, d: int, k: int) -> None:
        n, std = 4_000, 2.5
        samples = np.random.default_rng(7).normal(0.0, std, (n, d))
        expected = 0.5 * d * np.log(2 * np.pi * np.e * std**2)
        assert knn_entropy(samples, k) == pytest.approx(expected, abs=entropy_tolerance(n, k, d / 2) + 0.02)

    def test_uniform_square_has_the_logarithm_of_its_area(self) -> None:
        n, side = 4_000, 3.0
        samples = np.random.default_rng(3).uniform(0.0, side, (n, 2))
        assert knn_entropy(samples) == pytest.approx(2 * np.log(side), abs=entropy_tolerance(n, 3, 0.0) + 0.03)

    def test_scaling_adds_its_logarithm_in_every_dimension(self) -> None:
        samples = np.random.default_rng(0).normal(size=(500, 4))
        assert knn_entropy(3.0 * samples) == pytest.approx(knn_entropy(samples) + 4 * np.log(3.0))

    def test_repeated_samples_have_no_density(self) -> None:
        assert knn_entropy(np.zeros((10, 2)), k=3) == -np.inf

    def test_k_must_leave_neighbours(self) -> None:
        for k in (0, 5):
            with pytest.raises(ValueError, match="k must be from 1 to 4"):
                knn_entropy(np.arange(5.0)[:, None], k)


class TestVendiScore:
    @pytest.mark.parametrize("clusters", [1, 2, 7])
    def test_far_clusters_are_counted(self, clusters: int) -> None:
        centres = 100.0 * np.arange(clusters)[:, None] * np.ones((1, 3))
        assert vendi_score(np.repeat(centres, 12, axis=0)) == pytest.approx(clusters, rel=1e-6)

    def test_unequal_clusters_count_by_the_entropy_of_their_shares(self) -> None:
        samples = np.concatenate([np.zeros((30, 1)), np.full((10, 1), 1e3)])
        assert vendi_score(samples) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))

    def test_cosine_counts_directions(self) -> None:
        directions = np.eye(5)[np.arange(50) % 5] * np.arange(1, 51)[:, None]
        assert vendi_score(directions, "cosine") == pytest.approx(5.0)
        # With fewer samples than dimensions the other of the two matrices is taken
        assert vendi_score(np.eye(6)[:4], "cosine") == pytest.approx(4.0)

    def test_two_samples_have_the_score_of_their_similarity(self) -> None:
        # The eigenvalues of K / 2 are (1 + s) / 2 and (1 - s) / 2
        similarity = np.exp(-(3.0**2) / (2 * 2.0**2))
        shares = np.array([(1 + similarity) / 2, (1 - similarity) / 2])
        expected = np.exp(-np.sum(shares * np.log(shares)))
        assert vendi_score(np.array([[0.0], [3.0]]), bandwidth=2.0) == pytest.approx(expected)

    def test_wrong_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="'gaussian' or 'cosine'"):
            vendi_score(np.ones((3, 2)), "linear")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="bandwidth must be positive"):
            vendi_score(np.ones((3, 2)), bandwidth=0.0)
        with pytest.raises(ValueError, match="Sample 1 is zero"):
            vendi_score(np.array([[1.0], [0.0]]), "cosine")


class TestActionNoise:
    def test_noise_around_a_policy_is_recovered(self) -> None:
        generator = np.random.default_rng(5)
        states = generator.uniform(-1, 1, (8_000, 2))
        std = np.array([0.2, 0.05])
        actions = np.stack([np.sin(states[:, 0]), states[:, 1] ** 2], axis=1) + generator.normal(0, std, (8_000, 2))
        noise = action_noise(states, actions)
        # 8 % are five standard errors of a standard deviation from 2,000 independent rows
        assert noise.std == pytest.approx(std, rel=0.08)
        assert noise.total_std == pytest.approx(actions.std(axis=0))
        assert noise.mean_std == pytest.approx(np.sqrt(np.mean(noise.std**2)))
        assert (noise.neighbours, noise.references, noise.queries) == (10, 8_000, 2_000)

    def test_a_deterministic_policy_has_next_to_none_and_a_random_one_nothing_else(self) -> None:
        generator = np.random.default_rng(1)
        states = generator.uniform(-1, 1, (6_000, 1))
        assert action_noise(states, np.tanh(states)).mean_std < 0.01
        uniform = action_noise(states, generator.uniform(-1, 1, (6_000, 1)))
        assert uniform.mean_std == pytest.approx(1 / np.sqrt(3), rel=0.08)
        assert uniform.unexplained == pytest.approx(1.0, abs=0.16)

    def test_units_of_the_states_do_not_matter(self) -> None:
        generator = np.random.default_rng(2)
        states, actions = generator.normal(size=(500, 2)), generator.normal(size=(500, 1))
        scaled = states * np.array([1e4, 1e-4]) + 7.0
        assert action_noise(states, actions).std == pytest.approx(action_noise(scaled, actions).std)

    def test_rows_that_coincide_are_not_their_own_neighbours(self) -> None:
        # Two states, actions +1 and -1 in equal number: each row's ten neighbours share its state, not its row
        states = np.repeat([[0.0], [1.0]], 40, axis=0)
        actions = np.tile([[1.0], [-1.0]], (40, 1))
        noise = action_noise(states, actions)
        assert 0.7 < noise.mean_std < 1.3

    def test_samples_follow_the_seed(self) -> None:
        generator = np.random.default_rng(3)
        states, actions = generator.normal(size=(400, 2)), generator.normal(size=(400, 1))
        one, same, other = (action_noise(states, actions, max_references=200, max_queries=50, seed=s) for s in (0, 0, 1))
        assert one.std == pytest.approx(same.std, abs=0)
        assert (one.references, one.queries) == (200, 50)
        assert one.std != pytest.approx(other.std, abs=0)

    def test_too_few_rows_are_refused(self) -> None:
        with pytest.raises(ValueError, match="k must be from 1 to 4, found 10"):
            action_noise(np.zeros((5, 1)), np.zeros((5, 1)))


class TestHelpers:
    @settings(max_examples=50)
    @given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
    def test_rows_have_equal_hashes_exactly_if_they_are_equal(self, width: int, n_rows: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        columns = generator.integers(3, size=(n_rows, width)).astype(np.float32), generator.random((n_rows, 1)) < 0.5
        table = np.concatenate([column.astype(np.float64) for column in columns], axis=1)
        _, groups = np.unique(table, axis=0, return_inverse=True)
        hashes = row_hashes(*columns)
        assert ((hashes[:, None] == hashes) == (groups.reshape(-1)[:, None] == groups.reshape(-1))).all()

    def test_hashes_see_signs_and_places_but_not_the_sign_of_zero(self) -> None:
        rows = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [-0.0, 0.0]], np.float32)
        hashes = row_hashes(rows)
        assert len(set(hashes[:4].tolist())) == 4 and hashes[3] == hashes[4]

    def test_samples_are_without_replacement_and_follow_the_seed(self) -> None:
        assert sample_rows(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
        rows = sample_rows(1_000, 100, 0)
        assert len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
        assert (rows == sample_rows(1_000, 100, 0)).all() and (rows != sample_rows(1_000, 100, 1)).any()

    def test_constant_columns_become_zero(self) -> None:
        rows = standardized(np.array([[1.0, 5.0], [3.0, 5.0]]))
        assert rows.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def dict_dataset(n_rows: int = 60) -> OfflineDataset:
    """A dataset with a vector, a discrete key and an image."""
    generator = np.random.default_rng(0)
    space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (4, 4, 1), np.uint8),
            "gear": spaces.Discrete(3),
            "speed": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )
    observations = {
        "camera": generator.integers(0, 256, (n_rows + 1, 4, 4, 1), dtype=np.uint8),
        "gear": generator.integers(0, 3, (n_rows + 1, 1)),
        "speed": generator.normal(size=(n_rows + 1, 2)),
    }
    terminations = np.zeros(n_rows, np.bool_)
    return OfflineDataset.from_columns(
        {key: array[:-1] for key, array in observations.items()},
        generator.uniform(-2, 2, (n_rows, 1)).astype(np.float32),
        np.ones(n_rows),
        {key: array[1:] for key, array in observations.items()},
        terminations,
        observation_space=space,
        action_space=spaces.Box(-2, 2, (1,), np.float32),
    )


class TestDatasets:
    def test_vectors_make_the_states_and_images_do_not(self) -> None:
        data = dict_dataset()
        states = state_matrix(data)
        assert states.shape == (60, 5)
        assert isinstance(data.observations, dict)
        assert (states[:, :3].argmax(axis=1) == data.observations["gear"][:, 0]).all()
        assert (states[:, 3:] == data.observations["speed"]).all()
        assert measure_diversity(data).state_dimensions == 5

    def test_actions_are_scaled_by_their_bounds_or_else_their_range(self) -> None:
        data = dict_dataset()
        assert scaled_actions(data) == pytest.approx(data.actions / 2, abs=1e-6)
        unbounded = OfflineDataset.from_columns(
            data.observations, data.actions, data.rewards, data.next_observations, data.terminations
        )
        assert scaled_actions(unbounded).min() == -1.0 and scaled_actions(unbounded).max() == pytest.approx(1.0)
        low, high, known = action_bounds(unbounded)
        assert (low, high, known) == (data.actions.min(), data.actions.max(), False)

    def test_measures_of_real_data(self) -> None:
        data = load_dataset("bundled:pendulum-medium")
        told: list[str] = []
        diversity = measure_diversity(data, progress=told.append)
        scores = data.reference_scores
        assert scores is not None and diversity.trajectory_quality is not None and diversity.action_noise is not None
        assert diversity.trajectory_quality == pytest.approx(scores.normalized(data.episode_returns.mean()) / 100)
        assert diversity.positive_sided_variance == positive_sided_variance(data.episode_returns)
        # A stochastic policy on a small state space: much noise, but far from uniform, and no row twice
        assert 0.2 < diversity.action_noise.mean_std < 0.55
        assert diversity.coverage is not None and diversity.coarse_coverage is not None
        assert diversity.coarse_coverage.unique < diversity.coverage.unique <= diversity.coverage.rows == len(data)
        assert diversity.state_entropy is not None and diversity.gaussian_entropy is not None
        assert diversity.state_entropy < diversity.gaussian_entropy
        assert diversity.vendi_score is not None and 1.0 < diversity.vendi_score < diversity.vendi_rows == 1_000
        assert told == ["coverage", "entropy", "Vendi score", "action noise"]

    def test_the_same_seed_gives_the_same_measures(self) -> None:
        data = load_dataset("bundled:pendulum-medium?episodes=20")
        one, same, other = (measure_diversity(data, entropy_rows=500, vendi_rows=200, seed=seed) for seed in (0, 0, 1))
        assert repr(one) == repr(same)
        assert one.vendi_score != other.vendi_score

    def test_images_alone_leave_measures_out(self) -> None:
        data = dict_dataset()
        assert isinstance(data.observations, dict) and isinstance(data.next_observations, dict)
        images = OfflineDataset.from_columns(
            data.observations["camera"], data.actions, data.rewards, data.next_observations["camera"], data.terminations
        )
        diversity = measure_diversity(images)
        assert diversity.state_dimensions == 0
        assert diversity.coverage is diversity.state_entropy is diversity.vendi_score is diversity.action_noise is None
