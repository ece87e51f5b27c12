"""`sparsekv ls`: what names there are."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsekv.errors import unknown

KINDS = ("methods", "tasks", "models")


def listing(what: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")]) -> None:
    """List the methods, the benchmarks' tasks, or the models that need no Hub."""
    if what == "methods":
        rows = _methods()
    elif what == "tasks":
        rows = _tasks()
    elif what == "models":
        rows = _models()
    else:
        raise unknown("list", what, KINDS)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        lead = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
        typer.echo(f"{lead}  {row[-1]}".rstrip())


def _methods() -> list[tuple[str, ...]]:
    from sparsekv.policies import list_methods

    rows: list[tuple[str, ...]] = [("METHOD", "ROUTE", "ALIASES", "IDEA")]
    for info in list_methods():
        paper = f" ({info.paper})" if info.paper else ""
        rows.append((info.name, info.route, ", ".join(info.aliases), info.idea + paper))
    return rows


def _tasks() -> list[tuple[str, ...]]:
    from sparsekv.benchmarks import BENCHMARKS

    rows: list[tuple[str, ...]] = [("BENCHMARK", "TASK")]
    for name in BENCHMARKS.names():
        rows += [(name, task) for task in BENCHMARKS.get(name).tasks() or ["(as the data file names them)"]]
    return rows


def _models() -> list[tuple[str, ...]]:
    from sparsekv.models import MODELS

    rows: list[tuple[str, ...]] = [("MODEL", "PUBLIC ID", "PARAMETERS", "WEIGHTS")]
    for name in MODELS.names():
        model = MODELS.get(name)
        rows.append((name, model.public_id, f"{model.parameters / 1e6:.0f}M", model.weights))
    return rows
