"""What perturbations do to policies, for people: tables and a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_offline_ft.common.drawing import BLUE, VERMILLION, common_legend
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.evaluation.robustness.result import FILE, KEPT, RETURN, Response, RobustnessResult
from sb3_offline_ft.pages.pictures import Drawing, level, panels

# Told from one another by form and line too
LOOKS: dict[str, dict[str, Any]] = {
    "candidate": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "baseline": {"color": VERMILLION, "marker": "s", "linestyle": (0, (4, 2)), "markerfacecolor": "white"},
}
N_COLUMNS = 3


def write_files(result: RobustnessResult, folder: Path) -> list[Path]:
    """
    Write ``robustness.json``, and the picture as PNG and SVG.

    :param result: The outcome
    :param folder: Where the files shall be
    :return: The files
    """
    result.save(folder / FILE)
    paths = [folder / FILE]
    for ending, content in drawing(result).files().items():
        paths.append((folder / FILE).with_suffix(f".{ending}"))
        with atomic_write(paths[-1]) as file:
            file.write(content)
    return paths


def print_tables(result: RobustnessResult, console: Console) -> None:
    """Print what is kept under each perturbation, the lowest mean return, and the other metrics."""
    for line in _headlines(result):
        console.print(Text(line))
    console.print(_table_of_returns(result))
    for metric in result.metrics:
        if metric != RETURN:
            console.print(_table_of_metric(result, metric))


def _headlines(result: RobustnessResult) -> Iterator[str]:
    yield f"{result.env_id}, {result.n_seeds} episodes at each level, a random policy has {result.random_return:.1f}"
    for role, policy in result.policies.items():
        threshold = result.threshold(role)
        if threshold is None:
            kept = "no better than a random policy, so there is nothing to keep"
        else:
            kept = f"{100 * KEPT:.0f} % above random are {threshold:.1f}"
        yield f"{role}: {policy.name}, mean return {result.nominal_return(role):.1f} with nothing changed; {kept}"


def _table_of_returns(result: RobustnessResult) -> Table:
    table = Table(title="Where the mean return is kept", title_justify="left", caption_justify="left")
    table.caption = "\u2190 and \u2192: nothing beyond was tried. Nothing is known of what lies between levels."
    table.add_column("changed")
    table.add_column("level")
    for role in result.policies:
        table.add_column(f"{role} keeps it", justify="right")
        table.add_column("lowest", justify="right")
    for response in result.responses:
        cells = [response.name, response.what]
        for role in result.policies:
            kept, means = result.kept(role, response), response.means(role)
            lowest = int(np.argmin(np.where(np.isnan(means), -np.inf, means)))
            cells += ["" if kept is None else str(kept), f"{means[lowest]:.1f} at {response.levels[lowest]:g}"]
        table.add_row(*cells)
    return table


def _table_of_metric(result: RobustnessResult, metric: str) -> Table:
    table = Table(title=f"Mean of {metric}", title_justify="left")
    table.add_column("changed")
    for role in result.policies:
        table.add_column(f"{role}, nominal", justify="right")
        table.add_column("smallest", justify="right")
        table.add_column("largest", justify="right")
    for response in result.responses:
        cells = [response.name]
        for role in result.policies:
            means = response.means(role, metric)
            cells.append(f"{means[response.levels.index(response.nominal)]:.4g}")
            for at in (int(np.argmin(means)), int(np.argmax(means))):
                cells.append(f"{means[at]:.4g} at {response.levels[at]:g}")
        table.add_row(*cells)
    return table


def drawing(result: RobustnessResult) -> Drawing:
    """
    :param result: The outcome
    :return: A picture with a panel for each perturbation, for a page or for files
    """
    rows = -(-len(result.responses) // N_COLUMNS)
    words = [
        f"{response.name}: "
        + ", ".join(f"the {role} keeps it {kept}" for role in result.policies if (kept := result.kept(role, response)))
        for response in result.responses
    ]
    return Drawing(
        name="robustness",
        title=f"Robustness on {result.env_id}",
        caption="Mean return at each level of what was changed, all episodes as small dots. The thin vertical line is the "
        f"nominal level; the thin lines across are {100 * KEPT:.0f} % of each policy's nominal return above that of a random "
        "policy.",
        words=". ".join(words),
        paint=lambda figure: _paint(result, figure),
        size=(10.0, 2.3 * rows + 0.6),
    )


def _paint(result: RobustnessResult, figure: Figure) -> None:
    all_axes = panels(figure, len(result.responses), N_COLUMNS, sharex=False, sharey=True)
    for axes, response in zip(all_axes, result.responses, strict=True):
        _paint_response(result, response, axes)
    for axes in all_axes[::N_COLUMNS]:
        axes.set_ylabel("return")
    common_legend(figure, all_axes)


def _paint_response(result: RobustnessResult, response: Response, axes: Axes) -> None:
    axes.set_title(response.name, fontsize=11, loc="left")
    axes.set_xlabel(response.what, fontsize=8)
    axes.axvline(response.nominal, color="0.6", linewidth=0.8, zorder=0)
    for role in result.policies:
        look = LOOKS[role]
        for at, values in zip(response.levels, response.values[role], strict=True):
            returns = values[RETURN]
            axes.plot([at] * len(returns), returns, linestyle="", marker=".", markersize=2, color=look["color"], alpha=0.4)
        axes.plot(response.levels, response.means(role), label=role, gid=role, markersize=5, linewidth=1.6, **look)
        dashes = (1, 0) if role == "candidate" else (4, 2)
        level(axes, result.threshold(role), dashes, f"kept by the {role}")
