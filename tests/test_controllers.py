"""Controllers: each kind acts as what it was made from, and says clearly what it cannot be."""

import hashlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from sb3_contrib import ARS, TQC, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import VecNormalize

from sb3_offline_ft import TD3BC, TD3C
from sb3_offline_ft.controllers import Controller, check_fits, load_controller
from sb3_offline_ft.testing import PointEnv
from tests.zoo_runs import UNGUARDED, make_manager, run

ENV = "Pendulum-v1"
NORMALIZED = {"learning_rate": 1e-2, "normalize": "dict(norm_reward=False)"}
NAME = "sb3_offline_ft.deployment.ChampionChallenger"


def small() -> dict[str, Any]:
    """Arguments for a small agent; SB3 changes the dictionary of a policy's arguments."""
    return {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 3}


def observations(env_id: str = ENV, n: int = 5) -> list[Any]:
    space = gym.make(env_id).observation_space
    space.seed(1)
    return [space.sample() for _ in range(n)]


def acts_like(controller: Controller, model: Any, seen: list[Any], statistics: Path | None = None) -> bool:
    if statistics is not None:
        normalize: VecNormalize = pickle.loads(statistics.read_bytes())
        expected = [model.predict(normalize.normalize_obs(each), deterministic=True)[0] for each in seen]
    else:
        expected = [model.predict(each, deterministic=True)[0] for each in seen]
    controller.reset()
    return all(np.array_equal(controller.act(each), action) for each, action in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(TD3, {}), (SAC, {}), (TQC, {}), (PPO, {"use_sde": True}), (TD3C, {"dataset": "bundled:pendulum-medium"})],
)
def test_a_zip_file_acts_as_its_model(algorithm: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", ENV, **small(), **options)
    model.save(tmp_path / "model")
    state = th.random.get_rng_state()
    controller = load_controller(str(tmp_path / "model.zip"), ENV)
    assert th.equal(th.random.get_rng_state(), state), "loading draws from the generator of others"
    assert acts_like(controller, model, observations())
    assert controller.name == str(tmp_path / "model.zip")
    assert controller.sha256 == hashlib.sha256((tmp_path / "model.zip").read_bytes()).hexdigest()
    check_fits(controller, gym.make(ENV))
    assert acts_like(load_controller(str(tmp_path / "model"), ENV), model, observations()), "the suffix may be left out"


def test_other_kinds_of_policies(tmp_path: Path) -> None:
    """Linear ones without a learning rate, and those for choices instead of numbers."""
    ars = ARS("LinearPolicy", ENV, device="cpu", seed=0)
    dqn = DQN("MlpPolicy", "CartPole-v1", **small())
    for model, env_id in ((ars, ENV), (dqn, "CartPole-v1")):
        model.save(tmp_path / "model")
        controller = load_controller(str(tmp_path / "model.zip"))
        check_fits(controller, gym.make(env_id))
        assert acts_like(controller, model, observations(env_id))


def test_a_recurrent_policy_remembers_until_its_reset(tmp_path: Path) -> None:
    model = RecurrentPPO("MlpLstmPolicy", ENV, device="cpu", seed=0, n_steps=8)
    with th.no_grad():
        # The first weights of the last layer are so small that actions hardly differ
        model.policy.action_net.weight.mul_(100)
    model.save(tmp_path / "model")
    controller, seen = load_controller(str(tmp_path / "model.zip")), observations(n=1)[0]
    controller.reset()
    first, second = controller.act(seen), controller.act(seen)
    expected, memory = model.predict(seen, deterministic=True)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, model.predict(seen, memory, deterministic=True)[0])
    assert not np.array_equal(first, second)
    controller.reset()
    np.testing.assert_array_equal(controller.act(seen), first)


def test_dict_observations(tmp_path: Path) -> None:
    parts = {"goal": spaces.Box(-1, 1, (1,), np.float32), "place": spaces.Box(-1, 1, (2,), np.float32)}
    env = PointEnv(spaces.Dict(parts))
    model = TD3BC("MultiInputPolicy", env, **small())
    model.save(tmp_path / "model")
    controller = load_controller(str(tmp_path / "model.zip"))
    check_fits(controller, env)
    env.observation_space.seed(0)
    assert acts_like(controller, model, [env.observation_space.sample() for _ in range(3)])
    with pytest.raises(ValueError, match=r"does not fit Pendulum-v1: it was made for observations Dict\(.*has Box"):
        check_fits(controller, gym.make(ENV))


def test_a_folder_of_a_run_has_its_best_model(tmp_path: Path) -> None:
    model = run(tmp_path)
    folder = tmp_path / "logs/td3c/Pendulum-v1_1"
    model.save(folder / "rl_model_60_steps")
    model.save(folder / f"{ENV}.zip")
    best = TD3C.load(folder / "best_model.zip", device="cpu")
    assert acts_like(load_controller(str(folder), ENV), best, observations())
    (folder / "best_model.zip").unlink()
    assert acts_like(load_controller(str(folder), ENV), model, observations())
    (folder / f"{ENV}.zip").unlink()
    with pytest.raises(ValueError, match=r"has no policy: expected a run's folder such as"):
        load_controller(str(folder), ENV)


@pytest.fixture(scope="module")
def champions_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ``VecNormalize`` whose champion is the pretrained policy, with statistics of its own."""
    settings = UNGUARDED | {"callback": [{NAME: {"risk_budget": 0.0, "verbose": 0}}], "warmup_steps": 0}
    manager = make_manager(
        tmp_path_factory.mktemp("run"),
        hyperparams=settings | NORMALIZED,
        n_timesteps=150,
    )
    model, _ = manager.setup_experiment()
    with pytest.warns(UserWarning, match="VecNormalize updates its statistics online"):
        manager.learn(model)
    manager.save_trained_model(model)
    return Path(manager.save_path)


def test_normalized_observations(champions_run: Path) -> None:
    folder, inner = champions_run, champions_run / ENV
    champion, learner = (TD3C.load(folder / name, device="cpu") for name in ("best_model.zip", f"{ENV}.zip"))
    assert acts_like(load_controller(str(folder)), champion, observations(), folder / "vecnormalize.pkl")
    named = load_controller(str(folder / f"{ENV}.zip"))
    assert acts_like(named, learner, observations(), inner / "vecnormalize_learner.pkl")
    assert not acts_like(named, learner, observations()), "the statistics change nothing"
    contents = [path.read_bytes() for path in (folder / f"{ENV}.zip", inner / "vecnormalize_learner.pkl")]
    assert named.sha256 == hashlib.sha256(b"".join(contents)).hexdigest()


def test_statistics_that_are_missing_or_damaged(champions_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(champions_run, tmp_path / "run")
    (folder / "vecnormalize.pkl").write_bytes(pickle.dumps({"not": "statistics"}))
    with pytest.raises(ValueError, match=r"vecnormalize.pkl is damaged or not a VecNormalize .* found a dict"):
        load_controller(str(folder))
    for path in folder.rglob("vecnormalize*.pkl"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"was trained on normalized observations, but .*vecnormalize.pkl.* is missing"
    ):
        load_controller(str(folder))


def test_a_run_whose_wrappers_the_environment_would_lack(tmp_path: Path) -> None:
    folder = tmp_path / "Pendulum-v1_1"
    (folder / ENV).mkdir(parents=True)
    TD3("MlpPolicy", ENV, **small()).save(folder / f"{ENV}.zip")
    (folder / ENV / "config.yml").write_text(yaml.safe_dump({"frame_stack": 4}))
    with pytest.raises(ValueError, match=r"was trained with frame_stack: 4, which changes what it sees"):
        load_controller(str(folder))


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plant_of_test.py").write_text(
        "def proportional(observation):\n"
        "    return -7 * observation[:1]\n\n"
        "class Counter:\n"
        "    def reset(self):\n"
        "        self.n = 0\n\n"
        "    def __call__(self, observation):\n"
        "        self.n += 1\n"
        "        return [self.n]\n\n"
        "not_a_function = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    controller = load_controller("plant_of_test:proportional", ENV)
    controller.reset(seed=0)
    assert controller.act(np.array([1.0, 2.0, 3.0])).tolist() == [-7] and controller.sha256 is None
    check_fits(controller, gym.make(ENV))
    counter = load_controller("plant_of_test:Counter")
    for _ in range(2):
        counter.reset()
        assert [counter.act(None).tolist() for _ in range(2)] == [[1], [2]]
    with pytest.raises(ValueError, match="Cannot import the controller 'plant_of_test:proportinal'"):
        load_controller("plant_of_test:proportinal")
    with pytest.raises(ValueError, match="'plant_of_test:not_a_function' is a int, expected a function"):
        load_controller("plant_of_test:not_a_function")


def test_zero_and_random() -> None:
    space = spaces.Box(np.array([-1, 0.5], np.float32), np.array([1, 2], np.float32))
    assert load_controller("zero", action_space=space).act(None).tolist() == [0, 0.5]
    controller = load_controller("random", ENV)
    drawn = []
    for seed in (0, 0, 1):
        controller.reset(seed)
        drawn.append([controller.act(None).item() for _ in range(4)])
    assert drawn[0] == drawn[1] != drawn[2] and -2 <= min(drawn[0]) < max(drawn[0]) <= 2
    with pytest.raises(ValueError, match=r"'zero' needs actions that are a Box of numbers, found Discrete\(2\)"):
        load_controller("zero", "CartPole-v1")
    with pytest.raises(ValueError, match="'random' needs an environment"):
        load_controller("random")


@pytest.mark.parametrize("is_dict", [False, True])
def test_onnx_files(is_dict: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    make, number = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.array([[1.0], [2.0], [4.0]], np.float32)
    if is_dict:
        inputs = [make.make_tensor_value_info(name, number, ["batch", 3]) for name in ("b", "a")]
        nodes = [make.make_node("Sub", ["a", "b"], ["x"]), make.make_node("MatMul", ["x", "w"], ["action"])]
    else:
        inputs = [make.make_tensor_value_info("obs", number, ["batch", 3])]
        nodes = [make.make_node("MatMul", ["obs", "w"], ["action"])]
    output = make.make_tensor_value_info("action", number, ["batch", 1])
    graph = make.make_graph(nodes, "controller", inputs, [output], [onnx.numpy_helper.from_array(weights, "w")])
    path = tmp_path / "controller.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    controller = load_controller(str(path))
    seen = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([0.0, 1.0, 0.0])} if is_dict else np.array([1.0, 1.0, 3.0])
    action = controller.act(seen)
    np.testing.assert_array_equal(action, [15.0])
    assert controller.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if is_dict:
        with pytest.raises(ValueError, match="it was made for observations Dict"):
            check_fits(controller, gym.make(ENV))
    else:
        check_fits(controller, gym.make(ENV))
        with pytest.raises(ValueError, match=r"does not fit MountainCar.*made for observations Box\(-inf, inf, \(3,\)"):
            check_fits(controller, gym.make("MountainCarContinuous-v0"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"controller.onnx' is damaged or not a file in ONNX's format"):
        load_controller(str(path))
    with pytest.raises(FileNotFoundError, match="No model"):
        load_controller("missing.onnx")


@pytest.mark.parametrize(
    ("kind", "shape", "made_for"),
    [
        ("INT64", ["batch", 3], r"Box\(-9223372036854775808, 9223372036854775807, \(3,\), int64\)"),
        ("FLOAT", [2], r"Box\(-inf, inf, \(2,\), float32\)"),
        ("FLOAT", [8, 3], r"Box\(-inf, inf, \(8, 3\), float32\)"),
    ],
)
def test_an_onnx_file_that_takes_something_else(kind: str, shape: list[Any], made_for: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    make, number = onnx.helper, getattr(onnx.TensorProto, kind)
    ends = [make.make_tensor_value_info(name, number, shape) for name in ("obs", "action")]
    graph = make.make_graph([make.make_node("Identity", ["obs"], ["action"])], "controller", ends[:1], ends[1:])
    path = tmp_path / "controller.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(ValueError, match=f"does not fit {ENV}: it was made for observations {made_for}"):
        check_fits(load_controller(str(path)), gym.make(ENV))


def test_an_actor_that_torch_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = TD3("MlpPolicy", "MountainCarContinuous-v0", **small())
    path = tmp_path / "actor.onnx"
    model.policy.set_training_mode(False)
    with warnings.catch_warnings():
        # torch's own
        warnings.simplefilter("ignore", FutureWarning)
        th.onnx.export(model.actor, (th.zeros(1, 2),), path, input_names=["observation"], verbose=False)
    controller = load_controller(str(path))
    check_fits(controller, gym.make("MountainCarContinuous-v0"))
    for seen in observations("MountainCarContinuous-v0"):
        expected = model.predict(seen, deterministic=True)[0]
        np.testing.assert_allclose(controller.act(seen), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("missing.zip", FileNotFoundError, "No policy .*missing.zip': expected a .zip saved by"),
        ("randm", ValueError, "'randm' is no controller: expected a .zip .* Did you mean 'random'"),
        ("notes.txt", ValueError, "'notes.txt' is no controller: expected a .zip"),
        ("damaged.zip", ValueError, "damaged.zip' is damaged or not a zip file saved by a Stable-Baselines3 algorithm"),
        (":act", ValueError, "must be given as module:function, found ':act'"),
    ],
)
def test_what_is_no_controller(
    spec: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no controller")
    Path("damaged.zip").write_bytes(b"PK nothing")
    with pytest.raises(error, match=message):
        load_controller(spec, ENV)


def test_a_policy_for_another_environment(tmp_path: Path) -> None:
    TD3("MlpPolicy", "MountainCarContinuous-v0", **small()).save(tmp_path / "car")
    controller = load_controller(str(tmp_path / "car.zip"), ENV)
    with pytest.raises(
        ValueError, match=r"car.zip' does not fit Pendulum-v1: it was made for observations Box.*\(2,\).*\(3,\)"
    ):
        check_fits(controller, gym.make(ENV))
