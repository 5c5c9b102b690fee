"""Small runs and studies of rl_zoo3's ``ExperimentManager`` in this process."""

import argparse
from pathlib import Path
from typing import Any

import sb3_offline_ft.zoo
from sb3_offline_ft import OfflineTD3

sb3_offline_ft.zoo.register()

from rl_zoo3.exp_manager import ExperimentManager  # noqa: E402

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "offline_steps": 30, "batch_size": 16, "buffer_size": 1000}
UNGUARDED = SMALL | {"callback": None}


def make_manager(folder: Path, algo: str = "td3c", hyperparams: dict[str, Any] = UNGUARDED, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "n_timesteps": 120,
        "n_eval_episodes": 1,
        "eval_freq": -1,
        "seed": 1,
        "verbose": 0,
        "log_interval": -1,
    }
    settings = defaults | {"hyperparams": dict(hyperparams)} | settings
    environment = settings.pop("environment", "Pendulum-v1")
    return ExperimentManager(argparse.Namespace(), algo, environment, str(folder / "logs"), **settings)


def run(folder: Path, algo: str = "td3c", hyperparams: dict[str, Any] = UNGUARDED, **settings: Any) -> OfflineTD3:
    manager = make_manager(folder, algo, {"warmup_steps": 20} | hyperparams, **{"eval_freq": 60} | settings)
    model, _ = manager.setup_experiment()
    manager.learn(model)
    return model
