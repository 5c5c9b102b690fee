"""
Measure what ``make demo`` comes to with other seeds: its command as the Makefile has it, and the champion in fresh episodes.

    python benchmarks/deployment/demo.py             # run what is missing, then write the table
    python benchmarks/deployment/demo.py --report    # write the table from the results that are there

A run takes about two minutes on one core. Results are saved after each.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from tqdm import tqdm

from sb3_offline_ft import TD3C
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.common.io import atomic_write

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "demo.json", HERE / "demo.md"
SEEDS, N_EPISODES, EVALUATION_SEED = range(10), 50, 10_000
VISIBLE = 0.2
"""Of the pretrained policy's mean return, in absolute value: what a lead has to be for eyes to see it."""


def demo_command() -> list[str]:
    """The command of the Makefile, without the interpreter, seed and folder."""
    makefile = (HERE.parents[1] / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(r"^demo:.*\n\t\$\(PY\) (.*)$", makefile, re.MULTILINE)
    assert found is not None
    return shlex.split(re.sub(r"--seed \S+ -f \S+", "", found[1]))


def run(seed: int) -> dict[str, Any]:
    """One demo, and what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["--seed", str(seed), "-f", folder]
        command = demo_command()
        env_id = command[command.index("--env") + 1]
        at = command.index("-params")
        subprocess.run([sys.executable, *command[:at], *chosen, *command[at:]], check=True, stdout=subprocess.DEVNULL)
        (run_folder,) = Path(folder).glob(f"td3c/{env_id}_*")
        events = read_events(run_folder / "deployment_events.jsonl")
        (baseline,) = (event for event in events if event["event"] == "baseline")
        champion = TD3C.load(run_folder / "best_model.zip", device="cpu")
        learner = TD3C.load(run_folder / f"{env_id}.zip", device="cpu")
        found = {}
        for name, model in (("champion", champion), ("learner", learner)):
            env = make_vec_env(env_id, seed=EVALUATION_SEED)
            returns, _ = evaluate_policy(model, env, N_EPISODES, return_episode_rewards=True)
            found[name] = {"mean": float(np.mean(returns)), "standard_error": float(np.std(returns, ddof=1) / N_EPISODES**0.5)}
    served = [event["return"] for event in events if event["event"] == "episode" and event["timestep"] > baseline["timestep"]]
    promotions = [event["timestep"] for event in events if event["event"] == "promotion"]
    return {
        "seed": seed,
        "baseline": {name: baseline[name] for name in ("mean", "standard_error")},
        "served": float(np.mean(served)),
        "promotions": promotions,
        **found,
    }


def is_better(result: dict[str, Any]) -> bool:
    """Whether the champion is better than the pretrained policy for eyes to see."""
    baseline: float = result["baseline"]["mean"]
    return bool(result["champion"]["mean"] - baseline >= VISIBLE * abs(baseline))


def report(results: list[dict[str, Any]], note: str = "") -> str:
    """The table, with what has to be known of the results."""
    n_better = sum(map(is_better, results))
    rows = [
        f"| {one['seed']} | {one['baseline']['mean']:.0f} ± {one['baseline']['standard_error']:.0f} | {one['served']:.0f} | "
        f"{one['champion']['mean']:.0f} ± {one['champion']['standard_error']:.0f} | {one['learner']['mean']:.0f} | "
        f"{', '.join(f'{step:,}' for step in one['promotions']) or 'none'} | {'yes' if is_better(one) else 'no'} |"
        for one in sorted(results, key=lambda one: one["seed"])
    ]
    return (
        "# What the demo comes to\n\nWritten by `demo.py`. "
        f"The champion at the end is better by at least {100 * VISIBLE:.0f} % of the pretrained policy's return with "
        f"{n_better} of {len(results)} seeds. "
        f"Pretrained policy: mean of the warm-up's episodes. Champion and learner: mean of {N_EPISODES} fresh episodes, ± one "
        "standard error. All that acted: mean return of all episodes after the warm-up, trials and explorations included."
        f"{note and f' {note}'}\n\n"
        "| seed | pretrained policy | all that acted | champion | learner | promoted at interaction | better |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS), help="run these only")
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    # Results of another command are of no use
    command = shlex.join(demo_command())
    results = content.get("results", []) if content.get("command") == command else []
    note = content.get("note", "") if results else ""
    missing = [] if arguments.report else [seed for seed in arguments.seeds if seed not in {one["seed"] for one in results}]
    for seed in tqdm(missing, desc="demos"):
        results.append(run(seed))
        with atomic_write(RESULTS) as file:
            file.write((json.dumps({"command": command, "note": note, "results": results}, indent=1) + "\n").encode())
    with atomic_write(TABLE) as file:
        file.write(report(results, note).encode())


if __name__ == "__main__":
    main()
