"""What data and names say is shown, and never obeyed by the terminal."""

import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from sb3_offline_ft.cli import app
from sb3_offline_ft.common.console import PlainConsole, echo

CODES = "\x1b]0;title\x07\x1b[31mred\x9b2Jgone\r"


def test_texts_of_data_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    table = Table(title=CODES)
    table.add_row(CODES, Text(CODES, style="red"))
    console.print(CODES, highlight=False, markup=False)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    # Colours are Rich's own
    assert "\x1b[31m" in shown and "\x1b[31mred" not in shown
    for code in ("\x07", "\x9b", "\r", "\x1b]"):
        assert code not in shown
    # Some Rich leaves out
    assert shown.count("\\x1b]0;title") == 4 and "red\\x9b2Jgone" in shown
    echo(f"tab\tand {CODES}")
    assert capsys.readouterr().out == "tab\tand \\x1b]0;title\\x07\\x1b[31mred\\x9b2Jgone\\x0d\n"


def test_commands_show_names_and_errors_as_text(tmp_path: Path) -> None:
    table = tmp_path / f"log{CODES[:4]}.csv"
    table.write_text("a,b\n1,2\n")
    for arguments in (
        ["dataset", "convert", str(table), "--to", "my/x-v0", "--observations", CODES],
        ["dataset", "show", str(tmp_path / CODES)],
        ["summary", str(tmp_path / CODES)],
        ["study", "status", str(tmp_path / CODES)],
        ["guard", "show", str(tmp_path / CODES)],
    ):
        result = CliRunner().invoke(app, arguments, color=True)
        assert result.exit_code == 1, arguments
        assert not set("\x1b\x07\x9b\r") & set(result.output), arguments
