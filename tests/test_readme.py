"""The code of README.md runs as it is written, but for the numbers of steps."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RunPython

README = (REPOSITORY / "README.md").read_text()
TINY_BUDGET = ["-n", "300", "--eval-freq", "150", "--eval-episodes", "1", "--seed", "1"]
TINY_PARAMETERS = ["offline_steps:30", "warmup_steps:100"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def shortened(code: str) -> str:
    """Steps are written with underscores, such as 50_000: make each a thousandth, but at least 60."""
    return re.sub(r"\b\d+(?:_\d{3})+\b", lambda number: str(max(60, int(number[0].replace("_", "")) // 1000)), code)


@pytest.mark.parametrize("code", blocks("python"), ids=["champion", "guard", "data"])
def test_python(code: str, run_python: RunPython) -> None:
    process = run_python("-W", "error", "-W", "ignore:rich is experimental/alpha", "-c", shortened(code))
    assert process.returncode == 0, process.stderr


def test_zoo_commands_in_their_order(run_python: RunPython, tmp_path: Path) -> None:
    flights = tmp_path / "work" / "flights"
    flights.mkdir(parents=True)
    (flights / "1.csv").write_text("obs_0,obs_1,u1,u2,r\n" + "0.5,1,0.1,-1,2\n" * 5)
    ran = 0
    for command in commands():
        if command[:2] == ["python", "-m"]:
            arguments = command[1:]
            if any("mujoco/" in argument for argument in arguments):
                # Needs the hub; without it, the spec must at least be understood
                process = run_python(*arguments)
                assert "mujoco/invertedpendulum/medium-v0" in process.stdout
                continue
            if "rl_zoo3.train" in arguments:
                split = arguments.index("-params") if "-params" in arguments else len(arguments)
                parameters = [item for item in arguments[split + 1 :] if not item.startswith("offline_steps")]
                arguments = [*arguments[:split], *TINY_BUDGET, "-params", *parameters, *TINY_PARAMETERS]
                if "-optimize" in arguments:
                    arguments[arguments.index("--n-trials") + 1] = "1"
            process = run_python(*arguments)
        elif command[:2] == ["sb3-offline-ft", "dataset"]:
            # As a shell does
            arguments = ["flights/1.csv" if argument == "flights/*.csv" else argument for argument in command[1:]]
            process = run_python("-m", "sb3_offline_ft", *arguments, MINARI_DATASETS_PATH=str(tmp_path / "minari"))
        elif command[:2] == ["sb3-offline-ft", "summary"]:
            process = run_python("-m", "sb3_offline_ft", *command[1:])
            assert "J after pretraining" in process.stdout
        elif command[:3] == ["sb3-offline-ft", "guard", "show"]:
            process = run_python("-m", "sb3_offline_ft", *command[1:])
            assert "CollapseGuard" in process.stdout or "alarm" in process.stdout
        elif command[:2] == ["sb3-offline-ft", "study"] and command[2] in ("init", "status"):
            process = run_python("-m", "sb3_offline_ft", *command[1:])
            assert ("30 runs" if command[2] == "init" else "30 waiting") in process.stdout
        else:
            continue
        assert process.returncode == 0, process.stderr
        ran += 1
    assert ran == 14
    assert (tmp_path / "work" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "work" / "logs" / "td3c" / "Hopper-v5_1" / "run.png").exists()


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [command[1] for command in commands() if command[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
