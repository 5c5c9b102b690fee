"""Flags and numbers are checked alike in every kind of data: what is no flag is not taken as one, text is no number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow as pa
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from pyarrow import parquet
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import save_to_pkl

from sb3_offline_ft.buffers import OfflineToOnlineReplayBuffer
from sb3_offline_ft.datasets import OfflineDataset, load_dataset
from sb3_offline_ft.datasets.files.tables import read_tables

pytestmark = pytest.mark.usefixtures("minari_root")

OBSERVATIONS, ACTIONS = spaces.Box(-9, 9, (2,)), spaces.Box(-1, 1, (1,))
N = 6

Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def of(value: Any) -> Change:
    """The third value becomes this one, whatever the type of the column must be for it."""

    def change(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if isinstance(value, str):
            texts = column.astype("U16")
            texts[2] = value
            return texts
        changed = column.astype(np.result_type(column.dtype, type(value)) if column.dtype != bool else np.float64)
        changed[2] = value
        return changed

    return change


BAD_FLAGS = {"text": of("False"), "nan": of(np.nan), "0.3": of(0.3), "2": of(2.0), "-1": of(-1.0), "inf": of(np.inf)}


def good() -> dict[str, Any]:
    observations = np.arange(N + 1, dtype=np.float32)[:, None].repeat(2, axis=1)
    return {
        "observations": observations[:-1],
        "actions": np.zeros((N, 1), np.float32),
        "rewards": np.ones(N, np.float32),
        "next_observations": observations[1:],
        "terminations": np.zeros(N, bool),
        "truncations": np.arange(N) == N - 1,
    }


def write_minari(data_format: str, name: str, change: Change) -> str:
    columns = good()
    observations = np.concatenate([columns["observations"], columns["next_observations"][-1:]])
    rest: Any = {key: columns[key] for key in ("actions", "rewards", "terminations", "truncations")}
    made = minari.create_dataset_from_buffers(
        "bad/values-v0",
        [EpisodeBuffer(observations=observations, **rest), EpisodeBuffer(observations=observations, **rest)],
        observation_space=OBSERVATIONS,
        action_space=ACTIONS,
        data_format=data_format,
    )
    data = Path(made.storage.data_path)
    column = change(observations if name == "observations" else columns[name])
    if data_format == "hdf5":
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            del file[f"episode_1/{name}"]
            file[f"episode_1/{name}"] = column.astype(h5py.string_dtype()) if column.dtype.kind == "U" else column
        return "bad/values-v0"
    (part,) = (data / "1").glob(f"*.{data_format}")
    if data_format == "parquet":
        table = parquet.read_table(part)
    else:
        with pa.OSFile(str(part)) as source:
            table = pa.ipc.open_file(source).read_all()
    if len(column) == N:
        column = np.concatenate([column, column[-1:]])
    values = column.tolist() if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(column.reshape(-1).tolist(), 1)
    if name == "observations":
        values = pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1).tolist()), 2)
    table = table.set_column(table.column_names.index(name), name, pa.array(values) if isinstance(values, list) else values)
    if data_format == "parquet":
        parquet.write_table(table, part)
    else:
        with pa.OSFile(str(part), "wb") as target, pa.ipc.new_file(target, table.schema) as writer:
            writer.write_table(table)
    return "bad/values-v0"


def write_ring(path: Path, name: str, change: Change, own: bool) -> str:
    kind = OfflineToOnlineReplayBuffer if own else ReplayBuffer
    buffer = kind(N, OBSERVATIONS, ACTIONS, "cpu")
    columns = good()
    for row in range(N):
        buffer.add(*(columns[key][row : row + 1] for key in ("observations", "next_observations", "actions", "rewards")),
                   columns["truncations"][row : row + 1], [{}])  # fmt: skip
    if not own:
        ring = getattr(buffer, name)
        setattr(buffer, name, change(ring[:, 0])[:, None])
        save_to_pkl(path.with_suffix(".pkl"), buffer)
        return f"{path.with_suffix('.pkl')}?trust_pickle=1"
    buffer.save_online(path.with_suffix(".npz"))
    with np.load(path.with_suffix(".npz")) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[name] = change(arrays[name][:, 0])[:, None]
    np.savez(path.with_suffix(".npz"), **arrays)
    return str(path.with_suffix(".npz"))


def write(kind: str, folder: Path, name: str, change: Change) -> Any:
    if kind in ("hdf5", "arrow", "parquet"):
        return write_minari(kind, name, change)
    if kind in ("sb3", "own"):
        return write_ring(
            folder / "buffer", {"terminations": "dones", "truncations": "timeouts"}.get(name, name), change, kind == "own"
        )
    columns = good()
    columns[name] = change(columns[name])
    if "derived" in kind:
        del columns["next_observations"]
    if "npz" in kind:
        np.savez(folder / "data.npz", **columns)
        return folder / "data.npz"
    with h5py.File(folder / "data.hdf5", "w") as file:
        for key, array in columns.items():
            file[key] = array.astype(h5py.string_dtype()) if array.dtype.kind == "U" else array
    return folder / "data.hdf5"


KINDS = ["hdf5", "arrow", "parquet", "sb3", "own", "npz", "npz derived", "flat", "flat derived"]


def where(kind: str) -> str:
    """Part of the file's name in messages."""
    return {"hdf5": "main_data.hdf5", "arrow": "/data'", "parquet": "/data'", "sb3": "buffer.pkl", "own": "buffer.npz"}.get(
        kind, "data.npz" if "npz" in kind else "data.hdf5"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["terminations", "truncations"])
@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_flags(kind: str, name: str, bad: str, tmp_path: Path) -> None:
    spec = write(kind, tmp_path, name, BAD_FLAGS[bad])
    column = {"terminations": "dones", "truncations": "timeouts"}[name] if kind in ("sb3", "own") else name
    found = "dtype" if bad == "text" else {"nan": "nan", "0.3": "0.3", "2": "2.0", "-1": "-1.0", "inf": "inf"}[bad]
    with pytest.raises(ValueError, match=rf"{column} must be booleans.* found {found}") as raised:
        load_dataset(spec)
    assert where(kind) in str(raised.value)
    assert type(raised.value) is ValueError


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rewards", "actions", "observations"])
def test_numbers(kind: str, name: str, tmp_path: Path) -> None:
    spec = write(kind, tmp_path, name, lambda column: column.astype("U16"))
    with pytest.raises(ValueError, match=rf"{name} must hold real numbers, found dtype") as raised:
        load_dataset(spec)
    assert where(kind) in str(raised.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float32, np.float64, bool])
def test_zeros_and_ones_of_any_type(kind: str, dtype: type, tmp_path: Path) -> None:
    for name in ("terminations", "truncations"):
        folder = tmp_path / name
        folder.mkdir()
        if kind in ("hdf5", "arrow", "parquet") and name == "truncations":
            continue
        dataset = load_dataset(write(kind, folder, name, lambda column: column.astype(dtype)))
        assert dataset.n_episodes == (2 if kind in ("hdf5", "arrow", "parquet") else 1)
        assert dataset.terminations.sum() == (1 if kind in ("sb3", "own") else 0)


def test_nothing_is_loaded_into_a_buffer_from_a_file_with_wrong_values(tmp_path: Path) -> None:
    buffer = OfflineToOnlineReplayBuffer(N, OBSERVATIONS, ACTIONS, "cpu")
    for name in ("dones", "timeouts", "rewards"):
        bad = of("False") if name == "rewards" else of(0.3)
        with pytest.raises(ValueError, match=rf"{name} must"):
            buffer.load_online(write_ring(tmp_path / name, name, bad, own=True))
        assert buffer.online_size == 0


def test_lists_of_objects(tmp_path: Path) -> None:
    for bad, message in (([None, False] * 3, "found dtype object"), (["False"] * N, "found dtype <U5, such as")):
        with pytest.raises(ValueError, match=f"terminations must be booleans, {message}"):
            OfflineDataset.from_columns(**(good() | {"terminations": bad}))
    np.savez(tmp_path / "bounds.npz", **good(), action_low=np.array(["-1"]), action_high=np.array(["1"]))
    with pytest.raises(ValueError, match="action_low must hold real numbers"):
        load_dataset(tmp_path / "bounds.npz")


OBSERVED = {"obs": [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], "action": [0.0, 0.1, 0.2], "reward": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"obs": [[0.0, 1.0], [1.0, 1e39], [2.0, 3.0]]}, r"column 'obs', row 2: 1e\+39 is too large for float32"),
        ({"action": [0.0, 1e39, 0.2]}, r"column 'action', row 2: 1e\+39 is too large for float32"),
        (
            {"obs": [["0.0", "1.0"], ["1.0", "1.5"], ["2.0", "3.0"]]},
            r"column 'obs', row 1: .*the text '0\.0'.*lists of numbers",
        ),
        ({"obs": [[0.0, 1.0], [1.0, None], [2.0, 3.0]]}, r"column 'obs', row 2: expected numbers, found .*nan"),
        ({"action": ["0.0", "1.5", "0.2"]}, r"column 'action', row 1: .* found the text '0\.0'; 3 of 3 rows .*as text"),
        ({"reward": ["1", "2", "-"]}, r"column 'reward', row 1: expected a number, found the text '1'"),
    ],
)
def test_numbers_in_parquet_are_no_text_and_fit_into_float32(changed: Any, message: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table(OBSERVED | changed), tmp_path / "run.parquet")
    with pytest.raises(ValueError, match=rf"run\.parquet', {message}"):
        read_tables([tmp_path / "run.parquet"])


def test_digits_in_quotes_are_numbers_in_csv(tmp_path: Path) -> None:
    """Its cells have no types."""
    (tmp_path / "run.csv").write_text('obs,action,reward\n"1.5","0.1","1"\n"2.5","0.2","2"\n"3.5","0.3","3"\n')
    with pytest.warns(UserWarning, match="no next_observations"):
        assert read_tables([tmp_path / "run.csv"]).rewards.tolist() == [1.0, 2.0]
