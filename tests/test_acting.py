"""Collecting experience: the same actions, transitions and random streams as SB3's TD3, and the same modes of the networks."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from stable_baselines3.td3 import policies as td3_policies
from torch import nn
from torch.nn.utils import parametrizations

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, NormalizedFlattenExtractor

SMALL = {"net_arch": [16, 16]}
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (5,), np.float64)
ACTIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)

pytestmark = pytest.mark.filterwarnings("ignore:.* has neither a dataset nor pretrained weights")


class DictEnv(gym.Env):
    """Observations that are a ``Dict`` of two vectors."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (3,), np.float32), "b": spaces.Box(-1, 1, (2,), np.float64)})
    action_space = spaces.Box(-2.0, 3.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(action.sum()), False, self.steps == 7, {}


class ImageEnv(gym.Env):
    """Observations that are images."""

    observation_space = spaces.Box(0, 255, (40, 40, 1), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.image(), {}

    def step(self, action):
        return self.image(), float(action.sum()), bool(self.np_random.random() < 0.1), False, {}

    def image(self):
        return self.np_random.integers(256, size=(40, 40, 1), dtype=np.uint8)


class Record(BaseCallback):
    """Records what the policy did and whether any network was in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["actions"].copy())
        assert not any(module.training for module in self.model.policy.modules())
        return True


def gather(algorithm, policy="MlpPolicy", env="Hopper-v5", n_envs=1, steps=90, noise=None, normalize=False, **settings):
    """Collects experience without updates; returns all that it leaves behind."""
    vec_env_cls = settings.pop("vec_env_cls", None)
    vec_env = make_vec_env(env, n_envs, seed=3, vec_env_cls=vec_env_cls)
    if normalize:
        vec_env = VecNormalize(vec_env)
    if noise is not None:
        shape = vec_env.action_space.shape
        noise = noise(np.zeros(shape), 0.3 * np.ones(shape))
    model = algorithm(policy, vec_env, gradient_steps=0, action_noise=noise, buffer_size=500, seed=0, device="cpu",
                      **{"learning_starts": 20, "policy_kwargs": SMALL} | settings)  # fmt: skip
    record = Record()
    model.learn(steps, record)
    buffer = model.replay_buffer
    result = {"actions_taken": np.array(record.actions), "size": buffer.size()}
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        stored = getattr(buffer, name)
        for key, values in stored.items() if isinstance(stored, dict) else [("", stored)]:
            result[name + key] = values[: buffer.size()]
    result["numpy"] = np.random.get_state()[1]
    result["torch"] = th.get_rng_state().numpy()
    result["action_space"] = model.action_space.sample()
    vec_env.close()
    return result


def assert_gathers_as_sb3(**settings) -> None:
    theirs, ours = gather(TD3, **settings), gather(OfflineTD3, **settings)
    for name, value in theirs.items():
        # Our buffer keeps observations as float32
        value = np.asarray(value).astype(np.asarray(ours[name]).dtype)
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("noise", [None, NormalActionNoise, OrnsteinUhlenbeckActionNoise])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("env", ["Hopper-v5", "Pendulum-v1"])
def test_gathers_as_sb3(env, n_envs, noise):
    assert_gathers_as_sb3(env=env, n_envs=n_envs, noise=noise)


@pytest.mark.parametrize("noise", [None, NormalActionNoise])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_gathers_as_sb3_with_vec_normalize(n_envs, noise):
    assert_gathers_as_sb3(n_envs=n_envs, noise=noise, normalize=True)


def test_gathers_as_sb3_in_subprocesses():
    assert_gathers_as_sb3(n_envs=2, noise=NormalActionNoise, vec_env_cls=SubprocVecEnv)


def test_gathers_whole_episodes_as_sb3():
    assert_gathers_as_sb3(train_freq=(2, "episode"), noise=NormalActionNoise, learning_starts=0)


@pytest.mark.parametrize("noise", [None, NormalActionNoise])
def test_gathers_dict_observations_as_sb3(noise):
    assert_gathers_as_sb3(policy="MultiInputPolicy", env=DictEnv, n_envs=2, noise=noise)


def test_gathers_images_as_sb3():
    small = {"features_extractor_kwargs": {"features_dim": 16}, "net_arch": [8]}
    assert_gathers_as_sb3(policy="CnnPolicy", env=ImageEnv, n_envs=2, steps=60, policy_kwargs=small)


class Constant(nn.Module):
    """An activation whose result is not to be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", -th.ones(1, 16))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.value


@pytest.mark.parametrize("activation", [nn.Tanh, nn.RReLU, Constant])
def test_gathers_with_other_activations_as_sb3(activation):
    assert_gathers_as_sb3(policy_kwargs=SMALL | {"activation_fn": activation})


@pytest.mark.parametrize("net_arch", [[], [7], {"pi": [9, 9, 9], "qf": [5]}])
def test_gathers_with_other_layers_as_sb3(net_arch):
    assert_gathers_as_sb3(policy_kwargs={"net_arch": net_arch})


def make_policy(kind=MlpPolicy, observations=OBSERVATIONS, actions=ACTIONS, **settings) -> td3_policies.TD3Policy:
    th.manual_seed(0)
    if kind is MlpPolicy:
        settings["layer_norm"] = False
    return kind(observations, actions, lambda _: 1e-3, **SMALL | settings)


def make_both(**settings) -> tuple[MlpPolicy, td3_policies.TD3Policy]:
    """Our policy, which has already acted, and SB3's with the same weights."""
    settings = {"features_extractor_class": NormalizedFlattenExtractor} | settings
    ours, theirs = make_policy(**settings), make_policy(td3_policies.TD3Policy, **settings)
    observations = ours.observation_space
    rng = np.random.default_rng(0)
    if settings["features_extractor_class"] is NormalizedFlattenExtractor:
        for policy in (ours, theirs):
            policy.actor.features_extractor.set_statistics(np.linspace(-1, 2, 5), np.linspace(0.1, 3, 5))
    for _ in range(3):
        assert_acts_alike(ours, theirs, rng.normal(size=(4, *observations.shape)))
    return ours, theirs


def assert_acts_alike(ours: BasePolicy, theirs: BasePolicy, observations: np.ndarray) -> None:
    found, expected = ours.predict(observations), theirs.predict(observations)
    assert found[0].dtype == expected[0].dtype and found[0].shape == expected[0].shape
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] is expected[1] is None
    assert [module.training for module in ours.modules()] == [module.training for module in theirs.modules()]


BATCH = np.random.default_rng(1).normal(size=(6, 5)) * 10


@pytest.mark.parametrize("observations", [
    BATCH, BATCH[:1], BATCH[0], BATCH[:0], BATCH.astype(np.float32), BATCH.astype(np.float16), BATCH.astype(int),
    np.asfortranarray(BATCH), BATCH[::-2], BATCH * 1e300, BATCH * 1e-300, BATCH.astype(np.float32) * np.float32(1e-42),
    np.full((1, 5), np.inf), np.full(5, np.nan), BATCH > 0, BATCH.tolist(), BATCH[0].tolist(),
])  # fmt: skip
@pytest.mark.parametrize("extractor", [FlattenExtractor, NormalizedFlattenExtractor])
def test_actions_are_sb3s_for_any_observations(observations, extractor):
    ours, theirs = make_both(features_extractor_class=extractor)
    assert_acts_alike(ours, theirs, observations)
    if extractor is NormalizedFlattenExtractor:
        assert_acts_alike(ours.double(), theirs.double(), observations)


def replace_layer(policy):
    th.manual_seed(5)
    policy.actor.mu[2] = nn.Linear(16, 16)


def insert_dropout(policy):
    policy.actor.mu.insert(1, nn.Dropout(0.9))


def replace_mlp(policy):
    th.manual_seed(5)
    policy.actor.mu = nn.Sequential(nn.Linear(5, 3), nn.Tanh())


def flip(name):
    def change(policy):
        module = policy.get_submodule(name)
        module.training = not module.training

    return change


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode, whatever it is told."""

    def train(self, mode=True):
        return super().train(False)


def freeze_by_attribute(policy):
    policy.critic.qf0.train = lambda mode=True: policy.critic.qf0


def replace_critic_layer(policy):
    policy.critic.qf1[2] = nn.Sequential(nn.Dropout(), nn.Linear(16, 16)).train()


def extend_critic(policy):
    policy.critic.qf0.append(nn.Dropout().train())


def add_frozen(policy):
    policy.actor.mu.insert(1, Frozen(16).train())


def replace_critic(policy):
    policy.critic = policy.make_critic().train()


def parametrize_layer(policy):
    parametrizations.spectral_norm(policy.critic.qf0[2]).train()


MODES = {
    **{f"flip {name or 'policy'}": flip(name) for name in (
        "", "actor", "actor.mu", "actor.mu.0", "actor.features_extractor.flatten", "critic", "critic.qf0", "critic.qf1.4",
        "actor_target", "critic_target.qf0.2",
    )},
    **{function.__name__: function for function in (
        freeze_by_attribute, replace_critic_layer, extend_critic, add_frozen, replace_critic, parametrize_layer,
        insert_dropout, replace_layer, replace_mlp,
    )},
}  # fmt: skip


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("change", MODES.values(), ids=MODES.keys())
def test_mode_is_sb3s_after_any_change(change, mode):
    ours, theirs = make_both()
    for policy in (ours, theirs):
        policy.set_training_mode(mode)
        change(policy)
        policy.set_training_mode(mode)
    assert [module.training for module in ours.modules()] == [module.training for module in theirs.modules()]
    for policy in (ours, theirs):
        change(policy)
        policy.predict(BATCH)
    assert [module.training for module in ours.modules()] == [module.training for module in theirs.modules()]


def test_mode_that_is_not_a_mode():
    for policy in make_both():
        with pytest.raises(ValueError, match="training mode is expected to be boolean"):
            policy.set_training_mode(1)


def test_batch_norm_follows_the_mode():
    class Normed(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.norm = nn.BatchNorm1d(self.features_dim)

        def forward(self, observations):
            return self.norm(super().forward(observations))

    ours, theirs = make_both(features_extractor_class=Normed)
    for policy in (ours, theirs):
        policy.set_training_mode(True)
        policy.actor(th.as_tensor(BATCH))
    assert_acts_alike(ours, theirs, BATCH)


@pytest.mark.parametrize("name, env, theirs, ours", [
    ("MlpPolicy", lambda: gym.make("Pendulum-v1"), td3_policies.TD3Policy, MlpPolicy),
    ("CnnPolicy", ImageEnv, td3_policies.CnnPolicy, CnnPolicy),
    ("MultiInputPolicy", DictEnv, td3_policies.MultiInputPolicy, MultiInputPolicy),
])  # fmt: skip
def test_files_open_in_both_directions(tmp_path, name, env, theirs, ours):
    small = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8} if name == "CnnPolicy" else None}
    settings = {"policy_kwargs": small, "buffer_size": 50, "seed": 0, "device": "cpu"}
    observation, _ = env().reset(seed=0)
    for saving, loading, kind in ((TD3, OfflineTD3, theirs), (OfflineTD3, TD3, ours), (OfflineTD3, OfflineTD3, ours)):
        saved = saving(name, env(), **settings)
        saved.save(tmp_path / "model")
        loaded = loading.load(tmp_path / "model", env=env(), device="cpu")
        assert type(saved.policy) is type(loaded.policy) is kind
        np.testing.assert_array_equal(saved.predict(observation)[0], loaded.predict(observation)[0])


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_acts_on_a_gpu():
    ours, theirs = make_both()
    assert_acts_alike(ours.cuda(), theirs.cuda(), BATCH)
    assert_acts_alike(ours.cpu(), theirs.cpu(), BATCH)
