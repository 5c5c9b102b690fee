"""Exported policies do what the policies do, and say what they are."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from sb3_contrib import TQC, RecurrentPPO
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from typer.testing import CliRunner

from sb3_offline_ft import TD3C, CollapseGuard
from sb3_offline_ft.cli import app
from sb3_offline_ft.controllers import check_fits, load_controller
from sb3_offline_ft.evaluation.robustness import run_robustness
from sb3_offline_ft.export import export_policy
from sb3_offline_ft.testing import PointEnv
from sb3_offline_ft.zoo.enjoy import main as enjoy
from tests.contest_runs import run as run_contest
from tests.guarded_runs import Hold

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ENV = "Pendulum-v1"
DATA = "bundled:pendulum-medium"


def small() -> dict[str, Any]:
    """Arguments for a small agent; SB3 changes the dictionary of a policy's arguments."""
    return {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 3}


class TwoFaced(FlattenExtractor):
    """Has a branch that depends on what is seen, which no trace can hold."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features if bool(features[0, 0] > 0) else -features


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def images_and_more() -> PointEnv:
    parts = {
        "camera": spaces.Box(0, 255, (36, 40, 3), np.uint8),
        "mode": spaces.Discrete(3),
        "place": spaces.Box(-1, 1, (2,), np.float64),
        "switches": spaces.MultiBinary(2),
    }
    env = PointEnv(spaces.Dict(parts), spaces.Box(np.array([-2, 0], np.float32), np.array([1, 10], np.float32)))
    env.dt = 0.02  # type: ignore[attr-defined]
    units = {"place": ["m", "m"]}
    env.metadata = env.metadata | {"observation_units": units, "action_names": ["left", "right"]}
    return env


gym.register("ImagesAndMore-v0", images_and_more)


class Slowly(gym.Wrapper[Any, Any, Any, Any]):
    """Decides every fourth step."""

    def step(self, action: Any) -> Any:
        for _ in range(3):
            self.env.step(action)
        return self.env.step(action)


def pendulum_with_units(**metadata: list[str]) -> gym.Env[Any, Any]:
    env = gym.make(ENV).unwrapped
    env.metadata = env.metadata | {"action_units": ["N m"], "observation_names": ["x", "y", "speed"]} | metadata
    return env


gym.register("Units-v0", pendulum_with_units)
gym.register("Slow-v0", lambda: Slowly(pendulum_with_units()))
gym.register("Scaled-v0", lambda: gym.wrappers.RescaleAction(pendulum_with_units(), -1, 1))


def saved(model: Any, folder: Path, name: str = "model.zip") -> Path:
    # Those that have not learned hardly act
    for parameter in model.policy.parameters():
        parameter.data *= 2
    model.save(folder / name)
    return folder / name


def contract_of(policy: Path) -> Any:
    return json.loads(policy.with_suffix(".json").read_text())


def seen_in(env: gym.Env[Any, Any], n: int = 20) -> list[Any]:
    env.action_space.seed(0)
    observations = [env.reset(seed=7)[0]]
    for _ in range(n):
        observations.append(env.step(env.action_space.sample())[0])
    return observations


def acts_like(policy: Path, model: Any, observations: list[Any]) -> bool:
    controller, space = load_controller(str(policy)), model.action_space
    expected = np.stack([model.predict(each, deterministic=True)[0] for each in observations])
    assert np.ptp(expected, axis=0).min() > 5e-3, "the actions say nothing"
    found = np.stack([controller.act(each) for each in observations])
    assert found.shape == expected.shape and found.dtype == np.float32
    return bool((np.abs(found - expected) <= 1e-5 * (space.high - space.low)).all())


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(TD3C, {"dataset": DATA}), (SAC, {"use_sde": True}), (PPO, {})],
)
def test_an_onnx_file_acts_as_its_model(algorithm: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", ENV, **small(), **options)
    if algorithm is TD3C:
        model.pretrain(5)
    path = tmp_path / "out" / "policy.onnx"
    export_policy(saved(model, tmp_path), path, env=ENV)
    assert acts_like(path, model, seen_in(gym.make(ENV)))
    assert sorted(file.name for file in path.parent.iterdir()) == ["policy.json", "policy.onnx"]
    content = path.read_bytes()
    assert str(Path(sys.prefix)).encode() not in content, "the file tells of this machine"
    contract = contract_of(path)
    assert contract["policy"] == {"file": "policy.onnx", "format": "onnx", "sha256": hashlib.sha256(content).hexdigest()}
    assert contract["observations"][0]["high"] == [1, 1, 8] and contract["observations"][0]["dtype"] == "float32"
    assert contract["action"] | {"low": -2, "high": 2, "shape": [1]} == contract["action"]
    assert contract["environment"] == {"id": ENV, "kwargs": {}, "step_seconds": 0.05, "steps_per_second": 20}
    source = "the dataset pendulum-medium" if algorithm is TD3C else f"the environment {ENV}"
    assert contract["parity"]["observations"] == 1000 and contract["parity"]["from"] == source
    assert 0 <= contract["parity"]["largest_difference"] <= 1e-5
    check_fits(load_controller(str(path)), gym.make(ENV))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_torch_runs_the_other_formats(suffix: str, tmp_path: Path) -> None:
    arguments = small() | {"policy_kwargs": {"net_arch": {"pi": [8], "qf": [128, 128]}}}
    model = (TQC if suffix == ".pt" else DDPG)("MlpPolicy", ENV, **arguments)
    path = tmp_path / f"policy{suffix}"
    export_policy(saved(model, tmp_path), path, data=DATA)
    with warnings.catch_warnings():
        # torch's own: it has come to prefer torch.export
        warnings.simplefilter("ignore")
        run = th.jit.load(path) if suffix == ".pt" else th.export.load(path).module()
    seen = np.stack(seen_in(gym.make(ENV)))
    for rows in (seen, seen[:1]):
        expected = model.predict(rows, deterministic=True)[0]
        np.testing.assert_allclose(run(th.from_numpy(rows)).detach().numpy(), expected, atol=4e-5)
    assert contract_of(path)["policy"]["format"] == {".pt": "torchscript", ".pt2": "torch-export"}[suffix]
    assert path.stat().st_size < 4 * 128 * 128, "the critics are in it"


def test_images_and_dicts_as_the_environment_gives_them(tmp_path: Path) -> None:
    env = gym.make("ImagesAndMore-v0")
    model = TD3("MultiInputPolicy", env, buffer_size=10, **small())
    assert model.observation_space["camera"].shape == (3, 36, 40)
    path = tmp_path / "policy.onnx"
    export_policy(saved(model, tmp_path), path, env="ImagesAndMore-v0")
    assert acts_like(path, model, seen_in(env))
    by_name = {each["name"]: each for each in contract_of(path)["observations"]}
    assert by_name["camera"] | {"shape": [36, 40, 3], "dtype": "uint8", "low": 0, "high": 255} == by_name["camera"]
    assert by_name["mode"] | {"kind": "Discrete", "shape": [], "dtype": "int64", "high": 2} == by_name["mode"]
    assert by_name["place"]["units"] == ["m", "m"] and by_name["camera"]["units"] is None
    assert contract_of(path)["action"] | {"low": [-2, 0], "names": ["left", "right"]} == contract_of(path)["action"]
    assert contract_of(path)["environment"]["steps_per_second"] == 50
    controller = load_controller(str(path))
    check_fits(controller, env)
    with pytest.raises(ValueError, match=r"does not fit Pendulum-v1: it was made for observations Dict\(.*has Box"):
        check_fits(controller, gym.make(ENV))


@pytest.mark.parametrize("keys", [("action", "action_"), ("linear", "low", "observation", "tanh")])
def test_keys_may_be_called_as_the_inside_of_the_file(keys: tuple[str, ...], tmp_path: Path) -> None:
    env = f"Keys{len(keys)}-v0"
    gym.register(env, lambda: PointEnv(spaces.Dict({key: spaces.Box(-1, 1, (2,)) for key in keys})))
    model, path = TD3("MultiInputPolicy", env, buffer_size=10, **small()), tmp_path / "policy.onnx"
    export_policy(saved(model, tmp_path), path, env=env)
    assert acts_like(path, model, seen_in(gym.make(env)))
    assert {each["name"] for each in contract_of(path)["observations"]} == set(keys)
    assert contract_of(path)["action"]["name"] == ("action__" if "action" in keys else "action")


def test_a_contract_says_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    model, path = saved(TD3("MlpPolicy", ENV, **small()), tmp_path), tmp_path / "policy.pt"

    def said(env: str) -> Any:
        export_policy(model, path, data=DATA, env=env)
        return contract_of(path)

    contract = said("Units-v0")
    assert contract["action"]["units"] == ["N m"] and contract["observations"][0]["names"] == ["x", "y", "speed"]
    assert contract["environment"]["step_seconds"] == 0.05
    assert contract["made_of"]["dataset"] is None, "data that it was compared on is not what it learned from"
    assert said("Slow-v0")["environment"]["step_seconds"] is None
    with pytest.warns(UserWarning, match=r"trained with actions Box\(-2.0, 2.0.* takes Box\(-1.0, 1.0.*: if a wrapper scaled"):
        assert said("Scaled-v0")["action"]["units"] is None
    gym.register("FewNames-v0", lambda: pendulum_with_units(observation_names=["x"]))
    with pytest.warns(UserWarning, match=r"observation_names of the environment are left out: expected a list of 3, found"):
        assert said("FewNames-v0")["observations"][0]["names"] is None


def test_arguments_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plant_of_mine.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "class Plant(PendulumEnv):\n"
        "    def __init__(self, dt, render_mode=None):\n"
        "        super().__init__(render_mode)\n"
        "        self.dt = dt\n"
        "gym.register('Mine-v0', Plant)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    saved(TD3("MlpPolicy", ENV, **small()), tmp_path, "Mine-v0.zip")
    (tmp_path / "Mine-v0").mkdir()
    (tmp_path / "Mine-v0" / "config.yml").write_text("env_kwargs: {dt: 0.5, render_mode: rgb_array}")
    export_policy(tmp_path, tmp_path / "policy.onnx", data=DATA, env="plant_of_mine:Mine-v0")
    known = contract_of(tmp_path / "policy.onnx")["environment"]
    kwargs = {"dt": 0.5, "render_mode": "rgb_array"}
    assert known == {"id": "plant_of_mine:Mine-v0", "kwargs": kwargs, "step_seconds": 0.5, "steps_per_second": 2}
    monkeypatch.setattr(sys, "argv", ["enjoy", f"--onnx={tmp_path / 'policy.onnx'}", "--no-render", "-n", "3"])
    enjoy()


def test_a_broken_environment_is_told(tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("no bus")

    gym.register("Broken-v0", broken)
    model = saved(TD3("MlpPolicy", ENV, **small()), tmp_path, "Broken-v0.zip")
    with pytest.raises(ValueError, match=r"Cannot make the environment 'Broken-v0' \(RuntimeError: no bus\)"):
        export_policy(model, tmp_path / "policy.pt", data=DATA, env="Broken-v0")
    (tmp_path / "Broken-v0").mkdir()
    (tmp_path / "Broken-v0" / "config.yml").write_text("n_timesteps: 1")
    with pytest.warns(UserWarning, match="The contract says nothing of the environment. Cannot make"):
        export_policy(model, tmp_path / "policy.pt", data=DATA)


def test_images_turn_where_the_environment_was_not_known(tmp_path: Path) -> None:
    model = TD3("CnnPolicy", PointEnv(spaces.Box(0, 255, (36, 40, 3), np.uint8)), buffer_size=10, **small())
    path = tmp_path / "policy.pt"
    data = tmp_path / "data.npz"
    frames = np.random.default_rng(0).integers(0, 255, (1000, 36, 40, 3), np.uint8)
    ends = np.arange(1000) % 100 == 99
    columns = {"rewards": np.zeros(1000), "terminations": ends, "truncations": np.zeros(1000, bool)}
    np.savez(data, observations=frames, next_observations=np.roll(frames, -1, axis=0), actions=np.zeros((1000, 2)), **columns)
    export_policy(saved(model, tmp_path), path, data=str(data))
    assert contract_of(path)["observations"][0]["shape"] == [3, 36, 40] and contract_of(path)["environment"] is None


@pytest.fixture
def normalized(tmp_path: Path) -> tuple[Path, TD3, VecNormalize]:
    """A champion in a folder of its own; what it sees is far from zero and hardly varies."""
    env = VecNormalize(DummyVecEnv([lambda: gym.make(ENV)]))
    env.obs_rms.mean, env.obs_rms.var = np.array([0.2, -0.1, 123.4]), np.array([0.5, 0.6, 1e-4])
    model = TD3("MlpPolicy", env, **small())
    saved(model, tmp_path, "best_model.zip")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    return tmp_path, model, env


def test_statistics_of_vecnormalize_are_inside(normalized: tuple[Path, TD3, VecNormalize]) -> None:
    folder, model, statistics = normalized
    path = folder / "policy.onnx"
    export_policy(folder, path, env=ENV)
    controller, (seen,) = load_controller(str(path)), np.float32([[0.7, -0.3, 123.41234]])
    expected = model.predict(statistics.normalize_obs(seen), deterministic=True)[0]
    np.testing.assert_allclose(controller.act(seen), expected, atol=4e-5)
    assert not np.allclose(controller.act(seen + np.float32([0, 0, 0.01])), expected, atol=1e-3)
    assert contract_of(path)["made_of"]["normalized_by_vecnormalize"]
    assert contract_of(path)["observations"][0]["high"] == [1, 1, 8], "what is normalized has no bounds, what is raw has"


def test_statistics_of_a_checkpoint(normalized: tuple[Path, TD3, VecNormalize], tmp_path: Path) -> None:
    folder, model, statistics = normalized
    model.save(folder / "rl_model_20_steps.zip")
    (folder / "vecnormalize.pkl").rename(folder / "rl_model_vecnormalize_20_steps.pkl")
    export_policy(folder / "rl_model_20_steps.zip", folder / "policy.onnx", env=ENV)
    seen = np.float32([[0.7, -0.3, 123.41234]])
    expected = model.predict(statistics.normalize_obs(seen), deterministic=True)[0]
    np.testing.assert_allclose(load_controller(str(folder / "policy.onnx")).act(seen), expected, atol=4e-5)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (1,)), spaces.Dict({"a": spaces.Box(-1, 1, (3,))})])
def test_statistics_of_another_model_are_refused(space: spaces.Space[Any], tmp_path: Path) -> None:
    model = saved(TD3("MlpPolicy", ENV, **small()), tmp_path)
    VecNormalize(DummyVecEnv([lambda: PointEnv(space)])).save(str(tmp_path / "vecnormalize.pkl"))
    with pytest.raises(ValueError, match=r"vecnormalize.pkl' is not of the policy .*: it normalizes .* sees .* shape \(3,\)"):
        export_policy(model, tmp_path / "policy.pt", data=DATA)
    assert not list(tmp_path.glob("policy*"))


def test_what_a_run_says_is_in_the_contract(tmp_path: Path) -> None:
    model = TD3("MlpPolicy", ENV, learning_starts=10**6, **small())
    returns = [-1000.0, -1100.0, -900.0, -1050.0, -950.0]
    guard = CollapseGuard(baseline=returns, random_return=-1500, tolerance=0.2, path=tmp_path, verbose=0)
    model.learn(200, callback=guard)
    saved(model, tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"run": 1}')
    export_policy(tmp_path / "model.zip", tmp_path / "policy.pt", data=DATA)
    contract = contract_of(tmp_path / "policy.pt")
    assert contract["made_of"]["manifest_sha256"] == hashlib.sha256(b'{"run": 1}').hexdigest()
    assert contract["guard"]["least_mean_return"] == pytest.approx(-1000 - 0.2 * 500)
    assert contract["guard"]["tolerance"] == 0.2 and contract["guard"]["baseline"]["n"] == 5
    assert contract["champion"] is None and contract["environment"]["id"] == ENV


def test_a_policy_that_a_trace_cannot_hold_is_refused(tmp_path: Path) -> None:
    arguments = small() | {"policy_kwargs": {"net_arch": [8], "features_extractor_class": TwoFaced}}
    model = saved(TD3("MlpPolicy", ENV, **arguments), tmp_path)
    path = tmp_path / "policy.pt"
    path.write_text("the one before")
    with pytest.raises(
        ValueError,
        match=r"policy.pt' is not written: on 1,000 observations of the dataset pendulum-medium, its actions differ from "
        r"those of .*model.zip' by up to [0-9.]+ of their range, and 1e-05 is allowed",
    ):
        export_policy(model, path, data=DATA)
    with pytest.raises(ValueError, match=r"The policy cannot be exported to onnx \(\w+: "):
        export_policy(model, tmp_path / "policy.onnx", data=DATA)
    assert path.read_text() == "the one before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.zip", "policy.pt"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("Pendulum-v1/config.yml", "env_kwargs: 7", r"Pendulum-v1 is damaged or not the settings .*env_kwargs are 7"),
        ("collapse_events.jsonl", '{"event": "start", "settings": [1]}\n', r"damaged or not the events of a CollapseGuard"),
    ],
)
def test_damaged_facts_of_a_run(file: str, content: str, words: str, tmp_path: Path) -> None:
    saved(TD3("MlpPolicy", ENV, **small()), tmp_path, f"{ENV}.zip")
    (tmp_path / ENV).mkdir()
    (tmp_path / ENV / "config.yml").write_text("n_timesteps: 1")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        export_policy(tmp_path, tmp_path / "policy.pt", data=DATA)


def test_what_a_champion_returned_is_told_of_the_champion_alone(tmp_path: Path) -> None:
    contest = run_contest(tmp_path, steps=400)
    contest.model.save(tmp_path / "Hold-v0.zip")
    gym.register("Hold-v0", Hold)
    for name, is_champion in (("best_model", True), ("Hold-v0", False)):
        export_policy(tmp_path / f"{name}.zip", tmp_path / f"{name}.pt", env="Hold-v0")
        champion = contract_of(tmp_path / f"{name}.pt")["champion"]
        assert (champion is not None) == is_champion, name
        if is_champion:
            assert champion["learned_until_step"] == contest.champion.name
            assert 0 < champion["episodes"] <= len(contest.champion.returns)


def test_the_environment_is_the_one_that_the_data_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, ends = np.random.default_rng(0), np.arange(1000) == 999
    buffer = EpisodeBuffer(
        observations=rng.uniform(-1, 1, (1001, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (1000, 1)).astype(np.float32),
        rewards=np.zeros(1000),
        terminations=np.zeros(1000, bool),
        truncations=ends,
    )
    env = gym.make(ENV, g=3.0, render_mode="rgb_array")
    with warnings.catch_warnings():
        # Minari asks for an author, a permalink, ...
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("moon/pendulum-v0", [buffer], env=env)
    model = saved(TD3("MlpPolicy", ENV, **small()), tmp_path)
    export_policy(model, tmp_path / "policy.pt", data="moon/pendulum-v0")
    known = contract_of(tmp_path / "policy.pt")["environment"]
    assert (known["id"], known["kwargs"]) == (ENV, {"g": 3.0})


class RoundedInTraces(FlattenExtractor):
    """Differs a little where it is traced."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features * 1.01 if th.jit.is_tracing() else features


def test_wide_bounds_do_not_hide_a_difference(tmp_path: Path) -> None:
    wide = float(np.finfo(np.float32).max)
    gym.register("Wide-v0", lambda: PointEnv(action_space=spaces.Box(-wide, wide, (2,))))
    arguments = small() | {"policy_kwargs": {"net_arch": [8], "features_extractor_class": RoundedInTraces}}
    model = saved(PPO("MlpPolicy", "Wide-v0", **arguments), tmp_path)
    with pytest.raises(ValueError, match=r"differ from those of .* by up to [0-9.e-]+ of their range, and 1e-05 is allowed"):
        export_policy(model, tmp_path / "policy.pt", env="Wide-v0")
    assert not (tmp_path / "policy.pt").exists()


def test_on_a_full_disk_all_stays_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    gym.register("ManyWords-v0", lambda: pendulum_with_units(action_names=["torque " * 500]))
    arguments = small() | {"policy_kwargs": {"net_arch": [1]}}
    path = tmp_path / "policy.onnx"
    export_policy(saved(TD3("MlpPolicy", ENV, **arguments), tmp_path), path, data=DATA)
    model = saved(TD3("MlpPolicy", ENV, **arguments | {"seed": 4}), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # The contract is the larger one, and does not fit
    assert len(before["policy.onnx"]) < 5_000
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_policy(model, path, data=DATA, env="ManyWords-v0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_where_the_observations_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved(TD3("MlpPolicy", ENV, **small()), tmp_path), tmp_path / "policy.pt"
    with pytest.raises(ValueError, match=r"on 1,000 real observations, and there are none: name a dataset with --data, or"):
        export_policy(model, path)
    few = f"{DATA}?episodes=3"
    with (
        pytest.warns(UserWarning, match="The contract says nothing of the environment"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delitem(gym.registry, ENV)
        with pytest.raises(ValueError, match=r"the dataset pendulum-medium\?episodes=3 has 600: name"):
            export_policy(model, path, data=few)
    export_policy(model, path, data=few, env=ENV)
    said = contract_of(path)["parity"]["from"]
    assert said == f"600 of the dataset pendulum-medium?episodes=3 and 400 of the environment {ENV}"
    with pytest.raises(ValueError, match="does not fit the environment"):
        export_policy(model, path, data="bundled:hopper-medium", env=ENV)
    with pytest.raises(ValueError, match="does not fit MountainCarContinuous-v0"):
        export_policy(model, path, env="MountainCarContinuous-v0")


def test_a_model_gives_no_consent_to_unpickle_its_data(tmp_path: Path) -> None:
    model, marker = TD3("MlpPolicy", ENV, **small()), tmp_path / "marker"
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    model.dataset = f"{tmp_path}/data.pkl?trust_pickle=1"  # type: ignore[attr-defined]  # as our algorithms have it
    path = saved(model, tmp_path)
    with pytest.warns(UserWarning, match=r"The dataset of the model, '.*data.pkl', cannot be read, so that observations are"):
        export_policy(path, tmp_path / "policy.pt", env=ENV)
    assert not marker.exists() and contract_of(tmp_path / "policy.pt")["parity"]["from"] == f"the environment {ENV}"


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(TD3("MlpPolicy", ENV, **small()), tmp_path)

    def refused(error: type[Exception], words: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=words):
            export_policy(*arguments, data=DATA, **options)

    refused(ValueError, r"The suffix of .*: expected one of .onnx \(onnx\), .pt \(torchscript\), .pt2", model, "policy.zip")
    refused(ValueError, "has the suffix of onnx: files of torchscript end in .pt", model, "a.onnx", format="torchscript")
    refused(ValueError, "no format 'onx': did you mean 'onnx'", model, "a.onnx", format="onx")
    refused(ValueError, "'math:sqrt' cannot be exported: expected a .zip", "math:sqrt", tmp_path / "a.pt")
    refused(FileNotFoundError, "No policy .*other.zip", tmp_path / "other.zip", tmp_path / "a.pt")
    (tmp_path / "folder.pt").mkdir()
    refused(IsADirectoryError, "folder.pt' is a folder: choose another name", model, tmp_path / "folder.pt")
    (tmp_path / "notes.json").write_text('{"mine": true}')
    refused(ValueError, "notes.json' would get the contract, but is something else", model, tmp_path / "notes.onnx")
    choices = saved(DQN("MlpPolicy", "CartPole-v1", buffer_size=10, **small()), tmp_path, "choices.zip")
    with pytest.raises(ValueError, match=r"expected actions that are a Box, found Discrete\(2\)"):
        export_policy(choices, tmp_path / "a.pt", env="CartPole-v1")
    memory = saved(RecurrentPPO("MlpLstmPolicy", ENV, device="cpu", n_steps=8), tmp_path, "memory.zip")
    refused(ValueError, "it has a memory", memory, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(ImportError, r"needs onnxscript, not installed here: pip install 'sb3-offline-ft\[onnx\]'", model, "a.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(th, "__version__", "2.5.1+cpu")
    refused(ImportError, r"needs torch 2.6 or later, not installed here: pip install", model, "a.onnx")
    assert not list(tmp_path.glob("a.*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that the command wrote, in the folder of its model."""
    folder = tmp_path_factory.mktemp("exported")
    model = saved(TD3("MlpPolicy", ENV, **small()), folder)
    result = CliRunner().invoke(app, ["export", str(model), str(folder / "policy.onnx"), "--data", DATA])
    assert result.exit_code == 0, result.output
    assert "of the range of the actions, on 1,000 observations of the dataset pendulum-medium" in result.output
    assert f"Contract: {folder / 'policy.json'}" in result.output
    return folder / "policy.onnx"


def test_the_command_reports_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path / "no.zip"), str(tmp_path / "policy.onnx")])
    assert result.exit_code == 1 and "sb3-offline-ft export: No policy" in result.output


def test_the_same_policy_gives_the_same_file(exported: Path, tmp_path: Path) -> None:
    export_policy(exported.with_name("model.zip"), tmp_path / "again.onnx", data=DATA)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_a_contract_of_another_file_is_kept(exported: Path) -> None:
    before = exported.with_suffix(".json").read_bytes()
    with pytest.raises(ValueError, match=r"policy.json' would get the contract, but is the contract of policy.onnx: choose"):
        export_policy(exported.with_name("model.zip"), exported.with_suffix(".pt"), data=DATA)
    assert exported.with_suffix(".json").read_bytes() == before and not exported.with_suffix(".pt").exists()


def test_robustness_takes_an_exported_policy(exported: Path) -> None:
    policies = {"candidate": str(exported), "baseline": str(exported.with_name("model.zip"))}
    result = run_robustness(policies, ENV, {"max_torque": [0.5]}, n_seeds=1, random_return=-1300)
    (response,) = result.responses
    returns = [[values["return"][0] for values in response.values[role]] for role in policies]
    np.testing.assert_allclose(returns[0], returns[1], rtol=1e-2)
    assert returns[0][0] != returns[0][1]


def test_enjoy_takes_an_exported_policy(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["enjoy", "--onnx", *arguments, "--no-render", "-n", "400", "--seed", "5"])
        enjoy()
        return capsys.readouterr().out

    said = output(str(exported))
    assert said.count("Episode Length 200") == 2 and "2 Episodes" in said
    env, controller, total = gym.make(ENV), load_controller(str(exported)), 0.0
    observation, _ = env.reset(seed=5)
    for _ in range(200):
        observation, reward, *_ = env.step(controller.act(observation))
        total += float(reward)
    assert f"Episode Reward: {total:.2f}\n" in said
    assert output(str(exported), "--env-kwargs", "g:1.0") != said
    with pytest.raises(SystemExit):
        output(str(exported), "--env-kwargs", "q:1.0")
    assert "Cannot make the environment 'Pendulum-v1' (TypeError: " in capsys.readouterr().err
    damaged = shutil.copy(exported, tmp_path)
    for environment in ([1], {"id": ENV, "kwargs": 5}):
        Path(damaged).with_suffix(".json").write_text(json.dumps(contract_of(exported) | {"environment": environment}))
        with pytest.raises(SystemExit):
            output(damaged)
        assert "policy.json is damaged or not a contract" in capsys.readouterr().err
    # One that cannot be rendered
    gym.register("Unseen-v0", lambda: gym.make(ENV))
    assert output(str(exported), "--env", "Unseen-v0") == said
    with pytest.raises(SystemExit):
        output(str(exported), "--env", "MountainCarContinuous-v0")
    assert "does not fit MountainCarContinuous-v0: it was made for observations Box" in capsys.readouterr().err


def test_a_contract_that_is_not_that_of_the_file(exported: Path, tmp_path: Path) -> None:
    path, contract = tmp_path / "policy.onnx", tmp_path / "policy.json"
    path.write_bytes(exported.read_bytes())
    content = contract_of(exported)
    contract.write_text(json.dumps(content | {"policy": content["policy"] | {"sha256": "0" * 64}}))
    with pytest.raises(ValueError, match=r"policy.json' is the contract of another file than .*policy.onnx'"):
        load_controller(str(path))
    for damaged in ("{", json.dumps(content | {"version": 2}), json.dumps(content | {"action": {"name": "action"}})):
        contract.write_text(damaged)
        with pytest.raises(ValueError, match=r"policy.json is damaged or not a contract that `sb3-offline-ft export` wrote"):
            load_controller(str(path))
    contract.unlink()
    os.mkfifo(contract)
    with pytest.raises(ValueError, match=r"policy.json is a named pipe"):
        load_controller(str(path))
    contract.unlink()
    # Without one, and with one of something else, the model speaks for itself
    contract.write_text('{"mine": true}')
    check_fits(load_controller(str(path)), gym.make(ENV))
