"""Recorded agents: what is in the dataset is what the environment saw, and the same seed gives the same data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import rl_zoo3
import torch as th
import yaml
from gymnasium import spaces
from minari.dataset.minari_dataset import EpisodeData
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize

import sb3_offline_ft.zoo
from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.datasets import reference_scores_for
from sb3_offline_ft.datasets.tools.collect import Behaviour, collect_dataset, stop_on_signals
from sb3_offline_ft.datasets.tools.recorder import EpisodeRecorder

pytestmark = pytest.mark.usefixtures("minari_root")


def small(seed: int = 0) -> dict[str, Any]:
    """Arguments for a small agent; SB3 changes the dictionary of a policy's arguments."""
    return {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": seed}


class Corridor(gym.Env[dict[str, Any], Any]):
    """Walk right to the goal: Dict observations, terminations, no time limit, one array that is changed in place."""

    observation_space = spaces.Dict(
        {"goal": spaces.Box(-10, 10, (1,), np.float32), "position": spaces.Box(-10, 10, (1,), np.float32)}
    )
    action_space = spaces.Box(-1, 3, (1,), np.float32)

    def __init__(self, length: float = 5.0) -> None:
        self.length = length
        self.position = np.zeros(1, np.float32)

    def _observe(self) -> dict[str, Any]:
        return {"goal": np.array([self.length], np.float32), "position": self.position}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.position[:] = self.np_random.uniform(0, 1)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.position += action
        np.clip(self.position, -10, 10, out=self.position)
        return self._observe(), -1.0, bool(self.position[0] >= self.length), False, {}


class Drift(gym.Env[Any, Any]):
    """Draws from NumPy's global generator, and hands out the same array again and again."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self) -> None:
        self.state = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state[:] = 0
        return self.state, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.state += np.random.normal(size=2)
        return self.state, float(self.state.sum()), False, False, {}


class Walk(gym.Env[Any, Any]):
    """Counts its steps since the reset; ends by itself with a probability."""

    observation_space = spaces.Box(0, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, end: float = 0.0) -> None:
        self.end, self.n_steps = end, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return np.array([self.n_steps], np.float32), 1.0, bool(self.np_random.random() < self.end), False, {}


class EndAt(gym.Wrapper[Any, Any, Any, Any]):
    """Ends episodes when the environment has taken so many steps, as wrappers that know when a task is solved do."""

    def __init__(self, env: gym.Env[Any, Any], n_steps: int, terminated: bool = True, resets: bool = True) -> None:
        super().__init__(env)
        self.n_steps, self.terminated, self.resets = n_steps, terminated, resets
        self.last: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        # As wrappers that take the loss of a life for an end: the environment goes on
        return self.env.reset(**options) if self.resets or self.last is None else (self.last, {})

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.last, reward, terminated, truncated, info = self.env.step(action)
        ends = self.last[0] % self.n_steps == 0
        return self.last, reward, terminated or (ends and self.terminated), truncated or (ends and not self.terminated), info


class GoOn(gym.Wrapper[Any, Any, Any, Any]):
    """Hides the ends of the environment; may reset it behind the agent's back."""

    def __init__(self, env: gym.Env[Any, Any], resets: bool = False) -> None:
        super().__init__(env)
        self.resets = resets

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.resets and (terminated or truncated):
            observation, _ = self.env.reset()
        return observation, reward, False, False, info


class TwoStepsAtOnce(gym.Wrapper[Any, Any, Any, Any]):
    """Repeats actions."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        _, first, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            return _, first, terminated, truncated, info
        observation, second, terminated, truncated, info = self.env.step(action)
        return observation, first + second, terminated, truncated, info


class VecEndAt(VecEnvWrapper):
    """Ends episodes of a vectorised environment, which it resets."""

    def __init__(self, venv: VecEnv, n_steps: int = 3) -> None:
        super().__init__(venv)
        self.n_steps, self.taken = n_steps, 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.taken = 0 if dones[0] else self.taken + 1
        if self.taken == self.n_steps:
            infos[0] |= {"terminal_observation": observations[0], "TimeLimit.truncated": True}
            observations, dones[0], self.taken = self.venv.reset(), True, 0
        return observations, rewards, dones, infos


@pytest.fixture(scope="module", autouse=True)
def environments() -> Any:
    gym.register("TestCorridor-v0", Corridor, disable_env_checker=True)
    gym.register("TestDrift-v0", Drift, disable_env_checker=True, max_episode_steps=20)
    gym.register("TestWalk-v0", Walk, disable_env_checker=True)
    yield
    del gym.registry["TestCorridor-v0"], gym.registry["TestDrift-v0"], gym.registry["TestWalk-v0"]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SAC for Pendulum, whose mean actions are far from the bounds."""
    path = tmp_path_factory.mktemp("agent") / "sac.zip"
    model = SAC("MlpPolicy", "Pendulum-v1", **small())
    with th.no_grad():
        model.actor.mu.weight.mul_(0.1)
    model.save(path)
    return path


def episodes_of(dataset_id: str) -> list[EpisodeData]:
    return list(minari.load_dataset(dataset_id).iterate_episodes())


class TestReproducibility:
    def test_the_same_seed_gives_the_same_data(self, agent: Path) -> None:
        behaviour = Behaviour(noise_std=0.1, epsilon=0.2)
        for index, seed in enumerate((3, 3, 4)):
            collect_dataset(f"my/data-v{index}", "Pendulum-v1", agent=agent, n_steps=300, seed=seed, behaviour=behaviour)
            np.random.seed(index)  # Whatever happens between two collections does not matter
        one, same, other = (load_dataset(f"my/data-v{index}") for index in range(3))
        assert one.fingerprint == same.fingerprint != other.fingerprint

    def test_every_episode_can_be_replayed_from_its_seed(self, agent: Path) -> None:
        made = collect_dataset("my/data-v0", "Pendulum-v1", agent=agent, n_episodes=3, seed=7)
        dataset = minari.load_dataset("my/data-v0")
        env = dataset.recover_environment()
        facts = dataset.storage.get_episode_metadata(range(3))
        for index, (episode, fact) in enumerate(zip(dataset.iterate_episodes(), facts, strict=True)):
            assert fact["seed"] == derive_seed(7, index)
            observation, _ = env.reset(seed=fact["seed"])
            total = 0.0
            for step, action in enumerate(episode.actions):
                assert (observation == episode.observations[step]).all()
                observation, reward, _, truncated, _ = env.step(action)
                assert reward == episode.rewards[step] and truncated == episode.truncations[step]
                total += float(reward)
            assert (observation == episode.observations[-1]).all()
            assert total == pytest.approx(made.returns[index])

    def test_environments_that_draw_from_global_generators(self) -> None:
        for index in range(2):
            collect_dataset(f"my/d-v{index}", "TestDrift-v0", algorithm="random", n_steps=60, seed=2)
        one, same = (load_dataset(f"my/d-v{index}") for index in range(2))
        assert one.fingerprint == same.fingerprint and one.n_episodes == 3
        assert one.rewards == pytest.approx(one.next_observations.sum(axis=1), abs=1e-4)  # type: ignore[union-attr]
        assert (one.observations[one.episode_starts] == 0).all()  # type: ignore[call-overload]

    def test_deterministic_and_stochastic_actions(self, agent: Path) -> None:
        model = SAC.load(agent, device="cpu")
        for behaviour, is_mean in ((Behaviour(deterministic=True), True), (Behaviour(), False)):
            collect_dataset("my/d-v0", "Pendulum-v1", agent=agent, n_steps=200, behaviour=behaviour, overwrite=True)
            (episode,) = episodes_of("my/d-v0")
            mean, _ = model.predict(episode.observations[:-1], deterministic=True)
            assert np.allclose(episode.actions, mean, atol=1e-5) is is_mean


class TestBehaviour:
    def test_noise_is_in_units_of_the_bounds(self, agent: Path) -> None:
        behaviour = Behaviour(deterministic=True, noise_std=0.05)
        collect_dataset("my/d-v0", "Pendulum-v1", agent=agent, n_steps=2_000, behaviour=behaviour)
        data = load_dataset("my/d-v0")
        mean, _ = SAC.load(agent, device="cpu").predict(data.observations, deterministic=True)
        # Pendulum's bounds are -2 and 2: far from them nothing is clipped. The tolerances are 5 standard errors
        assert np.abs(mean).max() < 1.4
        noise = data.actions - mean
        assert noise.std() == pytest.approx(0.1, rel=5 / np.sqrt(2 * len(noise)))
        assert abs(noise.mean()) < 5 * 0.1 / np.sqrt(len(noise))

    def test_epsilon_is_the_share_of_random_actions(self, agent: Path) -> None:
        behaviour = Behaviour(deterministic=True, epsilon=0.3)
        collect_dataset("my/d-v0", "Pendulum-v1", agent=agent, n_steps=1_000, behaviour=behaviour)
        data = load_dataset("my/d-v0")
        mean, _ = SAC.load(agent, device="cpu").predict(data.observations, deterministic=True)
        differs = (np.abs(data.actions - mean) > 1e-4)[:, 0]
        # 5 standard deviations of a binomial share
        assert differs.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / 1_000))
        # Uniform over the bounds: 5 standard errors of the standard deviation of a uniform one, about 0.65 / sqrt(n)
        assert data.actions[differs].std() == pytest.approx(2 / np.sqrt(3), abs=5 * 0.65 / np.sqrt(differs.sum()))

    def test_random_actions_cover_the_bounds(self) -> None:
        made = collect_dataset("my/r-v0", "Pendulum-v1", algorithm="random", n_steps=1_000)
        data = load_dataset("my/r-v0")
        assert -2 <= data.actions.min() < -1.95 and 1.95 < data.actions.max() <= 2
        assert data.actions.std() == pytest.approx(2 / np.sqrt(3), abs=5 * 0.65 / np.sqrt(1_000))
        assert made.transitions == len(data) == 1_000 and data.provenance["algorithm"] == "uniformly random"

    @pytest.mark.parametrize("wrong", [{"noise_std": -0.1}, {"epsilon": 1.5}, {"noise_std": float("nan")}])
    def test_impossible_behaviour_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="must be"):
            Behaviour(**wrong)


class TestWhatIsRecorded:
    def test_steps_are_rounded_up_to_whole_episodes(self, agent: Path) -> None:
        made = collect_dataset("my/d-v0", "Pendulum-v1", agent=agent, n_steps=250)
        data = load_dataset("my/d-v0")
        assert made.transitions == 400 and data.episode_lengths.tolist() == [200, 200]
        assert data.episode_returns == pytest.approx(made.returns) and not made.interrupted

    def test_dict_observations_and_an_environment_without_time_limit(self) -> None:
        collect_dataset("my/c-v0", "TestCorridor-v0", algorithm="random", n_steps=50, seed=1)
        data = load_dataset("my/c-v0")
        assert len(data) == 50, "without a time limit the last episode is cut"
        collect_dataset("my/whole-v0", "TestCorridor-v0", algorithm="random", n_episodes=2, seed=1)
        cut, whole = (minari.load_dataset(f"my/{name}-v0").storage.metadata["description"] for name in ("c", "whole"))
        assert "whole episodes, but the last one may be cut once there are 50 steps, seed 1" in cut
        assert "whole episodes, seed 1" in whole
        assert isinstance(data.observations, dict) and isinstance(data.next_observations, dict)
        position, following = data.observations["position"], data.next_observations["position"]
        # The environment hands out the same array again and again
        assert following == pytest.approx(np.clip(position + data.actions, -10, 10))
        assert (data.terminations == (following[:, 0] >= 5)).all()
        assert data.n_episodes > 3 and data.env_id == "TestCorridor-v0"

    def test_an_environment_that_cannot_be_named_is_left_out_with_a_warning(self) -> None:
        gym.register("TestNameless-v0", lambda: Corridor(), disable_env_checker=True)
        try:
            with pytest.warns(UserWarning, match=r"TestNameless-v0 cannot be recovered .*entry_point='module:Class'"):
                collect_dataset("my/c-v0", "TestNameless-v0", algorithm="random", n_steps=5)
            assert len(load_dataset("my/c-v0")) == 5 and load_dataset("my/c-v0").env_id is None
        finally:
            del gym.registry["TestNameless-v0"]

    def test_the_metadata_say_how(self, agent: Path, minari_root: Path) -> None:
        collect_dataset(
            "my/pendulum/d-v0", "Pendulum-v1", agent=agent, n_steps=200, seed=5, facts={"author": "A. Uthor"},
            behaviour=Behaviour(noise_std=0.25), command="sb3-offline-ft dataset collect ...",
        )  # fmt: skip
        metadata = minari.load_dataset("my/pendulum/d-v0").storage.metadata
        for text in ("Pendulum-v1", "sac.zip", "SHA-256", "0.25", "seed 5", "dataset collect ...", "gymnasium 1."):
            assert text in metadata["description"]
        assert metadata["algorithm_name"] == "SAC (stable-baselines3)" and metadata["author"] == {"A. Uthor"}
        assert metadata["requirements"] == [f"gymnasium=={gym.__version__}"]
        scores = reference_scores_for("Pendulum-v1")
        assert scores is not None
        assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (scores.random, scores.expert)
        assert not [path for path in minari_root.rglob("*") if path.name.startswith((".", "tmp"))]

    def test_wrappers_of_the_agent_are_not_in_the_data(self) -> None:
        """A Monitor, as SB3 puts one around every environment, cannot be recovered."""
        from stable_baselines3.common.monitor import Monitor

        recorder = EpisodeRecorder(Monitor(gym.make("Pendulum-v1")), seed=3)
        assert recorder.env.spec == gym.spec("Pendulum-v1")
        first, _ = recorder.reset(seed=99)
        again, _ = gym.make("Pendulum-v1").reset(seed=derive_seed(3, 0))
        assert (first == again).all()
        recorder.step(np.zeros(1, np.float32))
        recorder.end(terminated=False)
        assert len(recorder.complete) == 1 and recorder.complete[0].truncations[-1]
        recorder.end(terminated=False)
        assert len(recorder.complete) == 1, "there is nothing more to cut"


def save_run(
    folder: Path, algorithm: str, env_id: str, model: BaseAlgorithm, config: dict[str, Any], env_kwargs: Any = None
) -> Path:
    """Writes what ``python -m rl_zoo3.train`` leaves behind."""
    run = folder / algorithm / f"{env_id}_1"
    (run / env_id).mkdir(parents=True)
    model.save(run / f"{env_id}.zip")
    (run / env_id / "config.yml").write_text(yaml.dump(config))
    (run / env_id / "args.yml").write_text(yaml.dump({"env_kwargs": env_kwargs}))
    return run


class TestZoo:
    def test_vecnormalize_is_for_the_agent_only(self, tmp_path: Path) -> None:
        venv = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), norm_reward=True)
        model = TD3("MlpPolicy", venv, learning_starts=300, **small())
        model.learn(300)
        run = save_run(tmp_path, "td3", "Pendulum-v1", model, {"normalize": "{'norm_obs': True, 'norm_reward': True}"})
        venv.save(run / "Pendulum-v1" / "vecnormalize.pkl")
        collect_dataset("my/n-v0", "Pendulum-v1", algorithm="td3", log_folder=tmp_path, n_steps=200)
        data = load_dataset("my/n-v0")
        # Speeds and rewards are those of the environment; the actions are the agent's for normalised observations
        assert np.abs(data.observations[:, 2]).max() > 2 and data.rewards.min() < -3
        expected, _ = model.predict(venv.normalize_obs(data.observations.astype(np.float64)), deterministic=True)
        assert data.actions == pytest.approx(expected, abs=1e-4)
        assert not np.allclose(data.actions, model.predict(data.observations, deterministic=True)[0], atol=1e-2)
        # The same agent as a file, its statistics named
        (tmp_path / "lone").mkdir()
        lone = tmp_path / "lone" / "agent.zip"
        model.save(lone)
        statistics = run / "Pendulum-v1" / "vecnormalize.pkl"
        collect_dataset("my/n-v1", "Pendulum-v1", algorithm="td3", agent=lone, vecnormalize=statistics, n_steps=200)
        assert load_dataset("my/n-v1").fingerprint == data.fingerprint
        with pytest.raises(ValueError, match="has its own VecNormalize"):
            collect_dataset("my/n-v2", "Pendulum-v1", algorithm="td3", log_folder=tmp_path, vecnormalize=statistics, n_steps=1)
        with pytest.raises(FileNotFoundError, match="No VecNormalize"):
            collect_dataset("my/n-v2", "Pendulum-v1", agent=lone, vecnormalize=tmp_path / "no.pkl", n_steps=1)

    @pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
    def test_wrappers_and_arguments_of_the_run_are_used(self, tmp_path: Path) -> None:
        env = gym.wrappers.FlattenObservation(gym.make("TestCorridor-v0"))
        wrapped = gym.wrappers.RescaleAction(env, -1.0, 1.0)
        model = SAC("MlpPolicy", wrapped, **small())
        config = {
            "env_wrapper": [
                "gymnasium.wrappers.FlattenObservation",
                {"gymnasium.wrappers.RescaleAction": {"min_action": -1.0, "max_action": 1.0}},
            ]
        }
        save_run(tmp_path, "sac", "TestCorridor-v0", model, config, env_kwargs={"length": 2.5})
        collect_dataset("my/w-v0", "TestCorridor-v0", algorithm="sac", log_folder=tmp_path, n_steps=40)
        data = load_dataset("my/w-v0")
        # Recorded are the environment's own observations and actions
        assert isinstance(data.observations, dict) and (data.observations["goal"] == 2.5).all()
        assert data.actions.min() >= -1 and data.actions.max() > 1
        dataset = minari.load_dataset("my/w-v0")
        assert dataset.action_space == Corridor.action_space
        assert dataset.recover_environment().unwrapped.length == 2.5  # type: ignore[attr-defined]

    def test_episodes_that_an_outer_wrapper_ends_are_kept(self, tmp_path: Path) -> None:
        """A walk that ends with probability 0.1, or at the tenth step by the zoo's env_wrapper."""
        data = self.collected(tmp_path, {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 10}}, 0.1, n_episodes=600)
        lengths, expected = data.episode_lengths, (1 - 0.9**10) / 0.1
        deviation = np.sqrt(np.mean((np.minimum(np.random.default_rng(0).geometric(0.1, 100_000), 10) - expected) ** 2))
        assert lengths.mean() == pytest.approx(expected, abs=5 * deviation / np.sqrt(600))
        ends = data.episode_starts + lengths - 1
        assert data.n_episodes == 600 and lengths.max() == 10
        assert (data.terminations[ends] != data.truncations[ends]).all() and data.truncations[ends][lengths < 10].sum() == 0
        assert 0 < data.terminations[ends][lengths == 10].sum() < data.truncations.sum()

    @pytest.mark.parametrize(
        ("wrappers", "end", "length", "ends"),
        [
            ([{"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 7}}], 0.0, 7, "truncations"),
            ([{"EndAt": {"n_steps": 4}}], 0.0, 4, "terminations"),
            ([{"EndAt": {"n_steps": 4, "terminated": False}}], 0.0, 4, "truncations"),
            # The end is not the environment's, which is not reset: the next episode goes on where it is
            ([{"EndAt": {"n_steps": 4, "resets": False}}], 0.0, 4, "terminations"),
            # What the environment says of an end does not count where the agent does not see it
            (["GoOn", {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 9}}], 1.0, 9, "truncations"),
            ([{"GoOn": {"resets": True}}], 1.0, 1, "terminations"),
            (["TwoStepsAtOnce", {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 3}}], 0.0, 6, "truncations"),
            ([{"EndAt": {"n_steps": 5}}, "TwoStepsAtOnce"], 0.0, 5, "terminations"),
        ],
    )
    def test_the_ends_are_those_that_the_agent_sees(
        self, wrappers: list[Any], end: float, length: int, ends: str, tmp_path: Path
    ) -> None:
        data = self.collected(tmp_path, wrappers, end, n_episodes=4)
        assert data.episode_lengths.tolist() == [length] * 4
        assert (np.flatnonzero(getattr(data, ends)) == data.episode_starts + data.episode_lengths - 1).all()
        assert not (data.terminations if ends == "truncations" else data.truncations).any()
        assert isinstance(data.observations, np.ndarray) and isinstance(data.next_observations, np.ndarray)
        assert (data.next_observations == data.observations + 1).all(), "they are the environment's own, in their order"

    def test_the_last_episode_is_completed_up_to_a_time_limit_of_the_agent(self, tmp_path: Path) -> None:
        limit = {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 7}}
        assert self.collected(tmp_path / "a", limit, 0.0, n_steps=18).episode_lengths.tolist() == [7, 7, 7]
        cut = self.collected(tmp_path / "b", {"EndAt": {"n_steps": 7}}, 0.0, n_steps=18)
        assert cut.episode_lengths.tolist() == [7, 7, 4] and np.flatnonzero(cut.truncations).tolist() == [17]
        # A limit that the agent never sees does not make it go on for ever
        hidden = self.collected(tmp_path / "c", [limit, "GoOn"], 0.0, n_steps=18)
        assert len(hidden) < 30 and hidden.truncations.sum() == 1

    def test_ends_that_a_wrapper_of_the_vectorised_environment_makes(self, tmp_path: Path) -> None:
        config = {"frame_stack": 2, "normalize": False, "vec_env_wrapper": f"{__name__}.VecEndAt"}
        data = self.collected(tmp_path, [{"EndAt": {"n_steps": 2}}], 0.0, n_steps=8, config={"frame_stack": 2})
        assert data.episode_lengths.tolist() == [2, 2, 2, 2] and data.observation_space == Walk.observation_space
        data = self.collected(tmp_path / "vec", [], 0.0, n_steps=9, config=config)
        assert data.episode_lengths.tolist() == [3, 3, 3] and data.truncations.sum() == 3

    def collected(
        self, folder: Path, wrappers: Any, end: float, config: dict[str, Any] | None = None, **amount: int
    ) -> OfflineDataset:
        """What an agent with these wrappers records in a walk."""
        listed = wrappers if isinstance(wrappers, list) else [wrappers]
        named = [
            {(name if "." in name else f"{__name__}.{name}"): options}
            for one in listed
            for name, options in (one if isinstance(one, dict) else {one: {}}).items()
        ]
        frames = (config or {}).get("frame_stack", 1)
        env = gym.make("TestWalk-v0")
        model = SAC("MlpPolicy", VecFrameStack(DummyVecEnv([lambda: env]), frames) if frames > 1 else env, **small())
        save_run(folder, "sac", "TestWalk-v0", model, {"env_wrapper": named, **(config or {})}, env_kwargs={"end": end})
        collect_dataset("my/walk-v0", "TestWalk-v0", algorithm="sac", log_folder=folder, overwrite=True, **amount)  # type: ignore[arg-type]
        return load_dataset("my/walk-v0")

    def test_best_model_and_our_algorithms(self, tmp_path: Path) -> None:
        sb3_offline_ft.zoo.register()
        for algorithm in ("td3bc", "td3c"):
            model = rl_zoo3.ALGOS[algorithm]("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", **small())
            run = save_run(tmp_path, algorithm, "Pendulum-v1", model, {})
            other = rl_zoo3.ALGOS[algorithm]("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", **small(seed=1))
            other.save(run / "best_model.zip")
            for load_best, expected in ((False, model), (True, other)):
                collect_dataset(
                    "my/z-v0", "Pendulum-v1", algorithm=algorithm, log_folder=tmp_path, load_best=load_best, n_steps=200,
                    overwrite=True,
                )  # fmt: skip
                data = load_dataset("my/z-v0")
                assert data.actions == pytest.approx(expected.predict(data.observations, deterministic=True)[0], abs=1e-4)
                assert str(data.provenance["algorithm"]).endswith("(sb3-offline-ft)")

    def test_missing_and_wrong_agents(self, agent: Path, tmp_path: Path) -> None:
        def collect(**options: Any) -> None:
            collect_dataset("my/x-v0", options.pop("env_id", "Pendulum-v1"), n_steps=10, **options)

        with pytest.raises(FileNotFoundError, match=r"No trained agent: .*--agent"):
            collect(algorithm="sac", log_folder=tmp_path)
        with pytest.raises(FileNotFoundError, match="No agent"):
            collect(agent=tmp_path / "missing.zip")
        with pytest.raises(ValueError, match="Name the agent's algorithm, one of random, "):
            collect()
        with pytest.raises(ValueError, match="Unknown algorithm 'sacc'"):
            collect(algorithm="sacc")
        with pytest.raises(ValueError, match="does not fit the environment: it was trained with observations"):
            collect(agent=agent, env_id="Hopper-v5")
        with pytest.raises(ValueError, match="Unknown environment 'Pendulum-v9'"):
            collect(agent=agent, env_id="Pendulum-v9")
        with pytest.raises(ValueError, match=r"Cannot load .*sac\.zip' as td3"):
            collect(agent=agent, algorithm="td3")
        (tmp_path / "no.zip").write_bytes(b"not a zip")
        with pytest.raises(ValueError, match="does not say which algorithm saved it"):
            collect(agent=tmp_path / "no.zip")
        PPO("MlpPolicy", "Pendulum-v1", **small()).save(tmp_path / "ppo.zip")
        with pytest.raises(ValueError, match="does not say which algorithm saved it: name it with --algo"):
            collect(agent=tmp_path / "ppo.zip")
        collect(agent=tmp_path / "ppo.zip", algorithm="ppo")
        assert load_dataset("my/x-v0").provenance["algorithm"] == "PPO (stable-baselines3)"

    def test_what_does_not_go_together(self, agent: Path) -> None:
        with pytest.raises(ValueError, match="either a number of steps or a number of episodes"):
            collect_dataset("my/x-v0", "Pendulum-v1", agent=agent)
        with pytest.raises(ValueError, match="either a number of steps or a number of episodes"):
            collect_dataset("my/x-v0", "Pendulum-v1", agent=agent, n_steps=1, n_episodes=1)
        with pytest.raises(ValueError, match="at least one step"):
            collect_dataset("my/x-v0", "Pendulum-v1", agent=agent, n_steps=0)
        with pytest.raises(ValueError, match="A random policy has no agent"):
            collect_dataset("my/x-v0", "Pendulum-v1", algorithm="random", agent=agent, n_steps=1)
        with pytest.raises(ValueError, match="actions must be a Box of floats"):
            collect_dataset("my/x-v0", "CartPole-v1", algorithm="random", n_steps=1)
        collect_dataset("my/x-v0", "Pendulum-v1", algorithm="random", n_steps=1)
        with pytest.raises(FileExistsError, match="already"):
            collect_dataset("my/x-v0", "Pendulum-v1", algorithm="random", n_steps=1)


class InterruptedCorridor(Corridor):
    """Presses Ctrl-C in its eighth step."""

    steps = 0

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        type(self).steps += 1
        if type(self).steps == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(np.ones(1, np.float32))


@pytest.mark.parametrize(("length", "episodes"), [(3.0, 2), (9.5, 0)])
def test_an_interrupted_episode_is_left_out(length: float, episodes: int, minari_root: Path) -> None:
    InterruptedCorridor.steps = 0
    before = signal.getsignal(signal.SIGINT)
    gym.register("TestInterrupted-v0", InterruptedCorridor, disable_env_checker=True, kwargs={"length": length})
    try:
        made = collect_dataset("my/i-v0", "TestInterrupted-v0", algorithm="random", n_steps=1_000)
    finally:
        del gym.registry["TestInterrupted-v0"]
    assert made.interrupted and len(made.returns) == episodes
    assert (made.folder is not None) == bool(episodes)
    if episodes:
        data = load_dataset("my/i-v0")
        assert data.n_episodes == episodes == data.terminations.sum() and made.transitions == len(data) == 6
    assert signal.getsignal(signal.SIGINT) is before
    assert not [path for path in minari_root.rglob("*") if path.name.startswith((".", "tmp"))]


def test_a_second_signal_ends_the_program_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_interrupted_command_keeps_complete_episodes(tmp_path: Path, minari_root: Path, number: int) -> None:
    arguments = ["--id", "my/i-v0", "--env", "Pendulum-v1", "--random", "--steps", "10000000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "200"}
    command = [sys.executable, "-m", "sb3_offline_ft", "dataset", "collect", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            files = list(minari_root.glob(".sb3-offline-ft-*/my/i-v0/data/main_data.hdf5"))
            if files and files[0].stat().st_size > 20_000:
                break
            time.sleep(0.01)
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "interrupted, the complete episodes were kept" in error and "my/i-v0" in output
    data = load_dataset("my/i-v0")
    assert (data.episode_lengths == 200).all() and 1 <= data.n_episodes < 50_000
    assert json.loads((minari_root / "my/i-v0/data/metadata.json").read_text())["total_episodes"] == data.n_episodes
    assert not [path for path in minari_root.rglob("*") if path.name.startswith((".", "tmp"))]
