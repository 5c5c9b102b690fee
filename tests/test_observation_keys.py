"""Which keys of Dict observations are taken, and in which order they stand in flattened ones."""

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.wrappers import DtypeObservation, FilterObservation, FlattenObservation, TimeLimit, TransformObservation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_offline_ft import TD3BC, load_dataset
from sb3_offline_ft.datasets import OfflineDataset, as_flattened_by, check_compatible, check_spec, fit_to_space
from sb3_offline_ft.datasets.tools.collect import collect_dataset
from sb3_offline_ft.datasets.tools.convert import convert_logs
from sb3_offline_ft.datasets.tools.show import describe_dataset
from tests.keyed_environments import WIDE, Keyed, record
from tests.zoo_runs import run

pytestmark = pytest.mark.usefixtures("minari_root")

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}


def shown(make: Callable[[], gym.Env[Any, Any]], seed: int = 0) -> np.ndarray[Any, Any]:
    """What an environment shows in an episode but for the last observation."""
    env = make()
    rows, over = [env.reset(seed=seed)[0]], False
    while not over:
        observation, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        over = terminated or truncated
        rows.append(observation)
    return np.stack(rows[:-1]).astype(np.float32)


def vectorized(kind: str, make: Callable[[], gym.Env[Any, Any]]) -> VecEnv:
    if kind.startswith("subproc"):
        env: VecEnv = SubprocVecEnv([make, make], start_method=kind.partition(" ")[2] or None)
    else:
        env = DummyVecEnv([make, make])
    if kind == "monitor":
        env = VecMonitor(env)
    return VecNormalize(env, norm_obs=False, norm_reward=False) if kind == "normalize" else env


def make_flat() -> gym.Env[Any, Any]:
    return FlattenObservation(Keyed())


def make_flat_within_wrappers() -> gym.Env[Any, Any]:
    return TimeLimit(DtypeObservation(FlattenObservation(TimeLimit(Keyed(), 9)), np.float32), 9)


@pytest.mark.parametrize("make", [make_flat, make_flat_within_wrappers])
@pytest.mark.parametrize("kind", ["dummy", "subproc", "subproc spawn", "monitor", "normalize"])
def test_flattened_data_has_the_order_of_the_environment(kind: str, make: Callable[[], gym.Env[Any, Any]]) -> None:
    record(Keyed(), "keyed/one-v0")
    env = vectorized(kind, make)
    model = TD3BC("MlpPolicy", env, dataset="keyed/one-v0", **TINY)
    model.load_offline_data()
    assert model.offline_dataset is not None
    expected = np.tile(shown(make), (3, 1))
    np.testing.assert_array_equal(expected[0], [1.0, 2.0])
    np.testing.assert_array_equal(model.offline_dataset.observations, expected)
    env.close()


SPACES = [
    spaces.Dict(position=WIDE, goal=WIDE),
    spaces.Dict(OrderedDict(z=WIDE, a=spaces.Box(-100, 100, (2, 2)), m=WIDE)),
    spaces.Dict([("y", WIDE), ("mode", spaces.Discrete(3)), ("x", spaces.Box(-100, 100, (3,), np.float64))]),
    spaces.Dict({"b": WIDE, "a": WIDE}),
    spaces.Dict({"b": WIDE, "a": WIDE}, sort_keys=False),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_minari_data_keeps_the_order_of_the_keys(space: spaces.Dict, data_format: str) -> None:
    collector = minari.DataCollector(Keyed(space), data_format=data_format)
    collector.reset(seed=0, options={"minari_autoseed": False})
    while not collector.step(np.zeros(1, np.float32))[2]:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.create_dataset("keyed/kept-v0")
        del collector
        gc.collect()
    dataset = load_dataset("keyed/kept-v0")
    assert list(dataset.observations) == list(dataset.observation_space.spaces) == list(space)  # type: ignore[arg-type, union-attr]
    expected = shown(lambda: FlattenObservation(Keyed(space)))
    # With and without an environment at hand
    flat = fit_to_space(dataset, flatten_space(space))
    np.testing.assert_array_equal(flat.observations, expected)
    through = as_flattened_by(dataset, FlattenObservation(Keyed(space)))
    np.testing.assert_array_equal(fit_to_space(through, flatten_space(space)).observations, expected)


names = st.lists(st.text("abz/", min_size=1, max_size=3).filter(lambda name: name.strip("/") == name), max_size=5, unique=True)
leaves = st.one_of(
    st.lists(st.integers(1, 2), min_size=1, max_size=2).map(lambda shape: spaces.Box(-100, 100, tuple(shape))),
    st.integers(1, 3).map(spaces.Discrete),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=names.filter(bool), data=st.data())
def test_any_order_of_recording_meets_any_order_of_the_environment(names: list[str], data: st.DataObject) -> None:
    subspaces = {name: data.draw(leaves) for name in names}
    recorded_in = spaces.Dict([(name, subspaces[name]) for name in data.draw(st.permutations(names))])
    flattened = spaces.Dict([(name, subspaces[name]) for name in data.draw(st.permutations(names))])
    rows = [recorded_in.sample() for _ in range(4)]
    columns = {key: np.stack([row[key] for row in rows]) for key in recorded_in}
    dataset = OfflineDataset.from_columns(
        columns, np.zeros((4, 1), np.float32), np.zeros(4), columns, np.ones(4, bool), observation_space=recorded_in
    )
    env = FlattenObservation(Keyed(flattened))
    expected = np.stack([flatten(flattened, row) for row in rows]).astype(np.float32)
    without_space = OfflineDataset.from_columns(
        {key: column.reshape(4, -1) if column.ndim == 1 else column for key, column in columns.items()},
        np.zeros((4, 1), np.float32), np.zeros(4),
        {key: column.reshape(4, -1) if column.ndim == 1 else column for key, column in columns.items()}, np.ones(4, bool),
    )  # fmt: skip
    for one in (dataset, without_space):
        found = as_flattened_by(one, env)
        check_compatible(found, env.observation_space, env.action_space)
        np.testing.assert_array_equal(fit_to_space(found, env.observation_space).observations, expected)
    # Behind a wrapper that says nothing: right, or refused
    opaque = TransformObservation(Keyed(flattened), lambda row: flatten(flattened, row), flatten_space(flattened))
    unknown = as_flattened_by(dataset, opaque)
    try:
        found = fit_to_space(unknown, opaque.observation_space)
    except ValueError as error:
        assert "not known in which order" in str(error)
    else:
        np.testing.assert_array_equal(found.observations, expected)
    named = as_flattened_by(dataset.select_keys(list(flattened)), opaque)
    np.testing.assert_array_equal(fit_to_space(named, opaque.observation_space).observations, expected)


def concatenating(keys: tuple[str, ...]) -> gym.Env[Any, Any]:
    """A flat environment by a wrapper of one's own."""
    env = Keyed()
    return TransformObservation(env, lambda row: np.concatenate([row[key] for key in keys]), spaces.Box(-100, 100, (2,)))


def test_an_order_that_cannot_be_known_must_be_named(tmp_path: Path) -> None:
    record(Keyed(), "keyed/one-v0")
    for keys in (("position", "goal"), ("goal", "position")):
        env = DummyVecEnv([lambda keys=keys: concatenating(keys)])
        with pytest.raises(ValueError) as raised:
            TD3BC("MlpPolicy", env, dataset="keyed/one-v0", **TINY).load_offline_data()
        for part in ("position, goal or goal, position", "?keys=position,goal", "keys=['position', 'goal']"):
            assert part in str(raised.value)
        spec = f"keyed/one-v0?keys={','.join(keys)}"
        model = TD3BC("MlpPolicy", env, dataset=spec, **TINY).pretrain(2)
        assert model.offline_dataset is not None
        np.testing.assert_array_equal(model.offline_dataset.observations[:4], shown(lambda keys=keys: concatenating(keys)))
        model.save(tmp_path / "model")
        again = TD3BC.load(tmp_path / "model", env=env)
        assert again.dataset == spec
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.pretrain(1)
        assert again.dataset_fingerprint == model.dataset_fingerprint


def test_the_order_is_known_to_a_model_that_is_loaded_without_an_environment(tmp_path: Path) -> None:
    record(Keyed(spaces.Dict(goal=WIDE, position=WIDE)), "keyed/other-v0")
    model = TD3BC("MlpPolicy", make_flat(), dataset="keyed/other-v0", **TINY).pretrain(2)
    model.save(tmp_path / "model")
    again = TD3BC.load(tmp_path / "model")
    again.pretrain(1)
    assert model.offline_dataset is not None and again.offline_dataset is not None
    np.testing.assert_array_equal(again.offline_dataset.observations, model.offline_dataset.observations)
    np.testing.assert_array_equal(model.offline_dataset.observations[0], [2.0, 1.0])


def test_combined_minari_datasets_do_not_know_their_order() -> None:
    """Minari sorts the keys when it combines."""
    record(Keyed(), "keyed/one-v0")
    record(Keyed(), "keyed/two-v0")
    minari.combine_datasets([minari.load_dataset(f"keyed/{name}-v0") for name in ("one", "two")], "keyed/both-v0")
    dataset = load_dataset("keyed/both-v0")
    flat = flatten_space(Keyed().observation_space)
    for function in (lambda: fit_to_space(dataset, flat), lambda: check_compatible(dataset, flat, Keyed().action_space)):
        with pytest.raises(ValueError, match="goal, position or position, goal"):
            function()
    known = as_flattened_by(dataset, make_flat())
    np.testing.assert_array_equal(fit_to_space(known, flat).observations[0], [1.0, 2.0])
    # What is known of one part counts for all, unless they disagree
    both = load_dataset(["keyed/both-v0", "keyed/one-v0"])
    np.testing.assert_array_equal(fit_to_space(both, flat).observations[[0, -4]], [[1.0, 2.0]] * 2)
    record(Keyed(spaces.Dict(goal=WIDE, position=WIDE)), "keyed/other-v0")
    with pytest.raises(ValueError, match="not known in which order"):
        fit_to_space(load_dataset("keyed/one-v0 + keyed/other-v0"), flat)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Dict(position=WIDE, aim=WIDE), r"expected .* position, aim, found position, goal \(missing: aim\)"),
        (spaces.Dict(position=spaces.Box(-100, 100, (2,))), "keys position, found position, goal"),
        (spaces.Dict(goal=WIDE), r"not in the environment: position\); take those with \?keys=goal"),
        (spaces.Dict(position=spaces.Box(-9, 100, (1,)), goal=WIDE), "observation 'position' space's low differs"),
        (spaces.Dict(position=spaces.Discrete(3), goal=WIDE), "'position' of the space Discrete"),
        (spaces.Dict(position=WIDE, goal=spaces.MultiBinary(2)), "found MultiBinary"),
        (spaces.Box(-100, 100, (2, 1)), "expected one array"),
    ],
)
def test_environments_that_flatten_something_else(space: spaces.Space[Any], message: str) -> None:
    record(Keyed(), "keyed/one-v0")
    env = FlattenObservation(TransformObservation(Keyed(), lambda row: row, space))
    with pytest.raises(ValueError, match=message):
        TD3BC("MlpPolicy", env, dataset="keyed/one-v0", **TINY).load_offline_data()


def test_arrays_of_another_shape_are_not_flattened() -> None:
    data = OfflineDataset.from_columns(*[np.zeros((4, 2, 3), np.float32), np.zeros((4, 1), np.float32), np.zeros(4)],
        np.zeros((4, 2, 3), np.float32), np.ones(4, bool))  # fmt: skip
    env = FlattenObservation(TransformObservation(Keyed(), lambda row: row, spaces.Box(-1, 1, (3, 2))))
    with pytest.raises(ValueError, match=r"expected observations of shape \(3, 2\), found \(2, 3\)"):
        as_flattened_by(data, env)


NESTED = spaces.Dict(
    observation=spaces.Box(-100, 100, (3,)),
    achieved_goal=spaces.Dict(kettle=spaces.Box(-100, 100, (2,)), burner=WIDE),
    desired_goal=spaces.Dict(kettle=spaces.Box(-100, 100, (2,)), burner=WIDE),
)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_nested_keys(data_format: str) -> None:
    collector = minari.DataCollector(Keyed(NESTED), data_format=data_format)
    for seed in range(2):
        collector.reset(seed=seed, options={"minari_autoseed": False})
        while not collector.step(np.zeros(1, np.float32))[2]:
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.create_dataset("keyed/kitchen-v0")
        del collector
        gc.collect()
    for function in (check_spec, load_dataset):
        with pytest.raises(ValueError, match=r"a Dict within a Dict.*\?keys=observation"):
            function("keyed/kitchen-v0")
    dataset = load_dataset("keyed/kitchen-v0?keys=observation,achieved_goal/kettle")
    assert list(dataset.observations) == ["observation", "achieved_goal/kettle"]
    assert isinstance(dataset.observations, dict)
    np.testing.assert_array_equal(dataset.observations["observation"][0], [1, 2, 3])
    np.testing.assert_array_equal(dataset.observations["achieved_goal/kettle"][1], [4.0625, 5.0625])
    np.testing.assert_array_equal(fit_to_space(dataset, spaces.Box(-100, 100, (5,))).observations[0], [1, 2, 3, 4, 5])
    # A group stands for all in it; the whole of the flattened environment
    whole = load_dataset("keyed/kitchen-v0", keys=["desired_goal", "achieved_goal", "observation"])
    env = FlattenObservation(Keyed(NESTED))
    model = TD3BC("MlpPolicy", env, dataset=whole, **TINY)
    model.load_offline_data()
    assert model.offline_dataset is not None
    np.testing.assert_array_equal(model.offline_dataset.observations[:4], shown(lambda: FlattenObservation(Keyed(NESTED))))
    for wrong, message in (
        ("achieved_goal/kettel", "no key 'achieved_goal/kettel'. Did you mean 'achieved_goal/kettle"),
        ("goal", "no key 'goal'"),
        ("observation,observation", "observation twice"),
        ("achieved_goal,achieved_goal/kettle", "names achieved_goal/kettle twice"),
    ):
        for function in (check_spec, load_dataset):
            with pytest.raises(ValueError, match=message):
                function(f"keyed/kitchen-v0?keys={wrong}")


def make_goals(flatten: bool, keys: tuple[str, ...] = ("observation", "desired_goal")) -> gym.Env[Any, Any]:
    env = FilterObservation(gym.make("KeyedGoals-v0"), keys)
    return FlattenObservation(env) if flatten else env


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("sources", ["minari", "npz", "hdf5", "object", "list"])
def test_a_subset_of_the_keys(flatten: bool, sources: str, tmp_path: Path) -> None:
    import h5py

    record(gym.make("KeyedGoals-v0"), "keyed/goals-v0")
    whole = load_dataset("keyed/goals-v0")
    arrays = {f"{name}/{key}": getattr(whole, name)[key] for name in ("observations", "next_observations")
              for key in whole.observations}  # fmt: skip
    arrays |= {name: getattr(whole, name) for name in ("actions", "rewards", "terminations", "truncations")}
    np.savez(tmp_path / "goals.npz", **arrays)
    with h5py.File(tmp_path / "goals.hdf5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    keys = "?keys=observation,desired_goal"
    spec: Any = {
        "minari": f"keyed/goals-v0{keys}",
        "npz": f"{tmp_path / 'goals.npz'}{keys}",
        "hdf5": f"{tmp_path / 'goals.hdf5'}{keys}",
        "object": load_dataset(whole, keys=["observation", "desired_goal"]),
        "list": [{"spec": "keyed/goals-v0", "keys": ["observation", "desired_goal"], "weight": 0.5},
                 (f"{tmp_path / 'goals.npz'}{keys}&min_length=2", 0.5)],
    }[sources]  # fmt: skip
    env = make_goals(flatten)
    with pytest.raises(ValueError, match=r"achieved_goal\); take those with \?keys=desired_goal,observation"):
        TD3BC("MlpPolicy" if flatten else "MultiInputPolicy", env, dataset=whole, **TINY).load_offline_data()
    model = TD3BC("MlpPolicy" if flatten else "MultiInputPolicy", env, dataset=spec, **TINY).pretrain(3)
    data = model.offline_dataset
    assert data is not None
    if flatten:
        np.testing.assert_array_equal(data.observations[:4], shown(lambda: make_goals(True)))
    else:
        assert isinstance(data.observations, dict)
        assert {key: column[0].tolist() for key, column in data.observations.items()} == {
            "observation": [1.0],
            "desired_goal": [2.0],
        }
    loaded = load_dataset(spec)
    assert loaded.fingerprint != whole.fingerprint
    if sources == "object":
        assert loaded.spec == "keyed/goals-v0?keys=observation,desired_goal"
    assert loaded.spec is not None and load_dataset(loaded.spec).fingerprint == loaded.fingerprint
    model.save(tmp_path / "model")
    again = TD3BC.load(tmp_path / "model", env=env).pretrain(1)
    assert again.dataset_fingerprint == loaded.fingerprint


def test_one_key_for_an_environment_that_shows_an_array() -> None:
    record(gym.make("KeyedGoals-v0"), "keyed/goals-v0")
    env = TransformObservation(gym.make("KeyedGoals-v0"), lambda row: row["desired_goal"], WIDE)
    model = TD3BC("MlpPolicy", env, dataset="keyed/goals-v0?keys=desired_goal", **TINY).pretrain(1)
    assert model.offline_dataset is not None
    np.testing.assert_array_equal(model.offline_dataset.observations[:2], [[2.0], [2.0625]])
    picture = spaces.Box(0, 255, (8, 9, 3), np.uint8)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 9, 3), np.uint8)
    data = OfflineDataset.from_columns(
        {"image": images, "speed": np.zeros((4, 1))}, np.zeros((4, 1), np.float32), np.zeros(4),
        {"image": images, "speed": np.zeros((4, 1))}, np.ones(4, bool),
    ).select_keys("image")  # fmt: skip
    np.testing.assert_array_equal(fit_to_space(data, picture).observations, images)
    first = spaces.Box(0, 255, (3, 8, 9), np.uint8)
    check_compatible(data, first, WIDE)
    np.testing.assert_array_equal(fit_to_space(data, first).observations, np.moveaxis(images, -1, 1))


def test_keys_with_signs_in_their_names() -> None:
    odd = ["a,b", "c d", "e&f=1", "g + h", "100%"]
    columns = {key: np.full((4, 1), index, np.float32) for index, key in enumerate(odd)}
    data = OfflineDataset.from_columns(columns, np.zeros((4, 1), np.float32), np.zeros(4), columns, np.ones(4, bool))
    kept = load_dataset(data.with_facts(spec="some/data-v0"), keys=odd[::-1])
    assert list(kept.observations) == odd[::-1]
    assert kept.spec is not None and " " not in kept.spec
    again = load_dataset({"spec": data, "keys": kept.spec.partition("?keys=")[2]})
    assert again.fingerprint == kept.fingerprint


@pytest.mark.parametrize(
    ("spec", "keywords", "message"),
    [
        ("?keys=", {}, "keys must be names"),
        ("", {"keys": []}, "keys must be names"),
        ("", {"keys": [1]}, "keys must be names"),
        ("?keys=a", {"keys": "b"}, "keys is a in the spec and b as a keyword"),
        ("", {"keys": "a"}, r"found one array of shape \(3,\)"),
    ],
)
def test_wrong_keys(spec: str, keywords: dict[str, Any], message: str) -> None:
    for function in (check_spec, load_dataset):
        with pytest.raises(ValueError, match=message):
            function(f"bundled:pendulum-medium{spec}", **keywords)


def test_what_we_record_keeps_the_order(tmp_path: Path) -> None:
    collect_dataset("keyed/collected-v0", "Keyed-v0", algorithm="random", n_steps=8)
    columns = {"position": np.ones((4, 1), np.float32), "goal": np.full((4, 1), 2, np.float32)}
    space = Keyed().observation_space
    data = OfflineDataset.from_columns(columns, np.zeros((4, 1), np.float32), np.zeros(4), columns, np.ones(4, bool))
    convert_logs([data], "keyed/converted-v0", action_low=-1, action_high=1)
    convert_logs(["keyed/collected-v0"], "keyed/again-v0", env="Keyed-v0")
    convert_logs(["keyed/collected-v0"], "keyed/flat-v0", env=FlattenObservation(Keyed()))
    for name in ("collected", "converted", "again"):
        dataset = load_dataset(f"keyed/{name}-v0")
        assert list(dataset.observations) == ["position", "goal"], name
        assert list(dataset.observation_space.spaces) == ["position", "goal"]  # type: ignore[union-attr]
        if name != "converted":
            np.testing.assert_array_equal(fit_to_space(dataset, flatten_space(space)).observations[0], [1.0, 2.0])
    np.testing.assert_array_equal(load_dataset("keyed/flat-v0").observations[0], [1.0, 2.0])


def test_replay_buffers_of_dict_observations(tmp_path: Path) -> None:
    """Filled in an environment with keys, read for one that flattens them."""
    space = spaces.Dict([("z", WIDE), ("mode", spaces.Discrete(3)), ("a", WIDE)])
    model = TD3BC("MultiInputPolicy", Keyed(space), learning_starts=50, **TINY)
    with pytest.warns(UserWarning, match="neither a dataset nor pretrained"):
        model.learn(12)
    model.save_replay_buffer(tmp_path / "buffer.npz")
    flat = TD3BC("MlpPolicy", FlattenObservation(Keyed(space)), dataset=tmp_path / "buffer.npz", **TINY)
    flat.load_offline_data()
    assert flat.offline_dataset is not None
    np.testing.assert_array_equal(flat.offline_dataset.observations[:4], shown(lambda: FlattenObservation(Keyed(space))))


def test_keys_are_shown() -> None:
    record(gym.make("KeyedGoals-v0"), "keyed/goals-v0")
    facts = describe_dataset(load_dataset("keyed/goals-v0?keys=observation,desired_goal"))
    assert [one.name for one in facts.observations] == ["observations['observation']", "observations['desired_goal']"]
    assert facts.provenance["keys"] == ["observation", "desired_goal"]
    assert facts.spec == "keyed/goals-v0?keys=observation,desired_goal"


def test_keys_in_the_zoo(tmp_path: Path) -> None:
    record(Keyed(), "keyed/one-v0")
    settings = {"env_wrapper": "gymnasium.wrappers.FlattenObservation", "offline_steps": 3, "policy": "MlpPolicy"}
    settings |= {"policy_kwargs": {"net_arch": [8]}, "callback": None, "dataset": "keyed/one-v0?keys=goal,position"}
    model = run(tmp_path, "td3bc", settings, environment="Keyed-v0", n_timesteps=30)
    assert model.dataset == "keyed/one-v0?keys=goal,position" and model.offline_dataset is not None
    # The order of the environment comes first
    np.testing.assert_array_equal(model.offline_dataset.observations[0], [1.0, 2.0])


def test_an_environment_with_another_order_is_refused_later_on() -> None:
    record(Keyed(), "keyed/one-v0")
    model = TD3BC("MlpPolicy", FlattenObservation(Keyed()), dataset="keyed/one-v0", **TINY)
    model.pretrain(1)
    model.set_env(TimeLimit(FlattenObservation(Keyed()), 9))
    other = FlattenObservation(Keyed(spaces.Dict([("goal", WIDE), ("position", WIDE)])))
    with pytest.raises(ValueError, match=r"in the order goal, position, and the data was put into the order position, goal"):
        model.set_env(other)
    env = model.get_env()
    assert env is not None and list(env.get_attr("env")[0].unwrapped.observation_space) == ["position", "goal"]
