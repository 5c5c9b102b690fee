"""Running one cell of a study: what is measured, what is shared, what is kept."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import sb3_offline_ft
from sb3_offline_ft import TD3BC, load_dataset
from sb3_offline_ft.common.live import as_json
from sb3_offline_ft.common.machine import machine_facts, processor
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.pretrained.recipe import Recipe
from sb3_offline_ft.pretrained.start import new_pretraining_learner, pretrain
from sb3_offline_ft.study.design.learners import algorithm_class, arguments_of, pretrained_learner, pretraining_recipe
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine import cell as cell_module
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.folder import (
    CellResult,
    find_result,
    keep_result,
    read_result,
    run_folder,
    write_result,
)
from sb3_offline_ft.study.engine.measure import FINETUNING, PRETRAINING, Measure
from sb3_offline_ft.study.engine.results import load_results
from tests.study_environments import FOLDER_VARIABLE, GATED_PENDULUM
from tests.study_runs import ARRAYS

NETS = {"policy_kwargs": {"net_arch": [16, 16]}}
STUDY = {
    "name": "tiny",
    "env": "Pendulum-v1",
    "datasets": {"medium": "bundled:pendulum-medium"},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 40}},
    "seeds": 1,
    "interactions": 600,
    "evaluation": {"every": 200, "episodes": 2},
    "learner_evaluation": {"every": 300, "episodes": 1},
    "hyperparams": {"warmup_steps": 250, "batch_size": 16, **NETS},
    "methods": {
        "scratch": {"algorithm": "td3", "start": "scratch"},
        "sac": {"algorithm": "sac", "start": "scratch", "hyperparams": {"learning_starts": 100, "train_freq": 8, **NETS}},
        "offline": {"frozen": True},
        "td3bc": {"algorithm": "td3bc"},
        "td3": {"algorithm": "td3"},
        "td3c": {"algorithm": "td3c"},
        "td3c-guard": {"algorithm": "td3c", "guard": {"baseline": [-1300, -1000, -1200, -900, -1100, -1400]}},
    },
}


def write_study(folder: Path, **changes: Any) -> Protocol:
    folder.mkdir(parents=True)
    (folder / "study.yml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return Protocol.load(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return write_study(tmp_path_factory.mktemp("study") / "tiny")


@pytest.fixture(scope="module")
def cells(study: Protocol) -> dict[str, Cell]:
    return {cell.method.name: cell for cell in study.cells()}


@pytest.fixture(scope="module")
def results(study: Protocol, cells: dict[str, Cell]) -> dict[str, CellResult]:
    return {name: run_cell(study, cell, pretrained_folder=study.folder / "pretrained") for name, cell in cells.items()}


def test_every_method_is_evaluated_at_the_same_interactions(results: dict[str, CellResult]) -> None:
    for name, result in results.items():
        assert result.timesteps.tolist() == [0, 200, 400, 600], name
        assert result.returns.shape == result.lengths.shape == (4, 2), name
        assert (result.lengths == 200).all(), name


def test_pretrained_methods_start_from_one_policy_and_leave_it_after_the_warmup_only(results: dict[str, CellResult]) -> None:
    pretrained = [name for name in results if name not in ("scratch", "sac")]
    weights = {results[name].manifest["pretrained"]["weights_sha256"] for name in pretrained}
    assert len(weights) == 1
    for name in pretrained:
        # The same policy in the same episodes, to the bit
        np.testing.assert_array_equal(results[name].returns[:2], results["offline"].returns[:2], err_msg=name)
        moved = not np.array_equal(results[name].returns[2:], results["offline"].returns[2:])
        assert moved == (name != "offline"), name
        assert results[name].frozen_until == (600 if name == "offline" else 250)
    assert results["scratch"].frozen_until == results["sac"].frozen_until == -1
    assert results["scratch"].manifest["pretrained"] is None and results["scratch"].manifest["dataset"] is None


def test_training_episodes_and_steps_of_the_learners_own_evaluations_are_told(results: dict[str, CellResult]) -> None:
    for name, result in results.items():
        expected = [] if name == "offline" else [200, 400, 600]
        assert result.training_timesteps.tolist() == expected, name
        assert result.training_returns.shape == (len(expected),)
        # One before the first interaction and two while learning, of one episode each
        learns_from_some = name.startswith("td3c")
        assert result.manifest["learner_evaluation_steps"] == (600 if learns_from_some else 0), name
        assert result.own_timesteps.tolist() == ([0, 300, 600] if learns_from_some else []), name
        assert result.own_lengths.tolist() == ([[200]] * 3 if learns_from_some else []), name
        assert result.own_returns.shape == result.own_lengths.shape and result.knows_own_evaluations, name
    assert results["td3c-guard"].manifest["guarded"] and results["td3c-guard"].events
    assert not results["td3c"].manifest["guarded"] and not results["td3c"].events


def test_a_guard_measures_losses_by_the_random_return_that_the_report_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an environment of one's own only the data says it."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    baseline = STUDY["methods"]["td3c-guard"]["guard"]["baseline"]  # type: ignore[index]
    methods = {
        name: {"algorithm": "td3", "guard": {"baseline": baseline, **own}}
        for name, own in {"data": {}, "own": {"random_return": -900.0}}.items()
    }
    protocol = write_study(
        tmp_path / "tiny", env=GATED_PENDULUM, methods=methods, interactions=300, hyperparams={"warmup_steps": 20, **NETS}
    )
    assert protocol.random_return == load_dataset("bundled:pendulum-medium").reference_scores.random  # type: ignore[union-attr]
    first, second = protocol.cells()
    for cell, expected in ((first, protocol.random_return), (second, -900.0)):
        result = run_cell(protocol, cell, pretrained_folder=tmp_path / "pretrained")
        assert result.events[0]["settings"]["random_return"] == result.manifest["cell"]["guard"]["random_return"] == expected
    # Other scores make another run
    scores = {"medium": protocol.data_facts("medium") | {"reference_scores": [-700.0, 0.0]}}
    other = Protocol.load(protocol.folder)
    other.remember_data(scores)
    assert other.random_return == -700.0
    assert other.cell_key(first) != protocol.cell_key(first) and other.cell_key(second) == protocol.cell_key(second)


def test_running_a_cell_changes_nothing_about_it(
    study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult]
) -> None:
    fresh = {cell.method.name: cell for cell in Protocol.load(study.folder).cells()}
    for name, result in results.items():
        # SB3's SAC writes into the `policy_kwargs` that it is given
        assert cells[name].method.hyperparams == fresh[name].method.hyperparams
        assert result.manifest["key"] == study.cell_key(fresh[name]) == study.cell_key(cells[name]), name


def test_the_same_cell_gives_the_same_bits(study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult]) -> None:
    for name in ("td3c-guard", "scratch"):
        again = run_cell(study, cells[name], pretrained_folder=study.folder / "pretrained")
        for field in ("timesteps", "returns", "lengths", "training_timesteps", "training_returns"):
            np.testing.assert_array_equal(getattr(again, field), getattr(results[name], field), err_msg=f"{name} {field}")


def test_a_run_says_with_which_versions_settings_and_machine_it_was_made(
    study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult]
) -> None:
    for name, result in results.items():
        manifest = result.manifest
        assert manifest["versions"]["sb3-offline-ft"] == sb3_offline_ft.__version__, name
        assert (manifest["device"], manifest["threads"]) == ("cpu", th.get_num_threads())
        assert manifest["platform"] == f"{platform.system()} {platform.machine()}"
        assert json.loads(json.dumps(manifest)) == manifest
        assert manifest["cpu"] and manifest["gpu"] is None
        method, hyperparams = cells[name].method, manifest["hyperparams"]
        assert manifest["algorithm"] == algorithm_class(method.algorithm).__name__
        assert manifest["frozen"] == (name == "offline")
        written = as_json(arguments_of(method.hyperparams, make_vec_env("Pendulum-v1").action_space))
        if "train_freq" in written:
            written["train_freq"] = [written["train_freq"], "step"]
        # The policy that there is has a name of its own
        del written["policy_kwargs"], written["policy"]
        assert written == {key: hyperparams[key] for key in written}, name
        assert hyperparams["policy_kwargs"]["net_arch"] == [16, 16]
        # Defaults of constructors, of the policy's too
        assert hyperparams["n_steps"] == 1 and hyperparams["policy_kwargs"]["n_critics"] == 2, name
    assert results["td3c"].manifest["hyperparams"]["epsilon"] == "geo_0.03_0.01"
    assert results["sac"].manifest["hyperparams"]["ent_coef"] == "auto"
    pretraining = results["td3c"].manifest["pretrained"]
    assert pretraining == results["offline"].manifest["pretrained"] and results["scratch"].manifest["pretrained"] is None
    assert pretraining["algorithm"] == "TD3BC"
    assert (pretraining["hyperparams"]["offline_steps"], pretraining["hyperparams"]["alpha"]) == (40, 2.5)


@pytest.mark.parametrize(
    ("information", "expected"),
    [
        (
            "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: A Xeon\nstepping\t: 8\n\nprocessor\t: 1\nmodel\t: 2\n",
            ("A Xeon", "6/143/8"),
        ),
        # All of these have one name, such as aarch64
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n", (None, "0x41/0xd0c/0x3")),
        ("", (None, None)),
    ],
)
def test_processors_are_told_apart_by_their_models(information: str, expected: tuple[str | None, ...], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(information)
    facts = processor(tmp_path / "cpuinfo")
    assert facts == {"cpu": expected[0] or platform.processor() or platform.machine(), "cpu_model": expected[1]}


def test_a_guard_knows_what_the_data_says_of_a_random_policy(tmp_path: Path) -> None:
    gym.register("PendulumWithoutScores-v0", entry_point=PendulumEnv, max_episode_steps=200)
    data = shutil.copytree(Path(sb3_offline_ft.__file__).parent / "datasets/bundled/pendulum-medium", tmp_path / "data")
    file = data / "data" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ref_min_score": -1275.0, "ref_max_score": -150.0}))
    changes: dict[str, Any] = {"env": "PendulumWithoutScores-v0", "datasets": {"medium": f"{data}?episodes=20"}}
    guard: dict[str, Any] = {"algorithm": "td3", "guard": {"baseline": [-1300, -1000, -1200, -900, -1100, -1400]}}
    for number, (given, expected) in enumerate([({}, -1275.0), ({"random_return": -1250}, -1250.0)]):
        protocol = write_study(tmp_path / f"study{number}", **changes | given | {"methods": {"guarded": guard}})
        (cell,) = protocol.cells()
        result = run_cell(protocol, cell, pretrained_folder=tmp_path / "pretrained")
        assert result.manifest["random_return"] == result.events[0]["settings"]["random_return"] == expected
        # What a run depends on is in its key
        assert protocol.described(cell)["guard"]["random_return"] == expected


def test_methods_with_other_default_networks_take_those_of_the_pretraining(tmp_path: Path) -> None:
    changes = {"hyperparams": {"warmup_steps": 250, "batch_size": 16}, "methods": {"it": {"algorithm": "rebrac"}}}
    (cell,) = (protocol := write_study(tmp_path / "study", **changes)).cells()
    manifest = run_cell(protocol, cell, pretrained_folder=tmp_path / "pretrained").manifest
    assert manifest["algorithm"] == "ReBRAC"
    networks = manifest["hyperparams"]["policy_kwargs"]
    assert networks["net_arch"] == [256, 256] and networks == manifest["pretrained"]["hyperparams"]["policy_kwargs"]


def test_a_version_is_recorded_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.delitem(vars(sb3_offline_ft), "__version__", raising=False)
    assert machine_facts()["versions"]["sb3-offline-ft"] == "0+not.installed"


@pytest.mark.parametrize(
    "entry",
    [
        {"algorithm": "ppo", "hyperparams": {"n_steps": 128, "n_epochs": 1}},
        {"algorithm": "ppo", "hyperparams": {"n_steps": 1024}},
        {"algorithm": "sac", "hyperparams": {"train_freq": [1, "episode"], "gradient_steps": 1, **NETS}},
        {"algorithm": "sac", "hyperparams": {"train_freq": 7, "gradient_steps": 1, **NETS}},
    ],
)
def test_runs_end_at_their_last_interaction_whatever_the_algorithm(tmp_path: Path, entry: dict[str, Any]) -> None:
    changes = {"datasets": {}, "hyperparams": {}, "interactions": 450, "evaluation": {"every": 150, "episodes": 1}}
    protocol = write_study(tmp_path / "study", **changes, methods={"it": entry | {"start": "scratch"}})
    steps: list[int] = []
    (cell,) = protocol.cells()
    result = run_cell(protocol, cell, pretrained_folder=tmp_path, on_step=lambda phase, done, total: steps.append(done))
    assert result.timesteps.tolist() == [0, 150, 300, 450]
    assert result.training_timesteps.tolist() == [200, 400]
    assert max(steps) <= 450


def test_progress_is_told(study: Protocol, cells: dict[str, Cell], tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    evaluations: list[int] = []
    run_cell(
        study,
        cells["td3"],
        pretrained_folder=tmp_path,
        on_step=lambda *step: steps.append(step),
        on_evaluation=lambda timestep, returns: evaluations.append(timestep),
    )
    assert (PRETRAINING, 40, 40) in steps and (FINETUNING, 600, 600) in steps
    assert [step for step in steps if step[0] == PRETRAINING] == steps[: len(steps) - 3]
    assert evaluations == [0, 200, 400, 600]


def test_told_progress_does_not_change_the_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_offline_ft.pretrained.start.REPORT_STEPS", 7)
    env = make_vec_env("Pendulum-v1")
    dataset = load_dataset("bundled:pendulum-medium")
    recipe = Recipe(TD3BC, {"policy": "MlpPolicy", "offline_steps": 40, "batch_size": 16, **NETS}, dataset, env, 3, "cpu")
    told: list[int] = []
    whole, parts = pretrain(recipe, env), pretrain(recipe, env, on_progress=lambda done, total: told.append(done))
    assert told == [7, 14, 21, 28, 35, 40]
    models = [new_pretraining_learner(recipe, env) for _ in range(2)]
    for model, pretrained in zip(models, (whole, parts), strict=True):
        pretrained.snapshot.restore(model)
    for one, other in zip(*(model.policy.state_dict().values() for model in models), strict=True):
        assert th.equal(one, other)


def test_told_progress_leaves_no_folders_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_offline_ft.pretrained.start.REPORT_STEPS", 7)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = make_vec_env("Pendulum-v1")
    dataset = load_dataset("bundled:pendulum-medium")
    recipe = Recipe(TD3BC, {"policy": "MlpPolicy", "offline_steps": 40, "batch_size": 16, **NETS}, dataset, env, 3, "cpu")
    pretrain(recipe, env, on_progress=lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


def test_measuring_is_not_noticed_by_the_learner(study: Protocol, cells: dict[str, Cell]) -> None:
    env = make_vec_env("Pendulum-v1", seed=1)
    recipe = Recipe(
        TD3BC, {"policy": "MlpPolicy", "offline_steps": 20, "batch_size": 16, **NETS}, study.dataset("medium"), env, 0, "cpu"
    )
    pretrained = pretrain(recipe, env)

    def finetuned(measured: VecEnv | None) -> list[th.Tensor]:
        own = make_vec_env("Pendulum-v1", seed=1)
        model = pretrained_learner("td3c", {"warmup_steps": 50, "constraint_reference": "target"}, pretrained, own, 5)
        model.learn(300, callback=None if measured is None else [Measure(measured, 100, 2)])
        return list(model.policy.state_dict().values())

    for one, other in zip(finetuned(None), finetuned(make_vec_env("Pendulum-v1", seed=2)), strict=True):
        assert th.equal(one, other)


def test_measured_episodes_start_alike_for_all_methods(study: Protocol) -> None:
    class Stop:
        """A policy that lets the pendulum fall: the same starts give the same returns."""

        def predict(self, observation, *_, **__):
            return np.zeros((len(observation), 1), dtype=np.float32), None

    first, second = (Measure(make_vec_env("Pendulum-v1", seed=7), 100, 3) for _ in range(2))
    for measure in (first, second):
        for timestep in (0, 100):
            measure.measure(Stop(), timestep)
    assert first.returns == second.returns
    assert first.returns[0] != first.returns[1]


def test_hyperparameters_become_arguments_as_in_rl_zoo3() -> None:
    space = make_vec_env("Pendulum-v1").action_space
    arguments = arguments_of({"noise_type": "normal", "noise_std": 0.3, "train_freq": [1, "episode"]}, space)
    assert arguments["train_freq"] == (1, "episode")
    assert arguments["action_noise"]._sigma.tolist() == [pytest.approx(0.3)]
    schedule = arguments_of({"learning_rate": "lin_0.5"}, space)["learning_rate"]
    assert (schedule(1.0), schedule(0.5)) == (0.5, 0.25)


def test_results_survive_files_and_json_to_the_bit(results: dict[str, CellResult], tmp_path: Path) -> None:
    for name, result in results.items():
        write_result(tmp_path / name, result)
        for copy in (read_result(tmp_path / name), CellResult.from_json(result.to_json())):
            assert copy is not None
            for field in ARRAYS:
                one, other = getattr(result, field), getattr(copy, field)
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
            assert copy.manifest == result.manifest
            assert json.dumps(copy.events) == json.dumps(result.events)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_own_evaluations_are_those_that_an_eval_callback_keeps(
    study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult], tmp_path: Path
) -> None:
    """Of the same run, made as a user makes it."""
    cell, env = cells["td3c"], make_vec_env(study.env, seed=cells["td3c"].seed)
    recipe = pretraining_recipe("td3bc", cell.method.pretraining_hyperparams, study.dataset("medium"), env, cell.seed, "cpu")
    pretrained = PretrainedCache(study.folder / "pretrained", verbose=False).get(recipe, env)
    model = pretrained_learner("td3c", cell.method.hyperparams, pretrained, env, cell.seed)
    evaluation = EvalCallback(
        make_vec_env(study.env, seed=cell.seed), eval_freq=300, n_eval_episodes=1, log_path=str(tmp_path), verbose=0
    )
    model.learn(study.interactions, callback=evaluation)
    with np.load(tmp_path / "evaluations.npz") as kept:
        for there, here in (("timesteps", "own_timesteps"), ("results", "own_returns"), ("ep_lengths", "own_lengths")):
            np.testing.assert_allclose(kept[there], getattr(results["td3c"], here), atol=1e-5)


def test_results_without_a_record_of_own_evaluations_are_read(results: dict[str, CellResult], tmp_path: Path) -> None:
    for name in ("td3", "td3c"):
        folder = tmp_path / name
        write_result(folder, results[name])
        with np.load(folder / "training.npz") as arrays:
            np.savez(folder / "training.npz", timesteps=arrays["timesteps"], returns=arrays["returns"])
        text = json.loads(results[name].to_json())
        text["arrays"] = {key: value for key, value in text["arrays"].items() if not key.startswith("own_")}
        for old in (read_result(folder), CellResult.from_json(json.dumps(text))):
            assert old is not None and old.own_returns.size == 0
            np.testing.assert_array_equal(old.training_returns, results[name].training_returns)
            # It had none, or had some of which nothing is known
            assert old.knows_own_evaluations == (name == "td3")


def test_the_same_result_gives_the_same_files(results: dict[str, CellResult], tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_result(tmp_path / name, results["td3c-guard"])
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["collapse_events.jsonl", "evaluations.npz", "manifest.json", "training.npz"]
    for file in ("evaluations.npz", "training.npz"):
        with zipfile.ZipFile(tmp_path / "one" / file) as archive:
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file


@pytest.mark.parametrize("lost", ["manifest.json", "evaluations.npz", "training.npz", "collapse_events.jsonl"])
def test_half_a_folder_is_no_result_and_is_made_whole_again(
    study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult], lost: str
) -> None:
    cell = cells["td3c-guard"]
    folder = run_folder(study.folder, cell.dataset, cell.method.name, cell.seed, study.cell_key(cell))
    write_result(folder, results["td3c-guard"])
    file = folder / lost
    file.write_bytes(file.read_bytes()[:-30]) if lost.endswith("npz") else file.unlink()
    with pytest.warns(UserWarning, match="counts as not run"):
        assert read_result(folder) is None
    with pytest.warns(UserWarning, match="counts as not run"):
        assert find_result(study, cell) is None
    with pytest.warns(UserWarning, match="counts as not run"):
        restored = find_result(study, cell, results["td3c-guard"].to_json())
    assert restored is not None and read_result(folder) is not None
    np.testing.assert_array_equal(restored.returns, results["td3c-guard"].returns)
    shutil.rmtree(folder)


def test_a_result_that_cannot_be_written_leaves_nothing(
    results: dict[str, CellResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_result(tmp_path / "cell", results["td3"])

    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_result(tmp_path / "cell", results["td3c"])
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]
    kept = read_result(tmp_path / "cell")
    assert kept is not None and kept.manifest["name"] == results["td3"].manifest["name"]


def _write_at_once(folder: Path, result: CellResult, times: int, barrier: Any, errors: Any) -> None:
    for index in range(times):
        barrier.wait()
        try:
            write_result(folder / f"seed{index}-0123abcd", result)
        except OSError as error:
            errors.append(repr(error))


def test_processes_that_write_the_same_folder_at_once_all_succeed(results: dict[str, CellResult], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    result, times = results["offline"], 100
    with context.Manager() as manager:
        errors, barrier = manager.list(), context.Barrier(3)
        writers = [context.Process(target=_write_at_once, args=(tmp_path, result, times, barrier, errors)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert list(errors) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"seed{index}-0123abcd" for index in range(times))
    assert all(read_result(folder) is not None for folder in tmp_path.iterdir())


def test_what_killed_writers_left_is_removed_when_it_is_old(results: dict[str, CellResult], tmp_path: Path) -> None:
    # Of another machine's processes
    names = [f".{name}.00000000-1-1.x3_k9qwe" for name in ("seed1-0123abcd", "seed1-0123abcd.old", "seed2-0123abcd.fresh")]
    names += [".other", ".seedling"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        if "fresh" not in name:
            os.utime(tmp_path / name, (1e9, 1e9))
    write_result(tmp_path / "seed0-89abcdef", results["td3"])
    assert {path.name for path in tmp_path.iterdir()} == {"seed0-89abcdef", *names[2:]}


@pytest.mark.parametrize("manifest", ["[]", "3", '"key guarded"', "{}", '{"key": "a"}', '{"guarded": false}', "null"])
def test_a_manifest_without_what_it_must_have_is_no_result(
    results: dict[str, CellResult], tmp_path: Path, manifest: str
) -> None:
    write_result(tmp_path / "cell", results["td3"])
    (tmp_path / "cell" / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match="counts as not run"):
        assert read_result(tmp_path / "cell") is None


def test_a_result_is_found_under_the_names_of_before(
    results: dict[str, CellResult], cells: dict[str, Cell], tmp_path: Path
) -> None:
    before = write_study(tmp_path / "study")
    keep_result(before, cells["td3c"], results["td3c"])
    methods = {"tight": STUDY["methods"]["td3c"] | {"label": "Tight"}}
    (before.file).write_text(yaml.safe_dump(STUDY | {"datasets": {"all": "bundled:pendulum-medium"}, "methods": methods}))
    after = Protocol.load(before.folder)
    (run,) = load_results(after).runs
    assert (run.result.manifest["name"], run.result.manifest["label"]) == ("all/tight/seed0", "Tight")
    np.testing.assert_array_equal(run.result.returns, results["td3c"].returns)
    folders = [path.parent.relative_to(after.folder / "runs") for path in (after.folder / "runs").rglob("manifest.json")]
    assert {str(folder.parent) for folder in folders} == {"all/tight", "medium/td3c"}


def test_results_are_sorted_into_runs_failed_and_missing(
    study: Protocol, cells: dict[str, Cell], results: dict[str, CellResult]
) -> None:
    key = {name: study.cell_key(cell) for name, cell in cells.items()}
    find_result(study, cells["td3"], results["td3"].to_json())
    found = load_results(study, {key["td3c"]: "Traceback ...", key["td3"]: "old"})
    assert [run.cell.method.name for run in found.runs] == ["td3"]
    assert [cell.method.name for cell in found.failed] == ["td3c"]
    assert {cell.method.name for cell in found.missing} == cells.keys() - {"td3", "td3c"}
    shutil.rmtree(study.folder / "runs")


def test_environments_are_closed_whatever_happens(
    study: Protocol, cells: dict[str, Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[VecEnv] = []
    closed: list[VecEnv] = []

    def make(*args, **kwargs):
        env = make_vec_env(*args, **kwargs)
        close = env.close
        env.close = lambda: (closed.append(env), close())
        made.append(env)
        return env

    monkeypatch.setattr(cell_module, "make_vec_env", make)

    def stop(timestep: int, returns: list[float]) -> None:
        if timestep == 400:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run_cell(study, cells["td3c"], pretrained_folder=study.folder / "pretrained", on_evaluation=stop)
    assert len(made) == 3 and closed == made
