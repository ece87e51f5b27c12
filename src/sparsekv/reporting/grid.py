"""A table of texts: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsekv.reporting.markdown import markdown_row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A titled table of texts.

    Parameters
    ----------
    title : what it shows
    header : column names
    rows : one text per column
    left : so many first columns are aligned left, the others right
    bold : indices of rows that stand out
    spare : so many last columns are left out, one after the other, where a terminal is too narrow
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    bold: frozenset[int] = frozenset()
    spare: int = 0

    def markdown(self) -> str:
        """A GitHub table, without the title."""
        marks = ["---" if index < self.left else "---:" for index in range(len(self.header))]
        return "".join(markdown_row(line) for line in (self.header, marks, *self.rows))

    def rich(self, width: int) -> Table:
        """A table for a terminal `width` characters wide."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        n_columns = len(self.header)
        while self._needed(n_columns) > width and n_columns > len(self.header) - self.spare:
            n_columns -= 1
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(self.title), title_justify="left")
        for index, name in enumerate(self.header[:n_columns]):
            named = index < self.left  # names may break where they must, numbers never
            justify: Literal["left", "right"] = "left" if named else "right"
            # Text, not str: rich would take "[window_size=8]" for a style.
            table.add_column(Text(name), justify=justify, no_wrap=not named, overflow="fold")
        for index, row in enumerate(self.rows):
            table.add_row(*map(Text, row[:n_columns]), style="bold" if index in self.bold else None)
        return table

    def _needed(self, n_columns: int) -> int:
        lines: Sequence[Sequence[str]] = [self.header, *self.rows]
        return sum(max(len(line[i]) for line in lines) + 3 for i in range(n_columns))
