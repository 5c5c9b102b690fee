"""Methods of a study that have a champion: how they are written, what is measured of them, and what their results tell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rl_zoo3.utils import get_callback_list

from sb3_offline_ft.deployment import ChampionChallenger
from sb3_offline_ft.study import Protocol
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.folder import CellResult, read_result, write_result
from sb3_offline_ft.study.tuning.entry import zoo_entry
from sb3_offline_ft.study.tuning.plan import TuningPlan, TuningSettings

GATED = {
    "risk_budget": 0.9,
    "worst_return": -1700,
    "baseline_episodes": 2,
    "min_updates": 20,
    "futility": 0.0,
    "controls": "concurrent",
}
STUDY: dict[str, Any] = {
    "name": "gated",
    "env": "Pendulum-v1",
    "datasets": {"medium": "bundled:pendulum-medium"},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 40}},
    "seeds": [3],
    "interactions": 900,
    "evaluation": {"every": 300, "episodes": 2},
    "hyperparams": {"warmup_steps": 220, "batch_size": 16, "learning_rate": 3e-3, "policy_kwargs": {"net_arch": [16]}},
    "methods": {
        "offline": {"frozen": True},
        "td3c": {"algorithm": "td3c"},
        "served": {"algorithm": "td3c", "champion": {"risk_budget": 0.0}},
        "gated": {"algorithm": "td3", "champion": GATED},
        "segments": {"algorithm": "td3", "champion": GATED | {"segment_steps": 80, "worst_return": -800}},
    },
}


def parse(**changes: Any) -> Protocol:
    return Protocol.parse(yaml.safe_dump(STUDY | changes), Path("/nowhere/study.yml"))


def with_method(**settings: Any) -> Protocol:
    return parse(methods=STUDY["methods"] | {"x": {"algorithm": "td3", **settings}})


def champion(protocol: Protocol, name: str = "x") -> Any:
    return next(method.champion for method in protocol.methods if method.name == name)


def keys(protocol: Protocol) -> dict[str, str]:
    return {cell.method.name: protocol.cell_key(cell) for cell in protocol.cells()}


# The file


def test_a_champion_has_the_arguments_of_the_preset_and_its_own() -> None:
    assert champion(parse(), "td3c") is None
    assert champion(with_method(champion=True)) == {"random_return": -1309}
    assert champion(with_method(champion={"random_return": -1000, "seed": 2})) == {"random_return": -1000, "seed": 2}
    of_preset = parse(
        presets={"td3bc": {"champion": {"min_updates": 7}}}, methods={"x": {"algorithm": "td3", "champion": True}}
    )
    assert champion(of_preset) == {"random_return": -1309, "min_updates": 7}
    assert champion(parse(random_return=-1200), "gated") == GATED | {"random_return": -1200}
    ChampionChallenger(**champion(with_method(champion=True)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"champion": {"risk_budgt": 0.1}}, "`methods.x.champion.risk_budgt`.*ChampionChallenger.*'risk_budget'"),
        ({"champion": {"risk_budget": 2}}, "`methods.x.champion` is not possible: `risk_budget` must"),
        ({"champion": {"path": "."}}, "`methods.x.champion.path` is set by the study"),
        ({"champion": "yes"}, "`methods.x.champion` must be a mapping"),
        ({"champion": True, "frozen": True, "algorithm": "td3bc"}, "`methods.x.champion` has nothing to do"),
        ({"champion": True, "start": "scratch"}, "`methods.x.champion` needs a pretrained policy"),
        ({"champion": True, "start": "scratch", "algorithm": "ppo"}, "`methods.x.champion` needs an off-policy algorithm"),
        ({"hyperparams": {"callback": []}}, "use `guard` and `champion` of the method"),
    ],
)
def test_what_a_champion_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_method(**settings)


def test_a_champion_makes_another_run_of_its_method_alone() -> None:
    before = keys(parse())
    changed = STUDY["methods"] | {"gated": {"algorithm": "td3", "champion": GATED | {"seed": 1}}}
    after = keys(parse(methods=changed))
    assert {name for name in before if before[name] != after[name]} == {"gated"}
    without = keys(parse(methods=STUDY["methods"] | {"gated": {"algorithm": "td3"}}))
    assert {name for name in before if before[name] != without[name]} == {"gated"}
    # Losses are counted by the study's random policy; it is in the facts of those alone who count by it
    known = keys(parse(random_return=-1000))
    assert {name for name in before if before[name] != known[name]} == {"served", "gated", "segments"}


def test_a_learner_behind_a_champion_needs_no_evaluations() -> None:
    assert [method.name for method in parse().methods if method.learns_from_evaluations] == ["td3c"]


def test_a_tuning_takes_a_method_without_a_champion_unless_one_is_named(tmp_path: Path) -> None:
    methods = {"first": STUDY["methods"]["served"], "td3c": {"algorithm": "td3c"}}
    settings: dict[str, Any] = {"folder": tmp_path, "algo": "td3c"}
    assert TuningPlan(TuningSettings(**settings), parse(methods=methods)).method.name == "td3c"
    plan = TuningPlan(TuningSettings(**settings, method="first"), parse(methods=methods))
    (made,) = get_callback_list(zoo_entry(plan, plan.method, tmp_path))
    assert isinstance(made, ChampionChallenger)
    assert (made.rules.risk_budget, made.rules.random_return) == (0.0, -1309)


# Its runs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yml").write_text(yaml.safe_dump(STUDY))
    return Protocol.load(folder)


@pytest.fixture(scope="module")
def results(study: Protocol) -> dict[str, CellResult]:
    cells = [cell for cell in study.cells() if cell.method.name != "td3c"]
    return {cell.method.name: run_cell(study, cell, pretrained_folder=study.folder / "pretrained") for cell in cells}


def test_what_is_measured_is_the_champion(results: dict[str, CellResult]) -> None:
    served = results["served"]
    np.testing.assert_array_equal(served.returns, results["offline"].returns)
    # The learner has learned all the time, and nobody has seen it
    assert served.manifest["updates"]["online"] == 2 * (900 - 220)
    assert served.kinds == ["serve"] * 4 and served.manifest["learner_evaluation_steps"] == 0
    facts = {"step": 0, "promotions": 0, "rejections": 0, "demotions": 0, "trials": 0, "explorations": 0, "budget_used": None}
    assert served.manifest["champion"] == facts


def test_a_result_tells_what_champion_and_challengers_did(results: dict[str, CellResult]) -> None:
    result = results["gated"]
    episodes = [event for event in result.deployment_events if event["event"] == "episode"]
    assert [event["timestep"] for event in episodes] == result.training_timesteps.tolist() == [200, 400, 600, 800]
    assert result.kinds == [event["kind"] for event in episodes] and result.kinds[2] == "trial"
    np.testing.assert_allclose([event["return"] for event in episodes], result.training_returns, atol=1e-4)
    facts, decisions = result.manifest["champion"], [event["event"] for event in result.deployment_events]
    assert facts["trials"] == result.kinds.count("trial") and facts["explorations"] == result.kinds.count("explore")
    for kind in ("promotion", "rejection", "demotion"):
        assert facts[f"{kind}s"] == decisions.count(kind)
    last = episodes[-1]
    assert facts["budget_used"] == pytest.approx(1 - last["balance"] / (0.9 * len(episodes)))
    assert result.manifest["cell"]["champion"] == GATED | {"random_return": -1309}
    assert results["offline"].manifest["champion"] is None and results["offline"].kinds == []


def test_an_episode_is_of_the_riskiest_kind_of_its_segments(results: dict[str, CellResult]) -> None:
    result = results["segments"]
    segments = [event for event in result.deployment_events if event["event"] == "episode"]
    # 80, 80 and 40 steps in each episode, and one in the episode that did not end
    assert [event["length"] for event in segments] == [80, 80, 40] * 4 + [80]
    kinds = [[event["kind"] for event in segments[start : start + 3]] for start in range(0, 12, 3)]
    expected = ["trial" if "trial" in of_episode else max(of_episode, key="serve explore".index) for of_episode in kinds]
    assert result.kinds == expected and "trial" in expected
    assert any(len({*of_episode}) > 1 for of_episode in kinds)


def test_results_are_kept_whole_in_files_and_storages(results: dict[str, CellResult], tmp_path: Path) -> None:
    for name, result in results.items():
        write_result(tmp_path / name, result)
        for kept in (read_result(tmp_path / name), CellResult.from_json(result.to_json())):
            assert kept is not None and kept.kinds == result.kinds
            assert kept.deployment_events == result.deployment_events and kept.manifest == result.manifest
        assert (tmp_path / name / "deployment_events.jsonl").exists() == (name != "offline")


def test_results_of_before_have_no_kinds(results: dict[str, CellResult]) -> None:
    content = json.loads(results["gated"].to_json())
    del content["deployment_events"], content["arrays"]["training_kinds"], content["manifest"]["champion"]
    result = CellResult.from_json(json.dumps(content))
    assert result.kinds == ["serve"] * 4 and result.deployment_events == []


def change_kinds(folder: Path, kinds: Any) -> None:
    with np.load(folder / "training.npz") as file:
        arrays = dict(file)
    np.savez(folder / "training.npz", **arrays | {"training_kinds": np.array(kinds)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deployment_events.jsonl").unlink(),
        lambda folder: (folder / "deployment_events.jsonl").write_text('{"event": "start"'),
        lambda folder: change_kinds(folder, [0, 0, 1]),
        lambda folder: change_kinds(folder, [0, 0, 1, 3]),
        lambda folder: change_kinds(folder, [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_a_damaged_result_counts_as_not_run(
    results: dict[str, CellResult], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write_result(tmp_path / "run", results["gated"])
    damage(tmp_path / "run")
    with pytest.warns(UserWarning, match="The cell counts as not run"):
        assert read_result(tmp_path / "run") is None
