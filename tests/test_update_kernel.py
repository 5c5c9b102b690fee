"""The update kernels: the fast one does what autograd does, on the same parameters and the same optimizers."""

import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from sb3_offline_ft import TD3BC, TD3C, OfflineDataset, OfflineTD3, ReBRAC
from sb3_offline_ft.update import ActorObjective, AutogradKernel, FastKernel, UpdateKernel
from sb3_offline_ft.update.products import choose_products
from tests.hooks import n_updates
from tests.kernels import (
    DEVICES,
    SMALL,
    TOLERANCE,
    assert_agree,
    assert_identical,
    count_steps,
    difference,
    is_fast,
    make,
    norm,
    relative_distance,
    state_of,
)

KERNELS = {"fast": FastKernel, "autograd": AutogradKernel}


def kernel_for(model: OfflineTD3, name: str) -> UpdateKernel:
    """A kernel of the test's own, ready for the next gradient step, for a learner whose data is loaded."""
    model.load_offline_data()
    kernel = KERNELS[name](model.policy)
    if isinstance(kernel, FastKernel):
        kernel.prepare()
    return kernel


# Agreement


@pytest.fixture
def one_library() -> Iterator[None]:
    """
    Let autograd multiply by the library that the fast kernel chooses on this CPU.

    Two libraries round differently. Of the 50 million inputs of ReLUs in 60 steps a few are then 0 for one kernel and 1e-8 for
    the other. If it is a unit's only active row, Adam makes a step of full length of its tiny gradient.
    """
    if not choose_products("float32", th.device("cpu")).name.startswith("oneDNN"):
        yield
        return
    matmul: Any = th.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("one_library")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("layer_norm", "n_seeds"), [(True, 8), (False, 2)], ids=["LayerNorm", "plain"])
def test_offline_the_kernels_agree(device: str, layer_norm: bool, n_seeds: int) -> None:
    """Standard networks and batches, 60 gradient steps of TD3BC: the median over seeds differs by no more than rounding."""
    distances = []
    for seed in range(n_seeds):
        common = {"seed": seed, "device": device, "batch_size": 256, "learning_rate": 3e-4}
        common |= {"policy_kwargs": {"net_arch": [256, 256], "layer_norm": layer_norm}}
        fast, autograd = (make(kernel=kernel, **common) for kernel in ("fast", "autograd"))
        start = state_of(fast).weights
        fast.pretrain(60)
        autograd.pretrain(60)
        assert is_fast(fast) and not is_fast(autograd)
        distances.append(relative_distance(state_of(fast).weights, state_of(autograd).weights, start))
    assert statistics.median(distances) <= (2e-5 if device == "cpu" else TOLERANCE)


@pytest.mark.usefixtures("one_library")
@pytest.mark.parametrize("device", DEVICES)
def test_online_the_kernels_agree_under_an_active_constraint(device: str) -> None:
    """TD3C from the same pretrained policy on the same transitions; its multiplier and what is logged agree too."""
    distances = []
    names = ["actor_loss", "critic_loss", "mean_abs_q", "policy_distance", "constraint_violation", "multiplier", "epsilon"]
    for seed in range(3):  # a median of two is their mean
        models = []
        for kernel in ("fast", "autograd"):
            model = make(TD3C, seed=seed, device=device, kernel="autograd", batch_size=256, warmup_steps=0,
                         train_freq=64, gradient_steps=60, offline_fraction=0.75, constraint_reference="pretrained",
                         epsilon=1e-7, multiplier_learning_rate=0.05, trust_region=None, policy_averaging=0.0,
                         policy_kwargs={"net_arch": [256, 256]})  # fmt: skip
            model.pretrain(4)
            start = state_of(model).weights
            model.kernel = kernel
            model.learn(64, log_interval=None)
            assert n_updates(model) == 64
            models.append(model)
        fast, autograd = models
        assert is_fast(fast) and not is_fast(autograd)
        distances.append(relative_distance(state_of(fast).weights, state_of(autograd).weights, start))
        assert autograd.multiplier > 1.5, "the constraint is not active: nothing is tested"
        assert fast.multiplier == pytest.approx(autograd.multiplier, rel=1e-4)
        for name in names:
            found, expected = (model.logger.name_to_value[f"train/{name}"] for model in models)
            assert found == pytest.approx(expected, rel=1e-3), name
    assert statistics.median(distances) <= (2e-5 if device == "cpu" else TOLERANCE)


class Random(gym.Env[np.ndarray, np.ndarray]):
    """Nothing but its spaces and noise."""

    def __init__(self, observation_space: spaces.Box, action_dim: int) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Box(-2, 3, (action_dim,), np.float32)

    def observation(self) -> np.ndarray:
        values = self.np_random.normal(scale=3, size=self.observation_space.shape) + 9
        return np.clip(values, self.observation_space.low, self.observation_space.high).astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation(), float(np.sum(action)), False, bool(self.np_random.random() < 0.1), {}


def random_dataset(env: Random, n_rows: int, generator: np.random.Generator) -> OfflineDataset:
    env.reset(seed=0)
    terminations = generator.random(n_rows) < 0.3
    return OfflineDataset.from_columns(
        observations=np.stack([env.observation() for _ in range(n_rows)]),
        actions=generator.uniform(-2, 3, (n_rows, *env.action_space.shape)).astype(np.float32),
        rewards=generator.normal(size=n_rows).astype(np.float32),
        next_observations=np.stack([env.observation() for _ in range(n_rows)]),
        terminations=terminations,
        truncations=~terminations & (generator.random(n_rows) < 0.3),
        episode_starts=[0],
        observation_space=env.observation_space,
        action_space=env.action_space,
    )


VECTORS = {
    "one number": spaces.Box(-np.inf, np.inf, (1,), np.float32),
    "vector": spaces.Box(-np.inf, np.inf, (17,), np.float32),
    "double": spaces.Box(-np.inf, np.inf, (5,), np.float64),
    "matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
    "bytes": spaces.Box(0, 255, (7,), np.uint8),
}


@st.composite
def learners(draw: st.DrawFn) -> dict[str, Any]:
    """Everything that the kernels depend on."""
    layer_norm = draw(st.booleans())
    # A LayerNorm of one or two numbers has gradients of 0, of which Adam makes steps of full length by rounding
    widths = st.integers(4 if layer_norm else 1, 80)
    optimizer = {
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.99), [0.9, 0.9]])),
        "eps": draw(st.sampled_from([1e-8, 1e-5, 1e-2])),
        "weight_decay": draw(st.sampled_from([0.0, 0, 0.01, 1.0])),
    }
    algorithm = draw(st.sampled_from([OfflineTD3, TD3BC, TD3C, ReBRAC]))
    n_critics = draw(st.sampled_from([1, 2, 5, 10]))
    settings: dict[str, Any] = {
        "policy_kwargs": {
            "net_arch": {name: draw(st.lists(widths, max_size=3)) for name in ("pi", "qf")},
            "activation_fn": draw(st.sampled_from([nn.ReLU, nn.Tanh])),
            "n_critics": n_critics,
            "target_critics": draw(st.none() | st.integers(1, n_critics)),
            "actor_value": draw(st.sampled_from(["first", "mean", "min"])),
            "layer_norm": layer_norm,
            "share_features_extractor": draw(st.booleans()),
            "optimizer_kwargs": optimizer,
        },
        "batch_size": draw(st.integers(1, 70)),
        "learning_rate": draw(st.sampled_from([1e-4, 1e-3, 1e-2])),
        "tau": draw(st.sampled_from([0.005, 0.3, 0.7, 1.0])),
        "gamma": draw(st.sampled_from([0.0, 0.9, 0.99])),
        "policy_delay": draw(st.integers(1, 3)),
        "normalize_observations": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }
    if algorithm is ReBRAC:
        settings["actor_bc_coef"] = draw(st.sampled_from([0.0, 0.01, 1.0]))
        settings["critic_bc_coef"] = draw(st.sampled_from([0.0, 0.01, 1.0]))
    elif algorithm is not OfflineTD3:
        settings["alpha"] = draw(st.sampled_from([0.0, 0.4, 2.5, float("inf")]))
    return {"algorithm": algorithm, "settings": settings} | {
        "space": draw(st.sampled_from(sorted(VECTORS))),
        "action_dim": draw(st.integers(1, 6)),
        "n_steps": draw(st.integers(1, 6)),
    }


# Derandomized: where a ReLU's input is 0 up to rounding its gradient may differ, so that a rare example fails for no reason
@settings(max_examples=80, deadline=None, derandomize=True)
@given(learner=learners())
def test_whatever_the_network_and_the_settings_the_kernels_agree(learner: dict[str, Any]) -> None:
    env = Random(VECTORS[learner["space"]], learner["action_dim"])
    data = random_dataset(env, 50, np.random.default_rng(0))
    fast, autograd = (
        learner["algorithm"]("MlpPolicy", env, dataset=data, device="cpu", kernel=kernel, **learner["settings"])
        for kernel in ("fast", "autograd")
    )
    fast.load_offline_data()
    start = state_of(fast)
    fast.pretrain(learner["n_steps"])
    autograd.pretrain(learner["n_steps"])
    assert is_fast(fast) and not is_fast(autograd)
    assert_agree(fast, autograd, start, 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_critics", [1, 2, 5, 10])
@pytest.mark.parametrize("actor_value", ["first", "mean", "min"])
def test_for_each_value_of_the_actor_the_kernels_agree(actor_value: str, n_critics: int, device: str) -> None:
    """Targets over a random subset of the critics, which both kernels draw alike, and a batch that is no power of two."""
    target_critics = max(1, n_critics // 2)
    kwargs = SMALL | {"n_critics": n_critics, "target_critics": target_critics, "actor_value": actor_value}
    fast, autograd = (
        make(policy_kwargs=kwargs, kernel=kernel, device=device, batch_size=37) for kernel in ("fast", "autograd")
    )
    start = state_of(fast)
    for model in (fast, autograd):
        model.pretrain(12)
    assert is_fast(fast) and not is_fast(autograd)
    assert_agree(fast, autograd, start)


@pytest.mark.parametrize("actor_value", ["mean", "min"])
def test_critics_that_agree_share_the_gradient_of_the_actor(actor_value: str) -> None:
    """Of five critics three are the same and the smallest, so that the minimum is not unique in any row."""
    kwargs = SMALL | {"n_critics": 5, "actor_value": actor_value}
    models = [make(OfflineTD3, policy_kwargs=kwargs, kernel=kernel) for kernel in ("fast", "autograd")]
    start = state_of(models[0]).weights
    gradients = []
    for model in models:
        model.load_offline_data()
        critics = model.critic.q_networks
        with th.no_grad():
            for critic in (critics[2], critics[4]):
                critic.load_state_dict(critics[1].state_dict())
            for critic in (critics[0], critics[3]):
                critic[-1].bias.add_(10.0)
        kernel = kernel_for(model, model.kernel)
        next(kernel.batches(model.replay_buffer.sample(32), 32))
        kernel.update_actor(lambda actions, q_values: ActorObjective())
        gradients.append({name: value.grad.double().clone() for name, value in model.actor.named_parameters()})
        moved = difference(state_of(model).weights, start)
        assert all(bool((moved[name] != 0).any()) == name.startswith("actor.") for name in moved if "critic" not in name)
    assert norm(difference(*gradients)) <= TOLERANCE * norm(gradients[1]) > 0


def test_with_steps_of_different_discounts_and_further_columns_the_kernels_agree() -> None:
    """What n-step returns and the buffer's options add to a batch, several batches at once."""
    fast, autograd = (make(ReBRAC, kernel=kernel, critic_bc_coef=0.5, n_steps=3, gamma=0.9) for kernel in KERNELS)
    start = state_of(fast)
    for model in (fast, autograd):
        model.pretrain(9)
    discounts = fast.replay_buffer.sample(200).discounts
    assert len(discounts.unique()) > 1 and is_fast(fast)
    assert_agree(fast, autograd, start)


@pytest.mark.parametrize("name", KERNELS)
def test_all_columns_are_cut_into_batches(name: str) -> None:
    model = make(n_steps=3)
    kernel, buffer = kernel_for(model, name), model.replay_buffer
    buffer.require(next_actions=True)
    rows = buffer.sample(48)._replace(returns=th.randn(48, 1))
    batches = list(kernel.batches(rows, 16))
    assert len(batches) == 3 and all(batch.has_returns is None for batch in batches)
    for column, values in rows._asdict().items():
        assert values is None or th.equal(th.cat([getattr(batch, column) for batch in batches]), values), column


@pytest.mark.parametrize("name", KERNELS)
def test_the_actions_of_the_next_values_are_told(name: str) -> None:
    model = make()
    kernel = kernel_for(model, name)
    batch = next(kernel.batches(model.replay_buffer.sample(16), 16))
    noise = th.linspace(-3, 3, 16)[:, None]
    values = kernel.next_q_values(noise, th.tensor([1]))
    with th.no_grad():
        actions = (model.actor_target(batch.next_observations) + noise).clamp(-1, 1)
        expected = model.critic_target(batch.next_observations, actions)[1]
    assert th.allclose(kernel.next_actions, actions, atol=1e-6) and values.shape == (16, 1)
    assert th.allclose(values, expected, atol=1e-4)
    assert float(actions.abs().max()) == 1


@pytest.mark.parametrize("space", sorted(VECTORS))
def test_online_the_kernels_agree_on_every_vector_space(space: str) -> None:
    """Without a dataset observations come as they are stored, in the space's own type."""
    models = []
    for kernel in ("fast", "autograd"):
        env = Random(VECTORS[space], 2)
        model = OfflineTD3("MlpPolicy", env, policy_kwargs=SMALL, seed=0, device="cpu", kernel=kernel, learning_starts=30,
                           batch_size=16, train_freq=40, gradient_steps=7)  # fmt: skip
        start = state_of(model)
        with pytest.warns(UserWarning, match="trains online like TD3"):
            model.learn(40)
        models.append(model)
    assert is_fast(models[0]) and n_updates(models[0]) == 7
    assert_agree(*models, start)


# The optimizers' state is the optimizers' own


@pytest.mark.parametrize(
    ("device", "fused"),
    # Off the CPU the fast kernel leaves a fused Adam to autograd
    [("cpu", None), ("cpu", True), pytest.param("cuda", None, marks=DEVICES[1].marks)],
)
def test_the_optimizers_know_what_was_done(device: str, fused: bool | None) -> None:
    """``optimizer.state_dict()`` has all parameters with the right counts, and autograd goes on from there and back."""
    kwargs = {**SMALL, "optimizer_kwargs": {"fused": fused}}
    switching, autograd = (make(device=device, policy_kwargs=kwargs, kernel=kernel) for kernel in ("fast", "autograd"))
    start = state_of(switching)
    for kernel, critic_steps, actor_steps in (("fast", 13, 6), ("autograd", 26, 13), ("fast", 39, 19)):
        switching.kernel = kernel
        switching.pretrain(13)
        assert is_fast(switching) == (kernel == "fast")
        for network, steps in ((switching.critic, critic_steps), (switching.actor, actor_steps)):
            saved = network.optimizer.state_dict()["state"]
            assert set(network.optimizer.state) == set(network.parameters())
            assert [float(entry["step"]) for entry in saved.values()] == [steps] * len(list(network.parameters()))
            for parameter, entry in network.optimizer.state.items():
                assert entry["exp_avg"].shape == parameter.shape and entry["exp_avg"].dtype == th.float32
    autograd.pretrain(39)
    assert_agree(switching, autograd, start)


@pytest.mark.parametrize("device", DEVICES)
def test_sb3_goes_on_where_the_fast_kernel_stopped(tmp_path: Path, device: str) -> None:
    """A count that parameters share would be raised by each of them in SB3's ``TD3.load``, the moments of others be lost."""
    model = make(device=device, kernel="fast").pretrain(14)
    model.save(tmp_path / "model")
    theirs = TD3.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device=device)
    before = state_of(theirs)
    assert before.counts == state_of(model).counts and norm(difference(before.first, state_of(model).first)) == 0
    theirs.learning_starts = 10
    theirs.learn(20)
    done = n_updates(theirs) - 14
    assert done > 0
    assert count_steps(theirs.critic.optimizer) == {14 + done}
    assert count_steps(theirs.actor.optimizer) == {(14 + done) // 2}
    # With the right counts Adam's steps are at most about the learning rate long
    moved = difference(state_of(theirs).weights, before.weights)
    assert 0 < max(float(step.abs().max()) for name, step in moved.items() if "target" not in name) < 3e-3 * done


@pytest.mark.parametrize("algorithm", [OfflineTD3, TD3BC, TD3C])
def test_resuming_is_as_good_as_going_on_to_the_bit(algorithm: type[OfflineTD3], tmp_path: Path) -> None:
    whole, part = make(algorithm, kernel="fast").pretrain(21), make(algorithm, kernel="fast").pretrain(8)
    part.save(tmp_path / "model")
    resumed = algorithm.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").pretrain(13)
    assert is_fast(whole) and is_fast(resumed)
    assert_identical(resumed, whole)


def test_resuming_online_is_as_good_as_going_on_to_the_bit(tmp_path: Path) -> None:
    """The online part: reference, multiplier, moments and parameters of TD3C after more updates on the same transitions."""
    model = make(TD3C, kernel="fast", constraint_reference="pretrained", warmup_steps=0, offline_steps=6).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    resumed = TD3C.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    resumed.load_offline_data()
    resumed.load_replay_buffer(tmp_path / "buffer")
    for learner in (model, resumed):
        learner.set_random_seed(5)
        learner.train(11, 16)
        assert is_fast(learner)
    assert_identical(resumed, model)
    assert resumed.multiplier == model.multiplier


def _load_parameters(model: TD3BC) -> None:
    model.set_parameters(copy.deepcopy(make(seed=5, kernel="autograd").pretrain(4).get_parameters()))


def _load_policy(model: TD3BC) -> None:
    model.policy.load_state_dict(make(seed=5).policy.state_dict())


def _load_optimizers(model: TD3BC) -> None:
    other = make(seed=5, kernel="autograd").pretrain(40)
    for network in ("actor", "critic"):
        getattr(model, network).optimizer.load_state_dict(copy.deepcopy(getattr(other, network).optimizer.state_dict()))


def _forget_moments(model: TD3BC) -> None:
    model.actor.optimizer.state.clear()
    model.critic.optimizer.state.clear()


def _change_moments(model: TD3BC) -> None:
    for entry in model.critic.optimizer.state.values():
        entry["exp_avg"].mul_(-3)


def _replace_moments(model: TD3BC) -> None:
    for entry in model.actor.optimizer.state.values():
        entry["exp_avg_sq"] = 9 * entry["exp_avg_sq"]


def _replace_optimizer(model: TD3BC) -> None:
    model.critic.optimizer = th.optim.Adam(model.critic.parameters(), lr=1e-3)


def _change_betas(model: TD3BC) -> None:
    model.critic.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def _step_by_hand(model: TD3BC) -> None:
    for parameter in model.critic.parameters():
        parameter.grad = th.ones_like(parameter)
    model.critic.optimizer.step()


def _forget_gradients(model: TD3BC) -> None:
    # Has an effect only together with a step
    model.policy.actor.optimizer.zero_grad()
    model.policy.critic.optimizer.zero_grad()
    _change_parameters(model)


@th.no_grad()
def _change_parameters(model: TD3BC) -> None:
    for parameter in model.policy.parameters():
        parameter.mul_(0.9)


def _point_elsewhere(model: TD3BC) -> None:
    for parameter in model.policy.parameters():
        parameter.data = 0.9 * parameter.data


def _point_one_elsewhere(model: TD3BC) -> None:
    bias = model.critic_target.q_networks[1][-1].bias
    bias.data = bias.data + 1


def _move(model: TD3BC) -> None:
    # To other memory and back, with rounding to half precision on the way so that it has an effect
    model.policy.half()
    model.policy.float()


def _replace_layer(model: TD3BC) -> None:
    model.actor.mu[2] = nn.Linear(13, 11).to(model.device)
    model.actor_target.mu[2] = copy.deepcopy(model.actor.mu[2])
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-3)


def _change_statistics(model: TD3BC) -> None:
    for normalizer in model.policy.normalizers():
        normalizer.set_statistics(np.ones(3), np.full(3, 2.0))


CHANGES = [
    _load_parameters,
    _load_policy,
    _load_optimizers,
    _forget_moments,
    _change_moments,
    _replace_moments,
    _replace_optimizer,
    _change_betas,
    _step_by_hand,
    _forget_gradients,
    _change_parameters,
    _point_elsewhere,
    _point_one_elsewhere,
    _move,
    _replace_layer,
    _change_statistics,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_in_the_middle_is_seen(change: Callable[[TD3BC], None], device: str) -> None:
    """The fast kernel goes on from what it finds, as autograd does, and it stays in charge."""

    def run(kernel: str, change: Callable[[TD3BC], None] = lambda model: None) -> TD3BC:
        model = make(kernel=kernel, device=device).pretrain(8)
        # Networks made in the change begin with the same weights
        th.manual_seed(3)
        change(model)
        return model.pretrain(9)

    start = state_of(make(device=device))
    fast, autograd, unchanged = run("fast", change), run("autograd", change), run("autograd")
    assert is_fast(fast)
    assert_agree(fast, autograd, start)
    assert relative_distance(state_of(unchanged).weights, state_of(autograd).weights, start.weights) > 10 * TOLERANCE


def test_finetuning_starts_with_fresh_moments() -> None:
    """``reset_optimizers``: after 30 offline steps the counts are those of the finetuning run."""
    for reset in (True, False):
        model = make(kernel="fast", offline_steps=30, warmup_steps=0, batch_size=8, reset_optimizers=reset).learn(20)
        online = n_updates(model) - 30
        assert online > 0
        assert count_steps(model.critic.optimizer) == {online if reset else n_updates(model)}


@pytest.mark.parametrize("kernels", [("fast", "fast"), ("fast", "autograd"), ("autograd", "fast")])
@pytest.mark.parametrize("first", ["copy", "original"])
def test_a_copy_of_a_learner_is_independent(kernels: tuple[str, str], first: str) -> None:
    """After ``set_parameters(other.get_parameters())`` training one of the two changes nothing in the other."""
    original, copied = make(kernel=kernels[0]).pretrain(10), make(kernel=kernels[1], seed=1)
    copied.set_parameters(original.get_parameters())
    trained, other = (copied, original) if first == "copy" else (original, copied)
    before = copy.deepcopy(state_of(other))
    trained.pretrain(5)
    after = state_of(other)
    assert before.counts == after.counts
    for mine, theirs in zip(before[:3], after[:3], strict=True):
        assert norm(difference(mine, theirs)) == 0


def test_copies_of_the_policy_have_memory_of_their_own() -> None:
    model = make(kernel="fast").pretrain(3)
    before, copied = state_of(model), copy.deepcopy(model.policy)
    with th.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert norm(difference(state_of(model).weights, before.weights)) == 0


def test_the_parameters_stay_the_same_objects_and_the_policy_acts_by_them() -> None:
    model = make(kernel="fast")
    parameters, names = list(model.policy.parameters()), list(model.policy.state_dict())
    observation = np.array([0.3, -0.9, 1.0], np.float32)
    before = model.predict(observation)[0]
    model.pretrain(30)
    assert all(a is b for a, b in zip(model.policy.parameters(), parameters, strict=True))
    assert list(model.policy.state_dict()) == names
    assert model.predict(observation)[0] != before
    copied = make(seed=1)
    copied.policy.load_state_dict(model.policy.state_dict())
    assert copied.predict(observation)[0] == model.predict(observation)[0]


# Chunks


class Nothing(BaseCallback):
    """With a callback there is one gradient step in each call of ``train``."""

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("batch_size", [1, 5, 16, 37])
@pytest.mark.parametrize("n_steps", [20, 70])
def test_in_how_many_pieces_it_is_done_makes_no_difference(batch_size: int, n_steps: int) -> None:
    """To the bit, for odd sizes too: 70 steps are more than are drawn at once."""

    def new() -> TD3BC:
        return make(kernel="fast", batch_size=batch_size)

    whole = new().pretrain(n_steps)
    assert_identical(whole, new().pretrain(7).pretrain(n_steps - 7))
    assert_identical(whole, new().pretrain(n_steps, callback=Nothing()))
    assert_identical(whole, new().pretrain(n_steps))


def test_online_in_how_many_pieces_it_is_done_makes_no_difference() -> None:
    """``train(70)`` is seventy times ``train(1)``, also with online data, whose batches are drawn from NumPy's generator."""
    models = []
    for pieces in ([70], [1] * 70, [63, 7]):
        model = make(TD3C, kernel="fast", constraint_reference="target", warmup_steps=0, offline_steps=6).learn(30)
        model.set_random_seed(7)
        for piece in pieces:
            model.train(piece, 16)
        models.append(model)
    assert n_updates(models[0]) > 76
    assert_identical(models[0], models[1])
    assert_identical(models[0], models[2])


def test_batch_sizes_may_alternate() -> None:
    fast, autograd = make(kernel="fast"), make(kernel="autograd")
    start = state_of(fast)
    for model in (fast, autograd):
        for batch_size in (16, 3, 16, 40, 3):
            model.batch_size = batch_size
            model.pretrain(4)
    assert_agree(fast, autograd, start)
