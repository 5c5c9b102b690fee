"""The examples run, without a warning, with their budgets divided by 1,000; the notebook's text says what its outputs say."""

import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

from tests.conftest import REPOSITORY
from tests.test_docs import shortened

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NOTEBOOK = nbformat.read(EXAMPLES / "pretrain_finetune.ipynb", as_version=4)
CODE_CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")


@pytest.fixture(autouse=True)
def figures_without_a_screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def run(code: str, path: Path) -> None:
    """The warm-ups are not budgets: without at least five episodes in them, the guard warns."""
    for name in ("WARMUP = 3000", "EVALUATE_EVERY = 250"):
        code = code.replace(name, name.split(" = ")[0] + " = 1000")
    exec(compile(shortened(code), str(path), "exec"), {"__name__": "__main__"})


def texts(cells: list[nbformat.NotebookNode]) -> str:
    """What the outputs of these cells say, without the pictures."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(output.text if output.output_type == "stream" else output.data["text/plain"] for output in outputs)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    path = EXAMPLES / name
    run(path.read_text(encoding="utf-8"), path)


def test_all_scripts_are_shown_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "examples.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 8
    assert [name for name in SCRIPTS if f"../examples/{name}" not in page] == []


def test_notebook_runs() -> None:
    run("\n".join(cell.source for cell in CODE_CELLS), EXAMPLES / "pretrain_finetune.ipynb")


def test_notebook_is_stored_with_the_outputs_of_one_run() -> None:
    assert [cell.execution_count for cell in CODE_CELLS] == list(range(1, len(CODE_CELLS) + 1))
    kinds = [output.output_type for cell in CODE_CELLS for output in cell.outputs]
    assert "error" not in kinds
    assert "stderr" not in [output.get("name") for cell in CODE_CELLS for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for cell in CODE_CELLS for output in cell.outputs) == 3


def test_numbers_in_the_text_of_the_notebook_are_in_its_code_and_outputs() -> None:
    known = set(NUMBER.findall(texts(CODE_CELLS)))
    known |= {number.replace("_", "") for cell in CODE_CELLS for number in re.findall(r"\d[\d_.]*", cell.source)}
    stated = NUMBER.findall(NOTEBOOK.cells[-1].source)
    assert len(set(stated)) >= 10, "the conclusion states what came out"
    assert [number for number in stated if number not in known] == []
