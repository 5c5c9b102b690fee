"""Manifests and traces of runs, and ``sb3-offline-ft reproduce``."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from click.testing import Result
from stable_baselines3.common.callbacks import BaseCallback
from typer.testing import CliRunner

from sb3_offline_ft import load_dataset
from sb3_offline_ft.cli import app
from sb3_offline_ft.common.live import weights_digest
from sb3_offline_ft.zoo.command_line import last_value, without_options
from sb3_offline_ft.zoo.manifest import MANIFEST, note_resume, read_manifest
from sb3_offline_ft.zoo.trace import TRACE, Trace, compare
from tests.conftest import Installation
from tests.zoo_runs import SMALL, UNGUARDED, make_manager, run

PARAMETERS = [
    "policy_kwargs:dict(net_arch=[8])",
    "offline_steps:60",
    "batch_size:16",
    "buffer_size:1000",
    "warmup_steps:40",
    "callback:None",
    "n_envs:2",
    "normalize:dict(norm_reward=False)",
    "dataset:'data.npz'",
    "finetuning_policy_delay:1",
]
TRAIN = ["--algo", "td3c", "--env", "Pendulum-v1", "-n420", "--eval-freq", "-1", "-f", "logs", "--tensorb", "tb", "--dev=cpu"]
TRAIN = [*TRAIN, "-params", *PARAMETERS]


def reproduce(*arguments: Path | str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def write_data(path: Path, scale: float) -> None:
    data = load_dataset("bundled:pendulum-medium?episodes=3")
    np.savez(
        path,
        observations=data.observations,
        actions=data.actions,
        rewards=data.rewards * scale,
        next_observations=data.next_observations,
        terminations=data.terminations,
        truncations=data.truncations,
    )


@pytest.fixture(scope="module")
def recorded(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two environments and ``VecNormalize``, whose seed was drawn."""
    folder = tmp_path_factory.mktemp("work")
    write_data(folder / "data.npz", 1.0)
    process = installation.run("-m", "sb3_offline_ft.zoo.train", *TRAIN, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "logs" / "td3c" / "Pendulum-v1_1"


def test_a_run_comes_out_the_same_until_its_data_is_another(recorded: Path, tmp_path: Path) -> None:
    same = reproduce(recorded, "--keep", tmp_path / "kept")
    assert same.exit_code == 0, same.output
    assert "THE SAME, to the bit" in same.stdout and "2 training episodes" in same.stdout
    assert "Versions, code, processor" in same.stdout
    again = tmp_path / "kept" / "td3c" / "Pendulum-v1_1"
    assert Trace.read(again) == Trace.read(recorded)
    assert sorted(path.name for path in recorded.parent.iterdir()) == [recorded.name]
    assert len(list(recorded.parents[2].glob("tb/*/*"))) == 1

    data = recorded.parents[2] / "data.npz"
    write_data(data, 2.0)
    try:
        other = reproduce(recorded)
    finally:
        write_data(data, 1.0)
    assert other.exit_code == 1
    assert "DIFFERENT: weights differ after update 60; training episode 1, ended at step 400, differs" in other.stdout
    assert "dataset's fingerprint" in other.stdout

    taken = reproduce(recorded, "--keep", tmp_path / "kept")
    assert taken.exit_code == 2 and "choose another one with --keep" in taken.stderr


def test_a_run_whose_data_is_gone_cannot_be_run(recorded: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(recorded, tmp_path / "run"))
    change(copied, working_folder=str(tmp_path), arguments=[*TRAIN, "policy_delay:'\x1b]0;title'"])
    gone = reproduce(copied)
    assert gone.exit_code == 2
    assert "\x1b" not in gone.stderr and r"\x1b]0;title" in gone.stderr
    assert "could not be run again: exit code 1" in gone.stderr and "data.npz" in gone.stderr.splitlines()[-1]


def test_the_manifest_says_what_the_run_had_and_why(recorded: Path) -> None:
    manifest = read_manifest(recorded)
    assert manifest["state"] == "finished" and manifest["timesteps"] == 420 and manifest["error"] is None
    assert manifest["arguments"] == TRAIN and manifest["working_folder"] == str(recorded.parents[2])
    assert manifest["seed"] == manifest["hyperparameters"]["seed"]["value"] >= 0
    assert manifest["dataset"]["fingerprint"] == load_dataset(recorded.parents[2] / "data.npz").fingerprint
    assert manifest["replay_buffer"] == {
        "class": "OfflineToOnlineReplayBuffer",
        "capacity": 1000,
        "rows": 420,
        "offline_rows": 600,
    }
    assert manifest["environments"]["n_envs"] == 2
    assert manifest["environments"]["normalization"]["norm_reward"] is False
    assert manifest["variables"]["OMP_NUM_THREADS"] == "1" and {"cpu", "threads", "git", "code"} <= manifest.keys()
    assert {"rl_zoo3", "torch", "gymnasium", "numpy", "minari", "sb3-offline-ft"} <= manifest["versions"].keys()
    expected = {
        "batch_size": (16, "command line (-params)"),
        "gradient_steps": (2, "preset (td3c.yml)"),
        "tau": (0.005, "default of the algorithm"),
        "n_envs": (2, "command line (-params)"),
        "n_timesteps": (420, "command line (-n)"),
        "device": ("cpu", "command line (--device)"),
        "seed": (manifest["seed"], "drawn by rl-zoo3"),
        "verbose": (1, "rl-zoo3's default"),
        "policy_delay": (1, "command line (-params), for the finetuning"),
    }
    found = {name: manifest["hyperparameters"][name] for name in expected}
    assert {name: (fact["value"], fact["source"]) for name, fact in found.items()} == expected
    assert manifest["hyperparameters"]["policy_delay"]["in_pretraining"] == 2
    noise = manifest["hyperparameters"]["action_noise"]
    assert noise["value"]["_sigma"] == [0.1] and "made by rl-zoo3" in noise["source"]
    # What the run itself made of it
    assert manifest["changed_hyperparameters"] == {"learning_starts": 0}
    # rl_zoo3 adds a discount factor to what it was given
    assert manifest["hyperparameters"]["normalize"]["value"] == {"norm_reward": False}
    assert manifest["environments"]["normalization"]["gamma"] == 0.98


def test_the_trace_has_the_weights_on_the_way_and_all_episodes(tmp_path: Path) -> None:
    model = run(tmp_path, hyperparams=UNGUARDED | {"gradient_steps": 1}, n_timesteps=405)
    (folder,) = (tmp_path / "logs" / "td3c").iterdir()
    trace = Trace.read(folder)
    # Pretraining in pieces, then 1 update an interaction after the warm-up
    updates = [position[1] for position in trace.weights]
    assert updates == [0, 30, *range(40, 100, 10), 100, 200, 300, 400, 415]
    assert trace.weights[405, 415] == weights_digest(model)
    assert [(episode["timestep"], episode["length"]) for episode in trace.episodes] == [(200, 200), (400, 200)]
    monitor = np.loadtxt(folder / "0.monitor.csv", delimiter=",", skiprows=2)
    np.testing.assert_allclose([episode["return"] for episode in trace.episodes], monitor[:, 0])


def test_runs_with_other_seeds_part_at_the_start(tmp_path: Path) -> None:
    traces = []
    for name, seed in (("first", 1), ("other", 2)):
        run(tmp_path / name, seed=seed)
        traces.append(Trace.read(next((tmp_path / name / "logs" / "td3c").iterdir())))
    difference = compare(*traces)
    assert difference is not None and (difference.updates, difference.same_until) == (0, None)


def trace_of(*weights: str, returns: tuple[float, ...] = (), every: int = 10) -> Trace:
    episodes = [{"timestep": n * 20, "env": 0, "return": value, "length": 20} for n, value in enumerate(returns, start=1)]
    return Trace({(n * every, n * every): digest for n, digest in enumerate(weights)}, episodes)


def test_where_two_runs_part() -> None:
    first = trace_of("a", "b", "c", returns=(1.0, 2.0))
    assert compare(first, trace_of("a", "b", "c", returns=(1.0, 2.0))) is None
    weights = compare(first, trace_of("a", "b", "x", returns=(1.0, 2.0)))
    assert weights is not None and (weights.updates, weights.same_until, weights.episode) == (20, 10, None)
    episode = compare(first, trace_of("a", "b", "c", returns=(1.0, 3.0)))
    assert episode is not None and (episode.updates, episode.episode, episode.second) == (None, 2, episode.second)
    assert episode.second is not None and episode.second["return"] == 3.0
    shorter = compare(first, trace_of("a", "b", returns=(1.0,)))
    assert shorter is not None and shorter.ends == ((20, 20), (10, 10)) and shorter.second is None
    nan = trace_of("a", returns=(float("nan"),))
    assert compare(nan, trace_of("a", returns=(float("nan"),))) is None
    # A run that was stopped may go on
    assert compare(trace_of("a", "b", returns=(1.0,)), first, whole=False) is None
    assert compare(trace_of("a"), trace_of(), whole=False) is not None
    early = compare(first, trace_of("a", "b", returns=(1.0,)), whole=False)
    assert early is not None and early.ends == ((20, 20), (10, 10)) and early.updates is None


def test_a_trace_goes_on_after_a_resume_without_what_was_lost(tmp_path: Path) -> None:
    events = [
        {"event": "start", "timestep": 0},
        {"event": "weights", "timestep": 0, "updates": 0, "sha256": "a"},
        {"event": "weights", "timestep": 30, "updates": 30, "sha256": "lost"},
        {"event": "episode", "timestep": 40, "env": 0, "return": 1.0, "length": 40},
        {"event": "start", "timestep": 20},
        {"event": "weights", "timestep": 30, "updates": 30, "sha256": "b"},
    ]
    (tmp_path / TRACE).write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert Trace.read(tmp_path) == Trace({(0, 0): "a", (30, 30): "b"}, [])


class FailAtStep(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps == 70:
            raise RuntimeError("failed at step 70")
        return True


class StopAtStep(BaseCallback):
    def _init_callback(self) -> None:
        self.model.gamma = 0.5  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return self.num_timesteps < 70


class InterruptAtStep(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps == 75:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize(
    ("callback", "state", "error", "step"),
    [
        ("Fail", "failed", "RuntimeError: failed at step 70", 70),
        ("Stop", "stopped", None, 70),
        ("Interrupt", "stopped", None, 75),
    ],
)
def test_the_manifest_says_how_a_run_ended(tmp_path: Path, callback: str, state: str, error: str | None, step: int) -> None:
    callbacks = f"{__name__}.{callback}AtStep"
    manager = make_manager(
        tmp_path, hyperparams=SMALL | {"callback": callbacks, "warmup_steps": 20, "constraint_reference": "target"}
    )
    model, _ = manager.setup_experiment()
    folder = Path(manager.save_path)
    begun = read_manifest(folder)
    assert begun["state"] == "running" and "timesteps" not in begun
    try:
        manager.learn(model)
    except RuntimeError:
        assert state == "failed"
    manifest = read_manifest(folder)
    assert (manifest["state"], manifest["error"], manifest["timesteps"]) == (state, error, step)
    # Ctrl-C may come in the midst of an update, so these weights need not come again
    is_interrupted = callback == "Interrupt"
    assert (Trace.read(folder).end == (step, manifest["updates"])) is not is_interrupted
    gamma = manifest["hyperparameters"]["gamma"]
    if callback == "Stop":
        assert gamma == {"given": 0.98, "value": 0.5, "source": "preset (td3c.yml), changed when the training began"}
    else:
        assert gamma == {"value": 0.98, "source": "preset (td3c.yml)"}
    note_resume(folder)
    resumed = read_manifest(folder)
    assert resumed["state"] == "running" and len(resumed["resumed"]) == 1
    assert resumed["started"] == manifest["started"]


def test_a_run_that_goes_on_from_an_agent_names_its_file(tmp_path: Path) -> None:
    model = run(tmp_path)
    agent = tmp_path / "agent.zip"
    model.save(agent)
    manager = make_manager(tmp_path / "second", trained_agent=str(agent), hyperparams=UNGUARDED | {"warmup_steps": 20})
    loaded, _ = manager.setup_experiment()
    loaded.env.close()
    manifest = read_manifest(Path(manager.save_path))
    assert manifest["agent"] == {"path": str(agent), "files": {"agent.zip": hashlib.sha256(agent.read_bytes()).hexdigest()}}
    sources = {name: fact["source"] for name, fact in manifest["hyperparameters"].items()}
    assert sources["policy_kwargs"] == sources["tau"] == "the agent that was loaded (-i)"
    assert sources["warmup_steps"] == "command line (-params)"


def test_hyperparameters_of_a_trial_are_said_to_be_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--storage=postgresql://me:hunter2@host/db", "dataset:'file:///a?b=1'"]
    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    storage = str(tmp_path / "study.log")
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    study = optuna.create_study(storage=backend, study_name="study")
    params, ranges = {"finetuning_learning_rate": 2e-4, "gradient_steps": 1}, {}
    ranges["finetuning_learning_rate"] = optuna.distributions.FloatDistribution(3e-5, 1e-3, log=True)
    ranges["gradient_steps"] = optuna.distributions.CategoricalDistribution((1, 2))
    study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=1.0))
    manager = make_manager(tmp_path, storage=storage, study_name="study", trial_id=0)
    model, _ = manager.setup_experiment()
    model.env.close()
    manifest = read_manifest(Path(manager.save_path))
    assert manifest["arguments"] == ["--storage=postgresql://me:***@host/db", command[1]]
    facts = manifest["hyperparameters"]
    assert facts["gradient_steps"] == {"value": 1, "source": "trial 0 of the study study"}
    rate = facts["learning_rate"]
    assert rate["value"]["val"] == 2e-4 and rate["source"] == "trial 0 of the study study, for the finetuning"
    assert rate["in_pretraining"] == 1e-3


def test_our_train_records_runs_of_other_algorithms(tmp_path: Path) -> None:
    from sb3_offline_ft.zoo.recording import RecordingManager

    config = tmp_path / "sac.yml"
    config.write_text(
        "Pendulum-v1: {policy: MlpPolicy, n_timesteps: 60, learning_starts: 40, policy_kwargs: 'dict(net_arch=[8])'}"
    )
    logs = str(tmp_path / "logs")
    manager = RecordingManager(argparse.Namespace(), "sac", "Pendulum-v1", logs, eval_freq=-1, config=str(config), verbose=0)
    experiment = manager.setup_experiment()
    assert experiment is not None
    manager.learn(experiment[0])
    manager.save_trained_model(experiment[0])
    manifest = read_manifest(Path(manager.save_path))
    assert (manifest["state"], manifest["dataset"], manifest["updates"]) == ("finished", None, 20)
    assert manifest["hyperparameters"]["learning_starts"] == {"value": 40, "source": f"-conf {config}"}
    assert manifest["hyperparameters"]["ent_coef"] == {"value": "auto", "source": "default of the algorithm"}
    assert [each["class"] for each in manifest["callbacks"]] == []


def test_options_are_read_as_argparse_reads_them() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", "--n-timesteps")
    parser.add_argument("-tb", "--tensorboard-log")
    parser.add_argument("--track", action="store_true")
    parser.add_argument("-params", nargs="+")
    words = ["-n3", "--n-t=-1", "--tensor", "a b", "-tb=c", "--trac", "-params", "n:1", "seed:--track"]
    parsed = parser.parse_args(words)
    for name, value in (("-n", parsed.n_timesteps), ("-tb", parsed.tensorboard_log)):
        names = (name, {"-n": "--n-timesteps", "-tb": "--tensorboard-log"}[name])
        found = last_value(words, names)
        assert found is not None and found[1] == value
    left = parser.parse_args(without_options(words, ["-tb", "--tensorboard-log"], ["--track"]))
    assert vars(left) == vars(parsed) | {"tensorboard_log": None, "track": False}


def change(folder: Path, **facts: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def overwrite_model(folder: Path) -> None:
    (folder / "Pendulum-v1.zip").write_bytes(b"another run's")


PICKLE = [*TRAIN, "dataset:'buffer.pkl?trust_pickle=1'"]
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
    "no folder": (shutil.rmtree, "has no manifest.json"),
    "half": (lambda folder: (folder / MANIFEST).write_text('{"format": 1,'), "damaged or not the manifest of a run"),
    "binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\0"), "damaged or not the manifest of a run"),
    "a study's": (lambda folder: (folder / MANIFEST).write_text('{"cell": 1}'), "expected facts by name with a `format`"),
    "later": (lambda folder: change(folder, format=99), "update sb3-offline-ft"),
    "no command": (lambda folder: change(folder, arguments=[1]), "must hold texts"),
    "no source": (lambda folder: change(folder, hyperparameters={"tau": 1}), "each of `hyperparameters`"),
    "no seed": (lambda folder: change(folder, seed="1"), "`seed` must be a whole number"),
    "another run's": (overwrite_model, "is that of another run"),
    "own script": (lambda folder: change(folder, module="mine.py"), "started by mine.py"),
    "no trace": (lambda folder: (folder / TRACE).unlink(), "has no trace.jsonl"),
    "empty trace": (lambda folder: (folder / TRACE).write_text(""), "or an empty one"),
    "only a start": (
        lambda folder: (folder / TRACE).write_text('{"event": "weights", "timestep": 0, "updates": 0, "sha256": "a"}\n'),
        "has come to no update",
    ),
    "trace": (lambda folder: (folder / TRACE).write_text('{"event": "weights"}\n'), "damaged or not the trace of a run"),
    "trace's start": (
        lambda folder: (folder / TRACE).write_text('{"event": "start"}\n' * 2),
        "damaged or not the trace of a run",
    ),
    "pickle": (lambda folder: change(folder, arguments=PICKLE), "add --trust-pickle"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_reproduced_is_one_clear_error(recorded: Path, tmp_path: Path, damage: str) -> None:
    do, message = DAMAGES[damage]
    copied = Path(shutil.copytree(recorded, tmp_path / "run"))
    do(copied)
    result = reproduce(copied)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sb3-offline-ft reproduce: ") and message in line
