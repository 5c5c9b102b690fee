"""What was measured about the promises is what is said about them, and keeps them."""

import json

import pytest
from scipy.stats import binomtest

from sb3_offline_ft.deployment import Rules
from tests.conftest import REPOSITORY
from tests.simulated_contests import load

FOLDER = REPOSITORY / "benchmarks" / "deployment"
RESULTS = json.loads((FOLDER / "promises.json").read_text())


def test_tables_say_what_the_results_say() -> None:
    """If it fails, run benchmarks/deployment/promises.py --report."""
    promises = load("promises")
    assert RESULTS.keys() == promises.cells().keys()
    assert (FOLDER / "promises.md").read_text() == promises.report(RESULTS)


def test_the_budget_was_never_exceeded() -> None:
    budget = RESULTS["budget"]
    assert budget["runs"] == 10_000 and budget["broken"] == 0 and budget["at_risk"] > 100_000
    # Not because it was hardly used
    assert 0.9 < budget["largest_share"] <= 1


@pytest.mark.parametrize("name", [name for name in RESULTS if name.startswith("promotions/") and "outside" not in name])
def test_false_promotions_were_rare(name: str) -> None:
    cell = RESULTS[name]
    assert cell["runs"] >= 2000
    assert binomtest(cell["not_better"], cell["runs"]).proportion_ci(0.95, "exact").high <= Rules().false_promotion_rate


def test_the_page_shows_the_tables() -> None:
    page = (REPOSITORY / "docs" / "champion_challenger_promises.md").read_text(encoding="utf-8")
    assert "```{include} ../benchmarks/deployment/promises.md" in page
    assert "a random policy 0." in (FOLDER / "promises.md").read_text()
