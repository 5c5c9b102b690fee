"""What logged data alone says of a policy: fitted Q evaluation, its intervals, coverage, and the verdict for a trial."""

import itertools
import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from typer.testing import CliRunner

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.cli import app
from sb3_offline_ft.evaluation.off_policy import (
    OffPolicyEstimate,
    coverage,
    data_suffices,
    fitted_q_evaluation,
    initial_value_of_critics,
)
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.update import AutogradKernel, FastKernel
from tests.conftest import REPOSITORY
from tests.kernels import make

SMALL: dict[str, Any] = {"net_arch": (32, 32), "n_bootstraps": 4, "batch_size": 64}
ACTIONS = spaces.Box(-1, 1, (1,), np.float32)


class Act:
    """A policy that is a function of one observation."""

    def __init__(self, function: Callable[[np.ndarray], float]) -> None:
        self._function, self.n_resets = function, 0

    def reset(self) -> None:
        self.n_resets += 1

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.array([self._function(observation)], np.float32)


RIGHT, LEFT = Act(lambda _: 1.0), Act(lambda _: -1.0)


def corridor(n_episodes: int = 150, seed: int = 0) -> OfflineDataset:
    """Random walks in a corridor of three places, which positive actions leave to the right, where there is a reward of 1."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n_episodes):
        place = 0
        for step in range(12):
            action = rng.uniform(-1, 1)
            to = max(0, place + (1 if action > 0 else -1))
            rows.append((np.eye(4)[place], [action], float(to == 3), np.eye(4)[to], to == 3, step == 11 and to != 3))
            place = to
            if place == 3:
                break
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return OfflineDataset.from_columns(
        *columns, observation_space=spaces.Box(0, 1, (4,), np.float32), action_space=ACTIONS, name="corridor"
    )


def episodes_of_luck(n_episodes: int, length: int = 10, seed: int = 0) -> OfflineDataset:
    """Each episode has rewards that are all alike, drawn from a normal distribution; nothing depends on anything else."""
    rng = np.random.default_rng(seed)
    n = n_episodes * length
    observations, actions = rng.normal(size=(n, 2)), rng.uniform(-1, 1, size=(n, 1))
    starts = np.arange(0, n, length)
    return OfflineDataset.from_columns(
        observations, actions, np.repeat(rng.normal(size=n_episodes), length), observations, np.zeros(n),
        episode_starts=starts, observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float32), action_space=ACTIONS,
    )  # fmt: skip


@pytest.mark.parametrize(("policy", "value"), [(RIGHT, 0.9**2), (LEFT, 0.0)])
def test_the_value_is_the_true_one_where_it_is_known(policy: Act, value: float) -> None:
    found = fitted_q_evaluation(policy, corridor(), gamma=0.9, gradient_steps=800, **SMALL)
    assert found.estimate.value == pytest.approx(value, abs=0.05)
    assert found.is_settled and found.clipped < 0.05
    assert found.curve.shape == (len(found.steps), 4) and found.steps[-1] == 800
    assert np.array_equal(found.curve[-1], found.replicates)
    # Random walks find the way out later than the policy that walks straight
    assert 0.2 < found.data_value < 0.7


def test_a_longer_way_is_worth_less_by_the_discount_factor() -> None:
    values = [
        fitted_q_evaluation(RIGHT, corridor(), gamma=gamma, gradient_steps=600, **SMALL).estimate.value for gamma in (0.5, 0.0)
    ]
    assert values == pytest.approx([0.25, 0.0], abs=0.05)


@pytest.mark.parametrize("n_episodes", [25, 400])
def test_the_interval_is_about_episodes_and_not_rows(n_episodes: int) -> None:
    settings: dict[str, Any] = SMALL | {"n_bootstraps": 24, "net_arch": (8,)}
    found = fitted_q_evaluation(LEFT, episodes_of_luck(n_episodes), gamma=0.0, gradient_steps=400, **settings)
    # Rows that were independent would make it 0.32 of this
    assert 0.6 < found.replicates.std(ddof=1) * np.sqrt(n_episodes) < 1.6
    half_width = stats.t.ppf(0.975, 23) * found.replicates.std(ddof=1)
    assert found.estimate.high - found.estimate.value == pytest.approx(half_width)
    assert found.estimate.n == n_episodes


def test_equal_seeds_give_equal_numbers() -> None:
    first, again, other = (
        fitted_q_evaluation(RIGHT, corridor(), gradient_steps=40, seed=seed, **SMALL).replicates for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_one_episode_has_no_interval() -> None:
    found = fitted_q_evaluation(RIGHT, corridor(1), gradient_steps=20, **SMALL)
    assert not found.estimate.has_interval and "two episodes" in found.estimate.method


@pytest.mark.parametrize("curve", [np.linspace(0, 100, 41), np.zeros(41)])
def test_what_still_moves_has_not_settled(curve: np.ndarray) -> None:
    def found(clipped: float, horizons: float = 3.0) -> OffPolicyEstimate:
        estimate = Estimate(curve[-1], curve[-1] - 5, curve[-1] + 5, 9, "")
        return OffPolicyEstimate(estimate, 0.9, curve[-1:], np.arange(41), curve[:, None], 0.0, clipped, horizons)

    assert found(0.0).is_settled == (curve[-1] == 0)
    assert not found(0.5).is_settled and not found(0.0, horizons=0.1).is_settled


# Pendulum


class Swing:
    """Pumps energy until the pendulum is up, then holds it; weaker or in the wrong sense if asked."""

    observation_space, action_space = gym.make("Pendulum-v1").observation_space, gym.make("Pendulum-v1").action_space

    def __init__(self, gain: float) -> None:
        self._gain = gain

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        cos, sin, speed = observation.T
        # Of the pendulum: its energy is 0 when it stands
        energy = speed**2 / 6 + 5 * (cos - 1)
        pump = -np.sign(speed) * np.sign(energy) * 2
        hold = -12 * np.arctan2(sin, cos) - 3 * speed
        action = np.where(cos > 0.9, hold, pump) * self._gain
        return np.clip(action, -2, 2)[:, None].astype(np.float32), None


def discounted_returns(policy: Any, gamma: float, n_episodes: int = 10, n_steps: int = 300) -> np.ndarray:
    env, returns = gym.make("Pendulum-v1", max_episode_steps=n_steps), []
    for seed in range(n_episodes):
        observation, _ = env.reset(seed=seed)
        total = 0.0
        for step in range(n_steps):
            action, _ = policy.predict(observation[None], deterministic=True)
            observation, reward, *_ = env.step(action[0])
            total += gamma**step * float(reward)
        returns.append(total)
    return np.array(returns)


def test_poor_medium_and_good_policies_are_told_apart_on_pendulum() -> None:
    policies = [Swing(gain) for gain in (-1.0, 0.2, 1.0)]
    truth = [discounted_returns(policy, 0.97).mean() for policy in policies]
    assert truth[0] + 20 < truth[1] < truth[2] - 20, truth
    found = [
        fitted_q_evaluation(policy, "bundled:pendulum-medium", gamma=0.97, gradient_steps=900, net_arch=(64, 64))
        for policy in policies
    ]
    # Pairs by seed; two tests, each wrong with a probability of at most 0.01 where there is no difference in such estimates
    for worse, better in itertools.pairwise(found):
        test = stats.ttest_rel(better.replicates, worse.replicates, alternative="greater")
        assert test.pvalue < 0.01, [one.replicates for one in found]


# What the policy does


def test_policies_are_asked_once_for_each_logged_observation() -> None:
    data = corridor(20)
    policy = Act(lambda observation: float(observation @ [0.1, 0.2, 0.3, 0.4]))
    actions = LoggedData(data, policy).actions_of(policy)
    assert policy.n_resets == 20
    for acted, observations in ((actions.now, data.observations), (actions.after, data.next_observations)):
        assert np.allclose(acted[:, 0], observations @ np.array([0.1, 0.2, 0.3, 0.4]))


def test_algorithms_and_controllers_are_asked_alike() -> None:
    model = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=1, seed=0, device="cpu")
    data = load_dataset("bundled:pendulum-medium").select_episodes([0, 1])

    class One:
        observation_space, action_space = model.observation_space, model.action_space

        def act(self, observation: np.ndarray) -> np.ndarray:
            return np.asarray(model.predict(observation, deterministic=True)[0])

    by_one, by_many = (LoggedData(data, policy).actions_of(policy) for policy in (One(), model))
    assert np.allclose(by_one.now, by_many.now, atol=1e-6) and np.allclose(by_one.after, by_many.after, atol=1e-6)
    # Torques of up to 2 are scaled to [-1, 1]
    expected = np.asarray(model.predict(data.observations, deterministic=True)[0]) / 2
    assert np.allclose(by_many.now, expected, atol=1e-6)


def test_dict_observations_and_images_have_critics_too() -> None:
    rng, n = np.random.default_rng(0), 24
    pictures, numbers = rng.integers(0, 255, (n, 1, 36, 36), dtype=np.uint8), rng.normal(size=(n, 2))
    observations = {"camera": pictures, "joints": numbers}
    space = spaces.Dict(
        {"camera": spaces.Box(0, 255, (1, 36, 36), np.uint8), "joints": spaces.Box(-np.inf, np.inf, (2,), np.float32)}
    )
    data = OfflineDataset.from_columns(
        observations, rng.uniform(-1, 1, (n, 1)), np.ones(n), observations, np.zeros(n), episode_starts=[0, 8, 16],
        observation_space=space, action_space=ACTIONS,
    )  # fmt: skip
    found = fitted_q_evaluation(RIGHT, data, gamma=0.5, gradient_steps=3, n_bootstraps=2, batch_size=8, net_arch=(8,))
    assert np.isfinite(found.replicates).all()
    assert len(coverage(RIGHT, data).distances) == 16


# Coverage


def followed(n_episodes: int = 40) -> OfflineDataset:
    """Actions are half of the observation, with a little noise."""
    rng, n = np.random.default_rng(0), n_episodes * 20
    observations = rng.uniform(-1, 1, size=(n, 1))
    actions = np.clip(0.5 * observations + rng.normal(scale=0.05, size=(n, 1)), -1, 1)
    return OfflineDataset.from_columns(
        observations, actions, np.zeros(n), observations, np.zeros(n), episode_starts=np.arange(0, n, 20),
        observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float32), action_space=ACTIONS,
    )  # fmt: skip


def test_a_policy_like_the_datas_is_covered_and_its_opposite_is_not() -> None:
    like, opposite = (Act(lambda seen, sign=sign: sign * 0.5 * float(seen[0])) for sign in (1.0, -1.0))
    covered, left = (coverage(policy, followed()) for policy in (like, opposite))
    assert covered.outside < 0.1 and not covered.leaves_data
    assert left.outside > 0.7 and left.leaves_data
    assert covered.action_distance == pytest.approx(0.05, rel=0.3)
    # Actions differ by the whole of an observation that is uniform from -1 to 1
    assert left.action_distance == pytest.approx(1 / np.sqrt(3), rel=0.1)
    assert np.mean(covered.own_distances > covered.limit) == pytest.approx(0.05, abs=0.01)
    assert f"{100 * left.outside:.0f} % of its actions" in left.text


def test_states_that_a_policy_visits_count_where_they_are_known() -> None:
    like = Act(lambda seen: 0.5 * float(seen[0]))
    near, far = (
        coverage(like, followed(), visited=np.random.default_rng(1).uniform(at - 1, at + 1, size=(500, 1)).astype(np.float32))
        for at in (0, 10)
    )
    assert near.states_outside is not None and near.states_outside < 0.12 and not near.leaves_data
    assert far.states_outside == 1.0 and far.leaves_data and "100 % of the states" in far.text
    assert coverage(like, followed()).states_outside is None


# The learner's own critics


@pytest.mark.parametrize("algorithm", [TD3, SAC])
def test_own_critics_are_asked_at_the_first_states(algorithm: type[BaseAlgorithm]) -> None:
    model: Any = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=1, seed=0, device="cpu")
    dataset = load_dataset("bundled:pendulum-medium").select_episodes([0, 1, 2])
    starts = dataset.observations[dataset.episode_starts]
    actions = model.policy.scale_action(model.predict(starts, deterministic=True)[0])
    with th.no_grad():
        values = th.cat(model.critic(th.as_tensor(starts), th.as_tensor(actions)), dim=1)
    assert initial_value_of_critics(model, LoggedData(dataset, model)) == pytest.approx(float(values.mean()), abs=1e-5)


def test_critics_with_quantiles_count_by_their_mean_and_policies_without_have_no_opinion() -> None:
    from sb3_contrib import TQC

    dataset = load_dataset("bundled:pendulum-medium").select_episodes([0])
    tqc = TQC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=1, seed=0, device="cpu")
    value = initial_value_of_critics(tqc, LoggedData(dataset, tqc))
    assert value is not None and np.isfinite(value)
    ppo = PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, n_steps=8, batch_size=8, device="cpu")
    assert initial_value_of_critics(ppo, LoggedData(dataset, ppo)) is None
    assert initial_value_of_critics(RIGHT, LoggedData(corridor(2), RIGHT)) is None


# The verdict


def test_a_gross_failure_is_seen_before_a_trial() -> None:
    settings: dict[str, Any] = {"gamma": 0.9, "gradient_steps": 600, "n_bootstraps": 4, "net_arch": (32, 32)}
    worse = data_suffices(LEFT, RIGHT, corridor(), **settings)
    assert worse.gross_failure and "gross failure" in worse.text
    assert worse.estimates["baseline"].estimate.value == pytest.approx(0.81, abs=0.05)
    better = data_suffices(RIGHT, LEFT, corridor(), **settings)
    assert not better.gross_failure and "only episodes are" in better.text and "100 % of the replicates" in better.text


def test_data_that_does_not_cover_a_candidate_does_not_suffice() -> None:
    like, opposite = (Act(lambda seen, sign=sign: sign * 0.5 * float(seen[0])) for sign in (1.0, -1.0))
    settings: dict[str, Any] = {"gamma": 0.5, "gradient_steps": 100, "n_bootstraps": 3, "net_arch": (8,)}
    verdict = data_suffices(opposite, like, followed(), **settings)
    assert not verdict.suffices and "does not cover the candidate" in verdict.text
    verdict = data_suffices(like, like, followed(), **settings)
    assert verdict.suffices and verdict.text.endswith("which states they would reach, it cannot say.")


# The update kernels


@pytest.mark.parametrize("with_weights", [True, False])
def test_kernels_agree_where_critics_learn_different_things(with_weights: bool) -> None:
    generator = th.Generator().manual_seed(0)
    learners = [make(policy_kwargs={"net_arch": [13, 11], "n_critics": 3}) for _ in range(2)]
    rows = [th.randn(16, size, generator=generator) for size in (3, 3)]
    batch = ReplayBufferSamples(rows[0], th.rand(16, 1, generator=generator), rows[1], th.zeros(16, 1), th.zeros(16, 1))
    targets, actions = th.randn(16, 3, generator=generator), th.rand(16, 1, generator=generator) * 2 - 1
    weights = th.rand(16, 3, generator=generator) if with_weights else None
    losses, values = [], []
    for learner, kernel_class in zip(learners, (FastKernel, AutogradKernel), strict=True):
        kernel = kernel_class(learner.policy)
        if isinstance(kernel, FastKernel):
            kernel.prepare()
        for _ in kernel.batches(batch, 16):
            for _ in range(3):
                losses.append(float(kernel.update_critics(targets, weights)))
                kernel.update_targets(0.5, update_actor=False)
            values.append(kernel.q_values_of_next(actions))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    assert values[0].shape == (16, 3) and th.allclose(values[0], values[1], atol=1e-5)


def test_a_weight_of_zero_is_as_if_the_row_were_not_there() -> None:
    learners = [make(policy_kwargs={"net_arch": [8], "n_critics": 2}) for _ in range(2)]
    batch = ReplayBufferSamples(*(th.randn(8, size, generator=th.Generator().manual_seed(1)) for size in (3, 1, 3, 1, 1)))
    changed = batch._replace(observations=batch.observations.clone().index_fill_(0, th.tensor([7]), 5.0))
    weights = th.ones(8, 2)
    weights[7] = 0
    values = []
    for learner, rows in zip(learners, (batch, changed), strict=True):
        kernel = FastKernel(learner.policy)
        kernel.prepare()
        for _ in kernel.batches(rows, 8):
            kernel.update_critics(th.ones(8, 1), weights)
            kernel.update_targets(1.0, update_actor=False)
            values.append(kernel.q_values_of_next(batch.actions))
    assert th.equal(*values)


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gamma": 1.0}, "`gamma` must be at least 0 and less than 1, found 1.0"),
        ({"n_bootstraps": 1}, "`n_bootstraps` must be a whole number of at least 2, found 1"),
        ({"gradient_steps": 0}, "`gradient_steps` must be a whole number of at least 1, found 0"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        fitted_q_evaluation(RIGHT, corridor(3), **settings)


def test_what_does_not_fit_is_named() -> None:
    class TwoActions:
        def act(self, observation: np.ndarray) -> np.ndarray:
            return np.zeros(2)

    with pytest.raises(ValueError, match=r"must be finite and have the shape \(1,\), found \(2,\)"):
        fitted_q_evaluation(TwoActions(), corridor(3))
    with pytest.raises(ValueError, match="some of them not finite"):
        fitted_q_evaluation(Act(lambda _: float("nan")), corridor(3))
    with pytest.raises(ValueError, match="at least two episodes"):
        coverage(RIGHT, corridor(1))
    model = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=1, device="cpu")
    with pytest.raises(ValueError, match="observation"):
        fitted_q_evaluation(model, corridor(3))
    bare = corridor(3)
    unknown = OfflineDataset.from_columns(
        bare.observations, bare.actions, bare.rewards, bare.next_observations, bare.terminations, bare.truncations
    )
    with pytest.raises(ValueError, match="does not say what its spaces are, and neither does the policy"):
        fitted_q_evaluation(RIGHT, unknown)


# The command


def test_the_command_estimates_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    agent, picture = tmp_path / "agent.zip", tmp_path / "estimate.png"
    make(gamma=0.9).save(agent)
    command = ["dataset", "evaluate-policy", "bundled:pendulum-medium?episodes=6", "--agent", str(agent)]
    few = ["--steps", "20", "--bootstraps", "2"]
    result = CliRunner().invoke(app, [*command, *few, "--figure", str(picture)])
    assert result.exit_code == 0, result.output
    for said in ("discounted by 0.9 a step", "95 % interval", "what its own critics say", "farther from the data"):
        assert said in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, [*command, *few, "--json", "--gamma", "0.5"])
    facts = json.loads(result.stdout)
    assert facts["gamma"] == 0.5 and facts["low"] < facts["estimate"] < facts["high"]
    assert facts["own_critics"] is not None
    # 20 steps are far too few, and are said to be
    assert not facts["settled"] and "has not settled" in " ".join(facts["warnings"])


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dataset", "evaluate-policy", "bundled:pendulum-medium", "--agent", "nowhere.zip"])
    assert result.exit_code == 1 and "nowhere.zip" in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("sb3-offline-ft dataset evaluate-policy: ")


# What was measured

ACCURACY = REPOSITORY / "benchmarks" / "off_policy"


def accuracy() -> Any:
    """The benchmark's script."""
    spec = spec_from_file_location("off_policy_accuracy", ACCURACY / "accuracy.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["off_policy_accuracy"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_say_what_the_results_say() -> None:
    """If it fails, run benchmarks/off_policy/accuracy.py --report."""
    script, results = accuracy(), json.loads((ACCURACY / "accuracy.json").read_text())
    assert (ACCURACY / "accuracy.md").read_text() == script.report(results)
    for name, result in results.items():
        assert result["settings"] == script.settings_of(script.TASKS[name])


def test_the_page_says_what_was_measured() -> None:
    script, results = accuracy(), json.loads((ACCURACY / "accuracy.json").read_text())
    page = " ".join((REPOSITORY / "docs" / "off_policy.md").read_text().split())
    cells = {name: sorted(result["cells"].values(), key=lambda cell: cell["true"]) for name, result in results.items()}
    said = {}
    for name, of in cells.items():
        found = stats.spearmanr([cell["true_return"] for cell in of], [cell["estimate"] for cell in of]).statistic
        said[name] = f"{found:.2f} over {len(of)} policies"
    assert f"On Pendulum the rank correlation with the true returns is {said['pendulum']}" in page
    assert f"On Hopper it is {said['hopper']}, with an interval that contains 0" in page
    covered = {name: f"{sum(map(script.covers, of))} of {len(of)}" for name, of in cells.items()}
    assert f"{covered['pendulum']} cover the true value on Pendulum, and {covered['hopper']} on Hopper" in page
    worst, best = cells["pendulum"][:4], cells["pendulum"][4:]
    assert max(cell["estimate"] for cell in worst) < min(cell["estimate"] for cell in best)
    first = worst[0]
    assert f"off by {abs(first['estimate'] - first['true']):.0f} of {abs(first['true']):.0f}" in page
    hopper = cells["hopper"]
    assert f"worth {hopper[0]['true']:.0f}, is estimated at {hopper[0]['estimate']:.0f}" in page
    warned = [cell for cell in hopper if cell["actions_outside"] > script.MOST_OUTSIDE]
    assert f"all {len(warned)} policies with a warning are outside" in page and not any(map(script.covers, warned))
    others = [cell for cell in hopper if cell not in warned]
    assert f"{sum(map(script.covers, others))} of the {len(others)} without one are inside" in page
    unseen = max(others, key=lambda cell: cell["estimate"] - cell["true"])
    assert f"worth {unseen['true']:.0f} and estimated at {unseen['estimate']:.0f}" in page
    assert f"{100 * unseen['states_outside']:.0f} % of the states that it reaches" in page


def test_choosing_checkpoints_was_no_better_than_taking_the_last() -> None:
    results = json.loads((ACCURACY / "accuracy.json").read_text())
    chosen_minus_last = []
    for result in results.values():
        for run, steps in result["settings"]["checkpoints"].items():
            cells = [result["cells"][f"{run}, {wanted} steps"] for wanted in steps]
            chosen = max(cells, key=lambda cell: cell["estimate"])
            chosen_minus_last.append(chosen["true_return"] - cells[-1]["true_return"])
    assert sorted(np.sign(chosen_minus_last)) == [-1, -1, -1, 0]
