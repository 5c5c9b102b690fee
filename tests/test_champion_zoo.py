"""ChampionChallenger in runs and studies of rl_zoo3: the run's best model is the champion, for enjoy too."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft import TD3C
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.deployment import ChampionChallenger
from tests.conftest import Installation
from tests.test_zoo_optimize import optimize
from tests.zoo_runs import UNGUARDED, make_manager

ENV, STEPS = "Pendulum-v1", 150
NAME = "sb3_offline_ft.deployment.ChampionChallenger"
# The pretrained policy is the champion for ever, and the learner another one soon
SERVE: dict[str, Any] = {NAME: {"risk_budget": 0.0, "verbose": 0}}
FAST: dict[str, Any] = UNGUARDED | {"callback": [SERVE], "warmup_steps": 0, "learning_rate": 1e-2, "policy_averaging": 0.0}
FAST |= {"constraint_reference": "champion", "trust_region": None}


class Interrupt(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps == 60:
            raise KeyboardInterrupt
        return True


Finished = tuple[Path, ChampionChallenger, TD3C]


def finished(folder: Path, **settings: Any) -> Finished:
    """A run's folder, its contest, and its learner at the end."""
    manager = make_manager(folder, **{"hyperparams": FAST, "n_timesteps": STEPS} | settings)
    model, _ = manager.setup_experiment()
    manager.learn(model)
    manager.save_trained_model(model)
    (contest,) = (callback for callback in manager.callbacks if isinstance(callback, ChampionChallenger))
    return Path(manager.save_path), contest, model


def is_same(policy: Any, state: Any) -> bool:
    return all(th.equal(value, state[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("eval_freq", [-1, 40, 25_000])
def test_the_best_model_of_a_run_is_the_champion(tmp_path: Path, eval_freq: int) -> None:
    folder, contest, model = finished(tmp_path, eval_freq=eval_freq)
    champion = contest.champion.policy.state
    assert contest.champion.name == 0 and not is_same(model.policy, champion)
    assert is_same(TD3C.load(folder / "best_model.zip", device="cpu").policy, champion)
    assert is_same(TD3C.load(folder / f"{ENV}.zip", device="cpu").policy, model.policy.state_dict())
    assert [event["event"] for event in read_events(folder / "deployment_events.jsonl")][-1] == "end"
    assert (folder / "evaluations.npz").exists() == (eval_freq > 0)
    assert not (folder / "vecnormalize.pkl").exists()


def test_algorithms_of_sb3_leave_their_champion_too(tmp_path: Path) -> None:
    settings = {"policy": "MlpPolicy", "learning_starts": 50, "policy_kwargs": "dict(net_arch=[8])", "normalize": True}
    (tmp_path / "sac.yml").write_text(yaml.safe_dump({ENV: settings | {"n_timesteps": STEPS, "callback": [SERVE]}}))
    folder, contest, model = finished(tmp_path, algo="sac", hyperparams={}, config=str(tmp_path / "sac.yml"), device="cpu")
    assert is_same(SAC.load(folder / "best_model.zip", device="cpu").policy, contest.champion.policy.state)
    assert not is_same(model.policy, contest.champion.policy.state)
    statistics, found = contest.champion.policy.statistics, []
    for path in (folder, folder / ENV):
        found.append(VecNormalize.load(str(path / "vecnormalize.pkl"), make_vec_env(ENV)).obs_rms)
    assert statistics is not None and found[0].count == statistics[""].count < found[1].count


def test_an_interrupt_leaves_the_champion_and_all_events(tmp_path: Path) -> None:
    interrupt = {f"{__name__}.Interrupt": {}}
    folder, contest, model = finished(tmp_path, hyperparams=FAST | {"callback": [interrupt, SERVE]})
    assert model.num_timesteps == 60
    assert [event["event"] for event in read_events(folder / "deployment_events.jsonl")] == ["start", "end"]
    assert is_same(TD3C.load(folder / "best_model.zip", device="cpu").policy, contest.champion.policy.state)


@pytest.fixture(scope="module")
def normalized(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """``VecNormalize`` goes on learning its statistics, those of the champion stay what they were."""
    with pytest.warns(UserWarning, match="VecNormalize"):
        hyperparams = FAST | {"normalize": "dict(norm_reward=False)"}
        return finished(tmp_path_factory.mktemp("run"), hyperparams=hyperparams, eval_freq=40)


def test_what_enjoy_finds_is_the_champions(normalized: Finished) -> None:
    folder, contest, model = normalized
    hyperparams, stats_path = get_saved_hyperparams(str(folder / ENV), test_mode=True)
    env = create_test_env(ENV, stats_path=stats_path, hyperparams=hyperparams, should_render=False)
    statistics, live = contest.champion.policy.statistics, model.get_vec_normalize_env()
    assert isinstance(env, VecNormalize) and statistics is not None and live is not None
    np.testing.assert_array_equal(env.obs_rms.mean, statistics[""].mean)
    np.testing.assert_array_equal(env.obs_rms.var, statistics[""].var)
    assert not np.allclose(env.obs_rms.var, live.obs_rms.var, rtol=0.1)

    enjoyed = TD3C.load(folder / "best_model.zip", device="cpu")
    observations = np.array([[1.0, 0.0, 0.0], [-1.0, 0.1, 3.0], [0.0, 1.0, -6.0]])
    expected = contest.predict(live.normalize_obs(observations))[0]
    np.testing.assert_allclose(enjoyed.predict(env.normalize_obs(observations))[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("agent", ["best_model", ENV])
def test_who_goes_on_from_a_model_has_its_statistics(normalized: Finished, agent: str, tmp_path: Path) -> None:
    folder, contest, model = normalized
    manager = make_manager(tmp_path, hyperparams=FAST, trained_agent=str(folder / f"{agent}.zip"))
    (loaded, _), live = manager.setup_experiment(), model.get_vec_normalize_env()
    loaded.env.close()
    assert live is not None and contest.champion.policy.statistics is not None
    expected = live.obs_rms if agent == ENV else contest.champion.policy.statistics[""]
    for is_evaluation in (False, True):
        env = manager.create_envs(1, eval_env=is_evaluation, no_log=True)
        np.testing.assert_array_equal(env.obs_rms.mean, expected.mean)
        assert env.training != is_evaluation


def test_enjoy_shows_the_champion(installation: Installation, tmp_path: Path) -> None:
    hyperparams = FAST | {"normalize": True, "policy": "MlpPolicy", "n_timesteps": STEPS, "dataset": "bundled:pendulum-medium"}
    (tmp_path / "run.yml").write_text(yaml.safe_dump({ENV: hyperparams}))
    command = ["--algo", "td3c", "--env", ENV]
    trained = installation.run("-m", "rl_zoo3.train", *command, "-conf", "run.yml", "--seed", "1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "logs" / "td3c" / f"{ENV}_1"
    assert read_events(folder / "deployment_events.jsonl")[-1]["champion"] == 0

    env = VecNormalize.load(str(folder / "vecnormalize.pkl"), make_vec_env(ENV, seed=7))
    env.training = env.norm_reward = False
    model, observations, total = TD3C.load(folder / "best_model.zip", device="cpu"), env.reset(), 0.0
    for _ in range(200):
        observations, rewards, _, _ = env.step(model.predict(observations, deterministic=True)[0])
        total += float(rewards[0])
    for module in ("rl_zoo3.enjoy", "sb3_offline_ft.zoo.enjoy"):
        options = ["-f", "logs", "--load-best", "--no-render", "-n", "200", "--seed", "7", "--device", "cpu"]
        enjoyed = installation.run("-m", module, *command, *options, cwd=tmp_path)
        assert enjoyed.returncode == 0, enjoyed.stderr
        (shown,) = re.findall(r"Episode Reward: (\S+)", enjoyed.stdout)
        assert float(shown) == pytest.approx(total, abs=0.02)


def test_a_trial_is_worth_what_its_champion_is(tmp_path: Path) -> None:
    def value(name: str, **changes: Any) -> float:
        (trial,) = optimize(tmp_path / name, hyperparams=FAST | changes, n_trials=1, n_timesteps=STEPS).trials
        assert trial.state.name == "COMPLETE" and trial.value is not None
        return trial.value

    # The pretrained policy is all that is ever evaluated, here as there
    champion, frozen = (
        value("champion"),
        value("frozen", callback=None, constraint_reference="pretrained", warmup_steps=STEPS - 1),
    )
    assert champion == frozen
    assert value("learner", callback=None, constraint_reference="pretrained") != frozen
