"""Tuning of the finetuning: objective, pruning on dips, shared pretraining, retries, files, and rl_zoo3's -optimize."""

import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
import yaml
from optuna.pruners import MedianPruner, NopPruner
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from typer.testing import CliRunner

from sb3_offline_ft import TD3C, LearnerSnapshot
from sb3_offline_ft.algorithms import search_space
from sb3_offline_ft.cli import app
from sb3_offline_ft.common.search_space import split_finetuning
from sb3_offline_ft.datasets import load_dataset
from sb3_offline_ft.evaluation.comparisons import compare_paired
from sb3_offline_ft.pretrained.start import pretrain
from sb3_offline_ft.study.design.learners import pretraining_recipe
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.cell import run_cell
from sb3_offline_ft.study.engine.queue import KEY, CellState
from sb3_offline_ft.study.engine.status import read_statuses
from sb3_offline_ft.study.report.page import write_report
from sb3_offline_ft.study.tuning.entry import pretrains_alike, spec_seen_from, write_entry, zoo_entry
from sb3_offline_ft.study.tuning.plan import TuningPlan, TuningSettings
from sb3_offline_ft.study.tuning.queue import GIVEN_UP, SCORES, TuningQueue
from sb3_offline_ft.study.tuning.report import parameter_importance
from sb3_offline_ft.study.tuning.run import Tuned, confirm_best, confirmation_text, tune
from sb3_offline_ft.tuning.objective import Objective, ObservedTrial, number_of_last, split_tuning
from sb3_offline_ft.tuning.pruner import DEEPEST_DIP, PRESET, DipPruner, make_pruner
from tests.conftest import REPOSITORY, RunPython
from tests.study_environments import CLOSED, FAIL, FOLDER_VARIABLE, GATED_PENDULUM
from tests.study_runs import environment, wait_until, write_study
from tests.test_zoo_optimize import optimize
from tests.zoo_runs import UNGUARDED, run

SHORT: dict[str, Any] = {
    "interactions": 300,
    "evaluation": {"every": 50, "episodes": 1},
    "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 50}},
    "methods": {
        "td3c": {"algorithm": "td3c"},
        "rebrac": {"algorithm": "rebrac"},
        "td3c-guard": {"algorithm": "td3c", "guard": True},
    },
}
QUIET = Console(quiet=True)
BUNDLED = REPOSITORY / "sb3_offline_ft" / "datasets" / "bundled" / "pendulum-medium"


def settings_for(folder: Path, **changes: Any) -> TuningSettings:
    return TuningSettings(folder, **{"n_trials": 3, "pruner": "none", "prune_dip": math.inf, "startup_trials": 2} | changes)


def plan_for(folder: Path, **changes: Any) -> TuningPlan:
    return TuningPlan(settings_for(folder, **changes), Protocol.load(folder))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", **SHORT)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A tuning of three trials, the first of which is the preset, on data beside the study's folder."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(BUNDLED, folder / "data" / "medium")
    study = write_study(folder / "study", **SHORT | {"datasets": {"medium": "../data/medium?episodes=20"}})
    return tune(settings_for(study), console=QUIET)


# The objective


def test_the_value_is_the_gain_less_the_dip_in_units_of_what_the_policy_is_worth() -> None:
    objective = Objective(dip_penalty=0.5, random_return=0.0, baseline_until=100, n_last=2)
    timesteps, means = [0, 100, 200, 300, 400, 500], [90.0, 110.0, 40.0, 70.0, 140.0, 160.0]
    score = objective.score(timesteps, means, 150)
    assert score is not None
    assert (score.initial_return, score.last_return, score.lowest_return) == (100.0, 150.0, 40.0)
    assert score.dip_depth == pytest.approx(0.6)
    assert score.value == pytest.approx(0.5 - 0.5 * 0.6)
    # A longer warm-up measures the pretrained policy more often, which changes nothing of what it counts for
    longer = objective.score(timesteps, means, 250)
    assert longer is not None and (longer.initial_return, longer.lowest_return) == (100.0, 70.0)
    assert objective.score(timesteps[:2], means[:2], 150) is None


@pytest.mark.parametrize(("random_return", "unit"), [(-50.0, 150.0), (None, 100.0), (100.0, 100.0)])
def test_the_unit_is_the_distance_to_a_random_policy_if_it_is_known(random_return: float | None, unit: float) -> None:
    score = Objective(1.0, random_return, 0, 1).score([0, 10], [100.0, 130.0], 0)
    assert score is not None and score.value == pytest.approx(30 / unit)
    # What was never below has a negative dip, which is no merit
    assert score.dip_depth == pytest.approx(-30 / unit)


@pytest.mark.parametrize(("evaluations", "last"), [(1, 1), (5, 1), (12, 4), (30, 10), (100, 10)])
def test_the_end_is_ten_evaluations_or_a_third(evaluations: int, last: int) -> None:
    assert number_of_last(evaluations) == last


# Pruning


def finished(values: dict[int, float]) -> FrozenTrial:
    return optuna.trial.create_trial(value=list(values.values())[-1], intermediate_values=values)


def running(values: dict[int, float], **attributes: Any) -> FrozenTrial:
    return optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values=values, user_attrs=attributes)


def test_a_deep_dip_ends_a_trial_at_once_but_never_the_presets() -> None:
    study = optuna.create_study(direction="maximize")
    pruner = DipPruner(0.5, NopPruner())
    assert not pruner.prune(study, running({1: 0.0}))
    assert not pruner.prune(study, running({1: 0.0}, **{DEEPEST_DIP: 0.5}))
    assert pruner.prune(study, running({1: 0.0}, **{DEEPEST_DIP: 0.51}))
    assert not pruner.prune(study, running({1: 0.0}, **{DEEPEST_DIP: 3.0, PRESET: True}))


def test_what_counts_for_the_median_is_where_a_trial_is_now() -> None:
    study = optuna.create_study(direction="maximize")
    for value in (0.0, 0.1, 0.2):
        study.add_trial(finished({1: value, 2: value, 3: value, 4: value}))
    pruner = make_pruner("median", 0.5, 3, n_evaluations=2, n_seeds=2)
    fallen = running({1: 0.5, 2: -0.4})
    assert not MedianPruner(n_startup_trials=3).prune(study, fallen)
    assert pruner.prune(study, fallen)
    assert not pruner.prune(study, running({1: 0.5, 2: 0.15}))
    assert not pruner.prune(study, running({}))
    # Only where a run of some seed has ended and another one follows
    assert not pruner.prune(study, running({1: -0.4}))
    assert not pruner.prune(study, running({1: 0.5, 2: 0.15, 3: -0.4}))
    assert not pruner.prune(study, running({1: 0.5, 2: 0.15, 3: -0.4, 4: -0.4}))
    assert not make_pruner("median", 0.5, 4, n_evaluations=2, n_seeds=2).prune(study, fallen)


def test_the_median_ends_no_more_than_half_of_the_trials_that_are_as_good_as_the_others() -> None:
    generator = np.random.default_rng(0)
    pruner = make_pruner("median", math.inf, 10, n_evaluations=20, n_seeds=2)

    def values() -> dict[int, float]:
        return dict(enumerate(generator.normal(size=40).tolist(), start=1))

    def given_up() -> bool:
        study = optuna.create_study(direction="maximize")
        study.add_trials([finished(values()) for _ in range(10)])
        told = list(values().items())
        return any(pruner.prune(study, running(dict(told[:n]))) for n in range(1, 41))

    n_trials = 200
    # One half in truth: more than 0.6 of 200 has a probability of 0.002
    assert sum(given_up() for _ in range(n_trials)) <= 0.6 * n_trials


# What is searched


def test_the_preset_is_found_in_the_search_space(study: Path) -> None:
    plan = plan_for(study)
    parameters = plan.preset_parameters()
    assert parameters.keys() == search_space("td3c").tuned.keys()
    hyperparams = plan.method.hyperparams
    changed = plan.changed(parameters)
    assert changed.pop("epsilon") == "geo_0.03_0.01"
    assert changed == {name: hyperparams.get(name, TD3C_DEFAULTS.get(name)) for name in changed}
    assert plan.tuned(None) is plan.method


TD3C_DEFAULTS = {"critic_warmup_steps": 0, "gradient_steps": 1, "multiplier_learning_rate": 1e-2, "policy_averaging": 0.99}


def test_values_that_the_search_space_does_not_have_are_left_to_the_sampler(tmp_path: Path) -> None:
    methods = {
        "td3c": {
            "algorithm": "td3c",
            "hyperparams": {"warmup_steps": 2, "offline_fraction": "lin_0.5_0.2", "epsilon": "lin_0.1"},
        },
        "rebrac": {"algorithm": "rebrac", "hyperparams": {"online_actor_bc": "geo_1_0.01", "noise_type": None}},
    }
    write_study(tmp_path, **SHORT | {"methods": methods})
    everything = search_space("td3c").tuned.keys()
    without = {"warmup_steps", "offline_fraction", "offline_fraction_schedule", "epsilon", "epsilon_end_factor"}
    assert plan_for(tmp_path).preset_parameters().keys() == everything - without
    rebrac = plan_for(tmp_path, algo="rebrac").preset_parameters()
    assert (rebrac["online_actor_bc"], rebrac["online_actor_bc_schedule"]) == (1.0, "geometric")
    # The default falls to a half, which the space does not have
    write_study(tmp_path, **SHORT)
    assert "online_actor_bc" not in plan_for(tmp_path, algo="rebrac").preset_parameters()


def test_only_trials_that_can_be_compared_are_in_one_tuning(study: Path) -> None:
    first = plan_for(study)
    assert plan_for(study, n_trials=50, sampler="random", prune_dip=0.2).name == first.name
    names = {first.name, plan_for(study, dip_penalty=2.0).name, plan_for(study, fixed=("epsilon",)).name}
    write_study(study, **SHORT | {"interactions": 400})
    assert len(names | {plan_for(study).name}) == 4
    assert plan_for(study, fixed=("epsilon",)).facts == {"n_timesteps": 400, "fixed": ["epsilon"]}


def test_methods_and_seeds_are_chosen_from_the_study(study: Path) -> None:
    assert plan_for(study).method.name == "td3c"
    assert plan_for(study, method="td3c-guard").method.guard is not None
    # The study has the seeds 0 and 1, whose runs shall judge what was tuned
    apart = plan_for(study)
    assert apart.seeds == (1000, 1001) and apart.fresh_seeds(2) == [1002, 1003]
    together = plan_for(study, n_seeds=3, same_seeds=True)
    assert together.seeds == (0, 1, 1000) and together.fresh_seeds(2) == [1001, 1002]
    assert plan_for(study, n_seeds=2, same_seeds=True).seeds == (0, 1)
    # A study that gets more seeds judges by those, too, and the tuning goes on where it was
    write_study(study, **SHORT | {"seeds": 50})
    assert plan_for(study).name == apart.name
    write_study(study, **SHORT | {"seeds": [1001, 2**32 - 1]})
    assert plan_for(study).seeds == (1000, 1002) and plan_for(study).fresh_seeds(1) == [1003]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_seeds": 1}, "`--seeds` must be at least 2, found 1: the best of many trials with one seed each is the luckiest"),
        ({"n_trials": 0}, "`--n-trials` must be at least 1, found 0"),
        ({"dip_penalty": -1.0}, "`--dip-penalty` must be a finite number of at least 0, found -1.0"),
        ({"prune_dip": 0.0}, "`--prune-dip` must be above 0, or inf for never, found 0.0"),
        ({"algo": "td3"}, "`--algo` must be one of td3bc, td3c, rebrac, found 'td3'"),
        ({"sampler": "grid"}, "`--sampler` must be one of tpe, random, found 'grid'"),
        ({"pruner": "halving"}, "`--pruner` must be one of median, hyperband, none, found 'halving'"),
        ({"algo": "td3bc"}, r"study.yml: no method has the algorithm td3bc .* add `td3bc: {algorithm: td3bc}` to `methods`"),
        ({"method": "td3c-gard"}, "`--method td3c-gard` is no method that can be tuned: .* Did you mean 'td3c-guard'"),
        ({"dataset": "medum"}, "`--dataset medum` is no dataset of the study. Did you mean 'medium'"),
        ({"fixed": ("epsilom",)}, "`--fix epsilom` is no hyperparameter that is tuned. Did you mean 'epsilon'"),
    ],
)
def test_settings_that_are_not_possible_are_refused(study: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(study, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "study tune: `--seeds` must be at least 2"),
        (["-o", "best.json"], "study tune: `--output` must end in .yml or .yaml"),
        (["--confirm", "1"], "study tune: `--confirm` must be at least 2 seeds"),
        (["--timeout", "0"], "study tune: `--timeout` must be above 0 seconds"),
    ],
)
def test_the_command_reports_errors_in_one_line_and_writes_nothing(study: Path, options: list[str], message: str) -> None:
    told = CliRunner().invoke(app, ["study", "tune", str(study), *options])
    assert told.exit_code == 1
    assert message in told.stderr and told.stderr.count("\n") == 1
    assert [path.name for path in study.iterdir()] == ["study.yml"]


# Trials


def test_trials_are_runs_of_the_study_with_the_presets_first(tuned: Tuned) -> None:
    plan, trials = tuned.result.plan, tuned.result.trials
    assert [trial.state for trial in trials] == 3 * [TrialState.COMPLETE]
    assert [PRESET in trial.user_attrs for trial in trials] == [True, False, False]
    assert trials[0].params == plan.preset_parameters()
    folder = plan.study.folder / "pretrained"
    # One pretraining for each seed
    before = sorted(folder.glob("*.pt"))
    assert len(before) == 2
    for trial, method in ((trials[0], plan.method), (trials[2], plan.tuned(trials[2].params))):
        values = []
        for seed, told in zip(plan.seeds, trial.user_attrs[SCORES], strict=True):
            result = run_cell(plan.study, Cell("medium", method, seed), pretrained_folder=folder)
            means = result.returns.mean(axis=1)
            # 15 interactions are the shortest warm-up, so only the first evaluation is of the same policy in all trials
            unit, free = abs(means[0] + 1309), means[result.timesteps > result.frozen_until]
            assert told["dip_depth"] == pytest.approx((means[0] - free.min()) / unit)
            values.append((means[-2:].mean() - means[0]) / unit - max(0.0, told["dip_depth"]))
            assert told["value"] == pytest.approx(values[-1])
            # Facts about the run are kept too
            for fact in ("frozen_until", "interactions", "replay_buffer", "updates", "alarms", "code"):
                assert told[fact] == result.manifest[fact], fact
        assert trial.value == pytest.approx(np.mean(values))
        assert trial.intermediate_values[12] == trial.value
    assert sorted(folder.glob("*.pt")) == before


def test_a_tuning_goes_on_where_it_was(tuned: Tuned, tmp_path: Path) -> None:
    study = Path(shutil.copytree(tuned.result.plan.study.folder.parent, tmp_path / "copy")) / "study"
    options = ["--n-trials", "3", "--pruner", "none", "--prune-dip", "inf", "--startup-trials", "2"]
    told = CliRunner().invoke(app, ["study", "tune", str(study), *options])
    assert told.exit_code == 0, told.output
    assert "td3c on medium: 3 complete" in told.stdout and tuned.result.verdict in told.stdout
    assert "Written: " in told.stdout and "begins" not in told.stdout
    # A new one has no time, and waits for the next call
    later = tune(settings_for(study, n_trials=4), timeout=1e-3, console=QUIET)
    assert [trial.number for trial in later.result.trials] == [0, 1, 2]
    longer = TuningQueue(plan_for(study, n_trials=4))
    assert longer.enqueue() == 0
    claim = longer.claim(list(longer.cells))
    assert claim is not None and claim.key == "slot-3"
    claim.let_go()


def test_trials_are_described_by_the_search_that_they_were_drawn_with(tuned: Tuned, tmp_path: Path) -> None:
    study = Path(shutil.copytree(tuned.result.plan.study.folder.parent, tmp_path / "copy")) / "study"
    later = tune(settings_for(study, n_trials=4, sampler="random", prune_dip=9.0), console=QUIET)
    drawn, pruned = "tpe sampler, none pruner, 2 random trials first", "random sampler, none pruner, 2 random trials first"
    assert later.result.searches == [
        f"{drawn}; a trial was given up as the pruner says, but never the preset: preset, trial 1 and trial 2.",
        f"{pruned}; a trial was given up at a dip deeper than 9, or as the pruner says, but never the preset: trial 3.",
    ]
    page = (later.files[0].parent / "tuning.html").read_text()
    assert all(text in page for text in later.result.searches)
    # All of them had a memory, and were updated
    assert later.result.shortcomings == []


def test_draws_depend_on_the_study_and_the_trials_before_only(study: Path, tuned: Tuned) -> None:
    drawn = []
    for storage in ("one.log", "other.log"):
        queue = TuningQueue(plan_for(study), str(study / storage))
        queue.enqueue()
        params = []
        for _ in range(2):
            claim = queue.claim(list(queue.cells))
            assert claim is not None
            params.append(queue.plan.space.draw(queue.trial(claim)))
            queue.finish(claim, 0.0)
        drawn.append(params)
    assert drawn[0] == drawn[1]
    assert drawn[0] == [trial.params for trial in tuned.result.trials[:2]]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_lost_trial_is_tried_again_with_the_same_hyperparameters(study: Path, kind: str) -> None:
    storage = str(study / "shared.log") if kind == "journal" else f"sqlite:///{study / 'shared.db'}"
    queue = TuningQueue(plan_for(study, n_trials=2), storage)
    queue.enqueue()
    preset = queue.claim(list(queue.cells))
    lost = queue.claim(list(queue.cells))
    assert preset is not None and lost is not None
    parameters = queue.plan.space.draw(queue.trial(lost))
    queue.finish(preset, 1.0)
    lost.let_go()
    queue.lost(lost.number)
    other = TuningQueue(plan_for(study, n_trials=2), storage, create=False)
    assert other.enqueue() == 1
    again = other.claim(list(other.cells))
    assert again is not None and again.number == 2
    assert other.plan.space.draw(other.trial(again)) == parameters
    assert other.finish(again, 0.5)
    assert other.claim(list(other.cells)) is None
    assert [trial.number for trial in other.trials()] == [0, 2]
    # Who was believed to be dead is told, and changes nothing
    assert not queue.finish(lost, 9.0)


def test_dips_end_trials_early(study: Path) -> None:
    done = tune(settings_for(study, prune_dip=1e-6), console=QUIET)
    preset, *others = done.result.trials
    assert preset.state == TrialState.COMPLETE and len(preset.intermediate_values) == 10
    assert done.result.preset_is_best
    dipped = [trial for trial in others if trial.state == TrialState.PRUNED]
    assert dipped
    for trial in dipped:
        assert trial.user_attrs[DEEPEST_DIP] > 1e-6
        assert f"deepest dip {trial.user_attrs[DEEPEST_DIP]:.2f}" in trial.user_attrs[GIVEN_UP]
        assert trial.value == trial.intermediate_values[trial.last_step or 0]
        assert len(trial.intermediate_values) < 10
    page = (done.files[0].parent / "tuning.html").read_text()
    assert "No trial was better than the preset" in page and "given up at" in page


def watched(folder: Path, **changes: Any) -> Path:
    return write_study(folder / "study", **SHORT | {"env": GATED_PENDULUM, "random_return": -1309} | changes)


def test_the_trial_of_a_killed_worker_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    study = watched(tmp_path)
    (tmp_path / CLOSED).touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_offline_ft", "study", "tune", str(study), "--n-trials", "1"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    queue = None

    def is_running() -> bool:
        nonlocal queue
        if queue is None and (study / "tune.log").exists():
            try:
                queue = TuningQueue(plan_for(study, n_trials=1), create=False)
            except FileNotFoundError:
                return False
        if queue is None:
            return False
        running = queue.study.get_trials(states=(TrialState.RUNNING,))
        # Who is killed while it writes keeps the journal's lock for half a minute
        return any(trial.params.keys() == queue.plan.preset_parameters().keys() for trial in running)

    try:
        wait_until(is_running, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (tmp_path / CLOSED).unlink()
    done = tune(settings_for(study, n_trials=1), console=QUIET)
    assert [(trial.number, trial.state) for trial in done.result.trials] == [(1, TrialState.COMPLETE)]
    assert queue is not None
    lost, again = queue.study.trials
    assert lost.state == TrialState.FAIL and again.params == done.result.plan.preset_parameters()
    assert again.user_attrs[KEY] == lost.user_attrs[KEY]


def test_a_preset_that_fails_ends_the_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    study = watched(tmp_path)
    (tmp_path / FAIL).touch()
    with pytest.raises(
        OSError, match="The preset failed, without which nothing can be compared: RuntimeError: The pendulum fell"
    ):
        tune(settings_for(study, n_trials=4), console=QUIET)
    trials = TuningQueue(plan_for(study), create=False).trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL]
    # It waits no more, unless it is asked for
    queue = TuningQueue(plan_for(study, n_trials=1))
    assert (queue.enqueue(), queue.enqueue(retry_failed=True)) == (0, 1)


# What is written


def test_the_files_say_what_came_out(tuned: Tuned) -> None:
    names = {path.name for path in tuned.files}
    assert names == {"hyperparams.yml", "history.svg", "history.png", "tuning.html", "trials.csv"}
    folder = tuned.files[0].parent
    page = (folder / "tuning.html").read_text()
    assert tuned.result.verdict in page and "cannot be computed from 3 completed trials: it needs 10" in page
    assert "<script" not in page and "src=" not in page
    assert "tpe sampler, none pruner, 2 random trials first; a trial was given up as the pruner says, but never" in page
    columns, *rows = (folder / "trials.csv").read_text().splitlines()
    params = [f"params_{name}" for name in sorted(search_space("td3c").tuned)]
    facts = ["number", "trial", "state", "value", *params, "scores", "search", "deepest_dip", "datetime_start", "duration"]
    assert columns.split(",") == facts and len(rows) == 3
    assert (folder / "history.png").read_bytes().startswith(b"\x89PNG")


def assert_nothing_of_this_machine(folder: Path, secrets: list[str]) -> None:
    texts = [path for path in folder.rglob("*") if path.suffix in (".yml", ".html", ".csv", ".svg", ".md")]
    assert len(texts) >= 2
    for path in texts:
        assert not [secret for secret in secrets if secret in path.read_text(encoding="utf-8")], path


def test_the_files_say_nothing_of_the_machine(tuned: Tuned, study: Path) -> None:
    plan = tuned.result.plan
    secrets = [str(plan.study.folder), str(plan.study.folder.parent), f"{socket.gethostname()}:"]
    assert_nothing_of_this_machine(tuned.files[0].parent, secrets)
    # Nor where it was when a trial failed
    queue = TuningQueue(plan_for(study, n_trials=2))
    queue.enqueue()
    preset, other = queue.claim(list(queue.cells)), queue.claim(list(queue.cells))
    assert preset is not None and other is not None
    queue.trial(preset).set_user_attr(SCORES, tuned.result.trials[0].user_attrs[SCORES])
    queue.finish(preset, 0.0)
    other.fail(f'Traceback:\n  File "{study}/env.py", line 3\nRuntimeError: It fell\n')
    done = tune(settings_for(study, n_trials=2), console=QUIET)
    assert "trial 1: failed: RuntimeError: It fell" in (done.files[0].parent / "tuning.html").read_text()
    assert_nothing_of_this_machine(done.files[0].parent, [str(study), "Traceback", f"{socket.gethostname()}:"])


def test_paths_lead_from_other_folders_to_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, data, here = tmp_path / "disk" / "study", tmp_path / "disk" / "data", tmp_path / "here"
    shutil.copytree(BUNDLED, data / "medium")
    shutil.copytree(BUNDLED, here / "own")
    shutil.copytree(BUNDLED, real / "inside")
    specs = {
        "beside": "../data/medium?episodes=20",
        "inside": "inside?episodes=30",
        "mixed": "0.5*../data/medium?episodes=10 + 0.5*bundled:pendulum-medium",
        "here": "./own?episodes=5",
        "absolute": f"{data / 'medium'}?episodes=7",
        "bundled": "bundled:pendulum-medium",
    }
    write_study(real, **SHORT | {"datasets": specs})
    # As on clusters, where homes link to a larger disk: the system looks for `..` there
    study = tmp_path / "home"
    study.symlink_to(real, target_is_directory=True)
    monkeypatch.chdir(here)
    protocol = Protocol.load(study)
    folder = study / "tuning" / "x"
    folder.mkdir(parents=True)
    moved = {label: spec_seen_from(protocol, label, folder) for label in specs}
    prints = {label: protocol.dataset(label).fingerprint for label in specs}
    assert {label for label in specs if moved[label] == specs[label]} == {"absolute", "bundled"}
    assert [label for label in specs if str(tmp_path) in moved[label]] == ["absolute"]
    # What begins with a point is not taken for the name of a dataset of Minari's
    assert spec_seen_from(protocol, "inside", study) == "./inside?episodes=30"
    monkeypatch.chdir(folder)
    assert {label: load_dataset(spec).fingerprint for label, spec in moved.items()} == prints


def with_best(tuned: Tuned, number: int) -> Any:
    return replace(tuned.result, best=tuned.result.trials[number])


def test_the_configuration_pretrains_as_the_trials_were_and_finetunes_as_the_best(tuned: Tuned) -> None:
    result, plan = with_best(tuned, 1), tuned.result.plan
    entry = zoo_entry(plan, result.method, plan.study.folder)
    changes = {name: new for name, (_, new) in result.changes.items()}
    whole_run, finetuning = split_finetuning(entry)
    assert finetuning == {"learning_rate": changes.pop("learning_rate")}
    assert {name: whole_run[name] for name in changes} == changes
    assert (whole_run["learning_rate"], whole_run["offline_steps"], whole_run["n_timesteps"]) == (1e-3, 50, 300)
    champion = {"random_return": -1309, "worst_return": -1900}
    assert whole_run["callback"][1]["sb3_offline_ft.ChampionChallenger"] == champion
    # What TD3C would learn from the data by this configuration is what TD3BC learned for the trials
    env = make_vec_env("Pendulum-v1")
    arguments = {name: value for name, value in whole_run.items() if name not in ("n_timesteps", "dataset", "callback")}
    recipe = pretraining_recipe("td3c", arguments, plan.study.dataset("medium"), env, plan.seeds[0], "cpu")
    state = pretrain(recipe, env).snapshot.policy_state
    env.close()
    expected = [LearnerSnapshot.load(path).policy_state for path in (plan.study.folder / "pretrained").glob("*.pt")]
    assert any(all(th.equal(state[name], each[name]) for name in state) for each in expected)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [("td3c td3bc", True), ("rebrac rebrac", True), ("td3c rebrac", False), ("td3bc td3", False), ("td3 td3", True)],
)
def test_algorithms_that_do_the_same_offline_are_known(pair: str, expected: bool) -> None:
    assert pretrains_alike(*pair.split()) is pretrains_alike(*reversed(pair.split())) is expected


def test_a_pretraining_that_rl_zoo3_cannot_repeat_is_said(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "study", **SHORT | {"pretraining": {"algorithm": "rebrac", "hyperparams": {"offline_steps": 9}}}
    )
    plan = plan_for(study)
    text = write_entry(plan, plan.method, tmp_path / "best.yml", {})
    assert "# The trials started from policies pretrained by rebrac; rl_zoo3 pretrains by td3c" in text
    entry = yaml.safe_load(text)["Pendulum-v1"]
    assert entry["offline_steps"] == 9 and "actor_bc_coef" not in entry


def test_the_zoo_command_takes_the_configuration(run_python: RunPython, tmp_path: Path, tuned: Tuned) -> None:
    result = with_best(tuned, 2)
    folder = tmp_path / "elsewhere"
    text = write_entry(result.plan, result.method, folder / "best.yml", {})
    assert "# In this file's folder, from which `dataset` leads to the data:\n# python " in text
    command = next(line for line in text.splitlines() if line.startswith("# python ")).removeprefix("# python ").split()
    assert command[:8] == ["-m", "rl_zoo3.train", "--algo", "td3c", "--env", "Pendulum-v1", "-conf", "best.yml"]
    trained = run_python(*command, "--seed", "0", "-f", "logs", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    model = TD3C.load(folder / "logs" / "td3c" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    assert (model.offline_steps_done, model.num_timesteps) == (50, 300)
    changes = {name: new for name, (_, new) in result.changes.items()}
    assert model.epsilon == changes["epsilon"]
    assert model.lr_schedule(1.0) == changes["learning_rate"]
    assert model.warmup_steps == changes["warmup_steps"]


def test_importance_needs_trials_that_differ() -> None:
    few = optuna.create_study(direction="maximize")
    few.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=9)
    assert "cannot be computed from 9 completed trials: it needs 10" in parameter_importance(few).reason
    constant = optuna.create_study(direction="maximize")
    constant.optimize(lambda trial: 0 * trial.suggest_float("x", 0, 1), n_trials=12)
    assert "all trials have the same value" in parameter_importance(constant).reason
    many = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    many.optimize(lambda trial: trial.suggest_float("x", 0, 1) + 0 * trial.suggest_float("y", 0, 1), n_trials=60)
    shares = parameter_importance(many).shares
    assert list(shares) == ["x", "y"] and shares["x"] > 0.7


def test_the_best_is_confirmed_with_fresh_seeds(tuned: Tuned) -> None:
    result = with_best(tuned, 1)
    settings = result.plan.settings
    comparison = confirm_best(result, settings, 2, 1, QUIET)
    assert comparison.n_pairs == 2 and comparison.smallest_p_value == 0.5
    protocol = Protocol.load(next(tuned.files[0].parent.glob("confirmation-*")))
    assert protocol.seeds == (1002, 1003)
    assert protocol.dataset("medium").fingerprint == result.plan.study.dataset("medium").fingerprint
    preset, best = protocol.methods
    assert dict(preset.hyperparams) == dict(result.plan.method.hyperparams)
    assert dict(best.hyperparams) == dict(result.method.hyperparams)
    assert preset.pretraining_hyperparams == result.plan.method.pretraining_hyperparams
    differences = []
    for seed in protocol.seeds:
        values = []
        for method in (best, preset):
            told = run_cell(protocol, Cell("medium", method, seed), pretrained_folder=protocol.folder / "pretrained")
            score = result.plan.objective.score(told.timesteps.tolist(), told.returns.mean(axis=1).tolist(), told.frozen_until)
            assert score is not None
            values.append(score.value)
        differences.append(values[0] - values[1])
    assert comparison.difference.value == pytest.approx(np.mean(differences))
    # It is a study as any other
    assert [each.state for each in read_statuses(protocol)] == 4 * [CellState.DONE]
    assert [path.name for path in write_report(protocol.folder, formats=["html"])] == ["report.html"]
    assert_nothing_of_this_machine(protocol.folder, [str(result.plan.study.folder.parent)])


def confirmed(differences: Any) -> str:
    return confirmation_text(compare_paired([differences], [np.zeros(len(differences))], n_resamples=100))


def test_equal_hyperparameters_are_seldom_called_different() -> None:
    # Of 400 repetitions at most a twentieth may be wrong in the long run: more than the limit are in one of 10,000 tests
    limit = stats.binom.isf(1e-4, 400, 0.05)
    rng = np.random.default_rng(0)
    for n_seeds, most in ((2, 0), (5, 0), (6, limit), (8, limit)):
        texts = [confirmed(rng.normal(size=n_seeds) - rng.normal(size=n_seeds)) for _ in range(400)]
        assert sum(text.endswith((": better.", ": worse.")) for text in texts) <= most


def test_differences_are_shown_by_six_seeds_and_by_no_fewer() -> None:
    gains = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert confirmed(gains).startswith("With 6 fresh seeds, best less preset is +0.450")
    assert confirmed(gains).endswith("sign-flip test p = 0.0312): better.")
    assert confirmed(-gains).endswith(": worse.")
    # One seed of six that says otherwise, and nothing is shown, whatever an interval says
    assert confirmed([-0.1, *gains[1:]]).endswith("p = 0.0625): not shown to be different.")
    few = confirmed(gains[:5])
    assert "no difference can be shown with fewer than 6 seeds: p is at least 0.0625 with so few" in few


def test_too_few_fresh_seeds_are_said_before_the_work(study: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(ValueError, match="No trial was completed"):
        tune(settings_for(study), confirm=5, timeout=1e-9, console=console)
    assert "`--confirm 5`: no difference can be shown with fewer than 6 seeds" in console.file.getvalue()  # type: ignore[attr-defined]


# -optimize


def test_optimize_takes_the_dip_off_the_value(tmp_path: Path) -> None:
    common = {"pruner": "none", "sampler": "random", "n_evaluations": 3, "seed": 5}
    values = {}
    for penalty in (0.0, 2.0):
        settings = UNGUARDED | {"warmup_steps": 45, "tuning_dip_penalty": penalty}
        values[penalty] = optimize(tmp_path / str(penalty), hyperparams=settings, **common).trials
    for plain, penalized in zip(values[0.0], values[2.0], strict=True):
        assert plain.params == penalized.params
        dip = max(0.0, plain.user_attrs["dip"])
        assert penalized.value == pytest.approx(plain.value - 2 * dip)
        assert penalized.intermediate_values[3] == penalized.value
        # The first evaluation is in the warm-up: there is no dip yet
        assert penalized.intermediate_values[1] == plain.intermediate_values[1]
    assert any(plain.user_attrs["dip"] > 0 for plain in values[0.0])


def test_runs_without_optimize_do_not_mind_the_penalty(tmp_path: Path) -> None:
    model = run(tmp_path, hyperparams=UNGUARDED | {"tuning_dip_penalty": 1.0})
    assert model.num_timesteps == 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tuning_dip": 1.0}, "`tuning_dip` is no known setting of the tuning: there is `tuning_dip_penalty`"),
        ({"tuning_dip_penalty": -0.1}, "`tuning_dip_penalty` must be a finite number of at least 0, found -0.1"),
        ({"tuning_dip_penalty": "1"}, "`tuning_dip_penalty` must be a finite number of at least 0, found '1'"),
        ({"tuning_dip_penalty": math.inf}, "`tuning_dip_penalty` must be a finite number of at least 0, found inf"),
    ],
)
def test_penalties_that_are_none_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_tuning(given | {"learning_rate": 1e-3})


def test_a_penalty_needs_evaluations_before_and_after_the_warmup(tmp_path: Path) -> None:
    trial = optuna.create_study().ask()
    with pytest.raises(RuntimeError, match="no evaluation of the pretrained policy"):
        ObservedTrial(trial, frozen_steps=0, random_return=None, dip_penalty=1.0).report(5.0, 1)
    ObservedTrial(trial, frozen_steps=0, random_return=None).report(5.0, 1)
    settings = UNGUARDED | {"warmup_steps": 100, "tuning_dip_penalty": 1.0}
    # Evaluations after 60 and 120 interactions, the last one of a policy that has just begun to change
    assert optimize(tmp_path / "a", "td3bc", settings, n_trials=1).trials[0].value is not None
    with pytest.raises(ValueError, match=r"`warmup_steps` are 120.*no evaluation after them"):
        optimize(tmp_path / "b", "td3bc", settings | {"warmup_steps": 120}, n_trials=1)


def test_a_penalty_needs_a_pretrained_policy(tmp_path: Path) -> None:
    settings = UNGUARDED | {"dataset": None, "offline_steps": 0, "tuning_dip_penalty": 1.0}
    with pytest.raises(ValueError, match="without `dataset` and `offline_steps` there is no pretrained policy"):
        optimize(tmp_path, "td3bc", settings, n_trials=1)
