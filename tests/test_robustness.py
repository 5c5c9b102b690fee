"""Policies in perturbed environments: the numbers, whatever the number of processes, and what is told of them."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import TD3
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.common.seeding import derive_seed
from sb3_offline_ft.evaluation.robustness import (
    InfoMetric,
    Policy,
    Range,
    Response,
    RobustnessResult,
    drawing,
    print_tables,
    run_robustness,
)

ENV = "Pendulum-v1"
CONTROLLERS = '''
import gymnasium as gym
import numpy as np


def swing_up(observation):
    """Pumps energy into the pendulum until it stands, and holds it there."""
    cos, sin, speed = observation
    if cos > 0.9:
        return np.array([-12 * np.arctan2(sin, cos) - 3 * speed])
    return np.array([-3 * (speed**2 / 6 + 5 * (cos - 1)) * np.sign(speed)])


def weak(observation):
    return 0.2 * np.clip(swing_up(observation), -2, 2)


def broken(observation):
    return np.array([np.nan])


def stumbling(observation):
    return {}["action"]


def number(observation):
    return 0.5


class Unready:
    def reset(self):
        raise RuntimeError("no connection")

    def __call__(self, observation):
        return np.zeros(1)


def strong(observation):
    return np.array([100.0])


class Energy(gym.Wrapper):
    """Says how much is asked of the motor."""

    def step(self, action):
        assert abs(action[0]) <= 2
        result = self.env.step(action)
        result[-1]["energy"] = abs(float(action[0]))
        return result


if "RobustPendulum-v0" not in gym.registry:
    gym.register("RobustPendulum-v0", lambda: Energy(gym.make("Pendulum-v1").env), max_episode_steps=50)
'''
MADE = "robust_controllers_of_test"


@pytest.fixture(autouse=True)
def controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MADE}.py").write_text(CONTROLLERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def swing_up(**settings: Any) -> RobustnessResult:
    policies = {"candidate": f"{MADE}:swing_up", "baseline": f"{MADE}:weak"}
    defaults: dict[str, Any] = {"n_seeds": 2, "random_return": -1300.0}
    return run_robustness(policies, settings.pop("env", ENV), settings.pop("grid", {"mass": [1.5]}), **defaults | settings)


def test_numbers_are_those_of_the_episodes() -> None:
    result = swing_up(grid={"mass": [1.5, 0.5], "delay": [2]}, seed=4)
    mass, delay = result.responses
    assert mass.levels == (0.5, 1.0, 1.5) and delay.levels == (0.0, 2.0) and mass.nominal == 1.0
    env: Any = gym.make(ENV)
    act = __import__(MADE).swing_up
    for level, values in zip(mass.levels, mass.values["candidate"], strict=True):
        env.unwrapped.m = level
        for number, expected in enumerate(values["return"]):
            observation, _ = env.reset(seed=derive_seed(4, number))
            rewards, ended = [], False
            while not ended:
                observation, reward, _, ended, _ = env.step(np.clip(act(observation), -2, 2).astype(np.float32))
                rewards.append(reward)
            assert math.fsum(rewards) == pytest.approx(expected, rel=1e-12)
    assert mass.values["candidate"][1] == delay.values["candidate"][0], "nominal episodes are the same ones"
    assert result.nominal_return("candidate") == np.mean(mass.values["candidate"][1]["return"])
    assert result.nominal_return("candidate") > result.nominal_return("baseline")
    assert result.policies["candidate"] == Policy(f"{MADE}:swing_up", None)


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    env_id = "Hopper-v5"
    model = TD3("MlpPolicy", env_id, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    model.save(tmp_path / "model.zip")
    grid = {"mass": [0.7], "sensor_noise": [0.1, 0.5], "random_start": [3], "initial_state": [2]}
    policies = {"candidate": str(tmp_path / "model.zip"), "baseline": "zero"}
    results = [run_robustness(policies, env_id, grid, n_seeds=2, n_jobs=n_jobs) for n_jobs in (1, 2)]
    assert results[0] == results[1]
    other = run_robustness(policies, env_id, grid, n_seeds=2, seed=1)
    assert other.nominal_return("candidate") != results[0].nominal_return("candidate")


def test_the_return_of_a_random_policy_is_measured() -> None:
    result = swing_up(random_return=None, n_seeds=10)
    assert -1800 < result.random_return < -900
    assert set(result.policies) == {"candidate", "baseline"}


def test_what_is_measured_beside_the_return() -> None:
    env_id = f"{MADE}:RobustPendulum-v0"
    metrics = [InfoMetric.parse(f"{each}=info.energy:{each}") for each in ("sum", "mean", "min", "max", "last")]
    metrics = [*metrics, InfoMetric("all", "energy")]
    result = run_robustness({"candidate": "random"}, env_id, {"mass": [1.5]}, metrics=metrics, n_seeds=2)
    assert result.metrics == ("return", "sum", "mean", "min", "max", "last", "all")
    for values in result.responses[0].values["candidate"]:
        for total, mean, low, high, last, again in zip(*(values[name] for name in result.metrics[1:]), strict=True):
            assert total == again == pytest.approx(50 * mean) and 0 <= low < mean < high <= 2 and low < last < high
    console = Console(file=StringIO(), width=200)
    print_tables(result, console)
    assert "Mean of energy" not in console.file.getvalue() and "Mean of sum" in console.file.getvalue()  # type: ignore[attr-defined]


def test_actions_beyond_the_bounds_are_clipped() -> None:
    env_id = f"{MADE}:RobustPendulum-v0"
    result = run_robustness(
        {"candidate": f"{MADE}:strong"}, env_id, {"mass": [0.5]}, metrics=[InfoMetric("high", "energy", "max")], n_seeds=1
    )
    assert result.responses[0].values["candidate"][0]["high"] == (2.0,)


def made_up(levels: tuple[float, ...], means: list[float], nominal: float = 1.0) -> RobustnessResult:
    values = tuple({"return": (mean - 1.0, mean + 1.0)} for mean in means)
    response = Response("mass", "times the masses", nominal, levels, {"candidate": values})
    return RobustnessResult(ENV, {}, 0, 0.0, {"candidate": Policy("a.zip", "ab")}, (response,), {})


@pytest.mark.parametrize(
    ("means", "kept", "words"),
    [
        ([95, 90, 100, 89, 100], (0.5, 1.0, True, False), "←0.5 to 1"),
        ([95, 89.9, 100, 90, 100], (1.0, 2.0, False, True), "1 to 2→"),
        ([0, 0, 100, 0, 0], (1.0, 1.0, False, False), "1 to 1"),
        ([95, math.nan, 100, 95, math.nan], (1.0, 1.5, False, False), "1 to 1.5"),
    ],
)
def test_where_a_policy_keeps_its_return(means: list[float], kept: tuple[Any, ...], words: str) -> None:
    result = made_up((0.5, 0.8, 1.0, 1.5, 2.0), means)
    assert result.threshold("candidate") == pytest.approx(90)
    found = result.kept("candidate", result.responses[0])
    assert found is not None
    assert (found.low, found.high, found.low_is_last, found.high_is_last) == kept and str(found) == words


def test_nothing_goes_on_where_nothing_was_tried() -> None:
    result = made_up((0.0, 1.0, 2.0), [100, 95, 91], nominal=0.0)
    kept = result.kept("candidate", result.responses[0])
    assert kept == Range(0.0, 2.0, False, True) and str(kept) == "0 to 2→"


def test_the_share_that_is_kept_is_above_that_of_a_random_policy() -> None:
    result = replace(made_up((1.0,), [-200.0]), random_return=-1200.0)
    assert result.threshold("candidate") == pytest.approx(-300)
    useless = replace(made_up((1.0,), [-200.0]), random_return=-200.0)
    assert useless.threshold("candidate") is None and useless.kept("candidate", useless.responses[0]) is None


def test_json_is_strict_and_read_again(tmp_path: Path) -> None:
    result = swing_up(grid={"mass": [], "delay": [1]})
    result.save(tmp_path / "robustness.json")
    assert RobustnessResult.read(tmp_path / "robustness.json") == result
    text = (tmp_path / "robustness.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    kept = result.kept("candidate", result.responses[1])
    assert kept is not None and content["derived"]["candidate"]["kept"]["delay"]["high"] == kept.high

    broken = made_up((1.0, 2.0), [100.0, math.nan])
    broken.save(tmp_path / "robustness.json")
    read = RobustnessResult.read(tmp_path / "robustness.json")
    assert np.isnan(read.responses[0].means("candidate")[1]) and read.kept("candidate", read.responses[0]) is not None
    (tmp_path / "robustness.json").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"robustness.json is damaged or not written by `sb3-offline-ft robustness`"):
        RobustnessResult.read(tmp_path / "robustness.json")


def test_the_picture_for_a_page() -> None:
    result = swing_up(grid={"mass": [0.5], "delay": [1]})
    picture = drawing(result).on_page()
    assert picture.svg.startswith("<svg") and picture.svg.count('id="robustness-candidate"') == 2
    assert "delay" in picture.svg and "the baseline keeps it" in picture.words


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["robustness", *arguments], env={"COLUMNS": "200"})


def test_the_command(tmp_path: Path) -> None:
    result = invoke(
        f"{MADE}:swing_up", "--env", ENV, "--baseline", "zero", "--perturb", "mass=0.9,1.1", "--perturb", "delay",
        "--seeds", "2", "--random-return", "-1300", "--output", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "candidate keeps it" in result.output and "baseline: zero, mean return" in result.output
    assert (tmp_path / "out/robustness.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/robustness.svg").read_text().lstrip().startswith("<?xml")
    read = RobustnessResult.read(tmp_path / "out/robustness.json")
    assert [response.levels for response in read.responses] == [(0.9, 1.0, 1.1), (0.0, 1.0, 2.0, 3.0, 5.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero", "--env", ENV, "--perturb", "mas=1"], "Unknown perturbation 'mas'. Did you mean 'mass'"),
        (["zero", "--env", ENV, "--perturb", "friction"], "Pendulum-v1 has no friction that could be changed: it has mass,"),
        (
            ["zero", "--env", ENV, "--perturb", "mass=heavy"],
            "Levels of mass must be numbers with commas between",
        ),
        (["zero", "--env", ENV, "--perturb", "mass=1", "--perturb", "mass=2"], "'mass' is named twice"),
        (["zero", "--env", ENV, "--perturb", "delay=0.5"], "A level of delay must be a whole number from 0 to inf"),
        (["zero", "--env", "Pendulm-v1"], "Cannot make the environment 'Pendulm-v1'"),
        (["zero", "--env", "CartPole-v1"], "The controller 'zero' needs actions that are a Box"),
        (["random", "--env", "FrozenLake-v1"], "There is nothing to change"),
        (["car.zip", "--env", ENV], "'car.zip' does not fit Pendulum-v1: it was made for observations"),
        (["missing.zip", "--env", ENV], "No policy"),
        (["zero", "--env", ENV, "--metric", "energy"], "A metric is given as name=info.key:aggregate"),
        (["zero", "--env", ENV, "--metric", "e=info.energy:som"], "Unknown aggregate 'som' of e. Did you mean 'sum'"),
        (["zero", "--env", ENV, "--metric", "e=info.energy"], "Pendulum-v1 gives no info 'energy' for the metric 'e'"),
        (["zero", "--env", ENV, "--metric", "return=info.energy"], "A metric cannot be called 'return'"),
        (["zero", "--env", ENV, "--seeds", "0"], "`n_seeds` must be a whole number of at least 1"),
        ([f"{MADE}:broken", "--env", ENV], "The action of the candidate, with nothing changed, in episode 0 is [nan]"),
        (
            [f"{MADE}:stumbling", "--env", ENV],
            "An error in the candidate, with nothing changed, in episode 0 (KeyError: 'action')",
        ),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "car.zip" in arguments:
        TD3("MlpPolicy", "MountainCarContinuous-v0", policy_kwargs={"net_arch": [8]}, device="cpu").save("car.zip")
    result = invoke(*arguments)
    assert result.exit_code == 1 and result.exception.__class__ is SystemExit, result.output
    assert message in result.output and len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("robustness.*"))


def test_a_number_will_do_for_a_single_actuator() -> None:
    result = run_robustness({"candidate": f"{MADE}:number"}, ENV, {"delay": [1]}, n_seeds=1, random_return=-1300.0)
    assert np.isfinite(result.nominal_return("candidate"))


def test_a_policy_that_cannot_begin_is_named() -> None:
    with pytest.raises(ValueError, match=r"An error in the candidate, .* \(RuntimeError: no connection\)"):
        run_robustness({"candidate": f"{MADE}:Unready"}, ENV, {"delay": [1]}, n_seeds=1, random_return=-1300.0)


def test_a_policy_that_fails_in_another_process() -> None:
    with pytest.raises(ValueError, match="The action of the candidate, with nothing changed"):
        run_robustness({"candidate": f"{MADE}:broken"}, ENV, {"mass": [0.5]}, n_seeds=1, n_jobs=2)
