"""What a study's results say, in words, and what they leave open. Only the paired tests call anything a difference."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from sb3_offline_ft.evaluation.finetuning_metrics import CONSECUTIVE
from sb3_offline_ft.evaluation.served import EXPLORE, TRIAL
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.words import (
    LEVEL,
    NBSP,
    capital,
    counted,
    interval,
    listed,
    number,
    percent,
    probability,
    some,
)
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers
from sb3_offline_ft.study.report.comparisons import COLLAPSED, FAMILIES, SIGNIFICANT, Comparison
from sb3_offline_ft.study.report.runs import Group, last_evaluations
from sb3_offline_ft.study.report.shortcomings import shortcomings

FEW_SEEDS = 10
"""With fewer seeds the report says that they are few."""
RARE = 0.1
NOISE_CONFIDENCE = 0.95
"""That of the noise floor of dips."""
TELLING = 0.01
"""If an unchanged policy counts as collapsed with a higher probability, the report says so."""

Sections = list[tuple[str, list[str]]]


def verdict(numbers: StudyNumbers) -> Sections:
    """Headings with their sentences."""
    served = [text for one in numbers.datasets for text in _served(one)]
    sections: Sections = [("What was served", served), ("In short", _in_short(numbers))]
    if numbers.reference is not None:
        sections.append((f"Compared with {numbers.reference.label}", _compared(numbers, numbers.reference.label)))
    sections += [(f"On {one.title}", _on_dataset(numbers, one)) for one in numbers.datasets]
    sections.append(("What remains uncertain", _uncertain(numbers)))
    return [(heading, [capital(text) for text in texts]) for heading, texts in sections if texts]


def _served(one: DatasetNumbers) -> list[str]:
    """What everything that acted earned, at equal interactions."""
    groups = one.shown
    means, thirds = (_estimates(groups, f"served_{name}_return") for name in ("mean", "last_third"))
    if not means:
        return []
    n = counted(one.interactions, "interaction")
    texts = [
        f"mean return of everything that acted on {one.title} in {n}, own evaluations included, {when}: "
        f"{_values([(group.label, estimate) for group, estimate in rows])}."
        for when, rows in (("in all", means), ("in the last third", thirds))
        if rows
    ]
    losses = [
        f"{group.label} {number(max(group.values('served_largest_shortfall')), 1)}, "
        f"{number(100 * float(np.mean(group.values('served_collapsed_share'))), 1)}{NBSP}%"
        for group in groups
        if group.values("served_largest_shortfall") and group.values("served_collapsed_share")
    ]
    if losses:
        texts.append(
            f"largest shortfall of any seed on {one.title}, in episodes in which all is lost that the pretrained policy has "
            f"over a random one, and mean share of episodes that lost at least three quarters of it: {'; '.join(losses)}."
        )
    at_risk = [f"{group.label} {risks}" for group in groups if (risks := _at_risk(group))]
    if at_risk:
        texts.append(f"episodes at risk behind a champion on {one.title}, means over the seeds: {'; '.join(at_risk)}.")
    return texts


def _at_risk(group: Group) -> str:
    """How many trials and explorations there were, and their shortfalls if these are known."""
    texts = []
    for kind, noun in ((TRIAL, "trials"), (EXPLORE, "explorations")):
        episodes, lost = (group.estimate(f"served_{kind}_{name}") for name in ("episodes", "shortfall"))
        if episodes is not None:
            shortfall = "" if lost is None else f" (shortfall {number(lost.value, 1)})"
            texts.append(f"{number(episodes.value, 1)} {noun}{shortfall}")
    return listed(texts)


def _in_short(numbers: StudyNumbers) -> list[str]:
    texts = [text for one in numbers.datasets for text in _collapses(f"on {one.title}", one.shown, "seed")]
    pooled = [one for one in numbers.datasets if any(group.outcomes for group in one.shown)]
    if len(pooled) > 1:
        which = "all datasets" if len(pooled) == len(numbers.datasets) else listed(one.title for one in pooled)
        texts += _collapses(f"taking {which} together", _pooled(numbers), "run")
    rows = sorted(numbers.aggregates, key=lambda row: -row.iqm.value)
    if len(rows) > 1:
        over = "over all datasets" if len(numbers.datasets) > 1 else f"on {numbers.datasets[0].title}"
        scores = [(row.method.label, row.iqm) for row in rows]
        text = (
            f"{over}, the interquartile means of the normalised ends are: {_values(scores, 1)}. {_overlaps(scores)}".rstrip()
        )
        n, n_all = len(numbers.scored), len(numbers.datasets) * len(numbers.protocol.seeds)
        if n < n_all:
            text += f" They are over the {n} of {counted(n_all, 'pair')} of dataset and seed that all of these methods have."
        texts.append(text)
    if texts and numbers.tests.comparisons:
        texts.append("Whether methods differ is for the paired tests below to say, not for intervals.")
    return texts + _own_evaluations(numbers)


def _own_evaluations(numbers: StudyNumbers) -> list[str]:
    parts: list[str] = []
    for method in numbers.shown_methods:
        steps = [one.learner_evaluation_steps for one in numbers.runs if one.method.name == method.name]
        known = [each for each in steps if each is not None]
        if any(known):
            used = "used on average " if not parts else ""
            parts.append(f"{method.label} {used}{number(float(np.mean(known)), 0)}")
    if not parts:
        return []
    whose = "its" if len(parts) == 1 else "their"
    interactions = counted(numbers.protocol.interactions, "interaction")
    return [f"beside the {interactions}, {listed(parts)} environment steps for {whose} own evaluations."]


def _values(estimates: Sequence[tuple[str, Estimate]], digits: int | None = None) -> str:
    """Named estimates with their intervals."""
    parts = []
    first = next((name for name, estimate in estimates if estimate.has_interval), None)
    for name, estimate in estimates:
        around = f"{LEVEL} interval {interval(estimate, digits)}" if name == first else interval(estimate, digits)
        parts.append(f"{name} {number(estimate.value, digits)} ({around})")
    return "; ".join(parts)


def _pooled(numbers: StudyNumbers) -> list[Group]:
    """By method, the runs on the datasets and seeds that all methods have which can collapse."""
    names = {group.method.name for one in numbers.datasets for group in one.groups if group.outcomes}
    methods = [method for method in numbers.shown_methods if method.name in names]
    common = set(numbers.common(methods))
    runs = [one for one in numbers.runs if (one.dataset, one.seed) in common]
    return [Group(method, tuple(one for one in runs if one.method.name == method.name)) for method in methods]


def _collapses(where: str, groups: Sequence[Group], noun: str) -> list[str]:
    """Which runs collapsed, of the groups for which that is defined."""
    rates = [(group, rate) for group in groups if (rate := group.collapse_rate) is not None]
    if all(group.method.frozen for group, _ in rates):
        return []
    rates.sort(key=lambda row: -row[1].value)
    parts = []
    for index, (group, estimate) in enumerate(rates):
        count, n = sum(group.outcomes), len(group.outcomes)
        if index == 0:
            nouns = noun if n == 1 and noun == "seed" else f"{noun}s"
            parts.append(f"{group.label} collapsed in {count} of {n} {nouns} ({LEVEL} CI {percent(estimate)})")
        else:
            parts.append(f"{group.label} in {count} of {n} ({percent(estimate)})")
    text = f"{where}, {'; '.join(parts)}."
    if len(rates) > 1 and rates[0][1].value > 0:
        text += " " + _overlaps([(group.label, estimate) for group, estimate in rates])
    return [text + _collapses_by_chance([group for group, _ in rates])]


def _collapses_by_chance(groups: Sequence[Group]) -> str:
    shares = [group.collapse_probability for group in groups if group.collapse_probability is not None]
    if not shares or max(shares) <= TELLING:
        return ""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    share = high if low == high else f"{low} to {high}"
    return (
        f" By the noise of evaluations alone, an unchanged policy would count as collapsed in {share}{NBSP}% of runs: so many "
        "say nothing of a method."
    )


def _overlaps(estimates: Sequence[tuple[str, Estimate]]) -> str:
    """How many intervals overlap; no more, as intervals of single methods are no test of their difference."""
    pairs = list(combinations([one for _, one in estimates if one.has_interval], 2))
    if not pairs:
        return ""
    n = sum(one.low <= other.high and other.low <= one.high for one, other in pairs)
    if len(pairs) == 1:
        return f"These intervals {'overlap' if n else 'do not overlap'}; that is no test."
    if n in (0, len(pairs)):
        return f"{'All' if n else 'No two'} of these intervals overlap; that is no test."
    return f"{n} of {len(pairs)} pairs of these intervals overlap; that is no test."


def _on_dataset(numbers: StudyNumbers, one: DatasetNumbers) -> list[str]:
    groups = one.shown
    return [*_dips(one, groups), *_ends(one, groups), *_kept(numbers, groups), *_selected(groups)]


def _dips(one: DatasetNumbers, groups: Sequence[Group]) -> list[str]:
    known = [group for group in groups if group.values("dip_depth")]
    if all(group.method.frozen for group in known):
        return []
    known.sort(key=lambda group: -max(group.values("dip_depth")))
    parts, n_learning = [], 0
    for index, group in enumerate(known):
        deep, n = group.deeper_than_noise
        n_learning += n if not group.method.frozen else 0
        words = f" {'seed' if n == 1 else 'seeds'} deeper than the noise of an unchanged policy" if index == 0 else ""
        noise = f" ({deep} of {n}{words})" if n else ""
        parts.append(f"{group.label} {number(max(*group.values('dip_depth'), 0.0), 2)}{noise}")
    text = f"deepest dip of any seed, where 1 is down to a random policy and 0 is none: {'; '.join(parts)}."
    if one.noise_floor is not None:
        floor = number(max(one.noise_floor, 0.0), 2)
        expected = number((1 - NOISE_CONFIDENCE) * n_learning, 1)
        text += (
            f" {LEVEL} of the runs of an unchanged policy seem to dip by no more than {floor}, by noise alone: of "
            f"{counted(n_learning, 'learning run')} about {expected} would be deeper by chance, and more if returns are "
            "skewed towards low values."
        )
    return [text]


def _ends(one: DatasetNumbers, groups: Sequence[Group]) -> list[str]:
    ends = _estimates(groups, "last_return")
    values = [(group.label, estimate) for group, estimate in ends]
    levels = []
    if one.initial_return is not None:
        levels.append(f"the pretrained policies' mean is {number(one.initial_return)}")
    if one.data_return is not None:
        levels.append(f"the data's {number(one.data_return)}")
    last = last_evaluations(one for group in groups for one in group.runs)
    text = f"mean of the last {last} evaluations: {_values(values)}. {_overlaps(values)}"
    if levels:
        text = f"{text.rstrip()} For comparison: {listed(levels)}."
    gains = [(group, *group.above_initial) for group, _ in ends]
    above = [f"{group.label} in {count} of {n}" for group, count, n in gains if n]
    texts = [text.rstrip()]
    if any(n and not group.method.frozen for group, _, n in gains):
        texts.append(
            f"seeds that ended above the pretrained policy they started from: {'; '.join(above)}. {_unchanged(groups)} does "
            "in about half of the seeds, by noise."
        )
    return texts


def _estimates(groups: Sequence[Group], metric: str) -> list[tuple[Group, Estimate]]:
    """Means of a metric for which it is defined, the highest first."""
    found = [(group, estimate) for group in groups if (estimate := group.estimate(metric)) is not None]
    return sorted(found, key=lambda pair: -pair[1].value)


def _unchanged(groups: Sequence[Group]) -> str:
    frozen = [group.label for group in groups if group.method.frozen]
    return f"A policy that does not change ({listed(frozen)})" if frozen else "A policy that does not change"


def _kept(numbers: StudyNumbers, groups: Sequence[Group]) -> list[str]:
    random = numbers.random_return
    if random is None:
        return []
    parts = []
    for group in groups:
        metrics = [one.metrics for one in group.runs]
        best = float(np.mean([one.best_sustained_return for one in metrics])) - random
        if best > 0:
            held = max(0.0, float(np.mean([one.last_return for one in metrics])) - random) / best
            parts.append(f"{group.label} {100 * held:.0f}{NBSP}%")
        else:
            parts.append(f"{group.label} never above a random policy")
    if all(group.method.frozen for group in groups):
        return []
    return [
        f"held at the end of the best {CONSECUTIVE} evaluations in a row, both from the random policy's level, means over the "
        f"seeds: {'; '.join(parts)}. {_unchanged(groups)} has less than 100{NBSP}% too, since the best of many is partly luck."
    ]


def _selected(groups: Sequence[Group]) -> list[str]:
    kept = _estimates(groups, "selected_return")
    if all(group.method.frozen for group, _ in kept):
        return []
    return [
        "if the best evaluated policy is kept rather than the last one, chosen by half of the episodes of each evaluation and "
        f"measured by the others: {_values([(group.label, estimate) for group, estimate in kept])}. This needs evaluations "
        "in which a fall does no harm."
    ]


MEASURES = {
    "served_mean_return": ("what was served", "What was served", "more", "less"),
    "last_return": ("mean of the last {last} evaluations", "Ends", "higher", "lower"),
    "mean_return": (
        "mean over the whole run after the warm-up", "Means over the whole run after the warm-up", "higher", "lower"
    ),
    "dip_depth": ("dips", "Dips", "deeper", "less deep"),
    COLLAPSED: ("collapses", "Collapses", "more often", "less often"),
}  # fmt: skip
"""What is compared, in a sentence and at its beginning, and how it may differ."""


def _compared(numbers: StudyNumbers, reference: str) -> list[str]:
    rows = [row for row in numbers.tests.comparisons if row.method in numbers.shown_methods]
    texts = []
    for metric, (words, _, more, less) in MEASURES.items():
        of_metric = [row for row in rows if row.metric == metric and (row.difference or row.only_method or row.only_reference)]
        if of_metric:
            texts.append(_one_measure(of_metric, words.format(last=last_evaluations(numbers.runs)), more, less))
            if metric == COLLAPSED:
                texts[-1] += " The pairs are those in which only the first : only the second of the two collapsed."
    if texts:
        texts.insert(
            0,
            f"pairs are runs with the same data and seed. Numbers are mean differences to {reference}, p-values are after "
            f"Holm's correction, for {_families(numbers)}. One below {SIGNIFICANT:g} is called a difference. So a study of "
            f"methods that are all alike shows any, of those corrected together, with a probability of at most "
            f"{100 * SIGNIFICANT:g}{NBSP}%.",
        )
    return texts


def _families(numbers: StudyNumbers) -> str:
    """How many tests are corrected together."""
    served, others = (
        next((row.n_tests for row in numbers.tests.comparisons if row.metric in family), 0) for family in FAMILIES
    )
    if not (served and others):
        return counted(served or others, "test")
    return f"{counted(served, 'test')} of what was served and, apart from them, {counted(others, 'test')} of all else"


def _one_measure(rows: Sequence[Comparison], what: str, more: str, less: str) -> str:
    def sign(row: Comparison) -> float:
        return row.difference.value if row.difference is not None else row.only_method - row.only_reference

    def size(row: Comparison) -> str:
        if row.difference is None:
            return f"{row.only_method} : {row.only_reference} pairs"
        value = number(row.difference.value, 2 if row.metric == "dip_depth" else None)
        return f"+{value}" if row.difference.value > 0 else value

    certain = [row for row in rows if row.p_corrected < SIGNIFICANT]
    parts = []
    for words, chosen in (
        (more, [row for row in certain if sign(row) > 0]),
        (less, [row for row in certain if sign(row) <= 0]),
        ("no difference shown", [row for row in rows if row.p_corrected >= SIGNIFICANT]),
    ):
        if chosen:
            named = [f"{row.method.label} ({size(row)}, {probability(row.p_corrected)})" for row in chosen]
            parts.append(f"{words} for {'; '.join(named)}")
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
    tested = [row for row in numbers.tests.comparisons if row.method in shown]
    weak = [row for row in tested if row.smallest_p_corrected >= SIGNIFICANT]
    if weak:
        row = min(weak, key=lambda one: (one.n, -one.smallest_p_corrected))
        which = "" if len(weak) == len(tested) else f", as for {listed(dict.fromkeys(one.method.label for one in weak))}"
        texts.append(
            f"With {counted(row.n, 'pair')} of runs{which}, a paired test cannot give a p-value below {row.smallest_p:.2g}, "
            f"and Holm's correction for {counted(row.n_tests, 'test')} makes "
            f"{row.smallest_p_corrected:.2g} of it: no difference, however large, can be called significant. "
            "More seeds or fewer methods would help."
        )
    if numbers.reference is None and len(numbers.methods) > 1:
        name = numbers.protocol.reference_method
        why = "The protocol names no reference_method" if name is None else f"No run of {name}, the reference, has finished"
        texts.append(f"{why}, so methods are not compared in pairs and nothing is called a difference.")
    for metric, methods in numbers.tests.not_compared.items():
        if names := listed(method.label for method in methods if method in shown):
            texts.append(f"{MEASURES[metric][1]} cannot be compared for {names}: there are fewer than two pairs of runs.")
    texts += _not_recorded(numbers)
    texts += _undefined(numbers)
    texts += shortcomings({one.run.cell.name: one.manifest for one in numbers.runs}, numbers.protocol.interactions)
    unwatched = [one.run.cell.name for one in numbers.runs if one.run.result.events and one.watched[0] == 0]
    if unwatched:
        texts.append(f"The guard watched no returns in {counted(len(unwatched), 'run')}, so had no alarms: {some(unwatched)}.")
    texts += [
        f"There are no normalised scores on {one.title}: {one.why_no_scale}." for one in numbers.datasets if one.why_no_scale
    ]
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


def _not_recorded(numbers: StudyNumbers) -> list[str]:
    unknown = [one for one in numbers.runs if one.acted is None]
    if not unknown:
        return []
    methods = listed(method.label for method in numbers.methods if method in [one.method for one in unknown])
    return [
        f"What was served is not known of {len(unknown)} of {counted(len(numbers.runs), 'run')} ({methods}): they did not "
        "record what their own evaluations returned, or how many steps these took."
    ]


def _undefined(numbers: StudyNumbers) -> list[str]:
    shown = numbers.shown_methods
    without = [method.label for method in shown if numbers.random_return is None or not method.pretrained]
    texts = []
    if without:
        why = "there is no pretrained policy that they could fall from"
        if numbers.random_return is None:
            why = "the return of a random policy is not known; random_return in the protocol gives it"
        texts.append(f"Dips and collapses are not defined for {listed(without)}: {why}.")
    for one in numbers.datasets if numbers.random_return is not None else []:
        lacking = [
            f"{group.label} ({len(group.runs) - len(group.outcomes)} of {counted(len(group.runs), 'run')})"
            for group in one.groups
            if group.method in shown and group.method.pretrained and len(group.outcomes) < len(group.runs)
        ]
        if lacking:
            texts.append(
                f"Dips and collapses on {one.title} are not defined for {listed(lacking)}: the pretrained policy is no better "
                "than a random one."
            )
    return texts
