"""What a study's results say, in words, and what they leave open. Intervals that overlap are not called differences."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from sb3_offline_ft.evaluation.finetuning_metrics import LAST
from sb3_offline_ft.evaluation.statistics import Estimate, rate
from sb3_offline_ft.study.analysis import COLLAPSED, SIGNIFICANT, Comparison, DatasetNumbers, Group, StudyNumbers
from sb3_offline_ft.study.words import LEVEL, NBSP, capital, counted, interval, listed, number, percent, probability

FEW_SEEDS = 10
"""With fewer seeds the report says that they are few."""
RARE = 0.1
MOST_PAIRS = 5
"""So many overlapping intervals are named."""

Sections = list[tuple[str, list[str]]]


def verdict(numbers: StudyNumbers) -> Sections:
    """
    :param numbers: A study's results
    :return: Headings with their sentences
    """
    sections: Sections = [("In short", _in_short(numbers))]
    if numbers.reference is not None:
        sections.append((f"Compared with {numbers.reference.label}", _compared(numbers, numbers.reference.label)))
    sections += [(f"On {one.title}", _on_dataset(numbers, one)) for one in numbers.datasets]
    sections.append(("What remains uncertain", _uncertain(numbers)))
    return [(heading, [capital(text) for text in texts]) for heading, texts in sections if texts]


def _in_short(numbers: StudyNumbers) -> list[str]:
    texts = [text for one in numbers.datasets for text in _collapses(f"on {one.title}", _outcomes(numbers, one))]
    if len(numbers.datasets) > 1:
        pooled: dict[str, list[bool]] = {}
        for one in numbers.datasets:
            for label, outcomes in _outcomes(numbers, one):
                pooled.setdefault(label, []).extend(outcomes)
        texts += _collapses("taking all datasets together", list(pooled.items()))
    rows = sorted(numbers.aggregates, key=lambda row: -row.iqm.value)
    if len(rows) > 1:
        over = "over all datasets" if len(numbers.datasets) > 1 else f"on {numbers.datasets[0].title}"
        scores = [(row.method.label, row.iqm) for row in rows]
        text = f"{over}, the interquartile means of the normalised ends are: {_values(scores, 1)}. {_overlaps(scores)}"
        texts.append(text.rstrip())
    return texts


def _values(estimates: Sequence[tuple[str, Estimate]], digits: int | None = None) -> str:
    """
    :param estimates: Names with their estimates
    :param digits: Digits after the point
    :return: All of them, with their intervals
    """
    parts = []
    first = next((name for name, estimate in estimates if estimate.has_interval), None)
    for name, estimate in estimates:
        around = f"{LEVEL} interval {interval(estimate, digits)}" if name == first else interval(estimate, digits)
        parts.append(f"{name} {number(estimate.value, digits)} ({around})")
    return "; ".join(parts)


def _outcomes(numbers: StudyNumbers, one: DatasetNumbers) -> list[tuple[str, list[bool]]]:
    return [(group.label, group.outcomes) for group in numbers.shown(one) if group.outcomes and not group.method.frozen]


def _collapses(where: str, outcomes: Sequence[tuple[str, list[bool]]]) -> list[str]:
    rates = [(label, rate(sum(one), len(one)), one) for label, one in outcomes]
    if not rates:
        return []
    rates.sort(key=lambda row: -row[1].value)
    parts = []
    for index, (label, estimate, one) in enumerate(rates):
        if index == 0:
            runs = ("seed" if len(one) == 1 else "seeds") if where.startswith("on ") else "runs"
            parts.append(f"{label} collapsed in {sum(one)} of {len(one)} {runs} ({LEVEL} CI {percent(estimate)})")
        else:
            parts.append(f"{label} in {sum(one)} of {len(one)} ({percent(estimate)})")
    text = f"{where}, {'; '.join(parts)}."
    if len(rates) > 1 and rates[0][1].value > 0:
        text += " " + _overlaps([(label, estimate) for label, estimate, _ in rates])
    return [text]


def _overlaps(estimates: Sequence[tuple[str, Estimate]]) -> str:
    """
    :param estimates: Names with their estimates, the highest first
    :return: Which intervals overlap
    """
    known = [(name, one) for name, one in estimates if one.has_interval]
    pairs = list(combinations(known, 2))
    overlapping = [(a, b) for (a, one), (b, other) in pairs if one.low <= other.high and other.low <= one.high]
    if not pairs:
        return ""
    if len(overlapping) == len(pairs):
        few = "These intervals overlap" if len(pairs) == 1 else "All of these intervals overlap"
        return f"{few}: no difference is certain."
    if not overlapping:
        return "These intervals do not overlap." if len(pairs) == 1 else "No two of these intervals overlap."
    if min(len(overlapping), len(pairs) - len(overlapping)) > MOST_PAIRS:
        top = known[0][0]
        with_top = [b for a, b in overlapping if a == top]
        which = f"those of {listed(with_top)}" if with_top else "none"
        return f"{len(overlapping)} of {len(pairs)} pairs of these intervals overlap; that of {top} with {which}."
    if 2 * len(overlapping) <= len(pairs):
        named = "; ".join(f"{a} and {b}" for a, b in overlapping)
        return f"These intervals overlap, so that their difference is not certain: {named}. All others are apart."
    by_higher: dict[str, list[str]] = {}
    for (a, one), (b, other) in pairs:
        if (a, b) not in overlapping:
            higher, lower = (a, b) if one.low > other.high else (b, a)
            by_higher.setdefault(higher, []).append(lower)
    parts = [f"that of {higher} is above {'that' if len(lower) == 1 else 'those'} of {listed(lower)}"
             for higher, lower in by_higher.items()]  # fmt: skip
    return f"Only these intervals do not overlap: {'; '.join(parts)}. No other difference is certain."


def _on_dataset(numbers: StudyNumbers, one: DatasetNumbers) -> list[str]:
    groups = numbers.shown(one)
    return [*_dips(one, groups), *_ends(one, groups), *_kept(numbers, groups)]


def _dips(one: DatasetNumbers, groups: Sequence[Group]) -> list[str]:
    learning = [group for group in groups if group.values("dip_depth") and not group.method.frozen]
    if not learning:
        return []
    learning.sort(key=lambda group: -max(group.values("dip_depth")))
    parts = []
    for index, group in enumerate(learning):
        deep, n = group.deeper_than_noise
        words = f" {'seed' if n == 1 else 'seeds'} deeper than the noise of an unchanged policy" if index == 0 else ""
        noise = f" ({deep} of {n}{words})" if n else ""
        parts.append(f"{group.label} {number(max(*group.values('dip_depth'), 0.0), 2)}{noise}")
    text = f"deepest dip of any seed, where 1 is down to a random policy: {'; '.join(parts)}."
    if one.noise_floor is not None:
        floor = number(max(one.noise_floor, 0.0), 2)
        text += f" {LEVEL} of the runs of an unchanged policy seem to dip by no more than {floor}, by noise alone."
    return [text]


def _ends(one: DatasetNumbers, groups: Sequence[Group]) -> list[str]:
    ends = [(group, estimate) for group in groups if (estimate := group.estimate("last_return")) is not None]
    ends.sort(key=lambda pair: -pair[1].value)
    values = [(group.label, estimate) for group, estimate in ends]
    levels = []
    if one.initial_return is not None:
        levels.append(f"the pretrained policies' mean is {number(one.initial_return)}")
    if one.data_return is not None:
        levels.append(f"the data's {number(one.data_return)}")
    text = f"mean of the last {LAST} evaluations: {_values(values)}. {_overlaps(values)}"
    if levels:
        text = f"{text.rstrip()} For comparison: {listed(levels)}."
    gains = [(group.label, *group.above_initial) for group, _ in ends if not group.method.frozen]
    above = [f"{label} in {count} of {n}" for label, count, n in gains if n]
    return [
        text.rstrip(),
        *([f"seeds that ended above the pretrained policy they started from: {'; '.join(above)}."] if above else []),
    ]


def _kept(numbers: StudyNumbers, groups: Sequence[Group]) -> list[str]:
    random = numbers.protocol.random_return
    if random is None:
        return []
    parts = []
    for group in groups:
        metrics = [one.metrics for one in group.runs]
        shares = [
            max(0.0, one.last_return - random) / (one.best_return - random) for one in metrics if one.best_return > random
        ]
        if shares and not group.method.frozen:
            parts.append(f"{group.label} {100 * float(np.mean(shares)):.0f}{NBSP}%")
    return [f"held at the end of the best evaluation, from the random policy's level: {'; '.join(parts)}."] if parts else []


_MEASURES: tuple[tuple[str, str, str, str, int | None], ...] = (
    ("last_return", f"mean of the last {LAST} evaluations", "higher", "lower", None),
    ("mean_return", "mean over the whole run after the warm-up", "higher", "lower", None),
    ("dip_depth", "dips", "deeper", "less deep", 2),
)


def _compared(numbers: StudyNumbers, reference: str) -> list[str]:
    shown = numbers.shown_methods
    rows = [row for row in numbers.comparisons if row.method in shown]
    texts = []
    for metric, what, more, less, digits in _MEASURES:
        learning = [row for row in rows if row.metric == metric and not (metric == "dip_depth" and row.method.frozen)]
        text = _one_measure(learning, what, more, less, partial(_size, digits=digits))
        texts += [text] if text else []
    collapsed = [row for row in rows if row.metric == COLLAPSED and row.only_method + row.only_reference]
    text = _one_measure(
        collapsed, "collapses", "more often", "less often", lambda row: f"{row.only_method} : {row.only_reference} pairs"
    )
    if text:
        texts.append(f"{text} The pairs are those in which only the first : only the second of the two collapsed.")
    if texts:
        texts.insert(
            0,
            f"pairs are runs with the same data and seed. Numbers are mean differences to {reference}, p-values are after "
            f"Holm's correction, and one below {SIGNIFICANT:g} is called a difference.",
        )
    return texts


def _size(row: Comparison, digits: int | None) -> str:
    assert row.difference is not None
    sign = "+" if row.difference.value > 0 else ""
    return f"{sign}{number(row.difference.value, digits)}"


def _one_measure(rows: Sequence[Comparison], what: str, more: str, less: str, size: Callable[[Comparison], str]) -> str | None:
    if not rows:
        return None

    def named(chosen: Sequence[Comparison]) -> str:
        return "; ".join(f"{row.method.label} ({size(row)}, {probability(row.p_corrected)})" for row in chosen)

    def sign(row: Comparison) -> float:
        return row.difference.value if row.difference is not None else row.only_method - row.only_reference

    certain = [row for row in rows if row.p_corrected < SIGNIFICANT]
    parts = []
    for words, chosen in (
        (more, [row for row in certain if sign(row) > 0]),
        (less, [row for row in certain if sign(row) <= 0]),
        ("no difference shown", [row for row in rows if row.p_corrected >= SIGNIFICANT]),
    ):
        if chosen:
            parts.append(f"{words} for {named(chosen)}")
    return f"{what}: {'. '.join([parts[0], *map(capital, parts[1:])])}."


def _uncertain(numbers: StudyNumbers) -> list[str]:
    texts = []
    n = numbers.fewest_seeds
    if n == 1:
        texts.append("Some methods have only 1 seed: nothing can be said of how much seeds differ.")
    elif n < FEW_SEEDS:
        texts.append(
            f"{n} seeds are few: bootstrap intervals are too narrow, and a collapse that happens in one run of ten is missed "
            f"with probability {100 * (1 - RARE) ** n:.0f}{NBSP}%."
        )
    shown = numbers.shown_methods
    tested = [row for row in numbers.comparisons if row.method in shown]
    weak = [row for row in tested if row.smallest_p > SIGNIFICANT]
    if weak:
        row = min(weak, key=lambda one: one.n)
        which = "" if len(weak) == len(tested) else f", as for {listed(dict.fromkeys(one.method.label for one in weak))}"
        texts.append(
            f"With {counted(row.n, 'pair')} of runs{which}, a paired test cannot give a p-value below {row.smallest_p:.2g}: "
            "no difference, however large, can be called significant."
        )
    if numbers.reference is None and len(numbers.methods) > 1:
        texts.append("The protocol names no reference_method, so methods are not compared in pairs.")
    texts += _undefined(numbers)
    missing, failed, unusable = len(numbers.results.missing), len(numbers.results.failed), len(numbers.unusable)
    if missing:
        texts.append(f"{_of_all(missing, numbers)} not finished: what is said may change.")
    if failed + unusable:
        texts.append(
            f"{_of_all(failed + unusable, numbers)} left out, as {'it' if failed + unusable == 1 else 'they'} failed or "
            "cannot be measured: if the learner diverged, the method looks better here than it is."
        )
    texts.append(
        "All runs are of one environment, with these data and hyperparameters: other environments, data and hyperparameters "
        "may say otherwise."
    )
    return texts


def _of_all(n: int, numbers: StudyNumbers) -> str:
    return f"{n} of {counted(numbers.n_cells, 'run')} {'is' if n == 1 else 'are'}"


def _undefined(numbers: StudyNumbers) -> list[str]:
    unknown = [method.label for method in numbers.shown_methods if not _has_outcomes(numbers, method.name)]
    if not unknown:
        return []
    if numbers.protocol.random_return is None:
        why = "the return of a random policy is not known; random_return in the protocol gives it"
    else:
        why = "there is no pretrained policy that they could fall from, or it is no better than a random one"
    return [f"Dips and collapses are not defined for {listed(unknown)}: {why}."]


def _has_outcomes(numbers: StudyNumbers, name: str) -> bool:
    return any(group.outcomes for one in numbers.datasets for group in one.groups if group.method.name == name)
