"""Before anything runs: is a trial worth it, how long does it take, at what risk and cost?"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.evaluation.statistics import Estimate
from sb3_offline_ft.trial.advice import Advice, recipe_for
from sb3_offline_ft.trial.assignment import BASELINE, Assignment
from sb3_offline_ft.trial.comparison import Array, information
from sb3_offline_ft.trial.decision import episodes_needed, value_a_year
from sb3_offline_ft.trial.evidence import design_of, mean_of
from sb3_offline_ft.trial.machine import TrialMachine
from sb3_offline_ft.trial.plan import RETURN, TrialPlan
from sb3_offline_ft.trial.simulation import Draw, Episodes, Outcomes, simulate

if TYPE_CHECKING:
    from sb3_offline_ft.evaluation.off_policy import DataVerdict
    from sb3_offline_ft.trial.trial import Trial

PLAN_RESULT_FILE = "plan.json"
FEWEST_VALUES = 5
"""Episodes of the baseline from which its spread is taken."""
N_EPISODES = 20
"""Episodes that the baseline runs in an environment, if nothing is known of it."""
OTHER_EPISODES = 1_000_000
"""Their numbers begin here: the trial's own episodes have other seeds."""
N_TRIALS = 400
"""Simulated trials for each chance."""
LONGER = 1.15
"""Factor by which a plan that is too short is made longer, until it reaches its power."""


@dataclass(frozen=True)
class BaselineValues:
    """
    What is known of the baseline's episodes.

    :param metrics: Values of each metric, of the same episodes
    :param source: Where they are from, in words
    """

    metrics: Mapping[str, Array]
    source: str


@dataclass(frozen=True)
class PlanResult:
    """
    What to expect of a trial; made by :func:`plan_trial`.

    :param plan: The plan
    :param source: Where the baseline's values are from
    :param baseline: Mean of the primary metric of the baseline
    :param spread: Its standard deviation from episode to episode
    :param needed: Episodes of both, in equal shares, to see the smallest effect with the power of the plan
    :param visible: The effect that the plan as it is sees with this power
    :param better: How simulated trials end for a candidate with the smallest effect
    :param equal: For one that is as good as the baseline
    :param worse: For one that is worse by as much
    :param enough: If the plan is too short: how many episodes of its last ramp or pilot would be enough, and the chance then
    :param hours: Duration of all episodes
    :param cost: Of all episodes, in the currency
    :param worst_loss: What the candidate can lose at most during the trial, of the return; None if the plan has no
        ``risk``, or nothing is known of the return yet
    :param worst_cost: The same in the currency
    :param value: What the smallest effect is worth a year, with the interval that a trial will leave
    :param payback_days: Days of service until trial and deployment are paid for; None if there is no value
    :param verdict: What the data say of candidate and baseline; None without data or policies
    :param advice: Which recipe for the data; None without data
    :param notes: What the simulation left out
    """

    plan: TrialPlan
    source: str
    baseline: Estimate
    spread: float
    needed: int
    visible: float
    better: Outcomes
    equal: Outcomes
    worse: Outcomes
    enough: tuple[int, Outcomes] | None
    hours: float
    cost: float
    worst_loss: float | None
    worst_cost: float | None
    value: Estimate
    payback_days: float | None
    verdict: "DataVerdict | None" = None
    advice: Advice | None = None
    notes: tuple[str, ...] = ()

    @property
    def reaches_power(self) -> bool:
        """Whether a candidate with the smallest effect passes often enough, up to the noise of the simulation."""
        return _reaches(self.plan, self.better)

    def as_mapping(self) -> dict[str, Any]:
        """In the form of JSON."""
        said = {name: value for name, value in vars(self).items() if name not in ("plan", "verdict", "advice")}
        for name in ("baseline", "value", "better", "equal", "worse"):
            said[name] = asdict(said[name])
        if self.enough is not None:
            said["enough"] = {"episodes": self.enough[0], "better": asdict(self.enough[1])}
        said["digest"] = self.plan.digest
        said["reaches_power"] = self.reaches_power
        said["verdict"] = None if self.verdict is None else self.verdict.text
        said["advice"] = None if self.advice is None else asdict(self.advice)
        form: dict[str, Any] = json_form(said)
        return form


def plan_of(
    trial: "Trial", *, ask_data: bool = True, n_trials: int = N_TRIALS, on_progress: Callable[[str], None] = lambda doing: None
) -> PlanResult:
    """
    Say what to expect of a trial (:func:`plan_trial`), and keep it in its folder as ``plan.json``.

    :param trial: The trial
    :param ask_data: Whether to ask the plan's dataset what candidate and baseline return, which takes minutes
    :param n_trials: Simulated trials for each chance
    :param on_progress: Is told what is being done
    :return: What to expect
    :raises ValueError: Nothing is known of the primary metric, or something does not fit
    :raises OSError: A policy or the data cannot be read
    """
    plan = trial.plan_in_force
    on_progress("what is known of the baseline")
    values = baseline_values(plan, trial.machine)
    verdict = None
    if ask_data and plan.data is not None and plan.env is not None:
        on_progress("what the data say of both policies")
        verdict = _asked_data(plan)
    result = plan_trial(plan, values, verdict=verdict, n_trials=n_trials, on_progress=on_progress)
    with atomic_write(trial.folder / PLAN_RESULT_FILE) as file:
        file.write((json.dumps(result.as_mapping(), indent=1) + "\n").encode())
    return result


def _asked_data(plan: TrialPlan) -> "DataVerdict":
    from sb3_offline_ft.controllers import load_controller
    from sb3_offline_ft.evaluation.off_policy import data_suffices

    assert plan.data is not None
    candidate, baseline = (load_controller(spec, plan.env) for spec in (plan.candidate, plan.baseline))
    return data_suffices(candidate, baseline, plan.data)


def baseline_values(plan: TrialPlan, machine: TrialMachine | None = None, n_episodes: int = N_EPISODES) -> BaselineValues:
    """
    What is known of the baseline: its recorded episodes if there are enough; else some that it runs now, if there is an
    environment; else the returns of the dataset.

    :param plan: The plan
    :param machine: The trial, if there are episodes already
    :param n_episodes: How many to run in an environment
    :return: Values of the baseline's episodes
    :raises ValueError: Nothing is known of the primary metric
    :raises OSError: A policy or the data cannot be read
    """
    records = (
        [] if machine is None else [record for record in machine.episodes if record.arm == BASELINE and not record.excluded]
    )
    recorded = _complete([record.metrics for record in records], plan)
    if len(recorded.get(plan.primary.metric, ())) >= FEWEST_VALUES:
        return BaselineValues(recorded, f"{len(recorded[plan.primary.metric])} recorded episodes of the baseline")
    if plan.env is not None:
        return BaselineValues(_run_baseline(plan, n_episodes), f"{n_episodes} episodes of the baseline in {plan.env}, run now")
    if plan.data is not None and plan.primary.metric == RETURN:
        returns = dataset_returns(plan.data)
        if len(returns) >= FEWEST_VALUES:
            return BaselineValues({RETURN: returns}, f"{len(returns)} episodes of {plan.data}")
    raise ValueError(
        f"Nothing is known of how {plan.primary.metric} spreads: record {FEWEST_VALUES} episodes of the baseline or more with "
        "`sb3-offline-ft trial record` (the stages shadow and pilot begin with it), or name a dataset of it as `data`, if the "
        "primary metric is the return."
    )


def dataset_returns(spec: str) -> Array:
    """Returns of the episodes of a dataset."""
    from sb3_offline_ft.datasets.sources import load_dataset

    return np.asarray(load_dataset(spec).episode_returns, dtype=np.float64)


def _complete(metrics: list[Mapping[str, float | None]], plan: TrialPlan) -> dict[str, Array]:
    """Values of the metrics that most episodes have, of the episodes that have all of these."""
    primary = [one for one in metrics if one.get(plan.primary.metric) is not None]
    names = [each.name for each in plan.metrics if primary and all(one.get(each.name) is not None for one in primary)]
    return {name: np.array([one[name] for one in primary], dtype=np.float64) for name in names}


def _run_baseline(plan: TrialPlan, n_episodes: int) -> dict[str, Array]:
    from contextlib import closing

    from sb3_offline_ft.trial.episodes import EpisodeRunner

    with closing(EpisodeRunner(plan)) as runner:
        runs = [
            runner.run(Assignment(OTHER_EPISODES + i, plan.stages[0].name, BASELINE, 0.0, None, None, "planning")).metrics
            for i in range(n_episodes)
        ]
    return _complete(list(runs), plan)


def plan_trial(
    plan: TrialPlan,
    values: BaselineValues,
    *,
    verdict: "DataVerdict | None" = None,
    n_trials: int = N_TRIALS,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> PlanResult:
    """
    Say what to expect of a trial, by simulating the procedure that will run.

    Simulated episodes are drawn from the baseline's. The candidate's differ from them in the primary metric only.

    :param plan: The plan
    :param values: What is known of the baseline, at least two episodes
    :param verdict: What the data say, if they were asked (:func:`~sb3_offline_ft.evaluation.off_policy.data_suffices`)
    :param n_trials: Simulated trials for each chance
    :param seed: Seed of the simulation
    :param on_progress: Is told what is being done
    :return: What to expect
    :raises ValueError: Too little is known of the baseline
    """
    metric, effect = plan.primary.metric, plan.primary.smallest_effect
    sample = values.metrics.get(metric, np.array([]))
    if len(sample) < 2:
        raise ValueError(f"To plan a trial takes at least two values of {metric} of the baseline, found {len(sample)}.")
    simulated, notes = _simulated(plan, values)
    spread = float(sample.std(ddof=1))
    chances = []
    for words, shift in (("better", effect), ("as good", 0.0), ("worse", -effect)):
        on_progress(f"{n_trials} trials with a candidate that is {words}")
        chances.append(simulate(simulated, _draw(simulated, values, shift), n_trials, seed))
    enough = None
    if not _reaches(plan, chances[0]):
        on_progress("a plan that is long enough")
        enough = _long_enough(simulated, values, episodes_needed(plan, spread, effect), n_trials, seed)
    error = spread / math.sqrt(float(information(design_of(plan).sizes).sum()))
    half = float(norm.isf(plan.error_rates.false_go)) * error
    value = value_a_year(plan, Estimate(effect, effect - half, effect + half, 0, "the smallest effect"))
    cost, worst = _cost(plan), _worst_loss(plan, values)
    return PlanResult(
        plan=plan,
        source=values.source,
        baseline=mean_of(sample, 1 - 2 * plan.error_rates.false_go),
        spread=spread,
        needed=episodes_needed(plan, spread, effect),
        visible=error * float(norm.isf(plan.error_rates.false_go) + norm.isf(plan.error_rates.missed)),
        better=chances[0],
        equal=chances[1],
        worse=chances[2],
        enough=enough,
        hours=sum(stage.episodes for stage in plan.stages) * plan.costs.minutes / 60,
        cost=cost,
        worst_loss=worst,
        worst_cost=None if worst is None else worst * plan.metric(RETURN).value_per_unit,
        value=value,
        payback_days=365 * (cost + plan.costs.deployment) / value.value if value.value > 0 else None,
        verdict=verdict,
        advice=_advice(plan, values),
        notes=notes,
    )


def _reaches(plan: TrialPlan, better: Outcomes) -> bool:
    wanted = 1 - plan.error_rates.missed
    return better.go / better.trials >= wanted - 2 * math.sqrt(wanted * (1 - wanted) / better.trials)


def _simulated(plan: TrialPlan, values: BaselineValues) -> tuple[TrialPlan, tuple[str, ...]]:
    """The plan without what cannot be simulated, and what that is."""
    notes = []
    known = tuple(rail for rail in plan.guardrails if rail.metric in values.metrics)
    if unknown := [rail.metric for rail in plan.guardrails if rail not in known]:
        notes.append(f"Nothing is known of {', '.join(unknown)} yet: the chances are those without these guardrails.")
    risk = plan.risk
    if risk is not None and RETURN in values.metrics:
        risk = replace(risk, baseline_return=float(values.metrics[RETURN].mean()))
    elif risk is not None:
        risk = None
        notes.append("Nothing is known of the return yet: the chances are those without the risk budget.")
    return replace(plan, guardrails=known, risk=risk), tuple(notes)


def _draw(plan: TrialPlan, values: BaselineValues, effect: float) -> Draw:
    """Episodes like the baseline's, smoothed where values are continuous; the candidate is better by an effect."""
    names = list(values.metrics)
    table = np.stack([values.metrics[name] for name in names], axis=1)
    means, spreads, n = table.mean(axis=0), table.std(axis=0, ddof=1), len(table)
    is_continuous = np.array([len(np.unique(column)) == n for column in table.T])
    noise = np.where(is_continuous, spreads * n**-0.2, 0.0)
    # Few values differ less from their own mean than from the true one
    shrink = spreads / np.sqrt(np.maximum((1 - 1 / n) * spreads**2 + noise**2, 1e-300))
    primary = names.index(plan.primary.metric)
    shift = plan.sign(plan.primary.metric) * effect

    levels = np.unique(table[:, primary])

    def shifted(rng: np.random.Generator, column: Array) -> Array:
        if len(levels) != 2:
            return column + shift
        # Success or failure: the candidate succeeds more often
        share = np.clip((means[primary] + shift - levels[0]) / (levels[1] - levels[0]), 0.0, 1.0)
        return np.asarray(levels[(rng.random(len(column)) < share).astype(int)], dtype=np.float64)

    def draw(rng: np.random.Generator, n_episodes: int) -> Episodes:
        drawn = table[rng.integers(n, size=(n_episodes, 2))]
        drawn = np.where(is_continuous, means + (drawn - means + noise * rng.normal(size=drawn.shape)) * shrink, drawn)
        drawn[:, 1, primary] = shifted(rng, drawn[:, 1, primary])
        return {name: drawn[..., i] for i, name in enumerate(names)}

    return draw


def _long_enough(plan: TrialPlan, values: BaselineValues, needed: int, n_trials: int, seed: int) -> tuple[int, Outcomes]:
    """How many episodes the last stage that compares would need, and the chance of a better candidate then."""
    last = max(i for i, stage in enumerate(plan.stages) if stage.compares)
    now = plan.stages[last]
    missing = max(plan.blocks.episodes, needed - 4 * float(information(design_of(plan).sizes).sum()))
    episodes = now.episodes + math.ceil(missing / (4 * now.share * (1 - now.share)))
    for _ in range(5):
        stages = tuple(replace(now, episodes=episodes) if i == last else stage for i, stage in enumerate(plan.stages))
        longer = replace(plan, stages=stages, budget=plan.budget + episodes - now.episodes)
        better = simulate(longer, _draw(longer, values, plan.primary.smallest_effect), n_trials, seed)
        if _reaches(plan, better):
            break
        episodes = math.ceil(LONGER * episodes)
    return episodes, better


def _cost(plan: TrialPlan) -> float:
    supervised = sum(stage.episodes for stage in plan.stages if stage.supervised)
    return sum(stage.episodes for stage in plan.stages) * plan.costs.episode + supervised * plan.costs.supervision


def _worst_loss(plan: TrialPlan, values: BaselineValues) -> float | None:
    """What the risk budget lets the candidate lose, in returns."""
    if plan.risk is None:
        return None
    expected = plan.risk.baseline_return
    if expected is None and RETURN in values.metrics:
        expected = float(np.mean(values.metrics[RETURN]))
    if expected is None:
        return None
    return plan.risk.budget * plan.budget * abs(expected - plan.risk.random_return)


def _advice(plan: TrialPlan, values: BaselineValues) -> Advice | None:
    policy: npt.NDArray[np.float64] = values.metrics.get(RETURN, np.array([]))
    if plan.data is None or len(policy) < 2 or plan.data in values.source:
        return None
    returns = dataset_returns(plan.data)
    return None if len(returns) < 2 else recipe_for(returns, policy, None if plan.risk is None else plan.risk.random_return)
