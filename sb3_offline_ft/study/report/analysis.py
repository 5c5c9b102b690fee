"""A study's results in numbers: what the tables, the pictures and the sentences of its report are made of."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sb3_offline_ft.datasets.reference_scores import reference_scores_for
from sb3_offline_ft.evaluation.statistics import Band, Estimate, aggregate, performance_profile
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.engine.results import StudyResults
from sb3_offline_ft.study.report.comparisons import Improvement, PairedTests, improvement
from sb3_offline_ft.study.report.runs import Group, RunNumbers, frozen_returns, measure_runs, started_from

NO_DATA_TITLE = "no data"
MOST_TOGETHER = 8
"""Pictures show so many methods at most; of more, those that are no variants."""
PROFILE_POINTS = 101


@dataclass(frozen=True)
class Scale:
    """Returns with the normalised scores 0 and 100: of a random policy, and of an expert or the pretrained policies."""

    random: float
    top: float
    words: str

    def normalized(self, value: float) -> float:
        """``100 * (value - random) / (top - random)``"""
        return 100.0 * (value - self.random) / (self.top - self.random)


@dataclass(frozen=True)
class DatasetNumbers:
    """The results on a dataset, if the study has one. Methods without data are shown with every dataset."""

    label: str | None
    groups: tuple[Group, ...]
    """The methods that have runs, in the protocol's order."""
    scale: Scale | None
    data_return: float | None
    """Mean return of the data's episodes."""
    slug: str
    """Its name for files and ids."""
    interactions: int
    """Interactions that the study gives each run."""
    why_no_scale: str = ""
    """Why scores cannot be normalised, if they cannot though the return of a random policy is known."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.label or NO_DATA_TITLE

    @property
    def shown(self) -> list[Group]:
        """The methods that pictures and sentences are about: all, or of many those that are no variants."""
        plain = [group for group in self.groups if not group.method.variant]
        return plain if len(self.groups) > MOST_TOGETHER and plain else list(self.groups)

    @property
    def runs(self) -> list[RunNumbers]:
        return [one for group in self.groups for one in group.runs]

    @property
    def last_evaluation(self) -> int:
        """Interactions before the last evaluation that all runs of some method have."""
        return max(int(group.curve.x[-1]) for group in self.groups)

    @property
    def pretrained_runs(self) -> list[RunNumbers]:
        """Runs that started from one of the study's pretrained policies, which those of commands are not."""
        return [one for one in self.runs if one.metrics.initial_return is not None and one.method.external is None]

    @cached_property
    def initial_return(self) -> float | None:
        """Mean level of the pretrained policies: the mean over seeds of what most evaluations say of each."""
        best: dict[tuple[int, str | None], tuple[int, float]] = {}
        for one in self.pretrained_runs:
            n, start = frozen_returns(one.run).size, (one.seed, started_from(one.run))
            if one.method.variant == {} and one.metrics.initial_return is not None and n > best.get(start, (0, 0.0))[0]:
                best[start] = (n, one.metrics.initial_return)
        return float(np.mean([level for _, level in best.values()])) if best else None

    @property
    def warmup_steps(self) -> int:
        """Interactions in which all learning policies are frozen, but those of commands."""
        return min((one.run.result.frozen_until for one in self.pretrained_runs if not one.method.frozen), default=0)

    @property
    def noise_floor(self) -> float | None:
        """The dip depth that 95 % of the runs of an unchanged policy do not exceed, for the noisiest seed."""
        known = [one.noise.quantile for one in self.pretrained_runs if one.noise and one.metrics.collapsed is not None]
        return max(known, default=None)


@dataclass(frozen=True)
class Aggregate:
    """Normalised scores of a method over the datasets and seeds that all methods have; ``mean`` is of the datasets' means."""

    method: Method
    iqm: Estimate
    median: Estimate
    mean: Estimate


@dataclass(frozen=True)
class Profile:
    """The performance profile of a method: the share of its runs above a score, and the median of its scores."""

    method: Method
    band: Band
    median_score: float


def slugs(texts: Iterable[str]) -> dict[str, str]:
    """Names of texts for files and ids, which differ by more than the case of letters: some file systems do not tell it."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "x"
        name, number = slug, 1
        while name.lower() in taken:
            number += 1
            name = f"{slug}-{number}"
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

    def __init__(self, results: StudyResults, data_returns: dict[str, float]) -> None:
        self.results, self.protocol = results, results.protocol
        self.random_return = _random_return(results)
        self.runs, self.unusable = measure_runs(results.runs, self.random_return, self.protocol.interactions)
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

    @property
    def shown_methods(self) -> list[Method]:
        """The methods that pictures over all datasets are about."""
        plain = [method for method in self.methods if not method.variant]
        return plain if len(self.methods) > MOST_TOGETHER and plain else self.methods

    def _on_dataset(self, label: str | None, data_return: float | None, slug: str) -> DatasetNumbers:
        groups = []
        for method in self.protocol.methods:
            runs = [one for one in self.runs if one.method.name == method.name and one.dataset in (None, label)]
            if runs:
                groups.append(Group(method, tuple(sorted(runs, key=lambda one: one.seed))))
        bare = DatasetNumbers(label, tuple(groups), None, data_return, slug, self.protocol.interactions)
        if data_return is None:
            known = (one.manifest.get("dataset") for one in bare.runs)
            recorded = next((facts["mean_return"] for facts in known if facts and "mean_return" in facts), None)
            bare = replace(bare, data_return=recorded)
        scale = self._scale(bare)
        if scale is None or scale.top > scale.random:
            return replace(bare, scale=scale)
        return replace(bare, why_no_scale=f"100 would not be above 0 ({scale.words.rstrip('.')})")

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

    def score(self, one: RunNumbers, labels: Iterable[str | None] | None = None) -> float | None:
        """A run's normalised end; without data, averaged over the scales of all datasets, or of those with these labels."""
        scales = [
            dataset.scale
            for dataset in self.datasets
            if one.dataset in (None, dataset.label) and (labels is None or dataset.label in labels)
        ]
        known = [scale.normalized(one.metrics.last_return) for scale in scales if scale is not None]
        return float(np.mean(known)) if known and len(known) == len(scales) else None

    def common(self, methods: Sequence[Method]) -> list[tuple[str | None, int]]:
        """The datasets, with the seeds, of which all methods have runs: over others, aggregates compare other mixtures."""
        have = {(one.method.name, one.dataset, one.seed) for one in self.runs}
        return [
            (dataset.label, seed)
            for dataset in self.datasets
            for seed in self.protocol.seeds
            if all({(method.name, dataset.label, seed), (method.name, None, seed)} & have for method in methods)
        ]

    @cached_property
    def _complete(self) -> list[Method]:
        """Those shown that have runs on all datasets: means over different datasets cannot be compared."""
        names = [{group.method.name for group in one.groups} for one in self.datasets]
        return [method for method in self.shown_methods if all(method.name in present for present in names)]

    @cached_property
    def scored(self) -> list[tuple[str | None, int]]:
        """The datasets with the seeds that normalised scores are aggregated over."""
        return self.common(self._complete)

    def _scores(self, method: Method) -> list[list[float]]:
        """Scores by dataset; those of methods without data are one stratum, averaged over the datasets' scales."""
        strata: dict[str | None, list[float]] = {}
        for one in self.runs:
            labels = [label for label, seed in self.scored if seed == one.seed]
            if one.method.name == method.name and (score := self.score(one, labels)) is not None:
                strata.setdefault(one.dataset, []).append(score)
        return list(strata.values())

    @cached_property
    def aggregates(self) -> list[Aggregate]:
        """Scores of the methods that have runs on all datasets, over what all of them have; none if a dataset has no scale."""
        complete = self._complete if all(one.scale for one in self.datasets) else []
        return [
            Aggregate(method, aggregate(scores, "iqm"), aggregate(scores, "median"), aggregate(scores, "mean"))
            for method in complete
            if (scores := self._scores(method))
        ]

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
            Profile(method, performance_profile(strata, points), float(np.median(np.concatenate(strata))))
            for method, strata in scores.items()
        ]

    @cached_property
    def improvements(self) -> list[Improvement]:
        """The reference method against each other one, with the datasets and seeds that both have."""
        reference = self.reference
        others = [method for method in self.shown_methods if method != reference] if reference is not None else []
        rows = [improvement(self.runs, reference, other, self.common([reference, other])) for other in others if reference]
        return [row for row in rows if row is not None]

    @cached_property
    def tests(self) -> PairedTests:
        """Paired tests of all methods against the reference method."""
        return PairedTests(self.runs, self.methods, self.reference, self.protocol.seeds)


def _random_return(results: StudyResults) -> float | None:
    """Data that says it need not be here: then the runs do."""
    known = results.protocol.random_return
    if known is not None:
        return known
    values = (run.result.manifest.get("random_return") for run in results.runs)
    recorded = Counter(float(value) for value in values if value is not None)
    return recorded.most_common(1)[0][0] if recorded else None
