"""Gradient steps of MLPs without autograd: written-out gradients on memory that is kept."""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch as th
from stable_baselines3.td3.policies import TD3Policy

from sb3_offline_ft.policies.layers import NormalizedFlattenExtractor
from sb3_offline_ft.update.adam import FlatAdam
from sb3_offline_ft.update.kernel import ActorLoss, ActorObjective, Batch, UpdateKernel, actor_value_of, batches_of
from sb3_offline_ft.update.mlp import MlpPass, Scratch, layer_tensors
from sb3_offline_ft.update.networks import (
    ALIGNMENT,
    FlatParameters,
    ModuleWatch,
    NotSupportedError,
    PolicyNetworks,
    check_trainable,
    networks_of,
    read_policy,
)
from sb3_offline_ft.update.products import choose_products


class _Inputs:
    """What the networks are given: features with actions behind them, of the observations and of the next ones."""

    def __init__(self, memory: th.Tensor, n_features: int) -> None:
        # ``(2, n_rows, n_features + action_dim)``
        self.input, self.next_input = memory.unbind()
        self.features, self.next_features = memory[:, :, :n_features].unbind()
        self.actions, self.next_actions = memory[:, :, n_features:].unbind()


class _Passes:
    """The passes of all networks at one batch size."""

    def __init__(self, kernel: "FastKernel", batch_size: int) -> None:
        self.batch_size = batch_size
        networks, products, like = kernel.networks, kernel.products, kernel.actor_parameters.values
        actor, actor_target, critic, critic_target = (
            layer_tensors(layers, parameters, parameters.values)
            for layers, parameters in zip(networks, kernel.parameters, strict=True)
        )
        actor_gradients = layer_tensors(networks.actor, kernel.actor_parameters, kernel.actor_adam.gradients)
        critic_gradients = layer_tensors(networks.critic, kernel.critic_parameters, kernel.critic_adam.gradients)
        # The actor's results are needed while the first critic's gradient is computed, those of different critics are not
        scratch, actor_scratch = Scratch(batch_size, like), Scratch(batch_size, like)
        self.actor = MlpPass(networks.actor, 0, actor[0], actor_gradients[0], actor_scratch, products)
        self.actor_target = MlpPass(networks.actor_target, 0, actor_target[0], None, actor_scratch, products)
        self.critics = [
            MlpPass(networks.critic, index, tensors, gradients, scratch, products)
            for index, (tensors, gradients) in enumerate(zip(critic, critic_gradients, strict=True))
        ]
        self.critics_target = [
            MlpPass(networks.critic_target, index, tensors, None, scratch, products)
            for index, tensors in enumerate(critic_target)
        ]
        # Without gradients of parameters, for the policy's step
        self.critics_for_actor = [
            MlpPass(networks.critic, index, tensors, None, scratch, products) for index, tensors in enumerate(critic)
        ]
        self.error = like.new_empty(batch_size, 1)


class FastKernel(UpdateKernel):
    """
    Gradient steps for MLP actors and critics, with LayerNorm and ensembles of any size, trained by Adam.

    It agrees with :class:`AutogradKernel` up to rounding. The parameters stay the policy's own, in one piece of memory for
    each network, and the moments stay in the optimizers.

    :param policy: The policy
    :param precision: ``"float32"``, or ``"bfloat16"`` for the products of hidden layers; parameters, sums, normalization,
        losses and the optimizers' state are float32 in both
    :raises NotSupportedError: The policy or an optimizer is of another kind
    """

    name: ClassVar[str] = "fast"
    needs_training_mode: ClassVar[bool] = False

    def __init__(self, policy: TD3Policy, precision: str = "float32") -> None:
        super().__init__(policy)
        self.precision = precision
        self._statistics_version = -1
        self.networks = self.check(policy)
        self._check_normalizers()
        self.parameters = [FlatParameters(layers) for layers in self.networks]
        self.actor_parameters, self._actor_target, self.critic_parameters, self._critic_target = self.parameters
        self.actor_adam = FlatAdam(policy.actor.optimizer, self.actor_parameters)
        self.critic_adam = FlatAdam(policy.critic.optimizer, self.critic_parameters)
        self.products = choose_products(precision, self.actor_parameters.values.device)
        self._watch = ModuleWatch(module for network in networks_of(policy) for module in network.modules())
        self._is_disturbed = False
        self._passes: _Passes | None = None
        self._n_features = self.networks.actor[0].linears[0].in_features
        self._width = self.networks.critic[0].linears[0].in_features
        self._action_columns = slice(self._n_features, self._width)
        self._memory = self.actor_parameters.values.new_zeros(2, 0, 1)
        self._inputs: dict[int, tuple[_Inputs, list[_Inputs]]] = {}

    @staticmethod
    def check(policy: TD3Policy) -> PolicyNetworks:
        """
        Check whether the gradient steps of a policy can be computed here; changes nothing.

        :param policy: The policy
        :return: Its layers
        :raises NotSupportedError: They cannot
        """
        networks = read_policy(policy)
        for network, layers in ((policy.actor, networks.actor), (policy.critic, networks.critic)):
            parameters = [parameter for layer in layers for group in layer.parameter_groups for parameter in group]
            check_trainable(parameters)
            problem = FlatAdam.problem(network.optimizer) or FlatAdam.problem_of_state(network.optimizer, parameters)
            if problem is not None:
                raise NotSupportedError(problem)
        return networks

    @property
    def is_current(self) -> bool:
        """Whether the policy still is what was read: its modules, its parameters and where they are kept."""
        return (
            self.policy.actor.optimizer is self.actor_adam.optimizer
            and self.policy.critic.optimizer is self.critic_adam.optimizer
            and self._watch.is_unchanged
            and all([parameters.is_current for parameters in self.parameters])
        )

    def prepare(self) -> None:
        """
        Look at what may have changed since the last gradient step: state of the optimizers, statistics, frozen parameters.

        :raises NotSupportedError: It is something that only autograd can do
        """
        for adam, parameters in ((self.actor_adam, self.actor_parameters), (self.critic_adam, self.critic_parameters)):
            problem = FlatAdam.problem(adam.optimizer)
            if problem is not None:
                raise NotSupportedError(problem)
            check_trainable(parameters.parameters)
            adam.attach()
        self._check_normalizers()

    def _check_normalizers(self) -> None:
        extractors = [network.features_extractor for network in networks_of(self.policy)]
        normalizers = [module for module in extractors if isinstance(module, NormalizedFlattenExtractor)]
        version = sum(module.observation_mean._version + module.observation_std._version for module in normalizers)
        if version == self._statistics_version:
            return
        if normalizers and len(normalizers) != len(extractors):
            raise NotSupportedError("the networks do not all normalize observations")
        for module in normalizers[1:]:
            same = th.equal(module.observation_mean, normalizers[0].observation_mean)
            if not same or not th.equal(module.observation_std, normalizers[0].observation_std):
                raise NotSupportedError("the networks normalize observations by different statistics")
        self._statistics_version = version

    @th.no_grad()
    def batches(self, rows: Batch, batch_size: int) -> Iterator[Batch]:
        if self._passes is None or self._passes.batch_size != batch_size:
            self._inputs.clear()
            self._passes = _Passes(self, batch_size)
        n_rows = len(rows.actions)
        if n_rows not in self._inputs:
            self._inputs[n_rows] = self._new_inputs(n_rows, batch_size)
        whole, parts = self._inputs[n_rows]
        self._write_features(rows.observations, whole.features)
        self._write_features(rows.next_observations, whole.next_features)
        whole.actions.copy_(rows.actions)
        for batch, part in zip(batches_of(rows, batch_size), parts, strict=True):
            self._now, self._batch = part, batch
            yield batch

    def _new_inputs(self, n_rows: int, batch_size: int) -> tuple["_Inputs", list["_Inputs"]]:
        if n_rows > self._memory.shape[1]:
            # Rows begin at a cache line
            width = math.ceil(self._width / ALIGNMENT) * ALIGNMENT
            self._memory = self.actor_parameters.values.new_zeros(2, n_rows, width)
            self._inputs.clear()
        memory = self._memory[:, :n_rows, : self._width]
        parts = [_Inputs(memory[:, start : start + batch_size], self._n_features) for start in range(0, n_rows, batch_size)]
        return _Inputs(memory, self._n_features), parts

    def _write_features(self, observations: th.Tensor, features: th.Tensor) -> None:
        extractor = self.policy.actor.features_extractor
        observations = observations.flatten(1)
        if isinstance(extractor, NormalizedFlattenExtractor):
            th.sub(observations, extractor.observation_mean, out=features)
            features.div_(extractor.observation_std)
        else:
            features.copy_(observations)

    @th.no_grad()
    def next_q_values(self, noise: th.Tensor, critics: th.Tensor | None = None) -> th.Tensor:
        passes, now = self._passes, self._now
        assert passes is not None
        self._is_disturbed = True
        self.next_actions = th.add(passes.actor_target.forward(now.next_features), noise, out=now.next_actions).clamp_(-1, 1)
        asked = passes.critics_target
        # Elsewhere than on a CPU, asking all is cheaper than waiting for the indices
        if critics is not None and critics.device.type == "cpu":
            asked, critics = [asked[index] for index in critics.tolist()], None
        q_values = th.empty(len(noise), len(asked), device=noise.device)
        for index, critic in enumerate(asked):
            q_values[:, index : index + 1] = critic.forward(now.next_input)
        return q_values if critics is None else q_values[:, critics]

    @th.no_grad()
    def q_values_of_next(self, actions: th.Tensor) -> th.Tensor:
        passes, now = self._passes, self._now
        assert passes is not None
        self._is_disturbed = True
        now.next_actions.copy_(actions)
        # Copies, since the critics take turns in one memory
        return th.cat([critic.forward(now.next_input).clone() for critic in passes.critics_target], dim=1)

    @th.no_grad()
    def update_critics(self, targets: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
        passes = self._passes
        assert passes is not None
        error, scale = passes.error, 1 / len(targets)
        flat_error = error.view(-1)
        loss = th.zeros((), device=targets.device)
        for index, critic in enumerate(passes.critics):
            own = targets if targets.shape[1] == 1 else targets[:, index : index + 1]
            th.sub(critic.forward(self._now.input), own, out=error)
            if weights is None:
                loss += th.dot(flat_error, flat_error)
            else:
                squares = error * error
                error.mul_(weights[:, index : index + 1])
                loss += th.dot(squares.view(-1), weights[:, index])
            critic.backward(error.mul_(2 * scale))
        self.critic_adam.step()
        return loss.mul_(scale)

    @th.no_grad()
    def update_actor(self, actor_loss: ActorLoss) -> th.Tensor:
        passes, now = self._passes, self._now
        assert passes is not None
        # Copies, since an algorithm may keep what it is given
        actions = now.actions.copy_(passes.actor.forward(now.features)).clone()
        first = actor_value_of(self.policy) == "first"
        if first:
            q_values = passes.critics_for_actor[0].forward(now.input).clone()
        else:
            q_values, per_value = self._value_of_all_critics()
        self._is_disturbed = False
        with th.enable_grad():
            objective = actor_loss(actions.requires_grad_(), q_values.requires_grad_())
        if isinstance(objective, ActorObjective):
            loss, through_q, direct = _gradients(objective, actions.detach(), q_values.detach())
            beside = None
        else:
            self.actor_adam.gradients.zero_()
            objective.backward()  # type: ignore[no-untyped-call]
            through_q = th.zeros_like(q_values) if q_values.grad is None else q_values.grad
            loss, direct = objective.detach(), actions.grad
            # What reaches the policy on other ways, such as a second call of the actor
            beside = self.actor_adam.gradients.clone()
        if self._is_disturbed:
            # The objective asked for the values of other actions, in the same memory
            passes.actor.forward(now.features)
            if first:
                passes.critics_for_actor[0].forward(now.input)
        if first:
            gradient = passes.critics_for_actor[0].backward(through_q, self._action_columns)
        else:
            gradient = per_value.mul_(through_q)
        if direct is not None:
            gradient += direct
        passes.actor.backward(gradient)
        if beside is not None:
            self.actor_adam.gradients += beside
        self.actor_adam.step()
        now.actions.copy_(self._batch.actions)
        return loss

    def _value_of_all_critics(self) -> tuple[th.Tensor, th.Tensor]:
        """
        The mean or the smallest of the critics' values and its gradient with respect to the actions, row by row.

        Each row of a value depends on the same row of the actions alone, so that the chain rule is a product by rows, and the
        critics can take turns in one memory before the objective is known.
        """
        passes, now = self._passes, self._now
        assert passes is not None
        results = []
        for critic in passes.critics_for_actor:
            q_values = critic.forward(now.input).clone()
            results.append((q_values, critic.backward(th.ones_like(q_values), self._action_columns)))
        all_values = th.cat([q_values for q_values, _ in results], dim=1)
        if actor_value_of(self.policy) == "mean":
            value = all_values.mean(dim=1, keepdim=True)
            weights = th.full_like(all_values, 1 / len(results))
        else:
            value = all_values.amin(dim=1, keepdim=True)
            smallest = all_values == value
            # Critics that agree share the gradient, as in torch's `amin`
            weights = smallest / smallest.sum(dim=1, keepdim=True)
        per_value = th.zeros_like(results[0][1])
        for index, (_, gradient) in enumerate(results):
            per_value.addcmul_(gradient, weights[:, index : index + 1])
        return value, per_value

    @th.no_grad()
    def update_targets(self, tau: float, update_actor: bool) -> None:
        self._critic_target.values.lerp_(self.critic_parameters.values, tau)
        if update_actor:
            self._actor_target.values.lerp_(self.actor_parameters.values, tau)


def _gradients(
    objective: ActorObjective, actions: th.Tensor, q_values: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
    """The loss, its gradient with respect to the values, and that with respect to the actions as such."""
    loss = -q_values.mean() * objective.value_weight
    through_q = th.full_like(q_values, -1 / len(q_values)).mul_(objective.value_weight)
    attraction: th.Tensor | None = None
    for term in objective.attractions:
        difference = actions - term.reference
        flat = difference.view(-1)
        loss = loss + term.weight * (th.dot(flat, flat) / len(flat))
        part = difference.mul_(term.weight * (2 / len(flat)))
        attraction = part if attraction is None else attraction.add_(part)
    return loss, through_q, attraction
