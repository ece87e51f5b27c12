"""Methods that only kvpress's own hooks can run: its prefill, its generation loop, one example at a time.

Used for presses that change more than which entries stay (`NativePolicy`). The prompt's token ids are ours,
so that these methods see what all others see; everything after that is kvpress's pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv.architecture import compressible_layers, text_config
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.reply import Reply
from sparsekv.policies.base import NativePolicy
from sparsekv.policies.budget import Budget


class _DecodeRecorder:
    """Stands in for the pipeline's tokenizer: its generation loop hands over token ids only here."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []

    def decode(self, token_ids: Tensor, **kwargs: Any) -> str:
        self.token_ids = token_ids.tolist()
        return self.tokenizer.decode(token_ids, **kwargs)


def native_reply(
    model: Any, tokenizer: Any, prompt: Prompt, policy: NativePolicy, budget: Budget, eos_ids: set[int]
) -> Reply:
    """The answer of a kvpress press in kvpress's own pipeline, and what its cache holds afterwards."""
    text, ids, cache = _run(model, tokenizer, prompt, policy, budget, prompt.max_new_tokens)
    stored, full, n_bytes, full_bytes = _sizes(model, cache, prompt.context_tokens)
    return Reply(
        prediction=text,
        finish_reason="eos" if ids and ids[-1] in eos_ids and len(ids) > 1 else "length",
        achieved_compression=1 - stored / full if full else 0.0,
        cache_bytes=n_bytes,
        full_cache_bytes=full_bytes,
    )


def native_times(
    model: Any, tokenizer: Any, prompt: Prompt, policy: NativePolicy, budget: Budget, n_tokens: int
) -> tuple[float, float]:
    """(seconds for prefill, eviction and question; decoded tokens per second), of one answer of `n_tokens` >= 2.

    The first token is there when the model is called with it, which is n_tokens - 1 calls before the end.
    """
    calls: list[float] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(_now()))
    try:
        with _endless(model):
            begin = _now()
            _run(model, tokenizer, prompt, policy, budget, n_tokens)
            end = _now()
    finally:
        hook.remove()
    answering = calls[-(n_tokens - 1)]
    return answering - begin, (n_tokens - 1) / (end - answering)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _run(
    model: Any, tokenizer: Any, prompt: Prompt, policy: NativePolicy, budget: Budget, max_new_tokens: int
) -> tuple[str, list[int], DynamicCache]:
    from kvpress.pipeline import KVPressTextGenerationPipeline

    from sparsekv.policies.press_routes import refusing

    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    recorder = _DecodeRecorder(tokenizer)
    pipeline.tokenizer = recorder
    cache = DynamicCache()
    inputs = {"context_ids": prompt.context_ids, "questions_ids": [prompt.question_ids]}
    press = policy.press(budget)
    with torch.no_grad(), refusing(press, policy.name, alone=False):
        (text,) = pipeline._forward(inputs, max_new_tokens=max_new_tokens, press=press, cache=cache)
    return text, recorder.token_ids, cache


def _sizes(model: Any, cache: DynamicCache, context_tokens: int) -> tuple[int, int, int, int]:
    """Entries stored and of a full cache (over compressible layers), then bytes of both."""
    config = text_config(model)
    compressible = set(compressible_layers(config))
    stored = full = n_bytes = full_bytes = 0
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        size = sum(t.numel() * t.element_size() for t in (keys, values))
        length = keys.shape[-2]
        n_bytes += size
        if index in compressible:
            stored += length
            full += context_tokens
            full_bytes += size * context_tokens // max(length, 1)
        else:
            full_bytes += size
    return stored, full, n_bytes, full_bytes


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """No token ends an answer: every measured answer has the same length."""
    settings = model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = None
    try:
        yield
    finally:
        settings.eos_token_id = before
