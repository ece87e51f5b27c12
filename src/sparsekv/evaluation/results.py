"""From predictions and costs to results: one row per cell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsekv.evaluation.cells import Cell
from sparsekv.evaluation.records import SCHEMA_VERSION, CostRow, PredictionRow, ResultRow

UNKNOWN_COMMIT = "unknown"
"""Stands for a commit that nobody wrote down (code outside a clone) beside others that are known."""


def standard_error(scores: Sequence[float]) -> float | None:
    """Standard error of the mean (sample standard deviation over the root of n); None for a single score."""
    if len(scores) < 2:
        return None
    return statistics.stdev(scores) / math.sqrt(len(scores))


def joined_commits(commits: Iterable[str | None]) -> str | None:
    """Distinct commits in order of appearance, joined by ", "; None if none is known."""
    found = dict.fromkeys(commits)
    if set(found) <= {None}:
        return None
    return ", ".join(commit or UNKNOWN_COMMIT for commit in found)


def comparable(costs: Sequence[CostRow], n_tokens: int) -> list[CostRow]:
    """The cost rows of one cell that decoded equally many tokens: `n_tokens` if any did, else as the newest row."""
    # Rows from before they named their tokens are a group of their own.
    counts = [row.get("new_tokens") for row in costs]
    wanted = n_tokens if n_tokens in counts else counts[-1] if counts else None
    return [row for row, count in zip(costs, counts, strict=True) if count == wanted]


def result_row(
    cell: Cell,
    metric: str,
    predictions: Sequence[PredictionRow],
    costs: Sequence[CostRow],
    identity: Mapping[str, Any],
    earlier_commit: str | None = None,
) -> ResultRow:
    """One cell over its predictions: means, and medians of the cost pass (None if not measured).

    `earlier_commit` is that of predictions which do not name their own.
    """
    scores = [row["score"] for row in predictions]
    setting = cell.setting
    tier = setting.tier
    cache_bytes = _mean(row["cache_bytes"] for row in predictions)
    passive_bytes = _mean(row.get("passive_bytes") or 0 for row in predictions)
    return ResultRow(
        schema_version=SCHEMA_VERSION,
        cell_id=cell.cell_id,
        model=identity["model"],
        adapter=identity["adapter"],
        method=setting.method,
        method_args=setting.args,
        passive=None if tier is None else tier.passive,
        recall_tokens=None if tier is None else tier.recall_tokens,
        page_size=None if tier is None else tier.page_size,
        phase=setting.phase,
        query_aware=setting.query_aware,
        compression_ratio=setting.compression_ratio,
        budget_tokens=setting.budget_tokens,
        budget_scope=setting.budget_scope,
        achieved_compression=_mean(row["achieved_compression"] for row in predictions),
        attended_fraction=_mean(row["attended_fraction"] for row in predictions),
        benchmark=cell.task.benchmark,
        task=cell.task.task,
        context_length=cell.task.context_length,
        metric=metric,
        score=_mean(scores),
        stderr=standard_error(scores),
        n=len(scores),
        cache_bytes=cache_bytes,
        full_cache_bytes=_mean(row["full_cache_bytes"] for row in predictions),
        active_bytes=cache_bytes - passive_bytes,
        passive_bytes=passive_bytes,
        prefill_s=_median([row["prefill_s"] for row in costs]),
        select_s=_median([row["select_s"] for row in costs]),
        question_s=_median([row.get("question_s") for row in costs]),
        decode_tokens_per_s=_median([row["decode_tokens_per_s"] for row in costs]),
        throughput_tokens_per_s=_median([row.get("throughput_tokens_per_s") for row in costs]),
        peak_bytes=_median([row["peak_bytes"] for row in costs]),
        dtype=identity["dtype"],
        device=identity["device"],
        seed=identity["seed"],
        commit=joined_commits(row.get("commit", earlier_commit) for row in predictions),
    )


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
