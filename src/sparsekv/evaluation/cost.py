"""What one cell costs when it runs alone: seconds, tokens per second, peak memory.

Kept apart from the scores, whose cells share a prefill and a batch. Every answer decodes the same number of
tokens (no token ends it), so that methods with short answers don't look fast.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsekv.cache.sparse import SparseCache
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.cells import Cell, Setting
from sparsekv.evaluation.native import native_times
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.records import CostRow
from sparsekv.generation import greedy_decode
from sparsekv.policies.base import NativePolicy


@contextmanager
def quick_collections() -> Iterator[None]:
    """Objects that live now are left out of garbage collections inside: each takes milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class PeakMemory:
    """Peak memory since it was made: allocated device memory (CUDA) or the process's resident memory (Linux).

    Weights are included in both. None where neither can be read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident = False
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier cells freed is not this cell's peak
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
            self._resident = True
        except (OSError, AttributeError):
            pass

    def read(self) -> int | None:
        """Bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._resident:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def read_alone(
    answerer: Answerer, prompt: Prompt, setting: Setting
) -> tuple[SparseCache, float, float | None]:
    """A setting's compacted cache (not of a native method), with the seconds to read the context and to select.

    `close` the cache after use. Selecting is scoring, choosing and compacting; None where a method's eviction is
    part of its prefill.
    """
    begin = _now(answerer.model)
    if not answerer.shares_prefill(setting):
        cache = answerer.compress(prompt, setting)
        return cache, _now(answerer.model) - begin, None
    read = answerer.read(prompt, {0: setting})
    begin = _now(answerer.model)
    cache = read.cache.fork([read.selections[0]])
    return cache, read.prefill_s, read.select_s[0] + _now(answerer.model) - begin


def measure(answerer: Answerer, cell: Cell, prompt: Prompt, n_tokens: int) -> CostRow:
    """Run one setting on one prompt, alone, decoding `n_tokens` >= 2.

    Returns
    -------
    CostRow
        `prefill_s`: reading the context; `select_s`: scoring, choosing and compacting (None where a method's
        eviction is part of its prefill); `question_s`: reading the question, which gives the first token (None where
        that is part of the prefill); `decode_tokens_per_s`: of the `new_tokens` after the first;
        `throughput_tokens_per_s`: all `new_tokens` over all these seconds; `peak_bytes`: see `PeakMemory`.
    """
    setting, model = cell.setting, answerer.model
    peak = PeakMemory(model.device)
    policy = answerer.policy(setting)
    select_s: float | None = None
    question_s: float | None = None
    if isinstance(policy, NativePolicy):
        prefill_s, rate = native_times(model, answerer.tokenizer, prompt, policy, setting.budget, n_tokens)
    else:
        cache, prefill_s, select_s = read_alone(answerer, prompt, setting)
        try:
            question_s, rate = _answer_times(model, cache, prompt, n_tokens)
        finally:
            cache.close()
    seconds = prefill_s + (select_s or 0.0) + (question_s or 0.0) + (n_tokens - 1) / rate
    return CostRow(
        cell_id=cell.cell_id,
        example_id=prompt.example.example_id,
        prefill_s=prefill_s,
        select_s=select_s,
        decode_tokens_per_s=rate,
        peak_bytes=peak.read(),
        new_tokens=n_tokens,
        question_s=question_s,
        throughput_tokens_per_s=n_tokens / seconds,
    )


def _answer_times(model: Any, cache: SparseCache, prompt: Prompt, n_tokens: int) -> tuple[float, float]:
    """(seconds until the answer's first token, tokens per second of the rest)."""
    ids = prompt.question_ids.to(model.device)
    begin = _now(model)
    first = greedy_decode(model, cache, ids, 1, ())[0].token_ids
    last = torch.tensor([first], device=model.device)
    answering = _now(model)
    greedy_decode(model, cache, last, n_tokens - 1, ())
    return answering - begin, (n_tokens - 1) / max(_now(model) - answering, 1e-9)


def can_measure(setting: Setting, prompt: Prompt, answerer: Answerer) -> bool:
    """False where there is nothing to time: a native method in perplexity."""
    return not (prompt.is_scored_text and isinstance(answerer.policy(setting), NativePolicy))


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
