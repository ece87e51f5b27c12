"""One question about one text, and what the answer cost beside the full cache."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sparsekv.architecture import max_context
from sparsekv.benchmarks.base import Example
from sparsekv.config import EvalConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.answers import Answerer, end_ids
from sparsekv.evaluation.cells import UNCOMPRESSED, Task, settings
from sparsekv.evaluation.native import native_reply
from sparsekv.evaluation.plan import check_combinations, load_model_config, try_budgets
from sparsekv.evaluation.prompts import assemble
from sparsekv.generation import greedy_decode
from sparsekv.models import load_model, load_tokenizer
from sparsekv.policies.base import NativePolicy


@dataclass(frozen=True)
class Report:
    """An answer and its cost. Seconds, bytes, tokens per second; None where it can't be told apart."""

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
        return [
            f"context      {self.context_tokens} tokens, {self.method}: achieved compression "
            f"{self.achieved_compression:.3f} ({kept:.1%} kept)",
            f"cache        {self.cache_bytes / 1e6:.2f} MB, {share:.1%} of the full cache's "
            f"{self.full_cache_bytes / 1e6:.2f} MB",
            f"time         {', '.join(parts)}",
        ]


def ask(config: EvalConfig, text: str, question: str) -> Report:
    """Answer `question` about `text` with the config's one method and budget.

    Raises
    ------
    ConfigError
        As `sparsekv eval` does, before weights are loaded.
    """
    chosen = settings(config)
    if len(chosen) != 1:
        raise ConfigError(f"one method and one budget are needed, got {len(chosen)}")
    setting = chosen[0]
    check_combinations(chosen)
    limit = config.max_new_tokens or 128
    example = Example(
        example_id="ask",
        benchmark="ask",
        task="ask",
        context=text.rstrip() + "\n\n",
        question=question,
        answer_prefix="",
        references=("",),
        max_new_tokens=limit,
        metric="string_match_part",
        context_length=None,
    )
    model_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    longest = max_context(model_config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    prompt = assemble(
        example,
        tokenizer,
        query_aware=config.query_aware,
        max_tokens=None if config.chunk is not None else longest,
        truncate=config.truncate,
    )
    try_budgets(chosen, {Task("ask", "ask", None): [prompt]}, model_config, tokenizer, longest)
    model, tokenizer = load_model(
        config.model,
        adapter=config.adapter,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    answerer = Answerer(model, tokenizer, config.seed, longest)
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
    select_s: float | None = None
    if answerer.shares_prefill(setting):
        read = answerer.read(prompt, {0: setting})
        forked = time.perf_counter()
        cache = read.cache.fork([read.selections[0]])
        prefill_s, select_s = read.prefill_s, read.select_s[0] + time.perf_counter() - forked
        del read
    else:
        cache = answerer.compress(prompt, setting)
        prefill_s = time.perf_counter() - begin
    sizes = cache.achieved_compression[0], cache.nbytes, cache.full_nbytes
    begin = time.perf_counter()
    ids = prompt.question_ids.to(model.device)
    answer = greedy_decode(model, cache, ids, prompt.max_new_tokens, end_ids(model))[0]
    answer_s = time.perf_counter() - begin
    text = str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return Report(
        text, label, prompt.context_tokens, *sizes, prefill_s, select_s, answer_s, len(answer.token_ids)
    )
