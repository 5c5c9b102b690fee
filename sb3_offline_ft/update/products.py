"""Matrix products of large factors: which library computes them, and in which precision."""

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

from sb3_offline_ft.common.warning import warn

LARGE = 64
"""Products whose three sizes are at least this are worth another library's overhead."""
PROBE_SIZE = 128
SINGLE_PRECISION_ERROR = 1e-5
"""Largest error, relative to the norm, that counts as float32: it errs by about 1e-7, bfloat16 by 2e-3."""
UPDATE_PRECISIONS = ("float32", "bfloat16")
Product = Callable[..., Any]


class Products(NamedTuple):
    """What computes ``out = a @ b``, by ``multiply(a, b, out=out)``, and whether it keeps the precision of float32."""

    name: str
    multiply: Product = th.mm
    is_single_precision: bool = True


NATIVE = Products("torch's default")


def has_onednn_switch() -> bool:
    """Whether this torch can be told at run time to let oneDNN compute float32 products."""
    matmul = getattr(th.backends.mkldnn, "matmul", None)
    return bool(th.backends.mkldnn.is_available()) and hasattr(matmul, "fp32_precision")  # type: ignore[no-untyped-call]


def _with_onednn(a: th.Tensor, b: th.Tensor, out: th.Tensor) -> None:
    matmul: Any = th.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        # Named for what oneDNN may do; without such units on the CPU it computes in float32
        matmul.fp32_precision = "bf16"
        th.mm(a, b, out=out)
    finally:
        matmul.fp32_precision = before


def _in_bfloat16(a: th.Tensor, b: th.Tensor, out: th.Tensor) -> None:
    out.copy_(th.mm(a.bfloat16(), b.bfloat16()))


def _relative_error(multiply: Product) -> float:
    generator = th.Generator().manual_seed(0)
    a, b = (th.randn(PROBE_SIZE, PROBE_SIZE, generator=generator, device="cpu") for _ in range(2))
    out = th.empty_like(a)
    multiply(a, b, out=out)
    exact = a.double() @ b.double()
    return float((out - exact).norm() / exact.norm())


@functools.cache
def onednn_is_single_precision() -> bool:
    """Whether products that are handed to oneDNN by the switch keep the precision of float32 on this CPU, measured."""
    return has_onednn_switch() and _relative_error(_with_onednn) < SINGLE_PRECISION_ERROR


@functools.cache
def cpu_vendor() -> str:
    """The CPU's maker as the operating system names it, such as ``GenuineIntel`` or ``AuthenticAMD``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), platform.machine())


def choose_products(precision: str, device: th.device) -> Products:
    """
    Choose by rule, not by timing, so that the same machine always computes the same.

    In float32, MKL is used (torch's default), but for AMD's CPUs with AVX-512, where MKL does not use it and oneDNN does,
    if oneDNN's products are found to be float32's. In bfloat16, oneDNN converts by itself where the switch makes it do so
    (Intel's AMX); elsewhere factors are converted before.

    :param precision: ``"float32"`` or ``"bfloat16"``; results are float32 in both
    :param device: Where the factors are
    :return: How to compute large products
    """
    if precision == "bfloat16":
        if device.type == "cpu" and has_onednn_switch() and not onednn_is_single_precision():
            return Products("oneDNN bfloat16", _with_onednn, False)
        if device.type == "cpu" and not has_bfloat16_units():
            warn(
                "`update_precision='bfloat16'`: this CPU has no units for bfloat16 (AVX-512 BF16 or AMX), so updates will be "
                "slower than with 'float32'."
            )
        return Products("bfloat16 copies", _in_bfloat16, False)
    if device.type == "cpu" and cpu_vendor() == "AuthenticAMD" and has_avx512() and onednn_is_single_precision():
        return Products("oneDNN float32", _with_onednn)
    return NATIVE


def has_avx512() -> bool:
    """Whether torch uses AVX-512 on this CPU."""
    return th.backends.cpu.get_cpu_capability() == "AVX512"


def has_bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 numbers itself."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        # Elsewhere than on Linux: Apple's processors have them since the M2, which cannot be asked for here
        return platform.machine() == "arm64"
