"""rl_zoo3's own commands with our algorithms, in an installation of the wheel, at tiny budgets."""

import argparse
import os
import shutil
from pathlib import Path

import pytest
import yaml

from sb3_offline_ft import TD3BC, TD3C
from sb3_offline_ft.algorithms import ALGORITHMS, algorithm_class, preset_path
from sb3_offline_ft.common.checks import constructor_arguments
from tests.conftest import REPOSITORY, Installation, RunPython
from tests.hooks import n_updates

BUNDLED_PENDULUM = REPOSITORY / "sb3_offline_ft" / "datasets" / "bundled" / "pendulum-medium"

TINY = ["--env", "Pendulum-v1", "-n", "300", "--eval-freq", "-1", "--seed", "1"]
TINY_PARAMETERS = ["-params", "offline_steps:20", "warmup_steps:200"]


def run_folders(log_folder: Path) -> list[str]:
    return sorted(path.relative_to(log_folder).as_posix() for path in log_folder.glob("*/*"))


def test_the_stock_commands_pretrain_finetune_and_show(
    run_python: RunPython, installation: Installation, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    dataset = tmp_path / "data" / "pendulum-copy"
    shutil.copytree(BUNDLED_PENDULUM, dataset)
    settings = [*TINY_PARAMETERS, f"dataset:{str(dataset)!r}"]

    pretrained = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3bc", "-P", *settings)
    assert pretrained.returncode == 0, pretrained.stderr
    preset = installation.site_packages / "sb3_offline_ft" / "hyperparams" / "td3bc.yml"
    assert f"Loading hyperparameters from: {preset}" in pretrained.stdout
    run = folder / "logs" / "td3bc" / "Pendulum-v1_1"
    saved = yaml.unsafe_load((run / "Pendulum-v1" / "config.yml").read_text())
    changed = {"offline_steps": 20, "warmup_steps": 200, "dataset": str(dataset)}
    assert dict(saved) == yaml.safe_load(preset.read_text())["Pendulum-v1"] | changed

    agent = "logs/td3bc/Pendulum-v1_1/Pendulum-v1.zip"
    finetuned = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3c", "-i", agent, *settings)
    assert finetuned.returncode == 0, finetuned.stderr
    assert "Loading pretrained agent" in finetuned.stdout
    first = TD3BC.load(folder / agent)
    second = TD3C.load(folder / "logs" / "td3c" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    assert (first.num_timesteps, second.num_timesteps) == (300, 300)
    assert n_updates(second) > n_updates(first) >= 20

    # Looking at an agent needs no data: it may be gone.
    shutil.rmtree(dataset)
    for module, algo in (("rl_zoo3.enjoy", "td3c"), ("sb3_offline_ft.zoo.enjoy", "td3bc")):
        enjoy = ["-m", module, "--algo", algo, "--env", "Pendulum-v1", "-f", "logs", "-n", "201", "--no-render"]
        shown = run_python(*enjoy)
        assert shown.returncode == 0, shown.stderr
        assert "Episode Length 200" in shown.stdout


def test_our_own_train_needs_no_hook(run_python: RunPython, tmp_path: Path) -> None:
    off = {"SB3_OFFLINE_FT_NO_HOOK": "1"}
    stock = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3bc", **off)
    assert "invalid choice: 'td3bc'" in stock.stderr
    process = run_python("-m", "sb3_offline_ft.zoo.train", *TINY, "--algo", "td3bc", *TINY_PARAMETERS, **off)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "work" / "logs" / "td3bc" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()


def test_custom_envs_may_import_us_instead_of_the_hook(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "custom_envs.py").write_text("import sb3_offline_ft.zoo\n")
    settings = ["--algo", "td3bc", *TINY_PARAMETERS, "dataset:'bundled:nothing'"]
    process = run_python("-m", "rl_zoo3.train", *TINY, *settings, SB3_OFFLINE_FT_NO_HOOK="1")
    assert "hyperparams/td3bc.yml" in process.stdout
    assert "'nothing'" in process.stderr.splitlines()[-1]


def test_a_configuration_of_the_user_replaces_the_preset(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    settings = {
        "policy": "MlpPolicy",
        "n_timesteps": 40,
        "dataset": "bundled:pendulum-medium",
        "offline_steps": 3,
        "warmup_steps": 10,
        "batch_size": 17,
    }
    (folder / "mine.yml").write_text(yaml.safe_dump({"Pendulum-v1": settings}))
    process = run_python("-m", "rl_zoo3.train", "--algo", "td3c", "--env", "Pendulum-v1", "-conf", "mine.yml")
    assert process.returncode == 0, process.stderr
    assert "Loading hyperparameters from: mine.yml" in process.stdout
    assert "hyperparams/td3c.yml" not in process.stdout
    saved = yaml.unsafe_load((folder / "logs" / "td3c" / "Pendulum-v1_1" / "Pendulum-v1" / "config.yml").read_text())
    assert dict(saved) == settings


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("bundled:hoper-medium", "bundled:hopper-medium"),
        ("data/nowhere.npz", "nowhere.npz"),
        (["bundled:pendulum-medium", "bundled:pendulum-mediu"], "bundled:pendulum-medium"),
    ],
)
def test_a_wrong_dataset_is_refused_before_any_folder_is_made(
    run_python: RunPython, tmp_path: Path, spec: str | list[str], named: str
) -> None:
    process = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3c", "-P", "-params", f"dataset:{spec!r}")
    assert process.returncode == 1
    # Before environments and models are made
    assert "Using" not in process.stdout and "check_spec" in process.stderr
    assert named in process.stderr.splitlines()[-1]
    assert list((tmp_path / "work").iterdir()) == []


def test_discrete_actions_are_refused_and_leave_no_folder(run_python: RunPython, tmp_path: Path) -> None:
    process = run_python("-m", "rl_zoo3.train", "--algo", "td3c", "-n", "100", "--seed", "1", "--env", "CartPole-v1")
    assert process.returncode == 1
    message = "td3c needs a Box action space with finite bounds, CartPole-v1 has Discrete(2)"
    assert message in process.stderr.splitlines()[-1]
    assert run_folders(tmp_path / "work" / "logs") == []


def test_a_run_that_fails_before_its_first_step_removes_its_folder_and_no_other(run_python: RunPython, tmp_path: Path) -> None:
    logs = tmp_path / "work" / "logs"
    (logs / "td3c" / "Pendulum-v1_1").mkdir(parents=True)
    other_data = "dataset:'bundled:hopper-medium'"
    process = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3c", "-P", *TINY_PARAMETERS, other_data)
    assert process.returncode == 1
    assert "Log path: logs/td3c/Pendulum-v1_2" in process.stdout
    # Not rl_zoo3's "'ProgressBarCallback' object has no attribute 'pbar'", which hides the cause.
    error = process.stderr.splitlines()[-1]
    assert "hopper-medium" in error and "(11,)" in error
    assert "pbar" not in process.stderr
    assert run_folders(logs) == ["td3c/Pendulum-v1_1"]


def test_a_run_that_fails_later_keeps_its_folder(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "failing.py").write_text(
        "from stable_baselines3.common.callbacks import BaseCallback\n"
        "class FailAtStep(BaseCallback):\n"
        "    def _on_step(self):\n"
        "        if self.num_timesteps == 3:\n"
        "            raise RuntimeError('failed at step 3')\n"
        "        return True\n"
    )
    callback = "callback:'failing.FailAtStep'"
    parameters = ["-params", "offline_steps:0", "warmup_steps:200", "dataset:None", callback]
    process = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3c", *parameters)
    assert "RuntimeError: failed at step 3" in process.stderr
    assert run_folders(folder / "logs") == ["td3c/Pendulum-v1_1"]


def test_a_log_folder_that_cannot_be_used_is_named(run_python: RunPython, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    process = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3bc", "-f", str(occupied))
    assert process.returncode == 1
    error = process.stderr.splitlines()[-1]
    assert error.startswith("OSError: The run folder")
    assert f"{occupied}/td3bc/Pendulum-v1_1" in error
    assert os.strerror(20) in error
    assert "-f <log folder>" in error
    assert process.stderr.count("Traceback") == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="only an ordinary user can be refused a folder")
def test_a_log_folder_without_permission_is_named(run_python: RunPython, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    process = run_python("-m", "rl_zoo3.train", *TINY, "--algo", "td3bc", "-f", str(locked))
    error = process.stderr.splitlines()[-1]
    assert "Permission denied" in error and str(locked) in error and "-f <log folder>" in error


def test_other_algorithms_are_left_as_they_are(run_python: RunPython, tmp_path: Path) -> None:
    logs = tmp_path / "work" / "logs"
    train = ["-m", "rl_zoo3.train", *TINY, "--algo", "td3"]
    fine = run_python(*train, "-params", "learning_starts:100", "buffer_size:1000")
    assert fine.returncode == 0, fine.stderr
    loaded = next(line for line in fine.stdout.splitlines() if line.startswith("Loading hyperparameters from: "))
    assert Path(loaded.partition(": ")[2]).parts[-3:] == ("rl_zoo3", "hyperparams", "td3.yml")
    # rl_zoo3 keeps the folders of its own failed runs.
    failed = run_python(*train, "-params", "no_such_parameter:1")
    assert "no_such_parameter" in failed.stderr.splitlines()[-1]
    assert run_folders(logs) == ["td3/Pendulum-v1_1", "td3/Pendulum-v1_2"]


def manager(algo: str, log_folder: Path, config: str | None = None, uuid: str = "") -> object:
    from rl_zoo3.exp_manager import ExperimentManager

    return ExperimentManager(argparse.Namespace(), algo, "Pendulum-v1", str(log_folder), config=config, uuid_str=uuid)


@pytest.mark.parametrize("uuid", ["", "_3f2c"])
def test_two_runs_that_start_together_do_not_share_a_folder(tmp_path: Path, uuid: str) -> None:
    import sb3_offline_ft.zoo

    sb3_offline_ft.zoo.register()
    first, second = manager("td3c", tmp_path, uuid=uuid), manager("td3c", tmp_path, uuid=f"{uuid}a" if uuid else "")
    for one in (first, second):
        one.create_log_folder()  # type: ignore[attr-defined]
        assert Path(one.params_path).is_dir()  # type: ignore[attr-defined]
        assert Path(one.params_path).parent == Path(one.save_path)  # type: ignore[attr-defined]
    expected = [f"Pendulum-v1_1{uuid}", f"Pendulum-v1_1{uuid}a" if uuid else "Pendulum-v1_2"]
    assert sorted(path.name for path in (tmp_path / "td3c").iterdir()) == expected


def test_the_preset_is_the_default_for_our_algorithms_only(tmp_path: Path) -> None:
    import sb3_offline_ft.zoo

    sb3_offline_ft.zoo.register()
    assert manager("td3c", tmp_path).config == preset_path("td3c")  # type: ignore[attr-defined]
    assert manager("td3c", tmp_path, "mine.yml").config == "mine.yml"  # type: ignore[attr-defined]
    assert manager("sac", tmp_path).config.endswith("rl_zoo3/hyperparams/sac.yml")  # type: ignore[attr-defined]


def test_registering_again_changes_nothing(run_python: RunPython) -> None:
    code = """
import rl_zoo3.exp_manager as m, rl_zoo3
table, keys, before = rl_zoo3.ALGOS, list(rl_zoo3.ALGOS), dict(vars(m.ExperimentManager))
import sb3_offline_ft.zoo as zoo
def changed():
    return {name: value for name, value in vars(m.ExperimentManager).items() if value is not before.get(name)}
first = changed()
zoo.register(); zoo.register()
print(rl_zoo3.ALGOS is table is m.ALGOS, changed() == first, *first)
print(*[k for k in table if k not in keys], *[k for k in keys if k not in table])
"""
    process = run_python("-c", code, SB3_OFFLINE_FT_NO_HOOK="1")
    assert process.stdout.split() == ["True", "True", "__new__", "td3bc", "td3c", "rebrac"], process.stderr


def test_only_the_zoo_itself_changes_anything_in_rl_zoo3(run_python: RunPython) -> None:
    code = """
import sys
from rl_zoo3 import exp_manager, hyperparams_opt, utils
def tables():
    names = (utils.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER)
    return [dict(table) for table in (vars(exp_manager.ExperimentManager), *names)]
before = tables()
import sb3_offline_ft.cli, sb3_offline_ft.study.commands, sb3_offline_ft.study.tuning.run, sb3_offline_ft.tuning.samplers
from pathlib import Path
from sb3_offline_ft.algorithms import ALGORITHMS, algorithm_class, preset_path, search_space
from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.pretrained.cache import PretrainedCache
from sb3_offline_ft.pretrained.recipe import Recipe
from sb3_offline_ft.study import Protocol, init_study
from sb3_offline_ft.tuning.storage import open_storage
from stable_baselines3.common.env_util import make_vec_env
open_storage("study.log", create=True)
init_study(Path("made"), env="Pendulum-v1", datasets=["bundled:pendulum-medium"])
Protocol.load(Path("made")).check()
for algo in ALGORITHMS:
    search_space(algo), preset_path(algo)
recipe = Recipe(algorithm_class("td3c"), {"policy": "MlpPolicy", "offline_steps": 2}, load_dataset("bundled:pendulum-medium"),
    make_vec_env("Pendulum-v1"), 0)
PretrainedCache(Path("pretrained")).get(recipe, make_vec_env("Pendulum-v1"))
print(tables() == before, "sb3_offline_ft.zoo" in sys.modules)
"""
    process = run_python("-c", code, SB3_OFFLINE_FT_NO_HOOK="1")
    assert process.stdout.splitlines()[-1:] == ["True False"], process.stdout + process.stderr


def test_our_algorithms_have_a_manager_of_their_own_wherever_the_class_was_imported_from(run_python: RunPython) -> None:
    code = """
import argparse, copy, inspect, pickle
from rl_zoo3.exp_manager import ExperimentManager
signature = inspect.signature(ExperimentManager)
import sb3_offline_ft.zoo, rl_zoo3.train
class Mine(ExperimentManager):
    pass
def make(cls, algo):
    return cls(argparse.Namespace(), algo, "Pendulum-v1", log_folder="logs", config=None)
ours, theirs = make(ExperimentManager, "td3c"), make(rl_zoo3.train.ExperimentManager, "sac")
named = ExperimentManager(args=argparse.Namespace(), algo="rebrac", env_id="Pendulum-v1", log_folder="logs")
print(*[type(each).__name__ for each in (ours, named, copy.copy(ours), pickle.loads(pickle.dumps(ours)), make(Mine, "sac"))])
print(type(theirs) is type(copy.deepcopy(theirs)) is ExperimentManager is rl_zoo3.train.ExperimentManager)
print(isinstance(ours, ExperimentManager), inspect.signature(ExperimentManager) == signature, ours.config == named.config)
"""
    process = run_python("-c", code, SB3_OFFLINE_FT_NO_HOOK="1")
    names = 4 * ["OfflineExperimentManager"]
    assert process.stdout.split() == [*names, "Mine", "True", "True", "True", "False"], process.stderr


def test_a_subclass_of_the_users_has_what_is_ours_below_its_own(run_python: RunPython) -> None:
    code = """
import argparse, copy, pickle
from rl_zoo3.exp_manager import ExperimentManager
class Mine(ExperimentManager):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_created = 0
    def create_envs(self, *args, **kwargs):
        self.n_created += 1
        return super().create_envs(*args, **kwargs)
small = dict(policy_kwargs=dict(net_arch=[8]), offline_steps=5, warmup_steps=5, batch_size=8, callback=None)
def make(algo):
    return Mine(argparse.Namespace(), algo, "Pendulum-v1", "logs", n_timesteps=20, eval_freq=-1, hyperparams=dict(small))
mine = make("td3c")
again = [copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
print("kept", {type(each) for each in again} == {type(mine)}, isinstance(mine, Mine), again[-1].config == mine.config)
print("shared", type(make("rebrac")) is type(mine), type(make("sac")) is Mine)
model, _ = mine.setup_experiment()
mine.learn(model)
print("run", mine.n_created, model.num_timesteps, model.offline_steps_done)
"""
    process = run_python("-c", code, SB3_OFFLINE_FT_NO_HOOK="")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert {"kept True True True", "shared True True", "run 1 20 5"} <= set(lines), process.stdout


def test_an_algorithm_that_the_user_registered_under_our_name_is_kept(run_python: RunPython) -> None:
    code = """
import rl_zoo3
rl_zoo3.ALGOS["td3c"] = rl_zoo3.ALGOS["td3"]
import sb3_offline_ft.zoo
print(rl_zoo3.ALGOS["td3c"].__name__)
"""
    assert run_python("-c", code, SB3_OFFLINE_FT_NO_HOOK="1").stdout.split() == ["TD3"]


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_presets_name_only_parameters_that_exist(algo: str) -> None:
    zoo_parameters = {"n_timesteps", "noise_type", "noise_std", "n_envs", "normalize", "env_wrapper", "callback"}
    accepted = constructor_arguments(algorithm_class(algo)).keys() | zoo_parameters
    presets = yaml.safe_load(Path(preset_path(algo)).read_text())
    assert {"default", "Hopper-v5", "Pendulum-v1"} <= set(presets)
    for environment, preset in presets.items():
        assert set(preset) <= accepted, environment
        assert environment == "default" or isinstance(preset["dataset"], str)


def test_there_is_no_preset_for_an_algorithm_of_others() -> None:
    with pytest.raises(ValueError, match=r"No preset for the algorithm 'sac'.*td3bc, td3c, rebrac"):
        preset_path("sac")
