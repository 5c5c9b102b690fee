"""The report of a trial: one HTML page that needs nothing else, for those who decide and sign."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_offline_ft.common.io import atomic_write, naming_damage
from sb3_offline_ft.common.reading import read_json
from sb3_offline_ft.evaluation.robustness import result as robustness
from sb3_offline_ft.evaluation.robustness.show import drawing
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.html import Picture, render_page
from sb3_offline_ft.pages.pictures import Drawing
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import NBSP, counted, listed, number, ranged
from sb3_offline_ft.trial import figures
from sb3_offline_ft.trial import report_tables as tables
from sb3_offline_ft.trial.assignment import BASELINE, CANDIDATE
from sb3_offline_ft.trial.checklist import read_checklist
from sb3_offline_ft.trial.decision import Decision, decide, value_a_year
from sb3_offline_ft.trial.equal_guardrails import effect_at_equal_guardrails
from sb3_offline_ft.trial.evidence import Evidence
from sb3_offline_ft.trial.journal import Event, kinds
from sb3_offline_ft.trial.machine import TrialMachine
from sb3_offline_ft.trial.plan import TrialPlan

if TYPE_CHECKING:
    from sb3_offline_ft.trial.trial import Trial

REPORT_FILE, PLAN_RESULT_FILE = "report.html", "plan.json"
REFRESH_SECONDS = 5
"""How often the page of a running trial loads itself again."""
HEADLINES = {
    "go": "Go: put the candidate into service",
    "no-go": "No-go: keep the baseline",
    "not yet": "Not yet: the trial has not decided",
}


@dataclass
class Part:
    """A part of the page: texts, pictures and tables, and tables that are shown when asked for."""

    id: str
    title: str
    texts: Sequence[str] = ()
    drawings: Sequence[Drawing | None] = ()
    tables: Sequence[TextTable] = ()
    folded: Sequence[TextTable] = ()
    words: Sequence[TextTable] = ()
    """Tables whose cells are sentences."""
    pictures: list[Picture] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.texts or self.pictures or self.tables or self.folded or self.words)


def write_report(trial: "Trial", output: str | Path | None = None, *, running: bool = False) -> Path:
    """
    Write the page of a trial.

    :param trial: The trial
    :param output: The file, ``report.html`` in the trial's folder by default. It is written whole or not at all
    :param running: Whether the trial runs: the page then loads itself again every few seconds
    :return: The file
    :raises OSError: It cannot be written
    """
    path = trial.folder / REPORT_FILE if output is None else Path(output)
    page = _page(trial.folder, trial.plan_in_force, trial.machine, trial.journal.events, running)
    with atomic_write(path) as file:
        file.write(page)
    return path


def _page(folder: Path, plan: TrialPlan, machine: TrialMachine, events: Sequence[Event], running: bool) -> bytes:
    decision = decide(plan, machine)
    level = f"{100 * decision.confidence:g}{NBSP}%"
    parts = [
        _effect_part(plan, machine, decision, level),
        _episodes_part(plan, machine),
        _stages_part(plan, machine, events),
        _system_part(plan, machine),
        Part("regimes", "By regime", tables=_filled(tables.regimes_table(plan, machine))),
        _robustness_part(folder, plan, _files(events)),
        _tests_part(plan, decision),
        _checklist_part(folder, events),
        _expected_part(folder, plan, machine),
        _provenance_part(plan, events),
    ]
    for part in parts:
        part.pictures = [one.on_page(figures.COLOURS) for one in part.drawings if one is not None]
    return render_page(
        __package__,
        "report.html.jinja",
        name=folder.absolute().name,
        subtitle=_subtitle(plan),
        running=REFRESH_SECONDS if running else None,
        progress=_progress(plan, machine),
        verdict=decision.decision,
        headline=HEADLINES[decision.decision],
        sentences=three_sentences(plan, machine, decision),
        reasons=decision.reasons[1:],
        notices=_notices(events),
        parts=[part for part in parts if not part.is_empty],
        plan_text=json.dumps(plan.as_mapping(), indent=2, ensure_ascii=False),
        signatures=plan.sign_off or ("",),
    )


def _filled(*candidates: TextTable) -> list[TextTable]:
    return [table for table in candidates if table.rows]


def _subtitle(plan: TrialPlan) -> str:
    where = f"in {plan.env}" if plan.env is not None else "on a system without an environment"
    return f"Trial {where}: the candidate {plan.candidate} against the baseline {plan.baseline}."


def _progress(plan: TrialPlan, machine: TrialMachine) -> str:
    planned = sum(stage.episodes for stage in plan.stages)
    stage = f"stage {machine.stage}" if machine.stage is not None else "all stages done"
    return f"{counted(len(machine.episodes), 'episode')} of {planned}, {stage}"


def three_sentences(plan: TrialPlan, machine: TrialMachine, decision: Decision) -> list[str]:
    """
    :param plan: The plan
    :param machine: The trial
    :param decision: The decision
    :return: Its main reason; how guardrails stand; what it cost and is worth
    """
    first = decision.reasons[0] if decision.reasons else "Nothing is known yet."
    return [first, _guardrails_sentence(decision), _safety_sentence(plan, machine, decision)]


def _guardrails_sentence(decision: Decision) -> str:
    if not decision.guardrails:
        return "The plan has no guardrails, so nothing else than the primary metric was guarded."
    groups = {
        "violated": [one.guardrail.metric for one in decision.guardrails if one.is_violated],
        "proved to hold": [one.guardrail.metric for one in decision.guardrails if one.holds and not one.is_violated],
        "not proved yet": [one.guardrail.metric for one in decision.guardrails if not one.holds and not one.is_violated],
    }
    told = [f"{listed(names)} {'is' if len(names) == 1 else 'are'} {state}" for state, names in groups.items() if names]
    return f"Of the guardrails {listed(told)}."


def _safety_sentence(plan: TrialPlan, machine: TrialMachine, decision: Decision) -> str:
    n = len(machine.aborts)
    aborts = f"{counted(n, 'episode') if n else 'no episode'} of the candidate {'was' if n < 2 else 'were'} aborted"
    risk = ""
    if machine.risk is not None:
        spent = max(0.0, machine.risk.lost)
        risk = f", and it has used {number(spent)} of {number(machine.risk.allowance)} total losses of the risk budget"
    worth = ""
    value = value_a_year(plan, decision.effect)
    if value.has_interval and value.value != 0:
        worth = f"; in service it would be worth {ranged(value)} {plan.currency} a year"
    return f"{aborts[0].upper()}{aborts[1:]}{risk}{worth}."


def _notices(events: Sequence[Event]) -> list[str]:
    """What the reader must not overlook: the plan was changed after the first episode."""
    texts = []
    for event in kinds(list(events), "amendment", "plan_changed"):
        found, what = f"on {_when(event)}, after the start", "; ".join(event["difference"])
        if event["event"] == "amendment":
            texts.append(f"The plan was amended {found}, because: {event['reason']} Changed: {what}.")
        else:
            texts.append(f"The file of the plan was found changed {found}; the frozen plan stayed in force. Changed: {what}.")
    return texts


def _when(event: Mapping[str, Any]) -> str:
    return str(event["time"])[:19].replace("T", " ") + " UTC"


def _effect_part(plan: TrialPlan, machine: TrialMachine, decision: Decision, level: str) -> Part:
    evidence = Evidence(plan, machine.episodes)
    improvements: dict[str, Estimate] = {}
    for metric in plan.metrics:
        comparison = evidence.comparison(metric.name)
        if comparison is not None and comparison.is_possible:
            improvements[metric.name] = comparison.interval(decision.confidence)
    primary = plan.metric(plan.primary.metric)
    roles = {primary.name: ("primary", plan.primary.smallest_effect)}
    roles |= {rail.metric: ("guardrail", -rail.margin) for rail in plan.guardrails if rail.margin is not None}
    effects = [
        figures.Effect(plan.metric(name), improvements[name], needed, role)
        for name, (role, needed) in roles.items()
        if name in improvements
    ]
    drawings = [figures.draw_effects(effects, level), figures.draw_blocks(plan, machine)]
    found = [tables.metrics_table(plan, machine, improvements, level), *_filled(_worth_table(plan, improvements, level))]
    return Part("effect", "What the candidate changes", _at_equal_guardrails(plan, evidence, decision), drawings, found)


def _at_equal_guardrails(plan: TrialPlan, evidence: Evidence, decision: Decision) -> list[str]:
    equal = effect_at_equal_guardrails(plan, evidence, decision.confidence)
    if equal is None:
        return []
    primary = plan.metric(plan.primary.metric)
    others = listed(rail.metric for rail in plan.guardrails if rail.metric != primary.name)
    return [
        f"At equal guardrails: if the candidate were exactly as good as the baseline in {others}, its {primary.name} would be "
        f"better by {ranged(equal)} {primary.unit} ({equal.method}). This is what is left when nothing is bought with a "
        "guardrail, as far as one is traded for the other linearly."
    ]


def _worth_table(plan: TrialPlan, improvements: Mapping[str, Estimate], level: str) -> TextTable:
    """What the improvements are worth in a year, and when they have paid for the candidate."""
    rows = []
    for metric in plan.metrics:
        found, scale = improvements.get(metric.name), metric.value_per_unit * plan.costs.episodes_per_year
        if found is not None and found.has_interval and scale:
            worth = Estimate(found.value * scale, found.low * scale, found.high * scale, found.n, found.method)
            payback = plan.costs.deployment / worth.value * 12 if worth.value > 0 else None
            rows.append([
                metric.name, f"{metric.value_per_unit:g} {plan.currency}", ranged(worth),
                "never" if payback is None else f"{number(payback)} months",
            ])  # fmt: skip
    columns = ["metric", "one unit in one episode", f"{plan.currency} a year ({level} interval)", "payback of the deployment"]
    costs = f"{plan.costs.deployment:,.0f} {plan.currency} to deploy"
    note = f"With {plan.costs.episodes_per_year:,.0f} episodes a year, and {costs}."
    return TextTable("worth", columns, rows, "What it is worth", note)


def _episodes_part(plan: TrialPlan, machine: TrialMachine) -> Part:
    named = [plan.primary.metric, *(rail.metric for rail in plan.guardrails)]
    shown = [plan.metric(name) for name in dict.fromkeys(named)]
    drawing = figures.draw_episodes(plan, machine, shown)
    return Part("episodes", "Every episode", drawings=[drawing], folded=_filled(tables.episodes_table(plan, machine)))


def _stages_part(plan: TrialPlan, machine: TrialMachine, events: Sequence[Event]) -> Part:
    drawing = figures.draw_risk(_risk_spent(plan, events), machine.risk.allowance, plan.budget) if machine.risk else None
    texts = [] if plan.risk is not None else ["The plan has no risk budget: nothing bounds what the candidate may lose."]
    found = [tables.stages_table(plan, machine), *_filled(tables.aborts_table(machine), tables.drills_table(machine))]
    if not machine.aborts:
        texts.append("No episode was aborted.")
    if not machine.drills:
        texts.append("There was no rollback drill.")
    return Part("stages", "Stages, risk and aborts", texts, [drawing], found)


def _risk_spent(plan: TrialPlan, events: Sequence[Event]) -> list[tuple[int, float]]:
    """What had been lost after each episode, by replaying the journal."""
    machine, spent = TrialMachine(plan), list[tuple[int, float]]()
    for event in events:
        machine.apply(event)
        if event["event"] in ("episode", "missing") and machine.risk is not None:
            spent.append((len(machine.episodes), machine.risk.lost))
    return spent


def _system_part(plan: TrialPlan, machine: TrialMachine) -> Part:
    numbers = _filled(
        tables.service_table(machine), tables.violations_table(plan, machine), tables.actuators_table(machine),
        tables.shadow_table(machine),
    )  # fmt: skip
    texts = [] if plan.abort.limits else ["The plan has no limits within episodes."]
    return Part("system", "What the system went through", texts, tables=numbers if machine.episodes else [])


def _robustness_part(folder: Path, plan: TrialPlan, files: Mapping[str, str | None]) -> Part:
    """What the policies stand, if it was tried; it is marked if that was with others than those of the trial, or elsewhere."""
    title, path = "Robustness before exposure", folder / robustness.FILE
    if not path.is_file():
        return Part("robustness", title, [f"Nobody has tried what the policies stand: there is no {robustness.FILE}."])
    result = robustness.RobustnessResult.read(path)
    others = [role for role, policy in result.policies.items() if files and policy.sha256 != files.get(role)]
    texts = [f"Tried with ANOTHER file of the {role} than that of the trial." for role in others]
    specs: dict[str, str] = {CANDIDATE: plan.candidate, BASELINE: plan.baseline}
    without_file = {role: policy.name for role, policy in result.policies.items() if policy.sha256 is None}
    texts += [
        f"Tried with ANOTHER {role} than that of the trial, {name}."
        for role, name in without_file.items()
        if plan.env is not None and role not in others and name != specs.get(role)
    ]
    if plan.env is not None and plan.env.split(":")[-1] != result.env_id.split(":")[-1]:
        texts.append(f"Tried in ANOTHER environment than that of the trial, {result.env_id}.")
    return Part("robustness", title, texts, [drawing(result)], [tables.robustness_table(result)])


def _tests_part(plan: TrialPlan, decision: Decision) -> Part:
    quality = _filled(tables.quality_table(decision))
    return Part("tests", "Tests and quality", tables=[tables.tests_table(plan, decision)], words=quality)


def _checklist_part(folder: Path, events: Sequence[Event]) -> Part:
    ticked = {event["item"]: f"{_when(event)} by {event['who']}" for event in kinds(list(events), "ticked")}
    return Part("checklist", "Checklist", words=_filled(tables.checklist_table(read_checklist(folder), ticked)))


def _expected_part(folder: Path, plan: TrialPlan, machine: TrialMachine) -> Part:
    """Cost and duration so far beside what was planned."""
    stages = {stage.name: stage for stage in plan.stages}
    supervised = sum(stages[record.stage].supervised for record in machine.episodes)
    cost = plan.costs.episode * len(machine.episodes) + plan.costs.supervision * supervised
    planned_supervised = sum(stage.episodes for stage in plan.stages if stage.supervised)
    planned = sum(stage.episodes for stage in plan.stages)
    planned_cost = plan.costs.episode * planned + plan.costs.supervision * planned_supervised
    hours = plan.costs.minutes / 60
    rows = [
        ["episodes", str(planned), str(len(machine.episodes))],
        ["of them supervised", str(planned_supervised), str(supervised)],
        [f"cost ({plan.currency})", number(planned_cost), number(cost)],
        ["duration (hours)", number(planned * hours), number(len(machine.episodes) * hours)],
    ]
    table = TextTable("expected", ["", "planned", "so far"], rows)
    return Part("expected", "Planned and spent", what_was_expected(folder, plan), tables=[table])


def what_was_expected(folder: Path, plan: TrialPlan) -> list[str]:
    """
    :param folder: A trial's folder
    :param plan: The plan in force
    :return: What `trial plan` said before the start, as sentences
    :raises ValueError: What it wrote is damaged
    """
    path = folder / PLAN_RESULT_FILE
    if not os.path.lexists(path):
        return ["What this plan can show was not asked before the start (trial plan)."]
    with naming_damage(path, "written by `sb3-offline-ft trial plan`"):
        said = read_json(path)
        chances = [(f"{100 * said[kind]['go'] / said[kind]['trials']:.3g}", kind) for kind in ("better", "equal", "worse")]
        effect = f"{plan.primary.smallest_effect:g}"
        words = {"better": f"better by {effect}", "equal": "as good as the baseline", "worse": f"worse by {effect}"}
        told = [f"{share}{NBSP}% for one that is {words[kind]}" for share, kind in chances]
        texts = [f"Chance of a go, by simulation of this procedure before the start: {listed(told)}."]
        if said["digest"] != plan.digest:
            texts.append("That was said of ANOTHER plan than the one in force.")
        return texts + ([str(said["verdict"])] if said["verdict"] else [])


def _files(events: Sequence[Event]) -> Mapping[str, str | None]:
    """Hashes of the policies' files that the trial began with."""
    start = next(iter(kinds(list(events), "start")), None)
    return {} if start is None else start["files"]


def _provenance_part(plan: TrialPlan, events: Sequence[Event]) -> Part:
    start = next(iter(kinds(list(events), "start")), None)
    rows = [["seed", str(plan.seed)], ["digest of the plan in force", plan.digest]]
    if start is not None:
        rows.append(["plan frozen", f"{_when(start)}, before the first episode; digest {start['digest']}"])
        rows += [[f"file of the {arm} (SHA-256)", str(sha or "none: it has no file")] for arm, sha in _files(events).items()]
        rows.append(["versions", listed(f"{name} {version}" for name, version in start["versions"].items())])
    if events:
        last = events[-1]
        rows.append(["journal", f"{counted(len(events), 'line')}, the last on {_when(last)}; its hash {last['hash']}"])
    text = "Each line of the journal holds the hash of the one before it: the hash of the last line stands for all of them."
    return Part("provenance", "Where all this comes from", [text], words=[TextTable("provenance", ["", ""], rows)])
