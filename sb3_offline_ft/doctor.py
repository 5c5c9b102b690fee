"""The checks behind ``sb3-offline-ft doctor``: each looks at one thing users depend on and says how to repair it."""

import json
import os
import platform
import site
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Literal

import _sb3_offline_ft_startup
from sb3_offline_ft.algorithms import ALGORITHMS, DISTRIBUTION, distribution_of, preset_path

STARTUP_FILES = ("sb3_offline_ft.pth", "sb3_offline_ft.start")
HUB_TIMEOUT = 3.0
REINSTALL = "pip install --force-reinstall --no-deps"
REINSTALL_US = f"{REINSTALL} {DISTRIBUTION}"

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """
    The outcome of one check.

    :param name: what was looked at
    :param status: ``"problem"`` means that something needed is broken, ``"note"`` that something optional is missing
    :param found: what was found
    :param remedy: what the user can do about it; empty if nothing need be done
    """

    name: str
    status: Status
    found: str
    remedy: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether something needed is broken."""
        return self.status == "problem"


def check_python() -> Iterator[Check]:
    """The interpreter: version and place; pip refuses to install the package where it is too old."""
    yield Check("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def check_packages() -> Iterator[Check]:
    """Our own version, and each of our requirements against what is installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
        yield Check(DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, "problem", "not installed in this Python", f"pip install {DISTRIBUTION}")
        return

    needed: dict[str, Requirement] = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            known = needed.setdefault(requirement.name, requirement)
            known.specifier &= requirement.specifier
    for name, requirement in needed.items():
        install = f'pip install "{name}{requirement.specifier}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "problem", "not installed", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(name, "ok", version)
        else:
            yield Check(name, "problem", f"{version}, but {requirement.specifier} is needed", install)


def _site_folders() -> list[Path]:
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return [Path(folder) for folder in folders]


def check_startup_hook() -> Iterator[Check]:
    """Whether ``python -m rl_zoo3.train`` finds us: the startup files, and whether they took effect in this Python."""
    fallback = "or use `python -m sb3_offline_ft.zoo.train`, which does not need it"
    missing = [name for name in STARTUP_FILES if not any((folder / name).is_file() for folder in _site_folders())]
    variable = _sb3_offline_ft_startup.DISABLE_VARIABLE
    if missing:
        found = f"{' and '.join(missing)} not in {', '.join(map(str, _site_folders()))}"
        yield Check("Startup hook", "problem", found, f"{REINSTALL_US}, {fallback}.")
    elif _sb3_offline_ft_startup.installed:
        yield Check("Startup hook", "ok", "active")
    elif _sb3_offline_ft_startup.is_disabled():
        yield Check("Startup hook", "note", f"turned off by {variable}", f"Unset {variable}, {fallback}.")
    else:
        yield Check("Startup hook", "problem", "installed, but it did not run", f"Start Python without -S, {fallback}.")


def check_zoo() -> Iterator[Check]:
    """Which of our algorithms a fresh ``import rl_zoo3`` knows, and whether their presets are there."""
    unknown: list[str] = []
    process = subprocess.run(
        [sys.executable, "-c", "import rl_zoo3; print('ALGOS', *rl_zoo3.ALGOS)"], capture_output=True, text=True
    )
    if process.returncode:
        error = (process.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("rl_zoo3", "problem", f"cannot be imported: {error}", "pip install rl_zoo3")
    else:
        listing = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("ALGOS ")][-1]
        unknown = [name for name in ALGORITHMS if name not in listing]
        if not unknown:
            yield Check("rl_zoo3", "ok", f"knows {', '.join(ALGORITHMS)}")
        elif _sb3_offline_ft_startup.is_disabled():
            yield Check("rl_zoo3", "note", f"does not know {' and '.join(unknown)}: the startup hook is turned off")
        else:
            reason = process.stderr.strip() or "the startup hook did not run"
            yield Check("rl_zoo3", "problem", f"does not know {' and '.join(unknown)}: {reason}", _reinstall(unknown))

    # Where another package's cannot be used, its preset cannot be found either
    presets = {
        name: Path(preset_path(name)) for name in ALGORITHMS if name not in unknown or distribution_of(name) == DISTRIBUTION
    }
    lost = [name for name, path in presets.items() if not path.is_file()]
    if lost:
        yield Check("Presets", "problem", f"{', '.join(str(presets[name]) for name in lost)} missing", _reinstall(lost))
    else:
        yield Check("Presets", "ok", ", ".join(map(str, dict.fromkeys(path.parent for path in presets.values()))))


def _reinstall(algorithms: list[str]) -> str:
    """How to repair algorithms: ours first, without which others are not known either."""
    distributions = {distribution_of(name) for name in algorithms}
    return f"{REINSTALL} {DISTRIBUTION if DISTRIBUTION in distributions else ' '.join(sorted(distributions))}."


def check_minari() -> Iterator[Check]:
    """Where Minari keeps its datasets, and whether the hub can be reached."""
    folder = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        yield Check("Minari datasets", "ok", str(folder))
    else:
        remedy = "Set MINARI_DATASETS_PATH to a folder that can be written to; bundled data works without it."
        yield Check("Minari datasets", "note", f"{folder} cannot be written to", remedy)

    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT):
            yield Check("Minari hub", "ok", f"{address} can be reached")
    except (OSError, ValueError, urllib.error.URLError) as error:
        remedy = "Only needed to download datasets: copy them into the Minari datasets folder, or use bundled data."
        yield Check("Minari hub", "note", f"{address} cannot be reached ({error})", remedy)


def check_bundled_data() -> Iterator[Check]:
    """Every bundled dataset is read in full and counted."""
    from sb3_offline_ft.datasets import BUNDLED, load_dataset

    for name in BUNDLED:
        spec = f"bundled:{name}"
        try:
            dataset = load_dataset(spec)
            facts = files("sb3_offline_ft.datasets").joinpath("bundled", name, "data", "metadata.json").read_text()
            expected = json.loads(facts)["total_steps"]
        except Exception as error:
            yield Check(spec, "problem", f"cannot be read: {error}", f"{REINSTALL_US}.")
            continue
        if len(dataset) == expected:
            yield Check(spec, "ok", f"{expected:,} transitions")
        else:
            yield Check(spec, "problem", f"{len(dataset):,} transitions instead of {expected:,}", f"{REINSTALL_US}.")


def check_mujoco() -> Iterator[Check]:
    """A MuJoCo environment can be made and stepped."""
    import gymnasium as gym

    try:
        env = gym.make("Hopper-v5")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    except Exception as error:
        yield Check("MuJoCo", "problem", f"Hopper-v5 fails: {error}", 'pip install "gymnasium[mujoco]"')
    else:
        yield Check("MuJoCo", "ok", f"{metadata.version('mujoco')}, Hopper-v5 works")


def check_update_kernel() -> Iterator[Check]:
    """What computes the matrix products of updates on this machine, in each precision."""
    import torch as th

    from sb3_offline_ft.update.products import choose_products, has_bfloat16_units

    yield Check(
        "Updates in float32", "ok", f"{choose_products('float32', th.device('cpu')).name}, {th.get_num_threads()} threads"
    )
    if has_bfloat16_units():
        yield Check("Updates in bfloat16", "ok", choose_products("bfloat16", th.device("cpu")).name)
    else:
        remedy = "Only matters for `update_precision='bfloat16'`, which is slower than 'float32' here."
        yield Check("Updates in bfloat16", "note", "the CPU has no units for it", remedy)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_packages,
    check_startup_hook,
    check_zoo,
    check_minari,
    check_bundled_data,
    check_mujoco,
    check_update_kernel,
)


def diagnose() -> list[Check]:
    """
    Run all checks.

    :return: their outcomes, in the order in which users should read them
    """
    outcomes: list[Check] = []
    for check in CHECKS:
        try:
            outcomes.extend(check())
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            outcomes.append(Check(name, "problem", f"{type(error).__name__}: {error}", "Repair what is named above first."))
    return outcomes


def render(checks: Sequence[Check]) -> None:
    """
    Print the checks as a table, and a summary.

    :param checks: what :func:`diagnose` returned
    """
    from rich.markup import escape
    from rich.table import Table

    from sb3_offline_ft.common.console import PlainConsole

    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table(title="sb3-offline-ft doctor")
    for heading in ("", "Check", "Found", "What to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(status, escape(check.name), escape(check.found), escape(check.remedy))
    console = PlainConsole()
    console.print(table)
    broken = [check.name for check in checks if check.is_broken]
    console.print(f"Broken: {', '.join(broken)}." if broken else "Everything that is needed works.", markup=False)
