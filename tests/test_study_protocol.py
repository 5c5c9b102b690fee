"""The file of a study: what it means, what is refused, and which runs it asks for."""

import copy
import inspect
import json
import pickle
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_offline_ft.algorithms import ALGORITHMS, preset_path
from sb3_offline_ft.collapse import CollapseGuard
from sb3_offline_ft.common.checks import constructor_arguments
from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.study import Protocol, init_study
from sb3_offline_ft.study.design import identity
from sb3_offline_ft.study.design.factory import METHOD_KEYS
from sb3_offline_ft.study.design.identity import ALGORITHM_VERSIONS, RESULTS_VERSION
from sb3_offline_ft.study.design.init import DEFAULT_METHODS, next_steps
from sb3_offline_ft.study.design.learners import algorithm_class
from sb3_offline_ft.study.design.methods import preset
from sb3_offline_ft.study.design.protocol import KEYS, Cell
from sb3_offline_ft.study.tuning.plan import TuningPlan, TuningSettings
from sb3_offline_ft.td3c import TD3C
from tests.conftest import REPOSITORY

PENDULUM = "bundled:pendulum-medium"
LIKE_OTHERS = {"offline_fraction": 0.5, "gradient_steps": 1}
"""Otherwise in the preset of TD3C."""
STUDY: dict[str, Any] = {
    "name": "pendulum",
    "env": "Pendulum-v1",
    "datasets": {"medium": PENDULUM, "few": f"{PENDULUM}?episodes=5&seed=0"},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {}},
    "seeds": 2,
    "interactions": 6000,
    "evaluation": {"every": 500, "episodes": 3},
    "learner_evaluation": {"every": 1000, "episodes": 2},
    "hyperparams": {},
    "methods": {
        "scratch": {"algorithm": "td3", "start": "scratch"},
        "offline": {"frozen": True},
        "td3bc": {"algorithm": "td3bc"},
        "td3": {"algorithm": "td3"},
        "td3c": {"algorithm": "td3c", "hyperparams": LIKE_OTHERS},
        "td3c-guard": {"algorithm": "td3c", "hyperparams": LIKE_OTHERS, "guard": True},
    },
    "reference_method": "td3c",
}


UNIFORM = {"replay_buffer_kwargs": {"offline_sampling": "uniform"}}
PINNED = """
env: Pendulum-v1
datasets: {medium: bundled:pendulum-medium}
seeds: [3]
interactions: 2000
evaluation: {every: 500, episodes: 2}
learner_evaluation: {every: 500, episodes: 2}
presets:
  td3bc: {policy: MlpPolicy, offline_steps: 100, learning_rate: 1e-3, noise_type: normal, noise_std: 0.1}
  td3c: {policy: MlpPolicy, offline_steps: 100, warmup_steps: 1000, epsilon: 0.02}
methods:
  scratch: {algorithm: td3, start: scratch}
  offline: {frozen: true}
  td3c: {algorithm: td3c, guard: {tolerance: 0.2, random_return: -1300}}
hyperparams: {warmup_steps: 1000}
"""
PINNED_KEYS = {
    "no-data/scratch/seed3": "bb300cd222ccd83f",
    "medium/offline/seed3": "55e3516ff9bc1aea",
    "medium/td3c/seed3": "8579571d2592967a",
}


def edited(**changes: Any) -> dict[str, Any]:
    """The study with some values changed; ``a__b`` is key b in a, None removes a key."""
    study: dict[str, Any] = copy.deepcopy(STUDY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = study
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return study


def parse(study: dict[str, Any] | str, folder: Path = Path("/nowhere")) -> Protocol:
    return Protocol.parse(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False), folder / "study.yml")


def method(protocol: Protocol, name: str) -> Any:
    return next(each for each in protocol.methods if each.name == name)


def keys(protocol: Protocol) -> dict[str, str]:
    return {cell.name: protocol.cell_key(cell) for cell in protocol.cells()}


# init


def test_what_init_writes_is_a_study_of_all_methods(tmp_path: Path) -> None:
    file = init_study(tmp_path / "mine", env="Pendulum-v1", datasets=[PENDULUM], seeds=3, interactions=6000)
    protocol = Protocol.load(tmp_path / "mine")
    assert file == tmp_path / "mine" / "study.yml" and protocol.text == file.read_text()
    assert (protocol.name, protocol.env, protocol.seeds, protocol.interactions) == ("mine", "Pendulum-v1", (0, 1, 2), 6000)
    assert protocol.datasets == {"medium": PENDULUM}
    assert [each.name for each in protocol.methods] == list(DEFAULT_METHODS)
    assert protocol.reference_method == "td3c"
    assert len(protocol.cells()) == 3 * 6
    assert "18 runs" in next_steps(file) and f"sb3-offline-ft study run {tmp_path / 'mine'}" in next_steps(file)
    assert [path.name for path in file.parent.iterdir()] == ["study.yml"]


def test_init_takes_labels_seeds_methods_and_other_algorithms(tmp_path: Path) -> None:
    file = init_study(
        tmp_path / "mine",
        env="Pendulum-v1",
        datasets=[PENDULUM, f"{PENDULUM}?episodes=5&seed=0", f"best={PENDULUM}?top_fraction=0.25"],
        seeds=[4, 7],
        interactions=6000,
        methods=["td3", "rebrac", "sac"],
        name="yes: no",
    )
    protocol = Protocol.load(file)
    assert protocol.name == "yes: no"
    assert list(protocol.datasets) == ["medium", "medium-episodes5-seed0", "best"]
    assert protocol.seeds == (4, 7)
    assert [(each.algorithm, each.pretrained) for each in protocol.methods] == [
        ("td3", True),
        ("rebrac", True),
        ("sac", False),
    ]
    assert protocol.reference_method is None


def test_init_makes_the_warmup_of_a_short_run_short(tmp_path: Path) -> None:
    protocol = Protocol.load(init_study(tmp_path, env="Pendulum-v1", datasets=[PENDULUM], interactions=600))
    assert method(protocol, "td3c").hyperparams["warmup_steps"] == 100
    assert protocol.evaluation.every == 60


def test_init_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "study.yml").write_text("name: theirs\n")
    with pytest.raises(FileExistsError, match=r"There is a study already.*study\.yml.*or take another folder"):
        init_study(tmp_path, env="Pendulum-v1", datasets=[PENDULUM])
    assert (tmp_path / "study.yml").read_text() == "name: theirs\n"
    with pytest.raises(NotADirectoryError, match="is a file: choose another folder"):
        init_study(tmp_path / "study.yml", env="Pendulum-v1", datasets=[PENDULUM])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"env": "Pendulun-v1"}, ValueError, "`env` is 'Pendulun-v1'.*Pendulum"),
        ({"env": "no_such_module:Pendulum-v1"}, ValueError, "no_such_module"),
        ({"datasets": ["bundled:pendulum-expert"]}, FileNotFoundError, "datasets.expert.*bundled:pendulum-medium"),
        (
            {"datasets": {"medium": "bundled:hopper-medium"}},
            ValueError,
            "`datasets.medium`.*does not fit the env.*Hopper-v5",
        ),
        ({"datasets": [f"a={PENDULUM}", f"a={PENDULUM}?episodes=3"]}, ValueError, "Two datasets are called 'a'"),
        ({"datasets": []}, ValueError, "`datasets` must have at least one dataset"),
        ({"seeds": 0}, ValueError, "`seeds` must be a whole number of at least 1, found 0"),
        ({"seeds": [1, 1]}, ValueError, "`seeds` must be .* different ones"),
        ({"interactions": 0}, ValueError, "`interactions` must be a whole number of at least 1"),
        ({"methods": ["td3c-gaurd"]}, ValueError, "Unknown method 'td3c-gaurd'. Did you mean 'td3c-guard'"),
    ],
)
def test_init_refuses_what_cannot_run_and_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"env": "Pendulum-v1", "datasets": [PENDULUM], "interactions": 6000} | arguments
    with pytest.raises(error, match=message):
        init_study(tmp_path / "mine", **arguments)
    assert list(tmp_path.iterdir()) == []


# What a file means


def test_cells_come_seed_by_seed_and_cover_all_methods_early() -> None:
    names = [cell.name for cell in parse(edited()).cells()]
    with_data = list(STUDY["methods"])[1:]
    first = ["no-data/scratch/seed0", *(f"{data}/{name}/seed0" for data in ("medium", "few") for name in with_data)]
    assert names == first + [name.replace("seed0", "seed1") for name in first]


@pytest.mark.parametrize(("env", "entry"), [("Hopper-v5", "Hopper-v5"), ("Acrobot-v1", "default")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_presets_are_those_of_the_zoo_without_what_is_no_argument(algorithm: str, env: str, entry: str) -> None:
    expected = yaml.safe_load(Path(preset_path(algorithm)).read_text())[entry]
    hyperparams, callbacks = preset(algorithm, env)
    assert hyperparams == {key: value for key, value in expected.items() if key not in ("n_timesteps", "dataset", "callback")}
    written = dict(next(iter(each.items())) if isinstance(each, dict) else (each, {}) for each in expected["callback"])
    kinds = {"guard": "CollapseGuard", "champion": "ChampionChallenger"}
    assert callbacks == {kind: written.get(f"sb3_offline_ft.{name}", {}) for kind, name in kinds.items()}
    assert any(callbacks.values()) == (entry == "Hopper-v5")


def test_hyperparams_are_preset_then_study_then_method() -> None:
    study = edited(
        hyperparams={"warmup_steps": 700, "tau": 0.01, "epsilon": 0.5, "gamma": 0.9},
        pretraining={"algorithm": "td3bc", "hyperparams": {"gamma": 0.95, "policy_kwargs": {"net_arch": [32]}}},
        methods__td3={"algorithm": "td3", "hyperparams": {"tau": 0.02, "learning_rate": 1e-4}},
    )
    protocol = parse(study)
    td3, td3c = method(protocol, "td3").hyperparams, method(protocol, "td3c").hyperparams
    of_preset, _ = preset("td3bc", "Pendulum-v1")
    assert (td3["warmup_steps"], td3["tau"], td3["learning_rate"], td3["gamma"]) == (700, 0.02, 1e-4, 0.9)
    assert td3["batch_size"] == of_preset["batch_size"] and td3["noise_std"] == of_preset["noise_std"]
    assert "alpha" not in td3 and "online_bc" not in td3 and "epsilon" not in td3
    assert (td3c["epsilon"], td3c["tau"], td3c["constraint_reference"]) == (0.5, 0.01, "best")
    pretraining = method(protocol, "td3c").pretraining_hyperparams
    assert pretraining == protocol.pretraining.hyperparams
    assert (pretraining["gamma"], pretraining["tau"], pretraining["alpha"]) == (0.95, 0.01, 2.5)
    # Networks are the same everywhere, from scratch too
    assert all(each.hyperparams["policy_kwargs"] == {"net_arch": [32]} for each in protocol.methods)


def test_a_study_keeps_the_presets_that_it_was_written_with(tmp_path: Path) -> None:
    file = init_study(tmp_path, env="Pendulum-v1", datasets=[PENDULUM], interactions=6000)
    written = Protocol.load(file)
    study = yaml.safe_load(written.text)
    assert list(study["presets"]) == ["td3bc", "td3c"]
    without = parse({name: value for name, value in study.items() if name != "presets"})
    assert keys(without) == keys(written)
    study["presets"]["td3c"] |= {"epsilon": 0.25, "guard": {"random_return": -1000, "tolerance": 0.3}}
    study["presets"]["td3bc"] = {"policy": "MlpPolicy", "offline_steps": 7, "tau": 0.5}
    study["methods"]["rebrac"] = {"algorithm": "rebrac"}
    changed = parse(study)
    assert method(changed, "td3c").hyperparams["epsilon"] == 0.25
    assert method(changed, "td3c-guard").guard == {"random_return": -1000, "tolerance": 0.3}
    assert method(changed, "td3").hyperparams == {"policy": "MlpPolicy", "offline_steps": 7, "tau": 0.5}
    assert changed.pretraining.hyperparams == {"policy": "MlpPolicy", "offline_steps": 7, "tau": 0.5}
    assert method(changed, "rebrac").hyperparams["critic_bc_coef"] == preset("rebrac", "Pendulum-v1")[0]["critic_bc_coef"]


def test_methods_go_on_with_the_networks_of_rebrac() -> None:
    protocol = parse(edited(env="Hopper-v5", pretraining__algorithm="rebrac"))
    for name in ("td3", "td3c", "scratch"):
        assert method(protocol, name).hyperparams["policy_kwargs"] == {"net_arch": [256, 256, 256], "actor_value": "min"}
    assert method(protocol, "td3").hyperparams["batch_size"] == 1024
    assert method(protocol, "offline").algorithm == "rebrac"


def test_numbers_in_scientific_notation_are_numbers() -> None:
    text = yaml.safe_dump(edited()) + "random_return: -1.3e3\n"
    text = text.replace(
        "hyperparams: {}\ninteractions: 6000", "hyperparams: {learning_rate: 1e-3, tau: 5E-3}\ninteractions: 6e3"
    )
    protocol = parse(text)
    assert protocol.interactions == 6000 and isinstance(protocol.interactions, int)
    assert method(protocol, "td3").hyperparams["learning_rate"] == 1e-3 and protocol.random_return == -1300
    assert method(protocol, "td3").hyperparams["tau"] == 5e-3


def test_guards_have_the_arguments_of_the_preset_and_their_own() -> None:
    study = edited(methods__mine={"algorithm": "td3", "guard": {"tolerance": 0.2, "detector": {"cusum": {"drift": 0.25}}}})
    protocol = parse(study)
    assert method(protocol, "td3c").guard is None
    assert method(protocol, "td3c-guard").guard == {"random_return": -1309}
    assert method(protocol, "mine").guard == {
        "random_return": -1309,
        "tolerance": 0.2,
        "detector": {"cusum": {"drift": 0.25}},
    }
    assert method(parse(study | {"random_return": -1200}), "mine").guard["random_return"] == -1200
    CollapseGuard(**method(protocol, "mine").guard)


def test_a_preset_may_have_a_champion_and_no_guard() -> None:
    presets = {
        "td3bc": {"policy": "MlpPolicy", "offline_steps": 7, "guard": {"random_return": -1310}},
        "td3c": {"policy": "MlpPolicy", "epsilon": 0.3, "champion": {"random_return": -1300, "worst_return": -1900}},
    }
    champions = {f"{name}-champion": {"algorithm": name, "champion": True} for name in ("td3c", "td3")}
    protocol = parse(edited(presets=presets, methods=STUDY["methods"] | champions))
    plain, guarded, champion = (method(protocol, name) for name in ("td3c", "td3c-guard", "td3c-champion"))
    assert plain.callbacks == {} and plain.hyperparams["epsilon"] == 0.3
    assert guarded.callbacks == {"guard": {"random_return": -1310}}
    assert champion.callbacks == {"champion": presets["td3c"]["champion"]}
    # TD3 goes on with the preset of the pretraining, which has none
    assert method(protocol, "td3-champion").callbacks == {"champion": {"random_return": -1309}}


def test_who_learns_from_evaluations() -> None:
    study = edited(methods__near={"algorithm": "td3c", "hyperparams": {"constraint_reference": "pretrained"}})
    learning = {each.name for each in parse(study).methods if each.learns_from_evaluations}
    assert learning == {"td3c", "td3c-guard"}


def test_defaults_are_those_of_the_methods_own_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = inspect.signature(TD3C.__init__)
    changed = [one.replace(default=7_000) if one.name == "warmup_steps" else one for one in shown.parameters.values()]
    monkeypatch.setattr(TD3C.__init__, "__signature__", shown.replace(parameters=changed))
    # The preset would say it
    study = edited(
        presets={name: {"offline_steps": 10} for name in ("td3c", "td3bc")},
        methods={"td3": {"algorithm": "td3"}, "td3c": {"algorithm": "td3c"}},
    )
    with pytest.raises(ValueError, match=r"methods\.td3c.* has 7,000 warm-up steps"):
        parse(study)
    longer = parse(study | {"interactions": 9_000})
    assert TuningPlan(TuningSettings(Path("/nowhere"), algo="td3c"), longer).frozen_until({}) == 7_000


def test_random_return_is_given_or_known_of_the_environment() -> None:
    assert parse(edited()).random_return == -1309.0
    assert parse(edited(random_return=-1000)).random_return == -1000.0
    assert (
        parse(
            edited(
                env="Acrobot-v1",
                datasets=None,
                methods={"dqn": {"algorithm": "dqn", "start": "scratch"}},
                reference_method=None,
            )
        ).random_return
        is None
    )


def test_protocols_and_cells_can_be_sent_to_other_processes_and_be_keys() -> None:
    protocol = parse(edited(factors={"offline_fraction": [0, 0.25]}))
    before = keys(protocol)
    sent: Protocol = pickle.loads(pickle.dumps(protocol))
    assert sent.cells() == protocol.cells() and keys(sent) == before
    assert len({cell: None for cell in [*protocol.cells(), *sent.cells()]}) == len(protocol.cells())


# Factors


def test_factors_vary_one_at_a_time_by_default() -> None:
    factors = {"offline_fraction": [0, 0.25, 0.5, "lin_0.5_0.0"], "ensemble_size": [2, 5]}
    protocol = parse(edited(factors=factors))
    td3c = [each for each in protocol.methods if each.base == "td3c"]
    # 0.5 and 2 are what the method has anyway
    assert [each.name for each in td3c] == [
        "td3c",
        "td3c+offline_fraction=0",
        "td3c+offline_fraction=0.25",
        "td3c+offline_fraction=lin_0.5_0.0",
        "td3c+ensemble_size=5",
    ]
    assert [each.variant for each in td3c][2:] == [
        {"offline_fraction": 0.25},
        {"offline_fraction": "lin_0.5_0.0"},
        {"ensemble_size": 5},
    ]
    assert [each.hyperparams["offline_fraction"] for each in td3c] == [0.5, 0, 0.25, "lin_0.5_0.0", 0.5]
    assert td3c[-1].label == "td3c, ensemble_size 5"
    assert [each.name for each in protocol.methods if each.base in ("scratch", "offline")] == ["scratch", "offline"]
    assert len(protocol.methods) == 2 + 4 * 5


def test_factors_can_be_combined() -> None:
    factors = {"offline_fraction": [0, 0.25], "ensemble_size": [5, 10]}
    protocol = parse(edited(factors=factors, factors_combined=True))
    names = [each.name for each in protocol.methods if each.base == "td3"]
    grid = [f"td3+offline_fraction={share}+ensemble_size={size}" for share in (0, 0.25) for size in (5, 10)]
    assert names == ["td3", *grid]


def test_a_factor_acts_where_its_hyperparameter_does() -> None:
    factors = {
        "ensemble_size": [5],
        "offline_fraction": [0.25],
        "gamma": [0.9],
        "finetuning_learning_rate": [1e-5],
        "replay_buffer_kwargs.offline_sampling": ["balanced"],
        "epsilon": [0.1],
    }
    protocol = parse(edited(factors=factors, hyperparams={"policy_kwargs": {"net_arch": [32]}}))
    variants = {next(iter(each.variant)): each for each in protocol.methods if each.base == "td3c" and each.variant}
    plain = method(protocol, "td3c")
    changed = {
        name: (
            {key for key, value in each.hyperparams.items() if plain.hyperparams.get(key) != value},
            {key for key, value in each.pretraining_hyperparams.items() if plain.pretraining_hyperparams.get(key) != value},
        )
        for name, each in variants.items()
    }
    assert changed == {
        "ensemble_size": ({"policy_kwargs"}, {"policy_kwargs"}),
        "offline_fraction": ({"offline_fraction"}, set()),
        "gamma": ({"gamma"}, {"gamma"}),
        "finetuning_learning_rate": ({"learning_rate"}, set()),
        "replay_buffer_kwargs.offline_sampling": ({"replay_buffer_kwargs"}, {"replay_buffer_kwargs"}),
        "epsilon": ({"epsilon"}, set()),
    }
    assert variants["ensemble_size"].hyperparams["policy_kwargs"] == {"net_arch": [32], "n_critics": 5}
    assert variants["replay_buffer_kwargs.offline_sampling"].hyperparams["replay_buffer_kwargs"] == {
        "offline_sampling": "balanced"
    }
    assert {each.base for each in protocol.methods if "epsilon" in each.variant} == {"td3c", "td3c-guard"}


def test_a_default_within_a_mapping_makes_no_variant() -> None:
    factors = {"replay_buffer_kwargs.offline_sampling": ["uniform", "balanced"]}
    protocol = parse(edited(factors=factors))
    assert [each.name for each in protocol.methods if each.base == "td3"] == [
        "td3",
        "td3+replay_buffer_kwargs.offline_sampling=balanced",
    ]
    # It changes no keys
    listed = parse(edited(methods__td3={"algorithm": "td3", "hyperparams": UNIFORM}))
    assert method(listed, "td3").hyperparams["replay_buffer_kwargs"] == UNIFORM["replay_buffer_kwargs"]
    assert keys(listed)["medium/td3/seed0"] != keys(parse(edited()))["medium/td3/seed0"]


# Which runs are the same


def test_names_labels_order_and_other_cells_do_not_matter() -> None:
    before = keys(parse(edited()))
    study = edited(name="other", seeds=[1, 5], datasets={"all": PENDULUM}, reference_method=None)
    study["methods"] = {f"{name}-2": entry | {"label": name.upper()} for name, entry in reversed(study["methods"].items())}
    after = keys(parse(study, Path("/elsewhere")))
    same = {
        "no-data/scratch-2/seed1": "no-data/scratch/seed1",
        **{f"all/{name}-2/seed1": f"medium/{name}/seed1" for name in list(STUDY["methods"])[1:]},
    }
    assert {name: after[name] for name in same} == {name: before[old] for name, old in same.items()}
    assert len(set(before.values())) == len(before) and all(len(key) == 16 for key in before.values())


def test_values_that_mean_the_same_are_the_same() -> None:
    written_out = {
        "gradient_steps": 1.0,
        "buffer_size": 1e6,
        "guide_steps": 0,
        "adaptive_bc_gains": [7.5e-5, 2.5e-4],
        "policy_kwargs": {"n_critics": 2},
    }
    assert keys(parse(edited(hyperparams=written_out))) == keys(parse(edited()))


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"interactions": 7000}, STUDY["methods"]),
        ({"evaluation__episodes": 4}, STUDY["methods"]),
        ({"learner_evaluation__every": 500}, {"td3c", "td3c-guard"}),
        ({"pretraining__hyperparams__alpha": 1.0}, {"offline", "td3bc", "td3", "td3c", "td3c-guard"}),
        ({"hyperparams__warmup_steps": 500}, {"td3bc", "td3", "td3c", "td3c-guard"}),
        ({"hyperparams__epsilon": 0.02}, {"td3c", "td3c-guard"}),
        ({"hyperparams__batch_size": 100}, STUDY["methods"]),
        ({"hyperparams__noise_std": 0.2}, {"scratch", "td3bc", "td3", "td3c", "td3c-guard"}),
        ({"methods__td3": {"algorithm": "td3", "hyperparams": {"tau": 0.1}}}, {"td3"}),
        ({"random_return": -1000}, {"td3c-guard"}),
        ({"datasets": {"medium": f"{PENDULUM}?top_fraction=0.5"}}, {"offline", "td3bc", "td3", "td3c", "td3c-guard"}),
    ],
)
def test_what_a_result_depends_on_makes_another_run_and_only_that(changes: dict[str, Any], changed: set[str]) -> None:
    before, after = (
        keys(parse(edited(datasets={"medium": PENDULUM}))),
        keys(parse(edited(**{"datasets": {"medium": PENDULUM}} | changes))),
    )
    assert before.keys() == after.keys()
    assert {name.split("/")[1] for name in before if before[name] != after[name]} == set(changed)


OF_ALL = {
    "learning_rate": 3e-4, "buffer_size": 1_000_000, "learning_starts": 100, "batch_size": 256, "tau": 0.005, "gamma": 0.99,
    "train_freq": 1, "gradient_steps": 1, "action_noise": None, "replay_buffer_class": None, "replay_buffer_kwargs": None,
    "optimize_memory_usage": False, "n_steps": 1, "policy_delay": 2, "target_policy_noise": 0.2, "target_noise_clip": 0.5,
    "policy_kwargs": None, "offline_steps": 0, "offline_fraction": 0.5, "warmup_steps": 2000, "warmup_action_noise": False,
    "critic_warmup_steps": 0, "reset_optimizers": True, "normalize_observations": True, "kernel": "auto",
    "update_precision": "float32", "guide_policy": None, "guide_steps": 0, "policy_averaging": 0.0,
}  # fmt: skip
OF_TD3BC = {
    "alpha": 2.5, "online_bc": 1.0, "adaptive_bc_target": 1.05, "adaptive_bc_gains": (7.5e-5, 2.5e-4),
    "adaptive_bc_returns": None,
}  # fmt: skip
OF_TD3C = {
    "policy_averaging": 0.99,
    "alpha": 2.5, "constraint_reference": "best", "epsilon": 1e-3, "initial_multiplier": 1.0, "multiplier_learning_rate": 1e-2,
    "min_multiplier": 1e-3, "max_multiplier": 1e3, "trust_region": 2.0, "critic_penalty": 0.0,
}  # fmt: skip
OF_REBRAC = {"actor_bc_coef": 0.01, "critic_bc_coef": 0.01, "online_actor_bc": "lin_1.0_0.5", "online_critic_bc": 0.0}


@pytest.mark.parametrize(("algorithm", "own"), [("td3", {}), ("td3bc", OF_TD3BC), ("td3c", OF_TD3C), ("rebrac", OF_REBRAC)])
def test_defaults_are_those_of_this_version_of_results(algorithm: str, own: dict[str, Any]) -> None:
    """Facts leave defaults out. Whoever changes one raises a version; new arguments need not be here."""
    assert (RESULTS_VERSION, ALGORITHM_VERSIONS) == (2, {})
    defaults = constructor_arguments(algorithm_class(algorithm))
    expected = OF_ALL | own
    assert {name: defaults[name] for name in expected} == expected


def test_a_version_of_an_algorithm_changes_its_own_cells_only(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = parse(edited())
    before = keys(protocol)
    monkeypatch.setattr(identity, "ALGORITHM_VERSIONS", {TD3C: 2})
    after = keys(parse(edited()))
    changed = {cell.name for cell in protocol.cells() if cell.method.algorithm == "td3c" and not cell.method.frozen}
    assert changed and {name for name in before if before[name] != after[name]} == changed


def test_keys_stay_what_they_are() -> None:
    protocol = Protocol.parse(PINNED, Path("/nowhere/study.yml"))
    assert {cell.name: protocol.cell_key(cell) for cell in protocol.cells()} == PINNED_KEYS


@pytest.mark.parametrize("name", ["hopper", "pendulum"])
def test_archived_runs_are_those_of_the_committed_studies(name: str) -> None:
    folder = REPOSITORY / "benchmarks" / "studies" / name
    with tarfile.open(folder / "runs.tar.xz") as archive:
        manifests = [archive.extractfile(member) for member in archive if member.name.endswith("/manifest.json")]
        kept = {facts["name"]: facts["key"] for file in manifests if file is not None and (facts := json.load(file))}
    assert kept and kept.items() <= keys(Protocol.load(folder)).items()


def test_equal_data_is_the_same_wherever_it_is(tmp_path: Path) -> None:
    data = load_dataset(PENDULUM)
    columns = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    found = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        np.savez(folder / "data.npz", **{name: getattr(data, name) for name in columns})
        found.append(keys(parse(edited(datasets={"medium": "data.npz"}), folder)))
    assert found[0] == found[1] == keys(parse(edited(datasets={"medium": PENDULUM})))


def test_keys_need_no_data_where_facts_about_it_are_remembered(tmp_path: Path) -> None:
    data = load_dataset(PENDULUM)
    columns = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    np.savez(tmp_path / "data.npz", **{name: getattr(data, name) for name in columns})
    study = edited(datasets={"medium": "data.npz"})
    here = parse(study, tmp_path)
    expected, facts = keys(here), {"medium": here.data_facts("medium")}
    shutil.move(tmp_path / "data.npz", tmp_path / "gone.npz")
    there = parse(study, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"datasets.medium.*data.npz"):
        there.cell_key(there.cells()[-1])
    there.remember_data(facts)
    assert keys(there) == expected
    # Another spec is other data, of which nothing is known
    changed = parse(edited(datasets={"medium": "data.npz?episodes=3"}), tmp_path / "other")
    changed.remember_data(facts)
    with pytest.raises(FileNotFoundError):
        keys(changed)


# Data


def test_paths_beside_the_file_are_found_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study").mkdir()
    data = load_dataset(PENDULUM)
    columns = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    for name in ("one.npz", "two.npz"):
        np.savez(tmp_path / "study" / name, **{column: getattr(data, column) for column in columns})
    monkeypatch.chdir(tmp_path)
    specs = {
        "one": "one.npz",
        "dotted": "./one.npz?episodes=4&seed=1",
        "both": f"0.25*one.npz?top_fraction=0.5 + 0.75*two.npz + 1*{PENDULUM}",
        "listed": [{"spec": "one.npz", "weight": 0.25, "episodes": 3}, {"spec": "two.npz", "weight": 0.75}],
        "narrowed": f"{PENDULUM}?min_return=-700&max_return=-450",
    }
    protocol = parse(edited(datasets=specs), tmp_path / "study")
    folder = tmp_path / "study"
    assert protocol.datasets == {
        "one": f"{folder}/one.npz",
        "dotted": f"{folder}/one.npz?episodes=4&seed=1",
        "both": f"0.25*{folder}/one.npz?top_fraction=0.5 + 0.75*{folder}/two.npz + 1*{PENDULUM}",
        "listed": f"0.25*{folder}/one.npz?episodes=3 + 0.75*{folder}/two.npz",
        "narrowed": specs["narrowed"],
    }
    assert protocol.specs["both"] == specs["both"]
    assert protocol.dataset("dotted").n_episodes == 4 and protocol.dataset("dotted") is protocol.dataset("dotted")
    assert [round(part.weight or 0, 3) for part in protocol.dataset("both").sources] == [0.125, 0.375, 0.5]
    assert protocol.dataset("narrowed").episode_returns.min() >= -700
    file = init_study(tmp_path / "made", env="Pendulum-v1", datasets={"a": "study/one.npz?episodes=3"}, interactions=6000)
    moved = shutil.move(tmp_path, tmp_path.with_name("moved"))
    protocol = Protocol.load(Path(moved) / "made" / file.name)
    # Both were moved, and nobody is where they were
    assert protocol.specs == {"a": "../study/one.npz?episodes=3"} and protocol.dataset("a").n_episodes == 3


def test_init_keeps_absolute_paths_and_finds_relative_ones_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(PENDULUM)
    columns = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    np.savez(tmp_path / "data.npz", **{column: getattr(data, column) for column in columns})
    monkeypatch.chdir(tmp_path)
    file = init_study(
        "link", env="Pendulum-v1", datasets={"a": "data.npz", "b": f"{tmp_path}/data.npz", "c": PENDULUM}, interactions=6000
    )
    protocol = Protocol.load(file)
    assert protocol.specs == {"a": "../../data.npz", "b": f"{tmp_path}/data.npz", "c": PENDULUM}
    assert len(protocol.dataset("a")) == len(data)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": None}, "`env` is missing"),
        ({"env": "Pendulum-v7"}, "`env` is 'Pendulum-v7'"),
        ({"datasets": ["a"]}, "`datasets` must be a mapping"),
        ({"datasets": {"a/b": PENDULUM}}, "`datasets.a/b` must be a label"),
        ({"datasets": {"a": f"{PENDULUM}?epsodes=3"}}, "`datasets.a` is no dataset.*Did you mean 'episodes'"),
        ({"datasets": {1: PENDULUM}}, r"`datasets.1` must be text, found 1: put it in quotes"),
        ({"datasets": {"no-data": PENDULUM}}, "`datasets.no-data` must be a label"),
        ({"datasets": {}}, "`datasets` must have at least one dataset"),
        ({"pretraining": {"algorithm": "tdbc"}}, "`pretraining.algorithm` is 'tdbc'.*'td3bc'"),
        ({"pretraining": {"algorithm": "sac"}}, "`pretraining.algorithm` is 'sac', which is no algorithm that pretrains"),
        ({"pretraining__hyperparams__offline_steps": 0}, "`pretraining.hyperparams.offline_steps` must be .* at least 1"),
        ({"pretraining__hyperparams__warmup_steps": 5}, "warmup_steps` does not act before the first interaction"),
        ({"pretraining__hyperparams__dataset": "x"}, "pretraining.hyperparams.dataset`.*use `datasets` of the study"),
        ({"seeds": -1}, "`seeds` must be a whole number of at least 1, found -1"),
        ({"seeds": []}, "`seeds` must be a number of seeds"),
        ({"seeds": [0, -1]}, r"`seeds\[1\]` must be a whole number of at least 0"),
        ({"interactions": "many"}, "`interactions` must be a whole number"),
        ({"evaluation__every": 6001}, "`evaluation.every` must be at most `interactions`, which are 6,000, found 6,001"),
        ({"evaluation__episodes": 0}, "`evaluation.episodes` must be a whole number of at least 1"),
        ({"learner_evaluation": 5}, "`learner_evaluation` must be a mapping"),
        ({"random_return": "low"}, "`random_return` must be a finite number, found 'low'"),
        ({"hyperparams__warmup_step": 5}, "`hyperparams.warmup_step` is no known argument of .*TD3C.* 'warmup_steps'"),
        ({"hyperparams__n_timesteps": 5}, "use `interactions` of the study"),
        ({"hyperparams__warmup_steps": 6000}, "6,000 warm-up steps.*6,000: nothing would be learned"),
        ({"hyperparams__guide_policy": "a.zip"}, "`hyperparams.guide_policy` must be 'pretrained'"),
        ({"hyperparams__noise_type": "pink"}, "`hyperparams.noise_type` must be one of 'normal'"),
        ({"hyperparams__policy_kwargs": "dict(n_critics=2)"}, "`hyperparams.policy_kwargs` must be a mapping"),
        ({"methods": {}}, "`methods` must have at least one method"),
        ({"methods__x": {"algorithm": "td3", "guard": {"tolerence": 0.1}}}, "`methods.x.guard.tolerence`.*'tolerance'"),
        (
            {"methods__x": {"algorithm": "td3", "guard": {"tolerance": 2}}},
            "`methods.x.guard` is not possible: `tolerance` must",
        ),
        ({"methods__x": {"algorithm": "td3", "guard": {"path": "."}}}, "`methods.x.guard.path` is set by the study"),
        ({"methods__x": {"algorithm": "td3", "guard": {"baseline": "evaluations"}}}, "must be 'warmup' or a list"),
        ({"methods__x": {"algorithm": "td3", "start": "scratch", "guard": True}}, "`methods.x.guard.baseline` must be a list"),
        ({"methods__x": {"algorithm": "ppo", "start": "scratch", "guard": True}}, "needs an off-policy algorithm"),
        ({"methods__x": {"algorithm": "td3", "guard": "yes"}}, "`methods.x.guard` must be a mapping"),
        ({"methods__x": {"algorithm": "tdc3"}}, "`methods.x.algorithm` is 'tdc3'.*'td3c'"),
        ({"methods__x": {"algorithm": "sac"}}, "`methods.x.algorithm` is sac, which cannot start.*`start: scratch`"),
        ({"methods__x": {"start": "scratch"}}, "`methods.x.algorithm` is missing"),
        ({"methods__x": {"start": "cold"}}, "`methods.x.start` must be pretrained or scratch, found 'cold'"),
        ({"methods__x": {"frozen": "yes"}}, "`methods.x.frozen` must be true or false"),
        ({"methods__x": {"frozen": True, "algorithm": "td3"}}, "`methods.x.frozen` is for the pretrained policy as it is"),
        ({"methods__x": {"frozen": True, "guard": True}}, "`methods.x.guard` has nothing to do"),
        ({"methods__x": {"frozen": True, "hyperparams": {"tau": 0.1}}}, "`methods.x.hyperparams` have no effect"),
        (
            {"methods__x": {"algorithm": "td3", "hyperparams": {"alpha": 1}}},
            "`methods.x.hyperparams.alpha` is no known argument of",
        ),
        (
            {"methods__x": {"algorithm": "td3", "hyperparams": {"policy_kwargs": {}}}},
            "cannot be another one than in the pretraining",
        ),
        (
            {"methods__x": {"algorithm": "td3", "start": "scratch", "hyperparams": {"warmup_steps": 5}}},
            "has no effect from scratch",
        ),
        (
            {"methods__x": {"algorithm": "sac", "start": "scratch", "hyperparams": {"ent_coeff": 1}}},
            "of SAC. Did you mean 'ent_coef'",
        ),
        ({"methods__x": {"algorithm": "td3"}}, "`methods.x` is the same as methods.td3"),
        (
            {"hyperparams__replay_buffer_kwargs": {}, "methods__x": {"algorithm": "td3", "hyperparams": UNIFORM}},
            "`methods.x` is the same as methods.td3",
        ),
        ({"methods__td3__label": "td3c"}, "`methods.td3c.label` makes 'td3c', as methods.td3 does: give each a label"),
        (
            {
                "methods__x": {"algorithm": "td3", "label": "td3, tau 0.1", "hyperparams": {"gamma": 0.9}},
                "factors": {"tau": [0.1]},
            },
            "`methods.x.label` makes 'td3, tau 0.1', as methods.td3 does",
        ),
        (
            {"methods__" + "x" * 151: {"algorithm": "td3", "hyperparams": {"tau": 0.1}}},
            "has 151 characters.* choose a shorter",
        ),
        (
            {"factors": {"policy_kwargs.net_arch": [[16] * 40]}},
            r"`factors` makes the name td3c-guard\+policy_.*\.\.\., which has 153 characters.*at most 150, make a method",
        ),
        (
            {"factors": {"train_freq": [[2, "step"], "2, step"]}},
            r"`factors` has the values \[\[2, 'step'\]\] and \['2, step'\], which both make td3bc\+train_freq=2_step: leave",
        ),
        ({"datasets": {"a" * 81: PENDULUM}}, "must have at most 80 characters, as folders are called so, found 81"),
        ({"methods__a+b": {"algorithm": "td3"}}, r"`methods.a\+b` must be a name of letters"),
        ({"factors": {"offline_fractoin": [0]}}, "`factors.offline_fractoin` is an argument of no method.*'offline_fraction'"),
        ({"factors": {"offline_fraction": 0.5}}, "`factors.offline_fraction` must be a list of values, found 0.5"),
        ({"factors": {"offline_fraction": [0.5, 0.5]}}, "`factors.offline_fraction` has a value twice"),
        ({"factors": {"warmup_steps": [9000]}}, "9,000 warm-up steps"),
        ({"factors": {"finetuning_policy_kwargs.n_critics": [9]}}, "use 'policy_kwargs.n_critics', which varies both"),
        ({"presets": {"td3": {}}}, "`presets.td3` is of no algorithm that has one.*'td3c'"),
        ({"presets": {"td3c": {"epsilom": 1}}}, "`presets.td3c.epsilom` is no known argument of TD3C.*'epsilon'"),
        ({"presets": {"td3c": {"guard": {"tolerence": 1}}}}, "`presets.td3c.guard.tolerence`.*'tolerance'"),
        ({"factors_combined": "yes"}, "`factors_combined` must be true or false"),
        ({"reference_method": "tdc3"}, "`reference_method` is 'tdc3', which is no method of the study. Did you mean .*'td3c'"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(edited(**changes))
    assert str(caught.value).startswith("/nowhere/study.yml: ")
    assert "\n" not in str(caught.value)


def _typos() -> st.SearchStrategy[tuple[tuple[str, ...], str, str]]:
    places: dict[tuple[str, ...], tuple[str, ...]] = {
        (): KEYS,
        ("evaluation",): ("every", "episodes"),
        ("pretraining",): ("algorithm", "hyperparams"),
        ("methods", "td3c"): METHOD_KEYS,
        ("methods", "td3c", "hyperparams"): ("epsilon", "warmup_steps", "offline_fraction", "constraint_reference", "gamma"),
        ("methods", "td3c-guard", "guard"): ("tolerance", "false_alarm_rate", "remedies", "max_rollbacks"),
    }
    letters = st.sampled_from("abcdefghijklmnopqrstuvwxyz_-")

    def change(draw: Callable[..., Any]) -> tuple[tuple[str, ...], str, str]:
        place = draw(st.sampled_from(list(places)))
        key = draw(st.sampled_from([name for name in places[place] if len(name) > 3]))
        at, letter = draw(st.integers(0, len(key) - 2)), draw(letters)
        typo = draw(
            st.sampled_from(
                [
                    key[:at] + key[at + 1 :],
                    key[:at] + letter + key[at:],
                    key[:at] + key[at + 1] + key[at] + key[at + 2 :],
                    key.upper(),
                    key.replace("_", "-"),
                ]
            )
        )
        return place, key, typo

    return st.composite(change)().filter(lambda found: found[2] not in places[found[0]])


@settings(max_examples=60, deadline=None)
@given(_typos())
def test_any_typo_of_a_key_is_refused_with_that_key(found: tuple[tuple[str, ...], str, str]) -> None:
    place, key, typo = found
    study = edited()
    inner: Any = study
    for name in place:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    inner[typo] = inner.pop(key, 1)
    with pytest.raises(ValueError, match="no known") as caught:
        parse(study)
    path = ".".join((*place, typo))
    assert f"`{path}`" in str(caught.value) and f"'{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nenv: b\nname: c\n", "line 3: the key 'name' is given twice"),
        ("methods:\n  td3: {algorithm: td3}\n  td3: {algorithm: td3c}\n", "line 3: the key 'td3' is given twice"),
        ("name: [", "line 1: "),
        ("- name\n", "`study` must be a mapping"),
        ("", "`env` is missing"),
    ],
)
def test_what_is_no_study_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_folder_without_a_study_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no study in .*study.yml.*study init"):
        Protocol.load(tmp_path)
    (tmp_path / "study.yml").write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        Protocol.load(tmp_path / "study.yml")


# What is found out before a run


def test_a_sound_study_passes_the_check() -> None:
    parse(edited(factors={"ensemble_size": [5]}, methods__sac={"algorithm": "sac", "start": "scratch"})).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyperparams__offline_fraction": 2.0}, "`methods.td3bc` is not possible with td3bc: `offline_fraction` must be in"),
        ({"pretraining__hyperparams__alpha": -1}, "`pretraining` is not possible with td3bc: `alpha`"),
        ({"pretraining__hyperparams__policy_kwargs": {"n_critic": 3}}, "`.*` is not possible with .*: .*n_critic"),
        ({"factors": {"epsilon": ["lin_a"]}}, r"`methods.td3c\+epsilon=lin_a` is not possible with td3c: `epsilon`"),
        ({"methods__dqn": {"algorithm": "dqn", "start": "scratch"}}, "`methods.dqn` is not possible with dqn: .*Discrete"),
    ],
)
def test_hyperparameters_that_are_not_possible_are_found_before_a_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(edited(**changes)).check()


@pytest.fixture
def other_pendulum() -> Iterator[str]:
    """An environment that is registered by a module only."""
    module = types.ModuleType("module_with_pendulum")
    sys.modules[module.__name__] = module
    gym.register("OtherPendulum-v3", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=200)
    yield f"{module.__name__}:OtherPendulum-v3"
    del gym.registry["OtherPendulum-v3"], sys.modules[module.__name__]


def test_data_of_another_environment_is_noted(other_pendulum: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="recorded in Pendulum-v1, the study is about module_with_pendulum:OtherPendulum-v3"):
        file = init_study(tmp_path, env=other_pendulum, datasets=[PENDULUM], interactions=6000)
    protocol = Protocol.load(file)
    assert protocol.env == other_pendulum
    assert method(protocol, "td3").hyperparams["warmup_steps"] == 1000
    # Nothing is known of the environment: what the data says
    assert protocol.random_return == -1309.0


def test_each_cell_says_what_it_is() -> None:
    protocol = parse(edited())
    cell = Cell("medium", method(protocol, "td3c"), 1)
    facts = protocol.described(cell)
    assert (facts["env"], facts["seed"], facts["interactions"], facts["algorithm"]) == ("Pendulum-v1", 1, 6000, "td3c")
    assert facts["learner_evaluation"] == {"every": 1000, "episodes": 2}
    assert facts["dataset"]["fingerprint"] == load_dataset(PENDULUM).fingerprint
    assert "pendulum" not in str(facts).replace("Pendulum-v1", "").lower()
