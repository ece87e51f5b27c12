"""The table of a run: for the terminal and for results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsekv.evaluation.records import ResultRow
from sparsekv.evaluation.results import joined_commits
from sparsekv.reporting.summary import Line, Summary, summarize

if TYPE_CHECKING:
    from rich.table import Table

MEGABYTE = 1e6
LEAD = ("method", "requested", "achieved", "average")
TRAIL = ("cache MB", "tokens/s")


def labels_of(run: Mapping[str, Any]) -> dict[str, str]:
    """What the methods of a run are called, by cell_id, from its run.json."""
    return {cell_id: definition["label"] for cell_id, definition in run["cells"].items()}


def _cells(line: Line, columns: Sequence[str]) -> list[str]:
    """The texts of one line, in the order of LEAD, the task columns and TRAIL."""
    average = "–" if line.average is None else f"{line.average:.1f}{'' if line.complete else '*'}"
    scores = [f"{line.scores[name]:.1f}" if name in line.scores else "–" for name in columns]
    speed = "–" if line.tokens_per_s is None else f"{line.tokens_per_s:.1f}"
    lead = [line.method, line.requested, f"{line.achieved:.3f}", average]
    return [*lead, *scores, f"{line.cache_bytes / MEGABYTE:.2f}", speed]


def notes(summary: Summary) -> list[str]:
    """What a reader must know to read the table."""
    found = [
        "requested: compression_ratio, the fraction of the context's entries to remove; achieved: the fraction "
        "really removed; cache MB: 10^6 bytes after the context was compacted, mean over rows",
    ]
    if any(line.tokens_per_s is not None for line in summary.lines):
        found.append("tokens/s: decoding, each method alone, batch 1")
    lower = [name for name in summary.columns if name not in summary.percentages]
    if lower:
        found.append(f"lower is better, and not part of the average: {', '.join(lower)}")
    if not all(line.complete for line in summary.lines):
        found.append("* average over only some of the tasks")
    return found


def to_markdown(summary: Summary) -> str:
    """A GitHub table."""
    header = [*LEAD, *summary.columns, *TRAIL]
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |")
    lines += ["| " + " | ".join(_cells(line, summary.columns)) + " |" for line in summary.lines]
    return "\n".join(lines) + "\n"


def to_rich(summary: Summary, width: int) -> Table:
    """A table for a terminal `width` characters wide; task columns are left out if they don't fit."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(summary.columns)
    rows = [_cells(line, columns) for line in summary.lines]
    if _needed([*LEAD, *columns, *TRAIL], rows) > width:
        columns = []
        rows = [_cells(line, columns) for line in summary.lines]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate([*LEAD, *columns, *TRAIL]):
        title = _wrapped(name) if name in columns else name
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for line, cells in zip(summary.lines, rows, strict=True):
        # Text, not str: rich would take "[window_size=8]" for a style.
        table.add_row(*map(Text, cells), style="bold" if line.uncompressed else None)
    return table


def _wrapped(name: str) -> str:
    """A column's title in lines short enough for a table of many tasks: broken at "/", "_" and "@"."""
    for mark in ("/", "@"):
        name = name.replace(mark, f"\n{mark}" if mark == "@" else f"{mark}\n")
    parts = []
    for line in name.split("\n"):
        head, _, tail = line.partition("_")
        parts.append(f"{head}_\n{tail}" if tail and len(line) > 8 else line)
    return "\n".join(parts)


def _needed(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters the table takes: the widest text of every column and the space between them."""
    widths = [max(len(part) for part in _wrapped(name).split("\n")) for name in header]
    for row in rows:
        widths = [max(width, len(text)) for width, text in zip(widths, row, strict=True)]
    return sum(widths) + 3 * len(widths)


def facts_of(rows: Sequence[ResultRow], run: Mapping[str, Any]) -> dict[str, str]:
    """All that is needed to get the rows of a run.json again, as name -> Markdown text."""
    identity, machine = run["identity"], run["machine"]
    counts = sorted({row["n"] for row in rows})
    n_rows = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    commits = [commit for row in rows if row["commit"] for commit in row["commit"].split(", ")]
    gpus = ", ".join(machine["gpus"]) or "none"
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
    return {
        "command": f"`{run['command']}`" if run["command"] else "–",
        "model": identity["model"] + (f" with adapter {identity['adapter']}" if identity["adapter"] else ""),
        "dtype, device": f"{identity['dtype']}, {identity['device']}",
        "rows per task": n_rows,
        "seed": str(identity["seed"]),
        "question known to eviction": "yes" if identity["query_aware"] else "no",
        "date": str(run["finished"] or f"{run['started']} (not finished)"),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {memory}, GPU: {gpus}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "commit": joined_commits(commits) or "–",
    }


def facts_table(facts: Mapping[str, str]) -> str:
    """`facts_of` as a Markdown table."""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in facts.items()) + "\n"


def results_page(rows: Sequence[ResultRow], run: Mapping[str, Any], picture: str | None) -> str:
    """results.md: the table, and all that is needed to get it again."""
    summary = summarize(rows, labels_of(run))
    parts = ["# Results\n", to_markdown(summary), "\n".join(f"- {note}" for note in notes(summary)) + "\n"]
    if picture is not None:
        parts.append(f"![average score against achieved compression]({picture})\n")
    parts.append(facts_table(facts_of(rows, run)))
    return "\n".join(parts)
