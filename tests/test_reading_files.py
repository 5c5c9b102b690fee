"""What reading does with files that are no files, damaged, malicious or too large: one clear error, soon, and nothing else."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pandas as pd
import pytest
import yaml
from gymnasium import spaces
from PIL import Image

from sb3_offline_ft import load_dataset
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.common.io import naming_damage, read_npz
from sb3_offline_ft.common.reading import free_in_groups, parse_json
from sb3_offline_ft.common.strict_yaml import load_yaml
from sb3_offline_ft.datasets import check_spec
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.tables import read_tables
from sb3_offline_ft.evaluation.robustness.result import Policy, Response, RobustnessResult
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.trial.journal import Journal
from sb3_offline_ft.trial.reading import read_plan
from tests.conftest import REPOSITORY
from tests.study_runs import write_study
from tests.trial_plans import plan_content

BENCHMARK = REPOSITORY / "benchmarks" / "robust_files"
N = 12


def arrays(n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) == n - 1,
        "next_observations": rng.normal(size=(n, 3)).astype(np.float32),
    }


def frame() -> pd.DataFrame:
    values = arrays()
    return pd.DataFrame(
        {f"obs_{i}": values["observations"][:, i].astype(float) for i in range(3)}
        | {"action": values["actions"][:, 0], "reward": values["rewards"], "terminated": values["terminations"]}
    )


def table(path: Path) -> Any:
    with pytest.warns(UserWarning, match="no next_observations"):
        return read_tables([path])


def npz(path: Path, **others: Any) -> Path:
    np.savez(path, **(arrays() | others))
    return path


def hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays().items():
            file[name] = array
    return path


# What is no file


READERS: dict[str, Callable[[Path], Any]] = {
    "data.npz": lambda path: load_dataset(str(path)),
    "data.pkl": lambda path: check_spec(str(path)),
    "data.hdf5": lambda path: load_dataset(str(path)),
    "data.csv": lambda path: read_tables([path]),
    "data.csv.gz": lambda path: read_tables([path]),
    "data.parquet": lambda path: read_tables([path]),
    "columns.yml": ColumnMap.from_file,
    "columns.toml": ColumnMap.from_file,
    "study.yml": lambda path: Protocol.load(path.parent),
    "trial.yml": lambda path: read_plan(path.parent),
    "journal.jsonl": Journal,
    "events.jsonl": read_events,
    "evaluations.npz": lambda path: read_npz(path, "timesteps"),
    "robustness.json": RobustnessResult.read,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is a named pipe: expected a regular file"):
        READERS[name](path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is a device: expected a regular file"):
        READERS[name](path)
    assert time.monotonic() - begin < 20


# Memory


def test_too_little_memory_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"x\.bin needs more memory than there is \(MemoryError: Unable to allocate 224\. TiB"
    ) as raised:
        with naming_damage(tmp_path / "x.bin", "an array"):
            np.empty(2**45 // 4 * 7, np.float32)[:] = 1
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("shape", [(2**40, 3), (2**36,)])
def test_arrays_that_unpack_to_more_than_memory_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = hdf5(tmp_path / "data.hdf5")
    with h5py.File(path, "r+") as file:
        del file["observations"]
        file.create_dataset("observations", shape, np.float32, chunks=(2**16, *shape[1:]), compression="gzip")
    assert path.stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"data\.hdf5'?: observations needs .* GiB of memory, and .* free") as raised:
        load_dataset(str(path))
    assert "damaged" not in str(raised.value)


def test_an_array_that_says_another_size_than_it_has_is_damaged(tmp_path: Path) -> None:
    for shape in ((2**60, 2), (N + 1, 3), (1, 3)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        content = header.getvalue() + bytes(12 * N)
        path = rewrite(npz(tmp_path / "data.npz"), lambda *_, content=content: content)
        with pytest.raises(ValueError, match=r"data\.npz.*observations should have .* bytes, as its shape is .*damaged"):
            load_dataset(str(path))


def test_a_header_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b" " * 2**26
    path = rewrite(npz(tmp_path / "data.npz"), lambda *_: header)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"data\.npz.*damaged or incomplete"):
        load_dataset(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_a_header_that_no_parser_takes_is_damage(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x01\x00" + (9001).to_bytes(2, "little") + b"-" * 9000 + b"1"
    path = rewrite(npz(tmp_path / "data.npz"), lambda *_: header)
    with pytest.raises(ValueError, match=r"observations has no header of NumPy's: the file is damaged"):
        load_dataset(str(path))


@pytest.mark.parametrize("group", ["", "slice/job"])
def test_limits_of_control_groups_count(group: str, tmp_path: Path) -> None:
    names = {
        "0::": ("", "memory.max", "memory.current", "inactive_file 20\nactive_file 30\n"),
        "4:cpu,memory:": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "active_file 9\ntotal_active_file 50\n"),
    }
    for line, (root, limit, used, copies) in names.items():
        folder = tmp_path / root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((limit, "1000\n"), (used, "700\n"), ("memory.stat", f"anon 5\n{copies}")):
            (folder / name).write_text(content)
        (tmp_path / "process").write_text(f"7:pids:/other\n{line}/{group}\n")
        assert list(free_in_groups(tmp_path, tmp_path / "process")) == [350]
        (folder / limit).write_text("max\n")
        assert list(free_in_groups(tmp_path, tmp_path / "process")) == []
    assert list(free_in_groups(tmp_path, tmp_path / "none")) == []


def test_values_of_lists_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = frame()[:1].drop(columns=["obs_0", "obs_1", "obs_2"])
    made["observations"] = [np.zeros(2**24)]
    made.to_parquet(tmp_path / "data.parquet")
    assert (tmp_path / "data.parquet").stat().st_size < 2**20
    monkeypatch.setattr("sb3_offline_ft.common.reading._free_memory", lambda: 2**27 - 1)
    with pytest.raises(ValueError, match=r"data\.parquet needs 0\.1 GiB of memory"):
        read_tables([tmp_path / "data.parquet"])


# npz


def rewrite(path: Path, change: Callable[[str, bytes], bytes], only: str = "observations.npy") -> Path:
    """Write an archive again with another member."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content) if name == only else content)
    return path


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    path = rewrite(npz(tmp_path / "data.npz"), lambda *_: b"[1, 2, 3]")
    with pytest.raises(ValueError, match=r"data\.npz.*observations is no array of NumPy's"):
        load_dataset(str(path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice(tmp_path: Path) -> None:
    path = npz(tmp_path / "data.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rewards.npy", archive.read("truncations.npy"))
    with pytest.raises(ValueError, match=r"data\.npz.*rewards 2 times: which one counts is not known"):
        load_dataset(str(path))


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_a_changed_version_of_zip(suffix: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "data.npz").rename(tmp_path / f"data{suffix}")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.(npz|pkl).*damaged or incomplete \(NotImplementedError: zip file version"):
        load_dataset(str(path))


def test_a_damaged_name_does_not_make_an_optional_array_missing(tmp_path: Path) -> None:
    path = npz(tmp_path / "data.npz")
    content = path.read_bytes()
    at = content.rindex(b"next_observations.npy")
    path.write_bytes(content[:at] + b"N" + content[at + 1 :])
    with pytest.raises(ValueError, match=r"data\.npz.*damaged or incomplete \(BadZipFile: File name in directory"):
        load_dataset(str(path))


def test_what_errors_quote_is_short_and_harmless(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.bin is damaged or not an array \(OSError: .*\.\.\.\)") as raised:
        with naming_damage(tmp_path / "x.bin", "an array"):
            raise OSError("\x1b[31m\x07" + "x" * 100_000)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


def twice(path: Path, name: str) -> Any:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr(f"{name}.npy", "")
    return load_dataset(str(path))


def other_arrays(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100):
            archive.writestr(f"{name}{number}.npy", "")
    return load_dataset(str(path))


def group_in_a_group(path: Path, name: str) -> Any:
    path = hdf5(path.with_suffix(".hdf5"))
    with h5py.File(path, "r+") as file:
        del file["observations"]
        file.create_group(f"observations/{name}")
    return load_dataset(str(path))


def other_hdf5(path: Path, name: str) -> Any:
    path = hdf5(path.with_suffix(".hdf5"))
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file[name] = 1
    return load_dataset(str(path))


def other_columns(path: Path, name: str) -> Any:
    frame().rename(columns=lambda column: column.replace("obs_", name)).to_csv(path.with_suffix(".csv"))
    return read_tables([path.with_suffix(".csv")])


def same_columns(path: Path, name: str) -> Any:
    path.with_suffix(".csv").write_text(f"{name},{name}\n1,2\n")
    return read_tables([path.with_suffix(".csv")])


def no_numbers(path: Path, name: str) -> Any:
    frame().rename(columns={"obs_0": f"obs_{name}"}).assign(**{f"obs_{name}": name}).to_csv(path.with_suffix(".csv"))
    return read_tables([path.with_suffix(".csv")], ColumnMap(observations=("obs_*",)))


def unknown_key(path: Path, name: str) -> Any:
    path.with_suffix(".yml").write_text(yaml.safe_dump({name: 1}))
    return ColumnMap.from_file(path.with_suffix(".yml"))


def json_twice(_: Path, name: str) -> Any:
    return parse_json(f"{{{json.dumps(name)}: 1, {json.dumps(name)}: 2}}", "x")


def yaml_twice(path: Path, name: str) -> Any:
    entry = f"? {json.dumps(name)}\n: 1\n"
    return load_yaml(2 * entry, path)


@pytest.mark.parametrize("name", ["\x1b[31mred\x07", "n" * 60_000])
@pytest.mark.parametrize(
    "read",
    [
        *(twice, other_arrays, group_in_a_group, other_hdf5, other_columns, same_columns, no_numbers, unknown_key),
        *(json_twice, yaml_twice),
    ],
)
def test_names_that_errors_quote_are_short_and_harmless(read: Callable[[Path, str], Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        read(tmp_path / "data.npz", name)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 20_000
    assert name[:3] in str(raised.value) or "x1b[31mred" in str(raised.value)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_truths_that_are_neither(suffix: str, tmp_path: Path) -> None:
    wrong = arrays() | {"terminations": np.full(N, 7, np.uint8).view(bool)}
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, **wrong)
    else:
        with h5py.File(path, "w") as file:
            for name, array in wrong.items():
                file[name] = array
    with pytest.raises(ValueError, match="terminations must be booleans, found bytes that are neither true nor false"):
        load_dataset(str(path))


# HDF5


def external_storage(file: h5py.File) -> None:
    file.create_dataset("observations", (N, 3), np.uint8, external=[("/etc/passwd", 0, 3 * N)])


def external_link(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("secret.hdf5"), "w") as other:
        other["observations"] = arrays()["observations"]
    file["observations"] = h5py.ExternalLink("secret.hdf5", "observations")


def soft_link(file: h5py.File) -> None:
    file["observations"] = h5py.SoftLink("/next_observations")


def virtual(file: h5py.File) -> None:
    external_link(file)
    del file["observations"]
    layout = h5py.VirtualLayout((N, 3), np.float32)
    layout[...] = h5py.VirtualSource("secret.hdf5", "observations", (N, 3))
    file.create_virtual_dataset("observations", layout)


@pytest.mark.parametrize("change", [external_storage, external_link, soft_link, virtual])
def test_values_in_other_files_are_not_read(change: Callable[[h5py.File], None], tmp_path: Path) -> None:
    path = hdf5(tmp_path / "data.hdf5")
    with h5py.File(path, "r+") as file:
        del file["observations"]
        change(file)
    with pytest.raises(ValueError, match=r"data\.hdf5'?: observations .*(another file|another place).* Copy the array into"):
        load_dataset(str(path))


# Minari


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Minari dataset with images, packed as JPEG."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episode = minari.data_collector.EpisodeBuffer(
        id=0,
        observations={
            "image": list(rng.integers(0, 255, (4, 32, 32, 3), np.uint8)),
            "state": list(np.ones((4, 2), np.float32)),
        },
        actions=list(np.zeros((3, 1), np.float32)),
        rewards=[0.0] * 3,
        terminations=[False] * 3,
        truncations=[False, False, True],
        infos={},
    )
    keys = {"image": spaces.Box(0, 255, (32, 32, 3), np.uint8), "state": spaces.Box(-1, 1, (2,), np.float32)}
    facts = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "x")
    space, action_space = spaces.Dict(keys), spaces.Box(-1, 1, (1,), np.float32)
    with warnings.catch_warnings():
        # Minari asks for an environment for evaluation
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "made/up-v0", [episode], observation_space=space, action_space=action_space, jpeg_encoding=True, **facts
        )
    return tmp_path / "made" / "up-v0" / "data"


@pytest.mark.parametrize("name", ["total_episodes", "total_steps"])
@pytest.mark.parametrize("count", [10**12, 2**70, -1, 1.5, "3", None, True])
def test_nonsense_counts_of_minari(name: str, count: Any, folder: Path) -> None:
    facts = folder / "metadata.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {name: count}))
    begin = time.process_time()
    with pytest.raises(ValueError, match=rf"metadata\.json|{name} must be a whole number of at least 0") as raised:
        load_dataset(str(folder))
    assert name in str(raised.value) and time.process_time() - begin < 5


def test_the_environment_that_a_dataset_describes_is_not_made(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "went-off"
    entry = {"id": "Bad-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(marker)}}
    spec = gym.spec("Pendulum-v1").to_json()
    facts = json.loads((folder / "metadata.json").read_text())
    del facts["action_space"]
    facts["env_spec"] = json.dumps(json.loads(spec) | entry)
    (folder / "metadata.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"metadata\.json' does not say the action_space.* runs code"):
        load_dataset(str(folder))
    assert not marker.exists()


def test_only_jpeg_is_unpacked_as_jpeg(folder: Path) -> None:
    """Other formats are more than images: PostScript is a language."""
    with pytest.warns(UserWarning, match="JPEG"):
        load_dataset(str(folder))
    stream = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(stream, "EPS")
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        file["episode_0/observations/image"][1] = np.frombuffer(stream.getvalue(), np.uint8)
    with pytest.raises(ValueError, match=r"main_data\.hdf5.*damaged or incomplete \(UnidentifiedImageError"):
        load_dataset(str(folder))


# Tables


def test_an_index_of_pandas_is_a_column(tmp_path: Path) -> None:
    expected = frame()
    for index in (["reward"], ["obs_1"], ["obs_0", "action"]):
        expected.set_index(index).to_parquet(tmp_path / "data.parquet")
        found = table(tmp_path / "data.parquet")
        assert np.array_equal(found.observations, expected[["obs_0", "obs_1", "obs_2"]].to_numpy(np.float32)[:-1])


@pytest.mark.parametrize("kind", ["datetime64[ns]", "datetime64[ns, UTC]", "timedelta64[ns]"])
def test_times_are_no_numbers(kind: str, tmp_path: Path) -> None:
    made = frame()
    made["obs_1"] = pd.Series(range(N)).astype(kind)
    made.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"column 'obs_1', row 1: expected a number, found a Time"):
        read_tables([tmp_path / "data.parquet"])


def test_a_list_beside_scalars_is_part_of_a_vector(tmp_path: Path) -> None:
    made = frame()
    made["obs_1"] = [[value, 1.0] for value in made["obs_1"]]
    made.to_parquet(tmp_path / "data.parquet")
    assert table(tmp_path / "data.parquet").observations.shape == (N - 1, 4)
    made["obs_1"] = [[1.0]] * (N - 1) + [None]
    made.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet', column 'obs_1', row 12: expected a list of numbers"):
        read_tables([tmp_path / "data.parquet"])


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.csv.xz", "data.csv.bz2"])
def test_a_byte_of_zero_does_not_shorten_a_number(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    frame().to_csv(path, index=False)
    assert len(table(path)) == N - 1
    text = frame().to_csv(index=False).splitlines()
    text[5] = text[5][:3] + "\0" + text[5][3:]
    pd.Series(text).to_csv(path, index=False, header=False, quoting=3, sep="\x01")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}', line 6 has a byte of zero"):
        read_tables([path])


def test_a_table_of_50_000_columns_is_read_soon(tmp_path: Path) -> None:
    n = 50_000
    names = [f"obs_{index}" for index in range(n)] + ["action", "reward", "terminated"]
    (tmp_path / "wide.csv").write_text(
        "\n".join(",".join(row) for row in (names, ["1"] * (n + 2) + ["0"], ["2"] * (n + 2) + ["0"]))
    )
    begin = time.process_time()
    assert table(tmp_path / "wide.csv").observations.shape == (1, n)
    assert time.process_time() - begin < 20


# Column maps and YAML


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yml", b"reward: \xff\xfe", r"a\.yml is no text in UTF-8 \(.* at byte 8\)\. Save it as UTF-8"),
        ("a.toml", b"reward = '\xff'", r"a\.toml is no text in UTF-8"),
        ("a.yml", b"reward: a\nreward: b", r"a\.yml, line 2: the key 'reward' is given twice"),
        ("a.toml", b"reward = 'a'\nreward = 'b'", "a.toml' is no TOML file: Cannot overwrite a value"),
        ("a.yml", b"observations: " + b"[" * 5000, r"a\.yml, line 1: is nested more than 50 deep"),
        ("a.toml", b"observations = " + b"[" * 5000, "a.toml' is no TOML file: maximum recursion depth"),
        ("a.yml", b"observations: &a [*a]", r"a\.yml, line 1: the alias 'a' stands for what it is in"),
        ("a.yml", b"reward: 2001-99-99", r"a\.yml holds a value that cannot be read \(ValueError: month"),
        ("a.yml", b"reward: " + b"x" * 2**20, r"a\.yml has 1,048,584 bytes: expected at most 1,048,576"),
    ],
)
def test_column_maps_that_are_none(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        ColumnMap.from_file(tmp_path / name)


def test_nine_lines_do_not_stand_for_a_billion(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    with pytest.raises(ValueError, match=r"line \d+: has more than 1,000,000 values, those that aliases repeat included"):
        load_yaml("\n".join(lines), tmp_path / "a.yml")
    # Repeating a little is what aliases are for
    assert load_yaml("\n".join(lines[:4]), tmp_path / "a.yml")["a1"] == [["x", "x"]] * 9


# Counts


@pytest.mark.parametrize("seeds", [10**9, 2**70, 10**7, 10**400, "list"])
def test_too_many_seeds_of_a_study(seeds: Any, tmp_path: Path) -> None:
    write_study(tmp_path, seeds=list(range(10_001)) if seeds == "list" else seeds)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"study\.yml: `seeds` must be at most 10,000"):
        Protocol.load(tmp_path)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("count", [2**70, 10**400, 1e300])
@pytest.mark.parametrize("key", ["interactions", "evaluation.episodes"])
def test_counts_of_a_study_have_an_upper_limit(key: str, count: float, tmp_path: Path) -> None:
    changes: dict[str, Any] = {key: count} if key == "interactions" else {"evaluation": {"every": 100, "episodes": count}}
    write_study(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"study\.yml: `{key}` must be at most 1,000,000,000, found "):
        Protocol.load(tmp_path)


@pytest.mark.parametrize("count", [2**70, 10**9, 10**400])
@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("budget.episodes", lambda n: {"budget": {"episodes": n}}),
        ("stages[0].episodes", lambda n: {"stages": [{"name": "shadow", "episodes": n}]}),
        ("blocks.episodes", lambda n: {"blocks": {"episodes": n}}),
        ("robustness.seeds", lambda n: {"env": "Pendulum-v1", "robustness": {"seeds": n}}),
    ],
)
def test_counts_of_a_trial_have_an_upper_limit(key: str, section: Callable[[int], Any], count: int, tmp_path: Path) -> None:
    (tmp_path / "trial.yml").write_text(yaml.safe_dump(plan_content(**section(count))))
    with pytest.raises(ValueError, match=rf"trial\.yml: `{re.escape(key)}` must be at most 100,000"):
        read_plan(tmp_path)


@pytest.mark.parametrize("effect", [10**400, -(10**400)])
def test_numbers_of_a_trial_that_no_float_holds(effect: int, tmp_path: Path) -> None:
    text = yaml.safe_dump(plan_content()).replace("smallest_effect: 1.0", f"smallest_effect: {effect}")
    (tmp_path / "trial.yml").write_text(text)
    with pytest.raises(ValueError, match=r"trial\.yml: `primary\.smallest_effect` must be a finite number"):
        read_plan(tmp_path)


# Results


@pytest.mark.parametrize("event", ["[1, 2]", '{"n": 0, "n": 0, "event": "x"}', '{"n": 0, "event": 3}', '{"event": "x"}'])
def test_a_line_with_the_right_hash_that_is_no_event(event: str, tmp_path: Path) -> None:
    body = event[:-1]
    line = f'{body}, "hash": "{hashlib.sha256(event.encode()).hexdigest()}"}}\n'
    (tmp_path / "journal.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 1"):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["responses"].clear(),
        lambda content: content["responses"][0]["levels"].pop(),
        lambda content: content["responses"][0].update(nominal=7.0),
        lambda content: content["responses"][0]["values"]["policy"][0].update({"return": ["x", "y"]}),
        lambda content: content["responses"][0]["values"]["policy"][0].update({"return": [10**400, 1.0]}),
        lambda content: content["responses"][0]["values"]["policy"][1].clear(),
        lambda content: content.update(versions={"numpy": 2}),
        lambda content: content.update(policies={}),
    ],
)
def test_a_result_of_robustness_with_parts_that_do_not_fit(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path = tmp_path / "robustness.json"
    rows = tuple({"return": (-1.0, -2.0)} for _ in range(2))
    response = Response("gravity", "its factor", 1.0, (1.0, 2.0), {"policy": rows})
    RobustnessResult("Pendulum-v1", {}, 0, -9.0, {"policy": Policy("a.zip", None)}, (response,), {"numpy": "2"}).save(path)
    assert RobustnessResult.read(path).n_seeds == 2
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"robustness\.json is damaged or not written by"):
        RobustnessResult.read(path)


# Damaged files of all kinds


def test_a_sample_of_damaged_files_gives_right_data_or_one_clear_error() -> None:
    """If it fails, it names the numbers of files; run benchmarks/robust_files/run.py --seed 7 --only <number>."""
    command = [sys.executable, str(BENCHMARK / "run.py"), "--n", "100", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "| **all** | 100 |" in done.stdout


def test_the_table_says_what_was_measured() -> None:
    """If it fails, run benchmarks/robust_files/run.py --report."""
    result = json.loads((BENCHMARK / "robust_files.json").read_text())
    counted = [n for counts in result["counts"].values() for n in counts.values()]
    assert result["files"] == sum(counted) >= 10_000
    page = (BENCHMARK / "robust_files.md").read_text()
    assert f"| **all** | {result['files']:,} |" in page
    for name, counts in result["counts"].items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert [int(cell) for cell in row.split("|")[2:6]] == [
            sum(counts.values()), *(counts.get(key, 0) for key in ("the same data", "other values", "one clear error"))
        ]  # fmt: skip
    assert result["bad"] == []
