"""Everything a finished (or interrupted) run leaves for its reader: results.md and scores.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.plots import scores_png
from sparsekv.reporting.tables import labels_of, results_page

PICTURE = "scores.png"
PAGE = "results.md"

Write = Callable[[str, "str | bytes"], None]


def write_report(rows: Sequence[ResultRow], run: Mapping[str, Any], write: Write) -> list[str]:
    """Write the page and the picture with `write(name, content)`; returns the names written.

    Without matplotlib the picture is left out.
    """
    identity = run["identity"]
    shown = identity["model"].rpartition("/")[2]
    try:
        picture = scores_png(rows, f"{shown}, {identity['dtype']}", labels_of(run))
    except ImportError:
        picture = None
    written = []
    if picture is not None:
        write(PICTURE, picture)
        written.append(PICTURE)
    write(PAGE, results_page(rows, run, PICTURE if picture is not None else None))
    return [PAGE, *written]
