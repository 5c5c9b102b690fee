"""The pictures of a study's report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.pages.html import Picture
from sb3_offline_ft.pages.pictures import INK, inline_svg, picture_files
from sb3_offline_ft.study.report.analysis import DatasetNumbers, Group, StudyNumbers, last_evaluations
from sb3_offline_ft.study.report.looks import Look, page_colours
from sb3_offline_ft.study.report.words import listed, number, percent, ranged

WIDTH = 4.6
_MILLION = 1_000_000

Paint = Callable[[Figure], None]


@dataclass(frozen=True)
class Drawing:
    """
    A picture that is yet to be drawn.

    :param name: Its name, for files and ids
    :param title: What it shows
    :param caption: How to read it
    :param words: What can be seen in it
    :param paint: Draws it
    :param size: Width and height in inches
    """

    name: str
    title: str
    caption: str
    words: str
    paint: Paint
    size: tuple[float, float]

    def on_page(self) -> Picture:
        """
        :return: It in the colours of the page
        """
        colours = {light: f"var({variable})" for variable, light, _ in page_colours()}
        words = f"{self.title}. {self.words}"
        svg = inline_svg(self.name, self.paint, self.size, words=words, colours=colours)
        return Picture(svg, self.title, self.caption, self.words)

    def files(self) -> dict[str, bytes]:
        """
        :return: Contents of an ``svg`` and a ``png`` file
        """
        return picture_files(self.name, self.paint, self.size, self.title)


def draw_curves(numbers: DatasetNumbers, groups: Sequence[Group], looks: Mapping[str, Look], name: str) -> Drawing:
    """
    :param numbers: A dataset's results
    :param groups: The methods to show
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: The learning curves of all methods
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _warmup(axes, numbers)
        for group in groups:
            look, curve = looks[group.method.name], group.curve
            axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.13, linewidth=0)
            axes.plot(curve.x, curve.value, color=look.light, linestyle=look.line, linewidth=1.9, label=group.label)
        _levels(axes, numbers)
        _interactions(axes, numbers)
        axes.set_ylabel("return")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, handlelength=3.2, columnspacing=1.2)

    ends = [f"{group.label} {_estimate(group.estimate('last_return'))}" for group in groups]
    n = max(len(group.runs) for group in groups)
    last = last_evaluations(one for group in groups for one in group.runs)
    words = f"Mean of the last {last} evaluations, with 95 % intervals: {listed(ends, ';')}."
    if numbers.initial_return is not None:
        words += f" The pretrained policies' mean level is {number(numbers.initial_return)}."
    caption = f"Mean over up to {n} seeds, with 95 % bootstrap intervals." + _level_caption(numbers)
    height = 3.3 + 0.2 * -(-(len(groups) + 2) // 2)
    return Drawing(name, "Learning curves", caption, words, paint, (WIDTH, height))


def draw_seeds(numbers: DatasetNumbers, groups: Sequence[Group], looks: Mapping[str, Look], name: str) -> Drawing:
    """
    :param numbers: A dataset's results
    :param groups: The methods to show
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: The runs of each method in a panel of its own
    """
    n_columns = min(2, len(groups))
    n_rows = -(-len(groups) // n_columns)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        for index, axes in enumerate(panels.flat):
            if index >= len(groups):
                axes.set_visible(False)
                continue
            group, look = groups[index], looks[groups[index].method.name]
            if group.method.pretrained:
                _warmup(axes, numbers, label=False)
            curve = group.curve
            for one in group.runs:
                axes.plot(one.run.result.timesteps, one.means, color=look.light, linewidth=0.7, alpha=0.75)
            axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.15, linewidth=0)
            axes.plot(curve.x, curve.value, color=look.light, linewidth=2.2)
            _levels(axes, numbers, label=False)
            axes.set_title(group.label, fontsize=10, loc="left")
            _interactions(axes, numbers, label=index >= len(groups) - n_columns)
            axes.tick_params(labelsize=9, labelbottom=index >= len(groups) - n_columns)
            if index % n_columns == 0:
                axes.set_ylabel("return", fontsize=10)

    ranges = [(group.label, np.concatenate([one.means for one in group.runs])) for group in groups]
    lows = [f"{label} {number(float(means.min()))} to {number(float(means.max()))}" for label, means in ranges]
    words = f"Lowest and highest evaluation of any seed: {listed(lows, ';')}."
    caption = "Thin lines are seeds, thick ones their means." + _level_caption(numbers)
    return Drawing(name, "Every seed", caption, words, paint, (WIDTH, 1.75 * n_rows + 0.45))


def draw_dips(numbers: DatasetNumbers, shown: Sequence[Group], looks: Mapping[str, Look], name: str) -> Drawing | None:
    """
    :param numbers: A dataset's results
    :param shown: The methods to show
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: The dip depth of every run, None if no method has one
    """
    groups = [group for group in shown if group.values("dip_depth")]
    if not groups:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        floor = numbers.noise_floor
        if floor is not None:
            axes.axvspan(0, floor, color=INK, alpha=0.08, linewidth=0, label="as deep as an unchanged policy seems to dip")
        axes.axvline(1, color=INK, linewidth=1, linestyle=":", label="down to a random policy")
        for position, group in enumerate(groups):
            look = looks[group.method.name]
            for one in group.runs:
                depth = one.value("dip_depth")
                if depth is not None:
                    face = look.light if one.metrics.collapsed else "none"
                    axes.plot(
                        depth, position + _spread(group, one.seed), look.marker, color=look.light, markerfacecolor=face,
                        markersize=5.5, markeredgewidth=1.3,
                    )  # fmt: skip
        _rows(axes, groups)
        axes.set_xlabel("dip depth")
        axes.set_xlim(min(-0.04, axes.get_xlim()[0]), max(1.1, axes.get_xlim()[1]))
        figure.legend(loc="outside upper left", ncols=1, fontsize=9)

    depths = [f"{group.label} {listed([f'{depth:.2f}' for depth in group.values('dip_depth')])}" for group in groups]
    words = f"Dip depth of each seed: {'; '.join(depths)}."
    if numbers.noise_floor is not None:
        words += f" An unchanged policy seems to dip by up to {numbers.noise_floor:.2f}."
    caption = "One point for each seed, filled if it collapsed. Left of 0: always above the pretrained policy."
    return Drawing(name, "Dips", caption, words, paint, (WIDTH, 0.38 * len(groups) + 1.25))


def draw_collapses(shown: Sequence[Group], looks: Mapping[str, Look], name: str) -> Drawing | None:
    """
    :param shown: The methods to show
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: The collapse rates, None if they are not defined for any method
    """
    rated = [(group, group.collapse_rate) for group in shown if group.collapse_rate is not None]
    if not rated:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for position, (group, rate) in enumerate(rated):
            assert rate is not None
            _interval(axes, rate, position, looks[group.method.name], factor=100)
        _rows(axes, [group for group, _ in rated])
        axes.set(xlabel="collapsed runs (%)", xlim=(-3, 103))

    words = "; ".join(
        f"{group.label} {sum(group.outcomes)} of {len(group.outcomes)} ({percent(rate)})"
        for group, rate in rated if rate is not None
    )  # fmt: skip
    caption = "Share of the seeds, with exact 95 % intervals (Clopper and Pearson)."
    return Drawing(name, "Collapses", caption, f"{words}.", paint, (WIDTH, 0.34 * len(rated) + 0.9))


def draw_aggregates(numbers: StudyNumbers, looks: Mapping[str, Look], name: str) -> Drawing | None:
    """
    :param numbers: The study's results
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: Aggregates of the normalised scores, None if there are none
    """
    rows = numbers.aggregates
    if not rows:
        return None
    kinds = [("iqm", "IQM"), ("median", "median"), ("mean", "mean")]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (kind, title) in zip(panels, kinds, strict=True):
            for position, row in enumerate(rows):
                _interval(axes, getattr(row, kind), position, looks[row.method.name])
            axes.set_yticks(range(len(rows)), [row.method.label for row in rows], fontsize=9)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_title(title, fontsize=10, loc="left")
            axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.8)
        panels[-1].set_xlabel("normalised score")

    words = "; ".join(f"{row.method.label}: IQM {ranged(row.iqm, 1)}, median {ranged(row.median, 1)}, "
                      f"mean {ranged(row.mean, 1)}" for row in rows)  # fmt: skip
    caption = (
        f"Normalised mean of the last {last_evaluations(numbers.runs)} evaluations over all datasets and seeds, with 95 % "
        "stratified bootstrap intervals."
    )
    return Drawing(name, "Scores", caption, f"{words}.", paint, (WIDTH, (0.24 * len(rows) + 0.42) * len(kinds) + 0.4))


def draw_improvement(numbers: StudyNumbers, looks: Mapping[str, Look], name: str) -> Drawing | None:
    """
    :param numbers: The study's results
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: Probabilities of improvement of the reference method over the others, None if there are none
    """
    rows, reference = numbers.improvements, numbers.reference
    if not rows or reference is None:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=":")
        for position, row in enumerate(rows):
            _interval(axes, row.probability, position, looks[row.method.name])
        axes.set_yticks(range(len(rows)), [row.method.label for row in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set(xlabel=f"P({reference.label} > the other)", xlim=(-0.03, 1.03))

    words = "; ".join(f"over {row.method.label} {ranged(row.probability, 2)}" for row in rows)
    caption = (
        "Probability that a run of the reference method ends higher than one of the other method on the same data, with 95 % "
        "bootstrap intervals. Right of the dotted line the reference is ahead. There is no interval if all runs of one are "
        "above all of the other."
    )
    title = f"Probability of improvement of {reference.label}"
    return Drawing(name, title, caption, f"{reference.label} {words}.", paint, (WIDTH, 0.34 * len(rows) + 0.9))


def draw_profiles(numbers: StudyNumbers, looks: Mapping[str, Look], name: str) -> Drawing | None:
    """
    :param numbers: The study's results
    :param looks: Looks of the methods
    :param name: Name of the picture
    :return: Performance profiles of the normalised scores, None if there are none
    """
    rows = numbers.profiles
    if not rows:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row in rows:
            look = looks[row.method.name]
            axes.fill_between(row.band.x, row.band.low, row.band.high, color=look.light, alpha=0.1, linewidth=0)
            axes.plot(row.band.x, row.band.value, color=look.light, linestyle=look.line, linewidth=1.9, label=row.method.label)
        axes.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
        axes.margins(x=0)
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, handlelength=3.2, columnspacing=1.2)

    words = "; ".join(
        f"{row.method.label}: half of its runs are above {number(row.median_score)}" for row in rows
    )  # fmt: skip
    last = last_evaluations(numbers.runs)
    caption = (
        f"Share of the runs whose normalised mean of the last {last} evaluations is above a score; the higher, the better."
    )
    height = 3.0 + 0.2 * -(-len(rows) // 2)
    return Drawing(name, "Performance profiles", caption, f"{words}.", paint, (WIDTH, height))


FACTOR_METRICS = (
    ("last_return", "last {last} evaluations"),
    ("dip_depth", "dip depth"),
    ("collapsed", "collapsed (%)"),
)


def draw_factor(
    numbers: DatasetNumbers,
    factor: str,
    levels: Mapping[str, Sequence[tuple[str, Group]]],
    looks: Mapping[str, Look],
    name: str,
) -> Drawing:
    """
    :param numbers: A dataset's results
    :param factor: Name of the factor
    :param levels: By listed method, the values of the factor and their runs
    :param looks: Looks of the listed methods
    :param name: Name of the picture
    :return: What changes with the factor
    """
    values = list(dict.fromkeys(value for points in levels.values() for value, _ in points))
    last = last_evaluations(one for points in levels.values() for _, group in points for one in group.runs)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(FACTOR_METRICS), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (metric, title) in zip(panels, FACTOR_METRICS, strict=True):
            for index, (base, points) in enumerate(levels.items()):
                look, shift = looks[base], 0.14 * (index - (len(levels) - 1) / 2)
                for value, group in points:
                    estimate = group.collapse_rate if metric == "collapsed" else group.estimate(metric)
                    if estimate is not None:
                        factor_of = 100 if metric == "collapsed" else 1
                        _interval(axes, estimate, values.index(value) + shift, look, factor=factor_of, upright=True)
            axes.set_title(title.format(last=last), fontsize=10, loc="left")
            axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
            axes.margins(y=0.15)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        panels[-1].set(ylim=(-12, 112), yticks=[0, 50, 100])
        panels[-1].set_xticks(range(len(values)), values, fontsize=9, rotation=20 if max(map(len, values)) > 9 else 0)
        panels[-1].set(xlabel=factor, xlim=(-0.5, len(values) - 0.5))
        for base, points in levels.items():
            look = looks[base]
            label = next((group.label for _, group in points if not group.method.variant), base)
            panels[0].plot([], [], look.marker, color=look.light, label=label)
        figure.legend(loc="outside upper left", ncols=2, fontsize=9)

    words = "; ".join(
        f"{group.label}: {value} ends at {_estimate(group.estimate('last_return'))}"
        for points in levels.values() for value, group in points
    )  # fmt: skip
    caption = "Means over the seeds with 95 % bootstrap intervals; collapse rates with exact ones."
    title = f"{factor} on {numbers.title}"
    return Drawing(name, title, caption, f"{words}.", paint, (WIDTH, 1.45 * len(FACTOR_METRICS) + 0.7))


def _estimate(estimate: Estimate | None) -> str:
    return "not defined" if estimate is None else ranged(estimate)


def _interval(axes: Axes, estimate: Estimate, position: float, look: Look, factor: float = 1.0, upright: bool = False) -> None:
    value, low, high = (factor * number for number in (estimate.value, estimate.low, estimate.high))
    if np.isfinite(low) and np.isfinite(high):
        ends, places = [low, high], [position, position]
        x, y = (places, ends) if upright else (ends, places)
        axes.plot(x, y, color=look.light, linewidth=3, alpha=0.45, solid_capstyle="round")
    x_value, y_value = (position, value) if upright else (value, position)
    axes.plot(x_value, y_value, look.marker, color=look.light, markersize=6.5)


def _rows(axes: Axes, groups: Sequence[Group]) -> None:
    axes.set_yticks(range(len(groups)), [group.label for group in groups], fontsize=9)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.8)


def _spread(group: Group, seed: int) -> float:
    seeds = [one.seed for one in group.runs]
    return 0.0 if len(seeds) < 2 else 0.5 * (seeds.index(seed) / (len(seeds) - 1) - 0.5)


def _warmup(axes: Axes, numbers: DatasetNumbers, label: bool = True) -> None:
    if numbers.warmup_steps > 0:
        axes.axvspan(
            0, numbers.warmup_steps, color=INK, alpha=0.07, linewidth=0, label="warm-up, policy frozen" if label else None
        )


def _levels(axes: Axes, numbers: DatasetNumbers, label: bool = True) -> None:
    if numbers.initial_return is not None:
        axes.axhline(
            numbers.initial_return, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="pretrained policy" if label else None
        )
    if numbers.data_return is not None:
        axes.axhline(
            numbers.data_return, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="mean of the data" if label else None
        )


def _level_caption(numbers: DatasetNumbers) -> str:
    lines = []
    if numbers.initial_return is not None:
        lines.append(f"dashed: the pretrained policy ({number(numbers.initial_return)})")
    if numbers.data_return is not None:
        lines.append(f"dotted: the mean of the data ({number(numbers.data_return)})")
    text = f" Thin lines across: {', '.join(lines)}." if lines else ""
    return text + (" Shaded: the warm-up, in which the policy is frozen." if numbers.warmup_steps > 0 else "")


def _interactions(axes: Axes, numbers: DatasetNumbers, label: bool = True) -> None:
    last = max(int(group.curve.x[-1]) for group in numbers.groups)
    unit, words = (1, "interactions") if last < 5_000 else (1_000, "interactions (thousands)")
    if last >= 5 * _MILLION:
        unit, words = _MILLION, "interactions (millions)"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlim(0, max(last, 1))
    if label:
        axes.set_xlabel(words, fontsize=10)
