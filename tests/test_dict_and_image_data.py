"""Dict and image observations: recorded in real environments, and brought into the form in which SB3 shows them."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.wrappers import FlattenObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from stable_baselines3 import TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecTransposeImage

from sb3_offline_ft.common.observations import Observations, map_observations, n_rows, nbytes, take_rows
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, check_spec, fit_to_space, load_dataset

pytestmark = pytest.mark.usefixtures("minari_root")

FORMATS = ("hdf5", "arrow", "parquet")
LENGTHS = (7, 1, 4)


class GoalPendulum(gym.ObservationWrapper[Any, Any, Any]):
    """Pendulum as a task with a goal: to be upright."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.observation_space = spaces.Dict(
            {
                "observation": self.env.observation_space,
                "desired_goal": spaces.Box(-1.0, 1.0, (2,), np.float64),
                "achieved_goal": spaces.Box(-1.0, 1.0, (2,), np.float64),
                "side": spaces.Discrete(2),
                "grid": spaces.Box(-8.0, 8.0, (2, 3), np.float32),
            }
        )

    def observation(self, observation: npt.NDArray[Any]) -> dict[str, Any]:
        return {
            "observation": observation,
            "desired_goal": np.array([1.0, 0.0]),
            "achieved_goal": observation[:2].astype(np.float64),
            "side": np.int64(observation[1] > 0),
            "grid": np.stack([observation, -observation]),
        }


class DrawnPendulum(gym.ObservationWrapper[Any, Any, Any]):
    """Pendulum seen as a picture of 40 x 48 pixels, with the velocity beside it on request."""

    def __init__(self, with_velocity: bool = False, shape: tuple[int, ...] = (40, 48, 3)) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.with_velocity = with_velocity
        image = spaces.Box(0, 255, shape, np.uint8)
        self.observation_space = (
            spaces.Dict({"image": image, "velocity": spaces.Box(-8.0, 8.0, (1,))}) if with_velocity else image
        )
        self.shape = shape

    def observation(self, observation: npt.NDArray[Any]) -> Any:
        rows, columns = np.mgrid[:40, :48]
        across, up = columns - 24.0, 20.0 - rows
        along = across * observation[1] + up * observation[0]
        aside = np.abs(across * observation[0] - up * observation[1])
        rod = (along > 0) & (along < 18) & (aside < 3)
        picture = np.where(rod, 0, 255)[..., None] + np.array([0, -40, 90])
        image = picture.clip(0, 255).astype(np.uint8).reshape(40, 48, 3)
        image = image if len(self.shape) == 3 else image[..., 0]
        return {"image": image, "velocity": observation[2:]} if self.with_velocity else image


def stack(rows: list[Any]) -> Any:
    """Observations of several steps, each key an array of its own type."""
    if isinstance(rows[0], dict):
        return {key: stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def stacked(episodes: list[list[Any]]) -> tuple[Any, Any]:
    """Observations and next observations of all steps."""
    return (
        stack([row for episode in episodes for row in episode[:-1]]),
        stack([row for episode in episodes for row in episode[1:]]),
    )


def record(env: gym.Env[Any, Any], dataset_id: str, data_format: str = "hdf5", jpeg: bool = True) -> list[list[Any]]:
    """Record random actions and write them with Minari; returns the observations of each episode as the environment's."""
    env.action_space.seed(0)
    episodes: list[list[Any]] = []
    buffers: list[EpisodeBuffer] = []
    for seed, length in enumerate(LENGTHS):
        actions = np.stack([env.action_space.sample() for _ in range(length)])
        first = env.reset(seed=seed)[0]
        steps = [env.step(action) for action in actions]
        episodes.append([first, *(step[0] for step in steps)])
        buffers.append(
            EpisodeBuffer(
                observations=stack(episodes[-1]),
                actions=actions,  # type: ignore[arg-type]
                rewards=[step[1] for step in steps],
                terminations=[step[2] for step in steps],
                truncations=[step[3] for step in steps],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author, a permalink, ...
        minari.create_dataset_from_buffers(dataset_id, buffers, env=env, data_format=data_format, jpeg_encoding=jpeg)
    return episodes


def assert_same(found: Observations, expected: Any) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert set(found) == set(expected)
        for key in expected:
            assert_same(found[key], expected[key])
        return
    assert not isinstance(found, dict)
    is_image = expected.dtype == np.uint8 and expected.ndim > 2
    assert found.dtype == (np.uint8 if is_image else np.float32)
    np.testing.assert_array_equal(found, expected.astype(found.dtype).reshape(found.shape))


def make_columns(observation_space: spaces.Space[Any], n_episodes: int = 4, length: int = 3) -> dict[str, Any]:
    """Columns with sampled observations; every episode terminates."""
    observation_space.seed(0)
    episodes = [[observation_space.sample() for _ in range(length + 1)] for _ in range(n_episodes)]
    observations, next_observations = stacked(episodes)
    n_steps = n_episodes * length
    return {
        "observations": observations,
        "actions": np.linspace(-2.0, 2.0, n_steps)[:, None],
        "rewards": np.arange(n_steps, dtype=np.float64),
        "next_observations": next_observations,
        "terminations": np.arange(n_steps) % length == length - 1,
    }


def without_space(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns for a dataset that does not know its space, and so not that numbers without a dimension are Discrete."""

    def as_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array[:, None] if array.ndim == 1 else array

    return columns | {name: map_observations(as_rows, columns[name]) for name in ("observations", "next_observations")}


MIXED = spaces.Dict(
    {
        "pose": spaces.Box(-1.0, 1.0, (2, 2), np.float64),
        "room": spaces.Discrete(3),
        "camera": spaces.Box(0, 255, (6, 5, 3), np.uint8),
        "buttons": spaces.Box(0, 7, (4,), np.uint8),
    }
)
PENDULUM_ACTIONS = spaces.Box(-2.0, 2.0, (1,), np.float32)


@pytest.mark.parametrize("data_format", FORMATS)
def test_goal_observations_come_back_row_by_row(data_format: str) -> None:
    env = GoalPendulum()
    observations, next_observations = stacked(record(env, "goal/pendulum-v0", data_format))
    check_spec("goal/pendulum-v0")
    dataset = load_dataset("goal/pendulum-v0")
    assert_same(dataset.observations, observations)
    assert_same(dataset.next_observations, next_observations)
    assert list(dataset.observations) == list(env.observation_space.spaces)
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    assert dataset.observation_space == env.observation_space
    assert "lossy_images" not in dataset.provenance
    check_compatible(dataset, env.observation_space, env.action_space)
    env.close()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("with_velocity", [False, True])
def test_images_that_were_stored_as_they_are(data_format: str, with_velocity: bool) -> None:
    env = DrawnPendulum(with_velocity)
    observations, next_observations = stacked(record(env, "drawn/pendulum-v0", data_format, jpeg=False))
    dataset = load_dataset("drawn/pendulum-v0")
    assert_same(dataset.observations, observations)
    assert_same(dataset.next_observations, next_observations)
    check_compatible(dataset, env.observation_space, env.action_space)
    assert "lossy" not in repr(dataset)
    env.close()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(40, 48, 3), (40, 48)])
def test_images_that_were_stored_as_jpeg(data_format: str, shape: tuple[int, ...]) -> None:
    env = DrawnPendulum(with_velocity=True, shape=shape)
    expected, _ = stacked(record(env, "drawn/pendulum-v0", data_format))
    with pytest.warns(UserWarning, match="stored as JPEG.*jpeg_encoding=False"):
        dataset = load_dataset("drawn/pendulum-v0")
    assert isinstance(dataset.observations, dict)
    images, velocities = dataset.observations["image"], dataset.observations["velocity"]
    assert images.dtype == np.uint8
    difference = np.abs(images.astype(np.int64) - expected["image"].astype(np.int64))
    assert 0 < difference.mean() < 15
    np.testing.assert_array_equal(velocities, expected["velocity"])
    # To the bit what Minari itself makes of the file
    begin = 0
    for episode in minari.load_dataset("drawn/pendulum-v0").iterate_episodes():
        rows = slice(begin, begin + len(episode.rewards))
        np.testing.assert_array_equal(images[rows], episode.observations["image"][:-1])
        np.testing.assert_array_equal(dataset.next_observations["image"][rows], episode.observations["image"][1:])  # type: ignore[call-overload]
        begin = rows.stop
    assert begin == len(dataset)
    assert dataset.provenance["lossy_images"] is True
    assert "lossy images" in repr(dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "lossy images" in repr(OfflineDataset.concatenate([dataset, dataset]))
    env.close()


def test_images_with_channels_first_are_no_jpeg() -> None:
    """Minari takes what is less than 32 pixels high for something else than a picture."""
    space = spaces.Box(0, 255, (3, 40, 48), np.uint8)
    env = gym.wrappers.TransformObservation(DrawnPendulum(), lambda image: np.moveaxis(image, -1, 0), space)
    observations, _ = stacked(record(env, "first/pendulum-v0"))
    assert_same(load_dataset("first/pendulum-v0").observations, observations)
    env.close()


def test_images_meet_the_environment_that_sb3_transposes() -> None:
    for with_velocity in (False, True):
        env = DrawnPendulum(with_velocity)
        dataset_id = f"drawn/velocity{with_velocity:d}-v0"
        record(env, dataset_id, jpeg=False)
        dataset = load_dataset(dataset_id)
        # The space that the learner sees
        policy = "MultiInputPolicy" if with_velocity else "CnnPolicy"
        learner = TD3(policy, env, buffer_size=1, device="cpu", policy_kwargs={"net_arch": [4]})
        seen = learner.observation_space
        check_compatible(dataset, seen, learner.action_space)
        fitted = fit_to_space(dataset, seen)
        assert fitted.observation_space == seen
        check_compatible(fitted, seen, learner.action_space)
        assert fit_to_space(fitted, seen) is fitted
        assert fit_to_space(dataset, env.observation_space) is dataset
        vec_env = VecTransposeImage(DummyVecEnv([lambda env=env: env]))
        for name in ("observations", "next_observations"):
            expected = vec_env.transpose_observations(getattr(dataset, name))
            assert_same(getattr(fitted, name), expected)
        assert fitted.rewards is dataset.rewards
        with pytest.raises(ValueError, match="read-only"):
            fitted.next_observations["image" if with_velocity else 0][...] = 0  # type: ignore[call-overload, index]
        vec_env.close()


def test_only_channels_that_moved_are_transposed() -> None:
    columns = make_columns(spaces.Box(0, 255, (6, 5, 3), np.uint8))
    dataset = OfflineDataset.from_columns(**columns, episode_starts=[0])
    for shape in ((6, 5, 3), (3, 5, 6), (5, 6, 3), (3, 6, 5, 1), (90,)):
        space = spaces.Box(0, 255, shape, np.uint8)
        assert (fit_to_space(dataset, space) is dataset) == (shape != (90,))
    floats = spaces.Box(0, 1, (3, 6, 5), np.float32)
    assert fit_to_space(dataset, floats) is dataset
    with pytest.raises(ValueError, match=r"expected observations of shape \(3, 6, 5\), found \(6, 5, 3\)"):
        check_compatible(dataset, floats, PENDULUM_ACTIONS)
    with pytest.raises(ValueError, match="expected observations of type float32, found uint8"):
        check_compatible(dataset, spaces.Box(0, 1, (6, 5, 3), np.float32), PENDULUM_ACTIONS)
    check_compatible(dataset, spaces.Box(0, 255, (3, 6, 5), np.uint8), PENDULUM_ACTIONS)


def test_data_for_an_environment_that_is_flattened() -> None:
    env = GoalPendulum()
    episodes = record(env, "goal/pendulum-v0")
    flat_env = FlattenObservation(env)
    dataset = load_dataset("goal/pendulum-v0")
    check_compatible(dataset, flat_env.observation_space, env.action_space)
    flat = fit_to_space(dataset, flat_env.observation_space)
    assert flat.observation_space == flat_env.observation_space
    rows = [flat_env.observation(row) for episode in episodes for row in episode[:-1]]
    assert_same(flat.observations, np.stack(rows))
    check_compatible(flat, flat_env.observation_space, env.action_space)
    assert fit_to_space(flat, flat_env.observation_space) is flat
    assert flat.actions is dataset.actions
    env.close()


boxes = st.builds(
    lambda shape, dtype: spaces.Box(0, 9, shape, dtype),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    st.sampled_from([np.float32, np.float64, np.uint8, np.int64]),
)
parts = st.one_of(boxes, st.integers(1, 4).map(spaces.Discrete))
observation_spaces = st.one_of(
    boxes.filter(lambda space: len(space.shape) > 1),
    st.dictionaries(st.text("abcz", min_size=1, max_size=3), parts, min_size=1, max_size=4).map(spaces.Dict),
)


@settings(max_examples=60, deadline=None)
@given(observation_spaces)
def test_flattened_rows_are_those_of_gymnasium(space: spaces.Space[Any]) -> None:
    columns = make_columns(space, n_episodes=2)
    dataset = OfflineDataset.from_columns(**columns, observation_space=space, episode_starts=[0])
    flat = fit_to_space(dataset, flatten_space(space))
    for name in ("observations", "next_observations"):
        rows = range(len(dataset))
        expected = np.stack([flatten(space, take_rows(columns[name], row)) for row in rows])
        np.testing.assert_array_equal(getattr(flat, name), expected.astype(np.float32))


def test_what_is_not_flattened() -> None:
    columns = make_columns(MIXED)
    size = flatten_space(MIXED).shape[0]
    unknown = OfflineDataset.from_columns(**without_space(columns), episode_starts=[0])
    flat_space = flatten_space(MIXED)
    assert fit_to_space(unknown, flat_space) is unknown
    with pytest.raises(
        ValueError, match=rf"one array of observations of shape \({size},\), found the keys .*FlattenObservation"
    ):
        check_compatible(unknown, flat_space, PENDULUM_ACTIONS)
    known = OfflineDataset.from_columns(**columns, episode_starts=[0], observation_space=MIXED)
    other = spaces.Box(flat_space.low - 1, flat_space.high, dtype=flat_space.dtype.type)
    with pytest.raises(ValueError, match="found the keys"):
        check_compatible(known, other, PENDULUM_ACTIONS)


def test_dict_data_that_does_not_fit() -> None:
    dataset = OfflineDataset.from_columns(**make_columns(MIXED), observation_space=MIXED, episode_starts=[0])
    check_compatible(dataset, MIXED, PENDULUM_ACTIONS)

    def differs(message: str, **changes: spaces.Space[Any] | None) -> None:
        changed = {key: space for key, space in ({**MIXED.spaces, **changes}).items() if space is not None}
        for data in (dataset, OfflineDataset.from_columns(**without_space(make_columns(MIXED)), episode_starts=[0])):
            with pytest.raises(ValueError, match=message):
                check_compatible(data, spaces.Dict(changed), PENDULUM_ACTIONS)
            if "low" in message or "Discrete" in message:
                break  # Data that does not know its space

    differs(r"the keys buttons, camera, pose, found .* \(not in the environment: room\)", room=None)
    differs(r"found .* \(missing: goal\)", goal=PENDULUM_ACTIONS)
    differs(r"expected observation 'pose' of shape \(2, 3\), found \(2, 2\)", pose=spaces.Box(-1, 1, (2, 3)))
    differs("the observation 'pose' space's low differs in 4 of 4", pose=spaces.Box(-2, 1, (2, 2)))
    differs("expected observation 'camera' of type float32, found uint8", camera=spaces.Box(0, 255, (6, 5, 3)))
    differs(r"expected observation 'room' of the space Discrete\(4\), found Discrete\(3\)", room=spaces.Discrete(4))


def test_npz_and_minari_hold_the_same_data(tmp_path: Path) -> None:
    env = GoalPendulum()
    record(env, "goal/pendulum-v0")
    dataset = load_dataset("goal/pendulum-v0")
    for order in (1, -1):
        arrays: dict[str, Any] = {}
        for name in ("observations", "next_observations"):
            arrays |= {f"{name}/{key}": getattr(dataset, name)[key] for key in list(dataset.observations)[::order]}
        names = ("actions", "rewards", "terminations", "truncations")
        arrays |= {name: getattr(dataset, name) for name in names}
        np.savez(tmp_path / "goal.npz", **arrays)
        check_spec(tmp_path / "goal.npz")
        again = load_dataset(tmp_path / "goal.npz")
        assert again.fingerprint == dataset.fingerprint
        assert_same(again.observations, dataset.observations)
        check_compatible(again, env.observation_space, env.action_space)
    del arrays["next_observations/side"]
    np.savez(tmp_path / "goal.npz", **arrays)
    with pytest.raises(ValueError, match="next_observations must have the same keys as observations"):
        load_dataset(tmp_path / "goal.npz")
    np.savez(tmp_path / "goal.npz", **{name: array for name, array in arrays.items() if not name.startswith("next_")})
    with pytest.warns(UserWarning, match="has no next_observations.* 3 last rows"):
        shorter = load_dataset(tmp_path / "goal.npz")
    assert len(shorter) == sum(length - 1 for length in LENGTHS)
    assert isinstance(shorter.next_observations, dict) and isinstance(dataset.observations, dict)
    np.testing.assert_array_equal(shorter.next_observations["grid"][:6], dataset.observations["grid"][1:7])
    np.savez(tmp_path / "goal.npz", **arrays, observations=np.zeros((12, 2)))
    with pytest.raises(ValueError, match="has both observations and observations/"):
        check_spec(tmp_path / "goal.npz")
    env.close()


def test_images_in_npz_stay_images(tmp_path: Path) -> None:
    columns = make_columns(spaces.Box(0, 255, (3, 6, 5), np.uint8))
    np.savez(tmp_path / "images.npz", **columns, truncations=np.zeros(12, bool))
    dataset = load_dataset(tmp_path / "images.npz")
    assert_same(dataset.observations, columns["observations"])
    assert dataset.nbytes < 12 * 2 * 3 * 6 * 5 + 12 * 40


def test_fingerprint_depends_on_every_key() -> None:
    columns = without_space(make_columns(MIXED))
    dataset = OfflineDataset.from_columns(**columns, episode_starts=[0])
    shuffled = {key: columns["observations"][key] for key in reversed(list(columns["observations"]))}
    same = OfflineDataset.from_columns(**(columns | {"observations": shuffled}), episode_starts=[0])
    assert same.fingerprint == dataset.fingerprint
    for key, array in columns["observations"].items():
        changed = np.array(array)
        changed.flat[-1] = changed.flat[-1] == 0
        other = columns | {"observations": columns["observations"] | {key: changed}}
        assert OfflineDataset.from_columns(**other, episode_starts=[0]).fingerprint != dataset.fingerprint, key
    renamed = {("view" if key == "camera" else key): array for key, array in columns["observations"].items()}
    renamed_next = {("view" if key == "camera" else key): array for key, array in columns["next_observations"].items()}
    other = columns | {"observations": renamed, "next_observations": renamed_next}
    assert OfflineDataset.from_columns(**other, episode_starts=[0]).fingerprint != dataset.fingerprint


def test_dict_datasets_are_read_only_and_describe_themselves() -> None:
    columns = make_columns(MIXED)
    dataset = OfflineDataset.from_columns(**columns, observation_space=MIXED, episode_starts=[0])
    columns["observations"]["room"][:] = 0
    assert len(dataset) == n_rows(dataset.observations) == 12
    assert isinstance(dataset.observations, dict)
    assert dataset.observations["room"].shape == (12, 1)
    assert dataset.observations["room"].max() > 0
    assert dataset.observations["buttons"].dtype == np.float32
    size = 12 * (4 * 4 + 4 + 6 * 5 * 3 + 4 * 4)
    assert nbytes(dataset.observations) == size
    assert dataset.nbytes == 2 * size + 12 * (4 + 4 + 1 + 1) + dataset.episode_starts.nbytes
    assert "{buttons: (4,), camera: (6, 5, 3) uint8, pose: (2, 2), room: (1,)}" in repr(dataset)
    dataset.monte_carlo_returns(0.9)
    for copied in (dataset, pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert copied.fingerprint == dataset.fingerprint
        for key in MIXED.spaces:
            with pytest.raises(ValueError, match="read-only"):
                copied.observations[key][0] = 0
            with pytest.raises(ValueError, match="read-only"):
                copied.next_observations[key][0] = 0
    doubled = map_observations(lambda array: array * 2, dataset.observations)
    np.testing.assert_array_equal(doubled["pose"], 2 * dataset.observations["pose"])


def test_episodes_of_dict_data() -> None:
    dataset = OfflineDataset.from_columns(**make_columns(MIXED), observation_space=MIXED, episode_starts=[0])
    some = dataset.select_episodes([3, 1])
    rows = [3, 4, 5, 9, 10, 11]
    assert_same(some.observations, take_rows(dataset.observations, rows))
    assert_same(some.next_observations, take_rows(dataset.next_observations, rows))
    both = OfflineDataset.concatenate([some, dataset])
    assert_same(take_rows(both.observations, slice(0, 6)), some.observations)
    assert_same(take_rows(both.next_observations, slice(6, 18)), dataset.next_observations)
    without = MIXED.spaces.copy()
    del without["room"]
    fewer = OfflineDataset.from_columns(**make_columns(spaces.Dict(without)), name="fewer", episode_starts=[0])
    with pytest.raises(ValueError, match=r"'arrays' and 'fewer' cannot be put together: .*observations\['room'\]"):
        OfflineDataset.concatenate([dataset, fewer])


@pytest.mark.parametrize("data_format", FORMATS)
def test_damaged_images(data_format: str, minari_root: Path) -> None:
    import h5py

    env = DrawnPendulum()
    record(env, "drawn/pendulum-v0", data_format)
    env.close()
    data = minari_root / "drawn" / "pendulum-v0" / "data"
    if data_format == "hdf5":
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            frames = file["episode_0/observations"][()]
            frames[2] = np.zeros_like(frames[2])
            file["episode_0/observations"][:] = frames
    else:
        (part,) = (data / "0").glob(f"*.{data_format}")
        content = part.read_bytes()
        part.write_bytes(content.replace(b"\xff\xd8\xff", b"\0\0\0"))
    with pytest.raises(ValueError, match=r"damaged or incomplete.*cannot identify image"):
        load_dataset("drawn/pendulum-v0")
