"""From an example to token ids, in one place and exactly as kvpress's pipeline does it.

The chat template is rendered around the context with a separator after it and split there: what stands
before belongs to the context, what stands after follows the question. Context and question are tokenised
separately, because the context is read before anyone knows the question:

    context_ids   <- template start + context                       (+ question, if query-aware)
    question_ids  <- question + template end + answer prefix        (without the question, if query-aware)

Perplexity is different: its context is read as plain text and what follows is the text to be scored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.chat import split_template
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.errors import ConfigError
from sparsekv.evaluation.advice import CONFIG, Advice


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Parameters
    ----------
    example : Example
    context_ids : LongTensor [1, T]
        What is read first and compressed.
    question_ids : LongTensor [1, Q]
        What follows; in perplexity the continuation that is scored.
    evidence : spans [start, end) of context tokens that hold the answer
    max_new_tokens : limit of the answer in tokens
    """

    example: Example
    context_ids: Tensor
    question_ids: Tensor
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int

    @property
    def context_tokens(self) -> int:
        """T."""
        return int(self.context_ids.shape[1])

    @property
    def total_tokens(self) -> int:
        """Longest sequence the model may see: context, question and answer."""
        answer = 0 if self.is_scored_text else self.max_new_tokens
        return self.context_tokens + int(self.question_ids.shape[1]) + answer

    @property
    def is_scored_text(self) -> bool:
        """True in perplexity: nothing is generated."""
        return self.example.metric == PERPLEXITY

    @property
    def sha(self) -> str:
        """sha256 of the token ids: the same prompt in every run, or the data has changed."""
        digest = hashlib.sha256()
        for ids in (self.context_ids, self.question_ids):
            digest.update(ids.to(torch.int64).numpy().tobytes())
            digest.update(b"|")
        return digest.hexdigest()


def assemble(
    example: Example,
    tokenizer: Any,
    *,
    query_aware: bool = False,
    max_tokens: int | None = None,
    truncate: bool = False,
    max_new_tokens: int | None = None,
    advice: Advice = CONFIG,
) -> Prompt:
    """Token ids of an example.

    Parameters
    ----------
    query_aware : bool
        The question becomes part of the context, so eviction knows it.
    max_tokens : int, optional
        What the model can read, answer included; None if it may be longer (chunked reading).
    truncate : bool
        Cut the end of a context that is too long, as kvpress does, instead of an error.
    max_new_tokens : int, optional
        Instead of the example's own limit.
    advice : Advice
        How messages call things.

    Raises
    ------
    ConfigError
        If the context is too long and must not be cut, or nothing of it would be left.
    """
    name = advice.example.format(example.example_id)
    limit = max_new_tokens or example.max_new_tokens
    prompt = _tokenise(example, tokenizer, query_aware, limit)
    if max_tokens is None or prompt.total_tokens <= max_tokens:
        return prompt
    if not truncate:
        raise ConfigError(
            f"{name}: context, question and answer take {prompt.total_tokens} tokens, "
            f"the model allows {max_tokens}; {advice.too_long}"
        )
    while prompt.total_tokens > max_tokens:
        excess = prompt.total_tokens - max_tokens
        context = _without_last_tokens(prompt.example.context, tokenizer, excess)
        if not context:
            raise ConfigError(
                f"{name}: question and answer alone take more than the {max_tokens} tokens that the model allows"
            )
        kept = tuple((a, min(b, len(context))) for a, b in example.evidence if a < len(context))
        prompt = _tokenise(replace(example, context=context, evidence=kept), tokenizer, query_aware, limit)
    return prompt


def _tokenise(example: Example, tokenizer: Any, query_aware: bool, max_new_tokens: int) -> Prompt:
    context, question = example.context, example.question
    if example.metric == PERPLEXITY:
        before = (tokenizer.bos_token or "") + context
        after = question + example.answer_prefix + example.references[0]
    else:
        if query_aware:
            context, question = context + question, ""
        before, suffix = split_template(tokenizer, context)
        after = question + suffix + example.answer_prefix
    encoded = tokenizer(
        before, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
    )
    question_ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
    offsets = encoded.get("offset_mapping")
    return Prompt(
        example=example,
        context_ids=torch.tensor([encoded["input_ids"]], dtype=torch.int64),
        question_ids=torch.tensor([question_ids], dtype=torch.int64),
        evidence=_token_spans(example, before, context, offsets),
        max_new_tokens=max_new_tokens,
    )


def _token_spans(
    example: Example, text: str, context: str, offsets: list[tuple[int, int]] | None
) -> tuple[tuple[int, int], ...]:
    """Character spans of the example's context -> spans of the tokens that overlap them."""
    if not example.evidence or not offsets:
        return ()
    start = text.find(context)
    if start < 0:  # a template may strip the message
        stripped = context.lstrip()
        start = text.find(stripped) - (len(context) - len(stripped))
        if text.find(stripped) < 0:
            return ()
    spans = []
    for begin, end in example.evidence:
        inside = [i for i, (a, b) in enumerate(offsets) if a < start + end and b > start + begin and b > a]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return tuple(spans)


def _without_last_tokens(text: str, tokenizer: Any, count: int) -> str:
    """`text` without about its last `count` tokens; always shorter than before."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        shorter = tokenizer.decode(ids[: max(0, len(ids) - count)])
        return shorter[: len(text) - 1]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if count >= len(offsets):
        return ""
    return text[: min(offsets[-count][0], len(text) - 1)]
