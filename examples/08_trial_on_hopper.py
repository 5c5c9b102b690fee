"""A trial on Hopper, from logs to a report: does it walk farther, without more effort, and also if it is heavier?"""

from sb3_offline_ft import TD3BC
from sb3_offline_ft.trial import Trial

LOGS = "bundled:hopper-medium"

# What runs today was learned from the logs in a hurry; the candidate was pretrained on their better half for longer.
for name, logs, steps in [("baseline", LOGS, 2_000), ("candidate", f"{LOGS}?top_fraction=0.5", 20_000)]:
    model = TD3BC("MlpPolicy", "Hopper-v5", dataset=logs, seed=0)
    model.pretrain(steps)
    model.save(name)

trial = Trial.create(
    "hopper",
    env="Hopper-v5",
    baseline="baseline.zip",
    candidate="candidate.zip",
    data=LOGS,
    metrics={
        "distance": {"from": "info.x_position", "aggregate": "last", "unit": "m"},
        "effort": {"from": "info.reward_ctrl", "aggregate": "mean", "unit": "of the reward"},
    },
    primary={"metric": "distance", "smallest_effect": 0.5},
    guardrails={"effort": {"margin": 0.001}},
    robustness={"seeds": 2, "perturb": {"mass": [1.2]}},
    stages=[
        {"name": "shadow", "episodes": 2},
        {"name": "pilot", "episodes": 8, "share": 0.25, "supervised": True},
        {"name": "ramp 50 %", "episodes": 32, "share": 0.5},
        {"name": "full", "episodes": 4},
    ],
    budget={"episodes": 44},
    sign_off=["head of robotics"],
)

trial.run(progress_bar=False)
decision = trial.decide()
print(decision.decision.upper(), *decision.reasons, sep="\n- ")
print(f"The page to read, print and sign: {trial.report()}")
