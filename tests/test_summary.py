"""The summary of a run: the numbers it prints are those of the files."""

import dataclasses
import io
import shutil
import warnings

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3.common.callbacks import ConvertCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from typer.testing import CliRunner

from sb3_offline_ft import TD3C, load_dataset
from sb3_offline_ft.cli import app
from sb3_offline_ft.evaluation import summarize_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in the form that rl-zoo3 gives it, with a second warm-up, which a guard's remedy may begin."""
    folder = tmp_path_factory.mktemp("logs") / "td3c" / "Pendulum-v1_1"
    folder.mkdir(parents=True)
    model = TD3C("MlpPolicy", Monitor(gym.make("Pendulum-v1"), str(folder / "0")), dataset="bundled:pendulum-medium", seed=0,
                 offline_steps=50, warmup_steps=200, policy_kwargs={"net_arch": [16]}, device="cpu")  # fmt: skip
    callback = EvalCallback(
        Monitor(gym.make("Pendulum-v1")), eval_freq=100, n_eval_episodes=2, log_path=str(folder), verbose=0
    )
    model.learn(600, callback=[callback, EveryNTimesteps(450, ConvertCallback(lambda *_: model.begin_warmup(100) or True))])
    model.save(folder / "Pendulum-v1")
    model.env.close()
    return folder


def shown(summary):
    """The lines that the terminal shows."""
    with (console := Console(file=io.StringIO(), width=200)).capture() as text:
        console.print(summary.table())
    return text.get().splitlines()


def test_numbers_are_those_of_the_run(run):
    summary = summarize_run(run)
    evaluations = np.load(run / "evaluations.npz")
    means = evaluations["results"].mean(axis=1)
    assert summary.timesteps.tolist() == [0, 100, 200, 300, 400, 500, 600]
    assert summary.initial_return == pytest.approx(means[:3].mean())
    assert summary.finetuning_returns == pytest.approx(means[3:])
    assert (summary.offline_steps, summary.warmup_steps) == (50, 200)
    assert (summary.algorithm, summary.environment) == ("td3c", "Pendulum-v1")
    assert summary.training_timesteps.tolist() == [200, 400, 600] and len(summary.training_returns) == 3
    random = summary.dataset.reference_scores.random
    assert summary.dip_depth == pytest.approx((means[:3].mean() - means[3:].min()) / abs(means[:3].mean() - random))


def test_what_acted_is_what_the_files_say(run):
    summary = summarize_run(run)
    evaluations, acted = np.load(run / "evaluations.npz"), summary.acted
    # Three training episodes, and seven evaluations of two, of 200 steps each
    assert acted.interactions == 600 + 7 * 2 * 200 and len(acted.returns) == 17
    assert acted.kinds.count("serve") == 3 and acted.kinds.count("evaluation") == 14
    # After 0, 100 and 200 interactions, and the training episode of the warm-up
    assert acted.n_warmup == 7 and acted.warmup_end == 7 * 200
    frozen = [*evaluations["results"][:3].ravel(), summary.training_returns[0]]
    lines = shown(summary)
    served = next(line for line in lines if "served return" in line)
    all_of_them = np.mean([*evaluations["results"].ravel(), *summary.training_returns])
    means = f"{all_of_them:.1f} in all, {np.mean(frozen):.1f} in the warm-up, "
    assert means in served and "3,400 interactions" in served
    random = summary.random_return
    shortfall = np.cumsum((np.mean(frozen) - acted.returns[7:]) / abs(np.mean(frozen) - random))
    line = next(line for line in lines if "served shortfall" in line)
    assert f"{max(0, shortfall.max()):.1f} at most, {shortfall[-1]:.1f} at the end" in line
    assert f"one of 10 episodes; against {np.mean(frozen):.1f}" in line
    # What was served stands before what was only measured
    places = [next(i for i, line in enumerate(lines) if name in line) for name in ("served return", "J after pretraining")]
    assert places == sorted(places)


def test_what_was_served_is_not_known_without_its_files(run, tmp_path):
    summary = summarize_run(run)
    for changes, reason in (
        ({"lengths": None}, "evaluations.npz has no lengths"),
        ({"training_timesteps": np.zeros(0, np.int64), "training_returns": np.zeros(0)}, "no training episode was recorded"),
        ({"training_returns": np.full(3, np.nan)}, "not finite"),
    ):
        changed = dataclasses.replace(summary, **changes)
        (line,) = [line for line in shown(changed) if "served" in line]
        assert changed.acted is None and f"not known: {reason}" in line.replace("there are returns that are ", "")
    copy = tmp_path / "td3c" / "Pendulum-v1_1"
    shutil.copytree(run, copy)
    evaluations = dict(np.load(copy / "evaluations.npz"))
    np.savez(copy / "evaluations.npz", timesteps=evaluations["timesteps"], results=evaluations["results"])
    assert summarize_run(copy).lengths is None
    # Of other evaluations
    np.savez(copy / "evaluations.npz", **evaluations | {"ep_lengths": np.ones((5, 2), np.int64)})
    assert summarize_run(copy).lengths is None


def test_command_prints_and_draws(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["summary", str(run)])
    assert result.exit_code == 0, result.output
    data = load_dataset("bundled:pendulum-medium")
    summary = summarize_run(run)
    for text in ("bundled:pendulum-medium", f"{data.episode_returns.mean():.1f}", f"{summary.initial_return:.1f}",
                 f"{summary.finetuning_returns.min():.1f}", f"{summary.finetuning_returns.max():.1f}", "run.png"):  # fmt: skip
        assert text in result.output
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")


def test_run_whose_data_is_gone_is_still_summarized(run, tmp_path):
    copy = tmp_path / "td3c" / "Pendulum-v1_1"
    shutil.copytree(run, copy)
    model = TD3C.load(copy / "Pendulum-v1")
    model.dataset = "gone/away-v0"
    model.save(copy / "Pendulum-v1")
    with pytest.warns(UserWarning, match="cannot be read any more"):
        summary = summarize_run(copy)
    assert summary.dataset is None and summary.dip_depth is None
    summary.draw(copy / "again.png")


def test_data_that_has_changed_since_is_not_taken_for_that_of_the_run(run, tmp_path):
    copy = tmp_path / "td3c" / "Pendulum-v1_1"
    shutil.copytree(run, copy)
    model = TD3C.load(copy / "Pendulum-v1")
    model.dataset = "bundled:pendulum-medium?episodes=5"
    model.save(copy / "Pendulum-v1")
    with pytest.warns(UserWarning, match="pendulum-medium.* is not what the run had.*fingerprint"):
        summary = summarize_run(copy)
    assert summary.dataset is None and summary.random_return is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summarize_run(run).dataset is not None


def test_a_dip_that_is_not_known_says_why(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    summary = summarize_run(run)
    for changes, reason in (
        ({"dataset": None}, "the mean return of a random policy is not known"),
        ({"timesteps": summary.timesteps + 300}, "the pretrained policy was not evaluated"),
        ({"warmup_steps": 600}, "there is no evaluation after the warm-up"),
    ):
        changed = dataclasses.replace(summary, **changes)
        assert changed.dip_depth is None
        (line,) = [line for line in shown(changed) if "dip depth" in line]
        assert "not known" in line and reason in line


def test_run_without_pretraining_has_no_dip(run, tmp_path):
    copy = tmp_path / "td3c" / "Pendulum-v1_1"
    shutil.copytree(run, copy)
    evaluations = dict(np.load(copy / "evaluations.npz"))
    kept = evaluations["timesteps"] > 200
    np.savez(copy / "evaluations.npz", **{name: values[kept] for name, values in evaluations.items()})
    summary = summarize_run(copy)
    assert summary.dip_depth is None
    result = CliRunner().invoke(app, ["summary", str(copy)])
    assert result.exit_code == 0 and "not evaluated  (50 steps)" in result.output and "nan" not in result.output
    model = TD3C.load(copy / "Pendulum-v1")
    model.life_cycle.offline_steps_done = 0
    model.save(copy / "Pendulum-v1")
    assert "not pretrained" in CliRunner().invoke(app, ["summary", str(copy)]).output


def test_other_folders_are_refused(tmp_path):
    for folder, message in ((tmp_path / "missing", "is not a folder"), (tmp_path, "has no evaluations.npz")):
        result = CliRunner().invoke(app, ["summary", str(folder)])
        assert result.exit_code == 1 and message in result.output
    np.savez(tmp_path / "evaluations.npz", timesteps=[0], results=[[1.0]])
    result = CliRunner().invoke(app, ["summary", str(tmp_path)])
    assert result.exit_code == 1 and "holds no model" in result.output
