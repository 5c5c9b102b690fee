"""What is read of a study in half a minute: a sentence, a table and a picture; all else stands behind it."""

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import NONE, capital, counted, listed, number, ranged
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers
from sb3_offline_ft.study.report.comparisons import SIGNIFICANT
from sb3_offline_ft.study.report.runs import Group

SERVED = "served_mean_return"
MOST_DATASETS = 3
"""With more of them, the table has no columns for final policies."""


def headline(numbers: StudyNumbers) -> str:
    """Who served most on each dataset and what it lost, and what the tests say of it."""
    texts = [text for one in numbers.datasets if (text := _first(numbers, one))]
    if not texts:
        return "What was served is not known of any run."
    return f"{capital('; '.join(texts))}. {_tested(numbers)}"


def _ranked(one: DatasetNumbers) -> list[tuple[Group, Estimate]]:
    known = [(group, estimate) for group in one.shown if (estimate := group.estimate(SERVED)) is not None]
    return sorted(known, key=lambda row: -row[1].value)


def _first(numbers: StudyNumbers, one: DatasetNumbers) -> str:
    ranked = _ranked(one)
    if not ranked:
        return ""
    group, estimate = ranked[0]
    seeds, lost = counted(len(group.runs), "seed"), group.estimate("served_collapsed_share")
    if lost is not None:
        seeds += f"; lost episodes {number(100 * lost.value, 1)} %"
    start = "" if one.initial_return is None else f", where the pretrained policy earns {number(one.initial_return)}"
    if len(ranked) == 1:
        return f"on {one.title}, {group.label} served {number(estimate.value)} on average ({seeds}){start}"
    second, other = ranked[1]
    first = f"{group.label} served most, {number(estimate.value)} on average ({seeds})"
    return f"on {one.title}, {first}, before {second.label} with {number(other.value)}{start}"


def _tested(numbers: StudyNumbers) -> str:
    reference = numbers.reference
    rows = [row for row in numbers.tests.comparisons if row.metric == SERVED]
    if reference is None:
        return "Nothing is tested, as the study names no reference method."
    if not rows:
        return f"Nothing is tested: no other method has two runs with the data and seed of {reference.label}."
    found = [row for row in rows if row.p_corrected < SIGNIFICANT and row.difference is not None]
    more, less = (
        [row.method.label for row in found if row.difference is not None and sign * row.difference.value > 0]
        for sign in (1, -1)
    )
    open_ = [row for row in rows if row not in found]
    texts = [f"less than {listed(more)}"] if more else []
    texts += [f"more than {listed(less)}"] if less else []
    said = f"Paired tests say that {reference.label} served {listed(texts)}" if texts else ""
    if open_:
        few = all(row.smallest_p_corrected >= SIGNIFICANT for row in open_)
        why = ", as there are too few pairs" if few else ""
        names = listed(row.method.label for row in open_)
        rest = f"they do not tell it from {names}{why}"
        said = f"{said}; {rest}" if said else f"Paired tests do not tell {reference.label} from {names}{why}"
    return f"{said}."


def summary_table(numbers: StudyNumbers) -> TextTable:
    """What each method served and ended with, one row for each."""
    with_ends = len(numbers.datasets) <= MOST_DATASETS
    columns = ["method"]
    for one in numbers.datasets:
        columns += [f"served, {one.title}", *([f"final policy, {one.title}"] if with_ends else [])]
    rows = []
    for method in numbers.shown_methods:
        row, lost = [method.label], list[float]()
        for one in numbers.datasets:
            group = next((group for group in one.groups if group.method.name == method.name), None)
            row.append(NONE if group is None else ranged(group.estimate(SERVED)))
            if with_ends:
                row.append(NONE if group is None else ranged(group.estimate("final_return")))
            lost += [] if group is None else group.values("served_collapsed_share")
        rows.append([*row, NONE if not lost else number(100 * sum(lost) / len(lost), 1)])
    return TextTable(
        "summary", [*columns, "lost episodes (%)"], rows, "",
        f"Served is the mean return of everything that acted in {counted(numbers.protocol.interactions, 'interaction')}, own "
        "evaluations included, after the warm-up (from scratch from the first step). Means over the seeds, with 95 % "
        "bootstrap intervals. Lost episodes earned at most a quarter of what the pretrained policy has over a random one.",
    )  # fmt: skip
