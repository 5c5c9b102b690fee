"""The policies: what they normalize, what their critics are, and that they travel through files."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.td3 import policies as td3_policies
from torch import nn

from sb3_offline_ft import OfflineDataset, OfflineTD3
from sb3_offline_ft.common.type_aliases import OfflineToOnlineReplayBufferSamples
from sb3_offline_ft.policies.policies import (
    CnnPolicy,
    LayerNormContinuousCritic,
    MlpPolicy,
    MultiInputPolicy,
    NormalizedCombinedExtractor,
    NormalizedFlattenExtractor,
    OfflinePolicy,
)
from sb3_offline_ft.update.kernel import batches_of
from tests.hooks import n_updates

ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
VECTOR = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
CHANNEL_FIRST = spaces.Box(0, 255, (1, 36, 36), np.uint8)
KEYS = {
    "camera": CHANNEL_FIRST,
    "gear": spaces.Discrete(4),
    "matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
    "speed": spaces.Box(-1, 1, (1,), np.float32),
}
DICT = spaces.Dict(KEYS)
POLICIES = {
    "MlpPolicy": (MlpPolicy, VECTOR),
    "CnnPolicy": (CnnPolicy, CHANNEL_FIRST),
    "MultiInputPolicy": (MultiInputPolicy, DICT),
}
SMALL: dict[str, dict[str, Any]] = {
    "MlpPolicy": {"net_arch": [8]},
    "CnnPolicy": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}},
    "MultiInputPolicy": {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
}


def make(name: str, **settings: Any) -> OfflinePolicy:
    kind, space = POLICIES[name]
    return kind(space, ACTIONS, lambda _: 1e-3, **(SMALL[name] | settings))


def rows(n_rows: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Observations of the ``Dict`` space whose statistics differ from number to number."""
    return {
        "camera": generator.integers(256, size=(n_rows, 1, 36, 36), dtype=np.uint8),
        "gear": generator.integers(4, size=(n_rows, 1)),
        "matrix": generator.normal([[5, -3, 0], [1, 2, 900]], [[1, 2, 3], [0.1, 7, 50]], (n_rows, 2, 3)).astype(np.float32),
        "speed": generator.uniform(-1, 0.5, (n_rows, 1)).astype(np.float32),
    }


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("layer_norm", [None, True, False])
def test_critics_have_layer_norm_unless_it_is_switched_off(name: str, layer_norm: bool | None) -> None:
    policy = make(name) if layer_norm is None else make(name, layer_norm=layer_norm)
    wanted = layer_norm is not False
    for critic in (policy.critic, policy.critic_target):
        assert isinstance(critic, LayerNormContinuousCritic) == wanted
        for network in critic.q_networks:
            assert sum(isinstance(module, nn.LayerNorm) for module in network) == wanted
    assert not any(isinstance(module, nn.LayerNorm) for module in policy.actor.modules())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_options_travel_with_the_policys_file(name: str, tmp_path: Path) -> None:
    """SB3's ``policy.save`` and ``load``, and copies made from the constructor's parameters."""
    settings = {"layer_norm": False, "n_critics": 3, "target_critics": 2, "actor_value": "mean"}
    policy = make(name, **settings)
    policy.save(str(tmp_path / "policy"))
    loaded = type(policy).load(str(tmp_path / "policy"), device="cpu")
    for option in ("layer_norm", "target_critics", "actor_value"):
        assert getattr(loaded, option) == settings[option]
    assert loaded.features_extractor_class is policy.features_extractor_class
    assert len(loaded.critic.q_networks) == 3
    for key, value in policy.state_dict().items():
        assert th.equal(value, loaded.state_dict()[key])


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_networks_begin_with_sb3s_weights(name: str) -> None:
    """Neither the normalizer nor ``LayerNorm`` takes anything from the stream of random numbers."""
    theirs = {"MlpPolicy": td3_policies.MlpPolicy, "CnnPolicy": td3_policies.CnnPolicy}.get(
        name, td3_policies.MultiInputPolicy
    )
    kind, space = POLICIES[name]
    policies = []
    for each in (kind, theirs):
        th.manual_seed(0)
        policies.append(each(space, ACTIONS, lambda _: 1e-3, **SMALL[name]))
    weights = [[v for n, v in policy.named_parameters() if v.dim() > 1] for policy in policies]
    assert len(weights[0]) == len(weights[1])
    for ours, expected in zip(*weights, strict=True):
        assert th.equal(ours, expected)


def test_default_features_extractors() -> None:
    found = {name: type(make(name).actor.features_extractor) for name in POLICIES}
    assert found == {
        "MlpPolicy": NormalizedFlattenExtractor,
        "CnnPolicy": NatureCNN,
        "MultiInputPolicy": NormalizedCombinedExtractor,
    }
    assert (
        type(make("MultiInputPolicy", features_extractor_class=CombinedExtractor).actor.features_extractor)
        is CombinedExtractor
    )


# Normalizers


def test_each_vector_of_a_dict_is_normalized_by_its_own_statistics() -> None:
    policy = make("MultiInputPolicy")
    observations = rows(500, np.random.default_rng(0))
    assert not policy.has_fitted_normalizer
    assert policy.fit_normalizers(observations)
    assert policy.has_fitted_normalizer
    # Four networks with two vectors each
    assert len(policy.normalizers()) == 8
    tensors, _ = policy.obs_to_tensor(observations)
    for network in (policy.actor, policy.actor_target, policy.critic, policy.critic_target):
        features = network.extract_features(tensors, network.features_extractor).detach().numpy()
        extractor = network.features_extractor
        plain = CombinedExtractor(DICT, cnn_output_dim=8)
        plain.extractors["camera"].load_state_dict(extractor.extractors["camera"].state_dict())
        expected = network.extract_features(tensors, plain).detach().numpy()
        position = 0
        for key in DICT.spaces:
            size = {"camera": 8, "gear": 4, "matrix": 6, "speed": 1}[key]
            part, raw = features[:, position : position + size], expected[:, position : position + size]
            if key in ("matrix", "speed"):
                column = observations[key].reshape(500, -1).astype(np.float64)
                raw = (column - column.mean(0)) / (column.std(0) + 1e-3)
            np.testing.assert_allclose(part, raw, atol=1e-4)
            position += size
        assert position == features.shape[1]


def test_unfitted_normalizers_of_a_dict_change_nothing_to_the_bit() -> None:
    observations = rows(20, np.random.default_rng(0))
    policy = make("MultiInputPolicy")
    extractor = policy.actor.features_extractor
    plain = CombinedExtractor(DICT, cnn_output_dim=8)
    plain.extractors["camera"].load_state_dict(extractor.extractors["camera"].state_dict())
    tensors, _ = policy.obs_to_tensor(observations)
    assert th.equal(policy.actor.extract_features(tensors, extractor), policy.actor.extract_features(tensors, plain))


def test_statistics_are_those_of_double_precision_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large means beside small deviations, which float32 sums would lose."""
    generator = np.random.default_rng(0)
    observations = (1e4 + generator.normal(scale=[0.1, 1, 10, 1, 1], size=(3001, 5))).astype(np.float32)
    expected = observations.astype(np.float64)
    for at_once in (7, 10**6):
        monkeypatch.setattr("sb3_offline_ft.common.observations.NUMBERS_AT_ONCE", at_once)
        policy = make("MlpPolicy")
        assert policy.fit_normalizers(observations)
        for normalizer in policy.normalizers():
            np.testing.assert_allclose(normalizer.observation_mean, expected.mean(0), rtol=1e-7)
            np.testing.assert_allclose(normalizer.observation_std, expected.std(0) + 1e-3, rtol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), [
    ("CnnPolicy", {}),
    ("MlpPolicy", {"features_extractor_class": FlattenExtractor}),
    ("MultiInputPolicy", {"features_extractor_class": CombinedExtractor, "features_extractor_kwargs": {}}),
])  # fmt: skip
def test_without_normalizers_nothing_is_fitted(name: str, kwargs: dict[str, Any]) -> None:
    policy = make(name, **kwargs)
    generator = np.random.default_rng(0)
    observations = {"MlpPolicy": generator.normal(size=(9, 5)), "CnnPolicy": rows(9, generator)["camera"]}.get(
        name, rows(9, generator)
    )
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    assert not policy.fit_normalizers(observations) and not policy.has_fitted_normalizer
    assert all(th.equal(value, before[key]) for key, value in policy.state_dict().items())


def test_images_in_an_mlp_are_divided_by_255_alone() -> None:
    """Their statistics are those of numbers up to 255, which the networks do not get."""
    policy = MlpPolicy(IMAGE, ACTIONS, lambda _: 1e-3, net_arch=[8])
    images = np.random.default_rng(0).integers(256, size=(5, 36, 36, 1), dtype=np.uint8)
    assert not policy.fit_normalizers(images)
    features = policy.actor.extract_features(policy.obs_to_tensor(images)[0], policy.actor.features_extractor)
    np.testing.assert_allclose(features.numpy(), images.reshape(5, -1) / 255, atol=1e-6)


def test_a_shared_features_extractor_is_fitted_once() -> None:
    policy = make("MultiInputPolicy", share_features_extractor=True)
    assert policy.fit_normalizers(rows(50, np.random.default_rng(0)))
    assert len(policy.normalizers()) == 4 and all(normalizer.is_fitted for normalizer in policy.normalizers())


# Life cycle


class Machine(gym.Env[Any, np.ndarray]):
    """Observations of all kinds."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = space, ACTIONS

    def _observation(self) -> Any:
        observations = {key: values[0] for key, values in rows(1, self.np_random).items()}
        observations["gear"] = int(observations["gear"][0])
        observations["matrix"] = observations["matrix"].astype(np.float64)
        return observations if isinstance(self.observation_space, spaces.Dict) else observations["camera"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observation(), float(action.sum()), bool(self.np_random.random() < 0.05), self.steps == 20, {}


@pytest.mark.parametrize(("name", "space"), [("CnnPolicy", CHANNEL_FIRST), ("MultiInputPolicy", DICT)])
def test_updates_on_images_and_dicts_are_sb3s_to_the_bit(name: str, space: spaces.Space[Any]) -> None:
    """The autograd kernel, with SB3's critics and an extractor that has not been fitted."""
    common: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "buffer_size": 60, "seed": 0, "device": "cpu"}
    theirs = TD3(name, Machine(space), policy_kwargs=SMALL[name], learning_rate=3e-4, **common).learn(22)
    ours = OfflineTD3(name, Machine(space), policy_kwargs=SMALL[name] | {"layer_norm": False}, **common)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        ours.learn(22)
    assert ours.updater.kernel.name == "autograd" and n_updates(ours) == n_updates(theirs) > 0
    for key, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(key)), key


def machine_dataset(space: spaces.Space[Any], n_rows: int = 40) -> OfflineDataset:
    generator = np.random.default_rng(0)
    now, then = rows(n_rows, generator), rows(n_rows, generator)
    terminations = generator.random(n_rows) < 0.1
    return OfflineDataset.from_columns(
        observations=now if isinstance(space, spaces.Dict) else now["camera"],
        actions=generator.uniform(-1, 1, (n_rows, 2)).astype(np.float32),
        rewards=generator.normal(size=n_rows).astype(np.float32),
        next_observations=then if isinstance(space, spaces.Dict) else then["camera"],
        terminations=terminations,
        truncations=np.zeros(n_rows, dtype=bool),
        episode_starts=[0],
        observation_space=space,
        action_space=ACTIONS,
    )


@pytest.mark.parametrize(("name", "space"), [("CnnPolicy", CHANNEL_FIRST), ("MultiInputPolicy", DICT)])
def test_pretraining_on_images_and_dicts_with_an_ensemble(name: str, space: spaces.Space[Any], tmp_path: Path) -> None:
    """No warning; vectors are normalized by the data; a file goes on to the bit."""
    kwargs = SMALL[name] | {"n_critics": 3, "target_critics": 2, "actor_value": "mean"}
    common: dict[str, Any] = {"batch_size": 8, "buffer_size": 60, "seed": 0, "device": "cpu", "policy_kwargs": kwargs}
    dataset = machine_dataset(space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = OfflineTD3(name, Machine(space), dataset=dataset, **common).pretrain(7)
        part = OfflineTD3(name, Machine(space), dataset=dataset, **common).pretrain(3)
    assert whole.policy.has_fitted_normalizer == (name == "MultiInputPolicy")
    part.save(tmp_path / "model")
    resumed = OfflineTD3.load(tmp_path / "model", env=Machine(space), dataset=dataset, device="cpu").pretrain(4)
    for key, value in whole.policy.state_dict().items():
        assert th.equal(value, resumed.policy.state_dict()[key]), key


def test_a_vector_that_cannot_be_normalized_is_said() -> None:
    kwargs = SMALL["MultiInputPolicy"] | {"features_extractor_class": CombinedExtractor}
    model = OfflineTD3("MultiInputPolicy", Machine(DICT), dataset=machine_dataset(DICT), batch_size=4, buffer_size=50,
                       policy_kwargs=kwargs, device="cpu")  # fmt: skip
    with pytest.warns(UserWarning, match="MultiInputPolicy with CombinedExtractor has no observation normalizer"):
        model.pretrain(1)


def test_batches_of_dicts_with_missing_columns() -> None:
    observations = {"a": th.arange(12.0).reshape(6, 2), "b": th.arange(6)}
    columns = OfflineToOnlineReplayBufferSamples(
        observations=observations,  # type: ignore[arg-type]
        actions=th.arange(6.0)[:, None],
        next_observations={key: values + 100 for key, values in observations.items()},  # type: ignore[arg-type]
        dones=th.zeros(6, 1),
        rewards=th.ones(6, 1),
        discounts=None,
        is_offline=th.ones(6, 1),
    )
    batches = list(batches_of(columns, 2))
    assert len(batches) == 3
    for index, batch in enumerate(batches):
        part = slice(2 * index, 2 * index + 2)
        assert th.equal(batch.observations["a"], observations["a"][part])  # type: ignore[call-overload,index]
        assert th.equal(batch.next_observations["b"], observations["b"][part] + 100)  # type: ignore[call-overload,index]
        assert th.equal(batch.actions, columns.actions[part]) and batch.discounts is None
    assert next(batches_of(columns, 6)) is columns


def test_sb3s_buffer_of_dicts_is_cut_into_batches() -> None:
    buffer = DictReplayBuffer(10, DICT, ACTIONS, "cpu")
    first, second = rows(1, np.random.default_rng(0)), rows(1, np.random.default_rng(1))
    for _ in range(5):
        buffer.add(first, second, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    batches = list(batches_of(buffer.sample(4), 2))  # type: ignore[arg-type]
    assert [len(batch.observations["matrix"]) for batch in batches] == [2, 2]  # type: ignore[call-overload]
