"""The formats of files that a policy can be exported to."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_offline_ft.common.suggestions import hint
from sb3_offline_ft.controllers.contract import output_name
from sb3_offline_ft.export.raw_policy import RawPolicy

Inputs = Mapping[str, npt.NDArray[Any]]
"""A batch of observations, by the names of the inputs."""
Run = Callable[[Inputs], npt.NDArray[Any]]

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TORCH = (2, 6)
"""The first version that can export to ONNX in this way."""
OPSET = 18
"""Version of ONNX's operators: of 2022, so that runtimes on controllers know it."""


@dataclass(frozen=True)
class Format:
    """
    One format.

    :param name: As the command takes it
    :param suffix: Of its files
    :param encode: Makes the content of a file of a network and one batch of its inputs
    :param open: Makes of the content what computes actions, as a controller would
    """

    name: str
    suffix: str
    encode: Callable[[RawPolicy, Inputs], bytes]
    open: Callable[[bytes], Run]


def find_format(path: Path, name: str | None) -> Format:
    """
    :param path: The file that shall be written
    :param name: The format, if it was named
    :return: The format by its name, or that of the file's suffix
    :raises ValueError: It is not known, or has another suffix
    :raises ImportError: It needs packages that are not installed
    """
    by_suffix = {one.suffix: one for one in FORMATS.values()}
    if name is not None and name not in FORMATS:
        raise ValueError(f"There is no format {name!r}: {hint(name, FORMATS)}")
    if path.suffix not in by_suffix:
        known = ", ".join(f"{one.suffix} ({one.name})" for one in FORMATS.values())
        raise ValueError(f"The suffix of {str(path)!r} says the format: expected one of {known}.")
    found = by_suffix[path.suffix]
    if name is not None and found.name != name:
        raise ValueError(f"{str(path)!r} has the suffix of {found.name}: files of {name} end in {FORMATS[name].suffix}.")
    missing = [package for package in ONNX_PACKAGES if found.name == "onnx" and importlib.util.find_spec(package) is None]
    if found.name == "onnx" and tuple(int(part) for part in th.__version__.split(".")[:2]) < TORCH:
        missing.append(f"torch {'.'.join(map(str, TORCH))} or later")
    if missing:
        raise ImportError(
            f"Exporting to ONNX needs {' and '.join(missing)}, not installed here: pip install 'sb3-offline-ft[onnx]'. Files "
            "that end in .pt (TorchScript) or .pt2 (torch.export) need no more than torch.",
            name=missing[0],
        )
    return found


def _to_onnx(network: RawPolicy, inputs: Inputs) -> bytes:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet():
        program = th.onnx.export(
            _program(network, inputs),
            dynamo=True,
            input_names=list(inputs),
            output_names=[output_name(inputs)],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        _rename_inner_values(program.model.graph)
        # Paths and source lines of this machine
        ClearMetadataAndDocStringPass()(program.model)
        content: bytes = program.model_proto.SerializeToString(deterministic=True)
    return content


def _rename_inner_values(graph: Any) -> None:
    """Those called as an input or output is: keys of a ``Dict`` may be ``linear`` or ``low``."""
    from onnx_ir.traversal import RecursiveGraphIterator

    interface = [*graph.inputs, *graph.outputs]
    values = [*graph.initializers.values(), *(value for node in RecursiveGraphIterator(graph) for value in node.outputs)]
    inner = [value for value in values if not any(value is each for each in interface)]
    names, taken = {value.name for value in values}, {value.name for value in interface}
    for value in inner:
        if value.name in taken:
            name = value.name
            while name in names | taken:
                name += "_"
            names.add(name)
            value.name = name


def _from_onnx(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> npt.NDArray[Any]:
        actions: npt.NDArray[Any] = session.run(None, dict(inputs))[0]
        return actions

    return run


def _to_torchscript(network: RawPolicy, inputs: Inputs) -> bytes:
    stream = io.BytesIO()
    with _quiet():
        traced = th.jit.trace(network, _tensors(inputs), check_trace=False)  # type: ignore[no-untyped-call]
        # What the policy does not use, such as critics, is left out
        th.jit.save(th.jit.freeze(traced), stream)
    return stream.getvalue()


def _from_torchscript(content: bytes) -> Run:
    with _quiet():
        return _running(th.jit.load(io.BytesIO(content), map_location="cpu"))  # type: ignore[no-untyped-call]


def _to_torch_export(network: RawPolicy, inputs: Inputs) -> bytes:
    stream = io.BytesIO()
    with _quiet():
        th.export.save(_program(network, inputs), stream)
    return stream.getvalue()


def _from_torch_export(content: bytes) -> Run:
    with _quiet():
        return _running(th.export.load(io.BytesIO(content)).module())


def _program(network: RawPolicy, inputs: Inputs) -> th.export.ExportedProgram:
    batch = th.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    return th.export.export(network, _tensors(inputs), dynamic_shapes=shapes)


def _running(module: Any) -> Run:
    def run(inputs: Inputs) -> npt.NDArray[Any]:
        with th.no_grad():
            actions: npt.NDArray[Any] = module(*_tensors(inputs)).numpy()
        return actions

    return run


def _tensors(inputs: Inputs) -> tuple[th.Tensor, ...]:
    return tuple(th.from_numpy(np.ascontiguousarray(array)) for array in inputs.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes to its developers, and without the checks of distributions, which no graph can hold."""
    logger, checks = logging.getLogger("torch.onnx"), th.distributions.Distribution._validate_args
    level = logger.level
    logger.setLevel(logging.ERROR)
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings(), th.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        th.distributions.Distribution.set_default_validate_args(checks)
        logger.setLevel(level)


FORMATS = {
    one.name: one
    for one in (
        Format("onnx", ".onnx", _to_onnx, _from_onnx),
        Format("torchscript", ".pt", _to_torchscript, _from_torchscript),
        Format("torch-export", ".pt2", _to_torch_export, _from_torch_export),
    )
}
