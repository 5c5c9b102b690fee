"""Methods of a study that are commands: what they are given, what is read back, and what becomes of those that fail."""

import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.study import write_report
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.external import RUNS, ExternalError, written
from sb3_offline_ft.study.engine.folder import CellResult, read_result, write_result
from sb3_offline_ft.study.engine.results import load_results
from tests.conftest import REPOSITORY
from tests.study_runs import ARRAYS, study_run, write_study

EXCHANGE = REPOSITORY / "benchmarks" / "peers" / "exchange.py"
LEARN = """
import numpy as np
from exchange import Exchange

exchange = Exchange.from_command_line()
data = exchange.dataset()
assert data["episode_starts"][0] == 0 and data["observations"].shape == data["next_observations"].shape
gain = 0.0

def act(observation):
    # It is found at once, with a gain that grows: an agent whose returns change
    return np.clip(-gain * observation[2:3], -2, 2).astype(np.float32)

for step in range(10):
    exchange.progress("pretraining", step + 1, 10)
env = exchange.make_env()
exchange.measure(act)
observation, _ = env.reset()
for _ in range(exchange.interactions):
    gain += exchange.options["speed"]
    observation, _, terminated, truncated, _ = env.step(act(observation))
    if terminated or truncated:
        observation, _ = env.reset()
    exchange.measure_if_due(act)
exchange.finish("gain", {"gain": gain, "rows": len(data["rewards"])}, [], offline_updates=10, online_updates=env.n_steps)
"""
EXCHANGE_WITH = (
    LEARN.replace("{", "{{").replace("}", "}}")
    + """
import json
path = exchange.request["result"]
content = json.load(open(path)) | {{{}}}
json.dump(content, open(path, "w"))
"""
)
COMMAND = [sys.executable, "learn.py"]
PLAN: dict[str, Any] = {"interactions": 450, "evaluation": {"every": 200, "episodes": 2}, "seeds": 1}


def study(folder: Path, script: str = LEARN, command: list[str] | None = None, **changes: Any) -> Protocol:
    method = {"label": "a gain", "external": {"command": command or COMMAND, "options": {"speed": 0.001}}}
    methods = {"offline": {"frozen": True}, "gain": method}
    write_study(folder, **{**PLAN, "methods": methods, **changes})
    shutil.copy(EXCHANGE, folder)
    (folder / "learn.py").write_text(script)
    return Protocol.load(folder)


def cell_of(protocol: Protocol, name: str = "gain") -> Cell:
    return next(cell for cell in protocol.cells() if cell.method.name == name)


def run(protocol: Protocol, name: str = "gain", **told: Any) -> CellResult:
    return run_cell(protocol, cell_of(protocol, name), pretrained_folder=protocol.folder / "pretrained", **told)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return study(tmp_path_factory.mktemp("external"))


@pytest.fixture(scope="module")
def result(protocol: Protocol) -> CellResult:
    return run(protocol)


def test_a_command_learns_from_the_data_and_is_measured_as_others_are(protocol: Protocol, result: CellResult) -> None:
    assert result.timesteps.tolist() == [0, 200, 400] and result.returns.shape == result.lengths.shape == (3, 2)
    assert result.training_timesteps.tolist() == [200, 400] and np.isfinite(result.training_returns).all()
    assert len({*result.returns.mean(axis=1).round(6)}) == 3
    manifest = result.manifest
    assert manifest["algorithm"] == "gain" and manifest["interactions"] == 450 and manifest["frozen_until"] == 0
    assert manifest["hyperparams"]["rows"] == len(load_dataset("bundled:pendulum-medium"))
    assert manifest["hyperparams"]["gain"] == pytest.approx(0.45) and manifest["updates"] == {"offline": 10, "online": 450}
    assert manifest["external"]["command"] == COMMAND and manifest["external"]["versions"]["numpy"] == np.__version__
    assert manifest["dataset"]["label"] == "medium" and 0 < manifest["seconds"]["finetuning"] < manifest["wall_seconds"]
    assert list(protocol.folder.glob("external_data/*.npz"))


def test_its_measured_episodes_start_as_those_of_the_studys_own_methods_do(protocol: Protocol) -> None:
    """Without a gain it never acts, so that returns tell where the episodes started."""
    still = run(study(protocol.folder.parent / "still", methods={"offline": {"frozen": True}, "gain": {
        "external": {"command": COMMAND, "options": {"speed": 0.0}}}}))  # fmt: skip

    class Still:
        def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
            return np.zeros((len(observation), 1), np.float32), None

    from stable_baselines3.common.env_util import make_vec_env

    from sb3_offline_ft.common.seeding import derive_seed
    from sb3_offline_ft.study.engine.cell import MEASURED_STREAM
    from sb3_offline_ft.study.engine.measure import Measure

    measure = Measure(make_vec_env("Pendulum-v1", seed=derive_seed(0, MEASURED_STREAM)), 200, 2)
    for timestep in (0, 200, 400):
        measure.measure(Still(), timestep)  # type: ignore[arg-type]
    np.testing.assert_allclose(still.returns, measure.returns, rtol=1e-5)


def test_the_same_cell_gives_the_same_and_survives_its_folder(protocol: Protocol, result: CellResult, tmp_path: Path) -> None:
    again = run(protocol)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    write_result(tmp_path / "cell", result)
    read = read_result(tmp_path / "cell")
    assert read is not None and read.manifest == result.manifest
    np.testing.assert_array_equal(read.training_returns, result.training_returns)


def test_progress_and_evaluations_are_told(protocol: Protocol) -> None:
    steps: list[tuple[str, int, int]] = []
    evaluations: list[int] = []
    run(protocol, on_step=lambda *step: steps.append(step), on_evaluation=lambda timestep, _: evaluations.append(timestep))
    assert {phase for phase, _, _ in steps} - {RUNS} == {"pretraining", "finetuning"}
    assert steps[-1] == ("finetuning", 450, 450) and evaluations == [0, 200, 400]


def test_what_it_depends_on_is_its_command_and_options(tmp_path: Path) -> None:
    def key(**external: Any) -> str:
        entry = {"external": {"command": COMMAND, "options": {"speed": 0.001}, **external}}
        made = study(tmp_path, methods={"gain": entry})
        return made.cell_key(cell_of(made))

    known = key()
    assert key() == known
    assert key(options={"speed": 0.002}) != known and key(command=[sys.executable, "other.py"]) != known
    assert key(timeout=7) == known
    # Others than what replay buffers have by default, and 1 is not true
    options: list[dict[str, Any]] = [{}, {"replay_buffer_kwargs": 1}, {"replay_buffer_kwargs": {}}, {"a": 1}, {"a": True}]
    named = {f"m{i}": {"external": {"command": COMMAND, "options": one}} for i, one in enumerate(options)}
    made = study(tmp_path, methods=named)
    assert len({made.cell_key(cell) for cell in made.cells()}) == len(options)
    first = study(tmp_path)
    # Its name and label, and other methods, do not matter
    assert first.cell_key(cell_of(first)) == known


def test_a_study_with_commands_is_run_and_reported(tmp_path: Path) -> None:
    """One that fails is a failed cell; those of other methods are run."""
    entries = {
        "offline": {"frozen": True},
        "gain": {"label": "a gain", "external": {"command": COMMAND, "options": {"speed": 0.001}}},
        "fails": {"external": {"command": [sys.executable, "-c", "print('no luck'); raise SystemExit(3)"]}},
        "scratch": {"start": "scratch", "external": {"command": COMMAND, "options": {"speed": 0.002}}},
    }
    protocol = study(tmp_path, methods=entries, reference_method="offline")
    assert [cell.name for cell in protocol.cells()] == [f"medium/{name}/seed0" for name in entries]
    with study_run(tmp_path, watched=tmp_path) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() != 0
    assert "no luck" in said and f"Running `{sys.executable} learn.py`" in said
    results = load_results(protocol)
    assert {one.cell.method.name for one in results.runs} == {"offline", "gain", "scratch"}
    write_report(tmp_path, formats=["md"])
    tables = (tmp_path / "tables.md").read_text()
    assert "a gain" in tables and "Served return on medium" in tables


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise ValueError('the data is strange')", "the data is strange\n`.*learn.py` failed with exit status 1"),
        ("import os; os.kill(os.getpid(), 9)", "nothing was printed\n.* was ended by SIGKILL"),
        ("print('done')", "ended without a result"),
        (LEARN.replace('"gain", {', '3, {'), "`algorithm` must be a str, found 3"),
        (LEARN.replace("exchange.finish", "env.returns[0] = 1e400\nexchange.finish"), "Out of range float|not JSON compliant"),
        (LEARN.replace("exchange.finish", "exchange.returns[1].pop()\nexchange.finish"), "`returns` must be numbers"),
        (LEARN.replace("exchange.finish", "exchange.timesteps[1] = 150\nexchange.finish"), "must be after 0, 200, 400"),
        (LEARN.replace("exchange.finish", "env.returns[0] = '7'\nexchange.finish"), "`training_returns` must be numbers"),
        (LEARN.replace("exchange.finish", "env.returns[0] = 10**400\nexchange.finish"), "`training_returns` must be numbers"),
        (LEARN.replace("=env.n_steps)", "=-1)"), "`updates` must have numbers of at least 0"),
        (LEARN.replace("=env.n_steps)", "=1, frozen_until=450)"), "`frozen_until` must be from -1 to below"),
        (LEARN.replace("exchange.finish", "env.ends.reverse()\nexchange.finish"), "the one later than the other"),
        (LEARN.replace("exchange.finish", "env.ends.pop()\nexchange.finish"), "must be of the same episodes"),
        (LEARN.replace("exchange.finish", "env.n_steps = 400\nexchange.finish"), "at least 450, found 400"),
        (LEARN.replace("exchange.finish", "exchange.lengths.pop()\nexchange.finish"), "`lengths` must be those of the epis"),
        (LEARN.replace("exchange.finish", "exchange.lengths[0][0] = 0\nexchange.finish"), "`lengths` must be those of the e"),
        (LEARN.replace("exchange.finish", "env.ends[0] = 10**300\nexchange.finish"), "`training_timesteps` must be finite"),
        (LEARN.replace("exchange.finish", "env.returns[0] = 1.7e308\nexchange.finish"), "`training_returns` must be finite"),
        (EXCHANGE_WITH.format('"updates": {"offline": 1}'), "`updates` must have numbers of at least 0, offline and online"),
        (EXCHANGE_WITH.format('"seconds": {"preparation": 10**400, "finetuning": 1}'), "`seconds` must have numbers"),
    ],
)  # fmt: skip
def test_a_command_that_fails_says_why(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExternalError, match=f"(?s){message}"):
        run(study(tmp_path, script))


@pytest.mark.parametrize("line", [
    '{"phase": 1}', "{broken", '{"phase": "a", "done": 1e999, "total": 2}', '{"phase": "a", "done": 3, "total": 2}',
    '{"phase": "a", "done": true, "total": 2}', f'{{"phase": "a", "done": 1, "total": {10**400}}}',
])  # fmt: skip
def test_lines_that_only_look_like_progress_are_said_if_it_fails(line: str, tmp_path: Path) -> None:
    script = f"print({line!r}, flush=True); print(); raise SystemExit(1)"
    told: list[Any] = []
    with pytest.raises(ExternalError, match=f"^{re.escape(line[:40])}"):
        run(study(tmp_path, script), on_step=lambda *step: told.append(step))
    assert {phase for phase, _, _ in told} <= {RUNS}


def test_the_last_line_of_an_error_says_how_it_ended(tmp_path: Path) -> None:
    """It is what is shown where there is room for one; what was printed is cut, the end of the command is not."""
    script = "import os\nfor _ in range(30): print('y' * 600 + chr(10), flush=True)\nos.kill(os.getpid(), 60)"
    with pytest.raises(ExternalError) as caught:
        run(study(tmp_path, script))
    *said, end = str(caught.value).splitlines()
    assert end.endswith("learn.py` was ended by signal 60") and all(line.strip() for line in said)
    assert len(str(caught.value)) < 5000


def test_a_command_ends_though_what_it_started_keeps_its_output_open(tmp_path: Path) -> None:
    """And ignores that it is to end."""
    script = (
        LEARN
        + """
import subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
open("pids", "w").write(f"{child.pid}")
"""
    )
    begun = time.monotonic()
    assert run(study(tmp_path, script)).timesteps.size == 3
    assert time.monotonic() - begun < 60
    _wait_for_end(int((tmp_path / "pids").read_text()))


def test_a_command_may_be_given_so_long(tmp_path: Path) -> None:
    entry = {"external": {"command": COMMAND, "timeout": 1.5}}
    told: list[Any] = []
    with pytest.raises(ExternalError, match=r"nothing was printed\n`.*learn.py` did not end within 1.5 seconds"):
        run(study(tmp_path, "import time; time.sleep(600)", methods={"gain": entry}), on_step=lambda *step: told.append(step))
    # Who runs it notices so whether there is anybody to tell
    assert told and {*told} == {(RUNS, 0, 1)}


def test_a_damaged_file_of_the_data_is_written_again(tmp_path: Path) -> None:
    data = load_dataset("bundled:pendulum-medium?episodes=2")
    path = written(data, tmp_path)
    content = path.read_bytes()
    for damaged in (b"", content[:-100]):
        path.write_bytes(damaged)
        assert written(data, tmp_path).read_bytes() == content


def test_an_interrupted_command_leaves_no_process(tmp_path: Path) -> None:
    """Nor do those that it has started."""
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("pids", "w").write(f"{child.pid}")
print('{"phase": "pretraining", "done": 1, "total": 2}', flush=True)
time.sleep(600)
"""

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study(tmp_path, script), on_step=interrupt)
    _wait_for_end(int((tmp_path / "pids").read_text()))


def _wait_for_end(pid: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"external": {"command": "python learn.py"}}, "`methods.gain.external.command` must be a list of words"),
        ({"external": {"command": []}}, "must be a list of words"),
        ({"external": {}}, "must be a list of words"),
        ({"external": {"command": COMMAND, "option": {}}}, "`methods.gain.external.option` is no known key. .*'options'"),
        (
            {"external": {"command": COMMAND, "options": {"x": float("inf")}}},
            "external.options.x` must be what JSON can hold .*found inf: write it as a text",
        ),
        ({"external": {"command": COMMAND, "options": {"a": [{1: 2}]}}}, r"options.a\[0\]` must have texts for keys.*found 1"),
        ({"external": {"command": [*COMMAND, "a\0b"]}}, "must be a list of words"),
        ({"external": {"command": COMMAND, "timeout": 0}}, "timeout` must be a number of seconds above 0, found 0"),
        ({"external": {"command": COMMAND}, "algorithm": "td3"}, "`methods.gain.algorithm` is not known to a command"),
        ({"external": {"command": COMMAND}, "champion": True}, "`methods.gain.champion` is not known to a command"),
        ({"external": {"command": COMMAND}, "hyperparams": {"gamma": 1}}, "`methods.gain.hyperparams` is not known"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study(tmp_path, methods={"gain": entry})


def test_what_would_fail_later_is_found_before_the_run(tmp_path: Path) -> None:
    for command in ("./nowhere/python", "no-such-command"):
        with pytest.raises(ValueError, match=f"`methods.gain.external` has the command '{command}', which is not there"):
            study(tmp_path, command=[command]).check()
    # On a machine that has others only
    study(tmp_path, command=["./nowhere/python"]).check(commands={"offline"})
    weighted = {"medium": "0.5*bundled:pendulum-medium + 0.5*bundled:pendulum-medium?episodes=2"}
    with pytest.raises(ValueError, match=r"`datasets.medium`: .* has weighted parts"):
        study(tmp_path, datasets=weighted).check()
    with pytest.raises(ValueError, match="`datasets` must have at least one dataset"):
        study(tmp_path, methods={"gain": {"start": "scratch", "external": {"command": COMMAND}}}, datasets={})
    study(tmp_path).check()


def test_factors_and_presets_are_not_for_commands(tmp_path: Path) -> None:
    methods = {"gain": {"external": {"command": COMMAND}}, "td3": {"algorithm": "td3"}}
    made = study(tmp_path, methods=methods, factors={"gamma": [0.9]}, hyperparams={"warmup_steps": 50})
    assert [method.name for method in made.methods] == ["gain", "td3", "td3+gamma=0.9"]
    with pytest.raises(ValueError, match=r"is an argument of no method that it can act in \(td3\)"):
        study(tmp_path, methods=methods, factors={"gama": [0.9]}, hyperparams={"warmup_steps": 50})


def test_commands_are_given_one_array_of_observations(tmp_path: Path) -> None:
    rows = np.zeros((4, 1), np.float32)
    columns: dict[str, Any] = {"actions": rows, "rewards": rows[:, 0], "terminations": np.array([0, 0, 0, 1])}
    data = OfflineDataset.from_columns(observations={"a": rows}, next_observations={"a": rows}, **columns)
    with pytest.raises(ExternalError, match="has `Dict` observations"):
        written(data, tmp_path)
    medium = load_dataset("bundled:pendulum-medium")
    with pytest.raises(ExternalError, match="has weighted parts"):
        written(load_dataset([(medium, 0.7), (medium, 0.3)]), tmp_path)
    assert not list(tmp_path.glob("**/*.npz"))
