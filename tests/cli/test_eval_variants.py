"""`sparsekv eval` and `validate` with variants, end to end on the toy model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv.cli.main import app, call
from toy_variants import save_toy_adapter, variants_of

Config = Callable[..., Path]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_adapter(tmp_path_factory.mktemp("adapters") / "toy-eit")


@pytest.fixture
def config(toy_eval: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path) -> Config:
    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(toy_eval(**(variants_of(adapter) | {"limit": 2} | changes))))
        return path

    return write


def sparsekv(*arguments: object) -> int:
    return call(app, "sparsekv", [str(a) for a in arguments])


def test_one_command_compares_the_variants(
    config: Config, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        variants=variants_of(adapter, methods=["full", "knorm", "relevance"])["variants"], progress=True
    )
    assert sparsekv("eval", path, "compare.resamples=100") == 0
    printed = capsys.readouterr()
    assert (
        "base (1 of 2): answers: 12 rows" in printed.err and "eit (2 of 2): answers: 12 rows" in printed.err
    )
    lines = [" ".join(line.split()) for line in printed.out.splitlines() if line.strip()]
    assert lines[0] == "Against base, full"
    assert lines[1] == "variant method requested average difference % of baseline gap closed % achieved"
    assert lines[3] == "base full – 0.0 – – – –"
    shown = [line.split()[:3] for line in lines[4:9]]
    assert shown == [
        ["base", "knorm", "0.50"],
        ["base", "tova", "0.50"],
        ["eit", "full", "–"],
        ["eit", "knorm", "0.50"],
        ["eit", "relevance", "0.50"],
    ]
    assert "Against the same method of base" in lines
    assert any(line.startswith("[low, high]: 95% interval") for line in lines)
    out = tmp_path / "out"
    assert lines[-1] == f"{out}: results.md, comparisons.jsonl, run.json, base/, eit/"
    names = {"results.jsonl", "predictions.jsonl", "results.md", "scores.png", "run.json", ".lock"}
    assert all({p.name for p in (out / name).iterdir()} == names for name in ("base", "eit"))
    page = (out / "results.md").read_text()
    assert "| model of eit | toy-llama with adapter toy-eit |" in page and "compare.resamples=100" in page
    assert len((out / "comparisons.jsonl").read_text().splitlines()) == (5 + 1 + 2) * 3


def test_without_variants_an_adapter_is_a_key_like_any_other(
    config: Config, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsekv("eval", config(variants=[]), f"adapter={adapter}", "methods=[full, relevance]") == 0
    assert "Against" not in capsys.readouterr().out
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["identity"]["adapter"] == "toy-eit" and not (tmp_path / "out" / "base").exists()


def test_validate_counts_and_checks_all_variants(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert sparsekv("validate", path) == 0
    printed = capsys.readouterr().out
    assert "ok. 2 variants, 20 rows" in printed and "local/a: 2 rows" in printed
    assert "  base: 3 settings × 2 tasks = 6 cells; 4 examples, 12 rows" in printed
    assert "  eit: 2 settings × 2 tasks = 4 cells; 4 examples, 8 rows" in printed
    assert not (tmp_path / "out").exists()
    assert sparsekv("eval", path, "limit=1") == 0
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    for overrides, expected in (
        (["variants.1.adapter=/nowhere"], "variant 'eit': adapter folder '/nowhere' does not exist"),
        (["seed=4"], "out/base' holds another run: seed was 0, now 4"),
        (["variants.2.adapter=x"], "'variants' is a list of 2; '2' is not an index from 0 to 1"),
        (["variants.1.name=base"], "variants: the name 'base' is given twice"),
        (["compare.method=nope"], "compare.method 'nope' is not a method of variant 'base'"),
    ):
        told = set()
        for command in ("validate", "eval"):
            assert sparsekv(command, path, *overrides) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
            told.add(error)
        assert len(told) == 1
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


def test_ctrl_c_says_how_to_go_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsekv.cli.progress import Bar

    done: list[int] = []

    def stop(self: Bar, rows: int) -> None:
        done.append(rows)
        if sum(done) > 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "advance", stop)
    path = config(batch_rows=1)
    assert sparsekv("eval", path) == 130
    printed = capsys.readouterr()
    assert (
        f"stopped; 14 rows are kept in {path.parent / 'out'}. To go on: sparsekv eval {path}" in printed.err
    )
    assert (path.parent / "out" / "eit" / "results.md").exists() and printed.out == ""
    monkeypatch.undo()
    assert sparsekv("eval", path) == 0
