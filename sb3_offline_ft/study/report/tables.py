"""The tables of a study: for its page, as Markdown, and one row for each run as CSV."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sb3_offline_ft.evaluation.served import AT, WINDOW
from sb3_offline_ft.pages.tables import TextTable
from sb3_offline_ft.pages.words import (
    NBSP,
    NONE,
    capital,
    counted,
    interval,
    listed,
    number,
    percent,
    probability,
    ranged,
)
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers
from sb3_offline_ft.study.report.comparisons import COLLAPSED, Comparison
from sb3_offline_ft.study.report.factors import Levels
from sb3_offline_ft.study.report.runs import Group, RunNumbers, last_evaluations

TEST_WORDS = (
    "Pairs are runs with the same data and seed, which start from the same pretrained policy, but for commands, which "
    "pretrain their own; a run without data is paired with the mean of those of its seed. Sign-flip permutation tests of the "
    "mean difference, for collapses McNemar's exact test; two-sided. Holm's correction is for all tests of what was served, "
    "which a study asks first, and apart from them for all others of this table. For collapses the difference is the pairs in "
    "which only the first : only the second collapsed. A dip depth below 0 counts as 0 here, no dip, but not in the other "
    "tables. Not tested: dips and collapses of a policy that does not change, which are noise, and means over time of methods "
    "with different warm-ups or, as from scratch, none, after which they begin."
)
GUARD_EVENTS = ("alarm", "rollback", "promotion", "escalation", "warning")


@dataclass(frozen=True)
class Column:
    """A number that :meth:`RunNumbers.value` gives, its heading, its digits after the point, and what it is multiplied by."""

    name: str
    title: str
    digits: int | None = None
    factor: float = 1.0

    def text(self, value: float | None) -> str:
        return number(None if value is None else self.factor * value, self.digits)

    def mean(self, group: Group, with_interval: bool = True) -> str:
        """The mean over the runs of a method, with its interval if it has one."""
        estimate = group.estimate(self.name)
        if estimate is None:
            return NONE
        around = f" ({self.text(estimate.low)} to {self.text(estimate.high)})"
        return self.text(estimate.value) + around * (with_interval and estimate.has_interval)


RETURN_COLUMNS = (
    Column("initial_return", "pretrained J₀"),
    Column("lowest_return", "lowest"),
    Column("best_return", "best"),
    Column("last_return", "last {last}"),
    Column("mean_return", "over time"),
    Column("training_return", "training"),
    Column("selected_return", "best kept"),
)
DIP_COLUMNS = (
    Column("dip_depth", "dip depth", 2),
    Column("dip_area", "dip area", 3),
    Column("time_below_band", "time below the band (%)", 0, 100.0),
    Column("recovery_time", "recovery (interactions)", 0),
)
SERVED_COLUMNS = (
    Column("served_mean_return", "all interactions"),
    Column("served_warmup_return", "warm-up"),
    Column("served_last_third_return", "last third"),
    *(Column(f"served_return_at_{steps}", f"at {steps:,}") for steps in AT),
    Column("served_initial_return", "J₀ served"),
    Column("served_shortfall", "shortfall (episodes)", 1),
    Column("served_largest_shortfall", "largest shortfall", 1),
    Column("served_collapsed_share", "lost episodes (%)", 1, 100.0),
    Column("served_longest_collapse", "most in a row", 0),
    Column("served_dip_depth", "dip of ten", 2),
)
RISK_COLUMNS = (
    Column("served_trial_episodes", "trials", 1),
    Column("served_trial_shortfall", "shortfall of trials", 1),
    Column("served_explore_episodes", "explorations", 1),
    Column("served_explore_shortfall", "shortfall of explorations", 1),
)
"""Of methods with a champion."""
COST_COLUMNS = (
    Column("learner_evaluation_steps", "steps of own evaluations", 0),
    Column("seconds", "wall time (min)", 1, 1 / 60),
)


def dataset_tables(numbers: DatasetNumbers) -> list[TextTable]:
    """The tables of a dataset, one row for each method."""
    groups = numbers.groups
    returns = [[group.label, str(len(group.runs)), *(column.mean(group) for column in RETURN_COLUMNS)] for group in groups]
    dips = [
        [
            group.label, _collapsed(group), _by_chance(group), *(column.mean(group) for column in DIP_COLUMNS[:3]),
            _recovery(group),
        ]
        for group in groups if group.method.pretrained
    ]  # fmt: skip
    costs = [[group.label, *(column.mean(group, with_interval=False) for column in COST_COLUMNS)] for group in groups]
    tables = [
        _served_table(numbers),
        TextTable(
            f"returns-{numbers.slug}", ["method", "seeds", *_titles(RETURN_COLUMNS, numbers.runs)], returns,
            f"Returns on {numbers.title}",
            "Means over the seeds, with 95 % bootstrap intervals. Over time is after the warm-up; from scratch it is from the "
            "first step. Best kept is the policy that is best by half of the episodes of each evaluation, measured by the "
            "other half.",
        ),
        TextTable(
            f"dips-{numbers.slug}",
            ["method", "collapsed", "by chance", *(column.title for column in DIP_COLUMNS[:3]), "recovered"], dips,
            f"Dips on {numbers.title}",
            "Means over the seeds with 95 % bootstrap intervals; collapse rates with exact ones. By chance: how many runs of "
            "unchanged policies would count as collapsed. A dip depth below 0: always above the pretrained policy. Recovered: "
            "of the seeds whose lowest evaluation is below the band, with the median time from it in interactions.",
        ),
        TextTable(
            f"costs-{numbers.slug}", ["method", *(column.title for column in COST_COLUMNS)], costs,
            f"Costs on {numbers.title}",
            "Means over the seeds. Own evaluations are environment steps that the learner needs besides its interactions; "
            "measured evaluations are not among them. Wall time is of finetuning with all evaluations.",
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _served_table(numbers: DatasetNumbers) -> TextTable:
    """No column for so many interactions as no run had."""
    groups = [group for group in numbers.groups if any(one.acted is not None for one in group.runs)]
    columns = [column for column in SERVED_COLUMNS + RISK_COLUMNS if any(group.values(column.name) for group in groups)]
    rows = [
        [group.label, str(len(group.values("served_mean_return"))), *(column.mean(group) for column in columns)]
        for group in groups
    ]
    return TextTable(
        f"served-{numbers.slug}", ["method", "seeds", *(column.title for column in columns)], rows,
        f"Served return on {numbers.title}",
        "What everything that acted earned, own evaluations included, against all interactions that this took. Means over the "
        "seeds, with 95 % bootstrap intervals, within as many interactions as the study has. Only at is of whole runs: "
        f"the mean over the {WINDOW:,} interactions before. J₀ served is the mean over episodes of the warm-up, the other "
        "returns are means over interactions. Shortfall is against J₀ served, at the end and at its largest, in episodes in "
        "which all is lost; below 0 more was earned. Lost episodes have at most a quarter of what J₀ served has over a "
        "random policy. Dip of ten: the depth of the lowest mean of ten episodes in a row; below 0 there was none."
        + " Trials and explorations are the episodes at risk behind a champion." * (RISK_COLUMNS[0] in columns),
    )  # fmt: skip


def runs_table(numbers: DatasetNumbers) -> TextTable:
    """One row for each run on a dataset."""
    at_risk = [each for each in RISK_COLUMNS if any(one.value(each.name) is not None for one in numbers.runs)]
    columns = [*SERVED_COLUMNS, *at_risk, *RETURN_COLUMNS, *DIP_COLUMNS, *COST_COLUMNS]
    outcomes = {True: "yes", False: "no", None: NONE}
    rows = [
        [
            f"{one.method.label}, seed {one.seed}",
            *(column.text(one.value(column.name)) for column in columns),
            outcomes[one.metrics.collapsed],
        ]
        for one in numbers.runs
    ]
    titles = ["run", *_titles(columns, numbers.runs), COLLAPSED]
    return TextTable(f"runs-{numbers.slug}", titles, rows, f"All runs on {numbers.title}")


def guard_words(numbers: StudyNumbers) -> str:
    """What guards did in all runs of each method."""
    texts = []
    for method in numbers.methods:
        guarded = [one for one in numbers.runs if one.method == method and one.run.result.events]
        if guarded:
            counts = [counted(sum(one.events(kind) for one in guarded), kind) for kind in GUARD_EVENTS]
            watched, episodes = (sum(numbers) for numbers in zip(*(one.watched for one in guarded), strict=True))
            texts.append(
                f"{capital(method.label)}: {listed(counts)} in {counted(len(guarded), 'run')}. It watched the returns of "
                f"{watched:,} of {counted(episodes, 'episode')}."
            )
    return " ".join(texts)


def guard_table(numbers: StudyNumbers) -> TextTable:
    """What guards did, one row for each guarded run."""
    guarded = {one.run.cell.name: one for dataset in numbers.datasets for one in dataset.runs if one.run.result.events}
    rows = []
    for name, one in guarded.items():
        alarms = [event.get("timestep") for event in one.run.result.events if event.get("event") == "alarm"]
        counts = [str(one.events(kind)) for kind in GUARD_EVENTS]
        rows.append([name, "{:,} of {:,}".format(*one.watched), *counts, f"{alarms[0]:,}" if alarms else NONE])
    titles = ["run", "episodes watched", *(f"{kind}s" for kind in GUARD_EVENTS), "first alarm after"]
    note = (
        "The baseline's episodes are not watched, and without enough of them none is: then only non-finite values and limits "
        "of other signals give alarms. Interactions until the first alarm. The events of a run are in its folder."
    )
    return TextTable("guard", titles, rows, "", note)


def scores_table(numbers: StudyNumbers) -> TextTable:
    """Normalised scores of each method, over all datasets."""
    rows = [
        [row.method.label, *(ranged(estimate, 1) for estimate in (row.iqm, row.median, row.mean))]
        for row in numbers.aggregates
    ]
    n_all = len(numbers.datasets) * len(numbers.protocol.seeds)
    over = f"Over {len(numbers.scored)} of {counted(n_all, 'pair')} of dataset and seed: those that all of these methods have."
    columns, note = ["method", "IQM", "median", "mean"], f"{over} {numbers.scale_words}".rstrip()
    return TextTable("scores", columns, rows, "Normalised scores", note)


def comparison_table(numbers: StudyNumbers) -> TextTable:
    """The tests against the reference method."""
    titles = {column.name: column.title for column in (*RETURN_COLUMNS, *DIP_COLUMNS)} | {COLLAPSED: COLLAPSED}
    titles["served_mean_return"] = "served"
    last = last_evaluations(numbers.runs)

    def difference(row: Comparison) -> list[str]:
        if row.difference is None:
            return [f"{row.only_method} : {row.only_reference}", NONE]
        digits = 2 if row.metric == "dip_depth" else None
        return [number(row.difference.value, digits), interval(row.difference, digits)]

    rows = [
        [
            f"{row.method.label}: {titles[row.metric].format(last=last)}", *difference(row), str(row.n),
            *(probability(p)[2:].removeprefix(f"={NBSP}") for p in (row.p, row.p_corrected)),
        ]
        for row in numbers.tests.comparisons
    ]  # fmt: skip
    reference = numbers.reference.label if numbers.reference is not None else ""
    columns = [f"minus {reference}", "mean difference", "95 % interval", "pairs", "p", "p, Holm"]
    return TextTable("comparisons", columns, rows, f"Paired comparison with {reference}", TEST_WORDS)


def factor_table(numbers: DatasetNumbers, factor: str, levels: Levels) -> TextTable:
    """What changes with a factor, one row for each method and value."""
    points = [(value, group) for points in levels.values() for value, group in points]
    metrics = {"dip_depth": 2, "last_return": None, "mean_return": None}
    rows = [
        [
            group.label, value, str(len({one.seed for one in group.runs})), _collapsed(group),
            *(ranged(group.estimate(name), digits) for name, digits in metrics.items()),
        ]
        for value, group in points
    ]  # fmt: skip
    last = last_evaluations(one for _, group in points for one in group.runs)
    columns = ["method", factor, "seeds", "collapsed", "dip depth", f"last {last}", "over time"]
    return TextTable(f"factor-{factor}-{numbers.slug}", columns, rows, f"{factor} on {numbers.title}")


UPDATES = ("offline", "online", "undone")
REPLAY = ("capacity", "rows", "distinct_rows", "offline_rows")
BATCH = ("rows", "distinct_rows", "offline_rows")
_AT_RISK = {column.name for column in RISK_COLUMNS}


def results_csv(numbers: StudyNumbers) -> bytes:
    """A CSV file with one row for each run and all metrics, in full precision; what is not defined is empty."""
    factors = sorted({name for one in numbers.runs for name in one.method.variant})
    rows = [_csv_row(numbers, one, factors) for one in numbers.runs]
    # Only where there are champions
    names = [name for name in rows[0] if name not in _AT_RISK or any(row[name] is not None for row in rows)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return stream.getvalue().encode("utf-8")


def _csv_row(numbers: StudyNumbers, one: RunNumbers, factors: Iterable[str]) -> dict[str, Any]:
    cell, manifest, noise = one.run.cell, one.manifest, one.noise
    seconds, updates, memory = (manifest.get(name) or {} for name in ("seconds", "updates", "replay_buffer"))
    batch = memory.get("batch") or {}
    return {
        "dataset": cell.dataset,
        "method": cell.method.name,
        "label": cell.method.label,
        "seed": cell.seed,
        "key": one.run.key,
        **{f"factor_{name}": cell.method.variant.get(name) for name in factors},
        **one.served.values(),
        **one.at_risk,
        **asdict(one.metrics),
        "dip_noise_quantile": None if noise is None else noise.quantile,
        "collapse_noise_probability": None if noise is None else noise.collapse_probability,
        "normalized_last_return": numbers.score(one),
        "last_evaluations": one.n_last,
        "frozen_until": one.run.result.frozen_until,
        "guard_watched": one.watched[0],
        **{f"guard_{kind}s": one.events(kind) for kind in GUARD_EVENTS},
        "interactions": manifest.get("interactions"),
        **{f"updates_{name}": updates.get(name) for name in UPDATES},
        **{f"replay_{name}": memory.get(name) for name in REPLAY},
        **{f"batch_{name}": batch.get(name) for name in BATCH},
        "changed_hyperparams": manifest.get("changed_hyperparams"),
        "code": manifest.get("code"),
        "learner_evaluation_steps": one.learner_evaluation_steps,
        "preparation_seconds": seconds.get("preparation"),
        "finetuning_seconds": seconds.get("finetuning"),
        "started": manifest.get("started"),
    }


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True) if value else ""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _titles(columns: Sequence[Column], runs: Sequence[RunNumbers]) -> list[str]:
    return [column.title.format(last=last_evaluations(runs)) for column in columns]


def _collapsed(group: Group) -> str:
    rate = group.collapse_rate
    return NONE if rate is None else f"{sum(group.outcomes)} of {len(group.outcomes)} ({percent(rate)})"


def _by_chance(group: Group) -> str:
    share = group.collapse_probability
    return NONE if share is None else f"{number(100 * share, 1)}{NBSP}%"


def _recovery(group: Group) -> str:
    known = [one.metrics for one in group.runs if one.metrics.collapsed is not None]
    below = [metrics for metrics in known if metrics.recovery_time != 0]
    if not below:
        return "not needed" if known else NONE
    times = sorted(one.recovery_time for one in below if one.recovery_time is not None)
    text = f"{len(times)} of {len(below)}"
    return f"{text}, after {number(float(np.median(times)), 0)}" if times else text


def markdown(title: str, headline: str, sections: Sequence[tuple[str, Sequence[str]]], tables: Sequence[TextTable]) -> bytes:
    """A Markdown file of the headline, the first table, the verdict's headings with their sentences, and the other tables."""
    first, *tables = tables
    lines = [f"# {title}\n", f"{headline}\n", first.as_markdown()]
    for heading, texts in sections:
        lines += [f"## {heading}\n", *(f"- {text}" for text in texts), ""]
    lines += ["## Tables\n", *(table.as_markdown() for table in tables)]
    return "\n".join(lines).encode("utf-8")
