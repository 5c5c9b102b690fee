"""A guide that begins the training episodes: when it acts, what is stored, and that it survives files."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, LearnerSnapshot, OfflineTD3
from sb3_offline_ft.testing import PointEnv
from tests.hooks import last_observations
from tests.learning import RANDOM_RETURN

ENV = "Pendulum-v1"
DATASET = "bundled:pendulum-medium"
SMALL = {"net_arch": [8, 8]}


def make(env: Any = ENV, algorithm: type[OfflineTD3] = TD3BC, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dataset": DATASET, "policy_kwargs": SMALL, "seed": 0, "device": "cpu", "batch_size": 4}
    defaults |= {"offline_steps": 5, "warmup_steps": 0, "train_freq": 50}
    return algorithm("MlpPolicy", env, **(defaults | settings))


class SwingUp(BasePolicy):
    """Pumps energy into the pendulum until it stands, and holds it there."""

    def __init__(self) -> None:
        high = np.array([1, 1, 8], np.float32)
        super().__init__(spaces.Box(-high, high), spaces.Box(-2.0, 2.0, (1,), np.float32))

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        cos, sin, speed = observation.unbind(dim=1)
        energy = 0.5 * speed**2 / 3 + 5 * (cos - 1)
        pumping = -3.0 * energy * speed.sign()
        holding = -12.0 * th.atan2(sin, cos) - 3.0 * speed
        return th.where(cos > 0.9, holding, pumping).clamp(-2, 2)[:, None]


class Constant(SwingUp):
    """Always the same torque."""

    def __init__(self, torque: float) -> None:
        super().__init__()
        self.torque = torque

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return th.full((len(observation), 1), self.torque)


class Record(BaseCallback):
    """Records at each step what was seen, done and stored, and who the learner would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []
        self.own: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.observations.append(last_observations(self.model).copy())
        self.actions.append(self.locals["actions"].copy())
        self.stored.append(self.locals["buffer_actions"].copy())
        self.own.append(self.model.predict(last_observations(self.model))[0])
        self.dones.append(self.locals["dones"].copy())
        return True


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_guide_acts_in_the_first_steps_of_each_episode(n_envs: int) -> None:
    """In each environment by itself, whose episodes end at different times; what is stored is what was done."""
    lengths = [40, 47, 54][:n_envs]
    env = DummyVecEnv([lambda length=length: Monitor(gym.make(ENV, max_episode_steps=length)) for length in lengths])
    record = Record()
    model = make(env, guide_policy=Constant(1.5), guide_steps=12, gradient_steps=0, train_freq=1)
    model.learn(130 * n_envs, callback=record)
    steps = np.zeros(n_envs, dtype=int)
    for action, stored, own, done in zip(record.actions, record.stored, record.own, record.dones, strict=True):
        expected = np.where((steps < 12)[:, None], 1.5, own)
        np.testing.assert_allclose(action, expected, atol=1e-6)
        np.testing.assert_allclose(stored, expected / 2, atol=1e-6)
        steps = np.where(done, 0, steps + 1)
    assert np.array(record.dones).sum(axis=0).tolist() == [130 // length for length in lengths]
    buffer = model.replay_buffer
    np.testing.assert_allclose(buffer.actions[:130, :, 0], np.array(record.stored)[:, :, 0], atol=1e-6)


def test_the_share_of_the_guide_is_logged() -> None:
    model = make(guide_policy=Constant(0.5), guide_steps=50, gradient_steps=0)
    model.learn(400, log_interval=None)
    # 50 of the 200 steps of an episode
    assert model.logger.name_to_value["rollout/guide_share"] == pytest.approx(0.25)


def test_the_learner_takes_over_by_the_schedule() -> None:
    record = Record()
    make(guide_policy=Constant(1.5), guide_steps="lin_200_0", gradient_steps=0).learn(1000, callback=record)
    guided = np.isclose(np.array(record.actions)[:, 0, 0], 1.5).reshape(5, 200)
    # After k of 1000 steps the guide acts in the first 200 * (1 - k / 1000) of an episode: 167, 133, 100, ... steps
    for episode, row in enumerate(guided):
        length = int(row.sum())
        assert row[:length].all() and not row[length:].any()
        assert length == pytest.approx((200 - 40 * episode) / 1.2, abs=1)


@pytest.mark.parametrize("noise", [False, True])
def test_noise_is_on_the_guides_actions_too(noise: bool) -> None:
    """It is that of the run: none in a warm-up without noise, and actions stay within their bounds."""
    record = Record()
    action_noise = NormalActionNoise(np.zeros(1), 0.2 * np.ones(1)) if noise else None
    model = make(guide_policy=Constant(1.9), guide_steps=200, action_noise=action_noise, warmup_steps=50, gradient_steps=0)
    model.learn(150, callback=record)
    actions = np.array(record.actions).ravel()
    assert np.allclose(actions[:50], 1.9)
    assert np.allclose(actions[50:], 1.9) == (not noise)
    assert np.abs(actions).max() <= 2
    np.testing.assert_allclose(np.array(record.stored).ravel(), actions / 2, atol=1e-6)


def test_without_a_guide_nothing_changes() -> None:
    """Also the streams of random numbers: the same run as with a guide that never acts."""
    runs = []
    for settings in ({}, {"guide_policy": Constant(1.0), "guide_steps": lambda progress_remaining: 0.0}):
        noise = NormalActionNoise(np.zeros(1), 0.2 * np.ones(1))
        model = make(action_noise=noise, train_freq=1, **settings).learn(60)
        runs.append([*model.policy.state_dict().values(), th.as_tensor(model.replay_buffer.actions[:60])])
    for a, b in zip(*runs, strict=True):
        assert th.equal(a, b)


# Pretrained


def same_weights(a: th.nn.Module, b: th.nn.Module) -> bool:
    return all(th.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_the_pretrained_guide_is_the_policy_at_the_start(tmp_path: Path) -> None:
    """It stays while the policy learns, travels with the file, and a run of its own begins with a new one."""
    model = make(guide_policy="pretrained", guide_steps=20, train_freq=1, learning_rate=1e-2).pretrain()
    start = {name: value.clone() for name, value in model.actor.state_dict().items()}
    record = Record()
    model.learn(100, callback=record)
    guide = model.acting.guide
    assert all(th.equal(value, start[name]) for name, value in guide.state_dict().items())
    assert not same_weights(guide, model.actor)
    for step, (observation, action) in enumerate(zip(record.observations, record.actions, strict=True)):
        by_guide = np.allclose(action, guide.predict(observation)[0], atol=1e-6)
        by_learner = np.allclose(action, record.own[step], atol=1e-6)
        assert by_guide if step < 20 else by_learner
    model.save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    assert loaded.guide_policy == "pretrained" and same_weights(guide, loaded.acting.guide)
    loaded.learn(30, reset_num_timesteps=False)
    assert same_weights(guide, loaded.acting.guide)
    latest = {name: value.clone() for name, value in loaded.actor.state_dict().items()}
    loaded.learn(30)
    assert all(th.equal(value, latest[name]) for name, value in loaded.acting.guide.state_dict().items())


def test_a_policy_that_replaced_another_is_the_guide_and_the_reference() -> None:
    settings = {"algorithm": TD3C, "constraint_reference": "pretrained", "guide_policy": "pretrained", "guide_steps": 5}
    model, other = make(seed=0, **settings).pretrain(), make(seed=1, **settings).pretrain()
    model.policy = other.policy
    model.learn(0)
    assert same_weights(model.acting.guide, other.actor) and same_weights(model.reference_actor, other.actor)


class Third(BasePolicy):
    """An action that float32 has no number for."""

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return th.full((len(observation), 2), 1 / 3, dtype=th.float64)


def test_a_guide_acts_as_precisely_as_the_action_space() -> None:
    env = PointEnv(action_space=spaces.Box(-0.7, 0.9, (2,), np.float64))
    record, guide = Record(), Third(env.observation_space, env.action_space)
    model = make(env, dataset=None, offline_steps=0, guide_policy=guide, guide_steps=99, gradient_steps=0, learning_starts=0)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        model.learn(5, callback=record)
    np.testing.assert_allclose(record.actions, 1 / 3, rtol=1e-12)


def test_every_algorithm_takes_the_guide_up(tmp_path: Path) -> None:
    """The zips load into one another, and into SB3's TD3."""
    model = make(guide_policy="pretrained", guide_steps=20, train_freq=1).learn(30)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="the Lagrange multiplier starts at its initial value"):
        loaded = TD3C.load(tmp_path / "model", env=gym.make(ENV))
    assert same_weights(model.acting.guide, loaded.acting.guide)
    TD3.load(tmp_path / "model")


def test_a_rollback_keeps_the_guide() -> None:
    model = make(guide_policy="pretrained", guide_steps=20, train_freq=1, learning_rate=1e-2).learn(30)
    weights = {name: value.clone() for name, value in model.acting.guide.state_dict().items()}
    snapshot = LearnerSnapshot.take(model)
    model.learn(30)
    assert not all(th.equal(value, weights[name]) for name, value in model.acting.guide.state_dict().items())
    snapshot.restore(model)
    assert all(th.equal(value, weights[name]) for name, value in model.acting.guide.state_dict().items())


def test_a_run_that_gets_a_pretrained_guide_on_the_way(tmp_path: Path) -> None:
    make(train_freq=1).learn(30).save(tmp_path / "model")
    model = TD3BC.load(tmp_path / "model", env=gym.make(ENV), guide_policy="pretrained", guide_steps=10)
    before = {name: value.clone() for name, value in model.actor.state_dict().items()}
    model.learn(30, reset_num_timesteps=False)
    assert all(th.equal(value, before[name]) for name, value in model.acting.guide.state_dict().items())


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("before", [Constant(1.5), None])
def test_the_steps_of_a_running_episode_go_on_after_loading(n_envs: int, before: BasePolicy | None, tmp_path: Path) -> None:
    """With ``force_reset=False`` the episode goes on, whether a guide acted in its first part or not."""
    env = make_vec_env(ENV, n_envs, seed=0)
    settings = {} if before is None else {"guide_policy": before, "guide_steps": 20}
    model = make(env, gradient_steps=0, train_freq=1, **settings).learn(15 * n_envs)
    model.save(tmp_path / "model")
    guide = {"guide_policy": Constant(1.5), "guide_steps": 20}
    for unknown, expected in (({}, 5), ({"_episode_steps": np.zeros(0, dtype=int)}, 20)):
        loaded = TD3BC.load(tmp_path / "model", env=env, force_reset=False, custom_objects=unknown, **guide)
        record = Record()
        loaded.learn(30 * n_envs, callback=record, reset_num_timesteps=False)
        guided = np.isclose(np.array(record.actions)[:, :, 0], 1.5)
        # Of a file that does not tell, as of older versions, the episode counts as new
        assert guided.sum(axis=0).tolist() == [expected] * n_envs and guided[:expected].all()


# Files and objects


@pytest.mark.parametrize("algorithm", [TD3, SAC, PPO, TD3BC])
@pytest.mark.parametrize("kind", ["path", "name", "algorithm", "policy"])
def test_a_guide_may_be_any_algorithms(algorithm: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"use_sde": True} if algorithm is PPO else {}
    other = algorithm("MlpPolicy", ENV, policy_kwargs={"net_arch": [6]}, seed=1, device="cpu", **settings)
    other.save(tmp_path / "guide")
    monkeypatch.chdir(tmp_path)
    guide = {"path": tmp_path / "guide.zip", "name": "guide", "algorithm": other, "policy": other.policy}[kind]
    record = Record()
    model = make(guide_policy=guide, guide_steps=1000, gradient_steps=0)
    # A path is found from other folders
    monkeypatch.chdir("/")
    model.learn(20, callback=record)
    for observation, action in zip(record.observations, record.actions, strict=True):
        np.testing.assert_allclose(action, other.predict(observation, deterministic=True)[0], atol=1e-5)


def test_where_the_guide_comes_from_makes_no_difference(tmp_path: Path) -> None:
    """Reading it from a file takes nothing from the learner's random streams."""
    other = SAC("MlpPolicy", ENV, policy_kwargs={"net_arch": [6]}, seed=1, device="cpu")
    other.save(tmp_path / "guide")
    runs = []
    for guide in (other, tmp_path / "guide"):
        model = make(guide_policy=guide, guide_steps=10, train_freq=1).learn(40)
        runs.append(list(model.policy.state_dict().values()))
    for a, b in zip(*runs, strict=True):
        assert th.equal(a, b)


def test_an_object_is_not_saved_and_that_is_said(tmp_path: Path) -> None:
    guide = Constant(1.0)
    model = make(guide_policy=guide, guide_steps=10, train_freq=1).learn(20)
    model.save(tmp_path / "model")
    assert model.guide_policy is guide, "saving does not change the model"
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    loaded.predict(loaded.observation_space.sample())
    with pytest.raises(ValueError, match="given as an object, which a saved model does not hold: pass `guide_policy"):
        loaded.learn(10)
    TD3BC.load(tmp_path / "model", env=gym.make(ENV), guide_policy=guide).learn(10)
    TD3BC.load(tmp_path / "model", env=gym.make(ENV), guide_policy=None, guide_steps=0).learn(10)


def test_the_guide_sees_what_the_learner_sees() -> None:
    """Behind ``VecNormalize`` these are normalized observations."""

    class Remember(Constant):
        seen: list[np.ndarray] = []  # noqa: RUF012

        def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(observation.copy())
            return super().predict(observation, *args, **kwargs)

    env = VecNormalize(make_vec_env(ENV, 2, seed=0), training=False, norm_reward=False)
    env.obs_rms.mean, env.obs_rms.var = np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 4.0])
    record, guide = Record(), Remember(1.0)
    make(env, guide_policy=guide, guide_steps=300, gradient_steps=0, train_freq=1).learn(20, callback=record)
    assert len(guide.seen) == len(record.observations) == 10
    for seen, observation in zip(guide.seen, record.observations, strict=True):
        assert np.array_equal(seen, observation) and float(observation[:, 1].max()) <= -0.5


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"guide_steps": 10}, ValueError, "`guide_steps` is 10 but there is no guide"),
        ({"guide_steps": "lin_10_0"}, ValueError, "`guide_steps` is 'lin_10_0' but there is no guide"),
        ({"guide_policy": "pretrained"}, ValueError, "`guide_policy` has no effect with `guide_steps=0`"),
        ({"guide_policy": "pretrained", "guide_steps": -1}, ValueError, "`guide_steps`"),
        ({"guide_policy": 3, "guide_steps": 1}, TypeError, "`guide_policy` must be 'pretrained', the path of a zip file"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_guides_that_cannot_be_used_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "damaged.zip").write_bytes(b"PK\x03\x04 and nothing else")
    (tmp_path / "text.zip").write_text("no zip file")
    TD3("MlpPolicy", "MountainCarContinuous-v0", policy_kwargs=SMALL, device="cpu").save(tmp_path / "car")
    for name, message in (
        ("damaged", "is damaged or not a zip file saved by a Stable-Baselines3 algorithm"),
        ("text", "is damaged or not a zip file saved by a Stable-Baselines3 algorithm"),
        ("car", "was made for the observation space"),
    ):
        model = make(guide_policy=tmp_path / f"{name}.zip", guide_steps=10)
        with pytest.raises(ValueError, match=message):
            model.learn(10)
        assert model.offline_steps_done == model.num_timesteps == 0
    with pytest.raises(FileNotFoundError, match="missing does not exist: expected 'pretrained' or a zip file"):
        make(guide_policy=tmp_path / "missing", guide_steps=10).learn(10)


def test_there_must_be_a_pretrained_policy_to_guide() -> None:
    model = make(guide_policy="pretrained", guide_steps=10, offline_steps=0)
    with pytest.raises(ValueError, match="`guide_policy='pretrained'` needs a pretrained policy"):
        model.learn(10)


def test_a_good_guide_lifts_the_returns_of_training() -> None:
    """
    A learner from scratch under a guide that swings the pendulum up, with a time of its own at the end.

    Returns of random actions have a standard deviation of about 300: were the guide no better, the mean of two would exceed
    theirs by 700 with a probability below 0.001.
    """
    env = Monitor(gym.make(ENV))
    model = make(env, dataset=None, offline_steps=0, guide_policy=SwingUp(), guide_steps="lin_400_0", learning_starts=0)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        model.learn(1200)
    returns = env.get_episode_rewards()
    assert np.mean(returns[:2]) > RANDOM_RETURN + 700
    assert np.mean(returns[-2:]) < np.mean(returns[:2]), "at the end the learner acts by itself"
