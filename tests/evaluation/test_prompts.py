"""Prompts are those of kvpress's pipeline, token for token, and evidence points at the right tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.errors import ConfigError
from sparsekv.evaluation.prompts import Prompt, assemble

EXAMPLE = Example(
    example_id="x/0",
    benchmark="x",
    task="t",
    context="  The key of the tower is 7421. Snow fell — “all” night. ",
    question="What is the key?",
    answer_prefix=" The key is",
    references=("7421",),
    max_new_tokens=5,
    metric="string_match_all",
    context_length=None,
    evidence=((6, 32),),
)

STRIPPING = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'THINK' if enable_thinking else 'NO' }}{% endif %}"
)


def from_kvpress(
    tokenizer: Any, context: str, question: str, prefix: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What kvpress's own pipeline makes of the same texts."""
    from kvpress.pipeline import KVPressTextGenerationPipeline

    pipeline = KVPressTextGenerationPipeline.__new__(KVPressTextGenerationPipeline)
    pipeline.tokenizer = tokenizer
    made = pipeline.preprocess(context, [question], prefix, max_context_length=10**6)
    return made["context_ids"], made["questions_ids"][0]


@pytest.fixture(params=["template", "stripping template", "no template"])
def tokenizer(request: pytest.FixtureRequest, toy_tokenizer: Any) -> Any:
    import toy

    made = toy.toy_tokenizer()
    if request.param == "stripping template":
        made.chat_template = STRIPPING
    elif request.param == "no template":
        made.chat_template = None
    return made


def test_ids_are_those_of_kvpress(tokenizer: Any) -> None:
    prompt = assemble(EXAMPLE, tokenizer)
    context, question = from_kvpress(tokenizer, EXAMPLE.context, EXAMPLE.question, EXAMPLE.answer_prefix)
    assert torch.equal(prompt.context_ids, context)
    assert torch.equal(prompt.question_ids, question)


def test_query_aware_ids_are_those_of_kvpress(tokenizer: Any) -> None:
    prompt = assemble(EXAMPLE, tokenizer, query_aware=True)
    context, question = from_kvpress(tokenizer, EXAMPLE.context + EXAMPLE.question, "", EXAMPLE.answer_prefix)
    assert torch.equal(prompt.context_ids, context)
    assert torch.equal(prompt.question_ids, question)
    assert tokenizer.decode(prompt.context_ids[0]).endswith(EXAMPLE.question)


@pytest.mark.parametrize("query_aware", [False, True])
def test_evidence_points_at_the_tokens_of_the_answer(tokenizer: Any, query_aware: bool) -> None:
    prompt = assemble(EXAMPLE, tokenizer, query_aware=query_aware)
    ((start, end),) = prompt.evidence
    assert tokenizer.decode(prompt.context_ids[0, start:end]) == "key of the tower is 7421. "


def test_evidence_behind_characters_of_several_bytes(tokenizer: Any) -> None:
    at = EXAMPLE.context.index("“all”")
    prompt = assemble(replace(EXAMPLE, evidence=((at, at + 5),)), tokenizer)
    ((start, end),) = prompt.evidence
    assert tokenizer.decode(prompt.context_ids[0, start:end]) == "“all”"
    assert end - start == len("“all”".encode())  # one toy token per byte


def test_the_same_ids_have_the_same_sha_and_others_another(tokenizer: Any) -> None:
    one = assemble(EXAMPLE, tokenizer)
    assert one.sha == assemble(EXAMPLE, tokenizer).sha
    moved = replace(EXAMPLE, context=EXAMPLE.context[:-1], question=" " + EXAMPLE.question)
    shas = {
        one.sha,
        assemble(replace(EXAMPLE, question="Why?"), tokenizer).sha,
        assemble(moved, tokenizer).sha,
    }
    shas.add(assemble(EXAMPLE, tokenizer, query_aware=True).sha)
    assert len(shas) == 4


def test_a_context_that_is_too_long_is_an_error_or_cut_at_its_end(tokenizer: Any) -> None:
    whole = assemble(EXAMPLE, tokenizer)
    fits = assemble(EXAMPLE, tokenizer, max_tokens=whole.total_tokens)
    assert fits.sha == whole.sha
    limit = whole.total_tokens - 9
    with pytest.raises(ConfigError, match=f"take {whole.total_tokens} tokens, the model allows {limit}"):
        assemble(EXAMPLE, tokenizer, max_tokens=limit)
    cut = assemble(EXAMPLE, tokenizer, max_tokens=limit, truncate=True)
    assert limit - 3 <= cut.total_tokens <= limit  # a character may be three tokens
    n = cut.context_tokens
    assert EXAMPLE.context.startswith(cut.example.context)
    assert torch.equal(cut.question_ids, whole.question_ids)
    if tokenizer.chat_template != STRIPPING:
        assert torch.equal(cut.context_ids, whole.context_ids[:, :n])


def test_truncating_spares_the_question_and_drops_evidence_that_is_gone(tokenizer: Any) -> None:
    whole = assemble(EXAMPLE, tokenizer, query_aware=True)
    cut = assemble(EXAMPLE, tokenizer, query_aware=True, max_tokens=whole.total_tokens - 30, truncate=True)
    assert tokenizer.decode(cut.context_ids[0]).endswith(EXAMPLE.question)
    ((start, end),) = cut.evidence
    assert "key of the tower".startswith(tokenizer.decode(cut.context_ids[0, start:end])[:16])
    assert end <= cut.context_tokens
    none = assemble(
        EXAMPLE, tokenizer, max_tokens=whole.total_tokens - len(EXAMPLE.context.encode()) + 4, truncate=True
    )
    assert none.evidence == ()


def test_a_question_that_is_too_long_alone_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="question and answer alone"):
        assemble(EXAMPLE, tokenizer, max_tokens=20, truncate=True)


def test_perplexity_reads_plain_text_and_scores_the_reference(tokenizer: Any) -> None:
    text = replace(EXAMPLE, metric=PERPLEXITY, question="", answer_prefix="", references=(" It thawed.",))
    prompt: Prompt = assemble(text, tokenizer)
    assert prompt.is_scored_text
    assert tokenizer.decode(prompt.context_ids[0]) == tokenizer.bos_token + EXAMPLE.context
    assert tokenizer.decode(prompt.question_ids[0]) == " It thawed."
    assert prompt.total_tokens == prompt.context_tokens + len(" It thawed.")
