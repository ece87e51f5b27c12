"""Attention over what a cache layer stores.

Shape letters: B batch, Hq query heads, H kv heads, G = Hq / H, Q queries, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekv.cache import kernel
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.segments import Segments

_PIECE = 1536
"""Fewest entries of a piece: to put pieces together takes longer than to read the entries of shorter ones."""

_MOST_QUERIES = 32
"""torch's kernel takes blocks of so many queries: more of them keep further cores busy by themselves."""

_FLASH = (torch.float32, torch.bfloat16, torch.float16)
"""What a CPU's fused kernel computes in."""


def attend_stored(
    layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of the newest Q tokens over everything a layer stores. Returns [B, Q, Hq, D].

    The G query heads of a kv head are folded into its queries ([segments, G * Q, D]): keys need not be repeated. Where
    the compiled kernel is there, a new token is one call of it; else SDPA's fused kernel is called for each group of
    equal segments.
    """
    batch, n_heads, n_query, width = query.shape
    heads = layer.n_kv_heads
    folded = query.reshape(1, batch * heads, (n_heads // heads) * n_query, width)
    seen_tail = tail_mask(layer, attention_mask, n_query, query.device)
    output = _at_once(layer.store, folded[0], scaling) if seen_tail is None else None
    if output is None:
        output = _by_groups(layer, folded, seen_tail, scaling)
    return output.view(batch, n_heads, n_query, width).transpose(1, 2).contiguous()


def _at_once(store: Segments, queries: Tensor, scaling: float | None) -> Tensor | None:
    """Attention [segments, G * Q, D] by the compiled kernel; None where that is not there, or not for this."""
    sizes = (store.counts, store.tail, store.room)
    if not _few_on_cpu(queries, store.keys, store.values) or store.tail + min(store.counts, default=0) < 1:
        return None
    return kernel.attend(queries, store.keys, store.values, *sizes, scaling)


def _by_groups(layer: SparseLayer, folded: Tensor, seen_tail: Tensor | None, scaling: float | None) -> Tensor:
    """Attention [1, segments, G * Q, D] of `folded` queries of that shape, for masks [B or 1, Q, tail] or none."""
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
                mask = mask.repeat_interleave(layer.n_kv_heads, dim=0)[group.start : group.stop]
            mask = nn.functional.pad(mask, (group.n_prefix, 0), value=True)
            mask = mask.repeat(1, folded.shape[2] // mask.shape[1], 1)[None]
        outputs.append(_attend(queries, group.keys, group.values, mask, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention [1, g, Q, D] of queries [1, g, Q, D] over keys and values [g, n, D]."""
    pieces = 1 if mask is not None else _pieces(queries, keys, values)
    if pieces > 1:
        return _in_pieces(queries, keys, values, pieces, scaling)
    return nn.functional.scaled_dot_product_attention(queries, keys[None], values[None], mask, scale=scaling)


def _pieces(queries: Tensor, keys: Tensor, values: Tensor) -> int:
    """In how many pieces entries are read. A CPU's attention kernel reads a segment for few queries on one core: the
    others take part where segments are long and fewer than cores."""
    if keys.shape[1] < 2 * _PIECE or not keys.shape[0] or not _few_on_cpu(queries, keys, values):
        return 1
    return max(1, min(torch.get_num_threads() // keys.shape[0], keys.shape[1] // _PIECE))


def _few_on_cpu(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether these, [..., n, D], suit kernels that read entries for few queries, on the CPU and without gradient."""
    every = (queries, keys, values)
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and all(x.is_cpu and x.dtype == queries.dtype and x.stride(-1) == 1 for x in every)
        and queries.dtype in _FLASH
        and keys.shape == values.shape
        and 0 < queries.shape[-2] <= _MOST_QUERIES
        and not torch.is_autocast_enabled("cpu")  # which casts for the stock function alone
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in every))
    )


def _in_pieces(queries: Tensor, keys: Tensor, values: Tensor, pieces: int, scaling: float | None) -> Tensor:
    """`_attend`, each piece of the entries by itself, put together by their softmax sums (Flash-Decoding).

    Pieces are as long as the last, which takes the remainder: what two of them share, the first does not see.
    """
    n_segments, n, width = keys.shape
    step = n // pieces
    length = n - (pieces - 1) * step

    def cut(x: Tensor) -> Tensor:
        shape, strides = (pieces, n_segments, length, width), (step * x.stride(1), *x.stride())
        return x.as_strided(shape, strides, x.storage_offset())

    mask = None
    if length > step:
        mask = queries.new_zeros(pieces, 1, 1, length)
        mask[:-1, :, :, step:] = -torch.inf
    outputs, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.expand(pieces, -1, -1, -1), cut(keys), cut(values), attn_mask=mask, scale=scaling
    )
    shares = log_sums.softmax(dim=0)[..., None]
    return (outputs * shares).sum(dim=0, keepdim=True).to(queries.dtype)


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
