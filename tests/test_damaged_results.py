"""A result of a run that is damaged, in whatever way, is named and made again; what is written is on the disk."""

import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.evaluation import summarize_run
from sb3_offline_ft.study import Protocol, study_results
from sb3_offline_ft.study.engine.folder import read_result, run_folder, write_result
from sb3_offline_ft.study.engine.queue import RESULT, StudyQueue
from tests import made_up_study, study_runs
from tests.test_opening_files import command, make_run


def arrays(path: Path, **changes: Any) -> None:
    """Write other arrays; None leaves one out."""
    with np.load(path) as file:
        content = dict(file) | changes
    with path.open("wb") as stream:
        np.savez(stream, **{name: array for name, array in content.items() if array is not None})  # type: ignore[arg-type]


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def claim(path: Path) -> None:
    """Let the file say that it holds more than any memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45, 10)})
    with np.load(path) as file:
        content = dict(file)
    with zipfile.ZipFile(path, "w") as archive:
        for name in content:
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(80))


def encrypt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[6] |= 1
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    path.write_bytes(content)


def scramble(path: Path) -> None:
    """Damage what is compressed, not the archive's lists."""
    content = bytearray(path.read_bytes())
    content[60:120] = bytes(255 for _ in range(60))
    path.write_bytes(content)


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


NPZ_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut to 20 bytes": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "half": lambda path: cut(path, 0.5),
    "nearly whole": lambda path: cut(path, 0.98),
    "text": lambda path: path.write_text("no archive"),
    "scrambled": scramble,
    "encrypted": encrypt,
    "one array": lambda path: path.write_bytes(np.lib.format.magic(1, 0) + b"\x10\x00" + b" " * 16),
    "one whole array": one_array,
    "claims too much": claim,
    "folder": folder_instead,
    "missing array": lambda path: arrays(path, timesteps=None),
    "timesteps of floats": lambda path: arrays(path, timesteps=np.array([0.0, np.nan])),
    "timesteps of text": lambda path: arrays(path, timesteps=np.array(["0", "1"])),
    "no timesteps": lambda path: arrays(path, timesteps=np.zeros(0, np.int64)),
    "a number": lambda path: arrays(path, timesteps=np.int64(3)),
}
EVALUATIONS_DAMAGES: dict[str, Callable[[Path], object]] = {
    "returns of text": lambda path: arrays(path, results=np.array([["a", "b"]] * 31)),
    "flat returns": lambda path: arrays(path, results=np.zeros(31)),
    "no episodes": lambda path: arrays(path, results=np.zeros((31, 0)), ep_lengths=np.zeros((31, 0), np.int64)),
    "fewer returns": lambda path: arrays(path, results=np.zeros((30, 10)), ep_lengths=np.ones((30, 10), np.int64)),
    "other lengths": lambda path: arrays(path, ep_lengths=np.ones((31, 9), np.int64)),
    "lengths of floats": lambda path: arrays(path, ep_lengths=np.ones((31, 10))),
    "twice the same": lambda path: arrays(path, timesteps=np.zeros(31, np.int64)),
    "before the begin": lambda path: arrays(path, timesteps=np.arange(-1, 30)),
}
OWN_DAMAGES: dict[str, Callable[[Path], object]] = {
    "flat own returns": lambda path: arrays(path, own_returns=np.zeros(31)),
    "fewer own times": lambda path: arrays(path, own_timesteps=np.arange(30)),
    "own lengths of floats": lambda path: arrays(path, own_lengths=np.ones((31, 10))),
    "own lengths are gone": lambda path: arrays(path, own_lengths=None),
}
MANIFEST_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: cut(path, 0.5),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep facts": lambda path: path.write_text('{"key": ' + '{"a":' * 100_000),
    "folder": folder_instead,
    **{
        f"{name} is {value!r}": lambda path, name=name, value=value: path.write_text(  # type: ignore[misc]
            json.dumps(json.loads(path.read_text()) | {name: value})
        )
        for name, value in [
            ("key", 5), ("key", None), ("guarded", "yes"), ("frozen_until", "2000"), ("frozen_until", None),
            ("frozen_until", 2.5), ("frozen_until", True), ("cell", "none"), ("cell", {"dataset": 3}), ("dataset", "medium"),
            ("dataset", {}), ("dataset", {"fingerprint": "a", "transitions": "many", "episodes": 1, "mean_return": 1.0}),
            ("pretrained", ["a"]), ("pretrained", {"recipe": 1, "weights_sha256": "a"}), ("random_return", "low"),
            ("learner_evaluation_steps", "few"), ("seconds", 5), ("seconds", {"finetuning": "long"}), ("versions", "new"),
        ]
    },
    **{
        f"{name} is missing": lambda path, name=name: path.write_text(  # type: ignore[misc]
            json.dumps({each: value for each, value in json.loads(path.read_text()).items() if each != name})
        )
        for name in ("key", "guarded", "frozen_until", "dataset")
    },
}  # fmt: skip
EVENTS_DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: cut(path, 0.5),
    "text": lambda path: path.write_text("nothing\nof it\n"),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "time of text": lambda path: path.write_text('{"event": "alarm", "timestep": "late"}\n'),
    "folder": folder_instead,
}
DAMAGES = {
    (name, words): damage
    for name, damages in {
        "evaluations.npz": NPZ_DAMAGES | EVALUATIONS_DAMAGES,
        "training.npz": NPZ_DAMAGES | OWN_DAMAGES,
        "manifest.json": MANIFEST_DAMAGES,
        "collapse_events.jsonl": EVENTS_DAMAGES,
    }.items()
    for words, damage in damages.items()
}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cell with events, which has no deficiency."""
    study = made_up_study.write_study(tmp_path_factory.mktemp("study"), {"seeds": 1})
    made_up_study.write_runs(study, [each for each in study.cells() if each.method.guard and each.dataset == "medium"])
    (folder,) = study.folder.glob("runs/*/*/seed*")
    return folder


@pytest.mark.parametrize(("name", "words"), DAMAGES)
def test_a_damaged_result_counts_as_absent_and_is_named(name: str, words: str, cell: Path, tmp_path: Path) -> None:
    folder = tmp_path / cell.name
    shutil.copytree(cell, folder)
    whole = read_result(folder)
    assert whole is not None
    DAMAGES[name, words](folder / name)
    with pytest.warns(UserWarning, match=rf"{folder} .*\. The cell counts as not run\.") as told:
        assert read_result(folder) is None
    assert len(told) == 1 and len(str(told[0].message)) < 1000
    # Whatever is there can be replaced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_result(folder, whole)
    study_runs_same(read_result(folder), whole)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def study_runs_same(result: Any, expected: Any) -> None:
    assert result is not None and result.events == expected.events and result.manifest == expected.manifest
    for name in study_runs.ARRAYS:
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))


def test_no_result_is_no_damage(tmp_path: Path) -> None:
    assert read_result(tmp_path / "nothing") is None


def test_a_file_in_place_of_the_folder_is_replaced(cell: Path, tmp_path: Path) -> None:
    whole = read_result(cell)
    assert whole is not None
    folder = tmp_path / cell.name
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="The cell counts as not run"):
        assert read_result(folder) is None
    write_result(folder, whole)
    study_runs_same(read_result(folder), whole)


def test_reports_name_damaged_cells_and_go_on(tmp_path: Path) -> None:
    study = made_up_study.write_study(tmp_path / "study", {"seeds": 3})
    made_up_study.write_runs(study)
    folders = sorted(study.folder.glob("runs/medium/td3*/seed1-*"))
    damages = [(*key, damage) for key, damage in DAMAGES.items() if key[0] == "evaluations.npz"]
    for folder, (name, _, damage) in zip(folders, damages, strict=False):
        damage(folder / name)
    output = command("study", "report", study.folder, "--format", "csv", "--format", "html")
    for folder in folders:
        assert output.count(f"Note: {folder} is damaged") == 1
    assert "has not finished" in (study.folder / "report.html").read_text() or len(folders) > 1
    lines = (study.folder / "results.csv").read_text().splitlines()
    assert len(lines) - 1 == len(study.cells()) - len(folders)


@pytest.mark.parametrize("with_storage", [True, False])
def test_a_damaged_cell_is_made_again_by_the_next_run(with_storage: bool, tmp_path: Path) -> None:
    folder = study_runs.write_study(tmp_path / "study", seeds=1, methods={"scratch": study_runs.STUDY["methods"]["scratch"]})
    command("study", "run", folder)
    (cell,) = folder.glob("runs/*/*/seed*")
    expected = read_result(cell)
    for damage in (NPZ_DAMAGES["empty"], NPZ_DAMAGES["scrambled"]):
        damage(cell / "evaluations.npz")
        if not with_storage:
            (folder / "study.log").unlink()
        output = command("study", "run", folder)
        notes = output.count(f"Note: {cell} is damaged")
        # What the storage has is not run again
        assert (notes == 1 if with_storage else notes >= 1) and "1 done" in output
        result = read_result(cell)
        assert result is not None and expected is not None
        study_runs.assert_same(result, expected)


@pytest.mark.parametrize("text", ["", "no result", '{"arrays": {}}'])
@pytest.mark.parametrize("has_folder", [True, False])
def test_so_is_one_that_is_damaged_in_the_storage_too(has_folder: bool, text: str, tmp_path: Path) -> None:
    folder = study_runs.write_study(tmp_path / "study", seeds=1, methods={"scratch": study_runs.STUDY["methods"]["scratch"]})
    (expected,) = study_runs.undisturbed(folder).values()
    with StudyQueue(Protocol.load(folder)) as queue:
        queue.enqueue()
        claim = queue.claim(list(queue.cells))
        assert claim is not None
        queue.storage.set_trial_user_attr(queue.trial_id(claim.number), RESULT, text)
        queue.storage.set_trial_state_values(queue.trial_id(claim.number), TrialState.COMPLETE, [0.0])
        claim.let_go()
    if has_folder:
        (run,) = (run_folder(folder, None, "scratch", 0, key) for key in queue.cells)
        write_result(run, expected)
        NPZ_DAMAGES["half"](run / "training.npz")
    output = command("study", "run", folder)
    assert "Note: The result of no-data/scratch/seed0 in the storage is damaged" in output and "1 done" in output
    assert (f"Note: {folder / 'runs'}" in output) == has_folder
    (made,) = study_results(folder).runs
    study_runs.assert_same(made.result, expected)
    # Nothing is left to do, and nothing to be said
    assert command("study", "run", folder) == "tiny: 1 done"


@pytest.mark.parametrize("words", [*NPZ_DAMAGES, "returns of text", "flat returns", "no episodes", "fewer returns"])
def test_the_summary_of_a_damaged_run_is_one_clear_error(words: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    arrays(run / "evaluations.npz", timesteps=np.arange(31), results=np.zeros((31, 10)))
    summarize_run(run)
    (NPZ_DAMAGES | EVALUATIONS_DAMAGES)[words](run / "evaluations.npz")
    output = command("summary", run, status=1)
    assert output.startswith("sb3-offline-ft summary:") and "evaluations.npz is damaged or not" in output


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Pendulum-v1.zip", b""),
        ("Pendulum-v1.zip", b"PK\x03\x04"),
        ("0.monitor.csv", b""),
        ("0.monitor.csv", b"#{}\nr,l,t\n"),
        ("0.monitor.csv", b'#{"t_start": 0}\nr,l,t\n1.0,x,2\n'),
        ("0.monitor.csv", b"[" * 100_000),
    ],
)
def test_so_is_that_of_a_run_whose_other_files_are_damaged(name: str, content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / name).write_bytes(content)
    assert f"{name} is damaged or not" in command("summary", run, status=1)


def test_nor_do_settings_of_other_types_end_the_summary_otherwise(tmp_path: Path) -> None:
    run = make_run(tmp_path, _warmup_end="late")
    assert "_warmup_end must be a whole number, found 'late'" in command("summary", run, status=1)


def test_what_has_a_name_is_on_the_disk(cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is synced before it gets its name, and the folder after that."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"content")
    assert [kind for kind, _ in done] == ["sync", "replace", "sync"]
    assert done[0][1].startswith(f"{tmp_path}/.file.") and done[1:] == [
        ("replace", f"{tmp_path}/file"),
        ("sync", str(tmp_path)),
    ]
    done.clear()
    whole = read_result(cell)
    assert whole is not None
    write_result(tmp_path / cell.name, whole)
    at = done.index(("replace", str(tmp_path / cell.name)))
    names = {Path(path).name for _, path in done[:at]}
    assert {path.name for path in cell.iterdir()} < names and done[at + 1 :] == [("sync", str(tmp_path))]


def test_a_disk_that_does_not_take_a_file_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "file") as file:
        file.write(b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
