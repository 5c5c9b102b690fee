"""The pictures of a study's report."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.pictures import INK, Drawing, label_rows, level, panels, shade
from sb3_offline_ft.pages.words import listed, number, percent, ranged
from sb3_offline_ft.study.design.methods import Method
from sb3_offline_ft.study.report.analysis import DatasetNumbers, StudyNumbers
from sb3_offline_ft.study.report.comparisons import COLLAPSED
from sb3_offline_ft.study.report.factors import Levels
from sb3_offline_ft.study.report.looks import Look
from sb3_offline_ft.study.report.runs import Group, last_evaluations

WIDTH = 4.6
FACTOR_METRICS = {"last_return": "last {last} evaluations", "dip_depth": "dip depth", COLLAPSED: "collapsed (%)"}
_MILLION = 1_000_000

Looks = Mapping[str, Look]
"""Of methods, by name."""


def draw_served(numbers: DatasetNumbers, looks: Looks) -> Drawing | None:
    """The served returns of all methods at equal interactions, None if no run has recorded what acted."""
    interactions = numbers.interactions
    curves = [(group, curve) for group in numbers.shown if (curve := group.served_curve(interactions)) is not None]
    if not curves:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _warmup(axes, numbers, "warm-up, policy frozen")
        for group, curve in curves:
            look = looks[group.method.name]
            axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.13, linewidth=0)
            axes.plot(curve.x, curve.value, color=look.light, linestyle=look.line, linewidth=1.9, label=group.label)
        _levels(axes, numbers, "pretrained policy", "mean of the data")
        _interactions(axes, interactions)
        axes.set_ylabel("served return")
        _legend(figure)

    ends = [f"{group.label} {_estimate(group, 'served_mean_return')}" for group, _ in curves]
    words = f"Mean served return of all interactions, with 95 % intervals: {listed(ends, ';')}."
    caption = (
        "What everything that acted earned, own evaluations included, against all interactions that this took; of runs that "
        f"took more the first {interactions:,}. Mean over the seeds, with 95 % bootstrap intervals.{_level_caption(numbers)}"
    )
    if any(one.learner_evaluation_steps for group, _ in curves for one in group.runs):
        caption += " The warm-up of learners with own evaluations takes longer here than shown."
    size = (WIDTH, 3.3 + 0.2 * -(-(len(curves) + 2) // 2))
    return Drawing(f"served-{numbers.slug}", "Served return", caption, words, paint, size)


def draw_curves(numbers: DatasetNumbers, looks: Looks) -> Drawing:
    """The learning curves of all methods."""
    groups = numbers.shown

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _warmup(axes, numbers, "warm-up, policy frozen")
        for group in groups:
            look, curve = looks[group.method.name], group.curve
            axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.13, linewidth=0)
            axes.plot(curve.x, curve.value, color=look.light, linestyle=look.line, linewidth=1.9, label=group.label)
        _levels(axes, numbers, "pretrained policy", "mean of the data")
        _interactions(axes, numbers.last_evaluation)
        axes.set_ylabel("return")
        _legend(figure)

    ends = [f"{group.label} {_estimate(group, 'last_return')}" for group in groups]
    last = last_evaluations(one for group in groups for one in group.runs)
    words = f"Mean of the last {last} evaluations, with 95 % intervals: {listed(ends, ';')}."
    if numbers.initial_return is not None:
        words += f" The pretrained policies' mean level is {number(numbers.initial_return)}."
    n = max(len(group.runs) for group in groups)
    caption = f"Mean over up to {n} seeds, with 95 % bootstrap intervals." + _level_caption(numbers)
    height = 3.3 + 0.2 * -(-(len(groups) + 2) // 2)
    return Drawing(f"curves-{numbers.slug}", "Learning curves", caption, words, paint, (WIDTH, height))


def draw_seeds(numbers: DatasetNumbers, looks: Looks) -> Drawing:
    """The runs of each method in a panel of its own."""
    groups = numbers.shown
    n_columns = min(2, len(groups))
    n_rows = -(-len(groups) // n_columns)

    def paint(figure: Figure) -> None:
        grid = panels(figure, len(groups), n_columns, sharey=True)
        for index, (axes, group) in enumerate(zip(grid, groups, strict=True)):
            look, curve, is_lowest = looks[group.method.name], group.curve, index >= len(groups) - n_columns
            if group.method.pretrained:
                _warmup(axes, numbers)
            for one in group.runs:
                axes.plot(one.run.result.timesteps, one.means, color=look.light, linewidth=0.7, alpha=0.75)
            axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.15, linewidth=0)
            axes.plot(curve.x, curve.value, color=look.light, linewidth=2.2)
            _levels(axes, numbers)
            axes.set_title(group.label, fontsize=10, loc="left")
            _interactions(axes, numbers.last_evaluation, label=is_lowest)
            axes.tick_params(labelsize=9, labelbottom=is_lowest)
            if index % n_columns == 0:
                axes.set_ylabel("return", fontsize=10)

    ranges = [(group.label, np.concatenate([one.means for one in group.runs])) for group in groups]
    lows = [f"{label} {number(float(means.min()))} to {number(float(means.max()))}" for label, means in ranges]
    words = f"Lowest and highest evaluation of any seed: {listed(lows, ';')}."
    caption = "Thin lines are seeds, thick ones their means." + _level_caption(numbers)
    return Drawing(f"seeds-{numbers.slug}", "Every seed", caption, words, paint, (WIDTH, 1.75 * n_rows + 0.45))


def draw_dips(numbers: DatasetNumbers, looks: Looks) -> Drawing | None:
    """The dip depth of every run, None if no method has one."""
    groups = [group for group in numbers.shown if group.values("dip_depth")]
    if not groups:
        return None
    floor = numbers.noise_floor

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if floor is not None:
            axes.axvspan(0, floor, color=INK, alpha=0.08, linewidth=0, label="as deep as an unchanged policy seems to dip")
        axes.axvline(1, color=INK, linewidth=1, linestyle=":", label="down to a random policy")
        for position, group in enumerate(groups):
            look = looks[group.method.name]
            for place, one in zip(_places(len(group.runs)), group.runs, strict=True):
                depth = one.value("dip_depth")
                if depth is not None:
                    face = look.light if one.metrics.collapsed else "none"
                    axes.plot(
                        depth, position + place, look.marker, color=look.light, markerfacecolor=face, markersize=5.5,
                        markeredgewidth=1.3,
                    )  # fmt: skip
        label_rows(axes, [group.label for group in groups])
        _grid(axes, "x")
        axes.set_xlabel("dip depth")
        axes.set_xlim(min(-0.04, axes.get_xlim()[0]), max(1.1, axes.get_xlim()[1]))
        figure.legend(loc="outside upper left", ncols=1, fontsize=9)

    depths = [f"{group.label} {listed([f'{depth:.2f}' for depth in group.values('dip_depth')])}" for group in groups]
    words = f"Dip depth of each seed: {'; '.join(depths)}."
    if floor is not None:
        words += f" An unchanged policy seems to dip by up to {floor:.2f}."
    caption = "One point for each seed, filled if it collapsed. Left of 0: always above the pretrained policy."
    return Drawing(f"dips-{numbers.slug}", "Dips", caption, words, paint, (WIDTH, 0.38 * len(groups) + 1.25))


def draw_collapses(numbers: DatasetNumbers, looks: Looks) -> Drawing | None:
    """The collapse rates, None if they are not defined for any method."""
    rated = [(group, rate) for group in numbers.shown if (rate := group.collapse_rate) is not None]
    if not rated:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _intervals(axes, [(group.method, rate) for group, rate in rated], looks, factor=100)
        _grid(axes, "x")
        axes.set(xlabel="collapsed runs (%)", xlim=(-3, 103))

    words = [f"{group.label} {sum(group.outcomes)} of {len(group.outcomes)} ({percent(rate)})" for group, rate in rated]
    caption = "Share of the seeds, with exact 95 % intervals (Clopper and Pearson)."
    size = (WIDTH, 0.34 * len(rated) + 0.9)
    return Drawing(f"collapses-{numbers.slug}", "Collapses", caption, f"{'; '.join(words)}.", paint, size)


def draw_aggregates(numbers: StudyNumbers, looks: Looks) -> Drawing | None:
    """Aggregates of the normalised scores, None if there are none."""
    rows = numbers.aggregates
    if not rows:
        return None
    kinds = {"iqm": "IQM", "median": "median", "mean": "mean"}

    def paint(figure: Figure) -> None:
        grid = panels(figure, len(kinds))
        for axes, (kind, title) in zip(grid, kinds.items(), strict=True):
            _intervals(axes, [(row.method, getattr(row, kind)) for row in rows], looks)
            axes.set_title(title, fontsize=10, loc="left")
            _grid(axes, "x")
        grid[-1].set_xlabel("normalised score")

    words = [
        f"{row.method.label}: {', '.join(f'{title} {ranged(getattr(row, kind), 1)}' for kind, title in kinds.items())}"
        for row in rows
    ]
    caption = (
        f"Normalised mean of the last {last_evaluations(numbers.runs)} evaluations over all datasets and seeds, with 95 % "
        "stratified bootstrap intervals."
    )
    size = (WIDTH, (0.24 * len(rows) + 0.42) * len(kinds) + 0.4)
    return Drawing("scores", "Scores", caption, f"{'; '.join(words)}.", paint, size)


def draw_improvement(numbers: StudyNumbers, looks: Looks) -> Drawing | None:
    """Probabilities of improvement of the reference method over the others, None if there are none."""
    rows, reference = numbers.improvements, numbers.reference
    if not rows or reference is None:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=":")
        _intervals(axes, [(row.method, row.probability) for row in rows], looks)
        axes.set(xlabel=f"P({reference.label} > the other)", xlim=(-0.03, 1.03))

    words = "; ".join(f"over {row.method.label} {ranged(row.probability, 2)}" for row in rows)
    caption = (
        "Probability that a run of the reference method ends higher than one of the other method on the same data, with 95 % "
        "bootstrap intervals. Right of the dotted line the reference is ahead. There is no interval if all runs of one are "
        "above all of the other."
    )
    title, size = f"Probability of improvement of {reference.label}", (WIDTH, 0.34 * len(rows) + 0.9)
    return Drawing("improvement", title, caption, f"{reference.label} {words}.", paint, size)


def draw_profiles(numbers: StudyNumbers, looks: Looks) -> Drawing | None:
    """Performance profiles of the normalised scores, None if there are none."""
    rows = numbers.profiles
    if not rows:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row in rows:
            look, band = looks[row.method.name], row.band
            axes.fill_between(band.x, band.low, band.high, color=look.light, alpha=0.1, linewidth=0)
            axes.plot(band.x, band.value, color=look.light, linestyle=look.line, linewidth=1.9, label=row.method.label)
        axes.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
        axes.margins(x=0)
        _legend(figure)

    words = "; ".join(f"{row.method.label}: half of its runs are above {number(row.median_score)}" for row in rows)
    last = last_evaluations(numbers.runs)
    caption = (
        f"Share of the runs whose normalised mean of the last {last} evaluations is above a score; the higher, the better."
    )
    height = 3.0 + 0.2 * -(-len(rows) // 2)
    return Drawing("profiles", "Performance profiles", caption, f"{words}.", paint, (WIDTH, height))


def draw_factor(numbers: DatasetNumbers, factor: str, levels: Levels, looks: Looks, name: str) -> Drawing:
    """What changes with a factor."""
    values = list(dict.fromkeys(value for points in levels.values() for value, _ in points))
    last = last_evaluations(one for points in levels.values() for _, group in points for one in group.runs)

    def paint(figure: Figure) -> None:
        grid = panels(figure, len(FACTOR_METRICS))
        for axes, (metric, title) in zip(grid, FACTOR_METRICS.items(), strict=True):
            for index, (base, points) in enumerate(levels.items()):
                shift = 0.14 * (index - (len(levels) - 1) / 2)
                for value, group in points:
                    is_rate = metric == COLLAPSED
                    estimate = group.collapse_rate if is_rate else group.estimate(metric)
                    position = values.index(value) + shift
                    _interval(axes, estimate, position, looks[base], factor=100 if is_rate else 1, upright=True)
            axes.set_title(title.format(last=last), fontsize=10, loc="left")
            _grid(axes, "y")
            axes.margins(y=0.15)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        _thousands(grid[0])
        grid[-1].set(ylim=(-12, 112), yticks=[0, 50, 100])
        grid[-1].set_xticks(range(len(values)), values, fontsize=9, rotation=20 if max(map(len, values)) > 9 else 0)
        grid[-1].set(xlabel=factor, xlim=(-0.5, len(values) - 0.5))
        for base, points in levels.items():
            label = next((group.label for _, group in points if not group.method.variant), base)
            grid[0].plot([], [], looks[base].marker, color=looks[base].light, label=label)
        figure.legend(loc="outside upper left", ncols=2, fontsize=9)

    words = [
        f"{group.label}: {value} ends at {_estimate(group, 'last_return')}"
        for points in levels.values()
        for value, group in points
    ]
    caption = "Means over the seeds with 95 % bootstrap intervals; collapse rates with exact ones."
    title, size = f"{factor} on {numbers.title}", (WIDTH, 1.45 * len(FACTOR_METRICS) + 0.7)
    return Drawing(name, title, caption, f"{'; '.join(words)}.", paint, size)


def _estimate(group: Group, metric: str) -> str:
    estimate = group.estimate(metric)
    return "not defined" if estimate is None else ranged(estimate)


def _intervals(axes: Axes, rows: Sequence[tuple[Method, Estimate]], looks: Looks, factor: float = 1.0) -> None:
    """A row for each method, the first at the top."""
    for position, (method, estimate) in enumerate(rows):
        _interval(axes, estimate, position, looks[method.name], factor)
    label_rows(axes, [method.label for method, _ in rows])


def _interval(
    axes: Axes, estimate: Estimate | None, position: float, look: Look, factor: float = 1.0, upright: bool = False
) -> None:
    if estimate is None:
        return
    value, low, high = (factor * number for number in (estimate.value, estimate.low, estimate.high))
    if np.isfinite(low) and np.isfinite(high):
        ends, places = [low, high], [position, position]
        x, y = (places, ends) if upright else (ends, places)
        axes.plot(x, y, color=look.light, linewidth=3, alpha=0.45, solid_capstyle="round")
    x_value, y_value = (position, value) if upright else (value, position)
    axes.plot(x_value, y_value, look.marker, color=look.light, markersize=6.5)


def _places(n: int) -> list[float]:
    """So many places around 0."""
    return [0.0] if n < 2 else [0.5 * (index / (n - 1) - 0.5) for index in range(n)]


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=2, fontsize=9, handlelength=3.2, columnspacing=1.2)


def _grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    axes.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.8)


def _warmup(axes: Axes, numbers: DatasetNumbers, label: str | None = None) -> None:
    if numbers.warmup_steps > 0:
        shade(axes, numbers.warmup_steps, label)


def _levels(axes: Axes, numbers: DatasetNumbers, initial: str | None = None, data: str | None = None) -> None:
    level(axes, numbers.initial_return, (4, 3), initial)
    level(axes, numbers.data_return, (1, 2), data)


def _level_caption(numbers: DatasetNumbers) -> str:
    lines = []
    if numbers.initial_return is not None:
        lines.append(f"dashed: the pretrained policy ({number(numbers.initial_return)})")
    if numbers.data_return is not None:
        lines.append(f"dotted: the mean of the data ({number(numbers.data_return)})")
    text = f" Thin lines across: {', '.join(lines)}." if lines else ""
    return text + (" Shaded: the warm-up, in which the policy is frozen." if numbers.warmup_steps > 0 else "")


def _thousands(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _interactions(axes: Axes, last: int, label: bool = True) -> None:
    unit, words = (1, "interactions") if last < 5_000 else (1_000, "interactions (thousands)")
    if last >= 5 * _MILLION:
        unit, words = _MILLION, "interactions (millions)"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _thousands(axes)
    axes.set_xlim(0, max(last, 1))
    if label:
        axes.set_xlabel(words, fontsize=10)
