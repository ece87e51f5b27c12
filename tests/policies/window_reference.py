"""Attention of the last queries from real eager attention weights: slow, and independent of the code under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eager_weights(model: Any, input_ids: Tensor) -> list[Tensor]:
    """Per layer, FloatTensor [B, Hq, T, T]: the weights that transformers' eager attention computes."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model.model(input_ids=input_ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return list(found)


def pooled_by_hand(values: list[float], kernel_size: int, kind: str) -> list[float]:
    """Mean (what is beyond the ends counts as 0) or maximum over a window of neighbours, one by one."""
    half, n = kernel_size // 2, len(values)
    out = []
    for i in range(n):
        around = values[max(0, i - half) : min(n, i + half + 1)]
        out.append(sum(around) / kernel_size if kind == "mean" else max(around))
    return out
