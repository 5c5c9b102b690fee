"""The plan of a trial: what ``trial.yml`` says. It is read by ``reading.py``."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sb3_offline_ft.common.json_form import json_form
from sb3_offline_ft.common.suggestions import hint

PLAN_FILE = "trial.yml"
RETURN = "return"
"""The metric that each trial has: the sum of rewards of an episode."""
AGGREGATES = ("sum", "mean", "min", "max", "last")
DIRECTIONS = ("higher", "lower")
STAGE_KINDS = ("shadow", "pilot", "ramp", "full")
"""First words of the names of stages, in the order in which they come."""
COMPARED = ("pilot", "ramp")


@dataclass(frozen=True)
class Metric:
    """
    What is measured of an episode.

    :param name: Its name
    :param source: ``reward``, ``info.<key>`` or ``column.<name>``, a value of each step; None if it comes with
        ``trial record --metric``
    :param aggregate: How the values of the steps become one: sum, mean, min, max or last
    :param better: ``higher`` or ``lower``
    :param unit: Its unit, in words
    :param value_per_unit: What an improvement by one unit in one episode is worth, in the currency of the plan
    """

    name: str
    source: str | None = None
    aggregate: str = "sum"
    better: str = "higher"
    unit: str = ""
    value_per_unit: float = 0.0

    @property
    def sign(self) -> int:
        """1 if higher values are better, else -1."""
        return 1 if self.better == "higher" else -1


@dataclass(frozen=True)
class Primary:
    """
    The metric that decides.

    :param metric: Its name
    :param smallest_effect: The smallest improvement of the mean that is worth having, in units of the metric, above 0
    """

    metric: str
    smallest_effect: float


@dataclass(frozen=True)
class Guardrail:
    """
    A metric that must not become worse.

    :param metric: Its name
    :param margin: By how much the candidate's mean may be worse than the baseline's, in units of the metric
    :param limit: Instead, the worst mean that the candidate may have
    """

    metric: str
    margin: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class ErrorRates:
    """
    Probabilities of wrong decisions.

    :param false_go: Of a go for a candidate that is not better
    :param missed: Of no go for one that is better by the smallest effect
    :param false_stop: Of stopping early because of one that is not worse
    """

    false_go: float = 0.05
    missed: float = 0.2
    false_stop: float = 0.01


@dataclass(frozen=True)
class Costs:
    """
    What a trial and what follows cost, in the currency of the plan.

    :param episode: An episode
    :param supervision: Besides, one that is supervised
    :param minutes: How long an episode takes
    :param episodes_per_year: How many there are in service
    :param deployment: Once, to put the candidate into service
    """

    episode: float = 0.0
    supervision: float = 0.0
    minutes: float = 0.0
    episodes_per_year: float = 0.0
    deployment: float = 0.0


@dataclass(frozen=True)
class Risk:
    """
    What the candidate may lose during the trial, of the return.

    :param budget: All its episodes together may lose this times the number of episodes of the budget, in total losses: a total
        loss is falling from the baseline's mean return to that of a random policy in one episode
    :param random_return: Mean return of a random policy
    :param worst_return: What an episode returns at the least
    :param baseline_return: Mean return of the baseline; that of its first episodes in the trial if None
    """

    budget: float
    random_return: float
    worst_return: float
    baseline_return: float | None = None


@dataclass(frozen=True)
class Stage:
    """
    A part of the trial.

    :param name: Its name, which begins with shadow, pilot, ramp or full
    :param episodes: How many episodes it has, of both policies
    :param share: Share of them in which the candidate acts
    :param supervised: Whether somebody watches, which costs ``costs.supervision`` an episode
    """

    name: str
    episodes: int
    share: float
    supervised: bool = False

    @property
    def kind(self) -> str:
        """Shadow, pilot, ramp or full."""
        return kind_of(self.name)

    @property
    def compares(self) -> bool:
        """Whether baseline and candidate alternate in blocks, so that they can be compared."""
        return self.kind in COMPARED


def kind_of(stage: str) -> str:
    """The kind of a stage, by its name."""
    return stage.split()[0]


@dataclass(frozen=True)
class Blocks:
    """
    How the policies alternate.

    :param episodes: Episodes of a block; larger where the share asks for it, so that each block has both policies
    :param wash_in_steps: First steps of an episode that are left out of the metrics
    """

    episodes: int = 4
    wash_in_steps: int = 0


@dataclass(frozen=True)
class Limit:
    """
    A limit within an episode.

    :param source: As of a metric
    :param min: The smallest value that a step may have
    :param max: The largest
    """

    source: str
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class ActionBounds:
    """
    Between which values the actions of a log lie.

    :param low: Lower bound of each action, or one for all
    :param high: Upper bound of each action, or one for all
    """

    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Robustness:
    """
    What both policies are tried in before the candidate acts.

    :param seeds: Episodes at each level
    :param perturb: What is changed, each with its levels, none for its usual ones; None for all that the environment has
    """

    seeds: int = 10
    perturb: tuple[tuple[str, tuple[float, ...]], ...] | None = None


@dataclass(frozen=True)
class AbortRules:
    """
    When the baseline takes over within an episode of the candidate.

    :param limits: What the steps have to keep
    :param most: How many aborts there may be before the trial ends with no-go
    :param actions_beyond: How far an action may lie beyond its bounds, in shares of its range; None for any distance
    """

    limits: tuple[Limit, ...] = ()
    most: int = 1
    actions_beyond: float | None = None


@dataclass(frozen=True)
class TrialPlan:
    """
    The plan of a trial; made by :func:`~sb3_offline_ft.trial.read_plan`.

    :param baseline: Spec of the policy that runs today
    :param candidate: Spec of the policy that is tried
    :param primary: What decides
    :param budget: The largest number of episodes of both, in all stages but shadow, without those besides, such as drills
    :param stages: The stages in order
    :param metrics: All metrics, the return first
    :param guardrails: What must not become worse
    :param env: Gymnasium id of the environment, None for a system without one
    :param env_kwargs: Its arguments
    :param seed: Seed of the order of policies, and of the environment's episodes
    :param data: Spec of a dataset of the baseline
    :param columns: File with the column map of logs, for ``trial record --csv``
    :param action_bounds: Bounds of the actions in the logs, None if they have no actions
    :param regime: ``info.<key>`` or ``column.<name>`` that names the operating regime of an episode
    :param currency: Of all costs and values
    :param error_rates: Probabilities of wrong decisions
    :param costs: What it costs
    :param risk: What the candidate may lose, None for any loss
    :param blocks: How the policies alternate
    :param abort: When the baseline takes over
    :param robustness: What both policies are tried in first, None for nothing
    :param sign_off: Who signs
    """

    baseline: str
    candidate: str
    primary: Primary
    budget: int
    stages: tuple[Stage, ...]
    metrics: tuple[Metric, ...] = (Metric(RETURN, "reward"),)
    guardrails: tuple[Guardrail, ...] = ()
    env: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    data: str | None = None
    columns: str | None = None
    action_bounds: ActionBounds | None = None
    regime: str | None = None
    currency: str = "EUR"
    error_rates: ErrorRates = ErrorRates()
    costs: Costs = Costs()
    risk: Risk | None = None
    blocks: Blocks = Blocks()
    abort: AbortRules = AbortRules()
    robustness: Robustness | None = None
    sign_off: tuple[str, ...] = ()

    def metric(self, name: str) -> Metric:
        """
        :param name: Name of a metric
        :return: The metric
        :raises ValueError: There is no such metric
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise ValueError(f"There is no metric {name!r}: {hint(name, [each.name for each in self.metrics])}")

    def sign(self, name: str) -> int:
        """1 if higher values of a metric are better, else -1; ``ValueError`` if there is no such metric."""
        return self.metric(name).sign

    @property
    def needed_metrics(self) -> set[str]:
        """Names of the metrics without which an episode says nothing: what is decided by, and what is at risk."""
        at_risk = set() if self.risk is None else {RETURN}
        return {self.primary.metric, *(rail.metric for rail in self.guardrails)} | at_risk

    @property
    def compared_episodes(self) -> int:
        """How many episodes the stages have in which baseline and candidate are compared."""
        return sum(stage.episodes for stage in self.stages if stage.compares)

    def as_mapping(self) -> dict[str, Any]:
        """The plan as its file would say it, with every key, in the form of JSON."""
        content = asdict(self)
        content["metrics"] = {}
        for metric in self.metrics:
            facts = asdict(metric)
            said = {"from": facts.pop("source"), **facts}
            kept = ("unit", "value_per_unit") if facts.pop("name") == RETURN else ("from", *facts)
            content["metrics"][metric.name] = {key: said[key] for key in kept}
        content["guardrails"] = {
            rail.metric: {"margin": rail.margin} if rail.limit is None else {"limit": rail.limit} for rail in self.guardrails
        }
        content["budget"] = {"episodes": self.budget}
        content["abort"]["limits"] = {
            limit.source: {key: bound for key in ("min", "max") if (bound := getattr(limit, key)) is not None}
            for limit in self.abort.limits
        }
        if self.robustness is not None and self.robustness.perturb is not None:
            content["robustness"]["perturb"] = dict(self.robustness.perturb)
        form: dict[str, Any] = json_form(content)
        return form

    @property
    def digest(self) -> str:
        """64 hexadecimal digits, equal for plans that say the same."""
        return hashlib.sha256(json.dumps(self.as_mapping(), sort_keys=True).encode()).hexdigest()


def differences(before: TrialPlan, after: TrialPlan) -> list[str]:
    """What differs between two plans, a text such as ``"budget.episodes: 80 -> 120"`` for each key."""
    old, new = _flat(before.as_mapping()), _flat(after.as_mapping())
    texts = ((key, json.dumps(old.get(key, "(none)")), json.dumps(new.get(key, "(none)"))) for key in old | new)
    return [f"{key}: {one} -> {other}" for key, one, other in texts if one != other]


def _flat(content: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(content, dict | list) or not content:
        return {key: content}
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return {path: value for name, one in entries for path, value in _flat(one, f"{key}.{name}" if key else str(name)).items()}
