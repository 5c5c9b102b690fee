"""Which library computes the products of an update, and in which precision."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_offline_ft import TD3BC
from sb3_offline_ft.update import products
from sb3_offline_ft.update.products import LARGE, NATIVE, Products, choose_products
from tests.conftest import REPOSITORY
from tests.kernels import kernel_of

CPU = th.device("cpu")
NO_UNITS = "ignore:`update_precision='bfloat16'`. this CPU has no units for bfloat16"
needs_switch = pytest.mark.skipif(not products.has_onednn_switch(), reason="this torch cannot be told to use oneDNN")
needs_avx512 = pytest.mark.skipif(not products.has_avx512(), reason="without AVX-512 there is nothing to choose")
Patch = Callable[[str, Any], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Lets what is known of the CPU be something else."""
    return lambda name, value: monkeypatch.setattr(products, name, lambda: value)


@pytest.fixture
def precision() -> Iterator[Any]:
    """torch's switch, which is set back after the test."""
    matmul: Any = th.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def make(**settings: Any) -> Any:
    defaults: dict[str, Any] = {"dataset": "bundled:pendulum-medium", "seed": 0, "device": "cpu", "batch_size": 128}
    defaults |= {"policy_kwargs": {"net_arch": [128, 128]}, "learning_rate": 1e-3}
    return TD3BC("MlpPolicy", "Pendulum-v1", **(defaults | settings))


# The rule


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", "arm64"])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_the_choice_is_made_by_rule(pretend: Patch, avx512: bool, vendor: str, single: bool, switch: bool) -> None:
    """oneDNN in float32 for AMD's CPUs with AVX-512 alone, and only where its products are float32's."""
    for name, value in (("cpu_vendor", vendor), ("has_avx512", avx512), ("has_onednn_switch", switch)):
        pretend(name, value)
    pretend("onednn_is_single_precision", single and switch)
    pretend("has_bfloat16_units", True)
    by_onednn = vendor == "AuthenticAMD" and avx512 and single and switch
    assert choose_products("float32", CPU).name == ("oneDNN float32" if by_onednn else NATIVE.name)
    assert choose_products("bfloat16", CPU).name == ("oneDNN bfloat16" if switch and not single else "bfloat16 copies")
    cuda = th.device("cuda")
    assert choose_products("float32", cuda) is NATIVE
    assert choose_products("bfloat16", cuda).name == "bfloat16 copies"


def test_a_cpu_without_units_is_said(pretend: Patch) -> None:
    pretend("has_onednn_switch", False)
    pretend("has_bfloat16_units", False)
    with pytest.warns(UserWarning, match="this CPU has no units for bfloat16"):
        choose_products("bfloat16", CPU)
    # Of a GPU it is not known, nor does the CPU matter
    choose_products("bfloat16", th.device("cuda"))


# The products themselves


def relative_errors(chosen: Products) -> list[float]:
    """Of a product of plain factors, and of one with a transposed weight, as in a pass."""
    generator = th.Generator().manual_seed(1)
    a, b = (th.randn(*shape, generator=generator) for shape in ((80, 112), (112, 96)))
    exact, errors = a.double() @ b.double(), []
    for factor in (b, b.mT.contiguous().mT):
        out = th.full((80, 96), 7.0)
        chosen.multiply(a, factor, out=out)
        errors.append(float((out - exact).norm() / exact.norm()))
    return errors


def test_float32_is_float32() -> None:
    """By torch's default, and by what is chosen on this CPU."""
    for chosen in (NATIVE, choose_products("float32", CPU)):
        assert chosen.is_single_precision
        assert max(relative_errors(chosen)) < 1e-6


@pytest.mark.filterwarnings(NO_UNITS)
@pytest.mark.parametrize(
    ("name", "by_onednn"),
    [
        ("bfloat16 copies", False),
        pytest.param("oneDNN bfloat16", True, marks=needs_switch),
    ],
)
def test_bfloat16_is_bfloat16(pretend: Patch, name: str, by_onednn: bool) -> None:
    """Results err as factors of eight bits do, and no more."""
    really = by_onednn and not products.onednn_is_single_precision()
    pretend("has_onednn_switch", by_onednn)
    pretend("onednn_is_single_precision", False)
    chosen = choose_products("bfloat16", CPU)
    assert chosen.name == name
    # Where the CPU has no such units, oneDNN computes in float32 in spite of the switch
    low, high = (1e-4, 1e-2) if really or not by_onednn else (0.0, 1e-6)
    assert all(low <= error <= high for error in relative_errors(chosen))


@needs_switch
@pytest.mark.parametrize("own", ["ieee", "tf32", "bf16", "none"])
def test_the_switch_is_put_back(pretend: Patch, precision: Any, own: str) -> None:
    """What a user has set stays, after a product, after one that fails, and after training."""
    pretend("onednn_is_single_precision", False)
    precision.fp32_precision = own
    kept = precision.fp32_precision
    chosen = choose_products("bfloat16", CPU)
    assert chosen.name == "oneDNN bfloat16"
    relative_errors(chosen)
    assert precision.fp32_precision == kept
    with pytest.raises(RuntimeError):
        chosen.multiply(th.zeros(2, 3), th.zeros(2, 3), out=th.zeros(2, 3))
    assert precision.fp32_precision == kept
    model = make(update_precision="bfloat16").pretrain(2)
    assert kernel_of(model).products.name == "oneDNN bfloat16"
    assert precision.fp32_precision == kept


@needs_switch
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_switch_is_put_back_after_an_interrupt(
    pretend: Patch, precision: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it comes while a product is computed, the user's own products are what they were."""

    def interrupted(*args: Any, **kwargs: Any) -> th.Tensor:
        if precision.fp32_precision == "bf16":
            raise error
        return multiply(*args, **kwargs)

    multiply = th.mm
    pretend("onednn_is_single_precision", False)
    before = precision.fp32_precision
    a, b = th.randn(128, 128), th.randn(128, 128)
    product = a @ b
    model = TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", update_precision="bfloat16", seed=0,
                        device="cpu", policy_kwargs={"net_arch": [128, 128]}, batch_size=128)  # fmt: skip
    monkeypatch.setattr(products.th, "mm", interrupted)
    with pytest.raises(error):
        model.pretrain(2)
    monkeypatch.undo()
    assert precision.fp32_precision == before
    assert th.equal(a @ b, product)


ON_AMD = """
import torch as th
from sb3_offline_ft import TD3BC
from sb3_offline_ft.update import products

products.cpu_vendor = lambda: "AuthenticAMD"
th.set_num_threads(1)
models = [
    TD3BC("MlpPolicy", "Pendulum-v1", dataset="bundled:pendulum-medium", seed=1, device="cpu", kernel=kernel, batch_size=256,
          policy_kwargs={"net_arch": [256, 256]})
    for kernel in ("fast", "autograd")
]
start = th.cat([p.detach().double().flatten() for p in models[0].policy.parameters()])
for model in models:
    model.pretrain(40)
fast, autograd = (th.cat([p.detach().double().flatten() for p in model.policy.parameters()]) for model in models)
print(models[0].updater.kernel.products.name)
print(float((fast - autograd).norm() / (autograd - start).norm()))
print(th.backends.mkldnn.matmul.fp32_precision)
"""


@needs_switch
@needs_avx512
def test_on_amds_cpus_onednn_computes_in_float32() -> None:
    """Without its units for bfloat16, which AMD's CPUs lack, oneDNN is float32 in spite of the switch; autograd agrees."""
    variables = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_AMD], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    name, distance, precision = process.stdout.split("\n")[:3]
    assert name == "oneDNN float32"
    assert 0 < float(distance) <= 2e-5
    assert precision == th.backends.mkldnn.matmul.fp32_precision


# Learning in bfloat16


def gradients_of(model: Any) -> dict[str, th.Tensor]:
    """Those of the last step, by network."""
    return {
        name: th.cat([parameter.grad.flatten() for parameter in getattr(model, name).parameters()]).clone()
        for name in ("actor", "critic")
    }


@pytest.mark.filterwarnings(NO_UNITS)
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_switch)], ids=["copies", "oneDNN"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_bfloat16_learns_nearly_the_same(pretend: Patch, onednn: bool, layer_norm: bool) -> None:
    """Only products are in bfloat16: what is kept is float32, and gradients point where those of float32 do."""
    kwargs = {"net_arch": [128, 128], "layer_norm": layer_norm}
    exact = make(kernel="fast", policy_kwargs=kwargs, policy_delay=1).pretrain(1)
    differs = not onednn or not products.onednn_is_single_precision()
    pretend("has_onednn_switch", onednn)
    pretend("onednn_is_single_precision", False)
    model = make(update_precision="bfloat16", policy_kwargs=kwargs, policy_delay=1).pretrain(1)
    assert kernel_of(model).products.name == ("oneDNN bfloat16" if onednn else "bfloat16 copies")
    for name, found in gradients_of(model).items():
        expected = gradients_of(exact)[name]
        assert float(nn.functional.cosine_similarity(found, expected, dim=0)) > 0.99, name
        assert bool((found != expected).any()) >= differs, name
    model.pretrain(5)
    for network in (model.actor, model.critic):
        for parameter in network.parameters():
            entry = network.optimizer.state[parameter]
            assert {parameter.dtype, parameter.grad.dtype, *(value.dtype for value in entry.values())} == {th.float32}
            assert bool(parameter.isfinite().all())
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())


@pytest.mark.filterwarnings(NO_UNITS)
def test_bfloat16_is_for_large_products_only(pretend: Patch) -> None:
    """Layers narrower than what pays are computed as ever."""
    pretend("has_onednn_switch", False)
    kwargs = {"net_arch": [LARGE - 1, LARGE - 1]}
    narrow = [make(policy_kwargs=kwargs, kernel="fast", update_precision=name).pretrain(4) for name in ("float32", "bfloat16")]
    for first, second in zip(*(model.policy.parameters() for model in narrow), strict=True):
        assert th.equal(first, second)


@pytest.mark.filterwarnings(NO_UNITS)
def test_the_precision_may_change_between_two_calls() -> None:
    model = make().pretrain(2)
    assert kernel_of(model).precision == "float32"
    model.update_precision = "bfloat16"
    model.pretrain(2)
    assert kernel_of(model).precision == "bfloat16" and "bfloat16" in kernel_of(model).products.name
    assert {float(entry["step"]) for entry in model.critic.optimizer.state.values()} == {4.0}
    model.update_precision = "float32"
    assert kernel_of(model.pretrain(2)).precision == "float32"


@needs_switch
def test_only_hidden_layers_are_rounded(pretend: Patch) -> None:
    """With wide observations and one hidden layer, bfloat16 changes nothing: the first and the last layer are float32."""

    class Wide(gym.ObservationWrapper[Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(gym.make("Pendulum-v1"))
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (90,), np.float32)

        def observation(self, observation: Any) -> Any:
            return np.tile(observation, 30)

    def run(precision: str, net_arch: list[int]) -> th.Tensor:
        settings = {"policy_kwargs": {"net_arch": net_arch}, "learning_starts": 70, "batch_size": 70, "learning_rate": 1e-3}
        model = TD3BC("MlpPolicy", Wide(), seed=0, device="cpu", update_precision=precision, **settings)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trains online like TD3")
            model.learn(74)
        return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])

    pretend("onednn_is_single_precision", False)
    pretend("has_onednn_switch", False)
    pretend("has_bfloat16_units", True)
    assert th.equal(run("bfloat16", [80]), run("float32", [80]))
    assert not th.equal(run("bfloat16", [80, 80]), run("float32", [80, 80]))
