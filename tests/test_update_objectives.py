"""Objectives of one's own are stated once, for both kernels."""

from typing import Any

import pytest
import torch as th

from sb3_offline_ft import TD3BC, OfflineToOnlineReplayBuffer
from sb3_offline_ft.update import ActorObjective, Attraction
from tests.hooks import n_updates
from tests.kernels import SMALL, assert_agree, assert_identical, make, relative_distance, state_of

# The objective is stated once


class Timid(TD3BC):
    """A penalty on large actions, not the same for all rows, and another weight of the values."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        penalty = (batch.rewards.abs() * actions.abs()).mean()
        objective = super()._actor_loss(batch, actions, q_values)
        assert isinstance(objective, ActorObjective)
        return objective.loss(actions, q_values) + 3 * penalty + 0.1 * q_values.square().mean()


class Torn(TD3BC):
    """Drawn to several actions, by weights that are numbers and tensors."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective:
        towards = (Attraction(0.7, batch.actions), Attraction(batch.rewards.mean().abs(), th.full_like(actions, 0.5)))
        return ActorObjective(0.3, towards)


class Unweighted(TD3BC):
    """Neither values nor attractions count, so that the policy stays."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective:
        return ActorObjective(0.0)


class Undetached(TD3BC):
    """Weights and a reference that depend on what is given, which an objective takes as constants."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> ActorObjective:
        return ActorObjective(1 / q_values.abs().mean(), (Attraction(actions.abs().mean(), 0.5 * actions),))


class Pessimist(TD3BC):
    """Asks the critics itself; the values that it is given are not used."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        return -th.cat(self.critic(batch.observations, actions), dim=1).min(dim=1).values.mean()


class Cloner(TD3BC):
    """Neither values nor critics."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        return (actions - batch.actions).abs().mean()


class Greedy(TD3BC):
    """Nothing but the values; changes of what it is given stay with it."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        loss = -q_values.mean()
        with th.no_grad():
            actions.fill_(0.3)
            q_values.fill_(1e3)
        return loss


class Biased(TD3BC):
    """Another target, from the same pieces."""

    def _target_q_values(self, batch: Any) -> th.Tensor:
        noise = th.full_like(batch.actions, 0.1)
        q_values = self.updater.kernel.next_q_values(noise)
        return (
            batch.rewards
            + 0.9 * q_values.mean(dim=1, keepdim=True)
            - 0.1 * self.updater.kernel.next_q_values(-noise).amax(1, True)
        )


class Advantaged(TD3BC):
    """Asks the kernel for values of other actions in the middle of the policy's step."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        advantage = self._target_q_values(batch) - q_values.detach()
        return ((1 + advantage.clamp(-1, 1)) * (actions - batch.actions).square()).mean() - 0.1 * q_values.mean()


class Smooth(TD3BC):
    """Calls the actor itself, so that the gradient reaches it on two ways, and has a parameter of its own."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        near = self.actor(batch.observations + 0.1)
        decay = sum((parameter.square().sum() for parameter in self.actor.parameters()), th.zeros(()))
        return -q_values.mean() + 10 * (near - actions).square().mean() + 0.1 * decay


class Selective(TD3BC):
    """Values of some rows count more than those of others, and of some against their sign."""

    def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
        return -(batch.observations[:, :1] * q_values).mean()


class Averse(TD3BC):
    """Takes something off the next values."""

    def _next_value_penalty(self, batch: Any, next_actions: th.Tensor, next_q_values: th.Tensor) -> th.Tensor:
        return 0.1 * next_q_values.abs() + next_actions.square().sum(dim=1, keepdim=True)


class Repeating(TD3BC):
    """Updates the critics after the policy too, with the batch's own actions."""

    def _update_actor(self, batch: Any) -> None:
        super()._update_actor(batch)
        self._update_critic(batch)


@pytest.mark.parametrize(
    "algorithm",
    [Timid, Torn, Unweighted, Undetached, Pessimist, Cloner, Biased, Advantaged, Smooth, Selective, Averse, Repeating],
)
@pytest.mark.parametrize("actor_value", ["first", "mean", "min"])
def test_an_objective_of_ones_own_is_stated_once(algorithm: type[TD3BC], actor_value: str) -> None:
    kwargs = SMALL | {"n_critics": 3, "actor_value": actor_value}
    fast, autograd = (make(algorithm, kernel=kernel, policy_kwargs=kwargs) for kernel in ("fast", "autograd"))
    plain = make(policy_kwargs=kwargs)
    start = state_of(fast)
    for model in (fast, autograd, plain):
        model.pretrain(15)
    assert_agree(fast, autograd, start)
    assert relative_distance(state_of(plain).weights, state_of(fast).weights, start.weights) > 0.01


@pytest.mark.parametrize("kernel", ["fast", "autograd"])
def test_parameters_of_an_objective_get_their_gradients(kernel: str) -> None:
    class Learned(TD3BC):
        def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
            temperature.grad = None
            return (actions - temperature * batch.actions).square().mean() - q_values.mean()

    temperature = th.ones((), requires_grad=True)
    make(Learned, kernel=kernel).pretrain(2)
    assert temperature.grad is not None and float(temperature.grad) != 0


def test_an_objective_may_change_what_it_is_given() -> None:
    """The tensors are its own; the kernel needs neither of them afterwards."""

    class Plain(TD3BC):
        def _actor_loss(self, batch: Any, actions: th.Tensor, q_values: th.Tensor) -> th.Tensor:
            return -q_values.mean()

    changed, plain = make(Greedy, kernel="fast").pretrain(12), make(Plain, kernel="fast").pretrain(12)
    assert_identical(changed, plain)


def test_an_interrupted_call_goes_on_with_the_batches_it_has_not_used() -> None:
    """Batches are drawn ahead, but an interrupt does not lose them."""

    class Interrupted(TD3BC):
        at = 0

        def _update_critic(self, batch: Any) -> None:
            super()._update_critic(batch)
            if self._n_updates == self.at:
                raise KeyboardInterrupt

    whole = make(Interrupted).pretrain(30)
    model = make(Interrupted)
    model.at = 9
    with pytest.raises(KeyboardInterrupt):
        model.pretrain(30)
    assert model.offline_steps_done == 9
    model.pretrain(21)
    assert_identical(model, whole)


def test_a_method_of_the_buffer_may_be_replaced() -> None:
    model, sizes = make(), []
    model.load_offline_data()
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda *args, **kwargs: (sizes.append(args[0]), sample(*args, **kwargs))[1]
    model.pretrain(3)
    assert len(sizes) == 3
    assert_identical(model, make().pretrain(3))


def test_shared_memory_stays_shared() -> None:
    """What another process evaluates is what is trained here."""
    model = make()
    model.policy.share_memory()
    with pytest.warns(UserWarning, match="shared between processes"):
        model.pretrain(4)
    assert all(parameter.is_shared() for parameter in model.policy.parameters())


class Shorter(OfflineToOnlineReplayBuffer):
    """Gives another number of rows than it is asked for."""

    extra = -5

    def sample(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        return super().sample(batch_size + self.extra, *args, **kwargs)


class Longer(Shorter):
    """More of them."""

    extra = 5


@pytest.mark.parametrize("buffer", [Shorter, Longer])
def test_a_buffer_decides_how_many_rows_a_batch_has(buffer: type[OfflineToOnlineReplayBuffer]) -> None:
    """As in SB3: one batch is one gradient step."""
    fast, autograd = (make(kernel=kernel, replay_buffer_class=buffer) for kernel in ("fast", "autograd"))
    start = state_of(fast)
    for model in (fast, autograd):
        model.pretrain(6)
        assert n_updates(model) == 6
    assert_agree(fast, autograd, start)
