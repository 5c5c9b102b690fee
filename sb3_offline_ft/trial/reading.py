"""Reads the file of a plan strictly."""

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sb3_offline_ft.common.reading import read_text
from sb3_offline_ft.common.strict_yaml import Reader, load_yaml
from sb3_offline_ft.common.suggestions import hint, suggestion
from sb3_offline_ft.trial.plan import (
    AGGREGATES,
    DIRECTIONS,
    PLAN_FILE,
    RETURN,
    STAGE_KINDS,
    AbortRules,
    ActionBounds,
    Blocks,
    Costs,
    ErrorRates,
    Guardrail,
    Limit,
    Metric,
    Primary,
    Risk,
    Robustness,
    Stage,
    TrialPlan,
    kind_of,
)

_SOURCE = re.compile(r"(info|column)\.\S.*")
MOST_EPISODES = 100_000
MOST_SEED = 2**64 - 1
Section = TypeVar("Section", ErrorRates, Costs)


def read_plan(path: str | Path) -> TrialPlan:
    """
    Read the plan of a trial. No policy and no data is read.

    :param path: The file, or the folder that has it as ``trial.yml``
    :return: The plan
    :raises FileNotFoundError: There is no such file
    :raises ValueError: Something in it is wrong; the message names the key, what was expected and what was found
    """
    file = Path(path).expanduser()
    file = file / PLAN_FILE if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(
            f"There is no trial in {str(path)!r}, as it has no {PLAN_FILE}: write one with `sb3-offline-ft trial init {path} "
            "--baseline ... --candidate ...`."
        )
    return parse_plan(load_yaml(read_text(file), file), file)


def parse_plan(content: Any, file: Path) -> TrialPlan:
    """
    :param content: What a plan's file says; :meth:`TrialPlan.as_mapping` gives it back
    :param file: Where it is from, for messages
    :return: The plan
    :raises ValueError: As for :func:`read_plan`
    """
    return _PlanReader(file).plan(content)


class _PlanReader(Reader):
    """Reads the sections of a plan."""

    def plan(self, content: Any) -> TrialPlan:
        if not isinstance(content, Mapping):
            raise ValueError(f"{self.file}: must have keys such as baseline, candidate and stages, found {content!r}.")
        given = self.mapping(content, "", [one.name for one in fields(TrialPlan)])
        for key in ("baseline", "candidate", "primary", "budget", "stages"):
            if given.get(key) is None:
                self.fail(key, "is missing, and a trial needs it.")
        env = self.optional_text(given.get("env"), "env")
        metrics = self.metrics(given.get("metrics"), env)
        budget = self.section(given["budget"], "budget", ("episodes",), ("episodes",))
        plan = TrialPlan(
            baseline=self.text(given["baseline"], "baseline"),
            candidate=self.text(given["candidate"], "candidate"),
            primary=self.primary(given["primary"], metrics),
            budget=self.whole(budget["episodes"], "budget.episodes", 1, MOST_EPISODES),
            stages=self.stages(given["stages"]),
            metrics=metrics,
            guardrails=self.guardrails(given.get("guardrails"), metrics),
            env=env,
            env_kwargs=self.mapping(given.get("env_kwargs"), "env_kwargs"),
            seed=self.whole(given.get("seed", 0), "seed", 0, MOST_SEED),
            data=self.optional_text(given.get("data"), "data"),
            columns=self.optional_text(given.get("columns"), "columns"),
            action_bounds=self.action_bounds(given.get("action_bounds"), env),
            regime=None if given.get("regime") is None else self.source(given["regime"], "regime", env),
            currency=self.text(given.get("currency", "EUR"), "currency"),
            error_rates=self.numbers(given.get("error_rates"), "error_rates", ErrorRates, below=1.0),
            costs=self.numbers(given.get("costs"), "costs", Costs),
            risk=self.risk(given.get("risk")),
            blocks=self.blocks(given.get("blocks")),
            abort=self.abort(given.get("abort"), env),
            robustness=self.robustness(given.get("robustness"), env),
            sign_off=self.texts(given.get("sign_off"), "sign_off"),
        )
        planned = sum(stage.episodes for stage in plan.stages if stage.kind != "shadow")
        if planned > plan.budget:
            self.fail(
                "budget.episodes", f"is {plan.budget}, but the stages after shadow have {planned} episodes: raise it to "
                f"{planned} or more, or shorten a stage."
            )  # fmt: skip
        return plan

    def section(self, value: Any, key: str, known: Collection[str], needed: Collection[str] = ()) -> dict[str, Any]:
        """A mapping without keys that say nothing, in which some may not be missing."""
        given = {name: one for name, one in self.mapping(value, key, known).items() if one is not None}
        for name in needed:
            if name not in given:
                self.fail(f"{key}.{name}", "is missing.")
        return given

    def optional_text(self, value: Any, key: str) -> str | None:
        return None if value is None else self.text(value, key)

    def texts(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value or [], list):
            self.fail(key, f"must be a list, found {value!r}.")
        return tuple(self.text(one, f"{key}[{index}]") for index, one in enumerate(value or []))

    def choice(self, value: Any, key: str, known: Collection[str]) -> str:
        if value not in known:
            self.fail(key, f"must be one of {', '.join(known)}, found {value!r}.")
        return str(value)

    def at_least(self, value: Any, key: str, least: float, above: bool = False) -> float:
        number = self.number(value, key)
        if number < least or (above and number == least):
            self.fail(key, f"must be {'above' if above else 'at least'} {least:g}, found {value!r}.")
        return number

    def numbers(self, value: Any, key: str, kind: type[Section], below: float | None = None) -> Section:
        """A section of numbers that are at least 0, or within (0, ``below``)."""
        given = self.section(value, key, [one.name for one in fields(kind)])
        numbers = {name: self.at_least(one, f"{key}.{name}", 0.0, above=below is not None) for name, one in given.items()}
        for name, number in numbers.items():
            if below is not None and number >= below:
                self.fail(f"{key}.{name}", f"must be below {below:g}, found {number!r}.")
        return kind(**numbers)

    def source(self, value: Any, key: str, env: str | None) -> str | None:
        """Where a value of each step comes from."""
        if value is None and env is None:
            return None
        if value != "reward" and not (isinstance(value, str) and _SOURCE.fullmatch(value)):
            self.fail(key, f"must be reward, info.<key> or column.<name>, found {value!r}.")
        if value.startswith("column.") and env is not None:
            self.fail(key, f"is {value!r}, but episodes of {env} have no columns: expected info.<key> or reward.")
        if value.startswith("info.") and env is None:
            self.fail(key, f"is {value!r}, but without `env` there is no info: expected column.<name> or reward.")
        return str(value)

    def metrics(self, value: Any, env: str | None) -> tuple[Metric, ...]:
        given = self.mapping(value, "metrics")
        metrics = {RETURN: Metric(RETURN, "reward")}
        for name, entry in given.items():
            key = f"metrics.{name}"
            known = ("unit", "value_per_unit") if name == RETURN else ("from", "aggregate", "better", "unit", "value_per_unit")
            said = self.section(entry, key, known)
            metrics[name] = Metric(
                name,
                "reward" if name == RETURN else self.source(said.get("from"), f"{key}.from", env),
                self.choice(said.get("aggregate", "sum"), f"{key}.aggregate", AGGREGATES),
                self.choice(said.get("better", "higher"), f"{key}.better", DIRECTIONS),
                self.text(said["unit"], f"{key}.unit") if said.get("unit") else "",
                self.number(said.get("value_per_unit", 0.0), f"{key}.value_per_unit"),
            )
        return tuple(metrics.values())

    def known_metric(self, value: Any, key: str, metrics: tuple[Metric, ...]) -> str:
        names = [metric.name for metric in metrics]
        if value not in names:
            self.fail(key, f"is {value!r}, which is none of `metrics`. {suggestion(str(value), names)}")
        return str(value)

    def primary(self, value: Any, metrics: tuple[Metric, ...]) -> Primary:
        known = [one.name for one in fields(Primary)]
        given = self.section(value, "primary", known, known)
        metric = self.known_metric(given["metric"], "primary.metric", metrics)
        return Primary(metric, self.at_least(given["smallest_effect"], "primary.smallest_effect", 0.0, above=True))

    def guardrails(self, value: Any, metrics: tuple[Metric, ...]) -> tuple[Guardrail, ...]:
        rails = []
        for name, entry in self.mapping(value, "guardrails").items():
            key = f"guardrails.{name}"
            given = self.section(entry, key, ("margin", "limit"))
            if len(given) != 1:
                self.fail(key, f"must have either a margin or a limit, found {entry!r}.")
            margin, limit = given.get("margin"), given.get("limit")
            rails.append(
                Guardrail(
                    self.known_metric(name, key, metrics),
                    None if margin is None else self.at_least(margin, f"{key}.margin", 0.0),
                    None if limit is None else self.number(limit, f"{key}.limit"),
                )
            )
        return tuple(rails)

    def risk(self, value: Any) -> Risk | None:
        if value is None:
            return None
        known = [one.name for one in fields(Risk)]
        given = self.section(value, "risk", known, known[:3])
        risk = Risk(**{name: self.number(one, f"risk.{name}") for name, one in given.items()})
        self.at_least(risk.budget, "risk.budget", 0.0, above=True)
        highest = min(risk.random_return, risk.random_return if risk.baseline_return is None else risk.baseline_return)
        if risk.worst_return > highest:
            self.fail("risk.worst_return", f"must be at most the other returns of `risk`, found {risk.worst_return!r}.")
        return risk

    def stages(self, value: Any) -> tuple[Stage, ...]:
        if not isinstance(value, list) or not value:
            self.fail("stages", f"must be a list of stages, found {value!r}.")
        stages = [self.stage(entry, f"stages[{index}]") for index, entry in enumerate(value)]
        for before, after in itertools.pairwise(stages):
            if STAGE_KINDS.index(after.kind) < STAGE_KINDS.index(before.kind):
                self.fail(
                    "stages", f"must come in the order {', '.join(STAGE_KINDS)}: {after.name!r} is after {before.name!r}."
                )
        names = [stage.name for stage in stages]
        if twice := [name for name in names if names.count(name) > 1]:
            self.fail("stages", f"has two that are called {twice[0]!r}: each needs a name of its own.")
        if not any(stage.compares for stage in stages):
            self.fail("stages", "must have a pilot or a ramp: only there baseline and candidate are compared.")
        return tuple(stages)

    def stage(self, entry: Any, key: str) -> Stage:
        given = self.section(entry, key, [one.name for one in fields(Stage)], ("name", "episodes"))
        name = self.text(given["name"], f"{key}.name")
        if (kind := kind_of(name)) not in STAGE_KINDS:
            self.fail(f"{key}.name", f"must begin with the kind of the stage, found {name!r}: {hint(kind, STAGE_KINDS)}")
        fixed = {"shadow": 0.0, "full": 1.0}.get(kind)
        if fixed is None and "share" not in given:
            self.fail(f"{key}.share", "is missing: the candidate's share of the episodes.")
        stage = Stage(
            name,
            self.whole(given["episodes"], f"{key}.episodes", 1, MOST_EPISODES),
            self.number(given.get("share", fixed), f"{key}.share"),
            self.truth(given.get("supervised", False), f"{key}.supervised"),
        )
        if fixed is not None and stage.share != fixed:
            self.fail(f"{key}.share", f"must be {fixed:g} in {name!r}, found {stage.share:g}.")
        if fixed is None and not 0 < stage.share < 1:
            self.fail(f"{key}.share", f"must be above 0 and below 1, found {stage.share:g}.")
        if stage.compares and not 1 <= int(stage.share * stage.episodes + 0.5) < stage.episodes:
            self.fail(
                f"{key}.episodes", f"is {stage.episodes}, too few for a share of {stage.share:g}: each policy needs at least "
                "one episode."
            )  # fmt: skip
        return stage

    def blocks(self, value: Any) -> Blocks:
        given = self.section(value, "blocks", [one.name for one in fields(Blocks)])
        return Blocks(
            self.whole(given.get("episodes", 4), "blocks.episodes", 2, MOST_EPISODES),
            self.whole(given.get("wash_in_steps", 0), "blocks.wash_in_steps", 0),
        )

    def action_bounds(self, value: Any, env: str | None) -> ActionBounds | None:
        if value is None:
            return None
        if env is not None:
            self.fail("action_bounds", f"is for logs: the bounds of {env} are those of its actions. Leave it out.")
        known = [one.name for one in fields(ActionBounds)]
        given = self.section(value, "action_bounds", known, known)
        sides = {side: one if isinstance(one, list) and one else [one] for side, one in given.items()}
        bounds = ActionBounds(
            **{side: tuple(self.number(one, f"action_bounds.{side}") for one in of) for side, of in sides.items()}
        )
        n = max(len(bounds.low), len(bounds.high))
        if {len(bounds.low), len(bounds.high)} - {1, n} or np.any(np.less_equal(bounds.high, bounds.low)):
            self.fail("action_bounds", f"must have a low below its high for each action, or one for all, found {value!r}.")
        return bounds

    def robustness(self, value: Any, env: str | None) -> Robustness | None:
        if value is None:
            return None
        if env is None:
            self.fail("robustness", "needs an environment that can be changed: name `env`, or leave it out.")
        given = self.section(value, "robustness", [one.name for one in fields(Robustness)])
        perturb = None if (named := given.get("perturb")) is None else self.mapping(named, "robustness.perturb")
        for name, levels in (perturb or {}).items():
            if not isinstance(levels, list):
                self.fail(f"robustness.perturb.{name}", f"must be a list of levels, found {levels!r}: [] for the usual ones.")
        levels = {
            name: tuple(self.number(level, f"robustness.perturb.{name}[{i}]") for i, level in enumerate(of))
            for name, of in (perturb or {}).items()
        }
        return Robustness(
            self.whole(given.get("seeds", 10), "robustness.seeds", 1, MOST_EPISODES),
            None if perturb is None else tuple(levels.items()),
        )

    def abort(self, value: Any, env: str | None) -> AbortRules:
        given = self.section(value, "abort", [one.name for one in fields(AbortRules)])
        limits = []
        for name, entry in self.mapping(given.get("limits"), "abort.limits").items():
            key = f"abort.limits.{name}"
            bounds = {
                bound: self.number(one, f"{key}.{bound}") for bound, one in self.section(entry, key, ("min", "max")).items()
            }
            if not bounds or bounds.get("min", -float("inf")) > bounds.get("max", float("inf")):
                self.fail(key, f"must have a min, a max or both, the min not above the max, found {entry!r}.")
            limits.append(Limit(str(self.source(name, key, env)), bounds.get("min"), bounds.get("max")))
        beyond = given.get("actions_beyond")
        return AbortRules(
            tuple(limits),
            self.whole(given.get("most", 1), "abort.most", 0),
            None if beyond is None else self.at_least(beyond, "abort.actions_beyond", 0.0),
        )
