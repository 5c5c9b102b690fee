"""Simulated runs of contests, as the benchmark of their promises has them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from tests.conftest import REPOSITORY


def load(name: str) -> ModuleType:
    """A module of ``benchmarks/deployment``."""
    spec = spec_from_file_location(name, REPOSITORY / "benchmarks" / "deployment" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulation = load("simulation")
