"""Go, no-go and not yet come out by the rules of the plan."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.trial import Decision, Finished, TrialMachine, TrialPlan, decide
from sb3_offline_ft.trial.assignment import Assignment
from sb3_offline_ft.trial.decision import review
from sb3_offline_ft.trial.evidence import Evidence, design_of
from tests.trial_plans import plan_of

STAGES = [{"name": "pilot", "episodes": 8, "share": 0.25}, {"name": "ramp 50 %", "episodes": 32, "share": 0.5}]
ENERGY = {"energy": {"better": "lower", "unit": "kWh"}}
Metrics = Callable[[Assignment, np.random.Generator], dict[str, Any]]
"""What comes of an episode: its metrics, and what else its event says."""


def plan(**sections: Any) -> TrialPlan:
    return plan_of(**{"stages": STAGES, "budget": {"episodes": 40}, **sections})


def run(plan: TrialPlan, metrics: Metrics, *, n: int | None = None, reviewed: bool = True) -> tuple[TrialMachine, Decision]:
    """Runs a trial until it is decided, or for so many episodes; who asks may also look on without deciding."""
    machine, rng = TrialMachine(plan), np.random.default_rng(1)
    while not isinstance(upcoming := machine.next(), Finished) and upcoming.episode != n:
        machine.apply({"event": "assignment", **upcoming.as_event()})
        result = metrics(upcoming, rng)
        if result.get("excluded") == "aborted":
            machine.apply({"event": "abort", "episode": upcoming.episode})
        kind = "missing" if "reason" in result else "episode"
        machine.apply({"event": kind, "episode": upcoming.episode, "excluded": None, **result})
        if reviewed and (decision := review(plan, machine)) is not None:
            return machine, decision
    return machine, decide(plan, machine)


def better_by(effect: float, energy: float = 0.0) -> Metrics:
    """A candidate that is better by so much, and takes so much more energy; episodes spread by 1."""

    def metrics(assignment: Assignment, rng: np.random.Generator) -> dict[str, Any]:
        gain = assignment.arm == "candidate"
        return {"metrics": {"return": 5 + gain * effect + rng.normal(), "energy": 30 + gain * energy + rng.normal()}}

    return metrics


def but(metrics: Metrics, when: Callable[[Assignment], bool], result: dict[str, Any]) -> Metrics:
    """The same, with another result of some episodes."""
    return lambda assignment, rng: {**metrics(assignment, rng), **(result if when(assignment) else {})}


def candidates(assignment: Assignment) -> bool:
    return assignment.arm == "candidate"


class TestOutcomes:
    def test_go_at_a_look(self) -> None:
        machine, decision = run(plan(), better_by(2.0))
        assert decision.decision == "go" and decision.more_episodes is None
        assert len(machine.episodes) < 40 and len(machine.episodes) in [
            design_of(machine.plan).ends[look.look.blocks - 1] for look in decision.looks
        ]
        assert decision.p is not None and decision.level is not None and decision.p <= decision.level
        assert decision.effect.low > 0 and decision.effect.low < 2 < decision.effect.high
        assert "better by" in decision.reasons[0] and "no deterioration" in decision.reasons[-1]

    def test_no_go_if_all_is_there_and_the_smallest_effect_is_excluded(self) -> None:
        machine, decision = run(plan(primary={"metric": "return", "smallest_effect": 1.5}), better_by(-0.1))
        assert decision.decision == "no-go" and len(machine.episodes) == 40
        assert decision.effect.high < 1.5 and "exclude the smallest effect" in decision.reasons[0]

    def test_not_yet_in_the_middle(self) -> None:
        _, decision = run(plan(), better_by(0.3), n=12)
        assert decision.decision == "not yet" and decision.more_episodes == 28

    def test_not_yet_at_the_end_says_how_many_more(self) -> None:
        _, decision = run(plan(primary={"metric": "return", "smallest_effect": 0.6}), better_by(0.4))
        assert decision.decision == "not yet" and "leave it open" in decision.reasons[-1]
        # Twice the errors' quantiles (1.64 + 0.84), squared, times two arms' spreads of 1 / 0.6; the pilot tells as much as 6
        # episodes at equal shares
        assert decision.more_episodes == pytest.approx(4 * (2.486 * decision.comparison.spread / 0.6) ** 2 - 38, abs=1)  # type: ignore[union-attr]

    def test_nothing_is_decided_before_the_first_block(self) -> None:
        _, decision = run(plan(), better_by(9.0), n=2)
        assert decision.decision == "not yet" and decision.p is None and not decision.effect.has_interval

    def test_worse_stops_at_an_episode_before_the_looks_say_so(self) -> None:
        machine, decision = run(plan(), better_by(-6.0))
        assert decision.decision == "no-go" and "worse than the baseline" in decision.reasons[0]
        assert len(machine.episodes) < 30 and decision.deterioration_p <= 0.01

    def test_lower_may_be_better(self) -> None:
        primary = {"metric": "energy", "smallest_effect": 1.0}
        _, decision = run(plan(metrics=ENERGY, primary=primary), better_by(0.0, energy=-2.0))
        assert (
            decision.decision == "go" and decision.effect.value == pytest.approx(2.0, abs=1.0) and "kWh" in decision.reasons[0]
        )
        _, decision = run(plan(metrics=ENERGY, primary=primary), better_by(0.0, energy=2.0))
        assert decision.decision == "no-go"

    def test_the_same_episodes_give_the_same_decision(self) -> None:
        first, second = (run(plan(), better_by(0.8), reviewed=False)[1] for _ in range(2))
        assert (first.reasons, first.p, first.effect) == (second.reasons, second.p, second.effect)

    def test_who_asks_between_looks_gets_the_answer_of_the_last_one(self) -> None:
        trial = plan()
        at_look = design_of(trial).ends[design_of(trial).looks[0].blocks - 1]
        first, later = (run(trial, better_by(0.5), n=n, reviewed=False)[1] for n in (at_look, at_look + 4))
        assert (first.p, len(first.looks)) == (later.p, 1) and first.effect != later.effect


class TestAborts:
    def test_too_many_end_the_trial(self) -> None:
        machine, decision = run(plan(), but(better_by(3.0), candidates, {"excluded": "aborted"}))
        assert decision.decision == "no-go" and len(machine.aborts) == 2 and "aborted" in decision.reasons[0]

    def test_those_of_the_baseline_say_nothing_against_the_candidate(self) -> None:
        stopped = but(better_by(3.0), lambda one: not candidates(one) and one.episode % 4 == 0, {"excluded": "aborted"})
        machine, decision = run(plan(), stopped)
        assert decision.decision == "go" and not machine.aborts and decision.n_aborts == 0
        assert sum(record.is_aborted for record in machine.episodes) > 1

    def test_one_that_may_be_counts_as_the_worst_return(self) -> None:
        trial = plan(risk={"budget": 100.0, "random_return": -10.0, "worst_return": -50.0, "baseline_return": 5.0})
        first = [True]

        def once(assignment: Assignment) -> bool:
            return candidates(assignment) and bool(first) and first.pop()

        machine, _ = run(trial, but(better_by(2.0), once, {"excluded": "aborted"}), reviewed=False)
        evidence = Evidence(trial, machine.episodes)
        (aborted,) = [record for record in machine.episodes if record.is_aborted]
        assert evidence.value(aborted, "return") == -50.0 and aborted.metrics["return"] != -50.0
        assert decide(trial, machine).effect.value < 0.5

    def test_without_a_worst_return_it_is_the_worst_that_was_seen(self) -> None:
        trial = plan(metrics=ENERGY, abort={"most": 20})
        machine, _ = run(trial, but(better_by(2.0), candidates, {"excluded": "aborted"}), reviewed=False)
        evidence = Evidence(trial, machine.episodes)
        aborted = next(record for record in machine.episodes if record.is_aborted)
        lowest = min(record.metrics["return"] for record in machine.episodes)
        most = max(record.metrics["energy"] for record in machine.episodes)
        assert [evidence.value(aborted, name) for name in ("return", "energy")] == [lowest, -most]


class TestGuardrails:
    def test_go_needs_them_proved(self) -> None:
        trial = plan(metrics=ENERGY, guardrails={"energy": {"margin": 2.0}})
        _, decision = run(trial, better_by(3.0, energy=0.0))
        assert decision.decision == "go" and any("Guardrail energy" in reason for reason in decision.reasons)

    def test_one_that_is_open_is_not_yet(self) -> None:
        trial = plan(metrics=ENERGY, guardrails={"energy": {"margin": 0.1}})
        _, decision = run(trial, better_by(3.0, energy=0.0))
        assert decision.is_superior and decision.decision == "not yet"
        assert any("energy" in reason and "not proved" in reason for reason in decision.reasons)

    @pytest.mark.parametrize("guardrail", [{"margin": 0.5}, {"limit": 30.5}])
    def test_one_that_is_violated_is_no_go(self, guardrail: dict[str, float]) -> None:
        _, decision = run(plan(metrics=ENERGY, guardrails={"energy": guardrail}), better_by(3.0, energy=4.0))
        assert decision.decision == "no-go" and "violated" in decision.reasons[0]

    def test_a_limit_holds(self) -> None:
        _, decision = run(plan(metrics=ENERGY, guardrails={"energy": {"limit": 33.0}}), better_by(3.0, energy=1.0))
        assert decision.decision == "go" and decision.guardrails[0].estimate.value == pytest.approx(31, abs=0.7)

    @pytest.mark.parametrize(("guardrail", "verdict"), [
        ({"limit": 0.05}, "not yet"), ({"margin": 0.05}, "not yet"), ({"limit": 0.0}, "not yet"),
        ({"limit": 0.3}, "go"), ({"margin": 0.3}, "go"),
    ])  # fmt: skip
    def test_no_failure_in_few_episodes_proves_that_they_are_not_frequent(
        self, guardrail: dict[str, float], verdict: str
    ) -> None:
        trial = plan(metrics={"failures": {"better": "lower"}}, guardrails={"failures": guardrail})
        never = better_by(3.0)
        _, decision = run(trial, lambda one, rng: {"metrics": {**never(one, rng)["metrics"], "failures": 0.0}})
        assert decision.is_superior and decision.decision == verdict

    @pytest.mark.parametrize("guardrail", [{"margin": 0.1}, {"limit": 0.1}])
    def test_a_candidate_that_fails_often_is_no_go(self, guardrail: dict[str, float]) -> None:
        trial = plan(metrics={"failures": {"better": "lower"}}, guardrails={"failures": guardrail})
        never = better_by(0.8)
        failing: Metrics = lambda one, rng: {  # noqa: E731
            "metrics": {**never(one, rng)["metrics"], "failures": float(candidates(one) and rng.random() < 0.9)}
        }
        _, decision = run(trial, failing)
        assert decision.decision == "no-go" and "violated" in decision.reasons[0]

    def test_an_open_one_says_how_many_more(self) -> None:
        trial = plan(metrics=ENERGY, guardrails={"energy": {"margin": 0.2}})
        _, decision = run(trial, better_by(3.0))
        assert decision.is_superior and decision.evidence.n_left == 0
        spread = decision.guardrails[0].comparison.spread  # type: ignore[union-attr]
        # What is there is worth 2 blocks of 4 x 0.75, and 32 episodes at equal shares
        assert decision.more_episodes == pytest.approx(4 * (2.486 * spread / 0.2) ** 2 - 38, rel=0.01)

    def test_the_metric_of_one_that_was_never_measured_is_named(self) -> None:
        trial = plan(metrics=ENERGY, guardrails={"energy": {"margin": 2.0}})
        _, decision = run(trial, lambda one, rng: {"metrics": {"return": better_by(3.0)(one, rng)["metrics"]["return"]}})
        assert decision.decision == "not yet" and decision.is_superior and not decision.guardrails[0].holds
        assert any("energy" in reason and "no episode" in reason for reason in decision.reasons)


class TestQuality:
    def check(self, decision: Decision, name: str) -> bool:
        return next(check.fired for check in decision.quality if check.name == name)

    def test_missing_episodes_of_one_policy_keep_a_go_back(self) -> None:
        asked = iter(range(100))
        missing = but(better_by(4.0), lambda one: candidates(one) and next(asked) % 2 == 0, {"reason": "power cut"})
        _, decision = run(plan(), missing)
        assert decision.is_superior and decision.decision == "not yet" and self.check(decision, "missing data")
        assert any("missing data" in reason for reason in decision.reasons)

    def test_a_drift_of_the_baseline_is_said_and_keeps_nothing_back(self) -> None:
        def rising(assignment: Assignment, rng: np.random.Generator) -> dict[str, Any]:
            return {"metrics": {"return": 0.5 * assignment.episode + 4.0 * candidates(assignment) + rng.normal()}}

        _, decision = run(plan(), rising)
        assert decision.decision == "go" and self.check(decision, "drift of the baseline")
        assert any("drift of the baseline" in reason for reason in decision.reasons)

    def test_a_difference_that_fades_keeps_a_go_back(self) -> None:
        def fading(assignment: Assignment, rng: np.random.Generator) -> dict[str, Any]:
            lead = 6.0 - 0.16 * assignment.episode
            return {"metrics": {"return": lead * candidates(assignment) + 0.1 * rng.normal()}}

        _, decision = run(plan(), fading, reviewed=False)
        assert decision.is_superior and decision.decision == "not yet" and self.check(decision, "fading of the difference")

    def test_nothing_fires_if_nothing_is_wrong(self) -> None:
        _, decision = run(plan(), better_by(1.0), reviewed=False)
        assert not any(check.fired for check in decision.quality)


def test_a_trial_that_was_cut_short_is_no_go_ahead() -> None:
    machine, decision = run(plan(), better_by(2.0))
    assert decision.decision == "go"
    machine.apply({"event": "stop", "reason": "the pump leaks"})
    stopped = decide(machine.plan, machine)
    assert stopped.decision == "not yet" and any("the pump leaks" in reason for reason in stopped.reasons)


def test_value_a_year() -> None:
    trial = plan(metrics={"return": {"value_per_unit": 0.5}}, costs={"episodes_per_year": 1000.0})
    _, decision = run(trial, better_by(2.0))
    value, effect = decision.value_a_year, decision.effect
    assert (value.value, value.low, value.high) == (500 * effect.value, 500 * effect.low, 500 * effect.high)


@pytest.mark.parametrize("arguments", [[], ["there is none"], [".", "--no-such-option"]])
def test_an_error_is_no_decision(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["trial", "decide", *arguments]).exit_code == 3
