"""What users change or hook into: the fast kernel sees it, or leaves it to autograd."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.td3.policies import Actor
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sb3_offline_ft import TD3BC, TD3C, OfflineTD3
from sb3_offline_ft.collapse.remedies import PolicyBrake
from sb3_offline_ft.collapse.signals import greedy_actions, policy_distance
from sb3_offline_ft.policies.policies import MlpPolicy
from tests.hooks import n_updates
from tests.kernels import (
    BY_AUTOGRAD,
    SMALL,
    TOLERANCE,
    assert_agree,
    assert_identical,
    data,
    difference,
    is_fast,
    make,
    norm,
    relative_distance,
    state_of,
)

# The brake of the guard, and hooks of users


class AtStart(BaseCallback):
    """Does something to the learner before the first step of the online phase."""

    def __init__(self, action: Callable[[Any], object]) -> None:
        super().__init__()
        self.action = action

    def _on_training_start(self) -> None:
        self.action(self.model)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
def test_a_held_policy_stays_while_the_critics_learn(algorithm: type[TD3BC]) -> None:
    model = make(algorithm, kernel="fast").pretrain(6)
    brake = PolicyBrake(model)
    before = state_of(model).weights
    brake.hold(True)
    model.pretrain(10)
    # The target policy comes nearer to the held one
    held = difference(state_of(model).weights, before)
    assert is_fast(model)
    for name, moved in held.items():
        assert bool((moved != 0).any()) != name.startswith("actor."), name
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3

    brake.hold(False)
    brake.remove()
    model.pretrain(4)
    after = difference(state_of(model).weights, before)
    assert all(bool((moved != 0).any()) for moved in after.values())


@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
def test_a_slower_policy_is_as_slow_as_by_autograd(algorithm: type[TD3BC]) -> None:
    def run(kernel: str, factor: float) -> TD3BC:
        model = make(algorithm, kernel=kernel, warmup_steps=0, offline_steps=5, batch_size=8)
        if algorithm is TD3C:
            # Nothing but the brake shall slow it
            model.constraint_reference, model.trust_region, model.policy_averaging = "target", None, 0.0
        brake = PolicyBrake(model)
        model.learn(30, callback=AtStart(lambda _: brake.slow_down(factor)))
        brake.remove()
        return model

    start = state_of(make(algorithm))
    fast, autograd, free = run("fast", 0.1), run("autograd", 0.1), run("fast", 1.0)
    assert is_fast(fast) and n_updates(autograd) == n_updates(fast) > 20
    # Actions differ in the last digits, which the environment amplifies
    assert_agree(fast, autograd, start, 1e-3)
    actor = {name for name in start.weights if name.startswith("actor.")}
    slow, quick = (
        norm(difference({n: state_of(model).weights[n] for n in actor}, {n: start.weights[n] for n in actor}))
        for model in (fast, free)
    )
    assert slow < 0.5 * quick


@pytest.mark.parametrize("algorithm", [TD3BC, TD3C])
def test_a_confined_policy_stays_near(algorithm: type[TD3BC]) -> None:
    radius = 1e-5

    def run(confined: bool) -> tuple[TD3BC, PolicyBrake, dict[str, th.Tensor]]:
        model = make(algorithm, kernel="fast", warmup_steps=0, offline_steps=5, batch_size=8, learning_rate=1e-2)
        if algorithm is TD3C:
            # Nothing but the brake shall slow it
            model.constraint_reference, model.trust_region, model.policy_averaging = "target", None, 0.0
        brake, center = PolicyBrake(model), {}

        def start(_: Any) -> None:
            center.update({name: value.clone() for name, value in model.policy.state_dict().items()})
            if confined:
                brake.confine(radius, center)

        model.learn(40, callback=AtStart(start))
        assert is_fast(model) and n_updates(model) > 25
        return model, brake, center

    model, brake, center = run(True)
    # The states on which the brake measures are nobody else's business, but the bound holds on them
    observations = brake._probe

    def distance(model: TD3BC) -> float:
        with th.no_grad():
            return policy_distance(greedy_actions(model, observations), greedy_actions(model, observations, center))

    assert 0 < distance(model) <= radius
    assert distance(run(False)[0]) > 100 * radius
    brake.remove()
    model.train(30, 8)
    assert distance(model) > 10 * radius


def test_hooks_on_the_optimizers_are_called_and_see_the_gradients() -> None:
    """Once before and once after each step; gradients are those of autograd, and what they do to them in place has effect."""

    def run(kernel: str) -> tuple[TD3BC, list[tuple[str, th.Tensor]]]:
        model, calls = make(kernel=kernel), []
        for name in ("actor", "critic"):
            module = getattr(model, name)

            def before(optimizer: Any, args: Any, kwargs: Any, name: str = name, module: nn.Module = module) -> None:
                assert optimizer is module.optimizer
                gradients = [parameter.grad for parameter in module.parameters()]
                calls.append((f"before {name}", th.cat([gradient.flatten() for gradient in gradients]).clone()))
                nn.utils.clip_grad_norm_(module.parameters(), 0.01)

            def after(optimizer: Any, args: Any, kwargs: Any, name: str = name, module: nn.Module = module) -> None:
                clipped = th.cat([parameter.grad.flatten() for parameter in module.parameters()])
                assert float(clipped.norm()) <= 0.010001
                calls.append((f"after {name}", clipped.clone()))

            module.optimizer.register_step_pre_hook(before)
            module.optimizer.register_step_post_hook(after)
        return model.pretrain(6), calls

    (fast, calls), (autograd, expected) = run("fast"), run("autograd")
    assert is_fast(fast)
    critic, actor = ["before critic", "after critic"], ["before actor", "after actor"]
    assert [name for name, _ in calls] == [name for name, _ in expected] == (critic * 2 + actor) * 3
    for (name, found), (_, value) in zip(calls, expected, strict=True):
        assert float((found - value).norm()) <= TOLERANCE * float(value.norm()), name
    assert_agree(fast, autograd, state_of(make()))


def test_hooks_on_all_optimizers_are_called() -> None:
    calls: list[th.optim.Optimizer] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: calls.append(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: calls.append(optimizer)),
    ]
    try:
        model = make(kernel="fast").pretrain(2)
    finally:
        for handle in handles:
            handle.remove()
    critic, actor = model.critic.optimizer, model.actor.optimizer
    assert calls == [critic, critic, critic, critic, actor, actor]


def _clip_to_new_tensors(optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = parameter.grad.clamp(-1e-3, 1e-3)


def _drop_one_gradient(optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
    optimizer.param_groups[0]["params"][0].grad = None


def _point_elsewhere_after(optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data = 0.99 * parameter.data


def _forget_after(optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
    optimizer.state.clear()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(_clip_to_new_tensors, None),
        pytest.param(_drop_one_gradient, None),
        pytest.param(None, _point_elsewhere_after),
        pytest.param(None, _forget_after),
    ],
    ids=["clip to new tensors", "drop a gradient", "point elsewhere", "forget"],
)
def test_what_hooks_do_has_effect(before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
    """Hooks may replace what they find, as with torch's own step; which kernel is used then is open."""

    def run(kernel: str) -> TD3BC:
        model = make(kernel=kernel)
        if before is not None:
            model.critic.optimizer.register_step_pre_hook(before)
        if after is not None:
            model.critic.optimizer.register_step_post_hook(after)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=BY_AUTOGRAD)
            return model.pretrain(12)

    found, expected, start = state_of(run("auto")).weights, state_of(run("autograd")).weights, state_of(make()).weights
    assert relative_distance(found, expected, start) <= TOLERANCE


# What the fast kernel leaves to autograd


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "name"),
    [
        (th.optim.RMSprop, {}, "the optimizer is RMSprop"),
        (th.optim.AdamW, {}, "the optimizer is AdamW"),
        (th.optim.Adam, {"amsgrad": True}, "the optimizer has `amsgrad`"),
        (th.optim.Adam, {"maximize": True}, "the optimizer has `maximize`"),
    ],
    ids=["RMSprop", "AdamW", "amsgrad", "maximize"],
)
def test_another_optimizer_is_said_once_and_is_sb3s_to_the_bit(
    optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], name: str
) -> None:
    common: dict[str, Any] = {"seed": 1, "device": "cpu", "learning_rate": 1e-3, "learning_starts": 30, "batch_size": 16}
    policy_kwargs = {**SMALL, "optimizer_class": optimizer_class, "optimizer_kwargs": kwargs}
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **common).learn(60)
    ours = OfflineTD3("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs | {"layer_norm": False}, **common)
    with pytest.warns(UserWarning) as record:
        ours.learn(60)
    said = [str(warning.message) for warning in record if "autograd" in str(warning.message)]
    assert len(said) == 1 and name in said[0]
    for key, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(key)), key
    ours.kernel = "fast"
    with pytest.raises(ValueError, match=f"`kernel='fast'` cannot be used: {name}"):
        ours.train(1, 16)
    ours.kernel, ours.update_precision = "auto", "bfloat16"
    with pytest.raises(ValueError, match=f"`update_precision='bfloat16'` cannot be used: {name}"):
        ours.train(1, 16)


class HalfLinear(nn.Linear):
    """A layer of one's own."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return 0.5 * super().forward(x)


class CubicActor(Actor):
    """A network class of one's own, which acts otherwise."""

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return super().forward(obs) ** 3


class CubicPolicy(MlpPolicy):
    """A policy with it."""

    def make_actor(self, features_extractor: Any = None) -> Actor:
        return CubicActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)


def _freeze(model: TD3BC) -> None:
    model.actor.mu[0].weight.requires_grad_(False)


def _hook_layer(model: TD3BC) -> None:
    model.critic.q_networks[0][0].register_forward_hook(lambda module, args, output: output.abs())


def _hook_input(model: TD3BC) -> None:
    model.actor.mu.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def _hook_network(model: TD3BC) -> None:
    model.critic_target.register_forward_hook(lambda module, args, output: tuple(0.5 * values for values in output))


def _hook_backward(model: TD3BC) -> None:
    model.critic.q_networks[1][3].register_full_backward_hook(lambda module, inputs, outputs: tuple(-g for g in inputs))


def _hook_extractor(model: TD3BC) -> None:
    for network in (model.actor, model.critic):
        network.features_extractor.register_forward_hook(lambda module, args, output: output + 1)


def _hook_gradient(model: TD3BC) -> None:
    model.actor.mu[0].weight.register_hook(lambda gradient: -gradient)


def _hook_accumulated_gradient(model: TD3BC) -> None:
    def turn(parameter: nn.Parameter) -> None:
        parameter.grad = -parameter.grad

    model.critic.q_networks[0][0].weight.register_post_accumulate_grad_hook(turn)


def _normalize_spectrum(model: TD3BC) -> None:
    parametrizations.spectral_norm(model.critic.q_networks[0][0])
    model.critic_target.q_networks[0][0].weight.requires_grad_(False)
    model.critic.optimizer = th.optim.Adam(model.critic.parameters(), lr=1e-3)
    # As many parameters in the target, so that SB3's own averaging finds them in pairs
    parametrizations.spectral_norm(model.critic_target.q_networks[0][0])


def _normalize_weights(model: TD3BC) -> None:
    for actor in (model.actor, model.actor_target):
        parametrizations.weight_norm(actor.mu[0])
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-3)


def _replace_forward(model: TD3BC) -> None:
    forward = model.actor.mu.forward
    model.actor.mu.forward = lambda x: 0.5 * forward(x)


def _replace_q1_forward(model: TD3BC) -> None:
    q1_forward = model.critic.q1_forward
    model.critic.q1_forward = lambda observations, actions: -q1_forward(observations, actions)


def _replace_activation(model: TD3BC) -> None:
    model.actor.mu[1] = nn.ELU()


def _add_dropout(model: TD3BC) -> None:
    model.critic.q_networks[0].insert(1, nn.Dropout(0.5))


def _use_layer_of_ones_own(model: TD3BC) -> None:
    for actor in (model.actor, model.actor_target):
        actor.mu[0] = HalfLinear(3, 13)
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-3)


def _use_groups(model: TD3BC) -> None:
    first, *others = model.actor.parameters()
    model.actor.optimizer = th.optim.Adam([{"params": [first], "betas": (0.0, 0.9)}, {"params": others}], lr=1e-3)


def _train_only_some(model: TD3BC) -> None:
    model.actor.optimizer = th.optim.Adam(list(model.actor.parameters())[2:], lr=1e-3)


def _average_statistics(model: TD3BC) -> None:
    # The target actor sees other numbers than the actor
    model.actor_target.features_extractor.set_statistics(np.ones(3), np.full(3, 2.0))


def _tie_critics(model: TD3BC) -> None:
    for critic in (model.critic, model.critic_target):
        critic.q_networks[1][0] = critic.q_networks[0][0]
    model.critic.optimizer = th.optim.Adam(model.critic.parameters(), lr=1e-3)


def _change_epsilon_of_one_norm(model: TD3BC) -> None:
    model.critic.q_networks[1][1].eps = 1.0


def _replace_flatten(model: TD3BC) -> None:
    for network in (model.actor, model.actor_target, model.critic, model.critic_target):
        network.features_extractor.flatten = nn.Sequential(nn.Flatten(), nn.Tanh())


def _add_parameter(model: TD3BC) -> None:
    for actor in (model.actor, model.actor_target):
        actor.mu.register_parameter("temperature", nn.Parameter(th.ones(1)))
    _replace_activation(model)


UNUSUAL = [
    _freeze,
    _hook_layer,
    _hook_input,
    _hook_network,
    _hook_backward,
    _hook_extractor,
    _hook_gradient,
    _hook_accumulated_gradient,
    _normalize_spectrum,
    _normalize_weights,
    _replace_forward,
    _replace_q1_forward,
    _replace_activation,
    _add_dropout,
    _use_layer_of_ones_own,
    _use_groups,
    _train_only_some,
    _average_statistics,
    _tie_critics,
    _replace_flatten,
]


def _name(change: Any) -> str:
    return str(change.__name__).strip("_")


def run_changed(change: Callable[[Any], None], kernel: str, when: str, n_steps: int = 9) -> TD3BC:
    """Changes a learner before its first gradient step, or in the middle."""
    model = make(kernel="fast")
    model.load_offline_data()
    if when == "in the middle":
        # The fast kernel has read the networks and worked on batches
        model.pretrain(4)
    model.kernel = kernel
    th.manual_seed(3)
    change(model)
    # Its own stream would go on where pretraining stops: dropout draws from the global one
    th.manual_seed(4)
    return model.pretrain(n_steps)


@pytest.mark.parametrize("when", ["before", "in the middle"])
@pytest.mark.parametrize("change", UNUSUAL, ids=_name)
def test_what_only_autograd_can_do_is_left_to_it(change: Callable[[Any], None], when: str) -> None:
    """It is said, what the user did has effect, and the results are those of ``kernel="autograd"`` to the bit."""
    expected = run_changed(change, "autograd", when)
    with pytest.warns(UserWarning, match=BY_AUTOGRAD) as record:
        found = run_changed(change, "auto", when)
    assert len(record) == 1
    assert not is_fast(found)
    ordinary = make(kernel="autograd").pretrain(n_updates(found))
    ours, theirs = state_of(found).weights, state_of(expected).weights
    assert ours.keys() == theirs.keys() and norm(difference(ours, theirs)) == 0
    with th.no_grad():
        observations = th.tensor([[0.3, -0.9, 1.0]])
        results = [
            th.cat([m.actor(observations), *m.critic(observations, th.zeros(1, 1))]).flatten() for m in (found, ordinary)
        ]
    assert not th.allclose(*results, rtol=1e-6)
    found.kernel = "fast"
    with pytest.raises(ValueError, match="`kernel='fast'` cannot be used: "):
        found.pretrain(1)


def test_a_parameter_may_be_added_in_the_middle() -> None:
    with pytest.warns(UserWarning, match=BY_AUTOGRAD):
        assert n_updates(run_changed(_add_parameter, "auto", "in the middle")) == 13


def test_hooks_on_all_modules_have_effect() -> None:
    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        return 0.5 * output if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        expected = make(kernel="autograd").pretrain(6)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=BY_AUTOGRAD)
            found = make().pretrain(6)
    finally:
        handle.remove()
    assert_agree(found, expected, state_of(make()))


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_another_epsilon_of_one_norm_is_seen(when: str) -> None:
    found, expected = (run_changed(_change_epsilon_of_one_norm, kernel, when) for kernel in ("fast", "autograd"))
    assert_agree(found, expected, state_of(make()))
    ordinary = run_changed(lambda model: None, "fast", when)
    assert norm(difference(state_of(found).weights, state_of(ordinary).weights)) > 0


def test_a_policy_of_ones_own_is_left_to_autograd() -> None:
    common = {"dataset": data(), "seed": 0, "device": "cpu", "policy_kwargs": SMALL, "learning_rate": 1e-3, "batch_size": 16}
    expected = TD3BC(CubicPolicy, "Pendulum-v1", kernel="autograd", **common).pretrain(6)
    found = TD3BC(CubicPolicy, "Pendulum-v1", **common)
    with pytest.warns(UserWarning, match="CubicActor is a network class of your own"):
        found.pretrain(6)
    assert_identical(found, expected)


def test_another_activation_is_left_to_autograd() -> None:
    kwargs = {**SMALL, "activation_fn": nn.ELU}
    with pytest.warns(UserWarning, match="the actor has ELU: known are Linear, LayerNorm, ReLU and Tanh"):
        found = make(policy_kwargs=kwargs).pretrain(6)
    assert_identical(found, make(policy_kwargs=kwargs, kernel="autograd").pretrain(6))


def test_a_scheduler_of_the_learning_rate_sees_the_steps() -> None:
    """torch's schedulers replace ``optimizer.step`` to know whether it was called; they warn if it was not."""
    model = make()
    scheduler = th.optim.lr_scheduler.LambdaLR(model.critic.optimizer, lambda epoch: 0.5)
    with pytest.warns(UserWarning, match="the optimizer's `step` has been replaced") as record:
        model.pretrain(3)
    assert len(record) == 1
    scheduler.step()
    with pytest.raises(ValueError, match="`kernel='fast'` cannot be used"):
        model.kernel = "fast"
        model.pretrain(1)


def test_the_fast_kernel_comes_back() -> None:
    """It takes over again when what only autograd can do is gone, and goes on from its moments."""
    fast, autograd = make(), make(kernel="autograd")
    start = state_of(fast)
    for model in (fast, autograd):
        model.pretrain(4)
        handle = model.critic.q_networks[0][0].register_forward_hook(lambda module, args, output: 0.5 * output)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=BY_AUTOGRAD)
            model.pretrain(4)
        assert not is_fast(model)
        handle.remove()
        model.pretrain(4)
    assert is_fast(fast)
    assert_agree(fast, autograd, start)


class Picture(gym.Env[Any, np.ndarray]):
    """Observations that are not vectors."""

    def __init__(self, kind: str) -> None:
        picture, vector = spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space: spaces.Space[Any] = picture if kind == "picture" else spaces.Dict(a=vector, b=vector)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action[0]), False, False, {}


@pytest.mark.parametrize(
    ("policy", "kind"), [("CnnPolicy", "picture"), ("MultiInputPolicy", "dict"), ("MlpPolicy", "picture")]
)
def test_other_observations_than_vectors_are_left_to_autograd_without_a_word(policy: str, kind: str) -> None:
    kwargs: dict[str, Any] = {"net_arch": [8]}
    if policy == "CnnPolicy":
        kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    common: dict[str, Any] = {"seed": 0, "device": "cpu", "learning_starts": 4, "batch_size": 4, "buffer_size": 50}
    model = OfflineTD3(policy, Picture(kind), policy_kwargs=kwargs, **common)
    with pytest.warns(UserWarning) as record:
        model.learn(7)
    assert ["trains online like TD3" in str(warning.message) for warning in record] == [True]
    assert not is_fast(model) and n_updates(model) == 3
    for option in ({"kernel": "fast"}, {"update_precision": "bfloat16"}):
        ((name, value),) = option.items()
        # At once, and not after the warm-up
        with pytest.raises(ValueError, match=rf"`{name}='{value}'` cannot be used: the observations are not vectors"):
            OfflineTD3(policy, Picture(kind), policy_kwargs=kwargs, **common, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"kernel": "quick"}, "`kernel` must be one of 'auto', 'fast', 'autograd', found 'quick'"),
        ({"kernel": None}, "`kernel` must be one of"),
        ({"update_precision": "float16"}, "`update_precision` must be one of 'float32', 'bfloat16', found 'float16'"),
        ({"update_precision": th.bfloat16}, "`update_precision` must be one of"),
        ({"kernel": "autograd", "update_precision": "bfloat16"}, "needs the fast kernel"),
    ],
)
def test_bad_options_are_refused(option: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(**option)
    make().save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        TD3BC.load(tmp_path / "model", **option)


def test_the_options_are_saved_and_can_be_changed(tmp_path: Path) -> None:
    make(kernel="autograd").save(tmp_path / "model")
    assert TD3BC.load(tmp_path / "model").kernel == "autograd"
    loaded = TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1"), kernel="fast").pretrain(1)
    assert is_fast(loaded)
