"""A trial of a system without an environment: who drives, what came of it, and what is decided; from Python and typed."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from sb3_offline_ft.cli import app
from sb3_offline_ft.trial import Assignment, Finished, Trial
from sb3_offline_ft.trial.assignment import CANDIDATE
from sb3_offline_ft.trial.plan import PLAN_FILE
from tests.trial_plans import plan_content

METRICS = {"energy": {"from": "column.kwh", "better": "lower", "unit": "kWh", "value_per_unit": 0.12}}
PLANT: dict[str, Any] = {
    "metrics": METRICS,
    "primary": {"metric": "energy", "smallest_effect": 2.0},
    "guardrails": {"return": {"margin": 3.0}},
}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Makes trials of a plant."""
    yield lambda **sections: Trial.create(tmp_path / "pump", **plan_content(**sections))


def typed(*arguments: str | Path) -> Result:
    """What a command says."""
    return CliRunner().invoke(app, ["trial", *map(str, arguments)])


def log_of(folder: Path, kwh: float, rewards: float, *, torque: float = 0.0, n_steps: int = 10, **columns: Any) -> Path:
    """A log as a plant writes one: a row a step."""
    steps = np.arange(n_steps)
    content = {"t": steps, "kwh": np.full(n_steps, kwh / n_steps), "reward": np.full(n_steps, rewards / n_steps)}
    path = folder / "log.csv"
    pd.DataFrame({**content, "torque": np.full(n_steps, torque), **columns}).to_csv(path, index=False)
    return path


def run_plant(trial: Trial, better_by: float, reward: float = 0.0, seed: int = 0) -> Finished:
    """Records all episodes of a plant whose candidate saves so many kWh, and returns so much more."""
    rng = np.random.default_rng(seed)
    while not isinstance(upcoming := trial.next(), Finished):
        gain = upcoming.arm == CANDIDATE
        energy = 30 - gain * better_by + rng.normal()
        trial.record(10 + gain * reward + rng.normal(), metrics={"energy": energy}, episode=upcoming.episode)
    return upcoming


def edit(trial: Trial, before: str, after: str) -> None:
    """Changes the file of a plan as with an editor."""
    file = trial.folder / PLAN_FILE
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")


class TestOutcomes:
    def test_a_better_candidate_gets_a_go_and_the_last_stage(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        end = run_plant(trial, better_by=6)
        decision = trial.decide()
        assert decision.decision == "go"
        assert decision.effect.low > 2 and decision.effect.value == pytest.approx(6, abs=2)
        assert end.reason == "All stages are done."
        assert [record.stage for record in trial.machine.episodes[-4:]] == ["full"] * 4
        written = [event for event in trial.journal.events if event["event"] == "decision"]
        assert [event["decision"] for event in written] == ["go"]
        assert written[0]["reasons"] and written[0]["effect"]["value"] == pytest.approx(6, abs=1.5)

    def test_a_worse_one_is_stopped_before_the_stages_are_done(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        end = run_plant(trial, better_by=-10)
        assert trial.decide().decision == "no-go"
        assert "worse than the baseline" in trial.decide().reasons[0]
        assert end.is_cut
        assert len(trial.machine.episodes) < 23
        # Nothing goes on from there
        assert isinstance(trial.next(), Finished)

    def test_one_that_breaks_a_guardrail_gets_no_go_whatever_it_saves(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        run_plant(trial, better_by=6, reward=-12)
        decision = trial.decide()
        assert decision.decision == "no-go"
        assert any("Guardrail return" in reason for reason in decision.reasons)

    def test_an_open_result_is_not_yet_with_what_it_would_take(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT | {"primary": {"metric": "energy", "smallest_effect": 0.4}})
        end = run_plant(trial, better_by=0.1, seed=1)
        decision = trial.decide()
        assert decision.decision == "not yet"
        assert decision.more_episodes is not None and decision.more_episodes > 0
        assert end.awaits_go
        # An amendment gives it more
        edit(trial, "  - {name: full", "  - {name: ramp again, episodes: 40, share: 0.5}\n  - {name: full")
        edit(trial, "budget: {episodes: 30}", "budget: {episodes: 70}")
        with pytest.warns(UserWarning, match="frozen stays in force"):
            assert isinstance(trial.next(), Finished)
        changed = trial.amend("the result is open")
        assert "budget.episodes: 30 -> 70" in changed
        upcoming = trial.next()
        assert isinstance(upcoming, Assignment) and upcoming.stage == "ramp again"
        # Blocks go on being numbered, and the state follows from the journal
        assert upcoming.block == 5
        assert Trial.open(trial.folder).machine == trial.machine

    def test_aborts_beyond_those_allowed_are_a_no_go(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        while not isinstance(upcoming := trial.next(), Finished):
            trial.record(10, metrics={"energy": 30}, aborted="pressure" if upcoming.arm == CANDIDATE else None)
        assert [abort["reason"] for abort in trial.machine.aborts] == ["pressure"] * 2
        assert trial.decide().decision == "no-go"
        assert "were aborted, at most 1 may be" in trial.decide().reasons[0]


class TestRecording:
    def test_the_same_again_changes_nothing_and_another_result_is_an_error(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        first = trial.next()
        assert isinstance(first, Assignment)
        assert trial.next() == first
        assert trial.record(10, metrics={"energy": 30}, episode=0).is_new
        before = trial.journal.path.read_bytes()
        assert not trial.record(10, metrics={"energy": 30}, episode=0).is_new
        for other in ({"energy": 31}, {"energy": 30, "return": 11}):
            with pytest.raises(ValueError, match=r"Episode 0 was recorded with return=10, energy=30, and cannot be changed"):
                trial.record(metrics={"return": 10, **other}, episode=0)
        assert trial.journal.path.read_bytes() == before

    def test_records_out_of_order_are_errors(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        with pytest.raises(ValueError, match="No episode is under way"):
            trial.record(10, metrics={"energy": 30})
        # What went wrong has not begun the trial
        assert not trial.is_begun
        trial.next()
        with pytest.raises(ValueError, match="Episode 1 is not under way: expected 0, which comes before it"):
            trial.record(10, metrics={"energy": 30}, episode=1)
        trial.record(10, metrics={"energy": 30})
        with pytest.raises(ValueError, match=r"No episode is under way\. Episode 0 was the last to be recorded"):
            trial.record(10, metrics={"energy": 30})

    @pytest.mark.parametrize(
        ("metrics", "message"),
        [
            ({"energi": 30.0}, r"no metric 'energi': did you mean 'energy'"),
            ({"energy": float("nan")}, "energy must be a finite number, found nan"),
            ({}, "the plan needs energy, and it is not given"),
        ],
    )
    def test_metrics_that_are_wrong_or_missing_are_errors(
        self, make: Callable[..., Trial], metrics: dict[str, float], message: str
    ) -> None:
        trial = make(**PLANT)
        trial.next()
        with pytest.raises(ValueError, match=message):
            trial.record(10, metrics=metrics)
        assert trial.machine.open is not None

    def test_an_episode_without_result_is_missing_and_the_trial_goes_on(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        trial.give_up("power cut")
        assert trial.machine.episodes[0].is_missing
        assert trial.machine.episodes[0].excluded == "missing: power cut"
        assert isinstance(trial.next(), Assignment)

    def test_a_drill_is_no_abort_and_not_compared(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        for reason in ("on purpose", None):
            drill = trial.next(drill=True)
            assert isinstance(drill, Assignment) and drill.is_drill
            trial.record(9, metrics={"energy": 31}, aborted=reason, seconds_to_baseline=0.4)
        assert [event["baseline_took_over"] for event in trial.machine.drills] == [True, False]
        assert trial.machine.drills[0]["seconds_to_baseline"] == 0.4
        assert not trial.machine.aborts
        assert {record.excluded for record in trial.machine.episodes} == {"drill"}
        upcoming = trial.next()
        assert isinstance(upcoming, Assignment) and not upcoming.is_drill and upcoming.slot == 0

    def test_an_event_that_cannot_follow_is_not_written(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        before = trial.journal.path.read_bytes()
        with pytest.raises(ValueError, match="Episode 3 cannot be recorded"):
            trial.append("missing", episode=3, reason="x")
        with pytest.raises(ValueError, match="JSON"):
            trial.append("episode", episode=0, metrics={"energy": float("inf")})
        assert trial.journal.path.read_bytes() == before
        assert trial.machine == Trial.open(trial.folder).machine

    def test_a_process_that_ends_at_any_moment_loses_nothing_that_was_recorded(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        for _ in range(8):
            upcoming = trial.next()
            assert isinstance(upcoming, Assignment)
            # As after kill -9: another process knows only what is on the disk
            trial = Trial.open(trial.folder)
            assert trial.next() == upcoming
            trial.record(10, metrics={"energy": 30})
        assert [record.episode for record in Trial.open(trial.folder).machine.episodes] == list(range(8))

    def test_two_processes_at_once_get_one_clear_word(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        other = Trial.open(trial.folder)
        with trial.locked():
            with pytest.raises(ValueError, match="Another process works on the trial"):
                other.record(10, metrics={"energy": 30})
            # Looking needs no lock
            assert other.decide().decision == "not yet"
        assert other.record(10, metrics={"energy": 30}).is_new
        # The first one knows of it
        upcoming = trial.next()
        assert isinstance(upcoming, Assignment) and upcoming.episode == 1

    def test_an_edited_journal_says_where(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        trial.record(10, metrics={"energy": 30})
        path = trial.journal.path
        lines = path.read_text(encoding="utf-8").splitlines()
        at = next(i for i, line in enumerate(lines, start=1) if '"event": "episode"' in line)
        path.write_text(path.read_text(encoding="utf-8").replace('"energy": 30', '"energy": 20'), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"journal\.jsonl, line {at} was changed after it was written"):
            Trial.open(trial.folder)


class TestPlanOnceBegun:
    def test_a_changed_file_is_noted_once_and_not_in_force(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        edit(trial, "smallest_effect: 2.0", "smallest_effect: 0.5")
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"primary.smallest_effect: 2.0 -> 0.5.*frozen stays in force"):
                trial.next()
        assert trial.plan_in_force.primary.smallest_effect == 2.0
        assert [event["difference"] for event in trial.journal.events if event["event"] == "plan_changed"] == [
            ["primary.smallest_effect: 2.0 -> 0.5"]
        ]

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("candidate: TD3C", "candidate: SAC", "`candidate` cannot be amended after the first episode: begin a new"),
            ("seed: 0", "seed: 1", "`seed` cannot be amended"),
            (
                "{name: shadow, episodes: 3",
                "{name: shadow, episodes: 4",
                r"Stages that have begun \(shadow\) cannot be amended",
            ),
            ("better: lower", "better: higher", "`metrics.energy` was measured in another way"),
            ("", "", "is the one in force: edit it first"),
        ],
    )
    def test_what_would_make_the_episodes_worthless_cannot_be_amended(
        self, make: Callable[..., Trial], before: str, after: str, message: str
    ) -> None:
        trial = make(**PLANT)
        trial.next()
        edit(trial, before, after)
        with pytest.raises(ValueError, match=message):
            trial.amend("why not")

    def test_before_the_first_episode_the_file_counts_without_amendment(self, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        with pytest.raises(ValueError, match="has not begun"):
            trial.amend("too early")
        edit(trial, "smallest_effect: 2.0", "smallest_effect: 0.5")
        trial.next()
        assert trial.plan_in_force.primary.smallest_effect == 0.5

    def test_the_files_of_policies_are_noted_and_must_stay(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        policy = tmp_path / "policy.zip"
        policy.write_bytes(b"policy")
        trial = make(**PLANT | {"candidate": str(policy)})
        trial.next()
        noted = trial.journal.events[0]["files"]
        assert noted["baseline"] is None and len(noted["candidate"]) == 64
        trial.begin({"candidate": noted["candidate"]})
        with pytest.raises(ValueError, match="file of the candidate is not the one that the trial began with"):
            trial.begin({"candidate": "0" * 64})


class TestLogs:
    def test_metrics_come_from_columns_as_the_plan_says(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        columns = tmp_path / "columns.yml"
        columns.write_text("reward: score\ntime: t\nepisode: run\n", encoding="utf-8")
        metrics = METRICS | {
            "peak": {"from": "column.torque", "aggregate": "max", "better": "lower"},
            "end": {"from": "column.kwh", "aggregate": "last"},
            "steady": {"from": "column.torque", "aggregate": "mean"},
        }
        trial = make(**PLANT | {"metrics": metrics}, columns=str(columns), regime="column.load", blocks={"wash_in_steps": 1})
        trial.next()
        path = tmp_path / "log.csv"
        # Out of order, of two runs, and the first step is wash-in
        pd.DataFrame(
            {
                "t": [2, 0, 1, 0, 3],
                "run": [0, 0, 0, 1, 0],
                "kwh": [2.0, 100.0, 1.5, 7.0, 4.25],
                "torque": [1.0, 9.0, 3.0, 8.0, 2.0],
                "score": [0.1, 50.0, 0.2, 7.0, 0.3],
                "load": ["high", "low", "high", "low", "low"],
            }
        ).to_csv(path, index=False)
        trial.record(csv=path)
        record = trial.machine.episodes[0]
        expected = {"return": 0.6, "energy": 7.75, "peak": 3.0, "end": 4.25, "steady": 2.0}
        assert record.metrics == pytest.approx(expected)
        assert (record.steps, record.regime) == (4, "high")

    @pytest.mark.parametrize(("ended", "known"), [({}, 6), ({"pressure": [4.0, 4.0, 9.0, 4.0, 4.0, 4.0]}, 3)])
    def test_the_report_of_a_plant_has_its_actuators_and_who_acted(
        self, tmp_path: Path, make: Callable[..., Trial], ended: dict[str, list[float]], known: int
    ) -> None:
        columns = tmp_path / "columns.yml"
        columns.write_text("actions: [valve_*]\nreward: reward\n", encoding="utf-8")
        limits = {"limits": {"column.pressure": {"max": 5.0}}}
        trial = make(**PLANT | {"abort": limits}, columns=str(columns), action_bounds={"low": 0, "high": [1, 100]})
        # At its upper bound in half of the steps; from bound to bound at each
        valves = {"valve_1": [0.5, 0.5, 0.5, 1.0, 1.0, 1.0], "valve_2": [0.0, 100.0] * 3, "pressure": [4.0] * 6}
        baseline = log_of(tmp_path, kwh=30, rewards=5, n_steps=6, **valves)
        while isinstance(upcoming := trial.next(), Assignment) and upcoming.arm != CANDIDATE:
            trial.record(csv=baseline)
        trial.record(csv=log_of(tmp_path, kwh=30, rewards=5, n_steps=6, **valves | ended))
        first, last = trial.machine.episodes[0], trial.machine.episodes[-1]
        assert first.travel == {"steps": 6, "travel": [0.5, 5.0], "saturation": [0.5, 1.0], "beyond": 0.0, "latency_ms": None}
        assert first.acted == {"baseline": 6, "candidate": 0}
        # What the baseline did after it took over is not the candidate's
        assert last.is_aborted == bool(ended) and last.acted == {"baseline": 6 - known, "candidate": known}
        assert last.travel is not None and last.travel["travel"] == ([0.5, 5.0] if known == 6 else [0.0, 2.0])
        page = trial.report().read_text(encoding="utf-8")
        assert "Actuators" in page and "share of all steps in which the candidate acted" in page

    def test_actions_without_a_column_or_with_other_bounds_are_errors(
        self, tmp_path: Path, make: Callable[..., Trial]
    ) -> None:
        trial = make(**PLANT, action_bounds={"low": [0, 0], "high": [1, 1]})
        trial.next()
        with pytest.raises(ValueError, match=r"no column was recognised as actions .* Name it with the key `actions` of"):
            trial.record(csv=log_of(tmp_path, kwh=30, rewards=5))
        with pytest.raises(ValueError, match="has 1 actions, and `action_bounds` of the plan 2"):
            trial.record(csv=log_of(tmp_path, kwh=30, rewards=5, action_0=0.5))

    def test_values_that_are_given_come_before_those_of_the_log(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT)
        trial.next()
        trial.record(csv=log_of(tmp_path, kwh=30, rewards=5), metrics={"energy": 29.5})
        assert trial.machine.episodes[0].metrics == pytest.approx({"return": 5.0, "energy": 29.5})

    def test_a_limit_that_the_candidate_crossed_makes_an_abort(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT | {"abort": {"limits": {"column.torque": {"max": 2.0}}}})
        while not trial.machine.aborts:
            upcoming = trial.next()
            assert isinstance(upcoming, Assignment)
            trial.record(csv=log_of(tmp_path, kwh=30, rewards=5, torque=2.5))
        (abort,) = trial.machine.aborts
        assert (abort["arm"], abort["step"]) == ("candidate", 0)
        assert "column.torque was 2.5, above its limit 2" in abort["reason"]
        record = trial.machine.episodes[-1]
        assert record.is_aborted and not record.is_compared
        # The baseline may cross it: it runs today
        before = trial.machine.episodes[0]
        assert before.excluded is None and before.violations == {"column.torque": {"count": 1, "steps": 10, "worst": 2.5}}

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"kwh": "x"}, r"column 'kwh', row 1 \(line 2\): expected a number, found the text 'x'"),
            ({"kwh": None, "kWh": 3.0}, r"has no column 'kwh' for the plan. Did you mean kWh"),
            (
                {"reward": None},
                r"no column was recognised as reward .* Name it with the key `reward` of the column map, .*kwh, torque\.$",
            ),
            ({"Reward": 1.0}, "reward could be reward or Reward. Say which with the key `reward` of the column map"),
            ({"episode": [7, 8] * 5}, "none of its rows is of episode 0; it has the episodes 7, 8"),
        ],
    )
    def test_logs_without_what_the_plan_needs_are_errors(
        self, tmp_path: Path, make: Callable[..., Trial], columns: dict[str, Any], message: str
    ) -> None:
        trial = make(**PLANT)
        trial.next()
        path = log_of(tmp_path, kwh=30, rewards=5)
        table = pd.read_csv(path).assign(**{name: value for name, value in columns.items() if value is not None})
        if "episode" in columns:
            table = table.sort_values("episode")
        table.drop(columns=[name for name, value in columns.items() if value is None]).to_csv(path, index=False)
        with pytest.raises(ValueError, match=message):
            trial.record(csv=path)
        assert trial.machine.open is not None and not trial.machine.episodes

    def test_an_episode_that_is_all_wash_in_is_an_error(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        trial = make(**PLANT | {"blocks": {"wash_in_steps": 10}})
        trial.next()
        with pytest.raises(ValueError, match="has 10 steps, all of which belong to the wash-in"):
            trial.record(csv=log_of(tmp_path, kwh=30, rewards=5))


class TestRobustness:
    def test_what_the_plan_asks_for_comes_before_the_first_episode_and_once(self, tmp_path: Path) -> None:
        asked = {"seeds": 1, "perturb": {"delay": [1]}}
        trial = Trial.create(
            tmp_path / "swing", env="Pendulum-v1", baseline="zero", candidate="random", episodes=9, robustness=asked
        )
        trial.run(progress_bar=False, until="shadow")
        kinds = [event["event"] for event in trial.journal.events]
        assert kinds.index("robustness") < kinds.index("stage")
        noted = trial.machine.robustness
        assert noted is not None
        content = (trial.folder / noted["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == noted["sha256"]
        assert set(json.loads(content)["policies"]) == {"candidate", "baseline"}
        trial.run(progress_bar=False, until="pilot")
        assert [event["event"] for event in trial.journal.events].count("robustness") == 1

    def test_a_system_without_environment_cannot_be_changed(self, make: Callable[..., Trial]) -> None:
        with pytest.raises(ValueError, match="has no environment to change"):
            make(**PLANT).robustness()


class TestCommands:
    def test_the_journey_of_a_plant_with_logs(self, tmp_path: Path) -> None:
        folder = tmp_path / "pump"
        made = typed("init", folder, "--baseline", "PID of today", "--candidate", "TD3C", "--episodes", "24")
        assert made.exit_code == 0, made.output
        assert "trial plan" in made.output
        file = folder / PLAN_FILE
        text = file.read_text(encoding="utf-8")
        text = text.replace("metrics:\n", "metrics:\n  energy: {from: column.kwh, better: lower, unit: kWh}\n")
        text = text.replace("{metric: return, smallest_effect: 1.0}", "{metric: energy, smallest_effect: 2}")
        file.write_text(text, encoding="utf-8")
        rng = np.random.default_rng(0)
        codes = []
        while (said := typed("next", folder, "--json")).exit_code == 0:
            upcoming = json.loads(said.stdout)
            log = log_of(tmp_path, kwh=30 - 6 * (upcoming["arm"] == "candidate") + rng.normal(), rewards=1)
            recorded = typed("record", folder, "--episode", str(upcoming["episode"]), "--csv", log)
            assert recorded.exit_code == 0, recorded.output
            codes.append(typed("decide", folder).exit_code)
        assert "finished" in json.loads(said.stdout)
        # Not yet, until it is a go
        assert codes == sorted(codes, reverse=True) and set(codes) == {2, 0}
        decided = typed("decide", folder)
        assert decided.stdout.startswith("GO\n- By energy, the candidate is better")
        assert json.loads(typed("decide", folder, "--json").stdout)["decision"] == "go"
        status = " ".join(typed("status", folder).stdout.split())
        assert "go. By energy" in status and "All stages are done." in status and "PID of today" in status

    def test_what_next_and_record_say(self, tmp_path: Path, make: Callable[..., Trial]) -> None:
        folder = make(**PLANT).folder
        first = typed("next", folder)
        assert "Episode 0, shadow: the baseline drives (PID)." in first.stdout
        assert "--episode 0" in first.stdout
        recorded = typed("record", folder, "--return", "12.3", "--metric", "energy=4.1")
        assert recorded.stdout == "Episode 0 (shadow, baseline): return 12.3, energy 4.1; recorded.\n"
        again = typed("record", folder, "--return", "12.3", "--metric", "energy=4.1", "--episode", "0")
        assert (again.exit_code, "the same was recorded before, nothing was changed" in again.stdout) == (0, True)
        typed("next", folder)
        missing = typed("record", folder, "--missing", "power cut")
        assert missing.stdout == "Episode 1 (shadow, baseline): missing: power cut; recorded.\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["record", "--metric", "energy"], "--metric must be a name and a number, such as energy=4.1, found 'energy'"),
            (["record", "--metric", "energy=a"], "--metric must be a name and a number"),
            (["record", "--metric", "energy=1", "--metric", "energy=2"], "--metric energy is given twice"),
            (["record", "--return", "1", "--missing", "x"], "Give either --missing or a result, not both"),
            (["record", "--csv", "nothing.csv"], "nothing.csv"),
            (["tick", "metrik", "--by", "Ann"], "Did you mean 'metric'"),
            (["amend", "--reason", "x"], "is the one in force"),
        ],
    )
    def test_errors_are_one_line_with_exit_code_1(
        self, make: Callable[..., Trial], arguments: list[str], message: str
    ) -> None:
        folder = make(**PLANT).folder
        typed("next", folder)
        command, *others = arguments
        result = typed(command, folder, *others)
        assert result.exit_code == 1
        assert message in result.stderr and len(result.stderr.splitlines()) == 1

    def test_an_error_of_decide_is_no_decision(self, tmp_path: Path) -> None:
        result = typed("decide", tmp_path)
        assert result.exit_code == 3
        assert "There is no trial in" in result.stderr
