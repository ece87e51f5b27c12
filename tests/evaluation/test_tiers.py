"""Methods with a passive tier in an evaluation: what is asked for, what is refused, and that nothing is lost."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relevance.scored import scored_model
from sparsekv import TieredCache, prepare
from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.cache.disk import DiskStore
from sparsekv.config import EvalConfig, parse_config
from sparsekv.errors import ConfigError
from sparsekv.evaluation import answers
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.cells import Cell, Setting, Task, settings
from sparsekv.evaluation.cost import measure
from sparsekv.evaluation.plan import check_combinations, try_budgets
from sparsekv.evaluation.prompts import assemble
from sparsekv.evaluation.tier import PAGE_SIZE, Tier
from sparsekv.generation import compress

TASK = Task("b", "t", None)
ALL = 10_000
"""More recalled tokens than any passive tier here holds."""


def chosen(*methods: Any, **changes: Any) -> list[Setting]:
    base: dict[str, Any] = {"model": "toy", "benchmarks": [{"name": "ruler"}], "compression_ratios": [0.8]}
    return settings(parse_config(EvalConfig, base | {"methods": list(methods)} | changes))


def tiered(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "passive": "cpu"} | options


def example(metric: str = "string_match_all") -> Example:
    context = "".join(f"In the year {1700 + i} the miller sold {3 * i} sacks of rye. " for i in range(4))
    question = "" if metric == PERPLEXITY else "What did he sell?"
    return Example("e/0", "b", "t", context, question, "", (" In 1701 he",), 6, metric, None)


@pytest.fixture
def answerer(toy_tokenizer: Any) -> Answerer:
    return Answerer(prepare(scored_model()), toy_tokenizer, seed=3, longest=8192)


# ---- what is asked for ----------------------------------------------------------------------------------------------


def test_a_tier_is_part_of_a_cell_but_not_its_folder() -> None:
    one, cpu, disk, elsewhere = (
        Cell(TASK, chosen("snapkv" if not options else tiered("snapkv", **options))[0])
        for options in ({}, {"page_size": 16}, {"passive": "disk:a"}, {"passive": "disk:b", "label": "x"})
    )
    assert one.cell_id.startswith("b.t.snapkv.0.80.") and "passive" not in one.cell_id
    assert "tier" not in one.definition() and one.setting.tier is None
    assert cpu.cell_id.startswith("b.t.snapkv.0.80.passive_cpu.") and cpu.setting.tier == Tier("cpu")
    assert disk.cell_id == elsewhere.cell_id != cpu.cell_id
    assert disk.setting.tier is not None and disk.setting.tier.folder == "a"
    for cell in (one, cpu, disk):
        again = Cell.from_definition(json.loads(json.dumps(cell.definition())))
        assert again == cell and again.cell_id == cell.cell_id
    ids = {
        Cell(TASK, chosen(tiered("snapkv", **options))[0]).cell_id
        for options in (
            {},
            {"recall_tokens": 0},
            {"recall_tokens": 8},
            {"page_size": 8},
            {"passive": "disk:a"},
        )
    }
    assert len(ids) == 5
    assert inspect.signature(TieredCache).parameters["page_size"].default == PAGE_SIZE


def test_labels_tell_tiers_apart() -> None:
    found = chosen(
        "knorm",
        tiered("knorm"),
        tiered("knorm", recall_tokens=4, page_size=8),
        tiered("knorm", page_size=4, label="x"),
    )
    labels = ["knorm", "knorm[passive=cpu]", "knorm[passive=cpu, recall_tokens=4, page_size=8]", "x"]
    assert [setting.label for setting in found] == labels
    with pytest.raises(ConfigError, match="label 'knorm' stands for two methods"):
        chosen("knorm", tiered("knorm", label="knorm"))
    with pytest.raises(ConfigError, match=r"method 'knorm' with budget 0\.80 is listed twice"):
        chosen(tiered("knorm", passive="disk:a"), tiered("knorm", passive="disk:b"))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            tiered("knorm", passive="cpuu"),
            r"methods\[0\]\.passive: unknown passive tier 'cpuu' \(did you mean 'cpu'\?\)",
        ),
        (tiered("knorm", passive="disk:"), "unknown passive tier 'disk:'; allowed: cpu, disk:<folder>"),
        (
            {"name": "knorm", "pasive": "cpu"},
            r"unknown key 'pasive' in methods\[0\] \(did you mean 'passive'\?\)",
        ),
        (tiered("knorm", recal_tokens=1), r"\(did you mean 'recall_tokens'\?\)"),
        (
            tiered("knorm", recall_tokens=-1),
            r"methods\[0\]\.recall_tokens: .*greater than or equal to 0, got -1",
        ),
        (tiered("knorm", page_size=0), r"methods\[0\]\.page_size: .*greater than or equal to 1, got 0"),
        (
            {"name": "knorm", "recall_tokens": 5},
            "recall_tokens=5 needs a second tier: give passive, cpu or disk",
        ),
        ({"name": "quest", "page_size": 5}, r"page_size=5 needs a second tier.*own page_size goes into args"),
    ],
)
def test_mistakes_in_a_tier_are_told_when_a_config_is_read(method: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        chosen(method)


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        (tiered("full"), {}, "method 'full' evicts nothing; remove passive"),
        (tiered("quest"), {}, "method 'quest' chooses at every step what to read"),
        (tiered("rocket_kv"), {}, "method 'rocket_kv' chooses at every step what to read"),
        (
            tiered("think", args={"key_channel_compression_ratio": 0.5}),
            {"compression_ratios": []},
            "one tier; remove",
        ),
        (
            tiered("knorm"),
            {"phase": "both"},
            "evicts once, and the active tier keeps its size.*use phase: prefill",
        ),
        (
            tiered("sliding_window", args={"window": 9}),
            {"compression_ratios": []},
            "needs a budget, the size of its",
        ),
    ],
)
def test_what_a_passive_tier_cant_serve_is_refused(
    method: Any, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_combinations(chosen(method, **changes))


def test_contexts_beyond_the_window_are_refused(toy_tokenizer: Any, tiny_model: Callable[..., Any]) -> None:
    found = chosen(tiered("knorm"), chunk=64)
    check_combinations(found)
    prompts = {TASK: [assemble(example(), toy_tokenizer)]}
    with pytest.raises(ConfigError, match="the model allows 100: keys are re-rotated beyond that"):
        try_budgets(found, prompts, tiny_model("llama").config, toy_tokenizer, 100)
    try_budgets(chosen("knorm", chunk=64), prompts, tiny_model("llama").config, toy_tokenizer, 100)


# ---- answers --------------------------------------------------------------------------------------------------------

METHODS = ["random", "anchors", "knorm", "snapkv", "adakv_snapkv", "dynamic_kv", "kvzip", "atskv"]


@pytest.mark.parametrize("name", METHODS)
def test_where_all_is_recalled_every_method_answers_like_the_full_cache(
    answerer: Answerer, name: str
) -> None:
    """And not where nothing is: then it answers as it does with one tier."""
    scored = assemble(example(PERPLEXITY), answerer.tokenizer)
    found = chosen("full", name, tiered(name, recall_tokens=ALL), tiered(name, recall_tokens=0))
    check_combinations(found)
    full, alone, everything, nothing = answerer.answer(scored, found)
    assert everything.perplexity == pytest.approx(full.perplexity, rel=1e-4)
    assert abs(alone.perplexity / full.perplexity - 1) > 1e-3
    assert everything.attended_fraction == 1.0 and nothing.attended_fraction < 0.5
    for reply in (everything, nothing):
        assert reply.achieved_compression == pytest.approx(alone.achieved_compression, abs=0.01)
        assert 0 < reply.passive_bytes < reply.cache_bytes
    assert alone.passive_bytes == full.passive_bytes == 0


def test_what_a_masked_prefill_hid_comes_back_afterwards(answerer: Answerer) -> None:
    """A sliding window's keys were computed under its mask, so this is not the full cache, but more than the window."""
    scored = assemble(example(PERPLEXITY), answerer.tokenizer)
    found = chosen("full", "sliding_window", *(tiered("sliding_window", recall_tokens=n) for n in (0, ALL)))
    full, alone, nothing, everything = answerer.answer(scored, found)
    assert alone.achieved_compression == pytest.approx(0.8, abs=0.01)
    assert nothing.attended_fraction < 0.5 and everything.attended_fraction == 1.0
    assert len({reply.perplexity for reply in (full, nothing, everything)}) == 3


def test_an_answer_is_what_generate_gives_with_the_same_cache(answerer: Answerer) -> None:
    prompt = assemble(example(), answerer.tokenizer)
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    (setting,) = chosen(tiered("atskv", page_size=4), compression_ratios=[0.7])
    assert not answerer.shares_prefill(setting)
    (reply,) = answerer.answer(prompt, [setting])
    n_active = int(prompt.context_tokens * (1 - 0.7))
    cache = TieredCache(answerer.model, n_active, page_size=4)
    compress(answerer.model, prompt.context_ids, "atskv", 0.7, cache=cache)
    sizes = cache.active_nbytes, cache.passive_nbytes
    assert reply.achieved_compression == pytest.approx(1 - n_active / prompt.context_tokens, abs=1e-3)
    out = answerer.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert reply.prediction == answerer.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert (reply.cache_bytes - reply.passive_bytes, reply.passive_bytes) == sizes
    assert reply.attended_fraction == pytest.approx(cache.attended_fraction)
    assert cache.stored_counts().double().mean() <= n_active + 1  # the question and the answer are inside


def test_a_context_may_be_read_in_chunks(answerer: Answerer) -> None:
    prompt = assemble(example(), answerer.tokenizer)
    for name in ("knorm", "atskv"):
        (setting,) = chosen(tiered(name), chunk=100)
        (reply,) = answerer.answer(prompt, [setting])
        assert reply.achieved_compression == pytest.approx(0.8, abs=0.02) and reply.passive_bytes > 0


def test_answers_do_not_depend_on_what_else_is_asked(answerer: Answerer) -> None:
    prompts = [assemble(one, answerer.tokenizer) for one in (example(), replace(example(), question="Rye?"))]
    found = chosen("full", tiered("knorm", page_size=4), "knorm")
    together = answerer.answer_many([(prompt, found) for prompt in prompts])
    assert together == [[answerer.answer(prompt, [s])[0] for s in found] for prompt in prompts]


def test_prompts_with_two_tiers_decode_side_by_side(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the right sizes each; one tier and two never share a batch."""
    batches: list[int] = []
    decode = answers.decode_together

    def counted(model: Any, asked: Any, ends: Any, **options: Any) -> Any:
        batches.append(len(asked))
        return decode(model, asked, ends, **options)

    monkeypatch.setattr(answers, "decode_together", counted)
    shorter = replace(example(), context=example().context[60:], example_id="e/1", max_new_tokens=9)
    prompts = [assemble(one, answerer.tokenizer) for one in (example(), shorter)]
    found = chosen("full", *(tiered("snapkv", recall_tokens=n) for n in (0, 5)), "snapkv")
    together = answerer.answer_many([(prompt, found) for prompt in prompts])
    assert sorted(batches) == [2, 2, 2]
    for prompt, replies in zip(prompts, together, strict=True):
        for setting, reply in zip(found, replies, strict=True):
            (alone,) = replace(answerer, batch_cells=False).answer(prompt, [setting])
            assert reply == replace(alone, attended_fraction=reply.attended_fraction)
            assert reply.attended_fraction == pytest.approx(alone.attended_fraction)
    assert together[0][1].attended_fraction < together[0][2].attended_fraction < 1
    assert together[0][1].passive_bytes > together[1][1].passive_bytes > 0


def test_a_disk_tier_gives_its_folder_back(answerer: Answerer, tmp_path: Path) -> None:
    prompt = assemble(example(), answerer.tokenizer)
    found = chosen(tiered("knorm", passive=f"disk:{tmp_path / 'tier'}"), tiered("knorm"))
    first, on_cpu = answerer.answer(prompt, found)
    assert replace(first, passive_bytes=0, cache_bytes=0) == replace(on_cpu, passive_bytes=0, cache_bytes=0)
    assert answerer.answer(prompt, found)[0].prediction == first.prediction
    row = measure(answerer, Cell(TASK, found[0]), prompt, 3)
    assert row["select_s"] is None and row["decode_tokens_per_s"] > 0
    (trace,) = [trace for _, trace in answerer.traces(prompt, found[:1])]
    n_kept = int(prompt.context_tokens * (1 - 0.8))
    assert all(len(head) == n_kept for layer in trace.kept[0] for head in layer)
    again = DiskStore(tmp_path / "tier")
    assert again.n_entries == 0
    again.close()


def test_a_failed_answer_gives_its_folder_back_too(answerer: Answerer, tmp_path: Path) -> None:
    prompt = assemble(example(), answerer.tokenizer)
    (setting,) = chosen(
        tiered("anchors", passive=f"disk:{tmp_path / 'tier'}"), budget_tokens=[3], compression_ratios=[]
    )
    for _ in range(2):  # a lock that is still held would be another error
        with pytest.raises(ConfigError, match="is under sink_size=4"):
            answerer.answer(prompt, [setting])


def test_the_cost_of_an_answer_adds_up(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by a second at every look: reading 1, question 1, four more tokens in 1."""
    import sparsekv.evaluation.cost as cost

    ticks = iter(range(100))
    monkeypatch.setattr(cost, "_now", lambda model: float(next(ticks)))
    prompt = assemble(example(), answerer.tokenizer)
    (setting,) = chosen(tiered("knorm"))
    row = measure(answerer, Cell(TASK, setting), prompt, 5)
    assert (row["prefill_s"], row["select_s"], row["question_s"]) == (1.0, None, 1.0)
    assert row["decode_tokens_per_s"] == 4.0
    assert row["throughput_tokens_per_s"] == pytest.approx(5 / 3)
