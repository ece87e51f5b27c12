"""Caches of different contexts, side by side as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError


def can_join(cache: SparseCache) -> bool:
    """True if nothing in a cache depends on its own columns or on more than it stores.

    No sliding window, no re-rotation, no later eviction, no second tier (also one that is still empty).
    """
    layers = [layer for _, layer in cache.sparse_layers()]
    plain = len(layers) == len(cache.layers) and not any(layer.reader is not None for layer in layers)
    return type(cache) is SparseCache and plain and cache.rotary is None and cache.decode is None


def join(caches: Sequence[SparseCache]) -> SparseCache:
    """The rows of all caches, one after the other. Copies; the caches stay as they are.

    All end at the same column: what saw fewer tokens than the longest counts as padded on the left, and the padding was
    never stored.

    Raises
    ------
    ConfigError
        If there is none, or one of them is empty or can't be joined (`can_join`).
    """
    if not caches or not all(can_join(cache) and cache.batch for cache in caches):
        raise ConfigError(
            "only caches that have read something can be joined, and that have no sliding window, re-rotated keys, "
            "readers, eviction while decoding or a second tier"
        )
    joined = SparseCache(caches[0].config)
    seen = max(cache.seen for cache in caches)
    for index in joined.compressible:
        joined.layers[index] = SparseLayer.joined([cache.layers[index] for cache in caches], seen)
    if any(cache.seen < seen or cache.real is not None for cache in caches):
        real = [pad(cache.real_columns().cpu(), (seen - cache.seen, 0), value=False) for cache in caches]
        joined.real = torch.cat(real).to(joined.sparse_layers()[0][1].store.keys.device)
    return joined
