"""A copy of a two-tier cache of one row, its passive tier in CPU memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsekv.cache.tiered_layer import TieredLayer
from sparsekv.cache.window import WindowLayer

if TYPE_CHECKING:
    from sparsekv.cache.tiered import TieredCache


def copied(cache: TieredCache) -> TieredCache:
    """An independent cache with the same entries in both tiers."""
    tiers = cache.tiers
    twin = type(cache)(
        cache.config,
        tiers.active.written(),
        recall_tokens=tiers.recall_tokens,
        page_size=tiers.page_size,
        n_sink=tiers.n_sink,
        n_recent=tiers.n_recent,
    )
    twin.fingerprint, twin.model_dtype = cache.fingerprint, cache.model_dtype
    twin.tokenizer, twin.seeds = cache.tokenizer, cache.seeds
    twin.real, twin.ids = cache.real, cache.ids
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            twin.layers[index] = _copied_layer(cache, twin, index, layer)
        elif isinstance(layer, WindowLayer):
            twin.layers[index] = layer.fork(1)
    return twin


def _copied_layer(cache: TieredCache, twin: TieredCache, index: int, layer: TieredLayer) -> TieredLayer:
    copy = twin.fresh_layer(index)
    copy.dtype, copy.device, copy.is_initialized = layer.dtype, layer.device, True
    copy.n_kv_heads, copy.share, copy.asked_at = layer.n_kv_heads, layer.share, layer.asked_at
    copy.replace_store(layer.store.take_rows(torch.arange(layer.batch, device=layer.device)))
    store = cache.tiers.store
    parts = [
        store.columns(index, row, head) for row in range(layer.batch) for head in range(layer.n_kv_heads)
    ]
    columns = torch.cat(parts)
    if len(columns):
        counts = torch.tensor([len(part) for part in parts]).view(layer.batch, layer.n_kv_heads)
        twin.tiers.store.put_layer(index, counts, columns, *store.peek_layer(index, counts, columns))
    return copy
