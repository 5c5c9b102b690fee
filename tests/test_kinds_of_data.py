"""Training on every kind of data, recorded in real environments: goals, images, n-step returns, several sources."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import FlattenObservation, TimeLimit
from scipy import stats
from stable_baselines3 import TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3, load_dataset
from sb3_offline_ft.common.observations import map_observations
from sb3_offline_ft.update import FastKernel
from tests.hooks import n_updates
from tests.test_dict_and_image_data import DrawnPendulum

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "seed": 0, "device": "cpu"}
PENDULUM = "bundled:pendulum-medium"
gym.register_envs(gymnasium_robotics)


def maze() -> gym.Env[Any, Any]:
    return gym.make("PointMaze_UMaze-v3", max_episode_steps=40, continuing_task=False)


def drawn_pendulum() -> gym.Env[Any, Any]:
    return TimeLimit(DrawnPendulum(), 30)


def record(
    make: Callable[[], gym.Env[Any, Any]], act: Callable[[Any], Any], dataset_id: str, episodes: int, jpeg: bool = False
) -> None:
    env = minari.DataCollector(make(), jpeg_encoding=jpeg)
    generator = np.random.default_rng(0)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode, options={"minari_autoseed": False})
        over = False
        while not over:
            action = act(observation) + 0.1 * generator.standard_normal(env.action_space.shape)
            action = np.clip(action, env.action_space.low, env.action_space.high).astype(np.float32)
            observation, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
    with warnings.catch_warnings():
        # Minari asks for an author and a link to the code, and leaves temporary folders to the garbage collector, which warns
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        env.create_dataset(dataset_id, algorithm_name="controller")
        env.close()
        del env
        gc.collect()


def to_goal(observation: dict[str, np.ndarray]) -> np.ndarray:
    return 5.0 * (observation["desired_goal"] - observation["achieved_goal"]) - observation["observation"][2:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Minari datasets recorded in an environment with goals, and in one with images."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        record(maze, to_goal, "maze/controller-v0", episodes=15)
        record(drawn_pendulum, lambda observation: np.ones(1), "drawn/constant-v0", episodes=5)
        record(drawn_pendulum, lambda observation: np.ones(1), "drawn/jpeg-v0", episodes=1, jpeg=True)
    return root


@pytest.fixture
def data(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded))


def cloning_errors(model: OfflineTD3) -> np.ndarray:
    """Squared distances of the policy's actions to those of the dataset, on the policy's scale, one a row."""
    dataset = model.offline_dataset
    assert dataset is not None
    actions, _ = model.predict(map_observations(np.array, dataset.observations), deterministic=True)
    return np.square(model.policy.scale_action(actions) - model.policy.scale_action(dataset.actions)).mean(axis=1)


@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_goals(algorithm: type[OfflineTD3], n_envs: int, data: None, tmp_path: Path) -> None:
    env = DummyVecEnv([maze] * n_envs)
    model = algorithm("MultiInputPolicy", env, dataset="maze/controller-v0", offline_steps=30, warmup_steps=30, **TINY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`constraint_reference='best'`")
        model.learn(200)
    assert model.offline_steps_done == 30 and n_updates(model) > 30
    assert model.policy.has_fitted_normalizer
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = algorithm.load(tmp_path / "model", env=env)
    again.load_replay_buffer(tmp_path / "buffer")
    observation = env.reset()
    np.testing.assert_array_equal(model.predict(observation)[0], again.predict(observation)[0])
    assert again.replay_buffer.online_size == model.replay_buffer.online_size
    again.learn(n_envs * 20, reset_num_timesteps=False)
    TD3.load(tmp_path / "model").predict(observation)


def test_behavior_cloning_learns_from_goals(data: None) -> None:
    # A network that learns nothing would pass with probability below 1e-3
    model = TD3BC("MultiInputPolicy", maze(), dataset="maze/controller-v0", alpha=0.0, seed=0, learning_rate=1e-3)
    model.load_offline_data()
    before = cloning_errors(model)
    model.pretrain(600)
    after = cloning_errors(model)
    assert stats.wilcoxon(after, before, alternative="less").pvalue < 1e-3
    assert after.mean() < 0.5 * before.mean()


def test_goals_in_one_vector(data: None) -> None:
    model = TD3BC("MlpPolicy", FlattenObservation(maze()), dataset="maze/controller-v0", offline_steps=20, **TINY)
    model.pretrain()
    assert isinstance(model.updater.kernel, FastKernel)
    env = FlattenObservation(maze())
    recorded = load_dataset("maze/controller-v0").observations
    assert isinstance(recorded, dict)
    row = {key: values[7] for key, values in recorded.items()}
    dataset = model.offline_dataset
    assert dataset is not None
    np.testing.assert_array_equal(dataset.observations[7], env.observation(row).astype(np.float32))  # type: ignore[index]


def test_images(data: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"offline_steps": 3, "warmup_steps": 10, "batch_size": 16, "buffer_size": 200, **TINY}
    model = TD3BC("CnnPolicy", drawn_pendulum(), dataset="drawn/constant-v0", **settings)
    model.learn(40)
    buffer = model.replay_buffer
    assert buffer.observations.dtype == np.uint8 and buffer.sample(8).observations.dtype == th.uint8
    assert buffer.sample(8).observations.shape == (8, 3, 40, 48)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 1.5 * sum(p.nbytes for p in model.policy.parameters()) * 3
    again = TD3BC.load(tmp_path / "model", env=drawn_pendulum())
    observation = model.get_env().reset()
    np.testing.assert_array_equal(model.predict(observation)[0], again.predict(observation)[0])


def test_images_compressed_by_minari(data: None) -> None:
    with pytest.warns(UserWarning, match="stored as JPEG"):
        lossy = load_dataset("drawn/jpeg-v0")
    exact = load_dataset("drawn/constant-v0", episodes=1)
    assert lossy.observations.dtype == np.uint8 and len(lossy) == len(exact)
    difference = np.abs(lossy.observations.astype(float) - exact.observations)
    assert 0 < difference.mean() < 10


def test_images_are_cloned(data: None) -> None:
    # The recorded torque is 1 of 2, with noise of 0.1: a policy that learns nothing stays near 0
    settings: dict[str, Any] = {"batch_size": 32, "buffer_size": 10, "learning_rate": 1e-3, **TINY}
    model = TD3BC("CnnPolicy", drawn_pendulum(), dataset="drawn/constant-v0", alpha=0.0, **settings)
    model.load_offline_data()
    before = cloning_errors(model).mean()
    model.pretrain(40)
    assert cloning_errors(model).mean() < 0.25 * before


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C])
def test_n_step_returns_with_data(algorithm: type[OfflineTD3], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": PENDULUM, "n_steps": 3, "gamma": 0.9, "warmup_steps": 50, **TINY}
    model = algorithm("MlpPolicy", "Pendulum-v1", **settings).pretrain(10)
    batch = model.replay_buffer.sample(256)
    assert batch.discounts is not None
    assert set(batch.discounts.numpy().round(4).ravel().tolist()) <= {
        np.float32(power).round(4) for power in (0.9, 0.81, 0.729)
    }
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=model.get_env())
    again.pretrain(10)
    model.pretrain(10)
    for ours, theirs in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)
    assert algorithm.load(tmp_path / "model", n_steps=1).replay_buffer.n_steps == 1
    assert algorithm.load(tmp_path / "model", gamma=0.5).replay_buffer.gamma == 0.5


def test_n_step_returns_of_files_of_sb3(tmp_path: Path) -> None:
    TD3("MlpPolicy", "Pendulum-v1", n_steps=3, gamma=0.9, **TINY).save(tmp_path / "theirs")
    model = TD3BC.load(tmp_path / "theirs", dataset=PENDULUM, env=gym.make("Pendulum-v1"))
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.9)
    model.pretrain(3)
    model.save(tmp_path / "ours")
    with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        # It is not: the keywords say the same
        buffer = TD3.load(tmp_path / "ours").replay_buffer
    assert (buffer.n_steps, buffer.gamma) == (3, 0.9)


def test_n_step_returns_do_not_cross_a_reset(tmp_path: Path) -> None:
    model = OfflineTD3("MlpPolicy", "Pendulum-v1", dataset=PENDULUM, n_steps=5, offline_fraction=0.0, **TINY)
    for _ in range(2):
        model.learn(30)
    buffer = model.replay_buffer
    assert buffer.size() == 60 and buffer.timeouts[29].all() and not buffer.dones[29].any()


def test_several_sources(tmp_path: Path) -> None:
    specs = [(f"{PENDULUM}?top_fraction=0.2", 0.7), {"spec": PENDULUM, "max_return": -1000, "weight": 0.3}]
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset=specs, offline_steps=50, warmup_steps=20, **TINY)
    assert model.dataset == f"0.7*{PENDULUM}?top_fraction=0.2 + 0.3*{PENDULUM}?max_return=-1000"
    model.learn(400)
    logs = model.logger.name_to_value
    counts = [value for name, value in logs.items() if name.startswith("replay/")]
    rows = model.replay_buffer.sampled_rows_by_source()
    assert counts == list(rows.values())
    # Two-sided at 1e-6: the share of the first source is 0.7
    assert stats.binomtest(counts[0], sum(counts), 0.7).pvalue > 1e-6
    model.save(tmp_path / "model")
    again = TD3BC.load(tmp_path / "model", env=model.get_env())
    again.pretrain(1)
    assert again.dataset_fingerprint == model.dataset_fingerprint


@pytest.mark.parametrize("interrupted_at", [1, 30, 100])
def test_rows_of_an_interrupted_pretraining_are_counted_once(interrupted_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [(f"{PENDULUM}?top_fraction=0.2", 0.7), (f"{PENDULUM}?max_return=-1000", 0.3)]

    def make() -> TD3BC:
        return TD3BC("MlpPolicy", "Pendulum-v1", dataset=specs, offline_steps=120, batch_size=32, **TINY)

    whole, model = make().pretrain(), make()
    # One gradient step, which has no public name
    update = TD3BC._update

    def stopped(self: TD3BC, batch: Any) -> None:
        if n_updates(self) == interrupted_at:
            raise KeyboardInterrupt
        update(self, batch)

    monkeypatch.setattr(TD3BC, "_update", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.pretrain()
    monkeypatch.undo()
    assert sum(model.replay_buffer.sampled_rows_by_source().values()) == interrupted_at * 32
    model.pretrain()
    assert model.offline_steps_done == 120
    assert model.replay_buffer.sampled_rows_by_source() == whole.replay_buffer.sampled_rows_by_source()
    for ours, theirs in zip(model.policy.parameters(), whole.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_balanced_replay_and_augmentation(n_steps: int, tmp_path: Path) -> None:
    options = {"offline_sampling": "balanced", "augmentation": "gaussian_noise", "balanced_kwargs": {"net_arch": [16]}}
    settings: dict[str, Any] = {"dataset": PENDULUM, "replay_buffer_kwargs": options, "n_steps": n_steps, **TINY}

    def run() -> TD3C:
        model = TD3C("MlpPolicy", "Pendulum-v1", offline_steps=30, warmup_steps=60, constraint_reference="target", **settings)
        return model.learn(300)

    first, second = run(), run()
    assert np.isfinite(first.logger.name_to_value["train/online_offline_divergence"])
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)
    first.save(tmp_path / "model")
    first.save_replay_buffer(tmp_path / "buffer")
    again = TD3C.load(tmp_path / "model", env=first.get_env())
    again.load_offline_data()
    again.load_replay_buffer(tmp_path / "buffer")
    again.learn(50, reset_num_timesteps=False)
    assert np.isfinite(again.logger.name_to_value["train/online_offline_divergence"])


def test_vec_normalize_with_goals(data: None) -> None:
    env = VecNormalize(DummyVecEnv([maze] * 2), norm_reward=False, training=False, norm_obs_keys=["observation"])
    model = TD3BC("MultiInputPolicy", env, dataset="maze/controller-v0", offline_steps=10, warmup_steps=20, **TINY)
    model.learn(100)
    assert not model.policy.has_fitted_normalizer
