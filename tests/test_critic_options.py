"""Ensembles of critics: which of them make the target, and whose value the actor maximises."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from scipy import stats
from stable_baselines3 import TD3

from sb3_offline_ft import TD3BC, OfflineTD3
from sb3_offline_ft.update import ActorObjective, Batch
from tests import hooks
from tests.learning import p_value_of_no_better_than_random

DATASET = "bundled:pendulum-medium"
KERNELS = ["fast", "autograd"]


def make(algorithm: type[OfflineTD3] = OfflineTD3, policy_kwargs: dict[str, Any] | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dataset": DATASET, "seed": 0, "device": "cpu", "learning_rate": 1e-3, "batch_size": 32}
    kwargs = {"net_arch": [16, 16]} | (policy_kwargs or {})
    return algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, **(defaults | settings))


def first_batch(model: OfflineTD3, batch_size: int = 32) -> Any:
    model.load_offline_data()
    model.life_cycle.environment_steps = 0
    return model.draw_batch(batch_size)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_target_is_the_minimum_over_a_random_subset(kernel: str) -> None:
    """Chen et al. 2021, algorithm 1, line 9, recomputed from the same stream of random numbers."""
    model = make(policy_kwargs={"n_critics": 5, "target_critics": 2}, kernel=kernel, gamma=0.9)
    batch = first_batch(model)
    generator = hooks.noise_generator(model)
    targets = [hooks.targets(model, batch) for _ in range(3)]
    subsets = []
    for target in targets:
        noise = th.empty_like(batch.actions).normal_(0, 0.2, generator=generator).clamp(-0.5, 0.5)
        subset = th.randperm(5, generator=generator)[:2].tolist()
        with th.no_grad():
            actions = (model.actor_target(batch.next_observations) + noise).clamp(-1, 1)
            values = th.stack(model.critic_target(batch.next_observations, actions))
        expected = batch.rewards + (1 - batch.dones) * 0.9 * th.minimum(values[subset[0]], values[subset[1]])
        assert th.allclose(target, expected, rtol=1e-4, atol=1e-4)
        assert not th.allclose(target, batch.rewards + (1 - batch.dones) * 0.9 * values.amin(0), rtol=1e-4, atol=1e-4)
        subsets.append(tuple(subset))
    assert len(set(subsets)) > 1, "the subset is drawn anew at each gradient step"


def test_all_pairs_of_target_critics_are_drawn_alike() -> None:
    """A chi-squared test over the 10 pairs of 5 critics; a uniform draw fails it with a probability of 0.001."""
    model = make(policy_kwargs={"n_critics": 5, "target_critics": 2})
    model.life_cycle.environment_steps = 0
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        pair = tuple(sorted(hooks.target_critics(model).tolist()))
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_target_critics_are_td3s_to_the_bit(kernel: str) -> None:
    """Also the stream of random numbers is the same: nothing is drawn if there is nothing to choose."""
    default = make(kernel=kernel).pretrain(12)
    explicit = make(policy_kwargs={"n_critics": 2, "target_critics": 2, "actor_value": "first"}, kernel=kernel).pretrain(12)
    for a, b in zip(default.policy.state_dict().values(), explicit.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


class Watching(OfflineTD3):
    """Keeps the values that the policy is to maximise."""

    def _actor_loss(self, batch: Batch, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective:
        self.seen = [*getattr(self, "seen", []), q_values.detach().clone()]
        return ActorObjective()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("actor_value", ["first", "mean", "min"])
def test_the_actor_follows_the_gradient_of_its_value(kernel: str, actor_value: str) -> None:
    """The gradient of ``-mean(Q(s, pi(s)))`` by autograd, from the definition of each value."""
    model = make(Watching, policy_kwargs={"n_critics": 4, "actor_value": actor_value}, kernel=kernel)
    batch = first_batch(model)
    actor, critic = model.actor, model.critic
    with th.no_grad():
        # So that each critic is the smallest in some rows
        for network, values in zip(critic.q_networks, critic(batch.observations, actor(batch.observations)), strict=True):
            network[-1].bias.sub_(values.mean())
    values = th.cat(critic(batch.observations, actor(batch.observations)), dim=1)
    smallest = values.argmin(dim=1)
    assert len(set(smallest.tolist())) > 1
    expected_value = {"first": values[:, 0], "mean": values.sum(1) / 4, "min": values[th.arange(32), smallest]}[actor_value]
    expected = th.autograd.grad(-expected_value.mean(), list(actor.parameters()))
    hooks.update_actor(model, batch)
    assert th.allclose(model.seen[0][:, 0], expected_value.detach(), atol=1e-5)
    for parameter, gradient in zip(actor.parameters(), expected, strict=True):
        assert th.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_policies_of_sb3_keep_td3s_critics(tmp_path: Path) -> None:
    """Their classes know neither option."""
    TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, learning_starts=10, seed=0).learn(20).save(
        tmp_path / "sb3"
    )
    models = [
        OfflineTD3.load(tmp_path / "sb3", env=gym.make("Pendulum-v1"), dataset=DATASET, batch_size=16, kernel=kernel)
        for kernel in KERNELS
    ]
    weights = []
    for model in models:
        model.set_random_seed(0)
        model.pretrain(4)
        weights.append(th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]))
    assert not hasattr(models[0].policy, "actor_value")
    assert th.allclose(*weights, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_pretraining_with_an_ensemble_resumes_to_the_bit(kernel: str, tmp_path: Path) -> None:
    kwargs = {"n_critics": 4, "target_critics": 2, "actor_value": "mean"}
    whole, part = (make(TD3BC, policy_kwargs=kwargs, kernel=kernel) for _ in range(2))
    whole.pretrain(15)
    part.pretrain(6).save(tmp_path / "model")
    resumed = TD3BC.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").pretrain(9)
    assert len(resumed.critic.q_networks) == 4
    assert (resumed.policy.target_critics, resumed.policy.actor_value) == (2, "mean")
    for a, b in zip(whole.policy.state_dict().values(), resumed.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_online_the_subset_comes_from_torchs_generator() -> None:
    """As SB3's target noise does: the same seed gives the same run, another seed another one."""

    def run(seed: int) -> th.Tensor:
        kwargs = {"n_critics": 4, "target_critics": 2}
        model = make(policy_kwargs=kwargs, offline_steps=4, warmup_steps=0, batch_size=4)
        th.manual_seed(seed)
        state = hooks.noise_generator(model).get_state()
        model.learn(0)
        after = hooks.noise_generator(model).get_state()
        assert not th.equal(state, after)
        model.learn(12, reset_num_timesteps=False)
        assert th.equal(after, hooks.noise_generator(model).get_state())
        return th.cat([parameter.detach().flatten() for parameter in model.critic.parameters()])

    assert th.equal(run(3), run(3))
    assert not th.equal(run(3), run(4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_critics": 0}, "`n_critics` must be a whole number of at least 1, found 0"),
        ({"target_critics": 0}, "`target_critics` must be a whole number of at least 1, found 0"),
        ({"target_critics": 3}, "`target_critics` must be at most `n_critics`, found 3 of 2"),
        ({"target_critics": 1.5}, "`target_critics` must be a whole number"),
        ({"actor_value": "max"}, "`actor_value` must be one of 'first', 'mean', 'min', found 'max'"),
        ({"actor_value": None}, "`actor_value` must be one of"),
    ],
)
def test_bad_options_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(policy_kwargs=kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"n_critics": 5, "target_critics": 2, "actor_value": "mean"}, {"actor_value": "min"}], ids=["REDQ", "min"]
)
def test_it_learns(kwargs: dict[str, Any]) -> None:
    """From the logged data alone: better than random actions, at a level of 0.01."""
    model = make(TD3BC, {"net_arch": [64, 64]} | kwargs, gamma=0.95, learning_rate=2e-3, batch_size=64, seed=2)
    assert p_value_of_no_better_than_random(model) > 0.01, "the test would not notice that nothing was learned"
    model.pretrain(1500)
    assert p_value_of_no_better_than_random(model) < 0.01


def test_a_subset_is_less_pessimistic_than_all() -> None:
    """The expected minimum over 2 of 10 critics is above that over all 10, in the same state of the same networks."""
    model = make(policy_kwargs={"n_critics": 10, "target_critics": 2})
    batch = first_batch(model, 64)
    few = th.stack([hooks.targets(model, batch) for _ in range(30)]).mean()
    model.policy.target_critics = None
    every = th.stack([hooks.targets(model, batch) for _ in range(30)]).mean()
    assert float(few) > float(every)
    assert np.isfinite(float(every))
