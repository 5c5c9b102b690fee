"""Pendulum for tests of studies, which waits or fails in the middle of a run if a file says so."""

import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

FOLDER_VARIABLE = "STUDY_TEST_FOLDER"
GATED_PENDULUM = "tests.study_environments:GatedPendulum-v0"
CLOSED, FAIL = "closed", "fail"
# Of the environment that policies are measured in: between the first evaluation's end and that of the second one
STEP = 230


class GatedPendulum(PendulumEnv):
    """
    Waits as long as there is a file ``closed``; raises an error if there is a file ``fail``, which it removes, so that one
    run fails only.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._steps = 0

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == STEP:
            folder = Path(os.environ[FOLDER_VARIABLE])
            while (folder / CLOSED).exists():
                time.sleep(0.02)
            try:
                (folder / FAIL).unlink()
            except FileNotFoundError:
                pass
            else:
                raise RuntimeError("The pendulum fell off the table.")
        return super().step(action)


gym.register("GatedPendulum-v0", entry_point=GatedPendulum, max_episode_steps=200)
