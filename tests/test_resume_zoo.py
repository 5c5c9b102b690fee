"""A run of rl_zoo3 that is killed goes on in its own folder."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import SAC

from sb3_offline_ft import TD3C
from sb3_offline_ft.algorithms import preset_path
from sb3_offline_ft.zoo.manifest import MANIFEST, read_manifest
from sb3_offline_ft.zoo.trace import Trace, compare
from sb3_offline_ft.zoo.train import main
from tests.conftest import REPOSITORY
from tests.resumed_runs import events, scalars

ENV = "Pendulum-v1"
SETTINGS: dict[str, Any] = {
    "policy": "MlpPolicy",
    "dataset": "bundled:pendulum-medium",
    "n_timesteps": 1800,
    "offline_steps": 1000,
    "warmup_steps": 1000,
    "policy_averaging": 0.99,
    "policy_kwargs": {"net_arch": [16]},
    "batch_size": 16,
    "noise_type": "normal",
    "noise_std": 0.1,
    "callback": [
        {"sb3_offline_ft.CheckpointRun": {"save_freq": 100}},
        {
            "sb3_offline_ft.ChampionChallenger": {
                "random_return": -1309,
                "worst_return": -1900,
                "baseline_episodes": 5,
                "min_updates": 50,
                "risk_budget": 0.9,
            }
        },
    ],
}


def start(folder: Path, *arguments: str, module: str = "sb3_offline_ft.zoo.train") -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=280)
    return errors


def kill_at(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Kill a run as soon as there is a checkpoint of this name."""
    while not list(folder.glob(f"checkpoints/{pattern}")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    end(process)
    assert process.returncode != 0


def monitored(run: Path) -> list[tuple[str, str]]:
    lines = (run / "0.monitor.csv").read_text().splitlines()
    return [(row["r"], row["l"]) for row in csv.DictReader(lines[1:])]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Trains in this process, as the command does."""
    threads = th.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        main()

    yield run
    th.set_num_threads(threads)


def test_a_run_that_is_killed_twice_equals_one_that_is_not(tmp_path: Path, train: Callable[..., None]) -> None:
    (tmp_path / "small.yml").write_text(yaml.safe_dump({ENV: SETTINGS}))
    arguments = ["--algo", "td3c", "--env", ENV, "--seed", "1", "-conf", "small.yml", "--verbose", "0", "--num-threads", "1"]
    arguments += ["--eval-freq", "300", "--eval-episodes", "1"]
    killed, folder = start(tmp_path, *arguments, "-f", "killed", "-tb", "killed_tb"), tmp_path / "killed" / "td3c" / f"{ENV}_1"
    kill_at(killed, folder, "step_0_*")
    resumed = ["--resume", f"killed/td3c/{ENV}_1"]
    kill_at(start(tmp_path, *resumed), folder, "step_1[1-5]??_*")
    train(*resumed)
    train(*arguments, "-f", "whole", "-tb", "whole_tb")

    expected = tmp_path / "whole" / "td3c" / f"{ENV}_1"
    first, second = (TD3C.load(run / f"{ENV}.zip") for run in (expected, folder))
    ones, others = first.policy.state_dict(), second.policy.state_dict()
    assert all(th.equal(ones[name], others[name]) for name in ones)
    assert (first.num_timesteps, first._n_updates) == (second.num_timesteps, second._n_updates)
    assert vars(first)["champion_challenger_state"] == vars(second)["champion_challenger_state"]
    assert monitored(expected) == monitored(folder) and len(monitored(folder)) == 9
    evaluations = [np.load(run / "evaluations.npz") for run in (expected, folder)]
    assert all(np.array_equal(evaluations[0][name], evaluations[1][name]) for name in ("timesteps", "results"))
    assert events(expected, "deployment_events.jsonl") == events(folder, "deployment_events.jsonl")
    assert compare(Trace.read(expected), Trace.read(folder)) is None
    assert events(expected, "trace.jsonl") == events(folder, "trace.jsonl")
    manifests = [read_manifest(run) for run in (expected, folder)]
    assert [len(manifest["resumed"]) for manifest in manifests] == [0, 2]
    assert all(manifests[0][name] == manifests[1][name] for name in ("state", "timesteps", "updates", "dataset"))
    logged = [scalars(tmp_path / f"{name}_tb" / ENV / "TD3C_1") for name in ("whole", "killed")]
    assert logged[0] == logged[1] and "offline/critic_loss" in logged[0] and "rollout/ep_rew_mean" in logged[0]
    assert sorted(path.name for path in (tmp_path / "killed_tb" / ENV).iterdir()) == ["TD3C_1"]


def test_a_run_of_sb3_is_gone_on_with(tmp_path: Path, train: Callable[..., None]) -> None:
    settings = {
        "policy": "MlpPolicy",
        "n_timesteps": 600,
        "policy_kwargs": {"net_arch": [8]},
        "batch_size": 8,
        "callback": [{"sb3_offline_ft.CheckpointRun": {"save_freq": 100}}],
    }
    (tmp_path / "sac.yml").write_text(yaml.safe_dump({ENV: settings}))
    arguments = ["--algo", "sac", "--env", ENV, "--seed", "1", "-conf", "sac.yml", "--verbose", "0", "--eval-freq", "-1"]
    arguments += ["--num-threads", "1"]
    train(*arguments, "-f", "whole")
    expected = tmp_path / "whole" / "sac" / f"{ENV}_1"
    for module in ("sb3_offline_ft.zoo.train", "rl_zoo3.train"):
        folder = tmp_path / module / "sac" / f"{ENV}_1"
        kill_at(start(tmp_path, *arguments, "-f", module, module=module), folder, "step_[2-4]??_*")
        train("--resume", f"{module}/sac/{ENV}_1")
        ones, others = (SAC.load(run / f"{ENV}.zip").policy.state_dict() for run in (expected, folder))
        assert all(th.equal(ones[name], others[name]) for name in ones)
        assert monitored(expected) == monitored(folder)
        if module == "rl_zoo3.train":
            # It began without one
            assert not (folder / MANIFEST).exists()
        else:
            assert compare(Trace.read(expected), Trace.read(folder)) is None
            manifest = read_manifest(folder)
            assert (manifest["state"], manifest["timesteps"], len(manifest["resumed"])) == ("finished", 600, 1)


def test_what_cannot_be_resumed_is_one_clear_error(train: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"nowhere is no folder of a run of rl_zoo3: .* such as logs/td3c/Hopper-v5_1\.$"):
        train("--resume", "nowhere")


@pytest.mark.parametrize("algo", ["td3bc", "td3c", "rebrac"])
def test_presets_write_checkpoints(algo: str) -> None:
    presets = yaml.safe_load(Path(preset_path(algo)).read_text())
    for name, entry in presets.items():
        names = [next(iter(one)) if isinstance(one, dict) else one for one in entry["callback"]]
        assert "sb3_offline_ft.CheckpointRun" in names, name
