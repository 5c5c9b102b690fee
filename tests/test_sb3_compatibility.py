"""What SB3 promises of its TD3 holds for our algorithms: the same results to the bit where they shall be the same."""

import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.td3 import policies as sb3_policies
from torch import nn

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, ReBRAC
from sb3_offline_ft.testing import PointEnv, record
from tests.hooks import last_observations, n_updates

ALGORITHMS = [OfflineTD3, TD3BC, TD3C, ReBRAC]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has neither a dataset nor pretrained weights"),
    pytest.mark.filterwarnings("ignore:.*learns what is best from an EvalCallback"),
    pytest.mark.filterwarnings("ignore:.*would replace the pretrained policy by random actions"),
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)

SMALL = {"net_arch": [16]}
SMALL_IMAGES = {"features_extractor_kwargs": {"features_dim": 8}, **SMALL}
SMALL_DICTS = {"features_extractor_kwargs": {"cnn_output_dim": 8}, **SMALL}
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3, "learning_starts": 20, "batch_size": 8, "buffer_size": 500, "seed": 0, "device": "cpu",
}  # fmt: skip


def make(algorithm: type[TD3], env: Any = None, policy: Any = "MlpPolicy", **settings: Any) -> TD3:
    ours = {"warmup_steps": 0} if issubclass(algorithm, OfflineTD3) else {}
    return algorithm(policy, PointEnv() if env is None else env, **({"policy_kwargs": SMALL} | COMMON | ours | settings))


def finetuning(algorithm: type[OfflineTD3], env: Any = None, **settings: Any) -> OfflineTD3:
    """A learner with data, which pretrains a little and warms up briefly."""
    common = {"dataset": record(PointEnv(), 200), "offline_steps": 10, "warmup_steps": 10, "learning_starts": 100}
    return make(algorithm, env, **(common | settings))


def state(model: TD3) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(value, b[name]) for name, value in a.items())


# The same as SB3's TD3, to the bit


class BatchNormExtractor(BaseFeaturesExtractor):
    """Has running statistics, and dropout."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=4)
        layers = (nn.Flatten(), nn.Linear(observation_space.shape[0], 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2))
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


class CountingReplayBuffer(ReplayBuffer):
    """Counts the batches that are drawn."""

    n_batches = 0

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        type(self).n_batches += 1
        return super().sample(*args, **kwargs)


def several(n: int, space: spaces.Space[Any] | None = None) -> VecEnv:
    return make_vec_env(PointEnv, n, env_kwargs={} if space is None else {"observation_space": space})


def mlp(**more: Any) -> dict[str, Any]:
    return {"policy_kwargs": SMALL | more}


# By name: the environment, and the arguments of the constructor
FEATURES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "nothing special": (PointEnv, {}),
    "several environments": (partial(several, 3), {"gradient_steps": -1}),
    "episodes": (PointEnv, {"train_freq": (1, "episode"), "gradient_steps": -1}),
    "rollouts": (PointEnv, {"train_freq": 5, "gradient_steps": 2}),
    "learning rate schedule": (PointEnv, {"learning_rate": lambda remaining: 3e-3 * remaining}),
    "Ornstein-Uhlenbeck noise": (PointEnv, {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.3 * np.ones(2))}),
    "noise in several environments": (partial(several, 2), {"action_noise": NormalActionNoise(np.zeros(2), np.ones(2))}),
    "n-step returns": (PointEnv, {"n_steps": 3}),
    "n-step returns in several environments": (partial(several, 2), {"n_steps": 4}),
    "policy delay and target noise": (PointEnv, {"policy_delay": 1, "target_policy_noise": 0.5, "target_noise_clip": 0.1}),
    "discount and polyak": (PointEnv, {"gamma": 0.5, "tau": 0.5}),
    "three critics": (PointEnv, mlp(n_critics=3)),
    "one critic": (PointEnv, mlp(n_critics=1)),
    "net_arch": (PointEnv, mlp(net_arch={"pi": [8], "qf": [16, 8]}, activation_fn=nn.Tanh)),
    "linear networks": (PointEnv, mlp(net_arch=[])),
    "optimizer": (PointEnv, mlp(optimizer_class=th.optim.AdamW, optimizer_kwargs={"weight_decay": 0.1, "eps": 1e-3})),
    "SGD": (PointEnv, mlp(optimizer_class=th.optim.SGD, optimizer_kwargs={"momentum": 0.9})),
    "shared features extractor": (PointEnv, mlp(share_features_extractor=True)),
    "batch norm and dropout": (PointEnv, mlp(features_extractor_class=BatchNormExtractor)),
    "VecNormalize": (lambda: VecNormalize(several(2)), {}),
    "VecFrameStack": (lambda: VecFrameStack(several(2), 3), {}),
    "optimize_memory_usage": (
        PointEnv,
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ),
    "time limits that end": (PointEnv, {"replay_buffer_kwargs": {"handle_timeout_termination": False}}),
    "small replay buffer": (PointEnv, {"buffer_size": 30}),
    "replay buffer class": (PointEnv, {"replay_buffer_class": CountingReplayBuffer}),
    "discrete observations": (partial(PointEnv, spaces.Discrete(5)), {}),
    "matrices": (partial(PointEnv, spaces.Box(-1, 1, (2, 3))), {}),
    "wide action bounds": (partial(PointEnv, action_space=spaces.Box(-2, 9, (1,))), {}),
    "images": (partial(PointEnv, IMAGE), {"policy": sb3_policies.CnnPolicy, "policy_kwargs": SMALL_IMAGES}),
    "dictionaries": (
        partial(PointEnv, spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (3,)), "cell": spaces.Discrete(4)})),
        {"policy": sb3_policies.MultiInputPolicy, "policy_kwargs": SMALL_DICTS},
    ),
    "hindsight": (
        partial(BitFlippingEnv, n_bits=4, continuous=True),
        {"policy": sb3_policies.MultiInputPolicy, "replay_buffer_class": HerReplayBuffer},
    ),
}


def run(algorithm: type[TD3], feature: str, **more: Any) -> TD3:
    env, settings = FEATURES[feature]
    return make(algorithm, env(), **({"policy": sb3_policies.MlpPolicy} | settings | more)).learn(80)


@cache
def result_of_sb3(feature: str) -> tuple[dict[str, th.Tensor], int]:
    model = run(TD3, feature)
    return state(model), n_updates(model)


ALSO_FOR_SUBCLASSES = ("nothing special", "several environments", "n-step returns", "batch norm and dropout", "hindsight")


@pytest.mark.parametrize(
    ("algorithm", "feature"),
    [(OfflineTD3, feature) for feature in FEATURES]
    + [(algorithm, feature) for algorithm in ALGORITHMS[1:] for feature in ALSO_FOR_SUBCLASSES],
)
def test_same_as_td3_to_the_bit(algorithm, feature):
    expected, expected_updates = result_of_sb3(feature)
    model = run(algorithm, feature, kernel="autograd")
    assert n_updates(model) == expected_updates > 10
    found = state(model)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not th.equal(value, found[name])] == []


# Replay buffers


@every_algorithm
@pytest.mark.parametrize(
    ("strategy", "observations"),
    [("future", {}), ("final", {"discrete_obs_space": True}), ("episode", {"image_obs_space": True})],
)
def test_hindsight_experience_replay(algorithm, strategy, observations, tmp_path):
    def env() -> VecEnv:
        return DummyVecEnv([partial(BitFlippingEnv, n_bits=4, continuous=True, **observations) for _ in range(2)])

    model = make(
        algorithm, env(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, policy_kwargs=SMALL_DICTS,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": strategy}, train_freq=4, gradient_steps=2,
    ).learn(64)  # fmt: skip
    assert isinstance(model.replay_buffer, HerReplayBuffer) and n_updates(model) > 0
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False, trust_pickle=True)
    assert loaded.replay_buffer.size() == model.replay_buffer.size()
    loaded.learn(16, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80 and loaded.replay_buffer.env is loaded.get_env()


@every_algorithm
def test_replay_buffer_classes(algorithm):
    CountingReplayBuffer.n_batches = 0
    model = make(algorithm, replay_buffer_class=CountingReplayBuffer).learn(60)
    assert type(model.replay_buffer) is CountingReplayBuffer and CountingReplayBuffer.n_batches == n_updates(model) == 40
    own = make(algorithm).learn(30)
    assert isinstance(own.replay_buffer, ReplayBuffer)
    with pytest.raises(ValueError, match="replay_buffer_class"):
        finetuning(algorithm, replay_buffer_class=CountingReplayBuffer)


@every_algorithm
def test_time_limits_are_told_from_terminations(algorithm):
    model = make(algorithm, PointEnv(max_steps=5)).learn(60)
    buffer, n = model.replay_buffer, model.replay_buffer.size()
    ends = buffer.dones[:n, 0].astype(bool)
    assert buffer.timeouts[:n, 0].sum() > 5 and (ends >= buffer.timeouts[:n, 0].astype(bool)).all()
    assert all(float(np.linalg.norm(x)) < 0.15 for x in buffer.next_observations[:n, 0][ends & (buffer.timeouts[:n, 0] == 0)])


@every_algorithm
def test_replay_buffer_keeps_raw_observations_under_vec_normalize(algorithm):
    env = VecNormalize(several(2))
    model = make(algorithm, env).learn(80)
    stored = model.replay_buffer.observations[: model.replay_buffer.size()]
    assert np.abs(stored).max() <= 1.0 < np.abs(last_observations(model)).max() + 1.0
    assert np.allclose(model._last_original_obs, np.stack(env.venv.get_attr("position")), atol=1e-6)
    batch = model.replay_buffer.sample(50, env=env)
    assert float(batch.observations.abs().max()) > 1.0, "normalized when they are drawn"


# Spaces


@every_algorithm
@pytest.mark.parametrize("channel_last", [True, False])
def test_dictionaries_of_images_and_vectors(algorithm, channel_last, tmp_path):
    env = SimpleMultiObsEnv(discrete_actions=False, channel_last=channel_last)
    model = make(algorithm, env, "MultiInputPolicy", policy_kwargs=SMALL_DICTS).learn(40)
    observation, _ = env.reset()
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert np.array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    assert evaluate_policy(loaded, Monitor(SimpleMultiObsEnv(discrete_actions=False)), 2, warn=False)[0] is not None


@every_algorithm
def test_vec_normalize_of_some_keys(algorithm):
    space = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (3,))})
    env = VecNormalize(several(2, space), norm_obs_keys=["vector"])
    model = make(algorithm, env, "MultiInputPolicy", policy_kwargs=SMALL_DICTS).learn(50)
    assert n_updates(model) > 0 and env.obs_rms.keys() == {"vector"}


@every_algorithm
def test_one_key_of_a_dictionary(algorithm):
    space = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (3,))})
    env = VecExtractDictObs(several(2, space), key="vector")
    model = make(algorithm, env).learn(50)
    assert n_updates(model) > 0 and model.observation_space == space["vector"]


@every_algorithm
@pytest.mark.parametrize("channel_first", [True, False])
def test_images(algorithm, channel_first, tmp_path):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=3, discrete=False, channel_first=channel_first)
    model = make(algorithm, env, "CnnPolicy", policy_kwargs=SMALL_IMAGES, buffer_size=100).learn(40)
    assert isinstance(model.get_env(), VecTransposeImage) is not channel_first
    for extractor, target in (
        (model.actor.features_extractor, model.actor_target.features_extractor),
        (model.critic.features_extractor, model.critic_target.features_extractor),
    ):
        assert extractor is not target
        assert any(not th.equal(a, b) for a, b in zip(extractor.parameters(), target.parameters(), strict=True))
    observation, _ = env.reset()
    action, _ = model.predict(observation, deterministic=True)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], action)


@every_algorithm
def test_images_that_are_normalized_already(algorithm):
    env = PointEnv(spaces.Box(0.0, 1.0, (1, 36, 36), np.float32))
    extractor = {"features_dim": 8, "normalized_image": True}
    kwargs = SMALL | {"features_extractor_kwargs": extractor, "normalize_images": False}
    assert n_updates(make(algorithm, env, "CnnPolicy", policy_kwargs=kwargs).learn(40)) > 0


@every_algorithm
def test_shared_features_extractor_is_one(algorithm):
    kwargs = SMALL_IMAGES | {"share_features_extractor": True}
    model = make(algorithm, PointEnv(IMAGE), "CnnPolicy", policy_kwargs=kwargs)
    assert model.actor.features_extractor is model.critic.features_extractor
    assert model.actor_target.features_extractor is model.critic_target.features_extractor
    before = state(model)
    model.learn(40)
    moved = {name for name, value in state(model).items() if not th.equal(value, before[name])}
    assert any(name.startswith("critic.features_extractor") for name in moved)


# Networks in training and evaluation mode


@every_algorithm
def test_acting_changes_no_running_statistics(algorithm):
    """As in SB3's issues about batch norm: statistics move in gradient steps alone, and dropout is off when acting."""
    model = make(algorithm, policy_kwargs=SMALL | {"features_extractor_class": BatchNormExtractor}, learning_starts=0)
    before = state(model)
    training = set()
    model.learn(10, callback=lambda _locals, _globals: training.add(model.policy.training) is None)
    assert training == {False}, "in evaluation mode whenever it acts"
    observation = model.observation_space.sample()
    actions = [model.predict(observation, deterministic=True)[0] for _ in range(5)]
    assert all(np.array_equal(actions[0], action) for action in actions)
    trained = state(model)
    statistics = [name for name in trained if "running_mean" in name]
    assert statistics
    assert any(not th.equal(trained[name], before[name]) for name in statistics)
    for name in statistics:
        if name.startswith("critic."):
            assert th.equal(trained[name], trained[name.replace("critic.", "critic_target.", 1)]), "SB3 copies them to targets"
    frozen = make(algorithm, policy_kwargs=SMALL | {"features_extractor_class": BatchNormExtractor}, learning_starts=1000)
    before = state(frozen)
    frozen.learn(30)
    frozen.predict(observation)
    assert same(state(frozen), before)


@every_algorithm
def test_batch_norm_with_data(algorithm):
    """Offline too, and a pretrained agent acts in evaluation mode."""
    kwargs = SMALL | {"features_extractor_class": BatchNormExtractor}
    with pytest.warns(UserWarning, match="`normalize_observations` is not applied"):
        model = finetuning(algorithm, policy_kwargs=kwargs, warmup_steps=30).pretrain()
    before, training, warm = state(model), set(), []
    assert any(float(value.abs().sum()) > 0 for name, value in before.items() if "running_mean" in name)

    def watch(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        training.add(model.policy.training)
        warm.append(same(state(model), before))
        return True

    model.learn(40, callback=watch)
    assert training == {False} and all(warm[:30]) and not warm[-1]


# Saving and loading


@every_algorithm
def test_saved_parameters_may_be_left_out_or_added(algorithm, tmp_path):
    model = make(algorithm, verbose=0, gamma=0.7)
    model.verbose = 2
    model.save(tmp_path / "without", exclude=["verbose"])
    model.verbose = 0
    assert algorithm.load(tmp_path / "without", device="cpu").verbose == 0
    model.learn(40)
    model.save(tmp_path / "with", include=["replay_buffer"])
    model.save(tmp_path / "plain")
    assert algorithm.load(tmp_path / "plain", device="cpu").replay_buffer.size() == 0
    loaded = algorithm.load(tmp_path / "with", device="cpu")
    assert loaded.gamma == 0.7 and same(state(loaded), state(model))


@every_algorithm
def test_wrong_parameters_are_refused(algorithm):
    model = make(algorithm)
    parameters = model.get_parameters()
    assert set(parameters) == {"policy", "actor.optimizer", "critic.optimizer"}
    with pytest.raises(ValueError):
        model.set_parameters(parameters | {"nonsense": {}})
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        model.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    other = make(algorithm, seed=1)
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    assert same(state(other), state(model))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(algorithm, policy_kwargs={"net_arch": [17]}).set_parameters(parameters)


@every_algorithm
def test_environment_is_exchanged(algorithm, tmp_path):
    model = make(algorithm).learn(30)
    model.save(tmp_path / "model")
    model.set_env(several(1))
    model.learn(20)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(several(2))
    loaded = algorithm.load(tmp_path / "model", env=several(3), device="cpu")
    assert loaded.learn(30).replay_buffer.n_envs == 3
    for env in (PointEnv(spaces.Box(-1, 1, (7,))), PointEnv(action_space=spaces.Box(-9, 9, (2,)))):
        with pytest.raises(ValueError, match="spaces do not match"):
            model.set_env(env)
        with pytest.raises(ValueError, match="spaces do not match"):
            algorithm.load(tmp_path / "model", env=env, device="cpu")


@every_algorithm
@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy", "CnnPolicy"])
def test_policy_alone_is_saved(algorithm, policy, tmp_path):
    space = {"MlpPolicy": None, "CnnPolicy": IMAGE, "MultiInputPolicy": spaces.Dict({"image": IMAGE})}[policy]
    kwargs = {"MlpPolicy": SMALL, "CnnPolicy": SMALL_IMAGES, "MultiInputPolicy": SMALL_DICTS}[policy]
    model = make(algorithm, PointEnv() if space is None else PointEnv(space), policy, policy_kwargs=kwargs).learn(30)
    model.policy.save(tmp_path / "policy")
    policy_class = type(model.policy)
    loaded = policy_class.load(tmp_path / "policy", device="cpu")
    model.observation_space.seed(0)
    for _ in range(3):
        observation = model.observation_space.sample()
        assert np.array_equal(loaded.predict(observation)[0], model.predict(observation)[0])
    actor = type(model.policy.actor)
    model.policy.actor.save(tmp_path / "actor")
    assert isinstance(actor.load(tmp_path / "actor", device="cpu"), actor)


@every_algorithm
def test_system_information_is_printed(algorithm, tmp_path, capsys):
    make(algorithm).save(tmp_path / "model")
    algorithm.load(tmp_path / "model", device="cpu", print_system_info=True)
    shown = capsys.readouterr().out
    assert "CURRENT SYSTEM INFO" in shown and "SAVED MODEL SYSTEM INFO" in shown


@every_algorithm
def test_custom_objects_replace_what_cannot_be_read(algorithm, tmp_path):
    make(algorithm, learning_rate=lambda remaining: remaining).save(tmp_path / "model")
    objects = {"learning_rate": 1e-5, "lr_schedule": lambda _: 1e-5, "gamma": 0.5}
    loaded = algorithm.load(tmp_path / "model", device="cpu", custom_objects=objects)
    assert loaded.learning_rate == 1e-5 and loaded.lr_schedule(1.0) == 1e-5 and loaded.gamma == 0.5


# Runs


@every_algorithm
def test_learns_the_identity(algorithm):
    """SB3's test of learning: the action shall be the observation. An episode has 100 steps, a step at most 1."""
    env = DummyVecEnv([lambda: Monitor(IdentityEnvBox(eps=0.5))])
    env.envs[0].action_space.seed(0)
    model = make(
        algorithm, env, policy_kwargs={"net_arch": [32, 32]}, gamma=0.5, learning_rate=3e-3, batch_size=64,
        learning_starts=100, action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)),
    ).learn(600)  # fmt: skip
    mean, _ = evaluate_policy(model, env, n_eval_episodes=5)
    assert mean > 90


# Without behavior cloning, TD3 overestimates the values of actions that the data lacks
@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALGORITHMS if algorithm is not OfflineTD3])
def test_learns_from_data_alone(algorithm):
    """Pretraining on the data of a fair controller makes a policy that is better than an untrained one."""
    model = finetuning(
        algorithm, dataset=record(PointEnv(), 1000), policy_kwargs={"net_arch": [32, 32]}, learning_rate=3e-3, batch_size=64,
        gamma=0.9,
    )  # fmt: skip

    def mean_return() -> float:
        env = Monitor(PointEnv())
        env.reset(seed=0)
        return float(evaluate_policy(model, env, n_eval_episodes=40)[0])

    untrained = mean_return()
    model.pretrain(400)
    assert mean_return() > max(untrained + 2, -5)


@every_algorithm
@pytest.mark.parametrize("train_freq", [(1, "steps"), ("1", "step"), (1.5, "step"), "episode"])
def test_wrong_train_freq_is_refused(algorithm, train_freq):
    with pytest.raises(ValueError, match="`train_freq`"):
        make(algorithm, train_freq=train_freq)


@every_algorithm
def test_episodes_of_several_environments_are_refused_as_rollouts(algorithm):
    model = make(algorithm, several(2), train_freq=(1, "episode"))
    with pytest.raises(AssertionError, match="only one env"):
        model.learn(20)


@every_algorithm
@pytest.mark.parametrize("dataset", [None, "bundled:pendulum-medium"])
def test_id_of_an_environment(algorithm, dataset):
    model = make(algorithm, "Pendulum-v1", dataset=dataset, offline_steps=3, warmup_steps=3).learn(30)
    assert isinstance(model.get_env(), VecEnv) and model.get_env().envs[0].spec.id == "Pendulum-v1"
    assert isinstance(model.get_env().envs[0], Monitor)
    with pytest.raises(gym.error.Error, match="Pendulm"):
        make(algorithm, "Pendulm-v1", dataset=dataset)


@every_algorithm
def test_runs_in_a_row(algorithm):
    """As in SB3, `learn` counts from 0 or goes on, and returns the model."""
    model = make(algorithm)
    assert model.learn(30) is model
    assert model.learn(25, reset_num_timesteps=False).num_timesteps == 55
    assert model.learn(10).num_timesteps == 10
    assert model.learn(0).num_timesteps == 0


@every_algorithm
def test_several_environments_may_overshoot(algorithm):
    model = finetuning(algorithm, several(3)).learn(40)
    assert model.num_timesteps == 42 and model.replay_buffer.size() == 14
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    assert isinstance(finetuning(algorithm, several(2), action_noise=noise).learn(20).action_noise, VectorizedActionNoise)


# Logs


@every_algorithm
@pytest.mark.parametrize("n_envs", [1, 2])
def test_tables_are_printed(algorithm, n_envs, capsys):
    finetuning(algorithm, several(n_envs), verbose=1).learn(120, log_interval=2)
    shown = capsys.readouterr().out
    for word in ("rollout/", "ep_rew_mean", "total_timesteps", "fps", "train/", "critic_loss", "offline/"):
        assert word in shown, word
    finetuning(algorithm, verbose=0).learn(60, log_interval=2)
    assert capsys.readouterr().out == ""


@every_algorithm
def test_nothing_is_dumped_without_an_interval(algorithm, capsys):
    model = make(algorithm, verbose=1)
    capsys.readouterr()
    model.learn(60, log_interval=None)
    assert "total_timesteps" not in capsys.readouterr().out


@every_algorithm
def test_tensorboard_folders(algorithm, tmp_path):
    """One folder for each run, one more only for a run that begins anew; pretraining writes to its run's."""
    pytest.importorskip("tensorboard")

    def folders() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    name = algorithm.__name__
    model = finetuning(algorithm, tensorboard_log=str(tmp_path))
    model.pretrain(5)
    model.learn(20)
    first = folders()
    assert all(folder.startswith(f"{name}_") for folder in first)
    model.learn(20, reset_num_timesteps=False)
    assert folders() == first
    model.learn(20, tb_log_name="mine")
    assert folders() == first | {"mine_1"}
    model.learn(20, tb_log_name="mine")
    assert folders() == first | {"mine_1", "mine_2"}
    assert all(list((tmp_path / folder).glob("*tfevents*")) for folder in folders())


@every_algorithm
def test_success_rate_and_episode_statistics(algorithm, tmp_path):
    env = DummyVecEnv([lambda: Monitor(BitFlippingEnv(n_bits=2, continuous=True), info_keywords=("is_success",))])
    evaluation = EvalCallback(
        Monitor(BitFlippingEnv(n_bits=2, continuous=True)), eval_freq=30, n_eval_episodes=3, log_path=str(tmp_path), verbose=0
    )
    model = make(algorithm, env, "MultiInputPolicy").learn(60, callback=evaluation)
    assert len(model.ep_info_buffer) > 5 and len(model.ep_success_buffer) > 5
    assert {"r", "l", "t", "is_success"} <= model.ep_info_buffer[0].keys()
    with np.load(tmp_path / "evaluations.npz") as file:
        assert set(file.files) == {"timesteps", "results", "ep_lengths", "successes"}


# Callbacks


@every_algorithm
def test_checkpoints_with_everything(algorithm, tmp_path):
    checkpoints = CheckpointCallback(20, str(tmp_path), "run", save_replay_buffer=True, save_vecnormalize=True)
    env = VecNormalize(several(2), training=False)
    env.training = True
    make(algorithm, env).learn(80, callback=checkpoints)
    names = {path.stem for path in tmp_path.iterdir()}
    assert {"run_40_steps", "run_80_steps", "run_replay_buffer_40_steps", "run_vecnormalize_80_steps"} <= names
    statistics = VecNormalize.load(str(tmp_path / "run_vecnormalize_40_steps.pkl"), several(2))
    loaded = algorithm.load(tmp_path / "run_40_steps", env=statistics, device="cpu")
    loaded.load_replay_buffer(tmp_path / "run_replay_buffer_40_steps.pkl")
    # SB3's callbacks run before a transition is stored
    assert loaded.replay_buffer.size() == 19
    loaded.learn(20, reset_num_timesteps=False)


@every_algorithm
def test_evaluation_shares_the_statistics_of_vec_normalize(algorithm):
    env, other = VecNormalize(several(2)), VecNormalize(several(1), training=False, norm_reward=False)
    make(algorithm, env).learn(60, callback=EvalCallback(other, eval_freq=30, n_eval_episodes=1, verbose=0, warn=False))
    assert np.array_equal(env.obs_rms.mean, other.obs_rms.mean)


@every_algorithm
def test_other_callbacks_in_both_phases(algorithm, capsys):
    model = finetuning(algorithm, verbose=1)
    model.pretrain(10, callback=[LogEveryNTimesteps(5), ProgressBarCallback()])
    model.learn(40, callback=[LogEveryNTimesteps(10), ProgressBarCallback()], log_interval=None)
    stop = StopTrainingOnMaxEpisodes(3, verbose=1)
    model.learn(500, callback=stop)
    assert stop.n_episodes == 3 and model.num_timesteps <= 60
    assert "40/40" in "".join(capsys.readouterr())


@every_algorithm
def test_evaluate_policy(algorithm):
    model = finetuning(algorithm).learn(30)
    env = several(2)
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=6, return_episode_rewards=True)
    assert len(returns) == len(lengths) == 6 and max(lengths) <= 20 and max(returns) <= 0
    seen = []
    evaluate_policy(model, env, n_eval_episodes=2, callback=lambda locals_, _globals: seen.append(locals_["actions"].shape))
    assert set(seen) == {(2, 2)}


@every_algorithm
def test_saving_to_memory_and_back(algorithm):
    model = finetuning(algorithm).learn(30)
    stream, buffer = io.BytesIO(), io.BytesIO()
    model.save(stream)
    model.save_replay_buffer(buffer)
    for each in (stream, buffer):
        each.seek(0)
    loaded = algorithm.load(stream, env=PointEnv(), device="cpu")
    loaded.load_replay_buffer(buffer)
    assert same(state(loaded), state(model)) and loaded.replay_buffer.size() == 30
