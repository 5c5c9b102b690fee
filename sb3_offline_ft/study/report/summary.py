"""What is read of a study in half a minute: a sentence, a table and a picture; all else stands behind it."""

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import NONE, capital, counted, listed, number, probability, ranged
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers
from sb3_offline_ft.study.report.comparisons import SIGNIFICANT
from sb3_offline_ft.study.report.runs import Group

SERVED = "served_mean_return"
MOST_DATASETS = 3
"""With more of them, the table has no columns for final policies."""


def headline(numbers: StudyNumbers) -> str:
    """Who served most on each dataset and what it lost, and what the tests say of it."""
    texts = [text for one in numbers.datasets if (text := _first(one))]
    if not texts:
        return "What was served is not known of any run."
    return f"{capital('; '.join(texts))}. {_tested(numbers)}"


def _ranked(one: DatasetNumbers) -> list[tuple[Group, Estimate]]:
    """What was served, the most first."""
    known = [(group, estimate) for group in one.shown if (estimate := group.estimate(SERVED)) is not None]
    return sorted(known, key=lambda row: -row[1].value)


def _first(one: DatasetNumbers) -> str:
    ranked = _ranked(one)
    if not ranked:
        return ""
    most = number(ranked[0][1].value)
    first = [group for group, estimate in ranked if number(estimate.value) == most]
    labels, rest = listed(group.label for group in first), ranked[len(first) :]
    facts = "; ".join(dict.fromkeys(map(_seeds, first)))
    start = "" if one.initial_return is None else f", where the pretrained policy earns {number(one.initial_return)}"
    if not rest:
        return f"on {one.title}, {labels} served {most} on average ({facts}){start}"
    second, other = rest[0]
    return (
        f"on {one.title}, {labels} served most, {most} on average ({facts}), before {second.label} with "
        f"{number(other.value)}{start}"
    )


def _seeds(group: Group) -> str:
    """Of how many seeds the means are, and how many episodes were lost."""
    n, losses = len(group.values(SERVED)), group.values("served_collapsed_share")
    text = counted(n, "seed")
    if not losses:
        return text
    of = "" if len(losses) == n else f" of {counted(len(losses), 'seed')}"
    return f"{text}; lost episodes{of} {number(100 * sum(losses) / len(losses), 1)} %"


def _tested(numbers: StudyNumbers) -> str:
    reference = numbers.reference
    rows = [row for row in numbers.tests.comparisons if row.metric == SERVED]
    if reference is None:
        name = numbers.protocol.reference_method
        why = "the study names no reference method" if name is None else f"no run of {name}, its reference, has finished"
        return f"Nothing is tested, as {why}."
    if not rows:
        return f"What was served is not tested: no other method has two runs with the data and seed of {reference.label}."
    found = [row for row in rows if row.p_corrected < SIGNIFICANT and row.difference is not None]
    more, less = (
        [
            f"{row.method.label} ({probability(row.p_corrected)})"
            for row in found
            if row.difference is not None and sign * row.difference.value > 0
        ]
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
        f"Served is the mean return of everything that acted in {counted(numbers.protocol.interactions, 'interaction')}, "
        "warm-up and own evaluations included. Means over the seeds, with 95 % bootstrap intervals. Lost episodes, of those "
        "after the warm-up, earned at most a quarter of what the pretrained policy has over a random one.",
    )  # fmt: skip
