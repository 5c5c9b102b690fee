"""Tuning of the finetuning through rl_zoo3's own command: shared pretraining, seeds, storages, replays, errors."""

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv

import sb3_offline_ft
from sb3_offline_ft import TD3C, LearnerSnapshot, OfflineDataset, OfflineTD3, load_dataset, register
from sb3_offline_ft.algorithms import ALGORITHMS, algorithm_class, search_space
from sb3_offline_ft.common.machine import code_digest
from sb3_offline_ft.common.search_space import FINETUNING_PREFIX, SearchSpace, choice, finetuning_arguments, real
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.pretrained.recipe import Recipe, online_only_arguments
from sb3_offline_ft.pretrained.start import pretrain
from sb3_offline_ft.tuning.storage import open_storage
from tests.conftest import REPOSITORY, Installation, RunPython
from tests.zoo_runs import SMALL, UNGUARDED, make_manager, run

TUNED = sorted(ALGORITHMS)
COMMAND = [*("--env", "Pendulum-v1", "-n", "120", "--eval-episodes", "1", "--study-name", "study")]
OPTIMIZE = ["-optimize", "--n-evaluations", "2", "--no-optim-plots", "--n-startup-trials", "1"]
PARAMETERS = ["-params", *(f"{name}:{value!r}" for name, value in SMALL.items())]


def optimize(folder: Path, algo: str = "td3c", hyperparams: dict[str, Any] = UNGUARDED, **settings: Any) -> optuna.Study:
    storage = settings.setdefault("storage", str(folder / "study.log"))
    tuning = {"optimize_hyperparameters": True, "study_name": "study", "n_evaluations": 2, "n_trials": 2}
    manager = make_manager(folder, algo, hyperparams, **tuning | {"no_optim_plots": True} | settings)
    assert manager.setup_experiment() is None
    manager.hyperparameters_optimization()
    return load_study(storage)


def load_study(storage: str) -> optuna.Study:
    journal = optuna.storages.journal.JournalFileBackend
    opened = optuna.storages.JournalStorage(journal(storage)) if storage.endswith(".log") else storage
    return optuna.load_study(study_name="study", storage=opened)


def pretrained_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/*/pretrained/*.pt"))


def weights(model: OfflineTD3) -> dict[str, th.Tensor]:
    return model.policy.state_dict()


def assert_same(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert all(th.equal(first[name], second[name]) for name in first)


@pytest.fixture
def env(tmp_path: Path) -> Iterator[VecEnv]:
    env = make_manager(tmp_path).create_envs(1, no_log=True)
    yield env
    env.close()


def make_recipe(
    env: VecEnv, algo: str = "td3c", seed: int = 1, dataset: str = "bundled:pendulum-medium", **changed: Any
) -> Recipe:
    hyperparams = {"policy": "MlpPolicy", **SMALL, "offline_steps": 4} | changed
    return Recipe(algorithm_class(algo), hyperparams, load_dataset(dataset), env, seed, "cpu")


# Through the command


def test_the_stock_command_tunes_and_replays_a_trial(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    arguments = ["-m", "rl_zoo3.train", "--algo", "td3c", *COMMAND, "--seed", "1", "--storage", "studies/study.log"]
    tuned = run_python(*arguments, *OPTIMIZE, "--n-trials", "3", *PARAMETERS)
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stdout.count("Pretraining TD3C, 30 steps on pendulum-medium, seed 1") == 1
    assert "30/30" in tuned.stdout + tuned.stderr
    # The baseline of the guard is too short in so small a run, which it says
    assert "Traceback" not in tuned.stderr
    study = load_study(str(folder / "studies" / "study.log"))
    assert study.user_attrs["seed"] == 1
    assert len(study.trials) == 3 and study.trials[0].state.name == "COMPLETE"
    (pretrained,) = pretrained_files(folder)
    (report,) = folder.glob("logs/td3c/report_Pendulum-v1_3-trials-*.csv")
    assert "user_attrs_initial_return" in report.read_text()
    # No folder of a run in which enjoy would look for a model
    assert [path.name for path in (folder / "logs" / "td3c").iterdir() if path.is_dir()] == ["pretrained"]

    replayed = run_python(*arguments, "--trial-id", "0", "--eval-freq", "60", "-f", "replays", *PARAMETERS)
    assert replayed.returncode == 0, replayed.stderr
    assert "Trial 0 (complete)" in replayed.stdout and "evaluated every 60" in replayed.stdout
    (again,) = (folder / "replays" / "td3c" / "pretrained").glob("*.pt")
    assert again.name == pretrained.name
    assert_same(LearnerSnapshot.load(again).policy_state, LearnerSnapshot.load(pretrained).policy_state)
    result = folder / "replays" / "td3c" / "Pendulum-v1_1"
    saved = dict(yaml.unsafe_load((result / "Pendulum-v1" / "config.yml").read_text()))
    converted = HYPERPARAMS_CONVERTER["td3c"](study.trials[0].params)
    assert {name: saved[name] for name in converted} == converted
    model = TD3C.load(result / "Pendulum-v1.zip")
    assert model.epsilon == converted["epsilon"]
    assert model.lr_schedule(1.0) == converted["finetuning_learning_rate"]
    assert (model.offline_steps_done, model.num_timesteps) == (30, 120)


def test_processes_share_a_study_and_its_pretraining(installation: Installation, tmp_path: Path) -> None:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                *(installation.python, "-m", "rl_zoo3.train", "--algo", "td3bc", *COMMAND, *OPTIMIZE),
                *("--seed", str(seed), "--storage", "study.log", "--n-trials", "2", "--pruner", "none", "--sampler", "random"),
                *PARAMETERS,
            ],
            cwd=tmp_path,
            env=inherited,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(output.count("Pretraining TD3BC") for output, _ in outputs) == 1
    assert sum(output.count("Pretrained learner: ") for output, _ in outputs) == 1
    assert sum(output.count("which is used in place of") for output, _ in outputs) == 1
    study = load_study(str(tmp_path / "study.log"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert len({trial.params["online_bc"] for trial in study.trials}) == 4
    assert len({trial.user_attrs["seed"] for trial in study.trials}) == 4
    assert len({trial.user_attrs["pretrained"] for trial in study.trials}) == 1


def test_threads_share_a_study_in_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "n_jobs": 2, "n_trials": 4, "pruner": "none"}
    study = optimize(tmp_path, "td3bc", sampler="random", verbose=1, **settings)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert len({trial.params["online_bc"] for trial in study.trials}) == 4
    assert capsys.readouterr().out.count("Pretraining TD3BC") == 1


def test_a_database_may_be_opened_first_by_two_at_once(tmp_path: Path) -> None:
    # Without a second attempt 39 of 40 such pairs failed
    for number in range(3):
        barrier = Barrier(2)

        def begin(url: str, barrier: Barrier = barrier) -> str:
            barrier.wait()
            storage = open_storage(url, create=True)
            return optuna.create_study(storage=storage, study_name="study", load_if_exists=True).study_name

        with ThreadPoolExecutor(2) as executor:
            begun = list(executor.map(begin, [f"sqlite:///{tmp_path / f'{number}.db'}"] * 2))
        assert begun == ["study", "study"]


# The pretraining


@pytest.mark.parametrize("algo", TUNED)
def test_a_pretraining_of_its_own_is_that_of_learn_to_the_bit(tmp_path: Path, algo: str) -> None:
    plain = run(tmp_path, algo, UNGUARDED | {"learning_rate": 1e-3})
    apart = run(tmp_path, algo, UNGUARDED | {"learning_rate": 1e-3, "finetuning_learning_rate": 1e-3})
    assert_same(weights(plain), weights(apart))
    assert plain.offline_steps_done == apart.offline_steps_done == 30
    assert pretrained_files(tmp_path) == []


def test_settings_of_the_finetuning_leave_the_pretraining_as_it_is(tmp_path: Path) -> None:
    pretrained_only = UNGUARDED | {"warmup_steps": 120}
    with pytest.warns(UserWarning, match="nothing will be learned online"):
        plain = run(tmp_path, "td3bc", pretrained_only)
    with pytest.warns(UserWarning, match="nothing will be learned online"):
        changed = run(tmp_path, "td3bc", pretrained_only | {"finetuning_alpha": 9.0, "finetuning_batch_size": 32})
    assert_same(weights(plain), weights(changed))
    assert (plain.alpha, plain.batch_size) == (2.5, 16)  # type: ignore[attr-defined]
    assert (changed.alpha, changed.batch_size) == (9.0, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("policy_kwargs", ValueError, "`finetuning_policy_kwargs`: policy_kwargs cannot be another one"),
        ("batchsize", TypeError, r"TD3C \(`finetuning_...`\) got an unknown keyword 'batchsize': did you mean 'batch_size'"),
    ],
)
def test_settings_that_a_finetuning_cannot_have(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, hyperparams=UNGUARDED | {FINETUNING_PREFIX + name: 1})
    assert [path for path in (tmp_path / "logs").glob("*/*")] == []


def test_an_agent_in_the_middle_of_its_pretraining_has_no_finetuning_of_its_own(tmp_path: Path) -> None:
    model = TD3C("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", **SMALL)
    model.pretrain(3)
    model.save(tmp_path / "half.zip")
    settings = {"trained_agent": str(tmp_path / "half.zip")}
    with pytest.raises(ValueError, match="has 27 offline steps left to do, in which `finetuning_tau` must not apply"):
        run(tmp_path, hyperparams=UNGUARDED | {"finetuning_tau": 0.01}, **settings)
    assert run(tmp_path, **settings).offline_steps_done == 30
    finished = run(tmp_path, hyperparams=UNGUARDED | {"finetuning_tau": 0.01, "offline_steps": 0}, **settings)
    assert finished.tau == 0.01


ALTERNATIVES = {
    "buffer_size": 500,
    "learning_starts": 7,
    "train_freq": 3,
    "gradient_steps": 5,
    "action_noise": NormalActionNoise(np.zeros(1), np.ones(1)),
    "stats_window_size": 3,
    "tensorboard_log": None,
    "verbose": 0,
    "offline_fraction": 0.1,
    "warmup_steps": 7,
    "warmup_action_noise": True,
    "critic_warmup_steps": 9,
    "reset_optimizers": False,
    "guide_policy": "pretrained",
    "guide_steps": 9,
    "policy_averaging": 0.9,
    "online_bc": "lin_0.5",
    "adaptive_bc_target": 0.5,
    "adaptive_bc_gains": (0.1, 0.1),
    "adaptive_bc_returns": (-1.0, 1.0),
    "constraint_reference": "pretrained",
    "epsilon": 0.3,
    "initial_multiplier": 3.0,
    "multiplier_learning_rate": 0.1,
    "min_multiplier": 0.1,
    "max_multiplier": 20.0,
    "trust_region": None,
    "critic_penalty": 0.7,
    "online_actor_bc": 0.1,
    "online_critic_bc": 0.9,
}


def test_hyperparameters_that_act_online_only_change_no_pretrained_weight(env: VecEnv) -> None:
    acting_online: set[str] = set()
    for algo in TUNED:
        recipe = make_recipe(env, algo)
        expected = pretrain(recipe, env).snapshot.policy_state
        own = {name: ALTERNATIVES[name] for name in online_only_arguments(recipe.algorithm)}
        acting_online |= own.keys()
        changed = make_recipe(env, algo, **own)
        assert changed.digest == recipe.digest
        # The recipe drops them; a learner has them
        given = {name: value for name, value in own.items() if name != "buffer_size"}
        changed.hyperparams |= given
        assert_same(pretrain(changed, env).snapshot.policy_state, expected)
    assert acting_online == ALTERNATIVES.keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"alpha": 1.0},
        {"learning_rate": 1e-4},
        {"batch_size": 17},
        {"gamma": 0.9},
        {"offline_steps": 5},
        {"policy_kwargs": {"net_arch": [9]}},
        {"policy_kwargs": {"net_arch": [8], "activation_fn": th.nn.Tanh}},
        {"replay_buffer_kwargs": {"offline_sampling": "uniform"}},
        {"learning_rate": lambda progress_remaining: 1e-4},
        {"learning_rate": partial(max, 1e-4)},
        {"seed": 2},
        {"algo": "td3bc"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_acts_in_the_pretraining_is_part_of_the_recipe(env: VecEnv, changed: dict[str, Any]) -> None:
    recipe = make_recipe(env, **changed)
    assert recipe.digest != make_recipe(env).digest
    assert recipe.digest == make_recipe(env, **changed).digest


def test_changed_code_of_the_same_version_is_another_recipe(
    env: VecEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_recipe(env).digest
    assert make_recipe(env).digest == before
    copied = Path(shutil.copytree(REPOSITORY / "sb3_offline_ft", tmp_path / "sb3_offline_ft"))
    monkeypatch.setattr(sb3_offline_ft, "__file__", str(copied / "__init__.py"))
    code_digest.cache_clear()
    assert make_recipe(env).digest == before
    with (copied / "td3bc" / "td3bc.py").open("a") as file:
        file.write("CHANGED = 1\n")
    code_digest.cache_clear()
    changed = make_recipe(env).digest
    code_digest.cache_clear()
    assert changed != before


def test_changed_code_of_an_algorithm_of_ones_own_is_another_recipe(
    env: VecEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "from sb3_offline_ft import TD3BC\n\n\nclass Mine(TD3BC):\n    pass\n"
    digests = []
    for text in (source, source, source.replace("pass", "weight = 2")):
        (tmp_path / "mine_for_this_test.py").write_text(text)
        module = importlib.import_module("mine_for_this_test")
        code_digest.cache_clear()
        recipe = Recipe(module.Mine, {"policy": "MlpPolicy"}, load_dataset("bundled:pendulum-medium"), env, 1, "cpu")
        digests.append(recipe.digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_recipe_names_what_a_default_is(env: VecEnv) -> None:
    assert make_recipe(env, alpha=2.5, epsilon="geo_0.1_1.0").digest == make_recipe(env).digest


def test_pretrained_learners_are_found_again_and_damaged_ones_made_anew(
    env: VecEnv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = make_recipe(env), tmp_path / "pretrained"
    made = PretrainedCache(folder).get(recipe, env).snapshot
    path = PretrainedCache(folder).path(recipe)
    assert json.loads(path.with_suffix(".json").read_text())["hyperparams"]["offline_steps"] == 4
    assert "Pretraining TD3C, 4 steps" in capsys.readouterr().out
    assert_same(PretrainedCache(folder).get(recipe, env).snapshot.policy_state, made.policy_state)
    assert capsys.readouterr().out == f"Pretrained learner: {path}\n"

    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"is damaged .* It is pretrained again"):
        assert_same(PretrainedCache(folder).get(recipe, env).snapshot.policy_state, made.policy_state)
    assert_same(LearnerSnapshot.load(path).policy_state, made.policy_state)
    assert not list(folder.glob(".*"))


def test_the_lock_of_a_killed_process_is_not_waited_for(
    env: VecEnv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cache = make_recipe(env), PretrainedCache(tmp_path)
    lock = cache.path(recipe).with_suffix(".lock")
    hold = (
        "import time; from filelock import FileLock; "
        f"lock = FileLock({str(lock)!r}).acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    # It dies while we wait
    kill = f"import os, time; time.sleep(1); os.kill({holder.pid}, {int(signal.SIGKILL)})"
    killer = subprocess.Popen([sys.executable, "-c", kill])
    cache.get(recipe, env)
    assert (killer.wait(), holder.wait()) == (0, -signal.SIGKILL)
    assert capsys.readouterr().out.startswith(
        "Waiting for another process that pretrains TD3C, 4 steps on pendulum-medium, seed 1"
    )
    holder.stdout.close()


def test_the_folder_of_pretrained_learners_may_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_OFFLINE_FT_PRETRAINED", str(tmp_path / "shared"))
    optimize(tmp_path, n_trials=1)
    optimize(tmp_path / "elsewhere", n_trials=1)
    assert len(list((tmp_path / "shared").glob("*.pt"))) == 1
    assert pretrained_files(tmp_path) == []
    monkeypatch.setenv("SB3_OFFLINE_FT_PRETRAINED", str(tmp_path / "study.log"))
    with pytest.raises(OSError, match=r"The folder of pretrained learners '.*study.log' cannot be used: File exists"):
        optimize(tmp_path / "third", n_trials=1)


# Search spaces


def test_schedules_of_the_finetuning_only_start_at_their_own_parameter() -> None:
    space = SearchSpace(
        "own",
        {
            "finetuning_gain": real(0.1, 1.0),
            "finetuning_gain_schedule": choice("constant", "linear"),
            "finetuning_width": real(0.1, 1.0),
            "finetuning_width_end_factor": real(0.1, 1.0),
        },
    )
    drawn = {
        "finetuning_gain": 0.5, "finetuning_gain_schedule": "linear",
        "finetuning_width": 0.5, "finetuning_width_end_factor": 0.5,
    }  # fmt: skip
    assert space.convert(drawn) == {"finetuning_gain": "lin_0.5", "finetuning_width": "geo_0.5_0.25"}


@pytest.mark.parametrize("algo", TUNED)
def test_parameters_are_converted_back_into_what_was_sampled(algo: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        sampled = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, {})
        converted = HYPERPARAMS_CONVERTER[algo](trial.params)
        again = finetuning_arguments(converted, 1)
        assert repr(sampled) == repr(again)
        model = algorithm_class(algo)("MlpPolicy", "Pendulum-v1", buffer_size=10, **sampled)
        assert model.lr_schedule(1.0) == converted["finetuning_learning_rate"]
        assert model.action_noise._sigma[0] == converted["noise_std"]
        # A file of hyperparameters and the command line can hold them
        assert yaml.safe_load(yaml.safe_dump(converted)) == converted
        assert not {"alpha", "gamma", "policy_kwargs", "offline_steps", "learning_rate"} & converted.keys()


def test_the_documentation_names_what_is_tuned() -> None:
    section = (REPOSITORY / "docs" / "tuning.md").read_text().partition("## Search spaces")[2].partition("\n## ")[0]
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert documented == {name for algo in TUNED for name in search_space(algo).tuned}


def test_what_the_user_gives_is_not_tuned(tmp_path: Path) -> None:
    given = {"epsilon": 0.02, "finetuning_learning_rate": 1e-4, "noise_type": "ornstein-uhlenbeck", "offline_fraction": 0.25}
    study = optimize(tmp_path, hyperparams=UNGUARDED | given, n_trials=1)
    tuned = study.trials[0].params.keys()
    expected = {"constraint_reference", "multiplier_learning_rate", "warmup_steps", "critic_warmup_steps", "gradient_steps"}
    assert tuned == expected | {"policy_averaging"}


def test_parameters_of_another_algorithm_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'one_minus_gamma' is not in the search space of td3c, which has constraint"):
        HYPERPARAMS_CONVERTER["td3c"]({"one_minus_gamma": 0.1})


def test_a_sampler_that_the_user_registered_is_kept_and_tunes_the_pretraining_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(trial: optuna.Trial, *_: Any) -> dict[str, Any]:
        return {"alpha": trial.suggest_categorical("alpha", [1.0, 2.0]), "warmup_steps": 20}

    monkeypatch.setitem(HYPERPARAMS_SAMPLER, "td3bc", sample)
    register()
    assert HYPERPARAMS_SAMPLER["td3bc"] is sample
    study = optimize(tmp_path, "td3bc", n_trials=4, sampler="random")
    alphas = {trial.params["alpha"] for trial in study.trials}
    recipes = {(trial.params["alpha"], trial.user_attrs["pretrained"]) for trial in study.trials}
    assert len(alphas) == len(recipes) == len(pretrained_files(tmp_path)) == 2


# Trials


def test_a_study_is_the_same_again_for_the_same_seed(tmp_path: Path) -> None:
    first = optimize(tmp_path / "first", "td3bc", n_trials=2, n_startup_trials=1, pruner="none")
    # Another process goes on with the study, whatever its own seed
    optimize(tmp_path / "second", "td3bc", n_trials=1, n_startup_trials=1, pruner="none")
    second = optimize(tmp_path / "second", "td3bc", n_trials=1, n_startup_trials=1, pruner="none", seed=99)
    told = [[(trial.params, trial.value, trial.user_attrs) for trial in study.trials] for study in (first, second)]
    assert told[0] == told[1]
    other = optimize(tmp_path / "other", "td3bc", n_trials=1, n_startup_trials=1, seed=99)
    assert other.trials[0].params != first.trials[0].params
    assert other.trials[0].user_attrs["pretrained"] != first.trials[0].user_attrs["pretrained"]


def test_trials_tell_how_deep_they_dip(tmp_path: Path) -> None:
    study = optimize(tmp_path, n_evaluations=3, n_trials=2, pruner="none", hyperparams=UNGUARDED | {"warmup_steps": 45})
    for trial in study.trials:
        told = trial.user_attrs
        values = trial.intermediate_values
        # The evaluation before the first interaction is none of rl_zoo3's, and 40 interactions are warm-up
        assert list(values) == [1, 2, 3]
        assert trial.value == values[3]
        assert told["lowest_return"] == min(values[2], values[3])
        assert told["dip"] == pytest.approx(told["initial_return"] - told["lowest_return"])
        assert told["dip_depth"] == pytest.approx(told["dip"] / abs(told["initial_return"] + 1309))
        assert told["eval_freq"] == 40
    first, second = ({2 * trial.user_attrs["initial_return"] - trial.intermediate_values[1]} for trial in study.trials)
    # The pretrained policy is evaluated on the same episodes in all trials
    assert first.pop() == pytest.approx(second.pop())


def test_the_report_holds_the_study(tmp_path: Path) -> None:
    optimize(tmp_path, n_trials=1)
    (report,) = tmp_path.glob("logs/td3c/report_*.pkl")
    study = pickle.loads(report.read_bytes())
    assert isinstance(study.sampler, optuna.samplers.TPESampler)
    assert len(study.trials) == 1


class _Failing(BaseCallback):
    error: Exception

    def _on_step(self) -> bool:
        raise self.error


class FailFirst(_Failing):
    error = ValueError("a value that is not finite")
    runs = 0

    def _on_step(self) -> bool:
        if self.num_timesteps == 1:
            FailFirst.runs += 1
        return FailFirst.runs > 1 or super()._on_step()


class FailAlways(_Failing):
    error = RuntimeError("no hyperparameter's fault")


def test_each_trial_has_a_guard_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guard = {"sb3_offline_ft.CollapseGuard": {"baseline": [-1000.0, -900.0, -1100.0, -950.0, -1050.0], "signal_freq": 0}}
    optimize(tmp_path, hyperparams=SMALL | {"callback": [guard]}, pruner="none")
    before = sorted(tmp_path.rglob("*"))
    assert not list(tmp_path.rglob("collapse*"))
    settings = {"optimization_log_path": "trials", "storage": str(tmp_path / "other.log"), "pruner": "none"}
    study = optimize(tmp_path, hyperparams=SMALL | {"callback": guard}, **settings)
    assert [trial.user_attrs["collapse_alarms"] for trial in study.trials] == [0, 0]
    new = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path not in before}
    assert new == {"trials", "other.log", "logs"}
    for number in range(2):
        events = (tmp_path / "trials" / f"trial_{number}" / "collapse_events.jsonl").read_text().splitlines()
        assert json.loads(events[0])["event"] == "start"
        assert sum('"event": "start"' in event for event in events) == 1


def test_trials_whose_hyperparameters_fail_are_pruned_and_errors_end_the_study(tmp_path: Path) -> None:
    study = optimize(tmp_path, hyperparams=UNGUARDED | {"callback": ["tests.test_zoo_optimize.FailFirst"]}, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    with pytest.raises(RuntimeError, match="no hyperparameter's fault"):
        optimize(tmp_path / "second", hyperparams=UNGUARDED | {"callback": "tests.test_zoo_optimize.FailAlways"})
    states = [trial.state.name for trial in load_study(str(tmp_path / "second" / "study.log")).trials]
    assert states == ["FAIL"]
    # What does not depend on a trial's hyperparameters does not count as their fault
    with pytest.raises(ValueError, match="hopper-medium"):
        optimize(tmp_path / "third", hyperparams=UNGUARDED | {"dataset": "bundled:hopper-medium"})
    states = [trial.state.name for trial in load_study(str(tmp_path / "third" / "study.log")).trials]
    assert states == ["FAIL"]


class InterruptSecond(BaseCallback):
    seen = 0

    def _on_step(self) -> bool:
        InterruptSecond.seen += self.num_timesteps == 1
        if InterruptSecond.seen == 2:
            raise KeyboardInterrupt
        return True


def test_an_interrupt_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = UNGUARDED | {"callback": "tests.test_zoo_optimize.InterruptSecond"}
    study = optimize(tmp_path, "rebrac", settings, n_trials=5)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert "Number of finished trials:  2" in capsys.readouterr().out
    assert len(list(tmp_path.glob("logs/rebrac/report_*.csv"))) == 1


def test_a_study_without_a_completed_trial_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^No trial was completed, so there is nothing to report"):
        optimize(tmp_path, hyperparams=UNGUARDED | {"callback": "tests.test_zoo_optimize.FailOften"})


class FailOften(_Failing):
    error = ValueError("a value that is not finite")


def test_a_process_loads_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(spec: Any) -> OfflineDataset:
        loaded.append(spec)
        return load_dataset(spec)

    for module in ("zoo.pretraining", "offline_td3.data"):
        monkeypatch.setattr(f"sb3_offline_ft.{module}.load_dataset", load)
    optimize(tmp_path, n_trials=3, pruner="none")
    assert [spec for spec in loaded if not isinstance(spec, OfflineDataset)] == ["bundled:pendulum-medium"]


def test_a_study_in_memory_leaves_a_report_and_the_pretrained_learner(tmp_path: Path) -> None:
    manager = make_manager(tmp_path, optimize_hyperparameters=True, n_evaluations=2, n_trials=1, no_optim_plots=True)
    assert manager.setup_experiment() is None
    manager.hyperparameters_optimization()
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".csv", ".pkl", ".pt", ".json", ".lock"}
    assert not list(tmp_path.rglob("study.lock"))


@pytest.mark.parametrize("algo", ["td3bc", "rebrac"])
def test_online_only_runs_are_tuned_too(tmp_path: Path, algo: str) -> None:
    settings = UNGUARDED | {"dataset": None, "offline_steps": 0}
    with pytest.warns(UserWarning, match="neither a dataset nor pretrained weights"):
        study = optimize(tmp_path, algo, settings, n_trials=1)
    assert "initial_return" not in study.trials[0].user_attrs
    assert pretrained_files(tmp_path) == []


# Errors


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hyperparams": {"dataset": "bundled:nothing"}}, FileNotFoundError, "No bundled dataset 'nothing'"),
        (
            {"storage": "study"},
            ValueError,
            r"`--storage` is 'study', which cannot be read: expected a journal file ending in .log, or the URL",
        ),
        (
            {"storage": "sqlite:///no/such/folder/study.db"},
            OSError,
            r"study.db cannot be opened: unable to open database file",
        ),
        ({"storage": "occupied/study.log"}, OSError, r"The journal '.*occupied/study.log' cannot be written: "),
        (
            {"storage": "postgresql+nothing://user:secret@host/db"},
            OSError,
            r"user:\*\*\*@host/db cannot be opened: Can't load plugin",
        ),
        ({"trained_agent": "agent.zip"}, ValueError, "`-optimize` pretrains by itself, and cannot start from an agent"),
        ({"environment": "CartPole-v1"}, ValueError, "td3c needs a Box action space"),
    ],
    ids=["dataset", "no URL", "no folder", "no permission", "no server", "agent", "actions"],
)
def test_a_study_that_cannot_begin_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("occupied", "agent.zip"):
        (tmp_path / name).write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        make_manager(tmp_path, optimize_hyperparameters=True, **settings).setup_experiment()
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name not in ("logs", "td3c")] == []


def test_a_trial_that_does_not_exist_is_named(tmp_path: Path) -> None:
    optimize(tmp_path, n_trials=1)
    study = {"storage": str(tmp_path / "study.log"), "study_name": "study"}
    for changed, message in [
        ({"trial_id": 1}, "There is no trial 1 in the study 'study', which has the trials 0 to 0"),
        ({"trial_id": 0, "study_name": "studi"}, r"There is no study 'studi' in .*study.log: it has 'study'"),
        ({"trial_id": 0, "study_name": None}, "`--trial-id` needs the study that the trial is of"),
        ({"trial_id": 0, "storage": str(tmp_path / "other.log")}, "There is no storage '.*other.log'"),
        ({"trial_id": 0, "storage": f"sqlite:///{tmp_path}/other.db"}, "There is no storage '.*other.db'"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_manager(tmp_path, **study | changed).setup_experiment()
    assert not list(tmp_path.glob("other*"))


def test_algorithms_of_rl_zoo3_are_tuned_as_ever(tmp_path: Path) -> None:
    settings = {"learning_starts": 20, "buffer_size": 500}
    study = optimize(tmp_path, "td3", settings, n_trials=1, n_timesteps=60)
    assert study.trials[0].user_attrs.keys() == {"gamma", "batch_size"}
    assert "seed" not in study.user_attrs
    assert not list(tmp_path.glob("logs/td3/pretrained"))
