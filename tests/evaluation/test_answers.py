"""Answers from the shared prefill are the answers each method would give alone, and full is the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.config import EvalConfig, parse_config
from sparsekv.evaluation.answers import Answerer, example_seed, pack
from sparsekv.evaluation.cells import Setting, settings
from sparsekv.evaluation.prompts import Prompt, assemble
from sparsekv.generation import compress, decode_together
from sparsekv.selection import Selection, SelectionTrace

TEXT = "In the year {} the miller of Thornfield sold {} sacks of rye to the innkeeper. "
METHODS = ["full", "sink_recent", "snapkv", "knorm", "random", "sliding_window", "adakv_snapkv", "kvzip"]


def example(metric: str = "string_match_all", references: tuple[str, ...] = ("rye",)) -> Example:
    context = "".join(TEXT.format(1700 + i, 3 * i) for i in range(5))
    scored = metric == PERPLEXITY
    question, prefix = ("", "") if scored else ("What did he sell?", " He sold")
    return Example("e/0", "b", "t", context, question, prefix, references, 8, metric, None)


def chosen(**changes: Any) -> list[Setting]:
    base = {
        "model": "toy",
        "benchmarks": [{"name": "ruler"}],
        "methods": METHODS,
        "compression_ratios": [0.5, 0.75],
    }
    return settings(parse_config(EvalConfig, base | changes))


@pytest.fixture
def answerer(tiny_model: Callable[..., Any], toy_tokenizer: Any) -> Answerer:
    return Answerer(tiny_model("llama"), toy_tokenizer, seed=3, longest=8192)


@pytest.fixture
def prompt(toy_tokenizer: Any) -> Prompt:
    return assemble(example(), toy_tokenizer)


def plain_answer(model: Any, tokenizer: Any, prompt: Prompt) -> str:
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    out = model.generate(input_ids=ids, max_new_tokens=prompt.max_new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_full_is_the_plain_model(answerer: Answerer, prompt: Prompt, tiny_model: Callable[..., Any]) -> None:
    (reply,) = answerer.answer(prompt, chosen(methods=["full"]))
    assert reply.prediction == plain_answer(tiny_model("llama"), answerer.tokenizer, prompt)
    assert reply.achieved_compression == 0.0 and reply.finish_reason == "length"
    n_bytes = 2 * 3 * 2 * 16 * 4 * prompt.context_tokens  # K and V, layers, kv heads, head_dim, fp32
    assert reply.full_cache_bytes == n_bytes


def test_every_method_answers_as_it_does_alone(answerer: Answerer, prompt: Prompt) -> None:
    found = chosen()
    together = answerer.answer(prompt, found)
    alone = [answerer.answer(prompt, [setting])[0] for setting in found]
    assert [r.prediction for r in together] == [r.prediction for r in alone]
    assert together == alone
    answerer.batch_cells = False
    assert answerer.answer(prompt, found) == alone
    assert len({r.prediction for r in together}) > len(METHODS)  # the answers do depend on what was evicted


def test_kvzip_shares_the_prefill_and_the_batch(
    answerer: Answerer, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(methods=["full", "kvzip", "knorm"])
    alone = [answerer._reply_of(answerer.compress(prompt, setting), prompt, setting) for setting in found]
    monkeypatch.setattr(Answerer, "compress", None)
    together = answerer.answer(prompt, found)
    for name in ("prediction", "achieved_compression"):
        assert [getattr(r, name) for r in together] == [getattr(r, name) for r in alone]
    assert len({r.prediction for r in together}) > 2


def test_prompts_side_by_side_are_answered_as_each_alone(
    answerer: Answerer, prompt: Prompt, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(n_lines: int, question: str) -> Prompt:
        context = "".join(TEXT.format(1600 + i, 7 * i) for i in range(n_lines))
        made = Example("e/1", "b", "t", context, question, " He", ("rye",), 5, "string_match_all", None)
        return assemble(made, toy_tokenizer)

    scored = assemble(example(PERPLEXITY, (TEXT.format(1705, 15),)), toy_tokenizer)
    asked = [
        (prompt, chosen()),
        (other(3, "To whom was it sold?"), chosen()),
        (scored, chosen(methods=["full", "knorm"])),
        (other(7, "When?"), chosen(methods=["snapkv", "streaming_llm"], phase="both")),
        (other(6, "What happened in the year 1602?"), chosen(methods=["sink_recent", "adakv_snapkv"])),
    ]
    alone = [answerer.answer(one, found) for one, found in asked]
    sizes: list[int] = []
    decode = decode_together

    def counted(model: Any, questions: Any, eos_ids: Any, **options: Any) -> Any:
        sizes.append(len(questions))
        return decode(model, questions, eos_ids, **options)

    monkeypatch.setattr("sparsekv.evaluation.answers.decode_together", counted)
    assert answerer.answer_many(asked) == alone
    assert max(sizes) > 1
    answerer.batch_cells = False
    assert answerer.answer_many(asked) == alone


def test_batches_are_bounded_by_memory(
    answerer: Answerer, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {i: (0.0, n_bytes, 100) for i, n_bytes in enumerate([10, 10, 30, 30, 99])}
    monkeypatch.setattr("sparsekv.evaluation.answers.BATCH_BYTES", 50)
    assert pack([0, 1, 2, 3, 4], sizes) == [[0, 1, 2], [3], [4]]
    monkeypatch.undo()
    found = chosen()
    whole = answerer.answer(prompt, found)
    monkeypatch.setattr("sparsekv.evaluation.answers.BATCH_BYTES", 2 * whole[0].cache_bytes)
    assert answerer.answer(prompt, found) == whole


def test_a_shared_prefill_gives_what_compress_and_generate_give(answerer: Answerer, prompt: Prompt) -> None:
    found = chosen(methods=["sink_recent", "knorm", "snapkv"])
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    for setting, reply in zip(found, answerer.answer(prompt, found), strict=True):
        cache = compress(answerer.model, prompt.context_ids, setting.policy(), setting.budget)
        assert reply.achieved_compression == pytest.approx(cache.achieved_compression[0])
        out = answerer.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        text = answerer.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert reply.prediction == text


def test_achieved_compression_and_bytes_follow_the_budget(answerer: Answerer, prompt: Prompt) -> None:
    n = prompt.context_tokens
    for setting, reply in zip(chosen(), answerer.answer(prompt, chosen()), strict=True):
        n_kept = max(1, int(n * (1 - (setting.compression_ratio or 0.0))))
        assert reply.achieved_compression == pytest.approx(1 - n_kept / n, abs=2 / n), setting
        assert reply.cache_bytes / reply.full_cache_bytes == pytest.approx(n_kept / n, abs=0.05)


def test_one_policy_object_serves_all_budgets(answerer: Answerer) -> None:
    snap_a, snap_b = chosen(methods=["snapkv"])
    assert answerer.policy(snap_a) is answerer.policy(snap_b)
    (other,) = chosen(methods=[{"name": "snapkv", "args": {"window_size": 8}}], compression_ratios=[0.5])
    assert answerer.policy(other) is not answerer.policy(snap_a)


def test_random_draws_depend_on_seed_and_example_only(answerer: Answerer, prompt: Prompt) -> None:
    traces: list[SelectionTrace] = []
    (setting,) = chosen(methods=["random"], compression_ratios=[0.5])
    for seed in (3, 3, 4):
        answerer.seed = seed
        traces += [trace for _, trace in answerer.traces(prompt, [setting])]
    kept = [torch.cat([head for layer in t.kept[0] for head in layer]).tolist() for t in traces]
    assert kept[0] == kept[1] and kept[0] != kept[2]
    assert example_seed(3, "e/0") != example_seed(3, "e/1")


def test_traces_are_what_the_cache_kept(answerer: Answerer, prompt: Prompt) -> None:
    found = chosen(methods=["sink_recent", "knorm", "sliding_window", "kvzip"], compression_ratios=[0.5])
    traces = {setting.method: trace for setting, trace in answerer.traces(prompt, found)}
    n = prompt.context_tokens
    n_kept = int(n * 0.5)
    assert traces["sink_recent"].kept[0][2][1].tolist() == [0, 1, 2, 3, *range(n - n_kept + 4, n)]
    assert traces["sliding_window"].kept[0][0][0].tolist() == list(range(n - n_kept, n))
    for trace in traces.values():
        assert trace.length == n and trace.steps == [n]
        assert sum(len(head) for layer in trace.kept[0] for head in layer) == pytest.approx(6 * n_kept, abs=6)


def test_a_trace_of_eviction_while_decoding_ends_with_the_answer(
    answerer: Answerer, toy_tokenizer: Any
) -> None:
    prompt = assemble(example(), toy_tokenizer, max_new_tokens=100)
    n, n_question = prompt.context_tokens, prompt.question_ids.shape[1]
    budget = {"compression_ratios": [], "budget_tokens": [40]}
    recent = {}
    for phase in ("decode", "both"):
        ((_, trace),) = answerer.traces(prompt, chosen(methods=["sink_recent"], phase=phase, **budget))
        assert trace.steps == [n, n + n_question + 99] and trace.length == trace.steps[1]
        start, end = ([head.tolist() for layer in step for head in layer] for step in trace.kept)
        whole = list(range(n))
        assert start == [whole if phase == "decode" else [0, 1, 2, 3, *range(n - 36, n)]] * 6
        # Evicted once per 64 tokens: 40 entries then, and what came since.
        assert all(40 <= len(head) < 40 + 64 and head[:4] == [0, 1, 2, 3] for head in end)
        assert all(head[4:] == list(range(head[4], trace.length)) and head[4] > n for head in end)
        recent[phase] = end
    assert recent["decode"] == recent["both"]  # the last eviction left nothing of the context but the sinks


def test_query_aware_lets_eviction_see_the_question(answerer: Answerer, toy_tokenizer: Any) -> None:
    aware = assemble(example(), toy_tokenizer, query_aware=True)
    blind = assemble(example(), toy_tokenizer)
    assert aware.context_tokens == blind.context_tokens + len("What did he sell?")
    assert answerer.answer(aware, chosen(methods=["full"]))[0].prediction == (
        answerer.answer(blind, chosen(methods=["full"]))[0].prediction
    )


def test_perplexity_of_the_full_cache_is_that_of_the_plain_model(
    answerer: Answerer, toy_tokenizer: Any, tiny_model: Callable[..., Any]
) -> None:
    prompt = assemble(example(PERPLEXITY, (" The next year he sold none.",)), toy_tokenizer)
    (reply,) = answerer.answer(prompt, chosen(methods=["full"]))
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    with torch.no_grad():
        log_p = tiny_model("llama")(ids).logits.log_softmax(-1)
    start, n = prompt.context_tokens, prompt.question_ids.shape[1]
    wanted = ids[0, start + 1 : start + n]
    expected = log_p[0, start : start + n - 1].gather(-1, wanted[:, None]).mean().neg().exp()
    assert reply.perplexity == pytest.approx(expected.item(), rel=1e-4)
    assert reply.finish_reason == "scored" and reply.prediction == ""


def test_perplexity_after_eviction_is_that_of_the_masked_forward(
    answerer: Answerer, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = assemble(example(PERPLEXITY, (" The next year he sold none.",)), toy_tokenizer)
    found = chosen(methods=["sink_recent", "knorm"], compression_ratios=[0.5, 0.9])
    replies = answerer.answer(prompt, found)
    read = answerer.read(prompt, dict(enumerate(found)))
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    start, n = prompt.context_tokens, prompt.question_ids.shape[1]
    wanted = ids[0, start + 1 : start + n, None]
    for index, reply in enumerate(replies):
        selection: Selection = read.selections[index]
        with torch.no_grad():
            log_p = answerer.model(ids, selection=selection).logits.log_softmax(-1)
        expected = log_p[0, start : start + n - 1].gather(-1, wanted).mean().neg().exp().item()
        assert reply.perplexity == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("sparsekv.evaluation.perplexity.LOGITS_AT_ONCE", 304 * len(found) * 3)
    in_pieces = answerer.answer(prompt, found)
    assert [r.perplexity for r in in_pieces] == pytest.approx([r.perplexity for r in replies], rel=1e-4)


def test_chunked_reading_and_eviction_while_decoding(answerer: Answerer, prompt: Prompt) -> None:
    (chunked,) = chosen(methods=["sink_recent"], compression_ratios=[], budget_tokens=[40], chunk=32)
    assert not answerer.shares_prefill(chunked)
    (reply,) = answerer.answer(prompt, [chunked])
    assert reply.achieved_compression == pytest.approx(1 - 40 / prompt.context_tokens)
    (both,) = chosen(methods=["sink_recent"], compression_ratios=[], budget_tokens=[40], phase="both")
    assert not answerer.shares_prefill(both)
    (reply,) = answerer.answer(prompt, [both])
    assert reply.prediction
