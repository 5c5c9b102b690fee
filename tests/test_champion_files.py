"""Champion and challenger in files and beside other callbacks: interrupts, saved runs, exports, evaluations, the guard."""

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from rl_zoo3.utils import get_callback_list
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

import sb3_offline_ft.deployment
from sb3_offline_ft import TD3BC, TD3C, CollapseGuard, OfflineTD3
from sb3_offline_ft.deployment import ChampionChallenger, Kind
from tests.contests import (
    BAD,
    QUICK,
    Aim,
    Hold,
    Record,
    aim,
    choice,
    episodes,
    make,
    noise,
    of,
    shape_of,
)
from tests.guarded_runs import parameters, same

OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*as long as the run", "ignore:.*neither a dataset nor", "ignore:.*learns what is best from an EvalCallback"
)


def own_actions(model: Any, steps: int) -> list[np.ndarray]:
    """What a learner does without a contest, which is to be what its own policy chooses; checked."""
    seen: list[np.ndarray] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            expected, _ = model.predict(model._last_obs, deterministic=True)
            np.testing.assert_allclose(self.locals["actions"], expected, atol=1e-6)
            seen.append(self.locals["actions"])
            return True

    model.learn(steps, callback=Look(), reset_num_timesteps=False)
    return seen


# Interrupted


class Interrupt(BaseCallback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        super().__init__()
        self.step, self.error = step, error

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            raise self.error
        return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("algorithm", [TD3, OfflineTD3])
def test_after_an_interrupted_run_the_learner_acts_itself(
    algorithm: type[OffPolicyAlgorithm], error: type[BaseException], tmp_path: Path
) -> None:
    model = make(algorithm)
    with pytest.raises(error):
        model.learn(200, callback=[ChampionChallenger(**QUICK), Interrupt(33, error)])
    aim(model, BAD)
    assert np.mean(own_actions(model, 20)) > 0.9
    assert type(model) is algorithm
    model.save(tmp_path / "model")
    assert np.mean(own_actions(algorithm.load(tmp_path / "model", make_vec_env(Hold)), 10)) > 0.9


@pytest.mark.parametrize("algorithm", [TD3, OfflineTD3, SAC])
def test_after_its_run_the_learner_acts_itself_and_evaluations_are_its_own(algorithm: type[OffPolicyAlgorithm]) -> None:
    model = make(algorithm)
    evaluation = EvalCallback(make_vec_env(Hold), eval_freq=20, n_eval_episodes=2, verbose=0)
    model.learn(60, callback=[evaluation, ChampionChallenger(**QUICK)])
    assert type(model) is algorithm and evaluation.model is model
    aim(model, BAD)
    model.learn(20, callback=evaluation, reset_num_timesteps=False)
    assert evaluation.last_mean_reward < 1
    if algorithm is not SAC:
        assert np.mean(own_actions(model, 20)) > 0.9


def test_an_interrupted_run_goes_on_with_the_same_objects() -> None:
    """A trial that was not finished is charged its worst case, and what is left of it counts for nobody."""
    model = make()
    contest = ChampionChallenger(**QUICK)
    record = Record(contest)
    with pytest.raises(KeyboardInterrupt):
        model.learn(400, callback=[record, contest, Interrupt(54, KeyboardInterrupt)])
    assert record.steps[-1].actors == [Kind.TRIAL]
    budget = contest.contest.budget
    assert budget is not None
    model.learn(200, callback=[record, contest], reset_num_timesteps=False)
    after = episodes(contest)[5]
    assert (after["kind"], after["counts"], after["timestep"]) == ("serve", False, 60)
    assert after["lost"] == pytest.approx(1.0)
    assert episodes(contest, Kind.TRIAL)


# Going on


def test_going_on_with_the_same_objects_is_the_same_as_one_run_to_the_bit() -> None:
    runs = []
    for steps in ([600], [125, 300, 175]):
        model = make(action_noise=noise(), learning_rate=1e-3)
        contest = ChampionChallenger(**QUICK)
        for index, n in enumerate(steps):
            model.learn(n, callback=contest, reset_num_timesteps=index == 0)
        told = [facts for facts in shape_of(contest) if ("event", "'end'") not in facts]
        runs.append((told, parameters(model), contest.champion.returns))
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("algorithm", [TD3, TD3C])
def test_a_saved_run_goes_on_in_the_middle_of_a_trial(algorithm: type[OffPolicyAlgorithm], tmp_path: Path) -> None:
    model = make(algorithm)
    contest = ChampionChallenger(**QUICK, path=tmp_path)
    record = Record(contest)
    # An episode is running when it is saved
    model.learn(600, callback=[record, contest, Aim(60), CheckpointCallback(555, str(tmp_path), save_replay_buffer=True)])
    before = contest.contest
    step = record.steps[554]
    predecessor = before.predecessor
    assert predecessor is not None and step.champion is before.champion and step.champion.name > 0

    loaded: Any = algorithm.load(tmp_path / "rl_model_555_steps.zip", make_vec_env(Hold, seed=5))
    again = ChampionChallenger(**QUICK, path=tmp_path)
    seen = Record(again)
    loaded.learn(45, callback=[seen, again], reset_num_timesteps=False)
    after = again.contest
    assert of(again, "start")[-1]["resumed"] and len(of(again, "start")) == 2
    assert after.champion.name == step.champion.name and after.predecessor is not None
    assert after.predecessor.name == predecessor.name and after.predecessor.returns == predecessor.returns
    np.testing.assert_array_equal(choice(loaded, after.champion, OBSERVATIONS), choice(model, before.champion, OBSERVATIONS))
    assert after.champion.returns[:5] == before.champion.returns[:5]
    assert after.n_tests >= 1 and after.budget is not None
    # The rest of the episode counts for nobody
    assert seen.steps[0].actors == [Kind.SERVE]
    since = again.events.index(of(again, "start")[-1])
    first = next(event for event in again.events[since:] if event["event"] == "episode")
    if "challenger" in step.contenders:
        assert seen.steps[0].contenders["challenger"].name == step.contenders["challenger"].name
    assert not first["counts"]


def test_the_state_in_a_file_is_that_of_the_contest(tmp_path: Path) -> None:
    model = make()
    # A challenger that is about as good as the champion is still being tested then
    rules: dict[str, Any] = {**QUICK, "controls": "concurrent", "futility": 0.0}
    contest = ChampionChallenger(**rules)
    model.learn(80, callback=contest)
    challenge, budget = contest.contest.challenge, contest.contest.budget
    assert challenge is not None and challenge.test is not None and budget is not None
    model.save(tmp_path / "model")
    loaded: Any = TD3.load(tmp_path / "model", make_vec_env(Hold, seed=5))
    again = ChampionChallenger(**rules)
    kept: list[dict[str, Any]] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            kept.append(again.contest.state_dict())
            return True

    loaded.learn(1, callback=[Look(), again], reset_num_timesteps=False)
    # The test begins anew
    expected = json.loads(json.dumps(contest.contest.state_dict()))
    assert kept[0] == expected | {"n_tests": expected["n_tests"] + 1}


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    model = make()
    model.learn(100, callback=ChampionChallenger(**QUICK))
    model.save(tmp_path / "model")

    def go_on(**settings: Any) -> ChampionChallenger:
        contest = ChampionChallenger(**{**QUICK, **settings})
        loaded: Any = TD3.load(tmp_path / "model", make_vec_env(Hold, seed=5))
        loaded.learn(20, callback=contest, reset_num_timesteps=False)
        return contest

    with pytest.warns(UserWarning, match="`risk_budget` stays 0.5, not 0.9; `futility` is 0.3 from now on, before 0.1"):
        contest = go_on(risk_budget=0.9, futility=0.3)
    assert contest.contest.budget is not None and contest.contest.budget.share == contest.contest.rules.risk_budget == 0.5
    with pytest.raises(ValueError, match="`segment_steps` is 5, and the saved run had None"):
        go_on(segment_steps=5)
    assert of(go_on(), "warning") == []


def test_a_damaged_state_begins_anew_with_a_warning(tmp_path: Path) -> None:
    model = make()
    model.learn(100, callback=ChampionChallenger(**QUICK))
    model.champion_challenger_state = "{"
    with pytest.warns(UserWarning, match="begins anew"):
        model.learn(50, callback=(contest := ChampionChallenger(**QUICK)), reset_num_timesteps=False)
    assert contest.champion.name == 100


def test_the_learner_is_put_back_in_a_run_that_goes_on_from_a_file(tmp_path: Path) -> None:
    """Of the champion there is only the policy in the file, but that is enough to learn on."""
    model = make(SAC)
    model.learn(80, callback=ChampionChallenger(**QUICK))
    model.save(tmp_path / "model")
    loaded: Any = SAC.load(tmp_path / "model", make_vec_env(Hold, seed=5))

    class Spoil(Aim):
        """As a gradient step with a loss that is not finite does, after which SB3's next one ends the run with an error."""

        @th.no_grad()
        def _on_rollout_start(self) -> None:
            learner: Any = self.model
            if not self.is_done and learner.num_timesteps >= self.step:
                self.is_done = True
                for value in (*learner.policy.parameters(), learner.log_ent_coef):
                    value.fill_(th.nan)

        def _on_step(self) -> bool:
            return True

    contest = ChampionChallenger(**QUICK)
    loaded.learn(100, callback=[Spoil(100), contest], reset_num_timesteps=False)
    assert of(contest, "refused") and of(contest, "restored")
    assert all(bool(value.isfinite().all()) for value in parameters(loaded))


# Absent


@pytest.mark.parametrize("algorithm", [TD3, TD3C])
def test_without_it_nothing_changes_to_the_bit(algorithm: type[OffPolicyAlgorithm]) -> None:
    runs = []
    for load in (False, True):
        if load:
            importlib.reload(importlib.import_module("sb3_offline_ft.deployment.acting"))
            make().learn(20, callback=ChampionChallenger(**QUICK))
        model = make(algorithm, action_noise=noise(), learning_rate=1e-3)
        model.learn(200)
        runs.append((parameters(model), model.replay_buffer.actions[:200].copy()))
    assert same(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


# Exports


@pytest.mark.parametrize(
    ("algorithm", "plain"), [(TD3C, TD3), (TD3BC, TD3), (TD3, TD3), (SAC, SAC), (TQC, TQC), (CrossQ, CrossQ)]
)
def test_the_champion_is_loaded_by_plain_sb3(
    algorithm: type[OffPolicyAlgorithm], plain: type[BaseAlgorithm], tmp_path: Path
) -> None:
    model = make(algorithm, learning_rate=1e-3)
    contest = ChampionChallenger(**QUICK, path=tmp_path)
    model.learn(150, callback=contest)
    own = parameters(model)
    contest.save_champion(tmp_path / "champion")
    assert same(own, parameters(model))
    expected = choice(model, contest.champion, OBSERVATIONS)
    assert not np.allclose(expected, model.predict(OBSERVATIONS, deterministic=True)[0], atol=1e-4)
    for name in ("champion.zip", "best_model.zip"):
        loaded = plain.load(tmp_path / name)
        np.testing.assert_array_equal(loaded.predict(OBSERVATIONS, deterministic=True)[0], expected)
        # What the contest knows is of no use to whoever deploys it
        assert not [key for key in vars(loaded) if "champion" in key]
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_a_champion_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    contest = ChampionChallenger(**QUICK, path=tmp_path)
    model.learn(20, callback=contest)
    before = (tmp_path / "best_model.zip").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.warns(UserWarning, match="the champion cannot be written.*No space left"):
        model.learn(20, callback=contest, reset_num_timesteps=False)
    assert (tmp_path / "best_model.zip").read_bytes() == before


def test_a_file_of_the_middle_of_a_run_needs_no_callback(tmp_path: Path) -> None:
    model = make(TD3C)
    model.learn(100, callback=[ChampionChallenger(**QUICK), CheckpointCallback(57, str(tmp_path))])
    loaded: Any = TD3C.load(tmp_path / "rl_model_57_steps.zip", make_vec_env(Hold))
    aim(loaded, BAD)
    assert np.mean(own_actions(loaded, 10)) > 0.9
    assert isinstance(TD3.load(tmp_path / "rl_model_57_steps.zip"), TD3)


# Beside other callbacks


def test_what_an_evaluation_evaluates_and_saves_is_the_champion(tmp_path: Path) -> None:
    model = make()
    evaluation = EvalCallback(
        make_vec_env(Hold, seed=1), eval_freq=50, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0,
        log_path=str(tmp_path),
    )  # fmt: skip
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0})
    model.learn(200, callback=[evaluation, Aim(20, BAD), contest])
    # The run goes on: still the champion
    model.learn(200, callback=[evaluation, contest], reset_num_timesteps=False)
    results = np.load(tmp_path / "evaluations.npz")["results"].mean(axis=1)
    assert len(results) == 8 and (abs(results - 6.4) < 0.5).all()
    loaded = TD3.load(tmp_path / "best_model.zip")
    assert abs(loaded.predict(OBSERVATIONS)[0] - 0.6).max() < 0.05
    assert (tmp_path / "deployment_events.jsonl").exists()


def test_evaluations_with_normalized_observations(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(Hold, seed=0))
    model = make()
    model.set_env(env)
    evaluation = EvalCallback(VecNormalize(make_vec_env(Hold, seed=1), training=False), eval_freq=50, verbose=0)
    model.learn(200, callback=[evaluation, ChampionChallenger(**QUICK)])
    assert evaluation.last_mean_reward > 5


def test_it_works_beside_the_guard(tmp_path: Path) -> None:
    """The guard sees the episodes of whoever acts, so that it has nothing to alarm of while the learner alone is bad."""
    model = make(TD3C, learning_rate=1e-4)
    contest = ChampionChallenger(**{**QUICK, "min_updates": 40}, path=tmp_path)
    guard = CollapseGuard(baseline=np.random.default_rng(0).normal(6.4, 0.3, 20), path=tmp_path, verbose=0)
    record = Record(contest)
    model.learn(600, callback=[record, guard, contest, *(Aim(step, BAD) for step in range(50, 600, 50))])
    assert of(contest, "rejection") and contest.champion.name == 0
    assert guard.rollbacks == 0 and len([event for event in guard.events if event["event"] == "episode"]) == 60
    # A single trial that falls is no collapse; who acts is still who is said to act
    served = [step for step in record.steps if step.actors == [Kind.SERVE]]
    expected = choice(model, contest.champion, np.concatenate([step.observations for step in served]))
    np.testing.assert_allclose(np.concatenate([step.actions for step in served]), expected, atol=1e-5)


def test_a_rollback_of_the_guard_does_not_touch_the_champion(tmp_path: Path) -> None:
    model = make()
    contest = ChampionChallenger(**{**QUICK, "risk_budget": 0})
    # What the champion returns is a collapse to this guard
    guard = CollapseGuard(baseline=np.random.default_rng(0).normal(9.5, 0.1, 30), verbose=0)
    model.learn(300, callback=[guard, contest])
    assert guard.rollbacks > 0
    assert contest.champion.name == 0 and len(contest.champion.returns) == 30


def test_it_is_made_from_yaml() -> None:
    text = """
    callback:
      - sb3_offline_ft.deployment.ChampionChallenger:
          risk_budget: 0.2
          random_return: -1300
          min_updates: 1.0e+3
          canary_envs: 1
    """
    (made,) = get_callback_list(yaml.safe_load(text))
    assert isinstance(made, ChampionChallenger) and made.min_updates == 1000 and made.rules.random_return == -1300
    assert made.rules.canary_envs == 1 and made.rules.worst_return == -1300
    assert made.use_default_path.__name__ in dir(sb3_offline_ft.deployment.ChampionChallenger)


def test_it_works_in_a_list_of_callbacks_within_a_list() -> None:
    model = make()
    contest = ChampionChallenger(**QUICK)
    model.learn(200, callback=CallbackList([CallbackList([contest])]))
    assert episodes(contest, Kind.TRIAL)
    assert contest.champion.name == 0
