"""Who acts in which episode of a trial: permuted blocks, shares, the risk budget, and a state that follows from the events."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sb3_offline_ft.trial import decide
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE, Assignment, schedule
from sb3_offline_ft.trial.machine import BASELINE_EPISODES, Finished, TrialMachine, replay
from sb3_offline_ft.trial.plan import Blocks, Risk, Stage, TrialPlan
from tests.trial_plans import drive, plan_of

PROPERTIES = settings(deadline=None, max_examples=50)


@st.composite
def plans(draw: st.DrawFn) -> TrialPlan:
    """Plans with any stages, shares and blocks."""
    compared = []
    for i in range(draw(st.integers(1, 3))):
        share = draw(st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9]) | st.floats(0.05, 0.95))
        fewest = math.ceil(0.5 / min(share, 1 - share)) + 1
        compared.append(Stage(f"ramp {i}", draw(st.integers(fewest, fewest + 25)), share))
    first = [Stage("shadow", draw(st.integers(1, 4)), 0.0)] * draw(st.booleans())
    last = [Stage("full", draw(st.integers(1, 4)), 1.0)] * draw(st.booleans())
    stages = (*first, *compared, *last)
    plan = plan_of(seed=draw(st.integers(0, 2**31)), blocks={"episodes": draw(st.integers(2, 8))})
    spare = draw(st.integers(0, 5))
    return replace(plan, stages=stages, budget=sum(stage.episodes for stage in stages) + spare)


@PROPERTIES
@given(plan=plans())
def test_each_stage_gives_the_candidate_its_share_and_each_block_has_both(plan: TrialPlan) -> None:
    for index, stage in enumerate(plan.stages):
        slots = schedule(plan, index)
        assert len(slots) == stage.episodes
        if not stage.compares:
            continue
        assert sum(slot.arm == CANDIDATE for slot in slots) == math.floor(stage.share * stage.episodes + 0.5)
        for _, block in itertools.groupby(slots, key=lambda slot: slot.block):
            arms = Counter(slot.arm for slot in block)
            assert arms[CANDIDATE] >= 1 and arms[BASELINE] >= 1


@PROPERTIES
@given(plan=plans())
def test_shares_are_the_probabilities_of_what_was_drawn(plan: TrialPlan) -> None:
    for index, stage in enumerate(plan.stages):
        if not stage.compares:
            continue
        for _, group in itertools.groupby(schedule(plan, index), key=lambda slot: slot.block):
            block = list(group)
            chance = math.prod(slot.share if slot.arm == CANDIDATE else 1 - slot.share for slot in block)
            n = sum(slot.arm == CANDIDATE for slot in block)
            # All orders of a block are as probable
            assert chance == pytest.approx(1 / math.comb(len(block), n))


@PROPERTIES
@given(plan=plans())
def test_blocks_are_numbered_through_the_trial(plan: TrialPlan) -> None:
    blocks = [slot.block for index in range(len(plan.stages)) for slot in schedule(plan, index) if slot.block is not None]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(len(set(blocks))))


def test_all_orders_of_a_block_are_as_frequent() -> None:
    plan = plan_of(stages=[{"name": "ramp", "episodes": 4, "share": 0.5}])
    orders: Counter[str] = Counter()
    for seed in range(3000):
        orders["".join(slot.arm[0] for slot in schedule(replace(plan, seed=seed), 0))] += 1
    assert len(orders) == 6
    assert chisquare(list(orders.values())).pvalue > 1e-4


def test_a_small_share_makes_the_block_as_large_as_it_needs_to_be() -> None:
    plan = plan_of(stages=[{"name": "ramp 10 %", "episodes": 30, "share": 0.1}])
    sizes = Counter(slot.block for slot in schedule(plan, 0))
    assert list(sizes.values()) == [10, 10, 10]
    assert [slot.size for slot in schedule(replace(plan, blocks=Blocks(15)), 0)] == [15] * 30


@PROPERTIES
@given(plan=plans(), data=st.data())
def test_the_same_events_give_the_same_state_wherever_the_process_ended(plan: TrialPlan, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    machine = TrialMachine(plan)
    events, end = drive(machine, lambda _: None if rng.random() < 0.1 else float(rng.normal()))
    assert replay(plan, events) == machine
    assert machine.next() == end
    cut = data.draw(st.integers(0, len(events)))
    again = replay(plan, events[:cut])
    for event in events[cut:]:
        if event["event"] == "assignment":
            upcoming = again.next()
            assert isinstance(upcoming, Assignment)
            assert upcoming.as_event() == {name: value for name, value in event.items() if name != "event"}
        again.apply(event)
    assert again == machine


@PROPERTIES
@given(plan=plans(), data=st.data())
def test_the_candidate_never_loses_more_than_the_risk_budget(plan: TrialPlan, data: st.DataObject) -> None:
    worst = data.draw(st.floats(-50.0, -10.0))
    plan = replace(plan, risk=Risk(data.draw(st.floats(0.01, 0.5)), -10.0, worst))
    allowed = plan.risk.budget * plan.budget if plan.risk else 0.0
    returns = st.floats(worst, 5.0)
    machine = TrialMachine(plan)

    def play(assignment: Assignment) -> float | None:
        if machine.risk is not None:
            assert machine.risk.lost <= allowed + 1e-9
        return 1.0 if assignment.arm == BASELINE else data.draw(st.none() | returns)

    drive(machine, play)
    if machine.risk is not None:
        assert machine.risk.lost <= allowed + 1e-9


def test_the_stages_follow_one_another_and_full_needs_a_go() -> None:
    machine = TrialMachine(plan_of())
    _, end = drive(machine, lambda _: 0.0)
    assert end.awaits_go and not end.is_cut
    assert Counter(record.stage for record in machine.episodes) == {"shadow": 3, "pilot": 8, "ramp 50 %": 12}
    assert {record.arm for record in machine.episodes if record.stage == "shadow"} == {BASELINE}
    assert machine.is_compared_fully
    machine.apply({"event": "decision", "decision": "go", "reasons": ["better"]})
    _, end = drive(machine, lambda assignment: 0.0 if assignment.arm == CANDIDATE else None)
    assert end == Finished("All stages are done.")
    assert [record.arm for record in machine.episodes][-4:] == [CANDIDATE] * 4
    assert not any(record.is_compared for record in machine.episodes if record.stage in ("shadow", "full"))


def test_a_go_ends_the_comparison_and_a_no_go_the_trial() -> None:
    machine = TrialMachine(plan_of())
    drive(machine, lambda assignment: _end_with(machine, assignment, 6, "go"))
    assert Counter(record.stage for record in machine.episodes) == {"shadow": 3, "pilot": 4, "full": 4}
    machine = TrialMachine(plan_of())
    _, end = drive(machine, lambda assignment: _end_with(machine, assignment, 6, "no-go"))
    assert len(machine.episodes) == 7
    assert end.is_cut and "no-go. because" in end.reason


def _end_with(machine: TrialMachine, assignment: Assignment, episode: int, decision: str) -> float:
    if assignment.episode == episode:
        # Noted within the episode, which is recorded after it
        machine.apply({"event": "decision", "decision": decision, "reasons": ["because"]})
    return 0.0


def test_the_baseline_acts_until_it_is_known_what_is_at_risk() -> None:
    stages = [{"name": "ramp", "episodes": 8, "share": 0.5}]
    plan = plan_of(stages=stages, risk={"budget": 0.5, "random_return": -10, "worst_return": -10})
    machine = TrialMachine(plan)
    drive(machine, lambda assignment: 0.0)
    first = machine.episodes[:BASELINE_EPISODES]
    assert {(record.arm, record.block, record.share) for record in first} == {(BASELINE, None, 0.0)}
    assert "What is at risk is known after 3 returns" in first[0].assignment.why
    assert all(record.is_compared for record in machine.episodes[BASELINE_EPISODES:])
    assert len(machine.episodes) == BASELINE_EPISODES + 8
    # Where the plan says it, no episode is needed
    told = plan_of(stages=stages, risk={"budget": 0.5, "random_return": -10, "worst_return": -10, "baseline_return": 0})
    assert TrialMachine(told).next().block == 0  # type: ignore[union-attr]


def test_a_candidate_that_has_spent_the_risk_budget_does_not_act_again() -> None:
    plan = plan_of(risk={"budget": 0.1, "random_return": -10, "worst_return": -10})
    machine = TrialMachine(plan)
    _, end = drive(machine, lambda assignment: 0.0 if assignment.arm == BASELINE else -10.0)
    # Three total losses are allowed: 0.1 of 30 episodes
    assert sum(record.arm == CANDIDATE for record in machine.episodes) == 3
    assert end.is_cut
    assert "of 3.00 total losses the candidate's episodes have taken 3.00, and one more may take 1.00" in end.reason
    assert "`risk.budget` of 0.133 would cover it" in end.reason


def test_the_budget_of_episodes_ends_the_trial() -> None:
    plan = plan_of(stages=[{"name": "ramp", "episodes": 20, "share": 0.5}], budget={"episodes": 20})
    machine = TrialMachine(replace(plan, budget=7))
    _, end = drive(machine, lambda _: 0.0)
    assert end == Finished("The budget of 7 episodes is used up.", is_cut=True)


def test_episodes_besides_those_of_the_stages_take_none_away_from_them() -> None:
    """Those in which the baseline acts until it is known what is at risk, and drills."""
    stages = [{"name": "ramp", "episodes": 8, "share": 0.5}]
    risk = {"budget": 1.0, "random_return": -10, "worst_return": -10}
    machine = TrialMachine(plan_of(stages=stages, budget={"episodes": 8}, risk=risk))
    for is_drill in (False, False, False, True):
        upcoming = machine.drill() if is_drill else machine.next()
        assert isinstance(upcoming, Assignment)
        machine.apply({"event": "assignment", **upcoming.as_event()})
        machine.apply({"event": "episode", "episode": upcoming.episode, "metrics": {"return": 0.0}})
    _, end = drive(machine, lambda _: 0.0)
    assert end == Finished("All stages are done.")
    assert sum(record.is_compared for record in machine.episodes) == machine.n_counted == 8


def test_a_drill_is_an_episode_of_the_candidate_besides_those_of_the_stage() -> None:
    machine = TrialMachine(plan_of())
    drill = machine.drill()
    assert isinstance(drill, Assignment)
    assert (drill.arm, drill.block, drill.slot, drill.share) == (CANDIDATE, None, None, 1.0)
    machine.apply({"event": "assignment", **drill.as_event()})
    again = machine.drill()
    assert isinstance(again, Finished) and "under way" in again.reason
    machine.apply({"event": "episode", "episode": 0, "metrics": {"return": 0.0}, "excluded": "drill"})
    _, end = drive(machine, lambda _: 0.0)
    assert end.awaits_go
    assert Counter(record.stage for record in machine.episodes) == {"shadow": 4, "pilot": 8, "ramp 50 %": 12}


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"event": "assignment", "episode": 2}, "Episode 2 cannot be assigned: the next episode to assign is 0"),
        ({"event": "episode", "episode": 0, "metrics": {}}, "Episode 0 cannot be recorded: the next episode to assign is 0"),
    ],
)
def test_events_out_of_order_are_errors(event: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrialMachine(plan_of()).apply(event)


def test_an_episode_that_is_under_way_is_the_next_one() -> None:
    machine = TrialMachine(plan_of())
    first = machine.next()
    assert isinstance(first, Assignment)
    machine.apply({"event": "assignment", **first.as_event()})
    assert machine.next() == first
    with pytest.raises(ValueError, match="Episode 1 cannot be recorded: episode 0 is under way"):
        machine.apply({"event": "episode", "episode": 1, "metrics": {}})


@pytest.mark.parametrize(("missing", "more"), [(7, None), (12, 48)])
def test_missing_episodes_cost_the_go_and_it_is_said_how_many_make_up_for_them(missing: int, more: int | None) -> None:
    stages = [{"name": "ramp 50 %", "episodes": 72, "share": 0.5}]
    plan = plan_of(stages=stages, budget={"episodes": 72}, primary={"metric": "return", "smallest_effect": 5.0})
    machine = TrialMachine(plan)
    lost = {6 * i for i in range(missing)}
    returns = {arm: float(arm == CANDIDATE) for arm in (BASELINE, CANDIDATE)}
    drive(
        machine,
        lambda upcoming: None if upcoming.episode in lost else returns[upcoming.arm] + 0.1 * math.sin(upcoming.episode),
    )
    decision = decide(plan, machine)
    assert (decision.decision, decision.more_episodes) == ("go" if more is None else "not yet", more)
