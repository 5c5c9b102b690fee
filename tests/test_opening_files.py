"""What opening a file may do: no file runs code, nor gives the consent that reading it would need."""

import argparse
import base64
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.her import HerReplayBuffer
from typer.testing import CliRunner

from sb3_offline_ft import TD3BC, LearnerSnapshot, load_dataset
from sb3_offline_ft.cli import app
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.common.plain_pickle import Name, NotPlainError, load_plain
from sb3_offline_ft.datasets import check_spec, without_trust
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.zoo import read_zoo_yaml, saved_hyperparams
from sb3_offline_ft.evaluation import summarize_run
from sb3_offline_ft.study.design.protocol import Protocol
from sb3_offline_ft.study.engine.folder import read_result
from sb3_offline_ft.study.engine.queue import StudyQueue
from tests import made_up_study, study_runs, zoo_runs
from tests.conftest import REPOSITORY

ENV = "Pendulum-v1"
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "batch_size": 16}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


class OwnBuffer(ReplayBuffer):
    """A buffer of a class that this package does not know."""


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that is there at the end if a bomb went off."""
    path = tmp_path / "went-off"
    yield path
    assert not path.exists(), "code in a file was run"


@pytest.fixture
def bomb(marker: Path) -> bytes:
    """A pickle that makes the marker."""
    content = pickle.dumps(Bomb(marker))
    pickle.loads(content)
    marker.rmdir()
    return content


def command(*words: Any, status: int = 0) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay buffer that SB3 saved."""
    model = TD3("MlpPolicy", ENV, learning_starts=1000, buffer_size=500, **SMALL).learn(400)
    path = tmp_path_factory.mktemp("sb3") / "data.pkl"
    model.save_replay_buffer(path)
    return path


def rewrite_settings(file: Path, **settings: Any) -> None:
    """Change what a model's zip file says."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["data"] = json.dumps(json.loads(content["data"]) | settings).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def pickled(value: Any) -> dict[str, str]:
    return {":type:": "?", ":serialized:": base64.b64encode(cloudpickle.dumps(value)).decode()}


# Consent


SPECS: list[Callable[[str], Any]] = [
    lambda path: f"{path}?trust_pickle=1",
    lambda path: f"{path}?min_return=-9999&trust_pickle=yes",
    lambda path: f"0.5*{path}?trust_pickle=1 + 0.5*bundled:pendulum-medium",
    lambda path: [f"{path}?trust_pickle=true", "bundled:pendulum-medium"],
    lambda path: [(f"{path}?trust_pickle=true", 0.5), ("bundled:pendulum-medium", 0.5)],
    lambda path: {"spec": path, "trust_pickle": True},
    lambda path: [{"spec": f"{path}?trust_pickle=1", "weight": 2.0, "trust_pickle": 1}],
]


@pytest.mark.parametrize("make_spec", SPECS)
def test_consent_is_taken_out_of_a_spec_and_nothing_else(make_spec: Callable[[str], Any], buffer: Path) -> None:
    spec = make_spec(str(buffer))
    check_spec(spec)
    without = without_trust(spec)
    assert "trust" not in str(without)
    with pytest.raises(
        ValueError, match=r"runs whatever code.*`--trust-pickle`.*trust_pickle=True.*a saved model.*does not count"
    ):
        check_spec(without)
    expected, found = load_dataset(spec), load_dataset(without, trust_pickle=True)
    assert found.fingerprint == expected.fingerprint and found.sources == expected.sources
    assert "trust" not in str(expected.spec)


@pytest.mark.parametrize("spec", [None, "bundled:pendulum-medium?episodes=3", ["a/b-v0", ["c/d-v0", 2]], "?? no spec"])
def test_specs_without_consent_stay_as_they_are(spec: Any) -> None:
    assert without_trust(spec) == spec


@pytest.mark.parametrize("twice", ["?trust_pickle=1?trust_pickle=1", "?trust_pickle=1&episodes=2?trust_pickle=1&episodes=2"])
def test_consent_that_a_file_says_twice_is_refused(twice: str, bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(bomb)
    for spec in (f"{tmp_path}/data.pkl{twice}", f"0.5*{tmp_path}/data.pkl{twice} + 0.5*bundled:pendulum-medium"):
        with pytest.raises(ValueError, match="in the name of the data"):
            without_trust(spec)
        run = make_run(tmp_path / f"run{len(spec)}", dataset=spec)
        with pytest.raises(ValueError, match="in the name of the data"):
            TD3BC.load(run / ENV, env=gym.make(ENV))
        assert "Note: The dataset of the run cannot be read any more" in command("summary", run)
        (tmp_path / "study.yml").write_text(
            f"env: {ENV}\nseeds: 1\ninteractions: 100\ndatasets: {{a: '{spec}'}}\nmethods: {{td3bc: {{algorithm: td3bc}}}}\n"
        )
        with pytest.raises(ValueError, match=r"datasets\.a.*in the name of the data"):
            Protocol.load(tmp_path)


def test_a_saved_model_holds_no_consent_and_gives_none(buffer: Path, tmp_path: Path) -> None:
    spec = f"{buffer}?trust_pickle=1"
    for steps in (0, 3):
        model = TD3BC("MlpPolicy", ENV, dataset=spec, offline_steps=3, **SMALL)
        model.pretrain(steps) if steps else None
        before = model.dataset
        model.save(tmp_path / "model")
        assert model.dataset == before, "saving does not change the model"
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            assert json.loads(archive.read("data"))["dataset"] == str(buffer)
    rewrite_settings(tmp_path / "model.zip", dataset=spec)
    loaded = TD3BC.load(tmp_path / "model", env=gym.make(ENV))
    loaded.predict(loaded.observation_space.sample())
    with pytest.raises(ValueError, match=r"data\.pkl.*runs whatever code"):
        loaded.pretrain(3)
    TD3BC.load(tmp_path / "model", env=gym.make(ENV), dataset=spec).pretrain(3)


def make_run(folder: Path, **settings: Any) -> Path:
    """A run of rl-zoo3, of which the summary takes notice."""
    run = folder / "td3bc" / f"{ENV}_1"
    run.mkdir(parents=True)
    TD3BC("MlpPolicy", ENV, **SMALL).save(run / ENV)
    rewrite_settings(run / f"{ENV}.zip", **settings)
    np.savez(run / "evaluations.npz", timesteps=np.arange(3), results=np.zeros((3, 2)), ep_lengths=np.ones((3, 2)))
    return run


def test_the_summary_unpickles_nothing(bomb: bytes, marker: Path, buffer: Path, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(bomb)
    run = make_run(tmp_path, dataset=f"{tmp_path}/data.pkl?trust_pickle=1", seed=pickled(Bomb(marker)))
    output = command("summary", run)
    assert "Note: The dataset of the run cannot be read any more" in output and "`--trust-pickle`" in output
    shutil.copy(buffer, tmp_path / "data.pkl")
    assert "mean return of the data" in command("summary", run, "--trust-pickle")


# Studies


@pytest.fixture
def study(tmp_path: Path, bomb: bytes) -> Path:
    """Somebody else's study."""
    (tmp_path / "data.pkl").write_bytes(bomb)
    methods = {"td3": {"algorithm": "td3"}, "td3c": {"algorithm": "td3c"}}
    spec = f"{tmp_path}/data.pkl?trust_pickle=1"
    return study_runs.write_study(tmp_path / "study", datasets={"medium": spec}, methods=methods)


def test_commands_on_a_study_unpickle_nothing_without_consent(study: Path) -> None:
    assert "4 waiting" in command("study", "status", study)
    # The last one finds a storage that knows nothing of the data
    for word in ("report", "run", "tune", "status"):
        output = command("study", word, study, status=1)
        assert output.count("runs whatever code it holds") == 1 and "`--trust-pickle`" in output


def test_with_consent_on_the_command_line_a_study_runs(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "study"
    begin = ["study", "init", folder, "--env", ENV, "--seeds", 1, "--interactions", 600, "--method", "offline"]
    assert "runs whatever code" in command(*begin, "--dataset", buffer, status=1) and not folder.exists()
    for given in ([f"{buffer}?trust_pickle=1"], [buffer, "--trust-pickle"]):
        shutil.rmtree(folder, ignore_errors=True)
        assert f"study run {folder} --trust-pickle" in command(*begin, "--dataset", *given)
        text = (folder / "study.yml").read_text()
        assert "trust" not in text and "data.pkl" in text
    settings = yaml.safe_load(text)
    settings["pretraining"]["hyperparams"] = {"offline_steps": 5, **study_runs.NETS}
    settings["evaluation"] = {"every": 600, "episodes": 1}
    (folder / "study.yml").write_text(yaml.safe_dump(settings))
    assert "1 done" in command("study", "run", folder, "--trust-pickle")
    assert "1 done" in command("study", "status", folder)
    (folder / "study.log").unlink()
    for options, words in (([], "not readable here: as the runs recorded it"), (["--trust-pickle"], "as the runs had it")):
        command("study", "report", folder, *options)
        assert words in (folder / "report.html").read_text()
    assert "trust_pickle=1" not in "".join(path.read_text() for path in folder.rglob("*.json"))


@pytest.fixture
def module(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that makes the marker, and registers an environment."""
    code = f"import os, gymnasium\nos.mkdir({str(marker)!r})\n"
    code += "gymnasium.register('OfModule-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=200)\n"
    (tmp_path / "others_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "others_module"
    sys.modules.pop("others_module", None)
    gym.registry.pop("OfModule-v0", None)


def test_the_module_of_an_environment_is_imported_by_run_only(module: str, marker: Path, tmp_path: Path) -> None:
    changes = {"env": f"{module}:OfModule-v0", "random_return": -1300.0}
    protocol = made_up_study.write_study(tmp_path / "study", made_up_study.STUDY | changes | {"evaluation": {"every": 1000}})
    made_up_study.write_runs(protocol)
    assert "done" in command("study", "status", tmp_path / "study")
    command("study", "report", tmp_path / "study", "--format", "csv")
    assert not marker.exists() and module not in sys.modules
    missing = study_runs.write_study(tmp_path / "missing", env="no_such_module:Pendulum-v1")
    output = command("study", "run", missing, status=1)
    assert "Importing no_such_module, as `env` of" in output and "`env` is 'no_such_module:Pendulum-v1'" in output
    command("study", "run", study_runs.write_study(tmp_path / "run", env=f"{module}:Unknown-v0"), status=1)
    assert marker.exists()
    marker.rmdir()


@pytest.mark.parametrize("env", ["module:", ":Pendulum-v1", "a b:Pendulum-v1", "../x:Pendulum-v1", "module:Pendulum v1", 3])
def test_environments_that_no_import_could_bring_are_refused(env: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`env`"):
        Protocol.load(study_runs.write_study(tmp_path, env=env))


def test_what_the_storage_of_a_study_holds_is_not_unpickled(bomb: bytes, tmp_path: Path, marker: Path) -> None:
    folder = study_runs.write_study(tmp_path / "study")
    with StudyQueue(Protocol.load(folder)) as queue:
        queue.enqueue()
        claim = queue.claim(list(queue.cells))
        assert claim is not None
        entry = {"dtype": "|O", "shape": [1], "content": base64.b64encode(bomb).decode()}
        arrays = dict.fromkeys(("timesteps", "returns", "lengths", "training_timesteps", "training_returns"), entry)
        text = json.dumps({"arrays": arrays, "events": [], "manifest": {"key": claim.key, "guarded": False}})
        queue.storage.set_trial_user_attr(queue.trial_id(claim.number), "result", text)
        queue.study.tell(claim.number, 1.0)
        claim.let_go()
    assert "The result of no-data/scratch/seed0 in the storage is damaged" in command("study", "report", folder, status=1)
    (folder / "study.log").write_bytes(bomb + b"\n")
    with pytest.raises((ValueError, UnicodeDecodeError)):
        StudyQueue(Protocol.load(folder), create=False)


# Files of rl-zoo3


TAGGED = "!!python/object/apply:os.mkdir [{marker}]"


def test_yaml_makes_no_objects(marker: Path, tmp_path: Path) -> None:
    tagged = TAGGED.format(marker=marker)
    (tmp_path / "study.yml").write_text(f"name: {tagged}\nenv: {ENV}\nseeds: 1\ninteractions: 5\nmethods: {{}}\n")
    with pytest.raises(ValueError, match=r"study\.yml.*python/object/apply"):
        Protocol.load(tmp_path)
    (tmp_path / "columns.yml").write_text(f"actions: {tagged}\n")
    with pytest.raises(ValueError, match=r"columns\.yml"):
        ColumnMap.from_options(tmp_path / "columns.yml", {})
    for text, message in (
        (tagged, "must hold settings by name, found the Python object object/apply:os.mkdir"),
        (f"env_kwargs: {{a: [1, {tagged}]}}", "env_kwargs holds the Python object object/apply:os.mkdir"),
        ("env_kwargs: !!python/name:os.mkdir ''", "env_kwargs holds the Python object name:os.mkdir"),
        ("env_kwargs: !!python/object/new:os.mkdir [x]", "env_kwargs holds the Python object object/new:os.mkdir"),
        ("env_kwargs: !!python/module:antigravity ''", "env_kwargs holds the Python object module:antigravity"),
        (f"env_kwargs: !!python/object/apply:collections.OrderedDict [[[a, {tagged}]]]", "env_kwargs holds the Python object"),
        ("env_kwargs: !!python/object/apply:collections.OrderedDict [1, 2]", "damaged or not written by rl-zoo3"),
        ("env_kwargs: {", "damaged or not written by rl-zoo3"),
        ("[" * 5000, "damaged or not written by rl-zoo3"),
    ):
        (tmp_path / "args.yml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_zoo_yaml(tmp_path / "args.yml")
    # What is not needed does not stop those who need it not
    (tmp_path / "args.yml").write_text(f"env_kwargs: {{length: 2}}\nhyperparams: {tagged}\n")
    assert read_zoo_yaml(tmp_path / "args.yml") == {"env_kwargs": {"length": 2}}


@pytest.mark.parametrize(
    "content",
    [
        "frame_stack: 1\nframe_stack: 2\n",
        "env_kwargs: {1: a, 0x1: b}\n",
        "!!python/object/apply:collections.OrderedDict\n- - - frame_stack\n    - 1\n  - - frame_stack\n    - 2\n",
    ],
)
def test_settings_of_rl_zoo3_that_are_there_twice_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yml.*twice"):
        read_zoo_yaml(tmp_path / "config.yml")


def test_a_model_that_is_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluations.npz", timesteps=[1], results=[[0.0]], ep_lengths=[[1]])
    os.mkfifo(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip is .*a named pipe: expected a regular file"):
        summarize_run(tmp_path)


def test_what_rl_zoo3_writes_is_read(tmp_path: Path) -> None:
    config = OrderedDict(
        env_wrapper=["a.B", {"c.D": {"e": 1}}], frame_stack=4, train_freq=(1, "episode"), policy_kwargs=th.nn.ReLU
    )
    for normalize, kwargs in (
        (True, {"norm_obs": True, "norm_reward": False}),
        ("{'norm_obs': True, 'norm_reward': True}", {"norm_obs": True, "norm_reward": False}),
        ("dict(norm_obs=True, clip_obs=5.0)", {"norm_obs": True, "clip_obs": 5.0, "norm_reward": False}),
        ({"norm_obs": False}, {"norm_obs": False, "norm_reward": False}),
    ):
        (tmp_path / "config.yml").write_text(yaml.dump(config | {"normalize": normalize}))
        read, folder = saved_hyperparams(tmp_path)
        assert folder == str(tmp_path) and read["normalize_kwargs"] == kwargs
        assert {name: read[name] for name in ("env_wrapper", "frame_stack", "train_freq")} == {
            name: config[name] for name in ("env_wrapper", "frame_stack", "train_freq")
        }
        assert "policy_kwargs" not in read
    assert saved_hyperparams(tmp_path / "none") == ({}, None)


def test_collecting_runs_nothing_that_is_beside_an_agent(
    marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    run = tmp_path / "logs" / "td3" / f"{ENV}_1"
    (run / ENV).mkdir(parents=True)
    TD3("MlpPolicy", ENV, **SMALL).save(run / ENV)
    words = [
        "dataset",
        "collect",
        "--env",
        ENV,
        "--algo",
        "td3",
        "-f",
        tmp_path / "logs",
        "--steps",
        200,
        "--id",
        "my/data-v0",
    ]
    files = {"config.yml": yaml.dump(OrderedDict(normalize=False)), "args.yml": yaml.dump(OrderedDict(env_kwargs=None))}
    for name, text in (
        ("args.yml", TAGGED.format(marker=marker)),
        ("args.yml", f"env_kwargs: {TAGGED.format(marker=marker)}"),
        ("config.yml", f"env_wrapper: {TAGGED.format(marker=marker)}"),
        ("config.yml", f"normalize: \"__import__('os').mkdir({str(marker)!r})\""),
    ):
        for each, content in (files | {name: text}).items():
            (run / ENV / each).write_text(content)
        assert name in command(*words, status=1)
    for each, content in files.items():
        (run / ENV / each).write_text(content)
    assert "my/data-v0: 200 transitions" in command(*words)


def test_the_zoo_takes_consent_from_the_command_line_only(bomb: bytes, marker: Path, buffer: Path, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(bomb)
    small = {"policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[8])", "offline_steps": 5, "n_timesteps": 20}
    conf = tmp_path / "conf.yml"
    for spec in (f"{tmp_path}/data.pkl?trust_pickle=1", [{"spec": f"{tmp_path}/data.pkl", "trust_pickle": True}]):
        conf.write_text(yaml.safe_dump({ENV: {**small, "dataset": spec}}))
        with pytest.raises(ValueError, match="runs whatever code it holds"):
            zoo_runs.make_manager(tmp_path, "td3bc", {}, config=str(conf)).setup_experiment()
    assert not (tmp_path / "logs").exists()
    given = {"dataset": f"{buffer}?trust_pickle=1"}
    manager = zoo_runs.make_manager(tmp_path, "td3bc", given, config=str(conf))
    manager.args = argparse.Namespace(hyperparams=given)
    model, _ = manager.setup_experiment()
    assert model.pretrain().offline_steps_done == 5
    model.env.close()
    assert "trust" not in Path(manager.params_path, "config.yml").read_text()


def test_a_replay_buffer_beside_an_agent_runs_nothing(bomb: bytes, buffer: Path, tmp_path: Path) -> None:
    TD3BC("MlpPolicy", ENV, **SMALL).save(tmp_path / "agent")
    words = [*"-m sb3_offline_ft.zoo.train --algo td3bc -i agent.zip -n 20 --eval-freq -1 --env".split(), ENV]

    def train(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words, "-params", "dataset:None", "callback:None", "learning_starts:100"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    (tmp_path / "replay_buffer.pkl").write_bytes(bomb)
    refused = train()
    assert refused.returncode == 1 and "runs whatever code it holds when it is read" in refused.stderr
    shutil.copy(buffer, tmp_path / "replay_buffer.pkl")
    went_on = train(SB3_OFFLINE_FT_TRUST_PICKLE="1")
    assert went_on.returncode == 0, went_on.stderr


# Replay buffers, guides, snapshots


@pytest.mark.parametrize("buffer_class", [None, ReplayBuffer])
def test_replay_buffers_run_nothing(buffer_class: Any, bomb: bytes, marker: Path, buffer: Path, tmp_path: Path) -> None:
    model = TD3BC("MlpPolicy", ENV, replay_buffer_class=buffer_class, buffer_size=500, **SMALL)
    for content in (bomb, buffer.read_bytes()):
        (tmp_path / "buffer.pkl").write_bytes(content)
        before = model.replay_buffer
        for source in (tmp_path / "buffer.pkl", tmp_path / "buffer", io.BytesIO(content)):
            with pytest.raises(ValueError, match=r"runs whatever code it holds.*trust_pickle=True"):
                model.load_replay_buffer(source)
        assert model.replay_buffer is before
    # One of the package's own format with Python objects
    np.savez(tmp_path / "buffer.npz", facts=np.array([Bomb(marker)], dtype=object))
    with pytest.raises(ValueError, match=r"buffer\.npz"):
        model.load_replay_buffer(tmp_path / "buffer.npz")
    model.load_replay_buffer(buffer, trust_pickle=True)
    assert model.replay_buffer.size() == 400


def test_a_replay_buffer_of_an_own_class_needs_consent(tmp_path: Path) -> None:
    settings = {"replay_buffer_class": OwnBuffer, "buffer_size": 500, "learning_starts": 100, **SMALL}
    TD3("MlpPolicy", ENV, **settings).learn(50).save_replay_buffer(tmp_path / "own.pkl")
    model = TD3BC("MlpPolicy", ENV, **settings)
    with pytest.raises(ValueError, match=r"own\.pkl is no replay buffer of this package.*trust_pickle=True"):
        model.load_replay_buffer(tmp_path / "own.pkl")
    model.load_replay_buffer(tmp_path / "own.pkl", trust_pickle=True)
    assert model.replay_buffer.size() == 50


def test_a_replay_buffer_with_goals_is_read(tmp_path: Path) -> None:
    settings = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 1000, "buffer_size": 100, **SMALL}
    models = [TD3BC("MultiInputPolicy", BitFlippingEnv(4, continuous=True, max_steps=4), **settings) for _ in range(2)]
    with pytest.warns(UserWarning, match="neither a dataset nor pretrained"):
        models[0].learn(20)
    models[0].save_replay_buffer(tmp_path / "goals")
    models[1].load_replay_buffer(tmp_path / "goals", truncate_last_traj=False, trust_pickle=True)
    assert models[1].replay_buffer.size() == 20


def save_guide(path: Path, **policy_kwargs: Any) -> SAC:
    other = SAC("MlpPolicy", ENV, policy_kwargs={"net_arch": [6], **policy_kwargs}, seed=1, device="cpu")
    other.save(path)
    return other


def learn_guided(path: Path) -> TD3BC:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TD3BC has neither a dataset nor pretrained weights")
        return TD3BC("MlpPolicy", ENV, guide_policy=path, guide_steps=5, **SMALL).learn(10)


@pytest.mark.parametrize("name", ["policy_class", "policy_kwargs", "observation_space", "action_space", "seed", "lr_schedule"])
def test_guides_run_nothing(name: str, marker: Path, tmp_path: Path) -> None:
    save_guide(tmp_path / "guide")
    rewrite_settings(tmp_path / "guide.zip", **{name: pickled({"net_arch": [6], "activation_fn": Bomb(marker)})})
    if name in ("seed", "lr_schedule"):
        learn_guided(tmp_path / "guide")
        return
    if name.endswith("_space"):
        # Nothing of them is read but the texts beside
        with pytest.raises(ValueError, match=f"was made for the {name.replace('_', ' ')} with type"):
            learn_guided(tmp_path / "guide")
        return
    refusal = r"guide cannot be read without running code.*calls functions.*guide_policy=TD3\.load"
    with pytest.raises(ValueError, match=refusal):
        learn_guided(tmp_path / "guide")


def words(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


PROGRAMS = {
    "a call by its name": b"cos\nmkdir\n(V{}\ntR.",
    "an old instance": b"(V{}\nios\nmkdir\n.",
    "an old object": b"(cos\nmkdir\nV{}\no.",
    "a new object": b"\x80\x02cpathlib\nPath\n(V{}\nt\x81.",
    "a module that is called": b"\x80\x02ctorch.nn.modules.linear\nIdentity\n)R(V{}\ntR.",
    "a state of a class": b"\x80\x02cstable_baselines3.common.buffers\nReplayBuffer\n(N}" + words("sample") + b"Nstb.",
    "a persistent name": b"Pos.mkdir\n.",
    "an extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_pickled_settings_are_read_by_a_machine_without_calls(name: str, marker: Path) -> None:
    content = PROGRAMS[name].replace(b"{}", str(marker).encode())
    with pytest.raises(NotPlainError, match="calls functions"):
        load_plain(content)
    assert ReplayBuffer.sample is not None


def test_plain_settings_are_read() -> None:
    value = {"net_arch": [6, 5], "a": (1, 2.5, None, True, b"x"), "b": {1, 2}, "long": 2**70}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        told = load_plain(pickle.dumps(value if protocol >= 4 else {**value, "a": (1, 2.5, None, True), "b": [1]}, protocol))
        assert told["net_arch"] == [6, 5] and told["a"][:4] == (1, 2.5, None, True) and told["long"] == 2**70
    assert load_plain(pickle.dumps({"activation_fn": th.nn.ELU})) == {
        "activation_fn": Name("torch.nn.modules.activation", "ELU")
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy_class", len),
        ("policy_kwargs", {"activation_fn": len}),
        ("policy_kwargs", {"optimizer_class": subprocess.Popen}),
    ],
)
def test_guides_name_parts_of_policies_only(name: str, value: Any, tmp_path: Path) -> None:
    save_guide(tmp_path / "guide")
    rewrite_settings(tmp_path / "guide.zip", **{name: pickled(value)})
    with pytest.raises(ValueError, match=r"guide cannot be read without running code.*names .*guide_policy=TD3\.load"):
        learn_guided(tmp_path / "guide")


@pytest.mark.parametrize(("space", "part", "text"), [("action_space", "high", "[3.]"), ("observation_space", "_shape", [4])])
def test_a_guide_for_other_spaces_is_refused(space: str, part: str, text: Any, tmp_path: Path) -> None:
    save_guide(tmp_path / "guide")
    with zipfile.ZipFile(tmp_path / "guide.zip") as archive:
        recorded = json.loads(archive.read("data"))[space]
    rewrite_settings(tmp_path / "guide.zip", **{space: recorded | {part: text}})
    with pytest.raises(ValueError, match=rf"was made for the {space.replace('_', ' ')} with {part.strip('_')}"):
        learn_guided(tmp_path / "guide")


def test_a_guide_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    save_guide(tmp_path / "guide")
    rewrite_settings(tmp_path / "guide.zip", policy_class=pickled(th.nn.Linear))
    with pytest.raises(
        ValueError, match=r"guide cannot be read without running code.*names torch\.nn\.modules\.linear\.Linear"
    ):
        learn_guided(tmp_path / "guide")


def test_guides_with_classes_of_sb3_and_torch_are_read(tmp_path: Path) -> None:
    kwargs = {"activation_fn": th.nn.ELU, "optimizer_class": th.optim.SGD}
    other = save_guide(tmp_path / "guide", **kwargs)
    model = learn_guided(tmp_path / "guide")
    observation = model.observation_space.sample()
    np.testing.assert_array_equal(
        model.acting.guide.predict(observation, deterministic=True)[0], other.predict(observation, deterministic=True)[0]
    )


def test_snapshots_run_nothing(bomb: bytes, marker: Path, tmp_path: Path) -> None:
    for save in (
        lambda: (tmp_path / "learner.pt").write_bytes(bomb),
        lambda: th.save(Bomb(marker), tmp_path / "learner.pt"),
        lambda: th.save({"policy_state": Bomb(marker)}, tmp_path / "learner.pt"),
    ):
        save()
        with pytest.raises(ValueError, match=r"learner\.pt"):
            LearnerSnapshot.load(tmp_path / "learner.pt")


# Data and results


def objects(path: Path, marker: Path, *names: str) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: np.array([Bomb(marker)], dtype=object) for name in names})  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5", ".pkl", ".zip", ".parquet"])
@pytest.mark.parametrize("trust", ["", "?trust_pickle=0"])
def test_datasets_run_nothing(suffix: str, trust: str, bomb: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(bomb)
    with pytest.raises(ValueError, match=f"data{suffix}"):
        load_dataset(f"{file}{trust}")


def test_arrays_of_objects_are_refused(marker: Path, tmp_path: Path) -> None:
    names = ("observations", "actions", "rewards", "terminations")
    objects(tmp_path / "data.npz", marker, *names)
    with pytest.raises(ValueError, match="holds Python objects"):
        load_dataset(tmp_path / "data.npz")
    np.save(tmp_path / "array.npy", np.array([Bomb(marker)], dtype=object))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match=r"array\.npz"):
        load_dataset(tmp_path / "array.npz")


def test_results_run_nothing(bomb: bytes, marker: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "logs")
    objects(run / "evaluations.npz", marker, "timesteps", "results")
    with pytest.raises(ValueError, match=r"evaluations\.npz is damaged"):
        summarize_run(run)
    protocol = made_up_study.write_study(tmp_path / "study")
    made_up_study.write_runs(protocol, [cell for cell in protocol.cells() if cell.seed == 0 and cell.method.guard])
    folder = next((tmp_path / "study" / "runs").glob("*/*/seed0*"))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in whole:
        for write in (
            lambda path: path.write_bytes(bomb),
            lambda path: objects(path, marker, "timesteps", "results", "ep_lengths", "returns"),
        ):
            (folder / name).unlink()
            write(folder / name)
            with pytest.warns(UserWarning, match=f"{folder.name} .*The cell counts as not run"):
                assert read_result(folder) is None
            (folder / name).write_bytes(whole[name])
    assert read_result(folder) is not None
    (tmp_path / "events.jsonl").write_bytes(bomb + b"\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 1 is damaged"):
        read_events(tmp_path / "events.jsonl")
