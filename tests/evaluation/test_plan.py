"""What is checked before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekv.config import EvalConfig, parse_config
from sparsekv.errors import ConfigError
from sparsekv.evaluation import plan as module
from sparsekv.evaluation.cells import Task
from sparsekv.evaluation.plan import Plan, make_plan


def plan(toy_eval: Callable[..., Any], **changes: Any) -> Plan:
    return make_plan(parse_config(EvalConfig, toy_eval(**changes)))


def test_no_weights_are_needed(toy_eval: Callable[..., Any], tmp_path: Path, toy_model_dir: Path) -> None:
    folder = tmp_path / "weightless"
    folder.mkdir()
    for file in toy_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    made = plan(toy_eval, model=str(folder))
    assert made.longest == 8192 and len(made.cells) == 10 and made.n_rows == 20


def test_limit_counts_rows_per_task(toy_eval: Callable[..., Any]) -> None:
    made = plan(toy_eval, limit=1)
    assert {str(task): len(rows) for task, rows in made.prompts.items()} == {"local/a": 1, "local/b": 1}
    ruler = [{"name": "ruler", "tasks": ["vt"], "context_length": 2000, "rows": 5}]
    assert [len(rows) for rows in plan(toy_eval, benchmarks=ruler, limit=2).prompts.values()] == [2]
    assert [len(rows) for rows in plan(toy_eval, benchmarks=ruler, limit=9).prompts.values()] == [5]


def test_a_longer_run_starts_with_the_same_rows(toy_eval: Callable[..., Any]) -> None:
    ruler = [{"name": "ruler", "tasks": ["vt"], "context_length": 2000, "rows": 3}]
    task = Task("ruler", "vt", 2000)
    short = plan(toy_eval, benchmarks=ruler, limit=1).prompts[task]
    long = plan(toy_eval, benchmarks=ruler).prompts[task]
    assert [p.sha for p in long][:1] == [p.sha for p in short] and len({p.sha for p in long}) == 3


def test_the_same_task_twice_is_an_error(toy_eval: Callable[..., Any]) -> None:
    twice = toy_eval()["benchmarks"] * 2
    with pytest.raises(ConfigError, match="task local/a is listed twice"):
        plan(toy_eval, benchmarks=twice)


def test_every_row_of_a_task_is_weighed_not_only_the_first(
    toy_eval: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [
        {
            "context": text,
            "question": "?",
            "answer_prefix": "",
            "answer": "x",
            "max_new_tokens": 2,
            "task": "a",
        }
        for text in ("long enough " * 30, "short")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = [{"name": "local", "path": str(data)}]
    with pytest.raises(ConfigError, match="is under n_sink=4"):
        plan(toy_eval, benchmarks=benchmarks, methods=["sink_recent"], compression_ratios=[0.9])
    assert plan(toy_eval, benchmarks=benchmarks, methods=["sink_recent"], compression_ratios=[0.5])


def test_an_adapter_on_an_adapter_is_refused(toy_eval: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (tmp_path / name / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is a LoRA adapter itself; adapter .* cannot be added"):
        plan(toy_eval, model=str(tmp_path / "one"), adapter=str(tmp_path / "two"))


def test_a_context_no_longer_than_a_methods_window_is_named(
    toy_eval: Callable[..., Any], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"question": "?", "answer": "x", "max_new_tokens": 2, "task": "a"}
    data.write_text("".join(json.dumps(row | {"context": "x" * n}) + "\n" for n in (200, 30)))
    short = {"benchmarks": [{"name": "local", "path": str(data)}], "methods": ["adakv_snapkv"]}
    told = r"example local/a/0001 has (\d+) tokens, method adakv_snapkv needs more than its window_size of 64; give"
    with pytest.raises(ConfigError, match=told):
        plan(toy_eval, **short)
    assert plan(toy_eval, **short, compression_ratios=[0.0])  # nothing leaves, so nothing is scored
    assert plan(toy_eval, **short | {"methods": [{"name": "adakv_snapkv", "args": {"window_size": 16}}]})


def test_nothing_is_downloaded_or_run_for_a_method_that_does_not_exist(
    toy_eval: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(module, "load_tokenizer", never)
    with pytest.raises(ConfigError, match="unknown method"):
        plan(toy_eval, methods=["snapvk"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["kvzip"], "budget_scope": "layer"}, "budget_scope must be head, got layer"),
        ({"methods": ["adakv_snapkv"], "budget_scope": "model"}, "head or layer, got model"),
        ({"methods": ["knorm"], "budget_scope": "model", "chunk": 64}, "whole context at once"),
        ({"methods": ["decoding_knorm"], "phase": "both"}, "use phase: decode or prefill, not both"),
        (
            {"methods": ["simlayerkv"]},
            "simlayerkv takes no compression ratio or budget; its argument lazy_threshold",
        ),
        (
            {"methods": ["duo_attention"]},
            "duo_attention takes no compression ratio or budget; its argument head_",
        ),
        (
            {"methods": [{"name": "dynamic_anchors", "args": {"method": "snapvk"}}]},
            "unknown method 'snapvk' .did you",
        ),
        (
            {"methods": [{"name": "dynamic_anchors", "args": {"method": "random"}}]},
            "method 'random' has no scores",
        ),
        (
            {"methods": [{"name": "dynamic_anchors", "args": {"method": ["knorm"]}}]},
            "must be the name of a method",
        ),
        ({"device": "gpu"}, "unknown device 'gpu'.*allowed: auto, cpu"),
        ({"methods": ["merging_knorm"], "phase": "decode"}, "can't evict while decoding; use phase: prefill"),
        ({"methods": ["knorm", {"name": "tova", "label": "knorm"}]}, "label 'knorm' stands for two methods"),
    ],
)
def test_combinations_that_would_be_ignored_or_fail_late_are_refused(
    toy_eval: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(toy_eval, **changes)
