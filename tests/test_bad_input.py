"""Bad input gets one clear error, and nothing is changed."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from torch.nn.utils import parameters_to_vector

from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, OfflineDataset, OfflineTD3
from tests.hooks import last_observations

ENV = "Pendulum-v1"
DATASET = "bundled:pendulum-medium"


def columns(n: int = 20, **changed: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.arange(n) % 10 == 9
    zeros = np.zeros((n, 3), np.float32)
    data = {
        "observations": zeros, "actions": zeros[:, :1], "rewards": zeros[:, 0], "next_observations": zeros,
        "terminations": ends, "truncations": ~ends & False,
    }  # fmt: skip
    return data | changed


def weights(model: OfflineTD3) -> th.Tensor:
    return parameters_to_vector(model.policy.parameters()).detach().clone()


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C])
def test_discrete_actions(algorithm):
    with pytest.raises(ValueError, match=r"needs a Box action space with finite bounds, the environment has Discrete\(2\)"):
        algorithm("MlpPolicy", "CartPole-v1", dataset=DATASET)


@pytest.mark.parametrize("name", ["offline_steps", "warmup_steps", "critic_warmup_steps"])
@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), float("inf"), "many", True, None])
def test_numbers_of_steps(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 0, found"):
        TD3BC("MlpPolicy", ENV, **{name: value})


def test_steps_written_as_floats_in_yaml_are_fine():
    assert TD3BC("MlpPolicy", ENV, offline_steps=1e4).offline_steps == 10_000


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "lin_0.5_2", "half", None])
def test_offline_fraction(value):
    with pytest.raises((ValueError, TypeError), match="`offline_fraction`"):
        TD3C("MlpPolicy", ENV, offline_fraction=value)


def test_negative_budgets():
    model = TD3BC("MlpPolicy", ENV, dataset=DATASET)
    before = weights(model)
    with pytest.raises(ValueError, match="`gradient_steps` must be a whole number of at least 0, found -5"):
        model.pretrain(-5)
    with pytest.raises(ValueError, match="`log_interval` must be a whole number of at least 1, found 0"):
        model.pretrain(5, log_interval=0)
    with pytest.raises(ValueError, match="`total_timesteps` must be a whole number of at least 0, found -5"):
        model.learn(-5)
    assert th.equal(weights(model), before) and model.offline_dataset is None


def test_unknown_keyword_in_the_constructor():
    with pytest.raises(TypeError, match="TD3BC got an unknown keyword 'offline_step': did you mean 'offline_steps'"):
        TD3BC("MlpPolicy", ENV, offline_step=3)
    with pytest.raises(TypeError, match="TD3BC got an unknown keyword 'epsilon'"):
        TD3BC("MlpPolicy", ENV, epsilon=0.1)


def test_pretraining_without_a_dataset():
    with pytest.raises(ValueError, match=r"TD3C\.pretrain needs a dataset, found None"):
        TD3C("MlpPolicy", ENV).pretrain(10)


def test_path_that_is_not_there(tmp_path):
    model = TD3BC("MlpPolicy", ENV, dataset=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No folder or file .*nowhere"):
        model.pretrain(3)


@pytest.mark.parametrize("value", [3, {3}])
def test_dataset_of_another_type(value):
    with pytest.raises(TypeError, match="`dataset` must be a spec such as"):
        TD3BC("MlpPolicy", ENV, dataset=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "`n_steps` must be a whole number of at least 1, found 0"),
        ({"replay_buffer_kwargs": {"n_steps": 3}}, "`replay_buffer_kwargs` has 'n_steps'"),
        ({"replay_buffer_kwargs": {"offline_sampling": "ballanced"}}, "'uniform', 'balanced', found 'ballanced'"),
        ({"replay_buffer_kwargs": {"augmentation": "gausian_noise"}}, "gaussian_noise"),
        ({"optimize_memory_usage": True}, "`optimize_memory_usage` must be False"),
        ({"replay_buffer_kwargs": {"offline_fraction": 0.3}}, "`replay_buffer_kwargs` has 'offline_fraction'"),
        ({"replay_buffer_kwargs": {"seed": 3}}, "`replay_buffer_kwargs` has 'seed'"),
        ({"replay_buffer_class": type("Own", (ReplayBuffer,), {})}, "`replay_buffer_class` must be .* found Own"),
    ],
)
def test_settings_that_logged_data_rules_out(settings, message):
    with pytest.raises(ValueError, match=message):
        TD3BC("MlpPolicy", ENV, dataset=DATASET, **settings)


def test_data_of_another_kind_of_observations():
    class DictEnv(gym.Env):
        observation_space = spaces.Dict({"x": spaces.Box(-1, 1, (2,))})
        action_space = spaces.Box(-1, 1, (1,))

    model = TD3BC("MultiInputPolicy", DictEnv(), dataset=DATASET)
    with pytest.raises(ValueError, match="does not fit the environment"):
        model.pretrain(3)
    assert model.offline_dataset is None


def test_discrete_observations_with_a_dataset():
    class DiscreteEnv(gym.Env):
        observation_space = spaces.Discrete(3)
        action_space = spaces.Box(-1, 1, (1,))

    with pytest.raises(ValueError, match="With a dataset, the environment: observations must be"):
        TD3BC("MlpPolicy", DiscreteEnv(), dataset=DATASET)


@pytest.mark.parametrize("start", ["pretrain", "learn"])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("bundled:hopper-medium", "observation"),
        ("bundled:hoper-medium", "hopper-medium"),
        (columns(actions=np.full((20, 1), 2.5, np.float32)), "2.5"),
        (columns(actions=np.zeros((20, 2), np.float32)), "action"),
    ],
    ids=["other environment", "unknown", "actions beyond the bounds", "action shape"],
)
def test_dataset_that_does_not_fit_changes_nothing(dataset, message, start):
    if isinstance(dataset, dict):
        dataset = OfflineDataset.from_columns(**dataset)
    model = TD3BC("MlpPolicy", ENV, dataset=dataset, offline_steps=10)
    before = weights(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        getattr(model, start)(5)
    assert th.equal(weights(model), before) and model.num_timesteps == model.offline_steps_done == 0
    assert model.offline_dataset is None and model.dataset_fingerprint is None and last_observations(model) is None
    assert all((normalizer.observation_std == 1).all() for normalizer in model.policy.normalizers())


def test_actions_a_rounding_error_beyond_the_bounds_are_clipped():
    dataset = OfflineDataset.from_columns(**columns(actions=np.full((20, 1), 2.0001, np.float32)))
    model = TD3BC("MlpPolicy", ENV, dataset=dataset)
    model.load_offline_data()
    assert (model.replay_buffer.sample(10).actions == 1).all()


def test_action_scaling_is_that_of_the_policy():
    env = gym.make(ENV)
    model = TD3BC("MlpPolicy", env, dataset=DATASET)
    model.load_offline_data()
    recorded = model.offline_dataset.actions
    assert np.abs(recorded).max() > 1.5, "recorded in the environment's units"
    batch = model.replay_buffer.sample(500)
    row_of = {row.tobytes(): index for index, row in enumerate(model.offline_dataset.observations)}
    rows = [row_of[row.tobytes()] for row in batch.observations.numpy()]
    assert batch.actions.numpy() == pytest.approx(model.policy.scale_action(recorded[rows]), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"optimize_memory_usage": True}])
def test_options_of_a_buffer_that_is_not_used(settings):
    class DiscreteEnv(gym.Env):
        observation_space = spaces.Discrete(3)
        action_space = spaces.Box(-1, 1, (1,))

    env = ENV if settings else DiscreteEnv()
    with pytest.raises(ValueError, match="'offline_sampling', an option of OfflineToOnlineReplayBuffer, which is not used"):
        TD3BC("MlpPolicy", env, replay_buffer_kwargs={"offline_sampling": "balanced"}, **settings)


def test_rows_that_belong_together_cannot_be_dropped_which_is_said_before_pretraining():
    model = TD3BC("MlpPolicy", ENV, dataset=DATASET, n_steps=3, offline_steps=5, batch_size=4)
    before = weights(model)
    with pytest.raises(ValueError, match=r"need the rows that follow: .*`poisoned_data='keep'`"):
        model.learn(10, callback=CollapseGuard(poisoned_data="drop"))
    assert th.equal(weights(model), before)
