"""The startup hook: cheap, silent, never in the way, and gone once it has done its work."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_offline_ft.algorithms import ALGORITHMS
from tests.conftest import REPOSITORY, Installation, RunPython

# os and site are loaded at any normal start; -I -S keeps a hook that is installed in this Python out of the measurement.
MEASURE = f"""
import os, site, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
with open({str(REPOSITORY / "sb3_offline_ft.pth")!r}) as file:
    line = file.read()
begin = time.perf_counter()
exec(line)
print(time.perf_counter() - begin)
print(sys.modules["_sb3_offline_ft_startup"].installed, [m for m in ("torch", "typing", "sb3_offline_ft") if m in sys.modules])
"""


def test_the_hook_costs_less_than_a_millisecond() -> None:
    seconds = []
    for _ in range(11):
        process = subprocess.run([sys.executable, "-I", "-S", "-c", MEASURE], capture_output=True, text=True, check=True)
        time, state = process.stdout.splitlines()
        assert state == "True []"
        seconds.append(float(time))
    assert statistics.median(seconds) < 1e-3


def test_a_plain_start_of_python_loads_neither_us_nor_torch(start_python: RunPython) -> None:
    code = "import sys; print([m for m in sys.modules if m.split('.')[0] in ('sb3_offline_ft', 'torch', 'rl_zoo3', 'numpy')])"
    process = start_python("-c", code)
    assert (process.stdout.strip(), process.stderr) == ("[]", "")


def test_importing_rl_zoo3_is_enough_to_know_our_algorithms(start_python: RunPython) -> None:
    code = (
        "import rl_zoo3, sys, inspect, rl_zoo3.exp_manager as m, _sb3_offline_ft_startup as hook;"
        f"print(*[rl_zoo3.ALGOS[name].__name__ for name in {list(ALGORITHMS)}]);"
        "print(hook._finder in sys.meta_path, type(m.__loader__).__name__, type(m.__spec__.loader).__name__);"
        "print(inspect.getsource(rl_zoo3.utils).startswith('import argparse'))"
    )
    process = start_python("-c", code)
    names = [location.rpartition(":")[2] for location in ALGORITHMS.values()]
    assert process.stdout.split() == [*names, "False", "SourceFileLoader", "SourceFileLoader", "True"], process.stderr


def test_importing_rl_zoo3_alone_does_not_load_the_experiment_manager(start_python: RunPython) -> None:
    process = start_python("-c", "import rl_zoo3, sys; print('td3c' in rl_zoo3.ALGOS, 'rl_zoo3.exp_manager' in sys.modules)")
    assert process.stdout.split() == ["True", "False"], process.stderr


def test_looking_for_a_module_without_importing_it_does_not_use_the_hook_up(run_python: RunPython) -> None:
    code = "import importlib.util as u; u.find_spec('rl_zoo3.utils'); import rl_zoo3; print('td3c' in rl_zoo3.ALGOS)"
    assert run_python("-c", code).stdout.split() == ["True"]


@pytest.mark.parametrize("position", ["0", "len(sys.meta_path)"])
def test_another_finder_that_searches_as_we_do_is_no_endless_loop(run_python: RunPython, position: str) -> None:
    code = """
import sys, importlib.util
class Searching:
    def find_spec(self, name, path=None, target=None):
        if name == "rl_zoo3.utils":
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
sys.meta_path.insert(POSITION, Searching())
import rl_zoo3
print('td3c' in rl_zoo3.ALGOS)
"""
    process = run_python("-c", code.replace("POSITION", position))
    assert process.stdout.split() == ["True"], process.stderr


@pytest.mark.parametrize(("value", "expected"), [("1", "False"), ("0", "True"), ("", "True")])
def test_the_environment_variable_turns_the_hook_off(start_python: RunPython, value: str, expected: str) -> None:
    process = start_python("-c", "import rl_zoo3; print('td3c' in rl_zoo3.ALGOS)", SB3_OFFLINE_FT_NO_HOOK=value)
    assert (process.stdout.strip(), process.stderr) == (expected, "")


def test_startup_files_left_behind_are_silent(wheel: Path, tmp_path: Path) -> None:
    installation = Installation(wheel, tmp_path / "installation")
    (installation.site_packages / "_sb3_offline_ft_startup.py").unlink()
    (installation.site_packages / "sb3_offline_ft.start").unlink()
    process = installation.start("-c", "print('unharmed')", cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "unharmed\n", "")


def test_a_failing_registration_is_reported_once_and_breaks_nothing(run_python: RunPython, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "sb3_offline_ft"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('half an installation')")
    code = "import rl_zoo3, rl_zoo3.exp_manager; print('td3' in rl_zoo3.ALGOS, 'td3c' in rl_zoo3.ALGOS)"
    process = run_python("-c", code, PYTHONPATH=str(broken.parent))
    assert process.stdout.split() == ["True", "False"]
    assert process.returncode == 0
    assert process.stderr.count("half an installation") == 1
    assert "SB3_OFFLINE_FT_NO_HOOK=1" in process.stderr
    assert "its algorithms could not be registered" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_without_rl_zoo3_the_hook_is_silent_and_our_own_import_is_clear(run_python: RunPython) -> None:
    hide = "import sys; sys.modules['rl_zoo3'] = None\n"
    silent = run_python("-c", hide + "try:\n    import rl_zoo3\nexcept ImportError:\n    print('absent')")
    assert (silent.stdout.strip(), silent.stderr) == ("absent", "")
    clear = run_python("-c", hide + "import sb3_offline_ft.zoo")
    assert clear.returncode == 1
    assert "pip install rl_zoo3" in clear.stderr.splitlines()[-1]


def test_the_start_file_names_the_function_that_the_pth_line_calls() -> None:
    from pkgutil import resolve_name

    import _sb3_offline_ft_startup

    assert resolve_name((REPOSITORY / "sb3_offline_ft.start").read_text().strip()) is _sb3_offline_ft_startup.install
