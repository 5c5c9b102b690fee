"""A cell of a study is the run that a user would make: by ``model.learn``, and by rl_zoo3's own command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results

from sb3_offline_ft import TD3BC, CollapseGuard, OfflineTD3
from sb3_offline_ft.collapse.events import read_events
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.deployment import ChampionChallenger
from sb3_offline_ft.study.design.learners import algorithm_class, arguments_of
from sb3_offline_ft.study.design.protocol import Cell, Protocol
from sb3_offline_ft.study.engine.cell import MEASURED_STREAM, run_cell
from sb3_offline_ft.study.engine.folder import CellResult
from sb3_offline_ft.study.engine.measure import Measure
from tests.conftest import RunPython

ENV, DATASET, SEED, INTERACTIONS, EVERY = "Pendulum-v1", "bundled:pendulum-medium", 3, 900, 300
NETWORKS = {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [16]}}
SETTINGS = {"warmup_steps": 220, "batch_size": 32, "learning_rate": 1e-3, "noise_type": "normal", "noise_std": 0.2}
# A baseline that nobody falls below, and one that everybody does: the guard must act alike, too
GUARDS: dict[str, dict[str, Any] | None] = {
    "unguarded": None,
    "watched": {"baseline": [-1700.0, -1650.0, -1690.0, -1600.0, -1680.0, -1710.0], "signal_freq": 100},
    "rolled-back": {"baseline": [-10.0, -5.0, -8.0, -12.0, -9.0, -11.0], "false_alarm_rate": 0.9, "signal_freq": 100},
    "warmed-up": {
        "baseline": [-10.0, -5.0, -8.0, -12.0, -9.0, -11.0],
        "false_alarm_rate": 0.9,
        "signal_freq": 100,
        "remedies": [{"warmup": {"steps": 100}}],
    },
}
# A trial in the third of four episodes
CHAMPION = {
    "worst_return": -1700,
    "risk_budget": 0.9,
    "baseline_episodes": 2,
    "min_updates": 20,
    "futility": 0.0,
    "controls": "concurrent",
}
GATED = "td3-champion"
ALGORITHMS = ("td3bc", "td3c", "td3")
ZOO_NAMES = {"td3": "offline_td3"}
REGISTER = 'from rl_zoo3 import ALGOS\n\nfrom sb3_offline_ft import OfflineTD3\n\nALGOS["offline_td3"] = OfflineTD3\n'
MEASURE_IN_ZOO = f"""
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_offline_ft.common.callbacks import find_callbacks
from sb3_offline_ft.deployment import ChampionChallenger
from sb3_offline_ft.study.engine.measure import Measure


class MeasureAsStudy(Measure):
    def __init__(self, seed: int) -> None:
        super().__init__(make_vec_env({ENV!r}, seed=seed), {EVERY}, 2)

    def _on_training_start(self) -> None:
        self.policy = next(find_callbacks(self.locals["callback"], ChampionChallenger), None)
        super()._on_training_start()

    def _on_training_end(self) -> None:
        np.savez("measured.npz", timesteps=self.timesteps, returns=self.returns)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    folder = tmp_path_factory.mktemp("study")
    methods = {
        f"{algorithm}-{name}": {"algorithm": algorithm, "guard": guard} if guard else {"algorithm": algorithm}
        for algorithm in ALGORITHMS
        for name, guard in GUARDS.items()
    }
    methods[GATED] = {"algorithm": "td3", "champion": CHAMPION}
    content = {
        "name": "runs",
        "env": ENV,
        "datasets": {"medium": DATASET},
        "pretraining": {"algorithm": "td3bc", "hyperparams": {"offline_steps": 60}},
        "seeds": [SEED],
        "interactions": INTERACTIONS,
        "evaluation": {"every": EVERY, "episodes": 2},
        "learner_evaluation": {"every": EVERY, "episodes": 1},
        "random_return": -1309,
        "hyperparams": {**NETWORKS, **SETTINGS},
        "methods": methods,
        "presets": {algorithm: {"gamma": 0.98} for algorithm in ("td3bc", "td3c")},
    }
    (folder / "study.yml").write_text(yaml.safe_dump(content))
    return Protocol.load(folder)


@pytest.fixture(scope="module")
def cells(study: Protocol) -> dict[str, Cell]:
    return {cell.method.name: cell for cell in study.cells()}


@pytest.fixture(scope="module")
def results(study: Protocol, cells: dict[str, Cell]) -> dict[str, CellResult]:
    return {name: run_cell(study, cell, pretrained_folder=study.folder / "pretrained") for name, cell in cells.items()}


@pytest.fixture(scope="module")
def pretrained_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user pretrains and saves, with what the study's file says."""
    model = TD3BC(env=ENV, seed=SEED, dataset=DATASET, offline_steps=60, gamma=0.98, **NETWORKS, **learner_settings())
    path = tmp_path_factory.mktemp("pretrained") / "agent.zip"
    model.pretrain().save(path)
    return path


def learner_settings() -> dict[str, Any]:
    space = make_vec_env(ENV).action_space
    return arguments_of({key: value for key, value in SETTINGS.items() if key != "warmup_steps"}, space)


def by_learn(
    algorithm: str, path: Path, guard: CollapseGuard | None = None, champion: ChampionChallenger | None = None
) -> tuple[OfflineTD3, Measure]:
    """The run as a user makes it in Python."""
    env = make_vec_env(ENV, seed=SEED)
    settings = learner_settings() | {"warmup_steps": SETTINGS["warmup_steps"], "gamma": 0.98}
    cls = algorithm_class(algorithm)
    assert issubclass(cls, OfflineTD3)
    model = cls.load(path, env=env, seed=SEED, dataset=DATASET, **settings)
    measure = Measure(make_vec_env(ENV, seed=derive_seed(SEED, MEASURED_STREAM)), EVERY, 2, policy=champion)
    callbacks: list[BaseCallback] = [measure] if champion is None else [champion, measure]
    if algorithm == "td3c":
        evaluation_env = make_vec_env(ENV, seed=SEED)
        callbacks.append(EvalCallback(evaluation_env, eval_freq=EVERY, n_eval_episodes=1, verbose=0, warn=False))
    model.learn(INTERACTIONS, callback=callbacks if guard is None else [*callbacks, guard])
    return model, measure


def by_zoo(algorithm: str, path: Path, folder: Path, run_python: RunPython, **given: dict[str, Any] | None) -> Path:
    """The run as rl_zoo3's command makes it; its folder, whose grandparent has what was measured."""
    folder.mkdir()
    (folder / "custom_envs.py").write_text(REGISTER)
    (folder / "measuring.py").write_text(MEASURE_IN_ZOO)
    callbacks: list[Any] = [{"measuring.MeasureAsStudy": {"seed": derive_seed(SEED, MEASURED_STREAM)}}]
    # A champion is there before it is measured
    for place, name in ((0, "deployment.ChampionChallenger"), (1, "CollapseGuard")):
        if (arguments := given.get(name.rpartition(".")[2])) is not None:
            callbacks.insert(place, {f"sb3_offline_ft.{name}": {"random_return": -1309, "verbose": 0, **arguments}})
    entry = {"n_timesteps": INTERACTIONS, "dataset": DATASET, "gamma": 0.98, "callback": callbacks, **NETWORKS, **SETTINGS}
    (folder / "run.yml").write_text(yaml.safe_dump({ENV: entry}))
    name = ZOO_NAMES.get(algorithm, algorithm)
    command = ["-m", "rl_zoo3.train", "--algo", name, "--env", ENV, "-i", str(path), "-conf", "run.yml"]
    flags = ["--seed", str(SEED), "--eval-freq", str(EVERY), "--eval-episodes", "1", "--num-threads", "1"]
    process = run_python(*command, *flags, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    (run,) = (folder / "logs").glob(f"{name}/{ENV}_*")
    return run


def assert_same_run(result: CellResult, model: OfflineTD3, measure: Measure, run: Path) -> None:
    """A cell's result, the run of the same in Python, and that by rl_zoo3."""
    np.testing.assert_array_equal(result.timesteps, measure.timesteps)
    np.testing.assert_array_equal(result.returns, measure.returns)
    env = model.get_env()
    assert env is not None
    np.testing.assert_array_equal(result.training_returns, env.env_method("get_episode_rewards")[0])
    assert result.training_timesteps.tolist() == [200, 400, 600, 800]
    with np.load(run.parents[2] / "measured.npz") as measured:
        np.testing.assert_array_equal(result.timesteps, measured["timesteps"])
        np.testing.assert_array_equal(result.returns, measured["returns"])
    # Monitor's files have six digits
    np.testing.assert_allclose(load_results(str(run))["r"], result.training_returns, rtol=0, atol=6e-7)
    saved = type(model).load(run / f"{ENV}.zip", device="cpu")
    for key, value in model.policy.state_dict().items():
        assert th.equal(value, saved.policy.state_dict()[key]), key


@pytest.mark.parametrize(
    ("algorithm", "guard"),
    [*((algorithm, "unguarded") for algorithm in ALGORITHMS), *zip(ALGORITHMS, [*GUARDS][1:], strict=True)],
)
@pytest.mark.filterwarnings("ignore:The file was not saved by TD3C")
def test_a_cell_is_the_run_that_a_user_makes(
    results: dict[str, CellResult], pretrained_zip: Path, run_python: RunPython, tmp_path: Path, algorithm: str, guard: str
) -> None:
    result, arguments = results[f"{algorithm}-{guard}"], GUARDS[guard]
    watching = None if arguments is None else CollapseGuard(verbose=0, random_return=-1309, **arguments)
    model, measure = by_learn(algorithm, pretrained_zip, watching)
    run = by_zoo(algorithm, pretrained_zip, tmp_path / "work", run_python, CollapseGuard=arguments)
    assert_same_run(result, model, measure, run)
    if watching is not None:
        assert [event["event"] for event in result.events] == [event["event"] for event in watching.events]
        assert result.manifest["rollbacks"] == watching.rollbacks


@pytest.mark.filterwarnings("ignore:The file was not saved by TD3C")
def test_a_cell_with_a_champion_is_the_run_that_a_user_makes(
    results: dict[str, CellResult], pretrained_zip: Path, run_python: RunPython, tmp_path: Path
) -> None:
    result, champion = results[GATED], ChampionChallenger(verbose=0, random_return=-1309, **CHAMPION)
    model, measure = by_learn("td3", pretrained_zip, champion=champion)
    run = by_zoo("td3", pretrained_zip, tmp_path / "work", run_python, ChampionChallenger=CHAMPION)
    assert_same_run(result, model, measure, run)
    told = [[without_time(event) for event in events] for events in (result.deployment_events, champion.events)]
    assert told[0] == told[1] == [without_time(event) for event in read_events(run / "deployment_events.jsonl")]
    assert result.kinds[:3] == ["serve", "serve", "trial"]
    deployed = OfflineTD3.load(run / "best_model.zip", device="cpu").policy.state_dict()
    assert all(th.equal(value, deployed[key]) for key, value in champion.champion.policy.state.items())


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "time"}


def test_guards_of_these_runs_measured_and_acted(results: dict[str, CellResult]) -> None:
    """What the runs above compare is not nothing."""
    for algorithm in ALGORITHMS:
        for guard in ("rolled-back", "warmed-up"):
            assert results[f"{algorithm}-{guard}"].manifest["rollbacks"] > 0, (algorithm, guard)
        for guard in ("watched", "rolled-back", "warmed-up"):
            events = [event["event"] for event in results[f"{algorithm}-{guard}"].events]
            assert events.count("signal") >= 3, (algorithm, guard)
        assert results[f"{algorithm}-watched"].manifest["rollbacks"] == 0


@pytest.mark.parametrize("name", [f"{algorithm}-{guard}" for algorithm in ALGORITHMS for guard in GUARDS])
def test_a_cell_remembers_what_it_did(results: dict[str, CellResult], name: str) -> None:
    manifest = results[name].manifest
    assert manifest["hyperparams"]["buffer_size"] == 1_000_000
    facts = manifest["replay_buffer"]
    assert (facts["capacity"], facts["rows"], facts["offline_rows"]) == (1_000_000, INTERACTIONS, 20_000)
    assert manifest["interactions"] == INTERACTIONS
    # One for each interaction after the warm-up, whatever was undone; the remedy `warmup` waits for 100 more and for its own
    waited = 101 if name.endswith("warmed-up") else 0
    assert manifest["updates"]["online"] == INTERACTIONS - SETTINGS["warmup_steps"] - waited
    assert manifest["updates"]["offline"] == 60
    assert (manifest["updates"]["undone"] > 0) == name.endswith(("rolled-back", "warmed-up"))
    # The first warm-up, not a later one
    assert results[name].frozen_until == SETTINGS["warmup_steps"]
    # Actions are continuous: no two transitions are the same
    assert facts["distinct_rows"] == INTERACTIONS
    # Half of a batch of 32 is drawn of 900 rows, half of 20,000: one or two pairs at most are the same row twice
    assert facts["batch"]["rows"] == 32 and facts["batch"]["distinct_rows"] >= 29 and facts["batch"]["offline_rows"] == 16


def test_a_smaller_buffer_is_what_the_manifest_says(study: Protocol, cells: dict[str, Cell], tmp_path: Path) -> None:
    content = yaml.safe_load(study.text)
    content["methods"] = {"small": {"algorithm": "td3", "hyperparams": {"buffer_size": 200}}}
    (tmp_path / "study.yml").write_text(yaml.safe_dump(content))
    (cell,) = (small := Protocol.load(tmp_path)).cells()
    manifest = run_cell(small, cell, pretrained_folder=study.folder / "pretrained").manifest
    assert manifest["hyperparams"]["buffer_size"] == manifest["replay_buffer"]["capacity"] == 200
    assert manifest["replay_buffer"]["rows"] == manifest["replay_buffer"]["distinct_rows"] == 200
