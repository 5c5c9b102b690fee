"""Tables of pages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TextTable:
    """A table of texts, whose rows begin with their own heading; the title stands above it, the note below."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def untitled(self) -> "TextTable":
        return replace(self, name=self.title or self.name, title="")

    def as_markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        parts = [f"### {self.title}\n"] if self.title else []
        parts.append("\n".join([line(self.columns), "|" + " --- |" * len(self.columns), *map(line, self.rows)]))
        if self.note:
            parts.append(f"\n{self.note}")
        return "\n".join(parts) + "\n"
