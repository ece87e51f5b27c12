"""Perplexity of a text that follows a compacted context. Knows caches; nothing of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.steps import reads_by_step
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError

LOGITS_AT_ONCE = 2**25
"""Logits held at a time (128 MB in fp32): long continuations are fed in pieces."""


@torch.no_grad()
def continuation_perplexity(model: Any, cache: SparseCache, token_ids: Tensor) -> list[float]:
    """exp of the mean negative log-likelihood of a continuation, for every row of a cache; the cache is used
    up.

    Parameters
    ----------
    token_ids : LongTensor [1, C]
        The continuation. Its first token is given: the context alone would predict it, before anything was
        evicted. Tokens 2 to C are scored, each from the compacted context and the tokens before it.

    Returns
    -------
    list of float, one per cache row
    """
    total = token_ids.shape[1]
    if total < 2:
        raise ConfigError(f"a continuation needs at least 2 tokens to be scored, got {total}")
    rows = cache.batch
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    step = max(1, LOGITS_AT_ONCE // (rows * vocabulary))
    if reads_by_step(cache) or isinstance(cache, TieredCache):
        step = 1  # several tokens at once read all that is stored, or what the last of them recall
    nll = torch.zeros(rows, dtype=torch.float64)
    for begin in range(0, total - 1, step):
        piece = token_ids[:, begin : min(begin + step, total - 1)].expand(rows, -1)
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits.float()
        targets = token_ids[:, begin + 1 : begin + 1 + piece.shape[1]].expand(rows, -1)
        chosen = logits.log_softmax(dim=-1).gather(-1, targets[..., None].to(logits.device))
        nll -= chosen.sum(dim=(1, 2)).double().cpu()
    if not bool(nll.isfinite().all()):
        raise ConfigError(f"perplexity is not finite in {model.dtype}; use dtype float32 or bfloat16")
    return (nll / (total - 1)).exp().tolist()
