"""Checkpoints on the disk: what is written, what is kept, and what is said when something is wrong."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
from gymnasium import spaces
from rl_zoo3.callbacks import TrialEvalCallback
from stable_baselines3 import SAC, TD3, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_offline_ft import TD3BC, CheckpointRun, load_dataset, resume
from sb3_offline_ft.checkpoints import folder as checkpoint_files
from sb3_offline_ft.checkpoints.environments import load_vec_env, vec_env_state
from tests.resumed_runs import OFFLINE, DieAt, DiedError, Witness, check_resume, environments, settings


def sac(env: Callable[[], VecEnv] = environments, **others: Any) -> SAC:
    return SAC("MlpPolicy", env(), **settings(learning_starts=20, gradient_steps=1, **others))


def killed(path: Path, at: int = 100, save_freq: int = 20, **others: Any) -> SAC:
    model = sac(**others)
    with pytest.raises(DiedError):
        model.learn(200, callback=[CheckpointRun(save_freq, path=path), DieAt(at)])
    return model


def newest(path: Path) -> Path:
    return max(
        (path / "checkpoints").glob("step_*"), key=lambda each: json.loads((each / "manifest.json").read_text())["number"]
    )


def goes_on_at(path: Path) -> int:
    witness = Witness()
    resume(path, environments()).learn(200, callback=[CheckpointRun(1000), witness])
    return min(witness.seen)


# What is written


def test_trials_of_a_tuner_have_none(tmp_path: Path) -> None:
    callbacks = [CheckpointRun(10), TrialEvalCallback(environments(), optuna.create_study().ask(), 1, eval_freq=50)]
    sac().learn(60, callback=callbacks)
    assert not callbacks[1].is_pruned and not list(tmp_path.iterdir())
    sac().learn(60, callback=[CheckpointRun(10, path=tmp_path), callbacks[1]])
    assert not list(tmp_path.iterdir())


def test_two_checkpoints_are_kept_without_pickles_and_with_the_rows_that_they_need(tmp_path: Path) -> None:
    killed(tmp_path, buffer_size=1000)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["buffer", "step_60_40", "step_80_60"]
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".pt", ".npz"}
    # One piece of the ring, twice: each checkpoint has one of its own length
    assert len(list((tmp_path / "checkpoints" / "buffer").iterdir())) == 2
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert manifest["algorithm"] == ["stable_baselines3.sac.sac", "SAC"] and set(manifest["sha256"]) == {
        "state.pt",
        "manifest.json",
    }


def test_only_new_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_offline_ft.checkpoints.ring.ROWS_OF_A_FILE", 16)
    killed(tmp_path, 200, save_freq=16, buffer_size=1000)
    names = [each["buffer"]["files"] for each in manifests(tmp_path)]
    times = {name: (tmp_path / "checkpoints" / "buffer" / name).stat().st_mtime_ns for _, name in names[-1]}
    assert len(names[-1]) == 12 and names[-1][:-1] == names[-2]
    assert len(set(times.values())) > 5 and max(times.values()) == times[names[-1][-1][1]]


def manifests(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(each.read_text()) for each in (path / "checkpoints").glob("*/manifest.json")]
    return sorted(found, key=lambda each: int(each["number"]))


def test_a_signal_writes_a_last_checkpoint_and_does_what_it_did_before(tmp_path: Path) -> None:
    class Signal(BaseCallback):
        keeps_no_state = True

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def _on_step(self) -> bool:
            if self.num_timesteps == 50:
                signal.raise_signal(self.number)
            return True

    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            sac().learn(200, callback=[CheckpointRun(1000, path=tmp_path / "1"), Signal(signal.SIGINT)])
        sac().learn(200, callback=[CheckpointRun(1000, path=tmp_path / "2"), Signal(signal.SIGTERM)])
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for run in "12":
        assert newest(tmp_path / run).name.startswith("step_50_")
    assert goes_on_at(tmp_path / "1") == 51


def test_a_signal_while_pretraining_is_obeyed_at_once(tmp_path: Path) -> None:
    model: Any = TD3BC("MlpPolicy", environments(), **settings(**OFFLINE | {"offline_steps": 1000}))
    update = model._update

    def signalled(batch: Any) -> None:
        update(batch)
        if model._n_updates == 70:
            signal.raise_signal(signal.SIGINT)

    model._update = signalled
    with pytest.raises(KeyboardInterrupt):
        model.learn(200, callback=CheckpointRun(1000, path=tmp_path))
    assert model.offline_steps_done == 100 and newest(tmp_path).name == "step_0_100"


def test_a_signal_after_a_run_that_failed_is_not_swallowed(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        # It comes between two instructions
        for _ in range(1000):
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What is damaged


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *(("cut", "manifest.json"), ("changed", "manifest.json"), ("gone", "manifest.json")),
        *(("changed", "state.pt"), ("pipe", "state.pt")),
        *(("cut", "rows"), ("changed", "rows"), ("gone", "rows")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(file: str, damage: str, tmp_path: Path) -> None:
    killed(tmp_path)
    path = newest(tmp_path) / file
    if file == "rows":
        path = tmp_path / "checkpoints" / "buffer" / manifests(tmp_path)[-1]["buffer"]["files"][-1][1]
    content = path.read_bytes()
    if damage in ("gone", "pipe"):
        path.unlink()
        if damage == "pipe":
            # Which nobody writes into: reading it would wait for ever
            os.mkfifo(path)
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut" else changed)
    with pytest.warns(UserWarning, match=path.name) as caught:
        assert goes_on_at(tmp_path) == 61
    assert "step_60_40 before it is used" in str(caught[0].message)


@pytest.mark.parametrize("damage", ["changed", "pipe", "folder"])
def test_rows_that_were_damaged_are_written_again(damage: str, tmp_path: Path) -> None:
    killed(tmp_path)
    path = tmp_path / "checkpoints" / "buffer" / manifests(tmp_path)[-1]["buffer"]["files"][-1][1]
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.warns(UserWarning, match=path.name):
        model = resume(tmp_path, environments())
    with pytest.raises(DiedError):
        # The same rows once more, since the run is the same
        model.learn(200, callback=[CheckpointRun(20), DieAt(100)])
    assert path.read_bytes() == content and goes_on_at(tmp_path) == 81


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    killed(tmp_path, 50)
    for name in (".unfinished_abc", "buffer"):
        (tmp_path / "checkpoints" / name).mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / ".unfinished_abc" / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "buffer" / ".x.npz.abcdefgh.tmp").write_bytes(b"half")
    resume(tmp_path, environments()).learn(200, callback=[CheckpointRun(20)])
    names = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*"))
    assert not [name for name in names if name.startswith(".")]


def test_the_only_checkpoint_is_there_until_the_next_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Witness):
        def _on_training_start(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(DiedError):
        sac().learn(200, callback=[CheckpointRun(20, keep=1, path=tmp_path), DieAt(50)])
    with (
        monkeypatch.context() as patched,
        pytest.warns(UserWarning, match="Input/output error"),
        pytest.raises(KeyboardInterrupt),
    ):
        patched.setattr("sb3_offline_ft.checkpoints.folder.replace_synced", fail)
        # Interrupted where it goes on, so that the last checkpoint is of the same place
        resume(tmp_path, environments()).learn(200, callback=[CheckpointRun(20, keep=1), Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, environments()).learn(200, callback=[CheckpointRun(20, keep=1), Interrupted()])
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 1
    assert goes_on_at(tmp_path) == 41


def test_without_an_intact_checkpoint_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no intact checkpoint: expected one that `CheckpointRun` wrote"):
        resume(tmp_path, environments())
    killed(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/state.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no intact checkpoint \((.*state\.pt is damaged .*has changed since){2}"):
        resume(tmp_path, environments())


# What is another one


def test_another_version_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path)
    here = checkpoint_files.installed_versions(checkpoint_files.PACKAGES)
    monkeypatch.setattr(checkpoint_files, "installed_versions", lambda names: here | {"numpy": "0.1"})
    with pytest.warns(UserWarning, match=r"written with numpy .* \(now 0\.1\): the run may go on differently"):
        resume(tmp_path, environments())
    monkeypatch.setattr(checkpoint_files, "installed_versions", lambda names: here | {"sb3-offline-ft": "9.9"})
    with pytest.raises(ValueError, match=r"written with sb3-offline-ft .* \(now 9\.9\): a run goes on with the version"):
        resume(tmp_path, environments())


def test_another_algorithm_environment_or_length_is_one_error(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(ValueError, match="is of SAC, expected TD3BC"):
        TD3BC.resume(tmp_path, environments())
    with pytest.raises(ValueError, match="resume with the same `buffer_size`, environment"):
        resume(tmp_path, environments(2)).learn(200)
    with pytest.raises(ValueError, match="resume with the same `buffer_size`, environment"):
        resume(tmp_path, make_vec_env("Hopper-v5")).learn(200)
    with pytest.raises(ValueError, match="was to have 200 steps, and `total_timesteps` is 300"):
        resume(tmp_path, environments()).learn(300)


def test_other_data_is_one_error(tmp_path: Path) -> None:
    data = load_dataset("bundled:pendulum-medium")
    model = TD3BC("MlpPolicy", environments(), **settings(**OFFLINE | {"dataset": data}))
    with pytest.raises(DiedError):
        model.learn(200, callback=[CheckpointRun(20, path=tmp_path), DieAt(150)])
    with pytest.raises(ValueError, match="cannot hold what the run had as dataset: give it again, `resume"):
        TD3BC.resume(tmp_path, environments())
    other = data.select_episodes(range(5))
    with pytest.raises(ValueError, match="The dataset is not the one that the run had"):
        TD3BC.resume(tmp_path, environments(), dataset=other).learn(200)
    assert TD3BC.resume(tmp_path, environments(), dataset=data).learn(200, callback=CheckpointRun(50)).num_timesteps == 200


def test_arguments_that_are_functions_are_asked_for(tmp_path: Path) -> None:
    def schedule(progress: float) -> float:
        return 1e-3 * progress

    killed(tmp_path, learning_rate=schedule)
    with pytest.raises(ValueError, match="as learning_rate: give it again, `resume"):
        resume(tmp_path, environments())
    assert resume(tmp_path, environments(), learning_rate=schedule).learn(200, callback=CheckpointRun(90)).num_timesteps == 200


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoints of another run\. To go on with that, use `resume`"):
        sac().learn(200, callback=CheckpointRun(20, path=tmp_path))


def test_two_runs_of_one_learner_share_a_folder(tmp_path: Path) -> None:
    model, checkpoints = sac(), CheckpointRun(20, path=tmp_path)
    model.learn(100, callback=checkpoints)
    with pytest.raises(DiedError):
        model.learn(100, callback=[checkpoints, DieAt(170)], reset_num_timesteps=False)
    witness = Witness()
    again = resume(tmp_path, environments())
    again.learn(100, callback=[CheckpointRun(20), witness], reset_num_timesteps=False)
    assert (again.num_timesteps, min(witness.seen)) == (200, 161)


# Disks


@pytest.mark.parametrize("where", ["state", "rows"])
def test_a_disk_that_is_full_does_not_end_training(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = sac()
    target = "torch.save" if where == "state" else "numpy.savez"
    with (
        monkeypatch.context() as patched,
        pytest.warns(UserWarning, match="No space left on device.*goes on without") as caught,
    ):
        patched.setattr(target, fail)
        model.learn(100, callback=CheckpointRun(20, path=tmp_path))
    assert model.num_timesteps == 100 and len(caught) == 1
    assert not list((tmp_path / "checkpoints").glob("*step*"))
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resume(tmp_path, environments())


def test_a_folder_that_cannot_be_written_to_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="a checkpoint cannot be written to"):
        assert sac().learn(100, callback=CheckpointRun(20, path=tmp_path)).num_timesteps == 100


def test_a_run_without_a_folder_asks_for_one() -> None:
    with pytest.raises(ValueError, match=r"does not know where to write: give it the run's folder, `CheckpointRun\(path="):
        sac().learn(100, callback=CheckpointRun())


def test_buffers_that_keep_objects_are_refused(tmp_path: Path) -> None:
    class Goal(gym.Env[Any, Any]):
        observation_space = spaces.Dict(
            {name: spaces.Box(-1, 1, (1,)) for name in ("observation", "achieved_goal", "desired_goal")}
        )
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, **_: Any) -> Any:
            return self.observation_space.sample(), {}

        def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
            return np.zeros(len(achieved))

    model = TD3("MultiInputPolicy", Goal(), replay_buffer_class=HerReplayBuffer, buffer_size=100)
    with pytest.raises(ValueError, match="cannot save a HerReplayBuffer"):
        model.learn(100, callback=CheckpointRun(path=tmp_path))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="`save_freq` must be a whole number of at least 1"):
        CheckpointRun(save_freq=0)
    with pytest.raises(TypeError, match="unknown keyword 'kepe'"):
        CheckpointRun(kepe=3)  # type: ignore[call-arg]


# Environments


class Counter(gym.Env[Any, Any]):
    """Says its own state."""

    observation_space = spaces.Box(-100, 100, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self) -> None:
        self.hidden = iter(range(0))
        self._box = {"n": 0}

    def get_state(self) -> dict[str, Any]:
        return dict(self._box)

    def set_state(self, state: dict[str, Any]) -> None:
        self._box = dict(state)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._box["n"] = int(self.np_random.integers(5))
        return self._observation(), {}

    def _observation(self) -> Any:
        return np.array([self._box["n"]], np.float32)

    def step(self, action: Any) -> Any:
        self._box["n"] += 1
        return self._observation(), float(action[0]), False, self._box["n"] >= 12, {}


def test_an_environment_that_says_its_own_state_goes_on(tmp_path: Path) -> None:
    def env() -> VecEnv:
        return environments(make=Counter)

    check_resume(tmp_path, lambda: sac(env), 77, env=env, total=100)


@pytest.mark.parametrize("name", ["Humanoid-v5", "Pusher-v5", "HalfCheetah-v5", "MountainCarContinuous-v0"])
def test_environments_go_on_to_the_bit(name: str) -> None:
    env, other = (make_vec_env(name, 2, seed=seed) for seed in (1, 2))
    env.reset(), other.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 2, *(env.action_space.shape or ()))).astype(np.float32)
    for action in actions[:30]:
        env.step(action)
    assert load_vec_env(other, vec_env_state(env))
    for action in actions[30:]:
        ones, others = env.step(action), other.step(action)
        assert all(np.array_equal(one, two) for one, two in zip(ones[:3], others[:3], strict=True))


class Holder(Counter):
    """Holds another environment, whose state it does not say."""

    get_state = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.hidden = None  # type: ignore[assignment]
        self.inner = gym.make("Pendulum-v1")


def test_what_cannot_be_had_of_an_environment_is_named() -> None:
    assert vec_env_state(environments(make=Holder))["missing"] == ["Holder.inner"]
    assert vec_env_state(environments())["missing"] == []
