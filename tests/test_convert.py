"""Logs of every kind become Minari datasets with the same rows."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import TD3

from sb3_offline_ft import OfflineDataset, load_dataset
from sb3_offline_ft.common.functions import load_function
from sb3_offline_ft.datasets.files.column_map import ColumnMap
from sb3_offline_ft.datasets.files.minari_writing import FailsafeFile, write_episodes, write_minari
from sb3_offline_ft.datasets.files.tables import read_tables
from sb3_offline_ft.datasets.tools.convert import ConvertedDataset, convert_logs

pytestmark = pytest.mark.usefixtures("minari_root")


@pytest.fixture(scope="module")
def pendulum() -> OfflineDataset:
    """Five real episodes of 200 steps, cut by the time limit."""
    return load_dataset("bundled:pendulum-medium?episodes=5")


@pytest.fixture(scope="module")
def hopper() -> OfflineDataset:
    """Four real episodes, some of which terminate."""
    return load_dataset("bundled:hopper-medium?episodes=4")


def table_of(data: OfflineDataset, with_next: bool = True) -> pd.DataFrame:
    """All columns of a dataset, under names that are recognised."""
    assert isinstance(data.observations, np.ndarray) and isinstance(data.next_observations, np.ndarray)
    columns: dict[str, Any] = {f"obs_{i}": data.observations[:, i] for i in range(data.observations.shape[1])}
    columns |= {f"action_{i}": data.actions[:, i] for i in range(data.actions.shape[1])}
    columns |= {"reward": data.rewards, "terminated": data.terminations, "truncated": data.truncations}
    columns["episode"] = data.episode_of_rows()
    if with_next:
        columns |= {f"next_obs_{i}": data.next_observations[:, i] for i in range(data.observations.shape[1])}
    return pd.DataFrame(columns)


def assert_same_rows(ours: OfflineDataset, theirs: OfflineDataset) -> None:
    assert ours.fingerprint == theirs.fingerprint


def assert_nothing_left(root: Path) -> None:
    """No dataset, and nothing hidden."""
    assert not [path for path in root.rglob("*") if path.name.startswith(".") or path.suffix == ".hdf5"]


class TestRoundTrips:
    """What was converted reads back to the bit."""

    @pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet"])
    def test_tables(self, suffix: str, hopper: OfflineDataset, tmp_path: Path) -> None:
        path = tmp_path / f"logs{suffix}"
        table = table_of(hopper)
        if suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
        made = convert_logs([path], "my/hopper/logs-v0", env="Hopper-v5")
        assert made == ConvertedDataset("my/hopper/logs-v0", made.folder, len(hopper), 4, ())
        back = load_dataset("my/hopper/logs-v0")
        assert_same_rows(back, hopper)
        assert back.env_id == "Hopper-v5"
        assert back.observation_space == gym.make("Hopper-v5").observation_space
        assert back.reference_scores == hopper.reference_scores

    def test_without_next_observations_only_last_rows_of_cut_episodes_go(self, hopper: OfflineDataset, tmp_path: Path) -> None:
        table_of(hopper, with_next=False).to_csv(tmp_path / "logs.csv", index=False)
        made = convert_logs([tmp_path / "logs.csv"], "my/logs-v0", env="Hopper-v5")
        back = load_dataset("my/logs-v0")
        kept = ~hopper.truncations
        assert isinstance(hopper.observations, np.ndarray) and isinstance(back.observations, np.ndarray)
        assert (back.observations == hopper.observations[kept]).all() and (back.rewards == hopper.rewards[kept]).all()
        assert back.n_episodes == 4
        (note,) = made.notes
        assert f"{hopper.truncations.sum()} last rows" in note and "derived" in note
        # The next observation of a terminated row is never used
        inside = ~back.terminations & ~back.truncations
        assert isinstance(back.next_observations, np.ndarray)
        assert (back.next_observations[inside] == back.observations[1:][inside[:-1]]).all()

    def test_every_source_that_load_dataset_takes(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
        arrays = {name: getattr(pendulum, name) for name in names}
        np.savez(tmp_path / "logs.npz", **arrays)
        import h5py

        with h5py.File(tmp_path / "logs.hdf5", "w") as file:
            for name, array in arrays.items():
                file[{"terminations": "terminals", "truncations": "timeouts"}.get(name, name)] = array
        for spec in (tmp_path / "logs.npz", tmp_path / "logs.hdf5", "bundled:pendulum-medium?episodes=5", pendulum):
            convert_logs([spec], "my/pendulum-v0", env="Pendulum-v1", overwrite=True)
            assert_same_rows(load_dataset("my/pendulum-v0"), pendulum)

    def test_replay_buffer_of_sb3(self, tmp_path: Path) -> None:
        model = TD3("MlpPolicy", "Pendulum-v1", learning_starts=450, buffer_size=500, seed=0, device="cpu")
        model.learn(450)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        with pytest.raises(ValueError, match="trust_pickle"):
            convert_logs([tmp_path / "buffer.pkl"], "my/buffer-v0", env="Pendulum-v1")
        convert_logs([tmp_path / "buffer.pkl"], "my/buffer-v0", env="Pendulum-v1", trust_pickle=True)
        back = load_dataset("my/buffer-v0")
        buffer = model.replay_buffer
        assert buffer is not None
        assert len(back) == 450 and back.n_episodes == 3
        assert (back.rewards == buffer.rewards[:450, 0]).all()
        assert back.actions == pytest.approx(2 * buffer.actions[:450, 0], abs=1e-6)

    def test_dict_observations(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        table_of(pendulum).to_csv(tmp_path / "logs.csv", index=False)
        columns = ColumnMap.from_mapping(
            {
                "observations": {"speed": "obs_2", "angle": ["obs_0", "obs_1"]},
                "next_observations": {"angle": "next_obs_0,next_obs_1", "speed": "next_obs_2"},
            },
            "test",
        )
        convert_logs([tmp_path / "logs.csv"], "my/dict-v0", columns=columns, action_low=-2, action_high=2)
        back = load_dataset("my/dict-v0")
        assert isinstance(back.observations, dict) and isinstance(pendulum.observations, np.ndarray)
        assert isinstance(back.next_observations, dict) and isinstance(pendulum.next_observations, np.ndarray)
        assert (back.observations["angle"] == pendulum.observations[:, :2]).all()
        assert (back.observations["speed"] == pendulum.observations[:, 2:]).all()
        assert (back.next_observations["speed"] == pendulum.next_observations[:, 2:]).all()
        assert set(back.observation_space) == {"angle", "speed"}  # type: ignore[call-overload]
        # And once more, from a Minari dataset with Dict observations
        convert_logs(["my/dict-v0"], "my/dict-v1")
        assert_same_rows(load_dataset("my/dict-v1"), back)

    def test_images_stay_as_they_are(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        frames = generator.integers(0, 256, (41, 36, 36, 3), dtype=np.uint8)
        data = OfflineDataset.from_columns(
            {"camera": frames[:-1], "speed": np.zeros((40, 1))},
            generator.uniform(-1, 1, (40, 2)),
            np.arange(40.0),
            {"camera": frames[1:], "speed": np.zeros((40, 1))},
            np.zeros(40, np.bool_),
        )
        convert_logs([data], "my/images-v0", action_low=[-1, -1], action_high=[1, 1])
        assert_same_rows(load_dataset("my/images-v0"), data)

    def test_several_logs_become_one(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        for index in range(5):
            table_of(pendulum.select_episodes([index])).to_csv(tmp_path / f"run_{index + 8}.csv", index=False)
        for logs in ([tmp_path], [str(tmp_path / "run_*.csv")], [tmp_path / f"run_{index}.csv" for index in range(8, 13)]):
            convert_logs(logs, "my/runs-v0", env="Pendulum-v1", overwrite=True)
            # Files are taken by their numbers: 8, 9, 10, 11, 12
            assert_same_rows(load_dataset("my/runs-v0"), pendulum)
        table = tmp_path / "run_8.csv"
        convert_logs([table, "bundled:pendulum-medium?episodes=2"], "my/both-v0", env="Pendulum-v1")
        both = load_dataset("my/both-v0")
        assert (both.rewards == np.concatenate([pendulum.rewards[:200], pendulum.rewards[:400]])).all()

    def test_the_columns_of_two_tables_must_agree(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        table_of(pendulum).to_csv(tmp_path / "a.csv", index=False)
        table_of(pendulum).rename(columns={"obs_2": "obs_7"}).to_csv(tmp_path / "b.csv", index=False)
        with pytest.raises(ValueError, match=r"b\.csv.*does not go with.*expected obs_0, obs_1, obs_2 for observations"):
            convert_logs([tmp_path / "a.csv", tmp_path / "b.csv"], "my/ab-v0", env="Pendulum-v1")

    def test_rows_that_do_not_follow_on_part_an_episode(self, pendulum: OfflineDataset) -> None:
        assert isinstance(pendulum.observations, np.ndarray) and isinstance(pendulum.next_observations, np.ndarray)
        rows = np.r_[0:50, 60:200]
        data = OfflineDataset.from_columns(
            pendulum.observations[rows],
            pendulum.actions[rows],
            pendulum.rewards[rows],
            pendulum.next_observations[rows],
            pendulum.terminations[rows],
            episode_starts=np.array([0]),
        )
        assert data.n_episodes == 1
        made = convert_logs([data], "my/gap-v0", env="Pendulum-v1")
        back = load_dataset("my/gap-v0")
        assert back.episode_lengths.tolist() == [50, 140] and back.truncations.sum() == 2
        assert (back.next_observations == data.next_observations).all()
        assert len(made.notes) == 1 and "1 episode was cut" in made.notes[0]
        assert [episode.truncations[-1] for episode in minari.load_dataset("my/gap-v0").iterate_episodes()] == [True, True]

    def test_flat_data_of_an_environment_with_dict_observations_is_refused(self, pendulum: OfflineDataset) -> None:
        space = spaces.Dict({"a": spaces.Box(-9, 9, (3,), np.float32)})
        env = gym.wrappers.TransformObservation(gym.make("Pendulum-v1"), lambda obs: {"a": obs}, space)
        with pytest.raises(ValueError, match="does not fit the environment"):
            convert_logs([pendulum], "my/dict-v0", env=env)


class TestColumns:
    """Which columns mean what."""

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        st.sampled_from(["obs_{}", "OBS{}", "observation_{}", "observations[{}]", "state.{}", "obs/{}"]),
        st.sampled_from(["action_{}", "act{}", "actions_{}"]),
        st.sampled_from(["reward", "rewards", "Rew"]),
        st.integers(1, 12),
        st.randoms(),
    )
    def test_usual_names_are_recognised_in_any_order(self, obs: str, action: str, reward: str, size: int, random: Any) -> None:
        names = [obs.format(i) for i in range(size)] + [action.format(i) for i in range(2)] + [reward, "time", "id"]
        shuffled = names.copy()
        random.shuffle(shuffled)
        found = ColumnMap().resolve(shuffled, "test")
        assert found.observations == tuple(names[:size])
        assert found.actions == tuple(names[size : size + 2])
        assert found.reward == reward and found.time is None and found.episode is None

    def test_names_after_a_stem_are_taken_in_the_order_of_the_table(self) -> None:
        columns = [
            "t",
            "obs_x",
            "obs_theta",
            "obs_dx",
            "action",
            "reward",
            "done",
            "next_obs_x",
            "next_obs_theta",
            "next_obs_dx",
        ]
        found = ColumnMap().resolve(columns, "test")
        assert found.observations == ("obs_x", "obs_theta", "obs_dx")
        assert found.next_observations == ("next_obs_x", "next_obs_theta", "next_obs_dx")
        assert (found.actions, found.done) == (("action",), "done")

    def test_wildcards(self) -> None:
        columns = ["q_10", "q_2", "q_1", "left_pos", "arm_pos", "u", "r"]
        given = {"observations": "q_*, *_pos", "actions": "u", "reward": "r"}
        found = ColumnMap.from_mapping(given, "test").resolve(columns, "test")
        assert found.observations == ("q_1", "q_2", "q_10", "left_pos", "arm_pos")

    def test_brackets_in_names(self) -> None:
        columns = ["obs[10]", "obs[2]", "obs[goal]", "q_1", "q_2", "q_3", "m[1][0]", "m[0][1]", "m[0][0]", "u", "r"]
        for names, expected in (
            ("obs[*]", ("obs[10]", "obs[2]", "obs[goal]")),
            ("obs[?]", ("obs[2]",)),
            ("obs[2]", ("obs[2]",)),
            ("obs[*0], obs[2]", ("obs[10]", "obs[2]")),
            ("q_[1-2]", ("q_1", "q_2")),
            ("m[*", ("m[0][0]", "m[0][1]", "m[1][0]")),
        ):
            chosen = ColumnMap.from_mapping({"observations": names, "actions": "u", "reward": "r"}, "test")
            assert chosen.resolve(columns, "test").observations == expected
        guessed = ColumnMap().resolve(["obs[1][0]", "obs[0][1]", "obs[0][0]", "act(1)", "act(0)", "reward"], "test")
        assert (guessed.observations, guessed.actions) == (("obs[0][0]", "obs[0][1]", "obs[1][0]"), ("act(0)", "act(1)"))

    @pytest.mark.parametrize(
        ("given", "columns", "message"),
        [
            (
                {"observations": "obs_x, obs_y"},
                "obs_x obs_z action reward",
                "no column 'obs_y' for observations. Did you mean",
            ),
            ({"observations": "q_*"}, "p_1 action reward", r"no column 'q_\*' for observations"),
            ({"reward": "score"}, "obs_0 action points", "no column 'score' for reward; there are obs_0"),
            ({}, "obs_0 reward", "no column was recognised as actions .* Name it with --actions"),
            ({}, "a b", "no column was recognised as observations"),
            ({}, "obs_0 action", "recognised as reward .* --reward-function"),
            ({}, "obs_0 state_0 action reward", "observations could be obs_0 and state_0. Say which with --observations"),
            ({}, "obs_0 action reward rewards", "reward could be reward or rewards"),
            ({}, "obs_0 obs_1 obs_goal action reward", "obs_0, obs_1, but that leaves out obs_goal. Say which with --obs"),
            ({}, "obs obs[1] action reward", r"observations could be obs, but that leaves out obs\[1\]"),
            ({}, "obs[0] obs[goal] action reward", r"could be obs\[0\], but that leaves out obs\[goal\]"),
            ({}, "obs_0 action action_0 reward", "actions could be action, but that leaves out action_0"),
            (
                {"observations": "obs[7]"},
                "obs[0] obs[1] action reward",
                r"no column 'obs\[7\]' .* Did you mean obs\[1\] or obs\[0\]",
            ),
            ({"episode": "run"}, "obs_0 action reward Run", "Did you mean Run"),
        ],
    )
    def test_missing_columns_are_named_with_near_ones(self, given: dict[str, Any], columns: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ColumnMap.from_mapping(given, "test").resolve(columns.split(), "Table 'logs.csv'")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("map.yml", "observations: [x, 'theta_*']\nactions: u\nreward: r\n"),
            ("map.toml", 'observations = ["x", "theta_*"]\nactions = "u"\nreward = "r"\n'),
        ],
    )
    def test_files(self, name: str, content: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        expected = ColumnMap(observations=("x", "theta_*"), actions=("u",), reward="r")
        assert ColumnMap.from_file(tmp_path / name) == expected
        # What is said on the command line comes first
        chosen = ColumnMap.from_options(tmp_path / name, {"reward": "cost", "episode": None})
        assert chosen == ColumnMap(observations=("x", "theta_*"), actions=("u",), reward="cost")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("map.yml", "obervations: x\n", "unknown key 'obervations'. Did you mean 'observations'"),
            ("map.yml", "observations: 3\n", "observations must be a list of columns"),
            ("map.yml", "reward: [a, b]\n", "reward must be the name of a column"),
            ("map.yml", "observations: ''\n", "observations names no column"),
            ("map.yml", "[1, 2", "is no YAML file"),
            ("map.yml", "- a\n", "expected keys such as observations"),
            ("map.toml", "a =", "is no TOML file"),
            ("map.json", "{}", "expected a .yml, .yaml or .toml file"),
        ],
    )
    def test_wrong_files(self, name: str, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            ColumnMap.from_file(tmp_path / name)


class TestTables:
    """What rows mean."""

    def read(self, folder: Path, text: str, **options: Any) -> OfflineDataset:
        (folder / "logs.csv").write_text(text)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*derived within episodes")
            return read_tables([folder / "logs.csv"], **options)

    def test_an_episode_column_parts_episodes(self, tmp_path: Path) -> None:
        data = self.read(tmp_path, "obs_0,action,reward,episode\n1,.1,1,a\n2,.1,2,a\n3,.1,3,a\n7,.1,4,b\n8,.1,5,b\n")
        # The last row of each is dropped, as what came next was not recorded
        assert data.observations.tolist() == [[1], [2], [7]] and data.next_observations.tolist() == [[2], [3], [8]]
        assert data.episode_starts.tolist() == [0, 2] and data.truncations.tolist() == [False, True, True]

    def test_done_without_truncations_is_a_termination(self, tmp_path: Path) -> None:
        data = self.read(tmp_path, "obs_0,action,reward,done\n1,.1,1,0\n2,.1,2,1\n3,.1,3,0\n4,.1,4,0\n")
        assert data.terminations.tolist() == [False, True, False]

    def test_done_at_a_time_limit_is_no_termination(self, tmp_path: Path) -> None:
        text = "obs_0,next_obs_0,action,reward,done,timeout\n1,2,.1,1,0,0\n2,3,.1,2,1,1\n5,6,.1,3,1,0\n"
        data = self.read(tmp_path, text)
        assert data.terminations.tolist() == [False, False, True] and data.truncations.tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("header", "rows", "terminations", "truncations"),
        [
            # Only a time limit, then a termination
            ("terminated,done", ["00", "01", "00", "11"], [3], [1]),
            ("terminal,done", ["00", "01", "00", "11"], [3], [1]),
            ("terminals,dones", ["00", "01", "00", "11"], [3], [1]),
            ("truncated,done", ["00", "11", "00", "01"], [3], [1]),
            ("timeouts,dones", ["00", "10", "00", "01"], [3], [1]),
            ("terminated,timeout,done", ["000", "011", "000", "101"], [3], [1]),
            ("terminated,truncated,done", ["000", "011", "000", "111"], [3], [1]),
        ],
    )
    def test_ends_of_either_kind_are_told_apart(
        self, header: str, rows: list[str], terminations: list[int], truncations: list[int], tmp_path: Path
    ) -> None:
        text = f"obs_0,next_obs_0,action,reward,{header}\n"
        text += "".join(f"{i},{i + 1},.1,0,{','.join(flags)}\n" for i, flags in enumerate(rows))
        names = dict(zip(header.split(","), (list(map(int, column)) for column in zip(*rows, strict=True)), strict=True))
        meanings = {"term": "terminated", "trun": "truncated", "time": "truncated", "done": "done"}
        named = ColumnMap(**{meanings[name[:4]]: name for name in names})  # type: ignore[arg-type]
        arrays = {"observations": np.arange(4.0)[:, None], "next_observations": np.arange(1.0, 5)[:, None]}
        arrays |= {"actions": np.zeros((4, 1), np.float32), "rewards": np.zeros(4)}
        np.savez(tmp_path / "logs.npz", **arrays, **{name: np.array(flags, np.bool_) for name, flags in names.items()})  # type: ignore[arg-type]
        for data in (self.read(tmp_path, text), self.read(tmp_path, text, columns=named), load_dataset(tmp_path / "logs.npz")):
            assert np.flatnonzero(data.terminations).tolist() == terminations
            assert np.flatnonzero(data.truncations).tolist() == truncations
            assert data.episode_starts.tolist() == [0, 2]

    def test_no_transition_from_one_episode_to_the_next_is_made_up(self, tmp_path: Path) -> None:
        text = "obs_0,action,reward,terminated,done\n1,.1,0,0,0\n2,.1,0,0,1\n70,.1,0,0,0\n80,.1,0,1,1\n"
        data = self.read(tmp_path, text)
        assert data.observations.tolist() == [[1], [70], [80]] and data.n_episodes == 2
        # The flags of the environment's D4RL-like files too
        import h5py

        with h5py.File(tmp_path / "logs.hdf5", "w") as file:
            file["observations"], file["actions"] = np.array([[1.0], [2], [70], [80]]), np.zeros((4, 1))
            file["rewards"], file["terminals"], file["dones"] = np.zeros(4), np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1])
        with pytest.warns(UserWarning, match="derived"):
            assert load_dataset(tmp_path / "logs.hdf5").observations.tolist() == [[1], [70], [80]]

    @pytest.mark.parametrize(
        ("header", "rows", "message"),
        [
            ("terminated,done", ["00", "10", "00", "11"], r"in 1 of 4 rows \(row 2 \(line 3\)\), first terminated 1, done 0"),
            (
                "terminated,truncated,done",
                ["000", "001", "000", "010"],
                r"in 2 of 4 rows \(row 2 \(line 3\), row 4 \(line 5\)\)",
            ),
        ],
    )
    def test_ends_that_contradict_each_other_are_refused(
        self, header: str, rows: list[str], message: str, tmp_path: Path
    ) -> None:
        text = f"obs_0,next_obs_0,action,reward,{header}\n"
        text += "".join(f"{i},{i + 1},.1,0,{','.join(flags)}\n" for i, flags in enumerate(rows))
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, text)
        if "truncated" in header:
            data = self.read(tmp_path, text, columns=ColumnMap(terminated="terminated", truncated="truncated"))
            assert np.flatnonzero(data.truncations).tolist() == [3], "done was left out, as both others were named"

    def test_time_sorts_the_rows_of_each_episode(self, tmp_path: Path) -> None:
        text = "t,obs_0,action,reward,episode\n2,12,.1,0,a\n1,21,.2,0,b\n1,11,.3,0,a\n3,13,.4,0,a\n2,22,.5,0,b\n"
        data = self.read(tmp_path, text, columns=ColumnMap(time="t"))
        assert data.observations[:, 0].tolist() == [11, 12, 21] and data.actions[:, 0] == pytest.approx([0.3, 0.1, 0.2])
        dates = "t,obs_0,action,reward\n2024-01-02 00:00:01,2,.1,0\n2024-01-01 23:59:59,1,.1,0\n2024-01-02 00:00:02,3,.1,0\n"
        assert self.read(tmp_path, dates, columns=ColumnMap(time="t")).observations[:, 0].tolist() == [1, 2]

    def test_joined_files_let_an_episode_go_on(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("obs_0,action,reward,episode\n1,.1,1,0\n2,.1,2,0\n3,.1,3,1\n")
        (tmp_path / "b.csv").write_text("obs_0,action,reward,episode\n4,.1,4,1\n5,.1,5,1\n6,.1,6,2\n")
        with pytest.warns(UserWarning, match="derived"):
            apart = read_tables([tmp_path / "a.csv", tmp_path / "b.csv"])
            joined = read_tables([tmp_path / "a.csv", tmp_path / "b.csv"], join=True)
        assert apart.observations[:, 0].tolist() == [1, 4]
        assert joined.observations[:, 0].tolist() == [1, 3, 4] and joined.episode_lengths.tolist() == [1, 2]
        (tmp_path / "c.csv").write_text("obs_0,action,reward,episode\n7,.1,7,3\n8,.1,8,3\n")
        with pytest.warns(UserWarning, match="derived"):
            joined = read_tables([tmp_path / "b.csv", tmp_path / "c.csv"], join=True)
        # Episode 2 does not go on as episode 3
        assert joined.observations[:, 0].tolist() == [4, 7]

    def test_flags_of_many_spellings(self, tmp_path: Path) -> None:
        for true, false in (("True", "False"), ("1", "0"), ("1.0", "0.0"), ("yes", "no"), ("t", "f")):
            text = f"obs_0,next_obs_0,action,reward,terminated\n1,2,.1,1,{false}\n2,3,.1,2,{true}\n"
            assert self.read(tmp_path, text).terminations.tolist() == [False, True]

    def test_semicolons_part_columns_too(self, tmp_path: Path) -> None:
        data = self.read(tmp_path, '"obs_0";next_obs_0;action;reward\n1;2;.1;1\n2;3;.1;2\n')
        assert data.observations.tolist() == [[1], [2]]

    def test_numbers_keep_every_bit(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
        table = pd.DataFrame({"obs_0": values, "next_obs_0": np.roll(values, -1), "action": values, "reward": values})
        table.to_csv(tmp_path / "a.csv", index=False)
        assert (read_tables([tmp_path / "a.csv"]).rewards == values).all()

    def test_lists_in_parquet(self, tmp_path: Path) -> None:
        table = pd.DataFrame({"observation": [[1.0, 2.0], [3.0, 4.0]], "next_observation": [[3.0, 4.0], [5.0, 6.0]],
                              "action": [[0.1], [0.2]], "reward": [0.0, 1.0]})  # fmt: skip
        table.to_parquet(tmp_path / "logs.parquet")
        data = read_tables([tmp_path / "logs.parquet"])
        assert data.observations.tolist() == [[1, 2], [3, 4]] and data.actions.shape == (2, 1)
        table.at[1, "observation"] = [3.0]
        table.to_parquet(tmp_path / "logs.parquet")
        with pytest.raises(ValueError, match=r"column 'observation', row 2: expected 2 numbers"):
            read_tables([tmp_path / "logs.parquet"])

    @pytest.mark.filterwarnings("ignore:.*derived within episodes")
    def test_several_columns_of_lists_are_put_together_in_the_order_named(self, tmp_path: Path) -> None:
        """Names and types as in LeRobot's files: lists of fixed and of any length, and numbers beside them."""
        import pyarrow as pa
        from pyarrow import parquet

        columns = {
            "observation.state": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2)),
            "observation.environment_state": pa.array([[10], [20], [30]], pa.list_(pa.int64())),
            "action": pa.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], pa.large_list(pa.float64())),
            "gripper": pa.array([1.0, 2.0, 3.0]),
            "next.reward": pa.array([0.0, 1.0, 2.0]),
            "next.done": pa.array([False, False, True]),
            "episode_index": pa.array([0, 0, 0]),
        }
        parquet.write_table(pa.table(columns), tmp_path / "logs.parquet")
        data = read_tables([tmp_path / "logs.parquet"])
        assert data.observations.tolist() == [[1, 2, 10], [3, 4, 20], [5, 6, 30]] and data.terminations.tolist()[-1]
        named = ColumnMap(
            observations=("observation.environment_state", "gripper", "observation.state"), actions=("gripper", "action")
        )
        mixed = read_tables([tmp_path / "logs.parquet"], named)
        assert mixed.observations.tolist() == [[10, 1, 1, 2], [20, 2, 3, 4], [30, 3, 5, 6]]
        assert mixed.actions.shape == (3, 3)
        keyed = read_tables([tmp_path / "logs.parquet"], ColumnMap(observations={"all": named.observations}))  # type: ignore[dict-item]
        assert keyed.observations["all"].tolist() == mixed.observations.tolist()  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=r"column 'action', row 1: expected an action from -2 to 0.15, found 0.2"):
            read_tables(
                [tmp_path / "logs.parquet"],
                named,
                action_space=spaces.Box(np.full(3, -2, np.float32), np.array([5, 0.15, 0.15], np.float32)),
            )

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            ([[1.0, 2.0], [3.0]], r"'observation\.state', row 2: expected 2 numbers as in the first row, found 1"),
            ([[1.0, 2.0], [3.0, None]], r"'observation\.state', row 2: expected numbers, found 3.0, nan"),
            ([[1, 2], [3, None]], r"'observation\.state', row 2: expected numbers, found 3.0, nan"),
            ([[1.0, 2.0], None], r"'observation\.state', row 2: expected a list of numbers, found an empty cell"),
            ([None, [1.0, 2.0]], r"'observation\.state', row 1: expected a list of numbers, found an empty cell"),
            ([[], []], r"'observation\.state', row 1: expected some numbers"),
            ([[[1, 2], [3, 4]]] * 2, r"'observation\.state', row 1: expected a list of numbers, found lists within it"),
            ([["a", "b"]] * 2, r"'observation\.state', row 1: expected a list of numbers \(could not convert"),
            ([{"path": "a.png"}] * 2, r"'observation\.state', row 1: expected a number, found a dict"),
        ],
    )
    def test_lists_that_are_no_vectors_are_refused(self, cells: list[Any], message: str, tmp_path: Path) -> None:
        table = pd.DataFrame({"observation.state": cells, "observation.goal": [[1.0]] * 2, "action": 0.0, "reward": 0.0})
        table.to_parquet(tmp_path / "logs.parquet")
        with pytest.raises(ValueError, match=r"logs\.parquet', column " + message):
            read_tables([tmp_path / "logs.parquet"])

    def test_lists_where_numbers_or_names_belong(self, tmp_path: Path) -> None:
        numbers = pd.DataFrame({"obs_0": [0.0, 1.0], "action": 0.0, "reward": 0.0, "terminated": False, "episode": 0})
        for name, message in (("reward", "a number"), ("terminated", "0 or 1"), ("episode", "a number or name")):
            table = numbers.drop(columns=name)
            table[name] = [[0.0], [0.0]]
            table.to_parquet(tmp_path / "logs.parquet")
            with pytest.raises(ValueError, match=rf"column '{name}', row 1: expected {message}"):
                read_tables([tmp_path / "logs.parquet"])

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("1,.1,x,0\n", r"column 'reward', row 1 \(line 2\): expected a number, found the text 'x'"),
            ("1,.1,1,0\n2,,1,0\n", r"column 'action', row 2 \(line 3\): expected a number, found an empty cell or NaN"),
            ("1,.1,1,0\ninf,.1,1,0\n3,.1,1,0\n", r"column 'obs_0', row 2 \(line 3\): expected a number, found inf"),
            ("1,.1,1,0\n1e40,.1,1,0\n", "1e[+]40 is too large for float32"),
            ("1,.1,1,0\n2,.1,1,2\n", "column 'terminated', row 2 .line 3.: expected 0 or 1, or true or false, found '2'"),
            ("1,.1,a b,0\n2,.1,c,0\n", "Is this the right column"),
        ],
    )
    def test_wrong_cells_are_named(self, rows: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message) as error:
            self.read(tmp_path, "obs_0,action,reward,terminated\n" + rows)
        assert str(tmp_path / "logs.csv") in str(error.value)

    def test_episodes_must_be_whole(self, tmp_path: Path) -> None:
        text = "obs_0,action,reward,episode\n1,.1,1,0\n2,.1,1,1\n3,.1,1,0\n"
        with pytest.raises(ValueError, match=r"column 'episode', row 3 \(line 4\): the episode 0 goes on here after another"):
            self.read(tmp_path, text)
        with pytest.raises(ValueError, match="expected the number or name of the episode"):
            self.read(tmp_path, "obs_0,action,reward,episode\n1,.1,1,0\n2,.1,1,\n")

    def test_times_must_be_known_and_different(self, tmp_path: Path) -> None:
        header, columns = "t,obs_0,action,reward\n", ColumnMap(time="t")
        with pytest.raises(ValueError, match=r"row 3 \(line 4\): the time 1 is also in row 1 \(line 2\) of the same episode"):
            self.read(tmp_path, header + "1,1,.1,0\n2,2,.1,0\n1,3,.1,0\n", columns=columns)
        with pytest.raises(ValueError, match=r"column 't', row 1 \(line 2\): expected a time"):
            self.read(tmp_path, header + ",1,.1,0\n2,2,.1,0\n", columns=columns)
        with pytest.raises(ValueError, match="expected numbers or dates"):
            self.read(tmp_path, header + "soon,1,.1,0\nlater,2,.1,0\n", columns=columns)

    def test_actions_beyond_the_bounds_are_named(self, tmp_path: Path) -> None:
        space = spaces.Box(-2, 2, (1,), np.float32)
        text = "obs_0,action,reward\n1,1.9,0\n2,2.5,0\n3,-3,0\n"
        with pytest.raises(
            ValueError, match=r"'action', row 2 \(line 3\): expected an action from -2 to 2, found 2.5; 2 of 3 rows"
        ):
            self.read(tmp_path, text, action_space=space)
        with pytest.raises(ValueError, match="expected 2 columns of actions, as the action space has, found 1: action"):
            self.read(tmp_path, text, action_space=spaces.Box(-2, 2, (2,), np.float32))

    def test_files_that_are_no_tables(self, tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("")
        (tmp_path / "header.csv").write_text("obs_0,action,reward\n")
        (tmp_path / "twice.csv").write_text("obs_0,obs_0,action,reward\n1,2,3,4\n")
        (tmp_path / "ragged.csv").write_text("obs_0,action,reward\n1,.1,0\n1,.1,0,5,6\n")
        (tmp_path / "longer.csv").write_text("obs_0,action,reward\n1,.1,0,5\n1,.1,0,6\n")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
        for name, message in (
            ("empty.csv", "cannot read"),
            ("header.csv", "has no rows"),
            ("longer.csv", "cannot read"),
            ("twice.csv", "more than one column 'obs_0'"),
            ("ragged.csv", "cannot read"),
            ("broken.parquet", "cannot read"),
        ):
            with pytest.raises(ValueError, match=message):
                read_tables([tmp_path / name])


class TestRewards:
    def test_a_function_computes_them(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        def reward(observations: Any, actions: Any, next_observations: Any) -> Any:
            angle = np.arctan2(observations[:, 1], observations[:, 0])
            return -(angle**2 + 0.1 * observations[:, 2] ** 2 + 0.001 * actions[:, 0] ** 2)

        table_of(pendulum).drop(columns="reward").to_csv(tmp_path / "logs.csv", index=False)
        convert_logs([tmp_path / "logs.csv"], "my/computed-v0", env="Pendulum-v1", reward_function=reward)
        computed = load_dataset("my/computed-v0")
        assert computed.rewards == pytest.approx(pendulum.rewards, abs=1e-4)
        # Those of other sources are replaced
        made = convert_logs([pendulum], "my/new-v0", env="Pendulum-v1", reward_function=lambda obs, act, following: act[:, 0])
        assert (load_dataset(made.dataset_id).rewards == pendulum.actions[:, 0]).all()

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (lambda n: np.zeros((n, 1)), r"one number for each of the 1,000 rows, an array of shape \(1000,\), found"),
            (lambda n: np.full(n, np.nan), "returned nan for row 1"),
        ],
    )
    def test_what_it_returns_is_checked(
        self, returned: Callable[[int], Any], message: str, pendulum: OfflineDataset, minari_root: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            convert_logs([pendulum], "my/x-v0", env="Pendulum-v1", reward_function=lambda obs, act, new: returned(len(act)))
        assert_nothing_left(minari_root)

    def test_it_is_imported_from_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my_rewards_of_test.py").write_text("def cost(obs, act, new):\n    return -act[:, 0]\nlimit = 3\n")
        monkeypatch.chdir(tmp_path)
        assert load_function("my_rewards_of_test:cost", "reward function")(None, np.ones((2, 1)), None).tolist() == [-1, -1]
        for name, message in (
            ("my_rewards_of_test", "must be given as module:function"),
            ("my_rewards_of_test:nothing", "Cannot import the reward function"),
            ("no_such_module_here:f", "No module named"),
            ("my_rewards_of_test:limit", "is a int, expected a function"),
        ):
            with pytest.raises(ValueError, match=message):
                load_function(name, "reward function")


class TestDatasetsWritten:
    def test_metadata_and_the_environment_come_back(self, pendulum: OfflineDataset) -> None:
        facts = {
            "author": "A. Uthor",
            "algorithm_name": "PID",
            "description": "from the plant",
            "code_permalink": "https://x.y",
        }
        convert_logs([pendulum], "my/pendulum/logs-v3", env="Pendulum-v1", facts=facts, random_score=-1000, expert_score=-100)
        dataset = minari.load_dataset("my/pendulum/logs-v3")
        metadata = dataset.storage.metadata
        assert (metadata["author"], metadata["algorithm_name"]) == ({"A. Uthor"}, "PID")
        assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-1000, -100)
        assert dataset.recover_environment().spec == gym.spec("Pendulum-v1")
        assert list(minari.list_local_datasets()) == ["my/pendulum/logs-v3"]
        scores = load_dataset("my/pendulum/logs-v3").reference_scores
        assert scores is not None and (scores.random, scores.expert) == (-1000, -100)

    def test_scores_survive_without_an_environment(self, pendulum: OfflineDataset) -> None:
        convert_logs([pendulum], "my/a-v0", random_score=1, expert_score=2)
        scores = load_dataset("my/a-v0").reference_scores
        assert scores is not None and (scores.random, scores.expert) == (1, 2)
        assert load_dataset("my/a-v0").action_space == pendulum.action_space

    def test_bounds_must_be_known(self, pendulum: OfflineDataset, tmp_path: Path, minari_root: Path) -> None:
        table_of(pendulum).to_csv(tmp_path / "logs.csv", index=False)
        with pytest.raises(ValueError, match=r"bounds of the actions are not known.*--env.*--action-low"):
            convert_logs([tmp_path / "logs.csv"], "my/a-v0")
        table_of(pendulum).assign(action_0=lambda table: table["action_0"] * 1000).to_csv(tmp_path / "large.csv", index=False)
        with pytest.raises(ValueError, match=r"The actions go from [-\d.]+ to [\d.]+\.$") as caught:
            convert_logs([tmp_path / "large.csv"], "my/a-v0")
        low, high = (float(number) for number in re.findall(r"from (\S+) to (\S+)\.$", str(caught.value))[0])
        assert (low, high) == pytest.approx((1000 * pendulum.actions.min(), 1000 * pendulum.actions.max()), rel=1e-5)
        with pytest.raises(ValueError, match="beyond its bounds"):
            convert_logs([tmp_path / "logs.csv"], "my/a-v0", action_low=-1, action_high=1)
        with pytest.raises(ValueError, match="Expected one bound or 1 of the actions, found 2"):
            convert_logs([tmp_path / "logs.csv"], "my/a-v0", action_low=[-2, -2], action_high=[2, 2])
        with pytest.raises(ValueError, match="both lower and upper"):
            convert_logs([tmp_path / "logs.csv"], "my/a-v0", action_low=-2)
        with pytest.raises(ValueError, match="not both"):
            convert_logs([tmp_path / "logs.csv"], "my/a-v0", action_low=-2, action_high=2, env="Pendulum-v1")
        assert_nothing_left(minari_root)
        convert_logs([tmp_path / "logs.csv"], "my/a-v0", action_low=-2, action_high=2)
        assert load_dataset("my/a-v0").action_space == spaces.Box(-2, 2, (1,), np.float32)

    def test_ids_are_checked_first(self, pendulum: OfflineDataset) -> None:
        for wrong in ("logs", "my/logs", "m/logs-v0", "my logs-v0", "../logs-v0"):
            with pytest.raises(ValueError, match="is no Minari id"):
                convert_logs([pendulum], wrong, env="Pendulum-v1")

    def test_a_dataset_is_replaced_only_on_request_and_only_by_a_complete_one(
        self, pendulum: OfflineDataset, hopper: OfflineDataset, minari_root: Path
    ) -> None:
        convert_logs([pendulum], "my/logs-v0", env="Pendulum-v1")
        with pytest.raises(FileExistsError, match=r"There is a dataset 'my/logs-v0' already.*my/logs-v1.*--overwrite"):
            convert_logs([hopper], "my/logs-v0", env="Hopper-v5")

        def fail(observations: Any, actions: Any, next_observations: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_logs([hopper], "my/logs-v0", env="Hopper-v5", overwrite=True, reward_function=fail)
        with pytest.raises(ValueError, match="does not fit"):
            convert_logs([hopper], "my/logs-v0", env="Pendulum-v1", overwrite=True)
        assert_same_rows(load_dataset("my/logs-v0"), pendulum)
        convert_logs([hopper], "my/logs-v0", env="Hopper-v5", overwrite=True)
        assert_same_rows(load_dataset("my/logs-v0"), hopper)
        assert not [path for path in minari_root.rglob("*") if path.name.startswith(".")]

    def test_a_failure_while_moving_keeps_the_old_dataset(
        self, pendulum: OfflineDataset, hopper: OfflineDataset, minari_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert_logs([pendulum], "my/logs-v0", env="Pendulum-v1")
        replace, target = os.replace, minari_root / "my" / "logs-v0"

        def full_disk(source: Any, destination: Any) -> None:
            if Path(destination) == target and "replaced" not in str(source):
                raise OSError("No space left on device")
            replace(source, destination)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full_disk)
            with pytest.raises(OSError, match="No space"):
                convert_logs([hopper], "my/logs-v0", env="Hopper-v5", overwrite=True)
        assert_same_rows(load_dataset("my/logs-v0"), pendulum)

    def test_what_reads_back_differently_is_thrown_away(
        self, pendulum: OfflineDataset, minari_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def damage(file: FailsafeFile, episodes: Any) -> dict[str, int]:
            buffers = list(episodes)
            buffers[3] = dataclasses.replace(buffers[3], rewards=buffers[3].rewards + 1e-3 * (np.arange(200) == 17))
            return write_episodes(file, buffers)

        monkeypatch.setattr("sb3_offline_ft.datasets.files.minari_writing.write_episodes", damage)
        with pytest.raises(ValueError, match=r"reads back differently from 'pendulum-medium\?episodes=5': nothing is kept"):
            convert_logs([pendulum], "my/logs-v0", env="Pendulum-v1")
        assert_nothing_left(minari_root)

    def test_other_mistakes(self, pendulum: OfflineDataset, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Cannot make the environment 'Pendulum-v7'"):
            convert_logs([pendulum], "my/a-v0", env="Pendulum-v7")
        with pytest.raises(ValueError, match="Give both a random and an expert score"):
            convert_logs([pendulum], "my/a-v0", env="Pendulum-v1", random_score=1)
        with pytest.raises(ValueError, match="no logs to convert"):
            convert_logs([], "my/a-v0")
        with pytest.raises(ValueError, match="no table"):
            convert_logs([pendulum], "my/a-v0", columns=ColumnMap(reward="r"), env="Pendulum-v1")
        with pytest.raises(FileNotFoundError, match=r"No table .*missing\.csv"):
            convert_logs([tmp_path / "missing.csv"], "my/a-v0")
        with pytest.raises(FileNotFoundError, match="neither a Minari dataset nor a table"):
            convert_logs([tmp_path / "minari"], "my/a-v0")
        with pytest.raises(ValueError, match="does not go with"):
            other = load_dataset("bundled:hopper-medium?episodes=1")
            convert_logs([pendulum, other], "my/a-v0")

    def test_files_are_small_and_minari_reads_them(self, minari_root: Path) -> None:
        data = load_dataset("bundled:hopper-medium?episodes=30&max_length=400")
        made = convert_logs([data], "my/hopper-v0", env="Hopper-v5")
        size = (made.folder / "data" / "main_data.hdf5").stat().st_size
        assert size < data.nbytes
        assert sorted(path.name for path in made.folder.rglob("*.*")) == ["main_data.hdf5", "metadata.json"]
        episodes = list(minari.load_dataset("my/hopper-v0").iterate_episodes())
        assert sum(len(episode) for episode in episodes) == len(data)
        assert (np.concatenate([episode.rewards for episode in episodes]) == data.rewards).all()
        assert json.loads((made.folder / "data" / "metadata.json").read_text())["total_episodes"] == data.n_episodes

    def test_files_are_as_those_that_minari_writes(self, minari_root: Path) -> None:
        from minari.data_collector import EpisodeBuffer

        buffers = [
            EpisodeBuffer(
                seed=None if index == 1 else index,
                observations={"a": np.random.default_rng(index).normal(size=(n + 1, 40)), "b": np.arange(n + 1)},
                actions=np.ones((n, 1), np.float32),
                rewards=np.full(n, 0.5),
                terminations=np.zeros(n, np.bool_),
                truncations=np.arange(n) == n - 1,
            )
            for index, n in enumerate((1, 30, 12))
        ]
        options: dict[str, Any] = {
            "observation_space": spaces.Dict({"a": spaces.Box(-9, 9, (40,)), "b": spaces.Discrete(99)}),
            "action_space": spaces.Box(-1, 1, (1,)),
        }
        facts = {"author": "A. Uthor", "author_email": "a@b.c", "algorithm_name": "PID", "requirements": ["numpy"]}
        facts |= {"description": "d", "code_permalink": "https://x.y"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers("my/x-v0", buffers, env="Pendulum-v1", jpeg_encoding=False, **options, **facts)
        write_minari("my/x-v1", buffers, env=gym.make("Pendulum-v1"), facts=facts, **options)
        theirs, ours = (minari.load_dataset(f"my/x-v{version}") for version in range(2))
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            before, after = ([getattr(episode, name) for episode in data.iterate_episodes()] for data in (theirs, ours))
            np.testing.assert_equal(after, before)
            if name != "observations":
                assert [array.dtype for array in after] == [array.dtype for array in before]
        facts_of = [list(data.storage.get_episode_metadata(range(3))) for data in (theirs, ours)]
        assert facts_of[0] == facts_of[1] and [fact.get("seed") for fact in facts_of[1]] == [0, None, 2]
        metadata = [
            {key: value for key, value in data.storage.metadata.items() if key not in ("dataset_id", "dataset_size")}
            for data in (theirs, ours)
        ]
        assert metadata[0] == metadata[1]


def test_a_conversion_that_is_killed_leaves_nothing(pendulum: OfflineDataset, tmp_path: Path, minari_root: Path) -> None:
    """SIGTERM while the reward function works, in a process of its own."""
    table_of(pendulum).to_csv(tmp_path / "logs.csv", index=False)
    (tmp_path / "slow_rewards.py").write_text(
        "import pathlib, time\n"
        "def reward(obs, act, new):\n    pathlib.Path('started').touch()\n    time.sleep(60)\n    return act[:, 0]\n"
    )
    arguments = ["logs.csv", "--to", "my/logs-v0", "--env", "Pendulum-v1", "--reward-function", "slow_rewards:reward"]
    command = [sys.executable, "-m", "sb3_offline_ft", "dataset", "convert", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 143 and "interrupted, nothing was written" in error
    assert_nothing_left(minari_root)
