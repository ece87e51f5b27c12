"""Rows of results.jsonl, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sparsekv.evaluation.cells import Cell, Setting, Task
from sparsekv.evaluation.records import CostRow, PredictionRow, ResultRow
from sparsekv.evaluation.results import comparable, result_row, standard_error
from sparsekv.evaluation.tier import Tier

CELL = Cell(
    Task("ruler", "vt", 1024),
    Setting("snapkv", {"window_size": 8}, "mine", 0.5, None, "head", "prefill", False, None),
)
IDENTITY = {"model": "m", "adapter": None, "dtype": "float32", "device": "cpu", "seed": 3}


def prediction(score: float, achieved: float, n_bytes: int) -> PredictionRow:
    row: dict[str, Any] = dict.fromkeys(PredictionRow.__annotations__)
    row |= {"score": score, "achieved_compression": achieved, "attended_fraction": 1.0}
    row |= {"cache_bytes": n_bytes, "full_cache_bytes": 2 * n_bytes, "commit": "abc", "passive_bytes": 0}
    return row  # type: ignore[return-value]


def cost(prefill_s: float, select_s: float | None, rate: float, peak: int | None) -> CostRow:
    return CostRow(
        cell_id="c",
        example_id="e",
        prefill_s=prefill_s,
        select_s=select_s,
        decode_tokens_per_s=rate,
        peak_bytes=peak,
        new_tokens=16,
        question_s=prefill_s / 10,
        throughput_tokens_per_s=2 * rate,
    )


def test_means_of_predictions_and_medians_of_costs() -> None:
    predictions = [prediction(100.0, 0.50, 10), prediction(0.0, 0.52, 20), prediction(50.0, 0.51, 30)]
    costs = [cost(1.0, None, 10.0, 5), cost(9.0, 0.2, 30.0, None), cost(2.0, 0.4, 20.0, 7)]
    row = result_row(CELL, "string_match_all", predictions, costs, IDENTITY)
    assert set(row) == set(ResultRow.__annotations__)
    assert (row["score"], row["n"]) == (50.0, 3)
    assert row["stderr"] == pytest.approx(50 / math.sqrt(3))  # sample standard deviation of 100, 0, 50 is 50
    assert row["achieved_compression"] == pytest.approx(0.51)
    assert (row["cache_bytes"], row["full_cache_bytes"], row["active_bytes"]) == (20, 40, 20)
    assert (row["prefill_s"], row["select_s"], row["decode_tokens_per_s"]) == (2.0, pytest.approx(0.3), 20.0)
    assert (row["peak_bytes"], row["passive_bytes"], row["attended_fraction"]) == (6, 0, 1.0)
    assert (row["question_s"], row["throughput_tokens_per_s"]) == (0.2, 40.0)
    assert (row["passive"], row["recall_tokens"], row["page_size"]) == (None, None, None)
    assert (row["method"], row["method_args"], row["compression_ratio"]) == (
        "snapkv",
        {"window_size": 8},
        0.5,
    )
    assert (row["benchmark"], row["task"], row["context_length"], row["commit"]) == (
        "ruler",
        "vt",
        1024,
        "abc",
    )


def test_bytes_of_two_tiers_are_told_apart() -> None:
    cell = replace(CELL, setting=replace(CELL.setting, tier=Tier("disk", recall_tokens=7, folder="x")))
    rows = [prediction(1.0, 0.5, 10), prediction(1.0, 0.5, 30)]
    rows[0]["passive_bytes"], rows[1]["passive_bytes"] = 6, 20
    row = result_row(cell, "f1", rows, [], IDENTITY)
    assert (row["cache_bytes"], row["active_bytes"], row["passive_bytes"]) == (20, 7, 13)
    assert (row["passive"], row["recall_tokens"], row["page_size"]) == ("disk", 7, 16)


def test_rows_of_earlier_versions_are_summed_up_too() -> None:
    """They name no second tier, and their cost pass did not time the question."""
    old, costs = prediction(1.0, 0.5, 10), cost(1.0, None, 10.0, None)
    del old["passive_bytes"], costs["question_s"], costs["throughput_tokens_per_s"]  # type: ignore[misc]
    row = result_row(CELL, "f1", [old, prediction(1.0, 0.5, 10)], [costs, costs], IDENTITY)
    assert (row["active_bytes"], row["passive_bytes"], row["prefill_s"]) == (10, 0, 1.0)
    assert row["question_s"] is row["throughput_tokens_per_s"] is None


def test_costs_of_different_lengths_are_not_mixed() -> None:
    rows = [cost(float(i), None, 1.0, None) for i in range(5)]
    for made, n_tokens in zip(rows, (16, 4, 16, 4, 8), strict=True):
        made["new_tokens"] = n_tokens
    assert [row["prefill_s"] for row in comparable(rows, 16)] == [0.0, 2.0]
    assert [row["prefill_s"] for row in comparable(rows, 99)] == [4.0]  # as the newest
    del rows[0]["new_tokens"], rows[2]["new_tokens"]  # type: ignore[misc]
    assert [row["prefill_s"] for row in comparable(rows[:3], 16)] == [0.0, 2.0]
    assert comparable([], 16) == []


def test_costs_that_were_not_measured_are_null() -> None:
    row = result_row(CELL, "string_match_all", [prediction(1.0, 0.5, 1)], [], IDENTITY)
    for name in ("prefill_s", "select_s", "question_s", "decode_tokens_per_s", "peak_bytes", "stderr"):
        assert row[name] is None  # type: ignore[literal-required]


def test_a_row_names_every_commit_that_made_its_predictions() -> None:
    rows = [prediction(1.0, 0.5, 1) for _ in range(4)]
    for made, commit in zip(rows, ("a+changed", "b", "a+changed", None), strict=True):
        made["commit"] = commit
    assert result_row(CELL, "f1", rows, [], IDENTITY)["commit"] == "a+changed, b, unknown"
    assert result_row(CELL, "f1", rows[3:], [], IDENTITY)["commit"] is None
    del rows[1]["commit"]  # type: ignore[misc]
    assert result_row(CELL, "f1", rows[:2], [], IDENTITY, "old")["commit"] == "a+changed, old"


def test_standard_error() -> None:
    assert standard_error([5.0]) is None
    assert standard_error([5.0, 5.0]) == 0.0
    assert standard_error([0.0, 100.0, 100.0, 0.0]) == pytest.approx(math.sqrt(10000 / 3) / 2)
