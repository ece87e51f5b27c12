"""Tables of comparisons, from rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from sparsekv.evaluation.records import SCHEMA_VERSION, ComparisonRow
from sparsekv.reporting.comparisons import grids, notes, own_grid, task_grid, variants_page


def row(against: str, variant: str, label: str, task: str | None, **changes: Any) -> ComparisonRow:
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "against": against,
        "variant": variant,
        "method": label,
        "method_args": {},
        "label": label,
        "compression_ratio": 0.0 if label == "full" else 0.7,
        "budget_tokens": None,
        "budget_scope": "model" if label == "relevance" else "head",
        "achieved_compression": 0.7004,
        "reference_variant": variant if against == "own" else "base",
        "reference_method": label if against == "same" else "full",
        "benchmark": None if task is None else "ruler",
        "task": task,
        "context_length": None if task is None else 1024,
        "tasks": ["ruler/vt/1024"] if task is None else [f"ruler/{task}/1024"],
        "in_average": task != "cwe",
        "metric": None if task is None else "string_match_all",
        "n": 100,
        "score": 54.36,
        "reference_score": 55.8,
        "difference": -1.44,
        "difference_interval": [-2.5, 0.04],
        "percent": 97.419,
        "percent_interval": [95.55, 100.1],
        "gap_closed": None,
        "gap_closed_interval": None,
        "gap_closed_from": None,
        "confidence": 0.95,
        "resamples": 2000,
        "seed": 7,
    }
    return made | changes  # type: ignore[return-value]


PPL = {
    "metric": "perplexity",
    "tasks": ["perplexity/continuation/1024"],
    "score": 12.345,
    "in_average": False,
}
GAP = {"gap_closed": 96.04, "gap_closed_interval": [93.0, 99.0], "gap_closed_from": "tova"}
ROWS = [
    row("baseline", "base", "tova", None, score=29.0, difference=-26.8, percent=52.0),
    row("baseline", "base", "tova", "vt", score=29.0),
    row("baseline", "base", "tova", "cwe", score=1.0, reference_score=3.25),
    row("baseline", "base", "tova", "continuation", **PPL),
    row("baseline", "eit", "relevance", None, **GAP),
    row("baseline", "eit", "relevance", "vt"),
    row("baseline", "eit", "relevance", "cwe", score=2.0, reference_score=3.25),
    row("baseline", "eit", "relevance", "continuation", **PPL),
    row("same", "eit", "tova", None, score=40.0, reference_score=29.0, difference=11.0),
    row("same", "eit", "mean of 2 methods", None, method=None, budget_scope=None, difference=12.0),
    row("own", "eit", "relevance", None, percent=98.0, percent_interval=None),
    row("own", "eit", "relevance", "vt", percent=None, percent_interval=None),
    row(
        "own",
        "eit",
        "relevance",
        "continuation",
        **PPL | {"percent": 103.21, "percent_interval": [101.0, 105.0]},
    ),
]


def test_the_first_table_is_against_the_baseline() -> None:
    first, same, perplexity = grids(ROWS)
    assert first.title == "Against base, full"
    assert first.rows == (
        ("base", "full", "–", "55.8", "–", "–", "–", "–"),
        ("base", "tova", "0.70", "29.0", "-26.8 [-2.5, +0.0]", "52.0 [95.5, 100.1]", "–", "0.700"),
        (
            *("eit", "relevance (model)", "0.70", "54.4", "-1.4 [-2.5, +0.0]"),
            *("97.4 [95.5, 100.1]", "96.0 [93.0, 99.0]", "0.700"),
        ),
    )
    assert same.title == "Against the same method of base" and same.bold == {1}
    assert same.rows[0] == ("eit", "tova", "0.70", "29.0", "40.0", "+11.0 [-2.5, +0.0]")
    assert same.rows[1][:2] == ("eit", "mean of 2 methods") and same.rows[1][-1].startswith("+12.0")
    assert perplexity.title == "perplexity/continuation/1024 (lower is better)"
    assert perplexity.rows[2][-3:] == ("12.35", "97.4 [95.5, 100.1]", "103.2 [101.0, 105.0]")
    assert perplexity.rows[1][-1] == "–"  # the base's own full cache is the baseline


def test_the_notes_say_what_was_left_out() -> None:
    text = "\n".join(notes(ROWS))
    assert "95% interval of a paired bootstrap" in text and "(2000 resamples, seed 7)" in text
    assert "average over 1 task: ruler/vt/1024\n" in text
    assert "left out of the average, base, full scores too little on them: ruler/cwe/1024 (3.2)" in text
    assert "continuation" not in text
    assert "best method of variant base at the same budget (tova at 0.70) to base, full" in text
    assert notes([]) == ["there is one setting only: nothing to compare"] and grids([]) == []


def test_every_task_stands_on_the_page() -> None:
    found = task_grid(ROWS)
    assert found.header[3:] == ("ruler/vt/1024", "ruler/cwe/1024", "perplexity/continuation/1024")
    assert found.rows[0][3:5] == ("55.8", "3.2")
    assert found.rows[2] == (
        *("eit", "relevance (model)", "0.70"),
        *("54.4 (-1.4 [-2.5, +0.0])", "2.0 (-1.4 [-2.5, +0.0])", "12.3 (-1.4 [-2.5, +0.0])"),
    )
    own = own_grid(ROWS)
    assert own.rows == (("eit", "relevance (model)", "0.70", "98.0", "–", "103.2 [101.0, 105.0]"),)


@pytest.mark.parametrize(("width", "last"), [(80, "difference"), (120, "gap closed %"), (200, "achieved")])
def test_a_narrow_terminal_gets_fewer_columns_but_whole_ones(width: int, last: str) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for grid in grids(ROWS):
        console.print(grid.rich(width))
    text = console.export_text()
    assert "…" not in text and max(len(line.rstrip()) for line in text.splitlines()) <= width
    header = next(line for line in text.splitlines() if line.strip().startswith("variant"))
    assert "difference" in header and ("gap closed" in header) == (width >= 120)
    assert ("achieved" in header) == (last == "achieved")


def run_of(name: str, adapter: str | None) -> dict[str, Any]:
    identity = {
        "model": "org/tiny",
        "adapter": adapter,
        "dtype": "float32",
        "device": "cpu",
        "seed": 3,
        "query_aware": False,
    }
    return {
        "command": "sparsekv eval x.yaml",
        "identity": identity,
        "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": 2**34, "gpus": []},
        "versions": {"python": "3.11"},
        "started": "then",
        "finished": f"{name} done",
    }


def test_the_page_says_how_to_get_it_again() -> None:
    runs = {"base": run_of("base", None), "eit": run_of("eit", "tiny-eit")}
    results: Any = {"base": [{"n": 100, "commit": "a"}], "eit": [{"n": 100, "commit": "b, a"}]}
    page = variants_page(ROWS, runs, results, "all done")
    for text in (
        "## Against base, full\n\n| variant | method | requested | average | difference | % of baseline |",
        "| eit | relevance (model) | 0.70 | 54.4 | -1.4 [-2.5, +0.0] | 97.4 [95.5, 100.1] | 96.0 [93.0, 99.0] |",
        "## Every task",
        "## Percent of the variant's own uncompressed score",
        "[base](base/results.md), [eit](eit/results.md)",
        "| command | `sparsekv eval x.yaml` |",
        "| model of base | org/tiny |",
        "| model of eit | org/tiny with adapter tiny-eit |",
        "| rows per task | 100 |",
        "| date | all done |",
        "| commit | a, b |",
    ):
        assert text in page
    assert "| model |" not in page
