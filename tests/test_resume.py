"""A run that dies goes on where it was, and comes out as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib import TQC
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_offline_ft import TD3BC, TD3C, ChampionChallenger, CheckpointRun, CollapseGuard, OfflineTD3, ReBRAC, resume
from tests.resumed_runs import (
    OFFLINE,
    TOTAL,
    DieAt,
    DiedError,
    Witness,
    assert_same,
    check_resume,
    die_in_update,
    environments,
    evaluation,
    events,
    scalars,
    settings,
)

IN_WARMUP, IN_FINETUNING = 55, 140


def maker(cls: type[OffPolicyAlgorithm], env: Callable[[], VecEnv] = environments, **others: Any) -> Any:
    return lambda: cls("MlpPolicy", env(), **settings(**others))


def dying_in(update: int) -> Callable[[OffPolicyAlgorithm], None]:
    return lambda model: die_in_update(model, update)


# Ours


@pytest.mark.parametrize("when", ["pretraining", "warm-up", "finetuning"])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_ours_go_on_in_every_phase(when: str, n_envs: int, tmp_path: Path) -> None:
    def env() -> VecEnv:
        return environments(n_envs)

    die: Any = {"pretraining": dying_in(90), "warm-up": IN_WARMUP, "finetuning": IN_FINETUNING}[when]
    make = maker(TD3C, env, **OFFLINE)
    _, second, begun = check_resume(tmp_path, make, die, env=env, callbacks=lambda folder: [evaluation(folder, 50 // n_envs)])
    assert isinstance(second, TD3C) and second.offline_steps_done == 100
    assert begun <= n_envs if when == "pretraining" else 40 < begun <= die


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_environments_in_other_processes_go_on(tmp_path: Path) -> None:
    def env() -> VecEnv:
        return environments(2, subproc=True)

    check_resume(tmp_path, maker(TD3BC, env, **OFFLINE), IN_FINETUNING, env=env)


@pytest.mark.parametrize(
    "others",
    [
        {"n_steps": 3},
        {"replay_buffer_kwargs": {"offline_sampling": "balanced", "balanced_kwargs": {"net_arch": [8]}}},
        {"replay_buffer_kwargs": {"augmentation": "gaussian_noise", "returns": True, "next_actions": True}},
        {"kernel": "autograd", "offline_fraction": "lin_0.9_0.1", "policy_kwargs": {"net_arch": [8], "n_critics": 3}},
        {"guide_policy": "pretrained", "guide_steps": "lin_10_0", "train_freq": (2, "episode")},
    ],
    ids=["n-step", "balanced", "augmented", "autograd", "guided"],
)
def test_options_go_on(others: dict[str, Any], tmp_path: Path) -> None:
    check_resume(tmp_path, maker(OfflineTD3 if "guide_policy" in others else TD3BC, **OFFLINE | others), IN_FINETUNING)


def test_rebrac_and_a_ring_that_is_full_many_times_go_on(tmp_path: Path) -> None:
    check_resume(tmp_path, maker(ReBRAC, **OFFLINE | {"buffer_size": 40}), IN_FINETUNING)


def test_pretrain_goes_on_and_then_learn(tmp_path: Path) -> None:
    def run(folder: Path, model: Any, die: bool = False) -> Any:
        callbacks: list[BaseCallback] = [evaluation(folder, 40), CheckpointRun(30, path=folder)]
        model.pretrain(160, callback=[*callbacks, *([DieAt(133)] if die else [])], log_interval=50)
        callbacks = [evaluation(folder, 50), CheckpointRun(30, path=folder)]
        return model.learn(TOTAL, callback=[*callbacks, *([DieAt(140)] if die else [])])

    make = maker(TD3C, **OFFLINE | {"offline_steps": 0})
    first = run(tmp_path / "whole", make())
    with pytest.raises(DiedError):
        run(tmp_path / "killed", make(), die=True)
    again = TD3C.resume(tmp_path / "killed", environments())
    with pytest.raises(ValueError, match="was written in `pretrain`"):
        TD3C.resume(tmp_path / "killed", environments()).learn(TOTAL)
    with pytest.raises(DiedError):
        again.pretrain(160, callback=[evaluation(tmp_path / "killed", 40), CheckpointRun(30), DieAt(155)], log_interval=50)
    again = TD3C.resume(tmp_path / "killed", environments())
    with pytest.raises(DiedError):
        run(tmp_path / "killed", again, die=True) if again.offline_steps_done > 133 else run_past(again, tmp_path / "killed")
    last = TD3C.resume(tmp_path / "killed", environments())
    # What is complete returns at once
    assert run(tmp_path / "killed", last) is last
    assert_same(first, last)


def run_past(model: Any, folder: Path) -> None:
    model.pretrain(160, callback=[evaluation(folder, 40), CheckpointRun(30, path=folder)], log_interval=50)
    model.learn(TOTAL, callback=[evaluation(folder, 50), CheckpointRun(30, path=folder), DieAt(140)])


# SB3's


@pytest.mark.parametrize("cls", [SAC, TD3, TQC])
def test_those_of_sb3_go_on(cls: type[OffPolicyAlgorithm], tmp_path: Path) -> None:
    check_resume(tmp_path, maker(cls, learning_starts=40), 90, callbacks=lambda folder: [evaluation(folder)], total=110)


def test_gsde_n_steps_and_shared_observations_go_on(tmp_path: Path) -> None:
    check_resume(tmp_path / "1", maker(SAC, learning_starts=40, use_sde=True, train_freq=8), 90, total=110)
    check_resume(tmp_path / "2", maker(TD3, learning_starts=40, n_steps=3), 90, total=110)
    shared = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    check_resume(tmp_path / "3", maker(SAC, learning_starts=40, buffer_size=60, **shared), 90, total=110)


@pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
def test_mujoco_goes_on_in_the_middle_of_an_episode(name: str, tmp_path: Path) -> None:
    def env() -> VecEnv:
        return make_vec_env(name, 2, seed=1)

    check_resume(tmp_path, maker(TD3, env, learning_starts=60, action_noise=None), 95, env=env, total=120)


def test_normalized_environments_go_on(tmp_path: Path) -> None:
    def env() -> VecEnv:
        return VecNormalize(environments(2))

    first, second, _ = check_resume(tmp_path, maker(SAC, env, learning_starts=40), 90, env=env, total=110)
    one, other = first.get_vec_normalize_env(), second.get_vec_normalize_env()
    assert one is not None and other is not None
    assert np.array_equal(one.returns, other.returns) and np.array_equal(one.obs_rms.mean, other.obs_rms.mean)


# Callbacks


@pytest.mark.parametrize("die", [157, 250])
def test_a_guard_goes_on_after_one_rollback_and_after_two(die: int, tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[BaseCallback]:
        guard = CollapseGuard(
            path=folder,
            baseline=[-70.0, -60.0, -90.0, -80.0, -75.0, -85.0, -65.0],
            detector={"cusum": {"n_simulations": 200}},
            false_alarm_rate=0.2,
            horizon_episodes=30,
            promotion_episodes=2,
            signal_freq=20,
            poisoned_data=0.5,
            random_return=-150.0,
            remedies=["trust_region", "slower_actor", "more_offline_data"],
            verbose=0,
        )
        return [guard]

    check_resume(tmp_path, maker(TD3BC, **OFFLINE | {"buffer_size": 500}), die, callbacks=callbacks, total=270, save_freq=30)
    whole = events(tmp_path / "whole", "collapse_events.jsonl")
    assert whole == events(tmp_path / "killed", "collapse_events.jsonl")
    rollbacks = [event["timestep"] for event in whole if event["event"] == "rollback"]
    assert any(step < 125 for step in rollbacks) and any(157 < step < 220 or 157 < step for step in rollbacks)


@pytest.mark.parametrize("controls", ["historical", "concurrent"])
def test_a_champion_goes_on_in_the_middle_of_a_trial(controls: str, tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[BaseCallback]:
        return [
            ChampionChallenger(
                path=folder,
                random_return=-130.0,
                worst_return=-200.0,
                risk_budget=0.9,
                baseline_episodes=5,
                min_updates=10,
                controls=controls,
                max_trial_episodes=20,
                futility=0.0,
                verbose=0,
            )
        ]

    def env() -> VecEnv:
        return environments(2)

    check_resume(tmp_path, maker(TD3C, env, **OFFLINE), 315, callbacks=callbacks, env=env, total=420, save_freq=20)
    whole = events(tmp_path / "whole", "deployment_events.jsonl")
    assert whole == events(tmp_path / "killed", "deployment_events.jsonl")
    trials = [event for event in whole if event.get("kind") == "trial"]
    assert any(event["timestep"] <= 290 for event in trials) and any(event["timestep"] > 320 for event in trials)


def test_a_champion_goes_on_in_the_middle_of_a_rivals_episode(tmp_path: Path) -> None:
    def contest(folder: Path) -> ChampionChallenger:
        rules: dict[str, Any] = {"random_return": -130.0, "worst_return": -200.0, "risk_budget": 0.9, "baseline_episodes": 5}
        return ChampionChallenger(path=folder, **rules, min_updates=5, max_trial_episodes=20, futility=0.0, verbose=0)

    def env() -> VecEnv:
        return environments(2)

    class Look(BaseCallback):
        keeps_no_state = True
        steps: list[int] = []  # noqa: RUF012

        def _on_step(self) -> bool:
            if looked_at.contest.rival is not None:
                self.steps.append(self.num_timesteps)
            return True

    looked_at = contest(tmp_path / "first")
    maker(TD3C, env, **OFFLINE)().learn(300, callback=[looked_at, Look()])
    # Somewhere within the first rival's episode
    step = Look.steps[5]
    assert step + 2 in Look.steps
    _, _, went_on = check_resume(
        tmp_path, maker(TD3C, env, **OFFLINE), step + 2, callbacks=lambda folder: [contest(folder)], env=env, total=300,
        save_freq=step,
    )  # fmt: skip
    assert went_on == step + 2
    assert events(tmp_path / "whole", "deployment_events.jsonl") == events(tmp_path / "killed", "deployment_events.jsonl")


class Counts(BaseCallback):
    """A callback of somebody else's, with plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.history = 0.0, list[float]()

    def _on_step(self) -> bool:
        self.total += float(self.locals["rewards"].sum())
        self.history.append(self.total)
        return True


def test_callbacks_of_sb3_and_of_others_go_on(tmp_path: Path) -> None:
    made: list[Counts] = []

    def callbacks(folder: Path) -> list[BaseCallback]:
        made.append(Counts())
        every = EveryNTimesteps(17, evaluation(folder, 1))
        return [made[-1], every, StopTrainingOnMaxEpisodes(11)]

    _, second, _ = check_resume(tmp_path, maker(SAC, learning_starts=40), 133, callbacks=callbacks, total=400)
    assert second.num_timesteps == 11 * 15
    assert made[0].history == made[2].history


def test_callbacks_that_are_others_now_are_named(tmp_path: Path) -> None:
    model = maker(SAC, learning_starts=40)()
    with pytest.raises(DiedError):
        model.learn(100, callback=[Counts(), CheckpointRun(30, path=tmp_path), DieAt(50)])
    with pytest.warns(UserWarning, match="without Counts: it had other callbacks"):
        resume(tmp_path, environments()).learn(100)


# Logs


@pytest.mark.parametrize("die", [61, 133])
def test_logs_have_neither_gaps_nor_doubled_rows(die: int, tmp_path: Path) -> None:
    def run(folder: Path, *others: BaseCallback) -> None:
        model = maker(SAC, learning_starts=40)()
        model.set_logger(configure(str(folder), ["csv", "json", "tensorboard"]))
        try:
            model.learn(170, callback=[CheckpointRun(30, path=folder), *others], log_interval=1)
        finally:
            model.logger.close()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    with pytest.raises(DiedError):
        run(killed, DieAt(die))
    again = resume(killed, environments()).learn(170, callback=[CheckpointRun(30, path=killed)], log_interval=1)
    again.logger.close()
    assert rows(whole) == rows(killed)
    assert scalars(whole) == scalars(killed)
    assert (whole / "progress.json").read_text().count("\n") == (killed / "progress.json").read_text().count("\n")


def rows(folder: Path) -> list[dict[str, Any]]:
    import pandas as pd

    table = pd.read_csv(folder / "progress.csv")
    kept = [name for name in sorted(table.columns) if name not in ("time/fps", "time/time_elapsed")]
    return table[kept].astype(str).to_dict("records")


# Environments without a state


class Opaque(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps what nobody can read."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.simulator = iter(range(10**9))


def opaque() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Opaque(gym.make("Pendulum-v1")), 15)


def test_without_the_state_of_the_environment_an_episode_begins_and_a_warning_says_so(tmp_path: Path) -> None:
    def env() -> VecEnv:
        return environments(make=opaque)

    model = maker(TD3BC, env, **OFFLINE)()
    with pytest.warns(UserWarning, match=r"Opaque\.simulator.*start of an episode") as caught, pytest.raises(DiedError):
        model.learn(TOTAL, callback=[CheckpointRun(20, path=tmp_path), DieAt(150)])
    assert len([each for each in caught if "Opaque" in str(each.message)]) == 1
    again, witness = TD3BC.resume(tmp_path, env()), Witness()
    with pytest.warns(UserWarning, match="goes on at the start of an episode"):
        again.learn(TOTAL, callback=[CheckpointRun(20), witness])
    assert again.num_timesteps == TOTAL and 120 < min(witness.seen) <= 150
