"""Every algorithm keeps the contract that the package offers to authors of algorithms, and the contract can be broken."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import TD3
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC
from sb3_offline_ft.offline_td3.updates import Updater
from sb3_offline_ft.testing import CLAUSES, PointEnv, check_algorithm, record
from sb3_offline_ft.testing.spaces import OTHERS_WITH_DATA, VECTORS, WITHOUT_DATA
from sb3_offline_ft.update import AutogradKernel
from tests.conftest import REPOSITORY

ALGORITHMS = [OfflineTD3, TD3BC, TD3C, ReBRAC]


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_contract(algorithm, clause):
    CLAUSES[clause](algorithm)


# Options that have a state of their own, and those by which updates differ
OPTIONS = {
    "adaptive behavior cloning": (TD3BC, {"online_bc": "adaptive"}),
    "balanced replay": (TD3BC, {"replay_buffer_kwargs": {"offline_sampling": "balanced"}}),
    "augmentation": (TD3BC, {"replay_buffer_kwargs": {"augmentation": "gaussian_noise"}}),
    "guide policy": (TD3BC, {"guide_policy": "pretrained", "guide_steps": 5}),
    "n-step returns": (TD3C, {"n_steps": 3}),
    "penalty in the critics": (TD3C, {"constraint_reference": "pretrained", "critic_penalty": 1.0}),
    "averaged policy": (TD3C, {"constraint_reference": "pretrained", "policy_averaging": 0.9}),
    "no trust region": (TD3C, {"constraint_reference": "pretrained", "trust_region": None}),
    "reference that follows": (TD3C, {"constraint_reference": "target"}),
    "subset of critics": (OfflineTD3, {"policy_kwargs": {"n_critics": 4, "target_critics": 2, "actor_value": "mean"}}),
}


OF_OPTIONS = (
    "same_seed_same_result", "targets", "kernels_agree", "save_load", "resumed_pretraining", "resumed_finetuning",
    "dataset_is_found_again", "copies", "snapshot",
)  # fmt: skip


# Priorities of balanced replay belong to the replay buffer, which no snapshot holds
@pytest.mark.parametrize(
    ("option", "clause"), [pair for pair in product(OPTIONS, OF_OPTIONS) if pair != ("balanced replay", "snapshot")]
)
def test_contract_with_options(option, clause):
    algorithm, settings = OPTIONS[option]
    CLAUSES[clause](algorithm, **settings)


# Subclasses with the mistakes that are easily made


class Unsaved(TD3BC):
    """Learns a number that is not saved."""

    def _setup_model(self):
        super()._setup_model()
        self.scale = 1.0

    def _actor_loss(self, batch, actions, q_values):
        self.scale = 0.9 * self.scale + 0.1 * float(q_values.detach().abs().mean())
        return -q_values.mean() / self.scale

    def _excluded_save_params(self):
        return [*super()._excluded_save_params(), "scale"]


class Unseeded(TD3BC):
    """Draws from a generator that no seed reaches."""

    generator = np.random.default_rng()

    def _actor_loss(self, batch, actions, q_values):
        return -float(self.generator.random()) * q_values.mean()


class BootstrapsFromTerminalStates(TD3BC):
    """Forgets that episodes end."""

    def _target_q_values(self, batch):
        return super()._target_q_values(batch._replace(dones=th.zeros_like(batch.dones)))


class ForgetsDiscounts(TD3BC):
    """Knows one-step returns only."""

    def _target_q_values(self, batch):
        return super()._target_q_values(batch._replace(discounts=None))


class TrainsInTheWarmUp(TD3BC):
    """Updates whenever it is asked to."""

    def _may_update(self, batch_size):
        return True


class SavesItsData(TD3BC):
    """Keeps a column of the dataset as an attribute."""

    def load_offline_data(self):
        super().load_offline_data()
        if self.offline_dataset is not None:
            self.rewards_seen = self.offline_dataset.rewards


class RandomPolicy(TD3BC):
    """Explores as if it knew nothing."""

    def _sample_action(self, learning_starts, action_noise=None, n_envs=1):
        return super()._sample_action(10**9, action_noise, n_envs)


class KernelsDiffer(TD3BC):
    """States two objectives."""

    def _actor_loss(self, batch, actions, q_values):
        sign = 1.0 if self.kernel == "autograd" else -1.0
        return sign * q_values.mean()


class SharesItsOptimizer(TD3BC):
    """Gives its tensors away."""

    def set_parameters(self, load_path_or_dict, exact_match=True, device="auto"):
        TD3.set_parameters(self, load_path_or_dict, exact_match, device)
        self.life_cycle.is_pretrained = True


class TakesOfflineRowsAsItLikes(TD3BC):
    """Draws offline rows alone."""

    def _setup_model(self):
        super()._setup_model()
        sample = self.replay_buffer.sample
        self.replay_buffer.sample = lambda batch_size, env=None, fraction=None: sample(batch_size, env, 1.0)


class LogsNothing(TD3BC):
    """Keeps its losses to itself."""

    def _log(self, name, value):
        pass


class AutogradAlone(Updater):
    def choose_kernel(self, learner):
        self.kernel = AutogradKernel(learner.policy)
        return self.kernel


class StaysWithAutograd(TD3BC):
    """Computes all updates in one way, so that there is nothing to compare."""

    def _setup_model(self):
        super()._setup_model()
        self.updater = AutogradAlone()


class ForgetsItsRun(TD3BC):
    """Has a memory of one row."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"buffer_size": 1})


MISTAKES = [
    (Unsaved, "resumed_pretraining"),
    (Unsaved, "resumed_finetuning"),
    (Unsaved, "snapshot"),
    (Unseeded, "same_seed_same_result"),
    (Unseeded, "set_random_seed"),
    (BootstrapsFromTerminalStates, "targets"),
    (ForgetsDiscounts, "targets"),
    (TrainsInTheWarmUp, "phases"),
    (SavesItsData, "files_hold_no_data"),
    (RandomPolicy, "phases"),
    (KernelsDiffer, "kernels_agree"),
    (StaysWithAutograd, "kernels_agree"),
    (ForgetsItsRun, "collapse_guard"),
    (SharesItsOptimizer, "parameters"),
    (TakesOfflineRowsAsItLikes, "offline_fraction"),
    (LogsNothing, "logs"),
]


@pytest.mark.parametrize(("algorithm", "clause"), MISTAKES)
def test_mistake_is_found(algorithm, clause):
    with pytest.raises(AssertionError):
        CLAUSES[clause](algorithm)


# The contract as a whole


class Own(OfflineTD3):
    """A subclass with an option of its own, which passes all others on."""

    def __init__(self, *args, damping=0.0, **kwargs):
        self.damping = damping
        super().__init__(*args, **kwargs)

    def _actor_loss(self, batch, actions, q_values):
        return -q_values.mean() + self.damping * actions.square().mean()


def test_algorithm_with_an_option_of_its_own():
    kept = {"save_load", "resumed_pretraining", "kernels_agree", "exchange", "wrong_data"}
    check_algorithm(Own, skip=CLAUSES.keys() - kept, damping=0.1)


def test_all_broken_clauses_are_told_at_once():
    kept = {"targets", "logs", "predict"}
    with pytest.raises(ExceptionGroup, match="LogsNothing breaks 1 of 3 clauses: logs") as caught:
        check_algorithm(LogsNothing, skip=CLAUSES.keys() - kept)
    (error,) = caught.value.exceptions
    assert isinstance(error, AssertionError) and "train/actor_loss is not logged" in str(error)
    assert error.__notes__ == ["This is about the clause 'logs' of the contract."]


def test_what_is_no_algorithm_or_clause_is_refused():
    for algorithm in (TD3, "td3bc", OfflineTD3("MlpPolicy", PointEnv())):
        with pytest.raises(TypeError, match="The contract is for OfflineTD3 and its subclasses, found"):
            check_algorithm(algorithm)
        with pytest.raises(TypeError, match="The contract is for OfflineTD3 and its subclasses, found"):
            CLAUSES["predict"](algorithm)
    with pytest.raises(ValueError, match=r"`skip` has predictions: the clauses are .*, predict,"):
        check_algorithm(TD3BC, skip=("predictions",))


def test_misspelt_setting_is_told():
    with pytest.raises(TypeError, match="did you mean 'alpha'"):
        CLAUSES["predict"](TD3BC, alhpa=1.0)


# Its environment


@pytest.mark.filterwarnings("ignore:.*A Box observation space m[ai][xn]imum value is -?infinity")
@pytest.mark.parametrize("name", [*VECTORS, *OTHERS_WITH_DATA, *WITHOUT_DATA])
def test_environment_is_a_proper_one(name):
    space = {**VECTORS, **OTHERS_WITH_DATA, **WITHOUT_DATA}[name]
    env = PointEnv(space)
    check_env_for_sb3(env, warn=False)
    check_env(env, skip_render_check=True, skip_close_check=True)
    ends, seen = set(), set()
    for seed in range(20):
        env.reset(seed=seed)
        terminated = truncated = False
        while not (terminated or truncated):
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation) and reward <= 0
            seen.add(flatten(space, observation).tobytes())
        ends.add((terminated, truncated))
    assert len(seen) > 3, "observations depend on the position"
    assert ends == {(True, False), (False, True)}


def test_data_of_the_environment():
    env = PointEnv(action_space=spaces.Box(-2.0, 5.0, (2,), np.float32))
    data = record(env, 200, seed=3)
    again = record(env, 200, seed=3)
    assert len(data) == 200 and data.fingerprint == again.fingerprint != record(env, 200, seed=4).fingerprint
    assert data.terminations.any() and data.truncations.any()
    assert data.actions.min() < -1 and data.actions.max() > 4
    assert data.action_space == env.action_space and data.observation_space == env.observation_space
    # The controller is better than chance
    env.action_space.seed(0)
    returns = []
    for seed in range(30):
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + reward, terminated or truncated
        returns.append(total)
    assert data.episode_returns.mean() > np.mean(returns) + 2


def test_environment_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="PointEnv cannot show a position in Text"):
        PointEnv(spaces.Text(3)).reset()
    env: gym.Env = PointEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="is not in Box"):
        env.step(np.full(2, 3.0, np.float32))


def test_documentation_lists_the_clauses():
    page = (REPOSITORY / "docs" / "custom_algorithms.md").read_text()
    rows = [f"| `{name}` | {check.__doc__.replace('``', '`')} |" for name, check in CLAUSES.items()]
    assert len(rows) == 36 and "\n".join(["|---|---|", *rows, "\n"]) in page
