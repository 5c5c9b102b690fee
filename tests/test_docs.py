"""Every Python example of the documentation runs, without a warning, and every public name is described.

An integer with an underscore, such as ``50_000``, is a budget in the examples: it is divided by 1,000, rounded up.
"""

import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, get_callback_list

import sb3_offline_ft.zoo  # noqa: F401  # so that the tables are complete before an example changes them
from sb3_offline_ft import ChampionChallenger
from sb3_offline_ft.common.strict_yaml import load_yaml
from sb3_offline_ft.study import Protocol
from sb3_offline_ft.trial.reading import parse_plan
from tests.conftest import Installation, RunPython

DOCS = Path(__file__).parent.parent / "docs"
DIRECTIVE = re.compile(r"^\.\. auto(?:class|function|exception|data):: ([\w.]+)$", re.MULTILINE)
SUMMARY = re.compile(r"^   ([\w.]+)$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BUDGET = re.compile(r"(?<![\w.])\d{1,3}(?:_\d{3})+(?![\w.])")


def examples(text: str) -> list[str]:
    """
    :param text: A page
    :return: Its Python blocks, on the lines on which they are in the page, so that tracebacks show the right ones
    """
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in BLOCK.finditer(text)]


def shortened(code: str) -> str:
    """
    :param code: An example
    :return: The same with its budgets divided by 1,000
    """
    return BUDGET.sub(lambda number: str(-(-int(number[0].replace("_", "")) // 1000)), code)


# The documentation that is built lies below docs/_build
PAGES = [
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and examples(path.read_text(encoding="utf-8"))
]


@pytest.fixture
def zoo_as_before() -> Iterator[None]:
    """Examples add to rl_zoo3's tables, which are the same for all tests."""
    tables = (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_only_budgets_are_shortened() -> None:
    code = "learn(1_000_000, n=2_500, x=1e-3, y=1000, name_1_000, 0.1_000)"
    assert shortened(code) == "learn(1000, n=3, x=1e-3, y=1000, name_1_000, 0.1_000)"


@pytest.mark.usefixtures("zoo_as_before")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = DOCS / page
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in examples(path.read_text(encoding="utf-8")):
        exec(compile(shortened(code), str(path), "exec"), namespace)


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".datasets",
        ".buffers",
        ".checkpoints",
        ".collapse",
        ".deployment",
        ".controllers",
        ".evaluation",
        ".evaluation.robustness",
        ".export",
        ".study",
        ".update",
        ".testing",
        ".trial",
        ".zoo",
    ],
)
def test_public_names_are_described_and_listed(module: str) -> None:
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    described = {name.rsplit(".", 1)[-1] for page in pages for name in DIRECTIVE.findall(page)}
    overview = (DOCS / "api.md").read_text(encoding="utf-8").split("## Schedules")[0]
    listed = {name.rsplit(".", 1)[-1] for name in SUMMARY.findall(overview)}
    public = import_module(f"sb3_offline_ft{module}")
    # Constants and types have no docstring of their own
    names = {name for name in public.__all__ if hasattr(getattr(public, name), "__qualname__")}
    assert sorted(names - described) == []
    assert sorted(names - listed) == []


def test_study_files_that_are_shown_are_valid(tmp_path: Path) -> None:
    text = (DOCS / "study.md").read_text(encoding="utf-8")
    whole, *parts = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    study = load_yaml(whole, tmp_path / "study.yml")
    for part in ({}, *(load_yaml(part, tmp_path / "study.yml") for part in parts)):
        protocol = Protocol.parse(yaml.safe_dump(study | part, sort_keys=False), tmp_path / "study.yml")
        assert len(protocol.cells()) >= 25
        protocol.check(label for label, spec in protocol.datasets.items() if "logs/" not in spec)


def test_the_plan_of_a_trial_that_is_shown_is_valid_and_complete() -> None:
    text = (DOCS / "trial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    content = load_yaml(block, Path("trial.yml"))
    plan = parse_plan(content, Path("trial.yml"))
    assert content.keys() == plan.as_mapping().keys()
    for section in ("error_rates", "budget", "costs", "risk", "blocks", "abort"):
        assert content[section].keys() == plan.as_mapping()[section].keys()
    # Each key is explained in the table
    assert set(content) <= set(re.findall(r"`(\w+)`", text))


def test_the_callback_that_is_shown_in_yaml_can_be_made() -> None:
    (block,) = re.findall(
        r"^```yaml\n(.*?)^```$", (DOCS / "deployment.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (callback,) = get_callback_list(yaml.safe_load(block)["Pendulum-v1"])
    assert isinstance(callback, ChampionChallenger) and callback.rules.worst_return == -1900


def test_commands_of_the_quickstart(run_python: RunPython, tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", (DOCS / "quickstart.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    _, commands, other_data = [[shlex.split(line) for line in block.splitlines()] for block in blocks]
    budget = ["-n", "300", "--eval-freq", "150", "-params", "offline_steps:30", "warmup_steps:100"]
    for arguments, said in zip(commands, ("Saving to", "baseline"), strict=True):
        if arguments[0] == "python":
            process = run_python(*arguments[1:], *budget)
        else:
            process = run_python("-m", "sb3_offline_ft", *arguments[1:])
        assert process.returncode == 0, process.stderr
        assert said in process.stdout
    # Needs the hub; without it, the spec must at least be understood
    process = run_python(*other_data[0][1:])
    assert "mujoco/invertedpendulum/medium-v0" in process.stdout


COMMAND = re.compile(r"(?:python -m ((?:rl_zoo3|sb3_offline_ft\.zoo)\.\w+(?:\.\w+)?)|(sb3-offline-ft(?: [a-z][a-z-]*)+))")


@lru_cache
def help_of(installation: Installation, *command: str) -> str:
    # Wide enough that no option is cut off
    process = installation.run("-m", *command, "--help", cwd=DOCS, COLUMNS="300", NO_COLOR="1", TERM="dumb")
    assert process.returncode == 0, process.stderr
    return process.stdout


def shell_lines() -> Iterator[tuple[str, str]]:
    for path in sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            yield from ((path.relative_to(DOCS).as_posix(), line) for line in block.splitlines())


COMMANDS = [(page, line) for page, line in shell_lines() if COMMAND.search(line)]


def test_commands_of_ours_are_recognized() -> None:
    assert len(COMMANDS) >= 50
    others = [line for page, line in shell_lines() if (page, line) not in COMMANDS and not line.startswith("#")]
    assert [line for line in others if re.search(r"rl_zoo3|sb3[-_]offline[-_]ft", line)] == []


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_commands_have_the_options_that_are_shown(page: str, installation: Installation) -> None:
    for line in (line for where, line in COMMANDS if where == page):
        command = COMMAND.search(line)
        assert command is not None
        module = [command[1]] if command[1] else ["sb3_offline_ft", *command[2].split()[1:]]
        # What follows -params are not options
        shown = re.findall(r"(?<=\s)--?[A-Za-z][\w-]*", line[command.end() :].split("#")[0].split("-params")[0])
        known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_of(installation, *module)))
        assert [option for option in shown if option not in known] == [], line
