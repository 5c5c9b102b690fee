"""What computes: the machine, its Python and the versions of packages, as a run's manifest says it."""

import hashlib
import platform
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import sb3_offline_ft
from sb3_offline_ft.common.versions import installed_versions

CPU_MODEL = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
"""What Linux says of a processor, on x86 or on ARM."""
_TOLD_OTHERWISE = (sb3_offline_ft.__name__, "builtins", "abc", "typing", "torch", "stable_baselines3")
"""Packages whose code is told by their version, or as a whole."""
PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "mujoco", "minari", "numpy")


def machine_facts(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """In the form of JSON, with the versions of some packages."""
    return {
        "versions": {"sb3-offline-ft": sb3_offline_ft.__version__, **installed_versions(packages)},
        "code": code_digest(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **processor(),
    }


def processor(information: Path = Path("/proc/cpuinfo")) -> dict[str, str | None]:
    """Its name, and its model: one name may stand for several, and ARM's have none."""
    text = information.read_text() if information.exists() else ""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    facts = {name.strip(): value.strip() for name, value in reversed(pairs)}
    model = "/".join(facts[name] for name in CPU_MODEL if name in facts)
    return {"cpu": facts.get("model name") or platform.processor() or platform.machine(), "cpu_model": model or None}


@cache
def code_digest(algorithm: type | None = None) -> str:
    """SHA-256 of the sources of this package and of a class and its bases: checkouts of one version are not all the same."""
    package = Path(sb3_offline_ft.__file__).parent
    modules = {
        base.__module__ for base in (algorithm.__mro__ if algorithm else ()) if not base.__module__.startswith(_TOLD_OTHERWISE)
    }
    files = {Path(path) for name in modules if (path := getattr(sys.modules.get(name), "__file__", None)) is not None}
    digest = hashlib.sha256()
    for path in sorted(files | set(package.rglob("*.py"))):
        name = path.relative_to(package) if path.is_relative_to(package) else path.name
        digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
