"""What was measured about the promises is what is said about them, and keeps them."""

import json
import shlex
from typing import Any

import pytest
from scipy.stats import binomtest

from sb3_offline_ft.deployment import Rules
from sb3_offline_ft.pages.words import number
from tests.conftest import REPOSITORY
from tests.simulated_contests import load, simulation

FOLDER = REPOSITORY / "benchmarks" / "deployment"
PAGE = REPOSITORY / "docs" / "champion_challenger_promises.md"
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


def false_promotions(controls: str, name: str, stream: str = "equal") -> Any:
    """Their share in all such runs, with its interval."""
    cell = RESULTS[f"promotions/{controls}/{name}/{stream}"]
    assert cell["runs"] >= 2000
    return binomtest(cell["not_better"], cell["runs"])


@pytest.mark.parametrize("key", [key for key in RESULTS if key.startswith("promotions/")])
def test_false_promotions_were_rare(key: str) -> None:
    _, controls, name, stream = key.split("/")
    high = false_promotions(controls, name, stream).proportion_ci(0.95, "exact").high
    assert high <= Rules().false_promotion_rate or not simulation.is_promised(name, controls)


def test_where_there_is_no_promise_the_page_says_so() -> None:
    """Drift breaks historical controls, and not concurrent ones."""
    rate, fast = Rules().false_promotion_rate, "rise of 4 in a run"
    assert false_promotions("historical", fast).proportion_ci(0.95, "exact").low > rate
    assert false_promotions("concurrent", fast).proportion_ci(0.95, "exact").high <= rate
    assert "promise nothing if returns drift" in PAGE.read_text(encoding="utf-8")


def test_all_was_measured_with_the_same_code() -> None:
    assert len({cell["code"] for cell in RESULTS.values()}) == 1


def test_the_page_shows_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "```{include} ../benchmarks/deployment/promises.md" in page
    assert "a random policy 0." in (FOLDER / "promises.md").read_text()


def test_the_demo_was_measured_with_its_present_command() -> None:
    """If it fails, run benchmarks/deployment/demo.py."""
    demo, content = load("demo"), json.loads((FOLDER / "demo.json").read_text())
    assert content["command"] == shlex.join(demo.demo_command())
    assert (FOLDER / "demo.md").read_text(encoding="utf-8") == demo.report(content["results"], content.get("note", ""))
    (first,) = (one for one in content["results"] if one["seed"] == 0)
    champion, learner = (number(first[who]["mean"]) for who in ("champion", "learner"))
    quickstart = " ".join((REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8").split())
    assert f"this champion returned {champion}, and the learner, which had gone on learning, {learner}:" in quickstart
