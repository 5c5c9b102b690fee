"""A guarded run that was saved goes on; its files, and disks that fail."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_offline_ft import TD3C, CollapseGuard, LearnerSnapshot
from sb3_offline_ft.collapse.events import read_events
from tests.guarded_runs import BASELINE, CALM, EPISODE_LENGTH, At, Hold, make, make_td3, of, ruin, same


def test_the_guard_goes_on_after_load(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"path": tmp_path, "save_snapshots": True, "promotion_episodes": 5, "ratchet": False}
    settings |= {"remedies": ["slower_actor"], "verbose": 0}
    model = make_td3()
    guard = CollapseGuard(**settings)
    model.learn(700, callback=[guard, At([300], ruin)])
    assert guard.rollbacks == 1 and guard.promotions > 0
    model.save(tmp_path / "model")
    loaded = TD3.load(tmp_path / "model", env=make_vec_env(Hold, seed=1))
    again = CollapseGuard(**settings)
    loaded.learn(600, callback=[again, At([900], ruin)], reset_num_timesteps=False)
    assert again.rollbacks == 2
    # The first halving was taken up, the second came on top of it
    assert again.brake_facts["learning_rate_factor"] == 0.25
    assert again.promotions >= guard.promotions
    # The baseline is that of the first run, also after the second rollback
    means = {event["mean"] for event in of(again, "baseline")}
    assert means == {event["mean"] for event in of(guard, "baseline")}
    # One file tells both runs
    events = read_events(tmp_path / "collapse_events.jsonl")
    assert [event["event"] for event in events].count("start") == 2
    assert [event["resumed"] for event in events if event["event"] == "start"] == [False, True]
    assert of(again, "rollback")[-1]["to_timestep"] > 0


def test_checkpoints_hold_the_guards_state(tmp_path: Path) -> None:
    model = make_td3()
    checkpoints = CheckpointCallback(save_freq=100, save_path=str(tmp_path))
    model.learn(300, callback=[CollapseGuard(verbose=0), checkpoints])
    for step in (200, 300):
        loaded = TD3.load(tmp_path / f"rl_model_{step}_steps", env=make_vec_env(Hold, seed=1))
        guard = CollapseGuard(verbose=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.learn(100, callback=[guard], reset_num_timesteps=False)
        assert of(guard, "start")[0]["resumed"]
        assert guard.events[-1]["episode"] >= (step + 80) // EPISODE_LENGTH


def test_two_calls_of_learn_are_one_run() -> None:
    model, guard = make_td3(), CollapseGuard(verbose=0)
    model.learn(300, callback=guard)
    episodes = guard.events[-1]["episode"]
    model.learn(300, callback=guard, reset_num_timesteps=False)
    assert guard.events[-1]["episode"] == 2 * episodes
    assert len(of(guard, "start")) == 1
    model.learn(300, callback=guard)
    assert guard.events[-1]["episode"] == episodes


def test_a_run_saved_in_its_warmup_keeps_the_baseline(tmp_path: Path) -> None:
    model = make_td3(train_freq=(200, "step"))
    model.learn(150, callback=CollapseGuard(verbose=0))
    model.save(tmp_path / "model")
    loaded = TD3.load(tmp_path / "model", env=make_vec_env(Hold, seed=1))
    loaded.train_freq = model.train_freq
    guard = CollapseGuard(verbose=0)
    loaded.learn(300, callback=guard, reset_num_timesteps=False)
    assert of(guard, "baseline")[0]["n"] >= 15 + 10


def test_a_damaged_state_is_said_and_the_guard_begins_anew(tmp_path: Path) -> None:
    model = make_td3()
    model.learn(300, callback=CollapseGuard(verbose=0))
    for text in ("{", "{}", '{"version": 99}', "[]"):
        model.collapse_guard_state = text  # type: ignore[attr-defined]
        with pytest.warns(UserWarning, match="cannot be taken up"):
            model.learn(20, callback=CollapseGuard(baseline=BASELINE, verbose=0), reset_num_timesteps=False)


def test_a_damaged_file_of_events_is_kept_aside(tmp_path: Path) -> None:
    model = make_td3()
    model.learn(300, callback=CollapseGuard(path=tmp_path, verbose=0))
    file = tmp_path / "collapse_events.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "not JSON", *lines[1:]]) + "\n")
    with pytest.warns(UserWarning, match="damaged"):
        model.learn(100, callback=CollapseGuard(path=tmp_path, verbose=0), reset_num_timesteps=False)
    assert (tmp_path / "collapse_events.damaged").exists() and read_events(file)


def test_snapshots_of_an_earlier_run_in_the_same_folder_are_not_taken_for_ours(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = make_td3(seed=seed)
        model.learn(300, callback=CollapseGuard(path=tmp_path, save_snapshots=True, promotion_episodes=5, verbose=0))
    stored = LearnerSnapshot.load(tmp_path / "snapshots" / "snapshot_0.pt").policy_state
    first = make_td3(seed=1).policy.state_dict()
    assert all(th.equal(stored[name], value) for name, value in first.items())


def test_going_on_after_a_stop_is_guarded_again() -> None:
    model = make_td3()
    guard = CollapseGuard(remedies=[], max_rollbacks=0, after_max_rollbacks="stop", verbose=0)
    model.learn(900, callback=[guard, At([300], ruin)])
    stopped = model.num_timesteps
    assert stopped < 900
    model.learn(600, callback=[guard, At([stopped + 200], ruin)], reset_num_timesteps=False)
    assert stopped + 200 < model.num_timesteps < stopped + 600
    assert guard.alarms == 2


def test_snapshots_are_kept_in_bounds(tmp_path: Path) -> None:
    guard = CollapseGuard(path=tmp_path, save_snapshots=True, keep_snapshots=2, promotion_episodes=2, ratchet=False, verbose=0)
    make_td3().learn(1000, callback=guard)
    assert guard.promotions > 5
    files = sorted((tmp_path / "snapshots").glob("*.pt"))
    assert len(files) == 3 and (tmp_path / "snapshots" / "snapshot_0.pt") in files


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LearnerSnapshot, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LearnerSnapshot, "save", fail)
    guard = CollapseGuard(path=tmp_path, save_snapshots=True, promotion_episodes=2, verbose=0)
    model = make_td3()
    with pytest.warns(UserWarning, match="No space left") as caught:
        model.learn(800, callback=guard)
    assert len([entry for entry in caught if "No space left" in str(entry.message)]) == 1
    assert model.num_timesteps == 800 and guard.promotions > 1


def test_a_promotion_makes_the_promoted_policy_the_reference_and_a_rollback_to_it_too(tmp_path: Path) -> None:
    """What is promoted is the learner of some episodes ago, not what it has become since."""
    settings: dict[str, Any] = {**CALM, "learning_rate": 1e-3, "constraint_reference": "pretrained", "epsilon": 1.0}
    model: Any = make(TD3C, **settings, warmup_steps=0, policy_averaging=0.5)
    model.set_parameters(make(TD3C, **settings).get_parameters())
    policies: dict[int, list[th.Tensor]] = {}

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            policies[self.num_timesteps] = [value.clone() for value in self.model.actor.state_dict().values()]  # type: ignore
            return True

    def reference() -> list[th.Tensor]:
        return list(model.reference_actor.state_dict().values())

    guard = CollapseGuard(baseline=BASELINE - 6, promotion_episodes=10, ratchet=False, remedies=[], update_reference=True,
                          path=tmp_path, save_snapshots=True, verbose=0)  # fmt: skip
    model.learn(500, callback=[guard, Keep()])
    promotion = of(guard, "promotion")[-1]
    assert same(reference(), policies[promotion["candidate_timestep"]])
    assert not same(reference(), policies[promotion["timestep"]])
    promoted = [value.clone() for value in reference()]
    model.save(tmp_path / "model")

    @th.no_grad()
    def spoil(model: Any) -> None:
        model.actor.mu[0].weight.fill_(math.nan)

    model.learn(100, callback=[guard, At([510], spoil)], reset_num_timesteps=False)
    assert guard.rollbacks == 1 and same(reference(), promoted)
    model = TD3C.load(tmp_path / "model", env=model.get_env())
    guard = CollapseGuard(baseline=BASELINE - 6, remedies=[], path=tmp_path, save_snapshots=True, verbose=0)
    # The third time it is not the loaded learner that is restored, but the one that was promoted last
    model.learn(100, callback=[guard, At([510, 520, 530], spoil)], reset_num_timesteps=False)
    assert guard.rollbacks == 3 and same(reference(), promoted)
