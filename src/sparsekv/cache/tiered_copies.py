"""Copies of two-tier caches, their passive tier in CPU memory: one as it is, or several side by side as one batch.

Shape letters: B rows, H kv heads, S = B * H segments.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from sparsekv.cache.segments import Segments
from sparsekv.cache.tiered_layer import TieredLayer
from sparsekv.cache.window import WindowLayer

if TYPE_CHECKING:
    from sparsekv.cache.tiered import TieredCache


def copied(cache: TieredCache) -> TieredCache:
    """An independent cache with the same entries in both tiers."""
    twin = _empty_like(cache, cache.tiers.active.written())
    twin.tokenizer, twin.seeds = cache.tokenizer, cache.seeds
    twin.real, twin.ids = cache.real, cache.ids
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            store = layer.store.take_rows(torch.arange(layer.batch, device=layer.device))
            twin.layers[index] = _side_by_side(twin, index, [cache], store, layer.share, layer.asked_at)
        elif isinstance(layer, WindowLayer):
            twin.layers[index] = layer.fork(1)
    return twin


def recall_settings(cache: TieredCache) -> Hashable | None:
    """Caches of equal settings can be `joined`. None: with no other, its active size is in bytes for all rows.

    Active sizes in tokens may differ: each row keeps its own.
    """
    tiers = cache.tiers
    if tiers.active.tokens is None:
        return None
    return tiers.recall_tokens, tiers.page_size, tiers.n_sink, tiers.n_recent


def joined(caches: Sequence[TieredCache], seen: int) -> TieredCache:
    """The rows of all caches, whose `recall_settings` are equal, as if each had seen `seen` columns, padding first.

    All rows look for what to recall as if the last forward of several tokens had ended for all where it did for the
    latest. `real` is left to the caller.
    """
    active = [cache.tiers.active.tokens or 0 for cache in caches]
    twin = _empty_like(caches[0], max(active))
    for index in twin.compressible:
        layers = [cache.layers[index] for cache in caches]
        store = Segments.joined([layer.store for layer in layers], seen, [cache.real for cache in caches])
        shares = [
            (torch.ones(len(layer.store.counts)) if layer.share is None else layer.share).double()
            * own
            / max(active)
            for layer, own in zip(layers, active, strict=True)
        ]
        asked_at = max(
            layer.asked_at + seen - cache.seen for layer, cache in zip(layers, caches, strict=True)
        )
        twin.layers[index] = _side_by_side(twin, index, caches, store, torch.cat(shares), asked_at)
    return twin


def _empty_like(cache: TieredCache, active: int | str) -> TieredCache:
    tiers = cache.tiers
    twin = type(cache)(
        cache.config,
        active,
        recall_tokens=tiers.recall_tokens,
        page_size=tiers.page_size,
        n_sink=tiers.n_sink,
        n_recent=tiers.n_recent,
    )
    twin.fingerprint, twin.model_dtype = cache.fingerprint, cache.model_dtype
    return twin


def _side_by_side(
    twin: TieredCache,
    index: int,
    caches: Sequence[TieredCache],
    store: Segments,
    share: torch.Tensor | None,
    asked_at: int,
) -> TieredLayer:
    """A layer with the residents in `store`; what the caches hold in their passive tiers is put into the twin's."""
    layer, like = twin.fresh_layer(index), caches[0].layers[index]
    layer.dtype, layer.device, layer.is_initialized = like.dtype, like.device, True
    layer.n_kv_heads, layer.share, layer.asked_at = like.n_kv_heads, share, asked_at
    layer.replace_store(store)
    rows, shifts = [cache.batch for cache in caches], [store.seen - cache.seen for cache in caches]
    stores = [cache.tiers.store for cache in caches]
    twin.tiers.store.put_rows_of(index, stores, rows, layer.n_kv_heads, shifts)
    first = 0
    for cache, n_rows, shift in zip(caches, rows, shifts, strict=True):
        own, segments = cache.layers[index], first * layer.n_kv_heads
        if own.attended_passive is not None:
            layer.note_attended(own.attended_passive[0] + segments, own.attended_passive[1] + shift)
        if own.recalls is not None:
            layer.put_recalls(own.recalls, segments, shift)
        first += n_rows
    return layer
