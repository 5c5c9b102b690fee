"""CollapseGuard in the stock commands of rl-zoo3: from YAML files, in presets without a champion, and under ``-optimize``."""

import json
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
import yaml
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.collapse.snapshot import LearnerSnapshot
from tests.conftest import Installation, RunPython

RUN = ("-n", "1300", "--eval-freq", "600", "--eval-episodes", "1", "--seed", "1")
BASELINE = [-900.0, -1000.0, -1100.0, -1200.0, -1300.0, -1400.0]


@pytest.fixture(scope="module")
def run_folder(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    arguments = ("--algo", "td3bc", "--env", "Pendulum-v1", *RUN)
    process = installation.run(
        "-m", "rl_zoo3.train", *arguments, "-params", "offline_steps:50", "warmup_steps:1200", cwd=folder
    )
    assert process.returncode == 0, process.stderr
    assert "CollapseGuard: baseline of 6 episodes" in process.stdout
    return folder / "logs" / "td3bc" / "Pendulum-v1_1"


def test_presets_without_a_champion_are_guarded(run_folder: Path) -> None:
    events = read_events(run_folder / "collapse_events.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("baseline") == 1
    assert events[0]["algorithm"] == "TD3BC"
    assert (run_folder / "collapse.png").stat().st_size > 10_000


def test_guard_show_prints_a_run(run_folder: Path) -> None:
    result = CliRunner().invoke(app, ["guard", "show", str(run_folder)])
    assert result.exit_code == 0, result.output
    assert "No alarm" in result.output and "baseline" in result.output


def test_the_guard_of_a_preset_can_be_left_out(installation: Installation, tmp_path: Path) -> None:
    arguments = ("--algo", "td3bc", "--env", "Pendulum-v1", "-n", "60", "--eval-freq", "-1", "--seed", "1")
    process = installation.run(
        "-m", "rl_zoo3.train", *arguments, "-params", "offline_steps:5", "warmup_steps:50", "callback:None", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert "CollapseGuard" not in process.stdout + process.stderr
    assert not list(tmp_path.rglob("collapse*"))


def guarded_sac(folder: Path, **settings: object) -> Path:
    content = {
        "Pendulum-v1": {
            "policy": "MlpPolicy",
            "n_timesteps": 600,
            "learning_starts": 50,
            "policy_kwargs": "dict(net_arch=[16])",
            "callback": [{"sb3_offline_ft.CollapseGuard": {"baseline": BASELINE, "signal_freq": 50, **settings}}],
        }
    }
    path = folder / "sac.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_yaml_file_guards_algorithms_of_sb3(installation: Installation, tmp_path: Path) -> None:
    config = guarded_sac(tmp_path)
    process = installation.run(
        "-m", "rl_zoo3.train", "--algo", "sac", "--env", "Pendulum-v1", "-conf", str(config), "--eval-freq", "-1", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    events = read_events(tmp_path / "logs" / "sac" / "Pendulum-v1_1" / "collapse_events.jsonl")
    assert events[0]["algorithm"] == "SAC"
    assert [event["source"] for event in events if event["event"] == "baseline"] == ["given"]


def test_optimize_reports_rollbacks_of_a_trial(installation: Installation, tmp_path: Path) -> None:
    # A limit that every run exceeds stands for a collapse
    config = guarded_sac(tmp_path, secondary_alarms={"log_mean_abs_q": -20.0}, max_rollbacks=2)
    command = ("--algo", "sac", "--env", "Pendulum-v1", "-conf", str(config), "-optimize", "--n-trials", "1", "--n-jobs", "1")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    process = installation.run(
        "-m",
        "rl_zoo3.train",
        *command,
        *("--storage", storage, "--study-name", "guarded", "--n-evaluations", "1", "--no-optim-plots", "-n", "250"),
        cwd=tmp_path,
    )
    # After the trials rl_zoo3 writes a table with pandas, which it does not require
    assert process.returncode == 0 or "No module named 'pandas'" in process.stderr, process.stdout + process.stderr
    (trial,) = optuna.load_study(study_name="guarded", storage=storage).trials
    assert trial.user_attrs["collapse_rollbacks"] == 2
    assert trial.user_attrs["collapse_alarms"] == 3


LONG_RUN = """
import sys
import numpy as np
from stable_baselines3 import TD3
from sb3_offline_ft import CollapseGuard
model = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, device="cpu", seed=0, learning_starts=0)
guard = CollapseGuard(
    baseline=-2000 + np.random.default_rng(0).normal(size=20), path=sys.argv[1], save_snapshots=True, promotion_episodes=2,
    keep_snapshots=2, signal_freq=20, ratchet=False,
)
model.learn(10**9, callback=guard)
"""


def test_kill_9_leaves_readable_events_and_snapshots(installation: Installation, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        with subprocess.Popen([installation.python, "-c", LONG_RUN, str(folder)], stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while len(list((folder / "snapshots").glob("snapshot_*.pt"))) < 2 + number and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        events = read_events(folder / "collapse_events.jsonl")
        assert "promotion" in [event["event"] for event in events]
        snapshots = sorted((folder / "snapshots").glob("snapshot_*.pt"))
        assert len(snapshots) >= 2
        for path in snapshots:
            assert LearnerSnapshot.load(path).algorithm == "TD3"


def test_the_import_of_the_package_stays_cheap(start_python: RunPython) -> None:
    code = "import sys, json, {}; print(json.dumps([name in sys.modules for name in {}]))"
    for module, heavy in (("sb3_offline_ft.collapse", ["torch", "scipy"]), ("sb3_offline_ft.collapse.guard", ["matplotlib"])):
        found = json.loads(start_python("-c", code.format(module, heavy)).stdout)
        assert not any(found), dict(zip(heavy, found, strict=True))
