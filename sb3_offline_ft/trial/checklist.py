"""The checklist of a trial: written from the plan, ticked by people."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.suggestions import suggestion
from sb3_offline_ft.trial.plan import TrialPlan

CHECKLIST_FILE = "checklist.md"
_ITEM = re.compile(r"- \[(?P<tick>.?)\] \*\*(?P<name>.+?)\*\*: (?P<text>.*?)\s*By:[ \t]*(?P<who>.*)")


@dataclass(frozen=True)
class ChecklistItem:
    """
    A line of the checklist.

    :param name: Its name
    :param text: What has to be ready
    :param is_ticked: Whether somebody ticked it
    :param who: Who did, empty if no name is given
    """

    name: str
    text: str
    is_ticked: bool = False
    who: str = ""

    @property
    def line(self) -> str:
        """As it is in the file."""
        return f"- [{'x' if self.is_ticked else ' '}] **{self.name}**: {self.text} By: {self.who}".rstrip()


def checklist_text(folder: Path, items: Iterable[ChecklistItem]) -> str:
    """The file of a trial's checklist."""
    shown = shlex.quote(str(folder))
    return (
        f"# Checklist of the trial {folder.absolute().name}\n\n"
        "Tick a line with an x between the brackets, and put your name after `By:`. The same does\n"
        f'`sb3-offline-ft trial tick {shown} metric --by "Your Name"`, which also notes when.\n\n'
        + "".join(f"{item.line}\n" for item in items)
    )


def checklist_items(plan: TrialPlan, folder: Path) -> list[ChecklistItem]:
    """What has to be ready before the trial, by its plan."""
    shown, primary = shlex.quote(str(folder)), plan.metric(plan.primary.metric)
    rails = " and ".join(f"`{rail.metric}`" for rail in plan.guardrails) or "nothing is named"
    limits = "; ".join(
        f"`{limit.source}` " + " and ".join(
            f"{words} {bound:g}" for words, bound in (("at least", limit.min), ("at most", limit.max)) if bound is not None
        )
        for limit in plan.abort.limits
    )  # fmt: skip
    drill = (
        f"`sb3-offline-ft trial run {shown} --drill` has shown that the baseline takes over, and how fast."
        if plan.env is not None
        else "The baseline was made to take over on purpose within an episode of the candidate, and it was measured how fast."
    )
    risk = (
        "no bound is set on what the candidate may lose"
        if plan.risk is None
        else f"the candidate may lose {plan.risk.budget * plan.budget:g} total losses in all"
    )
    items = {
        "metric": f"`{primary.name}` is what we want to improve, and {plan.primary.smallest_effect:g} "
        f"{primary.unit or 'units'} in the mean are worth having. What must not become worse: {rails}.",
        "data": "The logs are of the system as it is today, of all its regimes, and nobody cleaned away bad episodes.",
        "power": f"`sb3-offline-ft trial plan {shown}` says that {plan.compared_episodes} compared episodes can show it.",
        "limits": f"The limits within an episode are right: {limits or 'none is set'}; {risk}.",
        "abort": f"More than {plan.abort.most} aborted episodes of the candidate are a no-go; all know who may stop it.",
        "drill": drill,
        "people": "Who supervises, who is called, and who may end the trial is known in every shift.",
    }
    agreed = {name: "Agrees to the plan, before the first episode." for name in plan.sign_off}
    return [ChecklistItem(name, text) for name, text in (items | agreed).items()]


def read_checklist(folder: Path) -> list[ChecklistItem]:
    """The lines of a trial's checklist as people left them; none if there is no such file."""
    file = folder / CHECKLIST_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [match for line in lines if (match := _ITEM.fullmatch(line.strip()))]
    return [ChecklistItem(one["name"], one["text"], one["tick"].strip() != "", one["who"].strip()) for one in found]


def update_checklist(folder: Path, plan: TrialPlan) -> None:
    """Write the checklist of a plan that was edited. Ticks stay where the text is the same, as do own lines."""
    before = {item.name: item for item in read_checklist(folder)}
    items = checklist_items(plan, folder)
    kept = [before[item.name] if item.name in before and before[item.name].text == item.text else item for item in items]
    own = [item for name, item in before.items() if name not in {item.name for item in items}]
    text = checklist_text(folder, kept + own)
    if list(before.values()) != kept + own:
        with atomic_write(folder / CHECKLIST_FILE) as stream:
            stream.write(text.encode())


def tick(folder: Path, name: str, who: str) -> None:
    """
    Tick a line of the checklist.

    :param folder: Folder of the trial
    :param name: Name of the line
    :param who: Who ticks it
    :raises ValueError: There is no such line
    """
    items = {item.name: item for item in read_checklist(folder)}
    if name not in items:
        raise ValueError(f"The checklist in {str(folder)!r} has no line {name!r}. {suggestion(name, items)}")
    items[name] = replace(items[name], is_ticked=True, who=who)
    with atomic_write(folder / CHECKLIST_FILE) as stream:
        stream.write(checklist_text(folder, items.values()).encode())
