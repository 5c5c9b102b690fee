"""Data from files of other libraries, and several sources together: each is read as it was recorded."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.common.observations import take_rows
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, check_spec, load_dataset, spec_text
from sb3_offline_ft.testing.point_env import PointEnv

HOPPER, PENDULUM = "bundled:hopper-medium", "bundled:pendulum-medium"
BUNDLED_PENDULUM = Path(__file__).parent.parent / "sb3_offline_ft" / "datasets" / "bundled" / "pendulum-medium"
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))

pytestmark = [
    pytest.mark.usefixtures("minari_root"),
    pytest.mark.filterwarnings("ignore:OfflineTD3 has neither a dataset nor pretrained weights"),
]


@pytest.fixture(scope="module")
def pendulum() -> OfflineDataset:
    return load_dataset(PENDULUM)


@pytest.fixture(scope="module")
def hopper() -> OfflineDataset:
    return load_dataset(HOPPER)


def fails(spec: Any, error: type[Exception], *parts: str, check: bool = True, **options: Any) -> None:
    """Both functions raise this error (``check=False``: only loading), and its message has all the parts."""
    for function in (check_spec, load_dataset) if check else (load_dataset,):
        with pytest.raises(error) as raised:
            function(spec, **options)
        assert type(raised.value) is error
        for part in parts:
            assert part in str(raised.value), f"{part!r} is missing in: {raised.value}"
    if not check:
        check_spec(spec, **options)


# D4RL's files


def write_d4rl(path: Path, data: OfflineDataset, *left_out: str, **more: Any) -> None:
    """Write a file as D4RL's: terminals, timeouts, and facts that are not columns."""
    renamed = {"terminations": "terminals", "truncations": "timeouts"}
    with h5py.File(path, "w") as file:
        for name in COLUMNS:
            if name not in left_out:
                file[renamed.get(name, name)] = getattr(data, name)
        file["infos/qpos"] = np.zeros((len(data), 2))
        file["metadata/algorithm"] = np.bytes_("SAC")
        for name, array in more.items():
            file[name.replace("__", "/")] = array


@pytest.mark.parametrize("suffix", [".hdf5", ".h5"])
def test_d4rl_file(tmp_path: Path, hopper: OfflineDataset, suffix: str) -> None:
    path = tmp_path / f"hopper{suffix}"
    write_d4rl(path, hopper, "observations", observations=hopper.observations.astype(np.float64))
    check_spec(path)
    dataset = load_dataset(path)
    assert dataset.fingerprint == hopper.fingerprint
    assert (dataset.name, dataset.spec) == ("hopper", str(path))
    assert dataset.provenance["source"] == "hdf5"
    assert load_dataset(dataset.spec or "").fingerprint == hopper.fingerprint
    assert load_dataset(f"{path}?min_return=3000").spec == f"{path}?min_return=3000"


def test_d4rl_file_without_next_observations(tmp_path: Path, hopper: OfflineDataset) -> None:
    path = tmp_path / "hopper.hdf5"
    write_d4rl(path, hopper, "next_observations", action_low=[-1.0] * 3, action_high=[1.0] * 3)
    n_timeouts = int(hopper.truncations.sum())
    with pytest.warns(UserWarning, match=f"has no next_observations.* {n_timeouts} last rows"):
        dataset = load_dataset(path)
    kept = np.flatnonzero(~hopper.truncations)
    assert len(dataset) == len(kept) == len(hopper) - n_timeouts
    for name in ("observations", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(hopper, name)[kept])
    inner = np.flatnonzero(~dataset.terminations)
    expected = take_rows(hopper.next_observations, kept)
    np.testing.assert_array_equal(take_rows(dataset.next_observations, inner), expected[inner])
    assert dataset.action_space == spaces.Box(-1.0, 1.0, (3,), np.float32)


def test_hdf5_file_with_keys(tmp_path: Path, pendulum: OfflineDataset) -> None:
    keys = {
        f"{prefix}observations__{key}": getattr(pendulum, f"{prefix}observations")[:, part]  # type: ignore[index]
        for prefix in ("", "next_")
        for key, part in (("angle", slice(0, 2)), ("speed", slice(2, 3)))
    }
    write_d4rl(tmp_path / "dict.h5", pendulum, "observations", "next_observations", **keys)
    check_spec(tmp_path / "dict.h5")
    dataset = load_dataset(tmp_path / "dict.h5")
    assert isinstance(dataset.observations, dict)
    np.testing.assert_array_equal(np.hstack(list(dataset.observations.values())), pendulum.observations)
    write_d4rl(tmp_path / "nested.h5", pendulum, "observations", "next_observations", observations__a__b=np.zeros((3, 1)))
    fails(tmp_path / "nested.h5", ValueError, "observations/a is a group within a group")


def test_hdf5_errors(tmp_path: Path, pendulum: OfflineDataset) -> None:
    path = tmp_path / "data.hdf5"
    fails(path, FileNotFoundError, "No dataset file")
    path.write_bytes(b"nothing")
    fails(path, ValueError, str(path), "damaged or incomplete")
    write_d4rl(path, pendulum, "rewards", "terminations")
    fails(path, ValueError, "has no rewards and no terminations", "expected the arrays observations, actions", "timeouts")
    write_d4rl(path, pendulum, truncations=pendulum.truncations)
    fails(path, ValueError, "both truncations and timeouts", "keep one")
    write_d4rl(path, pendulum, "actions", actions=np.array([b"left", b"right"] * 10_000))
    fails(path, ValueError, "actions must hold real numbers", check=False)
    write_d4rl(path, pendulum, "rewards", rewards=np.zeros(5))
    fails(path, ValueError, "rewards must have shape (20000,)", "found (5,)", check=False)
    write_d4rl(path, pendulum, action_low=[-2.0])
    fails(path, ValueError, "only one of action_low and action_high")
    write_d4rl(path, pendulum)
    whole = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(whole // 2)
    fails(path, ValueError, str(path), "damaged or incomplete")
    shutil.copy(BUNDLED_PENDULUM / "data" / "main_data.hdf5", tmp_path / "renamed.hdf5")
    for minari_file in (tmp_path / "renamed.hdf5", BUNDLED_PENDULUM / "data" / "main_data.hdf5"):
        fails(minari_file, ValueError, "part of a Minari dataset", "name the folder that holds it")


# SB3's replay buffers


class Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps what the environment was given and what it answered."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.rows: list[tuple[Any, ...]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.last, info = self.env.reset(**kwargs)
        return self.last, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        answer = self.env.step(action)
        self.rows.append((self.last, np.array(action), answer[1], answer[0], answer[2], answer[3]))
        self.last = answer[0]
        return answer


def gather(
    path: Path, n_envs: int, n_steps: int, buffer_size: int, algorithm: type[OffPolicyAlgorithm] = TD3, **spaces_: Any
) -> list[list[tuple[Any, ...]]]:
    """Gather random actions with SB3 and save its replay buffer; returns the rows of each environment."""
    recorders: list[Recorder] = []

    def make() -> Recorder:
        recorders.append(Recorder(PointEnv(action_space=ACTIONS, max_steps=12, **spaces_)))
        return recorders[-1]

    env = DummyVecEnv([make] * n_envs)
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    model = algorithm(
        policy, env, buffer_size=buffer_size, learning_starts=10**6, seed=1, device="cpu", policy_kwargs={"net_arch": [4]}
    )
    model.learn(n_steps)
    model.save_replay_buffer(path)
    return [recorder.rows for recorder in recorders]


@pytest.mark.parametrize("algorithm", [TD3, SAC])
@pytest.mark.parametrize(("n_envs", "n_steps", "buffer_size"), [(1, 200, 1000), (3, 120, 3000), (1, 150, 64), (3, 210, 120)])
def test_replay_buffer_of_sb3(
    tmp_path: Path, algorithm: type[OffPolicyAlgorithm], n_envs: int, n_steps: int, buffer_size: int
) -> None:
    path = tmp_path / "buffer.pkl"
    rows = gather(path, n_envs, n_steps, buffer_size, algorithm)
    check_spec(path, trust_pickle=True)
    dataset = load_dataset(path, trust_pickle=True)
    kept = [env_rows[-(buffer_size // n_envs) :] for env_rows in rows]
    begin = 0
    for env_rows in kept:
        for step, (observation, action, reward, next_observation, terminated, truncated) in enumerate(env_rows):
            row = begin + step
            np.testing.assert_array_equal(take_rows(dataset.observations, row), observation)
            np.testing.assert_array_equal(take_rows(dataset.next_observations, row), next_observation)
            np.testing.assert_allclose(dataset.actions[row], action, rtol=1e-5, atol=1e-5)
            assert dataset.rewards[row] == np.float32(reward)
            assert dataset.terminations[row] == terminated
            is_last = step == len(env_rows) - 1
            assert dataset.truncations[row] == (not terminated and (truncated or is_last))
        begin += len(env_rows)
    assert begin == len(dataset)
    assert dataset.terminations.any() and dataset.truncations.sum() > n_envs
    assert dataset.provenance["n_envs"] == n_envs
    assert dataset.provenance["oldest_transitions_overwritten"] == (n_steps >= buffer_size)
    check_compatible(dataset, PointEnv().observation_space, ACTIONS)
    assert dataset.spec == str(path)
    assert dataset.name == "buffer"
    check_spec(dataset.spec, trust_pickle=True)
    assert load_dataset(dataset.spec, trust_pickle=True).fingerprint == dataset.fingerprint


def test_dict_replay_buffer_of_sb3(tmp_path: Path) -> None:
    space = spaces.Dict(
        {"place": spaces.Box(-1.0, 1.0, (2,)), "view": spaces.Box(0, 255, (3, 36, 36), np.uint8), "cell": spaces.Discrete(4)}
    )
    path = tmp_path / "buffer.pkl"
    rows = gather(path, 2, 40, 1000, observation_space=space)
    dataset = load_dataset(f"{path}?trust_pickle=1")
    expected = [row[0] for env_rows in rows for row in env_rows]
    assert isinstance(dataset.observations, dict)
    for key in space.spaces:
        column = np.stack([row[key] for row in expected])
        np.testing.assert_array_equal(dataset.observations[key], column.reshape(dataset.observations[key].shape))
    assert dataset.observations["view"].dtype == np.uint8
    assert dataset.provenance["buffer_class"] == "DictReplayBuffer"
    check_compatible(dataset, space, ACTIONS)
    some = load_dataset(path, trust_pickle=True, episodes=2)
    assert some.spec == f"{path}?episodes=2"
    assert load_dataset(some.spec, trust_pickle=True).fingerprint == some.fingerprint


def test_environment_that_was_reset_in_between(tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    model = TD3("MlpPolicy", PointEnv(max_steps=5), learning_starts=100, buffer_size=100, device="cpu", seed=0)
    model.learn(8)
    model.learn(8)
    model.save_replay_buffer(path)
    with pytest.warns(UserWarning, match="1 of 16 rows carry no flag although the next row does not continue"):
        dataset = load_dataset(path, trust_pickle=True)
    assert dataset.truncations[7]


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_pickle_is_read_only_if_trusted(tmp_path: Path) -> None:
    path, trace = tmp_path / "buffer.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    for options in ({}, {"trust_pickle": False}):
        fails(path, ValueError, "runs whatever code it holds", "trust_pickle=True", "?trust_pickle=1", **options)
        fails(f"{path}?trust_pickle=0", ValueError, "runs whatever code it holds", **options)
    fails([PENDULUM, str(path)], ValueError, "runs whatever code it holds")
    check_spec(path, trust_pickle=True)
    assert not trace.exists()
    fails(f"{path}?trust_pickle=perhaps", ValueError, "trust_pickle must be 1 or 0, found 'perhaps'")


def test_replay_buffer_errors(tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    fails(path, FileNotFoundError, "No dataset file", trust_pickle=True)

    def fails_with(content: Any, *parts: str) -> None:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        fails(path, ValueError, *parts, check=False, trust_pickle=True)

    fails_with(b"nothing", str(path), "damaged or incomplete")
    fails_with([1, 2], "holds a list: expected a replay buffer written by SB3's save_replay_buffer")
    vector = spaces.Box(-1.0, 1.0, (2,))
    fails_with(ReplayBuffer(4, vector, ACTIONS), "is empty")
    fails_with(ReplayBuffer(4, vector, spaces.Discrete(3)), "actions must be a Box of floats, found Discrete(3)")
    fails_with(ReplayBuffer(4, spaces.Discrete(3), ACTIONS), "observations must be a Box or a Dict of them, found Discrete")
    lean = ReplayBuffer(4, vector, ACTIONS, optimize_memory_usage=True, handle_timeout_termination=False)
    fails_with(lean, "optimize_memory_usage=True", "Gather it again with optimize_memory_usage=False")
    row = np.zeros((1, 2), np.float32)
    unbounded = ReplayBuffer(4, vector, spaces.Box(-np.inf, np.inf, (2,)))
    unbounded.add(row, row, row, np.zeros(1), np.zeros(1), [{}])
    fails_with(unbounded, "actions must have finite bounds")
    whole = pickle.dumps(unbounded)
    fails_with(whole[: len(whole) // 2], "damaged or incomplete")
    fails_with(b"\x80\x04cno_such_module\nThing\n.", "cannot be imported here", "no_such_module", "install them")
    blind = ReplayBuffer(4, vector, ACTIONS, handle_timeout_termination=False)
    blind.add(row, row, row, np.zeros(1), np.ones(1), [{"TimeLimit.truncated": True}])
    path.write_bytes(pickle.dumps(blind))
    with pytest.warns(UserWarning, match="handle_timeout_termination=False: its time limits count as terminations"):
        assert load_dataset(path, trust_pickle=True).terminations.tolist() == [True]


# Our own replay buffers


def gather_ours(path: Path, n_envs: int, n_steps: int, buffer_size: int, **spaces_: Any) -> list[list[tuple[Any, ...]]]:
    return gather(path, n_envs, n_steps, buffer_size, OfflineTD3, **spaces_)


@pytest.mark.parametrize("name", ["buffer.npz", "replay_buffer.pkl"])
@pytest.mark.parametrize(("n_envs", "n_steps", "buffer_size"), [(1, 200, 1000), (3, 210, 120)])
def test_our_replay_buffer(tmp_path: Path, name: str, n_envs: int, n_steps: int, buffer_size: int) -> None:
    """rl-zoo3 names it as SB3's pickle files. It needs no trust, and is the data of the same run with SB3."""
    path = tmp_path / name
    rows = gather_ours(path, n_envs, n_steps, buffer_size)
    check_spec(path)
    dataset = load_dataset(path)
    kept = [row for env_rows in rows for row in env_rows[-(buffer_size // n_envs) :]]
    np.testing.assert_array_equal(dataset.observations, np.stack([row[0] for row in kept]))
    np.testing.assert_array_equal(dataset.next_observations, np.stack([row[3] for row in kept]))
    np.testing.assert_allclose(dataset.actions, np.stack([row[1] for row in kept]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dataset.terminations, [row[4] for row in kept])
    n_rows = len(kept) // n_envs
    ends = np.array([row[4] or row[5] for row in kept])
    ends[n_rows - 1 :: n_rows] = True
    np.testing.assert_array_equal(dataset.truncations, ends & ~dataset.terminations)

    gather(tmp_path / "sb3.pkl", n_envs, n_steps, buffer_size)
    theirs = load_dataset(tmp_path / "sb3.pkl", trust_pickle=True)
    assert dataset.fingerprint == theirs.fingerprint and dataset.action_space == theirs.action_space
    facts = ("n_envs", "oldest_transitions_overwritten")
    assert all(dataset.provenance[fact] == theirs.provenance[fact] for fact in facts)
    check_compatible(dataset, PointEnv().observation_space, ACTIONS)
    assert dataset.spec == str(path) and dataset.name == path.stem
    assert load_dataset(f"{path}?trust_pickle=1").spec == str(path)
    some = load_dataset([(path, 1.0), (f"{path}?episodes=2", 3.0)])
    assert load_dataset(some.spec).fingerprint == some.fingerprint


def test_our_dict_replay_buffer(tmp_path: Path) -> None:
    space = spaces.Dict(
        {"place": spaces.Box(-1.0, 1.0, (2,)), "view": spaces.Box(0, 255, (3, 36, 36), np.uint8), "cell": spaces.Discrete(4)}
    )
    path = tmp_path / "buffer.npz"
    rows = gather_ours(path, 2, 40, 1000, observation_space=space)
    dataset = load_dataset(path)
    assert isinstance(dataset.observations, dict) and dataset.observations["view"].dtype == np.uint8
    for key in space.spaces:
        column = np.stack([row[0][key] for env_rows in rows for row in env_rows])
        np.testing.assert_array_equal(dataset.observations[key], column.reshape(dataset.observations[key].shape))
    check_compatible(dataset, space, ACTIONS)


def test_our_buffer_with_places_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "buffer.npz"
    model = OfflineTD3("MlpPolicy", PointEnv(max_steps=5), learning_starts=100, buffer_size=100, device="cpu", seed=0)
    model.learn(8)
    model.learn(8)
    model.save_replay_buffer(path)
    dataset = load_dataset(path)
    assert dataset.episode_lengths.tolist() == [5, 3, 5, 3] and dataset.truncations[7]
    assert "unflagged_episode_ends" not in dataset.provenance


def test_our_replay_buffer_errors(tmp_path: Path) -> None:
    whole, empty = tmp_path / "whole.npz", tmp_path / "empty.npz"
    gather_ours(whole, 1, 30, 100)
    content = whole.read_bytes()
    for name in ("half.npz", "half.pkl"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        fails(tmp_path / name, ValueError, str(tmp_path / name), "damaged or incomplete")
    OfflineTD3("MlpPolicy", PointEnv(), device="cpu").save_replay_buffer(empty)
    fails(empty, ValueError, "is empty: expected at least one transition", check=False)
    with np.load(whole) as arrays:
        columns = dict(arrays)
    other = tmp_path / "other.pkl"
    with open(other, "wb") as file:
        np.savez(file, a=np.zeros(3))
    fails(other, ValueError, "expected a replay buffer saved by save_replay_buffer, found a")
    np.savez(tmp_path / "facts.npz", **(columns | {"facts": np.array("{}")}))
    fails(tmp_path / "facts.npz", ValueError, "damaged or incomplete", check=False)
    np.savez(tmp_path / "short.npz", **(columns | {"rewards": columns["rewards"][:7]}))
    fails(tmp_path / "short.npz", ValueError, "rewards", "shape (7, 1)", check=False)
    # A dataset may hold an array of this name
    np.savez(tmp_path / "data.npz", facts=np.zeros(3), dones=np.zeros(3), **{k: np.zeros((3, 2)) for k in COLUMNS[:2]})
    fails(tmp_path / "data.npz", ValueError, "has no rewards and no terminations")
    blind = OfflineTD3(
        "MlpPolicy", PointEnv(max_steps=4), device="cpu", replay_buffer_kwargs={"handle_timeout_termination": False}
    )
    blind.learn(8)
    blind.save_replay_buffer(whole)
    with pytest.warns(UserWarning, match="handle_timeout_termination=False: its time limits count as terminations"):
        assert load_dataset(whole).terminations.sum() == 2


# Several sources together


def test_lists_and_their_one_string(pendulum: OfflineDataset) -> None:
    best, rest = f"{PENDULUM}?top_fraction=0.1", f"{PENDULUM}?max_return=-800&episodes=30"
    expected = OfflineDataset.concatenate([load_dataset(best), load_dataset(rest)])
    text = f"{best} + {rest}"
    for spec in (text, f"  {best}  +   {rest} ", [best, rest], (best, {"spec": PENDULUM, "max_return": -800, "episodes": 30})):
        check_spec(spec)
        dataset = load_dataset(spec)
        assert dataset.fingerprint == expected.fingerprint
        assert dataset.spec == text
        assert [part.weight for part in dataset.sources] == [None, None]
        assert [part.spec for part in dataset.sources] == [best, rest]
        assert [part.name for part in dataset.sources] == [part.removeprefix("bundled:") for part in (best, rest)]
    assert dataset.env_id == "Pendulum-v1"
    assert dataset.reference_scores == pendulum.reference_scores

    text = f"0.7*{best} + 0.3*{rest}"
    for spec in (
        text,
        f"0.7 * {best} + .3* {rest}",
        [(best, 0.7), (rest, 0.3)],
        [[best, 0.7], {"spec": rest, "weight": 0.3}],
        [f"0.7*{best}", f"0.3*{rest}"],
        [{"spec": PENDULUM, "weight": 0.7, "top_fraction": 0.1}, (rest, 0.3)],
        [(load_dataset(best), 0.7), (load_dataset(rest), 0.3)],
    ):
        check_spec(spec)
        dataset = load_dataset(spec)
        assert dataset.spec == text
        assert [part.weight for part in dataset.sources] == pytest.approx([0.7, 0.3])
        assert dataset.fingerprint == expected.fingerprint
    again = load_dataset(text)
    assert again.sources == dataset.sources
    assert [part.weight for part in load_dataset([(best, 7), (rest, 3e0)]).sources] == pytest.approx([0.7, 0.3])


def test_a_spec_as_one_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pendulum: OfflineDataset) -> None:
    monkeypatch.chdir(tmp_path)
    assert spec_text(PENDULUM) == PENDULUM
    assert (
        spec_text([(f"{PENDULUM}?seed=1&episodes=2", 1e-20), ("a/b-v0", 3)])
        == f"1e-20*{PENDULUM}?episodes=2&seed=1 + 3*a/b-v0"
    )
    assert spec_text([Path("here"), "there"]) == f"{tmp_path / 'here'} + there"
    assert spec_text({"spec": "buffer.pkl", "trust_pickle": True}) == "buffer.pkl?trust_pickle=1"
    assert spec_text([PENDULUM, pendulum]) is None
    with pytest.raises(ValueError, match="have none"):
        spec_text([PENDULUM, PENDULUM, (PENDULUM, 1)])
    text = spec_text([(f"{PENDULUM}?top_fraction=0.3333333333333333", 1 / 3), (f"{PENDULUM}?min_return=-1e20", 2 / 3)])
    assert text is not None and spec_text(text) == text
    assert [part.weight for part in load_dataset(text).sources] == [1 / 3, 2 / 3]


@pytest.mark.parametrize("name", ["a + b.npz", "a folder + more/b.npz", "c.npz"])
def test_a_path_with_a_plus_in_it(tmp_path: Path, name: str, pendulum: OfflineDataset) -> None:
    """A text is given only where it names the same data again."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{column: getattr(pendulum, column)[:200] for column in COLUMNS})
    with_plus = "+" in name
    for spec in (path, str(path), f"{path}?episodes=1", [path], {"spec": path, "episodes": 1}):
        dataset, text = load_dataset(spec), spec_text(spec)
        assert dataset.spec is not None and dataset.spec == text
        assert load_dataset(dataset.spec).fingerprint == dataset.fingerprint
    for spec in ([path, PENDULUM], [(path, 0.5), (PENDULUM, 0.5)], [(path, 2.0)], [(f"{path}?episodes=1", 2.0), (path, 1)]):
        dataset, text = load_dataset(spec), spec_text(spec)
        assert (text is None) == with_plus and (len(spec) == 1 or dataset.spec == text)
        if text is not None:
            assert load_dataset(text).fingerprint == dataset.fingerprint


def test_filters_hold_for_every_part() -> None:
    dataset = load_dataset([HOPPER, f"{HOPPER}?min_return=1000"], episodes=10)
    assert dataset.spec == f"{HOPPER}?episodes=10 + {HOPPER}?min_return=1000&episodes=10"
    assert dataset.n_episodes == 20
    with pytest.raises(ValueError, match="min_return is 1000 in the spec and 5 as a keyword"):
        load_dataset([HOPPER, f"{HOPPER}?min_return=1000"], min_return=5)


def test_parts_of_the_same_name_are_numbered() -> None:
    dataset = load_dataset([f"{PENDULUM}?episodes=1"] * 2)
    assert [part.name for part in dataset.sources] == ["pendulum-medium?episodes=1 (1)", "pendulum-medium?episodes=1 (2)"]
    assert len(load_dataset(dataset.spec or "")) == len(dataset) == 400


def test_parts_of_different_kinds(tmp_path: Path, pendulum: OfflineDataset) -> None:
    write_d4rl(tmp_path / "a + b.hdf5", pendulum)
    np.savez(tmp_path / "what?episodes=1.npz", **{name: getattr(pendulum, name) for name in COLUMNS})
    files = [tmp_path / "a + b.hdf5", tmp_path / "what?episodes=1.npz"]
    for file in files:
        assert load_dataset(str(file)).fingerprint == load_dataset(file).fingerprint == pendulum.fingerprint
        assert load_dataset(f"{file}?episodes=2").n_episodes == 2
    dataset = load_dataset([*files, PENDULUM, pendulum])
    assert dataset.n_episodes == 400
    assert dataset.provenance["env_id"] == "Pendulum-v1"
    assert [part["name"] for part in dataset.provenance["parts"]][2:] == ["pendulum-medium"] * 2
    in_memory = OfflineDataset.from_columns(**{name: getattr(pendulum, name) for name in COLUMNS})
    assert load_dataset([PENDULUM, in_memory]).spec is None


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ([], ("list of datasets is empty",)),
        ([(PENDULUM, 0.5), PENDULUM], (f"a weight for every dataset of a list or for none: '{PENDULUM}' has none",)),
        (f"0.5*{PENDULUM} + {HOPPER} + {HOPPER}", (f"'{HOPPER}', '{HOPPER}' have none",)),
        ([(PENDULUM, 0)], (f"The weight of the dataset '{PENDULUM}' must be a positive number, found 0",)),
        ([(PENDULUM, "much")], ("must be a positive number, found 'much'",)),
        ([(f"2*{PENDULUM}", 1)], ("has two weights, 2 and 1",)),
        (f"{PENDULUM} + ", ("has an empty part",)),
        (f" + {PENDULUM}", ("has an empty part",)),
        ([f"{PENDULUM} + {PENDULUM}"], ("An entry of a list names one dataset",)),
        ([{"weight": 1}], ("needs a `spec`",)),
        ([{"spec": PENDULUM, "wieght": 1}], ("unknown filter or option 'wieght'",)),
        ({"spec": PENDULUM, "weight": -1}, ("must be a positive number, found -1",)),
        ([PENDULUM, ""], ("spec is empty",)),
    ],
)
def test_malformed_lists(spec: Any, parts: tuple[str, ...]) -> None:
    fails(spec, ValueError, *parts)


def test_parts_that_do_not_go_together(tmp_path: Path, pendulum: OfflineDataset) -> None:
    fails(f"{PENDULUM} + {HOPPER}", ValueError, "'pendulum-medium' and 'hopper-medium'", "Hopper-v5", check=False)
    fails([PENDULUM, "bundled:hoper-medium"], FileNotFoundError, "Did you mean bundled:hopper-medium")
    columns = {name: getattr(pendulum, name) for name in COLUMNS}
    np.savez(tmp_path / "wide.npz", **(columns | {"actions": np.hstack([pendulum.actions] * 2)}))
    spec = [PENDULUM, tmp_path / "wide.npz"]
    fails(spec, ValueError, "'pendulum-medium' and 'wide'", "actions of shape (1,)", "of shape (2,)", check=False)


def test_progress_bar_counts_episodes(capsys: pytest.CaptureFixture[str], pendulum: OfflineDataset) -> None:
    assert load_dataset(PENDULUM, progress_bar=True).fingerprint == pendulum.fingerprint
    captured = capsys.readouterr()
    assert "pendulum-medium (episodes)" in captured.out + captured.err
    assert "100/100" in captured.out + captured.err
    load_dataset(PENDULUM)
    assert capsys.readouterr() == ("", "")


def test_checking_reads_no_data(tmp_path: Path, pendulum: OfflineDataset) -> None:
    write_d4rl(tmp_path / "a.hdf5", pendulum)
    arrays = {name: getattr(pendulum, name) for name in COLUMNS}
    np.savez(tmp_path / "a.npz", **arrays)
    for path in (tmp_path / "a.hdf5", tmp_path / "a.npz"):
        content = bytearray(path.read_bytes())
        # Damage in the middle of the data is seen by whoever reads it
        at = content.index(pendulum.observations[1000].tobytes())
        content[at : at + 4] = np.float32(np.nan).tobytes()
        path.write_bytes(content)
        fails(path, ValueError, check=False)


def test_vec_env_of_sb3_is_what_the_buffer_was_filled_with(tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model = TD3("MlpPolicy", env, learning_starts=10**6, buffer_size=500, device="cpu", seed=0)
    model.learn(420)
    model.save_replay_buffer(tmp_path / "pendulum.pkl")
    dataset = load_dataset(tmp_path / "pendulum.pkl", trust_pickle=True)
    assert dataset.episode_lengths.tolist() == [200, 10, 200, 10]
    assert not dataset.terminations.any()
    check_compatible(dataset, env.observation_space, env.action_space)
    together = load_dataset([PENDULUM, f"{tmp_path / 'pendulum.pkl'}?trust_pickle=1&min_length=200"])
    assert together.n_episodes == 102
    assert load_dataset(together.spec or "", trust_pickle=True).fingerprint == together.fingerprint


def test_bundled_data_is_read_once() -> None:
    first, second = load_dataset(PENDULUM), load_dataset(f"{PENDULUM}?episodes=100")
    assert np.shares_memory(first.observations, load_dataset(PENDULUM).observations)
    assert not first.observations.flags.writeable and len(second) == len(first)
    first.provenance["author"] = "somebody else"
    assert load_dataset(PENDULUM).provenance["author"] != "somebody else"
