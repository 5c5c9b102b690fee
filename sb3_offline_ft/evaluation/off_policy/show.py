"""The command ``sb3-offline-ft dataset evaluate-policy``."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_offline_ft.common.console import PlainConsole
from sb3_offline_ft.common.drawing import save_png
from sb3_offline_ft.controllers import load_controller
from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.datasets.tools.agents import find_agent
from sb3_offline_ft.evaluation.off_policy.coverage import PolicyCoverage, coverage
from sb3_offline_ft.evaluation.off_policy.critics import initial_value_of_critics
from sb3_offline_ft.evaluation.off_policy.figure import draw_estimate
from sb3_offline_ft.evaluation.off_policy.fitted_q import OffPolicyEstimate, fitted_q_evaluation
from sb3_offline_ft.evaluation.off_policy.logged import LoggedData, Policy

GAMMA = 0.99


def show_estimate(
    spec: str,
    agent: str,
    *,
    gamma: float | None = None,
    gradient_steps: int = 2_500,
    n_bootstraps: int = 8,
    seed: int = 0,
    device: str = "cpu",
    figure: Path | None = None,
    as_json: bool = False,
    trust_pickle: bool = False,
    safe_load: bool = False,
    progress_bar: bool = False,
    console: Console | None = None,
) -> None:
    """
    Estimate from data what a policy returns, and print it.

    :param spec: The data
    :param agent: A zip file of SB3, sb3-contrib or this package, or another controller
    :param gamma: Discount factor; the learner's own if omitted, 0.99 for policies that have none
    :param gradient_steps: Gradient steps of the critics
    :param n_bootstraps: Replicates of the bootstrap
    :param seed: Seed of the estimate
    :param device: Torch device
    :param figure: Where the picture shall be; none is drawn if omitted
    :param as_json: Print JSON instead of a table
    :param trust_pickle: Whether data may be unpickled
    :param safe_load: Whether nothing of the agent may be unpickled
    :param progress_bar: Display a progress bar
    :param console: Where to print
    """
    console = console or PlainConsole()
    dataset = load_dataset(spec, trust_pickle=trust_pickle)
    policy: Policy = _learner(agent, dataset.env_id, device, safe_load) or load_controller(
        agent, dataset.env_id, action_space=dataset.action_space, device=device, safe_load=safe_load
    )
    gamma = float(getattr(policy, "gamma", GAMMA)) if gamma is None else gamma
    data = LoggedData(dataset, policy, seed)
    actions = data.actions_of(policy)
    covered = coverage(policy, data, seed=seed, actions=actions)
    found = fitted_q_evaluation(
        policy, data, gamma=gamma, gradient_steps=gradient_steps, n_bootstraps=n_bootstraps, seed=seed, device=device,
        progress_bar=progress_bar, actions=actions,
    )  # fmt: skip
    own = initial_value_of_critics(policy, data, actions)
    if figure is not None:
        save_png(draw_estimate(found, covered, f"{agent} by {dataset.name}"), figure)
    if as_json:
        console.file.write(json.dumps(_facts(found, covered, own), indent=2) + "\n")
        return
    console.print(_table(found, covered, own, policy, f"{agent} by {dataset.name}"))
    for warning in _warnings(found, covered):
        console.print(f"Warning: {warning}", style="yellow", highlight=False)
    if figure is not None:
        console.print(f"Picture: {figure}", highlight=False)


def _learner(agent: str, env_id: str | None, device: str, safe_load: bool) -> BaseAlgorithm | None:
    """A whole algorithm, which has critics and answers many observations at once; None if there is only a policy."""
    file = Path(agent).expanduser()
    if file.suffix != ".zip" or not file.is_file():
        return None
    # Files of this package's algorithms do not say of which, and load into one another
    for algorithm in (None, "td3bc"):
        with suppress(ValueError):
            return find_agent(env_id or "", algorithm, Path(), file, 0, False).load_alone(device, safe_load)
    return None


def _facts(found: OffPolicyEstimate, covered: PolicyCoverage, own: float | None) -> dict[str, Any]:
    one = found.estimate
    return {
        "estimate": one.value, "low": one.low, "high": one.high, "method": one.method, "gamma": found.gamma,
        "settled": found.is_settled, "logged_episodes": found.data_value, "own_critics": own,
        "actions_outside": covered.outside, "action_distance": covered.action_distance, "warnings": _warnings(found, covered),
    }  # fmt: skip


def _table(found: OffPolicyEstimate, covered: PolicyCoverage, own: float | None, policy: Policy, title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    one = found.estimate
    table.add_row(f"return, discounted by {found.gamma:g} a step", f"{one.value:.1f}")
    table.add_row("95 % interval", f"{one.low:.1f} to {one.high:.1f}")
    table.add_row("the logged episodes, discounted alike", f"{found.data_value:.1f}")
    if own is not None:
        assert isinstance(policy, BaseAlgorithm)
        table.add_row("what its own critics say", f"{own:.1f} (discounted by {getattr(policy, 'gamma', found.gamma):g})")
    table.add_row("coverage", covered.text)
    return table


def _warnings(found: OffPolicyEstimate, covered: PolicyCoverage) -> list[str]:
    warnings = []
    if covered.leaves_data:
        warnings.append(
            "the policy leaves the data more than twice as often as the data itself: the estimate is a guess, and the "
            "interval does not say so."
        )
    if not found.is_settled:
        warnings.append(
            f"the estimate has not settled: the training was {found.horizons:.1f} horizons long, it moved {found.moved:.1f} "
            f"at the end, and {100 * found.clipped:.0f} % of the targets were beyond what rewards allow. Take more steps."
        )
    return warnings
