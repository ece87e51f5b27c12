"""Everything a finished (or interrupted) run leaves for its reader: results.md and the pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.by_context import ByContext, by_context, context_grid, context_notes
from sparsekv.reporting.context_plots import context_figures
from sparsekv.reporting.plots import scores_png
from sparsekv.reporting.summary import summarize
from sparsekv.reporting.tables import facts_of, facts_table, labels_of, listed, notes, to_markdown

PICTURE = "scores.png"
PAGE = "results.md"

Write = Callable[[str, "str | bytes"], None]


def write_report(rows: Sequence[ResultRow], run: Mapping[str, Any], write: Write) -> list[str]:
    """Write the page and the pictures with `write(name, content)`; returns the names written.

    Without matplotlib the pictures are left out. The page is there before they are drawn, and written anew with them.
    """
    identity = run["identity"]
    title = f"{identity['model'].rpartition('/')[2]}, {identity['dtype']}"
    lengths = by_context(rows, labels_of(run))
    # A picture that can't be drawn must not cost the tables.
    write(PAGE, results_page(rows, run, None, lengths))
    figures: dict[str, tuple[str, bytes]] = {}
    try:
        picture = scores_png(rows, title, labels_of(run))
        figures = {} if lengths is None else context_figures(lengths, title)
    except ImportError:
        picture = None
    written = []
    if picture is not None:
        write(PICTURE, picture)
        written.append(PICTURE)
    for name, (_, figure) in figures.items():
        write(name, figure)
        written.append(name)
    if written:
        shown = {name: shows for name, (shows, _) in figures.items()}
        write(PAGE, results_page(rows, run, PICTURE if picture is not None else None, lengths, shown))
    return [PAGE, *written]


def results_page(
    rows: Sequence[ResultRow],
    run: Mapping[str, Any],
    picture: str | None,
    lengths: ByContext | None = None,
    figures: Mapping[str, str] | None = None,
) -> str:
    """results.md: the tables, the pictures, and all that is needed to get them again.

    Parameters
    ----------
    picture : file of the picture of all scores
    lengths : the same by context length, where there are several
    figures : file -> what it shows, of the pictures of `lengths`
    """
    summary = summarize(rows, labels_of(run))
    parts = ["# Results\n"]
    if lengths is not None:
        grid = context_grid(lengths)
        new_tokens = run.get("config", {}).get("cost_new_tokens")
        parts += [f"## {grid.title}\n", grid.markdown(), listed(context_notes(lengths, new_tokens))]
        parts += [f"![{shows} against context length]({name})\n" for name, shows in (figures or {}).items()]
        parts.append("## Every task\n")
    parts += [to_markdown(summary), listed(notes(summary))]
    if picture is not None:
        parts.append(f"![average score against achieved compression]({picture})\n")
    parts.append(facts_table(facts_of(rows, run)))
    return "\n".join(parts)
