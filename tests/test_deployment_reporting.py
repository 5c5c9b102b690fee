"""What a run with champion and challenger tells while it goes on: events, the logger's values, and words."""

import csv
import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from typer.testing import CliRunner

from sb3_offline_ft import TD3C, ChampionChallenger
from sb3_offline_ft.cli import app
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.deployment.history import EVENTS_FILE, FIGURE, History
from sb3_offline_ft.evaluation import summarize_run
from tests.contest_runs import Fate, contest, learner, of, push, run


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run with SB3's logger, and what the logger wrote at the end of each episode."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = learner(), contest(folder)
    push(model, 1.0)
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(1000, callback=[Fate(), callback], log_interval=1)
    model.logger.close()
    with (folder / "progress.csv").open() as file:
        return callback, list(csv.DictReader(file))


def test_values_of_the_logger_are_those_of_the_events(told):
    callback, rows = told
    episodes = of(callback.events, "episode")
    served = [event["return"] for event in episodes if event["kind"] == "serve"]
    last = {name.removeprefix("deployment/"): float(value) for name, value in rows[-1].items() if "deployment/" in name}
    assert last["served_return"] == pytest.approx(np.mean(served[-10:]))
    assert last["champion_return"] == pytest.approx(callback.champion.mean)
    assert (last["allowance"], last["budget_left"], last["shortfall"]) == pytest.approx(
        tuple(episodes[-1][name] for name in ("allowance", "balance", "lost"))
    )
    for name in ("promotion", "rejection", "demotion"):
        assert last[f"{name}s"] == len(of(callback.events, name))
    assert last["promotions"] == 1 and last["rejections"] > 0


def test_an_episode_names_who_was_champion_while_it_ran(told):
    callback, _ = told
    events = callback.events
    (promotion,) = of(events, "promotion")
    decisive = events[events.index(promotion) - 1]
    assert decisive["event"] == "episode" and decisive["champion"] == 0 and decisive["counts"]
    assert decisive["challenger"] == promotion["contender"] and decisive["evidence"] >= decisive["needed"]
    own = [event for event in of(events, "episode") if event["challenger"] == promotion["contender"] and event["counts"]]
    assert promotion["returns"] == [event["return"] for event in own if event["kind"] == "trial"]


def test_the_baseline_is_told_once_with_its_uncertainty(told):
    callback, _ = told
    (baseline,) = of(callback.events, "baseline")
    before = callback.events[: callback.events.index(baseline)]
    returns = [event["return"] for event in of(before, "episode")]
    assert (baseline["n"], baseline["mean"]) == (len(returns), pytest.approx(np.mean(returns)))
    assert baseline["low"] < baseline["mean"] < baseline["high"]
    assert not of(before, "challenge") and all(event["kind"] == "serve" for event in of(before, "episode"))
    assert all("balance" not in event for event in of(before, "episode"))


def test_a_run_that_goes_on_counts_on(tmp_path):
    model, callback = learner(), contest(tmp_path)
    push(model, 1.0)
    fate = Fate()
    model.learn(800, callback=[fate, callback])
    model.save(tmp_path / "checkpoint")
    promotions = len(of(callback.events, "promotion"))
    assert promotions == 1
    # What comes after the checkpoint is left behind
    model.learn(200, callback=[fate, callback], reset_num_timesteps=False)
    loaded = TD3.load(tmp_path / "checkpoint", env=model.get_env())
    loaded.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    resumed = contest(tmp_path)
    loaded.learn(100, callback=resumed, reset_num_timesteps=False, log_interval=1)
    loaded.logger.close()
    with (tmp_path / "log" / "progress.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["deployment/promotions"]) == promotions
    assert len(of(resumed.events, "baseline")) == 1
    history = History(read_events(tmp_path / EVENTS_FILE))
    steps = [event["timestep"] for event in history.events]
    assert steps == sorted(steps) and steps[-1] == 900
    assert len(history.episodes()) == 90 and len(of(resumed.events, "episode")) == 110
    assert float(last["deployment/rejections"]) == history.counts["rejection"]


def test_words_while_it_goes_on(tmp_path, capsys):
    callback = run(tmp_path, verbose=2)
    shown = capsys.readouterr().out
    (baseline,), (promotion,) = of(callback.events, "baseline"), of(callback.events, "promotion")
    for text in (
        f"the baseline is known: mean return {baseline['mean']:.1f} (95 % interval",
        f"the policy of step {promotion['contender']} challenges that of step 0",
        f"the policy of step {promotion['contender']} is champion now: mean return {promotion['mean']:.1f}",
        f"against {promotion['champion_mean']:.1f}",
        "is given up, hopeless",
        "1 promotion, ",
    ):
        assert text in shown
    run(tmp_path, verbose=1)
    shown = capsys.readouterr().out
    assert "is champion now" in shown and "given up" not in shown and "challenges" not in shown
    run(tmp_path, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("algorithm", "noise", "budget", "said"),
    [(TD3, False, 0.3, 1), (TD3, True, 0.3, 0), (SAC, False, 0.3, 0), (TD3, False, 0, 0)],
)
def test_nothing_to_explore_with_is_said_once(algorithm, noise, budget, said, capsys):
    model, callback = learner(noise, algorithm), contest(None, risk_budget=budget, verbose=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(30, callback=callback)
        model.learn(30, callback=callback, reset_num_timesteps=False)
    found = [event for event in of(callback.events, "warning") if "explored" in event["message"]]
    assert len(found) == capsys.readouterr().out.count("action_noise") == said


def test_events_that_cannot_be_written_do_not_name_the_collapse_guard(tmp_path):
    (tmp_path / EVENTS_FILE).mkdir()
    with pytest.warns(RuntimeWarning, match="Events cannot be written to") as caught:
        callback = run(tmp_path, steps=100)
    assert not any("guard" in str(warning.message) for warning in caught)
    assert len(of(callback.events, "episode")) == 10


def test_summary_of_a_run_with_evaluations_has_both(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    folder = tmp_path / "td3c" / "Pendulum-v1_1"
    folder.mkdir(parents=True)
    model = TD3C("MlpPolicy", Monitor(gym.make("Pendulum-v1"), str(folder / "0")), dataset="bundled:pendulum-medium", seed=0,
                 offline_steps=20, warmup_steps=200, policy_kwargs={"net_arch": [16]}, device="cpu")  # fmt: skip
    evaluation = EvalCallback(
        Monitor(gym.make("Pendulum-v1")), eval_freq=300, n_eval_episodes=1, log_path=str(folder), verbose=0
    )
    callback = ChampionChallenger(random_return=-1309, worst_return=-2000, verbose=0)
    model.learn(600, callback=[evaluation, callback])
    model.save(folder / "Pendulum-v1")
    model.env.close()
    assert (folder / EVENTS_FILE).exists()
    summary = summarize_run(folder)
    assert summary.contest is not None and len(summary.contest.episodes()) == 3
    (folder / FIGURE).unlink()
    result = CliRunner().invoke(app, ["summary", str(folder)])
    assert result.exit_code == 0, result.output
    assert "3 of 3 episodes" in result.output and "J after pretraining" in result.output
    assert (folder / FIGURE).exists() and (folder / "run.png").exists() and FIGURE in result.output
