"""A table of text and its renderings: for terminals of any width, for pipes, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cllm_gpu.utils import exact_json
from cllm_gpu.utils.files import write_atomically
from cllm_gpu.utils.text import visible

GAP = 2
"""Spaces between two columns of a table."""
PLAIN_WIDTH = 160
"""Width in characters if there is no terminal."""
NONE = "–"
"""Content of an empty cell."""


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table; without a terminal, wide enough that rows are not wrapped."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table.visible().rich(console.width))


@dataclass(frozen=True)
class Table:
    """A table of text with notes below; columns are right-aligned except `text_columns`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: frozenset[int] = frozenset({0})
    """Left-aligned columns."""
    bad_rows: frozenset[int] = frozenset()
    """Rows to highlight (failed checks)."""
    notes: tuple[str, ...] = field(default=())
    spare_columns: tuple[int, ...] = ()
    """Columns to omit, in this order, if the terminal is too narrow; a note lists them."""

    def visible(self) -> Table:
        """The same table, its texts as a terminal may receive them."""
        return replace(
            self,
            title=visible(self.title),
            header=tuple(map(visible, self.header)),
            rows=tuple(tuple(map(visible, row)) for row in self.rows),
            notes=tuple(map(visible, self.notes)),
        )

    def rich(self, width: int) -> RichTable:
        """Render for a terminal of `width` characters: headers are wrapped between words, cells are not.

        If the table is too wide even without the spare columns, each row is rendered as a list of its cells.
        """
        widths = [self._column_width(column) for column in range(len(self.header))]
        shown = list(range(len(self.header)))
        for column in self.spare_columns:
            if sum(widths[c] + GAP for c in shown) - GAP > width:
                shown.remove(column)
        if sum(widths[c] + GAP for c in shown) - GAP > width:
            return self._rows_as_lists()
        left_out = [name for column, name in enumerate(self.header) if column not in shown]
        notes = [*self.notes, *([f"Too narrow to show: {', '.join(left_out)}."] if left_out else [])]
        grid = self._empty(notes, box=SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0))
        for column in shown:
            justify: Literal["left", "right"] = "left" if column in self.text_columns else "right"
            grid.add_column(self.header[column], justify=justify, vertical="bottom", width=widths[column])
        for number, row in enumerate(self.rows):
            grid.add_row(*(Text(row[column]) for column in shown), style=self._style(number))
        return grid

    def _rows_as_lists(self) -> RichTable:
        grid = self._empty(self.notes, box=None, show_header=False)
        for number, row in enumerate(self.rows):
            for name, cell in zip(self.header, row, strict=True):
                grid.add_row(name, Text(cell), style=self._style(number))
            grid.add_row()
        return grid

    def _empty(self, notes: Iterable[str], **style: Any) -> RichTable:
        ends: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "pad_edge": False}
        return RichTable(title=self.title, caption="\n".join(notes), **ends, **style)

    def _style(self, row: int) -> str:
        return "bold red" if row in self.bad_rows else ""

    def _column_width(self, column: int) -> int:
        return max(len(word) for word in (*self.header[column].split(), *(row[column] for row in self.rows)))

    def markdown(self) -> str:
        """Render as a Markdown document: heading, table, notes."""
        rule = [":---" if column in self.text_columns else "---:" for column in range(len(self.header))]
        lines = [_markdown_row(row) for row in (self.header, rule, *self.rows)]
        notes = [f"\n{_escaped(note)}" for note in self.notes]
        return "\n".join([f"# {_escaped(self.title)}", "", *lines, *notes]) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    text = visible(text)
    for special in "\\|*_`<":
        text = text.replace(special, f"\\{special}")
    return text


def number_or_dash(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def write_table(table: Table, data: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """Write folder/name.md and, from plain `data`, folder/name.json. Returns both paths.

    Raises UserError if they cannot be written.
    """
    markdown, json = folder / f"{name}.md", folder / f"{name}.json"
    write_atomically(markdown, table.markdown())
    write_json(json, data)
    return markdown, json


def write_json(path: Path, data: Any) -> None:
    """Write plain `data` as JSON. Raises UserError if `path` cannot be written."""
    write_atomically(path, exact_json.dumps(data, indent=1) + "\n")
