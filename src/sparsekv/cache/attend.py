"""Attention over what a cache layer stores.

Shape letters: B batch, Hq query heads, H kv heads, G = Hq / H, Q queries, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekv.cache.layer import SparseLayer


def attend_stored(
    layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of the newest Q tokens over everything a layer stores. Returns [B, Q, Hq, D].

    The G query heads of a kv head are folded into its queries ([segments, G * Q, D]), which keeps SDPA on its fused
    kernel without repeating keys; each group of equal segments is one call.
    """
    batch, n_heads, n_query, width = query.shape
    heads = layer.n_kv_heads
    folded = query.reshape(1, batch * heads, (n_heads // heads) * n_query, width)
    seen_tail = tail_mask(layer, attention_mask, n_query, query.device)
    groups = list(layer.groups())
    each = (
        folded.split([group.stop - group.start for group in groups], dim=1) if len(groups) > 1 else (folded,)
    )
    outputs = []
    for group, queries in zip(groups, each, strict=True):
        mask = None
        if seen_tail is not None:
            mask = seen_tail
            if mask.shape[0] > 1:  # rows differ (padding): [B, Q, tail] -> one mask per segment
                mask = mask.repeat_interleave(heads, dim=0)[group.start : group.stop]
            mask = nn.functional.pad(mask, (group.n_prefix, 0), value=True)
            mask = mask.repeat(1, n_heads // heads, 1)[None]
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                queries, group.keys[None], group.values[None], mask, scale=scaling
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.view(batch, n_heads, n_query, width).transpose(1, 2).contiguous()


def tail_mask(
    layer: SparseLayer, attention_mask: Tensor | None, n_query: int, device: torch.device
) -> Tensor | None:
    """BoolTensor [B or 1, Q, tail]: which tail entries each new query sees; None if all. Prefixes are always seen."""
    tail = layer.tail
    if attention_mask is not None:
        mask = attention_mask[:, 0, :, -tail:]
        if mask.dtype != torch.bool:
            mask = mask == 0
        if bool(mask.all()):
            return None
        return mask[:1] if bool((mask == mask[:1]).all()) else mask
    if n_query == 1:
        return None
    return torch.ones(n_query, tail, dtype=torch.bool, device=device).tril(tail - n_query)[None]
