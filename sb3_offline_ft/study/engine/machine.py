"""What computes: the machine, its Python and the versions of packages, as a run's manifest says it."""

import platform
from pathlib import Path
from typing import Any

import sb3_offline_ft
from sb3_offline_ft.common.versions import installed_versions
from sb3_offline_ft.pretrained.recipe import code_digest

CPU_MODEL = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
"""What Linux says of a processor, on x86 or on ARM."""
PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "mujoco", "minari", "numpy")


def machine_facts() -> dict[str, Any]:
    """In the form of JSON."""
    return {
        "versions": {"sb3-offline-ft": sb3_offline_ft.__version__, **installed_versions(PACKAGES)},
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
