"""An algorithm of another package: its folder is all that it takes for the zoo, tuning, studies and the contract."""

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
import yaml

from sb3_offline_ft import LearnerSnapshot, OfflineTD3
from sb3_offline_ft.testing import CLAUSES, check_algorithm
from tests.conftest import RunPython
from tests.study_runs import STUDY
from tests.test_zoo_optimize import load_study

ALGORITHM = '''
from torch.nn import functional as F

from sb3_offline_ft import OfflineTD3
from sb3_offline_ft.offline_td3 import Phase


class Huber(OfflineTD3):
    """TD3 with a Huber loss of behavior cloning, online with another weight."""

    def __init__(self, *args, online_weight=1.0, **kwargs):
        self.online_weight = online_weight
        super().__init__(*args, **kwargs)

    def _actor_loss(self, batch, actions, q_values):
        if self.life_cycle.is_plain_td3:
            return super()._actor_loss(batch, actions, q_values)
        weight = 1.0 if self.phase is Phase.PRETRAINING else self.online_weight
        return -q_values.mean() / q_values.detach().abs().mean() + weight * F.smooth_l1_loss(actions, batch.actions)
'''
SEARCH_SPACE = """
from sb3_offline_ft.common.search_space import real

SEARCH_SPACE = {"online_weight": real(0.01, 1.0, log=True)}
"""
PRESET = {
    "default": {
        "policy": "MlpPolicy",
        "n_timesteps": 120,
        "dataset": "bundled:pendulum-medium",
        "offline_steps": 20,
        "warmup_steps": 20,
        "batch_size": 16,
        "buffer_size": 1000,
        "policy_kwargs": {"net_arch": [8]},
        "online_weight": 0.5,
    }
}
TRAIN = ["-m", "rl_zoo3.train", "--algo", "huber", "--env", "Pendulum-v1", "--eval-episodes", "1", "--seed", "1"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of an installed package ``huber_for_this_test``."""
    root = tmp_path / "site"
    folder, facts = root / "huber_for_this_test", root / "huber_for_this_test-1.0.dist-info"
    for path, text in {
        folder / "__init__.py": ALGORITHM,
        folder / "search_space.py": SEARCH_SPACE,
        folder / "huber.yml": yaml.safe_dump(PRESET),
        facts / "METADATA": "Metadata-Version: 2.1\nName: huber-for-this-test\nVersion: 1.0\n",
        facts / "entry_points.txt": "[sb3_offline_ft.algorithms]\nhuber = huber_for_this_test:Huber\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_stock_command_trains_and_tunes_it(run_python: RunPython, package: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(package)}
    trained = run_python(*TRAIN, "--eval-freq", "60", **path)
    assert trained.returncode == 0, trained.stderr
    assert "huber_for_this_test/huber.yml" in trained.stdout
    assert (tmp_path / "work" / "logs" / "huber" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()

    study = ["--study-name", "study", "--storage", "study.log", "--n-trials", "1", "--n-evaluations", "2", "--no-optim-plots"]
    tuned = run_python(*TRAIN, "-optimize", *study, **path)
    assert tuned.returncode == 0, tuned.stderr
    (trial,) = load_study(str(tmp_path / "work" / "study.log")).trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert {"online_weight", "finetuning_learning_rate", "warmup_steps"} <= trial.params.keys()
    assert trial.user_attrs["pretrained"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "ModuleNotFoundError: No module named 'huber_for_this_test'"),
        ({"__init__.py": "1 / 0"}, "ZeroDivisionError: division by zero"),
        ({"__init__.py": ""}, "AttributeError: module 'huber_for_this_test' has no attribute 'Huber'"),
        (
            {"__init__.py": ALGORITHM, "search_space.py": ""},
            "AttributeError: module 'huber_for_this_test.search_space' has no attribute 'SEARCH_SPACE'",
        ),
    ],
)
def test_a_broken_one_is_named_and_takes_no_others_with_it(
    run_python: RunPython, package: Path, files: dict[str, str], found: str
) -> None:
    shutil.rmtree(package / "huber_for_this_test")
    for name, text in files.items():
        (package / "huber_for_this_test").mkdir(exist_ok=True)
        (package / "huber_for_this_test" / name).write_text(text)
    code = """
import argparse, rl_zoo3
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
print(*[type(ExperimentManager(argparse.Namespace(), algo, "Pendulum-v1", "logs")).__name__ for algo in ("td3c", "sac")])
print({"td3bc", "td3c", "rebrac"} <= rl_zoo3.ALGOS.keys() & HYPERPARAMS_SAMPLER.keys())
"""
    process = run_python("-c", code, PYTHONPATH=str(package))
    assert process.stdout.split() == ["OfflineExperimentManager", "ExperimentManager", "True"], process.stderr
    told = "The algorithm 'huber' of another package, huber_for_this_test:Huber, cannot be used"
    assert process.stderr.count(f"{told} ({found}): repair or uninstall huber-for-this-test.") == 1


def test_the_doctor_says_which_package_is_to_be_repaired(run_python: RunPython, package: Path) -> None:
    code = "from sb3_offline_ft.doctor import check_zoo\nfor c in check_zoo(): print(c.name, c.status, c.remedy)"
    reinstall = "pip install --force-reinstall --no-deps huber-for-this-test."
    (package / "huber_for_this_test" / "huber.yml").unlink()
    found = run_python("-c", code, PYTHONPATH=str(package)).stdout.splitlines()
    assert found == ["rl_zoo3 ok ", f"Presets problem {reinstall}"]
    shutil.rmtree(package / "huber_for_this_test")
    found = run_python("-c", code, PYTHONPATH=str(package)).stdout.splitlines()
    assert found == [f"rl_zoo3 problem {reinstall}", "Presets ok "]


def test_one_with_the_name_of_an_algorithm_of_the_zoo_leaves_that_alone(run_python: RunPython, package: Path) -> None:
    (package / "huber_for_this_test-1.0.dist-info" / "entry_points.txt").write_text(
        "[sb3_offline_ft.algorithms]\nsac = huber_for_this_test:Huber\n"
    )
    code = """
import argparse
from rl_zoo3.exp_manager import ALGOS, ExperimentManager
print(ALGOS["sac"].__name__, type(ExperimentManager(argparse.Namespace(), "sac", "Pendulum-v1", "logs")).__name__)
"""
    assert run_python("-c", code, PYTHONPATH=str(package)).stdout.split() == ["SAC", "ExperimentManager"]


def test_a_study_compares_it_with_others(run_python: RunPython, package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    methods = {"huber": {"algorithm": "huber", "hyperparams": {"online_weight": 0.1}}, "td3": {"algorithm": "td3"}}
    pretraining = {"algorithm": "huber", "hyperparams": {"offline_steps": 10}}
    study = STUDY | {"methods": methods, "pretraining": pretraining, "seeds": 1}
    (folder / "study.yml").write_text(yaml.safe_dump(study, sort_keys=False))
    process = run_python("-m", "sb3_offline_ft", "study", "run", str(folder), PYTHONPATH=str(package))
    assert process.returncode == 0, process.stdout + process.stderr
    manifests = [yaml.safe_load(path.read_text()) for path in folder.rglob("manifest.json")]
    assert len(manifests) == 2
    assert len(list((folder / "pretrained").glob("*.pt"))) == 1


def test_it_keeps_the_contract(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package)
    check_algorithm(importlib.import_module("huber_for_this_test").Huber, online_weight=0.5)


class Scaled(OfflineTD3):
    """TD3 with values divided by a running mean, which it keeps as arrays of its own rather than in a part."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.scale = 1.0

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> Any:
        if not (self._pretraining or self._finetuning):
            return super()._actor_loss(batch, actions, q_values)
        self.scale += 0.01 * (float(q_values.detach().abs().mean()) - self.scale)
        return -q_values.mean() / self.scale

    def _get_extra_state(self) -> dict[str, np.ndarray]:
        return super()._get_extra_state() | {"scale": np.array(self.scale)}

    def _set_extra_state(self, state: Mapping[str, np.ndarray]) -> None:
        super()._set_extra_state(state)
        self.scale = float(state.get("scale", 1.0))


def test_arrays_of_its_own_are_saved_and_restored(tmp_path: Path) -> None:
    model = Scaled("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", batch_size=8, device="cpu",
                   policy_kwargs={"net_arch": [8]})  # fmt: skip
    model.pretrain(10).save(tmp_path / "model")
    assert Scaled.load(tmp_path / "model").scale == (scale := model.scale) != 1.0
    for generators in (True, False):
        snapshot = LearnerSnapshot.take(model)
        model.pretrain(10)
        assert model.scale != scale
        snapshot.restore(model, generators=generators)
        assert model.scale == scale


@pytest.mark.parametrize("clause", ["resumed_pretraining", "resumed_finetuning", "snapshot", "exchange"])
def test_an_algorithm_with_arrays_of_its_own_keeps_the_contract(clause: str) -> None:
    CLAUSES[clause](Scaled)
