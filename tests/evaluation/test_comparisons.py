"""Which settings are compared with which, and every figure of a comparison worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsekv.config import CompareConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Setting, Task
from sparsekv.evaluation.comparisons import Line, TaskScores, baseline_line, compare
from sparsekv.evaluation.records import ComparisonRow


def setting(method: str, ratio: float = 0.0, **changes: Any) -> Setting:
    made = Setting(method, {}, method, ratio, None, "head", "prefill", False, None)
    return replace(made, **changes)


FULL, SNAP, KNORM = setting("full"), setting("snapkv", 0.7), setting("knorm", 0.7)
LEARNED = setting("relevance", 0.7, budget_scope="model")
BASELINE = Line("base", FULL)
LINES = [
    BASELINE,
    Line("base", SNAP),
    Line("base", KNORM),
    Line("eit", FULL),
    Line("eit", LEARNED),
    Line("eit", SNAP),
    Line("eit", KNORM),
]
ACHIEVED = np.array([0.0, 0.7, 0.71, 0.0, 0.72, 0.7, 0.71])


def task(metric: str, *scores: list[float]) -> TaskScores:
    return TaskScores(metric, np.array(scores, dtype=float), ACHIEVED)


VT, CWE, PPL = Task("ruler", "vt", 1024), Task("ruler", "cwe", 1024), Task("perplexity", "continuation", 1024)
TASKS = {
    #                                full  snap  knorm full   rel  snap  knorm
    VT: task(
        "string_match_all",
        [100.0, 20.0, 0.0, 100.0, 90.0, 40.0, 30.0],
        [60.0, 0.0, 0.0, 50.0, 58.0, 0.0, 10.0],
    ),
    CWE: task(
        "string_match_all", [10.0, 0.0, 0.0, 30.0, 20.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    ),
    PPL: task(
        "perplexity", [10.0, 20.0, 40.0, 11.0, 12.0, 20.0, 30.0], [10.0, 30.0, 40.0, 9.0, 10.0, 25.0, 30.0]
    ),
}
CONFIG = CompareConfig(min_baseline_score=20, resamples=400)


def rows_of(config: CompareConfig = CONFIG, **wanted: Any) -> list[ComparisonRow]:
    found = compare(LINES, BASELINE, TASKS, config)
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]  # type: ignore[literal-required]


def one(**wanted: Any) -> ComparisonRow:
    (row,) = rows_of(**wanted)
    return row


def test_every_setting_meets_the_baseline_its_twin_and_its_own_full_cache() -> None:
    averages = rows_of(task=None)
    keys = ("against", "variant", "label", "reference_variant", "reference_method")
    assert [tuple(row[key] for key in keys) for row in averages] == [  # type: ignore[literal-required]
        ("baseline", "base", "snapkv", "base", "full"),
        ("baseline", "base", "knorm", "base", "full"),
        ("baseline", "eit", "full", "base", "full"),
        ("baseline", "eit", "relevance", "base", "full"),
        ("baseline", "eit", "snapkv", "base", "full"),
        ("baseline", "eit", "knorm", "base", "full"),
        ("same", "eit", "snapkv", "base", "snapkv"),
        ("same", "eit", "knorm", "base", "knorm"),
        ("same", "eit", "mean of 2 methods", "base", None),
        ("own", "eit", "relevance", "eit", "full"),
        ("own", "eit", "snapkv", "eit", "full"),
        ("own", "eit", "knorm", "eit", "full"),
    ]  # fmt: skip
    assert len(rows_of()) == len(averages) * (1 + len(TASKS))
    assert all(set(row) == set(ComparisonRow.__annotations__) for row in rows_of())


def test_the_average_holds_only_what_the_baseline_can_do() -> None:
    row = one(against="baseline", label="relevance", task=None)
    assert (row["tasks"], row["n"], row["metric"]) == (["ruler/vt/1024"], 2, None)
    assert (row["score"], row["reference_score"], row["difference"]) == (74.0, 80.0, -6.0)
    assert row["percent"] == pytest.approx(92.5) and row["achieved_compression"] == pytest.approx(0.72)
    assert {row["task"]: row["in_average"] for row in rows_of(against="baseline", label="relevance")} == {
        None: True,
        "vt": True,
        "cwe": False,
        "continuation": False,
    }
    # With a lower bar both count, each task alike; without a task there is no average.
    both = rows_of(
        CONFIG.model_copy(update={"min_baseline_score": 5.0}), label="relevance", against="baseline"
    )
    assert both[0]["tasks"] == ["ruler/vt/1024", "ruler/cwe/1024"] and both[0]["n"] == 4
    assert both[0]["difference"] == pytest.approx((-6 + 2.5) / 2)
    high = CONFIG.model_copy(update={"min_baseline_score": 90.0})
    assert rows_of(high, task=None) == [] and len(rows_of(high)) == 12 * len(TASKS)


def test_intervals_are_those_of_two_rows() -> None:
    """Differences of -10 and -2 in vt: the mean of a resample is -10, -6 or -2."""
    row = one(against="baseline", label="relevance", task="vt")
    assert row["difference_interval"] == [-10.0, -2.0]
    assert row["percent_interval"] == pytest.approx([90.0, 100 * 58 / 60])
    assert (row["confidence"], row["resamples"], row["seed"]) == (0.95, 400, 0)
    full = one(against="baseline", label="full", task="vt")
    assert (full["difference"], full["difference_interval"]) == (-5.0, [-10.0, 0.0])


def test_the_gap_is_that_to_the_best_method_of_the_base_at_the_same_budget() -> None:
    row = one(against="baseline", label="relevance", task=None)
    assert row["gap_closed_from"] == "snapkv"  # 10 on average, knorm 0
    assert row["gap_closed"] == pytest.approx(100 * (74 - 10) / (80 - 10))
    assert row["gap_closed_interval"] == pytest.approx([100 * 70 / 80, 100 * 58 / 60])
    assert {r["label"] for r in rows_of() if r["gap_closed"] is not None} == {"relevance", "snapkv", "knorm"}
    assert all(r["variant"] == "eit" and r["task"] is None for r in rows_of() if r["gap_closed"] is not None)
    other = [replace(LINES[4], setting=setting("relevance", 0.9))]
    lines = [*LINES[:4], *other, *LINES[5:]]
    found = [r for r in compare(lines, BASELINE, TASKS, CONFIG) if r["label"] == "relevance"]
    assert [r["gap_closed"] for r in found] == [None] * len(found)  # the base did not run at 0.9


def test_a_mean_over_methods_is_of_their_differences() -> None:
    row = one(against="same", method=None, task=None)
    assert (row["score"], row["reference_score"]) == ((20 + 20) / 2, (10 + 0) / 2)
    assert row["difference"] == 15.0 and row["achieved_compression"] == pytest.approx(0.705)
    # Rows: (40 - 20 + 30 - 0) / 2 = 25 and (0 - 0 + 10 - 0) / 2 = 5.
    assert row["difference_interval"] == [5.0, 25.0]
    assert one(against="same", label="knorm", task=None)["percent"] is None  # a share of nothing


def test_perplexity_is_compared_with_its_own_full_cache_too() -> None:
    base = one(against="baseline", label="relevance", task="continuation")
    own = one(against="own", label="relevance", task="continuation")
    assert (base["score"], base["percent"], own["percent"]) == (
        11.0,
        pytest.approx(110.0),
        pytest.approx(110.0),
    )
    assert (base["reference_score"], own["reference_score"], own["metric"]) == (10.0, 10.0, "perplexity")
    assert own["percent_interval"] == pytest.approx([100 * 12 / 11, 100 * 10 / 9])


def test_the_baseline_is_one_setting() -> None:
    settings = {"base": [FULL, SNAP, setting("snapkv", 0.9)], "eit": [FULL, LEARNED]}
    assert baseline_line(settings, CompareConfig()) == BASELINE
    assert baseline_line(settings, CompareConfig(baseline="eit", method="relevance")) == Line("eit", LEARNED)
    with pytest.raises(ConfigError, match=r"compare.method 'snapkv' has 2 budgets of variant 'base'"):
        baseline_line(settings, CompareConfig(method="snapkv"))
    with pytest.raises(
        ConfigError, match=r"compare.method 'tova' is not a method of variant 'base'; .*full, snapkv"
    ):
        baseline_line(settings, CompareConfig(method="tova"))


def test_the_seed_is_the_runs_unless_it_is_given() -> None:
    rng = np.random.default_rng(0)
    tasks = {VT: TaskScores("string_match_all", rng.uniform(0, 100, (30, len(LINES))), ACHIEVED)}

    def interval(run_seed: int, **changes: Any) -> Any:
        config = CompareConfig(resamples=200, **changes)
        return compare(LINES, BASELINE, tasks, config, run_seed)[0]["difference_interval"]

    assert interval(3) == interval(3) == interval(9, seed=3) != interval(9)
