"""The rows that a run writes, and files that survive being killed. Knows nothing of models or methods."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from sparsekv.errors import ConfigError
from sparsekv.files import write_all

SCHEMA_VERSION = 1


class PredictionRow(TypedDict):
    """One line of predictions.jsonl: one example in one cell.

    Up to `evidence` the keys are the public schema; the rest is what the rows of results.jsonl are made of. Rows of
    earlier versions lack the last ones.
    """

    cell_id: str
    example_id: str
    benchmark: str
    task: str
    context_tokens: int
    prompt_sha: str
    prediction: str
    references: list[str]
    score: float
    achieved_compression: float
    finish_reason: str
    evidence: list[list[int]]
    cache_bytes: int
    full_cache_bytes: int
    attended_fraction: float
    commit: str | None
    max_new_tokens: int
    passive_bytes: int


class CostRow(TypedDict):
    """One line of costs.jsonl: one example in one cell, measured alone. Seconds, bytes, tokens per second.

    Rows of earlier versions lack the last ones.
    """

    cell_id: str
    example_id: str
    prefill_s: float
    select_s: float | None
    decode_tokens_per_s: float
    peak_bytes: int | None
    new_tokens: int
    question_s: float | None
    throughput_tokens_per_s: float


class ResultRow(TypedDict):
    """One line of results.jsonl: one cell over all its examples."""

    schema_version: int
    cell_id: str
    model: str
    adapter: str | None
    method: str
    method_args: dict[str, Any]
    passive: str | None
    recall_tokens: int | None
    page_size: int | None
    phase: str
    query_aware: bool
    compression_ratio: float | None
    budget_tokens: int | None
    budget_scope: str
    achieved_compression: float
    attended_fraction: float
    benchmark: str
    task: str
    context_length: int | None
    metric: str
    score: float
    stderr: float | None
    n: int
    cache_bytes: float
    full_cache_bytes: float
    active_bytes: float
    passive_bytes: float
    prefill_s: float | None
    select_s: float | None
    question_s: float | None
    decode_tokens_per_s: float | None
    throughput_tokens_per_s: float | None
    peak_bytes: float | None
    dtype: str
    device: str
    seed: int
    commit: str | None


class ComparisonRow(TypedDict):
    """One line of comparisons.jsonl: a setting of a variant beside another, on one task or on average over tasks.

    `against` says what it is compared with: the "baseline", the "same" method and budget in the baseline's variant, or
    its "own" variant's uncompressed cache. Intervals are [low, high] of the paired bootstrap; None: can't be told.
    """

    schema_version: int
    against: str
    variant: str
    method: str | None
    method_args: dict[str, Any]
    label: str
    compression_ratio: float | None
    budget_tokens: int | None
    budget_scope: str | None
    achieved_compression: float
    reference_variant: str
    reference_method: str | None
    benchmark: str | None
    task: str | None
    context_length: int | None
    tasks: list[str]
    in_average: bool
    metric: str | None
    n: int
    score: float
    reference_score: float
    difference: float
    difference_interval: list[float] | None
    percent: float | None
    percent_interval: list[float] | None
    gap_closed: float | None
    gap_closed_interval: list[float] | None
    gap_closed_from: str | None
    confidence: float
    resamples: int
    seed: int


class JsonLines:
    """An append-only file of JSON lines in which every append is on the disk before it returns.

    A process that is killed while it appends leaves a torn last line; `read` cuts it off. An append that
    fails (a full disk) leaves the file as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *, repair: bool = True) -> list[dict[str, Any]]:
        """All rows; a torn last line is removed from the file, unless `repair` is False.

        Raises
        ------
        ConfigError
            If a line before the last is not a JSON object: the file was changed by something else.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        rows: list[dict[str, Any]] = []
        good = 0  # bytes up to and including the last whole line
        while good < len(data):
            end = data.find(b"\n", good)
            row = None if end < 0 else _parse(data[good:end])
            if row is None:
                if end >= 0 and end + 1 < len(data):
                    raise ConfigError(f"{self.path}: line {len(rows) + 1} is damaged; remove it to go on")
                if repair:
                    os.truncate(self.path, good)
                break
            rows.append(row)
            good = end + 1
        return rows

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows` as one block and wait until it is on the disk."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        # A lone surrogate becomes its \\uXXXX escape, which is what JSON wants.
        data = text.encode("utf-8", errors="backslashreplace")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
