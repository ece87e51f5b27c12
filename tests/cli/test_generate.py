"""`sparsekv generate` on the toy model."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import one_line_error, sparsekv


def test_generate_answers_and_says_what_it_cost(
    toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The miller sold nine sacks of rye. " * 8)
    base = ["generate", "--model", str(toy_model_dir), "--file", str(text), "--question", "Who?"]
    base += ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "5"]
    assert sparsekv(*base, "--method", "sink_recent", "--ratio", "0.75") == 0
    printed = capsys.readouterr().out
    n = len(text.read_text()) + 1 + len("<>user\n") - 1  # bytes, the second line break, the template's start
    assert f"context      {n} tokens, sink_recent at 0.75: achieved compression 0.75" in printed
    full_mb = n * 2 * 3 * 2 * 16 * 4 / 1e6
    assert f"the full cache's {full_mb:.2f} MB" in printed and "(5 tokens, " in printed
    for extra in (
        ["--budget-tokens", "40", "--chunk", "64"],
        ["--method", "merging_knorm", "--ratio", "0.5"],
    ):
        method = [] if "--method" in extra else ["--method", "sink_recent"]
        assert sparsekv(*base, *method, *extra) == 0
        assert "achieved compression" in capsys.readouterr().out


def test_mistakes_of_generate_are_told_by_its_options(
    toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, long = tmp_path / "text.txt", tmp_path / "long.txt"
    text.write_bytes(b"\xef\xbb\xbf" + b"The miller sold nine sacks of rye. " * 8)  # with a byte order mark
    (tmp_path / "short.txt").write_text("The miller.")
    long.write_text("The miller sold nine sacks of rye. " * 300)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    keys = (
        "remove chunk",
        "truncate: true",
        "budget_tokens",
        "compression_ratios",
        "task ask",
        "example ask",
    )
    for file, options, expected in (
        (text, "--method sink_recent", "; give --ratio or --budget-tokens"),
        (text, "--method knorm", "method 'knorm' needs a budget; give --ratio or --budget-tokens"),
        (
            text,
            "--method kvzip --ratio 0.5 --chunk 64",
            "at once, so it can't be read in chunks; leave out --chunk",
        ),
        (long, "--ratio 0.5", "the model allows 8192; add --truncate to cut the text, or --chunk to read"),
        (long, "--method full --chunk 64", "give another --method, or --truncate without --chunk"),
        (tmp_path / "latin.txt", "--ratio 0.5", "--file: "),
        (
            tmp_path / "short.txt",
            "",
            "method snapkv needs more than its window_size of 64; give another --method",
        ),
    ):
        arguments = ["generate", "--model", str(toy_model_dir), "--file", str(file), "--question", "Who?"]
        assert sparsekv(*arguments, *options.split()) == 2
        told = one_line_error(capsys)
        assert expected in told and not [key for key in keys if key in told]


def test_a_question_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The miller sold nine sacks of rye.")
    assert (
        sparsekv("generate", "--file", str(file), "--question", "caf\udce9?") == 2
    )  # as sys.argv holds latin-1
    assert "--question is not valid UTF-8 text" in one_line_error(capsys)
