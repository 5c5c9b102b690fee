"""Every Python example of the documentation runs, without a warning.

An integer with an underscore, such as ``50_000``, is a budget in the examples: it is divided by 1,000, rounded up.
"""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
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


def test_only_budgets_are_shortened() -> None:
    code = "learn(1_000_000, n=2_500, x=1e-3, y=1000, name_1_000, 0.1_000)"
    assert shortened(code) == "learn(1000, n=3, x=1e-3, y=1000, name_1_000, 0.1_000)"


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = DOCS / page
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in examples(path.read_text(encoding="utf-8")):
        exec(compile(shortened(code), str(path), "exec"), namespace)
