"""What the results say about the machine and the code they come from."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "asimd", "bf16")
PACKAGES = ("sb3-offline-ft", "stable-baselines3", "torch", "numpy", "gymnasium", "mujoco")
HERE = Path(__file__).parent


def _cpu_facts() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    facts: dict[str, str] = {}
    for name, value in pairs:
        facts.setdefault(name.strip(), value.strip())
    return facts


def cpu_name() -> str:
    """
    :return: What the processor calls itself
    """
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def slug() -> str:
    """
    :return: The processor's name for file names
    """
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def busy_seconds() -> float | None:
    """
    :return: Seconds that all processors together have been at work since the start, or taken by other virtual machines;
        None where the system does not say
    """
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    idle, waiting = ticks[3], ticks[4]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """
    :return: The checkout's commit, marked as dirty if code differs from it; results that a benchmark writes are no code
    """
    git = ["git", "-C", str(HERE)]
    process = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/*.py", ":/*.yml", ":/constraints.txt"], capture_output=True, text=True
    )
    if process.returncode != 0:
        return "not a git checkout"
    return process.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def manifest(*more_packages: str) -> dict[str, Any]:
    """
    What a result comes from, to be called before the work: code that is edited meanwhile is another one.

    :param more_packages: Packages that matter besides those that always do
    :return: Machine, versions and command; the load average is the one of now
    """
    facts = _cpu_facts()
    present = set((facts.get("flags") or facts.get("Features") or "").split())
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *more_packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "from source" if package == "sb3-offline-ft" else "not installed"
    return {
        "cpu": cpu_name(),
        "cpu_family_model": "/".join(facts.get(name, "?") for name in ("cpu family", "model", "stepping")),
        "flags": {flag: flag in present for flag in FLAGS},
        "processors": os.cpu_count(),
        "usable_processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "git_commit": commit(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "load_average_before": os.getloadavg()[0],
    }
