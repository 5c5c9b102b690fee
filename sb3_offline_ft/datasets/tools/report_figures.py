"""The pictures of a dataset report: SVG that takes its text colour from the page around it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from sb3_offline_ft.datasets.offline_dataset import OfflineDataset
from sb3_offline_ft.datasets.tools.diversity import ActionNoise, sample_rows, scaled_actions, standardized, state_matrix
from sb3_offline_ft.pages.pictures import INK, inline_svg, panels

# Of the colours of Okabe and Ito, those that stand out on white and on black
BLUE, ORANGE, GREEN, VERMILLION = "#3B8FD0", "#E69F00", "#009E73", "#D55E00"

MOST_ACTIONS = 12
_PROJECTED_ROWS = 100_000
_WIDTH, _HEIGHT = 4.6, 3.1


def draw_returns(dataset: OfflineDataset) -> str:
    """The histogram of the returns."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        returns = dataset.episode_returns
        axes.hist(returns, bins=_edges(returns, bins=min(50, max(8, int(2 * np.sqrt(len(returns)))))).tolist(), color=BLUE)
        axes.axvline(returns.mean(), color=VERMILLION, linewidth=2, label=f"mean {returns.mean():,.1f}")
        axes.set(xlabel="return of the episode", ylabel="episodes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _name_single_value(axes, returns)
        axes.legend(loc="best")

    return _draw("returns", paint)


def draw_lengths(dataset: OfflineDataset) -> str:
    """The histogram of the lengths of episodes, by how they ended."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        lengths, terminated = dataset.episode_lengths, dataset.terminations[dataset.episode_ends]
        edges = _edges(lengths, bins=min(30, max(5, int(np.sqrt(len(lengths))))))
        groups = [("terminated", lengths[terminated], BLUE), ("truncated", lengths[~terminated], ORANGE)]
        groups = [group for group in groups if len(group[1])]
        axes.hist(
            [values for _, values, _ in groups], bins=edges.tolist(), stacked=True,
            color=[colour for *_, colour in groups], label=[f"{len(values):,} {label}" for label, values, _ in groups],
        )  # fmt: skip
        axes.set(xlabel="steps of the episode", ylabel="episodes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _name_single_value(axes, lengths)
        axes.legend(loc="best")

    return _draw("lengths", paint)


def draw_order(dataset: OfflineDataset) -> str:
    """The returns in the order of the episodes, with a running median."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        returns = dataset.episode_returns
        episodes = np.arange(len(returns))
        size = float(np.clip(60 / np.sqrt(len(returns)), 1.5, 5))
        axes.plot(episodes, returns, "o", color=BLUE, markersize=size, markeredgewidth=0, alpha=0.5, rasterized=True)
        window = int(np.clip(len(returns) // 20, 3, 101)) // 2 * 2 + 1
        if len(returns) >= 2 * window:
            median = np.median(np.lib.stride_tricks.sliding_window_view(returns, window), axis=1)
            middle = episodes[window // 2 : len(returns) - window // 2]
            axes.plot(middle, median, color=VERMILLION, linewidth=2, label=f"median of {window} episodes")
            axes.legend(loc="best")
        for part in dataset.sources[1:]:
            axes.axvline(np.searchsorted(dataset.episode_starts, part.begin) - 0.5, color=INK, linewidth=1, linestyle=":")
        axes.set(xlabel="episode, in the order of the data", ylabel="return")

    return _draw("order", paint)


def draw_states(dataset: OfflineDataset, seed: int = 0) -> str | None:
    """The density of the states on their first two principal components; none if fewer than two dimensions vary."""
    points = standardized(state_matrix(dataset, sample_rows(len(dataset), _PROJECTED_ROWS, seed)))
    points = points[:, points.std(axis=0) > 0]
    if points.shape[1] < 2 or len(points) < 3:
        return None
    # Rows are many and columns few: the small matrix has the same directions
    _, values, directions = np.linalg.svd(np.linalg.qr(points, mode="r"), full_matrices=False)
    shares = values**2 / np.sum(values**2)
    # The sign of a direction means nothing: the largest entry is positive
    directions = directions[:2] * np.sign(directions[[0, 1], np.abs(directions[:2]).argmax(axis=1)])[:, None]
    projected = points @ directions.T

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        cells = axes.hexbin(
            *projected.T, gridsize=45, mincnt=1, bins="log", cmap="viridis", linewidths=0.1, rasterized=True
        )  # fmt: skip
        bar = figure.colorbar(cells, ax=axes, label="transitions", format=LogFormatter())
        bar.outline.set_visible(False)
        axes.set(xlabel=f"1st component ({shares[0]:.0%} of the variance)", ylabel=f"2nd component ({shares[1]:.0%})")

    return _draw("states", paint, height=3.6)


def draw_actions(dataset: OfflineDataset, seed: int = 0) -> str:
    """Histograms of the first :data:`MOST_ACTIONS` dimensions of the actions on the scale from -1 to 1."""
    actions = scaled_actions(dataset, sample_rows(len(dataset), _PROJECTED_ROWS, seed))[:, :MOST_ACTIONS]
    n_columns = min(3, actions.shape[1])
    n_rows = -(-actions.shape[1] // n_columns)

    def paint(figure: Figure) -> None:
        for index, axes in enumerate(panels(figure, actions.shape[1], n_columns)):
            axes.hist(np.clip(actions[:, index], -1, 1), bins=np.linspace(-1, 1, 41).tolist(), color=GREEN)
            axes.set(yticks=[], xlim=(-1.05, 1.05), xticks=[-1, 0, 1])
            axes.spines["left"].set_visible(False)
            axes.set_title(f"dimension {index}", fontsize=10, loc="left")

    return _draw("actions", paint, height=max(_HEIGHT / 2 + 0.4, 1.25 * n_rows + 0.3))


def draw_noise(noise: ActionNoise) -> str:
    """Standard deviations of the action dimensions, over all rows and between similar states."""
    shown = min(len(noise.std), MOST_ACTIONS)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        position: npt.NDArray[np.float64] = np.arange(shown, dtype=np.float64)
        axes.barh(position, noise.total_std[:shown], height=0.75, color=BLUE, alpha=0.4, label="over all rows")
        axes.barh(position, noise.std[:shown], height=0.4, color=BLUE, label="between similar states")
        axes.set(yticks=position, yticklabels=[f"dim. {index}" for index in range(shown)], xlabel="standard deviation")
        axes.set_ylim(shown - 0.4, -0.6)
        figure.legend(loc="outside upper left", ncols=2)

    return _draw("noise", paint, height=max(1.9, 0.34 * shown + 1.1))


def _draw(name: str, paint: Callable[[Figure], None], height: float = _HEIGHT) -> str:
    return inline_svg(name, paint, (_WIDTH, height))


def _edges(values: npt.NDArray[Any], bins: int) -> npt.NDArray[np.float64]:
    if np.ptp(values) > 0:
        return np.asarray(np.histogram_bin_edges(values, bins=bins), np.float64)
    half = max(0.5, abs(float(values[0])) / 20)
    return np.array([values[0] - half, values[0] + half])


def _name_single_value(axes: Axes, values: npt.NDArray[Any]) -> None:
    if np.ptp(values) == 0:
        value = float(values[0])
        half = max(0.5, abs(value) / 20)
        axes.set_xticks([value], [f"{value:,.6g}"])
        axes.set_xlim(value - 4 * half, value + 4 * half)
