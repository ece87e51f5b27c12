"""The table of a run, for the terminal and for a page, and the facts of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsekv.evaluation.records import ResultRow
from sparsekv.evaluation.results import joined_commits
from sparsekv.reporting.markdown import code, markdown_row
from sparsekv.reporting.summary import Line, Summary

if TYPE_CHECKING:
    from rich.table import Table

MEGABYTE = 1e6
LEAD = ("method", "requested", "achieved", "average")


def labels_of(run: Mapping[str, Any]) -> dict[str, str]:
    """What the methods of a run are called, by cell_id, from its run.json."""
    return {cell_id: definition["label"] for cell_id, definition in run["cells"].items()}


def _trail(summary: Summary) -> list[str]:
    """The columns after the tasks: only what tells lines apart."""
    tiers = any(line.passive_bytes for line in summary.lines)
    steps = any(line.attended < 1 for line in summary.lines)
    return [
        *(["active MB", "passive MB"] if tiers else ["cache MB"]),
        *(["attended"] if steps else []),
        "tokens/s",
    ]


def _cells(line: Line, columns: Sequence[str], trail: Sequence[str]) -> list[str]:
    """The texts of one line, in the order of LEAD, the task columns and the trail."""
    average = "–" if line.average is None else f"{line.average:.1f}{'' if line.complete else '*'}"
    scores = [
        f"{line.scores[name]:.1f}{'*' if name in line.short else ''}" if name in line.scores else "–"
        for name in columns
    ]
    last = {
        "cache MB": f"{line.cache_bytes / MEGABYTE:.2f}",
        "active MB": f"{(line.cache_bytes - line.passive_bytes) / MEGABYTE:.2f}",
        "passive MB": f"{line.passive_bytes / MEGABYTE:.2f}" if line.passive_bytes else "–",
        "attended": f"{line.attended:.2f}",
        "tokens/s": "–" if line.tokens_per_s is None else f"{line.tokens_per_s:.1f}",
    }
    lead = [line.method, line.requested, f"{line.achieved:.3f}", average]
    return [*lead, *scores, *(last[name] for name in trail)]


PASSIVE_NOTE = (
    "passive MB: what left the active tier and may come back, page summaries included; in slower memory"
)
ATTENDED_NOTE = (
    "attended: the fraction of what is stored, in both tiers, that the answer's last step attended to"
)

INCOMPLETE_NOTE = (
    "* average over only some of the tasks, or a score over fewer of a task's rows than another line's"
)


def notes(summary: Summary) -> list[str]:
    """What a reader must know to read the table."""
    trail = _trail(summary)
    where = " of the active tier" if "passive MB" in trail else ""
    found = [
        "requested: compression_ratio, the fraction of the context's entries to remove; achieved: the fraction "
        f"really removed{where}; MB: 10^6 bytes after the context was compacted, mean over rows",
    ]
    if "passive MB" in trail:
        found.append(PASSIVE_NOTE)
    if "attended" in trail:
        found.append(ATTENDED_NOTE)
    if any(line.tokens_per_s is not None for line in summary.lines):
        found.append("tokens/s: decoding, each method alone, batch 1")
    lower = [name for name in summary.columns if name not in summary.percentages]
    if lower:
        found.append(f"lower is better, and not part of the average: {', '.join(lower)}")
    if not all(line.complete for line in summary.lines):
        found.append(INCOMPLETE_NOTE)
    return found


def to_markdown(summary: Summary) -> str:
    """A GitHub table."""
    trail = _trail(summary)
    header = [*LEAD, *summary.columns, *trail]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [_cells(line, summary.columns, trail) for line in summary.lines]
    return "".join(map(markdown_row, lines))


def to_rich(summary: Summary, width: int) -> Table:
    """A table for a terminal `width` characters wide; task columns are left out if they don't fit."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, trail = list(summary.columns), _trail(summary)
    rows = [_cells(line, columns, trail) for line in summary.lines]
    if _needed([*LEAD, *columns, *trail], rows) > width:
        columns = []
        rows = [_cells(line, columns, trail) for line in summary.lines]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate([*LEAD, *columns, *trail]):
        title = _wrapped(name) if name in columns else name
        # Text, not str: rich would take "[window_size=8]" for a style.
        table.add_column(Text(title), justify="left" if index == 0 else "right", no_wrap=True)
    for line, cells in zip(summary.lines, rows, strict=True):
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
        "command": code(run["command"]) if run["command"] else "–",
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
    return "| | |\n|---|---|\n" + "".join(map(markdown_row, facts.items()))


def listed(notes: Sequence[str]) -> str:
    """Notes as a Markdown list."""
    return "\n".join(f"- {note}" for note in notes) + "\n"
