"""Tables and pictures of rows made by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.grid import Grid
from sparsekv.reporting.markdown import cell, code
from sparsekv.reporting.plots import scores_png
from sparsekv.reporting.report import results_page, write_report
from sparsekv.reporting.summary import summarize
from sparsekv.reporting.tables import notes, to_markdown, to_rich


def row(method: str, ratio: float, task: str, score: float, **changes: Any) -> ResultRow:
    made: dict[str, Any] = {
        "schema_version": 1,
        "cell_id": f"{task}.{method}.{ratio}",
        "model": "org/tiny",
        "adapter": None,
        "method": method,
        "method_args": {},
        "phase": "prefill",
        "query_aware": False,
        "compression_ratio": ratio,
        "budget_tokens": None,
        "budget_scope": "head",
        "achieved_compression": ratio + 0.004 if ratio else 0.0,
        "attended_fraction": 1.0,
        "benchmark": "ruler",
        "task": task,
        "context_length": 1024,
        "metric": "string_match_all",
        "score": score,
        "stderr": 1.0,
        "n": 4,
        "cache_bytes": 2e6 * (1 - ratio),
        "full_cache_bytes": 2e6,
        "active_bytes": 2e6 * (1 - ratio),
        "passive_bytes": 0.0,
        "prefill_s": 1.0,
        "select_s": 0.1,
        "decode_tokens_per_s": 20.0,
        "peak_bytes": 1,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "commit": None,
    }
    return made | changes  # type: ignore[return-value]


ROWS = [
    row("snapkv", 0.75, "vt", 20.0),
    row("snapkv", 0.75, "qa_1", 40.0),
    row("snapkv", 0.5, "vt", 30.0, decode_tokens_per_s=30.0),
    row("snapkv", 0.5, "qa_1", 60.0, decode_tokens_per_s=10.0),
    row("knorm", 0.5, "vt", 10.0, decode_tokens_per_s=None),
    row("knorm", 0.5, "qa_1", 0.0, decode_tokens_per_s=None),
    row("full", 0.0, "vt", 80.0),
    row("full", 0.0, "qa_1", 90.0),
]

RUN = {
    "command": "sparsekv eval x.yaml",
    "identity": {
        "model": "org/tiny",
        "adapter": None,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "query_aware": False,
    },
    "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": 2**34, "gpus": []},
    "versions": {"python": "3.11"},
    "cells": {},
    "commit": "abc",
    "started": "then",
    "finished": "now",
}


def test_lines_start_uncompressed_and_go_by_method_and_ratio() -> None:
    summary = summarize(ROWS)
    assert summary.columns == ["vt", "qa_1"]
    shown = [(line.method, line.requested, line.average, line.achieved) for line in summary.lines]
    assert shown == [
        ("full", "–", 85.0, 0.0),
        ("snapkv", "0.50", 45.0, pytest.approx(0.504)),
        ("snapkv", "0.75", 30.0, pytest.approx(0.754)),
        ("knorm", "0.50", 5.0, pytest.approx(0.504)),
    ]
    assert summary.lines[1].scores == {"vt": 30.0, "qa_1": 60.0}
    assert [line.tokens_per_s for line in summary.lines] == [20.0, 20.0, 20.0, None]
    assert summary.lines[2].cache_bytes == pytest.approx(5e5)


def test_the_markdown_table_holds_the_numbers() -> None:
    lines = to_markdown(summarize(ROWS)).splitlines()
    assert lines[0] == "| method | requested | achieved | average | vt | qa_1 | cache MB | tokens/s |"
    assert lines[2] == "| full | – | 0.000 | 85.0 | 80.0 | 90.0 | 2.00 | 20.0 |"
    assert lines[3] == "| snapkv | 0.50 | 0.504 | 45.0 | 30.0 | 60.0 | 1.00 | 20.0 |"
    assert lines[5] == "| knorm | 0.50 | 0.504 | 5.0 | 10.0 | 0.0 | 1.00 | – |"


def test_labels_and_tasks_cannot_break_the_table() -> None:
    labelled = row("snapkv", 0.5, "a|b\nc", 30.0, cell_id="mine")
    page = to_markdown(summarize([labelled], {"mine": "x|y\nz"}))
    assert page.splitlines()[0].startswith("| method | requested | achieved | average | a\\|b c |")
    assert page.splitlines()[2].startswith("| x\\|y z | 0.50 |") and len(page.splitlines()) == 3
    grid = Grid("t", ("a|b",), (("c\nd",),))
    assert grid.markdown() == "| a\\|b |\n| --- |\n| c d |\n"


def test_a_method_without_all_tasks_is_marked() -> None:
    summary = summarize([*ROWS, row("tova", 0.5, "vt", 50.0)])
    assert "| tova | 0.50 | 0.504 | 50.0* | 50.0 | – |" in to_markdown(summary)
    assert any(note.startswith("* average over only some") for note in notes(summary))


def test_scores_over_fewer_rows_are_marked() -> None:
    """As when a method joins a folder under a lower limit."""
    added = [row("tova", 0.5, "vt", 50.0, n=3), row("tova", 0.5, "qa_1", 30.0)]
    summary = summarize([*ROWS, *added])
    assert [line.complete for line in summary.lines] == [True] * 4 + [False]
    assert "| tova | 0.50 | 0.504 | 40.0* | 50.0* | 30.0 |" in to_markdown(summary)
    assert to_markdown(summary).count("*") == 2
    assert any("fewer of a task's rows" in note for note in notes(summary))
    assert not any(note.startswith("*") for note in notes(summarize(ROWS)))


def test_numbers_of_rows_may_differ_between_tasks_and_lengths() -> None:
    rows = [row("knorm", 0.5, "vt", 1.0), row("knorm", 0.5, "qa_1", 2.0, n=9)]
    longer = row("knorm", 0.5, "vt", 1.0, n=2, context_length=2048, cell_id="long")
    assert summarize([*rows, longer]).lines[0].complete


def test_perplexity_stays_out_of_the_average() -> None:
    extra = [
        row("full", 0.0, "continuation", 12.5, benchmark="perplexity", metric="perplexity"),
        row("knorm", 0.5, "continuation", 40.0, benchmark="perplexity", metric="perplexity"),
        row("snapkv", 0.5, "continuation", 20.0, benchmark="perplexity", metric="perplexity"),
        row("snapkv", 0.75, "continuation", 30.0, benchmark="perplexity", metric="perplexity"),
    ]
    summary = summarize([*ROWS, *extra])
    assert summary.lines[0].average == 85.0 and summary.lines[0].scores["continuation"] == 12.5
    assert any("lower is better" in note and "continuation" in note for note in notes(summary))


def test_the_page_names_the_commits_of_its_rows() -> None:
    rows = [row("knorm", 0.5, t, 1.0, commit=c) for t, c in (("vt", "c1"), ("cwe", "c2, c1"), ("fwe", None))]
    assert "| commit | c1, c2 |" in results_page(rows, RUN, None)
    assert "| commit | – |" in results_page(ROWS, RUN, None)


def test_what_tells_lines_apart_is_shown() -> None:
    rows = [
        row("knorm", 0.5, "vt", 1.0),
        row("knorm", 0.5, "vt", 2.0, phase="both", cell_id="b"),
        row("snapkv", 0.5, "vt", 3.0, method_args={"window_size": 8}, cell_id="c"),
        row("snapkv", 0.5, "vt", 4.0, method_args={"window_size": 16}, cell_id="d"),
    ]
    assert [line.method for line in summarize(rows, {"d": "wide"}).lines] == [
        "knorm (prefill)",
        "knorm (both)",
        "snapkv[window_size=8] (prefill)",
        "wide (prefill)",
    ]
    scopes = [row("knorm", 0.5, "vt", 1.0), row("tova", 0.5, "vt", 2.0, budget_scope="model")]
    assert [line.method for line in summarize(scopes).lines] == ["knorm (head)", "tova (model)"]
    lengths = [row("knorm", 0.5, "vt", 1.0), row("knorm", 0.5, "vt", 2.0, context_length=2048)]
    assert summarize(lengths).columns == ["vt@1024", "vt@2048"]
    names = [row("knorm", 0.5, "vt", 1.0), row("knorm", 0.5, "vt", 2.0, benchmark="other")]
    assert summarize(names).columns == ["ruler/vt", "other/vt"]
    counts = [row("knorm", 0.5, "vt", 1.0, compression_ratio=None, budget_tokens=64)]
    assert summarize(counts).lines[0].requested == "64 tokens"
    own = [row("sink_recent", 0.5, "vt", 1.0, compression_ratio=None)]
    assert summarize(own).lines[0].requested == "own"


def test_names_stay_in_their_cells_of_a_page() -> None:
    """Labels, tasks, models and the command are a user's texts."""
    task = "x|y\nz<b>"
    run = RUN | {
        "command": "sparsekv eval a.yaml 'x=a|b<c`d'\n'",
        "identity": {**RUN["identity"], "model": "m|<n>"},  # type: ignore[dict-item]
        "cells": {"one": {"label": "a|b <script>"}},
    }
    page = results_page([row("knorm", 0.5, task, 1.0, cell_id="one")], run, None)
    assert r"| average | x\|y z&lt;b> | cache MB |" in page
    assert r"| a\|b &lt;script> | 0.50 |" in page
    assert r"| command | ``sparsekv eval a.yaml 'x=a\|b<c`d' '`` |" in page
    assert r"| model | m\|&lt;n> |" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("snapkv[window_size=8]", "snapkv[window_size=8]"),
        ("a\r\nb\u2028c\n", "a b c"),
        ("`a<b` <c> ``d`<`` <", "`a<b` &lt;c> ``d`<`` &lt;"),
        ("a` < ``b", "a` &lt; ``b"),
    ],
)
def test_a_cell_is_one_line_without_html(text: str, shown: str) -> None:
    assert cell(text) == shown


@pytest.mark.parametrize(("text", "shown"), [("a", "`a`"), ("a`b", "``a`b``"), ("`a``b", "``` `a``b ```")])
def test_code_may_hold_backticks(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_methods_arguments_stand_in_the_terminal_table() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(summarize([row("snapkv", 0.5, "vt", 3.0, method_args={"window_size": 8})]), 120))
    assert "snapkv[window_size=8]" in console.export_text()


def test_names_that_look_like_styles_are_shown_in_the_terminal() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(summarize([row("knorm", 0.5, "[bold]", 3.0)]), 120))
    console.print(Grid("title", ("[/b]", "n"), [("x", "1")], left=1).rich(120))
    text = console.export_text()
    assert "[bold]" in text and "[/b]" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_table_fits_and_is_never_cut(width: int) -> None:
    many = [
        row(m, r, f"niah_multikey_{i}", 100.0)
        for m in ("full", "adakv_snapkv")
        for r in (0.5,)
        for i in range(9)
    ]
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(summarize(many), width))
    text = console.export_text()
    assert "…" not in text and "adakv_snapkv" in text and "cache MB" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert ("multikey" in text) == (width == 200)


def test_the_page_says_how_to_get_it_again() -> None:
    page = results_page(ROWS, RUN, "scores.png")
    shown = (
        "`sparsekv eval x.yaml`",
        "org/tiny",
        "a cpu, 2 cores, 16 GiB",
        "| seed | 0 |",
        "now",
        "scores.png",
    )
    assert [text for text in shown if text not in page] == []


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_picture_draws_every_complete_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = Axes.plot

    def record(self: Axes, x: list[float], y: list[float], **options: Any) -> Any:
        drawn[options["label"]] = x, y
        return plot(self, x, y, **options)

    levels: list[float] = []
    monkeypatch.setattr(Axes, "plot", record)
    axhline = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **o: (levels.append(y), axhline(self, y, **o))[1])
    fewer = [row("tova", 0.75, task, 50.0, n=3) for task in ("vt", "qa_1")]
    data = scores_png([*ROWS, row("tova", 0.5, "vt", 50.0), *fewer], "tiny")
    assert data is not None and min(png_size(data)) > 500
    assert drawn == {
        "snapkv": (pytest.approx([0.504, 0.754]), [45.0, 30.0]),
        "knorm": (pytest.approx([0.504]), [5.0]),
    }
    assert levels == [85.0]
    # The uncompressed line too is drawn only beside averages over the same rows.
    assert scores_png([r | {"n": 3} if r["method"] == "full" else r for r in ROWS], "tiny") is not None  # type: ignore[misc]
    assert levels == [85.0]


def test_many_methods_make_the_picture_taller() -> None:
    few, many = (scores_png([row(f"m{i}", 0.5, "vt", float(i)) for i in range(n)], "t") for n in (3, 32))
    assert few is not None and many is not None
    assert png_size(many)[1] > png_size(few)[1]


def test_labels_are_drawn_as_they_are(legend_texts: list[tuple[str, bool]]) -> None:
    """A "$" is no mathematics, be it valid or not, and a leading "_" does not hide a line."""
    names = ["a $x_{$", "$x^2$", "_hidden", "5 $"]
    rows = [row(f"m{i}", 0.5, "vt", 9.0 - i) for i in range(len(names))]
    data = scores_png(rows, "t $y_{$", {r["cell_id"]: name for r, name in zip(rows, names, strict=True)})
    assert data is not None
    assert legend_texts == [("a $x_{$", False), ("$x^2$", False), (" _hidden", False), ("5 $", False)]


def test_a_picture_that_fails_leaves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bytes:
        raise RuntimeError("no picture")

    monkeypatch.setattr("sparsekv.reporting.report.scores_png", fail)
    written: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(ROWS, RUN, written.__setitem__)
    assert list(written) == ["results.md"] and to_markdown(summarize(ROWS)) in written["results.md"]


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    written: dict[str, Any] = {}
    names = write_report([row("full", 0.0, "vt", 1.0)], RUN, written.__setitem__)
    assert names == ["results.md"] and "scores.png" not in written["results.md"]
    names = write_report(ROWS, RUN, written.__setitem__)
    assert names == ["results.md", "scores.png"] and written["scores.png"][:4] == b"\x89PNG"
