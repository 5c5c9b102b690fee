"""The report of a trial: it says what the journal says, needs nothing else, and can be signed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.evaluation.robustness import Policy, Response, RobustnessResult
from sb3_offline_ft.trial import Finished, Trial, run_trial, write_report
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE
from sb3_offline_ft.trial.equal_guardrails import effect_at_equal_guardrails
from sb3_offline_ft.trial.evidence import Evidence
from sb3_offline_ft.trial.journal import kinds
from tests.test_dataset_report import SVG, Page
from tests.trial_systems import BETTER, STEADY
from tests.trials import tank_trial

NASTY = '<script>alert("1")</script> & $x_1$'
STAGES = [{"name": "pilot", "episodes": 8, "share": 0.25}, {"name": "ramp 50 %", "episodes": 24, "share": 0.5}]


def plant(folder: Path, **changes: Any) -> Trial:
    """A trial of a plant without an environment."""
    sections: dict[str, Any] = {
        "baseline": "PID",
        "candidate": "policy",
        "metrics": {"cost": {"better": "lower", "unit": "EUR"}, "heat": {"better": "lower", "unit": "K"}},
        "primary": {"metric": "cost", "smallest_effect": 0.5},
        "guardrails": {"heat": {"margin": 3.0}},
        "stages": STAGES,
        "budget": {"episodes": 40},
        "sign_off": ["plant manager", "control engineer"],
    }
    return Trial.create(folder, **sections | changes)


def operate(trial: Trial, lead: float = 2.0, per_kelvin: float = 0.0, hotter: float = 0.0, regimes: int = 0) -> None:
    """Record its episodes: the candidate is cheaper by ``lead``, and by ``per_kelvin`` for each kelvin that it is hotter."""
    generator = np.random.default_rng(0)
    while not isinstance(upcoming := trial.next(), Finished):
        is_candidate = upcoming.arm == CANDIDATE
        heat = 20.0 + hotter * is_candidate + generator.normal()
        cost = 50.0 - lead * is_candidate - per_kelvin * heat + 0.3 * generator.normal()
        regime = f"regime {upcoming.episode % regimes}" if regimes else None
        trial.record(metrics={"cost": cost, "heat": heat}, episode=upcoming.episode, regime=regime)


def page_of(trial: Trial, **options: Any) -> tuple[str, Page]:
    text = write_report(trial, **options).read_text(encoding="utf-8")
    return text, Page(text)


def plain(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A trial in an environment that ended with a go."""
    trial = tank_trial(tmp_path_factory.mktemp("report") / "tank")
    run_trial(trial, progress_bar=False, until="shadow")
    run_trial(trial, progress_bar=False, drill=True)
    trial.tick("drill", "M. Curie")
    run_trial(trial, progress_bar=False)
    return trial


class TestPage:
    def test_the_decision_and_its_reasons_come_first(self, go: Trial) -> None:
        text = plain(page_of(go)[1])
        head = text[: text.index("What the candidate changes", text.index("Signatures"))]
        assert "Go: put the candidate into service By return, the candidate is better by" in head
        assert "Of the guardrails energy is proved to hold. No episode of the candidate was aborted, and it has used" in head
        assert re.search(r"in service it would be worth [\d,]+ \([\d,]+ to [\d,]+\) EUR a year\.", head)

    def test_it_needs_nothing_else(self, go: Trial) -> None:
        text, page = page_of(go)
        assert all(link.startswith("#") for link in page.links) and "<script" not in text
        assert "http" not in "".join(re.findall(r"url\([^)]*\)", text)) and "@import" not in text
        assert len(page.ids) == len(set(page.ids))
        assert {link[1:] for link in page.links} <= set(page.ids)

    def test_everything_that_was_asked_is_on_it(self, go: Trial) -> None:
        page = page_of(go)[1]
        text = plain(page)
        for expected in (
            "At equal guardrails", "Both policies by every metric", "What it is worth", "Every episode", "Risk spent",
            "Stages, risk and aborts", "No episode was aborted.", "Rollback drills", "baseline took over",
            "share of all steps in which the candidate acted", "hand-backs to the baseline (aborts) 0",
            "Limits within episodes", "info.level at most 1.5 candidate", "travel a step", "saturated", "latency",
            "distance of actions", "Nobody has tried what the policies stand", "look 1 of", "worse: stop now",
            "fading of the difference", "by M. Curie", "digest of the plan in force", go.plan_in_force.digest,
            "before the first episode", "stable-baselines3", "plant manager", "control engineer", "name, signature",
        ):  # fmt: skip
            assert expected in text, expected
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)

    def test_every_episode_is_a_dot(self, go: Trial) -> None:
        text, _ = page_of(go)
        (figure,) = re.findall(r'<section id="episodes">.*?</figure>', text, re.DOTALL)
        told = re.findall(r"In words</summary><p>(.*?)</p>", figure, re.DOTALL)[0]
        n = {arm: sum(record.arm == arm for record in go.machine.episodes) for arm in (BASELINE, CANDIDATE)}
        assert f"in {n[BASELINE]} episodes" in told and f"in {n[CANDIDATE]} episodes" in told
        assert "pilot" in figure and "aborted" not in re.sub("<figcaption>.*", "", figure)
        assert len(SVG.findall(text)) == 4
        rows = re.findall(r"<summary>Every episode in numbers</summary>(.*?)</table>", text, re.DOTALL)[0].count("<tr>")
        assert rows == 1 + len(go.machine.episodes)

    def test_the_last_line_of_the_journal_is_named(self, go: Trial) -> None:
        assert go.journal.last_hash in page_of(go)[1].text

    def test_a_running_trial_reloads_its_page(self, go: Trial) -> None:
        assert '<meta http-equiv="refresh" content="5">' in page_of(go, running=True)[0]
        assert "http-equiv" not in page_of(go)[0]

    def test_the_command_writes_it(self, go: Trial, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["trial", "report", str(go.folder), "--output", str(tmp_path / "signed.html")])
        assert result.exit_code == 0 and "signed.html" in result.output
        assert "Go: put the candidate" in (tmp_path / "signed.html").read_text(encoding="utf-8")


class TestContent:
    def test_a_page_can_be_written_before_the_first_episode(self, tmp_path: Path) -> None:
        text = plain(page_of(plant(tmp_path / "plant"))[1])
        assert "Not yet: the trial has not decided No block of the comparison is complete yet." in text
        assert "0 episodes of 32" in text

    def test_what_people_wrote_is_text_not_markup(self, tmp_path: Path) -> None:
        metrics = {NASTY: {"better": "lower", "unit": NASTY}, "heat": {"better": "lower"}}
        trial = plant(
            tmp_path / "<b>plant", baseline=NASTY, candidate=NASTY, metrics=metrics, sign_off=[NASTY], currency=NASTY,
            primary={"metric": NASTY, "smallest_effect": 0.5},
            stages=[{"name": f"pilot {NASTY}", "episodes": 8, "share": 0.5}],
        )  # fmt: skip
        while not isinstance(upcoming := trial.next(), Finished):
            is_bad = upcoming.arm == CANDIDATE
            trial.record(metrics={NASTY: 1.0, "heat": 2.0}, regime=NASTY, aborted=NASTY if is_bad else None)
        text, page = page_of(trial)
        assert "<script" not in text and "<b>plant" not in text
        assert page.text.count(NASTY) > 10 and "<b>plant" in page.text
        for svg in SVG.findall(text):
            assert "$x_1$" not in svg or "&lt;script&gt;" in svg

    def test_a_plan_that_was_changed_after_the_start_is_marked(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant")
        trial.next()
        plan = trial.folder / "trial.yml"
        plan.write_text(re.sub(r"smallest_effect: 0\.5", "smallest_effect: 0.4", plan.read_text(encoding="utf-8")))
        trial.amend("it is worth less now")
        text = plain(page_of(trial)[1])
        assert "The plan was amended on" in text
        assert "after the start, because: it is worth less now Changed: primary.smallest_effect: 0.5 -> 0.4." in text

    def test_aborts_are_listed_with_their_reasons(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "trial", "tests.trial_systems:overflowing")
        run_trial(trial, progress_bar=False)
        text = plain(page_of(trial)[1])
        assert "No-go: keep the baseline" in text
        assert len(kinds(trial.journal.events, "abort")) == 2
        assert (
            text.count("above its limit 1.5") == 2 and "steps/" in text and "2 episodes of the candidate were aborted" in text
        )
        assert re.search(r"info\.level at most 1\.5 candidate 2 of 2 2 \d+ 1\.\d+", text), "violations: count, steps, worst"

    def test_regimes_are_told_apart(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant")
        operate(trial, regimes=2)
        text = plain(page_of(trial)[1])
        assert "By regime" in text and "regime 0" in text and "regime 1" in text

    def test_robustness_is_shown_and_other_files_are_marked(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant")
        operate(trial)
        values = tuple({"return": (level,)} for level in (5.0, 10.0, 9.5))
        response = Response("mass", "factor", 1.0, (0.5, 1.0, 1.5), {CANDIDATE: values, BASELINE: values})
        policies = {role: Policy(role, None) for role in (CANDIDATE, BASELINE)}
        result = RobustnessResult("Pendulum-v1", {}, 0, 0.0, policies, (response,), {})
        result.save(trial.folder / "robustness.json")
        text = plain(page_of(trial)[1])
        assert "Where the return is kept" in text and "mass factor 1 1 to 1.5" in text and "ANOTHER" not in text
        replace(result, policies=policies | {CANDIDATE: Policy("new", "abc")}).save(trial.folder / "robustness.json")
        assert "Tried with ANOTHER file of the candidate" in plain(page_of(trial)[1])

    def test_robustness_of_something_else_is_marked(self, tmp_path: Path) -> None:
        trial = tank_trial(tmp_path / "tank")
        trial.begin()
        values = tuple({"return": (level,)} for level in (5.0, 10.0))
        response = Response("mass", "factor", 1.0, (0.5, 1.0), {CANDIDATE: values, BASELINE: values})
        policies = {CANDIDATE: Policy(BETTER, None), BASELINE: Policy(STEADY, None)}
        result = RobustnessResult("Tank-v0", {}, 0, 0.0, policies, (response,), {})
        result.save(trial.folder / "robustness.json")
        assert "ANOTHER" not in plain(page_of(trial)[1])
        others = policies | {CANDIDATE: Policy("zero", None)}
        replace(result, env_id="Pendulum-v1", policies=others, random_return=float("nan")).save(
            trial.folder / "robustness.json"
        )
        text = plain(page_of(trial)[1])
        assert "Tried with ANOTHER candidate than that of the trial, zero." in text
        assert "Tried in ANOTHER environment than that of the trial, Pendulum-v1." in text


class TestEqualGuardrails:
    def estimate(self, trial: Trial) -> Any:
        return effect_at_equal_guardrails(trial.plan_in_force, Evidence(trial.plan_in_force, trial.machine.episodes), 0.9)

    def test_what_was_bought_with_a_guardrail_is_not_counted(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant", guardrails={"heat": {"margin": 9.0}})
        # 1 K more costs 0.5 less: of the lead of 2.5, 1.5 are bought with 3 K
        operate(trial, lead=1.0, per_kelvin=0.5, hotter=3.0)
        found = self.estimate(trial)
        assert found.low < 1.0 < found.high and found.high - found.low < 1.0
        assert trial.decide().effect.low > 1.6

    def test_nothing_changes_where_nothing_was_bought(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant")
        operate(trial, lead=2.0)
        assert self.estimate(trial).value == pytest.approx(trial.decide().effect.value, abs=0.3)

    def test_there_is_none_without_guardrails(self, tmp_path: Path) -> None:
        trial = plant(tmp_path / "plant", guardrails={})
        operate(trial)
        assert self.estimate(trial) is None
