"""Texts in Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A code span shows "&lt;" as it is, and "<" needs no escape in it.
_CODE_OR_LESS = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|<")


def cell(text: str) -> str:
    """A text that stays in one cell of a GitHub table: no "|" of its own, one line, no HTML. Code spans stay."""
    line = " ".join(text.splitlines()).replace("|", r"\|")
    return _CODE_OR_LESS.sub(lambda found: found[0] if found[1] else "&lt;", line)


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a GitHub table, with its end."""
    return "| " + " | ".join(map(cell, cells)) + " |\n"


def code(text: str) -> str:
    """A code span of a text, whatever backticks it holds."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
