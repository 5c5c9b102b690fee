"""Actions that were recorded before an environment clipped them."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import ClipAction
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import save_to_pkl

from sb3_offline_ft import TD3BC, load_dataset
from sb3_offline_ft.datasets import OfflineDataset, check_compatible, check_spec
from sb3_offline_ft.datasets.tools.convert import convert_logs
from sb3_offline_ft.datasets.tools.show import describe_dataset, provenance_rows
from tests.keyed_environments import record

pytestmark = pytest.mark.usefixtures("minari_root")

TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
OBSERVATIONS = spaces.Box(-1, 1, (2,))
UNIT = spaces.Box(-1, 1, (1,))
N = 40


class Still(gym.Env[Any, Any]):
    observation_space, action_space = OBSERVATIONS, UNIT

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.n = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        return np.zeros(2, np.float32), 0.0, self.n == 10, False, {}


def columns(actions: Any = None) -> dict[str, Any]:
    drawn = np.random.default_rng(0).normal(0, 0.8, (N, 1)).astype(np.float32)
    return {
        "observations": np.zeros((N, 2), np.float32),
        "actions": drawn if actions is None else actions,
        "rewards": np.zeros(N),
        "next_observations": np.zeros((N, 2), np.float32),
        "terminations": np.arange(N) % 10 == 9,
    }


N_BEYOND = int((np.abs(columns()["actions"]) > 1).sum())


def sources(folder: Path) -> dict[str, Any]:
    """The same actions, of which some are out of bounds, in every kind of data."""
    good = columns()
    np.savez(folder / "plain.npz", **good)
    np.savez(folder / "bounded.npz", **good, action_low=[-1.0], action_high=[1.0])
    with h5py.File(folder / "flat.hdf5", "w") as file:
        for name, array in good.items():
            file[name] = array
    buffer = ReplayBuffer(N, OBSERVATIONS, UNIT, "cpu")
    for action, done in zip(good["actions"], good["terminations"], strict=True):
        buffer.add(np.zeros((1, 2)), np.zeros((1, 2)), action[None], np.zeros(1), np.array([done]), [{}])
    save_to_pkl(folder / "buffer.pkl", buffer)
    return {
        "plain": folder / "plain.npz",
        "bounded": f"{folder / 'bounded.npz'}",
        "hdf5": folder / "flat.hdf5",
        "pickle": f"{folder / 'buffer.pkl'}",
        "object": OfflineDataset.from_columns(**good),
        "object with bounds": OfflineDataset.from_columns(**good, action_space=UNIT),
    }


@pytest.mark.parametrize("kind", ["plain", "bounded", "hdf5", "pickle", "object", "object with bounds"])
def test_clipping(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources(tmp_path)[kind]
    trust = {"trust_pickle": True} if kind == "pickle" else {}
    with pytest.raises(ValueError, match=rf"{N_BEYOND} of {N} rows .*\?clip_actions=1.*clip_actions=True"):
        TD3BC("MlpPolicy", Still(), dataset=load_dataset(source, **trust), **TINY).load_offline_data()
    dataset = load_dataset(source, clip_actions=True, **trust)
    model = TD3BC("MlpPolicy", Still(), dataset=dataset, verbose=1, **TINY).pretrain(2)
    assert f"Actions clipped to their bounds: in {N_BEYOND} of {N} transitions" in capsys.readouterr().out
    data = model.offline_dataset
    assert data is not None
    np.testing.assert_array_equal(data.actions, np.clip(columns()["actions"], -1, 1))
    found = data.provenance["actions_clipped"]
    assert (found["rows"], found["of_rows"], found["numbers"]) == (N_BEYOND, N, N_BEYOND)
    assert found["furthest"] == pytest.approx((np.abs(columns()["actions"]).max() - 1) / 2, abs=1e-5)
    if "bound" in kind or kind == "pickle":
        # Known without an environment
        assert describe_dataset(dataset).provenance["actions_clipped"] == found
        assert ("actions clipped", f"rows={N_BEYOND}, of_rows={N}") in [
            (name, text[: text.index(", numbers")]) for name, text in provenance_rows(dataset.provenance) if "clipped" in name
        ]
    if not isinstance(source, OfflineDataset):
        assert dataset.spec is not None and "?clip_actions=1" in dataset.spec
        again = load_dataset(dataset.spec, **trust)
        assert again.fingerprint == dataset.fingerprint


def test_one_part_of_a_list(tmp_path: Path) -> None:
    kinds = sources(tmp_path)
    np.savez(tmp_path / "good.npz", **columns(np.full((N, 1), 0.5, np.float32)))
    spec = f"0.7*{kinds['plain']}?clip_actions=1&episodes=3 + 0.3*{tmp_path / 'good.npz'}"
    check_spec(spec)
    model = TD3BC("MlpPolicy", Still(), dataset=spec, **TINY).pretrain(2)
    assert model.offline_dataset is not None
    actions = columns()["actions"][:30]
    np.testing.assert_array_equal(model.offline_dataset.actions[:30], np.clip(actions, -1, 1))
    assert model.offline_dataset.provenance["actions_clipped"]["rows"] == (np.abs(actions) > 1).sum()
    assert model.offline_dataset.provenance["actions_clipped"]["of_rows"] == 30
    assert [part.clip_actions for part in model.offline_dataset.sources] == [True, False]
    assert model.dataset == f"0.7*{kinds['plain']}?clip_actions=1&episodes=3 + 0.3*{tmp_path / 'good.npz'}"
    model.save(tmp_path / "model")
    assert TD3BC.load(tmp_path / "model", env=Still()).pretrain(1).dataset_fingerprint == model.dataset_fingerprint
    # The other part is not clipped
    with pytest.raises(ValueError, match=rf"{N_BEYOND} of {2 * N} rows have actions beyond"):
        TD3BC(
            "MlpPolicy", Still(), dataset=[f"{tmp_path / 'good.npz'}?clip_actions=1", kinds["plain"]], **TINY
        ).load_offline_data()


def test_data_recorded_behind_clip_action() -> None:
    """ClipAction takes any action, so that its space has no bounds."""
    env = ClipAction(Still())
    env.action_space.seed(0)
    record(env, "clip/behind-v0")
    dataset = load_dataset("clip/behind-v0")
    assert dataset.action_space is not None and not dataset.action_space.is_bounded() and np.abs(dataset.actions).max() > 1
    with pytest.raises(ValueError, match=r"expected -1, found -inf.*\?clip_actions=1"):
        check_compatible(dataset, OBSERVATIONS, UNIT)
    model = TD3BC("MlpPolicy", Still(), dataset="clip/behind-v0?clip_actions=1", **TINY).pretrain(1)
    assert model.offline_dataset is not None and np.abs(model.offline_dataset.actions).max() == 1.0
    both = load_dataset([("clip/behind-v0?clip_actions=1", 0.5), (OfflineDataset.from_columns(**columns(), action_space=UNIT,
        name="other"), 0.5)], clip_actions=1)  # fmt: skip
    check_compatible(both, OBSERVATIONS, UNIT)


def test_other_bounds_are_not_clipped() -> None:
    """Clipping is for actions in the units of the environment."""
    wide = OfflineDataset.from_columns(**columns(), action_space=spaces.Box(-9, 9, (1,)))
    with pytest.raises(ValueError, match=r"low differs in 1 of 1 dimensions.*expected -1, found -9"):
        TD3BC("MlpPolicy", Still(), dataset=load_dataset(wide, clip_actions=True), **TINY).load_offline_data()


@pytest.mark.parametrize(
    ("actions", "first"),
    [
        (np.random.default_rng(1).normal(0, 0.8, (N, 1)), "a stochastic policy's actions before clipping"),
        (np.random.default_rng(1).normal(0.7, 0.5, (N, 1)), "a stochastic policy's actions before clipping"),
        (np.clip(np.random.default_rng(1).normal(0, 2, (N, 1)), -2, 2), "actions in another unit or scale"),
        (np.random.default_rng(1).uniform(-90, 90, (N, 1)), "actions in another unit or scale"),
        (np.tile([[-2.0], [-1.0], [0.0], [1.0], [2.0]], (N // 5, 1)), "actions in another unit or scale"),
    ],
)
def test_the_message_tells_the_likelier_cause_first(actions: np.ndarray[Any, Any], first: str) -> None:
    dataset = OfflineDataset.from_columns(**columns(actions.astype(np.float32)))
    with pytest.raises(ValueError) as raised:
        check_compatible(dataset, OBSERVATIONS, UNIT)
    assert f"These look like {first}" in str(raised.value)
    assert "?clip_actions=1" in str(raised.value) and "RescaleAction" in str(raised.value)


def test_converting_clips(tmp_path: Path) -> None:
    sources(tmp_path)
    gym.register("ClipStill-v0", f"{__name__}:Still")
    convert_logs([f"{tmp_path / 'plain.npz'}?clip_actions=1"], "clip/converted-v0", env="ClipStill-v0")
    np.testing.assert_array_equal(load_dataset("clip/converted-v0").actions, np.clip(columns()["actions"], -1, 1))
    rows = [f"{index // 10},{value},0.0" for index, value in enumerate(columns()["actions"][:, 0])]
    (tmp_path / "log.csv").write_text("\n".join(["episode,action,obs", *rows]))
    bounds: dict[str, Any] = {"action_low": -1, "action_high": 1}
    for reward in (lambda o, a, n: np.zeros(len(a)), lambda o, a, n: a[:, 0]):
        made = convert_logs(
            [tmp_path / "log.csv"], "clip/table-v0", clip_actions=True, reward_function=reward, overwrite=True, **bounds
        )
        assert any("transitions were clipped" in note for note in made.notes)
        assert np.abs(load_dataset("clip/table-v0").actions).max() == 1.0
        kept = [f"{tmp_path / 'plain.npz'}?clip_actions=1"]
        convert_logs(kept, "clip/rewarded-v0", reward_function=reward, overwrite=True, **bounds)
        np.testing.assert_array_equal(load_dataset("clip/rewarded-v0").actions, np.clip(columns()["actions"], -1, 1))
    with pytest.raises(ValueError, match="clip_actions"):
        convert_logs([tmp_path / "log.csv"], "clip/table-v1", reward_function=lambda o, a, n: np.zeros(len(a)), **bounds)


@pytest.mark.parametrize(("value", "means"), [("1", True), ("true", True), (True, True), (0, False), ("no", False)])
def test_values_of_the_option(value: Any, means: bool) -> None:
    data = OfflineDataset.from_columns(**columns())
    assert load_dataset(data, clip_actions=value).sources[0].clip_actions is means
    assert load_dataset({"spec": data, "clip_actions": value}, clip_actions=means).sources[0].clip_actions is means
    with pytest.raises(ValueError, match="clip_actions must be 1 or 0, found 'maybe'"):
        load_dataset(data, clip_actions="maybe")
    with pytest.raises(ValueError, match="clip_actions is 1 in the spec and False as a keyword"):
        load_dataset("bundled:pendulum-medium?clip_actions=1", clip_actions=False)


def test_nothing_to_clip() -> None:
    plain, clipped = load_dataset("bundled:pendulum-medium"), load_dataset("bundled:pendulum-medium?clip_actions=1")
    assert clipped.fingerprint == plain.fingerprint
    assert clipped.provenance["actions_clipped"]["rows"] == 0
