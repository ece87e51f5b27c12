"""Methods that choose at every step what to read, in an evaluation: answers, what a step read, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.cache.steps import step_bytes
from sparsekv.config import EvalConfig, parse_config
from sparsekv.errors import ConfigError
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.ask import Report
from sparsekv.evaluation.cells import Setting, settings
from sparsekv.evaluation.cost import read_alone
from sparsekv.evaluation.plan import check_combinations
from sparsekv.evaluation.prompts import assemble
from sparsekv.generation import compress

METHODS = ["full", "sink_recent", "dynamic_kv", "defensive_kv", "layer_defensive_kv", "rocket_kv", "quest"]
BY_STEP = ("rocket_kv", "quest")


def example(metric: str = "string_match_all") -> Example:
    context = "".join(f"In the year {1700 + i} the miller sold {3 * i} sacks of rye. " for i in range(4))
    question = "" if metric == PERPLEXITY else "What did he sell?"
    return Example("e/0", "b", "t", context, question, "", (" In 1701 he sold none.",), 6, metric, None)


def chosen(**changes: Any) -> list[Setting]:
    base = {
        "model": "toy",
        "benchmarks": [{"name": "ruler"}],
        "methods": METHODS,
        "compression_ratios": [0.8],
    }
    return settings(parse_config(EvalConfig, base | changes))


@pytest.fixture
def answerer(tiny_model: Callable[..., Any], toy_tokenizer: Any) -> Answerer:
    return Answerer(tiny_model("llama"), toy_tokenizer, seed=3, longest=8192)


def test_answers_are_generates_and_say_what_steps_read(answerer: Answerer, toy_tokenizer: Any) -> None:
    prompt = assemble(example(), toy_tokenizer)
    ids = torch.cat([prompt.context_ids, prompt.question_ids], dim=1)
    found = chosen()
    for setting, reply in zip(found, answerer.answer(prompt, found), strict=True):
        by_step = setting.method in BY_STEP
        assert answerer.shares_prefill(setting) is not by_step
        cache = compress(answerer.model, prompt.context_ids, setting.policy(), setting.budget)
        assert reply.achieved_compression == pytest.approx(cache.achieved_compression[0])
        before = cache.nbytes
        out = answerer.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert reply.prediction == toy_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert (reply.attended_fraction < 1) is by_step
        if by_step:
            assert reply.cache_bytes == before + step_bytes(cache) > before  # the bounds of pages count
    quest = dict(zip(METHODS, answerer.answer(prompt, found), strict=True))["quest"]
    n = ids.shape[1] + 5  # the last step's token is stored, and two of three layers read everything
    assert quest.achieved_compression == 0
    assert quest.attended_fraction == pytest.approx((2 + int(n * (1 - 0.8)) / n) / 3)


def test_an_asked_question_says_what_a_step_read() -> None:
    report = Report("rye", "quest at 0.80", 100, 0.0, 900, 900, None, None, 0.1, 3, attended_fraction=0.25)
    assert report.lines()[0].endswith("achieved compression 0.000 (100.0% kept; a step reads 25.0% of it)")
    assert replace(report, attended_fraction=1.0).lines()[0].endswith("(100.0% kept)")


def test_perplexity_is_scored_step_by_step(answerer: Answerer, toy_tokenizer: Any) -> None:
    prompt = assemble(example(PERPLEXITY), toy_tokenizer)
    for setting, reply in zip(chosen(), answerer.answer(prompt, chosen()), strict=True):
        if setting.method not in BY_STEP:
            continue
        cache = compress(answerer.model, prompt.context_ids, setting.policy(), setting.budget)
        nll, ids = 0.0, prompt.question_ids
        for place in range(ids.shape[1] - 1):
            with torch.no_grad():
                logits = answerer.model(ids[:, place : place + 1], past_key_values=cache).logits[0, -1]
            nll -= float(logits.log_softmax(-1)[ids[0, place + 1]])
        assert reply.perplexity == pytest.approx(
            torch.tensor(nll / (ids.shape[1] - 1)).exp().item(), rel=1e-4
        )
        assert reply.attended_fraction < 1


def test_costs_and_traces(answerer: Answerer, toy_tokenizer: Any) -> None:
    prompt = assemble(example(), toy_tokenizer)
    found = [setting for setting in chosen() if setting.method in BY_STEP]
    for setting in found:
        cache, _, select_s = read_alone(answerer, prompt, setting)
        assert select_s is None and cache.layers[2].reader is not None
    traces = {setting.method: trace for setting, trace in answerer.traces(prompt, found)}
    n = prompt.context_tokens
    assert all(len(head) == n for layer in traces["quest"].kept[0] for head in layer)
    assert len({len(head) for layer in traces["rocket_kv"].kept[0] for head in layer}) == 1
    assert n // 5 < len(traces["rocket_kv"].kept[0][0][0]) < n


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["rocket_kv"], "phase": "both"}, "method 'rocket_kv' evicts nothing while decoding"),
        ({"methods": ["quest"], "phase": "decode"}, "method 'quest' evicts nothing while decoding"),
        ({"methods": ["rocket_kv"], "chunk": 64}, "method 'rocket_kv' needs the whole context at once"),
        ({"methods": ["dynamic_kv"], "chunk": 64}, "method 'dynamic_kv' needs the whole context at once"),
        (
            {"methods": ["dynamic_kv"], "budget_scope": "layer"},
            "budget_scope must be head or model, got layer",
        ),
        ({"methods": ["defensive_kv"], "budget_scope": "model"}, "must be head or layer, got model"),
        ({"methods": ["layer_defensive_kv"], "phase": "both"}, "needs the whole context at once"),
        (
            {"methods": ["knorm"], "budget_scope": "model", "chunk": 64},
            "budget_scope model needs the whole context",
        ),
        ({"methods": ["rocket_kv"], "compression_ratios": []}, "method 'rocket_kv' needs a budget"),
        ({"methods": ["dynamic_kv"], "compression_ratios": []}, "method 'dynamic_kv' needs a budget"),
        ({"methods": ["defensive_kv"], "compression_ratios": []}, "method 'defensive_kv' needs a budget"),
    ],
)
def test_combinations_that_cannot_be_are_named_before_weights_are_loaded(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_combinations(chosen(**changes))
