"""
Measure whether the promises of ``ChampionChallenger`` are kept, and what proof costs.

    python benchmarks/deployment/promises.py             # measure what is missing, then write the tables
    python benchmarks/deployment/promises.py --report    # write the tables from the results that are there

Results are saved after each cell, and cells of the present code that are there are skipped. All of it takes about three
minutes on one core.
"""

import argparse
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, t
from tqdm import tqdm

from sb3_offline_ft.collapse.detectors import betting, ranks
from sb3_offline_ft.common.io import atomic_write
from sb3_offline_ft.deployment import budget as budget_of_risk
from sb3_offline_ft.deployment import contest, promotion, roles, rules
from sb3_offline_ft.deployment.contest import Contest
from sb3_offline_ft.deployment.roles import Contender, Episode, Kind
from sb3_offline_ft.deployment.rules import CONTROLS, Rules

HERE = Path(__file__).parent
sys.path.append(str(HERE))
import simulation  # noqa: E402  # as in the other benchmarks
from simulation import HEAVY, STREAMS, WORLDS, Book, play, simulated_promotions  # noqa: E402

RESULTS, TABLES = HERE / "promises.json", HERE / "promises.md"
N_BUDGETS, N_BASELINES, N_RUNS, N_POWER = 10_000, 20_000, 2000, 100
N_EPISODES, LONGEST = 40, 100
LEVEL = 0.05
"""Of the first test of a run with the default rate."""
LEADS, SPREADS = (0.1, 0.25, 0.5, 1.0), (0.05, 0.1, 0.3, 0.5)
MEASURED = (
    ("historical", "normal"),
    ("concurrent", "normal"),
    ("historical", "rise of 4 in a run"),
    ("historical", "binary"),
    ("historical", HEAVY),
    ("historical", "rise of 2 in a run"),
    ("concurrent", "rise of 4 in a run"),
    ("historical", "bimodal (falls)"),
    ("historical", "crossing (outside the promise)"),
    ("historical", "rise of 1 in a run"),
    ("concurrent", HEAVY),
    ("concurrent", "binary"),
    ("historical", "4 places, short challengers"),
)
"""What the rate of false promotions is measured of."""
MEASURED_CODE = (contest, roles, rules, promotion, budget_of_risk, betting, ranks, simulation)

Cell = dict[str, Any]


# Promise 1


def adversary(rng: np.random.Generator, expected: float, worst: float) -> Callable[[Kind, int], float]:
    """A learner that wants the promise to be broken: returns of episodes by kind and index."""
    gain, start, way = abs(expected - worst), int(rng.integers(100)), rng.integers(5)

    def total(kind: Kind, i: int) -> float:
        good = expected + gain * rng.exponential()
        if kind is Kind.SERVE and i < 10:
            return float(rng.normal(expected, gain))
        if way == 0:
            return worst if kind is not Kind.SERVE else good
        if way == 1:
            return float(rng.uniform(worst, worst + 4 * gain))
        if way == 2:
            # Good until it is trusted, and lost from then on
            return good if i < start else worst
        if way == 3:
            return good if kind is Kind.TRIAL and rng.random() < 0.9 else worst
        return good if (i // 5) % 2 else worst

    return total


def budget_run(seed: int) -> tuple[bool, float, int]:
    """Whether the budget was kept at each moment of a run, the largest share of it used, and episodes at risk."""
    rng = np.random.default_rng(seed)
    worst, random = rng.normal(0, 100, 2)
    worst = random if rng.random() < 0.5 else min(worst, random)
    total = adversary(rng, random + rng.choice([-1, 1]) * rng.exponential(100), worst)
    rules = Rules(float(rng.uniform(0, 1)), random, worst, canary_envs=2 if rng.random() < 0.2 else None)
    n_places = int(rng.integers(1, 9))
    contest = Contest(rules, Contender(0), n_places, seed)
    book, is_kept, scale = Book(contest), True, math.exp(rng.normal())
    for part in range(2):
        # The second part goes on from the state that the first left, in the middle of its episodes
        if part:
            state, book.contest = contest.state_dict(), Contest(rules, Contender(0), n_places, seed)
            book.contest.load_state_dict(state, dict.fromkeys(state["contenders"]))
            contest = book.contest
            book.cut_off(worst)
        episodes = play(
            contest,
            25,
            rng,
            lambda: Contender(1),
            lambda episode, i: max(worst, total(episode.actor, i)),
            lambda episode: float(rng.exponential(scale if episode.kind is Kind.TRIAL else 1.0)),
            explores=bool(seed % 2),
            began=book.begin,
        )
        for episode in episodes:
            book.end(episode.place, episode.total)
            is_kept &= book.is_kept
            if rng.random() < 0.02:
                contest.stop_trial(episode.place, "broken")
    return is_kept, book.largest_share, book.n_at_risk


def budget() -> Cell:
    runs = [budget_run(seed) for seed in range(N_BUDGETS)]
    return {
        "runs": len(runs),
        "broken": sum(not is_kept for is_kept, _, _ in runs),
        "at_risk": sum(n for _, _, n in runs),
        "largest_share": max(share for _, share, _ in runs),
    }


def baseline(name: str) -> Cell:
    """How often the mean of all episodes lies in the interval of ten, and beyond how many standard errors 5 % lie."""
    rng, policy = np.random.default_rng(0), WORLDS[name].champion(1.0)
    returns = np.array([[policy.draw(rng) for _ in range(10)] for _ in range(N_BASELINES)])
    errors = np.maximum(returns.std(axis=1, ddof=1), 1e-12) / math.sqrt(10)
    off = np.abs(returns.mean(axis=1) - 1.0) / errors
    return {"normal": float((off <= 1.96).mean()), "student": float((off <= t.ppf(0.975, 9)).mean()), "runs": N_BASELINES}


# Promise 2


def promotions(controls: str, name: str, stream: str) -> Cell:
    """Runs with any promotion to a policy that is not better in mean, or is worse by more than a tenth of a total loss."""
    rules = Rules(risk_budget=0.99, controls=controls)
    counts = {"runs": N_RUNS, "not_better": 0, "worse": 0, "promotions": 0, "tests": 0, "rejections": 0, "trial_episodes": 0}
    for seed in range(N_RUNS):
        verdicts, contest = simulated_promotions(WORLDS[name], STREAMS[stream], rules, N_EPISODES, seed)
        gains = [one.contender.policy.mean - one.champion.policy.mean for one in verdicts if one.kind == "promotion"]
        rejected = [one for one in verdicts if one.kind == "rejection"]
        counts["not_better"] += any(gain <= 0 for gain in gains)
        counts["worse"] += any(gain < -0.1 for gain in gains)
        counts["promotions"] += len(gains)
        counts["tests"] += contest.n_tests
        counts["rejections"] += len(rejected)
        counts["trial_episodes"] += sum(len(one.contender.returns) for one in rejected)
    return counts


def power(lead: float, spread: float) -> Cell:
    """
    Episodes until a promotion, from the first trial on, when all challengers are better by this lead; beside the sequential
    tests that know both distributions.
    """

    def policy(mean: float) -> simulation.Policy:
        return simulation.Policy(mean, lambda rng: rng.normal(mean, spread))

    world, cell = simulation.World(policy, policy), Cell(runs=N_POWER)
    for controls in CONTROLS:
        runs = [until_promotion(world, lead, controls, seed) for seed in range(N_POWER)]
        cell[controls] = {
            "promoted": sum(math.isfinite(n) for _, _, n in runs) / N_POWER,
            "first_promoted": sum(is_first for is_first, _, _ in runs) / N_POWER,
            "trials": finite(np.median([n for _, n, _ in runs])),
            "episodes": finite(np.median([n for _, _, n in runs])),
        }
    rng, d = np.random.default_rng(0), lead / spread
    # Of the coin, and of the challenger's returns alone
    coins, longest = rng.random((N_POWER, 4000)) < 0.5, math.log(1 / LEVEL)
    scores = rng.normal(size=coins.shape) + d * coins
    odds = d * (scores - d / 2)
    coin = np.log(2.0) - np.logaddexp(0, np.where(coins, -odds, odds))
    alone = d * (rng.normal(size=coins.shape) + d / 2)
    return cell | {
        "known": finite(np.median(passage(coin, longest))),
        "challenger_only": finite(np.median(passage(alone, longest))),
    }


def finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def passage(gains: np.ndarray, threshold: float) -> np.ndarray:
    """When the sums of each row first reach a threshold, from 1; infinite if they do not."""
    reached = np.cumsum(gains, axis=1) >= threshold
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def until_promotion(world: simulation.World, lead: float, controls: str, seed: int) -> tuple[bool, float, float]:
    """Whether the first challenger is promoted; episodes of trials, and all episodes, until anyone is."""
    rng, rules = np.random.default_rng(seed), Rules(controls=controls)
    contest, n_verdicts, n_trials = Contest(rules, Contender(0, world.champion(1.0)), 1, seed), 0, 0
    challenger = world.challenger(1.0 + lead)

    def total(episode: Episode, i: int) -> float:
        policy: simulation.Policy = contest.contenders[episode.role].policy
        return policy.draw(rng)

    for i, episode in enumerate(play(contest, LONGEST, rng, lambda: Contender(1, challenger), total)):
        n_trials += episode.kind is Kind.TRIAL
        # Newer policies that do not overtake the challenger end nothing
        n_verdicts += episode.verdict is not None and episode.verdict.reason != "behind the challenger"
        if episode.verdict is not None and episode.verdict.kind == "promotion":
            return n_verdicts == 1, n_trials, i + 1.0 - rules.baseline_episodes
    return False, math.inf, math.inf


# Results


def code() -> str:
    """Of what is measured: cells of other code are measured again."""
    sources = [inspect.getsource(part).encode() for part in MEASURED_CODE]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def cells() -> dict[str, Callable[[], Cell]]:
    made: dict[str, Callable[[], Cell]] = {"budget": budget}
    for name, world in WORLDS.items():
        if world.drift is simulation.still and world.challenger is world.champion:
            made[f"baseline/{name}"] = partial(baseline, name)
    for controls, name in MEASURED:
        for stream in STREAMS if (controls, name) == ("historical", "normal") else ("equal",):
            made[f"promotions/{controls}/{name}/{stream}"] = partial(promotions, controls, name, stream)
    for lead in LEADS:
        for spread in SPREADS:
            made[f"power/{lead:g}/{spread:g}"] = partial(power, lead, spread)
    return made


def measured(key: str) -> Cell:
    return cells()[key]() | {"code": code()}


def percent(count: int, n: int) -> str:
    low, high = binomtest(count, n).proportion_ci(0.95, "exact")
    return f"{100 * count / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def shown(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f}"


def report(results: dict[str, Cell]) -> str:
    known = results["budget"]
    lines = ["# Whether the promises of ChampionChallenger are kept", ""]
    lines += ["Written by `promises.py`; a total loss is 1: the champion returns 1, a random policy 0.", ""]
    lines += ["## The risk budget", ""]
    lines += [
        f"{known['runs']:,} runs with adversarial learners, random budgets, 1 to 8 places, and an interruption in the middle: "
        f"{known['broken']} in which it was exceeded at any moment. {known['at_risk']:,} episodes were at risk. The largest "
        f"share of its allowance that any run ever used: {100 * known['largest_share']:.1f} %.",
        "",
        "## The baseline's interval",
        "",
        f"Share of {N_BASELINES:,} baselines of 10 episodes whose 95 % interval contains the mean of all episodes.",
        "",
        "| returns | 1.96 standard errors | Student's t (2.26) |",
        "|---|---|---|",
    ]
    for key, cell in results.items():
        if key.startswith("baseline/"):
            name = key.split("/")[1]
            lines.append(f"| {name} | {100 * cell['normal']:.1f} % | {100 * cell['student']:.1f} % |")
    return "\n".join([*lines, *false_promotions(results), *drifts(results), *costs(results)]) + "\n"


def false_promotions(results: dict[str, Cell]) -> list[str]:
    lines = ["", "## False promotions", ""]
    lines += [
        f"Share of {N_RUNS:,} runs of {N_EPISODES} episodes in which any challenger became champion that was not better in "
        "mean than the champion before, and that was worse by more than 0.1, with the exact 95 % interval (Clopper-Pearson). "
        f"At most {100 * Rules().false_promotion_rate:.0f} % is promised. *Equal*: all are as good as the champion. "
        f"*Mixed*: each is better by one of {', '.join(f'{lead:g}' for lead in STREAMS['mixed'])}, drawn by chance. The last "
        "two columns say how many trials of a run were given up, and after how many of their episodes.",
        "",
        "| returns | controls | challengers | not better | worse by more than 0.1 | promotions a run | given up a run | "
        "their episodes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results.items():
        if key.startswith("promotions/") and WORLDS[key.split("/")[2]].drift is simulation.still:
            _, controls, name, stream = key.split("/")
            n, rejections = cell["runs"], max(1, cell["rejections"])
            lines.append(
                f"| {name} | {controls} | {stream} | {percent(cell['not_better'], n)} | {percent(cell['worse'], n)} | "
                f"{cell['promotions'] / n:.2f} | {cell['rejections'] / n:.1f} | {cell['trial_episodes'] / rejections:.1f} |"
            )
    return lines


def drifts(results: dict[str, Cell]) -> list[str]:
    lines = ["", "## False promotions while returns drift", ""]
    lines += [
        f"The same for *equal* challengers with normal returns, while the returns of both drift in the run of {N_EPISODES} "
        "episodes, in standard deviations of an episode's return. Only concurrent controls promise anything here.",
        "",
        "| drift | historical: not better | concurrent: not better |",
        "|---|---|---|",
    ]
    for name, world in WORLDS.items():
        if world.drift is not simulation.still and any(name == measured_name for _, measured_name in MEASURED):
            found = (results.get(f"promotions/{controls}/{name}/equal") for controls in CONTROLS)
            shares = ("not measured" if cell is None else percent(cell["not_better"], cell["runs"]) for cell in found)
            lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def costs(results: dict[str, Cell]) -> list[str]:
    lines = ["", "## What proof costs", ""]
    lines += [
        "Median number of episodes from the first trial until a promotion, if all challengers are better by *lead*, and "
        f"returns are normal with standard deviation *spread*, with the default budget; {N_POWER} runs. *Trials* are the "
        "episodes of challengers, *all* has those of the champion too. Beside it are the episodes that Wald's tests need at "
        f"level {LEVEL:g}, which know both distributions: of the challenger's episodes only, and of a coin's. Shares are of "
        f"the runs whose first challenger was promoted, and of those in which any was within {LONGEST - 10} episodes.",
        "",
        "| lead | spread | historical: trials | all | first | any | known | concurrent: trials | all | first | any | known |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results.items():
        if key.startswith("power/"):
            row = key.split("/")[1:]
            for controls, known in zip(CONTROLS, ("challenger_only", "known"), strict=True):
                found = cell[controls]
                row += [shown(found["trials"]), shown(found["episodes"])]
                row += [f"{100 * found[name]:.0f} %" for name in ("first_promoted", "promoted")]
                row.append(shown(cell[known]))
            lines.append(f"| {' | '.join(row)} |")
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
