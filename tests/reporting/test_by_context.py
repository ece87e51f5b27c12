"""Tables and pictures by context length, of rows made by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.by_context import by_context, context_grid, context_notes
from sparsekv.reporting.context_plots import COLOURS, context_figures
from sparsekv.reporting.report import write_report
from sparsekv.reporting.summary import summarize
from sparsekv.reporting.tables import notes, to_markdown

SIZES = (512, 1024, 2048)
FIGURES = [
    "memory_by_context.png",
    "time_by_context.png",
    "throughput_by_context.png",
    "accuracy_by_context.png",
]
MEASURED = ("prefill_s", "select_s", "decode_tokens_per_s", "throughput_tokens_per_s")


def row(method: str, size: int, task: str, score: float, **changes: Any) -> ResultRow:
    """Costs that are easy to check: reading takes size / 1000 s, choosing 0.5 s."""
    ratio = 0.0 if method == "full" else 0.75
    held = 1000.0 * size * (1 - ratio)
    made: dict[str, Any] = {
        "cell_id": f"{task}.{size}.{method}",
        "method": method,
        "method_args": {},
        "passive": None,
        "recall_tokens": None,
        "page_size": None,
        "phase": "prefill",
        "compression_ratio": ratio,
        "budget_tokens": None,
        "budget_scope": "head",
        "achieved_compression": ratio,
        "attended_fraction": 1.0,
        "benchmark": "ruler",
        "task": task,
        "context_length": size,
        "metric": "string_match_all",
        "score": score,
        "n": 2,
        "cache_bytes": held,
        "active_bytes": held,
        "passive_bytes": 0.0,
        "prefill_s": size / 1000,
        "select_s": 0.5,
        "decode_tokens_per_s": 20.0,
        "throughput_tokens_per_s": 5.0,
        "commit": None,
    }
    return made | changes  # type: ignore[return-value]


def two_tiers(size: int, task: str, score: float) -> ResultRow:
    tier = {"passive": "cpu", "page_size": 16, "attended_fraction": 0.25}
    held = {"cache_bytes": 1100.0 * size, "active_bytes": 250.0 * size, "passive_bytes": 850.0 * size}
    return row("atskv", size, task, score, cell_id=f"{task}.{size}.two", select_s=None, **tier, **held)


def some_rows(sizes: Sequence[int] = SIZES) -> list[ResultRow]:
    found = []
    for size in sizes:
        for task, score in (("vt", 80.0), ("qa_1", 40.0)):
            found += [
                row("full", size, task, score),
                row("snapkv", size, task, score / 2 + size / 1024),
                row("atskv", size, task, score - 10),
                two_tiers(size, task, score - 5),
            ]
    return found


RUN: dict[str, Any] = {
    "command": "sparsekv eval x.yaml",
    "identity": {
        "model": "o/m",
        "adapter": None,
        "dtype": "f",
        "device": "cpu",
        "seed": 0,
        "query_aware": False,
    },
    "machine": {"cpu": "c", "cores": 2, "memory_bytes": None, "gpus": []},
    "versions": {},
    "cells": {},
    "config": {"cost_new_tokens": 16},
    "started": "then",
    "finished": "now",
}


def test_points_are_means_over_tasks() -> None:
    found = by_context(some_rows())
    assert found is not None and found.sizes == SIZES
    assert (found.tasks, found.n_scored, found.left_out) == (("vt", "qa_1"), 2, ())
    names = ["full", "snapkv", "atskv", "atskv[passive=cpu]"]
    assert [curve.name for curve in found.curves] == names
    assert [curve.uncompressed for curve in found.curves] == [True, False, False, False]
    points = {curve.name: curve.points for curve in found.curves}
    assert [p.score for p in points["snapkv"].values()] == [30.5, 31.0, 32.0]
    assert [p.read_s for p in points["full"].values()] == pytest.approx([1.012, 1.524, 2.548])
    assert [p.active_bytes for p in points["snapkv"].values()] == [128e3, 256e3, 512e3]
    last = points["atskv[passive=cpu]"][2048]
    assert (last.active_bytes, last.passive_bytes, last.attended) == (512e3, 850.0 * 2048, 0.25)
    assert (last.read_s, last.token_s, last.throughput, last.score) == (2.048, 0.05, 5.0, 55.0)


def test_the_table_holds_the_numbers_size_by_size() -> None:
    found = by_context(some_rows(), {f"{t}.{s}.two": "atskv_tiered" for t in ("vt", "qa_1") for s in SIZES})
    assert found is not None
    grid = context_grid(found)
    assert grid.header[:3] == ("context", "method", "requested")
    assert grid.header[3:] == (
        *("score", "achieved", "active MB", "passive MB", "attended", "read s", "ms/token", "throughput"),
    )
    assert [line[:2] for line in grid.rows[:5]] == [
        ("512", "full"),
        ("512", "snapkv"),
        ("512", "atskv"),
        ("512", "atskv_tiered"),
        ("1024", "full"),
    ]
    assert grid.rows[11] == (
        *("2048", "atskv_tiered", "0.75", "55.0", "0.750", "0.51", "1.74", "0.25", "2.05", "50.0", "5.00"),
    )
    assert grid.rows[0] == ("512", "full", "–", "60.0", "0.000", "0.51", "–", "1.00", "1.01", "50.0", "5.00")
    assert grid.bold == {0, 4, 8}
    told = context_notes(found, 16)
    assert told[0] == "means over 2 tasks at every size: vt, qa_1"
    assert any("an answer of 16 tokens" in note for note in told) and len(told) == 4


def test_columns_of_what_was_not_measured_are_left_out() -> None:
    rows = [r | dict.fromkeys(MEASURED) for r in some_rows() if r["passive"] is None]  # type: ignore[operator]
    found = by_context(rows)
    assert found is not None
    assert context_grid(found).header[3:] == ("score", "achieved", "active MB")
    assert len(context_notes(found)) == 1
    assert list(context_figures(found, "t")) == [FIGURES[0], FIGURES[3]]


def test_rows_of_earlier_versions_have_one_tier() -> None:
    rows = some_rows()
    old = [r for r in rows if r["passive"] is None]
    for one in old:
        for key in ("passive", "recall_tokens", "page_size", "passive_bytes", "throughput_tokens_per_s"):
            del one[key]  # type: ignore[misc]
    found = by_context(old)
    assert found is not None and len(found.curves) == 3 and found.points[0].passive_bytes == 0
    assert list(context_figures(found, "t")) == [FIGURES[0], FIGURES[1], FIGURES[3]]
    assert "cache MB" in to_markdown(summarize(old))


def test_one_length_is_no_sweep() -> None:
    assert by_context(some_rows([512])) is None
    lone = row("full", 4096, "continuation", 9.0, benchmark="perplexity", metric="perplexity")
    assert by_context([*some_rows([512]), lone]) is None
    assert by_context([row("full", 1, "a", 1.0) | {"context_length": None}]) is None  # type: ignore[operator]


def test_only_tasks_of_the_same_lengths_are_taken_together() -> None:
    """Else a curve would bend because another task joins it."""
    extra = [row("full", size, "fwe", 0.0) for size in (1024, 2048)]
    lone = [row("full", 1024, "continuation", 9.0, benchmark="perplexity", metric="perplexity")]
    found = by_context([*some_rows(), *extra, *lone])
    assert found is not None and found.left_out == ("fwe", "continuation") and found.tasks == ("vt", "qa_1")
    assert found.curves[0].points[1024].score == 60.0
    assert any(note == "left out, not run at these sizes: fwe, continuation" for note in context_notes(found))
    perplexity = [
        row("full", size, "continuation", 9.0, benchmark="perplexity", metric="perplexity") for size in SIZES
    ]
    mixed = by_context([*some_rows(), *perplexity])
    assert mixed is not None and mixed.n_scored == 2 and mixed.curves[0].points[512].score == 60.0
    assert any("of 2 of them" in note for note in context_notes(mixed))


def test_a_point_without_all_tasks_has_no_score() -> None:
    rows = [r for r in some_rows() if (r["cell_id"], r["context_length"]) != ("vt.2048.snapkv", 2048)]
    found = by_context(rows)
    assert found is not None
    snapkv = found.curves[1]
    assert [point.score for point in snapkv.points.values()] == [30.5, 31.0, None]
    assert snapkv.points[2048].active_bytes == 512e3


def test_a_point_over_fewer_rows_has_no_score() -> None:
    rows = some_rows()
    found = by_context([r | {"n": 1} if r["cell_id"] == "vt.512.snapkv" else r for r in rows])  # type: ignore[misc]
    assert found is not None
    assert [point.score for point in found.curves[1].points.values()] == [None, 31.0, 32.0]


def test_several_budgets_are_several_curves() -> None:
    more = [row("snapkv", s, t, 1.0, compression_ratio=0.9) for s in SIZES for t in ("vt", "qa_1")]
    found = by_context([*some_rows(), *more])
    assert found is not None
    assert [curve.name for curve in found.curves][1:3] == ["snapkv 0.75", "snapkv 0.90"]


def test_the_figures_draw_every_curve_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, str, list[float], list[float]]] = []
    plot = Axes.plot

    def record(self: Axes, x: list[float], y: list[float], **options: Any) -> Any:
        drawn.append((options["label"], options["color"], x, y))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", record)
    found = by_context(some_rows())
    assert found is not None
    figures = context_figures(found, "tiny")
    assert list(figures) == FIGURES
    for _, data in figures.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", data[16:24])) > 500
    assert all(x == list(SIZES) for _, _, x, _ in drawn)
    # memory: one more line for both tiers; time: two panels; throughput and accuracy one each
    assert len(drawn) == 5 + 4 + 4 + 4 + 4
    assert drawn[3][3] == pytest.approx([0.128, 0.256, 0.512])
    assert drawn[4][0] == "atskv[passive=cpu], both tiers"
    assert drawn[4][3] == pytest.approx([1.1 * 0.512, 1.1 * 1.024, 1.1 * 2.048])
    assert drawn[5][3] == pytest.approx([1.012, 1.524, 2.548]) and drawn[9][3] == [50.0] * 3
    colours = {name: {colour for other, colour, _, _ in drawn if other == name} for name, *_ in drawn}
    assert all(len(found) == 1 for found in colours.values())  # a method looks the same in all figures
    assert len({next(iter(colours[curve.name])) for curve in found.curves}) == 4


def test_more_curves_than_colours_still_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    looks: set[tuple[Any, ...]] = set()
    plot = Axes.plot

    def record(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        looks.add((options["color"], options["linestyle"], options["marker"]))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", record)
    n = 3 * len(COLOURS)
    found = by_context([row(f"m{i}", s, "vt", 1.0, prefill_s=None) for i in range(n) for s in SIZES])
    assert found is not None
    context_figures(found, "t")
    assert len(looks) == n


def test_labels_are_drawn_as_they_are(legend_texts: list[tuple[str, bool]]) -> None:
    rows = some_rows()
    names = {"snapkv": "a $x_{$", "full": "$x^2$", "atskv": "_hidden"}
    found = by_context(rows, {r["cell_id"]: names[r["method"]] for r in rows if r["passive"] is None})
    assert found is not None
    assert list(context_figures(found, "t $y_{$")) == FIGURES
    assert {text for text, _ in legend_texts} >= {"a $x_{$", "$x^2$", " _hidden"}
    assert not any(mathematics for _, mathematics in legend_texts)


def test_the_page_shows_the_sweep_first() -> None:
    written: dict[str, Any] = {}
    names = write_report(some_rows(), RUN, written.__setitem__)
    assert names == ["results.md", "scores.png", *FIGURES] and set(written) == set(names)
    page = written["results.md"]
    places = [
        page.index(text)
        for text in ("## By context size", *FIGURES, "## Every task", "scores.png", "| seed | 0")
    ]
    assert places == sorted(places)
    assert "| 2048 | atskv[passive=cpu] | 0.75 | 55.0 |" in page and "answer of 16 tokens" in page
    alone: dict[str, Any] = {}
    assert write_report(some_rows([512]), RUN, alone.__setitem__) == ["results.md", "scores.png"]
    assert "##" not in alone["results.md"]


def test_two_tiers_are_told_apart_in_the_table_of_tasks() -> None:
    summary = summarize(some_rows([1024]))
    lines = to_markdown(summary).splitlines()
    assert lines[0].endswith("| active MB | passive MB | attended | tokens/s |")
    assert lines[2].endswith("| 1.02 | – | 1.00 | 20.0 |")
    assert lines[5].startswith("| atskv[passive=cpu] | 0.75 |") and lines[5].endswith(
        "| 0.26 | 0.87 | 0.25 | 20.0 |"
    )
    assert sum(note.startswith(("passive MB:", "attended:")) for note in notes(summary)) == 2


def test_a_narrow_terminal_leaves_columns_out() -> None:
    found = by_context(some_rows())
    assert found is not None
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(context_grid(found).rich(80))
    text = console.export_text()
    assert "…" not in text and "score" in text and "throughput" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
