"""The fast kernel's parts: gradients, Adam and memory."""

import copy
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_offline_ft.update import ActorObjective, FastKernel
from sb3_offline_ft.update.adam import FlatAdam
from sb3_offline_ft.update.mlp import MlpPass, Scratch, layer_tensors
from sb3_offline_ft.update.networks import FlatParameters, NotSupportedError, read_layers
from sb3_offline_ft.update.products import NATIVE
from tests.kernels import (
    SMALL,
    make,
)

# Parts


def sequential(
    n_in: int, widths: list[int], n_out: int, layer_norm: bool, activation: type[nn.Module], seed: int
) -> nn.Module:
    th.manual_seed(seed)
    layers: list[nn.Module] = []
    for size, following in zip([n_in, *widths], widths, strict=False):
        layers += [nn.Linear(size, following), *([nn.LayerNorm(following)] if layer_norm else []), activation()]
    layers.append(nn.Linear([n_in, *widths][-1], n_out))
    if n_out > 1:
        layers.append(nn.Tanh())
    network = nn.Sequential(*layers)
    with th.no_grad():
        for parameter in network.parameters():
            # Gains and shifts that matter
            parameter.add_(0.2 * th.randn_like(parameter))
    return network


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("widths", [[], [7], [12, 5, 9]], ids=str)
@pytest.mark.parametrize("n_out", [1, 4])
def test_gradients_are_those_of_autograd(layer_norm: bool, activation: type[nn.Module], widths: list[int], n_out: int) -> None:
    """In double precision, where rounding explains nothing: parameters and any columns of the input, of two networks."""
    networks = [sequential(6, widths, n_out, layer_norm, activation, seed) for seed in range(2)]
    layers = read_layers(networks, "the network")
    parameters = FlatParameters(layers)
    values, gradients = parameters.values.double(), parameters.zeros().double()
    scratch = Scratch(10, values)
    x = th.randn(10, 6, dtype=th.float64)
    for i, (network, tensors, written) in enumerate(
        zip(networks, layer_tensors(layers, parameters, values), layer_tensors(layers, parameters, gradients), strict=True)
    ):
        exact = copy.deepcopy(network).double()
        inputs = x.clone().requires_grad_()
        output = exact(inputs)
        weights = th.randn(10, n_out, dtype=th.float64)
        expected = th.autograd.grad((weights * output).sum(), [inputs, *exact.parameters()])
        for columns in (None, slice(0, 6), slice(2, 5)):
            gradients.fill_(7.0)
            computed = MlpPass(layers, i, tensors, written, scratch, NATIVE)
            assert th.allclose(computed.forward(x), output, rtol=1e-12, atol=1e-12)
            found = computed.backward(weights.clone(), columns)
            if columns is not None:
                assert th.allclose(found, expected[0][:, columns], rtol=1e-10, atol=1e-12)
            views = dict(zip(map(id, parameters.parameters), parameters.views(gradients), strict=True))
            for parameter, gradient in zip(network.parameters(), expected[1:], strict=True):
                assert th.allclose(views[id(parameter)], gradient, rtol=1e-10, atol=1e-12)
            others = [views[id(parameter)] for other in networks[:i] + networks[i + 1 :] for parameter in other.parameters()]
            assert all(bool((gradient == 7.0).all()) for gradient in others)
        # Without gradients of parameters, as the policy's step asks for
        only = MlpPass(layers, i, tensors, None, scratch, NATIVE)
        only.forward(x)
        gradients.fill_(7.0)
        found = only.backward(weights.clone(), slice(2, 5))
        assert th.allclose(found, expected[0][:, 2:5], rtol=1e-10, atol=1e-12)
        assert bool((gradients == 7.0).all())


def flat_adam(sizes: list[tuple[int, int]], **kwargs: Any) -> tuple[FlatAdam, FlatParameters]:
    network = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    with th.no_grad():
        for parameter in network.parameters():
            # So that what is compared is the distance moved, not the rounding of what it is added to
            parameter.zero_()
    parameters = FlatParameters(read_layers([network], "the network"))
    return FlatAdam(th.optim.Adam(network.parameters(), **kwargs), parameters), parameters


@pytest.mark.parametrize(
    "kwargs", [{}, {"betas": (0.5, 0.99), "eps": 1e-3}, {"weight_decay": 0.1}], ids=["default", "other", "decay"]
)
def test_adam_is_as_exact_as_torchs(kwargs: dict[str, Any]) -> None:
    """Against double precision over 60 steps, with gradients of very different sizes: at most twice torch's own error."""
    sizes = [(9, 40), (40, 7)]
    ours, parameters = flat_adam(sizes, lr=1e-3, **kwargs)
    theirs = [th.zeros_like(parameter).requires_grad_() for parameter in parameters.parameters]
    exact = [th.zeros_like(parameter, dtype=th.float64).requires_grad_() for parameter in parameters.parameters]
    optimizers = [
        th.optim.Adam(theirs, lr=1e-3, foreach=False, **kwargs),
        th.optim.Adam(exact, lr=1e-3, foreach=False, **kwargs),
    ]
    generator = th.Generator().manual_seed(0)
    scales = [10 ** (12 * th.rand(parameter.shape, generator=generator) - 9) for parameter in theirs]
    ours.attach()
    for _ in range(60):
        for live, single, double, scale in zip(parameters.parameters, theirs, exact, scales, strict=True):
            gradient = scale * th.randn(scale.shape, generator=generator)
            assert live.grad is not None
            live.grad.copy_(gradient)
            single.grad, double.grad = gradient, gradient.double()
        ours.step()
        for optimizer in optimizers:
            optimizer.step()

    def error(found: list[th.Tensor]) -> float:
        return max(
            float((f.detach().double() - e.detach()).abs().div(e.detach().abs() + 1e-6).max())
            for f, e in zip(found, exact, strict=True)
        )

    # Where torch's own bias corrections are exact too, both errors are a few roundings
    assert error(parameters.parameters) <= max(2 * error(theirs), 1e-6)
    assert {float(entry["step"]) for entry in ours.optimizer.state.values()} == {60.0}


def test_adam_refuses_what_it_cannot_go_on_from() -> None:
    ours, parameters = flat_adam([(3, 4)])
    first, second = parameters.parameters
    entries = [
        {"step": th.tensor(3.0), "exp_avg": th.ones_like(parameter), "exp_avg_sq": th.ones_like(parameter)}
        for parameter in (first, second)
    ]
    ours.optimizer.state.update({first: entries[0]})
    with pytest.raises(NotSupportedError, match="not that of Adam for all parameters"):
        ours.attach()
    ours.optimizer.state.update({first: entries[0], second: entries[1] | {"step": th.tensor(4.0)}})
    with pytest.raises(NotSupportedError, match="different numbers of steps"):
        ours.attach()
    ours.optimizer.state.update({second: entries[1]})
    ours.attach()
    ours.gradients.fill_(1.0)
    ours.step()
    assert {float(entry["step"]) for entry in ours.optimizer.state.values()} == {4.0}
    assert float(ours.optimizer.state[second]["exp_avg"][0]) == pytest.approx(1.0)


def test_padding_between_layers_stays_zero() -> None:
    """Parameters are in one piece of memory whose gaps belong to nobody; weight decay and Adam find zeros there."""
    model = make(policy_kwargs={**SMALL, "optimizer_kwargs": {"weight_decay": 0.1}})
    model.load_offline_data()
    kernel = FastKernel(model.policy)
    kernel.prepare()
    for _ in kernel.batches(model.replay_buffer.sample_batches(6, 16), 16):
        kernel.update_critics(th.ones(16, 1))
        kernel.update_actor(lambda actions, q_values: ActorObjective())
        kernel.update_targets(0.1, update_actor=True)
    for parameters in kernel.parameters:
        used = sum(parameter.numel() for parameter in parameters.parameters)
        assert parameters.size > used
        memory = parameters.values.clone()
        for view in parameters.views(memory):
            view.zero_()
        assert not memory.any()


def test_the_critics_loss_is_that_of_the_batch() -> None:
    model = make()
    model.load_offline_data()
    kernel = FastKernel(model.policy)
    kernel.prepare()
    batch = next(kernel.batches(model.replay_buffer.sample(16), 16))
    direct = model.critic(batch.observations, batch.actions)
    losses = [float(((values.detach() - 1) ** 2).mean()) for values in direct]
    assert float(kernel.update_critics(th.ones(16, 1))) == pytest.approx(sum(losses), rel=1e-5)


def test_moments_of_dead_units_do_not_become_subnormal() -> None:
    """Subnormal numbers make Adam several times slower; clearing them before changes no parameter, to the bit."""
    cleared, parameters = flat_adam([(40, 30)])
    cleared.attach()
    flat_parameter = parameters.parameters[0]
    own = nn.Parameter(flat_parameter.detach().clone())
    torch_adam = th.optim.Adam([own], lr=1e-3, fused=True)
    generator = th.Generator().manual_seed(0)
    for step in range(1200):
        gradient = th.randn(own.shape, generator=generator) if step < 20 else th.zeros_like(own)
        cleared.gradients.zero_()
        parameters.views(cleared.gradients)[0].copy_(gradient)
        cleared.step()
        own.grad = gradient
        torch_adam.step()
    assert th.equal(flat_parameter, own)
    subnormal = 1.1754944e-38
    faded = torch_adam.state[own]["exp_avg"]
    assert bool(((faded != 0) & (faded.abs() < subnormal)).any()), "without clearing there are subnormal numbers"
    mine = cleared.optimizer.state[flat_parameter]
    for moment in (mine["exp_avg"], mine["exp_avg_sq"]):
        assert not bool(((moment != 0) & (moment.abs() < subnormal)).any())
    assert bool((mine["exp_avg_sq"] > 0).all())
