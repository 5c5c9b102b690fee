"""Bad data and bad specs: one error each that says what, what was expected, what was found and what to do."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from sb3_offline_ft.datasets import OfflineDataset, check_compatible, check_spec, load_dataset, scale_actions
from sb3_offline_ft.datasets.files import hub as hub_module

BUNDLED_PENDULUM = Path(__file__).parent.parent / "sb3_offline_ft" / "datasets" / "bundled" / "pendulum-medium"
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-2.0, 2.0, (1,), np.float32)
DISCRETE = {"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}
IMAGES = np.zeros((6, 8, 8, 3), np.uint8)

pytestmark = pytest.mark.usefixtures("minari_root")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port on this machine that refuses connections stands for the hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port on this machine that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "*")
        yield


@pytest.fixture
def pendulum(tmp_path: Path) -> Path:
    """A copy of the bundled Pendulum data, to be damaged."""
    target = tmp_path / "pendulum"
    shutil.copytree(BUNDLED_PENDULUM, target)
    return target


def edit_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_column(folder: Path, name: str, values: Any) -> None:
    """Replace one column of one episode, such as episode_3/rewards; None removes it."""
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        del file[name]
        if values is not None:
            file[name] = values


def read_column(folder: Path, name: str) -> Any:
    with h5py.File(folder / "data" / "main_data.hdf5", "r") as file:
        return file[name][()]


def fails(spec: Any, error: type[Exception], *parts: str, check: bool = True) -> None:
    """Both functions raise this error (``check=False``: only loading), and its message has all the parts."""
    for function in (check_spec, load_dataset) if check else (load_dataset,):
        with pytest.raises(error) as raised:
            function(spec)
        assert type(raised.value) is error
        for part in parts:
            assert part in str(raised.value), f"{part!r} is missing in: {raised.value}"
    if not check:
        check_spec(spec)


def columns(n_rows: int = 6, **changes: Any) -> dict[str, Any]:
    """Good columns of two episodes, except for the changes."""
    observations = np.arange(n_rows + 1, dtype=np.float32)[:, None].repeat(3, axis=1)
    good: dict[str, Any] = {
        "observations": observations[:-1],
        "actions": np.linspace(-2, 2, n_rows, dtype=np.float32)[:, None],
        "rewards": np.ones(n_rows),
        "next_observations": observations[1:],
        "terminations": np.arange(n_rows) == 2,
        "truncations": np.arange(n_rows) == n_rows - 1,
    }
    return good | changes


@pytest.mark.usefixtures("no_hub")
def test_unknown_id_says_what_was_tried_and_what_is_near(minari_root: Path) -> None:
    shutil.copytree(BUNDLED_PENDULUM, minari_root / "classic" / "pendulum" / "medium-v0")
    begin = time.monotonic()
    fails(
        "classic/pendulun/medium-v0",
        FileNotFoundError,
        "Unknown dataset 'classic/pendulun/medium-v0'",
        f"local Minari datasets in {str(minari_root)!r}: 1 there",
        "hf://farama-minari is unreachable (no connection to 127.0.0.1:",
        "Did you mean classic/pendulum/medium-v0",
        "copy the dataset into the local folder, or set MINARI_DATASETS_PATH",
    )
    assert time.monotonic() - begin < 2.0


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # No user sets it, and a test should not wait for ten seconds
    monkeypatch.setattr(hub_module, "_LIST_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"could not be listed \(TimeoutError: no answer within 1 s\)"):
        load_dataset("mujoco/hopper/medium-v0")
    assert time.monotonic() - begin < 6.0


def test_hub_is_not_asked_when_offline_or_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="not asked, as download=False"):
        load_dataset("mujoco/hopper/medium-v0", download=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("mujoco/hopper/medium-v0", FileNotFoundError, "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("mujoco/hopper/medium", ("has no version", "-v0")),
        ("a/hopper-v0", ("namespace 'a' is too short", "two letters")),
        ("hopper medium!", ("Malformed dataset spec 'hopper medium!'", "no existing path")),
        ("pendulum-medium", ("Did you mean bundled:pendulum-medium",)),
        ("", ("spec is empty", "A spec is a Minari id")),
        (__file__, ("expected a .npz, .hdf5 or .pkl file", "found a .py file")),
        (str(BUNDLED_PENDULUM / "data" / "main_data.hdf5"), ("name the folder that holds it",)),
    ],
)
def test_malformed_specs(spec: str, parts: tuple[str, ...]) -> None:
    fails(spec, ValueError, *parts)


def test_missing_things(tmp_path: Path) -> None:
    fails("bundled:hoper-medium", FileNotFoundError, "No bundled dataset 'hoper-medium'", "Did you mean bundled:hopper-medium")
    fails(tmp_path / "none" / "data.npz", FileNotFoundError, "none' does not exist")
    (tmp_path / "flights.npz").touch()
    fails(str(tmp_path / "flight.npz"), FileNotFoundError, "No dataset file", "Did you mean flights.npz?")
    fails(tmp_path / "nowhere", FileNotFoundError, "No folder or file")
    fails("./nowhere", FileNotFoundError, "No folder or file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    fails(tmp_path / "folder", FileNotFoundError, "holds no Minari dataset", "expected a metadata.json", "found notes.txt")


@pytest.mark.parametrize(
    ("spec", "kind"), [(None, "NoneType"), (3, "int"), ([2.5, "a"], "float"), ({"spec": None}, "NoneType")]
)
def test_specs_of_a_wrong_type(spec: Any, kind: str) -> None:
    fails(spec, TypeError, f"found {kind}", "A spec is a Minari id")


def test_truncated_hdf5_names_the_file(pendulum: Path) -> None:
    file = pendulum / "data" / "main_data.hdf5"
    os.truncate(file, file.stat().st_size // 2)
    fails(pendulum, ValueError, str(file), "damaged or incomplete", "Copy or download it again")


def test_garbled_hdf5_names_the_file(pendulum: Path) -> None:
    file = pendulum / "data" / "main_data.hdf5"
    with h5py.File(file, "r") as handle:
        chunk = handle["episode_40/observations"].id.get_chunk_info(0)
    with open(file, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * 64)
    fails(pendulum, ValueError, str(file), "damaged or incomplete", check=False)


def test_missing_hdf5_and_broken_metadata(pendulum: Path) -> None:
    edit_metadata(pendulum, minari_version="99.0.0")
    fails(pendulum, ValueError, "cannot open", "99.0.0", "another Minari version")
    (pendulum / "data" / "main_data.hdf5").unlink()
    fails(pendulum, ValueError, "No data found")
    (pendulum / "data" / "metadata.json").write_text("{")
    fails(pendulum, ValueError, "cannot open", "metadata.json is damaged")


def test_missing_column_and_missing_episode(pendulum: Path) -> None:
    edit_column(pendulum, "episode_7/rewards", None)
    fails(pendulum, ValueError, "main_data.hdf5", "damaged or incomplete", "rewards", check=False)
    edit_metadata(pendulum, total_episodes=7)
    fails(pendulum, ValueError, "promises 20000 steps in 7 episodes", "found 1400 steps in 7 episodes", "damaged", check=False)
    edit_metadata(pendulum, total_episodes=7, total_steps=1399)
    fails(pendulum, ValueError, "promises 1399 steps", "found 1400 steps", check=False)


def test_no_episodes(pendulum: Path) -> None:
    edit_metadata(pendulum, total_episodes=0, total_steps=0)
    fails(pendulum, ValueError, "is empty", "found 0 episodes and 0 steps")


@pytest.mark.parametrize(
    ("column", "value", "row", "step"),
    [("rewards", np.nan, 3 * 200 + 5, 5), ("actions", np.inf, 3 * 200 + 5, 5), ("observations", -np.inf, 3 * 200 + 5, 5)],
)
def test_values_that_are_not_finite(pendulum: Path, column: str, value: float, row: int, step: int) -> None:
    values = read_column(pendulum, f"episode_3/{column}")
    values[5] = value
    values[9] = value
    edit_column(pendulum, f"episode_3/{column}", values)
    where = f"row {row} (episode 3, step {step})"
    fails(pendulum, ValueError, f"{column} hold NaN or infinity in 2 of 20000 rows", where, "Remove", check=False)


def test_last_next_observation_that_is_not_finite(pendulum: Path) -> None:
    values = read_column(pendulum, "episode_0/observations")
    values[-1, 2] = np.nan
    edit_column(pendulum, "episode_0/observations", values)
    fails(pendulum, ValueError, "next_observations hold NaN", "row 199 (episode 0, step 199)", check=False)


def test_values_too_large_for_float32(pendulum: Path) -> None:
    rewards = read_column(pendulum, "episode_1/rewards")
    rewards[0] = 1e300
    edit_column(pendulum, "episode_1/rewards", rewards)
    fails(pendulum, ValueError, "rewards hold NaN or infinity in 1 of 20000 rows", "episode 1, step 0", check=False)


def test_missing_last_observation_in_hdf5(pendulum: Path) -> None:
    edit_column(pendulum, "episode_4/observations", read_column(pendulum, "episode_4/observations")[:-1])
    fails(
        pendulum,
        ValueError,
        "episode 4 has 200 rewards",
        "expected observations of shape (201, 3), found (200, 3)",
        "last next observation is missing",
        check=False,
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_missing_last_observation_in_arrow(data_format: str) -> None:
    def buffer(n_observations: int) -> EpisodeBuffer:
        zeros: Any = np.zeros
        return EpisodeBuffer(
            observations=zeros((n_observations, 3), np.float32),
            actions=zeros((8, 1), np.float32),
            rewards=zeros(8),
            terminations=zeros(8, bool),
            truncations=zeros(8, bool),
        )

    minari.create_dataset_from_buffers(
        "cut/episodes-v0",
        [buffer(9), buffer(8)],
        observation_space=OBSERVATIONS,
        action_space=ACTIONS,
        data_format=data_format,
    )
    fails(
        "cut/episodes-v0",
        ValueError,
        "promises 16 steps in 2 episodes, found 15 steps in 2 episodes",
        "first in episode 1: 8 steps promised, 7 found, as its last next observation is missing",
        check=False,
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_damaged_arrow_files(data_format: str, minari_root: Path) -> None:
    zeros: Any = np.zeros
    buffers = [
        EpisodeBuffer(
            observations=zeros((n + 1, 3), np.float32),
            actions=zeros((n, 1), np.float32),
            rewards=zeros(n),
            terminations=zeros(n, bool),
            truncations=zeros(n, bool),
        )
        for n in (4, 140_000)
    ]
    spaces_given = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    minari.create_dataset_from_buffers("bad/long-v0", buffers, data_format=data_format, **spaces_given)
    fails("bad/long-v0", ValueError, "Episode 1", "140001 observations", "at most 131072", "Use hdf5", check=False)

    minari.create_dataset_from_buffers("bad/cut-v0", buffers[:1] * 2, data_format=data_format, **spaces_given)
    data = minari_root / "bad" / "cut-v0" / "data"
    (part,) = (data / "1").glob(f"*.{data_format}")
    os.truncate(part, part.stat().st_size // 2)
    fails("bad/cut-v0", ValueError, str(data), "damaged or incomplete", check=False)
    part.unlink()
    fails("bad/cut-v0", ValueError, f"no .{data_format} file in", check=False)


@pytest.mark.parametrize(
    ("space", "value", "parts"),
    [
        ("observation_space", {"type": "Dict", "subspaces": {}}, ("at least one key", "empty Dict")),
        (
            "observation_space",
            {"type": "Dict", "subspaces": {"outer": {"type": "Dict", "subspaces": {"inner": DISCRETE}}}},
            ("the observation 'outer' is a Dict within a Dict", "nested", "FlattenObservation"),
        ),
        (
            "observation_space",
            {"type": "Dict", "subspaces": {"pair": {"type": "Tuple", "subspaces": [DISCRETE]}}},
            ("the observation 'pair' is a Tuple within a Dict",),
        ),
        (
            "observation_space",
            {"type": "Dict", "subspaces": {"flags": {"type": "MultiBinary", "n": [3]}}},
            ("the observation 'flags' must be a Box or Discrete, found MultiBinary",),
        ),
        (
            "observation_space",
            {"type": "Dict", "subspaces": {"room": DISCRETE | {"start": 1}}},
            ("the observation 'room' is Discrete(3, start=1)", "start at 0"),
        ),
        ("observation_space", DISCRETE, ("found Discrete", "Flatten")),
        ("observation_space", {"type": "Tuple", "subspaces": [DISCRETE]}, ("found Tuple",)),
        ("action_space", {"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}, ("actions must be a Box", "Discrete(3)")),
        ("action_space", {"type": "Tuple", "subspaces": []}, ("actions must be a Box", "Tuple")),
    ],
)
def test_spaces_that_are_not_supported(pendulum: Path, space: str, value: Any, parts: tuple[str, ...]) -> None:
    edit_metadata(pendulum, **{space: json.dumps(value)})
    fails(pendulum, ValueError, *parts)


def test_space_and_data_of_different_shape(pendulum: Path) -> None:
    edit_metadata(
        pendulum, action_space=json.dumps({"type": "Box", "dtype": "float32", "shape": [2], "low": [0] * 2, "high": [1] * 2})
    )
    fails(pendulum, ValueError, "expected actions of shape (200, 2), found (200, 1)", check=False)


def test_npz_errors(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    good = columns()

    def save(**arrays: Any) -> None:
        np.savez(path, **arrays)

    path.write_bytes(b"no archive")
    fails(path, ValueError, str(path), "damaged or incomplete")
    save(**good)
    raw = bytearray(path.read_bytes())
    os.truncate(path, len(raw) // 2)
    fails(path, ValueError, str(path), "damaged or incomplete")
    raw[raw.index(b"\x93NUMPY") + 200] ^= 0xFF
    path.write_bytes(raw)
    fails(path, ValueError, str(path), "damaged or incomplete", check=False)

    with open(path, "wb") as file:
        np.save(file, good["observations"])
    fails(path, ValueError, "is no .npz archive", "found a single array")
    save(obs=good["observations"], actions=good["actions"])
    fails(path, ValueError, "has no observations and no rewards and no terminations", "found obs, actions")
    save(**good, timeouts=good["truncations"])
    fails(path, ValueError, "both truncations and timeouts", "keep one")
    save(**good, action_low=[-2.0])
    fails(path, ValueError, "only one of action_low and action_high")
    save(**good, action_low=[[-2.0]], action_high=[2.0, 3.0])
    fails(path, ValueError, "make no Box", check=False)
    save(**good, action_low=[-2.0] * 2, action_high=[2.0] * 2)
    fails(path, ValueError, "actions have rows of shape (1,), but its space has shape (2,)", check=False)
    save(**(good | {"rewards": np.array([object()] * 6)}))
    fails(path, ValueError, "rewards holds Python objects, expected numbers", check=False)
    del good["next_observations"]
    save(**(good | {"rewards": np.ones(5)}))
    fails(path, ValueError, "rewards must have as many rows as observations (6), found shape (5,)", check=False)
    save(**{name: array[:0] for name, array in good.items()})
    fails(path, ValueError, "empty", check=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": np.ones((6, 1))}, r"rewards must have shape \(6,\) to go with observations \(6, 3\), found \(6, 1\)"),
        ({"rewards": np.ones(7)}, r"rewards must have shape \(6,\)"),
        ({"actions": np.ones(6)}, r"actions must have the shape \(rows, dimensions\), found \(6,\).* Reshape"),
        ({"actions": np.ones((6, 1), np.int64)}, "actions must be floats, found dtype int64"),
        ({"observations": np.ones(6)}, r"observations must have the shape \(rows, dimensions\)"),
        ({"observations": np.ones((6, 3), complex)}, "observations must hold real numbers, found dtype complex128"),
        ({"observations": (np.ones((6, 3)),)}, "observations must be one array or a dictionary of arrays, found a tuple"),
        ({"rewards": {"a": np.ones(6)}}, "rewards must be one array, found a dict"),
        (
            {"observations": {"image": np.ones((6, 3)), "speed": np.ones((6, 1))}},
            r"next_observations must have the same keys as observations \(image, speed\), found one array",
        ),
        ({"observations": {}}, "observations must have at least one key"),
        ({"observations": {"a": {"b": np.ones((6, 1))}}}, "found dict under 'a'; nested ones are not supported"),
        ({"observations": {1: np.ones((6, 1))}}, "found ndarray under 1"),
        ({"next_observations": IMAGES}, r"next_observations must have shape \(6, 3\)"),
        (
            {"observations": {"a": np.ones((6, 2))}, "next_observations": {"b": np.ones((6, 2))}},
            r"next_observations must have the same keys as observations \(a\), found b",
        ),
        (
            {"observations": {"a": np.ones((6, 2)), "b": np.ones(6)}, "next_observations": {"a": 1, "b": 2}},
            r"observations\['b'\] must have the shape \(rows, dimensions\), found \(6,\)",
        ),
        (
            {"observations": {"a": np.ones((6, 2)), "b": np.ones((5, 1))}, "next_observations": {"b": 0, "a": 0}},
            r"observations\['b'\] must have shape \(6, 1\) to go with observations\['a'\] \(6, 2\), found \(5, 1\)",
        ),
        (
            {
                "observations": {"a": np.ones((6, 2))},
                "next_observations": {"a": np.full((6, 2), np.nan)},
                "episode_starts": [0],
            },
            r"next_observations\['a'\] hold NaN or infinity in 6 of 6 rows",
        ),
        (
            {"observations": {"a": np.array([["x"]] * 6)}, "next_observations": {}},
            r"observations\['a'\] must hold real numbers",
        ),
        (
            {"observation_space": spaces.Box(0, 255, (3, 3), np.uint8)},
            "must be uint8 images as in its space, found dtype float32",
        ),
        ({"next_observations": np.ones((6, 4))}, r"next_observations must have shape \(6, 3\)"),
        ({"terminations": np.array([0, 0, 2, 0, 0, 0])}, "terminations must be booleans .*found 2 in row 2"),
        ({"truncations": np.array(["a"] * 6)}, "truncations must be booleans, found dtype <U1"),
        ({"truncations": np.zeros(5, bool)}, r"truncations must have shape \(6,\)"),
        ({"terminations": np.zeros((6, 1), bool)}, r"terminations must have shape \(6,\)"),
        ({"episode_starts": [1, 3]}, "episode_starts must increase from 0"),
        ({"episode_starts": [0, 3, 3]}, "episode_starts must increase from 0"),
        ({"episode_starts": [0, 6]}, "episode_starts must increase from 0"),
        ({"episode_starts": [0.0, 3.0]}, "episode_starts must be a 1-d array of row indices"),
        (
            {"rewards": np.array([1, 1, 1, 1, np.nan, np.nan])},
            r"rewards hold NaN .* 2 of 6 rows, first in row 4 \(episode 1, step 1\)",
        ),
        ({"action_space": spaces.Discrete(2)}, "actions must be a Box of floats"),
        ({"action_space": spaces.Box(-1, 1, (2,))}, r"actions have rows of shape \(1,\), but its space has shape \(2,\)"),
        (
            {"observation_space": spaces.Dict({"a": OBSERVATIONS})},
            "observations must be a dictionary with the keys a of its space, found one array",
        ),
        ({"observation_space": OBSERVATIONS, "observations": {"a": np.ones((6, 3))}}, "must be one array as its space is Box"),
        (
            {"observation_space": spaces.Dict({"a": OBSERVATIONS}), "observations": {"b": np.ones((6, 3))}},
            "observations must have the keys a of its space, found b",
        ),
        (
            {
                "observation_space": spaces.Dict({"room": spaces.Discrete(3)}),
                "observations": {"room": np.array([0, 1, 2, 3, 0, 0])},
            },
            r"observations\['room'\] must be whole numbers from 0 to 2, found 3.0 in row 3",
        ),
    ],
)
def test_wrong_columns(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        OfflineDataset.from_columns(**columns(**changes), name="mine")
    assert str(raised.value).startswith("Dataset 'mine'")


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="is empty: expected at least one transition"):
        OfflineDataset.from_columns(**{name: array[:0] for name, array in columns().items()})


def test_with_facts_changes_no_column() -> None:
    dataset = OfflineDataset.from_columns(**columns())
    with pytest.raises(ValueError, match="found rewards: use from_columns"):
        dataset.with_facts(rewards=np.zeros(6))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "parts"),
    [
        (spaces.Box(-1, 1, (11,)), ACTIONS, ("expected observations of shape (11,), found (3,)", "recorded in Pendulum-v1")),
        (None, spaces.Box(-2, 2, (3,)), ("expected actions of shape (3,), found (1,)",)),
        (None, spaces.Box(-1, 1, (1,)), ("action space's low", "1 of 1 dimensions", "expected -1, found -2", "wrappers")),
        (
            spaces.Box(np.array([-1, -1, -9], np.float32), np.array([1, 1, 8], np.float32)),
            ACTIONS,
            ("observation space's low", "first in dimension 2: expected -9, found -8"),
        ),
        (spaces.Box(-1, 1, (3,), np.int32), ACTIONS, ("expected observations of type int32, found float32",)),
        (None, spaces.Discrete(3), ("The environment: actions must be a Box", "Discrete(3)")),
        (None, spaces.Box(-np.inf, np.inf, (1,)), ("must have finite bounds", "RescaleAction")),
        (None, spaces.Box(1.0, 1.0, (1,)), ("low < high",)),
        (spaces.Tuple([OBSERVATIONS]), ACTIONS, ("The environment: observations must be a Box", "found Tuple")),
        (
            spaces.Dict({"a": OBSERVATIONS, "b": OBSERVATIONS}),
            ACTIONS,
            ("expected observations with the keys a, b, found one array of shape (3,)",),
        ),
        (spaces.Box(0, 255, (3, 1), np.uint8), ACTIONS, ("expected observations of shape (3, 1), found (3,)",)),
    ],
)
def test_dataset_and_environment_that_do_not_fit(
    observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any], parts: tuple[str, ...]
) -> None:
    dataset = load_dataset("bundled:pendulum-medium")
    env = gym.make("Pendulum-v1")
    with pytest.raises(ValueError) as raised:
        check_compatible(dataset, observation_space or env.observation_space, action_space)
    for part in parts:
        assert part in str(raised.value), f"{part!r} is missing in: {raised.value}"
    env.close()


def test_actions_beyond_the_bounds_of_the_environment() -> None:
    actions = np.array([[0.0], [2.003], [2.005], [-2.5], [2.0], [-2.0]])
    dataset = OfflineDataset.from_columns(**columns(actions=actions))
    with pytest.raises(ValueError) as raised:
        check_compatible(dataset, OBSERVATIONS, ACTIONS)
    for part in ("2 of 6 rows", "worst in row 3, dimension 0", "expected -2 to 2, found -2.5", "RescaleAction"):
        assert part in str(raised.value)


def test_scale_actions_checks_space_and_shape() -> None:
    with pytest.raises(ValueError, match="must have finite bounds"):
        scale_actions(np.zeros((2, 1), np.float32), spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(ValueError, match=r"must have the shape \(\.\.\., 1\), found \(2, 3\)"):
        scale_actions(np.zeros((2, 3), np.float32), ACTIONS)
