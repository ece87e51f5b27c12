"""configs/eval/atskv.yaml and relevance_vs_base.yaml, made tiny: the toy model, toy predictors, short contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.cli.main import app, call
from sparsekv.policies.rocket_kv import first_stage_exponent
from sparsekv.relevance import attach_relevance, relevance_modules, save_relevance
from toy import tiny_model

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
FIGURES = {f"{shows}_by_context.png" for shows in ("memory", "time", "throughput", "accuracy")}
METHODS = ["full", "sliding_window", "dynamic_kv", "rocket_kv", "atskv", "atskv_tiered"]


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but relevance predictors, as `sparsekv relevance fit` leaves one."""
    folder = tmp_path_factory.mktemp("adapters") / "toy-relevance"
    folder.mkdir()
    model = attach_relevance(tiny_model("llama"))
    generator = torch.Generator().manual_seed(4)
    for module in relevance_modules(model).values():
        torch.nn.init.normal_(module.relevance.score.weight, std=0.3, generator=generator)
    save_relevance(model, folder)
    return folder


def tiny(model: Path, out: Path) -> list[str]:
    return [
        f"model={model}",
        f"output_dir={out}",
        "dtype=float32",
        "device=cpu",
        "progress=false",
        "benchmarks.0.tasks=[niah_single_2]",
        "benchmarks.0.rows=1",
        "benchmarks.0.max_new_tokens=4",
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_experiment_end_to_end(
    predictors: Path, toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = [*tiny(toy_model_dir, out), f"adapter={predictors}", "benchmarks.0.context_length=[700, 1400]"]
    changes += ["cost_rows=1", "cost_new_tokens=3"]
    command = ["eval", str(CONFIGS / "atskv.yaml"), *changes]
    assert call(app, "sparsekv", ["validate", *command[1:]]) == 0
    assert "6 settings × 2 tasks = 12 cells; 2 examples, 12 rows" in capsys.readouterr().out
    assert call(app, "sparsekv", command) == 0
    printed = capsys.readouterr().out
    shown = [line.split()[:2] for line in printed[printed.index("By context size") :].splitlines()[4:16]]
    assert shown == [[size, method] for size in ("700", "1400") for method in METHODS]

    results = lines(out / "results.jsonl")
    labels = {
        cell_id: cell["label"]
        for cell_id, cell in json.loads((out / "run.json").read_text())["cells"].items()
    }
    assert [labels[row["cell_id"]] for row in results] == METHODS * 2
    for row in results:
        label = labels[row["cell_id"]]
        assert row["prefill_s"] > 0 and row["question_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["throughput_tokens_per_s"] > 0
        assert row["cache_bytes"] == row["active_bytes"] + row["passive_bytes"]
        expected = {"full": 0.0, "rocket_kv": 1 - 5 ** -first_stage_exponent(5)}.get(label, 0.8)
        assert row["achieved_compression"] == pytest.approx(expected, abs=0.005)
        assert (row["passive_bytes"] > 0, row["passive"]) == (
            (True, "cpu") if label == "atskv_tiered" else (False, None)
        )
        assert (row["attended_fraction"] < 1) is (label in ("rocket_kv", "atskv_tiered"))
    for row in lines(out / "costs.jsonl"):
        reading = row["prefill_s"] + (row["select_s"] or 0) + (row["question_s"] or 0)
        answering = reading + 2 / row["decode_tokens_per_s"]  # the question gives the first of 3 tokens
        assert row["throughput_tokens_per_s"] == pytest.approx(3 / answering)
    by_label = {(labels[row["cell_id"]], row["context_length"]): row for row in results}
    for size in (700, 1400):  # the second tier holds what the first one lost
        lone, two = by_label["atskv", size], by_label["atskv_tiered", size]
        assert two["active_bytes"] < 1.2 * lone["active_bytes"] < 0.4 * lone["full_cache_bytes"]
        assert two["passive_bytes"] > 0.8 * two["full_cache_bytes"]

    assert {path.name for path in out.iterdir()} >= FIGURES | {"results.md", "scores.png", "costs.jsonl"}
    page = (out / "results.md").read_text()
    assert all(f"]({figure})" in page for figure in FIGURES)
    assert page.index("## By context size") < page.index("## Every task")
    assert sum(line.startswith(("| 700 |", "| 1400 |")) for line in page.splitlines()) == 12
    assert "with adapter toy-relevance" in page and "an answer of 3 tokens" in page

    before = (out / "predictions.jsonl").read_bytes(), (out / "costs.jsonl").read_bytes()
    assert call(app, "sparsekv", command) == 0
    assert before == ((out / "predictions.jsonl").read_bytes(), (out / "costs.jsonl").read_bytes())


def test_frozen_predictors_beside_the_base_end_to_end(
    predictors: Path, toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = [*tiny(toy_model_dir, out), f"variants.2.adapter={predictors}", "methods=[full, knorm]"]
    changes += ["variants.1.methods=[tova]", "compare.resamples=100", "compare.min_baseline_score=0"]
    assert call(app, "sparsekv", ["eval", str(CONFIGS / "relevance_vs_base.yaml"), *changes]) == 0
    rows = [
        row
        for row in lines(out / "comparisons.jsonl")
        if row["task"] is None and row["against"] == "baseline"
    ]
    shown = [(row["variant"], row["label"], row["compression_ratio"]) for row in rows]
    assert shown == [
        *(("base", "knorm", ratio) for ratio in (0.7, 0.8)),
        *(("two_pass", "tova", ratio) for ratio in (0.7, 0.8)),
        *(("relevance", label, ratio) for label in ("atskv", "relevance") for ratio in (0.7, 0.8)),
        ("relevance", "atskv_tiered", 0.8),
    ]
    assert all(
        row["achieved_compression"] == pytest.approx(row["compression_ratio"], abs=0.005) for row in rows
    )
    assert {row["gap_closed_from"] for row in rows} <= {None, "knorm"}  # never from what needs another pass
    assert "relevance atskv_tiered (model) 0.80" in " ".join(capsys.readouterr().out.split())
