"""How often the decision of a trial is wrong was measured, is as planned, and is what the tables say."""

import importlib.util
import json
from types import ModuleType

import pytest
from scipy.stats import binomtest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "trial"
RESULTS = json.loads((FOLDER / "error_rates.json").read_text())
KINDS = ("normal", "heavy", "bimodal", "binary", "rising")


@pytest.fixture(scope="module")
def error_rates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("error_rates", FOLDER / "error_rates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lowest(count: int) -> float:
    """Of the exact interval."""
    return float(binomtest(count, 2000).proportion_ci(0.95, "exact").low)


def highest(count: int) -> float:
    return float(binomtest(count, 2000).proportion_ci(0.95, "exact").high)


def test_tables_say_what_the_results_say(error_rates: ModuleType) -> None:
    """If it fails, run benchmarks/trial/error_rates.py --report."""
    assert RESULTS.keys() == error_rates.cells().keys()
    assert (FOLDER / "error_rates.md").read_text() == error_rates.report(RESULTS)


def test_all_was_measured_with_the_same_code_and_often_enough() -> None:
    assert len({cell["code"] for cell in RESULTS.values()}) == 1
    assert {cell["trials"] for cell in RESULTS.values()} == {2000}


@pytest.mark.parametrize("kind", KINDS)
def test_false_go_and_false_stop_are_as_planned(error_rates: ModuleType, kind: str) -> None:
    rates = error_rates.PLAN.error_rates
    equal, worse = RESULTS[f"trials/{kind}/equal"], RESULTS[f"trials/{kind}/worse"]
    assert lowest(equal["go"]) <= rates.false_go and highest(worse["go"]) <= rates.false_go
    assert lowest(equal["stopped"]) <= rates.false_stop


@pytest.mark.parametrize("kind", KINDS)
def test_a_better_candidate_passes(error_rates: ModuleType, kind: str) -> None:
    better, rates = RESULTS[f"trials/{kind}/better"], error_rates.PLAN.error_rates
    assert highest(better["go"]) >= (1 - rates.missed if kind != "bimodal" else 0.7)
    # A no-go needs the effect to be excluded
    assert lowest(better["no_go"]) <= rates.false_go + rates.false_stop


@pytest.mark.parametrize("key", [key for key in RESULTS if key.startswith("guardrail/")])
def test_a_guardrail_that_does_not_hold_hardly_ever_passes(error_rates: ModuleType, key: str) -> None:
    assert lowest(RESULTS[key]["go"]) <= error_rates.PLAN.error_rates.false_go


def test_what_is_not_promised_is_marked() -> None:
    table = (FOLDER / "error_rates.md").read_text()
    assert "twice the baseline's (outside the promise)" in table
    assert "```{include} ../benchmarks/trial/error_rates.md" in (REPOSITORY / "docs/deciding.md").read_text(encoding="utf-8")
