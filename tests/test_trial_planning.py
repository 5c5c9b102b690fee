"""What a plan says before anything runs: chances, length, cost, risk, value, and which recipe for the data."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.trial import PlanResult, Trial, TrialMachine, TrialPlan, plan_trial, recipe_for
from sb3_offline_ft.trial.plan_shown import show_plan
from sb3_offline_ft.trial.planning import BaselineValues, _draw, baseline_values
from tests.conftest import REPOSITORY
from tests.trial_plans import plan_content, plan_of

STAGES = [
    {"name": "pilot", "episodes": 8, "share": 0.25, "supervised": True},
    {"name": "ramp 50 %", "episodes": 24, "share": 0.5},
]
SECTIONS: dict[str, Any] = {
    "stages": STAGES,
    "budget": {"episodes": 40},
    "metrics": {"return": {"value_per_unit": 0.5}, "energy": {"better": "lower"}},
    "costs": {"episode": 2.0, "supervision": 5.0, "minutes": 30, "episodes_per_year": 730, "deployment": 26},
    "risk": {"budget": 0.1, "random_return": -5.0, "worst_return": -8.0},
}


def known(n: int = 20, spread: float = 1.0) -> BaselineValues:
    """A baseline that returns 5 on average, to the digit."""
    values = np.random.default_rng(0).normal(size=n)
    return BaselineValues({"return": 5 + spread * (values - values.mean()) / values.std(ddof=1)}, "a made-up log")


def expected(n_trials: int = 60, spread: float = 1.0, **sections: Any) -> PlanResult:
    return plan_trial(plan_of(**{**SECTIONS, **sections}), known(spread=spread), n_trials=n_trials)


def shown(result: PlanResult) -> str:
    console = Console(width=100, record=True, file=StringIO())
    show_plan(result, console)
    return " ".join(console.export_text().split())


class TestChances:
    def test_a_better_candidate_passes_and_others_do_not(self) -> None:
        """A false go is promised in 5 % of the trials, and fails here by chance once in 10,000 times."""
        result = expected(100)
        assert result.better.go > 50 > 10 > result.worse.go == 0 and result.better.no_go < 15
        assert binomtest(result.equal.go, 100, 0.05, "greater").pvalue > 1e-4
        assert result.worse.no_go > 90 and result.better.episodes < result.equal.episodes

    def test_a_plan_that_is_too_short_says_what_would_be_enough(self) -> None:
        result = expected(60, spread=1.6)
        assert not result.reaches_power and result.enough is not None
        episodes, better = result.enough
        assert episodes > 24 and better.go / better.trials > result.better.go / result.better.trials
        text = shown(result)
        assert "No: a candidate" in text and f"give 'ramp 50 %' {episodes} episodes" in text
        assert f"the budget {40 + episodes - 24}" in text and "plan for an effect of" in text
        # An effect that the plan is said to see is seen
        effect = {"metric": "return", "smallest_effect": result.visible}
        assert expected(60, spread=1.6, primary=effect).reaches_power

    def test_success_and_failure_stay_what_they_are(self) -> None:
        """Values of 0 and 1: a candidate that always succeeds has no spread, which a shifted copy would have."""
        plan = plan_of(**{**SECTIONS, "primary": {"metric": "return", "smallest_effect": 0.5}, "risk": None})
        result = plan_trial(plan, BaselineValues({"return": np.array([0.0, 1.0] * 8)}, "a log"), n_trials=60)
        assert result.better.go > 50 and result.equal.go < 12

    def test_what_cannot_be_simulated_is_said(self) -> None:
        result = expected(2, guardrails={"energy": {"margin": 1.0}})
        assert any("energy" in note for note in result.notes) and "Nothing is known of energy" in shown(result)

    def test_the_same_seed_gives_the_same_plan(self) -> None:
        assert expected(5).as_mapping() == expected(5).as_mapping()


@pytest.mark.parametrize("n", [5, 20])
def test_simulated_episodes_spread_as_the_baseline_does(n: int) -> None:
    values = known(n, spread=2.0)
    drawn = _draw(plan_of(), values, 1.0)(np.random.default_rng(0), 20_000)["return"]
    # The second is the candidate's; 5 standard errors of the mean, and as many of the spread
    assert drawn.mean(axis=0) == pytest.approx([5.0, 6.0], abs=0.08) and drawn.std(axis=0) == pytest.approx([2, 2], abs=0.08)


class TestNumbers:
    def test_cost_risk_and_value(self) -> None:
        result = expected(2)
        assert (result.hours, result.cost) == (16.0, 32 * 2 + 8 * 5)
        # A share of 0.1 of total losses of 10 in each of 40 episodes
        assert result.worst_loss == pytest.approx(40.0) and result.worst_cost == pytest.approx(20.0)
        # An effect of 1 is worth 0.5 in each of 730 episodes, so 1 a day
        assert result.value.value == pytest.approx(365) and result.payback_days == pytest.approx(104 + 26)
        assert result.value.low < 365 < result.value.high
        text = shown(result)
        for words in ("104 EUR", "16.0 hours", "40 of return", "20.0 EUR", "365 EUR", "130 days of service"):
            assert words in text.replace("\N{NO-BREAK SPACE}", " "), words

    def test_what_is_not_known_is_not_made_up(self) -> None:
        result = plan_trial(plan_of(stages=STAGES, budget={"episodes": 40}), known(), n_trials=2)
        assert result.worst_loss is None and result.payback_days is None
        assert "not bounded" in shown(result) and "set `value_per_unit`" in shown(result)

    def test_what_may_be_lost_is_not_known_without_a_return(self) -> None:
        plan = plan_of(**{**SECTIONS, "primary": {"metric": "energy", "smallest_effect": 1.0}})
        result = plan_trial(plan, BaselineValues({"energy": np.arange(6.0)}, "a log"), n_trials=2)
        assert result.worst_loss is None and "nothing is known of the baseline's return" in shown(result)

    def test_more_spread_needs_more_episodes(self) -> None:
        needed = [expected(2, spread=spread).needed for spread in (1.0, 2.0)]
        # 4 (1.645 + 0.842)^2 = 24.7
        assert needed == [25, 99]


class TestBaselineValues:
    def machine(self, plan: TrialPlan, n: int) -> TrialMachine:
        machine = TrialMachine(replace(plan, risk=None))
        while len(machine.episodes) < n:
            upcoming = machine.next()
            machine.apply({"event": "assignment", **vars(upcoming)})
            metrics = {"return": float(upcoming.arm == "candidate"), "energy": 3.0}
            machine.apply({"event": "episode", "episode": len(machine.episodes), "metrics": metrics})
        return machine

    def test_recorded_episodes_of_the_baseline(self) -> None:
        plan = plan_of(**SECTIONS)
        found = baseline_values(plan, self.machine(plan, 12))
        assert set(found.metrics["return"]) == {0.0} and set(found.metrics["energy"]) == {3.0}
        assert f"{len(found.metrics['return'])} recorded episodes" in found.source

    def test_a_dataset(self) -> None:
        found = baseline_values(plan_of(**{**SECTIONS, "data": "bundled:pendulum-medium"}))
        assert len(found.metrics["return"]) >= 20 and "bundled:pendulum-medium" in found.source

    def test_episodes_that_are_run_now(self) -> None:
        found = baseline_values(plan_of(env="Pendulum-v1", baseline="zero", candidate="random"), n_episodes=6)
        assert len(found.metrics["return"]) == 6 and len(np.unique(found.metrics["return"])) == 6
        assert (found.metrics["return"] < -300).all() and "run now" in found.source

    def test_nothing_is_known(self) -> None:
        with pytest.raises(ValueError, match=r"Nothing is known of how energy spreads: record 5 episodes"):
            baseline_values(plan_of(**{**SECTIONS, "primary": {"metric": "energy", "smallest_effect": 1.0}}))
        with pytest.raises(ValueError, match="at least two values of return of the baseline, found 1"):
            plan_trial(plan_of(**SECTIONS), BaselineValues({"return": np.zeros(1)}, "a log"))


def test_the_command_says_it_and_keeps_it(tmp_path: Path) -> None:
    trial = Trial.create(tmp_path / "pump", **plan_content(**{**SECTIONS, "data": "bundled:pendulum-medium"}))
    done = CliRunner().invoke(app, ["trial", "plan", str(trial.folder), "--trials", "2", "--no-ask-data"])
    assert done.exit_code == 0, done.output
    for name in ("Question", "Is it long enough?", "As good", "Worst loss", "Worth a year"):
        assert name in done.output
    kept = json.loads((trial.folder / "plan.json").read_text())
    assert kept["digest"] == trial.plan_in_force.digest and kept["better"]["trials"] == 2
    assert not trial.is_begun


class TestRecipe:
    @pytest.mark.parametrize(
        ("policy", "data", "regime"), [(10.0, 5.0, "superior"), (5.0, 10.0, "inferior"), (10.0, 9.8, "comparable")]
    )
    def test_regimes(self, policy: float, data: float, regime: str) -> None:
        noise = np.random.default_rng(0).normal(0, 0.5, 20)
        advice = recipe_for(data + noise, policy + noise[::-1], random_return=0.0)
        assert advice.regime == regime and "arXiv 2510.01460" in advice.text

    def test_a_difference_within_the_margin_is_none(self) -> None:
        still = np.linspace(-0.001, 0.001, 10)
        assert recipe_for(9.6 + still, 10.0 + still, random_return=0.0).regime == "comparable"
        assert recipe_for(9.6 + still, 10.0 + still).regime == "superior"

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match="at least two returns of the data, found 1"):
            recipe_for([1.0], [1.0, 2.0])

    def test_what_it_says_of_our_runs_is_in_the_findings(self) -> None:
        page = " ".join((REPOSITORY / "docs/findings.md").read_text(encoding="utf-8").split())
        said = {regime: recipe_for(data, policy).text for regime, policy, data in [
            ("superior", [9.0, 9.1], [1.0, 1.1]), ("inferior", [1.0, 1.1], [9.0, 9.1]),
        ]}  # fmt: skip
        assert "in each of nine; TD3C kept eight of nine" in said["superior"]
        assert "kept the policy in eight of nine runs" in page
        assert "fell in each of them, by more than half of the way to a random policy" in page
        assert "learned far more" in said["inferior"]
        assert "On medium-replay data it learned far more than the others" in page
