"""Loading without unpickling: what is rebuilt from plain text acts and learns as before, and no code of a file is run."""

import base64
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from typer.testing import CliRunner

from sb3_offline_ft import TD3BC, TD3C, ReBRAC, safe_load
from sb3_offline_ft.cli import app
from sb3_offline_ft.controllers import load_controller

SMALL = {"net_arch": [8, 8], "activation_fn": th.nn.Tanh}
OWN = (TD3BC, TD3C, ReBRAC)


class DictEnv(gym.Env[dict[str, Any], Any]):
    """Two observations."""

    observation_space = spaces.Dict({"b": spaces.Box(-1, np.linspace(1, 2, 3, dtype=np.float32)), "a": spaces.Box(0, 1, (2,))})
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.observation_space.sample(), {}


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def with_traps(model: BaseAlgorithm, marker: Path, more: Iterable[str] = ()) -> io.BytesIO:
    """The model's zip file, whose pickles, and more settings as pickles, leave the marker when they are read."""
    saved, trapped = io.BytesIO(), io.BytesIO()
    model.save(saved)  # type: ignore[arg-type]
    trap = base64.b64encode(cloudpickle.dumps(Trap(marker))).decode()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(trapped, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "data":
                settings = json.loads(content)
                for key, entry in settings.items():
                    if isinstance(entry, dict) and ":serialized:" in entry:
                        entry[":serialized:"] = trap
                    elif key in more:
                        settings[key] = {":type:": str(type(entry)), ":serialized:": trap} | entry
                content = json.dumps(settings).encode()
            new.writestr(name, content)
    trapped.seek(0)
    return trapped


def model_of(algorithm: type[BaseAlgorithm], **settings: Any) -> BaseAlgorithm:
    env = gym.make("CartPole-v1" if algorithm is DQN else "Pendulum-v1")
    # A copy, since SB3 changes what it is given
    policy_kwargs = {"net_arch": [8, 8]} if algorithm is ReBRAC else dict(SMALL)
    return algorithm("MlpPolicy", env, policy_kwargs=policy_kwargs, device="cpu", **settings)


@pytest.mark.parametrize("algorithm", [*OWN, TD3, DDPG, SAC, TQC, PPO, A2C, DQN])
def test_nothing_is_run_and_the_agent_acts_the_same(algorithm: type[BaseAlgorithm], tmp_path: Path) -> None:
    model, marker = model_of(algorithm), tmp_path / "was here"
    assert model.observation_space.shape is not None
    observations = np.random.default_rng(0).normal(size=(30, *model.observation_space.shape)).astype(np.float32)
    if algorithm in (*OWN, PPO, A2C):
        loaded: BaseAlgorithm = safe_load(with_traps(model, marker), algorithm, device="cpu")
    else:
        with pytest.warns(UserWarning, match="tells `train_freq`.* as a pickle only, which is not read: the default"):
            loaded = safe_load(with_traps(model, marker), algorithm, device="cpu")
    assert not marker.exists()
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space
    np.testing.assert_array_equal(*(each.predict(observations, deterministic=True)[0] for each in (model, loaded)))
    with pytest.raises(Exception):  # noqa: B017  # whatever comes of a trap in place of a setting
        algorithm.load(with_traps(model, marker), device="cpu")
    assert marker.exists()


def test_nothing_is_run_to_compare_what_is_given_with_the_file(tmp_path: Path) -> None:
    model, marker = model_of(ReBRAC), tmp_path / "was here"
    trapped = with_traps(model, marker, more=["policy_kwargs"])
    assert ReBRAC.load(trapped, safe_load=True, policy_kwargs={"net_arch": [8, 8], "actor_value": "min"}).policy_kwargs
    trapped.seek(0)
    assert ReBRAC.load(trapped, safe_load=True, policy_kwargs={"net_arch": [8, 8]}).policy_kwargs == model.policy_kwargs
    assert not marker.exists()


def test_a_learner_of_ours_goes_on_as_if_it_had_been_unpickled() -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.123456789))
    model = model_of(
        TD3BC, dataset="bundled:pendulum-medium", train_freq=(3, "step"), action_noise=noise, learning_starts=0,
        batch_size=8, warmup_steps=0, seed=0,
    )  # fmt: skip
    model.learn(6)
    stream = io.BytesIO()
    model.save(stream)  # type: ignore[arg-type]
    weights = []
    for options in ({}, {"safe_load": True}):
        stream.seek(0)
        loaded = TD3BC.load(stream, env=gym.make("Pendulum-v1"), device="cpu", **options)
        assert isinstance(loaded.action_noise, OrnsteinUhlenbeckActionNoise)
        assert loaded.train_freq == model.train_freq and loaded.action_noise._sigma == noise._sigma  # type: ignore[attr-defined]
        loaded.set_random_seed(1)
        loaded.action_space.seed(1)
        loaded.learn(9, reset_num_timesteps=False)
        weights.append(th.cat([parameter.flatten() for parameter in loaded.policy.parameters()]))
    assert th.equal(*weights)


def test_dictionaries_of_observations_and_files_of_before(tmp_path: Path) -> None:
    env = DictEnv()
    model = TD3BC("MultiInputPolicy", env, policy_kwargs={"net_arch": [4]}, device="cpu")
    model.save(tmp_path / "model")
    assert TD3BC.load(tmp_path / "model", safe_load=True).observation_space == env.observation_space
    without = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "model.zip") as old, zipfile.ZipFile(without, "w") as new:
        for name in set(old.namelist()) - {"plain_settings.json"}:
            new.writestr(name, old.read(name))
    # Plain SB3 overlooks what is added, and what it does not know is asked for
    assert TD3.load(tmp_path / "model").observation_space == env.observation_space
    with pytest.raises(ValueError, match=r"observation_space cannot be rebuilt .*it is a Dict.* Give `env`"):
        TD3BC.load(io.BytesIO(without.getvalue()), safe_load=True)
    with pytest.warns(UserWarning, match="`train_freq`"):
        loaded = TD3BC.load(io.BytesIO(without.getvalue()), env=env, safe_load=True)
    assert loaded.observation_space == env.observation_space


@pytest.mark.parametrize("space", [spaces.MultiBinary([2, 2]), spaces.MultiDiscrete([3, 4], np.int32, start=[0, 5])])
def test_spaces_of_truths_and_choices_are_kept(space: spaces.Space[Any]) -> None:
    env, stream = DictEnv(), io.BytesIO()
    env.observation_space = spaces.Dict({"a": space})
    TD3BC("MultiInputPolicy", env, policy_kwargs={"net_arch": [4]}, device="cpu").save(stream)  # type: ignore[arg-type]
    stream.seek(0)
    found = TD3BC.load(stream, device="cpu", safe_load=True).observation_space
    assert found == env.observation_space and found["a"].dtype == space.dtype  # type: ignore[index]


CHANGES: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "a list of settings": lambda members: members.update(data=json.dumps(list(json.loads(members["data"]).items())).encode()),
    "plain settings that are none": lambda members: members.update({"plain_settings.json": b"[1, 2]"}),
    "no weights": lambda members: members.pop("policy.pth"),
    "weights that are none": lambda members: members.update({"policy.pth": b"junk"}),
    "a folder above": lambda members: members.update({"../evil.pth": b"x"}),
    "no space": lambda members: setting(members, "observation_space", None),
    "a policy that is none": lambda members: setting(members, "policy_kwargs", 5),
    "a negative size": lambda members: setting(members, "policy_kwargs", {"net_arch": [-1]}),
    "a number for arrays": lambda members: setting(members, "_extra_state", 5),
}


def setting(members: dict[str, bytes], name: str, value: Any) -> None:
    members["data"] = json.dumps(json.loads(members["data"]) | {name: value}).encode()


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_together_is_one_clear_error(change: str, tmp_path: Path) -> None:
    model_of(TD3BC).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    CHANGES[change](members)
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"changed\.zip (is damaged|cannot be loaded)"):
        safe_load(tmp_path / "changed.zip", TD3BC, device="cpu")
    assert not (tmp_path.parent / "evil.pth").exists()


def test_a_file_whose_bytes_changed_is_named(tmp_path: Path) -> None:
    model_of(TD3BC).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        place = archive.getinfo("policy.pth").header_offset + 500
    content = bytearray((tmp_path / "model.zip").read_bytes())
    content[place] ^= 255
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model is damaged .*policy\.pth"):
        safe_load(tmp_path / "model", TD3BC, device="cpu")


def test_noise_for_more_environments_than_there_can_be_is_left_out() -> None:
    model, stream = model_of(TD3BC, action_noise=NormalActionNoise(np.zeros(1), np.ones(1))), io.BytesIO()
    model.save(stream)  # type: ignore[arg-type]
    changed = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "plain_settings.json":
                plain = json.loads(content)
                plain["action_noise"] = {"object": "VectorizedActionNoise", "of": [plain["action_noise"], 10**9]}
                content = json.dumps(plain).encode()
            new.writestr(name, content)
    changed.seek(0)
    with pytest.warns(UserWarning, match="`action_noise`"):
        assert TD3BC.load(changed, device="cpu", safe_load=True).action_noise is None  # type: ignore[attr-defined]


class OwnActivation(th.nn.ReLU):
    """A class that no list knows."""


def test_what_cannot_be_rebuilt_is_named(tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1")
    for algorithm in (TD3BC, SAC):
        model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [4], "activation_fn": OwnActivation})
        model.save(tmp_path / "model")
        with pytest.raises(ValueError, match=r"model.*without unpickling: policy_kwargs cannot .*OwnActivation"):
            safe_load(tmp_path / "model", algorithm)
        with pytest.raises(ValueError, match=r"model.*without unpickling: policy_kwargs cannot .*OwnActivation"):
            load_controller(str(tmp_path / "model"), safe_load=True)
    for algorithm in (TD3BC, SAC):
        model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [4]}, learning_rate=lambda _: 1e-3)
        model.save(tmp_path / "model")
        with pytest.warns(UserWarning, match="`learning_rate`"):
            assert safe_load(tmp_path / "model", algorithm).learning_rate == 3e-4
    # NumPy's text of these bounds leaves out digits, so that the environment has to tell
    narrow = gym.wrappers.RescaleAction(env, np.float32(-1.23456789e-3), np.float32(1))
    narrow.action_space = spaces.Box(np.float32(-0.0123456789), np.float32(1.0), (1,))
    SAC("MlpPolicy", narrow, policy_kwargs=dict(SMALL)).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"action_space cannot be rebuilt .*leaves out digits"):
        safe_load(tmp_path / "model", SAC)
    with pytest.warns(UserWarning, match="`train_freq`"):
        assert safe_load(tmp_path / "model", SAC, narrow).action_space == narrow.action_space
    (tmp_path / "model.zip").write_bytes(b"PK nothing")
    for load in (lambda: safe_load(tmp_path / "model", SAC), lambda: TD3BC.load(tmp_path / "model", safe_load=True)):
        with pytest.raises(ValueError, match=r"model.* is damaged or not a zip file"):
            load()
    with pytest.raises(FileNotFoundError):
        safe_load(tmp_path / "none", SAC)


def test_noise_of_sb3s_own_files_is_kept() -> None:
    model = model_of(SAC, action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.3)))
    stream = io.BytesIO()
    model.save(stream)  # type: ignore[arg-type]
    stream.seek(0)
    loaded = safe_load(stream, SAC, train_freq=(2, "episode"), learning_rate=0.01)
    assert isinstance(loaded.action_noise, NormalActionNoise) and loaded.action_noise._sigma == np.full(1, 0.3)
    assert loaded.learning_rate == 0.01 and loaded.train_freq.frequency == 2  # type: ignore[union-attr]


def test_commands_that_read_agents_unpickle_nothing(tmp_path: Path) -> None:
    model, marker = model_of(SAC), tmp_path / "was here"
    (tmp_path / "agent.zip").write_bytes(with_traps(model, marker).getvalue())
    agent, output = str(tmp_path / "agent.zip"), ["-o", str(tmp_path)]
    robustness = ["robustness", agent, "--env", "Pendulum-v1", "--perturb", "mass=1.2", "--seeds", "1", *output]
    evaluate = [
        "dataset",
        "evaluate-policy",
        "bundled:pendulum-medium?episodes=3",
        "--agent",
        agent,
        "-n",
        "2",
        "--bootstraps",
        "2",
    ]
    for command in (robustness, evaluate):
        result = CliRunner().invoke(app, [*command, "--safe-load"])
        assert result.exit_code == 0, result.output
    assert not marker.exists()
    (tmp_path / "vecnormalize.pkl").write_bytes(pickle.dumps(Trap(marker)))
    result = CliRunner().invoke(app, [*robustness, "--safe-load"])
    assert result.exit_code == 1 and "vecnormalize.pkl" in result.output and "nothing is unpickled" in result.output
    assert not marker.exists()
