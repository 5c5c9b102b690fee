"""
Measure how often the decision of a trial is wrong, and how often a better candidate passes.

    python benchmarks/trial/error_rates.py             # measure what is missing, then write the tables
    python benchmarks/trial/error_rates.py --report    # write the tables from the results that are there

Results are saved after each cell, and cells of the present code that are there are skipped. All of it takes about five minutes
on one core.
"""

import argparse
import hashlib
import inspect
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.deployment import budget, promotion
from sb3_offline_ft.trial import assignment, comparison, decision, evidence, machine, simulation
from sb3_offline_ft.trial.plan import Guardrail, Metric, Primary, Risk, Stage, TrialPlan
from sb3_offline_ft.trial.simulation import Episodes, simulate

HERE = Path(__file__).parent
RESULTS, TABLES = HERE / "error_rates.json", HERE / "error_rates.md"
N_TRIALS = 2000
EFFECT = 0.75
"""The smallest effect worth having, in standard deviations of an episode."""
Generator = np.random.Generator
Array = np.ndarray
Cell = dict[str, Any]

PLAN = TrialPlan(
    baseline="baseline",
    candidate="candidate",
    primary=Primary("return", EFFECT),
    budget=62,
    stages=(
        Stage("pilot", 12, 0.25, supervised=True),
        Stage("ramp 10 %", 10, 0.1),
        Stage("ramp 25 %", 12, 0.25),
        Stage("ramp 50 %", 28, 0.5),
    ),
)
ENERGY = Metric("energy", "info.energy", better="lower")


# What episodes return: arrays of the baseline's and the candidate's, the second better by an effect on average


def normal(rng: Generator, n: int, effect: float) -> Array:
    return rng.normal(size=(n, 2)) + np.array([0.0, effect])


def heavy_tailed(rng: Generator, n: int, effect: float) -> Array:
    return rng.standard_t(2.1, size=(n, 2)) / 2 + np.array([0.0, effect])


def bimodal(rng: Generator, n: int, effect: float) -> Array:
    """Every fifth episode is a fall."""
    return np.where(rng.random((n, 2)) < 0.2, -2.0, 0.5) + rng.normal(0, 0.1, (n, 2)) + np.array([0.0, effect])


def binary(rng: Generator, n: int, effect: float) -> Array:
    """Failure and success, as often."""
    return np.where(rng.random((n, 2)) < [0.5, 0.5 + effect / 2], 1.0, -1.0)


def rising(rng: Generator, n: int, effect: float) -> Array:
    """Both rise by 4 standard deviations in a trial."""
    return normal(rng, n, effect) + np.linspace(0, 4, n)[:, None]


def unsteady(rng: Generator, n: int, effect: float) -> Array:
    """The candidate's spread is twice the baseline's."""
    return rng.normal(size=(n, 2)) * np.array([1.0, 2.0]) + np.array([0.0, effect])


@dataclass(frozen=True)
class World:
    """
    :param name: In words
    :param draw: What episodes return
    :param is_promised: Whether the false go is promised for equal candidates
    """

    name: str
    draw: Callable[[Generator, int, float], Array]
    is_promised: bool = True


WORLDS = {
    "normal": World("normal", normal),
    "heavy": World("heavy-tailed (Student's t, 2.1 degrees of freedom)", heavy_tailed),
    "bimodal": World("bimodal (every fifth episode a fall)", bimodal),
    "binary": World("binary (success or failure)", binary),
    "rising": World("drifting (both rise by 4 in a trial)", rising),
    "unsteady": World("normal, the candidate's spread is twice the baseline's", unsteady, is_promised=False),
}
CANDIDATES = {"equal": 0.0, "worse": -EFFECT, "better": EFFECT}
FAR_WORSE = -3.0


def outcomes(world: str, effect: float, plan: TrialPlan = PLAN) -> Cell:
    """How many of many trials ended how."""
    return asdict(simulate(plan, lambda rng, n: {"return": WORLDS[world].draw(rng, n, effect)}, N_TRIALS))


def guarded(kind: str) -> Cell:
    """A candidate that is better by the primary metric, and exactly as bad as it must not be by a guardrail."""
    guardrail = Guardrail("energy", margin=0.5) if kind == "margin" else Guardrail("energy", limit=0.5)
    plan = replace(PLAN, metrics=(*PLAN.metrics, ENERGY), guardrails=(guardrail,))

    def draw(rng: Generator, n: int) -> Episodes:
        return {"return": normal(rng, n, 2 * EFFECT), "energy": -normal(rng, n, -0.5)}

    return asdict(simulate(plan, draw, N_TRIALS))


def with_risk(effect: float) -> Cell:
    """A budget of risk that ends many trials early."""
    plan = replace(PLAN, risk=Risk(0.05, random_return=-5.0, worst_return=-8.0, baseline_return=0.0))
    return outcomes("normal", effect, plan)


def cells() -> dict[str, Callable[[], Cell]]:
    made: dict[str, Callable[[], Cell]] = {}
    for key, world in WORLDS.items():
        for candidate in CANDIDATES if world.is_promised else ("equal",):
            made[f"trials/{key}/{candidate}"] = partial(outcomes, key, CANDIDATES[candidate])
    made["far worse/normal"] = partial(outcomes, "normal", FAR_WORSE)
    for kind in ("margin", "limit"):
        made[f"guardrail/{kind}"] = partial(guarded, kind)
    for candidate in ("equal", "better"):
        made[f"risk/{candidate}"] = partial(with_risk, CANDIDATES[candidate])
    return made


def code() -> str:
    """Of what is measured: cells of other code are measured again."""
    state = machine.TrialMachine
    parts = (
        comparison, evidence, decision, simulation, promotion, budget, machine.TrialBudget, state.next, state._assign,
        state._record, state._risk_now, assignment.schedule, assignment.block_sizes, guarded, with_risk,
        *(world.draw for world in WORLDS.values()),
    )  # fmt: skip
    said = (PLAN.primary, PLAN.budget, PLAN.stages, PLAN.error_rates, PLAN.blocks, PLAN.abort.most)
    sources = [repr(said), *map(inspect.getsource, parts)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def measured(key: str) -> Cell:
    return cells()[key]() | {"code": code()}


# Results


def percent(count: int, n: int) -> str:
    low, high = binomtest(count, n).proportion_ci(0.95, "exact")
    return f"{100 * count / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def shown(cell: Cell | None, name: str) -> str:
    return "not measured" if cell is None else percent(cell[name], N_TRIALS)


def report(results: dict[str, Cell]) -> str:
    rates, sizes = PLAN.error_rates, evidence.design_of(PLAN)
    n, looks = PLAN.compared_episodes, len(sizes.looks)
    lines = ["# How often the decision of a trial is wrong", ""]
    lines += ["Written by `error_rates.py`. An episode's standard deviation is 1 where it has one.", ""]
    stages = ", ".join(f"{stage.name} ({stage.episodes}, share {stage.share:g})" for stage in PLAN.stages)
    lines += [
        f"The plan: {n} episodes in {len(sizes.sizes)} blocks and {looks} looks; stages {stages}; smallest effect worth "
        f"having {EFFECT:g}. Planned are a false go of at most {100 * rates.false_go:g} %, a false stop of at most "
        f"{100 * rates.false_stop:g} %, and {100 * (1 - rates.missed):g} % for a candidate that has the effect, if returns "
        f"are normal. Each number is of {N_TRIALS:,} simulated trials, with the exact 95 % interval (Clopper-Pearson). They "
        "run the state machine and the decision that real trials run.",
        "",
        "## False go and false stop",
        "",
        f"*Equal*: the candidate is as good as the baseline. *Worse*: by {EFFECT:g}. A stop is the test that may end a trial "
        "at any episode.",
        "",
        "| returns | go, equal | go, worse | stop, equal | stop, worse |",
        "|---|---|---|---|---|",
    ]
    for key, world in WORLDS.items():
        cells_of = [results.get(f"trials/{key}/{candidate}") for candidate in ("equal", "worse")]
        shares = [shown(cell, name) for name in ("go", "stopped") for cell in cells_of]
        lines.append(f"| {world.name}{'' if world.is_promised else ' (outside the promise)'} | {' | '.join(shares)} |")
    far = results["far worse/normal"]
    lines += [
        "",
        f"A normal candidate that is worse by {-FAR_WORSE:g} is stopped at an episode in {percent(far['stopped'], N_TRIALS)} "
        f"of the trials, and a trial has {far['episodes']:.1f} episodes on average.",
        "",
        "## Power",
        "",
        f"The candidate is better by {EFFECT:g} on average.",
        "",
        "| returns | go | no-go | not yet | episodes, mean |",
        "|---|---|---|---|---|",
    ]
    for key, world in WORLDS.items():
        if (one := results.get(f"trials/{key}/better")) is not None:
            counts = (one["go"], one["no_go"], N_TRIALS - one["go"] - one["no_go"])
            lines.append(
                f"| {world.name} | {' | '.join(percent(each, N_TRIALS) for each in counts)} | {one['episodes']:.1f} |"
            )
    return "\n".join([*lines, *guardrails(results), *risks(results)]) + "\n"


def guardrails(results: dict[str, Cell]) -> list[str]:
    lines = ["", "## Guardrails", ""]
    lines += [
        f"The candidate's return is better by {2 * EFFECT:g}, and it is exactly as bad by a guardrail as it must not be: "
        "worse by the margin, or at the limit.",
        "",
        "| guardrail | go | no-go |",
        "|---|---|---|",
    ]
    for key, cell in results.items():
        if key.startswith("guardrail/"):
            counts = " | ".join(percent(cell[name], N_TRIALS) for name in ("go", "no_go"))
            lines.append(f"| {key.removeprefix('guardrail/')} | {counts} |")
    return lines


def risks(results: dict[str, Cell]) -> list[str]:
    lines = ["", "## With a risk budget", ""]
    lines += [
        "Normal returns, as above; the trial ends when the budget does not cover another episode of the candidate.",
        "",
        "| candidate | go | no-go | stop | episodes, mean |",
        "|---|---|---|---|---|",
    ]
    for name in ("equal", "better"):
        cell = results[f"risk/{name}"]
        counts = " | ".join(percent(cell[one], N_TRIALS) for one in ("go", "no_go", "stopped"))
        lines.append(f"| {name} | {counts} | {cell['episodes']:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    results: dict[str, Cell] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.report:
        results = {key: cell for key, cell in results.items() if cell["code"] == code()}
        missing = [key for key in cells() if key not in results]
        with ProcessPoolExecutor(arguments.workers) as pool:
            running = {pool.submit(measured, key): key for key in missing}
            for future in tqdm(as_completed(running), total=len(missing)):
                results[running[future]] = future.result()
                with atomic_write(RESULTS) as file:
                    ordered = {key: results[key] for key in cells() if key in results}
                    file.write((json.dumps(ordered, indent=1) + "\n").encode())
    TABLES.write_text(report({key: results[key] for key in cells()}))


if __name__ == "__main__":
    main()
