"""Attention of the newest queries (the observation window of SnapKV, arXiv 2404.14469), and what is made of it.

Shape letters: B batch, H kv heads, G query heads per kv head, W observing queries, T stored entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError
from sparsekv.policies.attention_scores import attention_weights
from sparsekv.policies.base import LayerContext
from sparsekv.policies.sizes import check_size

ALWAYS = 1e38
"""Scores from here up are of entries that stay under any budget that holds them (see `with_window`)."""


def window_attention(ctx: LayerContext, window: int) -> Tensor:
    """Weights that the newest queries give to the entries: a causal softmax over all of them.

    Parameters
    ----------
    ctx : LayerContext
    window : int >= 1
        Observing queries at most: fewer where this forward has fewer, or entries between them are gone.

    Returns
    -------
    FloatTensor [B, H, G, W, T], fp32
    """
    total = ctx.keys.shape[2]
    hidden, rotary = ctx.observing(window)
    columns = torch.arange(total - hidden.shape[1], total, device=ctx.keys.device)
    return attention_weights(ctx.module, hidden, ctx.keys, rotary, columns)


def pooled(scores: Tensor, kernel_size: int, kind: Literal["mean", "max"]) -> Tensor:
    """Scores [..., n] smoothed over `kernel_size` (odd) neighbours, so that a token's surroundings stay with it.

    At the ends the mean counts what is missing as zero, as SnapKV does.
    """
    if not scores.shape[-1]:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    pool = nn.functional.avg_pool1d if kind == "mean" else nn.functional.max_pool1d
    return pool(flat, kernel_size, stride=1, padding=kernel_size // 2).view(scores.shape)


def with_window(scores: Tensor, window: int) -> Tensor:
    """Scores [..., n] of earlier entries, then those of `window` entries that always stay; the newest comes first."""
    rank = torch.arange(1, window + 1, device=scores.device, dtype=torch.float32)
    always = (ALWAYS * (1 + rank / max(window, 1))).expand(*scores.shape[:-1], window)
    return torch.cat([scores.float(), always], dim=-1)


def check_window(method: str, window: int, kernel_size: int | None) -> None:
    """Raise a `ConfigError` unless `window` is at least 1 and `kernel_size` odd and at least 1."""
    check_size(method, "window", window, 1)
    if kernel_size is None:
        return
    check_size(method, "kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ConfigError(f"{method}: kernel_size must be odd, got {kernel_size}; use {kernel_size + 1}")
