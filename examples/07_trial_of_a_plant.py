"""A trial on a plant that Python does not control: it says who acts next, and reads the logs (CSV). A few seconds."""

from pathlib import Path

import numpy as np
import pandas as pd

from sb3_offline_ft.trial import Finished, Trial

generator = np.random.default_rng(0)


def run_on_the_plant(who: str, log: Path) -> None:
    """Stands for your plant: an hour with one of the controllers, whose log has a row for each minute."""
    pressure = 4 + generator.normal(0, 0.1, size=60)
    power = generator.normal(11.0 if who == "candidate" else 12.0, 1.0, size=60)
    load, valve = ["day"] * 60, 0.5 + generator.normal(0, 0.1, size=60).clip(-0.5, 0.5)
    columns = {"minute": range(60), "load": load, "valve": valve, "pressure": pressure, "power_kw": power}
    pd.DataFrame(columns).to_csv(log, index=False)


Path("columns.yml").write_text("actions: [valve]\ntime: minute\n", encoding="utf-8")
trial = Trial.create(
    "pump",
    baseline="PID on the PLC, parameters of March",
    candidate="policy.onnx on the edge computer",
    columns="columns.yml",  # which columns are what
    action_bounds={"low": 0, "high": 1},
    regime="column.load",
    metrics={
        "power": {"from": "column.power_kw", "aggregate": "mean", "better": "lower", "unit": "kW", "value_per_unit": 0.12},
        "pressure": {"from": "column.pressure", "aggregate": "mean", "better": "higher", "unit": "bar"},
    },
    primary={"metric": "power", "smallest_effect": 0.5},
    guardrails={"pressure": {"margin": 0.2}},
    abort={"limits": {"column.pressure": {"min": 3.0, "max": 5.0}}, "most": 1},
    stages=[{"name": "pilot", "episodes": 8, "share": 0.25}, {"name": "ramp 50 %", "episodes": 16, "share": 0.5}],
    budget={"episodes": 24},
    costs={"minutes": 60, "episodes_per_year": 8000, "deployment": 2000},
    sign_off=["shift leader"],
)

# On the command line: `sb3-offline-ft trial next pump`, and `sb3-offline-ft trial record pump --csv hour_0.csv`
while not isinstance(upcoming := trial.next(), Finished):
    log = Path(f"hour_{upcoming.episode}.csv")
    run_on_the_plant(upcoming.arm, log)
    trial.record(csv=log, episode=upcoming.episode)

decision = trial.decide()
print(decision.decision.upper(), *decision.reasons, sep="\n- ")
print(f"The page to read, print and sign: {trial.report()}")
