"""ReBRAC: its update is the paper's, its schedules act online, and it learns."""

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.td3 import policies as td3_policies

from sb3_offline_ft import TD3BC, OfflineDataset, OfflineTD3, ReBRAC, load_dataset
from tests import hooks
from tests.learning import p_value_of_no_better_than_random

DATASET = "bundled:pendulum-medium"
SMALL = {"net_arch": [16, 16]}
KERNELS = ["fast", "autograd"]


def make(env: str = "Pendulum-v1", **settings: Any) -> ReBRAC:
    defaults: dict[str, Any] = {"dataset": DATASET, "policy_kwargs": SMALL, "seed": 0, "device": "cpu", "warmup_steps": 0}
    defaults |= {"learning_rate": 1e-3, "batch_size": 8}
    return ReBRAC("MlpPolicy", env, **(defaults | settings))


@th.no_grad()
def be_constant(network: th.nn.Module, value: float) -> None:
    """Lets a network return one number, whatever it is given."""
    network[-2 if isinstance(network[-1], th.nn.Tanh) else -1].weight.zero_()
    if isinstance(network[-1], th.nn.Tanh):
        network[-2].bias.fill_(math.atanh(value))
    else:
        network[-1].bias.fill_(value)


def episode_ends(n_rows: int = 3) -> OfflineDataset:
    """The last rows of Hopper's episodes, of which most terminate and some are truncated."""
    data = load_dataset("bundled:hopper-medium")
    ends = np.append(data.episode_starts[1:], len(data))
    rows = np.concatenate([np.arange(end - n_rows, end) for end in ends])
    columns = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return OfflineDataset.from_columns(
        **{name: getattr(data, name)[rows] for name in columns},
        episode_starts=np.arange(0, len(rows), n_rows),
        observation_space=data.observation_space,
        action_space=data.action_space,
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_update_by_hand(kernel: str) -> None:
    """
    Networks that return constants, so that target and objective can be worked out with a pencil.

    The target policy returns 0.5 and the target critics 30 and 20, the policy 0.25 and the critics 8 and 10.
    """
    data = episode_ends()
    model = make("Hopper-v5", dataset=data, kernel=kernel, gamma=0.9, target_policy_noise=0.0,
                 actor_bc_coef=0.3, critic_bc_coef=2.0)  # fmt: skip
    model.load_offline_data()
    model.life_cycle.environment_steps = 0
    be_constant(model.actor_target.mu, 0.5)
    be_constant(model.actor.mu, 0.25)
    for network, value in zip([*model.critic.q_networks, *model.critic_target.q_networks], [8, 10, 30, 20], strict=True):
        be_constant(network, value)
    batch = model.draw_batch(64)
    found = hooks.targets(model, batch)

    # The data's next actions, looked up in the data
    distances, kinds = [], set()
    for row in range(64):
        (matches,) = np.nonzero((data.observations == batch.observations[row].numpy()).all(axis=1))
        assert len(matches) == 1
        index = int(matches[0])
        target = float(batch.rewards[row])
        if not data.terminations[index]:
            value = 20.0
            if index % 3 < 2:
                value -= 2.0 * sum((0.5 - float(a)) ** 2 for a in data.actions[index + 1])
            target += 0.9 * value
        assert float(found[row]) == pytest.approx(target, rel=1e-5)
        kinds.add((bool(data.terminations[index]), bool(batch.has_next_actions[row])))
        distances.append(sum((0.25 - float(a)) ** 2 for a in data.actions[index]))
    assert kinds == {(False, True), (True, False), (False, False)}

    hooks.update_actor(model, batch)
    means = model.updater.pop_means()
    assert means["train/mean_abs_q"] == 8, "the smaller of the two critics"
    # Q / mean|Q| is 1
    assert means["train/actor_loss"] == pytest.approx(-1 + 0.3 * np.mean(distances), rel=1e-5)
    assert means["train/bc_loss"] == pytest.approx(np.mean(distances), rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_the_policy(kernel: str) -> None:
    """By autograd from the equation: the scale of the value is a constant, the distance a sum over action dimensions."""
    model = make("Hopper-v5", dataset="bundled:hopper-medium", kernel=kernel, actor_bc_coef=0.3)
    model.load_offline_data()
    model.life_cycle.environment_steps = 0
    batch = model.draw_batch(64)
    actions = model.actor(batch.observations)
    values = th.minimum(*model.critic(batch.observations, actions))
    loss = (0.3 * ((actions - batch.actions) ** 2).sum(-1) - (values / values.detach().abs().mean()).squeeze(1)).mean()
    expected = th.autograd.grad(loss, list(model.actor.parameters()))
    hooks.update_actor(model, batch)
    for parameter, gradient in zip(model.actor.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert th.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_online_schedules() -> None:
    """The policy's coefficient falls to a half; the critics have none, unless it is asked for."""
    model = make(actor_bc_coef=0.2, offline_steps=3)
    model.learn(0)
    batch = model.draw_batch(8)
    actions, q_values = model.actor(batch.observations), th.ones(8, 1)
    for progress_remaining, weight in ((1.0, 0.2), (0.5, 0.15), (0.0, 0.1)):
        hooks.set_progress_remaining(model, progress_remaining)
        objective = hooks.objective(model, batch, actions, q_values)
        distance = ((actions - batch.actions) ** 2).sum(1).mean()
        assert float(objective.loss(actions, q_values).detach()) == pytest.approx(
            -1 + weight * float(distance.detach()), rel=1e-5
        )
        assert hooks.next_value_penalty(model, batch, actions, q_values) is None
    model = make(critic_bc_coef=0.2, online_critic_bc="lin_1.0_0.5", offline_steps=3)
    model.learn(0)
    batch = model.draw_batch(8)
    hooks.set_progress_remaining(model, 0.0)
    penalty = hooks.next_value_penalty(model, batch, th.zeros_like(batch.actions), q_values)
    assert penalty is not None
    assert th.allclose(penalty, 0.1 * (batch.next_actions**2).sum(1, keepdim=True) * batch.has_next_actions)


def test_online_rows_have_next_actions_too() -> None:
    """A penalty online is on the new transitions as well."""
    model = make(critic_bc_coef=0.2, online_critic_bc=1.0, offline_steps=3, offline_fraction=0.0)
    model.learn(40)
    batch = model.draw_batch(64)
    assert not batch.is_offline.any() and batch.has_next_actions.any()
    assert "train/critic_bc_penalty" in model.logger.name_to_value


def test_without_dataset_and_weights_it_is_td3() -> None:
    kwargs = SMALL | {"layer_norm": False, "actor_value": "first"}
    common: dict[str, Any] = {"seed": 1, "device": "cpu", "learning_rate": 1e-3, "learning_starts": 50}
    theirs = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **common).learn(150)
    ours = ReBRAC("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, kernel="autograd", **common)
    with pytest.warns(UserWarning, match="trains online like TD3"):
        ours.learn(150)
    for name, parameter in theirs.policy.named_parameters():
        assert th.equal(parameter, ours.policy.get_parameter(name)), name


def test_no_penalties_is_td3_with_the_smaller_critic() -> None:
    """With both coefficients 0 only the scale of the value is left, which Adam does not see."""
    kwargs = SMALL | {"actor_value": "min", "optimizer_kwargs": {"eps": 1e-30}}
    ours = make(actor_bc_coef=0, critic_bc_coef=0, policy_kwargs=kwargs, kernel="autograd").pretrain(1)
    theirs = OfflineTD3("MlpPolicy", "Pendulum-v1", dataset=DATASET, policy_kwargs=kwargs, seed=0, device="cpu", batch_size=8,
                        learning_rate=1e-3, kernel="autograd").pretrain(1)  # fmt: skip
    for a, b in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert th.allclose(a, b, atol=1e-5)


def test_default_networks() -> None:
    model = ReBRAC("MlpPolicy", "Pendulum-v1", device="cpu")
    assert [layer.out_features for layer in model.actor.mu if isinstance(layer, th.nn.Linear)] == [256, 256, 256, 1]
    assert model.policy.actor_value == "min"
    model = ReBRAC("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs={"net_arch": [7], "actor_value": "mean"})
    assert model.policy.net_arch == [7] and model.policy.actor_value == "mean"
    # A policy of SB3 knows no such option
    model = ReBRAC(td3_policies.MlpPolicy, "Pendulum-v1", device="cpu", policy_kwargs=SMALL)
    assert model.policy.net_arch == [16, 16]


def test_defaults_travel_with_the_file(tmp_path: Path) -> None:
    """Other algorithms build the same networks from it."""
    ReBRAC("MlpPolicy", "Pendulum-v1", device="cpu").save(tmp_path / "model")
    loaded = TD3BC.load(tmp_path / "model", device="cpu")
    assert len([layer for layer in loaded.actor.mu if isinstance(layer, th.nn.Linear)]) == 4
    assert loaded.policy.actor_value == "min"


@pytest.mark.parametrize("given", [None, {}, {"n_critics": 4}, {"net_arch": [8], "actor_value": "mean"}])
def test_load_takes_the_policy_kwargs_of_the_constructor(given: dict[str, Any] | None, tmp_path: Path) -> None:
    """Without the defaults, which the file holds too; with other ones it refuses, as SB3 does."""
    model = ReBRAC("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=given)
    model.save(tmp_path / "model")
    for policy_kwargs in (given, model.policy_kwargs):
        loaded = ReBRAC.load(tmp_path / "model", device="cpu", policy_kwargs=policy_kwargs)
        assert loaded.policy_kwargs == model.policy_kwargs
    with (tmp_path / "model.zip").open("rb") as stream:
        assert ReBRAC.load(stream, device="cpu", policy_kwargs=given).policy_kwargs == model.policy_kwargs
    with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
        ReBRAC.load(tmp_path / "model", device="cpu", policy_kwargs={"n_critics": 3})


def test_load_takes_the_policy_kwargs_of_another_algorithm_too(tmp_path: Path) -> None:
    TD3BC("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=SMALL).save(tmp_path / "model")
    assert ReBRAC.load(tmp_path / "model", device="cpu", policy_kwargs=SMALL).policy.actor_value == "first"


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, part = make().pretrain(15), make().pretrain(6)
    part.save(tmp_path / "model")
    resumed = ReBRAC.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").pretrain(9)
    for a, b in zip(whole.policy.state_dict().values(), resumed.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_a_buffer_without_next_actions_is_refused(tmp_path: Path) -> None:
    """Online only, as a dataset needs our own buffer."""
    make(offline_steps=2).pretrain().save(tmp_path / "model")
    settings: dict[str, Any] = {"env": gym.make("Pendulum-v1"), "dataset": None, "online_critic_bc": 1.0, "batch_size": 4}

    class Plain(ReplayBuffer):
        """SB3's buffer."""

    model = ReBRAC.load(tmp_path / "model", custom_objects={"replay_buffer_class": Plain}, **settings)
    with pytest.raises(ValueError, match="ReBRAC's critics need the data's next actions"):
        model.learn(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor_bc_coef": -0.1}, "`actor_bc_coef` must be a number of at least 0, found -0.1"),
        ({"critic_bc_coef": float("nan")}, "`critic_bc_coef` must be a number of at least 0, found nan"),
        ({"critic_bc_coef": True}, "`critic_bc_coef` must be"),
        ({"online_actor_bc": "slow"}, "`online_actor_bc` is 'slow'"),
        ({"online_critic_bc": -1}, "`online_critic_bc`"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_it_learns() -> None:
    """From the logged data alone: better than random actions, at a level of 0.01."""
    model = make(
        policy_kwargs={"net_arch": [64, 64]}, gamma=0.95, learning_rate=2e-3, batch_size=64, seed=3, actor_bc_coef=0.1
    )
    model.pretrain(1500)
    assert p_value_of_no_better_than_random(model) < 0.01
