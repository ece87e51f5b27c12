"""Results, one row per cell, gathered into one line per method and budget; the uncompressed line first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsekv.benchmarks.scoring import higher_is_better
from sparsekv.evaluation.cells import UNCOMPRESSED, shown, shown_budget
from sparsekv.evaluation.records import ResultRow


@dataclass(frozen=True)
class Line:
    """One method at one budget over all tasks.

    Parameters
    ----------
    method : label, with the phase and the scope where lines differ in them
    requested : the budget as it was asked for ("0.50", "512 tokens", "own", "–" for the uncompressed line)
    ratio : the requested compression_ratio, if it was one
    scores : task column -> score
    average : mean of the scores that are percentages, None if there are none
    complete : every column has a score
    achieved : mean achieved_compression over tasks
    cache_bytes, tokens_per_s : mean over tasks; tokens_per_s None where nothing was measured
    uncompressed : nothing was evicted
    """

    method: str
    requested: str
    ratio: float | None
    scores: dict[str, float]
    average: float | None
    complete: bool
    achieved: float
    cache_bytes: float
    tokens_per_s: float | None
    uncompressed: bool


@dataclass(frozen=True)
class Summary:
    """The columns (one per task and context length, in order) and the lines."""

    columns: list[str]
    percentages: set[str]
    lines: list[Line]


def column_name(row: ResultRow, several_benchmarks: bool, several_lengths: bool) -> str:
    """The task's name, as short as it can be without ambiguity."""
    name = f"{row['benchmark']}/{row['task']}" if several_benchmarks else row["task"]
    return (
        f"{name}@{row['context_length']}" if several_lengths and row["context_length"] is not None else name
    )


def summarize(rows: Sequence[ResultRow], labels: Mapping[str, str] | None = None) -> Summary:
    """Rows of results.jsonl to lines: the uncompressed first, then by method in order of appearance, then by
    budget.

    `labels`: cell_id -> what to call the cell's method; by default its name and parameters.
    """
    labels = labels or {}
    tasks = {(row["benchmark"], row["task"]) for row in rows}
    benchmarks = len({task for _, task in tasks}) < len(tasks)
    lengths = len({row["context_length"] for row in rows}) > 1
    columns: list[str] = []
    percentages: set[str] = set()
    groups: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        name = column_name(row, benchmarks, lengths)
        if name not in columns:
            columns.append(name)
        if higher_is_better(row["metric"]):
            percentages.add(name)
        groups.setdefault(_line_key(row), []).append(row)
    compressed = [row for row in rows if not _is_uncompressed(row)]
    phases, scopes = {row["phase"] for row in compressed}, {row["budget_scope"] for row in compressed}
    apart = [name for name, found in (("phase", phases), ("budget_scope", scopes)) if len(found) > 1]
    lines = [
        _line(group, labels, benchmarks, lengths, apart, columns, percentages) for group in groups.values()
    ]
    order = {line.method: index for index, line in reversed(list(enumerate(lines)))}
    lines.sort(
        key=lambda line: (not line.uncompressed, order[line.method], line.ratio is None, line.ratio or 0.0)
    )
    return Summary(columns, percentages, lines)


def _is_uncompressed(row: ResultRow) -> bool:
    return row["method"] == UNCOMPRESSED


def _line_key(row: ResultRow) -> tuple[object, ...]:
    fields = (
        row["method"],
        row["compression_ratio"],
        row["budget_tokens"],
        row["phase"],
        row["budget_scope"],
    )
    if _is_uncompressed(row):
        return (row["method"],)
    return (*fields, repr(sorted(row["method_args"].items())))


def _line(
    group: Sequence[ResultRow],
    labels: Mapping[str, str],
    benchmarks: bool,
    lengths: bool,
    apart: Sequence[str],
    columns: Sequence[str],
    percentages: set[str],
) -> Line:
    first = group[0]
    scores = {column_name(row, benchmarks, lengths): row["score"] for row in group}
    averaged = [score for name, score in scores.items() if name in percentages]
    speeds = [row["decode_tokens_per_s"] for row in group if row["decode_tokens_per_s"] is not None]
    uncompressed = _is_uncompressed(first)
    differing: Mapping[str, object] = first
    extra = "" if uncompressed or not apart else f" ({', '.join(str(differing[name]) for name in apart)})"
    ratio = first["compression_ratio"]
    requested = "–" if uncompressed else shown_budget(ratio, first["budget_tokens"])
    return Line(
        method=labels.get(first["cell_id"], shown(first["method"], first["method_args"])) + extra,
        requested=requested,
        ratio=ratio,
        scores=scores,
        average=statistics.fmean(averaged) if averaged else None,
        complete=all(name in scores for name in columns),
        achieved=statistics.fmean(row["achieved_compression"] for row in group),
        cache_bytes=statistics.fmean(row["cache_bytes"] for row in group),
        tokens_per_s=statistics.fmean(speeds) if speeds else None,
        uncompressed=uncompressed,
    )
