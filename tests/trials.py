"""Trials on a small tank, for tests."""

from pathlib import Path
from typing import Any

from sb3_offline_ft.trial import Trial
from tests.trial_systems import BETTER, ENV, STEADY

STAGES = [
    {"name": "shadow", "episodes": 3},
    {"name": "pilot", "episodes": 8, "share": 0.25, "supervised": True},
    {"name": "ramp 50 %", "episodes": 24, "share": 0.5},
    {"name": "full", "episodes": 4, "share": 1.0},
]


def tank_trial(folder: Path, candidate: str = BETTER, **sections: Any) -> Trial:
    """A trial of a policy on the tank."""
    plan: dict[str, Any] = {
        "metrics": {
            "return": {"value_per_unit": 1.0},
            "energy": {"from": "info.energy", "better": "lower", "unit": "kWh", "value_per_unit": 0.12},
        },
        "primary": {"metric": "return", "smallest_effect": 1.0},
        "guardrails": {"energy": {"margin": 3.0}},
        "stages": STAGES,
        "budget": {"episodes": 40},
        "costs": {"episode": 1.0, "supervision": 5.0, "minutes": 10, "episodes_per_year": 5000, "deployment": 800},
        "risk": {"budget": 0.2, "random_return": -15.0, "worst_return": -25.0, "baseline_return": -4.5},
        "abort": {"limits": {"info.level": {"max": 1.5}}, "most": 1},
        "sign_off": ["plant manager", "control engineer"],
    }
    return Trial.create(folder, env=ENV, baseline=STEADY, candidate=candidate, **plan | sections)
