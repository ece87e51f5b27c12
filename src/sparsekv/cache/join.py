"""Caches of different contexts, side by side as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch.nn.functional import pad

from sparsekv.cache import tiered_copies
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError


def join_key(cache: SparseCache) -> Hashable | None:
    """Caches of equal keys can be joined; None: it can't be joined with any.

    What depends on its own columns, or on more than a cache and its tiers hold, can't: a sliding window, re-rotated
    keys, later eviction, a method that chooses at every step what to read. Two tiers join if they recall alike; their
    active sizes (in tokens) may differ.
    """
    if cache.rotary is not None or cache.decode is not None or len(cache.compressible) < len(cache.layers):
        return None
    if isinstance(cache, TieredCache):
        settings = tiered_copies.recall_settings(cache)
        return None if settings is None else (TieredCache, settings)
    read_by_step = any(layer.reader is not None for _, layer in cache.sparse_layers())
    return None if read_by_step else SparseCache


def join(caches: Sequence[SparseCache]) -> SparseCache:
    """The rows of all caches, one after the other. Copies; the caches stay as they are.

    All end at the same column: what saw fewer tokens than the longest counts as padded on the left; padding is not
    stored, also where a cache stored some. A joint passive tier is in CPU memory; its pages are those of the caches.

    Raises
    ------
    ConfigError
        If there is none, or one of them is empty or can't be joined with the others (`join_key`).
    """
    keys = {join_key(cache) for cache in caches}
    if len(keys) != 1 or None in keys or not all(cache.batch for cache in caches):
        raise ConfigError(
            "only caches that have read something can be joined, and that have no sliding window, re-rotated keys, "
            "readers or eviction while decoding; two tiers only with two tiers that recall alike"
        )
    seen = max(cache.seen for cache in caches)
    tiered = [cache for cache in caches if isinstance(cache, TieredCache)]
    joined = tiered_copies.joined(tiered, seen) if tiered else _joined(caches, seen)
    if any(cache.seen < seen or cache.real is not None for cache in caches):
        real = [pad(cache.real_columns().cpu(), (seen - cache.seen, 0), value=False) for cache in caches]
        joined.real = torch.cat(real).to(joined.sparse_layers()[0][1].store.keys.device)
    return joined


def _joined(caches: Sequence[SparseCache], seen: int) -> SparseCache:
    joined = SparseCache(caches[0].config)
    for index in joined.compressible:
        layers = [cache.layers[index] for cache in caches]
        joined.layers[index] = SparseLayer.joined(layers, seen, [cache.real for cache in caches])
    return joined
