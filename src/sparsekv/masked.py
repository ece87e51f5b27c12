"""Attention of a whole sequence under eviction, with nothing freed: the training side of a Selection.

Shape letters: B rows, Hq query heads, H kv heads, G = Hq / H, Q queries, T tokens (columns), D head size.

Two ways that give the same numbers. In general a mask is built from `evicted_at`. Where every row evicts at one
boundary b only (what compression after a prefill does), the square is split, and no mask of size T x T exists:

              keys  s .. b        b .. T
    queries s .. b  causal        -                stock attention, no mask
    queries b .. T  kept only     causal           kept keys gathered, or soft weights added
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsekv.errors import ConfigError
from sparsekv.selection import NEVER

LEAST_LOG_WEIGHT = -1e4
"""Nothing is left of an entry under it, in any type."""

Boundary = tuple[int, int]
"""(first real column, first column that misses what was evicted) of one row."""


def attend_selected(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    evicted_at: Tensor,
    log_weight: Tensor | None,
    boundaries: Sequence[Boundary] | None,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention output [B, Q, Hq, D] where `evicted_at` hides entries from later queries.

    Parameters
    ----------
    query : [B, Hq, Q, D], the last Q columns
    key, value : [B, H, T, D]
    evicted_at : IntTensor [B, H or 1, T]
    log_weight : FloatTensor [B, H or 1, T], optional
        Added to the logits instead of -inf where an entry would be hidden; differentiable.
    boundaries : one per row, optional
        Given if each row evicts at one column only; see `Selection.boundaries`.
    attention_mask : BoolTensor [B or 1, 1, Q, T], optional
        None: plain causal.
    """
    hides = any(end < key.shape[2] for _, end in boundaries or ())
    if boundaries is not None and hides and _fits(query, key, evicted_at, boundaries, attention_mask):
        if len(set(boundaries)) == 1:
            return _attend_split(
                module, query, key, value, evicted_at, log_weight, boundaries[0], dropout, scaling, **kwargs
            )
        rows = [
            _attend_split(
                module,
                query[i : i + 1],
                key[i : i + 1],
                value[i : i + 1],
                evicted_at[i : i + 1],
                None if log_weight is None else log_weight[i : i + 1],
                boundary,
                dropout,
                scaling,
                **kwargs,
            )
            for i, boundary in enumerate(boundaries)
        ]
        return torch.cat(rows)
    bias = selection_bias(evicted_at, log_weight, attention_mask, query, key.shape[2])
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)
    mask = attention_mask if bias is None else bias
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]


def selection_bias(
    evicted_at: Tensor, log_weight: Tensor | None, attention_mask: Tensor | None, query: Tensor, total: int
) -> Tensor | None:
    """What is added to (or, as a bool, allowed in) the attention logits; None if nothing is hidden.

        bias(q, k) = -inf if q < k;  0 if q < evicted_at[k];  else log_weight[k], or -inf where there is none

    Parameters
    ----------
    evicted_at : IntTensor [B, H or 1, T]
    log_weight : FloatTensor [B, H or 1, T], optional
    attention_mask : BoolTensor [B or 1, 1, Q, T] or None (plain causal)
    query : [B, Hq, Q, D]; its queries are the last Q columns
    total : int
        T, the number of keys.

    Returns
    -------
    BoolTensor, or FloatTensor if soft, [B, H or 1, Q, T]
    """
    n_query = query.shape[2]
    evicted_at = evicted_at.to(query.device)
    if evicted_at.shape[-1] > total:
        raise ConfigError(f"the selection covers {evicted_at.shape[-1]} columns, the model sees {total}")
    evicted_at = nn.functional.pad(evicted_at, (0, total - evicted_at.shape[-1]), value=NEVER)
    hidden = evicted_at < total
    if attention_mask is not None:
        hidden &= evicted_at > 0  # the mask hides the padding already
    if log_weight is None and not bool(hidden.any()):
        return None
    columns = torch.arange(total, device=query.device)
    queries = columns[total - n_query :]
    causal = columns <= queries[:, None]
    allowed = causal if attention_mask is None else attention_mask
    visible = queries[:, None] < evicted_at[:, :, None, :]
    if log_weight is None:
        return visible & allowed
    log_weight = nn.functional.pad(log_weight, (0, total - log_weight.shape[-1])).to(
        query.device, query.dtype
    )
    soft = torch.where(
        visible, torch.zeros((), dtype=query.dtype, device=query.device), log_weight[:, :, None, :]
    )
    return soft.masked_fill(~(allowed & (evicted_at > 0)[:, :, None, :]), float("-inf"))


def _fits(
    query: Tensor,
    key: Tensor,
    evicted_at: Tensor,
    boundaries: Sequence[Boundary],
    attention_mask: Tensor | None,
) -> bool:
    """True if the split applies: a whole sequence, and padding where the Selection has it."""
    total = key.shape[2]
    if query.shape[2] != total or evicted_at.shape[-1] != total or len(boundaries) != query.shape[0]:
        return False
    starts = torch.tensor([start for start, _ in boundaries], device=query.device)
    if attention_mask is None:
        return not bool(starts.any())
    if attention_mask.dtype != torch.bool:
        return False
    real = torch.arange(total, device=query.device) >= starts[:, None]
    return bool((attention_mask[:, 0, -1] == real).all())


def _attend_split(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    evicted_at: Tensor,
    log_weight: Tensor | None,
    boundary: Boundary,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Rows that all start and evict at the same columns. Returns [B, Q, Hq, D]."""
    start, end = boundary
    total = key.shape[2]
    end = min(end, total)
    parts = []
    if start:
        parts.append(query.new_zeros(query.shape[0], start, query.shape[1], query.shape[3]))
    if end > start:
        before = (x[:, :, start:end] for x in (query, key, value))
        parts.append(sdpa_attention_forward(module, *before, None, dropout, scaling, **kwargs)[0])
    if end < total:
        parts.append(_attend_after(query, key, value, evicted_at, log_weight, start, end, dropout, scaling))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _attend_after(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    evicted_at: Tensor,
    log_weight: Tensor | None,
    start: int,
    end: int,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The queries from column `end` on: they see what was kept of [start, end), and one another causally."""
    batch, n_heads, total, width = query.shape
    heads, n_query = key.shape[1], total - end
    groups = n_heads // heads
    tail = torch.ones(n_query, n_query, dtype=torch.bool, device=query.device).tril()
    kept = evicted_at[:, :, start:end].to(query.device) > end
    counts = kept.sum(-1)
    mask: Tensor
    if log_weight is not None:
        weight = log_weight[:, :, start:end].to(query.device).masked_fill(kept, 0.0)
        folded = query[:, :, end:].reshape(batch, heads, groups * n_query, width)
        output = _attend_weighted(
            folded, key[:, :, start:], value[:, :, start:], weight, tail, dropout, scaling
        )
        return output.reshape(batch, n_heads, n_query, width).transpose(1, 2)
    if bool((counts == counts.flatten()[0]).all()):
        index = kept.nonzero()[:, 2].view(batch, kept.shape[1], -1, 1).expand(-1, heads, -1, width)
        key, value = (
            torch.cat([x[:, :, start:end].gather(2, index), x[:, :, end:]], dim=2) for x in (key, value)
        )
        mask = nn.functional.pad(tail, (key.shape[2] - n_query, 0), value=True)[None, None]
    else:
        mask = torch.cat(
            [kept[:, :, None].expand(-1, -1, n_query, -1), tail.expand(*kept.shape[:2], -1, -1)], dim=-1
        )
        key, value = key[:, :, start:], value[:, :, start:]
    folded = query[:, :, end:].reshape(batch, heads, groups * n_query, width)
    if mask.shape[0] != batch or mask.shape[1] != heads:
        mask = mask.expand(mask.shape[0], mask.shape[1], -1, -1)
    output = nn.functional.scaled_dot_product_attention(
        folded, key, value, mask.repeat(1, 1, groups, 1), dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, n_heads, n_query, width).transpose(1, 2)


def _attend_weighted(
    folded: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor,
    tail: Tensor,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attention with one added logit per entry, the same for all queries: differentiable, and no soft mask exists.

    A fused kernel gives no gradient of a mask. So the weight is a further channel of the keys, met by a constant
    channel of the queries; two channels hold it to twice the precision of the type.

    Parameters
    ----------
    folded : [B, H, G * Q, D], a kv head's query heads one after the other
    key, value : [B, H, n + Q, D]
    log_weight : FloatTensor [B, H or 1, n], of the first entries
    tail : BoolTensor [Q, Q], which of the last ones a query sees
    """
    heads, total, width = key.shape[1:]
    n_query, n_context = tail.shape[0], log_weight.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    constant = 2.0 ** -round(
        math.log2(scale)
    )  # scale * constant is about 1, and the constant exact in any type
    extra = log_weight.float().clamp_min(LEAST_LOG_WEIGHT) / (scale * constant)
    high = extra.to(key.dtype)
    channels = torch.stack([high, (extra - high.float()).to(key.dtype)], dim=-1).expand(-1, heads, -1, -1)
    spare = -(width + 2) % 8  # fused kernels want a multiple of 8
    key = torch.cat([key, nn.functional.pad(channels, (0, spare, 0, total - n_context))], dim=-1)
    ones = folded.new_zeros(2 + spare)
    ones[:2] = constant
    query = torch.cat([folded, ones.expand(*folded.shape[:3], -1)], dim=-1)
    mask = nn.functional.pad(tail, (n_context, 0), value=True)
    mask = mask.repeat(folded.shape[2] // n_query, 1)[None, None]
    output = nn.functional.scaled_dot_product_attention(
        query, key, nn.functional.pad(value, (0, 2 + spare)), mask, dropout_p=dropout, scale=scale
    )
    return output[..., :width]
