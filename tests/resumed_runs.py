"""Runs that are killed and go on, and what of them must equal an uninterrupted run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_offline_ft import CheckpointRun, resume
from sb3_offline_ft.checkpoints.ring import columns_of

EPISODE_LENGTH = 15
TOTAL = 170
OFFLINE: dict[str, Any] = {
    "dataset": "bundled:pendulum-medium",
    "offline_steps": 100,
    "warmup_steps": 60,
    "warmup_action_noise": True,
}


def short_pendulum() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), EPISODE_LENGTH)


def environments(n_envs: int = 1, subproc: bool = False, make: Any = short_pendulum) -> VecEnv:
    kwargs = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}} if subproc else {}
    return make_vec_env(make, n_envs, seed=3, **kwargs)


def settings(**others: Any) -> dict[str, Any]:
    # Made anew each time, since a learner keeps the noise
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    common = {"policy_kwargs": {"net_arch": [8]}, "buffer_size": 110, "batch_size": 8, "seed": 0, "device": "cpu"}
    return {**common, "action_noise": noise, **others}


class DiedError(Exception):
    """What ends a run as a kill would."""


class DieAt(BaseCallback):
    """Ends the run at a step of the environment."""

    keeps_no_state = True

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.step:
            raise DiedError
        return True


class Witness(BaseCallback):
    """Notes the actions and rewards of a run."""

    keeps_no_state = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _on_step(self) -> bool:
        if "actions" in self.locals:
            self.seen[self.num_timesteps] = self.locals["actions"].copy(), self.locals["rewards"].copy()
        return True


def die_in_update(model: Any, number: int) -> None:
    """Let a learner of this package die in a gradient step."""
    update = model._update

    def dying(batch: Any) -> None:
        if model._n_updates + 1 >= number:
            raise DiedError
        update(batch)

    model._update = dying


def evaluation(folder: Path, freq: int = 50) -> EvalCallback:
    return EvalCallback(
        environments(), eval_freq=freq, n_eval_episodes=1, verbose=0, log_path=str(folder), deterministic=True, warn=False
    )


def tensors(value: Any) -> list[th.Tensor]:
    """All tensors of nested states, in order."""
    if isinstance(value, th.Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in value]
    return [each for entry in value for each in tensors(entry)] if isinstance(value, list | tuple) else []


def assert_same(first: OffPolicyAlgorithm, second: OffPolicyAlgorithm) -> None:
    """Weights, optimizers, replay buffers, counters and what was logged are the same, to the bit."""
    ones, others = (tensors(list(model.get_parameters().values())) for model in (first, second))
    assert ones and len(ones) == len(others)
    assert all(th.equal(one, other) for one, other in zip(ones, others, strict=True))
    assert first.replay_buffer is not None and second.replay_buffer is not None
    columns, those = columns_of(first.replay_buffer), columns_of(second.replay_buffer)
    assert columns.keys() == those.keys() and columns
    n_rows = first.replay_buffer.size()
    # Behind them may be what a guard has thinned out
    assert all(np.array_equal(columns[name][:n_rows], those[name][:n_rows]) for name in columns)
    assert (first.replay_buffer.pos, first.replay_buffer.full) == (second.replay_buffer.pos, second.replay_buffer.full)
    for name in ("num_timesteps", "_n_updates", "_episode_num", "_total_timesteps", "_current_progress_remaining"):
        assert getattr(first, name) == getattr(second, name), name
    assert np.array_equal(np.asarray(first._last_obs), np.asarray(second._last_obs))
    assert [episode["r"] for episode in first.ep_info_buffer or ()] == [
        episode["r"] for episode in second.ep_info_buffer or ()
    ]
    assert np.random.get_state()[1] is not None


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of a run but for the time of day."""
    lines = (folder / name).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run but for its speed, by name, with steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    names = [name for name in accumulator.Tags()["scalars"] if name not in ("time/fps", "offline/steps_per_second")]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def check_resume(
    folder: Path,
    make: Callable[[], OffPolicyAlgorithm],
    die: int | Callable[[OffPolicyAlgorithm], None],
    *,
    callbacks: Callable[[Path], list[BaseCallback]] = lambda folder: [],
    env: Callable[[], VecEnv] = environments,
    total: int = TOTAL,
    save_freq: int = 40,
) -> tuple[OffPolicyAlgorithm, OffPolicyAlgorithm, int]:
    """
    Do a run without an interruption and one that dies and goes on, and check that they are the same.

    :param make: Makes the learner
    :param die: When it dies: a step of the environment, or what makes it
    :return: Both learners, and the step at which the second one went on
    """
    whole, killed = folder / "whole", folder / "killed"
    witness, first = Witness(), make()
    # Without checkpoints, which shall change nothing
    first.learn(total, callback=[*callbacks(whole), witness])
    # What follows must not depend on where the random generators are
    expected = th.rand(3), np.random.rand(3)
    doomed, killers = make(), []
    if callable(die):
        die(doomed)
    else:
        killers = [DieAt(die)]
    try:
        doomed.learn(total, callback=[*callbacks(killed), CheckpointRun(save_freq, path=killed), *killers])
    except DiedError:
        pass
    else:
        raise AssertionError("the run did not die")
    th.rand(17), np.random.rand(5)
    after = Witness()
    second = resume(killed, env())
    second.learn(total, callback=[*callbacks(killed), CheckpointRun(save_freq, path=killed), after])
    assert th.equal(expected[0], th.rand(3)) and np.array_equal(expected[1], np.random.rand(3))
    assert_same(first, second)
    # The first action after the resume, and all others
    assert after.seen and all(
        np.array_equal(one, other)
        for step, pair in after.seen.items()
        for one, other in zip(pair, witness.seen[step], strict=True)
    )
    if (whole / "evaluations.npz").exists():
        ones, others = np.load(whole / "evaluations.npz"), np.load(killed / "evaluations.npz")
        assert ones.files == others.files and all(np.array_equal(ones[key], others[key]) for key in ones.files)
    for model in (first, doomed, second):
        assert model.env is not None
        model.env.close()
    return first, second, min(after.seen)
