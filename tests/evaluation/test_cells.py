"""Cells: their number, their identity, their budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsekv.config import EvalConfig, parse_config
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Cell, Setting, Task, settings, shown_budget

TASK = Task("ruler", "niah_single_2", 1024)
SETTING = Setting("snapkv", {"window_size": 8}, "snap", 0.5, None, "head", "prefill", False, None)


def chosen(toy_eval: Callable[..., dict[str, Any]], **changes: Any) -> list[Setting]:
    return settings(parse_config(EvalConfig, toy_eval(**changes)))


def test_an_id_never_changes() -> None:
    """Folders of earlier versions resume only if this literal stays."""
    assert Cell(TASK, SETTING).cell_id == "ruler.niah_single_2.1024.snapkv.0.50.a041301f"


def test_everything_that_defines_a_cell_is_in_its_id() -> None:
    cells = [Cell(TASK, SETTING)]
    for change in (
        {"method": "knorm"},
        {"args": {"window_size": 9}},
        {"compression_ratio": 0.6},
        {"compression_ratio": 0.501},
        {"compression_ratio": None, "budget_tokens": 100},
        {"compression_ratio": None},
        {"budget_scope": "layer"},
        {"phase": "both"},
        {"query_aware": True},
        {"chunk": 64},
    ):
        cells.append(Cell(TASK, replace(SETTING, **change)))
    for change in ({"benchmark": "r"}, {"task": "vt"}, {"context_length": 2048}):
        cells.append(Cell(replace(TASK, **change), SETTING))
    assert len({cell.cell_id for cell in cells}) == len(cells)


def test_a_label_is_only_a_name() -> None:
    assert Cell(TASK, replace(SETTING, label="other")).cell_id == Cell(TASK, SETTING).cell_id


def test_a_definition_goes_through_json_and_back() -> None:
    cell = Cell(TASK, SETTING)
    again = Cell.from_definition(json.loads(json.dumps(cell.definition())))
    assert again == cell and again.cell_id == cell.cell_id and again.setting.label == "snap"


def test_budgets_are_shown_with_as_many_digits_as_they_have() -> None:
    shown = [
        shown_budget(*budget)
        for budget in ((0.5, None), (0.501, None), (0.95, None), (None, 64), (None, None))
    ]
    assert shown == ["0.50", "0.501", "0.95", "64 tokens", "own"]
    fine = replace(SETTING, compression_ratio=0.501)
    assert fine.shown_budget == "0.501" and ".snapkv.0.501." in Cell(TASK, fine).cell_id


def test_ids_are_file_names() -> None:
    weird = Cell(Task("local", "a/b c:*", None), replace(SETTING, method="adakv(snapkv)"))
    assert not set(weird.cell_id) & set("/\\:* \"'")


def test_full_runs_once_and_others_once_per_budget(toy_eval: Callable[..., Any]) -> None:
    found = chosen(toy_eval, budget_tokens=[32], methods=["full", "knorm"])
    assert [(s.method, s.compression_ratio, s.budget_tokens) for s in found] == [
        ("full", 0.0, None),
        ("knorm", 0.5, None),
        ("knorm", 0.75, None),
        ("knorm", None, 32),
    ]


def test_a_method_may_have_budgets_of_its_own(toy_eval: Callable[..., Any]) -> None:
    own = {"name": "sink_recent", "args": {"n_recent": 8}, "compression_ratios": []}
    found = chosen(toy_eval, methods=[own, {"name": "knorm", "budget_tokens": [7]}])
    assert [(s.compression_ratio, s.budget_tokens) for s in found] == [(None, None), (None, 7)]
    assert found[0].label == "sink_recent[n_recent=8]" and found[0].shown_budget == "own"


def test_a_method_may_have_a_scope_of_its_own(toy_eval: Callable[..., Any]) -> None:
    methods = ["full", "snapkv", {"name": "knorm", "budget_scope": "model"}, "knorm"]
    found = chosen(toy_eval, methods=methods, budget_scope="layer", compression_ratios=[0.5])
    assert [(s.method, s.budget_scope, s.budget.scope) for s in found] == [
        ("full", "head", "head"),
        ("snapkv", "layer", "layer"),
        ("knorm", "model", "model"),
        ("knorm", "layer", "layer"),
    ]
    assert len({Cell(TASK, s).cell_id for s in found}) == 4
    with pytest.raises(
        ConfigError, match=r"methods\[0\]\.budget_scope: input should be 'head', 'layer' or 'model'"
    ):
        chosen(toy_eval, methods=[{"name": "knorm", "budget_scope": "row"}])


def test_an_alias_is_the_same_cell(toy_eval: Callable[..., Any]) -> None:
    by_name = chosen(toy_eval, methods=["full", "h2o"])
    by_alias = chosen(toy_eval, methods=["no_press", "observed_attention"])
    assert by_name == by_alias
    with pytest.raises(ConfigError, match=r"method 'h2o' with budget 0\.50 is listed twice"):
        chosen(toy_eval, methods=["h2o", "observed_attention"])


def test_full_does_not_evict_while_decoding(toy_eval: Callable[..., Any]) -> None:
    assert [s.phase for s in chosen(toy_eval, phase="both")] == ["prefill", "both", "both", "both", "both"]


def test_kvpress_methods_that_evict_while_decoding_say_so(toy_eval: Callable[..., Any]) -> None:
    names = [
        "knorm",
        "decoding_knorm",
        "cam_tova",
        "prefill_decoding(knorm, decoding(tova))",
        "merging_knorm",
    ]
    both_ways = {"name": "dms(knorm)", "args": {"threshold": 0.1, "decoding": True}}
    found = chosen(toy_eval, methods=[*names, both_ways], compression_ratios=[], budget_tokens=[32])
    assert [s.phase for s in found] == ["prefill", "decode", "decode", "both", "prefill", "both"]
    assert [s.phase for s in chosen(toy_eval, methods=["decoding_knorm"], phase="decode")] == ["decode"] * 2


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("snapvk", "unknown method 'snapvk' (did you mean 'snapkv'?)"),
        ({"name": "sink_recent", "args": {"n_sinks": 2}}, "(did you mean 'n_sink'?)"),
        ({"name": "sink_recent", "args": {"n_sink": -1}}, "n_sink must be a whole number >= 0, got -1"),
    ],
)
def test_wrong_methods_are_told(toy_eval: Callable[..., Any], method: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(toy_eval, methods=[method])
    assert expected in str(caught.value)
