"""What changes with the length of the context: one point per method, budget and length. Draws nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsekv.benchmarks.scoring import higher_is_better
from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.grid import Grid
from sparsekv.reporting.summary import grouped, passive_bytes, short_cells
from sparsekv.reporting.tables import ATTENDED_NOTE, MEGABYTE, PASSIVE_NOTE

TaskName = tuple[str, str]
"""(benchmark, task)"""


@dataclass(frozen=True)
class Point:
    """One method at one budget on contexts of one length, means over tasks; None: not measured, or not complete.

    Parameters
    ----------
    score : of the tasks that are percentages, if all of them are there, each over as many rows as any other curve's
    achieved, attended : achieved_compression and attended_fraction
    active_bytes, passive_bytes : of the cache, by tier
    read_s : seconds to read the context and to compress it
    token_s : seconds per token of the answer after the first
    throughput : tokens of the answer per second of the whole request
    """

    score: float | None
    achieved: float
    attended: float
    active_bytes: float
    passive_bytes: float
    read_s: float | None
    token_s: float | None
    throughput: float | None


@dataclass(frozen=True)
class Curve:
    """One method at one budget over all lengths: `points` by length, ascending.

    `name` tells it from all other curves; `method` and `requested` are a table's.
    """

    name: str
    method: str
    requested: str
    uncompressed: bool
    points: dict[int, Point]


@dataclass(frozen=True)
class ByContext:
    """All curves of a run.

    Parameters
    ----------
    sizes : context lengths in tokens, ascending
    tasks : names of the tasks that were run at every one of them
    n_scored : how many of these are percentages
    left_out : names of the other tasks
    """

    sizes: tuple[int, ...]
    tasks: tuple[str, ...]
    n_scored: int
    left_out: tuple[str, ...]
    curves: tuple[Curve, ...]

    @property
    def points(self) -> list[Point]:
        """Of all curves."""
        return [point for curve in self.curves for point in curve.points.values()]


def by_context(rows: Sequence[ResultRow], labels: Mapping[str, str] | None = None) -> ByContext | None:
    """Rows of results.jsonl by context length; None if no task has several.

    Only tasks that have the same lengths are taken together, so that a curve's points differ in the length alone: those
    lengths that most tasks have.

    Parameters
    ----------
    labels : cell_id -> what to call the cell's method
    """
    lengths: dict[TaskName, set[int]] = {}
    for row in rows:
        known = lengths.setdefault((row["benchmark"], row["task"]), set())
        if row["context_length"] is not None:
            known.add(row["context_length"])
    votes = Counter(frozenset(known) for known in lengths.values() if len(known) > 1)
    if not votes:
        return None
    chosen = max(votes, key=lambda found: (votes[found], len(found), sorted(found)))
    tasks = [task for task, known in lengths.items() if known == chosen]
    swept = [row for row in rows if (row["benchmark"], row["task"]) in tasks]
    scored = {(r["benchmark"], r["task"]) for r in swept if higher_is_better(r["metric"])}
    groups = grouped(swept, labels)
    short = short_cells(swept)
    budgets = Counter(group.method for group in groups)
    curves = []
    for group in groups:
        several = budgets[group.method] > 1
        of_size: dict[int, list[ResultRow]] = {size: [] for size in sorted(chosen)}
        for row in group.rows:
            if row["context_length"] is not None:
                of_size[row["context_length"]].append(row)
        curves.append(
            Curve(
                name=f"{group.method} {group.requested}" if several else group.method,
                method=group.method,
                requested=group.requested,
                uncompressed=group.uncompressed,
                points={size: _point(found, len(scored), short) for size, found in of_size.items() if found},
            )
        )
    return ByContext(
        sizes=tuple(sorted(chosen)),
        tasks=_names(tasks, lengths),
        n_scored=len(scored),
        left_out=_names([task for task in lengths if task not in tasks], lengths),
        curves=tuple(curves),
    )


def _names(tasks: Sequence[TaskName], among: Iterable[TaskName]) -> tuple[str, ...]:
    alike = Counter(task for _, task in among)
    return tuple(task if alike[task] == 1 else f"{benchmark}/{task}" for benchmark, task in tasks)


def _point(rows: Sequence[ResultRow], n_scored: int, short: set[str]) -> Point:
    scored = [row for row in rows if higher_is_better(row["metric"])]
    scores = [row["score"] for row in scored if row["cell_id"] not in short]
    passive = statistics.fmean(passive_bytes(row) for row in rows)
    read = [r["prefill_s"] + (r["select_s"] or 0.0) for r in rows if r["prefill_s"] is not None]
    return Point(
        score=statistics.fmean(scores) if scores and len(scores) == n_scored else None,
        achieved=statistics.fmean(row["achieved_compression"] for row in rows),
        attended=statistics.fmean(row["attended_fraction"] for row in rows),
        active_bytes=statistics.fmean(row["cache_bytes"] for row in rows) - passive,
        passive_bytes=passive,
        read_s=statistics.fmean(read) if read else None,
        token_s=_mean([1 / rate for row in rows if (rate := row["decode_tokens_per_s"])]),
        throughput=_mean([rate for row in rows if (rate := row.get("throughput_tokens_per_s"))]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def context_grid(found: ByContext) -> Grid:
    """The table `by context size`: one line per length and curve, the uncompressed ones bold."""
    points = found.points
    columns: list[tuple[str, bool]] = [
        ("score", any(p.score is not None for p in points)),
        ("achieved", True),
        ("active MB", True),
        ("passive MB", any(p.passive_bytes for p in points)),
        ("attended", any(p.attended < 1 for p in points)),
        ("read s", any(p.read_s is not None for p in points)),
        ("ms/token", any(p.token_s is not None for p in points)),
        ("throughput", any(p.throughput is not None for p in points)),
    ]
    names = [name for name, wanted in columns if wanted]
    lines: list[tuple[str, ...]] = []
    bold: set[int] = set()
    for size in found.sizes:
        for curve in found.curves:
            point = curve.points.get(size)
            if point is None:
                continue
            if curve.uncompressed:
                bold.add(len(lines))
            texts = _texts(point)
            lines.append((str(size), curve.method, curve.requested, *(texts[name] for name in names)))
    header = ("context", "method", "requested", *names)
    return Grid("By context size", header, tuple(lines), 3, frozenset(bold), spare=len(names) - 1)


def _texts(point: Point) -> dict[str, str]:
    def text(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    return {
        "score": text(point.score, ".1f"),
        "achieved": f"{point.achieved:.3f}",
        "active MB": f"{point.active_bytes / MEGABYTE:.2f}",
        "passive MB": f"{point.passive_bytes / MEGABYTE:.2f}" if point.passive_bytes else "–",
        "attended": f"{point.attended:.2f}",
        "read s": text(point.read_s, ".2f"),
        "ms/token": text(None if point.token_s is None else 1000 * point.token_s, ".1f"),
        "throughput": text(point.throughput, ".2f"),
    }


def context_notes(found: ByContext, new_tokens: int | None = None) -> list[str]:
    """What a reader must know to read the table and the figures; `new_tokens`: of an answer in the cost pass."""
    many = "" if len(found.tasks) == 1 else "s"
    notes = [f"means over {len(found.tasks)} task{many} at every size: {', '.join(found.tasks)}"]
    if found.left_out:
        notes.append(f"left out, not run at these sizes: {', '.join(found.left_out)}")
    if found.n_scored < len(found.tasks):
        notes.append(f"score: of {found.n_scored} of them, the others are no percentages")
    points = found.points
    if any(p.passive_bytes for p in points):
        notes.append(PASSIVE_NOTE)
    if any(p.attended < 1 for p in points):
        notes.append(ATTENDED_NOTE)
    if any(p.read_s is not None for p in points):
        length = "" if new_tokens is None else f" of {new_tokens} tokens"
        notes.append(
            "each method alone, batch 1; read s: reading and compressing the context; ms/token: decoding, after the "
            f"first token; throughput: tokens per second of the whole request, an answer{length} with all that comes "
            "before it"
        )
    return notes
