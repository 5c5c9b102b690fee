"""What happens within an episode of a trial: measures, limits, takeover, shadow, actuators."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_offline_ft.trial.aborting import Violations
from sb3_offline_ft.trial.actuators import ActionLog, Actuators
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Arm, Assignment
from sb3_offline_ft.trial.episodes import KEPT_STEPS, EpisodeRunner, LastSteps, Outcome
from sb3_offline_ft.trial.measuring import aggregate
from sb3_offline_ft.trial.pilot import Takeover
from sb3_offline_ft.trial.plan import RETURN, AbortRules, Blocks, Limit, Metric, Primary, Stage, TrialPlan
from tests.trial_systems import BETTER, ENV, STEADY

ENERGY = Metric("energy", "info.energy", better="lower")
PLAN = TrialPlan(
    baseline=STEADY, candidate=BETTER, primary=Primary(RETURN, 1.0), budget=10, stages=(Stage("pilot", 10, 0.5),),
    metrics=(Metric(RETURN, "reward"), ENERGY), env=ENV,
)  # fmt: skip
LEVEL_LIMIT = AbortRules((Limit("info.level", max=1.5),))


def assignment(arm: Arm = CANDIDATE, stage: str = "pilot", episode: int = 0) -> Assignment:
    return Assignment(episode, stage, arm, 0.5, 0, 0, "drawn")


def run(plan: TrialPlan, arm: Arm = CANDIDATE, stage: str = "pilot", **options: Any) -> Outcome:
    runner = EpisodeRunner(plan)
    try:
        return runner.run(assignment(arm, stage), **options)
    finally:
        runner.close()


class TestMeasures:
    def test_an_episode_is_measured_and_the_same_again(self) -> None:
        one, again = run(PLAN), run(PLAN)
        assert one.metrics == again.metrics
        assert one.metrics[RETURN] == pytest.approx(-2.4, abs=1.5) and one.metrics["energy"] is not None
        assert (one.steps, one.acted, one.takeover) == (20, {BASELINE: 0, CANDIDATE: 20}, None)
        assert run(PLAN, BASELINE).metrics[RETURN] < one.metrics[RETURN]  # type: ignore[operator]

    def test_the_number_of_the_episode_seeds_it(self) -> None:
        runner = EpisodeRunner(PLAN)
        returns = {runner.run(assignment(episode=episode)).metrics[RETURN] for episode in (0, 1, 2, 0)}
        runner.close()
        assert len(returns) == 3

    def test_a_wash_in_is_left_out(self) -> None:
        whole = run(PLAN).metrics[RETURN]
        washed = run(replace(PLAN, blocks=Blocks(4, wash_in_steps=5))).metrics[RETURN]
        assert washed is not None and whole is not None and whole < washed < 0

    @pytest.mark.parametrize(("how", "expected"), [("sum", 6.0), ("mean", 2.0), ("min", 1.0), ("max", 3.0), ("last", 2.0)])
    def test_steps_become_one_number(self, how: str, expected: float) -> None:
        assert aggregate(how, [1.0, 3.0, 2.0]) == expected
        assert (aggregate(how, []) is None and aggregate(how, [1.0, float("nan")]) is None) or how in ("min", "max")

    def test_a_metric_that_the_environment_never_reports_is_named(self) -> None:
        plan = replace(PLAN, metrics=(*PLAN.metrics, Metric("lvl", "info.levle")))
        with pytest.raises(ValueError, match=r"metrics.lvl: .* reports no 'info.levle'; did you mean 'info.level'"):
            run(plan)

    def test_a_limit_that_the_environment_never_reports_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"abort.limits.info.torque: the environment reports no 'info.torque'"):
            run(replace(PLAN, abort=AbortRules((Limit("info.torque", max=1.0),))))

    def test_the_regime_is_that_of_most_steps(self) -> None:
        plan = replace(PLAN, regime="info.season")
        assert run(PLAN).regime is None and run(plan).regime == "summer"
        assert run(replace(plan, env_kwargs={"steps": 7})).regime == "winter"

    def test_columns_do_not_come_from_an_environment(self) -> None:
        plan = replace(PLAN, metrics=(*PLAN.metrics, Metric("heat", "column.heat")))
        with pytest.raises(ValueError, match=r"metrics.heat: 'column.heat' does not come from an environment"):
            EpisodeRunner(plan)

    def test_an_environment_that_fails_is_said(self) -> None:
        with pytest.raises(ValueError, match=r"Episode 0 was lost: the environment failed with RuntimeError: the pump"):
            run(replace(PLAN, env_kwargs={"breaks_at": 3}))

    def test_a_policy_for_other_spaces_does_not_begin(self) -> None:
        other = str(Path(__file__).parent / "old_files" / "0.1.0" / "plain_td3.zip")
        with pytest.raises(ValueError, match="does not fit"):
            EpisodeRunner(replace(PLAN, candidate=other))


def candidate(name: str) -> TrialPlan:
    return replace(PLAN, candidate=f"tests.trial_systems:{name}", abort=LEVEL_LIMIT)


class TestTakeover:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("overflowing", r"info.level was 1\.\d+, above its limit 1.5"),
            ("silent_after_a_while", "the candidate cannot act: its action is not finite"),
            ("failing_after_a_while", "the candidate cannot act: it failed with ZeroDivisionError: division by zero"),
            ("exiting_after_a_while", "the candidate cannot act: it failed with SystemExit: 3"),
        ],
    )
    def test_the_baseline_takes_over_at_once(self, name: str, reason: str) -> None:
        told: list[tuple[Takeover, int]] = []
        outcome = run(candidate(name), on_takeover=lambda takeover, steps: told.append((takeover, takeover.n_after)))
        takeover = outcome.takeover
        assert takeover is not None and not takeover.is_drill
        assert takeover.seconds is not None and 0 <= takeover.seconds < 1
        assert 1 < takeover.step < 20
        assert outcome.acted == {CANDIDATE: takeover.step, BASELINE: 20 - takeover.step}
        assert told == [(takeover, 1)], "it is told as soon as the baseline has acted, once"
        assert re.fullmatch(reason, takeover.reason)
        assert outcome.travel is not None and outcome.travel["steps"] == takeover.step

    def test_actions_of_another_shape_are_never_sent(self) -> None:
        outcome = run(candidate("two_valves"))
        assert outcome.takeover is not None and outcome.takeover.step == 0
        assert outcome.takeover.reason == "the candidate cannot act: its action has the shape (2,), not (1,)"
        assert outcome.acted == {CANDIDATE: 0, BASELINE: 20} and outcome.travel is None
        assert outcome.metrics == run(PLAN, BASELINE).metrics, "the baseline acted as if it always had"

    def test_a_candidate_that_cannot_begin_never_acts(self) -> None:
        outcome = run(candidate("Unready"))
        assert outcome.takeover is not None and outcome.takeover.step == 0
        assert outcome.takeover.reason == "the candidate cannot begin: it failed with RuntimeError: no connection"
        assert outcome.acted == {CANDIDATE: 0, BASELINE: 20}
        assert run(candidate("Unready"), BASELINE).metrics == run(PLAN, BASELINE).metrics
        shadow = run(candidate("Unready"), BASELINE, "shadow").shadow
        assert shadow is not None and shadow["faults"] == {"it failed with RuntimeError: no connection": 1}

    def test_an_abort_is_told_even_if_the_environment_fails_then(self, tmp_path: Path) -> None:
        told: list[Takeover] = []

        def keep(takeover: Takeover, steps: LastSteps) -> None:
            steps.write(tmp_path / "steps.npz")
            told.append(takeover)

        with pytest.raises(ValueError, match="the pump is gone"):
            run(replace(candidate("two_valves"), env_kwargs={"breaks_at": 0}), on_takeover=keep)
        (takeover,) = told
        assert takeover.step == 0 and "(2,)" in takeover.reason

    def test_actions_may_lie_beyond_their_bounds_as_far_as_the_plan_says(self) -> None:
        assert run(PLAN).takeover is None
        outcome = run(replace(PLAN, abort=AbortRules(actions_beyond=0.05)))
        assert outcome.takeover is not None
        assert "of the range beyond the bounds, more than 0.05" in outcome.takeover.reason

    def test_a_missing_metric_is_an_abort_only_if_it_was_there_before(self) -> None:
        plan = replace(PLAN, env_kwargs={"forgets": "energy"})
        runner = EpisodeRunner(plan, measured=["energy"])
        outcome = runner.run(assignment())
        runner.close()
        assert outcome.takeover is not None
        assert (outcome.takeover.reason, outcome.takeover.seconds) == ("no value of energy", None)
        assert outcome.metrics["energy"] is None and outcome.metrics[RETURN] is not None

    def test_a_limit_without_a_value_is_crossed(self) -> None:
        outcome = run(replace(PLAN, abort=LEVEL_LIMIT, env_kwargs={"forgets": "level", "after": 4}))
        assert outcome.takeover is not None
        assert (outcome.takeover.step, outcome.takeover.reason) == (5, "info.level has no value")

    def test_the_baseline_is_watched_and_not_aborted(self) -> None:
        plan = replace(PLAN, baseline="tests.trial_systems:overflowing", abort=LEVEL_LIMIT)
        outcome = run(plan, BASELINE)
        assert outcome.takeover is None
        violation = outcome.violations["info.level"]
        assert violation["count"] == 1 and violation["steps"] > 10 and violation["worst"] > 5

    def test_a_baseline_that_cannot_act_ends_the_run(self) -> None:
        with pytest.raises(ValueError, match=r"The baseline .*two_valves' cannot act in step 0: its action has the shape"):
            run(replace(PLAN, baseline="tests.trial_systems:two_valves"), BASELINE)

    def test_a_baseline_that_fails_is_named(self) -> None:
        failing, unready = (f"tests.trial_systems:{name}" for name in ("failing_after_a_while", "Unready"))
        with pytest.raises(ValueError, match=r"The baseline .* cannot act in step \d: it failed with ZeroDivisionError"):
            run(replace(PLAN, baseline=failing), BASELINE)
        with pytest.raises(ValueError, match=r"The baseline .* cannot begin: it failed with RuntimeError: no connection"):
            run(replace(PLAN, baseline=unready), BASELINE)

    def test_a_drill_is_a_takeover_on_purpose(self) -> None:
        outcome = run(PLAN, drill_at=7)
        assert outcome.takeover is not None and outcome.takeover.is_drill
        assert (outcome.takeover.step, outcome.acted) == (7, {CANDIDATE: 7, BASELINE: 13})

    def test_the_last_steps_are_kept(self, tmp_path: Path) -> None:
        plan = replace(candidate("overflowing"), env_kwargs={"steps": 300}, abort=AbortRules((Limit("info.level", max=40.0),)))
        file = tmp_path / "steps.npz"

        def keep(takeover: Takeover, steps: LastSteps) -> None:
            steps.write(file)

        outcome = run(plan, on_takeover=keep)
        assert outcome.takeover is not None and outcome.takeover.step > KEPT_STEPS
        arrays = np.load(file, allow_pickle=False)
        assert {name: arrays[name].shape for name in arrays.files} == {
            "observation": (KEPT_STEPS, 2), "action": (KEPT_STEPS, 1), "actor": (KEPT_STEPS,), "reward": (KEPT_STEPS,),
            "info.energy": (KEPT_STEPS,), "info.level": (KEPT_STEPS,),
        }  # fmt: skip
        assert [*arrays["actor"][-3:]] == [CANDIDATE, CANDIDATE, BASELINE]
        assert arrays["info.level"][-2] > 40 >= arrays["info.level"][-3]


class TestShadow:
    def test_the_candidate_computes_and_the_baseline_acts(self) -> None:
        outcome, alone = run(PLAN, BASELINE, "shadow"), run(PLAN, BASELINE)
        assert outcome.metrics == alone.metrics and outcome.acted == {BASELINE: 20, CANDIDATE: 0}
        shadow = outcome.shadow
        assert alone.shadow is None and shadow is not None and shadow["steps"] == 20
        assert 0 < shadow["distance"]["mean"] < shadow["distance"]["p95"] <= shadow["distance"]["max"] <= 1
        # 2 (1 - level) is above 1 until the level is above 0.5
        assert 0.05 <= shadow["beyond"] <= shadow["saturation"][0] < 0.5
        assert 0 < shadow["latency_ms"]["median"] <= shadow["latency_ms"]["p99"]
        assert shadow["faults"] == {}

    def test_the_same_policy_is_at_no_distance(self) -> None:
        shadow = run(replace(PLAN, candidate=STEADY), BASELINE, "shadow").shadow
        assert shadow is not None and shadow["distance"] == {"mean": 0.0, "p95": 0.0, "max": 0.0}

    def test_what_the_candidate_writes_into_its_observation_reaches_nobody(self) -> None:
        plan = replace(PLAN, env_kwargs={"shares_state": True})
        assert run(replace(plan, candidate="tests.trial_systems:scribbling"), BASELINE, "shadow").metrics == (
            run(plan, BASELINE, "shadow").metrics
        )

    def test_faults_are_counted_and_hurt_nobody(self) -> None:
        outcome = run(candidate("two_valves"), BASELINE, "shadow")
        assert outcome.takeover is None and outcome.shadow is not None
        assert outcome.shadow["faults"] == {"its action has the shape (2,), not (1,)": 20}


class TestActuators:
    space = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))

    def test_travel_is_in_ranges_and_saturation_in_steps(self) -> None:
        log = ActionLog(Actuators(self.space))
        for action in ([0.0, 5.0], [1.0, 5.0], [1.0, 10.0], [-1.0, 12.0]):
            log.timed(lambda seen: seen, action)
            log.add(np.array(action))
        summary = log.summary()
        assert summary is not None and summary["steps"] == 4
        assert summary["travel"] == pytest.approx([0.5 + 0 + 1.0, 0 + 0.5 + 0])
        assert summary["saturation"] == pytest.approx([3 / 4, 2 / 4])
        assert summary["beyond"] == 1 / 4

    def test_what_is_sent_is_within_the_bounds(self) -> None:
        actuators = Actuators(self.space)
        sent = actuators.command(np.array([-7.0, 3.0]))
        assert self.space.contains(sent) and sent.tolist() == [-1.0, 3.0]

    def test_a_number_will_do_for_a_single_actuator(self) -> None:
        actuators = Actuators(spaces.Box(-1, 1, (1,), np.float32))
        assert actuators.fault(0.5) is None and actuators.command(np.float64(0.5)).shape == (1,)
        assert actuators.fault([0.5, 0.5]) is not None

    def test_choices_differ_or_do_not(self) -> None:
        actuators = Actuators(spaces.Discrete(3))
        assert actuators.fault(np.array(2)) is None and actuators.fault(3) is not None and actuators.fault(None) is not None
        assert actuators.distance(1, 2).tolist() == [1.0] and actuators.distance(1, 1).tolist() == [0.0]

    def test_without_bounds_the_unit_is_the_range(self) -> None:
        actuators = Actuators(spaces.Box(-np.inf, np.inf, (1,), np.float32))
        assert actuators.distance([1.0], [3.5]).tolist() == [2.5] and not actuators.saturated([1e9]).any()


def test_violations_know_how_often_how_long_and_how_far() -> None:
    violations = Violations(Limit("info.level", min=-1.0, max=1.0))
    said = [violations.take(value) for value in (0.0, 1.5, 2.0, 0.5, -1.2, float("nan"), 1.0)]
    assert (violations.count, violations.steps, violations.worst) == (2, 4, 2.0)
    assert said == [
        None, "info.level was 1.5, above its limit 1", "info.level was 2, above its limit 1", None,
        "info.level was -1.2, below its limit -1", "info.level has no value", None,
    ]  # fmt: skip
