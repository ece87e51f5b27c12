"""One question about one text, and what the answer cost beside the full cache."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sparsekv.architecture import max_context
from sparsekv.benchmarks.base import Example
from sparsekv.cache.step_report import attended_fractions
from sparsekv.errors import ConfigError
from sparsekv.evaluation.advice import CONFIG, Advice
from sparsekv.evaluation.answers import Answerer, end_ids
from sparsekv.evaluation.cells import UNCOMPRESSED, Setting, Task, in_own_phase, resolve
from sparsekv.evaluation.cost import read_alone
from sparsekv.evaluation.native import native_reply
from sparsekv.evaluation.plan import check_combinations, try_budgets
from sparsekv.evaluation.prompts import Prompt, assemble
from sparsekv.generation import greedy_decode
from sparsekv.models import load_model, load_tokenizer
from sparsekv.models.load import load_config
from sparsekv.policies.base import NativePolicy
from sparsekv.policies.budget import Budget


@dataclass(frozen=True)
class Report:
    """An answer and its cost. Seconds, bytes, tokens per second; None where it can't be told apart.

    `attended_fraction`: stored entries that the last decoding step attended to; 1.0 unless the method's steps choose.
    """

    answer: str
    method: str
    context_tokens: int
    achieved_compression: float
    cache_bytes: int
    full_cache_bytes: int
    prefill_s: float | None
    select_s: float | None
    answer_s: float
    new_tokens: int | None
    attended_fraction: float = 1.0

    def lines(self) -> list[str]:
        """The cost in a few lines for people."""
        kept = 1 - self.achieved_compression
        parts = []
        if self.prefill_s is not None:
            parts.append(f"prefill {self.prefill_s:.2f} s")
        if self.select_s is not None:
            parts.append(f"select {self.select_s:.2f} s")
        speed = (
            ""
            if self.new_tokens is None
            else f" ({self.new_tokens} tokens, {self.new_tokens / self.answer_s:.1f}/s)"
        )
        parts.append(f"answer {self.answer_s:.2f} s{speed}")
        share = self.cache_bytes / self.full_cache_bytes if self.full_cache_bytes else 1.0
        step = f"; a step reads {self.attended_fraction:.1%} of it" if self.attended_fraction < 1 else ""
        return [
            f"context      {self.context_tokens} tokens, {self.method}: achieved compression "
            f"{self.achieved_compression:.3f} ({kept:.1%} kept{step})",
            f"cache        {self.cache_bytes / 1e6:.2f} MB, {share:.1%} of the full cache's "
            f"{self.full_cache_bytes / 1e6:.2f} MB",
            f"time         {', '.join(parts)}",
        ]


def ask(
    text: str,
    question: str,
    *,
    model: str,
    method: str,
    budget: Budget,
    adapter: str | None = None,
    chunk: int | None = None,
    query_aware: bool = False,
    truncate: bool = False,
    max_new_tokens: int = 128,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    advice: Advice = CONFIG,
) -> Report:
    """Answer `question` about `text` with a method at a budget; the parameters are those of `EvalConfig`.

    `advice` says how messages call them.

    Raises
    ------
    ConfigError
        As `sparsekv eval` does, before weights are loaded.
    """
    if max_new_tokens < 1 or (chunk is not None and chunk < 1):
        raise ConfigError(f"max_new_tokens and chunk must be at least 1, got {max_new_tokens} and {chunk}")
    name = resolve(method)
    setting = Setting(
        method=name,
        args={},
        label=name,
        compression_ratio=0.0 if name == UNCOMPRESSED else budget.compression_ratio,
        budget_tokens=None if name == UNCOMPRESSED else budget.tokens,
        budget_scope=budget.scope,
        phase="prefill",
        query_aware=query_aware,
        chunk=chunk,
    )
    setting = in_own_phase(setting)
    check_combinations([setting], advice)
    example = Example(
        example_id="ask",
        benchmark="ask",
        task="ask",
        context=text.rstrip() + "\n\n",
        question=question,
        answer_prefix="",
        references=("",),
        max_new_tokens=max_new_tokens,
        metric="string_match_part",
        context_length=None,
    )
    model_config = load_config(model)
    longest = max_context(model_config)
    tokenizer = load_tokenizer(model)
    prompt = assemble(
        example,
        tokenizer,
        query_aware=query_aware,
        max_tokens=None if chunk is not None else longest,
        truncate=truncate,
        advice=advice,
    )
    try:
        try_budgets([setting], {Task("ask", "ask", None): [prompt]}, model_config, tokenizer, longest, advice)
    except ConfigError as error:
        raise error if setting.budget.given else ConfigError(f"{error}; give {advice.budget}") from None
    loaded, tokenizer = load_model(model, adapter=adapter, dtype=dtype, device=device)
    return _answer(Answerer(loaded, tokenizer, seed, longest), setting, prompt)


def _answer(answerer: Answerer, setting: Setting, prompt: Prompt) -> Report:
    model, tokenizer = answerer.model, answerer.tokenizer
    policy = answerer.policy(setting)
    label = setting.label if setting.method == UNCOMPRESSED else f"{setting.label} at {setting.shown_budget}"
    begin = time.perf_counter()
    if isinstance(policy, NativePolicy):
        reply = native_reply(model, tokenizer, prompt, policy, setting.budget, end_ids(model))
        return Report(
            reply.prediction,
            label,
            prompt.context_tokens,
            reply.achieved_compression,
            reply.cache_bytes,
            reply.full_cache_bytes,
            None,
            None,
            time.perf_counter() - begin,
            None,
        )
    cache, prefill_s, select_s = read_alone(answerer, prompt, setting)
    sizes = cache.achieved_compression[0], cache.nbytes, cache.full_nbytes
    begin = time.perf_counter()
    ids = prompt.question_ids.to(model.device)
    answer = greedy_decode(model, cache, ids, prompt.max_new_tokens, end_ids(model))[0]
    answer_s = time.perf_counter() - begin
    said = str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return Report(
        said,
        label,
        prompt.context_tokens,
        *sizes,
        prefill_s,
        select_s,
        answer_s,
        len(answer.token_ids),
        attended_fractions(cache)[0],
    )
