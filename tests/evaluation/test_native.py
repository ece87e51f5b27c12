"""Native methods are kvpress's own pipeline, on our prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sparsekv.benchmarks.base import Example
from sparsekv.config import EvalConfig, parse_config
from sparsekv.evaluation import native
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.cells import Setting, settings
from sparsekv.evaluation.native import native_times
from sparsekv.evaluation.prompts import Prompt, assemble
from sparsekv.policies.base import NativePolicy

CONTEXT = "The miller of Thornfield sold nine sacks of rye, and the innkeeper paid in silver. " * 4


@pytest.fixture
def prompt(toy_tokenizer: Any) -> Prompt:
    example = Example(
        "e/0", "b", "t", CONTEXT, "Who paid?", " The", ("innkeeper",), 12, "string_match_all", None
    )
    return assemble(example, toy_tokenizer)


def one(method: dict[str, Any], **changes: Any) -> Setting:
    config = {"model": "toy", "benchmarks": [{"name": "ruler"}], "methods": [method]}
    (setting,) = settings(parse_config(EvalConfig, config | changes))
    policy_of(setting)
    return setting


def policy_of(setting: Setting) -> NativePolicy:
    policy = setting.policy()
    assert isinstance(policy, NativePolicy)
    return policy


CASES = [
    ({"name": "think", "args": {"key_channel_compression_ratio": 0.5}}, {}, 0.0),
    ({"name": "merging_knorm"}, {"compression_ratios": [0.5]}, 0.5),
]


@pytest.mark.parametrize(("method", "changes", "achieved"), CASES)
def test_the_answer_is_that_of_kvpress_pipeline(
    method: dict[str, Any],
    changes: dict[str, Any],
    achieved: float,
    prompt: Prompt,
    tiny_model: Callable[..., Any],
    toy_tokenizer: Any,
) -> None:
    from kvpress.pipeline import KVPressTextGenerationPipeline

    setting = one(method, **changes)
    (reply,) = Answerer(tiny_model("llama"), toy_tokenizer, 0, 8192).answer(prompt, [setting])
    pipeline = KVPressTextGenerationPipeline(model=tiny_model("llama"), tokenizer=toy_tokenizer)
    policy = policy_of(setting)
    expected = pipeline(
        CONTEXT,
        question="Who paid?",
        answer_prefix=" The",
        press=policy.press(setting.budget),
        max_new_tokens=12,
    )
    assert reply.prediction == expected["answer"]
    assert reply.finish_reason == "length"
    n = prompt.context_tokens
    assert reply.achieved_compression == pytest.approx(achieved, abs=1 / n)
    assert reply.full_cache_bytes == 2 * 3 * 2 * 16 * 4 * n
    assert reply.cache_bytes == pytest.approx((1 - reply.achieved_compression) * reply.full_cache_bytes)


def test_a_native_answer_stops_at_an_end_token_and_says_so(
    prompt: Prompt, tiny_model: Callable[..., Any], toy_tokenizer: Any
) -> None:
    setting = one(CASES[1][0], **CASES[1][1])
    model = tiny_model("llama")
    answerer = Answerer(model, toy_tokenizer, 0, 8192)
    (whole,) = answerer.answer(prompt, [setting])
    model.generation_config.eos_token_id = list(range(304))  # every token ends it, from the second on
    (cut,) = answerer.answer(prompt, [setting])
    assert (whole.finish_reason, cut.finish_reason) == ("length", "eos")
    assert whole.prediction.startswith(cut.prediction) and len(cut.prediction) < len(whole.prediction)


def test_native_times_leave_the_stop_rule_as_it_was(
    prompt: Prompt, tiny_model: Callable[..., Any], toy_tokenizer: Any
) -> None:
    setting = one(CASES[1][0], **CASES[1][1])
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 7
    policy = policy_of(setting)
    seconds, rate = native_times(model, toy_tokenizer, prompt, policy, setting.budget, 4)
    assert seconds > 0 and rate > 0
    assert model.generation_config.eos_token_id == 7


@pytest.mark.parametrize(("method", "changes", "achieved"), CASES)
def test_native_times_are_of_one_answer(
    method: dict[str, Any],
    changes: dict[str, Any],
    achieved: float,
    prompt: Prompt,
    tiny_model: Callable[..., Any],
    toy_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A difference of two answers is nonsense where the first one is slow: it made rates of 10^9 tokens/s."""
    model = tiny_model("llama")
    passes: list[float] = []

    def spend(module: Any, args: Any, kwargs: Any) -> None:
        passes.append(0.25 if passes else 60.0)  # the first pass warms up

    hook = model.model.register_forward_pre_hook(spend, with_kwargs=True)
    monkeypatch.setattr(native, "time", SimpleNamespace(perf_counter=lambda: sum(passes)))
    setting = one(method, **changes)
    policy = policy_of(setting)
    try:
        seconds, rate = native_times(model, toy_tokenizer, prompt, policy, setting.budget, 4)
    finally:
        hook.remove()
    assert (seconds, rate) == (60.25, 4.0)  # context and question; 3 tokens of 0.25 s
    assert len(passes) == 5 and not model._forward_pre_hooks


def test_the_plain_model_comes_back_after_a_native_method(
    prompt: Prompt, tiny_model: Callable[..., Any], toy_tokenizer: Any
) -> None:
    answerer = Answerer(tiny_model("llama"), toy_tokenizer, 0, 8192)
    plain = settings(
        parse_config(EvalConfig, {"model": "t", "benchmarks": [{"name": "ruler"}], "methods": ["full"]})
    )
    before = answerer.answer(prompt, plain)
    answerer.answer(prompt, [one(*[CASES[0][0]])])
    assert answerer.answer(prompt, plain) == before
