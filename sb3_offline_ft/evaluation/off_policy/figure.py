"""The picture of an off-policy estimate: has it settled, and does the data show what the policy does?"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_offline_ft.common.drawing import BLUE, VERMILLION, new_figure
from sb3_offline_ft.evaluation.off_policy.coverage import PolicyCoverage
from sb3_offline_ft.evaluation.off_policy.fitted_q import OffPolicyEstimate


def draw_estimate(found: OffPolicyEstimate, covered: PolicyCoverage, title: str) -> Figure:
    """
    :param found: The estimate
    :param covered: How well the data covers the policy
    :param title: Whose it is, and from which data
    :return: Left the estimate during the training of the critics, a line each replicate; right the distances to the data
    """
    figure = new_figure((10, 4.2))
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)
    _draw_training(found, left)
    _draw_distances(covered, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _draw_training(found: OffPolicyEstimate, axes: Axes) -> None:
    axes.plot(found.steps, found.curve, color="0.7", linewidth=0.8)
    axes.plot(found.steps, found.curve.mean(axis=1), color=BLUE, linewidth=2, label="estimate", gid="estimate")
    axes.axhline(found.data_value, color="black", linestyle=(0, (4, 2)), linewidth=1, label="logged episodes", gid="data")
    one = found.estimate
    if one.has_interval:
        axes.errorbar(
            found.steps[-1], one.value, yerr=[[one.value - one.low], [one.high - one.value]], color=BLUE, capsize=4,
            linewidth=2, label="interval", gid="interval",
        )  # fmt: skip
    axes.set(xlabel="gradient steps", ylabel=f"return, discounted by {found.gamma:g}")
    axes.set_title("settled" if found.is_settled else "not settled: do not rely on it", loc="left", fontsize=10)


def _draw_distances(covered: PolicyCoverage, axes: Axes) -> None:
    most = max(float(np.quantile(covered.distances, 0.99)), 1.2 * covered.limit)
    bins = np.linspace(0, most or 1.0, 40).tolist()
    for values, label, look in (
        (covered.own_distances, "logged actions", {"color": "0.75"}),
        (covered.distances, "the policy's actions", {"histtype": "step", "color": VERMILLION, "linewidth": 2}),
    ):
        axes.hist(np.minimum(values, most), bins=bins, label=label, **look)
    axes.axvline(covered.limit, color="black", linestyle=(0, (1, 1)), label="95 % of the data")
    axes.set(xlabel="distance to the nearest logged state and action", ylabel="states")
    axes.set_title(f"{100 * covered.outside:.0f} % of the policy's actions are outside", loc="left", fontsize=10)
