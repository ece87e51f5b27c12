"""Compact a stock DynamicCache in place, by one list of columns for all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from sparsekv.cache.layer import SparseLayer
from sparsekv.errors import ConfigError


def evict_dynamic_cache_inplace(cache: Cache, keep_idx: Tensor | Sequence[int]) -> Cache:
    """Keep only the entries at `keep_idx` (columns, any order, duplicates ignored) in every full-attention layer.

    The layers are replaced, because a stock layer cannot report seen != stored: afterwards `get_seq_length()` is still
    the number of tokens seen, and later tokens get the right positions under any attention implementation. For rows
    without padding: a pad at a kept column would be seen by later tokens (`compress` takes an attention_mask).

    Parameters
    ----------
    cache : DynamicCache
    keep_idx : LongTensor [n] or sequence of int, each in [0, T)

    Returns
    -------
    Cache
        The same object.

    Raises
    ------
    ConfigError
        For another cache type, an empty list, or an index out of range.
    """
    if type(cache) is not DynamicCache:
        raise ConfigError(
            f"evict_dynamic_cache_inplace takes a DynamicCache, got {type(cache).__name__}: "
            "static, quantized and offloaded caches can't be compacted"
        )
    if cache.offloading:
        raise ConfigError("evict_dynamic_cache_inplace takes a DynamicCache without offloading")
    given = torch.as_tensor(keep_idx)
    if given.numel() and (given.dtype == torch.bool or given.is_floating_point()):
        raise ConfigError(f"keep_idx must hold column indices (whole numbers), got {given.dtype}")
    indices = given.long().cpu().unique()
    seen = cache.get_seq_length()
    if indices.numel() == 0:
        raise ConfigError("keep_idx is empty: at least one entry must stay")
    if int(indices[0]) < 0 or int(indices[-1]) >= seen:
        raise ConfigError(f"keep_idx must lie in [0, {seen}), got {int(indices[0])}…{int(indices[-1])}")
    layers: list[CacheLayerMixin] = []
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers.append(layer)
            continue
        if not isinstance(layer, (DynamicLayer, SparseLayer)):
            raise ConfigError(f"cache layer {type(layer).__name__} can't be compacted")
        sparse = layer
        if not isinstance(layer, SparseLayer):
            sparse = SparseLayer()
            sparse.update(layer.keys, layer.values)
        kept = torch.zeros(1, 1, sparse.get_seq_length(), dtype=torch.bool)
        kept[..., indices] = True
        sparse.keep(kept.expand(sparse.batch, 1, -1))
        layers.append(sparse)
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return cache
