"""The commands `sb3-offline-ft dataset ...`, run as users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from stable_baselines3 import SAC
from typer.testing import CliRunner

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.cli import app
from sb3_offline_ft.datasets.tools.show import count_duplicates, describe_dataset, number_text

pytestmark = pytest.mark.usefixtures("minari_root")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded."""
    monkeypatch.setenv("COLUMNS", "220")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["dataset", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.output)


def fail(*arguments: object) -> str:
    """Runs a command that must fail, with one line on standard error."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"sb3-offline-ft dataset {arguments[0]}: ")
    return str(line)


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "sb3_offline_ft", "dataset", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


class TestShow:
    def test_tables_show_the_numbers_of_the_data(self) -> None:
        output = succeed("show", "bundled:hopper-medium")
        data = load_dataset("bundled:hopper-medium")
        assert data.reference_scores is not None
        for text in (
            "100,045 transitions in 236 episodes",
            f"{number_text(data.episode_returns.mean())} ± {number_text(data.episode_returns.std())}",
            f"{data.reference_scores.normalized(data.episode_returns.mean()):.1f}",
            "not official",
            "213 terminated, 23 truncated",
            "SAC (stable-baselines3)",
            data.fingerprint,
            "Actions (3)",
            "Observations (11)",
            number_text(float(data.actions[:, 1].std())),
            f"{np.mean(np.abs(data.actions[:, 2]) > 0.99):.1%}",
        ):
            assert text in output

    def test_json_is_for_programs(self) -> None:
        facts = json.loads(succeed("show", "bundled:pendulum-medium?min_return=-800", "--json"))
        data = load_dataset("bundled:pendulum-medium?min_return=-800")
        assert facts["transitions"] == len(data) and facts["episodes"] == data.n_episodes
        assert facts["returns"]["mean"] == pytest.approx(data.episode_returns.mean())
        assert facts["returns"]["min"] >= -800
        assert facts["fingerprint"] == data.fingerprint and facts["env_id"] == "Pendulum-v1"
        assert facts["actions"][0]["low"] == -2 and facts["observations"][0]["shape"] == [3]
        assert facts["observations"][0]["std"] == pytest.approx(data.observations.std(axis=0), rel=1e-4)  # type: ignore[union-attr]

    def test_parts_and_their_shares(self) -> None:
        output = succeed("show", "0.75*bundled:pendulum-medium?episodes=2 + 0.25*bundled:pendulum-medium?top_fraction=0.5")
        assert "episodes=2" in succeed("show", "bundled:pendulum-medium?episodes=2").split("filters")[1].splitlines()[0]
        assert "Parts" in output and "75.0%" in output and "25.0%" in output
        # The episodes that are in both parts
        both = load_dataset("bundled:pendulum-medium?episodes=2 + bundled:pendulum-medium?top_fraction=0.5")
        repeated = 400 + 10_000 - len(np.unique(both.observations, axis=0))
        assert count_duplicates(both) == repeated
        if repeated:
            assert f"{repeated:,} transitions equal an earlier one" in output

    def test_all_parts_are_shown(self) -> None:
        output = succeed("show", " + ".join(["bundled:pendulum-medium?episodes=1"] * 17))
        assert "(17)" in output and "not shown" not in output

    def test_many_dimensions_are_shown_on_request(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        observations, following = generator.normal(size=(2, 50, 40))
        np.savez(
            tmp_path / "wide.npz", observations=observations, next_observations=following,
            actions=generator.uniform(-1, 1, (50, 1)), rewards=np.ones(50), terminations=np.ones(50, np.bool_),
        )  # fmt: skip
        few, all_of_them = succeed("show", tmp_path / "wide.npz"), succeed("show", tmp_path / "wide.npz", "--all")
        assert "24 more dimensions are not shown; --all shows them." in few and "not shown" not in all_of_them
        assert len(all_of_them.splitlines()) >= len(few.splitlines()) + 23
        assert "none known" in few and "not known" in few

    def test_dict_and_image_observations(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (31, 5, 6, 3), dtype=np.uint8)
        data = OfflineDataset.from_columns(
            {"camera": frames[:-1], "speed": np.arange(30.0)[:, None]},
            np.full((30, 1), 0.5),
            np.zeros(30),
            {"camera": frames[1:], "speed": np.arange(1, 31.0)[:, None]},
            np.zeros(30, np.bool_),
        )
        facts = describe_dataset(data)
        camera, speed = facts.observations
        assert (camera.name, camera.is_image, camera.shape) == ("observations['camera']", True, (5, 6, 3))
        assert camera.mean == [pytest.approx(frames[:-1].mean())] and (camera.min[0], camera.max[0]) == (0, 255)
        assert (speed.min, speed.max) == ([0], [29]) and facts.actions[0].at_bounds is None

    def test_duplicates_are_counted_in_every_column(self) -> None:
        def dataset(frames: Any, rewards: Any) -> OfflineDataset:
            n_rows = len(rewards)
            return OfflineDataset.from_columns(
                {"camera": frames, "x": np.zeros((n_rows, 1))},
                np.zeros((n_rows, 1)),
                rewards,
                {"camera": frames, "x": np.zeros((n_rows, 1))},
                np.ones(n_rows, np.bool_),
            )

        frames = np.zeros((6, 4, 4, 1), np.uint8)
        assert count_duplicates(dataset(frames, np.zeros(6))) == 5
        assert count_duplicates(dataset(frames, np.arange(6.0))) == 0
        different = frames.copy()
        different[3, 0, 0, 0] = different[5, 1, 1, 0] = 1
        assert count_duplicates(dataset(different, np.zeros(6))) == 3
        assert count_duplicates(dataset(different, np.array([0, 0, 1, 1, 2, 2]))) == 1

    def test_numbers_are_short_but_exact_enough(self) -> None:
        texts = {
            0.0: "0",
            1234.56: "1,234.6",
            1000.0: "1,000",
            0.123456: "0.1235",
            -1e12: "-1e+12",
            1e-9: "1e-09",
            423.9: "423.9",
        }
        assert {value: number_text(value) for value in texts} == texts

    def test_unknown_data_is_one_line(self, tmp_path: Path) -> None:
        assert "No bundled dataset 'hoper-medium'. Did you mean" in fail("show", "bundled:hoper-medium")
        assert "No dataset file" in fail("show", tmp_path / "missing.npz")
        assert "trust_pickle" in fail("show", self.pickle(tmp_path))

    def pickle(self, folder: Path) -> Path:
        (folder / "buffer.pkl").write_bytes(b"x")
        return folder / "buffer.pkl"


class TestConvert:
    @pytest.fixture
    def logs(self, tmp_path: Path) -> Path:
        data = load_dataset("bundled:pendulum-medium?episodes=3")
        assert isinstance(data.observations, np.ndarray)
        table = pd.DataFrame(
            {
                "time": np.arange(len(data)) % 200,
                "cos": data.observations[:, 0],
                "sin": data.observations[:, 1],
                "speed": data.observations[:, 2],
                "torque": data.actions[:, 0],
                "points": data.rewards,
                "run": np.array(["a", "b", "c"])[data.episode_of_rows()],
            }
        )
        table.sample(frac=1, random_state=0).to_csv(tmp_path / "logs.csv", index=False)
        return tmp_path / "logs.csv"

    OPTIONS = (
        "--observations",
        "cos,sin,speed",
        "--actions",
        "torque",
        "--reward",
        "points",
        "--episode",
        "run",
        "--time",
        "time",
    )

    def test_a_table_with_named_columns(self, logs: Path) -> None:
        result = invoke("convert", logs, "--to", "my/logs-v0", "--env", "Pendulum-v1", *self.OPTIONS, "--author", "A. Uthor")
        assert result.exit_code == 0, result.output
        data, back = load_dataset("bundled:pendulum-medium?episodes=3"), load_dataset("my/logs-v0")
        # Shuffled rows are sorted by time, episodes in the order in which they turn up
        kept = ~data.truncations
        assert back.n_episodes == 3 and len(back) == 597
        assert sorted(back.rewards.tolist()) == sorted(data.rewards[kept].tolist())
        assert back.episode_returns == pytest.approx(
            [data.rewards[kept].reshape(3, 199)["abc".index(run)].sum() for run in pd.read_csv(logs)["run"].unique()], rel=1e-5
        )
        assert back.provenance["author"] == ["A. Uthor"]
        assert "from logs.csv. Columns: observations: cos, sin, speed; actions: torque" in str(back.provenance["description"])
        for text in (
            "Columns of logs.csv",
            "cos, sin, speed",
            "no column: every episode counts as cut",
            "Note: ",
            "3 last rows",
        ):
            assert text in result.stderr
        assert "my/logs-v0: 597 transitions in 3 episodes" in result.stdout

    def test_a_map_in_a_file_and_a_reward_function(self, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cli_rewards.py").write_text("def f(obs, act, new):\n    return obs['v'][:, 0]\n")
        (tmp_path / "map.yml").write_text(
            "observations: {angle: [cos, sin], v: speed}\nactions: torque\nepisode: wrong\ntime: time\n"
        )
        bounds = ("--action-low=-2", "--action-high=2")
        arguments = ("convert", "logs.csv", "--to", "my/logs-v0", "--columns", "map.yml", "--reward-function", "cli_rewards:f")
        assert "no column 'wrong' for episode" in fail(*arguments, *bounds)
        assert "--action-high must be a number" in fail(*arguments, "--episode", "run", "--action-low=-2", "--action-high=2,")
        succeed(*arguments, "--episode", "run", *bounds)
        back = load_dataset("my/logs-v0")
        assert isinstance(back.observations, dict) and (back.rewards == back.observations["v"][:, 0]).all()
        assert "not both" in fail(*arguments, "--reward", "points", "--overwrite")

    def test_mistakes_are_one_line_and_leave_nothing(self, logs: Path, minari_root: Path) -> None:
        command = ("convert", logs, "--to", "my/logs-v0", "--env", "Pendulum-v1")
        assert "no column was recognised as observations" in fail(*command)
        assert "no column 'torqe' for actions. Did you mean torque?" in fail(
            *command, "--observations", "cos", "--actions", "torqe"
        )
        assert "is no Minari id" in fail("convert", logs, "--to", "logs")
        assert "No table" in fail("convert", "missing.csv", "--to", "my/logs-v0")
        assert list(minari_root.iterdir()) == []
        succeed(*command, *self.OPTIONS)
        assert "already" in fail(*command, *self.OPTIONS)
        succeed(*command, *self.OPTIONS, "--overwrite")

    def test_the_command_itself(self, logs: Path, tmp_path: Path) -> None:
        process = run(tmp_path, "convert", "logs.csv", "--to", "my/logs-v0", "--env", "Pendulum-v1", *self.OPTIONS)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith("my/logs-v0: 597 transitions in 3 episodes")
        assert "Warning" not in process.stderr and "Traceback" not in process.stderr
        process = run(tmp_path, "show", "my/logs-v0", "--json")
        assert process.returncode == 0 and json.loads(process.stdout)["transitions"] == 597 and process.stderr == ""


class TestCollect:
    def test_an_agent_from_a_file(self, tmp_path: Path) -> None:
        SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, device="cpu").save(tmp_path / "sac.zip")
        command = ("collect", "--env", "Pendulum-v1", "--agent", tmp_path / "sac.zip", "--steps", 300, "--seed", 1)
        output = succeed(*command, "--id", "my/a-v0", "--noise-std", "0.1", "--epsilon-random", "0.1")
        assert "my/a-v0: 400 transitions in 2 episodes, mean return" in output
        succeed(*command, "--id", "my/b-v0", "--deterministic", "--author", "A. Uthor", "--description", "mine")
        provenance = load_dataset("my/b-v0").provenance
        assert provenance["author"] == ["A. Uthor"] and provenance["description"] == "mine"
        assert load_dataset("my/a-v0").fingerprint != load_dataset("my/b-v0").fingerprint

    def test_random_actions(self) -> None:
        assert "my/r-v0: 400 transitions in 2 episodes" in succeed(
            "collect", "--env", "Pendulum-v1", "--random", "--n-episodes", 2, "--id", "my/r-v0"
        )
        assert "uniformly random" in succeed("show", "my/r-v0")

    def test_mistakes_are_one_line(self, tmp_path: Path) -> None:
        command = ("collect", "--env", "Pendulum-v1", "--id", "my/x-v0")
        assert "either a number of steps or a number of episodes" in fail(*command, "--random")
        assert "No trained agent" in fail(*command, "--algo", "sac", "-f", tmp_path, "-n", 10)
        assert "Give either --random or --algo sac" in fail(*command, "--random", "--algo", "sac", "-n", 10)
        assert "must be from 0 to 1" in fail(*command, "--algo", "sac", "--epsilon-random", 2, "-n", 10)

    def test_an_agent_that_the_zoo_trained(self, tmp_path: Path) -> None:
        """From `python -m rl_zoo3.train` to the dataset, both as processes of their own."""
        (tmp_path / "sac.yml").write_text(
            "Pendulum-v1:\n  n_timesteps: 200\n  policy: MlpPolicy\n  learning_starts: 1000\n"
            "  policy_kwargs: \"dict(net_arch=[8])\"\n  normalize: true\n"
        )  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        command = ["-m", "rl_zoo3.train", "--algo", "sac", "--env", "Pendulum-v1", "-conf", "sac.yml",
                   "--eval-freq", "-1", "--seed", "0", "--device", "cpu", "--verbose", "0"]  # fmt: skip
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=120)
        process = run(
            tmp_path,
            "collect",
            "--algo",
            "sac",
            "--env",
            "Pendulum-v1",
            "-f",
            "logs",
            "-n",
            200,
            "--id",
            "my/z-v0",
            "--device",
            "cpu",
        )
        assert process.returncode == 0, process.stderr
        assert "my/z-v0: 200 transitions in 1 episode, " in process.stdout and "Traceback" not in process.stderr
        data = load_dataset("my/z-v0")
        assert "dataset collect --algo sac --env Pendulum-v1 -f logs" in str(data.provenance["description"])
        assert data.observation_space == gym.make("Pendulum-v1").observation_space
        assert np.abs(data.observations[:, 2]).max() > 1.5  # type: ignore[call-overload]


class TestReport:
    def test_the_page_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "pages" / "report.html"
        output = succeed(
            "report",
            "bundled:pendulum-medium?episodes=10",
            "-o",
            path,
            "--compare",
            "bundled:pendulum-medium?top_fraction=0.1",
        )
        assert output.strip().endswith(f"Report: {path}")
        text = path.read_text(encoding="utf-8")
        assert text.startswith("<!DOCTYPE html>") and "Side by side" in text

    def test_the_command_itself(self, tmp_path: Path) -> None:
        process = run(tmp_path, "report", "bundled:pendulum-medium?episodes=5")
        assert process.returncode == 0 and process.stdout == "Report: report.html\n" and process.stderr == ""
        assert (tmp_path / "report.html").stat().st_size > 20_000

    def test_mistakes_leave_nothing(self, tmp_path: Path) -> None:
        assert "No dataset file" in fail("report", tmp_path / "missing.npz", "-o", tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()


def test_help_names_every_command() -> None:
    output = CliRunner().invoke(app, ["dataset", "--help"]).output
    for command in ("convert", "collect", "show", "report"):
        assert command in output
