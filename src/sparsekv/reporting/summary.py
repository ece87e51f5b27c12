"""Results, one row per cell, gathered into one line per method and budget; the uncompressed line first."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsekv.benchmarks.scoring import higher_is_better
from sparsekv.evaluation.cells import UNCOMPRESSED, shown, shown_budget
from sparsekv.evaluation.records import ResultRow
from sparsekv.evaluation.tier import tier_options


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
    complete : every column has a score, none of them over fewer rows than another line's
    achieved : mean achieved_compression over tasks
    cache_bytes, passive_bytes, tokens_per_s : mean over tasks; tokens_per_s None where nothing was measured.
        cache_bytes holds all tiers, passive_bytes the part in a second one.
    attended : mean attended_fraction over tasks
    uncompressed : nothing was evicted
    short : columns whose score is over fewer rows than another line's
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
    passive_bytes: float = 0.0
    attended: float = 1.0
    short: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Summary:
    """The columns (one per task and context length, in order) and the lines."""

    columns: list[str]
    percentages: set[str]
    lines: list[Line]


@dataclass(frozen=True)
class Group:
    """The rows of one method at one budget; `method`, `requested`, `ratio` and `uncompressed` as in `Line`."""

    method: str
    requested: str
    ratio: float | None
    uncompressed: bool
    rows: list[ResultRow]


def column_name(row: ResultRow, several_benchmarks: bool, several_lengths: bool) -> str:
    """The task's name, as short as it can be without ambiguity."""
    name = f"{row['benchmark']}/{row['task']}" if several_benchmarks else row["task"]
    return (
        f"{name}@{row['context_length']}" if several_lengths and row["context_length"] is not None else name
    )


def short_cells(rows: Sequence[ResultRow]) -> set[str]:
    """The cell_ids of rows whose score is over fewer examples than another row's of the same task and length."""

    def scored(row: ResultRow) -> tuple[str, str, int | None]:
        return row["benchmark"], row["task"], row["context_length"]

    most: Counter[tuple[str, str, int | None]] = Counter()
    for row in rows:
        most[scored(row)] = max(most[scored(row)], row["n"])
    return {row["cell_id"] for row in rows if row["n"] < most[scored(row)]}


def summarize(rows: Sequence[ResultRow], labels: Mapping[str, str] | None = None) -> Summary:
    """Rows of results.jsonl to lines: the uncompressed first, then by method in order of appearance, then by
    budget.

    `labels`: cell_id -> what to call the cell's method; by default its name and parameters.
    """
    tasks = {(row["benchmark"], row["task"]) for row in rows}
    benchmarks = len({task for _, task in tasks}) < len(tasks)
    lengths = len({row["context_length"] for row in rows}) > 1
    columns: list[str] = []
    percentages: set[str] = set()
    for row in rows:
        name = column_name(row, benchmarks, lengths)
        if name not in columns:
            columns.append(name)
        if higher_is_better(row["metric"]):
            percentages.add(name)
    short = short_cells(rows)
    lines = [
        _line(group, benchmarks, lengths, columns, percentages, short) for group in grouped(rows, labels)
    ]
    return Summary(columns, percentages, lines)


def grouped(rows: Sequence[ResultRow], labels: Mapping[str, str] | None = None) -> list[Group]:
    """Rows by method and budget, in the order of a summary's lines; `labels` as there."""
    labels = labels or {}
    found: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        found.setdefault(_line_key(row), []).append(row)
    compressed = [row for row in rows if not _is_uncompressed(row)]
    phases, scopes = {row["phase"] for row in compressed}, {row["budget_scope"] for row in compressed}
    apart = [name for name, found in (("phase", phases), ("budget_scope", scopes)) if len(found) > 1]
    groups = [_group(group, labels, apart) for group in found.values()]
    order = {group.method: index for index, group in reversed(list(enumerate(groups)))}
    groups.sort(
        key=lambda one: (not one.uncompressed, order[one.method], one.ratio is None, one.ratio or 0.0)
    )
    return groups


def _is_uncompressed(row: ResultRow) -> bool:
    return row["method"] == UNCOMPRESSED


def _line_key(row: ResultRow) -> tuple[object, ...]:
    fields = (
        row["method"],
        row["compression_ratio"],
        row["budget_tokens"],
        row["phase"],
        row["budget_scope"],
        *_tier(row),
    )
    if _is_uncompressed(row):
        return (row["method"],)
    return (*fields, repr(sorted(row["method_args"].items())))


def _tier(row: ResultRow) -> tuple[str | None, int | None, int | None]:
    # rows of earlier versions know of one tier only
    return row.get("passive"), row.get("recall_tokens"), row.get("page_size")


def passive_bytes(row: ResultRow) -> float:
    """Of a second tier; 0 where there is none."""
    return row.get("passive_bytes") or 0.0


def _group(rows: list[ResultRow], labels: Mapping[str, str], apart: Sequence[str]) -> Group:
    first = rows[0]
    uncompressed = _is_uncompressed(first)
    differing: Mapping[str, object] = first
    extra = "" if uncompressed or not apart else f" ({', '.join(str(differing[name]) for name in apart)})"
    ratio = first["compression_ratio"]
    own = shown(first["method"], {**first["method_args"], **tier_options(*_tier(first))})
    return Group(
        method=labels.get(first["cell_id"], own) + extra,
        requested="–" if uncompressed else shown_budget(ratio, first["budget_tokens"]),
        ratio=ratio,
        uncompressed=uncompressed,
        rows=rows,
    )


def _line(
    group: Group,
    benchmarks: bool,
    lengths: bool,
    columns: Sequence[str],
    percentages: set[str],
    short_cells: set[str],
) -> Line:
    rows = group.rows
    short = frozenset(column_name(row, benchmarks, lengths) for row in rows if row["cell_id"] in short_cells)
    scores = {column_name(row, benchmarks, lengths): row["score"] for row in rows}
    averaged = [score for name, score in scores.items() if name in percentages]
    speeds = [row["decode_tokens_per_s"] for row in rows if row["decode_tokens_per_s"] is not None]
    return Line(
        method=group.method,
        requested=group.requested,
        ratio=group.ratio,
        scores=scores,
        average=statistics.fmean(averaged) if averaged else None,
        complete=not short and all(name in scores for name in columns),
        achieved=statistics.fmean(row["achieved_compression"] for row in rows),
        cache_bytes=statistics.fmean(row["cache_bytes"] for row in rows),
        tokens_per_s=statistics.fmean(speeds) if speeds else None,
        uncompressed=group.uncompressed,
        passive_bytes=statistics.fmean(passive_bytes(row) for row in rows),
        attended=statistics.fmean(row["attended_fraction"] for row in rows),
        short=short,
    )
