"""A study's results in numbers: what the tables, the pictures and the sentences of its report are made of."""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.evaluation import statistics
from sb3_offline_ft.evaluation.comparisons import compare_paired, compare_paired_rates, holm
from sb3_offline_ft.evaluation.finetuning_metrics import (
    LAST,
    DipNoiseFloor,
    FinetuningMetrics,
    dip_noise_floor,
    finetuning_metrics,
)
from sb3_offline_ft.evaluation.statistics import Band, Estimate
from sb3_offline_ft.policies.policies import OfflinePolicy
from sb3_offline_ft.study.design.methods import Method, default_of, factor_path
from sb3_offline_ft.study.engine.results import Run, StudyResults

SIGNIFICANT = 0.05
COLLAPSED = "collapsed"
AS_LISTED = "as listed"
NO_DATA_TITLE = "no data"
RELATIVE_METRICS = ("dip_depth", "dip_area", "time_below_band", "recovery_time", "selected_dip_depth")
MOST_TOGETHER = 8
"""Pictures show so many methods at most; of more, those that are no variants."""
PROFILE_POINTS = 101

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """
    What normalised scores are measured between.

    :param random: Return of a random policy: 0
    :param top: Return of an expert, or of the pretrained policies: 100
    :param words: Where the two are from
    """

    random: float
    top: float
    words: str

    def normalized(self, value: float) -> float:
        """
        :param value: A return
        :return: ``100 * (value - random) / (top - random)``
        """
        return 100.0 * (value - self.random) / (self.top - self.random)


@dataclass(frozen=True)
class RunNumbers:
    """
    A run in numbers.

    :param run: The run
    :param metrics: Its metrics
    :param noise: The dips that its pretrained policy would show by chance, None if that cannot be said
    """

    run: Run
    metrics: FinetuningMetrics
    noise: DipNoiseFloor | None

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.run.cell.seed

    @property
    def method(self) -> Method:
        """Its method."""
        return self.run.cell.method

    @property
    def manifest(self) -> dict[str, Any]:
        """What is known of it."""
        return self.run.result.manifest

    @property
    def means(self) -> Array:
        """Mean return of each evaluation, shape ``(evaluations,)``."""
        return np.asarray(self.run.result.returns.mean(axis=1), np.float64)

    @property
    def n_last(self) -> int:
        """Evaluations that its end is the mean of: the last ones after the warm-up, as many as there are."""
        result = self.run.result
        n_free = int((result.timesteps > result.frozen_until).sum())
        return min(LAST, n_free or result.timesteps.size)

    @property
    def learner_evaluation_steps(self) -> int | None:
        """Environment steps of evaluations that the learner learned from, None if they were not recorded."""
        steps = self.manifest.get("learner_evaluation_steps")
        return None if steps is None else int(steps)

    @property
    def seconds(self) -> float | None:
        """Wall time of the finetuning, in seconds."""
        seconds = (self.manifest.get("seconds") or {}).get("finetuning")
        return None if seconds is None else float(seconds)

    def value(self, name: str) -> float | None:
        """
        :param name: Name of a metric, ``"seconds"`` or ``"learner_evaluation_steps"``
        :return: It, None if it is not defined for this run: dips are measured by what the pretrained policy has over a random
            one, so that one which is no better has none
        """
        if name in RELATIVE_METRICS and self.metrics.collapsed is None:
            return None
        value = getattr(self.metrics if hasattr(self.metrics, name) else self, name)
        return None if value is None else float(value)

    def events(self, kind: str) -> int:
        """
        :param kind: A kind of the guard's events
        :return: How many there are
        """
        return sum(event.get("event") == kind for event in self.run.result.events)

    @property
    def watched(self) -> tuple[int, int]:
        """Training episodes whose returns a guard watched, and all that it saw."""
        phases = [event.get("phase") for event in self.run.result.events if event.get("event") == "episode"]
        return phases.count("monitoring"), len(phases)


@dataclass(frozen=True)
class Group:
    """
    The runs of a method on a dataset.

    :param method: The method
    :param runs: Its runs, by seed
    """

    method: Method
    runs: tuple[RunNumbers, ...]

    @property
    def label(self) -> str:
        """The method's name for people."""
        return self.method.label

    @property
    def n_evaluations(self) -> int:
        """Evaluations that all runs have: a guard may have ended some early."""
        return min(one.means.size for one in self.runs)

    @cached_property
    def curve(self) -> Band:
        """Mean over the runs at each evaluation that all have."""
        timesteps = self.runs[0].run.result.timesteps[: self.n_evaluations]
        return statistics.curve_band(timesteps, [[one.means[: self.n_evaluations] for one in self.runs]], "mean")

    def values(self, name: str) -> list[float]:
        """
        :param name: As for :meth:`RunNumbers.value`
        :return: It, of the runs for which it is defined
        """
        return [value for one in self.runs if (value := one.value(name)) is not None]

    def estimate(self, name: str) -> Estimate | None:
        """
        :param name: As for :meth:`RunNumbers.value`
        :return: Its mean over the runs, None if it is not defined for any of them
        """
        values = self.values(name)
        return statistics.aggregate([values], "mean") if values else None

    @property
    def collapse_probability(self) -> float | None:
        """Share of the runs that would count as collapsed if their policies did not change; None if that cannot be said."""
        floors = [one.noise for one in self.runs if one.metrics.collapsed is not None]
        known = [floor.collapse_probability for floor in floors if floor is not None]
        values = [value for value in known if value is not None]
        return float(np.mean(values)) if values else None

    @property
    def outcomes(self) -> list[bool]:
        """Whether runs collapsed, of those for which that is defined."""
        return [one.metrics.collapsed for one in self.runs if one.metrics.collapsed is not None]

    @cached_property
    def collapse_rate(self) -> Estimate | None:
        """Share of the runs that collapsed, None if that is not defined for them."""
        return statistics.rate(sum(self.outcomes), len(self.outcomes)) if self.outcomes else None

    @property
    def deeper_than_noise(self) -> tuple[int, int]:
        """Runs whose dip is deeper than those of 95 % of unchanged policies, and runs for which that can be said."""
        pairs = [(one.value("dip_depth"), one.noise.quantile) for one in self.runs if one.noise is not None]
        known = [depth > quantile for depth, quantile in pairs if depth is not None]
        return sum(known), len(known)

    @property
    def above_initial(self) -> tuple[int, int]:
        """Runs that ended above their pretrained policy, and runs that had one."""
        known = [one.metrics for one in self.runs if one.metrics.initial_return is not None]
        return sum(one.last_return > (one.initial_return or 0.0) for one in known), len(known)


@dataclass(frozen=True)
class AveragedGroup(Group):
    """Runs of several variants, averaged seed by seed: those of a seed are not independent, as they begin alike."""

    def values(self, name: str) -> list[float]:
        """
        :param name: As for :meth:`RunNumbers.value`
        :return: Its mean over the variants, of each seed for which it is defined
        """
        by_seed: dict[int, list[float]] = {}
        for one in self.runs:
            if (value := one.value(name)) is not None:
                by_seed.setdefault(one.seed, []).append(value)
        return [float(np.mean(values)) for values in by_seed.values()]

    @cached_property
    def collapse_rate(self) -> Estimate | None:
        """Share of the variants that collapsed, averaged over the seeds."""
        by_seed: dict[int, list[bool]] = {}
        for one in self.runs:
            if one.metrics.collapsed is not None:
                by_seed.setdefault(one.seed, []).append(one.metrics.collapsed)
        return statistics.aggregate([[float(np.mean(each)) for each in by_seed.values()]], "mean") if by_seed else None


@dataclass(frozen=True)
class DatasetNumbers:
    """
    The results on a dataset. Methods without data are shown with every dataset.

    :param label: Label of the dataset, None if the study has none
    :param groups: The methods that have runs, in the protocol's order
    :param scale: What scores are normalised with, None if that is not known
    :param data_return: Mean return of the data's episodes
    :param slug: Its name for files and ids
    :param why_no_scale: Why scores cannot be normalised, if they cannot though the return of a random policy is known
    """

    label: str | None
    groups: tuple[Group, ...]
    scale: Scale | None
    data_return: float | None
    slug: str
    why_no_scale: str = ""

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.label or NO_DATA_TITLE

    @property
    def pretrained_runs(self) -> list[RunNumbers]:
        """Runs that started from a pretrained policy."""
        return [one for group in self.groups for one in group.runs if one.metrics.initial_return is not None]

    @cached_property
    def initial_return(self) -> float | None:
        """Mean level of the pretrained policies: the mean over seeds of what most evaluations say of each."""
        best: dict[str, tuple[int, float]] = {}
        for one in self.pretrained_runs:
            assert one.metrics.initial_return is not None
            n, name = _frozen_returns(one.run).size, f"{one.seed} {_weights(one.run)}"
            if one.method.variant == {} and n > best.get(name, (0, 0.0))[0]:
                best[name] = (n, one.metrics.initial_return)
        return float(np.mean([level for _, level in best.values()])) if best else None

    @property
    def warmup_steps(self) -> int:
        """Interactions in which all learning policies are frozen."""
        known = [one.run.result.frozen_until for one in self.pretrained_runs if not one.method.frozen]
        return min(known, default=0)

    @property
    def noise_floor(self) -> float | None:
        """The dip depth that 95 % of the runs of an unchanged policy do not exceed, for the noisiest seed."""
        known = [one.noise.quantile for one in self.pretrained_runs if one.noise and one.metrics.collapsed is not None]
        return max(known, default=None)


@dataclass(frozen=True)
class Aggregate:
    """
    Normalised scores of a method over the datasets and seeds that all methods have.

    :param method: The method
    :param iqm: Their interquartile mean
    :param median: Their median
    :param mean: Mean of the datasets' means
    """

    method: Method
    iqm: Estimate
    median: Estimate
    mean: Estimate


@dataclass(frozen=True)
class Improvement:
    """
    The reference method against another one.

    :param method: The other method
    :param probability: Probability that a run of the reference method ends higher than one of the other
    """

    method: Method
    probability: Estimate


@dataclass(frozen=True)
class Profile:
    """
    The performance profile of a method.

    :param method: The method
    :param band: Share of its runs above a score
    :param median_score: Median of its scores
    """

    method: Method
    band: Band
    median_score: float


@dataclass(frozen=True)
class Comparison:
    """
    A method against the reference method, in pairs of runs with the same dataset and seed.

    :param method: The method
    :param metric: What is compared: a metric, or ``"collapsed"``
    :param n: Pairs
    :param difference: Mean of the method's value minus the reference's, None for collapses
    :param only_method: Pairs in which only the method collapsed
    :param only_reference: Pairs in which only the reference collapsed
    :param p: Two-sided p-value
    :param smallest_p: The least that so many pairs can give
    :param p_corrected: The p-value, corrected for all comparisons of the study
    :param smallest_p_corrected: The least that it could be with so many pairs and comparisons
    """

    method: Method
    metric: str
    n: int
    difference: Estimate | None
    only_method: int
    only_reference: int
    p: float
    smallest_p: float
    p_corrected: float
    smallest_p_corrected: float


def last_evaluations(runs: Iterable[RunNumbers]) -> str:
    """
    :param runs: Runs
    :return: How many evaluations their ends are the means of, such as ``10`` or ``3 to 10``
    """
    counts = [one.n_last for one in runs]
    low, high = min(counts), max(counts)
    return str(high) if low == high else f"{low} to {high}"


def slug(text: str) -> str:
    """
    :param text: Any text
    :return: It in letters, digits, ``_`` and ``-``, for names of files and ids
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "x"


def slugs(texts: Iterable[str]) -> dict[str, str]:
    """
    :param texts: Different texts
    :return: Their slugs, which differ by more than the case of letters: some file systems do not tell it
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        name, number = slug(text), 1
        while name.lower() in taken:
            number += 1
            name = f"{slug(text)}-{number}"
        taken.add(name.lower())
        found[text] = name
    return found


class StudyNumbers:
    """
    The results of a study in numbers.

    :param results: The results
    :param data_returns: Mean return of the data's episodes by label, where known
    :ivar runs: The finished runs
    :ivar datasets: The datasets that have runs
    :ivar random_return: Mean return of a random policy; if the protocol does not know it, as the runs recorded it
    :ivar unusable: Runs that cannot be measured by name, and why: their returns are not finite
    """

    COMPARED = ("last_return", "mean_return", "dip_depth")

    def __init__(self, results: StudyResults, data_returns: dict[str, float]) -> None:
        self.results, self.protocol = results, results.protocol
        self.random_return = _random_return(results)
        noise = _NoiseFloors(results.runs, self.random_return)
        runs = []
        self.unusable: dict[str, str] = {}
        for run in results.runs:
            try:
                runs.append(RunNumbers(run, _measure(run, self.random_return), noise.of(run)))
            except ValueError as error:
                self.unusable[run.cell.name] = str(error)
        self.runs = tuple(runs)
        labels: list[str | None] = list(self.protocol.datasets) or [None]
        names = slugs(label or NO_DATA_TITLE for label in labels)
        on_all = (self._on_dataset(label, data_returns.get(label or ""), names[label or NO_DATA_TITLE]) for label in labels)
        self.datasets = tuple(one for one in on_all if one.groups)

    @property
    def n_cells(self) -> int:
        """All runs that the study asks for."""
        return len(self.results.runs) + len(self.results.missing) + len(self.results.failed)

    @property
    def methods(self) -> list[Method]:
        """The methods that have runs, in the protocol's order."""
        present = {one.method.name for one in self.runs}
        return [method for method in self.protocol.methods if method.name in present]

    @property
    def reference(self) -> Method | None:
        """The method that others are compared with, if it has runs."""
        return next((method for method in self.methods if method.name == self.protocol.reference_method), None)

    @property
    def fewest_seeds(self) -> int:
        """Fewest runs of any method on any dataset."""
        return min(len(group.runs) for one in self.datasets for group in one.groups)

    def shown(self, one: DatasetNumbers) -> list[Group]:
        """
        :param one: A dataset
        :return: The methods that pictures and sentences are about: all, or of many those that are no variants
        """
        plain = [group for group in one.groups if not group.method.variant]
        return plain if len(one.groups) > MOST_TOGETHER and plain else list(one.groups)

    @property
    def shown_methods(self) -> list[Method]:
        """The methods that pictures over all datasets are about."""
        plain = [method for method in self.methods if not method.variant]
        return plain if len(self.methods) > MOST_TOGETHER and plain else self.methods

    def score(self, one: RunNumbers) -> float | None:
        """
        :param one: A run
        :return: Its normalised mean of the last evaluations, averaged over the datasets' scales if it has no data
        """
        scales = [
            dataset.scale for dataset in self.datasets if one.run.cell.dataset in (None, dataset.label)
        ]  # fmt: skip
        if not scales or any(scale is None for scale in scales):
            return None
        return float(np.mean([scale.normalized(one.metrics.last_return) for scale in scales if scale is not None]))

    def _on_dataset(self, label: str | None, data_return: float | None, slug: str) -> DatasetNumbers:
        groups = []
        for method in self.protocol.methods:
            runs = [one for one in self.runs if one.method.name == method.name and one.run.cell.dataset in (None, label)]
            if runs:
                groups.append(Group(method, tuple(sorted(runs, key=lambda one: one.seed))))
        if data_return is None:
            known = (one.manifest.get("dataset") for group in groups for one in group.runs)
            data_return = next((facts["mean_return"] for facts in known if facts and "mean_return" in facts), None)
        bare = DatasetNumbers(label, tuple(groups), None, data_return, slug)
        scale = self._scale(bare)
        if scale is None or scale.top > scale.random:
            return replace(bare, scale=scale)
        why = f"100 would not be above 0 ({scale.words.rstrip('.')})"
        return replace(bare, why_no_scale=why)

    def _scale(self, one: DatasetNumbers) -> Scale | None:
        """What the scale would be; of use only if its top is above a random policy."""
        random = self.random_return
        if random is None:
            return None
        given = ", as the protocol says" if self.protocol.given_random_return is not None else ""
        if self.protocol.random_return is None:
            given = ", as the runs recorded it"
        zero = f"0 is a random policy ({random:,.5g}{given}), "
        scores = reference_scores_for(self.protocol.env.rpartition(":")[2])
        if scores is not None:
            return Scale(random, scores.expert, f"{zero}100 an expert ({scores.expert:,.5g}). Known scores: {scores.source}.")
        pair = self.protocol.data_facts(one.label)["reference_scores"] if one.label is not None else None
        if pair is not None:
            return Scale(random, float(pair[1]), f"{zero}100 an expert ({pair[1]:,.5g}), as the dataset says.")
        top = one.initial_return
        if top is None:
            return None
        words = f"{zero}100 the mean level of the pretrained policies ({top:,.5g}), as no score of an expert is known."
        return Scale(random, top, words)

    @property
    def scale_words(self) -> str:
        """Where normalised scores are from."""
        words = {one.scale.words: one.title for one in self.datasets if one.scale is not None}
        if len(words) <= 1:
            return next(iter(words), "")
        return " ".join(f"On {title}: {text}" for text, title in words.items())

    def common(self, methods: Sequence[Method]) -> list[tuple[str | None, int]]:
        """
        :param methods: Methods
        :return: The datasets, with the seeds, of which all of them have runs: over others, aggregates compare other mixtures
        """
        have = {(one.method.name, one.run.cell.dataset, one.seed) for one in self.runs}
        return [
            (dataset.label, seed) for dataset in self.datasets for seed in self.protocol.seeds
            if all({(method.name, dataset.label, seed), (method.name, None, seed)} & have for method in methods)
        ]  # fmt: skip

    @cached_property
    def scored(self) -> list[tuple[str | None, int]]:
        """The datasets with the seeds that normalised scores are aggregated over."""
        return self.common(self._complete(self.shown_methods))

    def _scores(self, method: Method) -> list[list[float]]:
        """Scores by dataset; those of methods without data are one stratum, averaged over the datasets' scales."""
        scales = {one.label: one.scale for one in self.datasets}
        strata: dict[str | None, list[float]] = {}
        for one in self.runs:
            own = one.run.cell.dataset
            labels = [label for label, seed in self.scored if seed == one.seed and own in (None, label)]
            known = [scale for label in labels if (scale := scales[label]) is not None]
            if one.method.name == method.name and labels and len(known) == len(labels):
                score = float(np.mean([scale.normalized(one.metrics.last_return) for scale in known]))
                strata.setdefault(own, []).append(score)
        return list(strata.values())

    @cached_property
    def aggregates(self) -> list[Aggregate]:
        """Scores of the methods that have runs on all datasets, over what all of them have; none if a dataset has no scale."""
        rows = []
        for method in self._complete(self.shown_methods) if all(one.scale for one in self.datasets) else []:
            scores = self._scores(method)
            if scores:
                iqm, median = statistics.aggregate(scores, "iqm"), statistics.aggregate(scores, "median")
                rows.append(Aggregate(method, iqm, median, statistics.aggregate(scores, "mean")))
        return rows

    def _complete(self, methods: Iterable[Method]) -> list[Method]:
        """Those that have runs on all datasets: means over different datasets cannot be compared."""
        return [
            method for method in methods
            if all(any(group.method.name == method.name for group in one.groups) for one in self.datasets)
        ]  # fmt: skip

    @cached_property
    def profiles(self) -> list[Profile]:
        """Profiles of the same methods, at the same scores."""
        scores = {row.method: self._scores(row.method) for row in self.aggregates}
        everything = [score for strata in scores.values() for stratum in strata for score in stratum]
        if not everything:
            return []
        low, high = min(everything), max(everything)
        room = 0.04 * (high - low) or 1.0
        points = np.linspace(low - room, high + room, PROFILE_POINTS)
        return [
            Profile(method, statistics.performance_profile(strata, points), float(np.median(np.concatenate(strata))))
            for method, strata in scores.items()
        ]

    @cached_property
    def improvements(self) -> list[Improvement]:
        """The reference method against each other one, with the datasets and seeds that both have."""
        reference = self.reference
        rows = []
        for method in self.shown_methods if reference is not None else []:
            if reference is None or method == reference:
                continue
            samples = self._samples_of_both(reference, method)
            if samples:
                x, y = zip(*samples, strict=True)
                both = [one for one, other in (("x", reference), ("y", method)) if not other.pretrained]
                shared: Any = both[0] if both and len(samples) > 1 else None
                rows.append(Improvement(method, statistics.probability_of_improvement(x, y, shared=shared)))
        return rows

    def _samples_of_both(self, one: Method, other: Method) -> list[tuple[list[float], list[float]]]:
        """
        By dataset, the ends of both methods' runs. The runs of a method without data are the same on all datasets: then only
        seeds count that all datasets have, and if both have none, only once.
        """
        cells = self.common([one, other])
        labels = list(dict.fromkeys(label for label, _ in cells))
        seeds = {label: [seed for other_label, seed in cells if other_label == label] for label in labels}
        if not (one.pretrained and other.pretrained):
            everywhere = [seed for seed in self.protocol.seeds if all(seed in seeds[label] for label in labels)]
            labels = labels if one.pretrained or other.pretrained else labels[:1]
            seeds = {label: everywhere for label in labels if everywhere}

        def ends(method: Method, label: str | None) -> list[float]:
            values = self._values(method, "last_return")
            return [values[label if method.pretrained else None, seed] for seed in seeds[label]]

        return [(ends(one, label), ends(other, label)) for label in seeds]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """
        Paired tests against the reference method. The correction is for all of them, of all methods and metrics: a study of
        methods that do not differ shows any difference with a probability of at most :data:`SIGNIFICANT`.
        """
        reference = self.reference
        others = [] if reference is None else [method for method in self.methods if method != reference]
        made: list[Comparison] = []
        for metric in (*self.COMPARED, COLLAPSED):
            made += [row for method in others if reference and (row := self._compare(method, reference, metric)) is not None]
        corrected, smallest = holm([row.p for row in made]), holm([row.smallest_p for row in made])
        made = [
            replace(row, p_corrected=float(p), smallest_p_corrected=float(least))
            for row, p, least in zip(made, corrected, smallest, strict=True)
        ]
        order = {method.name: position for position, method in enumerate(self.methods)}
        return sorted(made, key=lambda row: order[row.method.name])

    @cached_property
    def not_compared(self) -> dict[str, list[Method]]:
        """By metric, the methods that have it, as the reference method has, but fewer than two pairs of runs with it."""
        reference = self.reference
        others = [] if reference is None else [method for method in self.methods if method != reference]
        compared = {(row.metric, row.method.name) for row in self.comparisons}
        found = {
            metric: [
                method for method in others
                if reference and (metric, method.name) not in compared and _can_be_compared(method, reference, metric)
                and self._values(method, metric) and self._values(reference, metric)
            ]
            for metric in (*self.COMPARED, COLLAPSED)
        }  # fmt: skip
        return {metric: methods for metric, methods in found.items() if methods}

    def _compare(self, method: Method, reference: Method, metric: str) -> Comparison | None:
        strata = self._pairs(method, reference, metric) if _can_be_compared(method, reference, metric) else []
        if sum(map(len, strata)) < 2:
            return None
        x, y = ([[float(pair[side]) for pair in stratum] for stratum in strata] for side in (0, 1))
        if metric == COLLAPSED:
            outcomes = [(bool(one), bool(other)) for stratum in strata for one, other in stratum]
            test = compare_paired_rates([one for one, _ in outcomes], [other for _, other in outcomes])
            only = (sum(one and not other for one, other in outcomes), sum(other and not one for one, other in outcomes))
            return Comparison(method, metric, len(outcomes), None, *only, test.p_value, 2.0 ** (1 - len(outcomes)), 1.0, 1.0)
        paired = compare_paired(x, y)
        return Comparison(
            method, metric, paired.n_pairs, paired.difference, 0, 0, paired.p_value, paired.smallest_p_value, 1.0, 1.0
        )  # fmt: skip

    def _pairs(self, method: Method, reference: Method, metric: str) -> list[list[tuple[float, float]]]:
        """
        By dataset, the values of runs with the same seed. A run without data has one pair, with the mean of the other method's
        runs of its seed on all datasets: more pairs with the same run would not be independent. Seeds that lack a dataset on
        which others have been run are left out.
        """
        strata: dict[str | None, list[tuple[float, float]]] = {}
        sides = [self._values(one, metric) for one in (method, reference)]
        if method.pretrained == reference.pretrained:
            for key in sides[0]:
                if key in sides[1]:
                    strata.setdefault(key[0], []).append((sides[0][key], sides[1][key]))
            return list(strata.values())
        pairs = []
        n_datasets = [len({label for label, _ in side}) for side in sides]
        for seed in self.protocol.seeds:
            values = [[value for key, value in side.items() if key[1] == seed] for side in sides]
            if values[0] and values[1] and [len(side) for side in values] == n_datasets:
                pairs.append((float(np.mean(values[0])), float(np.mean(values[1]))))
        return [pairs] if pairs else []

    def _values(self, method: Method, metric: str) -> dict[tuple[str | None, int], float]:
        least = 0.0 if metric == "dip_depth" else -np.inf  # a policy that was never below its start did not dip
        return {
            (one.run.cell.dataset, one.seed): max(value, least)
            for one in self.runs
            if one.method.name == method.name and (value := one.value(metric)) is not None
        }

    def factor_levels(self, factor: str, one: DatasetNumbers) -> dict[str, list[tuple[str, Group]]]:
        """
        :param factor: A factor
        :param one: A dataset
        :return: By listed method, the values of the factor alone, in the protocol's order, with their runs; the method as it
            is listed comes first. If factors were combined, each value is averaged over the values of the others.
        """
        levels = {}
        for base in dict.fromkeys(group.method.base for group in one.groups if factor in group.method.variant):
            groups = [group for group in one.groups if group.method.base == base]
            are_combined = any(len(group.method.variant) > 1 for group in groups)
            points = self._averaged_levels(factor, groups) if are_combined else _levels(factor, groups)
            if points:
                levels[base] = points
        return levels

    def _averaged_levels(self, factor: str, groups: Sequence[Group]) -> list[tuple[str, Group]]:
        """Only seeds of which all combinations have runs: others would be averaged over other values."""
        base = groups[0].method.base
        planned = [method for method in self.protocol.methods if method.base == base]
        listed = next(method for method in planned if not method.variant)
        names = list(dict.fromkeys(name for method in planned for name in method.variant))
        runs_as_listed = [one for group in groups if not group.method.variant for one in group.runs]
        own = {name: _own_value(listed, name, runs_as_listed) for name in names}
        # The combination that the method has anyway makes no variant
        is_in_grid = all(own[name] in self.protocol.factors[name] for name in names)
        combination = {method.name: dict(method.variant) for method in planned if method.variant}
        if is_in_grid and own not in combination.values():
            combination[listed.name] = own
        runs = {group.method.name: {one.seed: one for one in group.runs} for group in groups}
        seeds = [seed for seed in self.protocol.seeds if all(seed in runs.get(name, {}) for name in combination)]
        points: dict[str, list[RunNumbers]] = {str(value): [] for value in self.protocol.factors[factor]}
        for name, values in combination.items():
            points[str(values[factor])] += [runs[name][seed] for seed in seeds]
        return [(value, AveragedGroup(listed, tuple(chosen))) for value, chosen in points.items() if chosen]


def _can_be_compared(method: Method, reference: Method, metric: str) -> bool:
    if metric == "mean_return":
        # The first steps from scratch count, those of the warm-up do not
        return method.pretrained == reference.pretrained
    # A policy that does not change has no dip: what seems so is noise
    return metric not in ("dip_depth", COLLAPSED) or not (method.frozen or reference.frozen)


def _levels(factor: str, groups: Sequence[Group]) -> list[tuple[str, Group]]:
    points = [(str(group.method.variant[factor]), group) for group in groups if set(group.method.variant) == {factor}]
    listed = [(_listed_value(group, factor), group) for group in groups if not group.method.variant]
    return [*listed, *points] if points else []


def _own_value(method: Method, factor: str, runs: Iterable[RunNumbers]) -> Any:
    """The value of a factor that a method has as it is listed: its own, else what its runs had, else a default."""
    path = factor_path(factor)
    for settings in (method.hyperparams, *(one.manifest.get("hyperparams") or {} for one in runs)):
        value: Any = settings
        for key in path:
            value = value[key] if isinstance(value, Mapping) and key in value else ...
        if value is not ...:
            return value
    if len(path) == 1:
        return default_of(method.algorithm, path[0])
    within = inspect.signature(OfflinePolicy.__init__).parameters if path[0] == "policy_kwargs" else {}
    return within[path[1]].default if path[1] in within else None


def _listed_value(group: Group, factor: str) -> str:
    value = _own_value(group.method, factor, group.runs)
    return AS_LISTED if value is None or isinstance(value, dict) else f"{value} ({AS_LISTED})"


def _random_return(results: StudyResults) -> float | None:
    """Data that says it need not be here: then the runs do."""
    known = results.protocol.random_return
    if known is not None:
        return known
    values = (run.result.manifest.get("random_return") for run in results.runs)
    recorded = Counter(float(value) for value in values if value is not None)
    return recorded.most_common(1)[0][0] if recorded else None


class _NoiseFloors:
    """Dips by chance: each run's from the most evaluations of the pretrained policy that it started from."""

    def __init__(self, runs: Iterable[Run], random_return: float | None) -> None:
        self._random_return = random_return
        self._pools: dict[str, Array] = {}
        self._known: dict[tuple[str, tuple[int, ...]], DipNoiseFloor | None] = {}
        for run in runs:
            weights, returns = _weights(run), _frozen_returns(run)
            if (
                weights is not None
                and np.isfinite(returns).all()
                and returns.size > self._pools.get(weights, np.empty(0)).size
            ):
                self._pools[weights] = returns

    def of(self, run: Run) -> DipNoiseFloor | None:
        weights, returns = _weights(run), run.result.returns
        if weights not in self._pools or weights is None:
            return None
        initial = _frozen_returns(run)
        measured = returns.size - initial.size or returns.size
        counts = (measured // returns.shape[1], returns.shape[1], initial.size)
        key = (weights, counts)
        if key not in self._known:
            self._known[key] = dip_noise_floor(
                self._pools[weights], counts[0], counts[1], self._random_return, initial_episodes=counts[2]
            )
        return self._known[key]


def _weights(run: Run) -> str | None:
    facts = run.result.manifest.get("pretrained")
    return None if facts is None else str(facts["weights_sha256"])


def _frozen_returns(run: Run) -> Array:
    result = run.result
    return np.asarray(result.returns[result.timesteps <= result.frozen_until], np.float64).ravel()


def _measure(run: Run, random_return: float | None) -> FinetuningMetrics:
    result = run.result
    training = result.training_timesteps, result.training_returns
    return finetuning_metrics(result.timesteps, result.returns, result.frozen_until, random_return, *training)
