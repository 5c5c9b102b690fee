"""Trials run in an environment: to a decision, through aborts, drills, Ctrl-C and kill -9."""

import io
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.trial import EpisodeRecord, Finished, Trial, run_trial
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE
from sb3_offline_ft.trial.episodes import EpisodeRunner
from sb3_offline_ft.trial.journal import kinds
from tests.trial_systems import STEADY
from tests.trials import tank_trial

runner = CliRunner()


def finished(trial: Trial) -> Finished:
    ended = run_trial(trial, progress_bar=False)
    assert isinstance(ended, Finished)
    return ended


class TestDecisions:
    def test_a_better_candidate_goes_into_service(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        assert finished(trial).reason == "All stages are done."
        assert trial.decide().decision == trial.machine.decision == "go"
        assert [record.arm for record in trial.machine.episodes[-4:]] == [CANDIDATE] * 4, "full, watched"
        assert (trial.folder / "report.html").read_text(encoding="utf-8").endswith("</html>")

    def test_a_worse_one_is_stopped_before_the_end(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", "tests.trial_systems:worse", risk=None)
        assert finished(trial).is_cut
        assert trial.decide().decision == "no-go" and "worse than the baseline" in trial.decide().reasons[0]
        assert len(trial.machine.episodes) < 35

    def test_the_same_policy_again_is_no_go(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", STEADY)
        assert finished(trial).awaits_go or trial.machine.stopped
        assert trial.decide().decision in ("no-go", "not yet")
        assert not any(record.arm == CANDIDATE for record in trial.machine.episodes if record.stage == "full")

    def test_brackets_in_names_are_no_markup(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", stages=[{"name": "pilot [/b]", "episodes": 8, "share": 0.5}])
        stream = io.StringIO()
        run_trial(trial, console=Console(file=stream, force_terminal=True, width=120))
        assert "pilot [/b]: candidate" in stream.getvalue()

    def test_the_stage_to_stop_after_is_named(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        assert run_trial(trial, progress_bar=False, until="pilot") is None
        assert [record.stage for record in trial.machine.episodes] == ["shadow"] * 3 + ["pilot"] * 8
        with pytest.raises(ValueError, match=r"no stage 'ramp': expected one of 'shadow', 'pilot', 'ramp 50 %', 'full'"):
            run_trial(trial, progress_bar=False, until="ramp")

    def test_what_happened_is_recorded_with_each_episode(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        run_trial(trial, progress_bar=False, until="pilot")
        records = trial.machine.episodes
        assert [record.shadow is not None for record in records] == [True] * 3 + [False] * 8
        assert all(record.steps == 20 and record.travel is not None and record.violations == {} for record in records)
        assert records[0].acted == {BASELINE: 20, CANDIDATE: 0}
        assert next(record.acted for record in records if record.arm == CANDIDATE) == {BASELINE: 0, CANDIDATE: 20}


class TestAborts:
    def test_an_abort_is_in_the_journal_with_its_last_steps(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", "tests.trial_systems:overflowing")
        assert finished(trial).is_cut
        assert trial.decide().decision == "no-go" and "aborted" in trial.decide().reasons[0]
        aborts = trial.machine.aborts
        assert len(aborts) == 2 and all(abort["seconds_to_baseline"] < 1 for abort in aborts)
        aborted = [record for record in trial.machine.episodes if record.is_aborted]
        assert [record.episode for record in aborted] == [abort["episode"] for abort in aborts]
        for record, abort in zip(aborted, aborts, strict=True):
            assert record.acted == {CANDIDATE: abort["step"], BASELINE: 20 - abort["step"]}
            steps = np.load(trial.folder / abort["steps_file"], allow_pickle=False)
            assert [*steps["actor"]] == [CANDIDATE] * abort["step"] + [BASELINE]
            assert steps["info.level"][abort["step"] - 1] > 1.5

    def test_an_aborted_episode_that_was_killed_stays_an_abort(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", stages=[{"name": "pilot", "episodes": 8, "share": 0.5}])
        while (upcoming := trial.next()).arm == BASELINE:  # type: ignore[union-attr]
            trial.record(-4.0, metrics={"energy": 2.0})
        trial.append("abort", episode=upcoming.episode, stage="pilot", arm=CANDIDATE, step=3, reason="smoke")  # type: ignore[union-attr]
        finished(trial)
        assert trial.machine.episodes[upcoming.episode].is_aborted  # type: ignore[union-attr]


class TestDrill:
    def test_a_drill_shows_that_the_baseline_takes_over(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        result = runner.invoke(app, ["trial", "run", str(trial.folder), "--drill"])
        assert result.exit_code == 0, result.output
        trial.refresh()
        (drill,) = trial.machine.drills
        assert drill["baseline_took_over"] and 0 < drill["seconds_to_baseline"] < 1 and 1 <= drill["step"] <= 20
        assert f"the baseline took over in step {drill['step']}, after" in result.output
        record = trial.machine.episodes[drill["episode"]]
        assert record.acted == {CANDIDATE: drill["step"], BASELINE: 20 - drill["step"]}
        assert not record.is_compared and not trial.machine.aborts, "it is no abort, and not part of the comparison"

    def test_it_is_tried_again_where_the_episode_was_too_short(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", env_kwargs={"steps": 2}, seed=1)
        run_trial(trial, progress_bar=False, drill=True)
        assert len(trial.machine.episodes) > 1, "the first step that was drawn is later than the second"
        assert trial.machine.drills[0]["step"] == 1 and trial.machine.drills[0]["baseline_took_over"]

    def test_an_abort_before_the_drill_is_an_abort(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", "tests.trial_systems:two_valves")
        with pytest.raises(ValueError, match="aborted in step 0, before the drill"):
            run_trial(trial, progress_bar=False, drill=True)
        assert len(trial.machine.aborts) == 1 and not trial.machine.drills


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """What a shell runs in the background ignores it, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestInterrupts:
    @pytest.mark.usefixtures("heeding_ctrl_c")
    def test_ctrl_c_loses_the_episode_under_way_and_nothing_else(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", env_kwargs={"interrupted_at": 110})
        result = runner.invoke(app, ["trial", "run", str(trial.folder)])
        assert result.exit_code == 130 and "the same command goes on" in result.output
        trial.refresh()
        assert [record.excluded for record in trial.machine.episodes] == [None] * 5 + ["missing: interrupted"]
        again = runner.invoke(app, ["trial", "run", str(trial.folder), "--until", "pilot"])
        assert again.exit_code == 0, again.output
        records = Trial.open(trial.folder).machine.episodes
        assert [record.is_missing for record in records] == [False] * 5 + [True] + [False] * 5

    def test_an_environment_that_fails_is_noted(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", env_kwargs={"breaks_at": 3})
        result = runner.invoke(app, ["trial", "run", str(trial.folder)])
        assert result.exit_code == 1 and "the pump is gone" in result.output
        (record,) = Trial.open(trial.folder).machine.episodes
        assert record.is_missing and "the pump is gone" in str(record.excluded)

    def test_files_that_a_killed_process_left_half_written_are_removed(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        (trial.folder / "steps").mkdir()
        left = [trial.folder / ".report.html.a1b2c3d4.tmp", trial.folder / "steps" / ".3.npz.a1b2c3d4.tmp"]
        for path in left:
            path.write_bytes(b"half")
        mine = trial.folder / "notes.tmp"
        mine.write_bytes(b"mine")
        Trial.open(trial.folder).next()
        assert not any(path.exists() for path in left) and mine.exists()

    def test_a_second_process_is_told_to_wait(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial")
        with Trial.open(trial.folder).locked(), pytest.raises(ValueError, match="Another process works on the trial"):
            run_trial(trial, progress_bar=False)
        assert not (trial.folder / "report.html").exists(), "the page is the other one's"


def run_it(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_trial(Trial.open(folder), progress_bar=False)


def measured_again(trial: Trial, record: EpisodeRecord) -> dict[str, float | None]:
    episodes = EpisodeRunner(trial.plan_in_force)
    try:
        return episodes.run(record.assignment).metrics
    finally:
        episodes.close()


def test_kill_9_at_50_random_moments_loses_at_most_the_episode_under_way(tmp_path: Path) -> None:
    stages = [{"name": "pilot", "episodes": 600, "share": 0.5}]
    trial = tank_trial(
        tmp_path / "trial", STEADY, stages=stages, budget={"episodes": 600}, env_kwargs={"pause": 0.002},
        error_rates={"false_stop": 1e-6, "false_go": 1e-6}, risk=None,
    )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    chance, journal = random.Random(0), trial.journal.path
    lines: list[bytes] = []
    for kill in range(60):
        process = context.Process(target=run_it, args=(trial.folder,))
        process.start()
        until, patience = len(lines) + chance.randint(1, 7), time.monotonic() + 60
        while process.is_alive() and _lines(journal) < until and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.05))
        seen = journal.read_bytes().splitlines(keepends=True)
        # Ctrl-C at some moments too: an event that was being written then is taken back, and none that was written
        is_interrupt = kill % 6 == 5
        os.kill(process.pid, signal.SIGINT if is_interrupt else signal.SIGKILL)  # type: ignore[arg-type]
        process.join(60)
        assert process.exitcode not in (0, None)
        lines = journal.read_bytes().splitlines(keepends=True)
        whole = [line for line in seen if line.endswith(b"\n")]
        kept_lines = whole[:-1] if is_interrupt else whole
        assert lines[: len(kept_lines)] == kept_lines, "what was in the journal before is there still"
        Trial.open(trial.folder)
        process.close()
    assert len(lines) > 3 * 60, "it went on every time"
    trial.refresh()
    with trial.locked():
        events = trial.journal.events
    records = trial.machine.episodes
    assert [record.episode for record in records] == [*range(len(records))]
    lost = [record for record in records if record.is_missing]
    assert len(lost) <= 60 and len(kinds(events, "missing")) == len(lost)
    assert len(kinds(events, "assignment")) == len(records) + (trial.machine.open is not None)
    kept = [record for record in records if not record.is_missing]
    assert len(kept) >= 20
    for record in chance.sample(kept, 5):
        assert dict(record.metrics) == measured_again(trial, record), "and it is what the episode was"


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
