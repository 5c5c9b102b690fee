"""The file of a trial's plan: read strictly, every key explained; and the checklist that is written from it."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_offline_ft.trial import Trial, TrialPlan, read_plan
from sb3_offline_ft.trial.checklist import CHECKLIST_FILE, read_checklist, update_checklist
from sb3_offline_ft.trial.init import FEWEST_EPISODES, default_stages, init_trial
from sb3_offline_ft.trial.plan import PLAN_FILE, differences
from sb3_offline_ft.trial.reading import parse_plan
from tests.trial_plans import STAGES, plan_content, plan_of

ENERGY = {"from": "column.kwh", "aggregate": "mean", "better": "lower", "unit": "kWh", "value_per_unit": 0.12}
EVERYTHING: dict[str, Any] = {
    "env": None,
    "env_kwargs": {},
    "seed": 3,
    "data": "bundled:pendulum-medium",
    "columns": "columns.yml",
    "regime": "column.load",
    "metrics": {"return": {"unit": "points", "value_per_unit": 0.5}, "energy": ENERGY},
    "currency": "USD",
    "guardrails": {"energy": {"margin": 2.0}, "return": {"limit": -500}},
    "error_rates": {"false_go": 0.1, "missed": 0.1, "false_stop": 0.05},
    "costs": {"episode": 1, "supervision": 5, "minutes": 10, "episodes_per_year": 5000, "deployment": 100},
    "risk": {"budget": 0.1, "random_return": -1309, "worst_return": -1900, "baseline_return": -200},
    "blocks": {"episodes": 6, "wash_in_steps": 5},
    "abort": {"limits": {"column.torque": {"max": 2.0, "min": -2.0}}, "most": 2, "actions_beyond": 0.1},
    "sign_off": ["Ann", "Bob"],
}

ENV: dict[str, Any] = {
    "env": "Pendulum-v1",
    "metrics": {"x": {"from": "info.x"}},
    "robustness": {"seeds": 2, "perturb": {"mass": [0.8, 1.2], "delay": []}},
}


def test_a_plan_that_says_everything_is_kept_as_it_is() -> None:
    plan = plan_of(**EVERYTHING)
    assert parse_plan(plan.as_mapping(), Path("again")) == plan
    said = plan.as_mapping()
    assert said["metrics"]["energy"] == ENERGY
    assert said["abort"]["limits"] == {"column.torque": {"min": -2.0, "max": 2.0}}
    assert said["guardrails"] == {"energy": {"margin": 2.0}, "return": {"limit": -500.0}}
    assert plan.sign("energy") == -1 and plan.sign("return") == 1
    assert plan.needed_metrics == {"return", "energy"}
    assert plan.compared_episodes == 20


def test_the_digest_is_that_of_what_is_said() -> None:
    plan = plan_of()
    assert plan.digest == plan_of(seed=0, currency="EUR").digest
    for name in ("seed", "blocks"):
        assert plan_of(**{name: EVERYTHING[name]}).digest != plan.digest
    changed = differences(plan, plan_of(budget={"episodes": 31}, metrics={"energy": {"better": "lower"}}))
    assert "budget.episodes: 30 -> 31" in changed
    assert 'metrics.energy.better: "(none)" -> "lower"' in changed


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"baselin": "x"}, r"`baselin` is no known key. Did you mean 'baseline'"),
        ({"metrics": {"energy": {"agregate": "sum"}}}, r"`metrics.energy.agregate` is no known key. Did you mean 'aggregate'"),
        ({"error_rates": {"false_goo": 0.1}}, r"`error_rates.false_goo` is no known key. Did you mean 'false_go'"),
        ({"error_rates": {"false_go": 1.0}}, "`error_rates.false_go` must be below 1, found 1.0"),
        ({"error_rates": {"missed": 0}}, "`error_rates.missed` must be above 0, found 0"),
        ({"costs": {"episode": -1}}, "`costs.episode` must be at least 0, found -1"),
        ({"candidate": None}, "`candidate` is missing"),
        ({"candidate": 5}, "`candidate` must be text, found 5: put it in quotes"),
        ({"primary": {"metric": "energi", "smallest_effect": 1}, "metrics": {"energy": {}}}, "Did you mean 'energy'"),
        ({"primary": {"metric": "return", "smallest_effect": 0}}, "`primary.smallest_effect` must be above 0, found 0"),
        ({"primary": {"metric": "return"}}, "`primary.smallest_effect` is missing"),
        ({"guardrails": {"return": {}}}, r"`guardrails.return` must have either a margin or a limit"),
        ({"guardrails": {"return": {"margin": 1, "limit": 2}}}, r"`guardrails.return` must have either a margin or a limit"),
        ({"guardrails": {"retrun": {"margin": 1}}}, "Did you mean 'return'"),
        ({"metrics": {"return": {"from": "reward"}}}, "`metrics.return.from` is no known key"),
        ({"metrics": {"energy": {"from": "energy"}}}, "`metrics.energy.from` must be reward, info.<key> or column.<name>"),
        ({"metrics": {"energy": {"from": "info.energy"}}}, "without `env` there is no info: expected column.<name>"),
        ({"env": "Pendulum-v1", "metrics": {"energy": {"from": "column.x"}}}, "episodes of Pendulum-v1 have no columns"),
        ({"env": "Pendulum-v1", "metrics": {"energy": {}}}, "`metrics.energy.from` must be reward, info"),
        ({"metrics": {"energy": {"aggregate": "median"}}}, "must be one of sum, mean, min, max, last, found 'median'"),
        ({"metrics": {"energy": {"better": "up"}}}, "must be one of higher, lower, found 'up'"),
        ({"stages": []}, "`stages` must be a list of stages"),
        ({"stages": STAGES[:1]}, "must have a pilot or a ramp"),
        ({"stages": STAGES[::-1]}, "must come in the order shadow, pilot, ramp, full"),
        ({"stages": [STAGES[1], STAGES[1]]}, "has two that are called 'pilot'"),
        ({"stages": [{"name": "rampe", "episodes": 4, "share": 0.5}]}, r"`stages\[0\].name` must begin.*did you mean 'ramp'"),
        ({"stages": [{"name": "ramp", "episodes": 4}]}, r"`stages\[0\].share` is missing"),
        ({"stages": [{"name": "ramp", "episodes": 4, "share": 1}]}, "must be above 0 and below 1, found 1"),
        ({"stages": [{"name": "ramp", "episodes": 4, "share": 0.1}]}, "is 4, too few for a share of 0.1"),
        ({"stages": [*STAGES[:3], {"name": "full", "episodes": 3, "share": 0.9}]}, "must be 1 in 'full', found 0.9"),
        ({"budget": {"episodes": 23}}, "is 23, but the stages after shadow have 24 episodes: raise it to 24 or more"),
        ({"budget": {}}, "`budget.episodes` is missing"),
        ({"blocks": {"episodes": 1}}, "`blocks.episodes` must be a whole number of at least 2, found 1"),
        ({"abort": {"limits": {"column.x": {}}}}, "`abort.limits.column.x` must have a min, a max or both"),
        ({"abort": {"limits": {"column.x": {"min": 1, "max": 0}}}}, "the min not above the max"),
        ({"risk": {"budget": 0.1, "random_return": -10}}, "`risk.worst_return` is missing"),
        ({"risk": {"budget": 0.1, "random_return": -10, "worst_return": -5}}, "`risk.worst_return` must be at most the other"),
        ({"robustness": {}}, "`robustness` needs an environment"),
        (
            {"env": "Pendulum-v1", "robustness": {"perturb": {"mass": 1.2}}},
            "`robustness.perturb.mass` must be a list",
        ),
        ({"seed": -1}, "`seed` must be a whole number of at least 0"),
        ({"sign_off": "Ann"}, "`sign_off` must be a list, found 'Ann'"),
    ],
)
def test_bad_plans_are_one_clear_error(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)trial\.yml: .*{message}"):
        plan_of(**sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must have keys such as baseline"),
        ("baseline: a\nbaseline: b\n", "line 2: the key 'baseline' is given twice"),
        ("baseline: [a\n", "line 2"),
        (b"baseline: \xff\n", "is no text in UTF-8"),
    ],
)
def test_files_that_are_no_plans_are_errors(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / PLAN_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path)


def test_a_folder_without_a_plan_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sb3-offline-ft trial init"):
        Trial.open(tmp_path / "pump")


@pytest.mark.parametrize("sections", [{}, EVERYTHING, ENV])
def test_the_file_that_is_written_says_what_was_asked_for(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections = {"sign_off": ["Ann"], **sections}
    file = init_trial(tmp_path / "pump", plan_content(**sections))
    assert read_plan(file) == plan_of(**sections)


def test_every_key_is_explained_where_it_is_written(tmp_path: Path) -> None:
    file = init_trial(tmp_path / "pump", plan_content(**EVERYTHING))
    explained = set()
    for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
        keys = re.findall(r"^(\w+):(.*)", paragraph, re.MULTILINE)
        explained |= {key for key, value in keys if "  # " in value or paragraph.startswith("#")}
    assert explained == {one.name for one in fields(TrialPlan)}


def test_known_returns_of_an_environment_make_the_defaults(tmp_path: Path) -> None:
    plan = Trial.create(tmp_path / "a", env="Pendulum-v1", baseline="zero", candidate="random").plan_in_force
    # 5 % of the way from random to expert
    assert plan.primary.smallest_effect == 60.0
    assert "random_return: -1309.0" in (tmp_path / "a" / PLAN_FILE).read_text()


@settings(deadline=None, max_examples=60)
@given(episodes=st.integers(FEWEST_EPISODES, 500))
def test_default_stages_fit_any_budget(episodes: int) -> None:
    plan = plan_of(stages=default_stages(episodes), budget={"episodes": episodes})
    assert sum(stage.episodes for stage in plan.stages if stage.kind != "shadow") == episodes


def test_a_budget_that_is_too_small_for_stages_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least 9 episodes, found 8"):
        Trial.create(tmp_path / "pump", baseline="a", candidate="b", episodes=8)
    assert not (tmp_path / "pump").exists()


def test_a_trial_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    Trial.create(tmp_path / "pump", baseline="a", candidate="b")
    with pytest.raises(FileExistsError, match="There is a trial already"):
        Trial.create(tmp_path / "pump", baseline="a", candidate="c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        Trial.create(tmp_path / "file", baseline="a", candidate="b")


def test_the_checklist_names_what_the_plan_asks_for_and_keeps_ticks(tmp_path: Path) -> None:
    trial = Trial.create(tmp_path / "pump", **plan_content(**EVERYTHING))
    folder = trial.folder
    items = {item.name: item for item in read_checklist(folder)}
    assert list(items) == ["metric", "data", "power", "limits", "abort", "drill", "people", "Ann", "Bob"]
    assert "`column.torque` at least -2 and at most 2" in items["limits"].text
    assert not any(item.is_ticked for item in items.values())
    trial.tick("drill", "Eve")
    trial.tick("limits", "Eve")
    # By hand, too, and a line of one's own
    file = folder / CHECKLIST_FILE
    text = file.read_text(encoding="utf-8").replace("- [ ] **people**", "- [X] **people**")
    file.write_text(text + "- [x] **crane**: The crane is locked. By: Bo\n", encoding="utf-8")
    looser = replace(trial.plan_in_force.abort.limits[0], max=3.0)
    plan = replace(trial.plan_in_force, abort=replace(trial.plan_in_force.abort, limits=(looser,)))
    update_checklist(folder, plan)
    items = {item.name: item for item in read_checklist(folder)}
    assert (items["drill"].is_ticked, items["drill"].who) == (True, "Eve")
    assert items["people"].is_ticked and items["people"].who == ""
    assert (items["crane"].is_ticked, items["crane"].who) == (True, "Bo")
    # What was agreed to has changed
    assert not items["limits"].is_ticked and "at most 3" in items["limits"].text
    with pytest.raises(ValueError, match=r"no line 'dril'\. Did you mean 'drill'"):
        trial.tick("dril", "Eve")
    assert [event["item"] for event in trial.journal.events if event["event"] == "ticked"] == ["drill", "limits"]
