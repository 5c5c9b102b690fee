"""A dataset report: one HTML page that needs nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.suggestions import first_of
from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.sources import load_dataset
from sb3_offline_ft.datasets.tools.diversity import Coverage, Diversity, measure_diversity
from sb3_offline_ft.datasets.tools.show import (
    DatasetFacts,
    FactTable,
    describe_dataset,
    detail_tables,
    number_text,
    progress_bar,
    summary_rows,
)
from sb3_offline_ft.pages.html import Picture, render_page

NARROW_STD, NARROW_SHARE = 0.1, 0.05
"""Below either, the report calls actions nearly determined by the state; above the next, nearly independent of it."""
WIDE_SHARE = 0.9
MUCH_SATURATED = 0.1
FEW_EPISODES = 20
RULE_HELD = 1, 3
"""How often the rule of Li et al. named what ended higher in our studies, and how often it named anything."""
SPARSE = 0.9

_PICTURES = 6
_ORDER = "A trend shows data of a policy that was still learning."
_STATES = "Standardised states on their first two principal components. Islands may be different kinds of behaviour."
_NOISE = "Inner bars: what similar states leave unexplained (an upper estimate)."


def write_report(
    specs: Sequence[str | Path | OfflineDataset],
    output: str | Path,
    *,
    seed: int = 0,
    console: Console | None = None,
    **options: Any,
) -> None:
    """
    Write the report on a dataset.

    :param specs: What :func:`load_dataset` takes: the dataset, and others to set beside it in a table
    :param output: The HTML file; written whole or not at all. The same data, seed and versions give the same file
    :param seed: Seed of the samples that some measures and pictures use
    :param console: Where to show the progress; nothing is shown if omitted
    :param options: Passed to :func:`load_dataset`
    :raises OSError: As :func:`load_dataset`, or the file cannot be written
    :raises ValueError: As :func:`load_dataset`
    """
    console = console or PlainConsole(quiet=True)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=6 * len(specs) + _PICTURES)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        columns: list[tuple[DatasetFacts, Diversity]] = []
        pictures: list[Picture] = []
        for spec in specs:
            step(f"loading {spec.name if isinstance(spec, OfflineDataset) else spec}")
            dataset = load_dataset(spec, **options)
            step("counting")
            facts = describe_dataset(dataset)
            diversity = measure_diversity(dataset, seed=seed, progress=lambda what: step(f"measuring {what}"))
            columns.append((facts, diversity))
            # The columns of one dataset at a time are kept in memory
            pictures = pictures or _pictures(dataset, diversity, seed, step)
        facts, diversity = columns[0]
    page = render_page(
        __package__,
        "report.html.jinja",
        facts=facts,
        rows=summary_rows(facts),
        tables=detail_tables(facts),
        paragraphs=in_words(facts, diversity),
        values=measured_values(diversity),
        pictures=pictures,
        comparison=comparison(columns) if len(columns) > 1 else None,
        seed=seed,
    )
    with atomic_write(output) as file:
        file.write(page)


def in_words(facts: DatasetFacts, diversity: Diversity) -> list[tuple[str, list[str]]]:
    """What a dataset is and what that may mean for finetuning: headings with their paragraphs."""
    sections = [
        ("What it is", [_what_it_is(facts)]),
        ("How good it is", [_how_good(facts)]),
        ("How diverse it is", [_how_diverse(diversity)]),
        ("What that may mean for finetuning", _what_it_means(facts, diversity)),
        ("To mind", _remarks(facts)),
    ]
    return [section for section in sections if section[1]]


def _what_it_is(facts: DatasetFacts) -> str:
    where = f" of {facts.env_id}" if facts.env_id else ""
    how = f", recorded with {facts.provenance['algorithm']}" if facts.provenance.get("algorithm") else ""
    ends = f"{facts.terminated:,} ended in a terminal state, {facts.truncated:,} were cut by a time limit or the recording"
    return (
        f"{facts.transitions:,} transitions in {facts.episodes:,} episodes{where}{how}. The median episode has "
        f"{number_text(facts.lengths.median)} steps; {ends}."
    )


def _how_good(facts: DatasetFacts) -> str:
    returns, scores = facts.returns, facts.normalized_returns
    text = (
        f"The mean return is {number_text(returns.mean)}, with a standard deviation of {number_text(returns.std)} between "
        f"episodes; the best episode reached {number_text(returns.max)}, the worst {number_text(returns.min)}."
    )
    if scores is None:
        return f"{text} No scores of a random policy and an expert are known, so it cannot be placed between them."
    return (
        f"{text} Where a random policy is 0 ({number_text(scores['random'])}) and an expert 100 "
        f"({number_text(scores['expert'])}), the mean is {scores['mean']:.1f} and the best episode {scores['max']:.1f}. "
        f"Source of the two scores: {scores['source']}."
    )


def _how_diverse(diversity: Diversity) -> str:
    noise = diversity.action_noise
    if noise is None:
        return "There are too few rows, or no observations but images, to measure it."
    text = (
        f"Between similar states, actions differ by a standard deviation of at most about {noise.mean_std:.2f}, where their "
        f"bounds are -1 and 1; the state leaves at most about {noise.unexplained:.0%} of their variance unexplained."
    )
    if is_narrow(diversity):
        return f"{text} This report calls that narrow: the actions are nearly determined by the state."
    if noise.unexplained > WIDE_SHARE:
        return f"{text} The actions hardly depend on the state, as those of a random policy."
    return f"{text} That is neither nearly determined by the state nor nearly independent of it."


def _what_it_means(facts: DatasetFacts, diversity: Diversity) -> list[str]:
    texts = [
        "Luo et al. (2023) relate the collapse of pretrained policies at the start of online finetuning to the diversity of "
        "the data, the algorithm and the online replay; an early loss of performance is reported for many offline-to-online "
        "algorithms (Fine-Tuning without Performance Degradation, 2025). No threshold is known: this page predicts nothing."
    ]
    if is_narrow(diversity):
        texts.append(
            "Narrow data shows a critic few actions in each state, so that its values of all others are extrapolated: a "
            "reason for care. TD3C bounds how far the policy moves, a warm-up with the frozen policy measures its level "
            "before the first update, and CollapseGuard watches and rolls back."
        )
    elif diversity.action_noise is not None:
        texts.append(
            "This data is not narrow in the sense of this report. That is no promise that finetuning keeps the level of the "
            "pretrained policy: measure that level in a warm-up with the frozen policy, and let CollapseGuard watch it."
        )
    if facts.returns.max > facts.returns.mean:
        texts.append(
            f"The root of the positive-sided variance of the returns is {_root_rpsv(diversity)}. Hong et al. "
            "(2023) found that the room for improvement over the behaviour policy goes with this variance, and that data "
            "dominated by poor episodes holds offline algorithms back. The filter top_fraction, and weights of several "
            "datasets, change what is sampled."
        )
    texts.append(
        f"After pretraining, compare the policy's return with the mean of the data, {number_text(facts.returns.mean)}: Li et "
        "al. (2025) propose to preserve whichever of the two is better during finetuning. In our own studies what this rule "
        f"named ended higher in {RULE_HELD[0]} of the {RULE_HELD[1]} cases in which it named one: little can be built on it."
    )
    texts.append(
        "Let a champion serve while another policy learns (ChampionChallenger): on Hopper and HalfCheetah more was served "
        "than the pretrained policy earns. On Pendulum, where returns depend on the start more than on the policy, TD3BC with "
        "its behavior cloning kept served more. Which learner belongs behind a champion depended on the data: TD3C for "
        "recordings of one policy, plain TD3 with half of each batch offline for all that a learner had done. That is little "
        "evidence: compare them on your data with sb3-offline-ft study init."
    )
    return texts


def is_narrow(diversity: Diversity) -> bool:
    """Whether actions are nearly determined by the state, by :data:`NARROW_STD` or :data:`NARROW_SHARE`."""
    noise = diversity.action_noise
    return noise is not None and (noise.mean_std < NARROW_STD or noise.unexplained < NARROW_SHARE)


def _remarks(facts: DatasetFacts) -> list[str]:
    remarks = []
    if facts.episodes < FEW_EPISODES:
        remarks.append(f"There are only {facts.episodes} episodes: everything said of returns is uncertain.")
    saturated = [
        f"{index} ({action.at_bounds:.0%})" for index, action in enumerate(facts.actions)
        if action.at_bounds is not None and action.at_bounds > MUCH_SATURATED
    ]  # fmt: skip
    if saturated:
        remarks.append(
            f"Many actions lie at a bound, in dimension {first_of(saturated, 8)}: a policy that ends in tanh comes close to a "
            "bound, but never reaches it."
        )
    if any(action.low is None for action in facts.actions):
        remarks.append("The bounds of the actions are not known; they were scaled by their own range.")
    if facts.duplicates:
        share = facts.duplicates / facts.transitions
        remarks.append(
            f"{facts.duplicates:,} transitions ({share:.1%}) equal an earlier one; they count twice in every batch."
        )
    if facts.zero_rewards > SPARSE:
        remarks.append(f"The reward is sparse: {facts.zero_rewards:.1%} of the transitions have a reward of exactly 0.")
    if facts.provenance.get("lossy_images"):
        remarks.append("The images were stored as JPEG: they differ from what the environment showed.")
    shares = [part["share_of_batches"] * facts.transitions / part["transitions"] for part in facts.parts]
    if max(shares) - min(shares) > 1e-6:
        remarks.append("Batches take the parts by their shares; everything on this page counts every row once.")
    constant = [
        f"{index} of {one.name}" for one in facts.observations if not one.is_image
        for index, (low, high) in enumerate(zip(one.min, one.max, strict=True)) if low == high
    ]  # fmt: skip
    if constant:
        remarks.append(f"Constant over all rows: dimension {first_of(constant, 5)}.")
    return remarks


def measured_values(diversity: Diversity) -> dict[str, list[str]]:
    """The lines that the page says of each measure, the main one first."""
    none = ["not measured"]
    quality, noise, vendi = diversity.trajectory_quality, diversity.action_noise, diversity.vendi_score
    values = {
        "quality": ["needs reference scores" if quality is None else f"{quality:.3f}"],
        "variance": [f"{number_text(diversity.positive_sided_variance)} (root {_root_rpsv(diversity)})"],
        "coverage": _coverage_in_words(diversity.coverage) + _coverage_in_words(diversity.coarse_coverage) or none,
        "entropy": none,
        "vendi": none if vendi is None else [f"{vendi:.1f} effectively different", f"of {diversity.vendi_rows:,} transitions"],
        "noise": none,
    }
    if diversity.state_entropy is not None and diversity.gaussian_entropy is not None:
        values["entropy"] = [
            _entropy(diversity.state_entropy),
            f"in {diversity.state_dimensions} dimensions, from {diversity.entropy_rows:,} rows",
            f"independent Gaussians: {diversity.gaussian_entropy:.2f} nats",
        ]
    if noise is not None:
        values["noise"] = [
            f"standard deviation {noise.mean_std:.3f}",
            f"{noise.unexplained:.1%} of the variance",
            f"{noise.neighbours} neighbours of {noise.queries:,} among {noise.references:,} rows",
        ]
    return values


def comparison(columns: Sequence[tuple[DatasetFacts, Diversity]]) -> FactTable:
    """A table that sets datasets side by side."""
    found = [_compared(*column) for column in columns]
    rows = [(name, *(values[name] or "-" for values in found)) for name in found[0]]
    return FactTable("Side by side", ("", *(facts.name for facts, _ in columns)), rows)


def _compared(facts: DatasetFacts, diversity: Diversity) -> dict[str, str | None]:
    """What is compared of a dataset, in words; nothing where it was not measured."""
    scores, noise, coverage = facts.normalized_returns, diversity.action_noise, diversity.coarse_coverage
    entropy, vendi = diversity.state_entropy, diversity.vendi_score
    return {
        "environment": facts.env_id,
        "transitions": f"{facts.transitions:,}",
        "episodes": f"{facts.episodes:,}",
        "mean return": number_text(facts.returns.mean),
        "median return": number_text(facts.returns.median),
        "best return": number_text(facts.returns.max),
        "normalised mean return": None if scores is None else f"{scores['mean']:.1f}",
        "root of the positive-sided variance": _root_rpsv(diversity),
        "mean length": number_text(facts.lengths.mean),
        "terminated": f"{facts.terminated / facts.episodes:.0%}",
        "action noise": None if noise is None else f"{noise.mean_std:.3f}",
        "unexplained": None if noise is None else f"{noise.unexplained:.1%}",
        "entropy of the states": None if entropy is None else _entropy(entropy),
        "Vendi score": None if vendi is None else f"{vendi:.1f}",
        "coarse coverage, per row": None if coverage is None else f"{coverage.per_row:.3f}",
        "coarse coverage, per shuffled": None if coverage is None else f"{coverage.per_shuffled:.3f}",
        "coarse coverage, per uniform": None if coverage is None else f"{coverage.per_uniform:.3f}",
        "duplicates": f"{facts.duplicates:,}",
    }


def _pictures(dataset: OfflineDataset, diversity: Diversity, seed: int, step: Callable[[str], None]) -> list[Picture]:
    from sb3_offline_ft.datasets.tools import report_figures as figures

    n_actions = int(np.prod(dataset.actions.shape[1:]))
    shown = f" The first {figures.MOST_ACTIONS} of {n_actions} dimensions." if n_actions > figures.MOST_ACTIONS else ""
    parts = " Dotted lines part the datasets it was put together from." if len(dataset.sources) > 1 else ""
    noise = diversity.action_noise
    drawn: list[tuple[str, Callable[[], str | None], str]] = [
        ("Returns", lambda: figures.draw_returns(dataset), "Undiscounted return of the episodes."),
        ("Returns in order", lambda: figures.draw_order(dataset), f"{_ORDER}{parts}"),
        ("Lengths", lambda: figures.draw_lengths(dataset), "Steps of the episodes, by how they ended."),
        ("States visited", lambda: figures.draw_states(dataset, seed), _STATES),
        ("Actions", lambda: figures.draw_actions(dataset, seed), f"On the scale where the bounds are -1 and 1.{shown}"),
        ("Action noise", lambda: None if noise is None else figures.draw_noise(noise), f"{_NOISE}{shown}"),
    ]
    pictures = []
    for title, draw, caption in drawn:
        step(f"drawing {title.lower()}")
        if (svg := draw()) is not None:
            pictures.append(Picture(svg, title, caption))
    return pictures


def _coverage_in_words(coverage: Coverage | None) -> list[str]:
    if coverage is None:
        return []
    ratios = f"{coverage.per_row:.3f} per row, {coverage.per_shuffled:.3f} of shuffled, {coverage.per_uniform:.3f} of uniform"
    return [f"{coverage.bins} bins: {ratios}"]


def _root_rpsv(diversity: Diversity) -> str:
    return number_text(float(np.sqrt(diversity.positive_sided_variance)))


def _entropy(value: float) -> str:
    return f"{value:.2f} nats" if np.isfinite(value) else "minus infinity: states repeat exactly"
